"""`overcommit list`: everything that can be named in a scenario."""

from __future__ import annotations

import click

from sim.cli.console import Console, as_json, table
from sim.cli.options import talks
from sim.errors import UserError, suggestion


@click.command(name="list")
@click.argument("kind", required=False)
@talks
@click.pass_obj
def list_parts(console: Console, kind: str | None) -> None:
    """List what a scenario can be made of, and the scenarios that came along; or only one KIND, such as presets."""
    from sim.scenario.parts import parts

    found = list(parts())
    if kind is not None:
        wanted = kind.removesuffix("s")
        kinds = dict.fromkeys(part for part, _, _ in found)
        found = [part for part in found if wanted in part[0]]
        if not found:
            raise UserError(f"nothing is called {kind}; {suggestion(kind, kinds)}")
    if console.json:
        console.data(as_json([{"kind": kind, "name": name, "about": about} for kind, name, about in found]))
    else:
        console.data(table(found))
