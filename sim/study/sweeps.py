"""A sweep: every point of a scenario's `sweep` run once, here or on a cluster, and one table of them all."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from platform import node
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from sim import files
from sim.cluster import connected
from sim.columns import METRICS
from sim.document import dump, dump_line
from sim.engine import engine
from sim.errors import At, MachineError, OvercommitError, UserError
from sim.limits import available_bytes, processors
from sim.results import Summary, kept_summary
from sim.results.store import locked, read_summary
from sim.results.summary import mean, over_hosts
from sim.results.tables import parquet_bytes, read_parquet
from sim.run import Result, check_size
from sim.run import run as simulate
from sim.scenario import Scenario
from sim.sizing import estimate
from sim.study.intervals import interval
from sim.study.workers import Died, run_all

if TYPE_CHECKING:
    import pandas as pd

Outcome = TypeVar("Outcome")
Progress = Callable[[float, str], None]

TABLE: Final = "points.parquet"
REPLICATIONS: Final = "replications.parquet"
INTERVALS: Final = "intervals.parquet"
TIMELINE: Final = "timeline.parquet"
FOLLOWED: Final = (
    "guests_running", "mem_used_bytes", "mem_swapped_bytes", "oom_kills", "psi_some_ns", "scan_cpu_ns", "merge_cpu_ns",
    "source_cpu_ns", "cow_cpu_ns", "kswapd_cpu_ns", "reclaim_cpu_ns", "swap_cpu_ns", "tlb_cpu_ns",
)  # fmt: skip
"""Columns of samples that are kept for every point of a sweep with phases."""
_BUG: Final = 3
_FRACTIONS: Final = ("ratio", "%", "s")
"""Units of metrics that need not be whole numbers."""


class Failure(NamedTuple):
    """Why a point has no result."""

    exit_code: int
    text: str
    trace: str = ""
    """The traceback of a bug."""

    def error(self, where: str) -> OvercommitError:
        """The failure as an exception, with what it is about."""
        kinds = {kind.exit_code: kind for kind in (UserError, MachineError)}
        return kinds.get(self.exit_code, OvercommitError)(f"{where}: {self.text}\n{self.trace}".strip())


@dataclass(frozen=True)
class Plan:
    """What a sweep is going to do, known before it starts."""

    scenario: Scenario
    out: Path
    digests: Sequence[str]
    """Name of each point's result; of its first replication."""
    replicas: Sequence[Mapping[str, int]]
    """Seed of each replication of each point, by the name of its result."""
    left: Mapping[str, Scenario]
    """Points that have no result yet, by digest."""
    jobs: int
    cpu_seconds: float
    """CPU time that they will take together, about."""
    cluster: str | None = None
    """Address of the Dask scheduler whose workers run them; None is this machine."""

    @property
    def folder(self) -> Path:
        """Where the table of all points goes."""
        digest = blake2b("\n".join([dump(self.scenario.resolved()), *self.digests]).encode(), digest_size=6)
        return self.out / self.scenario.name / f"sweep-{digest.hexdigest()}"


@dataclass(frozen=True)
class Swept:
    """A finished sweep."""

    plan: Plan
    table: pd.DataFrame
    """One row per point: the axes, the metrics, and how it ended."""
    failures: Mapping[str, Failure]
    """By digest."""
    timeline: pd.DataFrame | None = None
    """What became of each point over time, if the scenario has phases: `point`, its row in the table, `time_s` and
    the columns FOLLOWED, summed over hosts."""
    replications: pd.DataFrame | None = None
    """One row per replication of each point, if there are several: `point`, its row in the table, `replication`, its
    `seed` and result, and the metrics."""
    intervals: pd.DataFrame | None = None
    """One row per point and metric then: mean, ends of the 95 % t interval, and of how many runs."""

    @property
    def scenario(self) -> Scenario:
        """The scenario that was swept."""
        return self.plan.scenario

    @property
    def axes(self) -> Sequence[str]:
        """Columns of the table that are paths of the scenario."""
        return axes_of(self.scenario)

    @property
    def folder(self) -> Path:
        """Where the table is."""
        return self.plan.folder


