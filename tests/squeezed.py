"""A host that is short of memory, what its guests wrote as plain lists, and a recount of all that the host keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from one_host import size

from sim.columns import PAGE_BYTES
from sim.memory import pages as memory
from sim.memory.guest import Vm
from sim.memory.huge import Daemon, Khugepaged
from sim.memory.pages import BLOCK, NEVER, Float64
from sim.reclaim.compression import AS_IS
from sim.reclaim.pressure import BACK_COUNT, BACK_FIRST
from sim.reclaim.swap import DeviceTimes
from sim.reclaim.zswap import Pool
from sim.sharing.kernels import kernel
from sim.sharing.ksm import Ksm
from sim.sharing.ksm_pass import WORK
from sim.sharing.room import OutOfFrames, Room, Site, Squeeze
from sim.sharing.scanner import Scanner
from sim.units import MICROSECOND, MILLISECOND, SECOND

DISK = DeviceTimes(
    read_ns=100 * MICROSECOND, write_ns=50 * MICROSECOND, ns_per_page=2 * MICROSECOND, channels=2,
    cpu_in_ns=1 * MICROSECOND, cpu_out_ns=2 * MICROSECOND, drop_ns=1 * MICROSECOND, submit_ns=3 * MICROSECOND,
)  # fmt: skip
ZRAM = DeviceTimes(0, 0, 0, 1, 1 * MICROSECOND, 2 * MICROSECOND)
ZIP_NS = np.full((AS_IS + 1, 2), [7 * MICROSECOND, 4 * MICROSECOND])
WATERMARKS = 4, 8, 12
CONTENTS = 1 << 16
POOL = 60
"""What random writes of class WRITTEN leave."""
NAMED = 1000
"""The first number that a content gets which one page alone held before a fork."""

WRITTEN, FRESH, READ, LOOP = range(1, 5)
"""Classes of accesses: writes of one content, writes of new ones and reads, reads, a loop of reads."""


class Speeds(NamedTuple):
    """Accesses per second and page of each class, and the pages of the loop."""

    writes: float = 2.0
    reads: float = 5.0
    loop: float = 4.0
    loop_pages: int = 100

    def rates(self) -> Float64:
        """What `Memory.rates` says of the classes."""
        table = np.zeros((5, memory.ACCESS_COLUMNS))
        table[WRITTEN, [memory.WRITES, memory.LOWEST, memory.SPAN]] = self.writes / SECOND, POOL, 1
        table[FRESH, [memory.WRITES, memory.READS]] = self.writes / SECOND, self.reads / SECOND
        table[READ, memory.READS] = self.reads / SECOND
        table[LOOP, [memory.PERIOD, memory.LOOP_PAGES]] = SECOND / self.loop, self.loop_pages
        return table


_SPEEDS = Speeds()


class Squeezed:
    """A host whose guests are numbered in the order in which they start; whoever finds no frame is killed."""

    def __init__(
        self, *, frames: int, slots: int = 1 << 20, zram: bool = False, thp: bool = False, version: str = "6.18",
        watermarks: tuple[int, int, int] = WATERMARKS, swappiness: int = 60, page_cluster: int = 3,
        speeds: Speeds = _SPEEDS, guests: int = 12, device: DeviceTimes | None = None, zswap: Pool | None = None,
        look_ns: int = 100, **ksm: Any,
    ) -> None:  # fmt: skip
        squeeze = Squeeze(
            watermarks=watermarks, swappiness=swappiness, page_cluster=page_cluster, slots=slots,
            device=device or (ZRAM if zram else DISK), look_ns=look_ns, compresses=zram,
            zswap=zswap, zip_ns=ZIP_NS if (zram and not device) or zswap else None,
        )  # fmt: skip
        settings = Ksm.model_validate({"run": 0, "pages_to_scan": 200, **ksm}).completed(kernel(version))
        self.scanner = Scanner(
            settings,
            Site(
                kernel=kernel(version), hz=250, frames=frames, pages=BLOCK, guests=guests, contents=CONTENTS, nodes=1,
                work_ps=np.zeros(len(WORK), np.int64), split_ps=0, cold_milli=0, rates=speeds.rates(), key=7,
                squeeze=squeeze,
            ),
        )  # fmt: skip
        self.daemon = Daemon(Khugepaged(pages_to_scan=BLOCK * 4, max_ptes_none=511))
        self.thp = thp
        self.now = 0
        self.count = 0
        self.wrote: dict[int, list[int]] = {}
        """What each guest that runs wrote last to each page, 0 where it never wrote."""
        self.kinds: dict[int, list[int]] = {}
        self.killed: list[int] = []
        self.pressure = 0, 0
        self._next_content = NAMED
        self.scanner.begin()

    @property
    def counts(self) -> dict[str, int]:
        """Some of the host's counters, by the names of the tables."""
        columns = self.scanner.columns(self.scanner.snapshot(self.now)[np.newaxis])
        return {name: int(values[0]) for name, values in columns.items()}

    # --- what happens ---------------------------------------------------------------------------------------------

    def start(
        self, contents: Sequence[int], kind: int | Sequence[int] = 0, *, limit: int | None = None,
        mergeable: bool = False, level: float = 1.0, **vm: Any,
    ) -> int:  # fmt: skip
        """A guest starts and writes these contents. Returns its number."""
        guest = self._add(len(contents), limit, level, vm)
        m = self.scanner.m
        accesses = np.zeros(len(contents), np.uint16)
        accesses[:] = kind
        self.scanner.set_accesses(guest, accesses)
        if len(m.packed):
            self.scanner.set_packed(guest, (np.arange(len(contents)) * 37 % 255 + 1).astype(m.packed.dtype))
        assert not np.any(m.place[self.scanner.pages_of(guest)])
        if mergeable:
            self.scanner.advise(guest, 0, len(contents), True, self.now)
        self.wrote[guest] = [0 if content == NEVER else content for content in contents]
        self.kinds[guest] = accesses.tolist()
        self._try(guest, lambda: self.scanner.fill(guest, np.array(contents, np.int32), self.now))
        return guest

    def _add(self, pages: int, limit: int | None, level: float, about: Mapping[str, Any]) -> int:
        guest, self.count = self.count, self.count + 1
        limits = {"memory_limit": size(min(limit, pages))} if limit else {}
        vm = Vm.model_validate({"name": "vm", "memory": size(pages), **limits, **about})
        self.scanner.add(
            guest, pages, vm=vm, key=(guest + 1) << 40, now=self.now, level=level, node=0, thp=self.thp
        )  # fmt: skip
        if self.thp:
            self.daemon.register(guest)
        return guest

    def write(self, guest: int, first: int, contents: Sequence[int]) -> None:
        """The guest writes contents to its pages from the first one."""
        pages = np.arange(first, first + len(contents))
        self.wrote[guest][first : first + len(contents)] = contents
        self._try(guest, lambda: self.scanner.write(guest, pages, np.array(contents, np.int32), self.now))

    def discard(self, guest: int, first: int, pages: int) -> None:
        """The guest gives pages back."""
        self.wrote[guest][first : first + pages] = [0] * pages
        self.scanner.discard(guest, np.arange(first, first + pages))

    def advise(self, guest: int, first: int, pages: int, mergeable: bool) -> bool:
        """The guest offers pages to KSM, or takes them back."""
        return self.scanner.advise(guest, first, pages, mergeable, self.now)

    def fork(self, parent: int) -> int:
        """The guest forks. Returns the number of the child."""
        wrote = self.wrote[parent]
        child = self._add(len(wrote), None, 1.0, {})
        self._next_content = self.scanner.fork(parent, child, self._next_content, self.now)
        named = self.read(parent)
        for page, (before, after) in enumerate(zip(wrote, named, strict=True)):
            if before < 0:
                assert after >= NAMED or after == before or self.kinds[parent][page] == WRITTEN
                wrote[page] = after
        self.wrote[child], self.kinds[child] = list(wrote), self.kinds[parent]
        return child

    def exit(self, guest: int) -> None:
        """The guest ends."""
        self.daemon.forget(guest)
        self.scanner.remove(guest)
        del self.wrote[guest]

    def run(self, value: int) -> str:
        """Write the knob `run`. Returns why it was refused, or nothing."""
        for _ in self.scanner.finish_batch():
            pass
        return self.scanner.set_knob("run", value, self.now)

    def collapse(self) -> None:
        """Khugepaged works once."""
        self.scanner.wake_khugepaged(self.daemon, self.now)

    def change_activity(self, guest: int, level: float) -> None:
        """The guest does more or less."""
        self.scanner.change_activity(guest, self.now, level)

    def pass_time(self, time: int = MILLISECOND) -> None:
        """Let time (ns) go by."""
        self.now += time
        while True:
            try:
                for _ in self.scanner.advance(self.now):
                    pass
                return
            except OutOfFrames as starved:
                self._kill(starved.guest)

    def _try(self, guest: int, ask: Any) -> None:
        try:
            ask()
        except OutOfFrames as starved:
            assert starved.guest == guest
            self._kill(guest)

    def _kill(self, guest: int) -> None:
        self.killed.append(guest)
        self.exit(guest)

    # --- what is there --------------------------------------------------------------------------------------------

    def read(self, guest: int) -> list[int]:
        """What the guest reads; a page that it never touched reads as zeros."""
        contents = self.scanner.read(guest)
        return [0 if content == NEVER else content for content in contents.tolist()]

    def place(self, guest: int) -> Any:
        """Where the guest's pages are."""
        return self.scanner.m.place[self.scanner.pages_of(guest)]

    def swapped(self, guest: int) -> list[int]:
        """Pages of the guest that are swapped out."""
        return np.flatnonzero(self.place(guest) & memory.SWAPPED).tolist()

    def check(self) -> None:
        """Nothing is lost, and everything that the host counts is as often there."""
        for guest, wrote in self.wrote.items():
            for page, (read, written) in enumerate(zip(self.read(guest), wrote, strict=True)):
                kind = self.kinds[guest][page]
                left = (kind == WRITTEN and read == POOL) or (kind == FRESH and (read < 0 or read >= NAMED))
                assert read == written or left, f"guest {guest} page {page}: reads {read}, wrote {written}"
        recount(self.scanner, list(self.wrote))
        check_writes(self.scanner)
        some, full = self.scanner.pressure(self.now)
        assert self.pressure[0] <= some <= self.now
        assert self.pressure[1] <= full <= some
        self.pressure = some, full


