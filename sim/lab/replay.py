"""A scenario on the real kernel: guests, writes and settings become a workload, the kernel's counters its result."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import numpy as np
import numpy.typing as npt

from sim.columns import KSM_COUNTERS, KSM_SETTINGS, PAGE_BYTES
from sim.engine import package_version
from sim.errors import UserError
from sim.host import Assignment, Host, Machine
from sim.lab.guest import PACKED, Farewell, Keys, Pattern, mix
from sim.lab.machine import VMSTAT
from sim.lab.record import (
    Action,
    Disturbance,
    Guest,
    Level,
    Loop,
    Madvise,
    Rate,
    Reads,
    Recording,
    Setting,
    Workload,
    Write,
    record,
)
from sim.lab.swapping import SWAP_FIGURES, Swapping
from sim.memory.guest import Vm
from sim.memory.huge import Thp
from sim.memory.image import Captured, load_capture
from sim.memory.pages import (
    LOOP_FIRST,
    LOOP_PAGES,
    LOWEST,
    NEVER,
    PERIOD,
    READS,
    SPAN,
    WRITES,
    Int32,
    Int64,
    UInt16,
)
from sim.reclaim.commit import Commit
from sim.reclaim.compression import AS_IS, Algorithm, Packed, packed_of
from sim.run import Progress
from sim.sharing.kernels import kernel
from sim.sharing.ksm import Ksm
from sim.sharing.scanner import Scanner
from sim.units import SECOND, about_duration, format_bytes

if TYPE_CHECKING:
    import pandas as pd

    from sim.results import Summary
    from sim.scenario import Scenario
    from sim.scenario.expect import Verdict

Observer = TypeVar("Observer", bound=Scanner)

_OWN: Final = 1 << 63
"""First number of contents that equal no other; numbered contents lie below 2^32, those of random writes between."""
_DRAWS: Final = 1 << 20
"""Seeds of random writes that one run may use."""
_NOT_KNOBS: Final = ("changes", "ksmd_cpu_before", "max_kernel_pages")
_TOLD: Final = (*(column.name for column in (*KSM_COUNTERS, *KSM_SETTINGS)), "ksmd_cpu_ns", *VMSTAT, *SWAP_FIGURES)
"""Columns of samples and scans that are read from the kernel: those that little but guests, ksmd and khugepaged moves,
and where there is swap, which nobody else uses then, what is said of it.

