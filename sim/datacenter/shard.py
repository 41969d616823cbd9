"""A group of hosts in one process: it follows orders, and answers with reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from platform import node
from typing import Any, Final

import numpy as np

from sim.datacenter.checkpoint import pack, unpack
from sim.datacenter.crew import WINDOW
from sim.datacenter.messages import REPORT, SUMMED, Answer, Ended, Int64, Order, Orders, UInt8
from sim.datacenter.migration import Migration
from sim.datacenter.resident import Kinds, Report, Resident
from sim.errors import At, UserError
from sim.host import Host
from sim.memory.guest import Vm
from sim.memory.image import Captured
from sim.scale import enlarged, enlarged_guest, enlarged_work, shrunk_host

_OVERHEAD: Final = ("ksmd", "source", "cow", "tlb", "kswapd", "reclaim", "swap")
LARGEST: Final = frozenset({
    "run", "pages_to_scan", "sleep_millisecs", "mem_state", "write_private_ns", "write_merged_ns",
    "write_latency_worst_ns",
})  # fmt: skip
"""Columns of which the sum over hosts means nothing: the largest counts."""


@dataclass(frozen=True)
class Spec:
    """What a shard is made of: plain blocks, the same for every shard but for `numbers`."""

    hosts: Sequence[tuple[str, Host]]
    """All hosts of the run by name, in the order of their numbers, as large as they are."""
    numbers: Sequence[int]
    """Those of this shard."""
    vms: Sequence[Vm]
    seed: int
    duration: int
    scale: int
    """How many pages each page here stands for."""
    migration: Migration
    fingerprints: bool
    """Whether reports say what guests hold."""
    files: str
    """Digest of the price sets and captured images that it reads (`digest_of_files`)."""


@dataclass(frozen=True)
class Tables:
    """What is left to tell at the end."""

    guests: Sequence[Ended]
    work: Mapping[str, int] = field(default_factory=dict)


class Shard:
    """Some of the hosts of a run."""

    def __init__(self, spec: Spec) -> None:
        """All of them empty. Raises UserError on a machine that has other files."""
        _check_files(spec)
        self._spec = spec
        self._epochs = 0
        self._residents: dict[int, Resident] = {}
        self._prepare()
        for kind, numbers in self._numbers.items():
            if not self._empty[kind].rests():
                self._residents |= {number: self._resident(number) for number in numbers}

    def _prepare(self) -> None:
        """Make what is the same whenever it is made."""
        self._kinds = kinds_of(self._spec)
        self._hosts = _shrunk_hosts(self._spec)
        self._numbers: dict[str, list[int]] = {}
        for number in self._spec.numbers:
            self._numbers.setdefault(self._spec.hosts[number][1].name, []).append(number)
        self._empty = {kind: self._resident(numbers[0]) for kind, numbers in self._numbers.items()}
        """A host of each kind to which nothing has happened: it reports for all such hosts that only wait for guests,
        which are not made before one comes."""

    def _host(self, number: int) -> Resident:
        """A host, made now if nothing has happened to it before."""
        if number not in self._residents:
            self._residents[number] = self._resident(number)
        return self._residents[number]

    def _resident(self, number: int) -> Resident:
        spec = self._spec
        name, real = spec.hosts[number]
        host = self._hosts[real.name]
        smallest = min(vm.memory for vm in self._kinds.vms.values())
        return Resident(
            host, name, number, self._kinds, seed=spec.seed, duration=spec.duration,
            guests=min(_SLOTS, 2 * host.memory // smallest + 4), migration=spec.migration, scale=spec.scale,
        )  # fmt: skip

    def advance(self, orders: Orders) -> Answer:
        """Follow orders up to the moment that they name."""
        told: dict[int, list[Order]] = {}
        for order in orders.orders:
            told.setdefault(order.host, []).append(order)
        for number in told:
            self._host(number)
        busy = self._residents if orders.report else {each: self._residents[each] for each in self._due(told, orders)}
        for number, resident in busy.items():
            resident.follow(orders.until, told.get(number, ()))
        answer = self._answer(orders.report, busy.values())
        self._epochs += 1
        if self._epochs % WINDOW == 0:
            for resident in self._residents.values():
                resident.renew()
        return answer

    def _due(self, told: Mapping[int, Sequence[Order]], orders: Orders) -> list[int]:
        """Hosts that must go on though nobody reports: those with orders, or with a guest that may leave."""
        return [number for number, each in self._residents.items() if number in told or each.hands_over(orders.until)]

    def _answer(self, report: bool, busy: Iterable[Resident]) -> Answer:
        ended, moved, events = [], [], []
        for resident in busy:
            ended += [self._enlarged(each) for each in resident.ended]
            moved += resident.moved
            events += resident.events
            resident.ended, resident.moved, resident.events = [], [], []
        if not report:
            nothing = np.empty((0, len(REPORT)), np.int64)
            return Answer(np.empty(0, np.int64), nothing, {}, ended, moved, events)
        tables = {kind: self._table(kind, [each.report() for each in self._of_kind(kind)]) for kind in self._numbers}
        numbers = np.concatenate([np.array(each, np.int64) for each in self._numbers.values()])
        rows = np.concatenate([np.stack([table[name] for name in REPORT], axis=1) for table in tables.values()])
        order = np.argsort(numbers)
        sums = {kind: _summed(self._sampled(kind) or table) for kind, table in tables.items()}
        return Answer(numbers[order], rows[order], sums, ended, moved, events, self._fingerprints())

    def _enlarged(self, ended: Ended) -> Ended:
        return replace(ended, row=enlarged_guest(ended.row, self._spec.scale))

    def _of_kind(self, kind: str) -> list[Resident]:
        return [self._residents.get(number, self._empty[kind]) for number in self._numbers[kind]]

    def _sampled(self, kind: str) -> Mapping[str, Int64] | None:
        """What the samples say of hosts of a kind where that is not what they report: guests have left them."""
        residents = self._of_kind(kind)
        if not any(each.was_left for each in residents):
            return None
        return self._table(kind, [each.sample() for each in residents])

    def _table(self, kind: str, reports: Sequence[Report]) -> Mapping[str, Int64]:
        """The columns of the samples table, a row for each of these hosts, which are of one kind."""
        log = np.stack([each.log for each in reports])
        others = np.array([each.others for each in reports], np.int64)
        columns: dict[str, Any] = dict(self._empty[kind]._columns(log, others))
        for name in reports[0].walks:
            columns[name] = np.array([each.walks[name] for each in reports], np.int64)
        columns = enlarged(columns, self._spec.scale)
        columns["overhead_cpu_ns"] = sum(np.asarray(columns[f"{part}_cpu_ns"]) for part in _OVERHEAD)
        return columns

    def _fingerprints(self) -> dict[int, UInt8]:
        if not self._spec.fingerprints:
            return {}
        return {number: each.fingerprint() for number, each in self._residents.items() if each.running}

    def save(self) -> bytes:
        """All that `restore` needs; only after an epoch that ends a window."""
        saved: bytes = pack((self._epochs, self._residents))
        return saved

    @classmethod
    def restore(cls, spec: Spec, saved: bytes) -> Shard:
        """A shard as it was when it was saved. Raises UserError on a machine that has other files."""
        _check_files(spec)
        shard = cls.__new__(cls)
        shard._spec = spec
        shard._prepare()
        shard._epochs, shard._residents = unpack(saved)
        for resident in shard._residents.values():
            resident.attach(shard._kinds)
        return shard

    def finish(self) -> Tables:
        """What is known at the end."""
        rows = [self._enlarged(row) for resident in self._residents.values() for row in resident.rows()]
        work: dict[str, int] = {}
        for resident in [*self._empty.values(), *self._residents.values()]:
            for name, times in resident.scanner.work_done().items():
                work[name] = work.get(name, 0) + times
        return Tables(rows, enlarged_work(work, self._spec.scale))


_SLOTS: Final = 64
"""Guests that a host has room for to begin with, at most."""


def digest_of_files(hosts: Iterable[Host], vms: Iterable[Vm]) -> str:
    """A digest of what these hosts and guests read from files. Raises At or OSError if one cannot be read."""
    told = blake2b(digest_size=8)
    for host in hosts:
        told.update(host.price_set.model_dump_json().encode())
    for vm in vms:
        if isinstance(vm.content, Captured):
            told.update(vm.content.path.read_bytes())
    return told.hexdigest()


def _check_files(spec: Spec) -> None:
    try:
        fault = "" if _digest(spec) == spec.files else "some differ there"
    except (At, OSError) as error:
        fault = str(error)
    if fault:
        raise UserError(f"worker on {node()}: has not the images and prices of this scenario: {fault}")


def _digest(spec: Spec) -> str:
    return digest_of_files({host.name: host for _, host in spec.hosts}.values(), spec.vms)


def kinds_of(spec: Spec) -> Kinds:
    """What all hosts know of the guests that may come: none has more memory than the largest host."""
    hosts = {host.name: host for _, host in spec.hosts}
    return Kinds([*hosts.values()], spec.vms, seed=spec.seed, duration=spec.duration, scale=spec.scale)


def _shrunk_hosts(spec: Spec) -> dict[str, Host]:
    kinds = {host.name: host for _, host in spec.hosts}
    return {name: shrunk_host(host, spec.scale) for name, host in kinds.items()}


def _summed(table: Mapping[str, Int64]) -> Int64:
    """Over hosts, the sum or the largest of each of the columns SUMMED."""
    return np.array([table[name].max() if name in LARGEST else table[name].sum() for name in SUMMED], np.int64)