def recount(room: Room, running: list[int]) -> None:
    """Count what every number of the host stands for, and walk every list that it keeps."""
    m = room.m
    present, swapped, shared, zero, slot = (
        m.place & bit != 0 for bit in (memory.PRESENT, memory.SWAPPED, memory.SHARED, memory.ZERO, memory.SLOT)
    )
    own = present & ~shared & ~zero
    assert not np.any(present & swapped)
    assert not np.any(shared & ~(present | swapped))
    assert not np.any(zero & ~(present & ~shared))
    assert not np.any(slot & ~own)

    maps, pins = Counter(m.held[present & shared].tolist()), pinned(room)
    alive = maps.keys() | pins
    waits = Counter(m.held[swapped & shared].tolist())
    for frame in range(int(m.counts[memory.FRAME_HIGH])):
        kind, mapped = m.frame[frame, memory.KIND], m.frame[frame, memory.MAPS]
        if kind:
            assert mapped == (waits if kind == memory.SWAP_ENTRY else maps)[frame] + (frame in pins)
            assert mapped or kind not in (memory.ANON, memory.SWAP_ENTRY)
    assert all(m.frame[frame, memory.KIND] == memory.SWAP_ENTRY for frame in waits)
    assert all(m.frame[frame, memory.KIND] not in (0, memory.SWAP_ENTRY) for frame in maps)

    huge = m.block[:, memory.HUGE] != 0
    assert np.all(own.reshape(-1, BLOCK)[huge])
    torn = m.block[:, memory.IN_USE] > 0
    kept = np.where(torn, BLOCK - m.block[:, memory.IN_USE], 0)
    assert not np.any(huge & torn)
    assert np.all(m.block[torn, memory.IN_USE] < BLOCK)
    slots = np.count_nonzero(swapped & ~shared) + len(waits) + np.count_nonzero(slot)
    counted = {
        memory.PRIVATE: np.count_nonzero(own),
        memory.DEFERRED: kept.sum(),
        memory.FRAMES: len(alive),
        memory.TOUCHED: np.count_nonzero(present),
        memory.SHARERS: np.count_nonzero(present & shared),
        memory.KSM_ZERO: np.count_nonzero(zero),
        memory.SWAPPED_PAGES: np.count_nonzero(swapped),
        memory.SLOTS_USED: slots,
        memory.HUGE_PAGES: np.count_nonzero(huge),
    }
    assert {index: int(m.counts[index]) for index in counted} == counted
    metadata = -(-int(m.counts[memory.METADATA]) // PAGE_BYTES)
    assert free_frames(m) >= -metadata
    for guest in running:
        assert m.guest[guest, memory.OUT] == np.count_nonzero(swapped[room.pages_of(guest)])
    check_due(m)
    if m.counts[memory.LRU]:
        pooled = m.counts[memory.POOLED_PAGES] if m.counts[memory.POOL_HAS_NO_SLOTS] else 0
        assert slots - pooled <= m.counts[memory.SWAP_SLOTS]
        check_pool(m, np.flatnonzero(swapped & ~shared), list(waits))
        check_lists(room, running, own, {frame: maps[frame] for frame in alive}, pins)


def pinned(room: Room) -> set[int]:
    """Frames that stay because pages kept as differences are built from them."""
    small = getattr(room, "s", None)
    return set(np.flatnonzero(small.pins > 0).tolist()) if small else set()


def check_lists(room: Room, running: list[int], own: Any, maps: Mapping[int, int], pins: set[int]) -> None:
    """Every page of a guest's own and every shared frame that it is charged is on one of its lists."""
    m = room.m
    present, shared = m.place & memory.PRESENT != 0, m.place & memory.SHARED != 0
    for guest in running:
        pages = room.pages_of(guest)
        owned = [frame for frame in maps if m.frame_lru[frame, memory.OWNER] == guest]
        assert m.guest[guest, memory.CHARGED] == np.count_nonzero(own[pages]) + kept_by(m, pages) + len(owned)
        expected = {page + 1 for page in range(pages.start, pages.stop) if own[page] and not in_tail(m, page)}
        assert set(on_lists(m, guest)) == expected | {
            -(frame + 1) for frame in owned if not (stays(m, frame) or frame in pins)
        }
    assert sum(m.guest[guest, memory.CHARGED] for guest in running) == m.guest[:, memory.CHARGED].sum()
    for frame, mappers in maps.items():
        assert m.frame_lru[frame, memory.OWNER] in running
        ring = on_ring(m, frame)
        assert len(ring) == mappers
        assert all(m.held[page] == frame and present[page] and shared[page] for page in ring)


def kept_by(m: memory.Memory, pages: slice) -> int:
    """Frames of huge pages that nobody maps, for others of the same huge page are in use: as many as there are bits."""
    blocks = m.block[pages.start // BLOCK : pages.stop // BLOCK]
    torn = blocks[blocks[:, memory.IN_USE] > 0]
    assert not blocks[blocks[:, memory.IN_USE] == 0, memory.GIVEN_BACK :].any()
    kept = int(np.bitwise_count(torn[:, memory.GIVEN_BACK :].view(np.uint64)).sum())
    assert kept == int((BLOCK - torn[:, memory.IN_USE]).sum())
    return kept


def check_writes(scanner: Scanner) -> None:
    """Frames on their way to the device are those of the writes that have not ended, in order of time."""
    n, back = scanner.r.n, scanner.r.back
    writes = back[(n[BACK_FIRST] + np.arange(n[BACK_COUNT])) % len(back)]
    assert np.all(np.diff(writes[:, 0]) >= 0)
    assert np.all(writes[:, 1] >= 0)
    assert scanner.m.counts[memory.WRITEBACK] == writes[:, 1].sum()


def check_pool(m: memory.Memory, alone: Any, waits: list[int]) -> None:
    """What is compressed in memory takes as many zspages as its sizes say."""
    seen = m.seen[alone] if len(m.seen) else alone
    packed = m.packed[alone[seen & memory.POOLED != 0]].tolist() if len(m.packed) else []
    packed += [int(m.frame_lru[entry, memory.STAMP]) for entry in waits
               if m.frame_lru[entry, memory.SEEN] & memory.POOLED]  # fmt: skip
    assert m.counts[memory.POOLED_PAGES] == len(packed)
    stored: Counter[int] = Counter()
    for each in packed:
        stored[int(m.zspage[each, 0])] += int(m.zspage[each, memory.WEIGHT])
    sizes = {int(m.zspage[each, 0]): m.zspage[each] for each in packed}
    pages = sum(-(-count // sizes[kind][memory.OBJECTS]) * sizes[kind][memory.ZSPAGE_PAGES]
                for kind, count in stored.items())  # fmt: skip
    assert m.counts[memory.POOL] == pages


def free_frames(m: memory.Memory) -> int:
    """Frames that nothing uses, counted anew."""
    used = [memory.PRIVATE, memory.FRAMES, memory.RESERVED, memory.DEFERRED, memory.POOL, memory.WRITEBACK]
    metadata = -(-int(m.counts[memory.METADATA]) // PAGE_BYTES)
    return int(m.counts[memory.LIMIT] - m.counts[used].sum()) - metadata


def stays(m: memory.Memory, frame: int) -> bool:
    """Whether the frame is a KSM page of a kernel that cannot swap those."""
    return bool(m.counts[memory.KSM_STAYS] and m.frame[frame, memory.KIND] != memory.ANON)


def in_tail(m: memory.Memory, page: int) -> bool:
    """Whether the page is in a huge page, but not its first."""
    return bool(m.block[page // BLOCK, memory.HUGE] and page % BLOCK)


def on_lists(m: memory.Memory, guest: int) -> list[int]:
    """Entries of a guest's two lists, from the heads; every link back and every size is checked."""
    found: list[int] = []
    for active in (False, True):
        column = memory.INACTIVE + memory.LIST_COLUMNS * active
        at, before, size = int(m.guest[guest, column + memory.HEAD]), 0, 0
        while at:
            row, seen = (m.lru[at - 1], m.seen[at - 1]) if at > 0 else (m.frame_lru[-at - 1], None)
            bits = m.frame_lru[-at - 1, memory.SEEN] if seen is None else seen
            assert row[memory.PREVIOUS] == before
            assert (bits & memory.ACTIVE_LIST != 0) == active
            size += BLOCK if at > 0 and m.block[(at - 1) // BLOCK, memory.HUGE] else 1
            found.append(at)
            assert len(found) == len(set(found))
            before, at = at, int(row[memory.NEXT])
        assert m.guest[guest, column + memory.TAIL] == before
        assert m.guest[guest, column + memory.SIZE] == size
    return found


def on_ring(m: memory.Memory, frame: int) -> list[int]:
    """Pages of the ring of those who map a shared frame."""
    first = at = int(m.frame_lru[frame, memory.RING])
    found = []
    while at:
        found.append(at - 1)
        following = int(m.lru[at - 1, memory.NEXT])
        assert m.lru[following - 1, memory.PREVIOUS] == at
        at = 0 if following == first else following
        assert len(found) <= m.frame[frame, memory.MAPS]
    return found


def check_due(m: memory.Memory) -> None:
    """The list of what is due is a heap with each access once, and the pages know."""
    due = m.due[: m.counts[memory.DUE_COUNT]]
    keys = [(int(time), int(code)) for time, _, code in due]
    assert all(keys[(at - 1) // 2] <= keys[at] for at in range(1, len(keys)))
    codes = [code for _, code in keys]
    assert len(set(codes)) == len(codes)
    writes = {code // 2 for code in codes if not code & 1}
    reads = {code // 2 for code in codes if code & 1}
    assert writes == set(np.flatnonzero(m.place & memory.DUE).tolist())
    assert reads == set(np.flatnonzero(m.place & memory.DUE_READ).tolist())
