"""`overcommit solve`: find the largest value, or the best point, that keeps every expectation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sim.cli.console import EXIT_UNMET, Console, as_json, table
from sim.cli.options import file_argument, jobs_option, out_option, refuse_unwritable, seed_option, set_option, talks
from sim.cli.run import verdict_row

if TYPE_CHECKING:
    from sim.study.solver import Choice, Limit, Probe


@click.command()
@file_argument
@click.option("--vary", metavar="PATH=LOW..HIGH", help="Find the largest value, as in vms.0.count=1..64.")
@click.option("--smallest", is_flag=True, help="Find the smallest value instead.")
@click.option("--minimise", metavar="METRIC", help="Find the point of the sweep with the least of it.")
@click.option("--maximise", metavar="METRIC", help="Find the point of the sweep with the most of it.")
@set_option
@seed_option
@jobs_option
@out_option
@talks
@click.pass_obj
def solve(
    console: Console,
    file: Path,
    vary: str | None,
    smallest: bool,
    minimise: str | None,
    maximise: str | None,
    overrides: Sequence[str],
    seed: int | None,
    jobs: int | None,
    out: Path,
) -> int:
    """Find the largest value, or the best point of a sweep, that keeps every expectation of FILE.

    With replications, every one must keep it. Runs that have a result already are not run again. Exit code 1 says that
    there is no such value.
    """
    from sim.scenario import load
    from sim.study import solver
    from sim.study.frames import wanted

    metric, largest = wanted(vary, smallest, minimise, maximise)
    refuse_unwritable(out)
    console.kept_so_far = "the runs that are done are kept; the same command goes on from there"
    with console.progress("solve") as progress:
        if vary:
            found = solver.limit(
                file, vary, out, jobs, smallest=smallest, overrides=overrides, seed=seed, progress=progress
            )
            console.data(as_json(_limit_json(found)) if console.json else _limit_text(found, console))
            return 0 if found.best else EXIT_UNMET
        scenario = load(file, overrides, seed)
        chosen = solver.choose(scenario, metric, out, jobs, largest=largest, progress=progress)
    console.data(as_json(_choice_json(chosen)) if console.json else _choice_text(chosen, console))
    return 0 if chosen.best else EXIT_UNMET


def _limit_json(found: Limit) -> Mapping[str, Any]:
    told = [
        {"value": probe.value, "kept": probe.outcome.kept, "results": list(probe.outcome.digests),
         "expectations": [asdict(verdict) for verdict in probe.outcome.verdicts]}
        for probe in found.probes
    ]  # fmt: skip
    return {
        "path": found.path,
        "answer": found.best.value if found.best else None,
        "broken": found.broken.value if found.broken else None,
        "binding": [verdict.expectation for verdict in found.binding],
        "kept_again": [probe.value for probe in found.again],
        "runs": found.runs,
        "probes": told,
    }


def _limit_text(found: Limit, console: Console) -> str:
    """Return what was tried, where the limit is and what sets it; only the answer if quiet."""
    from sim.report.words import listed

    if console.quiet:
        return str(found.best.value) if found.best else "none"
    lines = [_probe_row(probe) for probe in found.probes]
    binding = listed([verdict.expectation for verdict in found.binding])
    match found.best, found.broken:
        case None, broken:
            end = f"no value keeps every expectation: {found.path} {broken.value if broken else ''} breaks {binding}"
        case best, None:
            end = f"{found.path} {best.value} keeps every expectation; the limit is beyond it: widen the range"
        case best, broken:
            end = f"{found.path} {best.value}: {broken.value} breaks {binding}"
    blocks = [table(lines), end]
    if found.again:
        values = listed([str(probe.value) for probe in found.again])
        keep = "keeps" if len(found.again) == 1 else "keep"
        blocks.append(f"there is more than one limit: {values} {keep} every expectation again")
    return "\n\n".join([*blocks, _runs_text(found.runs, len(found.probes))])


def _runs_text(runs: int, probes: int) -> str:
    return f"{probes:,} values in {runs:,} runs" if runs else f"{probes:,} values, all known already"


def _probe_row(probe: Probe) -> Sequence[str]:
    """Return a value that was tried, what became of it, and how near its expectations are to their bounds."""
    shown = ", ".join(f"{name} {each}" for name, each in probe.value.items()) if isinstance(probe.value, dict) else None
    if probe.outcome.failure:
        return shown or str(probe.value), "failed", probe.outcome.failure.text
    told = "; ".join(", ".join(verdict_row(verdict)[1:]) for verdict in probe.unmet or probe.outcome.verdicts)
    return shown or str(probe.value), "kept" if probe.outcome.kept else "broken", told


def _choice_json(found: Choice) -> Mapping[str, Any]:
    points = [
        {"settings": probe.value, "kept": probe.outcome.kept, "results": list(probe.outcome.digests),
         "value": probe.outcome.mean[found.metric] if probe.outcome.summaries else None}
        for probe in found.probes
    ]  # fmt: skip
    return {
        "metric": found.metric,
        "answer": found.best.value if found.best else None,
        "value": found.best.outcome.mean[found.metric] if found.best else None,
        "runs": found.runs,
        "points": points,
    }


def _choice_text(found: Choice, console: Console) -> str:
    from sim.columns import METRICS
    from sim.report.words import amount

    unit = next(metric.unit for metric in METRICS if metric.name == found.metric)
    if found.best is None:
        end = "no point keeps every expectation"
    else:
        what = f"the {'most' if found.largest else 'least'} {found.metric} that keeps every expectation"
        end = f"{_probe_row(found.best)[0]}: {amount(found.best.outcome.mean[found.metric], unit)}, {what}"
    if console.quiet:
        return end
    return "\n\n".join([table(map(_probe_row, found.probes)), end, _runs_text(found.runs, len(found.probes))])
