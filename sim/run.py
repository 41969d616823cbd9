"""A scenario in, a result out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from sim.columns import PAGE_BYTES
from sim.errors import MachineError, UserError
from sim.host import Machine, Report
from sim.scale import enlarged, enlarged_guest, enlarged_work
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
    """Of a datacenter, what its control plane knows, a row for each epoch."""
    hosts: pd.DataFrame | None = None
    """Of a datacenter, a row for each host."""


def run(
    scenario: Scenario, progress: Progress | None = None, jobs: int = 1, cluster: str | None = None
) -> Result:  # fmt: skip
    """Simulate a scenario; *progress* is told the share done and what is being done.

    The hosts of a datacenter are spread over so many processes, or over the Dask cluster at an address; the result is
    the same. Raises MachineError if this machine's memory cannot hold it, UserError if the cluster cannot be reached.
    """
    scale = check_size(scenario).scale
    clock = _Clock()
    if scenario.datacenter:
        return _run_fleet(scenario, scale, clock, progress, jobs, cluster)
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
    samples, scans = (_joined(table, [getattr(report, table) for report in reports]) for table in ("samples", "scans"))
    guests = [row for report in reports for row in report.guests]
    events = [row for report in reports for row in report.events]
    work = {name: sum(report.work[name] for report in reports) for name in reports[0].work}
    return _result(scenario, _Told(samples, scans, guests, events, work), _manifest(scenario, scale, clock))


def _run_fleet(
    scenario: Scenario, scale: int, clock: _Clock, progress: Progress | None, jobs: int, cluster: str | None
) -> Result:
    import pandas as pd

    from sim.datacenter.fleet import simulate
    from sim.results import frame, partial

    def tell(now: int, what: str) -> None:
        if progress:
            progress(now / scenario.duration, f"{what} at {about_duration(now)}")

    found = simulate(scenario, scale, jobs, cluster, tell)
    samples = partial("samples", pd.DataFrame(found.samples))
    told = _Told(samples, frame("scans", []), found.guests, [*found.events, *found.plane.events], found.work)
    result = _result(scenario, told, _manifest(scenario, scale, clock), found.plane.metrics)
    return replace(result, fleet=frame("fleet", found.plane.fleet), hosts=frame("hosts", found.plane.hosts))


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
            f"this machine has {about_bytes(available)} free; {remedy}"
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


class _Clock:
    """How long a run takes."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), _cpu_s()

    def taken(self) -> dict[str, float]:
        """Seconds so far: by the wall, and of CPU in this process and those that it waited for."""
        wall, cpu = self._began
        return {"wall_s": round(time.perf_counter() - wall, 3), "cpu_s": round(_cpu_s() - cpu, 3)}


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@dataclass(frozen=True)
class _Told:
    """What a run found, before it is put together."""

    samples: pd.DataFrame
    scans: pd.DataFrame
    guests: Sequence[Mapping[str, object]]
    events: list[Mapping[str, object]]
    work: Mapping[str, int]


def _manifest(scenario: Scenario, scale: int, clock: _Clock) -> dict[str, Any]:
    versions = {package: package_version(package) for package in _PACKAGES}
    return {
        "engine": f"overcommit {versions['overcommit']}",
        "seed": scenario.seed,
        "scale": scale,
        "digest": scenario.digest(versions["overcommit"]),
        "prices": {host.prices: host.price_set.digest() for host in scenario.hosts},
        "versions": versions,
        **clock.taken(),
        "peak_bytes": _kib("/proc/self/status", "VmHWM") * 1024,
    }


def _result(
    scenario: Scenario, told: _Told, manifest: Mapping[str, Any], others: Mapping[str, int | float | None] | None = None
) -> Result:
    """*others* are metrics that the tables of hosts do not tell."""
    from sim.results import frame, summarise

    guests = frame("guests", told.guests)
    events = sorted(told.events, key=lambda row: float(str(row["time_s"])))
    summary = summarise(told.samples, told.scans, guests) | dict(others or {})
    verdicts = [expectation.check(summary) for expectation in scenario.expect]
    manifest = {**manifest, "work": told.work}
    return Result(scenario, told.samples, told.scans, guests, frame("events", events), manifest, summary, verdicts)


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
