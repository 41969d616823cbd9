"""The compiled loops behind the methods of their plain twin; batches take no time unless prices are set."""

from __future__ import annotations

import numpy as np

from sim.memory import pages as memory
from sim.memory.pages import BLOCK, NEVER, Int32, Memory
from sim.reclaim import pressure
from sim.reclaim.pressure import Pressure
from sim.sharing import ksm_pass as ksmd
from sim.sharing.ksm_pass import Ksm

KSM_COUNTERS = {
    "pages_shared": ksmd.PAGES_SHARED,
    "pages_sharing": ksmd.PAGES_SHARING,
    "pages_unshared": ksmd.PAGES_UNSHARED,
    "pages_scanned": ksmd.PAGES_SCANNED,
    "pages_skipped": ksmd.PAGES_SKIPPED,
    "full_scans": ksmd.FULL_SCANS,
    "stable_node_chains": ksmd.CHAINS,
    "stable_node_dups": ksmd.DUPS,
    "items": ksmd.ITEMS,
}
CLASSES = 256
MEMORY_COUNTS = {
    "ksm_zero_pages": memory.KSM_ZERO,
    "metadata": memory.METADATA,
    "cow_ksm": memory.COW_KSM,
    "cow_other": memory.COW_FORK,
    "huge_pages": memory.HUGE_PAGES,
    "thp_split_page": memory.THP_SPLIT,
    "thp_fault_alloc": memory.THP_FAULT,
    "thp_collapse_alloc": memory.THP_COLLAPSE,
}


