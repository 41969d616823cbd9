"""The simulator against the kernel: counters at every full scan, times and CPU, and what limited guests swap.

`pytest tests/kernel/test_fidelity.py --record` makes the recordings anew.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from sim.lab import pressure
from sim.lab.pressure import PressureTrial
from sim.lab.recordings import keep, kept
from sim.lab.trial import Busy, Trial, scanned
from sim.scenario import Scenario, load

HERE = Path(__file__).parent
RECORDINGS = HERE / "recordings"
STATIC = sorted(path.stem for path in (HERE / "cases/static").glob("*.yaml"))
CHANGING = sorted(path.stem for path in (HERE / "cases/changing").glob("*.yaml"))
PRESSURE = sorted(path.stem for path in (HERE / "cases/pressure").glob("*.yaml"))

DIFFERENT = {
    "phases-file": "a page that was written to a file stays in memory until reclaim comes by again, and the job that "
    "wants it back finds it there: the simulator frees it when it is written"
}
"""Cases under pressure in which the simulator is known to differ, and why."""

Source = Callable[[str], Trial]

_too_busy: list[str] = []
_MOST_IN_VAIN = 6


@lru_cache
def scenario(case: str) -> Scenario:
    """The scenario of a case."""
    (path,) = HERE.glob(f"cases/*/{case}.yaml")
    return load(path)


@lru_cache
def on_this_machine(case: str) -> Trial:
    """The case on this machine's kernel: one run that must be met exactly, or three that span a spread.

    Each attempt on a busy machine takes its time, so after some cases in vain the others are not tried.
    """
    if len(_too_busy) >= _MOST_IN_VAIN:
        pytest.skip(f"not tried: this machine was too busy for {', '.join(_too_busy)}")
    try:
        return scanned(scenario(case), exact=case in STATIC)
    except Busy as busy:
        _too_busy.append(case)
        pytest.skip(str(busy))


@lru_cache
def recorded(case: str) -> Trial:
    """The case on the kernel that the recordings are of."""
    trial = kept(scenario(case), RECORDINGS, exact=case in STATIC)
    assert isinstance(trial, Trial)
    return trial


@pytest.fixture(params=[pytest.param(on_this_machine, marks=pytest.mark.kernel), recorded], ids=["live", "recorded"])
def kernel(request: pytest.FixtureRequest) -> Iterator[Source]:
    """Where the kernel's answer comes from."""
    recording = request.config.getoption("--record", False)
    if recording and request.param is recorded:
        pytest.skip("the recordings are being made")

    def ask(case: str) -> Trial:
        trial: Trial = request.param(case)
        if recording:
            keep(trial, RECORDINGS)
        return trial

    yield ask


@pytest.mark.parametrize("case", STATIC)
def test_unchanging_memory_has_the_kernels_counters_at_every_full_scan(case: str, kernel: Source) -> None:
    comparison = kernel(case).comparison

    assert comparison.exact
    assert comparison.counter_faults() == [], f"simulated, where it differs:\n{comparison.outside}"


@pytest.mark.parametrize("case", CHANGING)
def test_changing_memory_stays_inside_the_kernels_own_spread(case: str, kernel: Source) -> None:
    comparison = kernel(case).comparison

    assert comparison.counter_faults() == [], f"simulated, where it differs:\n{comparison.outside}"


@pytest.mark.parametrize("case", [*STATIC, *CHANGING])
def test_full_scans_take_as_long_as_the_kernels(case: str, report: Callable[[str], None]) -> None:
    """Within 3 %, but for what the price set makes ksmd's CPU time differ, which is reported.

    Only against recordings, which are made on a quiet machine: other work delays ksmd.
    """
    time, cpu = recorded(case).comparison.time, recorded(case).comparison.cpu
    report(
        f"{case:26} {time.highest:7.3f} s ({time.error:+6.1%})  ksmd {cpu.highest / 1e6:7.1f} ms ({cpu.error:+6.1%})"
    )

    priced = max(0.0, cpu.simulated - cpu.highest, cpu.lowest - cpu.simulated) / 1e9
    assert time.lowest * 0.97 - priced - time.stolen <= time.simulated <= time.highest * 1.03 + priced


def under_pressure(case: str, request: pytest.FixtureRequest) -> dict[str, str]:
    """Figures of the case that are outside their tolerances, in words."""
    if request.config.getoption("--record", False):
        keep(pressure.live(scenario(case)), RECORDINGS)
    return _held(case)


@lru_cache
def _held(case: str) -> dict[str, str]:
    trial = kept(scenario(case), RECORDINGS)
    assert isinstance(trial, PressureTrial)
    assert trial.comparison.figures.keys() >= {"pswpin", "pswpout", "psi_some_ns", "psi_full_ns"}
    return {fault.split()[0]: fault for fault in trial.comparison.faults()}


@pytest.mark.parametrize("case", PRESSURE)
def test_limited_guests_swap_and_wait_as_the_kernels_do(case: str, request: pytest.FixtureRequest) -> None:
    """Against recordings: how long the kernel's disk takes depends on what else this machine does."""
    found = [fault for name, fault in under_pressure(case, request).items() if name != "mem_pool_bytes"]

    if case in DIFFERENT and found:
        pytest.xfail(f"{DIFFERENT[case]}: {', '.join(found)}")
    assert found == []


@pytest.mark.parametrize("case", [case for case in PRESSURE if case.endswith("-zram")])
def test_zram_takes_as_much_memory_as_the_kernels(case: str) -> None:
    assert "mem_pool_bytes" not in _held(case)


@pytest.mark.kernel
def test_a_limited_guest_swaps_and_waits_as_on_this_machines_kernel() -> None:
    comparison = pressure.live(scenario("loop-zram"), runs=1).comparison

    assert [fault for fault in comparison.faults() if fault.startswith("psw")] == []
