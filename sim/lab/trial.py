"""Trials: a scenario in the simulator and on the kernel, as often as a fair comparison needs.

A run that other work on the machine disturbed is made again. How fast this machine is does not matter for counters:
where its ksmd is slower or faster than the price set says, the simulator is run at the kernel's pace as well.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pandas as pd

from sim.errors import MachineError
from sim.lab import pressure
from sim.lab.compare import (
    LEAST,
    VAGUE,
    Comparison,
    Scans,
    compare,
    in_step,
    keeps_pace,
    numbered,
    pace,
    write_recording,
)
from sim.lab.pressure import PressureTrial
from sim.lab.record import Disturbance, Rate, Workload, Write, moments_ns
from sim.lab.replay import first_host, replay, workload
from sim.run import Progress
from sim.scenario import Scenario
from sim.sharing.ksm import Ksm
from sim.sharing.ksm_pass import BATCH_VISITS, PAGES_SCANNED, PHASE, WORKING
from sim.sharing.room import Site
from sim.sharing.scanner import Scanner
from sim.streams import key as stream_key
from sim.units import SECOND

RUNS: Final = 3
"""Kernel runs that span the spread of changing memory."""
ATTEMPTS: Final = 3
"""Attempts at a run that nothing disturbs."""
_DRAWS: Final = 5
"""Simulated runs that span the simulator's spread where guests write at random."""
_LATE_NS: Final = 50_000_000
"""What guests may be late, in ns: those that write at the same moment share cores, and take their turns."""
_WAITED: Final = 0.02
_STOLEN: Final = 0.1


class Busy(MachineError):
    """Other work on this machine disturbed every attempt at a run."""


@dataclass(frozen=True)
class Trial:
    """A scenario on both sides; `pace` is how many times its price ksmd's work was given."""

    scenario: Scenario
    simulated: Sequence[Scans]
    measured: Sequence[Scans]
    comparison: Comparison
    pace: float = 1.0

    def told(self) -> dict[str, Any]:
        """The figures as plain data."""
        comparison = self.comparison
        return {
            "faults": comparison.faults(),
            "exact": comparison.exact,
            "full_scans": comparison.scans,
            "pages": comparison.pages,
            "kernel_runs": len(self.measured),
            "pace": self.pace,
            "counters": comparison.counters.to_dict("index"),
            "scan_time_s": asdict(comparison.time),
            "ksmd_cpu_ns": asdict(comparison.cpu),
        }

    def write_recording(self, file: Path) -> None:
        """Keep the kernel's runs as a compressed CSV file; equal runs give equal bytes."""
        write_recording(self.measured, file)


def is_static(plan: Workload) -> bool:
    """Whether no guest writes after its start, in small pages: then the simulator knows every counter of the kernel.

    What is left of huge pages of which a split unmaps the zeros depends on how contents are sorted, for a scan.
    """
    return not plan.thp and not any(isinstance(action, Write | Rate) for action in plan.actions)


def live(
    scenario: Scenario, runs: int | None = None, exact: bool | None = None, progress: Progress | None = None
) -> Trial | PressureTrial:
    """Run the scenario on this machine's kernel and hold the simulator against it."""
    if pressure.is_short(scenario):
        return pressure.live(scenario, runs, progress)
    return scanned(scenario, runs, exact, progress)


def scanned(
    scenario: Scenario, runs: int | None = None, exact: bool | None = None, progress: Progress | None = None
) -> Trial:
    """The same of a scenario without pressure, whose counters are compared at every full scan.

    The kernel runs once where counters must be *exact*, which is where memory is static unless given, and RUNS times
    elsewhere, or twice as often before the simulator is called wrong.
    Raises MachineError where this machine cannot do it, Busy where other work disturbs it.
    """
    plan = workload(scenario)
    exact = is_static(plan) if exact is None else exact
    moments = moments_s(plan)
    runs = runs or (1 if exact else RUNS)

    def tell(number: int) -> Progress | None:
        return progress and (lambda done, text: progress((number + done) / runs, f"{text}, run {number + 1} of {runs}"))

    for _ in range(ATTEMPTS):
        made = [_undisturbed(scenario, number, moments, tell(number)) for number in range(runs)]
        trial = judge(scenario, [scans for scans, _ in made], exact)
        if not exact or not trial.comparison.counter_faults():
            break
        planned = visited(scenario, trial.pace)
        if all(planned == where for _, where in made):
            break
    else:
        raise Busy(
            f"{scenario.name}: this machine is too busy for a comparison, in {ATTEMPTS} runs ksmd was at other pages "
            "than planned when something happened; try again when less is running"
        )
    if not exact and trial.comparison.counter_faults():
        # So few runs seldom show the whole spread of the kernel. Where more of them do not cover it, it is no chance.
        made += [_undisturbed(scenario, number, moments, tell(number - runs)) for number in range(runs, 2 * runs)]
        trial = judge(scenario, [scans for scans, _ in made], exact)
    faulty = bool(trial.comparison.counter_faults())
    if not exact and faulty and not all(keeps_pace(trial.simulated[0], scans) for scans, _ in made):
        raise Busy(
            f"{scenario.name}: this machine is too busy for a comparison, its scans came at other times than its own "
            "pace says, and saw other writes; try again when less is running"
        )
    if trial.comparison.expected < LEAST:
        raise Busy(
            f"{scenario.name}: ksmd ended {trial.comparison.expected} scans in time, which is too few to compare; "
            "try again when less is running, or make the scenario longer"
        )
    if not exact and trial.comparison.spread > VAGUE:
        raise Busy(
            f"{scenario.name}: this machine is too busy for a comparison, its own runs differ by "
            f"{trial.comparison.spread:.0%} of the pages; try again when less is running"
        )
    return trial


