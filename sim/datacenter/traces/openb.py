"""Alibaba's openb trace: pods of a GPU cluster in 2023, when each was made, placed and deleted, and the nodes.

github.com/alibaba/clusterdata, cluster-trace-gpu-v2023: times in seconds, CPU in thousandths of a core, memory in MiB.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from sim.datacenter.traces.rows import (
    BadRow,
    Rows,
    fault,
    lasting,
    moment,
    number,
    readable,
    shown,
    text_lines,
    whole_pages,
    whole_vcpus,
)
from sim.datacenter.traces.spool import Guest
from sim.datacenter.traces.trace import Trace
from sim.units import MIB, SECOND, format_bytes

PODS: Final = "openb_pod_list_default.csv"
NODES: Final = "openb_node_list_all_node.csv"

_POD = ("cpu_milli", "memory_mib", "creation_time", "deletion_time", "scheduled_time")
_NODE = ("cpu_milli", "memory_mib")


@dataclass(frozen=True, slots=True)
class NodeKind:
    """Hosts of one size."""

    count: int
    memory: int
    """Bytes."""
    cores: int

    def host(self) -> dict[str, str | int]:
        """The entry of `hosts` for them."""
        size = format_bytes(self.memory)
        return {"name": f"{self.cores}c-{size}", "count": self.count, "memory": size, "cores": self.cores}


def read(trace: Trace, rows: Rows) -> Iterator[Guest]:
    """Yield the pods in the order of the file.

    A pod runs from when it was placed until it was deleted; one that never was placed asks for as long as it waited.
    """
    file = trace.source / PODS if trace.source.is_dir() else trace.source
    for row, line, fields in _rows(file, _POD, rows):
        try:
            cpu, memory, *times = fields
            vcpus, size = _vcpus(cpu, trace.vcpus_per_core), _memory(memory)
            made, deleted = _seconds(times[0], _POD[2]), _seconds(times[1], _POD[3])
            placed = _seconds(times[2], _POD[4]) if times[2] else made
            if placed < made:
                raise BadRow("is placed before it was made")
            guest = Guest(made, row, made + lasting(placed, deleted) - placed, size, vcpus, b"")
        except BadRow as bad:
            rows.leave_out(str(bad), f"{shown(file.name)}:{line}")
            continue
        yield guest


# Pods come in a few sizes.
@lru_cache(maxsize=1 << 12)
def _vcpus(cpu_milli: bytes, per_core: float) -> int:
    return whole_vcpus(number(cpu_milli, "cpu_milli") / 1000 * per_core)


@lru_cache(maxsize=1 << 12)
def _memory(memory_mib: bytes) -> int:
    return whole_pages(number(memory_mib, "memory_mib") * MIB)


def _seconds(text: bytes, column: str) -> int:
    return moment(number(text, column), SECOND, column)


def nodes(trace: Trace, rows: Rows) -> Sequence[NodeKind]:
    """The sizes of the trace's nodes, smallest memory first; half a core is none."""
    if trace.format != "openb":
        raise fault(trace.source, f"traces of {trace.format} list no nodes", "name a folder of openb")
    file = node_list(trace)
    sizes: Counter[tuple[int, int]] = Counter()
    for _, line, fields in _rows(file, _NODE, rows):
        try:
            cores = int(number(fields[0], "cpu_milli")) // 1000
            if not cores:
                raise BadRow("less than a core")
            whole_vcpus(cores)
            sizes[_memory(fields[1]), cores] += 1
        except BadRow as bad:
            rows.leave_out(str(bad), f"{shown(file.name)}:{line}")
    rows.check(file, "openb's nodes")
    return [NodeKind(count, memory, cores) for (memory, cores), count in sorted(sizes.items())]


def node_list(trace: Trace) -> Path:
    """The file of the nodes, beside that of the pods."""
    folder = trace.source if trace.source.is_dir() else trace.source.parent
    return folder / NODES


def _rows(file: Path, columns: Sequence[str], rows: Rows) -> Iterator[tuple[int, int, Sequence[bytes]]]:
    """Yield number, line and the fields of *columns* of each row of a CSV file with a header and no quotes."""
    with readable(file) as stream:
        lines = text_lines(stream)
        places = _places(file, next(lines, (1, b""))[1] or b"", columns)
        wanted = [places[name] for name in columns]
        last = max(wanted)
        empty = 0
        for count, (line, text) in enumerate(lines):
            # An empty line is a bad row unless nothing follows it.
            if text == b"":
                empty += 1
                continue
            rows.read += 1 + empty
            if empty:
                rows.leave_out("empty line", f"{shown(file.name)}:{line - empty}", empty)
                empty = 0
            fields = text.split(b",") if text is not None else ()
            if text is None:
                rows.leave_out("a line of more than 64KiB", f"{shown(file.name)}:{line}")
            elif len(fields) <= last:
                rows.leave_out("too few columns", f"{shown(file.name)}:{line}")
            else:
                yield count, line, [fields[place] for place in wanted]


def _places(file: Path, header: bytes, columns: Sequence[str]) -> Mapping[str, int]:
    """Where each column stands."""
    names = [name.strip() for name in header.removeprefix(b"\xef\xbb\xbf").split(b",")]
    missing = [name for name in columns if name.encode() not in names]
    if missing:
        remedy = f"its first line must name {', '.join(columns)}, as in Alibaba's cluster-trace-gpu-v2023"
        raise fault(file, f"has no column {', '.join(missing)}", remedy)
    return {name: names.index(name.encode()) for name in columns}
