"""What the verbs of a study give in Python: data frames, where the command line prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from sim.document import blamed
from sim.errors import At, UserError
from sim.results import load as load_run
from sim.scenario import load
from sim.study import comparison, whereabouts
from sim.study.comparison import Comparison, Side
from sim.study.solver import Choice, Limit, Probe, choose, limit
from sim.study.sweeps import Progress
from sim.units import SECOND, parse_duration

if TYPE_CHECKING:
    import pandas as pd

    from sim.datacenter.traces import Survey


@dataclass(frozen=True)
class Solved:
    """The answer of `solve`."""

    answer: JsonValue
    """The value, or the settings of the point, that keeps every expectation; None if there is none."""
    binding: Sequence[str]
    """The expectations that the next value breaks; none for a point of a sweep."""
    table: pd.DataFrame
    """One row for each value that was tried: the value or the settings, whether it keeps everything, every metric."""
    runs: int
    """Runs that this took; what was known already is not counted."""


def solve(
    file: str | Path,
    vary: str | None = None,
    *,
    smallest: bool = False,
    minimise: str | None = None,
    maximise: str | None = None,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    out: str | Path = "results",
    jobs: int | None = None,
) -> Solved:
    """Find the largest value (or *smallest*), or the best point of a sweep, that keeps every expectation of *file*.

    *vary* is PATH=LOW..HIGH; *minimise* or *maximise* names the metric by which points of the sweep are compared.
    Runs that have a result in *out* are not run again.
    """
    file, out = Path(file), Path(out)
    metric, largest = wanted(vary, smallest, minimise, maximise)
    if vary:
        return _limit(limit(file, vary, out, jobs, smallest=smallest, overrides=overrides, seed=seed))
    return _choice(choose(load(file, overrides, seed), metric, out, jobs, largest=largest))


def wanted(vary: str | None, smallest: bool, minimise: str | None, maximise: str | None) -> tuple[str, bool]:
    """Return the metric that is searched for, "" if a value is, and whether the most of it. Refuse two searches."""
    if sum(each is not None for each in (vary, minimise, maximise)) != 1:
        raise UserError("say either what to vary, --vary PATH=LOW..HIGH, or one metric to --minimise or --maximise")
    if smallest and not vary:
        raise UserError("--smallest belongs to --vary")
    return maximise or minimise or "", maximise is not None


def _limit(found: Limit) -> Solved:
    binding = [verdict.expectation for verdict in found.binding]
    rows = [{found.path: probe.value, **_told(probe)} for probe in found.probes]
    return Solved(found.best.value if found.best else None, binding, _frame(rows), found.runs)


def _choice(found: Choice) -> Solved:
    rows = []
    for probe in found.probes:
        assert isinstance(probe.value, dict)
        rows.append({**probe.value, **_told(probe)})
    return Solved(found.best.value if found.best else None, [], _frame(rows), found.runs)


def _told(probe: Probe) -> Mapping[str, object]:
    return {"kept": probe.outcome.kept, **(probe.outcome.mean if probe.outcome.summaries else {})}


def compare(
    first: str | Path,
    second: str | Path | None = None,
    *,
    a: Sequence[str] = (),
    b: Sequence[str] = (),
    replications: int | None = None,
    metrics: Sequence[str] = (),
    out: str | Path = "results",
    jobs: int | None = None,
) -> pd.DataFrame:
    """Compare two scenario files or result folders, run by run with equal seeds; return one row per metric.

    *a* and *b* replace values of one side, as in `b=["hosts.0.ksm.smart_scan=0"]`; without *second* both are the same.
    A row's `verdict` is "differs" where the difference is real, by the 95 % interval from `low` to `high`.
    """
    paths = Path(first), Path(second) if second else None
    found = compared(*paths, a, b, replications, metrics, Path(out), jobs)
    return _frame(comparison.told(found)["differences"])


def compared(
    first: Path,
    second: Path | None,
    a: Sequence[str],
    b: Sequence[str],
    replications: int | None,
    metrics: Sequence[str],
    out: Path,
    jobs: int | None,
    progress: Progress | None = None,
) -> Comparison:
    """Run what has no result yet of both sides, and compare them."""
    if second is None and not (a or b):
        raise UserError("there is nothing to compare with; name a second scenario, or settings with --b path=value")

    def side(path: Path, sets: Sequence[str], option: str) -> Side:
        if path.is_dir():
            if sets or replications:
                raise UserError(f"{path}: is a result, which no setting changes; name its scenario file")
            return comparison.kept(path)
        more = [f"replications={replications}"] if replications else []
        with blamed(option, *sets):
            scenario = load(path, [*sets, *more])
        return comparison.side(scenario, " ".join([str(path), *sets]), out, jobs, progress)

    return comparison.compare(side(first, a, "--a"), side(second or first, b, "--b"), metrics)


def explain(folder: str | Path, at: str | None = None, host: str | None = None) -> pd.DataFrame:
    """Tell where the memory of a run's hosts is at a time such as "5min", or at its end, and why no more was saved.

    A row's `of` says what its bytes are a part of: host memory, what guests were promised, or what was not saved.
    """
    try:
        time_s = None if at is None else parse_duration(at) / SECOND
    except At as fault:
        raise UserError(f"at: {fault}") from None
    found = whereabouts.whereabouts(load_run(Path(folder)), time_s, host)
    return _frame([row for each in found for row in _parts(each)])


def _parts(found: whereabouts.Whereabouts) -> Iterator[Mapping[str, object]]:
    for of, parts in (("host memory", found.memory), ("promised", found.guests), ("not saved", found.reasons)):
        yield from ({"host": found.host, "time_s": found.time_s, "of": of, **part._asdict()} for part in parts)


def trace(path: str | Path, options: Sequence[str] = ()) -> Survey:
    """Tell what a recorded trace holds; *options* are those of its entry in a scenario, as in ["every=15min"]."""
    from sim.datacenter.traces import Reading, read_alone

    return Reading(read_alone(Path(path), options)).survey()


def _frame(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows)
