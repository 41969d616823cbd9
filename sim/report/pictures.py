"""Pictures of a run: each function draws frames with the columns of `sim.columns` on axes and returns the axes."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from sim.report.style import COLOURS
from sim.results.summary import over_hosts
from sim.units import GIB, MIB, about_bytes

Floats = npt.NDArray[np.float64]

POINTS = 400
"""Points a long series is thinned to."""

_MEMORY = ("huge", "private", "deferred", "shared", "metadata", "pool", "writeback", "reserved")
_OFTEN = ("private", "shared", "metadata")
_COUNTERS = {
    "pages_sharing": ("saved", "-"),
    "pages_shared": ("shared", "-"),
    "pages_unshared": ("private", "--"),
    "pages_volatile": ("volatile", "-."),
    "ksm_zero_pages": ("zero", ":"),
}
_CPU = {
    "scan": ("scan",),
    "merge": ("merge",),
    "cow": ("cow",),
    "source": ("source",),
    "swap": ("kswapd", "reclaim", "swap"),
    "tlb": ("tlb",),
}
"""Components of the CPU time, and the columns that each is the sum of."""
_CPU_NAMES = {"scan": "scan", "merge": "merge", "cow": "COW (guests)", "source": "sharing at the source",
              "swap": "reclaim, swap", "tlb": "TLB misses (guests)"}  # fmt: skip
_ALWAYS = ("scan", "merge", "cow")
_SCAN_MARKS = 60
_LABEL_GAP = 0.075


class _Label(NamedTuple):
    """A text beside the right edge, at the height of what it names."""

    height: float
    text: str
    colour: str


def memory(samples: pd.DataFrame, ax: Axes) -> Axes:
    """Draw where the memory of all hosts is over time, and on top of it what sharing adds."""
    totals = over_hosts(samples)
    parts = [part for part in _MEMORY if part in _OFTEN or totals[f"mem_{part}_bytes"].any()]
    drawn = thin(totals, [f"mem_{part}_bytes" for part in (*parts, "free")] + ["saved_bytes"])
    unit, scale = ("GiB", GIB) if totals["mem_total_bytes"].max() >= GIB else ("MiB", MIB)
    time = _time_axis(ax, drawn)
    base = np.zeros(len(drawn))
    labels = []
    for part in (*parts, "free", "saved"):
        size = _series(drawn, "saved_bytes" if part == "saved" else f"mem_{part}_bytes")
        if part == "private":
            size = size - _series(drawn, "mem_huge_bytes")  # its part in huge pages is drawn below it
        top = base + size / scale
        _band(ax, time, base, top, part)
        if size.any():
            name = {"private": "small", "huge": "huge"}.get(part, part) if "huge" in parts else part
            labels.append(_Label((base[-1] + top[-1]) / 2, f"{name} {about_bytes(size[-1])}", _light(part)))
        base = top
    total = _series(drawn, "mem_total_bytes")
    ax.plot(time, total / scale, color=_light("ink"), linewidth=1.2)
    labels.append(_Label(total[-1] / scale, f"host memory {about_bytes(total[-1])}", _light("ink")))
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 4, 8, 10]))
    ax.set_ylim(bottom=0)
    ax.set_title(f"Memory: host frames by use, and above the line what sharing adds ({unit})")
    return _label(ax, labels)


def counters(samples: pd.DataFrame, scans: pd.DataFrame, ax: Axes) -> Axes:
    """Draw KSM's page counters of all hosts over time, with a mark at each end of a full scan while they are few."""
    totals = over_hosts(samples)
    shown = [name for name in _COUNTERS if totals[name].any() or name != "ksm_zero_pages"]
    drawn = thin(totals, shown)
    time = _time_axis(ax, drawn)
    marks = scans["time_s"].to_numpy(dtype=np.float64)
    if 0 < len(marks) <= _SCAN_MARKS:
        _mark_scans(ax, marks / _time_unit(float(totals.index[-1]))[0])
    labels = []
    for name in shown:
        role, dashes = _COUNTERS[name]
        pages = _series(drawn, name)
        ax.plot(time, pages, color=_light(role), linestyle=dashes)
        labels.append(_Label(pages[-1], f"{name} {pages[-1]:,.0f}", _light(role)))
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_title("KSM counters (pages); ticks at the top: ends of full scans")
    return _label(ax, labels)


