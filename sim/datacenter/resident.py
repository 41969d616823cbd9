"""A host of a datacenter: its guests come and go as it is told, and it can be stored and goes on as if it had not."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import numpy as np

from sim.columns import PAGE_BYTES
from sim.cost.translation import TOTALS
from sim.datacenter.messages import NEVER, Ended, Fail, Luggage, Moved, Newcomer, Order, Receive, Send, Start, Stop
from sim.datacenter.migration import Migration, precopy
from sim.host import Guest, Host, Machine, Rows
from sim.memory.catalogue import Catalogue
from sim.memory.guest import Activity, Vm
from sim.memory.image import OWN, UNTOUCHED, Captured, ContentSpace, Domain
from sim.memory.pages import BLOCK, Int32, Int64, UInt8
from sim.scale import has_huge_pages, samples_of, shrunk_vm
from sim.units import HOUR, SECOND

if TYPE_CHECKING:
    import simpy

_KEPT: Final = (
    "pages_written", "expected_writes", "worked", "planned", "original", "free_pages", "freed", "reports_at",
    "reported", "fork_ns",
)  # fmt: skip
"""What a guest takes along, besides its memory."""


_NO_AVERAGES: Final = (0,) * 6
_NO_WALKS: Final = dict.fromkeys(TOTALS, 0)


class Member:
    """A kind of guest that may come, for the catalogue: as large as any of them."""

    def __init__(self, vm: Vm, domain: Domain) -> None:
        """Of such a guest, in that domain."""
        self.vm = vm
        self.domain = domain
        self.start = 0


class Kinds:
    """What all hosts know of the guests that may come: their kinds, and their contents by number."""

    def __init__(self, hosts: Sequence[Host], vms: Sequence[Vm], *, seed: int, duration: int, scale: int = 1) -> None:
        """Guests of these kinds, as large as the largest host at most, each of whose pages stands for *scale* pages.

        Hosts must keep the same guests apart: contents have one number on all of them.
        """
        self._scale = scale
        self._hosts = hosts
        self._real = {vm.name: vm for vm in vms}
        self._samples = samples_of(vms, scale)
        self._sized: dict[tuple[str, int], Vm] = {}
        largest = max(host.memory for host in hosts) // PAGE_BYTES * PAGE_BYTES
        self.catalogue: Final = Catalogue(seed, duration, hosts[0].version)
        members = []
        for name, vm in sorted(self._real.items()):
            domain = self.catalogue.space.domain(hosts[0].domain_of(vm, vm.name))
            # Guests of a kind may be of any size; most are of their kind's.
            sizes = {max(largest, vm.memory), vm.memory}
            members += [Member(self._shrunk(name, memory), domain) for memory in sorted(sizes, reverse=True)]
        self.catalogue.register(members)
        self.vms: Final = {name: self._shrunk(name, vm.memory) for name, vm in self._real.items()}
        self.common: Final = self.catalogue.space.count
        """Contents from this number on are a guest's own."""
        self.own: Final = self.catalogue.contents - self.common
        """Most contents of one guest's own that stand several times in it."""

    def _shrunk(self, kind: str, memory: int) -> Vm:
        """A kind of guest with so much memory, in pages that stand for several."""
        if (kind, memory) not in self._sized:
            vm = self._real[kind].model_copy(update={"memory": memory})
            huge = any(has_huge_pages(host, vm) for host in self._hosts)
            self._sized[kind, memory] = shrunk_vm(vm, self._scale, self._samples, huge)
        return self._sized[kind, memory]

    def vm_of(self, newcomer: Newcomer) -> Vm:
        """The kind of a guest with what is different in this one."""
        vm = self._shrunk(newcomer.kind, newcomer.memory or self._real[newcomer.kind].memory)
        changes: dict[str, Any] = {}
        if newcomer.vcpus is not None:
            changes["vcpus"] = newcomer.vcpus
        if newcomer.levels:
            # Not from a file: the duration is in ns already.
            changes["activity"] = Activity.model_construct(every=newcomer.every, levels=newcomer.levels, repeat=False)
        return vm.model_copy(update=changes) if changes else vm

    def fingerprints(self) -> dict[str, UInt8]:
        """The contents that guests of each kind start with and others may have too, a bit for each."""
        found = {}
        for name, vm in self.vms.items():
            domain = copy(self.catalogue.space.domain(self._hosts[0].domain_of(self._real[name], name)))
            domain.space = ContentSpace()
            domain.space.count = self.common
            image = vm.content
            if isinstance(image, Captured):
                contents = domain.captured(image.data_set_name, self.catalogue.captures[image.path].first)
            else:
                contents = image.contents(vm.memory, self.catalogue.places_of(vm), domain)
            found[name] = self.bits(contents)
        return found

    def bits(self, contents: Int32) -> UInt8:
        """Which contents that several guests may have are among these, a bit for each (`numpy.packbits`)."""
        bits = np.zeros(self.common, np.bool_)
        bits[contents[(contents >= 0) & (contents < self.common)]] = True
        return np.packbits(bits)


