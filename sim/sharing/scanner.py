"""A host's memory and its ksmd as one object over the compiled loops: guests come and go, knobs are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Final, cast

import numpy as np

from sim.memory import pages as memory
from sim.memory.compiled import quick
from sim.memory.guest import Vm
from sim.memory.pages import BLOCK, Int32, Int64, UInt8
from sim.sharing import ksm_pass as ksmd
from sim.sharing.ksm import Ksm
from sim.sharing.room import OutOfFrames, Room, Site, longer, memory_columns
from sim.units import MILLISECOND, SECOND

_LOG_ROWS: Final = 4096
_FIRST_CHAINS: Final = 1024
_NO_LIMIT: Final = 1 << 60
_SLICE: Final = MILLISECOND
"""Most time (ns) by which a guest's access that is due may come late while ksmd works, where memory is reclaimed."""

ROW_COUNTERS: Final = ksmd.SNAPSHOT
ROW_COUNTS: Final = ksmd.SNAPSHOT + ksmd.COUNTERS
ROW: Final = ROW_COUNTS + memory.COUNTS

_advance = quick(ksmd.advance)

_KNOBS: Final = {
    "run": ksmd.RUN,
    "pages_to_scan": ksmd.PAGES_TO_SCAN,
    "sleep_millisecs": ksmd.SLEEP_MILLISECS,
    "smart_scan": ksmd.SMART_SCAN,
    "max_page_sharing": ksmd.MAX_PAGE_SHARING,
    "use_zero_pages": ksmd.USE_ZERO_PAGES,
}


@cache
def _visits(smart: bool) -> UInt8:
    """Which visits to a page look at it, and which visit comes next; without smart scan all are the same."""
    visits = np.arange(ksmd.SMART_VISITS)
    after = np.where(visits == ksmd.SMART_VISITS - 1, ksmd.SMART_CYCLE, visits + 1)
    rows = np.zeros((2, ksmd.SMART_VISITS), np.uint8)
    rows[ksmd.PROCESSED] = np.isin(visits, ksmd.SMART_PROCESSED) if smart else 1
    rows[ksmd.NEXT_VISIT] = after if smart else visits
    return rows


