"""A scenario in, a result out."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from sim.errors import MachineError
from sim.host import Machine, Report
from sim.memory.guest import Vm
from sim.memory.image import Captured, pages_of
from sim.units import MIB, SECOND, about_bytes, about_duration

if TYPE_CHECKING:
    import pandas as pd

    from sim.results import Summary
    from sim.scenario import Scenario
    from sim.scenario.expect import Verdict

Progress = Callable[[float, str], None]

_BASE_BYTES: Final = 260 * MIB
_PAGE_COST: Final = 24
_ROW_COST: Final = 600
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
            ("guest pages", f"{self.pages:,} ({about_bytes(self.pages * 4096)})"),
            ("page visits", f"at most {self.visits:,.0f}"),
            ("samples", f"{self.samples:,}"),
            ("memory needed", about_bytes(self.memory_bytes)),
            ("CPU time needed", about_duration(self.cpu_seconds * SECOND)),
        ]


def estimate(scenario: Scenario) -> Estimate:
    """What running the scenario will take; figures of CPU time are for the machine named in README's *Measured*."""
    most, total, visits, cpu = 0, 0, 0.0, 2.0
    guests = 0
    assignments = scenario.assignments()
    samples = (scenario.duration // scenario.sample_every + 1) * len(assignments)
    for host, name in scenario.host_names():
        pages = sum(each.vm.pages for each in assignments[name])
        written = sum(_written_pages(each.vm) for each in assignments[name])
        guests += len(assignments[name])
        batches = scenario.duration / max(host.ksm.sleep_millisecs * 1_000_000 + 4_000_000, 1_000)
        possible = batches * host.ksm.pages_to_scan if pages else 0.0
        scans = possible / max(pages, 1)
        most, total, visits = max(most, pages), total + pages, visits + possible
        cpu += pages * 6e-7 + min(scans, batches) * (written * 5e-8 + pages * 3e-11) + batches * 1e-7
    cpu += samples * 4e-6
    memory = _BASE_BYTES + most * _PAGE_COST + samples * _ROW_COST
    return Estimate(len(assignments), guests, total, visits, memory, cpu, samples)


def _written_pages(vm: Vm) -> int:
    image = vm.content
    if vm.fork_of or isinstance(image, Captured):
        return vm.pages // 10
    return sum(pages_of(part.size, vm.pages) for part in image.parts if part.writes)


def run(scenario: Scenario, progress: Progress | None = None) -> Result:
    """Simulate a scenario; *progress* is told the share done and what is being done.

    Raises MachineError if this machine's memory cannot hold it.
    """
    need = estimate(scenario)
    available = _available_bytes()
    if need.memory_bytes > available:
        raise MachineError(
            f"{scenario.name}: needs about {about_bytes(need.memory_bytes)} of memory for {need.pages:,} guest pages, "
            f"this machine has {about_bytes(available)} free; give fewer or smaller guests"
        )
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
    return _result(scenario, reports, time.perf_counter() - began, time.process_time() - cpu_began)


def _result(scenario: Scenario, reports: Sequence[Report], wall_s: float, cpu_s: float) -> Result:
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
        "digest": scenario.digest(versions["overcommit"]),
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
