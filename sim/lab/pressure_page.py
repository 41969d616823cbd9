"""Runs with limited memory, for reading: tables and pictures that hold the simulator against the kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from sim.lab.pictures import KERNEL_LINE, WIDTH, light, save
from sim.lab.pressure import REQUIRED, Amount, Pressure, PressureTrial, since_start
from sim.report.style import RC
from sim.report.words import amount

_PAGES: Final = {"pswpin": ("in", "private"), "pswpout": ("out", "metadata")}
_STALLS: Final = {"psi_some_ns": ("some", "volatile"), "psi_full_ns": ("full", "cow")}
_NAMES: Final = {
    "pswpin": "swapped in",
    "pswpout": "swapped out",
    "psi_some_ns": "PSI some",
    "psi_full_ns": "PSI full",
    "mem_pool_bytes": "zram's memory, just filled",
}
_COLUMNS: Final = 2


def rows(comparison: Pressure) -> Iterator[Sequence[str]]:
    """The comparison as lines of a table, under a head."""
    yield "figure", "simulated", "kernel", "error", "allowed", "kernel's spread"
    for name, figure in comparison.figures.items():
        ours, *theirs = (_told(name, value) for value in (figure.simulated, figure.lowest, figure.highest))
        allowed = f"{figure.allowed:.0%}" if name in REQUIRED else ""
        yield name, ours, " to ".join(dict.fromkeys(theirs)), f"{figure.error:+.1%}", allowed, f"{figure.spread:.1%}"


def heading(trial: PressureTrial) -> str:
    """What was compared, in a sentence."""
    runs = len(trial.measured)
    return (
        f"{runs} {'run' if runs == 1 else 'runs'} of the kernel and {len(trial.simulated)} of the simulator: figures "
        "must be near the mean of the kernel's, or inside their spread."
    )


def verdict(comparison: Pressure) -> str:
    """Whether simulator and kernel agree, in a few words."""
    faults = comparison.faults()
    return f"differs: {'; '.join(faults)}" if faults else "agrees"


def section(trials: Sequence[PressureTrial], stem: str) -> str:
    """The part of the fidelity page about these trials."""
    told = [
        f"- **{_NAMES[name]}:** within {allowed:.0%} in {sum(each.agrees for each in found)} of {len(found)} cases, "
        f"median error {_median(found):.1%}."
        for name, allowed in REQUIRED.items()
        if (found := [t.comparison.figures[name] for t in trials if name in t.comparison.figures])
    ]
    blocks = [
        "## Memory pressure",
        "Guests in memory cgroups read and write more than their limit allows, and swap to zram or to a file. The mean "
        "of the simulator's runs must be near the mean of three runs of the kernel, or inside their spread.",
        "\n".join(told),
        f"![Pages swapped and time stalled, case by case]({stem}-pressure.png)",
        _table(trials),
    ]
    return "\n\n".join(blocks)


def draw(trial: PressureTrial, file: Path) -> None:
    """Draw pages swapped and time stalled over time."""
    with mpl.rc_context(RC):
        save(picture([trial]), file)


def picture(trials: Sequence[PressureTrial]) -> Figure:
    """Small multiples: for each case pages swapped, and time stalled, over time."""
    lines = math.ceil(len(trials) / _COLUMNS)
    canvas = Figure(figsize=(WIDTH, 1.2 + 1.5 * lines), layout="constrained")
    axes = canvas.subplots(lines, 2 * _COLUMNS, squeeze=False).reshape(-1, 2)
    for trial, (pages, stalls) in zip(trials, axes, strict=False):
        for name, (_, role) in _PAGES.items():
            _plot(pages, trial, name, 1.0, role)
        for name, (_, role) in _STALLS.items():
            _plot(stalls, trial, name, 1e-9, role)
        pages.set_title(f"{trial.scenario.name}: pages", fontsize=8.5)
        stalls.set_title("stalled (s)", fontsize=8.5)
    for ax in axes[len(trials) :].flat:
        ax.set_visible(False)
    handles = [
        *(Line2D([], [], color=light(role), label=f"swapped {name}, simulated") for name, role in _PAGES.values()),
        *(Line2D([], [], color=light(role), label=f"PSI {name}, simulated") for name, role in _STALLS.values()),
        Line2D([], [], **KERNEL_LINE, label="kernel"),
    ]
    canvas.supxlabel("time (s)", fontsize=9.5, color=light("muted"))
    canvas.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)
    return canvas


def _plot(ax: Axes, trial: PressureTrial, name: str, scale: float, role: str) -> None:
    for run in trial.measured:
        ax.plot(run["time_s"].to_numpy(), scale * since_start(run, name), **KERNEL_LINE)
    for run in trial.simulated[:1]:
        if name in run:
            ax.plot(
                run["time_s"].to_numpy(), scale * since_start(run, name), color=light(role), linewidth=1.2, zorder=3
            )
    ax.set_ylim(bottom=0)
    ax.tick_params(labelsize=7)
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    ax.yaxis.set_major_locator(MaxNLocator(3))


def _table(trials: Sequence[PressureTrial]) -> str:
    head = ["case", "what it shows", *(title for name in REQUIRED for title in (_NAMES[name], "error")), "verdict"]
    lines = [head, ["---"] * len(head), *(_line(trial) for trial in trials)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(trial: PressureTrial) -> Sequence[str]:
    comparison = trial.comparison
    cells = [_cells(name, comparison.figures.get(name)) for name in REQUIRED]
    flat = [cell for pair in cells for cell in pair]
    return [trial.scenario.name, trial.scenario.description, *flat, verdict(comparison)]


def _cells(name: str, figure: Amount | None) -> tuple[str, str]:
    """The kernel's mean, and the simulator's error with the kernel's spread."""
    if figure is None:
        return "", ""
    kernel = _told(name, figure.simulated / (1 + figure.error)) if figure.error > -1 else _told(name, figure.highest)
    return kernel, f"{figure.error:+.1%} (spread {figure.spread:.0%})"


def _told(name: str, value: float) -> str:
    """A figure with its unit."""
    if name.endswith("_percent"):
        return f"{value:.1f}%"
    if name.endswith("_s"):
        return amount(value, "s")
    unit = "ns" if name.endswith("_ns") else "bytes" if "_bytes" in name else "pages"
    return amount(int(value), unit)


def _median(figures: Sequence[Amount]) -> float:
    errors = sorted(abs(each.error) for each in figures)
    return errors[len(errors) // 2]