class Scanner(Room):
    """Memory and KSM of one host."""

    WORK = ksmd.WORK
    ROW = ROW

    def __init__(self, settings: Ksm, site: Site) -> None:
        """*settings* are complete for the kernel."""
        super().__init__(settings, site)
        self._settings = settings
        self._kernel = site.kernel
        trees = 1 if settings.merge_across_nodes else site.nodes
        blocks, room = len(self.m.block), len(self.m.place)
        self.m.counts[memory.KSM_STAYS] = site.squeeze is not None and not site.kernel.node_holds_page
        self.k = ksmd.Ksm(
            item=np.zeros(room, np.uint8),
            old=np.zeros(room, np.int32),
            link=np.zeros(room, np.int32),
            head=np.zeros(site.contents * trees, np.int32),
            node=np.zeros((len(self.m.frame), ksmd.NODE_COLUMNS), np.int32),
            chain=np.zeros((_FIRST_CHAINS, ksmd.CHAIN_COLUMNS), np.int64),
            block=np.zeros((blocks, ksmd.QUIET_COLUMNS), np.int64),
            slot=np.zeros((site.guests + 1, ksmd.SLOT_COLUMNS), np.int64),
            hot=np.zeros((len(site.rates), 2)),
            smart=np.zeros((2, ksmd.SMART_VISITS), np.uint8),
            n=np.zeros(ksmd.NUMBERS, np.int64),
            log=np.zeros((_LOG_ROWS, ROW), np.int64),
        )
        self.k.slot[:, ksmd.BEFORE] = -1
        self.k.slot[site.guests, [ksmd.FOLLOWING, ksmd.BEFORE]] = site.guests
        self._set_up(settings, site)
        self.k.n[ksmd.PRICE : ksmd.DONE] = site.work_ps
        self.k.n[ksmd.SPLIT_PS] = site.split_ps
        self.k.n[ksmd.COLD_MILLI] = site.cold_milli
        self.k.n[ksmd.MISROUTES] = settings.hints is None
        self.k.n[ksmd.KEY] = np.uint64(site.key).astype(np.int64)
        if settings.hints:
            self.m = self.m._replace(from_disk=np.zeros(settings.hints.entries, np.int32))
            self.k.n[ksmd.HINTS_TO_SCAN] = round(settings.hints.share * 1e6)
        self._contents = site.contents
        self._trees = trees
        self._leaving: set[int] = set()
        mixed = settings.mixed_pages
        self._judges_at = mixed.every if mixed else memory.END_OF_TIME

    def __getstate__(self) -> dict[str, object]:
        """Leave out the log: it is empty between two calls, and large."""
        return {**self.__dict__, "k": self.k._replace(log=self.k.log[:0])}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.k = self.k._replace(log=np.zeros((_LOG_ROWS, ROW), np.int64))

    def _set_up(self, settings: Ksm, site: Site) -> None:
        n, kernel = self.k.n, site.kernel
        n[ksmd.SLOT] = site.guests
        n[ksmd.RUN] = settings.run
        n[ksmd.PAGES_TO_SCAN] = settings.pages_to_scan
        n[ksmd.SLEEP_MILLISECS] = settings.sleep_millisecs
        n[ksmd.MAX_PAGE_SHARING] = settings.max_page_sharing or _NO_LIMIT
        n[ksmd.USE_ZERO_PAGES] = settings.use_zero_pages
        n[ksmd.PRUNE_MILLISECS] = settings.stable_node_chains_prune_millisecs
        n[ksmd.TARGET_SCAN_TIME] = settings.advisor_target_scan_time
        n[ksmd.MAX_CPU] = settings.advisor_max_cpu
        n[ksmd.MAX_PAGES_TO_SCAN] = settings.advisor_max_pages_to_scan
        most = site.frames // 4 if settings.max_kernel_pages is None else settings.max_kernel_pages
        n[ksmd.MAX_KERNEL_PAGES] = _NO_LIMIT if kernel.node_holds_page or most == 0 else most
        n[ksmd.HZ] = site.hz
        n[ksmd.SCALE] = site.scale
        n[ksmd.CHECKSUM_FIRST] = kernel.checksum_first
        n[ksmd.NODE_HOLDS_PAGE] = kernel.node_holds_page
        n[ksmd.COUNTS_LAST_BATCH] = kernel.counts_last_batch
        n[ksmd.EXACT_SLEEP] = kernel.exact_sleep
        n[ksmd.PROMPT_TIMERS] = not kernel.late_timers
        self._set_smart_scan(bool(settings.smart_scan))
        if settings.advisor_mode != "none":
            self._set_advisor(settings.advisor_mode)

    # --- guests ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """ksmd starts, if it shall."""
        if self._settings.run == 1:
            self.set_knob("run", 1, 0)

    def add(
        self, guest: int, pages: int, *, vm: Vm, key: int, now: int, level: float, node: int, thp: bool
    ) -> None:  # fmt: skip
        """See `Room`; the node of NUMA says which trees the guest's pages go to."""
        super().add(guest, pages, vm=vm, key=key, now=now, level=level, node=node, thp=thp)
        self.k.slot[guest, [ksmd.DIFFERS_AT, ksmd.MERGEABLE_PAGES]] = vm.differs_at, 0
        if self._settings.mixed_pages:
            span = self.pages_of(guest)
            self.m.block[span.start // BLOCK : -(-span.stop // BLOCK), memory.TEMPER] = memory.COLD
        self.k.slot[guest, ksmd.TREE] = node % self._trees * self._contents

    def fill(self, guest: int, contents: Int32, now: int) -> None:
        """See `Room`."""
        super().fill(guest, contents, now)
        self._hint(guest, np.flatnonzero(contents != memory.NEVER), now)

    def write(self, guest: int, pages: Int64, contents: Int32, now: int) -> None:
        """Write contents to the guest's pages. Raises OutOfFrames."""
        ksmd.note_writes(self.m, self.k, int(self.m.guest[guest, memory.FIRST]), pages)
        super().write(guest, pages, contents, now)
        self._hint(guest, pages, now)

    def _hint(self, guest: int, pages: Int64, now: int) -> None:
        """Tell ksmd which of these pages the guest just read from its disk or wrote to it, if it takes hints."""
        if len(self.m.from_disk):
            pages = pages[self.files[guest][pages]]
            self._make_room(due=len(pages))
            memory.tell_reads(self.m, int(self.m.guest[guest, memory.FIRST]), pages, now)

    def _see_moves(self) -> None:
        if self.m.counts[memory.GONE]:
            ksmd.note_moves(self.m, self.k)

    def _unmerge(self, guest: int, first: int, pages: int, now: int) -> bool:
        """Unmerge a range of a guest's pages. Returns whether there were frames enough."""
        for start in range(first, first + pages, BLOCK):
            length = min(BLOCK, first + pages - start)
            if self.m.counts[memory.LRU]:
                self._make_room()
                done = ksmd.unmerge_for_guest(self.m, self.r, guest, start, length, now)
                self._see_moves()
            else:
                done = ksmd.unmerge_pages(self.m, start, length)
            if done != memory.OK:
                return False
        return True

    def _unmap(self, first: int, pages: int) -> None:
        """See `Room`; ksmd's searches end where a page of its unstable tree was."""
        ksmd.unmap_pages(self.m, self.k, first, pages)

    def advise(self, guest: int, first: int, pages: int, mergeable: bool, now: int) -> bool:
        """madvise() of a range. Returns False (EAGAIN, nothing lost) if unmerging finds no frame."""
        start = int(self.m.guest[guest, memory.FIRST]) + first
        if not mergeable and not self._unmerge(guest, start, pages, now):
            return False
        ksmd.advise_mergeable(self.m, self.k, guest, start, pages, mergeable)
        if mergeable and pages and self.k.slot[guest, ksmd.BEFORE] < 0:
            ksmd.register(self.m, self.k, guest)
            ksmd.wake_up(self.k, now)
        return True

    def fork(self, parent: int, child: int, next_content: int, now: int) -> int:
        """See `Room`; the child's memory is offered to KSM as the parent's is."""
        next_content = super().fork(parent, child, next_content, now)
        self.k.slot[child, ksmd.MERGEABLE_PAGES] = self.k.slot[parent, ksmd.MERGEABLE_PAGES]
        if self.k.slot[parent, ksmd.BEFORE] >= 0:
            ksmd.register(self.m, self.k, child)
        return next_content

    def _name_contents(self, first: int, pages: int, next_content: int) -> int:
        """See `Room`; what ksmd knows of the pages gets the new numbers too."""
        span = slice(first, first + pages)
        known = self.k.old[span] == self.m.held[span]
        next_content = super()._name_contents(first, pages, next_content)
        self.k.old[span][known] = self.m.held[span][known]
        return next_content

    def remove(self, guest: int) -> None:
        """The guest exits; KSM forgets it when ksmd comes by."""
        span = self.pages_of(guest)
        ksmd.unmap_pages(self.m, self.k, span.start, span.stop - span.start)
        self._end(guest)
        if self.k.slot[guest, ksmd.BEFORE] < 0 or ksmd.leave(self.m, self.k, guest):
            self._give_back(guest)
        else:
            self._leaving.add(guest)

    def counters_of(self, guest: int) -> Mapping[str, int]:
        """The guest's files of /proc/PID/ksm_stat."""
        items, merging, zero = ksmd.items_of(self.m, self.k, guest)
        return {
            "ksm_merging_pages": int(merging),
            "ksm_zero_pages": int(zero),
            "ksm_rmap_items": int(items),
            "ksm_process_profit": int((merging + zero) * memory.PAGE_BYTES - items * ksmd.ITEM_BYTES),
        }

    def work_done(self) -> dict[str, int]:
        """How much ksmd did of each kind of work."""
        return dict(zip(ksmd.WORK, self.k.n[ksmd.DONE :].tolist(), strict=True))

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
        if value == 2 and before != 2 and not self._unmerge_all(now):
            n[ksmd.RUN] = 0
            return "ENOMEM: not every page could be unmerged"
        if value == 1:
            ksmd.wake_up(self.k, now)
        return ""

    def _unmerge_all(self, now: int) -> bool:
        """Unmerge every guest. Returns whether there were frames enough."""
        for guest in range(len(self.m.guest)):
            first, pages = (int(each) for each in self.m.guest[guest, [memory.FIRST, memory.PAGES]])
            registered = self.k.slot[guest, ksmd.BEFORE] >= 0 and not self.k.slot[guest, ksmd.EXITING]
            if registered and self.m.counts[memory.LRU] and not self._unmerge(guest, first, pages, now):
                return False
        return bool(ksmd.unmerge_all(self.m, self.k) == memory.OK)

    def _set_smart_scan(self, on: bool) -> None:
        ksmd.settle_all(self.m, self.k)
        self.k.n[ksmd.SMART_SCAN] = on
        self.k.smart[:] = _visits(on)

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
        while self._judges_at < horizon:
            yield from self._advance(self._judges_at)
            self._judge(self._judges_at)
        yield from self._advance(horizon)

    def _judge(self, now: int) -> None:
        """Say anew which huge pages ksmd may split, and which khugepaged may make."""
        mixed = self._settings.mixed_pages
        assert mixed is not None  # or there were no time for it
        free, _ = self.usage()
        splits = free < mixed.free_below * self.m.counts[memory.LIMIT] * memory.PAGE_BYTES
        repeated = max(1, round(mixed.repeated * BLOCK))
        copies = np.zeros(len(self.k.head), np.int32)
        ksmd.judge_blocks(self.m, self.k, copies, mixed.cold_below / SECOND, repeated, splits, now)
        self._judges_at = now + mixed.every

    def _advance(self, horizon: int) -> Iterator[Int64]:
        while self.m.counts[memory.LRU]:
            ksmd_ns = self._ksmd_time()
            self._run_guests(min(max(ksmd_ns, 0), horizon) - 1)
            if ksmd_ns >= horizon:
                return
            # Where a page stands for many, ksmd is that many times as long at each.
            yield from self._run(min(ksmd_ns + _SLICE * int(self.k.n[ksmd.SCALE]), horizon), False)
        yield from self._run(horizon, False)

    def _ksmd_time(self) -> int:
        """Host time (ns) up to which ksmd has worked, or at which it goes on."""
        n = self.k.n
        if n[ksmd.PHASE] == ksmd.WORKING:
            return int(n[ksmd.BATCH_START] + n[ksmd.BATCH_PS] // 1000)
        return int(n[ksmd.WAKE]) if n[ksmd.PHASE] == ksmd.SLEEPING else memory.END_OF_TIME

    def _run(self, horizon: int, batch_only: bool) -> Iterator[Int64]:
        while True:
            why = _advance(self.m, self.k, horizon, batch_only)
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
        yield from self._run(memory.END_OF_TIME, True)

    def snapshot(self, now: int) -> Int64:
        """Every counter as it is now; see ksm_pass.snapshot."""
        ksmd.snapshot(self.m, self.k, now, 0)  # the log is empty: `_run` hands it out before it returns
        self.k.log[0, [ROW_COUNTS + memory.PSI_SOME, ROW_COUNTS + memory.PSI_FULL]] = self.pressure(now)
        return cast(Int64, self.k.log[0])

    def columns(self, log: Int64) -> dict[str, Int64]:
        """See `columns_of`."""
        return columns_of(log)

    # --- room -----------------------------------------------------------------------------------------------------

    def is_free(self, guest: int) -> bool:
        """See `Room`; ksmd may still have to come by."""
        return guest not in self._leaving

    def more_guests(self, guests: int, contents: int) -> None:
        """See `Room`; the head of ksmd's list stays the last one of the slots."""
        before = len(self.m.guest)
        super().more_guests(guests, contents)
        slot = longer(self.k.slot, guests + 1)
        slot[guests], slot[before] = slot[before], 0
        slot[before:guests, ksmd.BEFORE] = -1
        for column in (ksmd.FOLLOWING, ksmd.BEFORE):
            of_head = slot[:, column] == before
            slot[of_head, column] = guests
        node = slot[:, ksmd.TREE] // self._contents
        slot[:, ksmd.TREE] = node * contents
        head = np.zeros((self._trees, contents), np.int32)
        head[:, : self._contents] = self.k.head.reshape(self._trees, self._contents)
        self.k = self.k._replace(slot=slot, head=head.reshape(-1))
        if self.k.n[ksmd.SLOT] == before:
            self.k.n[ksmd.SLOT] = guests
        self._contents = contents

    def _more_blocks(self, wanted: int) -> int:
        first = super()._more_blocks(wanted)
        room, blocks = len(self.m.place), len(self.m.block)
        self.k = self.k._replace(
            item=longer(self.k.item, room),
            old=longer(self.k.old, room),
            link=longer(self.k.link, room),
            block=longer(self.k.block, blocks),
        )
        return first

    def _collect_leavers(self) -> None:
        for guest in [each for each in self._leaving if self.k.slot[each, ksmd.BEFORE] < 0]:
            self._leaving.discard(guest)
            self._give_back(guest)

    def _make_room(self, frames: int = ksmd.ROOM, due: int = ksmd.ROOM) -> None:
        """See `Room`; there is a node for each frame, and the chains grow when they are full."""
        super()._make_room(frames, due)
        if len(self.k.node) < len(self.m.frame):
            self.k = self.k._replace(node=longer(self.k.node, len(self.m.frame)))
        if self.k.n[ksmd.CHAIN_HIGH] + ksmd.ROOM > len(self.k.chain):
            self.k = self.k._replace(chain=longer(self.k.chain, 2 * len(self.k.chain)))


def columns_of(log: Int64) -> dict[str, Int64]:
    """Rows of `ksm_pass.snapshot` as columns by the names of `sim.columns.SAMPLES`, and `cow_breaks`."""

    def counter(index: int) -> Int64:
        return log[:, ROW_COUNTERS + index]

    shared, sharing, unshared = (counter(each) for each in (ksmd.PAGES_SHARED, ksmd.PAGES_SHARING, ksmd.PAGES_UNSHARED))
    items, zero = counter(ksmd.ITEMS), log[:, ROW_COUNTS + memory.KSM_ZERO]
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
        "scan_cpu_ns": ksmd_ns - merge_ns,
        "merge_cpu_ns": merge_ns,
        **memory_columns(log[:, ROW_COUNTS:]),
    }
