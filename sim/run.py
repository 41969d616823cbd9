"""A scenario in, a result out."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from sim.columns import PAGE_BYTES
from sim.errors import MachineError, UserError
from sim.host import Assignment, Host, Machine, Report
from sim.memory.guest import Vm
from sim.memory.image import Captured, captured_shape, pages_of
from sim.units import MIB, SECOND, about_bytes, about_duration

if TYPE_CHECKING:
    import pandas as pd

    from sim.results import Summary
    from sim.scenario import Scenario
    from sim.scenario.expect import Verdict

Progress = Callable[[float, str], None]

# Measured by the runs named in `estimate`: what a run takes for each thing it holds or does.
_BASE_BYTES: Final = 240 * MIB
_PAGE_BYTES: Final = 20
_ROW_BYTES: Final = 1300
_START_S: Final = 1.4
_PAGE_S: Final = 1.2e-7
_GUEST_S: Final = 4e-4
_SAMPLE_S: Final = 4.5e-5
_BATCH_S: Final = 4e-7
_SCAN_S: Final = 5e-6
_CALM_VISIT_S: Final = 1e-9
_CHANGING_VISIT_S: Final = 2.7e-8
_BURST_WRITE_S: Final = 1.1e-7

_KSMD_VISIT_NS: Final = 1000
_SKIPPED_AFTER: Final = 4
_SKIPPED_VISITS: Final = 8
_CAPTURED_LONELY: Final = 1 / 3
_MOST_PAGES: Final = 1 << 30
_PACKAGES: Final = ("overcommit", "simpy", "numpy", "numba", "pandas", "pyarrow")


@dataclass(frozen=True)
class Result:
    """What a run found. The frames have the columns of `sim.columns`."""

    scenario: Scenario
    samples: pd.DataFrame
    scans: pd.DataFrame
    guests: pd.DataFrame
    events: pd.DataFrame
    manifest: Mapping[str, Any]
    summary: Summary
    verdicts: Sequence[Verdict]


@dataclass(frozen=True)
class Estimate:
    """What a run will take on this machine."""

    hosts: int
    guests: int
    pages: int
    peak_pages: int
    """Pages of the fullest host at its busiest moment."""
    visits: float
    """Most page visits ksmd can make."""
    memory_bytes: int
    cpu_seconds: float
    samples: int

    def rows(self) -> list[tuple[str, str]]:
        """Names and values to print."""
        return [
            ("hosts", f"{self.hosts:,}"),
            ("guests", f"{self.guests:,}"),
            ("guest pages", f"{self.pages:,} ({about_bytes(self.pages * PAGE_BYTES)})"),
            ("page visits", f"at most {self.visits:,.0f}"),
            ("samples", f"{self.samples:,}"),
            ("memory needed", about_bytes(self.memory_bytes)),
            ("CPU time needed", about_duration(self.cpu_seconds * SECOND)),
        ]


@dataclass(frozen=True)
class _Load:
    """What one host has to do: pages at the busiest moment, and counts over the whole run."""

    peak: int
    pages: int
    visits: float
    scans: float
    cpu_seconds: float


def estimate(scenario: Scenario) -> Estimate:
    """What running the scenario will take; compiling, once after an installation, takes 20 s more.

    CPU time and peak memory were within a factor of two of those measured for 16 runs of 64 MiB to 200 GiB of guests
    over 2 min to 24 h (Intel Xeon, Emerald Rapids; Python 3.11). Settings changed in mid-run are not foreseen.
    """
    assignments = scenario.assignments()
    loads = [_load(host, assignments[name], scenario.duration) for host, name in scenario.host_names()]
    guests = sum(map(len, assignments.values()))
    samples = (scenario.duration // scenario.sample_every + 1) * len(loads)
    peak = max(load.peak for load in loads)
    rows = samples + sum(load.scans for load in loads)
    images = sum(3 * snapshots * pages * 4 for snapshots, pages in
                 (captured_shape(image.path) for image in scenario.captured()))  # fmt: skip
    return Estimate(
        hosts=len(loads),
        guests=guests,
        pages=sum(load.pages for load in loads),
        peak_pages=peak,
        visits=sum(load.visits for load in loads),
        memory_bytes=round(_BASE_BYTES + peak * _PAGE_BYTES + rows * _ROW_BYTES + images),
        cpu_seconds=_START_S + guests * _GUEST_S + samples * _SAMPLE_S + sum(load.cpu_seconds for load in loads),
        samples=samples,
    )


def _load(host: Host, guests: Sequence[Assignment], duration: int) -> _Load:
    pages = sum(each.vm.pages for each in guests)
    writes = sum(_burst_writes(each) for each in guests)
    if not pages:
        return _Load(0, 0, 0.0, 0.0, 0.0)
    ksm = host.ksm
    ticks = -(-ksm.sleep_millisecs * host.hz // 1000) + 1 if ksm.sleep_millisecs else 0
    batches = duration / max(ticks * SECOND // host.hz + ksm.pages_to_scan * _KSMD_VISIT_NS, _KSMD_VISIT_NS)
    visits = batches * ksm.pages_to_scan * ksm.run
    lonely = sum(_lonely_pages(each.vm) for each in guests)
    scans = visits / pages
    if scans > _SKIPPED_AFTER and ksm.smart_scan:
        visited = 1 - lonely / pages * (1 - 1 / _SKIPPED_VISITS)
        scans = _SKIPPED_AFTER + (scans - _SKIPPED_AFTER) / visited
    changing = sum(_changing_pages(each.vm) for each in guests)
    cpu = pages * _PAGE_S + writes * _BURST_WRITE_S + batches * _BATCH_S
    cpu += scans * (_SCAN_S + pages * _CALM_VISIT_S + changing * _CHANGING_VISIT_S)
    return _Load(_peak_pages(guests, duration), pages, visits, scans, cpu)


def _peak_pages(guests: Sequence[Assignment], duration: int) -> int:
    changes = [(each.start, each.vm.pages) for each in guests]
    changes += [(each.stop, -each.vm.pages) for each in guests if each.stop < duration]
    return max(accumulate(pages for _, pages in sorted(changes)))


def _changing_pages(vm: Vm) -> int:
    """Pages that are written at random."""
    image = vm.content
    if vm.fork_of or isinstance(image, Captured):
        return 0
    return sum(pages_of(part.size, vm.pages) for part in image.parts if part.writes)


def _lonely_pages(vm: Vm) -> int:
    """Pages that smart_scan will come to skip."""
    image = vm.content
    if vm.fork_of or isinstance(image, Captured):
        return round(vm.pages * _CAPTURED_LONELY)
    lonely = (part for part in image.parts
              if part.writes or not (part.pool or part.duplicates or part.zero or part.untouched))  # fmt: skip
    return sum(pages_of(part.size, vm.pages) for part in lonely)


def _burst_writes(guest: Assignment) -> float:
    """Pages that the guest's bursts write."""
    image = guest.vm.content
    sizes = {} if isinstance(image, Captured) else {part.name: part.size for part in image.parts}
    written = 0.0
    for burst in guest.vm.bursts:
        times = 1 + ((guest.stop - guest.start) // burst.every if burst.every else 0)
        written += times * burst.share * pages_of(sizes.get(burst.part, 1.0), guest.vm.pages)
    return written


def run(scenario: Scenario, progress: Progress | None = None) -> Result:
    """Simulate a scenario; *progress* is told the share done and what is being done.

    Raises MachineError if this machine's memory cannot hold it.
    """
    need = estimate(scenario)
    if need.peak_pages > _MOST_PAGES:
        raise UserError(
            f"{scenario.name}: a host would hold {about_bytes(need.peak_pages * PAGE_BYTES)} of guests, "
            f"more than {about_bytes(_MOST_PAGES * PAGE_BYTES)}; spread them over more hosts"
        )
    available = _available_bytes()
    if need.memory_bytes > available:
        raise MachineError(
            f"{scenario.name}: needs about {about_bytes(need.memory_bytes)} of memory for {need.pages:,} guest pages, "
            f"this machine has {about_bytes(available)} free; give fewer or smaller guests"
        )
    digest = scenario.digest(_version("overcommit"))
    began, cpu_began = time.perf_counter(), time.process_time()
    assignments = scenario.assignments()
    hosts = scenario.host_names()
    reports: list[Report] = []
    for index, (host, name) in enumerate(hosts):

        def tell(now: int, index: int = index, name: str = name) -> None:
            if progress:
                progress((index + now / scenario.duration) / len(hosts), f"{name} at {about_duration(now)}")

        reports.append(Machine(
            host, name, assignments[name], seed=scenario.seed, duration=scenario.duration,
            sample_every=scenario.sample_every, progress=tell,
        ).run())  # fmt: skip
    return _result(scenario, digest, reports, time.perf_counter() - began, time.process_time() - cpu_began)


def _result(scenario: Scenario, digest: str, reports: Sequence[Report], wall_s: float, cpu_s: float) -> Result:
    from sim.results import frame, summarise

    samples, scans = (_joined(table, [getattr(report, table) for report in reports]) for table in ("samples", "scans"))
    guests = frame("guests", [row for report in reports for row in report.guests])
    events = [row for report in reports for row in report.events]
    events.sort(key=lambda row: float(str(row["time_s"])))
    summary = summarise(samples, scans)
    versions = {package: _version(package) for package in _PACKAGES}
    manifest = {
        "engine": f"overcommit {versions['overcommit']}",
        "seed": scenario.seed,
        "digest": digest,
        "versions": versions,
        "wall_s": round(wall_s, 3),
        "cpu_s": round(cpu_s, 3),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "work": {name: sum(report.work[name] for report in reports) for name in reports[0].work},
    }
    verdicts = [expectation.check(summary) for expectation in scenario.expect]
    return Result(scenario, samples, scans, guests, frame("events", events), manifest, summary, verdicts)


def _joined(table: str, columns: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One frame of several hosts' columns, in order of time."""
    import pandas as pd

    from sim.results import typed

    frames = [typed(table, pd.DataFrame(each)) for each in columns]
    return pd.concat(frames, ignore_index=True).sort_values("time_s", kind="stable", ignore_index=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _available_bytes() -> int:
    """Memory that this process may still use."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 62
