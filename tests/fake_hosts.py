"""Hosts that do nothing but arithmetic, for tests of the workers that hold them; they can die where a test says so."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sim.datacenter.checkpoint import pack, unpack
from sim.datacenter.crew import Crew, split
from sim.errors import MachineError, UserError
from sim.streams import generator

Int64 = npt.NDArray[np.int64]
HOSTS = 7
EPOCHS = 9


@dataclass(frozen=True)
class Part:
    """Which hosts a shard has, and files whose presence makes it die: the one who dies takes the file away."""

    hosts: Sequence[int]
    deaths: Mapping[str, Path] = field(default_factory=dict)
    work: int = 100
    """Numbers that each host draws and sorts in an epoch."""


@dataclass(frozen=True)
class Told:
    """What the hosts of a shard shall add to what they have."""

    epoch: int
    gifts: Mapping[int, int]


@dataclass(frozen=True)
class Heard:
    """What the hosts of a shard have."""

    hosts: Sequence[int]
    values: Int64


class Hosts:
    """A shard: each host has a random stream and a number of its own."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._streams = {host: generator(1, "host", host) for host in part.hosts}
        self._values = dict.fromkeys(part.hosts, 0)
        self._die("begin")

    @classmethod
    def restore(cls, part: Part, saved: bytes) -> Hosts:
        made = cls(part)
        made._streams, made._values = unpack(saved)
        made._die("restore")
        return made

    def save(self) -> bytes:
        self._die("save")
        return pack((self._streams, self._values))

    def advance(self, told: Told) -> Heard:
        self._die(f"before {told.epoch}")
        for host in self._part.hosts:
            drawn = np.sort(self._streams[host].integers(0, 1 << 40, self._part.work))
            self._values[host] = (self._values[host] * 31 + int(drawn[len(drawn) // 2]) + told.gifts[host]) % (1 << 61)
        self._die(f"after {told.epoch}")
        return Heard(self._part.hosts, np.array([self._values[host] for host in self._part.hosts]))

    def finish(self) -> Mapping[int, int]:
        self._die("finish")
        return self._values

    def _die(self, moment: str) -> None:
        for file in (self._part.deaths.get(moment), self._part.deaths.get(f"always {moment}")):
            if file and file.exists():
                if moment in self._part.deaths:
                    file.unlink()
                os.kill(os.getpid(), signal.SIGKILL)


class Wrong(Hosts):
    """A shard with mistakes, each in the epoch of its number."""

    def advance(self, told: Told) -> Heard:
        match told.epoch:
            case 1:
                raise UserError("a mistake of the user's")
            case 2:
                raise MachineError("too small a machine")
            case 3:
                raise ZeroDivisionError("a mistake of the program's")
            case 4:
                return lambda: None  # type: ignore[return-value] # it cannot be sent
        return super().advance(told)


class Forgetful(Hosts):
    """A shard that answers differently in every process."""

    def advance(self, told: Told) -> Heard:
        heard = super().advance(told)
        return Heard(heard.hosts, heard.values + os.getpid())


class Slow(Hosts):
    """A shard that takes longer than any test."""

    def advance(self, told: Told) -> Heard:
        Path(f"busy-{self._part.hosts[0]}").touch()
        time.sleep(600)
        return super().advance(told)


def gifts(values: Mapping[int, int]) -> Mapping[int, int]:
    """What each host gets next: it depends on all others, so that no mistake stays where it was made."""
    total = sum(values.values())
    return {host: (total * (host + 1) ^ value) % 1009 for host, value in values.items()}


def conversation(
    crew: Crew[Part, Told, Heard, Mapping[int, int]], parts: Sequence[Part]
) -> Iterator[Mapping[int, int]]:
    """Yield what each host has at the end of every epoch, and last what the tables say."""
    crew.begin(parts)
    values = dict.fromkeys(range(HOSTS), 0)
    for epoch in range(EPOCHS):
        given = gifts(values)
        heard = crew.advance([Told(epoch, {host: given[host] for host in part.hosts}) for part in parts])
        values = {host: int(each) for one in heard for host, each in zip(one.hosts, one.values, strict=True)}
        yield values
    yield {host: value for table in crew.finish() for host, value in table.items()}


def parts_for(workers: int, **deaths: Mapping[str, Path]) -> list[Part]:
    """The hosts in so many parts; `dieN` says where part N dies."""
    parts = split([100] * HOSTS, workers)
    return [Part(part, deaths.get(f"die{number}", {})) for number, part in enumerate(parts)]