def empty_memory(*, pages: int, guests: int, frames: int, due: int = 64) -> Memory:
    """Memory without any guest."""
    blocks = -(-pages // BLOCK)
    m = Memory(
        place=np.zeros(blocks * BLOCK, np.uint8),
        held=np.zeros(blocks * BLOCK, np.int32),
        accesses=np.zeros(blocks * BLOCK, np.uint16),
        lru=np.zeros((0, memory.LRU_COLUMNS), np.int32),
        seen=np.zeros(0, np.uint8),
        packed=np.zeros(0, np.uint8),
        zspage=np.zeros((256, memory.ZSPAGE_COLUMNS), np.int64),
        block=np.zeros((blocks, memory.BLOCK_COLUMNS), np.int64),
        frame=np.zeros((blocks * BLOCK + ksmd.ROOM, memory.FRAME_COLUMNS), np.int32),
        frame_lru=np.zeros((0, memory.FRAME_LRU_COLUMNS), np.int32),
        gone=np.zeros(0, np.int32),
        from_disk=np.zeros(0, np.int32),
        guest=np.zeros((guests, memory.GUEST_COLUMNS), np.int64),
        level=np.ones(guests),
        rates=np.zeros((CLASSES, memory.ACCESS_COLUMNS)),
        due=np.zeros((due, memory.DUE_COLUMNS), np.int64),
        counts=np.zeros(memory.COUNTS, np.int64),
    )
    m.counts[memory.LIMIT] = frames
    m.counts[memory.FREE_FRAME] = -1
    return m


def no_pressure(guests: int) -> Pressure:
    """Memory that is never reclaimed."""
    return Pressure(
        n=np.zeros(pressure.NUMBERS, np.int64),
        channel=np.zeros(1, np.int64),
        back=np.zeros((1, 2), np.int64),
        queue=np.zeros(0, np.int32),
        zip_ns=np.zeros((256, 2), np.int64),
        load=np.zeros(guests),
        until=np.zeros(guests, np.int64),
    )


def idle_ksm(m: Memory, *, contents: int, chains: int = 1000, rows: int = 4000) -> Ksm:
    """KSM of 6.18 that has not begun, with default settings and work that costs nothing."""
    pages, guests = len(m.place), len(m.guest)
    k = Ksm(
        item=np.zeros(pages, np.uint8),
        old=np.zeros(pages, np.int32),
        link=np.zeros(pages, np.int32),
        head=np.zeros(contents, np.int32),
        node=np.zeros((len(m.frame), ksmd.NODE_COLUMNS), np.int32),
        chain=np.zeros((chains, ksmd.CHAIN_COLUMNS), np.int64),
        block=np.zeros((len(m.block), ksmd.QUIET_COLUMNS), np.int64),
        slot=np.zeros((guests + 1, ksmd.SLOT_COLUMNS), np.int64),
        hot=np.zeros((CLASSES, 2)),
        smart=np.zeros((2, ksmd.SMART_VISITS), np.uint8),
        n=np.zeros(ksmd.NUMBERS, np.int64),
        log=np.zeros((rows, ksmd.SNAPSHOT + ksmd.COUNTERS + memory.COUNTS), np.int64),
    )
    k.slot[:, ksmd.BEFORE] = -1
    k.slot[guests, [ksmd.FOLLOWING, ksmd.BEFORE]] = guests
    settings = {
        ksmd.SLOT: guests, ksmd.PHASE: ksmd.SLEEPING, ksmd.RUN: 1, ksmd.PAGES_TO_SCAN: 100, ksmd.SLEEP_MILLISECS: 20,
        ksmd.MAX_PAGE_SHARING: 256, ksmd.PRUNE_MILLISECS: 2000, ksmd.MAX_KERNEL_PAGES: 1 << 60, ksmd.HZ: 250,
        ksmd.CHECKSUM_FIRST: 1, ksmd.NODE_HOLDS_PAGE: 1, ksmd.COUNTS_LAST_BATCH: 1, ksmd.EXACT_SLEEP: 1,
    }  # fmt: skip
    for index, value in settings.items():
        k.n[index] = value
    return k


class Machine:
    """A host driven batch by batch; guests are numbered in the order in which they come."""

    def __init__(
        self, *, max_page_sharing: int = 256, smart_scan: bool = True, use_zero_pages: bool = False,
        checksum_first: bool = True, prune_millisecs: int = 2000, pages: int = 16 * BLOCK, guests: int = 12,
        contents: int = 16384, due: int = 64, thp: bool = False, split_frees_zero: bool = True,
        splits_later: bool = False,
    ) -> None:  # fmt: skip
        self.m = empty_memory(pages=pages, guests=guests, frames=1 << 40, due=due)
        self.m.counts[[memory.SPLIT_FREES_ZERO, memory.SPLITS_LATER]] = split_frees_zero, splits_later
        self.thp = thp
        self.k = idle_ksm(self.m, contents=contents)
        self.k.n[ksmd.MAX_PAGE_SHARING] = max_page_sharing
        self.k.n[ksmd.SCALE] = 1
        self.k.n[ksmd.USE_ZERO_PAGES] = use_zero_pages
        self.k.n[ksmd.CHECKSUM_FIRST] = checksum_first
        self.k.n[ksmd.PRUNE_MILLISECS] = prune_millisecs
        self.set_smart_scan(smart_scan)
        self.now = 0
        self.count = 0
        self._next_block = 0
        self._next_content = contents
        self._named: dict[int, int] = {}

    # --- guests ---------------------------------------------------------------------------------------------------

    def start(self, contents: list[int | None], mergeable: bool = True) -> int:
        """A guest with these contents starts; None is a page never touched. Returns its number."""
        guest = self._place(len(contents))
        held = np.array([NEVER if content is None else content for content in contents], np.int32)
        memory.fill_pages(self.m, self.first(guest), held)
        if mergeable:
            self.madvise(guest, 0, len(contents), True)
        return guest

    def _place(self, pages: int) -> int:
        assert self._next_block * BLOCK + pages <= len(self.m.place)
        guest = self.count
        self.count += 1
        blocks = -(-pages // BLOCK)
        self.m.guest[guest, [memory.FIRST, memory.PAGES]] = self._next_block * BLOCK, pages
        self.m.guest[guest, [memory.KEY, memory.SINCE]] = (guest + 1) << 40, self.now
        self.m.guest[guest, memory.THP] = self.thp
        self.m.block[self._next_block : self._next_block + blocks, memory.GUEST] = guest
        self._next_block += blocks
        return guest

    def first(self, guest: int) -> int:
        """Where the guest's pages begin."""
        return int(self.m.guest[guest, memory.FIRST])

    def span(self, guest: int) -> slice:
        """Where the guest's pages are."""
        return slice(self.first(guest), self.first(guest) + int(self.m.guest[guest, memory.PAGES]))

    def write(self, guest: int, page: int, content: int) -> None:
        """Write a page."""
        ksmd.note_writes(self.m, self.k, self.first(guest), np.array([page]))
        assert memory.write_page(self.m, self.first(guest) + page, content) == memory.OK

    def unmap(self, guest: int, page: int, pages: int = 1) -> None:
        """Discard a page, or several from it on."""
        ksmd.unmap_pages(self.m, self.k, self.first(guest) + page, pages)

    def collapse(self, guest: int, max_ptes_none: int, max_ptes_shared: int) -> None:
        """khugepaged goes through the guest."""
        memory.collapse_blocks(self.m, guest, 0, 1 << 40, max_ptes_none, max_ptes_shared, 64, self.now)

    def exit(self, guest: int) -> None:
        """The guest ends."""
        ksmd.unmap_pages(self.m, self.k, self.first(guest), int(self.m.guest[guest, memory.PAGES]))
        if self._registered(guest):
            ksmd.leave(self.m, self.k, guest)

    def fork(self, guest: int) -> int:
        """The guest forks. Returns the number of the child."""
        span = self.span(guest)
        before = self.m.held[span].copy()
        pages = len(before)
        self._next_content -= pages
        known = self.k.old[span] == before
        memory.name_contents(self.m, span.start, pages, self._next_content)
        self.k.old[span][known] = self.m.held[span][known]
        named = before != self.m.held[span]
        self._named.update(zip(self.m.held[span][named].tolist(), before[named].tolist(), strict=True))
        child = self._place(pages)
        memory.fork_pages(self.m, span.start, self.first(child), pages, self.now)
        self.k.slot[child, ksmd.MERGEABLE_PAGES] = self.k.slot[guest, ksmd.MERGEABLE_PAGES]
        if self._registered(guest):
            ksmd.register(self.m, self.k, child)
        return child

    def madvise(self, guest: int, first: int, pages: int, mergeable: bool) -> None:
        """Advise a range of pages to be mergeable or not."""
        start = self.first(guest) + first
        if not mergeable:
            assert ksmd.unmerge_pages(self.m, start, pages) == memory.OK
        ksmd.advise_mergeable(self.m, self.k, guest, start, pages, mergeable)
        if mergeable and pages and not self._registered(guest):
            ksmd.register(self.m, self.k, guest)
            ksmd.wake_up(self.k, self.now)

    def _registered(self, guest: int) -> bool:
        return bool(self.k.slot[guest, ksmd.BEFORE] >= 0)

    def listed(self) -> list[int]:
        """Guests on KSM's list, from its head."""
        guests, head = [], len(self.m.guest)
        at = int(self.k.slot[head, ksmd.FOLLOWING])
        while at != head:
            guests.append(at)
            at = int(self.k.slot[at, ksmd.FOLLOWING])
        return guests

    def read(self, guest: int) -> list[int | None]:
        """What each page of the guest holds, None where it was never touched."""
        contents = self._contents(self.span(guest)).tolist()
        return [None if content == NEVER else self._named.get(content, content) for content in contents]

    def _contents(self, span: slice) -> Int32:
        place, held = self.m.place[span], self.m.held[span]
        shared = place & memory.SHARED != 0
        contents = held.copy()
        contents[shared] = self.m.frame[held[shared], memory.CONTENT]
        contents[place & memory.ZERO != 0] = 0
        contents[place & memory.PRESENT == 0] = NEVER
        return contents

    # --- knobs and counters ---------------------------------------------------------------------------------------

    def run(self, value: int) -> None:
        """Write the knob `run`."""
        if value == 2 and self.k.n[ksmd.RUN] != 2:
            assert ksmd.unmerge_all(self.m, self.k) == memory.OK
        self.k.n[ksmd.RUN] = value
        if value == 1:
            ksmd.wake_up(self.k, self.now)

    def set_smart_scan(self, on: bool) -> None:
        """Write the knob `smart_scan`."""
        self.settle()
        visits = np.arange(ksmd.SMART_VISITS)
        after = np.where(visits == ksmd.SMART_VISITS - 1, ksmd.SMART_CYCLE, visits + 1)
        self.k.n[ksmd.SMART_SCAN] = on
        self.k.smart[ksmd.PROCESSED] = np.isin(visits, ksmd.SMART_PROCESSED) if on else 1
        self.k.smart[ksmd.NEXT_VISIT] = after if on else visits

    def set_use_zero_pages(self, on: bool) -> None:
        """Write the knob `use_zero_pages`."""
        self.settle()
        self.k.n[ksmd.USE_ZERO_PAGES] = on

    def settle(self) -> None:
        """Let every block be visited page by page in the next full scan."""
        ksmd.settle_all(self.m, self.k)

    def between_scans(self) -> bool:
        """Whether ksmd has ended a full scan and not begun the next."""
        return bool(self.k.n[ksmd.SLOT] == len(self.m.guest))

    def counters(self) -> dict[str, int]:
        """Every counter, as a snapshot shows it."""
        row = np.zeros((1, self.k.log.shape[1]), np.int64)
        ksmd.snapshot(self.m, self.k._replace(log=row), self.now, 0)
        return counters_of(row[0])

    # --- time -----------------------------------------------------------------------------------------------------

    def batch(self, pages_to_scan: int) -> None:
        """One batch of ksmd, at the time at which it wakes up."""
        n = self.k.n
        n[ksmd.PAGES_TO_SCAN] = pages_to_scan
        if n[ksmd.PHASE] != ksmd.IDLE:
            self.now = int(n[ksmd.WAKE])
            self.advance(self.now + 1)

    def scan(self, scans: int, pages_to_scan: int = 1 << 40) -> list[dict[str, int]]:
        """Full scans, each in one batch unless told otherwise. Returns the counters at the end of each."""
        before = int(self.k.n[ksmd.LOGGED])
        while self.k.n[ksmd.LOGGED] < before + scans:
            self.batch(pages_to_scan)
        return [counters_of(row) for row in self.k.log[before : before + scans]]

    def advance(self, horizon: int) -> None:
        """Let host time reach *horizon* (ns)."""
        assert ksmd.advance(self.m, self.k, horizon, False) == ksmd.PAUSED


def counters_of(row: memory.Int64) -> dict[str, int]:
    """The counters of a row of the log, by name."""
    ksm, counts = row[ksmd.SNAPSHOT :], row[ksmd.SNAPSHOT + ksmd.COUNTERS :]
    found = {name: int(ksm[index]) for name, index in KSM_COUNTERS.items()}
    found |= {name: int(counts[index]) for name, index in MEMORY_COUNTS.items()}
    found["frames"] = int(counts[[memory.PRIVATE, memory.FRAMES, memory.DEFERRED]].sum())
    in_trees = found["pages_shared"] + found["pages_sharing"] + found["pages_unshared"]
    found["pages_volatile"] = max(0, found["items"] - in_trees)
    return found
