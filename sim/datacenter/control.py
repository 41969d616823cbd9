"""The control plane: once an epoch it decides, from what hosts reported and from its own books, who runs where."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Final, Protocol

import numpy as np

from sim.columns import Window
from sim.datacenter.arrivals import newcomers, read_traces
from sim.datacenter.blocks import Datacenter
from sim.datacenter.books import Placed, Waiting
from sim.datacenter.demand import THOUSANDTHS, Demand
from sim.datacenter.failures import Breakdowns
from sim.datacenter.ledger import Ledger, Tables
from sim.datacenter.messages import (
    NEVER,
    REPORT,
    Answer,
    Ended,
    Fail,
    Moved,
    Newcomer,
    Order,
    Receive,
    Send,
    Start,
    UInt8,
)
from sim.datacenter.moves import Movers
from sim.datacenter.placement import NOWHERE, Flags, Likeness, Need, Placement, Rooms
from sim.datacenter.power import BOOTING, OFF, ON, Powered
from sim.host import Host
from sim.memory.guest import Vm
from sim.streams import generator

_END, _FAILURE, _RESTART, _ARRIVAL = range(4)
"""What happens within an epoch; of things at the same moment the first goes first."""

_RESTARTED: Final = "~"
"""What stands between a guest's name and how often it was restarted: no name of a kind has it."""
_MADE_AGAIN: Final = ("readings", "_arrivals")
_USED: Final = REPORT.index("mem_used_bytes")
_OVERHEAD: Final = REPORT.index("overhead_cpu_ns")


class Question(Protocol):
    """What the control plane reads of a scenario."""

    @property
    def seed(self) -> int:
        """Seed of every random stream."""

    @property
    def duration(self) -> int:
        """Simulated time (ns)."""

    @property
    def hosts(self) -> Sequence[Host]:
        """Kinds of host."""

    @property
    def vms(self) -> Sequence[Vm]:
        """Kinds of guest."""

    @property
    def datacenter(self) -> Datacenter | None:
        """Its rules."""

    @property
    def window(self) -> Window | None:
        """What the metrics are about, if that is not the whole run."""


def numbered(hosts: Sequence[Host]) -> list[tuple[str, Host]]:
    """Every host by name, in the order of their names: its place is its number."""
    return sorted(((name, host) for host in hosts for name in host.names()), key=lambda each: each[0])


