"""A scenario on the real kernel: guests, writes and settings become a workload, the kernel's counters its result."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import numpy as np
import numpy.typing as npt

from sim.errors import UserError
from sim.host import Machine
from sim.lab.guest import Keys, Pattern, mix
from sim.lab.record import Action, Guest, Madvise, Rate, Setting, Workload, Write, record
from sim.memory.huge import Thp
from sim.memory.pages import NEVER, RATE, SPAN, Int32, Int64, UInt8
from sim.sharing.ksm import Ksm
from sim.sharing.scanner import Scanner
from sim.units import SECOND

if TYPE_CHECKING:
    import pandas as pd

    from sim.scenario import Scenario

Observer = TypeVar("Observer", bound=Scanner)

_OWN: Final = 1 << 63
"""First number of contents that equal no other; numbered contents lie below 2^32, those of random writes between."""
_NOT_KNOBS: Final = ("changes", "max_kernel_pages")


@dataclass(frozen=True)
class Replay:
    """What the kernel did with a scenario. `samples` and `scans` have the columns of `sim.columns` the kernel tells.

    `scans` also has `proven`: the row was read whole before ksmd could move on. `deeds` says when guests did
    what was planned.
    """

    scenario: Scenario
    samples: pd.DataFrame
    scans: pd.DataFrame
    deeds: pd.DataFrame
    manifest: Mapping[str, Any]


def replay(scenario: Scenario, pattern: Pattern = "random") -> Replay:
    """Run a scenario of one host under this machine's KSM, in real time; see `render` for *pattern*.

    Raises UserError for what the lab cannot replay, MachineError where this machine cannot do it.
    """
    recording = record(workload(scenario, pattern))
    manifest = {"engine": f"Linux {platform.release()}", "seed": scenario.seed, "pattern": pattern}
    samples, scans = (_with_host(scenario, frame) for frame in (recording.samples, recording.scans))
    return Replay(scenario, samples, scans, recording.deeds, manifest)


def workload(scenario: Scenario, pattern: Pattern = "random") -> Workload:
    """What the lab does to replay a scenario. Raises UserError for what it cannot replay."""
    _check(scenario)
    host, host_name = scenario.host_names()[0]
    names = [assignment.name for assignment in scenario.assignments()[host_name]]
    tape = observe(scenario, _Tape)
    return Workload(
        guests=[tape.lives[index].guest(names) for index in sorted(tape.lives)],
        ksm=_knobs(host.ksm),
        duration_ns=scenario.duration,
        actions=[*tape.actions(names)],
        sample_every_ns=scenario.sample_every,
        pattern=pattern,
        thp=_thp_knobs(host.thp),
    )


def _thp_knobs(thp: Thp) -> dict[str, int | str]:
    """Settings of huge pages; guests ask for them one by one, so that other processes get none."""
    return {} if thp.enabled == "never" else {"enabled": "madvise", **thp.khugepaged.model_dump()}


def observe(scenario: Scenario, observer: type[Observer]) -> Observer:
    """Simulate the first host of a scenario with an observer as its scanner; return the observer."""
    host, name = scenario.host_names()[0]
    machine = Machine(
        host,
        name,
        scenario.assignments()[name],
        seed=scenario.seed,
        duration=scenario.duration,
        sample_every=scenario.sample_every,
        make_scanner=observer,
    )
    scanner = machine.scanner
    machine.run()
    return cast(Observer, scanner)


def _check(scenario: Scenario) -> None:
    if len(scenario.host_names()) != 1:
        raise UserError(f"{scenario.name}: the lab replays one host; keep one entry of hosts, with count 1")
    if any(vm.activity for vm in scenario.vms):
        raise UserError(f"{scenario.name}: the lab's guests write at constant rates; remove activity")


def _knobs(ksm: Ksm) -> dict[str, int | str]:
    """Settings that the kernel is given: those that the scenario sets, and none that the advisor takes over."""
    values = {name: value for name, value in ksm.model_dump().items() if name not in _NOT_KNOBS and value is not None}
    if ksm.advisor_mode != "none":
        del values["pages_to_scan"]
    return values


def _with_host(scenario: Scenario, frame: pd.DataFrame) -> pd.DataFrame:
    frame.insert(1, "host", scenario.host_names()[0][1])
    return frame


@dataclass
class _Life:
    """What happens to one guest."""

    index: int
    start: int
    stop: int | None = None
    mergeable: bool = False
    parent: int | None = None
    keys: Keys = field(default_factory=lambda: np.empty(0, np.uint64))
    present: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    writers: UInt8 = field(default_factory=lambda: np.empty(0, np.uint8))
    huge_pages: bool = False

    def guest(self, names: list[str]) -> Guest:
        """The guest as the lab starts it."""
        parent = None if self.parent is None else names[self.parent]
        name, huge = names[self.index], self.huge_pages
        return Guest(name, self.keys, self.present, self.start, self.stop, self.mergeable, parent, huge)


class _Tape(Scanner):
    """A scanner that notes what is done to its guests and its settings, and when."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.lives: dict[int, _Life] = {}
        self._now = 0
        self._serial = 0
        self._noted_writes: list[tuple[int, int, Int64, Keys]] = []
        self._noted_advice: list[tuple[int, int, int, int, bool]] = []
        self._noted_settings: list[Setting] = []

    def actions(self, names: list[str]) -> Iterator[Action]:
        """What happens after the guests' starts."""
        for time, guest, pages, keys in self._noted_writes:
            yield Write(time, names[guest], pages, keys)
        for time, guest, first, count, mergeable in self._noted_advice:
            yield Madvise(time, names[guest], first, count, "MERGEABLE" if mergeable else "UNMERGEABLE")
        yield from self._noted_settings
        classes = ((life, kind) for life in self.lives.values() for kind in np.unique(life.writers) if kind)
        for seed, (life, kind) in enumerate(classes, start=1):
            if self.m.writes[kind, SPAN]:
                raise UserError("the lab's guests write unique contents at random; remove `leaves` from writes")
            rate = float(self.m.writes[kind, RATE]) * SECOND
            yield Rate(names[life.index], np.flatnonzero(life.writers == kind), rate, seed)

    def advance(self, horizon: int) -> Iterator[Int64]:
        """What is done next is done at *horizon*."""
        self._now = horizon
        return super().advance(horizon)

    def add(self, guest: int, pages: int, **named: Any) -> None:
        """A guest starts."""
        self.lives[guest] = _Life(guest, self._now, huge_pages=named["thp"])
        super().add(guest, pages, **named)

    def set_writers(self, guest: int, writers: UInt8) -> None:
        """Pages get random writes."""
        self.lives[guest].writers = writers
        super().set_writers(guest, writers)

    def fill(self, guest: int, contents: Int32) -> None:
        """A guest has its first contents."""
        life = self.lives[guest]
        life.keys, life.present = self._keys(contents), contents != NEVER
        super().fill(guest, contents)

    def fork(self, parent: int, child: int, next_content: int, now: int) -> int:
        """A guest is a copy of another."""
        life = self.lives[child]
        life.parent, life.mergeable, life.writers = parent, True, self.lives[parent].writers
        return super().fork(parent, child, next_content, now)

    def write(self, guest: int, pages: Int64, contents: Int32) -> None:
        """A guest writes."""
        self._noted_writes.append((self._now, guest, pages, self._keys(contents)))
        super().write(guest, pages, contents)

    def advise(self, guest: int, first: int, pages: int, mergeable: bool, now: int) -> bool:
        """A guest offers memory to KSM or takes it back; the offer before it has any contents is its start."""
        life = self.lives[guest]
        if len(life.keys):
            self._noted_advice.append((now, guest, first, pages, mergeable))
        else:
            life.mergeable = mergeable
        return super().advise(guest, first, pages, mergeable, now)

    def remove(self, guest: int) -> None:
        """A guest ends."""
        self.lives[guest].stop = self._now
        super().remove(guest)

    def set_knob(self, name: str, value: int | str, now: int) -> str:
        """A setting is written; ksmd's start at time 0 is the run's own."""
        if now:
            self._noted_settings.append(Setting(now, name, value))
        return super().set_knob(name, value, now)

    def _keys(self, contents: Int32) -> Keys:
        numbers = contents.astype(np.int64).astype(np.uint64)
        own = np.flatnonzero(contents < 0)
        numbers[own] = np.uint64(_OWN + self._serial) + np.arange(len(own), dtype=np.uint64)
        self._serial += len(own)
        return mix(numbers)
