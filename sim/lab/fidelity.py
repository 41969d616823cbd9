"""The fidelity of the simulator, for reading: tables, pictures and a page that hold trials against the kernel."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from sim import files
from sim.columns import KSM_COUNTERS, VMSTAT_COUNTERS
from sim.errors import UserError
from sim.lab import pressure_page
from sim.lab.compare import COUNTERS, CPU, SLACK, TIME, Comparison, Scans
from sim.lab.compare import Figure as Amount
from sim.lab.pictures import KERNEL_LINE, WIDTH, light, save
from sim.lab.pressure import Pressure, PressureTrial
from sim.lab.trial import Trial
from sim.report.style import RC
from sim.report.words import amount

_UNITS: Final = {column.name: column.unit for column in (*KSM_COUNTERS, *VMSTAT_COUNTERS)}
_CASE_COLUMNS: Final = 4
_CASE_COUNTERS: Final = {"pages_sharing": "saved", "pages_unshared": "private", "pages_volatile": "volatile"}
_PLACE: Final = re.compile(r"(?<=<!-- begin cases -->\n).*?(?=<!-- end cases -->)", re.DOTALL)
_NEW_PAGE: Final = "# Fidelity\n\n<!-- begin cases -->\n<!-- end cases -->\n"


def rows(comparison: Comparison | Pressure) -> Iterator[Sequence[str]]:
    """The comparison as lines of a table, under a head."""
    if isinstance(comparison, Pressure):
        yield from pressure_page.rows(comparison)
        return
    yield "figure", "simulated", "kernel", "largest error", "kernel's spread"
    for name, row in comparison.counters.iterrows():
        if row[["simulated", "highest", "error", "spread"]].any():
            unit = _UNITS[str(name)]
            cells = [amount(int(row[part]), unit) for part in ("simulated", "lowest", "highest", "error", "spread")]
            yield str(name), cells[0], _span(cells[1], cells[2]), cells[3], cells[4]
    for title, figure, unit in (("scan time", comparison.time, "s"), ("ksmd CPU", comparison.cpu, "ns")):
        cells = [amount(each, unit) for each in (figure.simulated, figure.lowest, figure.highest)]
        yield title, cells[0], _span(cells[1], cells[2]), f"{figure.error:+.1%}", f"{figure.spread:.1%}"


def heading(trial: Trial | PressureTrial) -> str:
    """What was compared, in a sentence or two."""
    if isinstance(trial, PressureTrial):
        return pressure_page.heading(trial)
    comparison, runs = trial.comparison, len(trial.measured)
    rule = (
        "every counter must be the kernel's"
        if comparison.exact
        else f"counters may leave the kernel's spread by {SLACK:.0%} of {comparison.pages:,} pages"
    )
    sentence = f"{comparison.scans} full scans of {runs} {'run' if runs == 1 else 'runs'} of the kernel: {rule}."
    if trial.pace == 1.0:
        return sentence
    return (
        f"{sentence} This machine's ksmd needs {trial.pace:.2f} times the time that the price set says, "
        "so the counters are those of a simulation at that pace."
    )


def verdict(comparison: Comparison | Pressure) -> str:
    """Whether simulator and kernel agree, in a few words."""
    if isinstance(comparison, Pressure):
        return pressure_page.verdict(comparison)
    if faults := comparison.counter_faults():
        return f"differs: {'; '.join([*faults, *comparison.figure_faults()])}"
    return "; ".join(["exact" if comparison.exact else "inside", *comparison.figure_faults()])


def draw(trial: Trial | PressureTrial, file: Path) -> None:
    """Draw what moved over time: the kernel's runs, and the simulator on top."""
    if isinstance(trial, PressureTrial):
        pressure_page.draw(trial, file)
        return
    moving = [name for name in COUNTERS if any(runs[name].any() for runs in (*trial.measured, trial.simulated[0]))]
    panels = [*moving, "ksmd_cpu_ns"]
    lines = math.ceil(len(panels) / 2)
    with mpl.rc_context(RC):
        canvas = Figure(figsize=(WIDTH, 1.2 + 2.0 * lines), layout="constrained")
        axes = list(canvas.subplots(lines, 2, squeeze=False, sharex=True).flat)
        for name, ax in zip(panels, axes, strict=False):
            _counter(trial, name, ax)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        canvas.supxlabel("time (s)", fontsize=9.5, color=light("muted"))
        axes[0].legend(loc="best", frameon=False)
        runs = f"{len(trial.measured)} runs" if len(trial.measured) > 1 else "one run"
        canvas.suptitle(f"{trial.scenario.name}: {runs} of the kernel, and the simulator", x=0.01, ha="left")
        save(canvas, file)