With them go the figures that follow from who runs, and the size of the machine (see `_told`). All others are NaN:
other lines of /proc/vmstat and /proc/meminfo count every process of the machine, and the kernel does not say what
ksmd's time was for.
"""


@dataclass(frozen=True)
class Replay:
    """What the kernel did with a scenario, in the form of `sim.run.Result`; figures it does not tell are NaN.

    `readings` has all that was read at each sample, under the kernel's names; `farewells` the guests' last words.

    `evidence` has two columns for each row of `scans`: `proven`, the row was read whole before ksmd could move on, and
    `stolen_ns`, time for which the hypervisor took ksmd's core away. `deeds` says when guests did what was planned,
    `visited` how many pages ksmd had visited at each planned moment. One machine is no datacenter: it has no `fleet`
    and no `hosts`.
    """

    scenario: Scenario
    samples: pd.DataFrame
    scans: pd.DataFrame
    guests: pd.DataFrame
    events: pd.DataFrame
    manifest: Mapping[str, Any]
    summary: Summary
    verdicts: Sequence[Verdict]
    readings: pd.DataFrame
    farewells: Mapping[str, Farewell]
    evidence: pd.DataFrame
    deeds: pd.DataFrame
    visited: Sequence[int]
    disturbance: Disturbance
    fleet: None = None
    hosts: None = None


def replay(
    scenario: Scenario, progress: Progress | None = None, *, pattern: Pattern | None = None, draw: int = 0
) -> Replay:
    """Run a scenario of one host under this machine's KSM, in real time; *progress* as for `sim.run.run`.

    *pattern* says where pages differ (see `render`), the scenario's `differs_at` unless given; *draw* is the number
    of the drawing of random writes. Raises UserError for what the lab cannot replay, MachineError where this machine
    cannot do it.
    """

    def tell(now: int) -> None:
        if progress:
            progress(now / scenario.duration, f"{scenario.name} on the kernel at {about_duration(now)}")

    plan = workload(scenario, pattern, draw)
    tell(0)
    began, cpu_began = time.perf_counter(), time.process_time()
    recording = record(plan, tell)
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    return _result(scenario, plan, recording, {"draw": draw, "wall_s": round(wall_s, 3), "cpu_s": round(cpu_s, 3)})


def workload(scenario: Scenario, pattern: Pattern | None = None, draw: int = 0) -> Workload:
    """What the lab does to replay a scenario. Raises UserError for what it cannot replay."""
    _check(scenario)
    host, host_name = scenario.host_names()[0]
    assert host.ksm is not None  # checked
    assignments = scenario.assignments()[host_name]
    names = [assignment.name for assignment in assignments]
    machine = first_host(scenario, _Tape)
    tape = cast(_Tape, machine.scanner)
    tape.know_sizes(scenario, assignments)
    machine.run()
    limits = [assignment.vm.memory_limit for assignment in assignments]
    return Workload(
        guests=[replace(tape.lives[index].guest(names), memory_limit=limits[index]) for index in sorted(tape.lives)],
        ksm=_knobs(host.ksm),
        duration_ns=scenario.duration,
        actions=[*tape.actions(names, draw)],
        sample_every_ns=scenario.sample_every,
        pattern=pattern or _pattern(scenario),
        thp=_thp_knobs(host.thp),
        swapping=_swapping(host),
    )


def _swapping(host: Host) -> Swapping | None:
    """The swap area, and the sysctls that matter to guests in control groups."""
    if host.swap is None:
        return None
    algorithm, rules = host.swap.compresses_with, host.watermarks
    return Swapping(host.swap.size, algorithm, rules.page_cluster, rules.swappiness)


def _thp_knobs(thp: Thp) -> dict[str, int | str]:
    """Settings of huge pages; guests ask for them one by one, so that other processes get none."""
    return {} if thp.enabled == "never" else {"enabled": "madvise", **thp.khugepaged.model_dump()}


def observe(scenario: Scenario, observer: type[Observer]) -> Observer:
    """Simulate the first host of a scenario with an observer as its scanner; return the observer."""
    machine = first_host(scenario, observer)
    scanner = machine.scanner
    machine.run()
    return cast(Observer, scanner)


def first_host(scenario: Scenario, observer: type[Scanner] | None = None) -> Machine:
    """The first host of a scenario, with an observer as its scanner unless it has none."""
    host, name = scenario.host_names()[0]
    return Machine(
        host,
        name,
        scenario.assignments()[name],
        seed=scenario.seed,
        duration=scenario.duration,
        sample_every=scenario.sample_every,
        make_scanner=observer,
    )


def _check(scenario: Scenario) -> None:
    if len(scenario.host_names()) != 1:
        raise UserError(f"{scenario.name}: the lab replays one host; keep one entry of hosts, with count 1")
    host = scenario.hosts[0]
    release = ".".join(re.findall(r"\d+", platform.release())[:2])
    if kernel(host.kernel)[1:] != kernel(release)[1:]:
        raise UserError(
            f"{scenario.name}: hosts.0.kernel is {host.kernel} and this machine runs {release}, which behaves "
            f"otherwise; set hosts.0.kernel={release}"
        )
    if host.ksm is None:
        raise UserError(f"{scenario.name}: the lab replays KSM; give hosts.0 ksm: {{}} and no other way to share")
    for name in ("hints", "mixed_pages"):
        if getattr(host.ksm, name):
            raise UserError(f"{scenario.name}: no released kernel has it; remove hosts.0.ksm.{name}")
    for name in host.sources:
        raise UserError(f"{scenario.name}: the lab replays KSM alone; remove hosts.0.{name}")
    for i, vm in enumerate(scenario.vms):
        if vm.kernel == "shared":
            raise UserError(f"{scenario.name}: the lab's guests read no files; remove vms.{i}.kernel")
        for name in ("balloon", "free_page_reporting"):
            if getattr(vm, name):
                raise UserError(f"{scenario.name}: the lab's guests have no balloon device; remove vms.{i}.{name}")
    if host.commit != Commit():
        raise UserError(f"{scenario.name}: the lab leaves vm.overcommit_memory as it is; remove hosts.0.commit")
    if host.shares_between != "all":
        raise UserError(f"{scenario.name}: no kernel keeps guests apart; set hosts.0.shares_between=all")
    if host.hugetlbfs:
        raise UserError(f"{scenario.name}: the lab sets no hugetlbfs up; remove hosts.0.hugetlbfs")
    if host.numa_nodes > 1:
        raise UserError(f"{scenario.name}: the lab's guests live on one NUMA node; set hosts.0.numa_nodes=1")
    _check_swap(scenario, host)
    for index, vm in enumerate(scenario.vms):
        if vm.memory_limit is not None:
            _check_limited(scenario, f"vms.{index}", vm)


def _check_swap(scenario: Scenario, host: Host) -> None:
    swap = host.swap
    if swap is None:
        return
    if swap.device not in ("zram", "file"):
        raise UserError(f"{scenario.name}: the lab swaps to zram or to a file; set hosts.0.swap.device to one of them")
    for name in ("read_latency", "write_latency", "bandwidth", "channels"):
        if getattr(swap, name) is not None:
            raise UserError(f"{scenario.name}: the lab's disk is as fast as it is; remove hosts.0.swap.{name}")
    needed = sum(max(vm.memory - vm.memory_limit, 0) * vm.count for vm in scenario.vms if vm.memory_limit)
    if swap.size < needed:
        size = format_bytes(needed)
        raise UserError(f"{scenario.name}: the guests would be killed for lack of swap; set hosts.0.swap.size={size}")
    most = sum(min(vm.memory, vm.memory_limit or vm.memory) * vm.count for vm in scenario.vms)
    if most > host.memory:
        raise UserError(
            f"{scenario.name}: the lab cannot make this machine's memory short, only that of guests; give each of vms "
            f"a memory_limit, or set hosts.0.memory={format_bytes(2 * most)}"
        )


def _check_limited(scenario: Scenario, path: str, vm: Vm) -> None:
    faults = (
        (scenario.hosts[0].swap is None, "a guest with a memory_limit needs hosts.0.swap: give it device and size"),
        (vm.fork_of, f"the lab forks no guest with a memory_limit; remove {path}.memory_limit"),
        (vm.start, f"the lab's guests with a memory_limit start at once; remove {path}.start"),
        (vm.every, f"the lab's guests with a memory_limit start at once; remove {path}.every"),
        (vm.vcpus > 1, f"the lab's guests have one processor; set {path}.vcpus=1"),
        (vm.load, f"the lab's guests compute nothing; set {path}.load=0%"),
    )
    for fault, message in faults:
        if fault:
            raise UserError(f"{scenario.name}: {message}")


def _pattern(scenario: Scenario) -> Pattern:
    """Equal contents must be equal bytes in all guests, so all differ late, or none; all are packed for zram."""
    if _algorithm(scenario):
        return "packed"
    return "late" if all(2 * vm.differs_at > PAGE_BYTES for vm in scenario.vms) else "random"


def _algorithm(scenario: Scenario) -> Algorithm | None:
    """How the host's zram compresses; None where it has none."""
    swap = scenario.hosts[0].swap
    return swap.compresses_with if swap else None


