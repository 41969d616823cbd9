"""Where guests may go, and which of these hosts each gets: room by promise, report or prediction; ways to choose."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from sim.datacenter.blocks import Admission, Overcommit
from sim.datacenter.messages import Int64, UInt8

Flags = npt.NDArray[np.bool_]

NOWHERE: Final = -1
_ENDLESS: Final = 1 << 62
_ONES: Final = np.array([value.bit_count() for value in range(256)], np.uint8)
"""Bits set in each byte."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a guest asks of a host."""

    kind: int
    memory: int
    """Bytes."""
    vcpus: int


class Rooms:
    """What each host still has for guests, in the books of the control plane."""

    def __init__(self, memory: Int64, cores: Int64, overcommit: Overcommit, admission: Admission) -> None:
        ratio = overcommit.memory if overcommit.memory is not None else _ratio_of(admission)
        self.admission = admission
        self.total = memory
        self.cores = cores
        self.limit = _times(memory, ratio)
        """Bytes that each may promise."""
        self.usable = _times(memory, None if admission.by == "promised" else admission.share)
        """Bytes that each may use, by report or prediction."""
        self.vcpu_limit = _times(cores, overcommit.cpu)
        self.promised = np.zeros(len(memory), np.int64)
        self.promised_vcpus = np.zeros(len(memory), np.int64)
        self.own = np.zeros(len(memory), np.int64)
        """Bytes placed since the last report, and not ended since."""
        self.expected = np.zeros(len(memory), np.int64)
        """Bytes that are used by the last report, or will be by prediction."""
        self.history: deque[Int64] = deque(maxlen=admission.reports)
        self.largest = np.minimum(np.minimum(self.limit, self.usable), self.total)
        """Bytes of the largest guest that an empty host takes."""
        self.memory = self.largest.copy()
        """Bytes of the largest guest that would get in now."""
        self.vcpus = self.vcpu_limit.copy()

    def take(self, host: int, need: Need) -> None:
        """A guest is placed."""
        self.own[host] += need.memory
        self._promise(host, need.memory, need.vcpus)

    def give(self, host: int, need: Need, *, reported: bool) -> None:
        """A guest is gone; *reported*: the last report still counts it."""
        if not reported:
            self.own[host] -= need.memory
        self._promise(host, -need.memory, -need.vcpus)

    def report(self, used: Int64, coming: Int64) -> None:
        """Hosts say how much memory they use; *coming*: what is kept for guests that move there (bytes)."""
        self.own = coming.copy()
        self.expected = used.copy()
        if self.admission.by == "predicted":
            self.history.append(self.expected)
            past = np.array(self.history)
            peak = past.mean(axis=0) + self.admission.sigmas * past.std(axis=0)
            self.expected = np.minimum(peak, _ENDLESS).astype(np.int64)
        free = self.usable - self.expected - (self.own if self.admission.counts_own else 0)
        self.memory = np.minimum(np.minimum(free, self.limit - self.promised), self.total)

    def emptied(self, host: int) -> None:
        """A host lost all that it held: what it last reported is no more."""
        self.expected[host] = 0
        self.own[host] = 0
        for used in self.history:
            used[host] = 0
        self._promise(host, 0, 0)

    def _promise(self, host: int, memory: int, vcpus: int) -> None:
        self.promised[host] += memory
        self.promised_vcpus[host] += vcpus
        self.vcpus[host] -= vcpus
        own = self.own[host] if self.admission.counts_own else 0
        free = self.usable[host] - self.expected[host] - own
        self.memory[host] = min(free, self.limit[host] - self.promised[host], self.total[host])

    def fit(self, need: Need, among: Flags) -> Flags:
        """Which of some hosts have room."""
        fits: Flags = self.memory >= need.memory
        fits &= self.vcpus >= need.vcpus
        fits &= among
        return fits


def _ratio_of(admission: Admission) -> float | None:
    return 1.0 if admission.by == "promised" else None


def _times(amounts: Int64, factor: float | None) -> Int64:
    """Amounts times a factor, rounded down; endless without one."""
    if factor is None:
        return np.full(len(amounts), _ENDLESS)
    return np.array([int(amount * factor) for amount in amounts.tolist()], np.int64)


class Likeness:
    """How many contents of each kind of guest every host holds, by fingerprints."""

    def __init__(self, kinds: Mapping[int, UInt8], hosts: int) -> None:
        """*kinds* has a bit for each content that a kind of guest has when it starts (`numpy.packbits`)."""
        self.kinds = kinds
        self.held: dict[int, UInt8] = {}
        self.common = np.zeros((max(kinds, default=-1) + 1, hosts), np.int64)

    def report(self, host: int, held: UInt8) -> None:
        """A host says which contents it holds."""
        self.held[host] = held
        for kind, wanted in self.kinds.items():
            self.common[kind, host] = int(_ONES[held & wanted].sum())

    def add(self, host: int, kind: int) -> None:
        """A guest was placed: what it brings is held, though no report says so yet."""
        if (brought := self.kinds.get(kind)) is not None:
            self.report(host, self.held[host] | brought if host in self.held else brought)


class Placement:
    """A way to choose among the hosts with room; of hosts that are as good, the first by name."""

    def __init__(self, policy: str, rooms: Rooms, likeness: Likeness, random: np.random.Generator) -> None:
        self.policy = policy
        self.rooms = rooms
        self.likeness = likeness
        self.random = random

    def choose(self, need: Need, among: Flags, policy: str | None = None) -> int:
        """One of some hosts that has room for a guest, or NOWHERE; by another policy than its own if one is given."""
        fits = self.rooms.fit(need, among)
        first = int(fits.argmax())
        return self._best(policy or self.policy, fits, first, need) if fits[first] else NOWHERE

    def _best(self, policy: str, fits: Flags, first: int, need: Need) -> int:
        rooms = self.rooms
        match policy:
            case "first-fit":
                return first
            case "best-fit":
                return int(np.where(fits, rooms.memory, _ENDLESS).argmin())
            case "worst-fit":
                return int(np.where(fits, rooms.memory, -1).argmax())
            case "dot-product":
                memory = (need.memory / rooms.total) * (rooms.memory / rooms.total)
                cpu = (need.vcpus / rooms.cores) * (rooms.vcpus / rooms.cores)
                return int(np.where(fits, memory + cpu, -1.0).argmax())
            case "sharing-aware":
                common = np.where(fits, self.likeness.common[need.kind], -1)
                return int(np.where(common == common.max(), rooms.memory, -1).argmax())
            case "random":
                places = np.flatnonzero(fits)
                return int(places[self.random.integers(len(places))])
        raise ValueError(policy)
