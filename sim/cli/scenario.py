"""Verbs that only read or write scenario files: `validate`, `new` and `schema`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import click

from sim import files
from sim.cli.console import Console, as_json
from sim.cli.options import set_option, talks
from sim.errors import Problem, UserError

_SCHEMA = Path(__file__).parents[1] / "scenario" / "schema.json"
"""What `overcommit schema` prints, where an editor finds it."""

_TEMPLATE = """\
# yaml-language-server: $schema={schema}
# One question to the simulator. Run it:  overcommit run {file}
# See every default:  overcommit explain {file}
name: {name}
description: How far do four small guests share their memory?
duration: 2min
sample_every: 1s

hosts:
  - memory: 2GiB
    cores: 4
    kernel: "6.18"
    ksm: {{run: 1, pages_to_scan: 1000, sleep_millisecs: 20}}

vms:
  - name: guest
    count: 4
    memory: 256MiB
    image:
      parts:
        - {{name: system, pool: distribution, size: 30%}}   # the same pages in every guest of this pool
        - {{name: empty, zero: true, size: 20%}}
        - {{name: data, size: 50%}}                         # unique to each guest

# Checked after the run; the exit code is 1 when one is not met.
expect:
  - consolidation_ratio >= 1.2
  - oom_kills == 0
"""


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@set_option
@talks
@click.pass_obj
def validate(console: Console, files: Sequence[Path], overrides: Sequence[str]) -> None:
    """Check scenario FILES and tell every mistake with its line."""
    from sim.scenario import load

    problems: list[Problem] = []
    for file in files:
        try:
            load(file, overrides)
        except UserError as error:
            problems += error.problems
        else:
            console.say(f"{file}: ok")
    if problems:
        raise UserError(*problems)
    if console.json:
        console.data(as_json({"problems": []}))


@click.command()
@click.argument("name")
def new(name: str) -> None:
    """Write a small commented scenario to NAME.yaml.

    Its first line tells editors with a YAML language server, such as VS Code, where the schema is.
    """
    file = Path(name if name.endswith(".yaml") else f"{name}.yaml")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", file.stem):
        raise UserError(f"{file.stem!r} cannot be a scenario's name; use letters, digits and dashes")
    if os.path.lexists(file):
        raise UserError(f"{file} exists already; choose another name")
    with files.explained(file, "choose another folder"):
        files.publish(file, _TEMPLATE.format(name=file.stem, file=file, schema=_SCHEMA.as_uri()).encode())
    click.echo(file)


@click.command()
def schema() -> None:
    """Print the JSON Schema of a scenario, for editors."""
    from sim.scenario import schema as scenario_schema

    click.echo(as_json(scenario_schema()))
