"""`overcommit explain`: every default of a scenario, or where the memory of a result is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from sim.cli.console import Console, as_json, table
from sim.cli.options import duration, file_argument, seed_option, set_option, talks
from sim.errors import UserError


@click.command()
@file_argument
@click.option("--at", callback=duration, metavar="TIME", help="Of a result: the moment to explain; its end otherwise.")
@click.option("--host", help="Of a result: this host alone.")
@set_option
@seed_option
@talks
@click.pass_obj
def explain(
    console: Console, file: Path, at: int | None, host: str | None, overrides: Sequence[str], seed: int | None
) -> None:
    """Show FILE with every default written out, and what running it takes; or explain a result.

    The text printed is a scenario again; the estimate stands above it in comments. If FILE is the folder of a result,
    tell where each host's memory is at a moment, and why no more of it was saved.
    """
    if file.is_dir():
        if overrides or seed is not None:
            raise UserError(f"{file}: is a result, which --set and --seed do not change; name its scenario file")
        _explain_result(console, file, at, host)
        return
    if at is not None or host is not None:
        raise UserError(f"{file}: is no result; --at and --host explain the folder that a run printed last")
    from sim.document import dump
    from sim.scenario import load
    from sim.sizing import estimate

    scenario = load(file, overrides, seed)
    rows = estimate(scenario).rows()
    if console.json:
        console.data(as_json({"estimate": dict(rows), "scenario": scenario.resolved()}))
    else:
        notes = [f"# {line}" for line in table(rows).splitlines()]
        console.data("\n".join([*notes, dump(scenario.resolved()).rstrip()]))


def _explain_result(console: Console, folder: Path, at: int | None, host: str | None) -> None:
    """Tell where memory is at a moment of a finished run."""
    from sim.results import load
    from sim.study import whereabouts
    from sim.units import SECOND, about_bytes

    found = whereabouts.whereabouts(load(folder), None if at is None else at / SECOND, host)
    if console.json:
        console.data(as_json([whereabouts.told(each) for each in found]))
        return
    titles = {"memory": "host memory", "guests": "promised to guests", "reasons": "not saved because"}
    for each in found:
        blocks = [whereabouts.sentence(each)]
        for name, title in () if console.quiet else titles.items():
            parts = getattr(each, name)
            rows = [(f"  {part.name}", about_bytes(part.bytes), part.meaning) for part in parts]
            blocks += [f"{title}\n{table(rows)}"] if rows else []
        console.data("\n\n".join(blocks))
