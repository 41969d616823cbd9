"""`overcommit lab calibrate`: measures what work costs on this machine, and keeps it as a price set.

Everything that is set up is noted in the lab's state file first, so that `overcommit lab restore` can undo it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import pwd
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from sim import files
from sim.cost.prices import DEFAULT, Prices, Provenance, bundled, load, own_name, user_folder
from sim.document import dump
from sim.errors import At, MachineError, UserError
from sim.lab import memory_costs, swap_costs
from sim.lab.ksmd_costs import ALONE, WITH_NODE, Certainty, Fit, Scans, certainty, fit, left_out, measured, trials
from sim.lab.machine import exclusive
from sim.limits import available_bytes
from sim.sharing.ksm_pass import WORK
from sim.units import MIB, parse_name

Tell = Callable[[float, str], None]

ROUNDS: Final = 3
"""How often each workload is run; once if it must be quick."""
_COARSE_CLOCK: Final = 6
"""CLOCK_MONOTONIC_COARSE (linux/time.h), which moves with the timer tick."""
_NEEDED: Final = 1024 * MIB
_QUICK_MEMORY: Final = 1024 * MIB


@dataclass(frozen=True)
class Calibration:
    """A price set and how far it can be trusted."""

    prices: Prices
    errors: Mapping[str, float]
    """Relative error of ksmd's CPU time in each workload at prices fitted to all the others."""
    together: Sequence[tuple[str, str]]
    """Kinds of work of which only the sum is known well."""
    missing: Mapping[str, str]
    """What could not be measured, and why."""


def calibrate(name: str, quick: bool = False, tell: Tell | None = None) -> Calibration:
    """Measure this machine (root, KSM unused); *tell* hears the share done and what is being done.

    Raises MachineError where this machine cannot do it.
    """
    tell = tell or (lambda _done, _text: None)
    with exclusive(_NEEDED):
        tell(0, "counting the work of the workloads")
    known = _known()
    workloads = [*trials()]
    parts = measured(workloads, 1 if quick else ROUNDS, lambda done, text: tell(0.8 * done, text))
    fitted = fit(Scans.joined(parts), known)
    tell(0.8, "confidence intervals")
    sure = certainty(parts, known)
    errors = dict(zip((trial.scenario.name for trial in workloads), left_out(parts, known), strict=True))
    missing: dict[str, str] = {}
    with exclusive(_NEEDED) as ksm:
        tell(0.85, "copies on write")
        others: dict[str, Any] = {**memory_costs.writes(ksm), "sha1": memory_costs.sha1()}
        with _optional(missing, "huge_pages"):
            tell(0.855, "huge pages")
            _check_huge_pages()
            others["huge_pages"] = memory_costs.huge_pages(ksm)
        with _optional(missing, "page_faults, fork and random_access"):
            others |= _memory(quick, tell)
        with _optional(missing, "zram"):
            others["zram"] = _zram(tell)
        with _optional(missing, "paging"):
            tell(0.95, "swapping")
            others["paging"] = swap_costs.paging()
        with _optional(missing, "swap"):
            tell(0.96, "swap file")
            others["swap"] = swap_costs.swap(ksm)
    scans = sum(len(part.cpu_ns) for part in parts)
    source = f"fitted to {scans} full scans of {len(parts)} workloads (overcommit lab calibrate)"
    about = f"{_processor()}, Linux {platform.release()}, {datetime.date.today():%B %Y}"
    ksmd = _ksmd_prices(fitted, sure, source)
    prices = Prices(name=name, about=about, machine=provenance(), **ksmd, **others)
    return Calibration(prices, errors, sure.together, missing)


def destination(name: str | None, out: Path | None) -> tuple[str, Path]:
    """Name of the set and the file it goes to: *out*, or the folder of the user's own sets.

    Raises UserError, before anything is measured, for a place that cannot be.
    """
    name = name or (out.stem if out else own_name())
    try:
        parse_name(name)
    except At as fault:
        raise UserError(f"--name {name}: {fault}") from None
    if out is None:
        if name in bundled():
            raise UserError(f"--name {name}: a set of this name comes with the package; choose another name")
        out = _own_folder() / f"{name}.yaml"
    elif out.name != f"{name}.yaml":
        raise UserError(f"--out {out}: the file must be called {name}.yaml, as the set; change --out or --name")
    _check_writable(out)
    return name, out


