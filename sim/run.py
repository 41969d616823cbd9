"""A scenario in, a result out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from sim.columns import PAGE_BYTES
from sim.errors import MachineError, UserError
from sim.host import Machine, Report
from sim.sizing import Estimate, estimate
from sim.units import about_bytes, about_duration

if TYPE_CHECKING:
    import pandas as pd

    from sim.results import Summary
    from sim.scenario import Scenario
    from sim.scenario.expect import Verdict

Progress = Callable[[float, str], None]

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


def run(scenario: Scenario, progress: Progress | None = None) -> Result:
    """Simulate a scenario; *progress* is told the share done and what is being done.

    Raises MachineError if this machine's memory cannot hold it.
    """
    check_size(scenario)
    digest = scenario.digest(package_version("overcommit"))
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


def check_size(scenario: Scenario) -> Estimate:
    """Return what a run will take. Raises UserError or MachineError if that is too much."""
    need = estimate(scenario)
    if need.peak_pages > _MOST_PAGES:
        raise UserError(
            f"{scenario.name}: a host would hold {about_bytes(need.peak_pages * PAGE_BYTES)} of guests, "
            f"more than {about_bytes(_MOST_PAGES * PAGE_BYTES)}; spread them over more hosts"
        )
    available = available_bytes()
    if need.memory_bytes > available:
        raise MachineError(
            f"{scenario.name}: needs about {about_bytes(need.memory_bytes)} of memory for {need.pages:,} guest pages, "
            f"this machine has {about_bytes(available)} free; give fewer or smaller guests"
        )
    return need


def _result(scenario: Scenario, digest: str, reports: Sequence[Report], wall_s: float, cpu_s: float) -> Result:
    from sim.results import frame, summarise

    samples, scans = (_joined(table, [getattr(report, table) for report in reports]) for table in ("samples", "scans"))
    guests = frame("guests", [row for report in reports for row in report.guests])
    events = [row for report in reports for row in report.events]
    events.sort(key=lambda row: float(str(row["time_s"])))
    summary = summarise(samples, scans, guests, scenario.window)
    versions = {package: package_version(package) for package in _PACKAGES}
    manifest = {
        "engine": f"overcommit {versions['overcommit']}",
        "seed": scenario.seed,
        "digest": digest,
        "prices": {host.prices: host.price_set.digest() for host in scenario.hosts},
        "versions": versions,
        "wall_s": round(wall_s, 3),
        "cpu_s": round(cpu_s, 3),
        "peak_bytes": _kib("/proc/self/status", "VmHWM") * 1024,
        "work": {name: sum(report.work[name] for report in reports) for name in reports[0].work},
    }
    verdicts = scenario.judge(summary)
    return Result(scenario, samples, scans, guests, frame("events", events), manifest, summary, verdicts)


def _joined(table: str, columns: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One frame of several hosts' columns, in order of time."""
    import pandas as pd

    from sim.results import typed

    frames = [typed(table, pd.DataFrame(each)) for each in columns]
    return pd.concat(frames, ignore_index=True).sort_values("time_s", kind="stable", ignore_index=True)


def package_version(package: str) -> str:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def available_bytes() -> int:
    """Memory that this process may still use."""
    return _kib("/proc/meminfo", "MemAvailable") * 1024


def _kib(file: str, name: str) -> int:
    """One figure, in KiB, of a file of /proc; ru_maxrss would count what the parent held before this process began."""
    with open(file, encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
