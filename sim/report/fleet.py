"""Pictures of a datacenter's run: guests and hosts, memory, energy, and what went wrong, over time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sim.report.pictures import POINTS, _Label, _label, _light, _series, _time_axis, thin
from sim.results.summary import over_hosts
from sim.units import GIB, about_bytes

Drawn = tuple[str, str, str, int, Callable[..., object]]
"""Name, title, caption, number of panels, and what draws them."""

_MARKS: Final = {"migrations": "saved", "guests_refused": "volatile", "host_failures": "metadata", "oom_kills": "cow"}
_KWH: Final = 3.6e6


def pictures_of(fleet: pd.DataFrame, hosts: pd.DataFrame, samples: pd.DataFrame) -> Iterator[Drawn]:
    """Every picture of the run of a datacenter, from its tables."""
    yield (
        "hosts-and-guests", "Guests and hosts over time",
        "Above, guests that run and that wait; below, hosts that are on and those of them with a guest.",
        2, lambda above, below: guests_and_hosts(fleet, above, below),
    )  # fmt: skip
    yield (
        "memory", "Memory over time",
        "Memory promised to guests, touched by them, and used by them on their hosts, at each report. Below, how much "
        "promised memory each used byte carries.",
        2, lambda above, below: memory(samples, above, below),
    )  # fmt: skip
    if fleet["energy_j"].any():
        yield (
            "energy", "Power and energy over time", "What all hosts draw; beside the axis, what they used in all.",
            1, lambda axes: power(fleet, axes),
        )  # fmt: skip
    if any(len(ends) for ends in _happenings(fleet, samples).values()):
        yield (
            "happenings", "What happened when",
            "Each mark is an epoch, or for kills a report, in which it happened at least once.",
            1, lambda axes: happenings(fleet, samples, axes),
        )  # fmt: skip
    yield (
        "guests-per-host", "Guests per host", "How many hosts had how many guests on average over the run.",
        1, lambda axes: guests_per_host(hosts, axes),
    )  # fmt: skip


def guests_and_hosts(fleet: pd.DataFrame, above: Axes, below: Axes) -> tuple[Axes, Axes]:
    """Draw guests that run and wait on one panel, hosts that are on and in use on the other."""
    _lines(fleet, {"guests_running": ("running", "private"), "guests_waiting": ("waiting", "volatile")}, above)
    above.set_title("Guests")
    above.set_xlabel("")
    _lines(fleet, {"hosts_on": ("on", "metadata"), "hosts_used": ("with a guest", "shared")}, below)
    below.set_title("Hosts")
    return above, below


def memory(samples: pd.DataFrame, above: Axes, below: Axes) -> tuple[Axes, Axes]:
    """Draw memory promised, touched and used on one panel, the consolidation ratio on the other."""
    totals = over_hosts(samples)
    parts = {"promised": "volatile", "touched": "shared", "used": "private", "swapped": "cow"}
    columns = [f"mem_{part}_bytes" for part in parts]
    drawn = thin(totals, columns)
    time = _time_axis(above, drawn)
    labels = []
    for part, role in parts.items():
        size = _series(drawn, f"mem_{part}_bytes")
        if size.any():
            above.plot(time, size / GIB, color=_light(role))
            labels.append(_Label(size[-1] / GIB, f"{part} {about_bytes(size[-1])}", _light(role)))
    above.set_ylim(bottom=0)
    above.set_xlabel("")
    above.set_title("Memory of guests, on all hosts (GiB)")
    _label(above, labels)
    promised, used = (_series(drawn, f"mem_{part}_bytes") for part in ("promised", "used"))
    ratio = np.divide(promised, used, out=np.full(len(used), np.nan), where=used > 0)
    below.plot(_time_axis(below, drawn), ratio, color=_light("saved"))
    below.set_ylim(bottom=0)
    below.set_title("Consolidation ratio (memory promised / used)")
    known = ratio[~np.isnan(ratio)]
    if len(known):
        _label(below, [_Label(float(known[-1]), f"{known[-1]:.3g} at the end", _light("saved"))])
    return above, below


def power(fleet: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the power that all hosts draw."""
    drawn = thin(fleet.set_index("time_s"), ["power_w"])
    watts = _series(drawn, "power_w") / 1000
    ax.step(_time_axis(ax, drawn), watts, where="pre", color=_light("metadata"))
    ax.set_ylim(bottom=0)
    ax.set_title("Power of all hosts (kW)")
    used = float(fleet["energy_j"].iloc[-1]) / _KWH
    return _label(ax, [_Label(float(watts[-1]), f"{used:.3g} kWh in all", _light("metadata"))])


def happenings(fleet: pd.DataFrame, samples: pd.DataFrame, ax: Axes) -> Axes:
    """Mark the epochs in which guests moved, were refused or killed, and hosts failed."""
    found = _happenings(fleet, samples)
    shown = {name: ends for name, ends in found.items() if len(ends)}
    clock = fleet.set_index("time_s")
    scale = _time_axis(ax, clock)[-1] / float(clock.index[-1])
    labels = []
    for row, (name, ends) in enumerate(reversed(shown.items())):
        ax.plot(ends * scale, np.full(len(ends), row), "|", color=_light(_MARKS[name]), markersize=14)
        labels.append(_Label(row, name.replace("_", " "), _light(_MARKS[name])))
    ax.set_yticks([])
    ax.set_ylim(-0.6, len(shown) - 0.4)
    ax.set_xlim(0, float(clock.index[-1]) * scale)
    ax.set_title("What happened when")
    return _label(ax, labels)


def guests_per_host(hosts: pd.DataFrame, ax: Axes) -> Axes:
    """Draw how many hosts had how many guests on average."""
    means = hosts["guests_mean"].to_numpy(dtype=np.float64)
    top = max(int(np.ceil(means.max())), 1)
    ax.hist(means, bins=np.linspace(0, top, min(top, 40) + 1).tolist(), color=_light("shared"))
    ax.set_xlabel("guests on a host, mean over the run")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title(f"Number of hosts by guests (of {len(hosts):,} hosts)")
    return ax


def _lines(fleet: pd.DataFrame, columns: dict[str, tuple[str, str]], ax: Axes) -> None:
    drawn = thin(fleet.set_index("time_s"), list(columns), POINTS)
    time = _time_axis(ax, drawn)
    labels = []
    for name, (text, role) in columns.items():
        values = _series(drawn, name)
        if values.any():
            ax.step(time, values, where="pre", color=_light(role))
            labels.append(_Label(float(values[-1]), f"{text} {values[-1]:,.0f}", _light(role)))
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    _label(ax, labels)


def _happenings(fleet: pd.DataFrame, samples: pd.DataFrame) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Ends (s) of the epochs in which each counter grew."""
    kills = over_hosts(samples)["oom_kills"]
    series = {name: fleet.set_index("time_s")[name] for name in _MARKS if name != "oom_kills"} | {"oom_kills": kills}
    return {
        name: each.index.to_numpy(dtype=np.float64)[each.diff().fillna(each).to_numpy() > 0]
        for name, each in series.items()
    }
