"""Options and arguments that several verbs share, and what they refuse."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from sim.cli.console import Console
from sim.errors import UserError

Verb = TypeVar("Verb", bound=Callable[..., Any])


def _note(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    setattr(ctx.ensure_object(Console), str(option.name), value)


def talks(verb: Verb) -> Verb:
    """Add --json, -q and -v, which reach the verb through its console."""
    for names, text in (
        (("-v", "--verbose"), "Also say what the run costs."),
        (("-q", "--quiet"), "Print only the answer and errors."),
        (("--json",), "Print one JSON object."),
    ):
        verb = click.option(*names, is_flag=True, expose_value=False, callback=_note, help=text)(verb)
    return verb


set_option = click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Replace one value, as in hosts.0.memory=32GiB."
)
seed_option = click.option("--seed", type=click.IntRange(min=0), help="Replace the scenario's seed.")
out_option = click.option(
    "--out", default="results", type=click.Path(path_type=Path), show_default=True, help="Results folder."
)
report_option = click.option(
    "--report/--no-report", "with_report", default=True, help="Also draw pictures and report.html."
)
jobs_option = click.option(
    "--jobs", type=click.IntRange(min=1), help="Processes at once; as many as processors unless given."
)
cluster_option = click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Use the workers of the Dask scheduler at this address, such as tcp://10.0.0.1:8786.",
)
file_argument = click.argument("file", type=click.Path(path_type=Path))


def shard(ctx: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int]:
    """Number of a part, and how many parts there are, of an option such as 1/4."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", value or "1/1")
    number, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= parts:
        raise click.BadParameter(f"{value} is no part; write 1/4 for the first of four", ctx, option)
    return number, parts


def duration(ctx: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """Nanoseconds of an option such as 10s."""
    from sim.errors import At
    from sim.units import parse_duration

    try:
        return None if value is None else parse_duration(value)
    except At as fault:
        raise click.BadParameter(str(fault), ctx, option) from None


def scenario_files(files: Iterable[Path]) -> Iterator[Path]:
    """Yield the files, and those in folders."""
    for file in files:
        found = sorted(file.rglob("*.yaml")) if file.is_dir() else [file]
        if not found:
            raise UserError(f"{file}: no scenario in this folder")
        yield from found


def refuse_both(jobs: int | None, cluster: str | None) -> None:
    """Refuse to count processes where a cluster has its own."""
    if jobs and cluster is not None:
        raise UserError("--jobs counts processes of this machine, and --cluster uses others; leave one of them out")


def refuse_unwritable(out: Path) -> None:
    """Refuse, before the simulation and not after it, a results folder that cannot be made or written."""
    existing = next(each for each in (out, *out.absolute().parents) if os.path.exists(each))
    if not os.path.isdir(existing):
        raise UserError(f"{existing}: not a folder; choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing}: not writable; choose another --out")
