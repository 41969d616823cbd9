"""Recordings of the real kernel: a workload goes in, its counters over time and at every full scan come out."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sim.lab.guest import PAGE_BYTES, Act, Advice, Farewell, GuestProcess, GuestServer, Keys, Pages, Pattern
from sim.lab.machine import VMSTAT, Ksm, exclusive
from sim.lab.swapping import Area, Groups, Swapping, events, groups, swap_area
from sim.lab.templates import templates

if TYPE_CHECKING:
    import pandas as pd

_ITEM_BYTES: Final = 64
_LEAD_NS: Final = 20_000_000
_NAP_S: Final = 200e-6
_LONG_NAP_S: Final = 2e-3
"""The same where guests wait for their memory: watching takes their core from them."""
_GUESTS_PRIORITY: Final = 1
_WATCH_PRIORITY: Final = 2
_NEVER_NS: Final = 1 << 62
_SINCE_START: Final = ("pages_scanned", "pages_skipped", "ksmd_cpu_ns", "stolen_ns", *VMSTAT)


_Row = dict[str, float]


@dataclass(frozen=True, eq=False)
class Guest:
    """One guest's memory: a key per page, which pages exist, and its life in ns after the start of the run.

    A late guest is filled beforehand and enters KSM's list at `start_ns`. A guest with `fork_of` is forked from
    that guest at `start_ns` and has its pages as they are then, so its own `keys` and `present` are empty.
    """

    name: str
    keys: Keys = field(default_factory=lambda: np.empty(0, np.uint64))
    present: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    start_ns: int = 0
    stop_ns: int | None = None
    mergeable: bool = True
    fork_of: str | None = None
    huge_pages: bool = False
    memory_limit: int | None = None


@dataclass(frozen=True, eq=False)
class Write:
    """A guest writes these pages, in this order, at this time."""

    time_ns: int
    guest: str
    pages: Pages
    keys: Keys


@dataclass(frozen=True, eq=False)
class Rate:
    """Each of these pages is rewritten `per_second` times a second at random, as long as the guest runs.

    A write leaves one of `choices`, or, where there are none, a content nobody else has.
    `seed` is below 2**32 and used once in a workload.
    """

    guest: str
    pages: Pages
    per_second: float
    seed: int
    choices: Keys = field(default_factory=lambda: np.empty(0, np.uint64))


@dataclass(frozen=True, eq=False)
class Reads:
    """The pages of each class are read so many times a second each, at random, as long as the guest runs."""

    guest: str
    classes: Sequence[tuple[Pages, float]]
    seed: int


@dataclass(frozen=True)
class Loop:
    """Pages from `first` on are read one after the other, and again and again, each once in `period_ns`."""

    guest: str
    first: int
    count: int
    period_ns: int


@dataclass(frozen=True)
class Level:
    """From now on a guest's rates are scaled by this factor (1 from its start)."""

    time_ns: int
    guest: str
    level: float


@dataclass(frozen=True)
class Madvise:
    """A guest advises the kernel about `count` of its pages from page `first`."""

    time_ns: int
    guest: str
    first: int
    count: int
    advice: Advice


@dataclass(frozen=True)
class Setting:
    """A KSM knob is written during the run."""

    time_ns: int
    knob: str
    value: int | str


Always = Rate | Reads | Loop | Level
"""What has no moment of its own."""
Deed = Write | Madvise | Always
Action = Deed | Setting


@dataclass(frozen=True, eq=False)
class Workload:
    """What a run does: guests, what happens to them, and KSM's settings where they differ from the defaults.

    The run ends after `duration_ns`, or with full scan number `until_scans` if that is earlier. Guests with a
    `memory_limit` need `swapping`.
    """

    guests: Sequence[Guest]
    ksm: Mapping[str, int | str]
    duration_ns: int
    actions: Sequence[Action] = ()
    sample_every_ns: int = 1_000_000_000
    pattern: Pattern = "random"
    until_scans: int | None = None
    thp: Mapping[str, int | str] = field(default_factory=dict)
    swapping: Swapping | None = None

    def __post_init__(self) -> None:
        names = [guest.name for guest in self.guests]
        if len(set(names)) < len(names):
            raise ValueError(f"guest names must differ: {names}")
        actors = [action.guest for action in self.actions if not isinstance(action, Setting)]
        parents = [guest.fork_of for guest in self.guests if guest.fork_of is not None]
        if unknown := {*actors, *parents} - {*names}:
            raise ValueError(f"no guest is named {sorted(unknown)}")
        seeds = [action.seed for action in self.actions if isinstance(action, Rate)]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"two rates with one seed would write equal contents: {seeds}")

    def memory_bytes(self) -> int:
        """The most memory the guests can touch, with KSM's item for each page."""
        pages = {guest.name: len(guest.keys) for guest in self.guests}
        for guest in self.guests:
            if guest.fork_of is not None:
                pages[guest.name] = pages[guest.fork_of]
        return sum(pages.values()) * (PAGE_BYTES + _ITEM_BYTES)