def cpu(samples: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the CPU time spent because of sharing, as percent of one core, mean over hosts and over each interval."""
    spent = cpu_percent(samples)
    time = _time_axis(ax, spent)
    base = np.zeros(len(spent))
    labels = []
    for part in _CPU:
        share = _series(spent, part)
        if part not in _ALWAYS and not share.any():
            continue
        top = base + share
        _band(ax, time, base, top, part, step="pre")
        mean = _time_mean(spent, part)
        labels.append(_Label((base[-1] + top[-1]) / 2, f"{_CPU_NAMES[part]}, mean {mean:.3g} %", _light(part)))
        base = top
    ax.set_ylim(bottom=0)
    ax.set_title(f"CPU spent for overcommit (% of one core{_mean_of(samples)})")
    return _label(ax, labels)


def swap(samples: pd.DataFrame, ax: Axes) -> Axes:
    """Draw guest memory that is swapped out, of all hosts."""
    totals = over_hosts(samples)
    drawn = thin(totals, ["mem_swapped_bytes"])
    unit, scale = ("GiB", GIB) if totals["mem_swapped_bytes"].max() >= GIB else ("MiB", MIB)
    swapped = _series(drawn, "mem_swapped_bytes")
    _band(ax, _time_axis(ax, drawn), np.zeros(len(drawn)), swapped / scale, "swap")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("")
    ax.set_title(f"Swapped out ({unit})")
    return _label(ax, [_Label(swapped[-1] / scale, f"{about_bytes(swapped[-1])} at the end", _light("swap"))])


def stalls(samples: pd.DataFrame, ax: Axes) -> Axes:
    """Draw for how much of the time guests waited for memory (PSI), mean over hosts."""
    spent = _rates(samples, {"some": ("psi_some_ns",), "full": ("psi_full_ns",)})
    time = _time_axis(ax, spent)
    labels = []
    for kind, role, dashes in (("some", "swap", "-"), ("full", "metadata", "--")):
        ax.step(time, _series(spent, kind), where="pre", color=_light(role), linestyle=dashes)
        labels.append(_Label(_series(spent, kind)[-1], f"{kind}, mean {_time_mean(spent, kind):.3g} %", _light(role)))
    ax.set_ylim(bottom=0)
    ax.set_title(f"Pressure stall information (% of the time{_mean_of(samples)})")
    return _label(ax, labels)


def huge_pages(samples: pd.DataFrame, ax: Axes) -> Axes:
    """Draw huge pages given, made and split so far, of all hosts."""
    totals = over_hosts(samples)
    names = {"thp_fault_alloc": "huge", "thp_collapse_alloc": "saved", "thp_split_page": "metadata"}
    drawn = thin(totals, list(names))
    time = _time_axis(ax, drawn)
    labels = []
    for name, role in names.items():
        pages = _series(drawn, name)
        ax.plot(time, pages, color=_light(role))
        labels.append(_Label(pages[-1], f"{name} {pages[-1]:,.0f}", _light(role)))
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_title("Huge pages: given at a touch, made by khugepaged, split")
    return _label(ax, labels)


def gain_and_cost(samples: pd.DataFrame, gain: Axes, cost: Axes) -> tuple[Axes, Axes]:
    """Draw the consolidation ratio over time on `gain` and the CPU use of ksmd on `cost`."""
    totals = over_hosts(samples)
    running = (totals["guests_running"] > 0) & (totals["mem_used_bytes"] > 0)
    totals["ratio"] = (totals["mem_promised_bytes"] / totals["mem_used_bytes"]).where(running)
    drawn = thin(totals, ["ratio"])
    gain.plot(_time_axis(gain, drawn), _series(drawn, "ratio"), color=_light("saved"))
    gain.set_ylim(bottom=0)
    gain.set_title("Gain: consolidation ratio (memory promised / used)")
    gain.set_xlabel("")
    if running.any():
        last = float(totals["ratio"].dropna().iloc[-1])
        _label(gain, [_Label(last, f"{last:.3g} at the end", _light("saved"))])
    return gain, ksmd_cost(samples, cost)


def ksmd_cost(samples: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the CPU use of ksmd."""
    spent = cpu_percent(samples)
    ksmd = _series(spent, "ksmd")
    ax.step(_time_axis(ax, spent), ksmd, where="pre", color=_light("scan"))
    ax.set_ylim(bottom=0)
    ax.set_title(f"Cost: ksmd (% of one core{_mean_of(samples)})")
    return _label(ax, [_Label(ksmd[-1], f"{ksmd[-1]:.3g} % at the end", _light("scan"))])


def thin(frame: pd.DataFrame, columns: Sequence[str], points: int = POINTS) -> pd.DataFrame:
    """Return about `points` rows of `frame` that keep the lows and highs of `columns`, and the first and last row."""
    if len(frame) <= points:
        return frame
    buckets = np.array_split(np.arange(len(frame)), max(1, points // (2 * len(columns))))
    kept = {0, len(frame) - 1}
    for name in columns:
        values = _series(frame, name)
        for bucket in buckets:
            part = values[bucket]
            if not np.isnan(part).all():
                kept |= {int(bucket[np.nanargmin(part)]), int(bucket[np.nanargmax(part)])}
    return frame.iloc[sorted(kept)]


def cpu_percent(samples: pd.DataFrame, points: int = POINTS) -> pd.DataFrame:
    """Return each component of the CPU time, and ksmd's, as percent of one core, mean over hosts, in at most `points`
    intervals.

    Rows are indexed by the end of the interval in seconds; the first repeats the second, to start a step plot.
    """
    parts = {**_CPU, "ksmd": ("ksmd",)}
    return _rates(samples, {part: [f"{name}_cpu_ns" for name in names] for part, names in parts.items()}, points)


def _rates(samples: pd.DataFrame, parts: Mapping[str, Sequence[str]], points: int = POINTS) -> pd.DataFrame:
    """Return sums of counters of nanoseconds as percent of the time, mean over hosts."""
    totals = over_hosts(samples)
    # The counters are cumulative: leaving out rows between keeps the mean of the longer interval exact.
    rows = np.unique(np.linspace(0, len(totals) - 1, min(points + 1, len(totals))).astype(int))
    ends = totals.iloc[rows]
    spent = pd.DataFrame({part: ends[list(names)].astype(float).sum(axis=1) for part, names in parts.items()})
    rate = spent.diff().div(np.diff(ends.index.to_numpy(), prepend=np.nan), axis=0) / 1e7
    return rate.div(ends["hosts"], axis=0).bfill().fillna(0.0)


def _band(ax: Axes, time: Floats, low: Floats, high: Floats, role: str, step: Literal["pre"] | None = None) -> None:
    band = ax.fill_between(time, low, high, step=step, facecolor=_light(role), linewidth=0)
    if role == "saved":
        band.set(facecolor="none", edgecolor=_light(role), hatch="////")


def _time_axis(ax: Axes, frame: pd.DataFrame) -> Floats:
    """Label the time axis in a fitting unit and return the times of `frame` in it."""
    seconds = frame.index.to_numpy(dtype=np.float64)
    scale, unit = _time_unit(seconds[-1])
    ax.set_xlabel(f"simulated time ({unit})")
    ax.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    return seconds / scale


def _time_unit(seconds: float) -> tuple[float, str]:
    fitting = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))
    return next((unit for unit in fitting if seconds >= 3 * unit[0]), (1.0, "s"))


def _mark_scans(ax: Axes, times: Floats) -> None:
    ax.plot(times, np.ones(len(times)), "|", color=_light("muted"), transform=ax.get_xaxis_transform(), clip_on=False)


def _label(ax: Axes, labels: Sequence[_Label]) -> Axes:
    """Write `labels` beside the right edge, apart from each other, each tied to its height."""
    bottom, top = ax.get_ylim()
    ordered = sorted(labels, key=lambda label: label.height)
    heights = [(label.height - bottom) / (top - bottom) for label in ordered]
    for label, height, place in zip(ordered, heights, _spread(heights, _LABEL_GAP), strict=True):
        ax.annotate(
            label.text,
            xy=(1.0, height),
            xytext=(1.03, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            verticalalignment="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": label.colour,
                "linewidth": 2.5,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )
    return ax


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Return ascending `heights` moved just enough to lie `gap` apart and below the top where they fit."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    ceiling = 1.0
    for position in reversed(range(len(placed))):
        placed[position] = min(placed[position], ceiling)
        ceiling = placed[position] - gap
    return placed


def _series(frame: pd.DataFrame, name: str) -> Floats:
    return frame[name].to_numpy(dtype=np.float64)


def _time_mean(spent: pd.DataFrame, part: str) -> float:
    widths = np.diff(spent.index.to_numpy(), prepend=spent.index[0])
    return float(np.average(spent[part], weights=widths if widths.any() else None))


def _mean_of(samples: pd.DataFrame) -> str:
    hosts = int(over_hosts(samples)["hosts"].iloc[-1])
    return f", mean of {hosts:,} hosts" if hosts > 1 else ""


def _light(role: str) -> str:
    return COLOURS[role].light
