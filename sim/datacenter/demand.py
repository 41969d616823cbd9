"""How much CPU the guests ask for, epoch by epoch: what monitoring would tell the control plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from sim.datacenter.messages import NEVER, Int64, Newcomer
from sim.memory.guest import Vm

THOUSANDTHS: Final = 1000
"""Demand is counted in thousandths of a core, so that sums do not depend on their order."""

_HOST, _SINCE, _VCPUS, _FIRST, _LEVELS, _EVERY, _AGAIN = range(7)
"""Columns: number of the host, from when the levels count (ns), virtual processors, place and number of the levels, how
long each lasts, and whether they start over."""
_FREE: Final = -1
_FULL: Final = 65535
"""Levels are kept in parts of a virtual processor, so many to the whole."""

Levels = npt.NDArray[np.uint16]


class Demand:
    """CPU demand of every guest over time, with a row for each guest."""

    def __init__(self, kinds: Sequence[Vm]) -> None:
        self.kinds = [_levels_of(vm) for vm in kinds]
        self.rows = np.full((7, 1024), _FREE, np.int64)
        self.asked = np.zeros(1024, np.int64)
        """Demand of each row when it was last looked at; it is that of a level that never changes."""
        self.free = list(range(1023, -1, -1))
        self.levels: Levels = np.zeros(4096, np.uint16)
        self.end = 0
        """Levels in use, those of guests that have gone included."""
        self.shared = [(self._keep(levels), len(levels)) for levels, _, _ in self.kinds]
        """Place and number of the levels of each kind, which its guests share."""

    def add(self, guest: Newcomer, kind: int, vcpus: int, host: int, start: int) -> int:
        """Count a guest that starts (ns); return its row."""
        if not self.free:
            self._grow()
        row = self.free.pop()
        if guest.levels:
            if self.end + len(guest.levels) > len(self.levels):
                self._tidy(len(guest.levels))
            own = np.rint(np.clip(np.array(guest.levels), 0, 1) * _FULL).astype(np.uint16)
            place, every, again = (self._keep(own), len(own)), guest.every or NEVER, False
        else:
            place, (_, every, again) = self.shared[kind], self.kinds[kind]
        self.rows[:, row] = host, start, vcpus, *place, every, again
        self.asked[row] = _thousandths(int(self.levels[place[0]]), vcpus)
        return row

    def move(self, row: int, host: int) -> None:
        """A guest runs on another host."""
        self.rows[_HOST, row] = host

    def remove(self, row: int) -> None:
        """A guest is gone."""
        self.rows[_HOST, row] = _FREE
        self.free.append(row)

    def of_guests(self, now: int) -> Int64:
        """Demand (thousandths of a core) of each row at a moment; 0 for those that have not started."""
        there = (self.rows[_HOST] != _FREE) & (self.rows[_SINCE] <= now)
        varying = np.flatnonzero(there & (self.rows[_LEVELS] > 1))
        _, since, vcpus, first, count, every, again = self.rows[:, varying]
        turn = (now - since) // every
        turn = np.where(again != 0, turn % count, np.minimum(turn, count - 1))
        self.asked[varying] = _thousandths(self.levels[first + turn].astype(np.int64), vcpus)
        return np.where(there, self.asked, 0)

    def of_hosts(self, asked: Int64, hosts: int) -> Int64:
        """Demand summed over the guests of each host."""
        running = np.flatnonzero(asked)
        return np.bincount(self.rows[_HOST, running], asked[running], hosts).astype(np.int64)

    def _keep(self, levels: Levels) -> int:
        first, self.end = self.end, self.end + len(levels)
        if self.end > len(self.levels):
            self.levels = np.concatenate([self.levels, np.zeros(max(self.end, len(self.levels)), np.uint16)])
        self.levels[first : self.end] = levels
        return first

    def _grow(self) -> None:
        before = self.rows.shape[1]
        self.rows = np.concatenate([self.rows, np.full((7, before), _FREE, np.int64)], axis=1)
        self.asked = np.concatenate([self.asked, np.zeros(before, np.int64)])
        self.free = list(range(2 * before - 1, before - 1, -1))

    def _tidy(self, more: int) -> None:
        """Drop the levels of guests that have gone, and leave room for as many as there are and so many more."""
        rows = self.rows
        shared = sum(count for _, count in self.shared)
        own = np.flatnonzero((rows[_HOST] != _FREE) & (rows[_FIRST] >= shared))
        kept = int(rows[_LEVELS, own].sum())
        levels: Levels = np.zeros(max(len(self.levels), 2 * (shared + kept + more)), np.uint16)
        levels[:shared] = self.levels[:shared]
        self.end = shared
        for row in own.tolist():
            first, count = int(rows[_FIRST, row]), int(rows[_LEVELS, row])
            levels[self.end : self.end + count] = self.levels[first : first + count]
            rows[_FIRST, row] = self.end
            self.end += count
        self.levels = levels


_Amount = TypeVar("_Amount", int, Int64)


def _thousandths(level: _Amount, vcpus: _Amount) -> _Amount:
    """Thousandths of a core that so many virtual processors ask for at a level."""
    return (level * vcpus * THOUSANDTHS + _FULL // 2) // _FULL


def _levels_of(vm: Vm) -> tuple[Levels, int, bool]:
    """Levels of a kind of guest: its load times its activity, a virtual processor being busy at most all the time."""
    activity = vm.activity
    factors = np.array(activity.levels if activity else (1.0,))
    levels = np.rint(np.minimum(vm.load * factors, 1.0) * _FULL).astype(np.uint16)
    return levels, activity.every if activity else NEVER, activity.repeat if activity else False
