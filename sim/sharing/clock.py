"""Difference Engine over time: the clock that goes through all memory, and what it does with the pages it finds.

Not published, and assumed here: a page is considered in the scan that has its hash in its table, shared first and kept
small after that; the guests' memory is gone through one guest after the other; what similar pages share is found
whenever there is a similar page (the table of 64-byte blocks forgets none); a page that shares its frame is not kept
small; and the swap daemon takes pages as Linux does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sim.memory import pages as memory
from sim.memory.guest import Vm
from sim.memory.image import UNIT_BYTES
from sim.memory.pages import PAGE_BYTES, Int32, Int64, UInt8
from sim.reclaim import pressure
from sim.reclaim.zswap import SAME_FILLED
from sim.sharing import equal_pages
from sim.sharing import small_pages as small
from sim.sharing.difference_engine import DifferenceEngine
from sim.sharing.passes import TURN, Passes
from sim.sharing.room import Site, Squeeze, longer

_ENTRY_BYTES: Final = 8
"""Size of an entry of the table of hashes: 1.76 MB for a fifth of the pages (section 4.3); of 4 GiB, assumed."""
_NO_SWAP: Final = Squeeze((0, 0, 0), swappiness=0, page_cluster=0, slots=0, device=None, look_ns=0, compresses=False)
_OWN: Final = equal_pages.WORK
_COUNTERS: Final = (
    small.VISITED, small.PATCHED_SO_FAR, small.COMPRESSED_SO_FAR, small.PATCHED_NOW, small.IDLE_FRAMES,
)  # fmt: skip


class Clock(Passes):
    """Memory of one host with Difference Engine."""

    WORK = (*_OWN, "patch", "compress", "unpatch", "uncompress")
    ROW = Passes.ROW + len(_COUNTERS)

    def __init__(self, settings: DifferenceEngine, site: Site) -> None:
        """*settings* are complete."""
        squeeze = site.squeeze if site.squeeze and site.squeeze.device else _NO_SWAP
        super().__init__(settings, replace(site, work_ps=site.work_ps[: len(_OWN)], squeeze=squeeze))
        patch_ps, compress_ps, unpatch_ps, uncompress_ps = (int(each) for each in site.work_ps[len(_OWN) :])
        self._spent_ps = patch_ps, compress_ps
        self.r.n[pressure.PATCH_IN_NS] = unpatch_ps // 1000
        self.r.zip_ns[:, pressure.UNZIP] = max(uncompress_ps // 1000 - int(self.r.n[pressure.IN_NS]), 0)
        room = len(self.m.place)
        self.m = self.m._replace(packed=np.zeros(room, np.uint8))
        self.s = small.Small(
            kind=np.zeros(room, np.uint8),
            old=np.full(room, memory.NEVER, np.int32),
            turn=np.zeros(room, np.uint16),
            draws=np.zeros(memory.BLOCK, np.uint64),
            came=np.zeros(len(self.m.block), np.int64),
            packed=np.zeros(room, np.uint8),
            patch=np.zeros(room, np.uint8),
            family=np.zeros(room, np.int32),
            base=np.zeros(room, np.int32),
            first=np.zeros(1, np.int32),
            pins=np.zeros(len(self.m.frame), np.int32),
            n=np.zeros(small.NUMBERS, np.int64),
        )
        n = self.s.n
        n[[small.PASSES, small.LARGEST]] = settings.passes, settings.largest // UNIT_BYTES
        n[[small.PATCHES, small.COMPRESSES]] = settings.patch, settings.compress
        n[[small.PATCH_PS, small.COMPRESS_PS]] = self._spent_ps
        self._todo: list[tuple[int, bool, int]] = []
        self._keep_pool_packed()

    def _keep_pool_packed(self) -> None:
        """What is kept small lies close together, in units of 16 bytes, and takes no slots of swap."""
        units = np.arange(len(self.m.zspage))
        self.m.zspage[:, 0] = 0
        self.m.zspage[:, memory.OBJECTS] = PAGE_BYTES // UNIT_BYTES
        self.m.zspage[:, memory.ZSPAGE_PAGES] = 1
        self.m.zspage[:, memory.WEIGHT] = units
        self.m.counts[memory.POOL_HAS_NO_SLOTS] = 1
        self.m.counts[memory.KEEPS_SLOTS] = 0
        entries = int(self.m.counts[memory.LIMIT] // self.s.n[small.PASSES])
        self.m.counts[memory.METADATA] = entries * _ENTRY_BYTES

    # --- guests ---------------------------------------------------------------------------------------------------

    def add(
        self, guest: int, pages: int, *, vm: Vm, key: int, now: int, level: float, node: int, thp: bool
    ) -> None:  # fmt: skip
        """See `Room`; the clock has not come by yet."""
        super().add(guest, pages, vm=vm, key=key, now=now, level=level, node=node, thp=thp)
        span = self.pages_of(guest)
        self.s.kind[span] = small.MODIFIED
        self.s.old[span] = memory.NEVER
        self.s.packed[span] = self.s.patch[span] = self.s.family[span] = 0

    def set_packed(self, guest: int, packed: UInt8) -> None:
        """See `Room`; a page of one repeated word is compressed like others."""
        self.s.packed[self.pages_of(guest)] = np.maximum(packed, SAME_FILLED)

    def set_similar(self, guest: int, family: Int32, patch: UInt8) -> None:
        """See `Room`."""
        span = self.pages_of(guest)
        self.s.family[span], self.s.patch[span] = family, patch
        missing = int(family.max(initial=0)) + 1 - len(self.s.first)
        if missing > 0:
            self.s = self.s._replace(first=longer(self.s.first, len(self.s.first) + missing))

    def remove(self, guest: int) -> None:
        """See `Passes`."""
        self._todo = [each for each in self._todo if each[0] != guest]
        super().remove(guest)

    def _end(self, guest: int) -> None:
        """See `Room`; what others are built from stays, and is theirs from now on."""
        small.count_pins(self.m, self.s)
        small.hand_over_pinned(self.m, self.s, guest)
        super()._end(guest)

    # --- scans ----------------------------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """Share first, then keep small what is left."""
        self._todo = [(guest, shrinks, 0) for shrinks in (False, True) for guest in sorted(self.vms)]

    def turn(self, now: int) -> bool:
        """See `Passes`."""
        self._equal.n[equal_pages.SPENT_PS] = 0
        while self._todo:
            guest, shrinks, done = self._todo[0]
            loop = small.shrink_pages if shrinks else small.come_by
            span = self.pages_of(guest)
            self._make_room(small.ROOM * memory.BLOCK, small.ROOM * memory.BLOCK)
            why, more = loop(
                self.m, self._equal, self.s, span.start + done, span.stop - span.start - done, self._passes,
                TURN * 1000, now,
            )  # fmt: skip
            self._todo[0] = guest, shrinks, done + more
            if span.start + done + more == span.stop:
                self._todo.pop(0)
            elif why == equal_pages.PAUSED:
                return False
        small.count_pins(self.m, self.s)
        return True

    # --- records --------------------------------------------------------------------------------------------------

    def snapshot(self, now: int) -> Int64:
        """See `Room`."""
        small.count_pins(self.m, self.s)
        return np.append(super().snapshot(now), self.s.n[list(_COUNTERS)])

    def columns(self, log: Int64) -> dict[str, npt.NDArray[Any]]:
        """See `Room`; what is kept small has counters of its own."""

        def count(index: int) -> Int64:
            return log[:, 1 + index]

        visited, patched, compressed, patched_now, idle = (log[:, Passes.ROW + i] for i in range(len(_COUNTERS)))
        pooled, out = count(memory.POOLED_PAGES), count(memory.SLOTS_USED)
        known = super().columns(log)
        shrinking = (patched * self._spent_ps[0] + compressed * self._spent_ps[1]) // 1000
        return known | {
            "pages_sharing": known["pages_sharing"] + idle,
            "pages_scanned": visited,
            "ksmd_cpu_ns": known["ksmd_cpu_ns"] + shrinking,
            "merge_cpu_ns": known["merge_cpu_ns"] + shrinking,
            "swap_used_bytes": (out - pooled) * PAGE_BYTES,
            "zswpin": np.zeros_like(pooled),
            "pages_patched": patched_now,
            "pages_compressed": pooled - patched_now,
            "patches": patched,
            "compressions": compressed,
            "rebuilds": count(memory.ZSWPIN),
        }

    def counters_of(self, guest: int) -> dict[str, int]:
        """See `Room`."""
        pooled = np.count_nonzero(self.m.seen[self.pages_of(guest)] & memory.POOLED)
        return {**super().counters_of(guest), "compressed_bytes": int(pooled) * PAGE_BYTES}

    def work_done(self) -> dict[str, int]:
        """See `Room`."""
        back, unpatched = (int(self.m.counts[each]) for each in (memory.ZSWPIN, memory.UNPATCHED))
        patched, compressed = (int(self.s.n[each]) for each in (small.PATCHED_SO_FAR, small.COMPRESSED_SO_FAR))
        own = {"patch": patched, "compress": compressed, "unpatch": unpatched, "uncompress": back - unpatched}
        return super().work_done() | own

    # --- room -----------------------------------------------------------------------------------------------------

    def _more_blocks(self, wanted: int) -> int:
        first = super()._more_blocks(wanted)
        room = len(self.m.place)
        names = ("kind", "old", "turn", "packed", "patch", "family", "base")
        arrays = {name: longer(getattr(self.s, name), room) for name in names}
        self.s = self.s._replace(came=longer(self.s.came, len(self.m.block)), **arrays)
        return first

    def _make_room(self, frames: int = small.ROOM, due: int = small.ROOM) -> None:
        """See `Room`."""
        super()._make_room(frames, due)
        if len(self.s.pins) < len(self.m.frame):
            self.s = self.s._replace(pins=longer(self.s.pins, len(self.m.frame)))
