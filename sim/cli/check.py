"""`overcommit check`: hold scenarios to what they expect, for people and for CI servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sim.cli.console import EXIT_UNMET, Console, as_json, table
from sim.cli.options import (
    cluster_option,
    jobs_option,
    out_option,
    refuse_both,
    refuse_unwritable,
    scenario_files,
    shard,
    talks,
)
from sim.errors import UserError

if TYPE_CHECKING:
    from sim.study.checks import Checked, Finding


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@jobs_option
@cluster_option
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write JUnit XML for a CI server.")
@click.option("--github", is_flag=True, help="Print workflow commands, which GitHub shows beside the lines.")
@click.option(
    "--baseline", type=click.Path(path_type=Path), metavar="DIR", help="Compare all metrics with those in DIR."
)
@click.option("--update", is_flag=True, help="Write the metrics to the baseline instead.")
@click.option("--shard", callback=shard, metavar="I/N", help="Check only the I-th of N parts of the files.")
@click.option("--exit-zero", is_flag=True, help="End with 0 also if something is not met.")
@out_option
@talks
@click.pass_obj
def check(
    console: Console,
    paths: Sequence[Path],
    jobs: int | None,
    cluster: str | None,
    junit: Path | None,
    github: bool,
    baseline: Path | None,
    update: bool,
    shard: tuple[int, int],
    exit_zero: bool,
    out: Path,
) -> int:
    """Check the expectations of scenario PATHS, or of all in a folder, and tell actual values and margins.

    What stands under `expect` must be met, what stands under `warn` should be. A metric without data is not met. With
    replications, each is held to it and the worst is told. Runs that have a result already are not run again.
    """
    from sim.results import junit as xml
    from sim.study import checks

    refuse_both(jobs, cluster)
    if update and not baseline:
        raise UserError("--update writes a baseline; say where with --baseline DIR")
    files = checks.shard(dict.fromkeys(scenario_files(paths)), *shard)
    for folder in (out, *([junit.parent] if junit else []), *([baseline] if baseline else [])):
        refuse_unwritable(folder)
    console.kept_so_far = "the runs that are done are kept; the same command goes on from there"
    compared = checks.Baseline(baseline, update) if baseline else None
    with console.progress("check") as progress:
        found = checks.check_all(files, out, jobs, compared, progress, cluster)
    said = {finding: _finding_text(finding) for each in found for finding in each.findings}
    if junit:
        from sim.files import explained, publish

        with explained(junit, "choose another --junit"):
            junit.parent.mkdir(parents=True, exist_ok=True)
            publish(junit, xml.document([checks.suite(each, said) for each in found]).encode())
    if github:
        for each in found:
            for finding in each.findings:
                if finding.state != "met":
                    click.echo(checks.command(each.file, finding, said[finding]), err=console.json)
    worst = max((each.exit_code for each in found), default=0)
    code = 0 if exit_zero and worst == EXIT_UNMET else worst
    if console.json:
        rows = [row for each in found for row in checks.rows(each)]
        console.data(as_json({"met": worst == 0, "exit_code": code, "findings": rows}))
    else:
        console.data(_checks_text(found, said, code, console))
    return code


def _finding_text(finding: Finding) -> str:
    """What was found, in words: actual value and margin, or why there is none."""
    from sim.report.words import amount

    if finding.state == "failed" or finding.what == "baseline":
        return finding.text
    told = [f"actual {amount(finding.actual, finding.unit)}"]
    if finding.margin is not None:
        how = "moved by" if finding.state == "moved" else "margin"
        told.append(f"{how} {amount(finding.margin, finding.unit)}")
    return ", ".join([*filter(None, [finding.text]), *told])


def _checks_text(found: Sequence[Checked], said: Mapping[Finding, str], code: int, console: Console) -> str:
    """Return each scenario with what was found, and last the sum of it and the exit code."""
    findings = [finding for each in found for finding in each.findings]
    counts = {state: sum(each.state == state and each.fails for each in findings) for state in _UNMET_STATES}
    warnings = sum(each.state != "met" and not each.fails for each in findings)
    met = sum(each.state == "met" for each in findings)
    sums = [f"{met:,} met", *(f"{count:,} {state}" for state, count in counts.items() if count)]
    sums += [f"{warnings:,} only warned of"] if warnings else []
    silent = sum(not each.findings for each in found)
    sums += [f"{silent:,} files expect nothing"] if silent else []
    end = f"{len(found):,} {'file' if len(found) == 1 else 'files'}: {', '.join(sums)}; exit code {code}"
    shown = [each for each in found if each.findings and not (console.quiet and each.exit_code == 0)]
    blocks = [f"{each.file}\n{table(_finding_row(one, said[one]) for one in each.findings)}" for each in shown]
    return "\n\n".join([*blocks, end])


_UNMET_STATES = ("not met", "no data", "moved", "failed")


def _finding_row(finding: Finding, said: str) -> Sequence[str]:
    state = "met" if finding.state == "met" else finding.state.upper() if finding.fails else "warning"
    return f"  {state}", finding.what, said
