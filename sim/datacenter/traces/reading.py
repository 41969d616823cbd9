"""A trace as guests that arrive one after the other, what it holds in all, and which format a file is in."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from sim.datacenter.messages import NEVER, Newcomer
from sim.datacenter.traces import azure, bitbrains, openb, percent
from sim.datacenter.traces.rows import Rows, fault, listed, readable, shown
from sim.datacenter.traces.spool import Guest, Spool
from sim.datacenter.traces.trace import Format, Trace
from sim.document import Document

_READERS: Final[Mapping[Format, Callable[[Trace, Rows], Iterator[Guest]]]] = {
    "openb": openb.read,
    "planetlab": percent.read_planetlab,
    "google": percent.read_google,
    "bitbrains": bitbrains.read,
    "azure": azure.read,
}


class Reading:
    """A trace that was read once, checked, and put in order on disk; memory does not grow with its guests."""

    def __init__(self, trace: Trace) -> None:
        """Read it whole. Raises UserError for what cannot be read, or is bad for more than a half."""
        self.trace = trace
        self.rows = Rows()
        try:
            self._spool = Spool(_READERS[trace.format](trace, self.rows))
        except OSError as error:
            raise fault(trace.source, f"cannot be read: {error.strerror or error}", "check the disk") from None
        self.rows.check(trace.source, trace.format)
        if not self._spool.count:
            raise fault(trace.source, "lists no guests", f"is it a trace of {trace.format}?")

    def newcomers(self) -> Iterator[Newcomer]:
        """Yield the guests that arrive in the trace's window, in order of time."""
        return islice(self._arrivals(), self.trace.limit)

    def _arrivals(self) -> Iterator[Newcomer]:
        begin, kinds, step = self.trace.begin, self.trace.kinds, self.trace.step
        # Numbered before the window cuts, so that a guest keeps its name and kind in any window.
        for number, (time, _, end, memory, vcpus, used) in enumerate(self._spool):
            if self.trace.end is not None and time >= self.trace.end:
                return
            # Guests that are there already live for the rest of their lives, and use the rest of their levels.
            since = max(time, begin)
            if end is not None and end <= since:
                continue
            levels = tuple(np.frombuffer(used, np.float64).tolist()) if used else ()
            yield Newcomer(
                f"{self.trace.prefix}-{number}",
                kinds[number % len(kinds)],
                since - begin,
                NEVER if end is None else end - since,
                memory,
                vcpus,
                levels[min((since - time) // step, len(levels) - 1) :] if levels else (),
                step if levels else 0,
            )

    def survey(self) -> Survey:
        """Go through the guests once more and add up."""
        guests, last, there = 0, 0, _There()
        cpu = levels = 0.0
        for newcomer in self.newcomers():
            guests += 1
            last = newcomer.time
            there.add(newcomer)
            cpu += sum(newcomer.levels)
            levels += len(newcomer.levels)
        return Survey(
            guests,
            last,
            self._spool.median_lifetime(),
            there.most,
            there.most_memory,
            there.most_vcpus,
            cpu / levels if levels else None,
        )


@dataclass(frozen=True, slots=True)
class Survey:
    """A trace in a few figures."""

    guests: int
    last_arrival: int
    """Time of the last arrival (ns)."""
    median_lifetime: int | None
    """Of all guests of the trace (ns); None if half of them have no end."""
    most_guests: int
    """Most guests at once, if each starts as it arrives."""
    most_memory: int | None
    """Most memory promised at once (bytes); None if it is the kinds' own."""
    most_vcpus: int | None
    """Most virtual processors at once; None if they are the kinds' own."""
    cpu: float | None
    """Mean of all levels of CPU use; None without any."""


class _There:
    """Who is there at a time; only guests that are there are held."""

    def __init__(self) -> None:
        self.most = 0
        self.most_memory: int | None = None
        self.most_vcpus: int | None = None
        self._ends: list[tuple[int, int, int]] = []
        self._guests = self._memory = self._vcpus = 0

    def add(self, newcomer: Newcomer) -> None:
        """Let the guests leave that are gone by then, and one arrive."""
        while self._ends and self._ends[0][0] <= newcomer.time:
            _, memory, vcpus = heapq.heappop(self._ends)
            self._change(-1, memory, vcpus)
        memory, vcpus = newcomer.memory or 0, newcomer.vcpus or 0
        if newcomer.lifetime != NEVER:
            heapq.heappush(self._ends, (newcomer.time + newcomer.lifetime, memory, vcpus))
        self._change(1, memory, vcpus)
        self.most = max(self.most, self._guests)
        if self._memory:
            self.most_memory = max(self.most_memory or 0, self._memory)
        if self._vcpus:
            self.most_vcpus = max(self.most_vcpus or 0, self._vcpus)

    def _change(self, guests: int, memory: int, vcpus: int) -> None:
        self._guests += guests
        self._memory += guests * memory
        self._vcpus += guests * vcpus


def newcomers(trace: Trace) -> Iterator[Newcomer]:
    """The guests of a trace in order of arrival. Raises UserError at once for a trace that cannot be read."""
    return Reading(trace).newcomers()


def read_alone(path: Path, options: Sequence[str]) -> Trace:
    """The block of a trace without a scenario; options are "key=value", the format is told from the files."""
    given: dict[str, Any] = {"path": str(path), "kinds": ["guest"]}
    if not any(option.startswith("format=") for option in options):
        if not os.path.exists(path):
            raise fault(path, "no such file or folder", "check the path")
        given["format"] = format_of(path)
    document = Document(shown(path), given)
    for option in options:
        document = document.override(option)
    return document.check(Trace, folder="")


def format_of(path: Path) -> Format:
    """What format a file or folder is in, by what it holds."""
    if path.is_dir():
        return _format_of_folder(path)
    with readable(path) as stream:
        start = stream.read(1 << 12)
    if start.startswith(azure.MAGIC):
        return "azure"
    if start.startswith(b"\x1f\x8b") or start[257:262] == b"ustar":
        return "google"
    if b"cpu_milli" in start.partition(b"\n")[0]:
        return "openb"
    raise fault(path, "is in no format that is known", "say which with --set format=openb")


def _format_of_folder(folder: Path) -> Format:
    if (folder / openb.PODS).is_file():
        return "openb"
    if any((folder / name).is_file() for layout in bitbrains.LAYOUTS for name in layout):
        return "bitbrains"
    for file in listed(folder):
        if file.is_file():
            with readable(file) as stream:
                columns = len(stream.read(1 << 12).partition(b"\n")[0].split())
            return "google" if columns == 2 else "planetlab"
    raise fault(folder, "holds no files of a trace", "name a folder with the files of one day")
