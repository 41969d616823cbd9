"""Ballooning and free page reporting: memory that a guest does not use goes back to the host.

A balloon takes pages from the guest's free memory, small and lately used pieces first, as the guest's allocator hands
them out; the host frees their frames. It never makes a guest swap within itself: it ends where free memory ends. A
guest that needs a page while its balloon has all free ones gets it back at once (deflate-on-oom). Filling and emptying
a balloon takes no time (Liu et al., TPDS 2015, section 4: 55 ms for 128 MB).

Sources: oVirt's rules (vdsm, static/etc/vdsm/mom.d/02-balloon.policy); Documentation/mm/free_page_reporting.rst, and
mm/page_reporting.c of Linux 6.18 for how much is reported at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from sim.errors import At
from sim.memory.image import PageNumbers
from sim.units import SECOND, Block, Duration, Share

Mask = npt.NDArray[np.bool_]

REPORT_EVERY: Final = 2 * SECOND
"""Time (ns) from one report of free pages to the next, and from the first page freed to the first report."""
_REPORTED_PAGES: Final = 512
"""Pages that must be free together to be reported: 2 MiB (pageblock_order)."""
_CAPACITY: Final = 32
"""Blocks that the guest hands to the host at once (PAGE_REPORTING_CAPACITY)."""
_PARTS: Final = 16
"""A report has this part of the free blocks, in whole lots of that capacity."""


class MomBalloon(Block):
    """oVirt MOM's rules for balloons: they fill while the host is short of memory and empty when it is not."""

    pressure_threshold: Share = 0.20
    """Below this share of free memory the host is short, and balloons fill."""
    pressure_critical: Share = 0.05
    """At this share of free memory and below, guests keep no free memory at all."""
    min_guest_free_percent: Share = 0.20
    """Share of its memory that a guest keeps free at the threshold; less in proportion to what the host has free."""
    max_balloon_change_percent: Share = 0.05
    """Most that a guest's memory changes at once, as a share of it."""
    min_balloon_change_percent: Share = 0.0025
    """Least, as a share of it: what is less is not done."""
    main_loop_interval: Duration = Field(default=5 * SECOND, gt=0)
    """Time between two samples."""
    policy_every: int = Field(default=2, ge=1)
    """Samples between two evaluations of the rules."""
    sample_history: int = Field(default=10, ge=1)
    """Samples averaged."""

    @model_validator(mode="after")
    def _ordered(self) -> MomBalloon:
        if self.pressure_critical > self.pressure_threshold:
            raise At("pressure_critical", "is above pressure_threshold", "write at most the threshold")
        return self

    def wanted(self, host_free: float, used: float, now: int, sizes: Sizes) -> int | None:
        """Pages that a guest of *now* pages shall have; None for no change.

        *host_free* is the free share of the host's memory, *used* the guest's pages in use; both are averages.
        """
        if host_free <= self.pressure_critical:
            spare = host_free - self.pressure_critical
        else:
            spare = self.min_guest_free_percent * host_free / self.pressure_threshold
        least = max(sizes.least, used + spare * now)
        if host_free < self.pressure_threshold:
            wanted = min(max(now * (1 - self.max_balloon_change_percent), least), now)
        else:
            wanted = min(max(now * (1 + self.max_balloon_change_percent), least), sizes.most)
        return round(wanted) if abs(wanted - now) > self.min_balloon_change_percent * now else None


@dataclass(frozen=True)
class Sizes:
    """Least and most pages that a guest may have."""

    least: int
    most: int


class FreePages:
    """What a guest does not use, and what of it its balloon holds."""

    def __init__(self, free: Mask, scale: int = 1) -> None:
        """*free* says of each page, which stands for so many, whether the guest's kernel has it on its list of free
        pages.
        """
        self.free = free.copy()
        self._block = max(_REPORTED_PAGES // scale, 1)
        self._stands_for = self._block * scale // _REPORTED_PAGES
        self.held = np.zeros(len(free), np.bool_)

    @property
    def balloon(self) -> int:
        """Pages in the balloon."""
        return int(np.count_nonzero(self.held))

    @property
    def unused(self) -> int:
        """Free pages as the guest counts them, those in the balloon left out."""
        return int(np.count_nonzero(self.free)) - self.balloon

    def resize(self, wanted: int, present: Mask) -> PageNumbers:
        """Let the balloon have so many pages, as far as there are free ones. Returns pages that the host takes back."""
        change = wanted - self.balloon
        if change < 0:
            self.held[np.flatnonzero(self.held)[change:]] = False
            return np.empty(0, np.int64)
        return self._take(np.flatnonzero(self.free & ~self.held), change, present)

    def use(self, pages: PageNumbers, present: Mask) -> PageNumbers:
        """The guest takes pages into use, others for those in its balloon. Returns pages that the host takes back."""
        lacking = int(np.count_nonzero(self.held[pages]))
        self.held[pages] = self.free[pages] = False
        return self._take(np.flatnonzero(self.free & ~self.held), lacking, present) if lacking else pages[:0]

    def give(self, pages: PageNumbers) -> None:
        """The guest frees pages: their contents stay until somebody takes them."""
        self.free[pages] = True

    def report(self, present: Mask) -> PageNumbers:
        """The next pages that the guest reports as free, of those that have frames."""
        blocks = len(self.free) // self._block
        whole = slice(0, blocks * self._block)
        free = (self.free & ~self.held)[whole].reshape(blocks, -1).all(axis=1)
        framed = present[whole].reshape(blocks, -1).any(axis=1)
        lots = -(-int(np.count_nonzero(free)) * self._stands_for // (_CAPACITY * _PARTS))
        chosen = np.flatnonzero(free & framed)[: -(-lots * _CAPACITY // self._stands_for)]
        pages = (chosen[:, np.newaxis] * self._block + np.arange(self._block)).ravel()
        return np.asarray(pages[present[pages]])

    def _take(self, candidates: PageNumbers, number: int, present: Mask) -> PageNumbers:
        """Put free pages into the balloon, those with frames first: free blocks never used are cut up last."""
        framed = present[candidates]
        taken = np.concatenate([candidates[framed], candidates[~framed]])[: max(number, 0)]
        self.held[taken] = True
        return np.asarray(taken[present[taken]])


class Ballooning:
    """MOM while it runs."""

    def __init__(self, rules: MomBalloon, memory: int) -> None:
        """*memory* is the host's, in bytes."""
        self.rules = rules
        self.memory = memory
        self._looks = 0
        self._free: deque[int] = deque(maxlen=rules.sample_history)
        self._used: dict[int, deque[int]] = {}

    def look(self, free: int, guests: Mapping[int, tuple[FreePages, Sizes]]) -> dict[int, int]:
        """Sample the host's free memory (bytes) and its guests, by number.

        Returns by guest how many pages its balloon shall have, when it is time for the rules.
        """
        self._free.append(free)
        self._used = {guest: self._used.get(guest, deque(maxlen=self.rules.sample_history)) for guest in guests}
        for guest, (pages, sizes) in guests.items():
            self._used[guest].append(sizes.most - pages.balloon - pages.unused)
        self._looks += 1
        if self._looks % self.rules.policy_every:
            return {}
        share = sum(self._free) / len(self._free) / self.memory
        found = {}
        for guest, (pages, sizes) in guests.items():
            used = sum(self._used[guest]) / len(self._used[guest])
            wanted = self.rules.wanted(share, used, sizes.most - pages.balloon, sizes)
            if wanted is not None:
                found[guest] = sizes.most - wanted
        return found
