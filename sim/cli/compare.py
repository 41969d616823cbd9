"""`overcommit compare`: say which differences between two scenarios are real."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sim.cli.console import EXIT_UNMET, Console, as_json, table
from sim.cli.options import jobs_option, out_option, refuse_unwritable, talks

if TYPE_CHECKING:
    from sim.study.comparison import Comparison, Difference


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", required=False, type=click.Path(path_type=Path))
@click.option("--a", "first_set", multiple=True, metavar="PATH=VALUE", help="Replace one value of the first.")
@click.option("--b", "second_set", multiple=True, metavar="PATH=VALUE", help="Replace one value of the second.")
@click.option("--replications", type=click.IntRange(1, 1000), help="Runs of each; what the scenarios say unless given.")
@click.option(
    "--metric", "metrics", multiple=True, metavar="NAME", help="Compare this metric; all headlines otherwise."
)
@jobs_option
@out_option
@talks
@click.pass_obj
def compare(
    console: Console,
    first: Path,
    second: Path | None,
    first_set: Sequence[str],
    second_set: Sequence[str],
    replications: int | None,
    metrics: Sequence[str],
    jobs: int | None,
    out: Path,
) -> int:
    """Compare two scenarios, or results, and say which differences are real.

    FIRST and SECOND are scenario files or folders of results; without SECOND the same scenario with other settings.
    Runs are paired by seed, so that both met the same random numbers. Exit code 1 says that a difference is real.
    """
    from sim.study import comparison
    from sim.study.frames import compared

    refuse_unwritable(out)
    console.kept_so_far = "the runs that are done are kept; the same command goes on from there"
    with console.progress("compare") as progress:
        found = compared(first, second, first_set, second_set, replications, metrics, out, jobs, progress)
    if console.json:
        console.data(as_json(comparison.told(found)))
    else:
        console.data(_comparison_text(found, console))
    return EXIT_UNMET if any(each.real for each in found.differences) else 0


def _comparison_text(found: Comparison, console: Console) -> str:
    """Return a line for each metric, which side is which, and what there is to know of the figures."""
    from sim.report.words import amount, listed

    def row(each: Difference) -> Sequence[str]:
        unit, told = each.metric.unit, each.interval
        figures = [amount(value, unit) for value in (each.first, each.second, told.mean if told else None)]
        ends = f"{amount(told.low, unit)} to {amount(told.high, unit)}" if told and len(found.seeds) > 1 else ""
        return each.metric.name, *figures, ends, each.verdict

    real = [each.metric.name for each in found.differences if each.real]
    end = f"real differences: {listed(real)}" if real else "no difference is shown to be real"
    if console.quiet:
        return end
    header = ("", "A", "B", "B - A", "95 % interval", "")
    shown = [each for each in found.differences if each.verdict not in ("same", "no data")]
    same = len(found.differences) - len(shown)
    sides = f"A: {found.first.name}\nB: {found.second.name}"
    remarks = [*found.remarks, *([f"{same} metrics are the same or have no data"] if same else [])]
    blocks = [table([header, *map(row, shown)])] if shown else []
    return "\n\n".join([sides, *blocks, "; ".join(remarks), end])
