"""The frontier between memory and CPU: which points of a sweep are worth having, which one to set, and the picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from textwrap import fill
from typing import Any, Final, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from sim.report.style import COLOURS
from sim.report.words import amount, listed, short_names
from sim.scenario import Scenario
from sim.scenario.points import Point

GAIN: Final = "consolidation_ratio"
COST: Final = "cpu_overhead_percent"
NEAR: Final = 0.02
"""A ratio this near to the best one is as good: more CPU for less than that buys next to nothing."""
MOST_LOST: Final = 2
"""Work, in percent, that guests may lose by waiting for memory: what a host that is too small must not hide."""
DEFAULT: Final = "the kernel's default"

_KSM_BLOCKS: Final = ("ksm", "ksmtuned", "mom")
_COLOURS: Final = ("private", "volatile", "saved", "zero", "metadata", "shared")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P")
_WIDE: Final = 20
"""From the least to the most CPU, a factor that needs a logarithmic axis."""

Row = Any
"""One point: a row of the frame."""


def judge(table: pd.DataFrame, points: Sequence[Point[Scenario]]) -> pd.DataFrame:
    """The table of a sweep with `fault`, why a point must not be chosen, and `mark`, a name that it has of its own."""
    faults = [why_not(row) for _, row in table.iterrows()]
    return table.assign(fault=faults, mark=[mark_of(point.scenario) for point in points])


def broken(row: Row) -> str:
    """Why a point did not end with the guests it began with, or nothing."""
    if row["error"]:
        return "failed"
    if pd.isna(row[GAIN]) or pd.isna(row[COST]):
        return "no guest was left"
    return "killed guests" if row["oom_kills"] else ""


def why_not(row: Row) -> str:
    """Why a point must not be chosen, or nothing."""
    if fault := broken(row):
        return fault
    return f"guests lost more than {MOST_LOST} % of their work" if 100 - row["progress_percent"] > MOST_LOST else ""


def mark_of(scenario: Scenario) -> str:
    """A tuner's name, or that KSM runs everywhere as the kernel sets it (mm/ksm.c): 100 pages every 20 ms."""
    tuned = [name for host in scenario.hosts for name in _KSM_BLOCKS[1:] if getattr(host, name)]
    as_set = {host.ksm and (host.ksm.run, host.ksm.pages_to_scan, host.ksm.sleep_millisecs) for host in scenario.hosts}
    return tuned[0] if tuned else DEFAULT * (as_set == {(1, 100, 20)})


def front(points: pd.DataFrame) -> pd.DataFrame:
    """The points without fault that no other beats in ratio and CPU, the cheapest first."""
    sound = points[points["fault"] == ""].sort_values([COST, GAIN], ascending=[True, False], kind="stable")
    return sound[sound[GAIN] > sound[GAIN].cummax().shift(fill_value=float("-inf"))]


def choice(points: pd.DataFrame) -> Row | None:
    """The cheapest point without fault whose ratio is near the best."""
    best = front(points)
    return None if best.empty else best[best[GAIN] >= (1 - NEAR) * best[GAIN].max()].iloc[0]


# --- in words ----------------------------------------------------------------------------------------------------


def conclusion(points: pd.DataFrame, axes: Sequence[str]) -> str:
    """Return what to set, what that brings and what it is held against, in a few sentences."""
    chosen = choice(points)
    out = listed(_left_out(points))
    if chosen is None:
        return f"No point of this sweep can be recommended: {out}."
    said = [f"Set {_settings(points, axes, chosen)}: {_figures(chosen)}.", _against_best(points, chosen)]
    said += [f"With {axis_free} instead: {_outcome(row)}." for axis_free, row in _rivals(points, axes, chosen)]
    return " ".join(said + ([f"Left out: {out}."] if out else []))


def _settings(points: pd.DataFrame, axes: Sequence[str], row: Row) -> str:
    names = zip(axes, short_names(axes), strict=True)
    told = [(axis, name) for axis, name in names if points[axis].nunique() > 1 and not _is_idle(axis, row)]
    return listed([f"{name} {row[axis]}" for axis, name in told])


def _is_idle(axis: str, row: Row) -> bool:
    """Whether a setting is without effect: of a tuner that is not there, or of KSM when a tuner sets it."""
    is_tuner = bool({"ksmtuned", "mom"} & {*axis.split(".")})
    return bool(row[axis] == "none") if is_tuner else _is_ksm(axis) and row["mark"] in _KSM_BLOCKS


def _figures(row: Row) -> str:
    return (
        f"a consolidation ratio of {amount(float(row[GAIN]), 'ratio')} for {amount(float(row[COST]), '%')} of the CPU"
    )


def _outcome(row: Row) -> str:
    return row["fault"] or _figures(row)


def _against_best(points: pd.DataFrame, chosen: Row) -> str:
    top = front(points).iloc[-1]
    if top.name == chosen.name:
        return "No other point has a better ratio."
    more, times = top[GAIN] / chosen[GAIN] - 1, top[COST] / chosen[COST]
    return f"The best ratio there is, {more:.1%} more, takes {times:.1f} times the CPU."