def sweep(
    scenario: Scenario, out: str | Path = "results", jobs: int | None = None, cluster: str | None = None
) -> pd.DataFrame:
    """Run every point of a scenario's sweep that has no result in *out* yet; return one row per point.

    A row has the value of each axis, every metric, `met` (whether all expectations are), `digest` (the folder of its
    result) and `error` (why it has none).
    """
    return run_points(plan(scenario, Path(out), jobs, cluster)).table


def axes_of(scenario: Scenario) -> Sequence[str]:
    """Paths that a sweep varies."""
    return list(scenario.points[0].settings) if scenario.points else []


def plan(scenario: Scenario, out: Path, jobs: int | None = None, cluster: str | None = None) -> Plan:
    """Find out what is left to do. Raises UserError or MachineError if a point cannot be run here.

    Whether the machines of a cluster have room for a point is found there.
    """
    if not scenario.points and scenario.replications == 1:
        raise UserError(f"{scenario.name}: has no sweep; write sweep: with a path and the values that it takes")
    points = [{run.digest(engine()): run for run in point.runs} for point in _scenarios(scenario)]
    runs = {digest: run for point in points for digest, run in point.items()}
    left, jobs, cpu_seconds = what_is_left(runs, out, jobs, here=cluster is None)
    replicas = [{digest: run.seed for digest, run in point.items()} for point in points]
    digests = [next(iter(point)) for point in points]
    return Plan(scenario, out, digests, replicas, left, jobs, cpu_seconds, cluster)


def _scenarios(scenario: Scenario) -> Sequence[Scenario]:
    """What stands at each point, with its replications; without a sweep the scenario is the only point."""
    found = [point.scenario.model_copy(update={"replications": scenario.replications}) for point in scenario.points]
    return found or [scenario]


def what_is_left(
    scenarios: Mapping[str, Scenario], out: Path, jobs: int | None, here: bool = True
) -> tuple[Mapping[str, Scenario], int, float]:
    """Return those *scenarios*, by digest, that have no result in *out*, in how many processes, and their CPU time (s).

    Raises UserError or MachineError if one cannot be run here.
    """
    left = {digest: each for digest, each in scenarios.items() if kept_summary(each.name, digest, out) is None}
    needs = [check_size(each) if here else estimate(each) for each in left.values()]
    jobs = min(jobs or processors(), max(len(left), 1))
    largest = sorted((need.memory_bytes for need in needs), reverse=True)
    while jobs > 1 and sum(largest[:jobs]) > available_bytes():
        jobs -= 1
    return left, jobs, sum(need.cpu_seconds for need in needs)


def run_points(todo: Plan, progress: Progress | None = None) -> Swept:
    """Run what is left, keep each result as soon as it is there, and write the table of all points.

    *progress* is told the share done and what was done last. A point that fails is noted and the others go on.
    """
    failed = run_left(todo.left, todo.out, todo.jobs, progress, "points", todo.cluster)
    names = {digest: todo.scenario.name for point in todo.replicas for digest in point}
    summaries, failures = kept(names, todo.out, failed)
    replications = _replications(todo, summaries, failures) if todo.scenario.replications > 1 else None
    swept = Swept(
        todo, _table(todo, summaries, failures), failures, _timeline(todo) if todo.scenario.phases else None,
        replications, None if replications is None else _intervals(replications),
    )  # fmt: skip
    _write(swept)
    return swept


def run_left(
    left: Mapping[str, Scenario],
    out: Path,
    jobs: int,
    progress: Progress | None,
    noun: str,
    cluster: str | None = None,
) -> Mapping[str, Failure]:
    """Run scenarios, keep each result in *out* as soon as it is there; return, by digest, what failed."""
    failures: dict[str, Failure] = {}
    ended = _run_here(left, out, jobs) if cluster is None else _run_there(left, out, cluster)
    for done, (digest, failure) in enumerate(ended, 1):
        if failure:
            failures[digest] = failure
        if progress:
            progress(done / len(left), f"{done} of {len(left)} {noun}")
    return failures


