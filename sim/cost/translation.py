"""What small pages cost: TLB misses by the rates at which a guest's pages are accessed, and the walks that follow.

A walk of nested page tables makes (g + 1)(h + 1) - 1 memory references, with g levels in the guest's tables and h in
the host's. Source: AMD's slides for the KVM Forum 2008, 9 to 13, after Bhargava and others, ASPLOS 2008. They also say
how many are left to walk caches and a nested TLB (`effective`), and that is what a miss costs here.

A translation covers the smaller of the guest's page and the host's. The TLB, its last level, evicts what was not used
for longest; misses of its first level, some 2 ns, cost the same with pages of any size and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import numpy.typing as npt

from sim.columns import PAGE_BYTES
from sim.cost import prices as price_sets
from sim.cost.cache import Cache, Reader
from sim.cost.lru import Floats, Ints, misses
from sim.cost.prices import Access, Prices, Tlb
from sim.memory.guest import Vm
from sim.units import SECOND

if TYPE_CHECKING:
    from sim.memory.pages import Memory

LOOK_EVERY: Final = SECOND
"""How often (ns) a host looks at its guests' pages; between two looks nothing is taken to change."""

_LEVELS: Final[Mapping[str, int]] = {"none": 0, "4KiB": 4, "2MiB": 3, "1GiB": 2}
"""Levels of page tables down to a page of that size; none where no second table is walked."""
_AREA_PAGES: Final = 512
_HARDLY: Final = 1e-12
"""Share of all misses that is not worth a price."""


def references(guest: int, host: int) -> int:
    """Memory references of a walk through so many levels; *host* is 0 where no nested tables are walked."""
    return (guest + 1) * (host + 1) - 1


def effective(guest: int, host: int) -> int:
    """References left to a walk with walk caches and a nested TLB.

    The nested TLB knows where the guest's tables lie, but for the last tables of a guest with pages of 4 KiB, of which
    there are too many. Left are the guest's levels, the host's for the data, and the host's again for such a table:
    the 12, 10 and 6 of AMD's slides for 4 KiB on 4 KiB, 4 KiB on 2 MiB and 2 MiB on 2 MiB.
    """
    return guest + host + (host if guest == _LEVELS["4KiB"] else 0)


@dataclass(frozen=True)
class Entries:
    """The TLB entries that one guest needs, by kind."""

    count: Ints
    """How many."""
    rate: Floats
    """Accesses to each, in any unit of time."""
    references: Ints
    """What a walk for one takes."""
    huge: npt.NDArray[np.bool_]
    """Whether it covers 2 MiB, and not 4 KiB."""

    def times(self, number: int) -> Entries:
        """So many times as many."""
        return replace(self, count=self.count * number)


class Walker:
    """What walks cost on one processor."""

    def __init__(self, prices: Prices) -> None:
        self._tlb, accesses = price_sets.translation(prices)
        priced = list(reference_prices(self._tlb, accesses))
        self._entries = np.log([entries for entries, _ in priced])
        self._ns = np.array([ns for _, ns in priced])

    def reference_ns(self, entries: float | Floats) -> Floats:
        """Time of one reference when misses spread evenly over so many entries: caches hold the tables of few."""
        found: Floats = np.interp(np.log(entries), self._entries, self._ns)
        return found

    def per_access(self, entries: Entries) -> float:
        """Time (ns) that an access waits for a walk, on average over all accesses."""
        missed = self._misses(entries)
        missing = entries.count * missed > _HARDLY * (entries.count @ missed)
        count, missed = entries.count[missing], missed[missing]
        # What is missed as often as this one of all would be missed evenly if there were so many.
        alike = count @ missed / missed
        walks = count * missed * entries.references[missing]
        return float(walks @ self.reference_ns(alike) / (entries.count @ entries.rate)) if len(count) else 0.0

    def _misses(self, entries: Entries) -> Floats:
        """Misses of one entry of each kind, in the unit of the rates."""
        if self._tlb.huge is None:
            return misses(entries.count, entries.rate, self._tlb.small)
        found = np.zeros(len(entries.rate))
        for chosen, capacity in ((~entries.huge, self._tlb.small), (entries.huge, self._tlb.huge)):
            found[chosen] = misses(entries.count[chosen], entries.rate[chosen], capacity)
        return found


