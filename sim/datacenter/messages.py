"""What the control plane tells hosts and what hosts tell it: plain data, the only thing that passes between them.

Hosts are numbered in the order of their names, guests by name; times are in ns since the start of the run. Between two
exchanges every host goes on by itself, so the hosts may be spread over any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from sim.columns import SAMPLES

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

NEVER: Final = 1 << 62
"""End of a life that outlasts every run (ns)."""

SUMMED: Final = tuple(column.name for column in SAMPLES if column.dtype == "int64")
"""Columns of the samples table that mean something as a sum over hosts."""

REPORT: Final = (
    "guests_running", "mem_total_bytes", "mem_promised_bytes", "mem_used_bytes", "mem_free_bytes",
    "mem_swapped_bytes", "saved_bytes", "overhead_cpu_ns", "ksmd_cpu_ns", "psi_some_ns", "stalled_ns", "oom_kills",
)  # fmt: skip
"""Columns of a host's report; overhead_cpu_ns is everything in `cpu_overhead_percent`. Counters since the start."""


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A guest that wants to run: its kind (`vms[].name`) and in what it differs from the others of that kind."""

    name: str
    kind: str
    time: int
    """When it arrives."""
    lifetime: int = NEVER
    """How long it runs, from when it starts."""
    memory: int | None = None
    """Bytes, if not its kind's."""
    vcpus: int | None = None
    """Virtual processors, if not its kind's."""
    levels: tuple[float, ...] = ()
    """CPU use over time as shares of its virtual processors; empty: its kind's load."""
    every: int = 0
    """How long each level lasts (ns), from its arrival on; the last one stays."""


@dataclass(frozen=True, slots=True)
class Luggage:
    """A guest on its way from one host to another: who it is, and all that its memory holds."""

    newcomer: Newcomer
    since: int
    """When it first started; parts of its life are counted from there."""
    contents: Int32
    """Content of each page as all hosts of the run number them, -1 for one that no other page has, NEVER untouched."""
    state: Mapping[str, object] = field(default_factory=dict)
    """What else its new host must know to let it go on; made and read by `Resident` alone."""


@dataclass(frozen=True, slots=True)
class Start:
    """A guest starts on a host."""

    host: int
    time: int
    guest: Newcomer


@dataclass(frozen=True, slots=True)
class Stop:
    """A guest is stopped; one with a lifetime stops by itself."""

    host: int
    time: int
    guest: str


@dataclass(frozen=True, slots=True)
class Send:
    """A guest begins to move: its memory is copied while it runs, and it leaves at the end of the epoch in which that
    is done (`Answer.luggage`).
    """

    host: int
    time: int
    guest: str
    bytes_per_s: int
    """What its host may send for it."""


@dataclass(frozen=True, slots=True)
class Receive:
    """A guest that left another host goes on here."""

    host: int
    time: int
    luggage: Luggage


@dataclass(frozen=True, slots=True)
class Fail:
    """A host fails: its guests are lost, and it is empty when it comes back."""

    host: int
    time: int


Order = Start | Stop | Send | Receive | Fail


@dataclass(frozen=True, slots=True)
class Orders:
    """What a group of hosts shall do up to a moment."""

    until: int
    report: bool
    """Whether every host reports at that moment; otherwise only those with orders are moved on."""
    orders: Sequence[Order]
    """In order of time for each host."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The law of one move: pre-copy rounds until what is left fits the downtime."""

    guest: str
    luggage: Luggage
    rounds: int
    sent_pages: int
    """Pages sent in all rounds, pages sent again included."""
    downtime_ns: int
    duration_ns: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A guest that runs no more: its row of the table of guests (`sim.columns.GUESTS`), its end among it."""

    host: int
    time: int
    row: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a group of hosts has done since the last orders."""

    hosts: Int64
    """Numbers of the hosts that report, rising."""
    reports: Int64
    """One row for each, with the columns REPORT."""
    sums: Mapping[str, Int64]
    """For each kind of host the columns SUMMED, over its hosts of this group (of settings and latencies the largest);
    empty without a report."""
    ended: Sequence[Ended]
    moved: Sequence[tuple[int, Moved]]
    """Guests that have left, with the number of the host that they left."""
    events: Sequence[Mapping[str, object]]
    """Rows of the table of events."""
    fingerprints: Mapping[int, UInt8] = field(default_factory=dict)
    """Of the hosts that report, where placement asks for it: one bit for each content of the run (`numpy.packbits`),
    set if a page of a guest there holds it."""
