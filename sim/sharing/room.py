"""A host's memory with the guests in it, and what the host asks of a mechanism that shares their pages.

`sim/memory/pages.py` has the steps, the file of each mechanism its behaviour.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar

import numpy as np
import numpy.typing as npt

from sim.memory import pages as memory
from sim.memory.compiled import quick
from sim.memory.guest import Vm
from sim.memory.huge import Daemon
from sim.memory.pages import BLOCK, Float64, Int32, Int64, Memory, UInt8, UInt16
from sim.reclaim import pressure
from sim.reclaim.compression import AS_IS, zsmalloc_classes
from sim.reclaim.pressure import Pressure
from sim.reclaim.swap import DeviceTimes
from sim.reclaim.zswap import Pool
from sim.sharing import declared_pass, equal_pages
from sim.sharing.equal_pages import Equal
from sim.sharing.kernels import Kernel
from sim.sharing.mechanism import Mechanism
from sim.sharing.source import AtSource

Number = TypeVar("Number", bound=np.generic)

ROOM: Final = 4
"""Shared frames and due accesses that one step may need."""

_next_event = quick(pressure.next_event)
_run_until = quick(pressure.run_until)
_change_activity = quick(memory.change_activity)

_NO_END: Final = 1 << 62
_FIRST_DUE: Final = 1024
_MOST_GONE: Final = 1 << 16
_MOST_WRITES: Final = 4096

_MAPS_SHARED: Final = memory.PRESENT | memory.SHARED

_SWAP_COUNTERS: Final = {
    "pswpin": memory.PSWPIN,
    "pswpout": memory.PSWPOUT,
    "swpin_zero": memory.SWPIN_ZERO,
    "swpout_zero": memory.SWPOUT_ZERO,
    "thp_swpout": memory.THP_SWPOUT,
    "ksm_swpin_copy": memory.KSM_SWPIN_COPY,
    "swap_ra": memory.SWAP_RA,
    "swap_ra_hit": memory.SWAP_RA_HIT,
    "allocstall": memory.ALLOCSTALL,
    "pgmajfault": memory.PGMAJFAULT,
    "zswpin": memory.ZSWPIN,
    "zswpout": memory.ZSWPOUT,
    "zswpwb": memory.ZSWPWB,
    "workingset_refault_anon": memory.REFAULT,
    "workingset_activate_anon": memory.REFAULT_ACTIVE,
    "psi_some_ns": memory.PSI_SOME,
    "psi_full_ns": memory.PSI_FULL,
    "stalled_ns": memory.STALLED_NS,
    "swpin_cached": memory.SWPIN_CACHED,
    "swpin_wait_ns": memory.SWPIN_WAIT_NS,
}


@dataclass(frozen=True)
class Squeeze:
    """How a host reclaims memory."""

    watermarks: tuple[int, int, int]
    """The watermarks min, low and high, in pages."""
    swappiness: int
    page_cluster: int
    slots: int
    """Pages that swap holds."""
    device: DeviceTimes | None
    """What swapping takes; None where there is no swap."""
    look_ns: int
    """CPU time of looking at a page that stays."""
    compresses: bool
    """Whether swap is compressed memory, which keeps no copy of what came back."""
    zswap: Pool | None = None
    """Limits of zswap's pool."""
    zip_ns: Int64 | None = None
    """CPU time (ns) of compressing a page and of decompressing it, where pages are compressed; see `cpu_ns`."""


@dataclass(frozen=True)
class Site:
    """What a mechanism is told of the host that it works on, of its guests and of the run."""

    kernel: Kernel
    hz: int
    frames: int
    """Frames of the host."""
    pages: int
    """Pages of guests that there is room for to begin with."""
    guests: int
    """Most guests."""
    contents: int
    """Most contents that are not unique: those have numbers below."""
    nodes: int
    """NUMA nodes."""
    rates: Float64
    """See `Memory.rates`."""
    key: int
    """Key of the host's random stream."""
    work_ps: Int64
    """Price in picoseconds of each kind of WORK."""
    split_ps: int
    """Price of splitting a huge page."""
    cold_milli: int
    """Surcharge for cold caches (see `Prices.cold_caches`), in thousandths."""
    sha1_ps: int = 0
    """Price of the SHA1 of a page."""
    squeeze: Squeeze | None = None
    """How memory is reclaimed; without it all pages stay."""
    scale: int = 1
    """How many pages each page stands for (`sim/scale.py`); prices are those of so many."""


