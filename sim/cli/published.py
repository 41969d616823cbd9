"""`overcommit published`: hold the simulator to published figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sim.cli.console import EXIT_UNMET, Console, as_json, table
from sim.cli.options import jobs_option, out_option, refuse_unwritable, scenario_files, set_option, talks

if TYPE_CHECKING:
    from sim.study.figures import Agenda


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@set_option
@jobs_option
@click.option("--write", "page", type=click.Path(path_type=Path), help="Write PAGE.md with the table of all figures.")
@out_option
@talks
@click.pass_obj
def published(
    console: Console, files: Sequence[Path], overrides: Sequence[str], jobs: int | None, page: Path | None, out: Path
) -> int:
    """Hold the simulator to the published figures of FILES, or of all in a folder.

    Exit code 1 says that a figure is outside its band without a reason, or inside although it is said to fail.
    Runs that have a result already are not run again.
    """
    from sim.study.figures import compute, plan

    todo = plan(list(scenario_files(files)), out, jobs, overrides)
    refuse_unwritable(out)
    if page:
        refuse_unwritable(page.parent)
    console.say(_agenda_text(todo))
    console.kept_so_far = "the runs that are done are kept; the same command goes on from there"
    with console.progress("published figures") as progress:
        rows = compute(todo, progress)
    from sim.report.published_page import conclusion, faults, lines, write

    if page:
        write(rows, page)
        console.say(f"wrote {page}")
    if console.json:
        from sim.study.figures import told

        console.data(as_json({"conclusion": conclusion(rows), "figures": [told(row) for row in rows]}))
    else:
        console.data(conclusion(rows) if console.quiet else "\n\n".join([table(lines(rows)), conclusion(rows)]))
    for fault in faults(rows):
        console.complain(fault)
    unheld = 0 if all(row.honest for row in rows) else EXIT_UNMET
    return max([unheld, *(row.failure.exit_code for row in rows if row.failure)])


def _agenda_text(todo: Agenda) -> str:
    from sim.units import SECOND, about_duration

    text = f"{len(todo.asked):,} published figures"
    if todo.left:
        seconds = about_duration(todo.cpu_seconds * SECOND)
        text += f"; {len(todo.left):,} runs, about {seconds} of CPU time in {todo.jobs} processes"
    return text
