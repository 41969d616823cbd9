"""A host's memory and its ksmd as one object over the compiled loops: guests come and go, knobs are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, TypeVar, cast

import numpy as np
import numpy.typing as npt

from sim.memory import pages as memory
from sim.memory.huge import Daemon
from sim.memory.pages import BLOCK, Float64, Int32, Int64, Memory, UInt16
from sim.sharing import ksm_pass as ksmd
from sim.sharing.kernels import Kernel
from sim.sharing.ksm import Ksm

Number = TypeVar("Number", bound=np.generic)

_LOG_ROWS: Final = 4096
_FIRST_DUE: Final = 1024
_FIRST_CHAINS: Final = 1024
_NO_LIMIT: Final = 1 << 60

ROW_COUNTERS: Final = ksmd.SNAPSHOT
ROW_COUNTS: Final = ksmd.SNAPSHOT + ksmd.COUNTERS
ROW: Final = ROW_COUNTS + memory.COUNTS

_KNOBS: Final = {
    "run": ksmd.RUN,
    "pages_to_scan": ksmd.PAGES_TO_SCAN,
    "sleep_millisecs": ksmd.SLEEP_MILLISECS,
    "smart_scan": ksmd.SMART_SCAN,
    "max_page_sharing": ksmd.MAX_PAGE_SHARING,
    "use_zero_pages": ksmd.USE_ZERO_PAGES,
}


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


class Scanner:
    """Memory and KSM of one host; times are host times in ns."""

    def __init__(
        self, settings: Ksm, kernel: Kernel, *, hz: int, frames: int, pages: int, guests: int, contents: int,
        trees: int, work_ps: Int64, split_ps: int, cold_milli: int, rates: Float64, key: int,
    ) -> None:  # fmt: skip
        """*settings* are complete for the kernel; *pages* is room to begin with, *guests* and *contents* the most."""
        self._settings = settings
        self._kernel = kernel
        blocks = blocks_of(pages)
        room = blocks * BLOCK
        self.m = Memory(
            place=np.zeros(room, np.uint8),
            held=np.zeros(room, np.int32),
            accesses=np.zeros(room, np.uint16),
            block=np.zeros((blocks, memory.BLOCK_COLUMNS), np.int64),
            frame=np.zeros((room + ksmd.ROOM, memory.FRAME_COLUMNS), np.int32),
            guest=np.zeros((guests, memory.GUEST_COLUMNS), np.int64),
            level=np.ones(guests),
            rates=rates,
            due=np.zeros((_FIRST_DUE, memory.DUE_COLUMNS), np.int64),
            counts=np.zeros(memory.COUNTS, np.int64),
        )
        self.m.counts[memory.LIMIT] = frames
        self.m.counts[memory.FREE_FRAME] = -1
        self.m.counts[memory.REUSE_LAST_MAPPER] = kernel.reuse_last_mapper
        self.m.counts[memory.SPLIT_FREES_ZERO] = kernel.split_frees_zero
        self.k = ksmd.Ksm(
            item=np.zeros(room, np.uint8),
            old=np.zeros(room, np.int32),
            link=np.zeros(room, np.int32),
            head=np.zeros(contents * trees, np.int32),
            node=np.zeros((room + ksmd.ROOM, ksmd.NODE_COLUMNS), np.int32),
            chain=np.zeros((_FIRST_CHAINS, ksmd.CHAIN_COLUMNS), np.int64),
            block=np.zeros((blocks, ksmd.QUIET_COLUMNS), np.int64),
            slot=np.zeros((guests + 1, ksmd.SLOT_COLUMNS), np.int64),
            hot=np.zeros((len(rates), 2)),
            smart=np.zeros((2, ksmd.SMART_VISITS), np.uint8),
            n=np.zeros(ksmd.NUMBERS, np.int64),
            log=np.zeros((_LOG_ROWS, ROW), np.int64),
        )
        self.k.slot[:, ksmd.BEFORE] = -1
        self.k.slot[guests, [ksmd.FOLLOWING, ksmd.BEFORE]] = guests
        self._set_up(settings, kernel, hz, frames, guests)
        self.k.n[ksmd.PRICE : ksmd.DONE] = work_ps
        self.k.n[ksmd.SPLIT_PS] = split_ps
        self.k.n[ksmd.COLD] = cold_milli
        self.k.n[ksmd.MISROUTES] = 1
        self.k.n[ksmd.KEY] = np.uint64(key).astype(np.int64)
        self._contents = contents
        self._trees = trees
        self._free_blocks: list[tuple[int, int]] = [(0, blocks)] if blocks else []
        self._leaving: set[int] = set()

    def _set_up(self, settings: Ksm, kernel: Kernel, hz: int, frames: int, guests: int) -> None:
        n = self.k.n
        n[ksmd.SLOT] = guests
        n[ksmd.RUN] = settings.run
        n[ksmd.PAGES_TO_SCAN] = settings.pages_to_scan
        n[ksmd.SLEEP_MILLISECS] = settings.sleep_millisecs
        n[ksmd.MAX_PAGE_SHARING] = settings.max_page_sharing or _NO_LIMIT
        n[ksmd.USE_ZERO_PAGES] = settings.use_zero_pages
        n[ksmd.PRUNE_MILLISECS] = settings.stable_node_chains_prune_millisecs
        n[ksmd.TARGET_SCAN_TIME] = settings.advisor_target_scan_time
        n[ksmd.MAX_CPU] = settings.advisor_max_cpu
        n[ksmd.MAX_PAGES_TO_SCAN] = settings.advisor_max_pages_to_scan
        most = frames // 4 if settings.max_kernel_pages is None else settings.max_kernel_pages
        n[ksmd.MAX_KERNEL_PAGES] = _NO_LIMIT if kernel.node_holds_page or most == 0 else most
        n[ksmd.HZ] = hz
        n[ksmd.CHECKSUM_FIRST] = kernel.checksum_first
        n[ksmd.NODE_HOLDS_PAGE] = kernel.node_holds_page
        n[ksmd.COUNTS_LAST_BATCH] = kernel.counts_last_batch
        n[ksmd.EXACT_SLEEP] = kernel.exact_sleep
        n[ksmd.PROMPT_TIMERS] = not kernel.late_timers
        self._set_smart_scan(bool(settings.smart_scan))
        if settings.advisor_mode != "none":
            self._set_advisor(settings.advisor_mode)

    # --- guests ---------------------------------------------------------------------------------------------------

    def add(
        self, guest: int, pages: int, *, key: int, now: int, level: float, differs_at: int, node: int, thp: bool
    ) -> None:  # fmt: skip
        """Give a guest that starts now its address space, all of it untouched; with *thp* it faults in huge pages."""
        first = self._place_blocks(blocks_of(pages))
        m = self.m
        m.guest[guest, memory.FIRST] = first * BLOCK
        m.guest[guest, memory.PAGES] = pages
        m.guest[guest, memory.KEY] = np.uint64(key).astype(np.int64)
        m.guest[guest, memory.SINCE] = now
        m.guest[guest, memory.THP] = thp
        m.level[guest] = level
        blocks = slice(first, first + blocks_of(pages))
        m.block[blocks, memory.GUEST] = guest
        m.block[blocks, memory.LOOKED] = 0
        m.block[blocks, memory.ADJACENT] = 0
        m.accesses[self.pages_of(guest)] = 0
        self.k.slot[guest, ksmd.DIFFERS_AT] = differs_at
        self.k.slot[guest, ksmd.TREE] = node % self._trees * self._contents

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

    def fill(self, guest: int, contents: Int32) -> None:
        """Touch the guest's pages for the first time. Raises OutOfFrames."""
        done = memory.fill_pages(self.m, int(self.m.guest[guest, memory.FIRST]), contents)
        if done < len(contents):
            raise OutOfFrames(guest)

    def write(self, guest: int, pages: Int64, contents: Int32) -> None:
        """Write contents to the guest's pages. Raises OutOfFrames."""
        ksmd.note_writes(self.m, self.k, int(self.m.guest[guest, memory.FIRST]), pages)
        done = memory.write_pages(self.m, int(self.m.guest[guest, memory.FIRST]), pages, contents)
        if done < len(pages):
            raise OutOfFrames(guest)

    def set_accesses(self, guest: int, accesses: UInt16) -> None:
        """Say which class of random accesses each page gets (before the guest is filled)."""
        self.m.accesses[self.pages_of(guest)] = accesses

    def change_activity(self, guest: int, now: int, level: float) -> None:
        """Scale the guest's random writes from now on."""
        memory.change_activity(self.m, guest, now, level)

    def advise(self, guest: int, first: int, pages: int, mergeable: bool, now: int) -> bool:
        """madvise() of a range. Returns False (EAGAIN, nothing lost) if unmerging finds no frame."""
        start = int(self.m.guest[guest, memory.FIRST]) + first
        if not mergeable and ksmd.unmerge_pages(self.m, start, pages) != memory.OK:
            return False
        ksmd.advise_mergeable(self.m, self.k, guest, start, pages, mergeable)
        if mergeable and pages and self.k.slot[guest, ksmd.BEFORE] < 0:
            ksmd.register(self.m, self.k, guest)
            ksmd.wake_up(self.k, now)
        return True

    def fork(self, parent: int, child: int, next_content: int, now: int) -> int:
        """Let the child (added already) share what the parent has. Returns the next unused content."""
        m = self.m
        first, pages = (int(each) for each in m.guest[parent, [memory.FIRST, memory.PAGES]])
        next_content = ksmd.name_contents(m, self.k, first, pages, next_content)
        self._make_room(frames=pages, due=2 * pages)
        m = self.m
        memory.fork_pages(m, first, int(m.guest[child, memory.FIRST]), pages, now)
        self.k.slot[child, ksmd.MERGEABLE_PAGES] = self.k.slot[parent, ksmd.MERGEABLE_PAGES]
        if self.k.slot[parent, ksmd.BEFORE] >= 0:
            ksmd.register(m, self.k, child)
        return next_content

    def remove(self, guest: int) -> None:
        """The guest exits; KSM forgets it when ksmd comes by."""
        span = self.pages_of(guest)
        ksmd.unmap_pages(self.m, self.k, span.start, span.stop - span.start)
        if self.k.slot[guest, ksmd.BEFORE] < 0 or ksmd.leave(self.m, self.k, guest):
            self._give_back(guest)
        else:
            self._leaving.add(guest)

    def items_of(self, guest: int) -> tuple[int, int, int]:
        """Items, merging pages and zero pages of a guest."""
        items, merging, zero = ksmd.items_of(self.m, self.k, guest)
        return int(items), int(merging), int(zero)

    def profit(self, items: int, merged: int) -> int:
        """Bytes that merged pages save, less their items (ksm_process_profit)."""
        return merged * memory.PAGE_BYTES - items * ksmd.ITEM_BYTES

    def copies(self, guest: int) -> int:
        """Copies on write that the guest had to make."""
        return int(self.m.guest[guest, memory.COPIES])

    def usage(self) -> tuple[int, int]:
        """Free memory and the sum of resident set sizes, in bytes."""
        counts = self.m.counts
        taken = counts[[memory.PRIVATE, memory.FRAMES, memory.RESERVED]].sum()
        frames = int(counts[memory.LIMIT] - taken)
        resident = int(counts[memory.TOUCHED] - counts[memory.KSM_ZERO])
        return frames * memory.PAGE_BYTES - int(counts[memory.METADATA]), resident * memory.PAGE_BYTES

    def work_done(self) -> dict[str, int]:
        """How much ksmd did of each kind of work."""
        return dict(zip(ksmd.WORK, self.k.n[ksmd.DONE :].tolist(), strict=True))

    def touched(self, guest: int) -> int:
        """Pages the guest holds."""
        return int(np.count_nonzero(self.m.place[self.pages_of(guest)] & memory.PRESENT))

    def read(self, guest: int) -> Int32:
        """Content of each of the guest's pages as a read returns it, NEVER where there is none."""
        span = self.pages_of(guest)
        place, held = self.m.place[span], self.m.held[span]
        shared = place & memory.SHARED != 0
        contents = held.copy()
        contents[shared] = self.m.frame[held[shared], memory.CONTENT]
        contents[place & memory.ZERO != 0] = 0
        contents[place & memory.PRESENT == 0] = memory.NEVER
        return contents

    # --- knobs ----------------------------------------------------------------------------------------------------

    def knob(self, name: str) -> int:
        """Read a file of /sys/kernel/mm/ksm."""
        return int(self.k.n[_KNOBS[name]])

    def set_knob(self, name: str, value: int | str, now: int) -> str:
        """Write a file of /sys/kernel/mm/ksm. Returns why it was refused (as errno), or nothing."""
        n = self.k.n
        if name == "run":
            return self._set_run(int(value), now)
        if name == "advisor_mode":
            self._set_advisor(str(value))
        elif name == "smart_scan":
            self._set_smart_scan(bool(value))
        elif name == "max_page_sharing" and value != n[ksmd.MAX_PAGE_SHARING] and n[ksmd.PAGES_SHARED]:
            return "EBUSY: pages are shared; write run 2 first"
        elif name == "pages_to_scan" and n[ksmd.ADVISOR]:
            return "EINVAL: the advisor sets pages_to_scan"
        else:
            if name == "use_zero_pages":
                ksmd.settle_all(self.m, self.k)
            n[_KNOBS[name]] = value
        if name == "sleep_millisecs" and self._kernel.sleep_wakes and n[ksmd.PHASE] == ksmd.SLEEPING:
            n[ksmd.WAKE] = min(int(n[ksmd.WAKE]), now)
        return ""

    def _set_run(self, value: int, now: int) -> str:
        n = self.k.n
        before = int(n[ksmd.RUN])
        n[ksmd.RUN] = value
        if value == 2 and before != 2 and ksmd.unmerge_all(self.m, self.k) != memory.OK:
            n[ksmd.RUN] = 0
            return "ENOMEM: not every page could be unmerged"
        if value == 1:
            ksmd.wake_up(self.k, now)
        return ""

    def _set_smart_scan(self, on: bool) -> None:
        ksmd.settle_all(self.m, self.k)
        self.k.n[ksmd.SMART_SCAN] = on
        visits = np.arange(ksmd.SMART_VISITS)
        after = np.where(visits == ksmd.SMART_VISITS - 1, ksmd.SMART_CYCLE, visits + 1)
        self.k.smart[ksmd.PROCESSED] = np.isin(visits, ksmd.SMART_PROCESSED) if on else 1
        self.k.smart[ksmd.NEXT_VISIT] = after if on else visits

    def _set_advisor(self, mode: str) -> None:
        n = self.k.n
        if (mode == "scan-time") == bool(n[ksmd.ADVISOR]):
            return
        n[ksmd.ADVISOR] = mode == "scan-time"
        # The kernel forgets when the scan began, so that the first one seems to have lasted since boot.
        n[[ksmd.ADVISOR_LAST, ksmd.ADVISOR_CHANGE, ksmd.PASS_START]] = 0
        n[ksmd.ADVISOR_CPU] = -1000 * self._settings.ksmd_cpu_before
        n[ksmd.PAGES_TO_SCAN] = self._settings.advisor_min_pages_to_scan if n[ksmd.ADVISOR] else 100

    # --- time -----------------------------------------------------------------------------------------------------

    def advance(self, horizon: int) -> Iterator[Int64]:
        """Let ksmd and due writes run up to *horizon*; yields the log of full scans. Raises OutOfFrames."""
        yield from self._run(lambda: ksmd.advance(self.m, self.k, horizon, False))

    def _run(self, loop: Callable[[], int]) -> Iterator[Int64]:
        while True:
            why = loop()
            logged = int(self.k.n[ksmd.LOGGED])
            if logged:
                self.k.n[ksmd.LOGGED] = 0
                self._collect_leavers()
                yield self.k.log[:logged]
            if why == ksmd.PAUSED:
                return
            if why == ksmd.NO_ROOM:
                self._make_room()
            if why == ksmd.STARVING:
                guest = int(self.m.block[self.k.n[ksmd.STARVED] // BLOCK, memory.GUEST])
                raise OutOfFrames(guest, int(memory.next_due(self.m)))

    def finish_batch(self) -> Iterator[Int64]:
        """Let ksmd end the batch it is in: who writes to `run` waits for that."""
        yield from self._run(lambda: ksmd.advance(self.m, self.k, memory.END_OF_TIME, True))

    def snapshot(self, now: int) -> Int64:
        """Every counter as it is now; see ksm_pass.snapshot."""
        ksmd.snapshot(self.m, self.k, now, 0)  # the log is empty: `_run` hands it out before it returns
        return cast(Int64, self.k.log[0])

    # --- room -----------------------------------------------------------------------------------------------------

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
            place=_longer(self.m.place, room),
            held=_longer(self.m.held, room),
            accesses=_longer(self.m.accesses, room),
            block=_longer(self.m.block, first + wanted),
        )
        self.k = self.k._replace(
            item=_longer(self.k.item, room),
            old=_longer(self.k.old, room),
            link=_longer(self.k.link, room),
            block=_longer(self.k.block, first + wanted),
        )
        return first

    def _give_back(self, guest: int) -> None:
        span = self.pages_of(guest)
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

    def _collect_leavers(self) -> None:
        for guest in [each for each in self._leaving if self.k.slot[each, ksmd.BEFORE] < 0]:
            self._leaving.discard(guest)
            self._give_back(guest)

    def _make_room(self, frames: int = ksmd.ROOM, due: int = ksmd.ROOM) -> None:
        """Lengthen each array that has no room for so many more entries, and the chains when they are full."""
        counts = self.m.counts
        if counts[memory.FRAME_HIGH] + frames > len(self.m.frame):
            length = 2 * len(self.m.frame) + frames
            self.m = self.m._replace(frame=_longer(self.m.frame, length))
            self.k = self.k._replace(node=_longer(self.k.node, length))
        if counts[memory.DUE_COUNT] + due > len(self.m.due):
            self.m = self.m._replace(due=_longer(self.m.due, 2 * len(self.m.due) + due))
        if self.k.n[ksmd.CHAIN_HIGH] + ksmd.ROOM > len(self.k.chain):
            self.k = self.k._replace(chain=_longer(self.k.chain, 2 * len(self.k.chain)))


def _longer(array: npt.NDArray[Number], length: int) -> npt.NDArray[Number]:
    longer = np.zeros((length, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer


def columns_of(log: Int64) -> dict[str, Int64]:
    """Rows of `ksm_pass.snapshot` as columns by the names of `sim.columns.SAMPLES`, and `cow_breaks`."""

    def counter(index: int) -> Int64:
        return log[:, ROW_COUNTERS + index]

    def count(index: int) -> Int64:
        return log[:, ROW_COUNTS + index]

    shared, sharing, unshared = (counter(each) for each in (ksmd.PAGES_SHARED, ksmd.PAGES_SHARING, ksmd.PAGES_UNSHARED))
    items, zero = counter(ksmd.ITEMS), count(memory.KSM_ZERO)
    ksmd_ns, merge_ns = log[:, ksmd.ROW_KSMD_PS] // 1000, log[:, ksmd.ROW_MERGE_PS] // 1000
    return {
        "time_s": log[:, ksmd.ROW_TIME] / 1e9,
        "full_scans": counter(ksmd.FULL_SCANS),
        "pages_shared": shared,
        "pages_sharing": sharing,
        "pages_unshared": unshared,
        "pages_volatile": np.maximum(items - shared - sharing - unshared, 0),
        "pages_scanned": counter(ksmd.PAGES_SCANNED),
        "pages_skipped": counter(ksmd.PAGES_SKIPPED),
        "ksm_zero_pages": zero,
        "stable_node_chains": counter(ksmd.CHAINS),
        "stable_node_dups": counter(ksmd.DUPS),
        "general_profit": (sharing + zero) * memory.PAGE_BYTES - items * ksmd.ITEM_BYTES,
        "run": log[:, ksmd.ROW_RUN],
        "pages_to_scan": log[:, ksmd.ROW_PAGES_TO_SCAN],
        "sleep_millisecs": log[:, ksmd.ROW_SLEEP_MILLISECS],
        "ksmd_cpu_ns": ksmd_ns,
        "cow_ksm": count(memory.COW_KSM),
        "thp_split_page": count(memory.THP_SPLIT),
        "thp_fault_alloc": count(memory.THP_FAULT),
        "thp_fault_fallback": count(memory.THP_FALLBACK),
        "thp_collapse_alloc": count(memory.THP_COLLAPSE),
        "mem_huge_bytes": count(memory.HUGE_PAGES) * memory.PAGE_BYTES * BLOCK,
        "mem_touched_bytes": count(memory.TOUCHED) * memory.PAGE_BYTES,
        "mem_private_bytes": count(memory.PRIVATE) * memory.PAGE_BYTES,
        "mem_reserved_bytes": count(memory.RESERVED) * memory.PAGE_BYTES,
        "mem_shared_bytes": count(memory.FRAMES) * memory.PAGE_BYTES,
        "mem_metadata_bytes": -(-count(memory.METADATA) // memory.PAGE_BYTES) * memory.PAGE_BYTES,
        "scan_cpu_ns": ksmd_ns - merge_ns,
        "merge_cpu_ns": merge_ns,
        "cow_breaks": count(memory.COW_KSM) + count(memory.COW_FORK),
    }
