"""`overcommit run`: simulate a scenario, keep its result, and tell what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import click

from sim.cli.console import EXIT_UNMET, WIDTH, Console, as_json, table
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
from sim.errors import UserError

if TYPE_CHECKING:
    from sim.columns import Metric
    from sim.lab.replay import Replay
    from sim.run import Result
    from sim.scenario.expect import Verdict


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
def run(
    console: Console,
    file: Path,
    overrides: Sequence[str],
    seed: int | None,
    jobs: int | None,
    cluster: str | None,
    out: Path,
    with_report: bool,
) -> int:
    """Simulate FILE, keep the result, and check its expectations.

    The hosts of a datacenter are spread over processes or over a cluster. The last line printed is the folder of the
    result.
    """
    from sim.limits import processors
    from sim.run import run as simulate
    from sim.scenario import load
    from sim.sizing import estimate

    scenario = load(file, overrides, seed)
    refuse_both(jobs, cluster)
    if (jobs or cluster is not None) and not scenario.datacenter:
        raise UserError(
            f"{scenario.name}: --jobs and --cluster spread the hosts of a datacenter, and this scenario has none; "
            "leave them out"
        )
    refuse_unwritable(out)
    if scenario.points:
        console.say(
            f"this runs the scenario as it stands; its sweep of {len(scenario.points):,} points: overcommit sweep"
        )
    elif scenario.replications > 1:
        console.say(f"this runs the scenario once; its {scenario.replications:,} replications: overcommit sweep")
    if console.verbose:
        console.say(table(estimate(scenario).rows()))
    with console.progress(scenario.name) as progress:
        result = simulate(scenario, progress, jobs or processors(), cluster)
    return keep_result(result, out, with_report, console)


def keep_result(result: Result | Replay, out: Path, with_report: bool, console: Console) -> int:
    """Keep a result, print it, and return whether its expectations are met as an exit code."""
    from sim.results import write  # pandas comes last: its memory would add to the simulation's

    console.kept = write(result, out)
    if with_report:
        from sim.report import write as write_report

        write_report(result, console.kept)
    met = not any(verdict.failed for verdict in result.verdicts)
    console.data(_run_json(result, console.kept, met) if console.json else _run_text(result, console))
    return 0 if met else EXIT_UNMET


def _run_json(result: Result | Replay, folder: Path, met: bool) -> str:
    verdicts = [asdict(verdict) for verdict in result.verdicts]
    return as_json({"result": str(folder), "met": met, "summary": dict(result.summary), "expectations": verdicts})


def _run_text(result: Result | Replay, console: Console) -> str:
    """Return the conclusion, the headline metrics, the expectations, and last the folder of the result."""
    from sim.report.words import conclusion, headlines, measured, telling, uncertainty

    if console.quiet:
        return str(console.kept)
    blocks = [conclusion(result.samples, result.guests, result.summary)]
    bars = result.manifest.get("error", {})
    if bars:
        blocks.append(uncertainty(result.manifest["scale"], bars, result.summary))
    real = str(result.manifest.get("engine")).startswith("kernel")
    shown = [each for each in headlines(result.summary) if not real or result.summary[each.name] is not None]
    told, rest = (shown, []) if console.verbose else telling(shown, result.summary)
    blocks.append(table(
        (each.name, measured(result.summary[each.name], bars.get(each.name), each.unit), each.meaning) for each in told
    ))  # fmt: skip
    blocks += ["\n".join(fill(line, width=WIDTH, subsequent_indent="  ") for line in rest)] if rest else []
    if result.verdicts:
        blocks.append(table(map(verdict_row, result.verdicts)))
    if console.verbose:
        blocks.append(table((name, str(value)) for name, value in result.manifest.items()))
    return "\n\n".join([*blocks, str(console.kept)])


def verdict_row(verdict: Verdict) -> Sequence[str]:
    from sim.report.words import amount
    from sim.scenario.expect import Expectation

    metric: Metric = Expectation.parse(verdict.expectation).metric
    actual, margin = amount(verdict.actual, metric.unit), amount(verdict.margin, metric.unit)
    unmet = "NOT MET" if verdict.severity == "error" else "warning"
    return "met" if verdict.met else unmet, verdict.expectation, f"actual {actual}", f"margin {margin}"
