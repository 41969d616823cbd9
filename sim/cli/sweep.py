"""`overcommit sweep`: run every point of a sweep, and tell what to set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sim.cli.console import EXIT_UNMET, Console, as_json, table
from sim.cli.options import (
    cluster_option,
    file_argument,
    jobs_option,
    out_option,
    refuse_both,
    refuse_unwritable,
    report_option,
    seed_option,
    set_option,
    talks,
)

if TYPE_CHECKING:
    from sim.study import Plan, Swept


@click.command()
@file_argument
@set_option
@seed_option
@jobs_option
@cluster_option
@out_option
@report_option
@talks
@click.pass_obj
def sweep(
    console: Console,
    file: Path,
    overrides: Sequence[str],
    seed: int | None,
    jobs: int | None,
    cluster: str | None,
    out: Path,
    with_report: bool,
) -> int:
    """Run every point of FILE's sweep, keep each result, and show what to set.

    Points that have a result already are not run again. The last line printed is the folder of the table of all points.
    """
    from sim.scenario import load
    from sim.study import plan, run_points

    scenario = load(file, overrides, seed)
    refuse_unwritable(out)
    refuse_both(jobs, cluster)
    todo = plan(scenario, out, jobs, cluster)
    console.say(_plan_text(todo))
    console.kept_so_far = "the points that are done are kept; the same command goes on from there"
    with console.progress(scenario.name) as progress:
        swept = run_points(todo, progress)
    console.kept = swept.folder
    if with_report and swept.axes:
        from sim.report.sweep_page import write

        write(swept)
    console.data(_sweep_json(swept) if console.json else _sweep_text(swept, console))
    unmet = 0 if swept.table["met"].all() else EXIT_UNMET
    return max([unmet, *(failure.exit_code for failure in swept.failures.values())])


def _plan_text(todo: Plan) -> str:
    from sim.units import SECOND, about_duration

    points, runs = len(todo.digests), len({digest for replicas in todo.replicas for digest in replicas})
    text = f"{points:,} points" if todo.scenario.replications == 1 else f"{points:,} points in {runs:,} runs"
    if len(todo.left) < runs:
        text += f", {runs - len(todo.left):,} of them known"
    if todo.left:
        where = f"on the cluster at {todo.cluster}" if todo.cluster else f"in {todo.jobs} processes"
        text += f"; about {about_duration(todo.cpu_seconds * SECOND)} of CPU time {where}"
    return text


def _sweep_json(swept: Swept) -> str:
    from sim.report.sweep_page import conclusion

    points = swept.table.astype(object).where(swept.table.notna(), None).to_dict("records")
    said = conclusion(swept) if swept.axes else _intervals_text(swept)
    told = {"result": str(swept.folder), "conclusion": said, "axes": list(swept.axes), "points": points}
    if swept.intervals is not None:
        told["intervals"] = swept.intervals.replace([float("inf"), float("-inf")], None).to_dict("records")
    return as_json(told)


def _sweep_text(swept: Swept, console: Console) -> str:
    """Return one line for each point, what failed, and last the folder of the table."""
    from sim.report.sweep_page import conclusion, rows

    if console.quiet:
        return str(swept.folder)
    blocks = [conclusion(swept), table(rows(swept))] if swept.axes else []
    if swept.intervals is not None:
        blocks += [table(_interval_rows(swept)), _intervals_text(swept)]
    return "\n\n".join([*blocks, str(swept.folder)])


def _intervals_text(swept: Swept) -> str:
    """Say of how many runs the means are, and what that is worth."""
    from sim.study.intervals import FEW

    runs, intervals = swept.scenario.replications, swept.intervals
    text = f"means of {runs} replications with 95 % t intervals"
    if intervals is not None and not intervals.empty and (intervals["low"] == intervals["high"]).all():
        return f"{text}; all runs are alike, for nothing in this scenario is random"
    return f"{text}; fewer than {FEW} say little" if runs < FEW else text


def _interval_rows(swept: Swept) -> Iterator[Sequence[str]]:
    """Yield the intervals of what is expected, and of gain and cost; of each point."""
    from sim.columns import METRICS
    from sim.report.words import amount

    assert swept.intervals is not None
    units = {metric.name: metric.unit for metric in METRICS}
    expected = [each.metric.name for each in (*swept.scenario.expect, *swept.scenario.warn)]
    shown = {"consolidation_ratio", "cpu_overhead_percent", *expected}
    for row in swept.intervals.to_dict("records"):
        name = row["metric"]
        if name in shown:
            where = [str(swept.table[axis].iloc[row["point"]]) for axis in swept.axes]
            mean, low, high = (amount(row[each], units[name]) for each in ("mean", "low", "high"))
            yield *where, name, mean, f"{low} to {high}"
