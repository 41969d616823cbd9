"""Searches: the most of something that keeps every expectation, and the best point of a sweep that does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from pydantic import JsonValue

from sim.columns import METRICS
from sim.document import blamed, dump_line
from sim.errors import At, Problem, UserError, suggestion
from sim.scenario import Scenario, load
from sim.scenario.expect import Verdict
from sim.scenario.ranges import Range
from sim.study.outcomes import Outcome, outcomes
from sim.study.sweeps import Progress

_PROBES: Final = 3
"""Values tried in each round, whatever the number of processes, so that the answer does not depend on that. One would
be bisection, which never sees an expectation that is met, broken and met again."""


class Probe(NamedTuple):
    """A value that was tried."""

    value: JsonValue
    outcome: Outcome

    @property
    def unmet(self) -> Sequence[Verdict]:
        """The expectations that it breaks."""
        return [verdict for verdict in self.outcome.verdicts if verdict.failed]


@dataclass(frozen=True)
class Limit:
    """How far a value can go."""

    path: str
    best: Probe | None
    """The last value before the first that breaks an expectation; none if the first does so."""
    broken: Probe | None
    """The first value found to break one; none if none does."""
    probes: Sequence[Probe]
    """All that was tried, in order of the values."""
    runs: int
    """Runs that this took; what was known already is not counted."""

    @property
    def again(self) -> Sequence[Probe]:
        """Values beyond the first broken one that keep every expectation: the answer is not all there is to say."""
        values = [probe.value for probe in self.probes]
        first = values.index(self.broken.value) if self.broken else len(values)
        return [probe for probe in self.probes[first:] if probe.outcome.kept]

    @property
    def binding(self) -> Sequence[Verdict]:
        """What the first broken value breaks."""
        return self.broken.unmet if self.broken else []


@dataclass(frozen=True)
class Choice:
    """The best point of a sweep."""

    metric: str
    largest: bool
    best: Probe | None
    """None if no point keeps every expectation."""
    probes: Sequence[Probe]
    runs: int


def limit(
    file: Path,
    vary: str,
    out: Path,
    jobs: int | None = None,
    *,
    smallest: bool = False,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    progress: Progress | None = None,
) -> Limit:
    """Find the largest value (or *smallest*) that keeps every expectation of a scenario file; *vary* is PATH=LOW..HIGH.

    Raises what ended the first run that failed, and UserError for a scenario that expects nothing.
    """
    path, steps = _asked(vary)

    def scenario(number: int) -> Scenario:
        value = f"{path}={dump_line(steps.value(number))}"
        with blamed("--vary", value):
            return load(file, [*overrides, value], seed)

    # From the end that is to be kept to the one that is to break.
    order = range(steps.last, -1, -1) if smallest else range(steps.last + 1)
    if not scenario(order[0]).expect:
        raise UserError(f"{file}: expects nothing, so no value is too large; write expect: with what must hold")
    tried: dict[int, Probe] = {}
    runs = 0

    def probe(places: Sequence[int]) -> None:
        nonlocal runs
        found, count = outcomes([scenario(order[place]) for place in places], out, jobs, progress)
        runs += count
        for place, outcome in zip(places, found, strict=True):
            value = steps.value(order[place])
            if outcome.failure:
                raise outcome.failure.error(f"{path}={value}")
            tried[place] = Probe(value, outcome)

    _search(len(order), probe, lambda place: tried[place].outcome.kept)
    kept, broken = _ends(tried)
    best = tried[kept] if kept is not None else None
    return Limit(
        path, best, tried.get(broken) if broken is not None else None, [tried[each] for each in sorted(tried)], runs
    )


def _asked(vary: str) -> tuple[str, Range]:
    path, equals, text = vary.partition("=")
    if not equals or not path:
        raise UserError(
            Problem(file=f"--vary {vary}", message="must be PATH=LOW..HIGH", remedy="for example vms.0.count=1..64")
        )
    try:
        return path, Range.parse(text)
    except At as fault:
        raise UserError(Problem(file=f"--vary {vary}", message=fault.message, remedy=fault.remedy)) from None


def _search(count: int, probe: Callable[[Sequence[int]], None], kept: Callable[[int], bool]) -> None:
    """Probe places 0 to *count* - 1 until the first broken one is next to the one before it."""
    probe([0, count - 1])
    known = [0, count - 1]
    while True:
        broken = next((place for place in known if not kept(place)), None)
        if not broken:
            return  # all that is known is kept, or the very first is broken
        before = known[known.index(broken) - 1]
        between = range(before + 1, broken)
        if not between:
            return
        places = sorted({between[len(between) * part // (_PROBES + 1)] for part in range(1, _PROBES + 1)})
        probe(places)
        known = sorted({*known, *places})


def _ends(tried: Mapping[int, Probe]) -> tuple[int | None, int | None]:
    """The last kept place before the first broken one, and that."""
    broken = next((place for place in sorted(tried) if not tried[place].outcome.kept), None)
    kept = [place for place in tried if broken is None or place < broken]
    return max(kept, default=None), broken


def choose(
    scenario: Scenario, metric: str, out: Path, jobs: int | None = None, *, largest: bool = False,
    progress: Progress | None = None,
) -> Choice:  # fmt: skip
    """Find the point of a sweep with the least (or *largest*) of a metric among those that keep every expectation.

    A point that fails is passed over. Of equals, the first in the sweep is taken.
    """
    known = [each.name for each in METRICS]
    if metric not in known:
        raise UserError(f"unknown metric {metric}; {suggestion(metric, known)}")
    if not scenario.points:
        raise UserError(f"{scenario.name}: has nothing to search; name --vary PATH=LOW..HIGH, or write a sweep")
    again = {"replications": scenario.replications}
    found, runs = outcomes([point.scenario.model_copy(update=again) for point in scenario.points], out, jobs, progress)
    probes = [Probe(dict(point.settings), each) for point, each in zip(scenario.points, found, strict=True)]

    def size(probe: Probe) -> float:
        value = probe.outcome.mean[metric]
        assert value is not None
        return -value if largest else value

    fit = [each for each in probes if each.outcome.kept and each.outcome.mean[metric] is not None]
    return Choice(metric, largest, min(fit, key=size, default=None), probes, runs)
