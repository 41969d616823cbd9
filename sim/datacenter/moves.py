"""Who moves where and why: hosts with too much to do, evacuation, and consolidation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from sim.datacenter.blocks import Datacenter, Hot
from sim.datacenter.books import Placed
from sim.datacenter.demand import THOUSANDTHS
from sim.datacenter.messages import NEVER, REPORT, Int64
from sim.datacenter.placement import NOWHERE, Flags, Need, Placement, Rooms
from sim.datacenter.power import Powered

_HISTORY: Final = 10
"""Epochs that a local regression looks back on: `length` in CloudSim's policy of that name."""

_COLUMN: Final = {name: place for place, name in enumerate(REPORT)}

Float = npt.NDArray[np.float64]
Guests = Sequence[Mapping[str, Placed]]
"""Guests of each host by name."""


class Movers:
    """Plans moves and begins them as the limits allow. A guest that moves has its room on both hosts."""

    def __init__(self, rules: Datacenter, numbers: Mapping[str, int], rooms: Rooms, placement: Placement,
                 power: Powered) -> None:  # fmt: skip
        """*numbers* has the number of each host by its name."""
        self.rules = rules
        self.rooms = rooms
        self.placement = placement
        self.power = power
        hosts = len(numbers)
        self.evacuations = [(each.at, each.until or NEVER, numbers[each.host]) for each in rules.evacuations]
        self.evacuated = np.zeros(hosts, bool)
        self.draining = np.zeros(hosts, bool)
        """Hosts that are emptied to be switched off."""
        self.unused = np.zeros(hosts, bool)
        """Hosts that were on and empty at the last decision."""
        self.planned: dict[str, Placed] = {}
        """Guests that move or shall move, in the order in which that was decided."""
        self.coming = np.zeros(hosts, np.int64)
        """Bytes kept for them where they move to."""
        self.under_way = np.zeros(hosts, np.int64)
        """Moves that leave or enter each host."""
        self.sending = 0
        self.loads: deque[Int64] = deque(maxlen=_HISTORY)
        self.looked = -1
        """When all hosts were last looked at for consolidation."""

    @property
    def any_reason(self) -> bool:
        """Whether guests ever move here."""
        return bool(self.rules.evacuations or self.rules.migration.hot or self.rules.consolidation)

    @property
    def closed(self) -> Flags:
        """Hosts that take no guests though they are on."""
        shut: Flags = self.evacuated | self.draining
        return shut

    def schedule(self, now: int) -> None:
        """Evacuations begin and end; by day no host is emptied to be switched off."""
        for begin, end, host in self.evacuations:
            if begin <= now:
                self.evacuated[host] = now < end
        rules = self.rules.consolidation
        if rules and not rules.holds_at(now):
            self.draining[:] = False

    def plan(self, now: int, guests: Guests, asked: Int64, loads: Int64, open_to: Callable[[Need], Flags],
             reports: tuple[Int64, Int64] | None) -> None:  # fmt: skip
        """Decide who shall move. *asked* is the CPU demand of each guest, *loads* that of each host; *reports* are the
        last ones and those before, if they are new.
        """
        self.loads.append(loads)
        for host in np.flatnonzero(self.closed).tolist():
            for placed in _movable(guests[host]):
                self._send_to(placed, self.placement.choose(placed.need, open_to(placed.need)))
        load = self._load_to_be(asked, loads)
        if hot := self.rules.migration.hot:
            self._relieve(hot, guests, asked, load, open_to, reports)
        rules = self.rules.consolidation
        if rules and rules.holds_at(now) and (self.looked < 0 or now - self.looked >= rules.every):
            self.looked = now
            self._consolidate(guests, asked, load, open_to)

    def begin(self) -> Iterator[Placed]:
        """Moves that begin now, as many as the limits allow; those to a host that takes no guests now are given up."""
        limits = self.rules.migration
        for placed in list(self.planned.values()):
            if placed.sent:
                continue
            if not self.power.on[placed.target] or self.evacuated[placed.target]:
                self.forget(placed)
            elif (
                self.sending < limits.in_all
                and self.under_way[placed.host] < limits.per_host
                and self.under_way[placed.target] < limits.per_host
            ):
                placed.sent = True
                self._count(placed, 1)
                yield placed

    def forget(self, placed: Placed) -> None:
        """A guest moves no more: what was kept for it is free."""
        if placed.target != NOWHERE:
            self.rooms.give(placed.target, placed.need, reported=False)
            self.over(placed)

    def over(self, placed: Placed) -> None:
        """A move is over; the room at its target stays the guest's."""
        if placed.sent:
            self._count(placed, -1)
        del self.planned[placed.guest.name]
        self.coming[placed.target] -= placed.need.memory
        placed.target, placed.sent = NOWHERE, False

    def idle(self, now: int, guests: Guests) -> list[int]:
        """Hosts to switch off: on, empty for a whole epoch, and not needed as spares."""
        rules = self.rules.consolidation
        if not rules:
            return []
        unused = np.array([not each for each in guests]) & (self.coming == 0) & self.power.on & ~self.evacuated
        long, self.unused = np.flatnonzero(unused & self.unused), unused
        if not rules.holds_at(now):
            return []
        spares = [host for host in long.tolist() if not self.draining[host]][: rules.spare_hosts]
        off = [host for host in long.tolist() if host not in set(spares)]
        self.draining[off] = False
        return off

    def _count(self, placed: Placed, change: int) -> None:
        self.under_way[placed.host] += change
        self.under_way[placed.target] += change
        self.sending += change

    def _send_to(self, placed: Placed, target: int) -> bool:
        """Plan a move; return whether there is a target."""
        if target == NOWHERE:
            return False
        placed.target = target
        self.rooms.take(target, placed.need)
        self.coming[target] += placed.need.memory
        self.planned[placed.guest.name] = placed
        return True

    def _load_to_be(self, asked: Int64, loads: Int64) -> Int64:
        """CPU demand of each host once all planned moves are over."""
        load = loads.copy()
        for placed in self.planned.values():
            load[placed.host] -= asked[placed.row]
            load[placed.target] += asked[placed.row]
        return load

    # --- hosts with too much to do --------------------------------------------------------------------------------

    def _relieve(self, hot: Hot, guests: Guests, asked: Int64, load: Int64, open_to: Callable[[Need], Flags],
                 reports: tuple[Int64, Int64] | None) -> None:  # fmt: skip
        most = self._most_load(hot)
        cpu = self._too_busy(hot, load, most)
        memory, pressed = self._too_full(hot, reports) if reports else (np.zeros_like(load), np.zeros(len(load), bool))
        warm = (cpu > 0) | (memory > 0) | pressed
        used = reports[0][:, _COLUMN["mem_used_bytes"]] if reports else np.zeros_like(load)
        for host in np.flatnonzero(warm & self.power.on).tolist():
            candidates = sorted(_movable(guests[host]), key=_by_memory)
            share = used[host] / max(int(self.rooms.promised[host]), 1)
            relief = [(placed, int(asked[placed.row]), int(placed.need.memory * min(share, 1.0)))
                      for placed in candidates]  # fmt: skip
            short_cpu, short_memory, one = int(cpu[host]), int(memory[host]), bool(pressed[host])
            if hot.select == "smallest-sufficient":
                enough = [each for each in relief if each[1] >= short_cpu and each[2] >= short_memory]
                relief = enough[:1] or relief
            for placed, less_cpu, less_memory in relief:
                if short_cpu <= 0 and short_memory <= 0 and not one:
                    break
                cool = open_to(placed.need) & ~warm & (load + less_cpu <= most)
                if hot.memory is not None:
                    full = used + self.coming + placed.need.memory
                    cool &= full <= (self.rooms.total * hot.memory)
                if self._send_to(placed, target := self.placement.choose(placed.need, cool)):
                    load[host] -= less_cpu
                    load[target] += less_cpu
                    short_cpu, short_memory, one = short_cpu - less_cpu, short_memory - less_memory, False

    def _most_load(self, hot: Hot | None) -> Int64:
        """Thousandths of a core that the guests of each host may ask for."""
        whole = self.power.cores * THOUSANDTHS
        if hot is None:
            return whole
        if hot.local_regression is not None:
            return (whole / hot.local_regression).astype(np.int64)
        return whole if hot.cpu is None else (whole * hot.cpu).astype(np.int64)

    def _too_busy(self, hot: Hot, load: Int64, most: Int64) -> Int64:
        """Thousandths of a core that the guests of each host ask for too much, or are going to."""
        if hot.local_regression is not None and len(self.loads) == _HISTORY:
            ahead = _regression(np.array(self.loads, float)) - self.loads[-1]
            return np.ceil(load + ahead - most).astype(np.int64)
        no_limit = hot.cpu is None and hot.local_regression is None
        return np.zeros_like(load) if no_limit else load - most

    def _too_full(self, hot: Hot, reports: tuple[Int64, Int64]) -> tuple[Int64, Flags]:
        """Bytes that each host reports as used too much, and hosts that report swapping or waiting for memory."""
        last, before = reports
        excess = np.zeros(len(last), np.int64)
        pressed = np.zeros(len(last), bool)
        if hot.memory is not None:
            leaving = np.zeros(len(last), np.int64)
            for placed in self.planned.values():
                leaving[placed.host] += placed.need.memory
            excess = last[:, _COLUMN["mem_used_bytes"]] - leaving - (self.rooms.total * hot.memory).astype(np.int64)
        if hot.swapped is not None:
            pressed |= last[:, _COLUMN["mem_swapped_bytes"]] > self.rooms.total * hot.swapped
        if hot.psi is not None:
            waited = last[:, _COLUMN["psi_some_ns"]] - before[:, _COLUMN["psi_some_ns"]]
            pressed |= waited > hot.psi * self.rules.report_period
        return excess, pressed

    # --- consolidation --------------------------------------------------------------------------------------------

    def _consolidate(self, guests: Guests, asked: Int64, load: Int64, open_to: Callable[[Need], Flags]) -> None:
        """Empty the hosts with the least memory promised, up to the first whose guests do not fit on others."""
        most = self._most_load(self.rules.migration.hot)
        share = self.rooms.promised / self.rooms.total
        used = np.array([bool(each) for each in guests]) & self.power.on & ~self.closed
        for host in np.argsort(share, kind="stable").tolist():
            if not used[host] or self.coming[host]:
                continue
            used[host] = False
            if not self._empty(host, guests[host], asked, load, most, lambda need: open_to(need) & used):
                return

    def _empty(self, host: int, guests: Mapping[str, Placed], asked: Int64, load: Int64, most: Int64,
               open_to: Callable[[Need], Flags]) -> bool:  # fmt: skip
        """Plan to move all guests of a host to others that are in use, the largest first; all of them or none."""
        moved: list[Placed] = []
        for placed in sorted(guests.values(), key=_by_memory, reverse=True):
            wants = int(asked[placed.row])
            cool = open_to(placed.need) & (load + wants <= most)
            target = self.placement.choose(placed.need, cool, "best-fit")
            if placed.target != NOWHERE or not self._send_to(placed, target):
                for each in moved:
                    load[each.target] -= asked[each.row]
                    self.forget(each)
                return False
            load[target] += wants
            moved.append(placed)
        load[host] = 0
        self.draining[host] = True
        return True


def _movable(guests: Mapping[str, Placed]) -> list[Placed]:
    """Guests that do not move already."""
    return [placed for placed in guests.values() if placed.target == NOWHERE]


def _by_memory(placed: Placed) -> tuple[int, str]:
    """What orders guests by the time that their move takes: memory, then name."""
    return placed.need.memory, placed.guest.name


def _regression(loads: Float) -> Float:
    """What a line through each column says of the next row, with tricube weights that end beyond the first row
    (Beloglazov & Buyya 2012, local regression after Cleveland 1979).
    """
    rows = len(loads)
    place = np.arange(rows) - (rows - 1.0)
    weight = (1 - (-place / rows) ** 3) ** 3
    weight = weight / weight.sum()
    middle, mean = weight @ place, weight @ loads
    slope = (weight * (place - middle)) @ loads / (weight @ (place - middle) ** 2)
    ahead: Float = mean + slope * (1 - middle)
    return ahead
