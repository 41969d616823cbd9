"""The command line: a file for each verb, or for a few that belong together, which parses, calls and prints.

Files import what a verb needs when it is called, so that `overcommit --help` stays quick.
"""

from __future__ import annotations

import click

from sim.cli import (
    calibrate,
    capture,
    check,
    compare,
    explain,
    lab,
    parts,
    published,
    run,
    scenario,
    solve,
    sweep,
    trace,
)
from sim.cli.console import Verbs, version_of


def _show_version(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"overcommit {version_of('overcommit')}")
        ctx.exit()


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show it.")
def main() -> None:
    """How many virtual machines fit on a host, what does it cost in CPU, and what breaks first?

    Exit codes: 0 done and met, 1 an expectation failed, 2 the scenario or the command line is wrong,
    3 a bug, 4 this machine cannot do it, 130 interrupted.
    """


for verb in (
    run.run,
    sweep.sweep,
    solve.solve,
    compare.compare,
    check.check,
    published.published,
    explain.explain,
    scenario.validate,
    scenario.new,
    scenario.schema,
    parts.list_parts,
    trace.trace,
    lab.lab,
):
    main.add_command(verb)

for lab_verb in (calibrate.calibrate, capture.capture):
    lab.lab.add_command(lab_verb)
