"""Guests whose memory is limited, in the simulator and on the kernel: pages swapped in and out, and time lost to it.

A run is the table of its samples; figures count from its first sample, at which guests hold what they start with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from sim import files
from sim.lab.compare import Figure, Vector, compressed
from sim.lab.replay import first_host, replay
from sim.run import Progress
from sim.scenario import Scenario
from sim.units import SECOND

RUNS: Final = 3
"""Kernel runs that span the kernel's spread."""
_DRAWS: Final = 3
"""Simulated runs, with other random accesses each, whose mean is held against the kernel's."""
REQUIRED: Final[Mapping[str, float]] = {
    "pswpin": 0.15,
    "pswpout": 0.15,
    "psi_some_ns": 0.25,
    "psi_full_ns": 0.25,
    "mem_pool_bytes": 0.05,
}
"""Figures that must be the kernel's, and the share of its mean by which they may differ; or they lie in its spread.

`mem_pool_bytes` is that of guests that were just filled: later zram's pool has gaps, which are not simulated.
"""
TOLD: Final = (
    "workingset_refault_anon",
    "workingset_activate_anon",
    "pgscan",
    "pgsteal",
    "pgmajfault",
    "swap_ra",
    "swap_ra_hit",
    "pages_shared",
    "pages_sharing",
)
"""Other figures that are shown."""
_LEVELS: Final = ("swap_used_bytes", "stall_s", "progress_percent")
"""The same, of figures that say how things are at the end: `stall_s` of all guests, `progress_percent` their mean."""
_FILLED: Final = "mem_pool_bytes"
_AT_END: Final = "mem_pool_bytes_at_end"
FIGURES: Final = (*REQUIRED, *TOLD, *_LEVELS)

Samples = pd.DataFrame


@dataclass(frozen=True)
class Amount(Figure):
    """One figure over a whole run: the mean of the simulated runs, and the kernel's range."""

    @property
    def agrees(self) -> bool:
        """Whether it is near enough to the kernel's mean, or inside the kernel's spread."""
        return abs(self.error) <= self.allowed or self.lowest <= self.simulated <= self.highest


@dataclass(frozen=True)
class Pressure:
    """What became of one scenario: figures by name, those that must agree first."""

    figures: Mapping[str, Amount]

    def faults(self) -> list[str]:
        """What is outside the tolerances, in words; empty when simulator and kernel agree."""
        return [
            f"{name} {figure.error:+.1%} (allowed {figure.allowed:.0%})"
            for name, figure in self.figures.items()
            if name in REQUIRED and not figure.agrees
        ]


@dataclass(frozen=True)
class PressureTrial:
    """A scenario with limited memory on both sides."""

    scenario: Scenario
    simulated: Sequence[Samples]
    measured: Sequence[Samples]
    comparison: Pressure

    def told(self) -> dict[str, Any]:
        """The figures as plain data."""
        figures = {name: {**asdict(each), "agrees": each.agrees} for name, each in self.comparison.figures.items()}
        return {"faults": self.comparison.faults(), "kernel_runs": len(self.measured), "figures": figures}

    def write_recording(self, file: Path) -> None:
        """Keep the kernel's runs as a compressed CSV file; equal runs give equal bytes."""
        frame = pd.concat([samples.assign(run=number) for number, samples in enumerate(self.measured)])
        files.publish(file, compressed(frame.to_csv(index=False)))


def is_short(scenario: Scenario) -> bool:
    """Whether the scenario limits the memory of guests, and so is about pressure."""
    return any(vm.memory_limit is not None for vm in scenario.vms)


def live(scenario: Scenario, runs: int | None = None, progress: Progress | None = None) -> PressureTrial:
    """Run the scenario on this machine's kernel and hold the simulator against it."""
    count = runs or RUNS

    def tell(number: int) -> Progress | None:
        return progress and (
            lambda done, text: progress((number + done) / count, f"{text}, run {number + 1} of {count}")
        )

    return judge(scenario, [_measured(scenario, number, tell(number)) for number in range(count)])


def judge(scenario: Scenario, measured: Sequence[Samples]) -> PressureTrial:
    """Hold the simulator against runs of the kernel."""
    simulated = [simulate(scenario, draw) for draw in range(_DRAWS)]
    return PressureTrial(scenario, simulated, measured, compare(simulated, measured))


def compare(simulated: Sequence[Samples], measured: Sequence[Samples]) -> Pressure:
    """Hold simulated runs against the kernel's."""
    common = set.intersection(*(set(run.columns) for run in (*simulated, *measured)))
    figures = {name: _amount(name, simulated, measured) for name in FIGURES if name in common}
    if _FILLED in common:
        figures[_AT_END] = _amount(_AT_END, simulated, measured)
    return Pressure(
        {name: each for name, each in figures.items() if name in REQUIRED or each.highest or each.simulated}
    )


def simulate(scenario: Scenario, draw: int = 0) -> Samples:
    """The scenario's samples; another *draw* has other random accesses."""
    report = first_host(scenario.model_copy(update={"seed": scenario.seed + draw})).run()
    return _kept(pd.DataFrame(report.samples), pd.DataFrame(report.guests))


def read_recording(file: Path) -> list[Samples]:
    """The runs in a file that `PressureTrial.write_recording` wrote."""
    return [samples.drop(columns="run") for _, samples in pd.read_csv(file).groupby("run")]


def _measured(scenario: Scenario, draw: int, progress: Progress | None) -> Samples:
    run = replay(scenario, progress, draw=draw)
    ends = [(each.stalled_ns / SECOND, 100 * each.progress) for each in run.farewells.values()]
    return _kept(run.readings, pd.DataFrame(ends, columns=["stall_s", "progress_percent"]))


def _kept(samples: pd.DataFrame, guests: pd.DataFrame) -> Samples:
    """The figures of a run, those that only guests tell at their end in every row."""
    ends = {"stall_s": guests["stall_s"].sum(), "progress_percent": guests["progress_percent"].mean()}
    return samples[["time_s", *(name for name in FIGURES if name in samples)]].assign(**ends)


def _amount(name: str, simulated: Sequence[Samples], measured: Sequence[Samples]) -> Amount:
    ours = float(np.mean([_value(run, name) for run in simulated]))
    theirs = [_value(run, name) for run in measured]
    mean = float(np.mean(theirs))
    error = ours / mean - 1 if mean else float(ours > 0)
    return Amount(ours, min(theirs), max(theirs), error, REQUIRED.get(name, 0.0))


def _value(run: Samples, name: str) -> float:
    """A figure at the start or the end, or what it grew by."""
    if name == _FILLED:
        return float(run[_FILLED].iloc[0])
    values = run[_FILLED if name == _AT_END else name]
    first = 0.0 if name in (*_LEVELS, _AT_END) else float(values.iloc[0])
    return float(values.iloc[-1]) - first


def since_start(run: Samples, name: str) -> Vector:
    """What a figure grew by up to each sample."""
    values: Vector = run[name].to_numpy(float)
    grown: Vector = values - values[0]
    return grown