def _rivals(points: pd.DataFrame, axes: Sequence[str], chosen: Row) -> Iterator[tuple[str, Row]]:
    """The marked points that differ from the chosen one in KSM's settings only."""
    others = [axis for axis in axes if not _is_ksm(axis)]
    for _, row in points[points["mark"] != ""].iterrows():
        if row.name != chosen.name and all(row[axis] == chosen[axis] for axis in others):
            yield row["mark"], row


def _is_ksm(axis: str) -> bool:
    return any(part in _KSM_BLOCKS for part in axis.split("."))


def _left_out(points: pd.DataFrame) -> list[str]:
    counts = points.loc[points["fault"] != "", "fault"].value_counts()
    return [f"{count:,} of {len(points):,} points ({fault})" for fault, count in counts.items()]


# --- the picture -------------------------------------------------------------------------------------------------


def draw(points: pd.DataFrame, axes: Sequence[str], ax: Axes) -> Axes:
    """Draw the ratio of every point against its CPU, by kind, with the front and the points that have a name."""
    drawn = points[points[GAIN].notna() & points[COST].notna()]
    colours, markers = _looks(drawn, axes)
    for _, row in drawn.iterrows():
        marker = "x" if row["fault"] else markers.of(row)
        ax.plot(row[COST], row[GAIN], marker, color=_light(colours.of(row)), markersize=6, alpha=0.8)
    best = front(points)
    ax.plot(best[COST], best[GAIN], color=_light("ink"), linewidth=1.2, zorder=1, drawstyle="steps-post")
    if drawn[COST].max() > _WIDE * drawn[COST].min() > 0:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.margins(x=0.06, y=0.12)
    ax.grid(visible=True, axis="x")
    ax.set_title("Gain and cost of each setting: memory promised / used, against CPU")
    ax.set_xlabel(
        "CPU overhead (% of the host, logarithmic)" if ax.get_xscale() == "log" else "CPU overhead (% of host)"
    )
    _name_points(points, axes, ax)
    handles = [*colours.handles("s", ""), *markers.handles("", "muted"), *_other_handles(drawn)]
    labels = [fill(str(handle.get_label()), 26) for handle in handles]
    ax.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.02, 1.03), frameon=False, fontsize=9)
    return ax


class _Look(NamedTuple):
    """What the points look like by their settings on some axes."""

    axes: Sequence[str]
    names: Sequence[str]
    looks: Mapping[tuple[object, ...], str]

    @classmethod
    def by(cls, points: pd.DataFrame, axes: Sequence[str], names: Sequence[str], looks: Sequence[str]) -> _Look:
        """Give every combination of settings a look of its own, as long as there are enough."""
        keys = points[list(axes)].drop_duplicates().itertuples(index=False, name=None) if axes else [()]
        return cls(axes, names, dict(zip(keys, cycle(looks), strict=False)))

    def of(self, row: Row) -> str:
        """The look of a point."""
        return self.looks[tuple(row[axis] for axis in self.axes)]

    def handles(self, marker: str, colour: str) -> Iterator[Line2D]:
        """Entries of a legend, with this marker or this colour if the look is the other."""
        for key, look in self.looks.items() if self.axes else ():
            label = ", ".join(f"{name} {value}" for name, value in zip(self.names, key, strict=True))
            yield _handle(marker or look, colour or look, label)


def _looks(points: pd.DataFrame, axes: Sequence[str]) -> tuple[_Look, _Look]:
    """Colours by the first axis that is no setting of KSM, markers by the others."""
    kinds = [(axis, name) for axis, name in zip(axes, short_names(axes), strict=True)
             if not _is_ksm(axis) and points[axis].nunique() > 1]  # fmt: skip
    first, others = kinds[:1], kinds[1:]
    return (_Look.by(points, [axis for axis, _ in first], [name for _, name in first], _COLOURS),
            _Look.by(points, [axis for axis, _ in others], [name for _, name in others], _MARKERS))  # fmt: skip


def _other_handles(points: pd.DataFrame) -> Iterator[Line2D]:
    for fault in points.loc[points["fault"] != "", "fault"].drop_duplicates():
        yield _handle("x", "muted", str(fault))
    yield Line2D([], [], color=_light("ink"), linewidth=1.2, label="the best for their CPU")


def _handle(marker: str, colour: str, label: str) -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, color=_light(colour), label=label)


def _name_points(points: pd.DataFrame, axes: Sequence[str], ax: Axes) -> None:
    """Write what to set, the kernel's default and the tuners beside their points."""
    chosen = choice(points)
    if chosen is None:
        return
    settings = _settings(points, axes, chosen)
    rivals = [(name, row, (10, -10), "left") for name, row in _rivals(points, axes, chosen)]
    for text, row, offset, side in [(f"set {settings}", chosen, (-12, 0), "right"), *rivals]:
        if pd.notna(row[GAIN]):
            at = (row[COST], row[GAIN])
            ax.plot(*at, "o", markersize=13, markerfacecolor="none", color=_light("ink"))
            ax.annotate(fill(text, 34), at, offset, textcoords="offset points", fontsize=9, va="center", ha=side)


def _light(role: str) -> str:
    return COLOURS[role].light
