"""Which way to use memory slows guests least, from plenty of it to little: the lines and where they cross."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Final, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from sim.report.frontier import broken
from sim.report.style import COLOURS
from sim.report.words import amount, listed, short_names
from sim.scenario import Scenario
from sim.units import GIB, about_bytes, parse_bytes

_FEWEST: Final = 3
"""Host memories that make a line."""
_COLOURS: Final = ("private", "saved", "volatile", "zero", "metadata", "shared")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P")
_FLOOR: Final = 0.01
"""Slowdowns below this, in percent, are drawn as this."""


class Reign(NamedTuple):
    """A range of host memory, bytes, in which one way slows guests least."""

    way: str
    most: float
    """Where it begins: between two points, or the most memory of all."""
    least: int
    """The last point in it."""


def memory_axis(table: pd.DataFrame, axes: Sequence[str]) -> str | None:
    """The axis that is the memory of a host, if the sweep gives it enough values beside another axis."""
    for axis in axes:
        keys = axis.split(".")
        if (keys[0], keys[-1]) == ("hosts", "memory") and table[axis].nunique() >= _FEWEST and len(axes) > 1:
            return axis
    return None


def slowdown(table: pd.DataFrame) -> pd.Series[float]:
    """How much longer guests take for their work, in percent: for TLB misses, and for waiting for memory."""
    misses = table["tlb_slowdown_percent"].fillna(0.0)
    return (1 + misses / 100) / (table["progress_percent"] / 100) * 100 - 100


def lines(table: pd.DataFrame, axes: Sequence[str], axis: str) -> pd.DataFrame:
    """One row per point, plenty of memory first: `way` (settings of the other axes), `memory`, `slowdown`, `fault`."""
    others = [(each, name) for each, name in zip(axes, short_names(axes), strict=True) if each != axis]
    named = [" ".join(f"{row[each]}" if len(others) == 1 else f"{name} {row[each]}" for each, name in others)
             for _, row in table.iterrows()]  # fmt: skip
    found = pd.DataFrame({
        "way": named, "memory": [parse_bytes(text) for text in table[axis]], "slowdown": slowdown(table),
        "fault": [broken(row) for _, row in table.iterrows()],
    })  # fmt: skip
    return found.sort_values("memory", ascending=False, kind="stable")


def reigns(points: pd.DataFrame) -> Sequence[Reign]:
    """Who slows guests least, from the most memory to the least; where two change over lies on the line between points.

    A way that kills guests is out from that memory on.
    """
    curves: dict[str, dict[int, float]] = {}
    for way, memory, percent, fault in points[["way", "memory", "slowdown", "fault"]].itertuples(index=False):
        curves.setdefault(way, {})[memory] = inf if fault else percent
    found: list[Reign] = []
    for memory in sorted(set(points["memory"]), reverse=True):
        last = found[-1].way if found else ""
        best = min(curves, key=lambda way: (curves[way].get(memory, inf), way != last))
        if curves[best].get(memory, inf) == inf:
            break
        if best != last:
            at = _crossing(curves[last], curves[best], found[-1].least, memory) if found else memory
            found.append(Reign(best, at, memory))
        found[-1] = found[-1]._replace(least=memory)
    return found


def _crossing(old: Mapping[int, float], new: Mapping[int, float], above: int, below: int) -> float:
    """The memory at which two lines cross between two points; the upper one if the old way, or the new, ends there."""
    lead, lag = new.get(above, inf) - old[above], old.get(below, inf) - new[below]
    return above - (above - below) * lead / (lead + lag) if lead + lag < inf else above


def conclusion(points: pd.DataFrame, promised: int) -> str:
    """Return in a few sentences which way to take at which memory of the host; *promised* is what guests have."""
    found = reigns(points)
    if not found:
        return "Guests were killed in every point of this sweep."
    first, *others = found
    said = f"With {about_bytes(first.most)} of host memory, {first.way} slows guests least"
    said += "".join(
        f"; below {about_bytes(reign.most)}, when guests are promised {promised / reign.most:.2f} times as much, "
        f"{reign.way} does"
        for reign in others
    )
    said += "" if others else f", and nothing beats it down to {about_bytes(first.least)}"
    scarce = points["memory"].min()
    ends = [f"{row['way']} {row['fault'] or amount(max(row['slowdown'], 0.0), '%')}"
            for _, row in points[points["memory"] == scarce].iterrows()]  # fmt: skip
    return f"{said}. Slowdown with {about_bytes(scarce)}: {listed(ends)}."


def promised_bytes(scenario: Scenario) -> int:
    """Memory promised to all guests, for each host."""
    return sum(vm.count * vm.memory for vm in scenario.vms) // sum(host.count for host in scenario.hosts)


def draw(points: pd.DataFrame, promised: int, ax: Axes) -> Axes:
    """Draw the slowdown of each way against the host's memory, plenty on the left, with the places where they cross."""
    top = points.loc[points["fault"] == "", "slowdown"].max()
    for number, (way, line) in enumerate(points.groupby("way", sort=False)):
        colour = _light(_COLOURS[number % len(_COLOURS)])
        good, killed = line[line["fault"] == ""], line[line["fault"] != ""]
        ax.plot(good["memory"] / GIB, good["slowdown"].clip(lower=_FLOOR), marker=_MARKERS[number % len(_MARKERS)],
                markersize=6, color=colour, label=way)  # fmt: skip
        ax.plot(killed["memory"] / GIB, [top] * len(killed), "x", color=colour, markersize=8)
    for reign in reigns(points)[1:]:
        ax.axvline(reign.most / GIB, color=_light("muted"), linestyle=":", linewidth=1.2)
        ax.annotate(about_bytes(reign.most), (reign.most / GIB, 0.02), (3, 0), xycoords=("data", "axes fraction"),
                    textcoords="offset points", fontsize=9, color=_light("muted"))  # fmt: skip
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    ax.margins(x=0.04)
    ax.invert_xaxis()
    ax.grid(visible=True, axis="x")
    ax.set_title("Slowdown of guests (%), from plenty of host memory to little")
    ax.set_xlabel(f"host memory (GiB); guests are promised {about_bytes(promised)}")
    handles, _ = ax.get_legend_handles_labels()
    if (points["fault"] != "").any():
        handles.append(Line2D([], [], linestyle="", marker="x", color=_light("muted"), label="guests killed"))
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.03), frameon=False, fontsize=9)
    return ax


def _light(role: str) -> str:
    return COLOURS[role].light
