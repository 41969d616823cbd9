"""Mechanisms that look for equal pages in passes, at known moments: what they have in common, and what each looks at.

A pass goes through a list of pages. It takes the CPU time that its work costs, of one core at most, in turns of a
second; what happens in a turn happens at its start.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sim.memory.guest import Vm
from sim.memory.pages import END_OF_TIME, Int32, Int64
from sim.sharing import equal_pages
from sim.sharing.mergemem import Mergemem
from sim.sharing.page_combining import PageCombining
from sim.sharing.room import Room, Site
from sim.units import SECOND

_TURN: Final = SECOND
_MERGING: Final = [equal_pages.W_COMPARE_BYTE, equal_pages.W_MERGE, equal_pages.W_PROMOTE]
_PASSES, _VISITS, _SCAN_PS, _MERGE_PS = range(Room.ROW, Room.ROW + 4)


class Passes(Room, ABC):
    """Memory of one host that is looked at in passes. A subclass says when, and at what."""

    WORK = equal_pages.WORK
    ROW = Room.ROW + 4
    splits = False
    """Whether huge pages are taken apart for a page that can be shared, or left alone."""

    def __init__(self, settings: Any, site: Site) -> None:
        """*settings* are complete for the kernel."""
        super().__init__(settings, site)
        self.settings = settings
        self.vms: dict[int, Vm] = {}
        """Guests that run."""
        self._equal = equal_pages.table(site.contents, site.work_ps)
        self._equal.n[equal_pages.SPLITS] = self.splits
        self._left: tuple[Int64, Int32] = np.empty(0, np.int64), np.empty(0, np.int32)
        self._passes = 0
        self._began = -1
        self._wake = self.following(-1)

    @abstractmethod
    def following(self, began: int) -> int:
        """When the pass after the one that *began* then begins (-1: the first one); END_OF_TIME for never."""

    @abstractmethod
    def chosen(self) -> tuple[Int64, Int32]:
        """Pages that a pass looks at, in order; each shares with equal ones of its group, and those stand together."""

    def add(
        self, guest: int, pages: int, *, vm: Vm, key: int, now: int, level: float, node: int, thp: bool
    ) -> None:  # fmt: skip
        """See `Room`."""
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
            if self._began < 0:
                self._began = now
                self._left = self.chosen()
            pages, groups = self._left
            done = self.look_at(self._equal, pages, now, groups, _TURN * 1000)
            self._left = pages[done:], groups[done:]
            self._wake = now + _TURN
            if done == len(pages):
                self._passes += 1
                self._wake, self._began = max(self.following(self._began), now + 1), -1
                yield self.snapshot(now)[np.newaxis]

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


class SameNames(Passes):
    """mergemem."""

    settings: Mergemem

    def following(self, began: int) -> int:
        """See `Passes`."""
        if began < 0:
            return self.settings.at
        return began + self.settings.every if self.settings.every else END_OF_TIME

    def chosen(self) -> tuple[Int64, Int32]:
        """One address of all processes of a name after the other."""
        names = sorted({vm.name for vm in self.vms.values()})
        pages, groups = [], []
        for guest, vm in self.vms.items():
            span = self.pages_of(guest)
            pages.append(np.arange(span.start, span.stop))
            groups.append(np.arange(vm.pages) * len(names) + names.index(vm.name))
        return _ordered(pages, groups)


class PrivatePages(Passes):
    """Windows' page combining."""

    settings: PageCombining

    def following(self, began: int) -> int:
        """See `Passes`."""
        return max(began, 0) + self.settings.every

    def chosen(self) -> tuple[Int64, Int32]:
        """Pages that were not read from files, of one system after the other."""
        pages, groups = [], []
        for guest in self.vms:
            own = np.flatnonzero(~self.files[guest]) + self.pages_of(guest).start
            pages.append(own)
            groups.append(np.full(len(own), guest if self.settings.within == "guest" else 0))
        return _ordered(pages, groups)


def _ordered(pages: list[Int64], groups: list[Int64]) -> tuple[Int64, Int32]:
    """Pages and their groups as one list, group by group."""
    if not pages:
        return np.empty(0, np.int64), np.empty(0, np.int32)
    all_pages, all_groups = np.concatenate(pages), np.concatenate(groups).astype(np.int32)
    order = np.lexsort((all_pages, all_groups))
    return all_pages[order], all_groups[order]
