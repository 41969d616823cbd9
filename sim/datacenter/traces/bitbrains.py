"""Virtual machines of the Bitbrains data centre in 2013 (GWA-T-12), as OpenDC keeps them in Parquet.

Two layouts (github.com/atlarge-research/opendc): `meta` and `trace`, with times of start, stop and of each sample, and
the later `tasks` and `fragments`, with a time of submission and durations. CPU in MHz. A sample says what was used
since the one before it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sim.datacenter.traces.rows import (
    LATEST,
    MOST_LEVELS,
    BadRow,
    Rows,
    fault,
    lasting,
    number,
    readable,
    shown,
    whole_pages,
    whole_vcpus,
)
from sim.datacenter.traces.spool import Guest, temporary
from sim.datacenter.traces.trace import Trace
from sim.errors import UserError
from sim.units import MILLISECOND

Floats = npt.NDArray[np.float64]

LAYOUTS: Final = (("meta.parquet", "trace.parquet"), ("tasks.parquet", "fragments.parquet"))

_META: Final = ("id", "start_time", "stop_time", "cpu_count", "cpu_capacity", "mem_capacity")
_TASKS: Final = ("id", "submission_time", "duration", "cpu_count", "cpu_capacity", "mem_capacity")
_TRACE: Final = ("id", "timestamp", "cpu_usage")
_FRAGMENTS: Final = ("id", "duration", "cpu_usage")
_MOST_GUESTS: Final = 1 << 20
_BATCH: Final = 1 << 16
_MOST_USE: Final = 1.25
"""A guest may use a little more than the nominal clock of its processors: 7 % of the samples of `bitbrains-small` are
above their capacity, by 6 % at most. Up to this share it is taken as all of the capacity; more is a fault."""
_REMEDY: Final = "fetch it again from OpenDC's traces"


@dataclass
class _Machine:
    """A guest before its samples are known; times in ms of the trace's clock."""

    start: int
    end: int
    row: int
    memory: int
    vcpus: int
    capacity: float
    """MHz."""
    clock: int = field(init=False)
    """End of its last sample in the order of the file."""

    def __post_init__(self) -> None:
        self.clock = self.start


def read(trace: Trace, rows: Rows) -> Iterator[Guest]:
    """Yield the guests in the order of the file that lists them; the first one starts at 0."""
    meta, samples = _files(trace.source)
    machines = _machines(trace, meta, rows)
    if not machines:
        return
    zero = min(machine.start for machine in machines.values())
    with temporary() as database:
        _put_in_order(database, machines, samples, rows)
        for name, machine in machines.items():
            levels = _levels(database, machine, trace.step)
            start, end = ((moment - zero) * MILLISECOND for moment in (machine.start, machine.end))
            if not len(levels):
                rows.mend("no sample of its CPU: it has its kind's load", f"{shown(meta.name)}: {_text(name)}")
            yield Guest(start, machine.row, end, machine.memory, machine.vcpus, levels.tobytes())


def _files(folder: Path) -> tuple[Path, Path]:
    """The list of guests and their samples, in the layout that is there."""
    for layout in LAYOUTS:
        if all((folder / name).is_file() for name in layout):
            return folder / layout[0], folder / layout[1]
    pairs = " or ".join(" and ".join(layout) for layout in LAYOUTS)
    raise fault(folder, "is no folder of a Bitbrains trace", f"it must hold {pairs}")


def _machines(trace: Trace, file: Path, rows: Rows) -> dict[object, _Machine]:
    """The guests by their id."""
    machines: dict[object, _Machine] = {}
    row = 0
    later = file.name == LAYOUTS[1][0]
    for batch in _batches(file, _TASKS if later else _META):
        for name, start, stop, cpus, capacity, memory in zip(*batch, strict=True):
            row += 1
            rows.read += 1
            try:
                begin = _ms(number(start, "its start"))
                end = _ms(number(stop, "its end") + (begin if later else 0))
                size = whole_pages(number(memory, "mem_capacity") * trace.memory_unit)
                vcpus, speed = whole_vcpus(number(cpus, "cpu_count")), number(capacity, "cpu_capacity")
                if not speed:
                    raise BadRow("cpu_capacity is 0")
                if name is None or name in machines:
                    raise BadRow("no id of its own")
                machines[name] = _Machine(begin, lasting(begin, end), row, size, vcpus, speed)
            except BadRow as bad:
                rows.leave_out(str(bad), f"{shown(file.name)}: row {row}")
            if len(machines) > _MOST_GUESTS:
                raise fault(file, f"lists more than {_MOST_GUESTS:,} guests", "take a part of it")
    return machines