def judge(scenario: Scenario, measured: Sequence[Scans], exact: bool) -> Trial:
    """Hold the simulator against runs of the kernel."""
    plan = workload(scenario)
    draws = range(_DRAWS if _writes_at_random(plan) else 1)
    simulated = [simulate(scenario, draw) for draw in draws]
    factor = _pace(simulated[0], measured, moments_s(plan), exact)
    paced = [simulate(scenario, draw, factor) for draw in draws] if factor != 1.0 else []
    return Trial(scenario, paced or simulated, measured, compare(simulated, measured, exact, paced), factor)


def simulate(scenario: Scenario, draw: int = 0, factor: float = 1.0) -> Scans:
    """The scenario's scans; another *draw* has other random writes, *factor* multiplies the prices of ksmd's work."""
    return numbered(pd.DataFrame(first_host(scenario, _varied(draw, factor)).run().scans))


def visited(scenario: Scenario, factor: float = 1.0) -> list[int]:
    """Pages that ksmd has visited at each planned moment, but for a batch under way, as the kernel counts them."""
    machine = first_host(scenario, _varied(0, factor))
    found: list[int] = []

    def note() -> Generator[Any, Any, None]:
        for moment in moments_ns(workload(scenario)):
            yield machine.env.timeout(moment - machine.env.now)
            n = cast(Scanner, machine.scanner).k.n
            found.append(int(n[PAGES_SCANNED] - (n[BATCH_VISITS] if n[PHASE] == WORKING else 0)))

    machine.env.process(note())
    machine.run()
    return found


def _varied(draw: int, factor: float) -> type[Scanner]:
    class Varied(Scanner):
        """A scanner with other random numbers and other prices."""

        def __init__(self, settings: Ksm, site: Site) -> None:
            prices = np.rint(site.work_ps * factor).astype(np.int64)
            super().__init__(settings, replace(site, work_ps=prices, key=_redrawn(site.key, draw)))

        def add(self, guest: int, pages: int, *, key: int, **named: Any) -> None:
            """A guest starts."""
            super().add(guest, pages, key=_redrawn(key, draw), **named)

    return Varied


def disturbances(what: Disturbance, duration_ns: int) -> Iterator[str]:
    """What was bad enough about a run to change its counters, in words."""
    if what.migrated_pages:
        yield f"the kernel moved {what.migrated_pages} pages, which ksmd overlooks meanwhile"
    if what.ksmd_waited_ns > _WAITED * duration_ns:
        yield f"ksmd waited {what.ksmd_waited_ns / 1e6:.0f} ms for a core"
    if what.deeds_late_ns > _LATE_NS:
        yield f"a guest was {what.deeds_late_ns / 1e6:.0f} ms late"


def _undisturbed(
    scenario: Scenario, draw: int, moments: Sequence[float], progress: Progress | None
) -> tuple[Scans, Sequence[int]]:
    """Scans of a run of the kernel, and where ksmd was at each moment; Busy when each attempt was disturbed."""
    reasons: list[str] = []
    for _ in range(ATTEMPTS):
        run = replay(scenario, progress, draw=draw)
        scans = numbered(run.scans.join(run.evidence))
        reasons = [*disturbances(run.disturbance, scenario.duration), *_stolen(scans, scenario.duration)]
        if not reasons and not _steps_with(scenario, scans, moments):
            reasons = ["ksmd was between other scans than planned when something happened"]
        if not reasons:
            return scans, run.visited
    raise Busy(
        f"{scenario.name}: this machine is too busy for a comparison, {ATTEMPTS} runs were disturbed: "
        f"in the last one {' and '.join(reasons)}; try again when less is running"
    )


def _stolen(scans: Scans, duration_ns: int) -> Iterator[str]:
    """Whether the hypervisor gave ksmd's core to others for too long, in words."""
    stolen_ns = float(scans["stolen_ns"].max())
    if stolen_ns > _STOLEN * duration_ns:
        yield f"the hypervisor took ksmd's core away for {stolen_ns / 1e6:.0f} ms"


def _steps_with(scenario: Scenario, scans: Scans, moments: Sequence[float]) -> bool:
    """Whether what is planned falls between the same scans in the simulator, at its own pace or at the kernel's."""
    simulated = simulate(scenario)
    if in_step(simulated, scans, moments):
        return True
    return in_step(simulate(scenario, factor=pace(simulated, scans)), scans, moments)


def _pace(simulated: Scans, measured: Sequence[Scans], moments: Sequence[float], exact: bool) -> float:
    """What prices must be multiplied with so that the simulator's scans see what the kernel's do."""
    if all(in_step(simulated, scans, moments) and (exact or keeps_pace(simulated, scans)) for scans in measured):
        return 1.0
    return float(np.mean([pace(simulated, scans) for scans in measured]))


def moments_s(plan: Workload) -> list[float]:
    """When something is planned to happen that one scan sees and the scan before does not, in s."""
    return [moment / SECOND for moment in moments_ns(plan)]


def _writes_at_random(plan: Workload) -> bool:
    return any(isinstance(action, Rate) for action in plan.actions)


def _redrawn(key: int, draw: int) -> int:
    return stream_key(key, "draw", draw) if draw else key
