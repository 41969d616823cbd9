"""Hosts without pages, for tests of the control plane: they do what they are told and answer from their books."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sim.datacenter.control import ControlPlane, numbered
from sim.datacenter.messages import (
    NEVER,
    REPORT,
    Answer,
    Ended,
    Fail,
    Luggage,
    Moved,
    Newcomer,
    Order,
    Receive,
    Send,
    Start,
)
from sim.scenario import Scenario, parse

PAGE = 4096


def scenario(**changes: Any) -> Scenario:
    """A small datacenter, some of it changed."""
    base: dict[str, Any] = {
        "name": "fleet",
        "duration": "1d",
        "hosts": [{"name": "node", "count": 4, "memory": "16GiB", "cores": 8}],
        "vms": [{"name": "web", "memory": "4GiB"}],
        "datacenter": {},
    }
    return parse(base | changes)


def named(order: Order) -> str:
    """The guest that an order is about."""
    match order:
        case Start():
            return order.guest.name
        case Receive():
            return order.luggage.newcomer.name
        case Fail():
            return ""
    return order.guest


class Fake:
    """A host: guests with the end of each, and those that are about to leave."""

    def __init__(self, number: int, memory: int, kinds: Mapping[str, int], used: float) -> None:
        self.number = number
        self.memory = memory
        self.kinds = kinds
        self.used = used
        self.guests: dict[str, tuple[Newcomer, int]] = {}
        self.leaving: list[tuple[int, Send]] = []
        self.ended: list[Ended] = []

    def end(self, name: str, time: int, how: str) -> None:
        self.guests.pop(name)
        self.leaving = [(done, send) for done, send in self.leaving if send.guest != name]
        self.ended.append(Ended(self.number, time, {"guest": name, "end": how}))

    def live(self, until: int) -> None:
        """Guests whose lives are over by then end."""
        due = sorted((end, name) for name, (_, end) in self.guests.items() if end <= until)
        for end, name in due:
            self.end(name, end, "stopped")

    def do(self, order: Order) -> None:
        self.live(order.time)
        if isinstance(order, Start):
            assert order.guest.name not in self.guests
            self.guests[order.guest.name] = order.guest, min(order.time + order.guest.lifetime, NEVER)
        elif isinstance(order, Send):
            guest, _ = self.guests[order.guest]
            self.leaving.append((order.time + self.size(guest) * 10**9 // order.bytes_per_s, order))
        elif isinstance(order, Receive):
            luggage = order.luggage
            left = luggage.since + luggage.newcomer.lifetime
            self.guests[luggage.newcomer.name] = luggage.newcomer, max(left, order.time)
        elif isinstance(order, Fail):
            for name in list(self.guests):
                self.end(name, order.time, "failed")
        else:
            raise AssertionError(order)

    def leave(self, until: int) -> list[tuple[int, Moved]]:
        """Guests whose copying is done by then."""
        moved = []
        for done, send in self.leaving:
            if done <= until:
                guest, end = self.guests.pop(send.guest)
                luggage = Luggage(guest, end - guest.lifetime, np.zeros(0, np.int32))
                moved.append(
                    (self.number, Moved(send.guest, luggage, 1, self.size(guest) // PAGE, 10**8, done - send.time))
                )
        self.leaving = [(done, send) for done, send in self.leaving if done > until]
        return moved

    def size(self, guest: Newcomer) -> int:
        return self.kinds[guest.kind] if guest.memory is None else guest.memory

    def report(self) -> list[int]:
        promised = sum(self.size(guest) for guest, _ in self.guests.values())
        told = dict.fromkeys(REPORT, 0) | {"guests_running": len(self.guests), "mem_total_bytes": self.memory}
        used = int(promised * self.used)
        told |= {"mem_promised_bytes": promised, "mem_used_bytes": used, "mem_free_bytes": self.memory - used}
        return [told[name] for name in REPORT]


class FakeFleet:
    """A control plane and its hosts; groups of hosts answer one after the other."""

    def __init__(self, asked: Scenario, *, used: float = 1.0, groups: int = 1) -> None:
        self.plane = ControlPlane(asked)
        self.rules = self.plane.rules
        kinds = {vm.name: vm.memory for vm in asked.vms}
        self.hosts = [Fake(number, host.memory, kinds, used) for number, (_, host) in enumerate(numbered(asked.hosts))]
        self.groups = groups
        self.orders: list[Order] = []
        self.ended: list[Ended] = []
        self.moved: list[str] = []

    def run(self, look: Callable[[int], None] | None = None) -> FakeFleet:
        """Go to the end of the scenario; *look* is called at the end of each epoch."""
        now = 0
        while now < self.plane.duration:
            until = min(now + self.rules.epoch, self.plane.duration)
            orders = self.plane.decide(now)
            self.orders += orders
            for answer in self.answers(orders, until, self.plane.due_for_report(until)):
                self.plane.hear(until, answer)
            now = until
            if look:
                look(now)
        return self

    def orders_as_text(self) -> list[str]:
        """What was ordered so far, to compare."""
        return [f"{type(each).__name__} {each.host} {each.time} {named(each)}" for each in self.orders]

    def answers(self, orders: Sequence[Order], until: int, report: bool) -> Iterable[Answer]:
        """What each group of hosts says."""
        for first in range(self.groups):
            group = self.hosts[first :: self.groups]
            numbers = {host.number for host in group}
            for order in orders:
                if order.host in numbers:
                    self.hosts[order.host].do(order)
            ended: list[Ended] = []
            moved: list[tuple[int, Moved]] = []
            for host in group:
                host.live(until)
                moved += host.leave(until)
                ended += host.ended
                host.ended = []
            self.ended += ended
            self.moved += [each.guest for _, each in moved]
            rows = [host.report() for host in group] if report else []
            yield Answer(
                np.array(sorted(numbers) if report else [], np.int64),
                np.array(rows, np.int64).reshape(-1, len(REPORT)), {}, ended, moved, [],
            )  # fmt: skip