def reference_prices(tlb: Tlb, accesses: Sequence[Access]) -> Iterator[tuple[float, float]]:
    """Yield, for random loads over a working set, its pages of 4 KiB and what one reference of their walks costs (ns).

    Loads were uniform, so a TLB of n entries holds what n of the pages need. What small pages cost more is walks alone,
    and where walks are the same nothing can be learnt.
    """
    host = _LEVELS[tlb.host_pages]
    for access in accesses:
        pages = access.working_set // PAGE_BYTES
        # Where the measured machine's own host has small pages, its huge ones need an entry for each of those.
        own = tlb.huge or tlb.small
        parts, slots = (pages, tlb.small) if tlb.host_pages == "4KiB" else (-(-pages // _AREA_PAGES), own)
        small = max(0.0, 1 - tlb.small / pages) * effective(_LEVELS["4KiB"], host)
        huge = max(0.0, 1 - slots / parts) * effective(_LEVELS["2MiB"], host)
        if small > huge:
            yield pages, max(0.0, access.small.ns - access.huge.ns) / (small - huge)


# --- one guest -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a guest accesses and where it lies."""

    counts: Ints
    """Pages by class (rows) and by the columns of `accessed.tally`."""
    areas: Floats
    """Accesses to each whole block of 2 MiB."""
    huge: Ints
    """1 for blocks that are huge pages of the host, else 0."""
    rates: Floats
    """Accesses to a page of each class; the unit is that of the areas."""
    last: float = 1.0
    """How much of the last block is there."""

    def in_huge(self) -> Seen:
        """The same if all of the host's pages were huge."""
        from sim.cost.accessed import IN_HUGE, IN_LAST

        counts = np.zeros_like(self.counts)
        counts[:, IN_HUGE] = self.counts[:, :IN_LAST].sum(axis=1)
        counts[:, IN_LAST] = self.counts[:, IN_LAST]
        return Seen(counts, self.areas, np.ones_like(self.huge), self.rates, self.last)

    def in_small(self) -> Seen:
        """The same if none were."""
        from sim.cost.accessed import IN_HUGE, IN_SMALL

        counts = self.counts.copy()
        counts[:, IN_SMALL] += counts[:, IN_HUGE]
        counts[:, IN_HUGE] = 0
        return Seen(counts, self.areas, np.zeros_like(self.huge), self.rates, self.last)

    def same_as(self, other: Seen) -> bool:
        """Whether nothing has changed."""
        return all(
            np.array_equal(mine, its)
            for mine, its in ((self.counts, other.counts), (self.areas, other.areas), (self.huge, other.huge))
        )


def entries(seen: Seen, guest: int, small: int, huge: int) -> Entries:
    """TLB entries for a guest with so many levels of tables (0: no own) in small and huge pages of the host."""
    from sim.cost.accessed import IN_HUGE, IN_LAST, IN_SMALL

    kinds = [(seen.counts[:, column], seen.rates, _walk(guest, small), False) for column in (IN_SMALL, IN_LAST)]
    if guest == _LEVELS["4KiB"]:
        kinds.append((seen.counts[:, IN_HUGE], seen.rates, _walk(guest, huge), False))
    else:
        there = np.ones(len(seen.areas))
        there[-1:] = seen.last
        count, rate = (each[seen.huge != 0] for each in (there, seen.areas / there))
        kinds.append((count, rate, _walk(guest, huge), True))
    counts, rates, walks, wide = zip(*kinds, strict=True)
    sizes = [len(count) for count in counts]
    return Entries(np.concatenate(counts), np.concatenate(rates), np.repeat(walks, sizes), np.repeat(wide, sizes))


def _walk(guest: int, host: int) -> int:
    return effective(guest, host) if guest else effective(host, 0)


# --- the guests of a host --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runner:
    """A guest that lives now."""

    index: int
    """Its number on its host."""
    vm: Vm
    """Its kind."""
    host_pages: Literal["2MiB", "1GiB"] | None
    """Size of the pages of hugetlbfs that it has, if it has such."""

    def processors(self, level: float) -> float:
        """Virtual processors that run, on average, at this level of activity."""
        return self.vm.vcpus * min(1.0, self.vm.load * level)

    @property
    def levels(self) -> tuple[int, int, int]:
        """Levels of the guest's tables, and of the host's for small and for huge pages."""
        guest = _LEVELS[self.vm.guest_pages] if self.vm.is_nested else 0
        return guest, _LEVELS["4KiB"], _LEVELS[self.host_pages or "2MiB"]


TOTALS: Final = ("work_cpu_ns", "walk_cpu_ns", "native_walk_cpu_ns", "tlb_cpu_ns", "llc_saved_ns")
"""Columns of the tables that `Walks` knows, in its order."""
_LLC: Final = TOTALS.index("llc_saved_ns")


class Walks:
    """CPU time that the guests of one host spend in walks, and what they gain in the last-level cache; see TOTALS."""

    def __init__(self, prices: Prices, *, cores: int, guests: int, scale: int = 1) -> None:
        """So many guests at most; each of their pages stands for so many."""
        self._walker = Walker(prices)
        self._cache = Cache(prices, cores, scale)
        self._scale = scale
        self._known: dict[int, tuple[Seen, Floats]] = {}
        self._stalled: dict[int, int] = {}
        self._last: object = None
        self._now = 0
        # One row for each guest, and the last for the host.
        self._rates = np.zeros((guests + 1, len(TOTALS)))
        self._totals = np.zeros((guests + 1, len(TOTALS)))
        self._history: list[tuple[int, Floats, Floats]] = []
        self._note()

    def look(self, m: Memory, runners: Sequence[Runner], now: int) -> None:
        """See where the guests' pages are now."""
        from sim.memory.pages import DUE_COUNT, SERIAL

        self.settle(now)
        busy = [(each, each.processors(float(m.level[each.index])) * self._awake(m, each)) for each in runners]
        # All other counts together tell whether any page went elsewhere; these two go up with every random write.
        state = np.delete(m.counts, [SERIAL, DUE_COUNT]).tobytes(), [(each.index, running) for each, running in busy]
        if state == self._last:
            return
        self._last = state
        self._rates[:] = 0
        readers = [self._run(m, each, running) for each, running in busy if running]
        self._rates[-1, _LLC] = self._cache.saved(m, readers)
        self._note()

    def more_guests(self, guests: int) -> None:
        """Make room for so many guests in all."""
        for name in ("_rates", "_totals"):
            before = getattr(self, name)
            after = np.zeros((guests + 1, len(TOTALS)))
            after[: len(before) - 1], after[-1] = before[:-1], before[-1]
            setattr(self, name, after)

    def forget(self) -> None:
        """Forget the past: columns are asked of now and later only."""
        del self._history[:-1]

    def retire(self, guest: int) -> None:
        """A guest that ended makes room for another one of its number; the host's figures keep its own."""
        self._totals[-1] += self._totals[guest]
        self._totals[guest] = 0
        self._stalled.pop(guest, None)

    def leave(self, guest: int, now: int) -> None:
        """The guest ends."""
        self.settle(now)
        self._rates[guest] = 0
        self._known.pop(guest, None)
        self._last = None
        self._note()

    def settle(self, now: int) -> None:
        """Count up to *now* (ns)."""
        self._totals += self._rates * (now - self._now)
        self._now = now

    def slowdown_percent(self, guest: int) -> float:
        """How much longer the guest's work takes than with all of the host's memory in huge pages, up to now."""
        work, walk, _, tlb, _ = self._totals[guest]
        return float(100 * tlb / (work + walk - tlb)) if work else 0.0

    def columns(self, times: Ints) -> dict[str, Ints]:
        """TOTALS of the host at these times (ns)."""
        since, totals, rates = (np.array(each) for each in zip(*self._history, strict=True))
        step = np.searchsorted(since, times, side="right") - 1
        sums = np.rint(totals[step] + rates[step] * (times - since[step])[:, np.newaxis]).astype(np.int64)
        return {name: sums[:, i] for i, name in enumerate(TOTALS)}

    def _note(self) -> None:
        self._history.append((self._now, self._totals.sum(axis=0), self._rates.sum(axis=0)))

    def _awake(self, m: Memory, runner: Runner) -> float:
        """Share of the time since the last look for which the guest did not wait for memory; so it goes on."""
        from sim.memory.pages import STALLED

        stalled = int(m.guest[runner.index, STALLED])
        waited = stalled - self._stalled.get(runner.index, 0)
        self._stalled[runner.index] = stalled
        return max(0.0, 1 - waited / (runner.vm.vcpus * LOOK_EVERY))

    def _run(self, m: Memory, runner: Runner, running: float) -> Reader:
        """Tell work from walks where so many of a guest's processors run; returns what that does to the cache."""
        seen = self._see(m, runner)
        known = self._known.get(runner.index)
        if known is None or not seen.same_as(known[0]):
            self._known[runner.index] = known = seen, self._per_access(seen, runner)
        now, native, huge = runner.vm.memory_accesses / SECOND * known[1]
        work = running / (1 + now)
        self._rates[runner.index, :_LLC] = work * np.array([1, now, native, now - huge])
        accesses = work * runner.vm.memory_accesses / SECOND
        counts = seen.counts.sum(axis=1)
        every = float(counts @ seen.rates)
        first, pages = span(m, runner.index)
        return Reader(first, pages, counts, seen.rates * (accesses / every if every else 0.0))

    def _see(self, m: Memory, runner: Runner) -> Seen:
        from sim.cost.accessed import TALLIED, tally

        first, pages = span(m, runner.index)
        rates = access_rates(m)
        counts = np.zeros((len(rates), TALLIED), np.int64)
        # The last block of a guest is too short for a huge page, but not where it stands for many that are whole.
        blocks = pages // _AREA_PAGES if self._scale == 1 else -(-pages // _AREA_PAGES)
        areas, huge = np.zeros(blocks), np.zeros(blocks, np.int64)
        tally(m, first, pages, rates, counts, areas, huge)
        seen = Seen(counts, areas, huge, rates, min(pages / _AREA_PAGES - blocks + 1, 1.0))
        return seen.in_huge() if runner.host_pages else seen

    def _per_access(self, seen: Seen, runner: Runner) -> Floats:
        """Time (ns) that an access waits for walks: now, without nested tables, and all in huge pages of the host."""
        guest, small, huge = runner.levels
        alone = seen.in_small() if guest == small else seen.in_huge()
        kinds = (
            entries(seen, guest, small, huge),
            entries(alone, 0, small, guest) if guest else entries(seen, 0, small, huge),
            entries(seen.in_huge(), guest, small, huge),
        )
        return np.array([self._walker.per_access(each.times(self._scale)) for each in kinds])


def span(m: Memory, guest: int) -> tuple[int, int]:
    """First page of a guest, and how many it has."""
    from sim.memory.pages import FIRST, PAGES

    return int(m.guest[guest, FIRST]), int(m.guest[guest, PAGES])


def access_rates(m: Memory) -> Floats:
    """Accesses to a page of each class per ns of activity."""
    from sim.memory.pages import PERIOD, READS, WRITES

    period = m.rates[:, PERIOD]
    rates: Floats = m.rates[:, WRITES] + m.rates[:, READS]
    rates[period > 0] += 1 / period[period > 0]
    return rates
