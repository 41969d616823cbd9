"""Published figures against runs: every figure of some scenarios computed, in processes of this machine, and judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sim.engine import engine
from sim.errors import UserError
from sim.results import Loaded, load
from sim.results.summary import over_hosts
from sim.scenario import Scenario
from sim.scenario import load as read
from sim.scenario.published import Claim, Figure, Moment, Number, Values
from sim.study.sweeps import Failure, Progress, run_left, what_is_left

if TYPE_CHECKING:
    import pandas as pd


class Asked(NamedTuple):
    """A published figure, where it stands, and the digests of its runs."""

    file: Path
    claim: Claim[Scenario]
    first: str
    second: str | None


@dataclass(frozen=True)
class Agenda:
    """The figures to compute, and which of their runs have no result yet."""

    asked: Sequence[Asked]
    out: Path
    left: Mapping[str, Scenario]
    jobs: int
    cpu_seconds: float


@dataclass(frozen=True)
class Row:
    """One published figure and what the simulator has for it."""

    file: Path
    figure: Figure
    simulated: float | None
    """None where the run gives no such figure."""
    failure: Failure | None = None
    """Why there is no run."""

    @property
    def inside(self) -> bool:
        """Whether the simulated figure is inside the band."""
        return self.simulated is not None and self.figure.band.holds(self.simulated, *self.figure.range)

    @property
    def error(self) -> float | None:
        """How far it is from what was published: as a share, or in the figure's unit if the band is."""
        if self.simulated is None:
            return None
        low, high = self.figure.range
        nearest = min(max(self.simulated, low), high)
        difference = self.simulated - nearest
        return difference / abs(nearest) if self.relative else difference

    @property
    def relative(self) -> bool:
        """Whether the error is a share."""
        band = self.figure.band
        return 0 not in self.figure.range and (band.kind != "absolute" or band.amount == 0)

    @property
    def verdict(self) -> str:
        """What the comparison comes to, one of `VERDICTS`."""
        if self.figure.not_modelled:
            return "not modelled"
        if self.figure.fails:
            return "inside, against what it says" if self.inside else "fails"
        if not self.inside:
            return "outside, without a reason"
        return "fitted" if self.figure.fitted else "inside"

    @property
    def honest(self) -> bool:
        """Whether the row says of itself what it does."""
        return self.failure is None and self.verdict in VERDICTS


VERDICTS = ("inside", "fails", "fitted", "not modelled")
"""What an honest row comes to."""


def published(files: Sequence[str | Path], out: str | Path = "results", jobs: int | None = None) -> pd.DataFrame:
    """Compute every published figure of scenario *files*; return one row per figure.

    Runs that have a result in *out* are not run again.
    """
    import pandas as pd

    rows = compute(plan([Path(file) for file in files], Path(out), jobs))
    return pd.DataFrame([told(row) for row in rows])


def plan(files: Sequence[Path], out: Path, jobs: int | None = None, overrides: Sequence[str] = ()) -> Agenda:
    """Read scenario files and find out what is left to run. Raises UserError if none has a published figure."""
    scenarios: dict[str, Scenario] = {}

    def digest(scenario: Scenario) -> str:
        name = scenario.digest(engine())
        scenarios.setdefault(name, scenario)
        return name

    asked = [
        Asked(file, claim, digest(claim.scenario), digest(claim.against) if claim.against else None)
        for file in files
        for claim in read(file, overrides).claims
    ]
    if not asked:
        names = ", ".join(map(str, files))
        raise UserError(f"{names}: no published figure here; write published: with what was measured and by whom")
    return Agenda(asked, out, *what_is_left(scenarios, out, jobs))


def compute(todo: Agenda, progress: Progress | None = None) -> Sequence[Row]:
    """Run what is left and return every figure with what was simulated for it."""
    failures = run_left(todo.left, todo.out, todo.jobs, progress, "runs")
    return [_row(asked, todo.out, failures) for asked in todo.asked]


def _row(asked: Asked, out: Path, failures: Mapping[str, Failure]) -> Row:
    figure = asked.claim.figure
    digests = [digest for digest in (asked.first, asked.second) if digest]
    failure = next((failures[digest] for digest in digests if digest in failures), None)
    if failure:
        return Row(asked.file, figure, None, failure)
    name = asked.claim.scenario.name
    values = [measured(figure, load(Path(out, name, digest))) for digest in digests]
    return Row(asked.file, figure, _compared(values, figure.compared))


def _compared(values: Sequence[float | None], how: str | None) -> float | None:
    if how is None:
        return values[0]
    first, second = values
    if first is None or second is None or (second == 0 and how != "difference"):
        return None
    if how == "difference":
        return first - second
    return first / second if how == "ratio" else 100 * (first / second - 1)


def measured(figure: Figure, run: Loaded) -> float | None:
    """What a run shows for a published figure; None if it shows nothing."""
    rows = _moments(run)
    last = rows.iloc[-1]
    now = last if figure.at is None else _row_at(rows, figure.at)
    if now is None:
        return None
    if figure.since is not None:
        before = _row_at(rows, figure.since)
        if before is None:
            return None
        now = now - before
    values: dict[str, Number | None] = {str(name): float(value) for name, value in now.items()}
    if figure.at is None and figure.since is None:
        values |= _guests(figure, run) | {name: run.summary[name] for name in run.summary}
    return figure.metric.value(_of_names(figure, values))


def _of_names(figure: Figure, values: Values) -> Values:
    """The values of the names in a figure's metric; NaN, a figure that nobody told, is no data."""
    told = ((name, values.get(name)) for name in figure.metric.names)
    return {name: None if value is None or math.isnan(value) else value for name, value in told}


def _moments(run: Loaded) -> pd.DataFrame:
    """Samples, summed over hosts, and the ends of full scans if there is one host, in order of time."""
    import pandas as pd

    rows = run.samples
    if rows["host"].nunique() == 1:
        rows = pd.concat([run.scans, rows]).sort_values("time_s", kind="stable")
        rows = rows.drop_duplicates("time_s", keep="first")
    summed = over_hosts(rows)
    return summed.assign(time_s=summed.index)


def _row_at(rows: pd.DataFrame, moment: Moment) -> pd.Series[float] | None:
    """The first row at a moment; None if it does not come."""
    if moment.time_s is not None:
        found = rows[rows["time_s"] >= moment.time_s]
    else:
        found = rows[[moment.has_come(value) for value in rows[moment.column]]]
    return None if found.empty else found.iloc[0]


def _guests(figure: Figure, run: Loaded) -> dict[str, Number | None]:
    """What the metric names of kinds of guests at the end: sums, and means of percentages."""
    found: dict[str, Number | None] = {}
    for name in figure.metric.names:
        kind, _, column = name.rpartition(".")
        if kind:
            values = run.guests.loc[run.guests["vm"] == kind, column]
            found[name] = float(values.mean() if column.endswith("_percent") else values.sum())
    return found


def told(row: Row) -> Mapping[str, object]:
    """A row as plain data."""
    low, high = (None if math.isinf(end) else end for end in row.figure.range)
    return {
        "scenario": row.file.stem,
        "source": row.figure.source,
        "figure": row.figure.figure,
        "unit": row.figure.unit,
        "published_low": low,
        "published_high": high,
        "simulated": row.simulated,
        "error": row.error,
        "band": row.figure.band.text,
        "verdict": row.verdict if row.failure is None else row.failure.text,
        "assumed": row.figure.assumed,
        "reason": row.figure.fitted or row.figure.fails or row.figure.not_modelled,
    }
