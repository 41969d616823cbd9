"""Which pages a guest reads and writes at random, and how often: pages with equal rates are of one class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from sim.memory.image import Captured, PageNumbers, Reads, Synthetic, Writes
from sim.units import SECOND


class Kind(NamedTuple):
    """A class of pages."""

    writes: float = 0.0
    """Writes per second and page."""
    leaves: str = "unique"
    """What a write leaves."""
    reads: float = 0.0
    """Reads per second and page."""
    period: int = 0
    """Time (ns) from one read of a page to the next, if they are read one after the other in a loop."""
    first: int = 0
    """First page (of the guest) of the loop."""
    pages: int = 0
    """Pages of the loop."""
    file: bool = False
    """Whether what a write leaves was read from a file."""
    domain: int = 0
    """Number of the domain whose pool it leaves contents of."""

    def within(self, domain: int) -> Kind:
        """What this is for guests of a domain: a class of its own if writes leave contents of a pool."""
        return self if self.leaves in ("unique", "zero") else self._replace(domain=domain)


class Group(NamedTuple):
    """Pages of a guest that are of one class."""

    kind: Kind
    where: PageNumbers


def groups(image: Synthetic | Captured, places: Mapping[str, PageNumbers]) -> Iterator[Group]:
    """The pages of an image that are accessed at random; *places* has those of each part.

    A captured image has one part, with the name "": its touched pages, those first that change most often.
    """
    if isinstance(image, Captured):
        if image.reads:
            yield from _grouped(places[""], None, image.reads, False)
        return
    for part in image.parts:
        if part.writes or part.reads:
            yield from _grouped(places[part.name], part.writes, part.reads, part.file)


def _grouped(where: PageNumbers, writes: Writes | None, reads: Reads | None, file: bool) -> Iterator[Group]:
    written = writes.pieces(len(where)) if writes else [(len(where), 0.0)]
    read = reads.pieces(len(where)) if reads else [(len(where), 0.0)]
    start = 0
    for end in sorted({end for end, _ in (*written, *read)}):
        write_rate, read_rate = (next(rate for last, rate in rates if end <= last) for rates in (written, read))
        kind = Kind(writes=write_rate, leaves=writes.leaves if writes and write_rate else "unique", reads=read_rate)
        if file and kind.leaves not in ("unique", "zero"):
            kind = kind._replace(file=True)
        if reads and reads.order == "loop" and read_rate:
            period = round(SECOND / read_rate)
            kind = kind._replace(reads=0.0, period=period, first=int(where[0]), pages=len(where))
        if kind != Kind() and end > start:
            yield Group(kind, where[start:end])
        start = end


def numbered(kinds: Iterable[Kind]) -> dict[Kind, int]:
    """A number from 1 up for each class: first come those that are written."""
    distinct = dict.fromkeys(kinds)
    return {kind: number for number, kind in enumerate(sorted(distinct, key=lambda kind: kind.writes == 0), 1)}


def by_activity(changes: Iterable[PageNumbers], touched: PageNumbers) -> PageNumbers:
    """Touched pages of a capture, those first that change in the most snapshots."""
    count = np.zeros(int(touched.max(initial=-1)) + 1, np.int64)
    for pages in changes:
        within = pages[pages < len(count)]
        count[within] += 1
    return touched[np.argsort(-count[touched], kind="stable")]