def kept(
    names: Mapping[str, str], out: Path, failures: Mapping[str, Failure]
) -> tuple[Mapping[str, Summary], Mapping[str, Failure]]:
    """Return, by digest, the summaries of runs with these scenarios' *names*, and why the others have none.

    What had a result a moment ago may be gone, or the disk may refuse to read it.
    """
    found, missing = dict[str, Summary](), dict(failures)
    for digest, name in names.items():
        if digest not in failures:
            try:
                found[digest] = read_summary(name, digest, out)
            except UserError as error:
                missing[digest] = Failure(error.exit_code, str(error))
    return found, missing


def _run_here(left: Mapping[str, Scenario], out: Path, jobs: int) -> Iterator[tuple[str, Failure | None]]:
    """Run scenarios in processes of this machine, each of which keeps its results."""
    digests = list(left)
    for number, outcome in run_all(_run_point, [(scenario, out) for scenario in left.values()], jobs):
        yield digests[number], Failure(_BUG, outcome.reason) if isinstance(outcome, Died) else outcome


def _run_there(left: Mapping[str, Scenario], out: Path, address: str) -> Iterator[tuple[str, Failure | None]]:
    """Run scenarios on a cluster, and keep the results here."""
    from sim.results import write

    digests = list(left)
    if not digests:
        return
    with connected(address) as cluster:
        for number, result in cluster.run_all(_find, [(scenario, digest) for digest, scenario in left.items()]):
            failure = None
            if result is None:
                failure = Failure(_BUG, "one worker after the other died of it, for lack of memory perhaps")
            elif isinstance(result, Failure):
                failure = result
            elif isinstance(kept := _attempted(partial(write, result, out)), Failure):
                failure = kept
            yield digests[number], failure


def _run_point(task: tuple[Scenario, Path]) -> Failure | None:
    """Run one point and keep its result."""
    from sim.results import write

    scenario, out = task
    if kept_summary(scenario.name, scenario.digest(engine()), out) is not None:
        return None  # another command came first
    kept = _attempted(lambda: write(_simulated(scenario), out))
    return kept if isinstance(kept, Failure) else None


def _find(task: tuple[Scenario, str]) -> Result | Failure:
    """Run one point on a machine that may have other files."""
    scenario, digest = task
    try:
        fault = "" if scenario.digest(engine()) == digest else "some differ there"
    except (At, OSError) as error:
        fault = str(error)
    if fault:
        return Failure(
            UserError.exit_code, f"worker on {node()}: has not the images and prices of this scenario: {fault}"
        )
    return _attempted(lambda: _simulated(scenario))


def _simulated(scenario: Scenario) -> Result:
    # VmHWM, the peak in the manifest, is to be this point's and not that of one before it in this process.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return simulate(scenario)


def _attempted(do: Callable[[], Outcome]) -> Outcome | Failure:
    """What comes of it, or why nothing does."""
    try:
        return do()
    except OvercommitError as error:
        return Failure(error.exit_code, str(error))
    except MemoryError:
        return Failure(MachineError.exit_code, "not enough memory")
    except Exception as error:
        return Failure(_BUG, f"a bug: {type(error).__name__}: {error}", traceback.format_exc())


def _table(todo: Plan, kept: Mapping[str, Summary], failures: Mapping[str, Failure]) -> pd.DataFrame:
    """One row per point, in order: axes, how it ended, metrics; their means if there are replications."""
    import pandas as pd

    scenario = todo.scenario
    columns: dict[str, Any] = {
        path: _column([point.settings[path] for point in scenario.points]) for path in axes_of(scenario)
    }
    found = [[kept.get(digest) for digest in point] for point in todo.replicas]
    columns["digest"] = list(todo.digests)
    columns["error"] = [
        next((failures[digest].text for digest in point if digest in failures), "") for point in todo.replicas
    ]
    columns["met"] = [
        all(summary and not any(each.failed for each in point.judge(summary)) for summary in summaries)
        for point, summaries in zip(_scenarios(scenario), found, strict=True)
    ]
    means = [mean(list(filter(None, summaries))) if all(summaries) else None for summaries in found]
    return pd.DataFrame({**columns, **_metrics(means, replicated=scenario.replications > 1)})


