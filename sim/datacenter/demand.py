"""How much CPU the guests ask for, epoch by epoch: what monitoring would tell the control plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from sim.datacenter.messages import NEVER, Int64, Newcomer
from sim.memory.guest import Vm

THOUSANDTHS: Final = 1000
"""Demand is counted in thousandths of a core, so that sums do not depend on their order."""

_COLUMNS: Final = ("host", "since", "vcpus", "first", "levels", "every", "again")
_FREE: Final = -1
_LEVELS: Final = np.uint16
"""Levels are kept in 1/65535 of a virtual processor."""
_FULL: Final = 65535


class Demand:
    """CPU demand of every guest over time, as arrays with a row for each guest."""

    def __init__(self, kinds: Sequence[Vm]) -> None:
        self.kinds = [_levels_of(vm) for vm in kinds]
        self.rows = {name: np.full(1024, _FREE, np.int64) for name in _COLUMNS}
        self.free = list(range(1023, -1, -1))
        self.levels = np.zeros(4096, _LEVELS)
        self.end = 0
        """Levels in use, those of guests that have gone included."""
        self.shared: list[tuple[int, int]] = []
        """First and number of the levels of each kind, which its guests share."""
        for levels, _, _ in self.kinds:
            self.shared.append((self._keep(levels), len(levels)))

    def add(self, guest: Newcomer, kind: int, vcpus: int, host: int, since: int) -> int:
        """Count a guest from a moment on (ns); return its row."""
        if not self.free:
            self._grow()
        row = self.free.pop()
        if guest.levels:
            if self.end + len(guest.levels) > len(self.levels):
                self._tidy(len(guest.levels))
            own = np.rint(np.clip(np.array(guest.levels), 0, 1) * _FULL).astype(_LEVELS)
            place, every, again = (self._keep(own), len(own)), guest.every or NEVER, False
        else:
            place, (_, every, again) = self.shared[kind], self.kinds[kind]
        for name, value in zip(_COLUMNS, (host, since, vcpus, *place, every, again), strict=True):
            self.rows[name][row] = value
        return row

    def move(self, row: int, host: int) -> None:
        """A guest runs on another host."""
        self.rows["host"][row] = host

    def remove(self, row: int) -> None:
        """A guest is gone."""
        self.rows["host"][row] = _FREE
        self.free.append(row)

    def of_guests(self, now: int) -> Int64:
        """Demand (thousandths of a core) of each row at a moment; 0 for those that have not started."""
        rows = self.rows
        age = now - rows["since"]
        active = (rows["host"] != _FREE) & (age >= 0)
        asked = np.zeros(len(age), np.int64)
        age, first, count, every, again, vcpus = (
            values[active] for values in (age, *(rows[name] for name in ("first", "levels", "every", "again", "vcpus")))
        )
        turn = age // every
        turn = np.where(again != 0, turn % count, np.minimum(turn, count - 1))
        level = self.levels[first + turn].astype(np.int64)
        asked[active] = (level * vcpus * THOUSANDTHS + _FULL // 2) // _FULL
        return asked

    def of_hosts(self, asked: Int64, hosts: int) -> Int64:
        """Demand summed over the guests of each host."""
        where = self.rows["host"]
        running = where != _FREE
        return np.bincount(where[running], asked[running], hosts).astype(np.int64)

    def _keep(self, levels: np.ndarray[tuple[int], np.dtype[np.uint16]]) -> int:
        first, self.end = self.end, self.end + len(levels)
        if self.end > len(self.levels):
            self.levels = np.concatenate([self.levels, np.zeros(max(self.end, len(self.levels)), _LEVELS)])
        self.levels[first : self.end] = levels
        return first

    def _grow(self) -> None:
        before = len(self.rows["host"])
        for name, values in self.rows.items():
            self.rows[name] = np.concatenate([values, np.full(before, _FREE, np.int64)])
        self.free = list(range(2 * before - 1, before - 1, -1))

    def _tidy(self, more: int) -> None:
        """Drop the levels of guests that have gone, if that makes room for so many more; otherwise get more room."""
        rows = self.rows
        shared = sum(count for _, count in self.shared)
        own = np.flatnonzero((rows["host"] != _FREE) & (rows["first"] >= shared))
        kept = int(rows["levels"][own].sum())
        levels = np.zeros(max(len(self.levels), 2 * (shared + kept + more)), _LEVELS)
        levels[:shared] = self.levels[:shared]
        self.end = shared
        for row in own.tolist():
            first, count = int(rows["first"][row]), int(rows["levels"][row])
            levels[self.end : self.end + count] = self.levels[first : first + count]
            rows["first"][row] = self.end
            self.end += count
        self.levels = levels


def _levels_of(vm: Vm) -> tuple[np.ndarray[tuple[int], np.dtype[np.uint16]], int, bool]:
    """Levels of a kind of guest: its load times its activity, a virtual processor being busy at most all the time."""
    activity = vm.activity
    factors = np.array(activity.levels if activity else (1.0,))
    levels = np.rint(np.minimum(vm.load * factors, 1.0) * _FULL).astype(_LEVELS)
    return levels, activity.every if activity else NEVER, activity.repeat if activity else False
