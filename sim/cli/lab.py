"""`overcommit lab`: run, compare and restore; what needs this machine's kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sim.cli.console import EXIT_UNMET, Console, as_json, table
from sim.cli.options import (
    file_argument,
    out_option,
    refuse_unwritable,
    report_option,
    scenario_files,
    seed_option,
    set_option,
    talks,
)
from sim.cli.run import keep_result
from sim.errors import MachineError, UserError

if TYPE_CHECKING:
    from sim.lab.pressure import PressureTrial
    from sim.lab.trial import Trial
    from sim.scenario import Scenario


@click.group()
def lab() -> None:
    """Hold the simulation against this machine's own kernel (Linux with KSM; most verbs need root)."""


@lab.command(name="run")
@file_argument
@set_option
@seed_option
@out_option
@report_option
@talks
@click.pass_obj
def lab_run(
    console: Console, file: Path, overrides: Sequence[str], seed: int | None, out: Path, with_report: bool
) -> int:
    """Run FILE on this machine's kernel, in real time, and keep the result as `overcommit run` does.

    Guests are processes with real pages. Figures that a kernel does not tell are left out.
    """
    from sim.lab.machine import check_abilities
    from sim.scenario import load

    scenario = load(file, overrides, seed)
    refuse_unwritable(out)
    check_abilities()
    from sim.lab.replay import replay

    with console.progress(scenario.name) as progress:
        result = replay(scenario, progress)
    return keep_result(result, out, with_report, console)


@lab.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@set_option
@seed_option
@click.option("--runs", type=click.IntRange(1, 100), help="Runs of the kernel; 3 for changing memory, 1 for static.")
@click.option("--record", "to", type=click.Path(path_type=Path), help="Keep the kernel's runs in this folder.")
@click.option("--recorded", type=click.Path(path_type=Path), help="Take the kernel's runs from this folder.")
@click.option("--write", "page", type=click.Path(path_type=Path), help="Write PAGE.md about all FILES, no results.")
@out_option
@talks
@click.pass_obj
def compare(
    console: Console,
    files: Sequence[Path],
    overrides: Sequence[str],
    seed: int | None,
    runs: int | None,
    to: Path | None,
    recorded: Path | None,
    page: Path | None,
    out: Path,
) -> int:
    """Hold the simulator against this machine's kernel: counters, scan times and CPU of FILES, or of all in a folder.

    Exit code 1 says that they differ by more than is stated: static memory must be exact at every full scan,
    changing memory inside the kernel's spread and 1 % of the pages, scan times within 3 %, ksmd's CPU within 10 %;
    where guests have a memory_limit, pages swapped within 15 % and stalls (PSI) within 25 %.
    """
    from sim.lab.machine import check_abilities
    from sim.scenario import load

    if recorded and (to or runs):
        raise UserError("--recorded takes runs that are there; remove --record and --runs, or --recorded")
    scenarios = [load(file, overrides, seed) for file in scenario_files(files)]
    refuse_unwritable(to or (page.parent if page else out))
    if not recorded:
        check_abilities()
    from sim.lab.recordings import about, keep, kept

    trials: list[Trial | PressureTrial] = []
    told: list[Mapping[str, Any]] = []
    busy: list[str] = []
    for scenario in scenarios:
        trial = kept(scenario, recorded) if recorded else _try(scenario, runs, console, busy)
        if trial is None:
            continue
        if to:
            keep(trial, to)
        trials.append(trial)
        folder = None if page else _keep_trial(trial, out)
        told.append(_trial_json(trial, folder))
        if not console.json:
            console.data(_trial_text(trial, folder, console))
    if page and not busy:
        from sim.lab.fidelity import write

        write(trials, about(recorded), page)
        console.say(f"wrote {page}")
    if console.json:
        console.data(as_json({"comparisons": told, "too_busy": busy}))
    if busy:
        raise MachineError("\n".join([*busy, f"{page} was not written"] if page else busy))
    return EXIT_UNMET if any(trial.comparison.faults() for trial in trials) else 0


def _try(scenario: Scenario, runs: int | None, console: Console, busy: list[str]) -> Trial | PressureTrial | None:
    """Run a trial on this machine; None, with the reason among *busy*, if other work disturbs it."""
    from sim.lab.trial import Busy, live

    try:
        with console.progress(scenario.name) as progress:
            return live(scenario, runs, progress=progress)
    except Busy as error:
        busy.append(str(error))
        return None


def _keep_trial(trial: Trial | PressureTrial, out: Path) -> Path:
    """Keep the simulation's result with the comparison's picture and figures; return its folder."""
    from sim import files
    from sim.lab.fidelity import draw
    from sim.report.html import PICTURES
    from sim.results import write
    from sim.run import run as simulate

    folder = write(simulate(trial.scenario), out)
    with files.explained(folder):
        (folder / PICTURES).mkdir(exist_ok=True)
        draw(trial, folder / PICTURES / "kernel.png")
        trial.write_recording(folder / "kernel.csv.gz")
        files.publish(folder / "comparison.json", f"{as_json(_trial_json(trial, folder))}\n".encode())
    return folder


@lab.command()
@talks
@click.pass_obj
def restore(console: Console) -> None:
    """Put back what an interrupted lab left: settings, ksmd's scheduling, guests, zram devices, swap files."""
    from sim.lab.machine import restore as heal

    healed = heal()
    if console.json:
        console.data(as_json({"restored": healed}))
    else:
        console.data("restored what an interrupted lab left" if healed else "nothing to restore")


def _trial_json(trial: Trial | PressureTrial, folder: Path | None) -> Mapping[str, Any]:
    return {"scenario": trial.scenario.name, **trial.told(), "result": str(folder) if folder else None}


def _trial_text(trial: Trial | PressureTrial, folder: Path | None, console: Console) -> str:
    """Return what was compared, the figures, the verdict, and last the folder of the result."""
    from sim.lab.fidelity import heading, rows, verdict

    end = f"{trial.scenario.name}: {verdict(trial.comparison)}"
    if console.quiet or not folder:
        return end
    return "\n\n".join([f"{trial.scenario.name}: {heading(trial)}", table(rows(trial.comparison)), end, str(folder)])