@dataclass(frozen=True)
class Disturbance:
    """What other work on the machine did to a run."""

    migrated_pages: int
    """Pages that the kernel moved: ksmd overlooks a page on its move, and forgets its item."""
    ksmd_waited_ns: int
    """Time for which ksmd was ready to run and had no core."""
    deeds_late_ns: int
    """How late the guests were, at the worst, for the first thing they had to do at one moment."""


@dataclass(frozen=True, eq=False)
class Recording:
    """What the kernel did.

    `samples` has the counters every `sample_every_ns`, `scans` at the end of every full scan. `proven` marks a
    scan whose row was read whole before ksmd could move again; a number left out of `full_scans` is a missed scan.
    `stolen_ns` is time for which the hypervisor took ksmd's core away: scans end later, `ksmd_cpu_ns` is not larger.
    `visited` has `pages_scanned` at each planned moment (`moments_ns`): where ksmd was when something happened.
    `deeds` tells when guests did what was planned, `farewells` how each guest ended that was born, by its name.
    Counters start at 0 at the start of the run.
    """

    samples: pd.DataFrame
    scans: pd.DataFrame
    deeds: pd.DataFrame
    farewells: Mapping[str, Farewell]
    visited: Sequence[int]
    disturbance: Disturbance


def moments_ns(workload: Workload) -> list[int]:
    """When something is planned to happen that one scan sees and the scan before does not, in order."""
    times = [action.time_ns for action in workload.actions if not isinstance(action, Always)]
    times += [moment for guest in workload.guests for moment in (guest.start_ns, guest.stop_ns) if moment]
    return sorted(times)


def record(workload: Workload, progress: Callable[[int], None] | None = None) -> Recording:
    """Run the workload under this machine's KSM; *progress* is told the time in ns at every sample.

    Raises MachineError where the machine cannot do it.
    """
    import pandas as pd

    with (
        exclusive(workload.memory_bytes()) as ksm,
        _apart(ksm),
        _short_memory(workload, ksm.token) as short,
        contextlib.closing(GuestServer(ksm.token, _templates(workload))) as server,
    ):
        ksm.reset(**{name: value for name, value in workload.ksm.items() if name != "run"})
        if workload.thp:
            ksm.set_thp(**workload.thp)
        crew = _Crew(workload, server, short)
        start_ns = time.monotonic_ns() + _LEAD_NS
        crew.begin(start_ns)
        watch = _Watch(ksm, workload, short, progress)
        before = ksm.interference()
        watch.run(start_ns)
        migrated, waited = (now - then for now, then in zip(ksm.interference(), before, strict=True))
        ksm.set(run=0)  # nothing moves while the guests report
        farewells = crew.end(int(watch.samples[-1]["time_s"] * 1e9))
    deeds = _deeds(farewells)
    columns = list(watch.samples[0])
    return Recording(
        samples=pd.DataFrame(watch.samples, columns=columns),
        scans=pd.DataFrame(watch.scans, columns=[*columns, "proven"]),
        deeds=deeds,
        farewells=farewells,
        visited=watch.visited,
        disturbance=Disturbance(migrated, waited, _late_ns(deeds)),
    )


def _deeds(farewells: Mapping[str, Farewell]) -> pd.DataFrame:
    """One row for each planned act that was done."""
    import pandas as pd

    rows = [
        (name, done.verb, done.time_ns / 1e9, done.began_ns / 1e9, done.ended_ns / 1e9)
        for name, farewell in farewells.items()
        for done in farewell.deeds
    ]
    return pd.DataFrame(rows, columns=["guest", "deed", "planned_s", "began_s", "ended_s"])


def _late_ns(deeds: pd.DataFrame) -> int:
    moments = deeds[deeds["planned_s"] > 0].groupby(["guest", "planned_s"])["began_s"].min()
    late_s = moments.to_numpy() - moments.index.get_level_values("planned_s").to_numpy()
    return round(1e9 * float(late_s.max(initial=0.0)))


def _templates(workload: Workload) -> Keys | None:
    """What packed pages look like, if there are any."""
    if workload.pattern != "packed" or workload.swapping is None or workload.swapping.algorithm is None:
        return None
    return templates(workload.swapping.algorithm)


