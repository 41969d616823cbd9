"""The simulator against the kernel: counters at every full scan, times, and CPU, live and against recordings.

`pytest tests/kernel/test_fidelity.py --record` makes the recordings anew.
"""

import json
import platform
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sim.columns import KSM_COUNTERS, PAGE_BYTES
from sim.lab.record import Rate
from sim.lab.replay import replay, workload
from sim.run import run
from sim.scenario import Scenario, load

HERE = Path(__file__).parent
RECORDINGS = HERE / "recordings"
STATIC = sorted(path.stem for path in (HERE / "cases/static").glob("*.yaml"))
CHANGING = sorted(path.stem for path in (HERE / "cases/changing").glob("*.yaml"))
COUNTERS = [column.name for column in KSM_COUNTERS if column.name != "full_scans"]
RUNS = 3
"""Kernel runs that span the spread of a changing case, and attempts at an undisturbed run of a static one."""
TOLERANCE = 0.01
"""Share of the pages by which a changing case may leave the kernel's spread."""
PACE = 0.05
"""Share by which the kernel's scans may be slower or faster for a changing case to say anything."""

Source = Callable[[str], list[pd.DataFrame]]


@lru_cache
def scenario(case: str) -> Scenario:
    """The scenario of a case."""
    (path,) = HERE.glob(f"cases/*/{case}.yaml")
    return load(path)


@lru_cache
def simulated(case: str) -> pd.DataFrame:
    """The simulator's scans, one row per full scan."""
    return numbered(run(scenario(case)).scans)


@lru_cache
def live(case: str) -> list[pd.DataFrame]:
    """This machine's scans: three runs of a changing case, an undisturbed one of a static case."""
    if case in CHANGING:
        runs = [numbered(replay(scenario(case)).scans) for _ in range(RUNS)]
        if not all(keeps_pace(case, scans) for scans in runs):
            pytest.skip("ksmd scans more slowly here than where its prices were measured: its scans see more writes")
        return runs
    for _ in range(RUNS):
        before = migrations()
        scans = numbered(replay(scenario(case)).scans)
        if migrations() == before and in_step(case, scans):
            return [scans]
    pytest.skip(f"in {RUNS} runs ksmd was late for what happens between two scans, or pages migrated: machine too busy")


@lru_cache
def recorded(case: str) -> list[pd.DataFrame]:
    """The scans of earlier runs."""
    runs = pd.read_csv(RECORDINGS / f"{case}.csv.gz", index_col=["unmerges", "full_scans"])
    return [scans.drop(columns="run") for _, scans in runs.groupby("run")]


def numbered(scans: pd.DataFrame) -> pd.DataFrame:
    """Scans by their number and how often it was set back before by run = 2."""
    unmerges = (scans["full_scans"].diff() < 0).cumsum().rename("unmerges")
    return scans.drop(columns="host").set_index([unmerges, "full_scans"])


def migrations() -> int:
    """Pages that the kernel has moved: ksmd overlooks a page on its move and forgets its item."""
    fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(fields["pgmigrate_success"])


def in_step(case: str, scans: pd.DataFrame) -> bool:
    """Whether everything planned happened between the same two scans as in the simulation."""
    plan = workload(scenario(case))
    times = [action.time_ns for action in plan.actions if not isinstance(action, Rate)]
    times += [moment for guest in plan.guests for moment in (guest.start_ns, guest.stop_ns) if moment]
    seconds = np.array(times) / 1e9
    return np.array_equal(*(np.searchsorted(each["time_s"], seconds) for each in (scans, simulated(case))))


def keeps_pace(case: str, scans: pd.DataFrame) -> bool:
    """Whether the kernel's scans end about when the simulated ones do: then each has seen the same writes."""
    last = simulated(case).index.intersection(scans.index)[-1]
    times = scans.loc[last, "time_s"], simulated(case).loc[last, "time_s"]
    return len(scans) >= 0.9 * len(simulated(case)) and max(times) <= (1 + PACE) * min(times)