class OutOfFrames(Exception):
    """A guest asked for a frame and there is none."""

    def __init__(self, guest: int, time: int = 0) -> None:
        """*time* is the host time (ns) of a write that was due; what a guest does now needs none."""
        super().__init__(guest, time)
        self.guest = guest
        self.time = time


def blocks_of(pages: int) -> int:
    """Blocks that a guest of so many pages takes."""
    return -(-pages // BLOCK)


class Room:
    """Memory of one host and its guests. It scans nothing; what does is a subclass. Times are host times in ns."""

    WORK: ClassVar[tuple[str, ...]] = ()
    """Kinds of work that it counts; each has a price (see cost/prices.py)."""
    ROW: ClassVar[int] = 1 + memory.COUNTS
    """Numbers in a row of its log."""

    m: Memory
    r: Pressure
    notes: list[tuple[int, str, str]]
    """What happened of itself, for the table of events: time (ns), kind, particulars."""
    sources: list[AtSource]
    """What shares pages where they come from."""
    files: dict[int, npt.NDArray[np.bool_]]
    """Of each guest, which pages hold what was read from files, if anything wants to know that."""
    origins: dict[int, Int32]
    """Of a guest whose pages are shared as declared, the number of the file or segment that each comes from, 0 none."""

    def __init__(self, settings: Mechanism, site: Site) -> None:
        """*settings* are complete for the kernel."""
        guests, squeeze = site.guests, site.squeeze
        blocks = blocks_of(site.pages)
        room = blocks * BLOCK
        spare = pressure.ROOM if squeeze else ROOM
        self.m = Memory(
            place=np.zeros(room, np.uint8),
            held=np.zeros(room, np.int32),
            accesses=np.zeros(room, np.uint16),
            lru=np.zeros((room if squeeze else 0, memory.LRU_COLUMNS), np.int32),
            seen=np.zeros(room if squeeze else 0, np.uint8),
            packed=np.zeros(room if squeeze and (squeeze.compresses or squeeze.zswap) else 0, np.uint8),
            zspage=np.zeros((AS_IS + 1, memory.ZSPAGE_COLUMNS), np.int64),
            block=np.zeros((blocks, memory.BLOCK_COLUMNS), np.int64),
            frame=np.zeros((room + spare, memory.FRAME_COLUMNS), np.int32),
            frame_lru=np.zeros((room + spare if squeeze else 0, memory.FRAME_LRU_COLUMNS), np.int32),
            gone=np.zeros(min(_MOST_GONE, site.frames) if squeeze else 0, np.int32),
            from_disk=np.zeros(0, np.int32),
            guest=np.zeros((guests, memory.GUEST_COLUMNS), np.int64),
            level=np.ones(guests),
            rates=site.rates,
            due=np.zeros((_FIRST_DUE + 2 * spare, memory.DUE_COLUMNS), np.int64),
            counts=np.zeros(memory.COUNTS, np.int64),
        )
        self.m.zspage[:, : memory.WEIGHT] = zsmalloc_classes()
        self.m.zspage[:, memory.WEIGHT] = 1
        self.m.counts[memory.LIMIT] = site.frames
        self.m.counts[memory.FREE_FRAME] = -1
        self.m.counts[memory.STANDS_FOR] = site.scale
        self.m.counts[memory.REUSE_LAST_MAPPER] = site.kernel.reuse_last_mapper
        self.m.counts[memory.SPLIT_FREES_ZERO] = site.kernel.split_frees_zero
        self.m.counts[memory.SPLITS_LATER] = site.kernel.deferred_split
        self.r = self._pressure(squeeze, guests, site.scale)
        self.r.n[pressure.SPLIT_NS] = site.split_ps // 1000
        self.notes = []
        self.sources = []
        self.files = {}
        self.origins = {}
        self._free_blocks: list[tuple[int, int]] = [(0, blocks)] if blocks else []

    def _pressure(self, squeeze: Squeeze | None, guests: int, scale: int) -> Pressure:
        device = squeeze.device if squeeze else None
        r = Pressure(
            n=np.zeros(pressure.NUMBERS, np.int64),
            channel=np.zeros(device.channels if device else 1, np.int64),
            back=np.zeros((_MOST_WRITES, 2), np.int64),
            queue=np.zeros(squeeze.slots if squeeze and squeeze.zswap else 0, np.int32),
            zip_ns=np.zeros((AS_IS + 1, 2), np.int64),
            load=np.zeros(guests),
            until=np.zeros(guests, np.int64),
        )
        r.n[pressure.SCALE] = scale
        r.n[pressure.CLUSTER] = max(pressure.BATCH // scale, 1)
        r.n[pressure.STEP] = max(pressure.MOST_AT_ONCE // scale, 1)
        if squeeze:
            self.m.counts[memory.LRU] = 1
            self.m.counts[memory.SWAP_SLOTS] = squeeze.slots
            self.m.counts[memory.KEEPS_SLOTS] = not squeeze.compresses
            r.n[[pressure.W_MIN, pressure.W_LOW, pressure.W_HIGH]] = squeeze.watermarks
            r.n[pressure.SWAPPINESS] = squeeze.swappiness
            r.n[pressure.PAGE_CLUSTER] = squeeze.page_cluster
            r.n[pressure.LOOK_NS] = squeeze.look_ns
            r.n[pressure.SYNCHRONOUS] = squeeze.compresses
        if squeeze and squeeze.zswap:
            r.n[[pressure.POOL_MOST, pressure.POOL_AGAIN]] = squeeze.zswap
        if squeeze and squeeze.zip_ns is not None:
            r.zip_ns[:] = squeeze.zip_ns
        if device:
            r.n[pressure.READ_NS] = device.read_ns
            r.n[pressure.WRITE_NS] = device.write_ns
            r.n[pressure.PAGE_NS] = device.ns_per_page
            r.n[pressure.IN_NS] = device.cpu_in_ns
            r.n[pressure.OUT_NS] = device.cpu_out_ns
            r.n[pressure.DROP_NS] = device.drop_ns
            r.n[pressure.SUBMIT_NS] = device.submit_ns
        return r

    # --- what a mechanism does ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The run begins."""

    def advance(self, horizon: int) -> Iterator[Int64]:
        """Let everything that is due by *horizon* happen; yields rows of the table of scans. Raises OutOfFrames."""
        self._run_guests(horizon)
        yield from ()

    def snapshot(self, now: int) -> Int64:
        """Every counter as it is now, a row of ROW numbers."""
        row = np.array([now, *self.m.counts], np.int64)
        row[[1 + memory.PSI_SOME, 1 + memory.PSI_FULL]] = self.pressure(now)
        return row

    def columns(self, log: Int64) -> dict[str, npt.NDArray[Any]]:
        """Rows as the columns of the tables that it knows (`sim.columns.SAMPLES`), and `cow_breaks`."""
        shared, sharers = log[:, 1 + memory.FRAMES], log[:, 1 + memory.SHARERS]
        return {
            "time_s": log[:, 0] / 1e9,
            "pages_shared": shared,
            "pages_sharing": sharers - shared,
            **memory_columns(log[:, 1 : 1 + memory.COUNTS]),
        }

    def counters_of(self, guest: int) -> Mapping[str, int]:
        """What the guest's row in the table of guests says of sharing."""
        shared = np.count_nonzero(self.m.place[self.pages_of(guest)] & (memory.PRESENT | memory.SHARED) == _MAPS_SHARED)
        return {"ksm_merging_pages": int(shared)}

    def work_done(self) -> dict[str, int]:
        """How much was done of each kind of WORK."""
        return {}

    def advise(self, guest: int, first: int, pages: int, mergeable: bool, now: int) -> bool:
        """Offer a range for sharing, or take it back. Returns False if that is refused (nothing is lost)."""
        start = int(self.m.guest[guest, memory.FIRST]) + first
        place = self.m.place[start : start + pages]
        place &= np.uint8(~memory.MERGEABLE & 0xFF)
        place |= np.uint8(memory.MERGEABLE * mergeable)
        return True

    def remove(self, guest: int) -> None:
        """The guest exits."""
        memory.drop_pages(self.m, *self.m.guest[guest, [memory.FIRST, memory.PAGES]])
        self._end(guest)
        self._give_back(guest)

    # --- settings that change in a run, for mechanisms that have such -----------------------------------------------

    def knob(self, name: str) -> int:
        """Read a setting."""
        raise KeyError(name)

    def set_knob(self, name: str, value: int | str, now: int) -> str:
        """Write a setting. Returns why it was refused (as errno), or nothing."""
        return f"EINVAL: no setting {name}"

    def finish_batch(self) -> Iterator[Int64]:
        """Let the scanner end what cannot be interrupted, before a setting is written; yields as `advance` does."""
        yield from ()

    # --- guests ---------------------------------------------------------------------------------------------------

    def add(
        self, guest: int, pages: int, *, vm: Vm, key: int, now: int, level: float, node: int, thp: bool
    ) -> None:  # fmt: skip
        """Give a guest that starts now its address space, all of it untouched; with *thp* it faults in huge pages."""
        first = self._place_blocks(blocks_of(pages))
        m = self.m
        m.guest[guest] = 0
        m.guest[guest, memory.FIRST] = first * BLOCK
        m.guest[guest, memory.PAGES] = pages
        m.guest[guest, memory.KEY] = np.uint64(key).astype(np.int64)
        m.guest[guest, memory.SINCE] = now
        m.guest[guest, memory.THP] = thp
        m.guest[guest, memory.CHARGE_LIMIT] = (vm.memory_limit or 0) // memory.PAGE_BYTES
        m.guest[guest, memory.VCPUS] = vm.vcpus
        m.guest[guest, memory.STAYS] = vm.huge_pages == "hugetlbfs"
        self.r.load[guest] = vm.load
        m.level[guest] = level
        blocks = slice(first, first + blocks_of(pages))
        m.block[blocks, memory.GUEST] = guest
        m.block[blocks, memory.LOOKED] = 0
        m.block[blocks, memory.ADJACENT] = 0
        m.block[blocks, memory.TEMPER] = memory.ANY
        m.accesses[self.pages_of(guest)] = 0

    def pages_of(self, guest: int) -> slice:
        """Where the guest's pages are."""
        first, pages = self.m.guest[guest, [memory.FIRST, memory.PAGES]]
        return slice(int(first), int(first + pages))

    def reserve(self, pages: int) -> None:
        """Set so many frames aside, or hand them back."""
        self.m.counts[memory.RESERVED] += pages

    def wake_khugepaged(self, daemon: Daemon, now: int) -> tuple[int, int]:
        """Let khugepaged work once. Returns blocks looked at, and huge pages made."""
        return daemon.wake(self.m, now)

    def fill(self, guest: int, contents: Int32, now: int) -> None:
        """Touch the guest's pages for the first time; it has them when it starts. Raises OutOfFrames."""
        if self.m.counts[memory.LRU]:
            self._store(guest, np.arange(len(contents)), contents, False, now)
        elif memory.fill_pages(self.m, int(self.m.guest[guest, memory.FIRST]), contents) < len(contents):
            raise OutOfFrames(guest)
        for source in self.sources:
            source.came(guest, np.flatnonzero(contents != memory.NEVER), now)

    def write(self, guest: int, pages: Int64, contents: Int32, now: int) -> None:
        """Write contents to the guest's pages, for which it waits. Raises OutOfFrames."""
        self._store(guest, pages, contents, True, now)
        for source in self.sources:
            source.came(guest, pages, now)

    def _store(self, guest: int, pages: Int64, contents: Int32, waits: bool, now: int) -> None:
        first, done = int(self.m.guest[guest, memory.FIRST]), 0
        while done < len(pages):
            self._make_room()
            before = done
            done = pressure.store_pages(self.m, self.r, first, pages, contents, done, waits, now)
            self._see_moves()
            if done == before:
                raise OutOfFrames(guest)

    def look_at(self, e: Equal, pages: Int64, now: int, groups: Int32 | None = None, most_ps: int = _NO_END) -> int:
        """Let pages (of the host's memory) share frames with equal ones of their group, those of a group one after the
        other, until so much CPU time is spent. Returns how many were looked at.
        """
        e.n[equal_pages.SPENT_PS], done = 0, 0
        groups = np.zeros(len(pages), np.int32) if groups is None else groups
        while True:
            why, done = equal_pages.look_at_pages(self.m, e, pages, groups, done, most_ps, now)
            if why == equal_pages.PAUSED:
                return int(done)
            self._make_room()

    def share(self, frame_of: Int32, pages: Int64, now: int) -> None:
        """Let pages (of the host's memory) map the frames of their contents (see `declared_pass`)."""
        done = 0
        while done < len(pages):
            self._make_room()
            done = declared_pass.share_pages(self.m, frame_of, pages, done, now)

    def _run_guests(self, until: int) -> None:
        """Let guests' accesses and kswapd happen up to *until*. Raises OutOfFrames."""
        if not self.m.counts[memory.LRU]:
            starved = int(memory.write_due(self.m, until))
            if starved >= 0:
                raise self._starved(starved)
            return
        while _next_event(self.m, self.r) <= until:
            self._make_room()
            starved = int(_run_until(self.m, self.r, until))
            self._see_moves()
            if starved >= 0:
                raise self._starved(starved)

    def _starved(self, page: int) -> OutOfFrames:
        """The write that is due first found no frame for its page."""
        return OutOfFrames(int(self.m.block[page // BLOCK, memory.GUEST]), int(memory.next_due(self.m)))

    def _see_moves(self) -> None:
        """Pages were swapped out or came back (`Memory.gone`)."""
        self.m.counts[memory.GONE] = 0

    def backed(self, guest: int) -> npt.NDArray[np.bool_]:
        """Which of the guest's pages the host keeps something for."""
        return np.asarray(self.m.place[self.pages_of(guest)] & (memory.PRESENT | memory.SWAPPED) != 0)

    def discard(self, guest: int, pages: Int64) -> None:
        """The guest gives pages back (MADV_DONTNEED): when it next touches one, that is a new page."""
        first = int(self.m.guest[guest, memory.FIRST])
        for piece in np.split(pages, np.flatnonzero(np.diff(pages) != 1) + 1):
            if len(piece):
                self._unmap(first + int(piece[0]), len(piece))

    def _unmap(self, first: int, pages: int) -> None:
        """Unmap a range of pages of the host's memory."""
        memory.drop_pages(self.m, first, pages)

    def set_domain(self, guest: int, zeros: int) -> None:
        """Say what stands for pages of zeros in the guest's domain (before the guest is filled)."""
        self.m.guest[guest, memory.ZEROS] = zeros

    def set_accesses(self, guest: int, accesses: UInt16) -> None:
        """Say which class of random accesses each page gets (before the guest is filled)."""
        self.m.accesses[self.pages_of(guest)] = accesses

    def set_packed(self, guest: int, packed: UInt8) -> None:
        """Say how small each page becomes when it is compressed (see reclaim/compression.py)."""
        self.m.packed[self.pages_of(guest)] = packed

    def set_similar(self, guest: int, family: Int32, patch: UInt8) -> None:
        """Say which pages resemble each other, and how small the difference is (see `Synthetic.similar`)."""

    def change_activity(self, guest: int, now: int, level: float) -> None:
        """Scale the guest's random writes from now on."""
        _change_activity(self.m, guest, now, level)

    def fork(self, parent: int, child: int, next_content: int, now: int) -> int:
        """Let the child (added already) share what the parent has. Returns the next unused content."""
        first, pages = (int(each) for each in self.m.guest[parent, [memory.FIRST, memory.PAGES]])
        next_content = self._name_contents(first, pages, next_content)
        self._make_room(frames=pages, due=4 * pages)
        if len(self.m.packed):
            self.m.packed[self.pages_of(child)] = self.m.packed[self.pages_of(parent)]
        memory.fork_pages(self.m, first, int(self.m.guest[child, memory.FIRST]), pages, now)
        if parent in self.origins:
            self.origins[child] = self.origins[parent]
        return next_content

    def _name_contents(self, first: int, pages: int, next_content: int) -> int:
        """Number contents that one page alone held, before it is forked. Returns the next unused content."""
        return int(memory.name_contents(self.m, first, pages, next_content))

    def table_entries(self, guest: int) -> tuple[int, int]:
        """Entries of page tables that a fork of the guest copies: those of pages, and of huge pages."""
        blocks, there = self._blocks_there(guest)
        huge = self.m.block[blocks, memory.HUGE] != 0
        return int(there[~huge].sum()), int(np.count_nonzero(huge))

    def page_tables(self, guest: int) -> int:
        """Bytes of the guest's page tables of the last level; there is one behind each huge page, for its split."""
        return int(np.count_nonzero(self._blocks_there(guest)[1])) * memory.PAGE_BYTES

    def _blocks_there(self, guest: int) -> tuple[slice, Int64]:
        """The guest's blocks, and how many pages of each the host keeps something for."""
        span, backed = self.pages_of(guest), self.backed(guest)
        there = np.add.reduceat(backed, np.arange(0, len(backed), BLOCK), dtype=np.int64)
        return slice(span.start // BLOCK, blocks_of(span.stop)), there

    def delay(self, guest: int, wait: int, now: int) -> None:
        """One of the guest's processors does nothing for so long (ns), though it does not wait for memory."""
        row = self.m.guest[guest]
        row[memory.ACTIVE] = self.activity(guest, now)
        row[memory.SINCE] = max(int(row[memory.SINCE]), now) + wait // int(row[memory.VCPUS])
        self.change_activity(guest, now, float(self.m.level[guest]))

    def copies(self, guest: int) -> int:
        """Copies on write that the guest had to make."""
        return int(self.m.guest[guest, memory.COPIES])

    def usage(self) -> tuple[int, int]:
        """Free memory and the sum of resident set sizes, in bytes."""
        counts = self.m.counts
        uses = [memory.PRIVATE, memory.FRAMES, memory.RESERVED, memory.DEFERRED, memory.POOL, memory.WRITEBACK]
        frames = int(counts[memory.LIMIT] - counts[uses].sum())
        resident = int(counts[memory.TOUCHED] - counts[memory.KSM_ZERO])
        return frames * memory.PAGE_BYTES - int(counts[memory.METADATA]), resident * memory.PAGE_BYTES

    def touched(self, guest: int) -> int:
        """Pages the guest holds, in memory and in swap."""
        return int(np.count_nonzero(self.m.place[self.pages_of(guest)] & (memory.PRESENT | memory.SWAPPED)))

    def swapped(self, guest: int) -> int:
        """Pages of the guest that are swapped out."""
        return int(self.m.guest[guest, memory.OUT])

    def stalled(self, guest: int) -> int:
        """How long (ns) the guest has waited for memory, each of its processors by itself."""
        return int(self.m.guest[guest, memory.STALLED])

    def activity(self, guest: int, now: int) -> int:
        """The guest's activity time (ns): what it would be without stalls, less the stalls."""
        row = self.m.guest[guest]
        return int(row[memory.ACTIVE]) + int(max(now - int(row[memory.SINCE]), 0) * float(self.m.level[guest]))

    def over_limit(self, guest: int) -> bool:
        """Whether the guest lacks frames because of its own limit."""
        charged, limit = self.m.guest[guest, [memory.CHARGED, memory.CHARGE_LIMIT]]
        return bool(0 < limit <= charged)

    def pressure(self, now: int) -> tuple[int, int]:
        """For how long (ns) some guest has waited for memory by now, and for how long none could run for that."""
        some = full = 0
        if self.r.n[pressure.SOME_UNTIL] > self.r.n[pressure.COUNTED]:
            some, full = pressure.pressure_since(self.m, self.r, now)
        return int(self.m.counts[memory.PSI_SOME]) + int(some), int(self.m.counts[memory.PSI_FULL]) + int(full)

    def _end(self, guest: int) -> None:
        """The guest's pages are unmapped: it counts no more."""
        for source in self.sources:
            source.left(guest)
        self.files.pop(guest, None)
        self.origins.pop(guest, None)
        self.r.load[guest] = 0.0
        if self.m.counts[memory.LRU]:
            pressure.hand_over(self.m, guest)

    def settle(self, guest: int, now: int) -> None:
        """Bring the contents of the guest's pages up to now."""
        span = self.pages_of(guest)
        for block in range(span.start // BLOCK, blocks_of(span.stop)):
            memory.look(self.m, block, now)

    def read(self, guest: int) -> Int32:
        """Content of each of the guest's pages as a read returns it, NEVER where there is none."""
        span = self.pages_of(guest)
        place, held = self.m.place[span], self.m.held[span]
        shared = place & memory.SHARED != 0
        contents = held.copy()
        contents[shared] = self.m.frame[held[shared], memory.CONTENT]
        contents[place & memory.ZERO != 0] = 0
        contents[place & (memory.PRESENT | memory.SWAPPED) == 0] = memory.NEVER
        return contents

    # --- room -----------------------------------------------------------------------------------------------------

    def lived(self, guest: int, now: int) -> dict[str, int]:
        """What is counted of a guest, whichever host it is on: activity time (ns), copies on write, time stalled."""
        return {"active_ns": self.activity(guest, now), "copies": self.copies(guest), "stalled_ns": self.stalled(guest)}

    def relive(self, guest: int, lived: Mapping[str, int]) -> None:
        """Let a guest that was elsewhere, and has no page here yet, go on counting from there."""
        row = self.m.guest[guest]
        row[[memory.ACTIVE, memory.COPIES, memory.STALLED]] = lived["active_ns"], lived["copies"], lived["stalled_ns"]
        span = self.pages_of(guest)
        self.m.block[span.start // BLOCK : blocks_of(span.stop), memory.LOOKED] = lived["active_ns"]

    def is_free(self, guest: int) -> bool:
        """Whether nothing knows any more of a guest of this number that ended."""
        return True

    def more_guests(self, guests: int, contents: int) -> None:
        """Make room for so many guests and contents in all."""
        self.m = self.m._replace(guest=longer(self.m.guest, guests), level=longer(self.m.level, guests))
        self.r = self.r._replace(load=longer(self.r.load, guests), until=longer(self.r.until, guests))
        for source in self.sources:
            source.more_contents(contents)

    def _place_blocks(self, wanted: int) -> int:
        for index, (first, length) in enumerate(self._free_blocks):
            if length >= wanted:
                self._free_blocks[index : index + 1] = [(first + wanted, length - wanted)] if length > wanted else []
                return first
        return self._more_blocks(wanted)

    def _more_blocks(self, wanted: int) -> int:
        first = len(self.m.block)
        room = (first + wanted) * BLOCK
        self.m = self.m._replace(
            place=longer(self.m.place, room),
            held=longer(self.m.held, room),
            lru=longer(self.m.lru, room if self.m.counts[memory.LRU] else 0),
            seen=longer(self.m.seen, room if self.m.counts[memory.LRU] else 0),
            packed=longer(self.m.packed, room if len(self.m.packed) else 0),
            accesses=longer(self.m.accesses, room),
            block=longer(self.m.block, first + wanted),
        )
        return first

    def _give_back(self, guest: int) -> None:
        span = self.pages_of(guest)
        memory.forget_accesses(self.m, span.start, span.stop - span.start)
        self.m.place[span] = 0
        self._free_blocks.append((span.start // BLOCK, blocks_of(span.stop - span.start)))
        self._free_blocks.sort()
        merged: list[tuple[int, int]] = []
        for first, length in self._free_blocks:
            if merged and merged[-1][0] + merged[-1][1] == first:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((first, length))
        self._free_blocks = merged

    def _make_room(self, frames: int = ROOM, due: int = ROOM) -> None:
        """Lengthen each array that has no room for so many more entries."""
        counts = self.m.counts
        if counts[memory.LRU]:
            frames, due = frames + pressure.ROOM, due + pressure.ROOM
        if counts[memory.FRAME_HIGH] + frames > len(self.m.frame):
            length = 2 * len(self.m.frame) + frames
            self.m = self.m._replace(
                frame=longer(self.m.frame, length),
                frame_lru=longer(self.m.frame_lru, length if counts[memory.LRU] else 0),
            )
        if counts[memory.DUE_COUNT] + due > len(self.m.due):
            self.m = self.m._replace(due=longer(self.m.due, 2 * len(self.m.due) + due))


def longer(array: npt.NDArray[Number], length: int) -> npt.NDArray[Number]:
    """A copy of an array with zeros behind it."""
    copy = np.zeros((length, *array.shape[1:]), array.dtype)
    copy[: len(array)] = array
    return copy


def memory_columns(counts: Int64) -> dict[str, Int64]:
    """Rows of `Memory.counts` as the columns of the tables, and what `Machine` makes others of."""

    def count(index: int) -> Int64:
        return counts[:, index]

    return {
        "cow_ksm": count(memory.COW_KSM),
        "thp_split_page": count(memory.THP_SPLIT),
        "thp_deferred_split_page": count(memory.THP_DEFERRED_SPLIT),
        "thp_fault_alloc": count(memory.THP_FAULT),
        "thp_fault_fallback": count(memory.THP_FALLBACK),
        "thp_collapse_alloc": count(memory.THP_COLLAPSE),
        "mem_huge_bytes": count(memory.HUGE_PAGES) * memory.PAGE_BYTES * BLOCK,
        "mem_touched_bytes": (count(memory.TOUCHED) + count(memory.SWAPPED_PAGES)) * memory.PAGE_BYTES,
        "mem_swapped_bytes": count(memory.SWAPPED_PAGES) * memory.PAGE_BYTES,
        "resident_bytes": count(memory.TOUCHED) * memory.PAGE_BYTES,
        "swap_used_bytes": count(memory.SLOTS_USED) * memory.PAGE_BYTES,
        "mem_pool_bytes": count(memory.POOL) * memory.PAGE_BYTES,
        "mem_compressed_bytes": count(memory.POOLED_PAGES) * memory.PAGE_BYTES,
        "mem_writeback_bytes": count(memory.WRITEBACK) * memory.PAGE_BYTES,
        "mem_private_bytes": count(memory.PRIVATE) * memory.PAGE_BYTES,
        "mem_deferred_bytes": count(memory.DEFERRED) * memory.PAGE_BYTES,
        "mem_reserved_bytes": count(memory.RESERVED) * memory.PAGE_BYTES,
        "mem_shared_bytes": count(memory.FRAMES) * memory.PAGE_BYTES,
        "mem_metadata_bytes": -(-count(memory.METADATA) // memory.PAGE_BYTES) * memory.PAGE_BYTES,
        **{name: count(index) for name, index in _SWAP_COUNTERS.items()},
        "pgscan": count(memory.PGSCAN_KSWAPD) + count(memory.PGSCAN_DIRECT),
        "pgsteal": count(memory.PGSTEAL_KSWAPD) + count(memory.PGSTEAL_DIRECT),
        "kswapd_cpu_ns": count(memory.KSWAPD_PS) // 1000,
        "reclaim_cpu_ns": count(memory.DIRECT_PS) // 1000,
        "swap_cpu_ns": count(memory.SWAP_PS) // 1000,
        "cow_breaks": count(memory.COW_KSM) + count(memory.COW_FORK),
        "write_wait_ns": count(memory.WRITE_WAIT_NS),
        "copy_wait_ns": count(memory.COPY_WAIT_NS),
    }