@dataclass
class _Short:
    """Where memory is short: the swap area, the guests' control groups, and what they told at the start."""

    area: Area
    groups: Groups
    before: Mapping[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """Events and stalls since `before` was set, and what is in use now."""
        counts = self._counts()
        totals = (name for name in counts if not name.startswith("psi") or name.endswith("_ns"))
        return counts | {name: counts[name] - self.before[name] for name in totals} | self.area.figures()

    def start(self) -> None:
        """Count from now on."""
        self.before = self._counts()

    def _counts(self) -> dict[str, float]:
        return {**events(), **self.groups.figures()}


@contextlib.contextmanager
def _short_memory(workload: Workload, token: str) -> Iterator[_Short | None]:
    """What guests with limited memory need, until the end."""
    if workload.swapping is None:
        yield None
        return
    with swap_area(workload.swapping, token) as area, groups(len(workload.guests), token) as made:
        yield _Short(area, made)


class _Crew:
    """The workload's guests as processes: living ones, and those that a parent will fork later."""

    def __init__(self, workload: Workload, server: GuestServer, short: _Short | None) -> None:
        self._workload = workload
        self._short = short
        self._guests = {guest.name: guest for guest in workload.guests}
        self._living: dict[str, GuestProcess] = {}
        self._unborn: dict[str, tuple[GuestProcess, int]] = {}
        for guest in workload.guests:
            if guest.fork_of is None:
                self._living[guest.name] = self._fill(guest, server)
            elif guest.start_ns == 0:
                self._living[guest.name] = server.fork(self._living[guest.fork_of], guest.name)
            else:
                self._unborn[guest.name] = server.reserve(self._living_ancestor(guest), guest.name)
        for name, process in self._living.items():
            process.plan(self._acts(self._guests[name]))

    def begin(self, start_ns: int) -> None:
        """Set time 0 on the monotonic clock."""
        for process in self._living.values():
            process.begin(start_ns)

    def end(self, ended_ns: int) -> dict[str, Farewell]:
        """End the guests born by then; return their last words."""
        # Children first: one whose birth is a little late still finds a living parent.
        forked = [process for name, (process, _) in self._unborn.items() if self._guests[name].start_ns < ended_ns]
        return {process.name: process.end() for process in [*reversed(forked), *self._living.values()]}

    def _fill(self, guest: Guest, server: GuestServer) -> GuestProcess:
        limited = self._short is not None and guest.memory_limit is not None
        process = server.spawn(guest.name, len(guest.keys), self._workload.pattern, guest.huge_pages, limited)
        pages = np.flatnonzero(guest.present)
        if self._short and guest.memory_limit is not None:
            # In order, because that decides which pages are in swap when the run begins.
            number = self._workload.guests.index(guest)
            process.confine(self._short.groups.confinement(number, guest.memory_limit), pages)
        else:
            # In shuffled order, so that its frames lie scattered, as on a host that has run for long: how much ksmd
            # waits for memory would else depend on what this machine did before.
            pages = np.random.default_rng(0).permutation(pages)
        process.write(pages, guest.keys[pages])
        if guest.mergeable and guest.start_ns == 0:
            process.madvise(0, len(guest.keys), "MERGEABLE")
        return process

    def _living_ancestor(self, guest: Guest) -> GuestProcess:
        while guest.name not in self._living:
            if guest.fork_of is None:
                raise ValueError(f"guest {guest.name} must come after the guest it is forked from")
            guest = self._guests[guest.fork_of]
        return self._living[guest.name]

    def _acts(self, guest: Guest) -> list[Act]:
        """The guest's plan; acts of one time keep this order: its start, the workload's order, its forks, its end."""
        acts = []
        if guest.fork_of is None and guest.mergeable and guest.start_ns:
            acts.append(Act(guest.start_ns, "madvise", (0, len(guest.keys), "MERGEABLE")))
        deeds = [action for action in self._workload.actions if not isinstance(action, Setting)]
        acts += [_act(deed, guest.start_ns) for deed in deeds if deed.guest == guest.name]
        for name, (_, line) in self._unborn.items():
            child = self._guests[name]
            if child.fork_of == guest.name:
                acts.append(Act(child.start_ns, "fork", (line, self._acts(child))))
        if guest.stop_ns is not None:
            acts.append(Act(guest.stop_ns, "exit", ()))
        return acts


class _Poll(NamedTuple):
    """When it was, how often ksmd had run by then, whether it slept, and how many full scans it had ended."""

    time_ns: int
    runs: int
    asleep: bool
    scan: int


class _Watch:
    """Writes KSM's settings in time and reads its counters at every sampling time and every full scan."""

    def __init__(
        self, ksm: Ksm, workload: Workload, short: _Short | None, progress: Callable[[int], None] | None
    ) -> None:
        self.samples: list[_Row] = []
        self.scans: list[_Row] = []
        self.visited: list[int] = []
        self._ksm = ksm
        self._workload = workload
        self._short = short
        self._nap_s = _LONG_NAP_S if short else _NAP_S
        self._progress = progress
        settings = [action for action in workload.actions if isinstance(action, Setting)]
        self._settings = deque(sorted(settings, key=lambda setting: setting.time_ns))
        self._moments = deque(moments_ns(workload))
        self._baseline = {name: ksm.counters()[name] for name in _SINCE_START}
        self._sleep_ns = 0
        if short:
            short.start()

    def run(self, start_ns: int) -> None:
        """Start KSM at `start_ns` of the monotonic clock and watch it until the workload's end."""
        self._start_ns = start_ns
        self.samples.append(self._row(0))
        time.sleep(max(0, start_ns - time.monotonic_ns()) / 1e9)
        with _at_once(_WATCH_PRIORITY):
            before = self._poll()
            if self._workload.thp:  # writing how long khugepaged sleeps wakes it: it starts to count here
                self._ksm.set_thp(scan_sleep_millisecs=self._workload.thp["scan_sleep_millisecs"])
            self._write(Setting(0, "run", self._workload.ksm.get("run", 1)))
            self._watch(before)
        self.samples.append(self._row(self._now_ns()))

    def _watch(self, before: _Poll) -> None:
        workload = self._workload
        next_sample_ns = workload.sample_every_ns
        while True:
            now = self._poll()
            if now.scan > before.scan:
                self._see_scan(before, now)
            before = now
            while self._moments and self._moments[0] <= now.time_ns:
                self._moments.popleft()
                self.visited.append(self._count("pages_scanned"))
            ended = workload.until_scans is not None and now.scan >= workload.until_scans
            if ended or now.time_ns >= workload.duration_ns:
                return
            if now.time_ns >= next_sample_ns:
                self.samples.append(self._row(now.time_ns))
                if self._progress:
                    self._progress(now.time_ns)
                next_sample_ns += workload.sample_every_ns
            while self._settings and self._settings[0].time_ns <= now.time_ns:
                self._write(self._settings.popleft())
                # The write may have cut ksmd's sleep short, so how long it lasts proves nothing now.
                before = before._replace(time_ns=-_NEVER_NS)
            time.sleep(self._nap_s)

    def _poll(self) -> _Poll:
        # In this order: if ksmd was asleep, the next scan end is in a later run than the one counted.
        time_ns, runs, asleep = self._now_ns(), self._ksm.ksmd_runs(), self._ksm.ksmd_asleep()
        return _Poll(time_ns, runs, asleep, self._ksm.read("full_scans"))

    def _see_scan(self, before: _Poll, now: _Poll) -> None:
        """Read the counters between two scans.

        The row is proven if ksmd cannot have run since the scan's end: because less time than it sleeps has passed
        since it was last seen inside the scan, or because it ran no more often than the scan's end needs.
        """
        row = self._row(now.time_ns)
        unmoved = all(self._count(name) == row[name] for name in ("full_scans", "pages_scanned"))
        in_time = self._now_ns() - before.time_ns < self._sleep_ns
        one_run = self._ksm.ksmd_runs() <= before.runs + before.asleep
        self.scans.append(row | {"proven": unmoved and (in_time or one_run)})

    def _row(self, now_ns: int) -> _Row:
        counts = {name: value - self._baseline.get(name, 0) for name, value in self._ksm.counters().items()}
        return {"time_s": now_ns / 1e9, **counts, **(self._short.figures() if self._short else {})}

    def _count(self, name: str) -> int:
        return self._ksm.read(name) - self._baseline.get(name, 0)

    def _write(self, setting: Setting) -> None:
        self._ksm.set(**{setting.knob: setting.value})
        self._sleep_ns = int(self._ksm.get("sleep_millisecs")) * 1_000_000

    def _now_ns(self) -> int:
        return time.monotonic_ns() - self._start_ns


@contextlib.contextmanager
def _apart(ksm: Ksm) -> Iterator[None]:
    """Keep this thread, and the guests it starts, off the core that ksmd is given and ahead of ordinary work."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ksm.isolate())
    try:
        with _at_once(_GUESTS_PRIORITY):
            yield
    finally:
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def _at_once(priority: int) -> Iterator[None]:
    """Let this thread run the moment it wakes: ksmd's sleep, in which counters are read, may be only 4 ms long."""
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameter)


def _act(deed: Deed, start_ns: int) -> Act:
    match deed:
        case Write():
            return Act(deed.time_ns, "write", (deed.pages, deed.keys))
        case Madvise():
            return Act(deed.time_ns, "madvise", (deed.first, deed.count, deed.advice))
        case Rate():
            return Act(start_ns, "rate", (deed.pages, deed.per_second, deed.seed, deed.choices))
        case Reads():
            return Act(start_ns, "reads", (deed.classes, deed.seed))
        case Loop():
            return Act(start_ns, "loop", (deed.first, deed.count, deed.period_ns))
        case Level():
            return Act(deed.time_ns, "level", (deed.level,))