def write(trials: Sequence[Trial | PressureTrial], about: str, file: Path) -> None:
    """Write the page of all trials and its pictures; in a page that is there only the generated part is replaced.

    *about* says what kernel they ran on. Raises UserError where the file cannot be written or has no such part.
    """
    with files.explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text() if file.exists() else _NEW_PAGE
        if not _PLACE.search(text):
            raise UserError(f"{file}: has no part between <!-- begin cases --> and <!-- end cases -->; add these lines")
        files.publish(file, _PLACE.sub(lambda _: page(trials, about, file.stem), text, count=1).encode())
        scanned, pressed = _kinds(trials)
        with mpl.rc_context(RC):
            if scanned:
                save(_overview(scanned), file.with_name(f"{file.stem}-overview.png"))
                save(_cases(scanned), file.with_name(f"{file.stem}-cases.png"))
            if pressed:
                save(pressure_page.picture(pressed), file.with_name(f"{file.stem}-pressure.png"))


def page(trials: Sequence[Trial | PressureTrial], about: str, stem: str) -> str:
    """The generated part of the page."""
    scanned, pressed = _kinds(trials)
    parts = [f"{len(trials)} cases on {about}."]
    if scanned:
        parts.append(_section(scanned, stem))
    if pressed:
        parts.append(pressure_page.section(pressed, stem))
    return "\n\n".join(parts) + "\n"


def _kinds(trials: Sequence[Trial | PressureTrial]) -> tuple[list[Trial], list[PressureTrial]]:
    """Trials compared at full scans, and those under pressure."""
    scanned = [trial for trial in trials if isinstance(trial, Trial)]
    return scanned, [trial for trial in trials if isinstance(trial, PressureTrial)]


def _section(trials: Sequence[Trial], stem: str) -> str:
    """The part of the page about KSM."""
    exact = [trial.comparison for trial in trials if trial.comparison.exact]
    changing = [trial.comparison for trial in trials if not trial.comparison.exact]
    agreeing = sum(not each.counter_faults() for each in exact), sum(not each.counter_faults() for each in changing)
    scans = sum(trial.comparison.scans for trial in trials)
    cpu = np.array([abs(trial.comparison.cpu.error) for trial in trials])
    time = np.array([abs(trial.comparison.time.error) for trial in trials])
    blocks = [
        f"{len(trials)} cases are compared at every full scan, {scans:,} scans in all.\n"
        f"- **Static memory:** {agreeing[0]} of {len(exact)} cases have every counter of every full scan exactly.\n"
        f"- **Changing memory:** {agreeing[1]} of {len(changing)} cases stay inside the spread of the kernel's own "
        f"runs and {SLACK:.0%} of the pages.\n"
        f"- **Scan times:** within {TIME:.0%} in {_agreeing(trials, 'time')} of {len(trials)} cases, median error "
        f"{np.median(time):.1%}.\n"
        f"- **ksmd's CPU time:** within {CPU:.0%} in {_agreeing(trials, 'cpu')} of {len(trials)} cases, median error "
        f"{np.median(cpu):.1%}.",
        f"![Errors of all cases]({stem}-overview.png)",
        f"![Simulator and kernel, case by case]({stem}-cases.png)",
        _table(trials),
    ]
    return "\n\n".join(blocks)


def _agreeing(trials: Sequence[Trial], figure: Literal["time", "cpu"]) -> int:
    """Cases in which a figure is as near as it must be."""
    return sum(getattr(trial.comparison, figure).agrees for trial in trials)


def _table(trials: Sequence[Trial]) -> str:
    head = ("case", "what it shows", "scans", "largest error of a counter", "kernel's spread", "scan time", "ksmd CPU")
    lines = [head, ["---"] * len(head)]
    lines += [_line(trial) for trial in trials]
    return "\n".join(f"| {' | '.join(line)} | {last} |" for line, last in zip(lines, _verdicts(trials), strict=True))


def _verdicts(trials: Sequence[Trial]) -> Iterator[str]:
    yield "verdict"
    yield "---"
    yield from (verdict(trial.comparison) for trial in trials)


def _line(trial: Trial) -> Sequence[str]:
    comparison = trial.comparison
    return (
        trial.scenario.name,
        trial.scenario.description,
        str(comparison.scans),
        _share(comparison.error),
        _share(comparison.spread) if len(trial.measured) > 1 else "one run",
        f"{comparison.time.error:+.1%}{_stolen(comparison.time)}",
        f"{comparison.cpu.error:+.1%}",
    )


def _stolen(time: Amount) -> str:
    """What the hypervisor took, as a share of the kernel's time, which holds it."""
    share = time.stolen / time.lowest if time.lowest else 0.0
    return f" ({share:.0%} stolen)" if share >= 0.005 else ""


def _share(value: float) -> str:
    return f"{value:.2%} of pages" if value else "0"


