"""What shared frames save in the last-level cache: a line of one is there once, whoever reads it.

Caches go by physical address, so n guests that read one shared page need its lines once instead of n times, and more
of everything else fits. All guests of a host share the cache. Accesses are those of `Vm.memory_accesses`; each line of
a page is as likely as another, so that counting pages is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from sim.columns import PAGE_BYTES
from sim.cost import prices as price_sets
from sim.cost.lru import Floats, Ints, misses
from sim.cost.prices import Prices

if TYPE_CHECKING:
    from sim.memory.pages import Memory

_STEPS: Final = 100
"""Shared frames whose rates differ by less than one part in so many count as equal."""


@dataclass(frozen=True)
class Reader:
    """A guest that runs."""

    first: int
    """Its first page."""
    pages: int
    """Its pages."""
    counts: Ints
    """How many of them are of each class and present."""
    rates: Floats
    """Accesses per ns to a page of each class."""


class Cache:
    """The last-level cache of one host."""

    def __init__(self, prices: Prices, cores: int, scale: int = 1) -> None:
        """As large as so many cores make it; each page stands for so many."""
        llc = price_sets.llc(prices)
        self._pages = llc.per_core * cores / PAGE_BYTES / scale
        self._miss_ns = llc.miss.ns

    def saved(self, m: Memory, readers: Sequence[Reader]) -> float:
        """CPU time per time that the readers save because some of their pages are shared."""
        from sim.cost.accessed import add_frames
        from sim.memory.pages import FRAME_HIGH

        frames = np.zeros(m.counts[FRAME_HIGH] + 1)
        alone = [np.zeros(len(reader.counts), np.int64) for reader in readers]
        for reader, own in zip(readers, alone, strict=True):
            add_frames(m, reader.first, reader.pages, reader.rates, own, frames)
        if not frames.any():
            return 0.0
        rates = [reader.rates for reader in readers]
        apart = self._misses([reader.counts for reader in readers], rates)
        count, rate = _grouped(frames)
        together = self._misses([*alone, count], [*rates, rate])
        return (apart - together) * self._miss_ns

    def _misses(self, counts: Sequence[Ints], rates: Sequence[Floats]) -> float:
        """Misses per ns of pages of these kinds."""
        count, rate = np.concatenate(counts), np.concatenate(rates)
        return float(count @ misses(count, rate, self._pages))


def _grouped(rates: Floats) -> tuple[Ints, Floats]:
    """Frames by nearly equal rates: how many there are of each kind, and their mean rate."""
    used = rates[rates > 0]
    kind = np.rint(np.log(used) * _STEPS).astype(np.int64)
    kind -= kind.min()
    count = np.bincount(kind)
    found = count > 0
    return count[found], np.bincount(kind, used)[found] / count[found]