class ControlPlane:
    """Decides where guests start, when they move and which hosts are on; knows hosts by their reports alone."""

    def __init__(self, question: Question, fingerprints: Mapping[str, UInt8] | None = None) -> None:
        """*fingerprints*: for sharing-aware placement, the contents of each kind of guest (`numpy.packbits`)."""
        assert question.datacenter is not None
        self.rules = question.datacenter
        self.seed = question.seed
        self.duration = question.duration
        self.kinds = tuple(question.vms)
        self.numbers = {vm.name: number for number, vm in enumerate(self.kinds)}
        self.names = [name for name, _ in numbered(question.hosts)]
        self.hosts = [host for _, host in numbered(question.hosts)]
        numbers = {name: number for number, name in enumerate(self.names)}
        memory = np.array([host.memory for host in self.hosts], np.int64)
        self.power = Powered(self.hosts)
        self.rooms = Rooms(memory, self.power.cores, self.rules.overcommit, self.rules.admission)
        prints = {self.numbers[kind]: bits for kind, bits in (fingerprints or {}).items()}
        self.likeness = Likeness(prints, len(self.hosts))
        random = generator(self.seed, "placement")
        self.placement = Placement(self.rules.placement, self.rooms, self.likeness, random)
        self.allowed = [self._allowed(vm) for vm in self.kinds]
        self.demand = Demand(self.kinds)
        self.guests: dict[str, Placed] = {}
        self.at: list[dict[str, Placed]] = [{} for _ in self.hosts]
        """Guests of each host, without those that are gone by the books."""
        self.possible: dict[Need, bool] = {}
        """Whether an empty host would take such a guest."""
        self.waiting: list[Waiting] = []
        self.heard: list[Answer] = []
        self.reports = np.zeros((len(self.hosts), len(REPORT)), np.int64)
        self.before = self.reports.copy()
        """The reports before those."""
        self.reported_at = -1
        self.reported_before = 0
        self.overhead = np.zeros(len(self.hosts), np.int64)
        """What overcommit takes of each host's CPU by its last two reports (thousandths of a core)."""
        self.failed_at = np.full(len(self.hosts), -1, np.int64)
        self.open = self.power.on
        """Hosts that take guests."""
        self.claimed = np.zeros((2, len(self.hosts)), np.int64)
        """Bytes and virtual processors for which hosts were switched on."""
        self.orders: list[Order] = []
        self.events: list[tuple[int, int, int, Any]] = []
        """Heap of what is to come: time, what it is, a number that no other has, and whom it is about."""
        self.counted = 0
        window = question.window or Window(0, question.duration)
        self.ledger = Ledger(self.names, self.hosts, self.rules.report_period, window)
        self.movers = Movers(self.rules, numbers, self.rooms, self.placement, self.power)
        self.breakdowns = Breakdowns(self.rules.failures, numbers, self.seed) if self.rules.failures else None
        for time, host, at_random in self.breakdowns.first() if self.breakdowns else ():
            self._later(time, _FAILURE, (host, at_random))
        self.taken = 0
        """Guests that the stream of arrivals has given so far."""
        self.readings = read_traces(self.rules)
        for reading in self.readings.values():
            for line in reading.rows.lines():
                self.ledger.event(0, None, "trace-rows", line)
        self._arrivals = self._stream()
        self._next_arrival()

    def __getstate__(self) -> dict[str, Any]:
        """The plain state: the stream of arrivals is made again and put forward."""
        return {name: value for name, value in self.__dict__.items() if name not in _MADE_AGAIN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on from a plain state."""
        self.__dict__ |= state
        self.readings = read_traces(self.rules)
        self._arrivals = islice(self._stream(), self.taken, None)

    def _stream(self) -> Iterator[Newcomer]:
        return newcomers(self.rules, self.kinds, self.seed, self.duration, self.readings)

    def _allowed(self, vm: Vm) -> Flags | None:
        """Hosts that a kind of guest may run on: those it names, if it does, with its NUMA node; None for all."""
        allowed = np.array([
            vm.host in (None, name, host.name) and (vm.numa_node or 0) < host.numa_nodes
            for name, host in zip(self.names, self.hosts, strict=True)
        ], bool)  # fmt: skip
        return None if allowed.all() else allowed

    # --- what hosts say -------------------------------------------------------------------------------------------

    def due_for_report(self, now: int) -> bool:
        """Whether hosts report at the end of an epoch (ns)."""
        return now % self.rules.report_period == 0 or now >= self.duration

    def hear(self, now: int, answer: Answer) -> None:
        """Take what some hosts answered at a moment; it is put off until all have, so that grouping cannot matter."""
        self.heard.append(answer)
        if len(answer.hosts):
            if self.reported_at != now:
                self.before[:] = self.reports
                self.reported_before, self.reported_at = max(self.reported_at, 0), now
            self.reports[answer.hosts] = answer.reports

    def _digest(self, now: int) -> None:
        """Write what was heard into the books, in an order that does not depend on who said it first."""
        if self.reported_at == now and any(len(answer.hosts) for answer in self.heard):
            self.rooms.report(self.reports[:, _USED], self.movers.coming)
            self.ledger.report(self.reports, self.before)
            spent = self.reports[:, _OVERHEAD] - self.before[:, _OVERHEAD]
            self.overhead = spent * THOUSANDTHS // (self.reported_at - self.reported_before)
        for answer in self.heard:
            for host, held in answer.fingerprints.items():
                self.likeness.report(host, held)
        ended = sorted((each for answer in self.heard for each in answer.ended), key=_when_ended)
        moved = sorted((each for answer in self.heard for each in answer.moved), key=lambda each: each[1].guest)
        self.heard = []
        for each in ended:
            self._ended(each)
        for _, move in moved:
            self._arrive_from(move, now)
        guests = np.fromiter(map(len, self.at), np.int64, len(self.at))
        self.ledger.close(now, self.power, self.rooms, guests, len(self.waiting), self.reports)

    def _ended(self, ended: Ended) -> None:
        name = str(ended.row["guest"])
        placed = self.guests.pop(name)
        # By the books its life may be over all the same: they did not know yet that its host had failed before.
        failed = placed.here <= self.failed_at[placed.host] <= ended.time < placed.end
        if not placed.gone:
            self._release(placed, reported=failed)
        if ended.row["end"] == "not-started":
            self.ledger.lost += 1
            return
        if not failed:
            self.ledger.ended += 1
            return
        rules = self.rules.failures
        if rules and rules.restart:
            self._later(ended.time + rules.detection, _RESTART, self._reborn(placed, ended.time))
        else:
            self.ledger.lost += 1

    def _reborn(self, placed: Placed, failed: int) -> Newcomer:
        """The same guest to be started again, for what is left of its life; its restarts are part of its name."""
        origin, _, count = placed.guest.name.partition(_RESTARTED)
        left = placed.end - failed if placed.end < NEVER else NEVER
        return replace(placed.guest, name=f"{origin}{_RESTARTED}{int(count or 0) + 1}", lifetime=left)

    def _release(self, placed: Placed, *, reported: bool = False) -> None:
        """Free what the guest has in the books: on its host, and where it moves to."""
        self.rooms.give(placed.host, placed.need, reported=reported or placed.here < self.reported_at)
        self.at[placed.host].pop(placed.guest.name)
        self.demand.remove(placed.row)
        self.movers.forget(placed)

    # --- what hosts shall do --------------------------------------------------------------------------------------

    def decide(self, now: int) -> list[Order]:
        """What hosts shall do in the epoch that begins now (ns), in order of time."""
        until = min(now + self.rules.epoch, self.duration)
        self.orders = []
        self.movers.schedule(now)
        self._reopen()
        self._digest(now)
        for host in self.power.wake(now):
            self.ledger.event(now, host, "host-on", "")
        self._reopen()
        self.claimed[:] = 0
        self._retry(now)
        self._move(now)
        powered = self.power.draws
        self._live(now, until)
        self._account(now, until, powered)
        return self.orders

    def _reopen(self) -> None:
        self.open = self.power.on & ~self.movers.closed

    def _arrive_from(self, move: Moved, now: int) -> None:
        """A guest has left its host, and goes on where it moves to, or elsewhere if that has no room any more."""
        placed = self.guests[move.guest]
        source, target = placed.host, placed.target
        self.ledger.move(now, source, move)
        self.rooms.give(source, placed.need, reported=placed.here < self.reported_at)
        self.at[source].pop(move.guest)
        self.movers.over(placed)
        if not self.open[target] or self.rooms.memory[target] < 0:
            self.rooms.give(target, placed.need, reported=False)
            other = self.placement.choose(placed.need, self._open_to(placed.need))
            if other == NOWHERE and not self.power.on[target]:
                self.guests.pop(move.guest)
                self.demand.remove(placed.row)
                self.ledger.lost += 1
                self.ledger.event(now, target, "guest-lost", "its new host failed and no other has room", move.guest)
                return
            target = target if other == NOWHERE else other
            self.rooms.take(target, placed.need)
        placed.host, placed.here = target, now
        self.at[target][move.guest] = placed
        self.demand.move(placed.row, target)
        self.ledger.entered[target] += 1
        self.likeness.add(target, placed.need.kind)
        self.orders.append(Receive(target, now, move.luggage))

    def _open_to(self, need: Need) -> Flags:
        allowed = self.allowed[need.kind]
        return self.open if allowed is None else self.open & allowed

    def _need(self, guest: Newcomer) -> Need:
        kind = self.numbers[guest.kind]
        vm = self.kinds[kind]
        return Need(kind, vm.memory if guest.memory is None else guest.memory, guest.vcpus or vm.vcpus)

    def _retry(self, now: int) -> None:
        """Guests that wait are tried again, those first that have waited longest."""
        waiting, self.waiting = self.waiting, []
        hopeless: set[Need] = set()
        for each in waiting:
            if each.until < now:
                self._refuse(each)
            elif each.need in hopeless or not self._start(each.guest, each.need, now, each.since):
                hopeless.add(each.need)
                self._wait(each, now)

    def _start(self, guest: Newcomer, need: Need, now: int, since: int) -> bool:
        """Start a guest that came at *since* if a host has room; return whether."""
        host = self.placement.choose(need, self._open_to(need))
        if host == NOWHERE and (host := self._spared(need)) == NOWHERE:
            return False
        self.rooms.take(host, need)
        self.likeness.add(host, need.kind)
        end = min(now + guest.lifetime, NEVER)
        row = self.demand.add(guest, need.kind, need.vcpus, host, now)
        self.guests[guest.name] = self.at[host][guest.name] = Placed(guest, need, host, now, end, row)
        if end < self.duration:
            self._later(end, _END, guest.name)
        self.orders.append(Start(host, now, guest))
        self.ledger.start(host, now - since)
        return True

    def _spared(self, need: Need) -> int:
        """A host with room that was about to be switched off, and now is not."""
        draining = self.movers.draining
        if not draining.any():
            return NOWHERE
        allowed = self.allowed[need.kind]
        on = self.power.on & draining & ~self.movers.evacuated
        host = self.placement.choose(need, on if allowed is None else on & allowed)
        if host != NOWHERE:
            draining[host] = False
            self.open[host] = True
        return host

    def _come(self, guest: Newcomer, now: int, *, again: bool) -> None:
        """A guest comes, for the first time or after its host failed."""
        need = self._need(guest)
        if not self._start(guest, need, now, now):
            patience = NEVER if again else self.rules.admission.patience
            self._wait(Waiting(guest, need, now, min(now + patience, NEVER), again), now)

    def _wait(self, each: Waiting, now: int) -> None:
        """Let a guest wait that found no room, switch a host on for it, or refuse it."""
        ready = self._claim(each.need, now) if self.rules.consolidation else NEVER
        if ready < NEVER:
            # It is first tried when the epoch after the boot begins.
            each = replace(each, until=max(each.until, ready + self.rules.epoch))
        if each.until > now and self._ever_fits(each.need):
            self.waiting.append(each)
        else:
            self._refuse(each)

    def _refuse(self, each: Waiting) -> None:
        if each.again:
            self.ledger.lost += 1
        else:
            self.ledger.refused += 1

    def _ever_fits(self, need: Need) -> bool:
        """Whether an empty host would take the guest."""
        if need not in self.possible:
            self.possible[need] = self._would_fit(need)
        return self.possible[need]

    def _would_fit(self, need: Need) -> bool:
        fits = (self.rooms.largest >= need.memory) & (self.rooms.vcpu_limit >= need.vcpus)
        allowed = self.allowed[need.kind]
        return bool(np.any(fits if allowed is None else fits & allowed))

    def _claim(self, need: Need, now: int) -> int:
        """When a host will have booted that has room for the guest, one being switched on if need be; NEVER if none."""
        memory, vcpus = self.rooms.memory - self.claimed[0], self.rooms.vcpus - self.claimed[1]
        fits = (memory >= need.memory) & (vcpus >= need.vcpus) & ~self.movers.evacuated
        if (allowed := self.allowed[need.kind]) is not None:
            fits &= allowed
        for state in (BOOTING, OFF):
            which = fits & (self.power.state == state)
            host = int(which.argmax())
            if which[host]:
                break
        else:
            return NEVER
        if state == OFF and self.rules.consolidation:
            self.power.boot(host, now + self.rules.consolidation.boot_time)
            self.ledger.event(now, host, "host-boots", "")
        self.claimed[:, host] += need.memory, need.vcpus
        return int(self.power.ready[host])

    def _move(self, now: int) -> None:
        """Plan moves, begin those that may begin, and switch off hosts that are empty."""
        if not self.movers.any_reason:
            return
        asked = self.demand.of_guests(now)
        by_host = self.demand.of_hosts(asked, len(self.hosts)) + self.overhead
        reports = (self.reports, self.before) if self.reported_at == now else None
        self.movers.plan(now, self.at, asked, by_host, self._open_to, reports)
        self._reopen()
        for placed in self.movers.begin():
            self.orders.append(Send(placed.host, now, placed.guest.name, self.rules.migration.bytes_per_s))
        for host in self.movers.idle(now, self.at):
            self.power.switch_off(host)
            self.open[host] = False
            self.ledger.event(now, host, "host-off", "")

    # --- within an epoch ------------------------------------------------------------------------------------------

    def _later(self, time: int, what: int, about: object) -> None:
        if time < self.duration:
            self.counted += 1
            heapq.heappush(self.events, (time, what, self.counted, about))

    def _next_arrival(self) -> None:
        guest = next(self._arrivals, None)
        if guest is not None:
            self.taken += 1
            self._later(guest.time, _ARRIVAL, guest)

    def _live(self, now: int, until: int) -> None:
        """Everything that happens within the epoch, in order of time."""
        while self.events and self.events[0][0] < until:
            time, what, _, about = heapq.heappop(self.events)
            time = max(time, now)
            if what == _END:
                self._expect_end(about, time)
            elif what == _FAILURE:
                self._fail(about, time)
            elif what == _RESTART:
                self.ledger.restarts += 1
                self._come(about, time, again=True)
            else:
                self.ledger.arrivals += 1
                self._come(about, time, again=False)
                self._next_arrival()

    def _expect_end(self, name: str, time: int) -> None:
        """A guest's life is over by the books; one that is moving holds its room until its host says so."""
        placed = self.guests.get(name)
        if placed and placed.end == time and not placed.sent:
            self._release(placed)
            placed.gone = True

    def _fail(self, failure: tuple[int, bool], time: int) -> None:
        host, at_random = failure
        rules = self.rules.failures
        assert rules and self.breakdowns
        repaired = time + rules.repair
        if self.power.state[host] == ON:
            self.power.fail(host, repaired)
            self.open[host] = False
            self.failed_at[host] = time
            self.rooms.emptied(host)
            self.ledger.fail(time, host)
            self.orders.append(Fail(host, time))
        if at_random:
            self._later(self.breakdowns.following(host, repaired), _FAILURE, (host, True))

    def _account(self, now: int, until: int, powered: Flags) -> None:
        """Note what guests ask for and hosts draw in the epoch; a host that fails in it draws to its end."""
        asked = self.demand.of_hosts(self.demand.of_guests(now), len(self.hosts))
        watts = self.power.watts(asked + self.overhead, powered)
        self.power.spend(watts, powered, until - now)
        self.ledger.epoch(now, until, int(powered.sum()), self.power.cores, asked, self.overhead, watts)

    def finish(self) -> Tables:
        """What became of the fleet, once hosts have answered for the last epoch: its tables and metrics."""
        self._digest(self.duration)
        return self.ledger.tables(self.power, self.reports, self.duration)


def _when_ended(ended: Ended) -> tuple[int, str]:
    return ended.time, str(ended.row["guest"])