def _ms(value: float) -> int:
    if value * MILLISECOND > LATEST:
        raise BadRow("a time more than a hundred years after 1970")
    return round(value)


def _put_in_order(database: sqlite3.Connection, machines: Mapping[object, _Machine], file: Path, rows: Rows) -> None:
    """Put the samples into a table, from which each guest's come in order of time."""
    database.execute("CREATE TABLE sample (guest INTEGER, at INTEGER, level REAL)")
    database.execute("BEGIN")
    database.executemany("INSERT INTO sample VALUES (?, ?, ?)", _samples(machines, file, rows))
    database.execute("COMMIT")
    database.execute("CREATE INDEX in_order ON sample (guest, at, level)")


def _samples(machines: Mapping[object, _Machine], file: Path, rows: Rows) -> Iterator[tuple[int, int, float]]:
    """Yield the row of the guest, the end and the level of each sample."""
    row = 0
    later = file.name == LAYOUTS[1][1]
    for batch in _batches(file, _FRAGMENTS if later else _TRACE):
        for name, when, usage in zip(*batch, strict=True):
            row += 1
            rows.read += 1
            try:
                machine = machines.get(name)
                if machine is None:
                    raise BadRow("a sample of a guest that is not listed")
                if later:
                    machine.clock += _ms(number(when, "duration"))
                at = _ms(machine.clock if later else number(when, "timestamp"))
                level = number(usage, "cpu_usage") / machine.capacity
                if at < machine.start:
                    raise BadRow("a sample from before the start of its guest")
                if level > _MOST_USE:
                    raise BadRow(f"CPU use is above {_MOST_USE:.0%} of the capacity")
            except BadRow as bad:
                rows.leave_out(str(bad), f"{shown(file.name)}: row {row}")
                continue
            if level > 1:
                rows.mend("CPU use is above the capacity, taken as all of it", f"{shown(file.name)}: row {row}")
            yield machine.row, at, min(level, 1.0)


def _levels(database: sqlite3.Connection, machine: _Machine, step: int) -> Floats:
    """CPU use of one guest averaged over steps (ns) from its start; a sample holds since the one before it."""
    found = database.execute("SELECT at, level FROM sample WHERE guest = ? ORDER BY at", (machine.row,)).fetchall()
    if not found:
        return np.zeros(0)
    ends, levels = np.array(found, np.float64).T
    ends = np.concatenate([[0.0], (ends - machine.start) * MILLISECOND])
    count = int(-(-ends[-1] // step))
    if count > MOST_LEVELS:
        raise UserError(f"a guest with more than {MOST_LEVELS:,} levels of CPU use; write a longer every")
    edges = np.minimum(np.arange(count + 1) * float(step), ends[-1])
    work = np.concatenate([[0.0], np.cumsum(levels * np.diff(ends))])
    mean: Floats = np.clip(np.diff(np.interp(edges, ends, work)) / np.diff(edges), 0.0, 1.0)
    return mean


def _batches(file: Path, columns: Sequence[str]) -> Iterator[list[list[Any]]]:
    """Yield the columns of a Parquet file as lists, some rows at a time; times as ms since 1970."""
    import pyarrow as pa
    from pyarrow import parquet

    with readable(file) as stream:
        try:
            table = parquet.ParquetFile(stream)
            _check_columns(file, table.schema_arrow, columns)
            for batch in table.iter_batches(_BATCH, columns=list(columns), use_threads=False):
                yield [_plain(batch.column(name)) for name in columns]
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise fault(file, f"is no Parquet file, or is damaged: {reason}", _REMEDY) from None


def _check_columns(file: Path, schema: Any, columns: Sequence[str]) -> None:
    from pyarrow import types

    if missing := [name for name in columns if name not in schema.names]:
        raise fault(file, f"has no column {', '.join(missing)}", f"it must have {', '.join(columns)}")
    for name in columns:
        kind = schema.field(name).type
        text = types.is_string(kind) or types.is_large_string(kind)
        figure = types.is_integer(kind) or types.is_floating(kind) or types.is_timestamp(kind)
        if not (figure or (text and name == "id")):
            raise fault(file, f"column {name} is of type {kind}", "it must be a number or a time")


def _plain(column: Any) -> list[Any]:
    import pyarrow as pa

    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("ms", column.type.tz), safe=False).cast(pa.int64())
    values: list[Any] = column.to_pylist()
    return values


def _text(name: object) -> str:
    return str(name)[:60].encode("utf-8", "replace").decode()
