"""Recordings: runs of a kernel kept in a folder, one compressed CSV file for each scenario, and what they ran on."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Final

from sim import files
from sim.errors import UserError, suggestion
from sim.lab import pressure
from sim.lab.compare import read_recording
from sim.lab.pressure import PressureTrial
from sim.lab.trial import Trial, judge
from sim.scenario import Scenario

_MACHINE: Final = "machine.json"
_ENDING: Final = ".csv.gz"


def keep(trial: Trial | PressureTrial, folder: Path) -> None:
    """Put the kernel's runs in the folder in place of older ones. Raises UserError where it cannot be written."""
    with files.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_recording(folder / f"{trial.scenario.name}{_ENDING}")
        files.publish(folder / _MACHINE, (json.dumps(_this_machine(), indent=1) + "\n").encode())


def kept(scenario: Scenario, folder: Path, exact: bool | None = None) -> Trial | PressureTrial:
    """Hold the simulator against a recording; *exact*, where a single run of KSM was recorded unless given.

    Raises UserError where there is none.
    """
    file = folder / f"{scenario.name}{_ENDING}"
    if not file.is_file():
        names = [each.name.removesuffix(_ENDING) for each in sorted(folder.glob(f"*{_ENDING}"))]
        remedy = suggestion(scenario.name, names) if names else "make it with --record"
        raise UserError(f"{file}: no such recording; {remedy}")
    short = pressure.is_short(scenario)
    try:
        runs = pressure.read_recording(file) if short else read_recording(file)
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{file}: not a recording: {error}") from error
    if short:
        return pressure.judge(scenario, runs)
    return judge(scenario, runs, len(runs) == 1 if exact is None else exact)


def about(folder: Path | None) -> str:
    """What the recordings of a folder, or runs made now, ran on, in words."""
    machine = json.loads((folder / _MACHINE).read_text()) if folder else _this_machine()
    return f"Linux {machine['kernel']}, {machine['cpu']}"


def _this_machine() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {"kernel": platform.release(), "machine": platform.machine(), "cpu": cpu}