def install(prices: Prices, file: Path) -> None:
    """Write a price set, whole or not at all."""
    made = [folder for folder in file.parents if not folder.exists()]
    with files.explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        files.publish(file, dump(prices.model_dump(mode="json", exclude_defaults=True)).encode())
    _hand_over(file, *made)


def provenance() -> Provenance:
    """What this machine is."""
    return Provenance(
        cpu=_processor(),
        cores=len(os.sched_getaffinity(0)),
        kernel=platform.release(),
        hz=round(1 / time.clock_getres(_COARSE_CLOCK)),
        virtualised=" hypervisor " in Path("/proc/cpuinfo").read_text(),
    )


def _known() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Prices in ns of the bundled set."""
    known = load(DEFAULT)
    return np.array([known.picoseconds(kind) / 1000 for kind in WORK])


def _memory(quick: bool, tell: Tell) -> dict[str, Any]:
    _check_huge_pages()
    tell(0.86, "page faults")
    faults = memory_costs.page_faults()
    tell(0.865, "forks")
    forks = memory_costs.fork()
    tell(0.87, "random access")
    memory = min(available_bytes(), _QUICK_MEMORY) if quick else available_bytes()
    return {"page_faults": faults, "fork": forks, "random_access": tuple(memory_costs.random_access(memory))}


def _check_huge_pages() -> None:
    if not memory_costs.has_huge_pages():
        raise MachineError("this machine's processes get no huge pages (transparent_hugepage/enabled is never)")


def _zram(tell: Tell) -> dict[str, Any]:
    found = swap_costs.algorithms()
    if not found:
        raise MachineError("this kernel has no zram (CONFIG_ZRAM, or the module is not loaded: modprobe zram)")
    costs = {}
    for algorithm in found:
        tell(0.93, f"zram {algorithm}")
        costs[algorithm] = swap_costs.zram(algorithm)
    return costs


def _ksmd_prices(fitted: Fit, sure: Certainty, source: str) -> dict[str, Any]:
    """The fitted prices as blocks; a price lies in its interval even where resampling never met it."""
    blocks: dict[str, Any] = {}
    for kind, price, low, high in zip(WORK, fitted.prices, sure.low, sure.high, strict=True):
        alike = WORK[ALONE] if kind == WORK[WITH_NODE] else kind
        others = [b if a == alike else a for a, b in sure.together if alike in (a, b)]
        doubt = f"; not told apart from {' and '.join(others)}" if others else ""
        figures = {"ns": price, "low": min(low, price), "high": max(high, price)}
        blocks[kind] = {name: round(float(ns), 3) for name, ns in figures.items()} | {"source": source + doubt}
    return blocks | {"cold_caches": {"factor": round(fitted.factor, 3), "source": source}}


@contextlib.contextmanager
def _optional(missing: dict[str, str], section: str) -> Iterator[None]:
    """Note why a section cannot be measured here, and go on."""
    try:
        yield
    except MachineError as error:
        missing[section] = str(error)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _own_folder() -> Path:
    """The user's price sets; those of the user who called sudo, who is to find them without it."""
    if "XDG_CONFIG_HOME" in os.environ or "SUDO_UID" not in os.environ:
        return user_folder()
    home = pwd.getpwuid(int(os.environ["SUDO_UID"])).pw_dir
    return Path(home, ".config", "overcommit", "prices")


def _hand_over(*made: Path) -> None:
    """Let what was made in the home of the user who called sudo belong to that user."""
    if "SUDO_UID" in os.environ and made[0].is_relative_to(_own_folder()):
        for each in made:
            os.chown(each, int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"]))


def _check_writable(file: Path) -> None:
    existing = next(each for each in (file, *file.absolute().parents) if os.path.exists(each))
    if not os.access(existing, os.W_OK) or (existing != file and not existing.is_dir()):
        raise UserError(f"{existing}: cannot be written; choose another --out")
