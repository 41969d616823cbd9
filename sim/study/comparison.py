"""Two scenarios against each other: runs paired by seed, and which differences are more than chance."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sim.columns import HEADLINES, METRICS, Metric
from sim.errors import UserError, suggestion
from sim.results import Loaded, Summary, load
from sim.scenario import Scenario
from sim.scenario.points import DERIVED
from sim.study.intervals import CONFIDENCE, FEW, Interval, interval
from sim.study.outcomes import outcomes
from sim.study.sweeps import Progress

Verdict = Literal["same", "tolerated", "differs", "perhaps", "not shown", "one pair", "no data"]

_RUNS = "manifest.json"


@dataclass(frozen=True)
class Side:
    """One of the two: its runs by seed."""

    name: str
    runs: Mapping[int, Summary]
    scenario: Scenario | None
    """Whose tolerances hold; none for a folder that came from elsewhere."""


@dataclass(frozen=True)
class Difference:
    """How one metric differs, second less first."""

    metric: Metric
    first: float | None
    second: float | None
    interval: Interval | None
    verdict: Verdict

    @property
    def real(self) -> bool:
        """Whether it is there, chance left out."""
        return self.verdict == "differs"


@dataclass(frozen=True)
class Comparison:
    """All metrics of two sides."""

    first: Side
    second: Side
    seeds: Sequence[int]
    """What both have run."""
    differences: Sequence[Difference]
    tested: int
    """How many metrics could differ by chance: the intervals that decide are so much wider that all of them hold
    together with 95 %."""

    @property
    def remarks(self) -> Sequence[str]:
        """What a reader has to know of the figures."""
        pairs, alone = len(self.seeds), len({*self.first.runs, *self.second.runs}) - len(self.seeds)
        told = [
            f"{pairs} pairs of runs with equal seeds" if pairs > 1 else "one pair of runs: nothing is known of chance"
        ]
        if alone:
            told.append(f"{alone} runs are in no pair and left out")
        if 1 < pairs < FEW:
            told.append(f"fewer than {FEW} pairs show only large differences")
        if self.tested > 1:
            told.append(
                f"{self.tested} metrics were tested: by chance about {self.tested * (1 - CONFIDENCE):.1g} intervals of "
                f"95 % would leave out 0; what differs does so at {1 - (1 - CONFIDENCE) / self.tested:.2%} (Bonferroni)"
            )
        return told


def side(scenario: Scenario, name: str, out: Path, jobs: int | None, progress: Progress | None = None) -> Side:
    """Run what has no result yet. Raises what ended the first run that failed."""
    [outcome], _ = outcomes([scenario], out, jobs, progress)
    if outcome.failure:
        raise outcome.failure.error(name)
    seeds = [run.seed for run in scenario.runs]
    return Side(name, dict(zip(seeds, outcome.summaries, strict=True)), scenario)


def kept(folder: Path) -> Side:
    """The runs of a result folder: one, or all in it if they differ in nothing but the seed."""
    if (folder / _RUNS).exists() or not folder.is_dir():
        runs = [load(folder)]
    else:
        runs = [load(each.parent) for each in sorted(folder.glob(f"*/{_RUNS}")) if not each.parent.name.startswith(".")]
    if not runs:
        raise UserError(f"{folder}: no run here; name a scenario file, a run, or a folder of runs")
    kinds: dict[str, list[Loaded]] = defaultdict(list)
    for run in runs:
        asked = {name: value for name, value in run.scenario.items() if name not in ("seed", *DERIVED)}
        kinds[json.dumps(asked, sort_keys=True)].append(run)
    if len(kinds) > 1:
        some = ", ".join(each[0].folder.name for each in kinds.values())
        raise UserError(f"{folder}: holds runs of {len(kinds)} different scenarios; name one of them, such as {some}")
    return Side(str(folder), {int(run.manifest["seed"]): run.summary for run in runs}, None)


def compare(first: Side, second: Side, metrics: Sequence[str] = ()) -> Comparison:
    """Pair the runs of both sides by seed. Raises UserError if none has a partner."""
    seeds = [seed for seed in first.runs if seed in second.runs]
    if not seeds:
        raise UserError(f"{first.name} and {second.name}: no run of one has the seed of a run of the other")
    known = {metric.name: metric for metric in METRICS}
    for name in metrics:
        if name not in known:
            raise UserError(f"--metric {name}: unknown metric; {suggestion(name, known)}")
    chosen = [known[name] for name in metrics] or HEADLINES
    pairs = {
        metric: [(first.runs[seed].get(metric.name), second.runs[seed].get(metric.name)) for seed in seeds]
        for metric in chosen
    }
    tested = sum(_by_chance(values) for values in pairs.values())
    told = [_difference(metric, values, tested, first.scenario) for metric, values in pairs.items()]
    return Comparison(first, second, seeds, told, tested)


def _by_chance(values: Sequence[tuple[float | None, float | None]]) -> bool:
    """Whether the differences scatter."""
    return len({b - a for a, b in values if a is not None and b is not None}) > 1


def _difference(
    metric: Metric, values: Sequence[tuple[float | None, float | None]], tested: int, scenario: Scenario | None
) -> Difference:
    both = [(a, b) for a, b in values if a is not None and b is not None]
    firsts, seconds = [a for a, _ in both], [b for _, b in both]
    if len(both) < len(values):
        return Difference(metric, None, None, None, "no data")
    first, second = interval(firsts).mean, interval(seconds).mean
    told = interval([b - a for a, b in both])
    strict = interval([b - a for a, b in both], 1 - (1 - CONFIDENCE) / max(tested, 1))
    return Difference(metric, first, second, told, _verdict(metric, first, second, told, strict, scenario, len(both)))


def _verdict(
    metric: Metric, first: float, second: float, told: Interval, strict: Interval, scenario: Scenario | None, pairs: int
) -> Verdict:
    if told.mean == 0 and (pairs == 1 or told.low == told.high):
        return "same"
    if scenario and metric.name in scenario.tolerances and scenario.tolerance(metric.name).holds(first, second):
        return "tolerated"
    if pairs == 1:
        return "one pair"
    return "differs" if strict.sure else "perhaps" if told.sure else "not shown"


def told(comparison: Comparison) -> Mapping[str, Any]:
    """The comparison as plain data."""
    return {
        "first": comparison.first.name,
        "second": comparison.second.name,
        "pairs": len(comparison.seeds),
        "tested": comparison.tested,
        "remarks": list(comparison.remarks),
        "differences": [
            {
                "metric": each.metric.name, "first": each.first, "second": each.second,
                "difference": each.interval.mean if each.interval else None,
                "low": _finite(each.interval, "low"), "high": _finite(each.interval, "high"), "verdict": each.verdict,
            }
            for each in comparison.differences
        ],
    }  # fmt: skip


def _finite(found: Interval | None, end: str) -> float | None:
    value = getattr(found, end) if found else None
    return None if value in (None, float("inf"), float("-inf")) else value
