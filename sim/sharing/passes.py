"""Looking for equal pages in passes, at known moments, for mechanisms that say when, and at what.

A pass goes through a list of pages. It takes the CPU time that its work costs, of one core at most, in turns of a
second; what happens in a turn happens at its start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from sim.memory import pages as memory
from sim.memory.guest import Vm
from sim.memory.pages import END_OF_TIME, Int32, Int64
from sim.sharing import equal_pages
from sim.sharing.mechanism import InPasses, Looked
from sim.sharing.room import Room, Site
from sim.units import SECOND

TURN: Final = SECOND
_MERGING: Final = [equal_pages.W_COMPARE_BYTE, equal_pages.W_MERGE, equal_pages.W_PROMOTE]
_PASSES, _VISITS, _SCAN_PS, _MERGE_PS = range(Room.ROW, Room.ROW + 4)


class Passes(Room):
    """Memory of one host that is looked at in passes."""

    WORK: ClassVar[tuple[str, ...]] = equal_pages.WORK
    ROW = Room.ROW + 4

    def __init__(self, settings: InPasses, site: Site) -> None:
        """*settings* are complete for the kernel."""
        super().__init__(settings, site)
        # Only Linux unmaps pages of zeros when it splits a huge page, or puts the split of one given back in part off,
        # and none of these mechanisms is in such a Linux.
        self.m.counts[[memory.SPLIT_FREES_ZERO, memory.SPLITS_LATER]] = 0
        self._settings = settings
        self.vms: dict[int, Vm] = {}
        """Guests that run."""
        self._equal = equal_pages.table(site.contents, site.work_ps)
        self._equal.n[equal_pages.SPLITS] = settings.splits
        self._left: tuple[Int64, Int32] = np.empty(0, np.int64), np.empty(0, np.int32)
        self._passes = 0
        self._began: int | None = None
        self._wake = self.following(None)

    def following(self, began: int | None) -> int:
        """When the pass after the one that *began* then begins, or the first one; END_OF_TIME for never."""
        then = self._settings.following(began)
        return END_OF_TIME if then is None else then

    def more_guests(self, guests: int, contents: int) -> None:
        """See `Room`."""
        super().more_guests(guests, contents)
        self._equal = equal_pages.longer_table(self._equal, contents)

    def add(
        self, guest: int, pages: int, *, vm: Vm, key: int, now: int, level: float, node: int, thp: bool
    ) -> None:  # fmt: skip
        """See `Room`."""
        thp = self._settings.has_huge_pages(vm, thp)
        super().add(guest, pages, vm=vm, key=key, now=now, level=level, node=node, thp=thp)
        self.vms[guest] = vm

    def remove(self, guest: int) -> None:
        """See `Room`; nothing is looked for any more where the guest was."""
        span = self.pages_of(guest)
        pages, groups = self._left
        stays = (pages < span.start) | (pages >= span.stop)
        self._left = pages[stays], groups[stays]
        equal_pages.forget_holders(self._equal, span.start, span.stop)
        del self.vms[guest]
        super().remove(guest)

    def advance(self, horizon: int) -> Iterator[Int64]:
        """Let guests' accesses and passes happen up to *horizon*; yields a row for each pass. Raises OutOfFrames."""
        while True:
            self._run_guests(min(horizon, self._wake))
            if self._wake > horizon:
                return
            now = self._wake
            if self._began is None:
                self._began = now
                self.begin_pass()
            self._wake = now + TURN
            if self.turn(now):
                self._passes += 1
                self._wake, self._began = max(self.following(self._began), now + 1), None
                yield self.snapshot(now)[np.newaxis]

    def begin_pass(self) -> None:
        """A pass begins."""
        self._left = np.empty(0, np.int64), np.empty(0, np.int32)
        if not self.vms:
            return
        vms = sorted(self.vms.items(), key=lambda each: self.pages_of(each[0]).start)
        looked = [Looked(guest, vm.name, vm.pages, self._files_of(guest)) for guest, vm in vms]
        groups = np.concatenate([*self._settings.groups(looked)])
        pages = np.concatenate(
            [np.arange(span.start, span.stop) for span in (self.pages_of(guest) for guest, _ in vms)]
        )
        order = np.argsort(groups, kind="stable")
        order = order[groups[order] >= 0]
        self._left = pages[order], groups[order].astype(np.int32)

    def _files_of(self, guest: int) -> npt.NDArray[np.bool_]:
        return self.files.get(guest, np.empty(0, np.bool_))

    def turn(self, now: int) -> bool:
        """Go on with the pass for one turn. Returns whether it is done."""
        pages, groups = self._left
        done = self.look_at(self._equal, pages, now, groups, TURN * 1000)
        self._left = pages[done:], groups[done:]
        return done == len(pages)

    def snapshot(self, now: int) -> Int64:
        """See `Room`."""
        spent = self._equal.n[equal_pages.DONE :] * self._equal.n[equal_pages.PRICE : equal_pages.DONE]
        merging = int(spent[_MERGING].sum())
        visits = int(self._equal.n[equal_pages.VISITS])
        return np.append(super().snapshot(now), [self._passes, visits, int(spent.sum()) - merging, merging])

    def columns(self, log: Int64) -> dict[str, npt.NDArray[Any]]:
        """See `Room`."""
        scan, merge = log[:, _SCAN_PS] // 1000, log[:, _MERGE_PS] // 1000
        return super().columns(log) | {
            "full_scans": log[:, _PASSES],
            "pages_scanned": log[:, _VISITS],
            "ksmd_cpu_ns": scan + merge,
            "scan_cpu_ns": scan,
            "merge_cpu_ns": merge,
        }

    def work_done(self) -> dict[str, int]:
        """See `Room`."""
        return dict(zip(equal_pages.WORK, self._equal.n[equal_pages.DONE :].tolist(), strict=True))
