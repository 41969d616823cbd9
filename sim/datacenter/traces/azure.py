"""Azure's packing trace of 2020: requests for virtual machines in one zone over 14 days, in an SQLite file.

github.com/Azure/AzurePublicDataset, AzureTracesForPacking2020.md. Table `vm`: starttime and endtime in days since the
collection began; negative for guests that were there already, no endtime for those that stayed for more than 90 days.
Table `vmType`: core and memory of each type on each machine it can run on, as fractions of that machine.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

from sim.datacenter.traces.rows import (
    BadRow,
    Rows,
    fault,
    lasting,
    moment,
    number,
    readable,
    shown,
    whole_pages,
    whole_vcpus,
)
from sim.datacenter.traces.spool import Guest
from sim.datacenter.traces.trace import Trace
from sim.units import DAY

MAGIC: Final = b"SQLite format 3\0"

_COLUMNS: Final = {
    "vm": ("vmTypeId", "starttime", "endtime"),
    "vmType": ("vmTypeId", "machineId", "core", "memory"),
}
_BEFORE: Final = -math.inf
"""Least of a time: guests may have been there before the collection began."""
_LONGEST_VALUE: Final = 1 << 16
_MOST_TYPES: Final = 1 << 20
_REMEDY: Final = "fetch packing_trace_zone_a_v1.sqlite of AzureTracesForPacking2020 again, and unzip it"

_Types = Mapping[object, tuple[int, int] | str]
"""Memory in bytes and virtual processors of each type, or why it has none."""


def read(trace: Trace, rows: Rows) -> Iterator[Guest]:
    """Yield the guests in the order of the file."""
    file = trace.source
    with _opened(file) as database:
        types = _types(trace, database, rows)
        for row, (kind, start, end) in enumerate(_select(database, "vm"), 1):
            rows.read += 1
            try:
                arrival = moment(number(start, "starttime", _BEFORE), DAY, "starttime")
                leaves = None
                if end is not None:
                    leaves = lasting(arrival, moment(number(end, "endtime", _BEFORE), DAY, "endtime"))
                size = types.get(kind, "its type is not in vmType")
                if isinstance(size, str):
                    raise BadRow(size)
                yield Guest(arrival, row, leaves, *size, b"")
            except BadRow as bad:
                rows.leave_out(str(bad), f"{shown(file.name)}: vm row {row}")


def _types(trace: Trace, database: sqlite3.Connection, rows: Rows) -> _Types:
    """What guests of each type get on the machine asked for, or on the lowest numbered one."""
    types: dict[object, tuple[int, int] | str] = {}
    on: dict[object, float] = {}
    for row, (kind, machine, core, memory) in enumerate(_select(database, "vmType"), 1):
        if row > _MOST_TYPES:
            raise fault(trace.source, f"has more than {_MOST_TYPES:,} rows in vmType", _REMEDY)
        try:
            number_of = number(machine, "machineId")
            if trace.machine_id is not None and number_of != trace.machine_id:
                types.setdefault(kind, f"its type does not run on machine {trace.machine_id}")
            elif number_of < on.get(kind, float("inf")):
                types[kind] = _size(trace, number(core, "core"), number(memory, "memory"))
                on[kind] = number_of
        except BadRow as bad:
            types.setdefault(kind, "its type has no size that can be read")
            rows.read += 1
            rows.leave_out(str(bad), f"{shown(trace.source.name)}: vmType row {row}")
    return types


def _size(trace: Trace, core: float, memory: float) -> tuple[int, int]:
    """Memory and virtual processors for fractions of a machine."""
    if max(core, memory) > 1:
        raise BadRow("is larger than a machine")
    assert trace.machine is not None
    vcpus = whole_vcpus(core * trace.machine.cores * trace.vcpus_per_core)
    return whole_pages(memory * trace.machine.memory), vcpus


@contextmanager
def _opened(file: Path) -> Iterator[sqlite3.Connection]:
    """Open the file for reading only; whatever is wrong with it is one clear error."""
    with readable(file) as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise fault(file, "is no SQLite file", _REMEDY)
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
            database.text_factory = bytes
            _check_tables(file, database)
            yield database
    except (sqlite3.Error, ValueError, OverflowError) as error:
        raise fault(file, f"is damaged: {error}", _REMEDY) from None


def _check_tables(file: Path, database: sqlite3.Connection) -> None:
    for table, columns in _COLUMNS.items():
        kind = database.execute("SELECT type FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        # A view could hold any query, one without an end too.
        if kind != (b"table",):
            raise fault(file, f"has no table {table}", _REMEDY)
        names = {name for _, name, *_ in database.execute(f"PRAGMA table_info({table})")}
        if missing := [name for name in columns if name.encode() not in names]:
            raise fault(file, f"has no column {', '.join(missing)} in its table {table}", _REMEDY)


def _select(database: sqlite3.Connection, table: str) -> Iterable[tuple[Any, ...]]:
    return database.execute(f"SELECT {', '.join(_COLUMNS[table])} FROM {table}")