def keep(case: str, runs: list[pd.DataFrame]) -> None:
    """Make the recording of a case."""
    frame = pd.concat([scans.assign(run=number) for number, scans in enumerate(runs)])
    frame = frame[["run", "time_s", *COUNTERS, "ksmd_cpu_ns", "proven"]]
    frame.to_csv(RECORDINGS / f"{case}.csv.gz", compression={"method": "gzip", "mtime": 0})
    about = {"kernel": platform.release(), "machine": platform.machine(), "cpu": cpu_model()}
    (RECORDINGS / "machine.json").write_text(json.dumps(about, indent=1) + "\n")


def cpu_model() -> str:
    """What the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


@pytest.fixture(params=[pytest.param(live, marks=pytest.mark.kernel), recorded], ids=["live", "recorded"])
def kernel_runs(request: pytest.FixtureRequest) -> Iterator[Source]:
    """Where the kernel's answer comes from."""
    recording = request.config.getoption("--record", False)
    if recording and request.param is recorded:
        pytest.skip("the recordings are being made")

    def ask(case: str) -> list[pd.DataFrame]:
        runs: list[pd.DataFrame] = request.param(case)
        if recording:
            keep(case, runs)
        return runs

    yield ask


@pytest.mark.parametrize("case", STATIC)
def test_unchanging_memory_has_the_kernels_counters_at_every_full_scan(case: str, kernel_runs: Source) -> None:
    (measured,) = kernel_runs(case)
    proven = measured[measured["proven"]]
    common = simulated(case).index.intersection(proven.index)

    assert len(common) >= max(4, 0.9 * len(measured.index.intersection(simulated(case).index)))
    pd.testing.assert_frame_equal(simulated(case).loc[common, COUNTERS], proven.loc[common, COUNTERS])


@pytest.mark.parametrize("case", CHANGING)
def test_changing_memory_stays_inside_the_kernels_own_spread(case: str, kernel_runs: Source) -> None:
    runs = kernel_runs(case)
    common = simulated(case).index
    for measured in runs:
        common = common.intersection(measured.index)
    pages = runs[0]["pages_scanned"].iloc[0]
    slack = pd.Series(TOLERANCE * pages, COUNTERS)
    slack["general_profit"] *= PAGE_BYTES
    values = [measured.loc[common, COUNTERS] for measured in runs]
    lowest, highest = np.minimum.reduce(values) - slack.to_numpy(), np.maximum.reduce(values) + slack.to_numpy()
    actual = simulated(case).loc[common, COUNTERS]

    outside = actual[(actual < lowest) | (actual > highest)].dropna(how="all").dropna(axis=1, how="all")
    assert len(common) >= 5
    assert outside.empty, f"outside of the kernel's {RUNS} runs:\n{outside}"


@pytest.mark.parametrize("case", [*STATIC, *CHANGING])
def test_full_scans_take_as_long_as_the_kernels(case: str, report: Callable[[str], None]) -> None:
    """Within 3 %, but for what the price set makes ksmd's CPU time differ, which is reported.

    Only against recordings, which are made on a quiet machine: other work delays ksmd.
    """
    (measured, *_) = recorded(case)
    last = simulated(case).index.intersection(measured.index)[-1]
    (time, cpu), (real_time, real_cpu) = (
        each.loc[last, ["time_s", "ksmd_cpu_ns"]] for each in (simulated(case), measured)
    )
    report(
        f"{case:22} {last[1]:4} scans  {real_time:7.3f} s ({time / real_time - 1:+6.1%})  "
        f"ksmd {real_cpu / 1e6:7.1f} ms ({cpu / real_cpu - 1:+6.1%})"
    )

    assert time == pytest.approx(real_time, abs=0.03 * real_time + abs(cpu - real_cpu) / 1e9)
