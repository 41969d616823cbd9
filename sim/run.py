"""A scenario in, a result out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sim.columns import PAGE_BYTES
from sim.engine import engine, package_version
from sim.errors import MachineError, UserError
from sim.host import Machine, Report
from sim.limits import available_bytes
from sim.scale import COARSER, enlarged, enlarged_guest, enlarged_work, error_bars, fleet_error_bars
from sim.sizing import MOST_PAGES, Estimate, estimate
from sim.units import about_bytes, about_duration

if TYPE_CHECKING:
    import pandas as pd

    from sim.results import Summary
    from sim.scenario import Scenario
    from sim.scenario.expect import Verdict

Progress = Callable[[float, str], None]

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
    fleet: pd.DataFrame | None = None
    """Of a datacenter, what its control plane knew, a row for each epoch."""
    hosts: pd.DataFrame | None = None
    """Of a datacenter, a row for each host."""


@dataclass(frozen=True)
class _Tables:
    """What all hosts recorded."""

    samples: pd.DataFrame
    scans: pd.DataFrame
    guests: pd.DataFrame
    events: pd.DataFrame
    summary: Summary
    work: Mapping[str, int]
    fleet: pd.DataFrame | None = None
    hosts: pd.DataFrame | None = None


def run(
    scenario: Scenario, progress: Progress | None = None, jobs: int = 1, cluster: str | None = None
) -> Result:  # fmt: skip
    """Simulate a scenario; *progress* is told the share done and what is being done.

    The hosts of a datacenter are spread over so many processes, or over the Dask cluster at an address; the result is
    the same. Raises MachineError if this machine's memory cannot hold it, UserError if the cluster cannot be reached.
    """
    scale = check_size(scenario).scale
    wall_began, cpu_began = time.perf_counter(), _cpu_s()
    bars = {}
    if scenario.datacenter:
        tables = _simulate_fleet(scenario, scale, progress, jobs, cluster)
        if scale > 1:
            bars = fleet_error_bars(tables.summary, scenario.vms, scale)
    else:
        tables = _simulate(scenario, scale, progress)
        if scale > 1:
            bars = error_bars(tables.summary, [_simulate(scenario, scale * times).summary for times in COARSER], scale)
    versions = {package: package_version(package) for package in _PACKAGES}
    manifest = {
        "engine": f"overcommit {versions['overcommit']}",
        "seed": scenario.seed,
        "scale": scale,
        **({"error": bars} if bars else {}),
        "digest": scenario.digest(engine()),
        "prices": {host.prices: host.price_set.digest() for host in scenario.hosts},
        "versions": versions,
        "wall_s": round(time.perf_counter() - wall_began, 3),
        "cpu_s": round(_cpu_s() - cpu_began, 3),
        "peak_bytes": _peak_bytes(),
        "work": tables.work,
    }
    return Result(
        scenario, tables.samples, tables.scans, tables.guests, tables.events, manifest, tables.summary,
        scenario.judge(tables.summary), tables.fleet, tables.hosts,
    )  # fmt: skip


def _cpu_s() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _simulate_fleet(
    scenario: Scenario, scale: int, progress: Progress | None, jobs: int, cluster: str | None
) -> _Tables:  # fmt: skip
    """Run a datacenter with a page for each *scale* pages."""
    import pandas as pd

    from sim.datacenter.fleet import simulate
    from sim.results import frame, partial, summarise

    def tell(now: int, what: str) -> None:
        if progress:
            progress(now / scenario.duration, f"{what} at {about_duration(now)}")

    found = simulate(scenario, scale, jobs, cluster, tell)
    samples, scans = partial("samples", pd.DataFrame(found.samples)), frame("scans", [])
    guests, events = frame("guests", found.guests), [*found.events, *found.plane.events]
    events.sort(key=lambda row: float(str(row["time_s"])))
    summary = {**summarise(samples, scans, guests, scenario.window), **found.metrics}
    return _Tables(
        samples, scans, guests, frame("events", events), summary, found.work,
        frame("fleet", found.plane.fleet), frame("hosts", found.plane.hosts),
    )  # fmt: skip


def _simulate(scenario: Scenario, scale: int, progress: Progress | None = None) -> _Tables:
    """Run every host with a page for each *scale* pages."""
    small = scenario.shrunk(scale)
    assignments, hosts = small.assignments(), small.host_names()
    reports: list[Report] = []
    for index, (host, name) in enumerate(hosts):

        def tell(now: int, index: int = index, name: str = name) -> None:
            if progress:
                progress((index + now / scenario.duration) / len(hosts), f"{name} at {about_duration(now)}")

        reports.append(_enlarged(Machine(
            host, name, assignments[name], seed=scenario.seed, duration=scenario.duration,
            sample_every=scenario.sample_every, progress=tell,
        ).run(), scale))  # fmt: skip
    return _tables(scenario, reports)


def _enlarged(report: Report, scale: int) -> Report:
    """What a host recorded, in the pages that each simulated one stands for."""
    if scale == 1:
        return report
    return Report(
        samples=enlarged(report.samples, scale),
        scans=enlarged(report.scans, scale),
        guests=[enlarged_guest(row, scale) for row in report.guests],
        events=report.events,
        work=enlarged_work(report.work, scale),
    )


def check_size(scenario: Scenario) -> Estimate:
    """Return what a run will take. Raises UserError or MachineError if that is too much."""
    need = estimate(scenario)
    available = available_bytes()
    if need.peak_pages > MOST_PAGES:
        remedy = _remedy(scenario, available, "spread them over more hosts")
        raise UserError(
            f"{scenario.name}: a host would hold {about_bytes(need.peak_pages * PAGE_BYTES)} of guests, "
            f"more than {about_bytes(MOST_PAGES * PAGE_BYTES)}; {remedy}"
        )
    if need.memory_bytes > available:
        remedy = _remedy(scenario, available, "give fewer or smaller guests")
        raise MachineError(
            f"{scenario.name}: needs about {about_bytes(need.memory_bytes)} of memory for {need.pages:,} guest pages, "
            f"only {about_bytes(available)} can be used here; {remedy}"
        )
    return need


def _remedy(scenario: Scenario, available: int, otherwise: str) -> str:
    """The least scale at which the scenario fits here, or something else."""
    scale = 1
    while scale < scenario.largest_scale():
        scale *= 2
        if estimate(scenario, scale).fits(available):
            return f"write scale: {scale}, or {otherwise}"
    return otherwise


def _tables(scenario: Scenario, reports: Sequence[Report]) -> _Tables:
    from sim.results import frame, summarise

    samples, scans = (_joined(table, [getattr(report, table) for report in reports]) for table in ("samples", "scans"))
    guests = frame("guests", [row for report in reports for row in report.guests])
    events = [row for report in reports for row in report.events]
    events.sort(key=lambda row: float(str(row["time_s"])))
    summary = summarise(samples, scans, guests, scenario.window)
    work = {name: sum(report.work[name] for report in reports) for name in reports[0].work}
    return _Tables(samples, scans, guests, frame("events", events), summary, work)


def _joined(table: str, columns: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One frame of several hosts' columns, in order of time."""
    import pandas as pd

    from sim.results import typed

    frames = [typed(table, pd.DataFrame(each)) for each in columns]
    return pd.concat(frames, ignore_index=True).sort_values("time_s", kind="stable", ignore_index=True)


def _peak_bytes() -> int:
    """Most memory this process has used; ru_maxrss would count what the parent held before this process began."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