def _span(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


# --- pictures ----------------------------------------------------------------------------------------------------


def _counter(trial: Trial, name: str, ax: Axes) -> None:
    """One counter over time: the kernel's runs wide and grey, the simulator thin on top."""
    scale = 1e-6 if name == "ksmd_cpu_ns" else 1.0
    for number, run in enumerate(trial.measured):
        _plot(ax, run, run[name] * scale, **KERNEL_LINE, label="kernel" if not number else None)
    for number, run in enumerate(trial.simulated):
        label = "simulator" if not number else None
        _plot(ax, run, run[name] * scale, color=light("private"), linewidth=1.1, marker=".", markersize=3, label=label)
    ax.set_title("ksmd's CPU time (ms)" if scale != 1.0 else name, fontsize=9.5)
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    ax.yaxis.set_major_locator(MaxNLocator(4))


def _plot(ax: Axes, run: Scans, values: pd.Series[Any], **style: Any) -> None:
    ax.plot(run["time_s"].to_numpy(), values.to_numpy(), **style)


def _overview(trials: Sequence[Trial]) -> Figure:
    """Every case's errors as dots, beside the tolerances."""
    names = [trial.scenario.name for trial in trials]
    canvas = Figure(figsize=(WIDTH, 1.1 + 0.19 * len(names)), layout="constrained")
    counters, time, cpu = canvas.subplots(1, 3, sharey=True)
    fine = [not trial.comparison.counter_faults() for trial in trials]
    _dots(counters, names, [100 * trial.comparison.error for trial in trials], 100 * SLACK, fine)
    counters.set_title("counters (% of pages outside)", fontsize=9.5)
    for ax, title, figures, allowed in (
        (time, "scan time (%)", [trial.comparison.time for trial in trials], TIME),
        (cpu, "ksmd's CPU time (%)", [trial.comparison.cpu for trial in trials], CPU),
    ):
        fine = [figure.agrees for figure in figures]
        _dots(ax, names, [100 * figure.error for figure in figures], 100 * allowed, fine)
        _spreads(ax, figures)
        ax.set_title(title, fontsize=9.5)
    title = "Errors of the simulator: dots, red beyond the tolerance; kernel's spread: lines; allowed: shaded"
    canvas.suptitle(title, x=0.01, ha="left")
    return canvas


def _dots(ax: Axes, names: Sequence[str], values: Sequence[float], allowed: float, fine: Sequence[bool]) -> None:
    ax.axvspan(-allowed, allowed, color=light("free"), zorder=0)
    ax.axvline(0, color=light("line"), linewidth=1, zorder=1)
    colours = [light("private") if each else light("metadata") for each in fine]
    ax.scatter(values, names, c=colours, s=16, zorder=3)
    widest = max(1.3 * allowed, 1.1 * max(map(abs, values)))
    ax.set_xlim(-widest, widest)
    ax.margins(y=0.02)
    if not ax.yaxis_inverted():
        ax.invert_yaxis()


def _spreads(ax: Axes, figures: Sequence[Amount]) -> None:
    """The range of the kernel's runs around their mean, as lines in %."""
    for place, figure in enumerate(figures):
        mean = figure.simulated / (1 + figure.error)
        if mean:
            ends = [100 * (end / mean - 1) for end in (figure.lowest, figure.highest)]
            ax.plot(ends, [place, place], color=light("muted"), linewidth=1.5, zorder=2)


def _cases(trials: Sequence[Trial]) -> Figure:
    """Small multiples: the page counters of each case over time."""
    lines = math.ceil(len(trials) / _CASE_COLUMNS)
    canvas = Figure(figsize=(WIDTH, 0.9 + 1.35 * lines), layout="constrained")
    axes = list(canvas.subplots(lines, _CASE_COLUMNS, squeeze=False).flat)
    for trial, ax in zip(trials, axes, strict=False):
        case(trial, ax)
    for ax in axes[len(trials) :]:
        ax.set_visible(False)
    handles = [Line2D([], [], color=light(role), label=f"{name}, simulated") for name, role in _CASE_COUNTERS.items()]
    handles.append(Line2D([], [], **KERNEL_LINE, label="kernel"))
    canvas.supxlabel("time (s)", fontsize=9.5, color=light("muted"))
    canvas.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)
    return canvas


def case(trial: Trial, ax: Axes) -> Axes:
    """Draw the page counters of a trial over time (s): the kernel's runs wide and grey, the simulator on top."""
    for name, role in _CASE_COUNTERS.items():
        for run in trial.measured:
            _plot(ax, run, run[name], **KERNEL_LINE)
        for run in trial.simulated[:1]:
            _plot(ax, run, run[name], color=light(role), linewidth=1.2, zorder=3)
    ax.set_title(trial.scenario.name, fontsize=8.5)
    ax.set_ylim(bottom=0)
    ax.tick_params(labelsize=7)
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    ax.yaxis.set_major_locator(MaxNLocator(3))
    return ax