def _metrics(summaries: Sequence[Summary | None], *, replicated: bool = False) -> Mapping[str, pd.Series[Any]]:
    """A column for each metric. Means need not be whole numbers."""
    import pandas as pd

    found = {}
    for metric in METRICS:
        whole = metric.unit not in _FRACTIONS and not replicated
        dtype: Any = "Int64" if whole else "float64"  # the one has NA for no data, the other NaN
        found[metric.name] = pd.Series([summary and summary[metric.name] for summary in summaries], dtype=dtype)
    return found


def _replications(todo: Plan, kept: Mapping[str, Summary], failures: Mapping[str, Failure]) -> pd.DataFrame:
    import pandas as pd

    rows = [
        {"point": point, "replication": number, "seed": seed, "digest": digest,
         "error": failures[digest].text if digest in failures else ""}
        for point, replicas in enumerate(todo.replicas)
        for number, (digest, seed) in enumerate(replicas.items())
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**_metrics([kept.get(str(row["digest"])) for row in rows]))


def _intervals(replications: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    def row(point: object, metric: str, values: Sequence[float]) -> Mapping[str, object]:
        found = interval(values)
        return {"point": point, "metric": metric, **found._asdict(), "runs": len(values)}

    rows = [
        row(point, metric.name, values)
        for point, runs in replications.groupby("point")
        for metric in METRICS
        if (values := [float(value) for value in runs[metric.name].dropna()])
    ]
    return pd.DataFrame(rows, columns=["point", "metric", "mean", "low", "high", "runs"])


def _timeline(todo: Plan) -> pd.DataFrame:
    """What became over time of the points that have a result."""
    import pandas as pd

    files = [Path(todo.out, todo.scenario.name, digest, "samples.parquet") for digest in todo.digests]
    found = {number: over_hosts(read_parquet(file)) for number, file in enumerate(files) if file.exists()}
    parts = [
        pd.DataFrame({"point": number, **samples[list(FOLLOWED)]}).reset_index() for number, samples in found.items()
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["time_s", "point", *FOLLOWED])


def _column(values: Sequence[object]) -> Sequence[object]:
    """The values of an axis: numbers as they are; a block by its `name` if it has one; all else as text."""
    if len({type(value) for value in values}) == 1 and isinstance(values[0], int | float):
        return values
    return [_text(value) for value in values]


def _text(value: object) -> str:
    if isinstance(value, Mapping) and "name" in value:
        return str(value["name"])
    if isinstance(value, Mapping | list):
        return dump_line(value)
    return "none" if value is None else str(value)


def _write(swept: Swept) -> None:
    """Write the table, the scenario and what failed, each file whole or not at all."""
    import pyarrow as pa

    units = {metric.name: metric for metric in METRICS}
    content = pa.Table.from_pandas(swept.table, preserve_index=False)
    told = [
        each.with_metadata({"unit": units[each.name].unit, "meaning": units[each.name].meaning})
        if each.name in units else each
        for each in content.schema
    ]  # fmt: skip
    traces = [f"{digest}: {each.text}\n{each.trace}" for digest, each in swept.failures.items()]
    parts = {REPLICATIONS: swept.replications, INTERVALS: swept.intervals, TIMELINE: swept.timeline}
    tables = {
        name: pa.Table.from_pandas(each, preserve_index=False) for name, each in parts.items() if each is not None
    }
    with files.explained(swept.folder), locked(swept.folder.parent):
        swept.folder.mkdir(parents=True, exist_ok=True)
        files.heal(swept.folder)
        for name, table in {TABLE: content.cast(pa.schema(told)), **tables}.items():
            files.publish(swept.folder / name, parquet_bytes(table))
        files.publish(swept.folder / "scenario.yaml", dump(swept.scenario.resolved()).encode())
        files.publish(swept.folder / "errors.txt", "\n".join(traces).encode(errors="backslashreplace"))
