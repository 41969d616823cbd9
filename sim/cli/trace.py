"""`overcommit trace`: what a recorded trace holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sim.cli.console import Console, as_json, table
from sim.cli.options import talks

if TYPE_CHECKING:
    from sim.datacenter.traces import Reading, Survey


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--set", "options", multiple=True, metavar="KEY=VALUE", help="An option of the trace, as in every=15min.")
@click.option("--hosts", "as_hosts", is_flag=True, help="Print the trace's nodes as `hosts` of a scenario.")
@talks
@click.pass_obj
def trace(console: Console, path: Path, options: Sequence[str], as_hosts: bool) -> None:
    """Read the recorded trace PATH as a scenario would: what arrives, how much at once, and which rows are bad.

    The format is told from the files unless --set format=... says it.
    """
    from sim.datacenter.traces import Reading, Rows, nodes, read_alone
    from sim.document import dump

    recorded = read_alone(path, options)
    if as_hosts:
        account = Rows()
        kinds = [kind.host() for kind in nodes(recorded, account)]
        for line in account.lines():
            console.say(line)
        console.data(as_json({"hosts": kinds}) if console.json else dump({"hosts": kinds}).rstrip())
        return
    reading = Reading(recorded)
    survey = reading.survey()
    console.data(_trace_json(reading, survey) if console.json else _trace_text(reading, survey))


def _trace_json(reading: Reading, survey: Survey) -> str:
    rows = reading.rows
    faults = {name: {reason: asdict(noted) for reason, noted in getattr(rows, name).items()}
              for name in ("left_out", "mended")}  # fmt: skip
    return as_json({"format": reading.trace.format, "rows": rows.read, **faults, **asdict(survey)})


def _trace_text(reading: Reading, survey: Survey) -> str:
    """Return what a trace holds, then what was wrong with it."""
    from sim.units import about_bytes, about_duration

    lifetime = "half of them have no end" if survey.median_lifetime is None else about_duration(survey.median_lifetime)
    rows = [
        ("format", reading.trace.format),
        ("rows", f"{reading.rows.read:,}, {reading.rows.bad:,} of them left out"),
        ("guests", f"{survey.guests:,}, the last after {about_duration(survey.last_arrival)}"),
        ("median lifetime", lifetime),
        ("most at once", f"{survey.most_guests:,} guests"),
    ]
    if survey.most_memory is not None:
        rows.append(("most memory", f"{about_bytes(survey.most_memory)} promised at once"))
    if survey.most_vcpus is not None:
        rows.append(("most CPU", f"{survey.most_vcpus:,} virtual processors at once"))
    if survey.cpu is not None:
        rows.append(("CPU use", f"{survey.cpu:.1%} of a guest's processors on average"))
    return "\n\n".join(filter(None, [table(rows), "\n".join(reading.rows.lines())]))