class Report(NamedTuple):
    """What a host has counted."""

    log: Int64
    """A row of its scanner's log."""
    others: tuple[int, ...]
    """See `Rows.others`."""
    walks: Mapping[str, int]
    """What walks through page tables cost (TOTALS)."""


class Resident(Machine):
    """One host; times are host times in ns."""

    STEP = HOUR

    def __init__(
        self, host: Host, name: str, number: int, kinds: Kinds, *, seed: int, duration: int, guests: int,
        migration: Migration, scale: int = 1,
    ) -> None:  # fmt: skip
        """Host *number* of the run; there is room for so many *guests*, and more is made when they are more."""
        self._slots = guests
        self._kinds = kinds
        super().__init__(
            host, name, (), seed=seed, duration=duration, sample_every=duration, catalogue=kinds.catalogue
        )  # fmt: skip
        self.number = number
        self.now = 0
        self._waited = -1
        """Time (ns) up to which memory has gone on."""
        self.ended: list[Ended] = []
        self.moved: list[tuple[int, Moved]] = []
        self._migration = migration
        self._scale = scale
        self._vacant = list(range(guests))
        self._left: list[int] = []
        """Numbers of guests that ended, of which the scanner may still know."""
        self._newcomers: dict[str, Newcomer] = {}
        self._leaving: dict[str, tuple[int, Moved]] = {}
        """Guests that move away, and when they may go."""
        self._varying: dict[int, list[tuple[Guest, int]]] = {}
        """Guests whose activity changes at a moment, with the number of the level."""
        self._at_rest: Report | None = None
        """What the host reports for as long as nothing happens here."""
        self._with_leavers: Report | None = None
        """What it counted right before guests left at the end of the epoch."""
        self._looks = any(vm.load for vm in self.catalogue.kinds)
        self._is_passive = self._has_no_daemon()
        self._begin()
        self._work(0)

    def _room(self) -> tuple[int, int, int]:
        pages = -(-self.host.memory // PAGE_BYTES // BLOCK) * BLOCK
        return self._slots, pages, self._contents(self._slots)

    def _contents(self, guests: int) -> int:
        return self._kinds.common + guests * self._kinds.own

    # --- orders ---------------------------------------------------------------------------------------------------

    def follow(self, until: int, orders: Sequence[Order]) -> None:
        """Do as told, each at its time, and go on to *until*."""
        self._with_leavers = None
        if not orders and self.rests():
            self.now = until
            return
        self._at_rest = None
        for order in orders:
            self._go_to(order.time)
            self._do(order)
        self._go_to(until)
        self.now = until
        leavers = [name for name, (ready, _) in self._leaving.items() if ready <= until]
        self._with_leavers = self._counted() if leavers else None
        for name in leavers:
            self._hand_over(name)

    def _do(self, order: Order) -> None:
        match order:
            case Start():
                self._begin_life(order.guest, order.time)
            case Stop():
                self._stop(order.guest, "stopped", order.time)
            case Send():
                self._send(order)
            case Receive():
                self._receive(order.luggage, order.time)
            case Fail():
                for guest in [each for each in self.guests if each.running]:
                    self._stop(guest.name, "host-failed", order.time)

    def _go_to(self, time: int) -> None:
        """Let everything happen that happens up to *time*."""
        env = self.env
        if env.now < time:
            env.timeout(time - env.now)  # so that it is that time when nothing else happens then
        while env.peek() <= time:
            self._wait(int(env.peek()))
            env.step()

    def _wait(self, until: int) -> None:
        """See `Machine`; what happens at one moment finds memory as the first of it did."""
        if until > self._waited:
            super()._wait(until)
            self._waited = until

    def hands_over(self, until: int) -> bool:
        """Whether a guest may leave by then."""
        return any(ready <= until for ready, _ in self._leaving.values())

    def rests(self) -> bool:
        """Whether nothing happens here before a guest comes: there is none, and no daemon that works without."""
        return self._is_passive and not self.running and all(self.scanner.is_free(each) for each in self._left)

    def _has_no_daemon(self) -> bool:
        works = self.host.mechanisms.keys() - {"ksm"} or self.tuner or self.ballooning
        return not (works or (self.host.ksm and self.host.ksm.changes))

    def report(self) -> Report:
        """Every counter as it is now."""
        if self._at_rest is None:
            report = self._counted()
            if not self.rests():
                return report
            self._at_rest = report
        return self._at_rest

    def sample(self) -> Report:
        """The same for the table of samples: a guest that leaves at this moment is here until its new host has it."""
        return self._with_leavers or self.report()

    @property
    def was_left(self) -> bool:
        """Whether guests have left at this moment."""
        return self._with_leavers is not None

    def _counted(self) -> Report:
        return Report(self.scanner.snapshot(self.now).copy(), self._others(), self._walked())

    def _others(self) -> tuple[int, ...]:
        """See `Machine`; averages over the last seconds say nothing in a report."""
        source_ns = sum(source.cpu_ns for source in self.scanner.sources)
        return self.promised, self.running, self.oom_kills, self.khugepaged_ns, source_ns, *_NO_AVERAGES

    def _walked(self) -> Mapping[str, int]:
        if not self._looks:
            return _NO_WALKS
        self._look_at_guests()
        walks = self.walks.columns(np.array([self.now]))
        self.walks.forget()
        return {name: int(values[0]) for name, values in walks.items()}

    def fingerprint(self) -> UInt8:
        """The contents that guests here hold and others may have too, a bit for each."""
        found = [self.scanner.read(each.index) for each in self.guests if each.running]
        return self._kinds.bits(np.concatenate(found) if found else np.empty(0, np.int32))

    # --- storing --------------------------------------------------------------------------------------------------

    def renew(self) -> None:
        """Go on with new processes from here, as a host does that was stored and came back.

        Every host does that at the same times in every run, for the order of what happens at one moment depends on it.
        """
        self._go_to(self.now)  # a host at rest may be behind
        self._begin_anew()

    def _begin_anew(self) -> None:
        import simpy

        self.env = simpy.Environment(initial_time=self.now)
        self._varying = {}
        self._work(self.now)
        for guest in self.guests:
            guest.frees = None
            if guest.running:
                self._go_on(guest, self.now)

    def __getstate__(self) -> dict[str, object]:
        """All but what can be made anew; only right after `renew`."""
        return {key: value for key, value in self.__dict__.items() if key not in ("env", "catalogue", "_kinds")}

    def attach(self, kinds: Kinds) -> None:
        """Go on after having been stored."""
        self._kinds, self.catalogue = kinds, kinds.catalogue
        self._begin_anew()

    # --- time -----------------------------------------------------------------------------------------------------

    def _record(self, rows: Rows, log: Int64) -> None:
        """Keep no rows: a report has what is asked of a host here."""

    def _go_on(self, guest: Guest, done: int) -> None:
        """See `Machine`; the guest ends when its time has come."""
        super()._go_on(guest, done)
        if guest.stop < self.duration:
            self.env.process(self._expire(guest))

    def _begin_to_vary(self, guest: Guest, activity: Activity, done: int) -> None:
        """See `Machine`; guests whose levels change at the same moment wait for it together."""
        step = max(done - guest.start, 0) // activity.every + 1
        if not activity.repeat and step >= len(activity.levels):
            return
        moment = guest.start + step * activity.every
        if moment not in self._varying:
            self._varying[moment] = []
            due = self.env.timeout(moment - self.env.now)
            due.callbacks.append(self._change_levels)
        self._varying[moment].append((guest, step))

    def _change_levels(self, _: simpy.Event) -> None:
        now = int(self.env.now)
        for guest, step in self._varying.pop(now):
            activity = guest.vm.activity
            if guest.running and activity is not None:
                self._change_level(guest, step, now)
                self._begin_to_vary(guest, activity, now)

    # --- guests ---------------------------------------------------------------------------------------------------

    def _place(self, newcomer: Newcomer, start: int, stop: int) -> Guest:
        """A number and a name for a guest that comes."""
        vm = self._kinds.vm_of(newcomer)
        index = self._take_slot()
        node = (vm.numa_node if vm.numa_node is not None else index) % self.host.numa_nodes
        domain = copy(self.catalogue.space.domain(self.host.domain_of(vm, newcomer.name)))
        domain.space = ContentSpace()
        domain.space.count = self._kinds.common + index * self._kinds.own
        guest = Guest(newcomer.name, vm, index, 0, start, stop, node, domain)
        while len(self.guests) <= index:
            self.guests.append(guest)
        self.guests[index] = guest
        self._newcomers[newcomer.name] = newcomer
        return guest

    def _take_slot(self) -> int:
        known = [each for each in self._left if not self.scanner.is_free(each)]
        for each in set(self._left) - set(known):
            heapq.heappush(self._vacant, each)
        self._left = known
        if not self._vacant:
            self._vacant = list(range(self._slots, 2 * self._slots))
            self._slots *= 2
            self.scanner.more_guests(self._slots, self._contents(self._slots))
            self.walks.more_guests(self._slots)
        return heapq.heappop(self._vacant)

    def _begin_life(self, newcomer: Newcomer, now: int) -> None:
        guest = self._place(newcomer, now, min(now + newcomer.lifetime, NEVER))
        if self._start(guest):
            self._go_on(guest, -1)
        elif not guest.started:
            self._end(guest, "not-started", now)

    def _stop(self, name: str, end: str, now: int) -> None:
        guest = self._find(name)
        if guest is not None:
            self._finish(guest, now)
            self._leave(guest, end, now)

    def _find(self, name: str) -> Guest | None:
        return next((each for each in self.guests if each.name == name and each.running), None)

    def _leave(self, guest: Guest, end: str, now: int) -> None:
        super()._leave(guest, end, now)
        self._end(guest, end, now)

    def _end(self, guest: Guest, end: str, now: int) -> None:
        guest.ended, guest.end = now, end
        if end != "moved":
            self.ended.append(Ended(self.number, now, self._row_of(guest)))
        if self._looks:
            self.walks.retire(guest.index)
        self._left.append(guest.index)
        self._leaving.pop(guest.name, None)
        del self._newcomers[guest.name]

    def rows(self) -> list[Ended]:
        """Rows of the guests that run at the end."""
        running = [each for each in self.guests if each.running]
        for guest in running:
            self._finish(guest, self.now)
        return [Ended(self.number, self.now, self._row_of(each)) for each in running]

    # --- moving ---------------------------------------------------------------------------------------------------

    def _send(self, order: Send) -> None:
        """Begin to send a guest's memory; what it will write meanwhile is known from its rates and bursts."""
        guest = self._find(order.guest)
        if guest is None:
            return
        held = int(np.count_nonzero(self.scanner.backed(guest.index)))
        course = precopy(
            held * self._scale, lambda begin, end: self._written(guest, order.time + begin, order.time + end),
            order.bytes_per_s, self._migration.downtime_limit, self._migration.max_rounds,
        )  # fmt: skip
        nobody = Luggage(self._newcomers[guest.name], guest.start, np.empty(0, np.int32))
        moved = Moved(guest.name, nobody, course.rounds, course.sent_pages, course.downtime_ns, course.duration_ns)
        self._leaving[guest.name] = order.time + course.duration_ns, moved

    def _written(self, guest: Guest, begin: int, end: int) -> int:
        """Different pages that a guest is expected to write between two times."""
        seconds = guest.level * (end - begin) / SECOND
        written = 0.0
        for kind, pages in self.catalogue.groups_of(guest.vm):
            written -= len(pages) * np.expm1(-kind.writes * seconds)
        for burst in guest.vm.bursts:
            first = guest.start + burst.at
            turns = (end - first) // burst.every - (begin - first) // burst.every if burst.every else begin < first
            if turns and end > first and burst.leaves != "free":
                written += burst.share * len(guest.places[burst.part])
        return round(written * self._scale)

    def _hand_over(self, name: str) -> None:
        """A guest leaves: nothing of it stays."""
        _, moved = self._leaving.pop(name)
        guest = self._find(name)
        assert guest is not None  # one that ends is forgotten (`_end`)
        self.scanner.settle(guest.index, self.now)
        contents = self.scanner.read(guest.index)
        contents[(contents < 0) & (contents != UNTOUCHED)] = OWN
        own = self._kinds.common + guest.index * self._kinds.own
        self._finish(guest, self.now)
        state = {
            "own": own,
            "lived": self.scanner.lived(guest.index, self.now),
            **{field: getattr(guest, field) for field in _KEPT},
        }
        luggage = Luggage(self._newcomers[name], guest.start, contents, state)
        self._leave(guest, "moved", self.now)
        self.moved.append((self.number, Moved(
            name, luggage, moved.rounds, moved.sent_pages, moved.downtime_ns, moved.duration_ns
        )))  # fmt: skip

    def _receive(self, luggage: Luggage, now: int) -> None:
        """Let a guest go on that left another host."""
        newcomer = luggage.newcomer
        guest = self._place(newcomer, luggage.since, min(luggage.since + newcomer.lifetime, NEVER))
        own = self._kinds.common + guest.index * self._kinds.own
        state = luggage.state
        for field in _KEPT:
            setattr(guest, field, state[field])
        before = int(str(state["own"]))
        contents = _renumbered(luggage.contents, before, self._kinds, own)
        if guest.original is not None:
            guest.original = _renumbered(guest.original, before, self._kinds, own)
        if refusal := self._refusal(guest.vm):
            self._note(guest, "not-started", f"mmap gets ENOMEM: {refusal}")
            self._end(guest, "not-started", now)
            return
        self._enter(guest, now)
        self.scanner.relive(guest.index, cast("Mapping[str, int]", state["lived"]))
        expected = guest.expected_writes
        _, accesses = self._image_of(guest)
        guest.expected_writes = expected
        if self._furnish(guest, contents, accesses, now):
            self._go_on(guest, now)


def _renumbered(contents: Int32, before: int, kinds: Kinds, now: int) -> Int32:
    """Contents with those of the guest's own as its new host numbers them."""
    own = (contents >= before) & (contents < before + kinds.own) & (contents >= kinds.common)
    return np.where(own, contents - before + now, contents).astype(np.int32)