def _knobs(ksm: Ksm) -> dict[str, int | str]:
    """Settings that the kernel is given: those that the scenario sets, and none that the advisor takes over."""
    values = {name: value for name, value in ksm.model_dump().items() if name not in _NOT_KNOBS and value is not None}
    if ksm.advisor_mode != "none":
        del values["pages_to_scan"]
    return values


def _result(scenario: Scenario, plan: Workload, recording: Recording, took: Mapping[str, float]) -> Replay:
    import pandas as pd

    from sim.results import frame, partial, summarise

    lives = _lives(scenario, recording.farewells)
    samples, scans = (partial("samples", _told(scenario, lives, each)) for each in (recording.samples, recording.scans))
    guests = partial("guests", pd.DataFrame([_guest_row(scenario, *each) for each in lives]))
    events = frame("events", _events(scenario, plan))
    engine = f"kernel {platform.release()}"
    manifest = {
        "engine": engine,
        "digest": scenario.digest(engine),
        "versions": {"overcommit": package_version("overcommit"), "kernel": platform.release()},
        "seed": scenario.seed,
        "pattern": plan.pattern,
        **took,
        "disturbance": asdict(recording.disturbance),
    }
    summary = summarise(samples, scans, guests, scenario.window)
    asked = [each for each in scenario.expect if summary[each.metric.name] is not None]
    return Replay(
        scenario,
        samples,
        scans,
        guests,
        events,
        manifest,
        summary,
        [expectation.check(summary) for expectation in asked],
        recording.samples,
        recording.farewells,
        recording.scans[["proven", "stolen_ns"]],
        recording.deeds,
        recording.visited,
        recording.disturbance,
    )


_Lives = Sequence[tuple[Assignment, Farewell]]


def _lives(scenario: Scenario, farewells: Mapping[str, Farewell]) -> _Lives:
    """The guests that lived, in the scenario's order."""
    [assignments] = scenario.assignments().values()
    return [(each, farewells[each.name]) for each in assignments if each.name in farewells]


def _told(scenario: Scenario, lives: _Lives, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with the columns that the kernel, the plan and the machine tell."""
    times = rows["time_s"].to_numpy() * SECOND
    running = [(times >= each.start) & (times <= farewell.ended_ns) for each, farewell in lives]
    sizes = [each.vm.memory for each, _ in lives]
    figures = np.array(running, np.int64).reshape(len(sizes), len(times))
    told = rows[["time_s", *(name for name in _TOLD if name in rows)]]
    return told.assign(
        host=scenario.host_names()[0][1],
        hosts=1,
        guests_running=figures.sum(axis=0),
        mem_promised_bytes=np.array(sizes, np.int64) @ figures,
        mem_total_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        cores=os.cpu_count(),
    )


def _guest_row(scenario: Scenario, guest: Assignment, farewell: Farewell) -> Mapping[str, Any]:
    """The guest's row of the guests table, by its own last words."""
    stopped = guest.stop < scenario.duration
    return {
        "guest": guest.name,
        "vm": guest.vm.name,
        "host": scenario.host_names()[0][1],
        "start_s": guest.start / SECOND,
        "stop_s": farewell.ended_ns / SECOND if stopped else float("nan"),
        "end": "stopped" if stopped else "running",
        "memory_bytes": guest.vm.memory,
        "touched_bytes": farewell.touched_pages * PAGE_BYTES,
        "pages_written": farewell.written_pages,
        "swapped_bytes": farewell.swapped_pages * PAGE_BYTES,
        "stall_s": farewell.stalled_ns / SECOND,
        "progress_percent": 100 * farewell.progress,
        **farewell.ksm_stat,
    }


def _events(scenario: Scenario, plan: Workload) -> list[dict[str, Any]]:
    """Settings written in mid-run."""
    host = scenario.host_names()[0][1]
    written = [each for each in plan.actions if isinstance(each, Setting)]
    return [
        {
            "time_s": each.time_ns / SECOND,
            "host": host,
            "guest": "",
            "kind": "setting",
            "detail": f"{each.knob} = {each.value}",
        }
        for each in written
    ]


@dataclass
class _Life:
    """What happens to one guest."""

    index: int
    start: int
    stop: int | None = None
    mergeable: bool = False
    level: float = 1.0
    parent: int | None = None
    keys: Keys = field(default_factory=lambda: np.empty(0, np.uint64))
    present: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    accesses: UInt16 = field(default_factory=lambda: np.empty(0, np.uint16))
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
        self._noted_levels: list[tuple[int, int, float]] = []
        self._packed: dict[int, Packed] = {}
        self._packed_contents: dict[int, int] = {}

    def know_sizes(self, scenario: Scenario, assignments: Sequence[Assignment]) -> None:
        """Learn how small zram makes the guests' pages: what is noted from now on compresses alike."""
        algorithm = _algorithm(scenario)
        if algorithm is None:
            return
        for index, guest in enumerate(assignments):
            if guest.vm.fork_of is None:
                image, pages = guest.vm.content, guest.vm.pages
                source = load_capture(image.path) if isinstance(image, Captured) else image
                places = image.layout(guest.vm.memory, scenario.seed, guest.vm.name) if image is source else {}
                self._packed[index] = packed_of(source, algorithm, scenario.seed, guest.name, pages, places)

    def actions(self, names: list[str], draw: int) -> Iterator[Action]:
        """What happens after the guests' starts."""
        for time_ns, guest, pages, keys in self._noted_writes:
            yield Write(time_ns, names[guest], pages, keys)
        for time_ns, guest, first, count, mergeable in self._noted_advice:
            yield Madvise(time_ns, names[guest], first, count, "MERGEABLE" if mergeable else "UNMERGEABLE")
        yield from self._noted_settings
        classes = ((life, kind) for life in self.lives.values() for kind in np.unique(life.accesses)
                   if self.m.rates[kind, WRITES])  # fmt: skip
        for seed, (life, kind) in enumerate(classes, start=draw * _DRAWS + 1):
            rate = float(self.m.rates[kind, WRITES]) * SECOND
            yield Rate(names[life.index], np.flatnonzero(life.accesses == kind), rate, seed, self._choices(kind))
        for life in self.lives.values():
            yield from self._reads(life, names[life.index], draw)
            if life.level != 1.0:
                yield Level(life.start, names[life.index], life.level)
        for time_ns, guest, level in self._noted_levels:
            yield Level(time_ns, names[guest], level)

    def _reads(self, life: _Life, name: str, draw: int) -> Iterator[Reads | Loop]:
        """A guest's reads, at random and in loops."""
        random = []
        loops = set()
        for kind in np.unique(life.accesses):
            rates = self.m.rates[kind]
            if rates[READS]:
                random.append((np.flatnonzero(life.accesses == kind), float(rates[READS]) * SECOND))
            if rates[PERIOD]:
                loops.add((int(rates[LOOP_FIRST]), int(rates[LOOP_PAGES]), int(rates[PERIOD])))
        if random:
            yield Reads(name, random, draw * _DRAWS + life.index)
        for first, count, period_ns in sorted(loops):
            yield Loop(name, first, count, period_ns)

    def _choices(self, kind: int) -> Keys:
        """What a class of random writes leaves; none for contents that nobody else has."""
        lowest, span = (int(each) for each in self.m.rates[kind, [LOWEST, SPAN]])
        return self._keys(np.arange(lowest, lowest + span, dtype=np.int32), None)

    def advance(self, horizon: int) -> Iterator[Int64]:
        """What is done next is done at *horizon*."""
        self._now = horizon
        return super().advance(horizon)

    def add(self, guest: int, pages: int, *, level: float, **named: Any) -> None:
        """A guest starts."""
        self.lives[guest] = _Life(guest, self._now, level=level, huge_pages=named["thp"])
        super().add(guest, pages, level=level, **named)

    def change_activity(self, guest: int, now: int, level: float) -> None:
        """A guest's random writes become more or fewer."""
        self._noted_levels.append((now, guest, level))
        super().change_activity(guest, now, level)

    def set_accesses(self, guest: int, accesses: UInt16) -> None:
        """Pages get random accesses."""
        self.lives[guest].accesses = accesses
        super().set_accesses(guest, accesses)

    def fill(self, guest: int, contents: Int32, now: int) -> None:
        """A guest has its first contents."""
        super().fill(guest, contents, now)
        life = self.lives[guest]
        life.keys, life.present = self._keys(contents, self._packed.get(guest)), contents != NEVER

    def fork(self, parent: int, child: int, next_content: int, now: int) -> int:
        """A guest is a copy of another."""
        life = self.lives[child]
        life.parent, life.mergeable, life.accesses = parent, True, self.lives[parent].accesses
        if parent in self._packed:
            self._packed[child] = self._packed[parent]
        return super().fork(parent, child, next_content, now)

    def write(self, guest: int, pages: Int64, contents: Int32, now: int) -> None:
        """A guest writes."""
        packed = self._packed.get(guest)
        keys = self._keys(contents, None if packed is None else packed[pages])
        self._noted_writes.append((now, guest, pages, keys))
        super().write(guest, pages, contents, now)

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
        """A setting is written; ksmd's start at time 0 is the run's own, and what is refused stays as it was."""
        refused = super().set_knob(name, value, now)
        if not refused and (now, name, value) != (0, "run", 1):
            self._noted_settings.append(Setting(now, name, value))
        return refused

    def _keys(self, contents: Int32, packed: Packed | None) -> Keys:
        """Keys of contents that zram packs as their pages are; a content, as where it was first."""
        numbers = contents.astype(np.int64).astype(np.uint64)
        own = contents < 0
        numbers[own] = np.uint64(_OWN + self._serial) + np.arange(np.count_nonzero(own), dtype=np.uint64)
        self._serial += int(np.count_nonzero(own))
        keys = mix(numbers)
        if not self._packed:
            return keys
        sizes = np.full(len(contents), AS_IS, np.uint64) if packed is None else packed.astype(np.uint64)
        known = self._packed_contents
        for at in np.flatnonzero(contents > 0):
            sizes[at] = known.setdefault(int(contents[at]), int(sizes[at]))
        return np.where(contents == 0, 0, keys & ~PACKED | sizes)
