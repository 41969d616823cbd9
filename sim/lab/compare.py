"""A simulated scenario against runs of the kernel: functions over frames of full scans, and what they may differ by.

A run's scans are the rows of its scans table, numbered (see `numbered`). Where memory is static, every counter of
every full scan must be the kernel's. Where guests write at random, no two runs of the kernel are equal: there the
ranges of a few simulated runs and a few runs of the kernel must meet, give or take SLACK.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from sim import files
from sim.columns import KSM_COUNTERS, PAGE_BYTES

_SPLITS: Final = "thp_split_page"
COUNTERS: Final = (*(column.name for column in KSM_COUNTERS if column.name != "full_scans"), _SPLITS)
SLACK: Final = 0.01
"""Share of the pages by which a counter may leave the kernel's spread where memory changes; splits: of their number."""
TIME: Final = 0.03
"""Share by which the time of the last full scan may differ."""
CPU: Final = 0.10
"""Share by which ksmd's CPU time may differ."""
PACE: Final = 0.05
"""Share by which the kernel's scans may be slower or faster and still see the same writes."""
VAGUE: Final = 0.10
"""Share of the pages from which on a spread of the kernel's own runs is too wide to prove anything."""
SEEN: Final = 0.9
"""Share of the scans that must have been read whole."""
LEAST: Final = 3
"""Scans that a comparison needs."""

_KINDS: Final = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
_RECORDED: Final = ("time_s", *COUNTERS, "ksmd_cpu_ns", "stolen_ns", "proven")
_INDEX: Final = ("unmerges", "full_scans")

Scans = pd.DataFrame
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """One figure at the last common scan: the simulated one, the kernel's range, and how far the means are apart."""

    simulated: float
    lowest: float
    highest: float
    error: float
    """(simulated - kernel) / kernel, each the mean of its runs."""
    allowed: float
    stolen: float = 0.0
    """By how much the kernel's figure may be too large because the hypervisor took ksmd's core away."""

    @property
    def spread(self) -> float:
        """The kernel's range as a share of its middle."""
        return (self.highest - self.lowest) / max((self.highest + self.lowest) / 2, 1e-9)

    @property
    def agrees(self) -> bool:
        """Whether the simulated figure is as near as it must be to what the kernel's runs span."""
        lowest = self.lowest - self.stolen
        return lowest * (1 - self.allowed) <= self.simulated <= self.highest * (1 + self.allowed)


@dataclass(frozen=True)
class Comparison:
    """What became of one scenario.

    `counters` has a row for each counter: `simulated`, `lowest`, `highest` at the last common scan, then over all
    scans the largest `error` (how far the simulated range lies outside the kernel's), the kernel's largest `spread`,
    and the same as shares of the pages (`error_share`, `spread_share`). `outside` has the scans and counters that
    are further out than allowed.
    """

    exact: bool
    scans: int
    """Full scans compared."""
    expected: int
    """Full scans that both sides have."""
    pages: int
    counters: pd.DataFrame
    outside: pd.DataFrame
    time: Figure
    cpu: Figure

    @property
    def error(self) -> float:
        """The largest error of any counter, as a share of the pages."""
        return float(self.counters["error_share"].max())

    @property
    def spread(self) -> float:
        """The kernel's largest spread of a count of pages by kind, as a share of the pages."""
        return float(self.counters.loc[list(_KINDS), "spread_share"].max())

    def faults(self) -> list[str]:
        """What is outside the tolerances, in words; empty when simulator and kernel agree."""
        return [*self.counter_faults(), *self.figure_faults()]

    def counter_faults(self) -> list[str]:
        """The same of the counters alone: what does not depend on how fast the machine is."""
        faults = []
        if self.scans < max(LEAST, SEEN * self.expected):
            faults.append(f"only {self.scans} of {self.expected} scans can be compared")
        if self.spread > VAGUE:
            faults.append(f"the kernel's runs differ by {self.spread:.0%} of the pages and prove nothing")
        if not self.outside.empty:
            faults.append(f"{', '.join(self.outside.columns)} in {len(self.outside)} of {self.scans} scans")
        return faults

    def figure_faults(self) -> list[str]:
        """The same of the scan time and ksmd's CPU time."""
        figures = (("scan time", self.time), ("ksmd CPU", self.cpu))
        return [
            f"{name} {figure.error:+.1%} (allowed {figure.allowed:.0%})"
            for name, figure in figures
            if not figure.agrees
        ]


def numbered(scans: pd.DataFrame) -> Scans:
    """Scans by their number and how often it was set back before by run = 2.

    Of two rows for one scan, read while ksmd was between two, the one that was read whole counts.
    """
    unmerges = (scans["full_scans"].diff() < 0).cumsum().rename(_INDEX[0])
    found = scans.set_index([unmerges, "full_scans"])
    best = found.sort_values("proven", kind="stable") if "proven" in found else found
    return best[~best.index.duplicated(keep="last")].sort_values("time_s", kind="stable")


def compare(
    simulated: Sequence[Scans], measured: Sequence[Scans], exact: bool, paced: Sequence[Scans] = ()
) -> Comparison:
    """Hold simulated runs against the kernel's; *exact* where every counter must be the kernel's.

    Exact comparisons leave out scans that were not read whole before ksmd moved on. *paced* are the simulated runs
    at this kernel's speed, where that is another than their prices say: they are what counters are taken from.
    """
    ours = paced or simulated
    expected = _common([*ours, *measured])
    common = _common([*ours, *(scans[scans["proven"]] for scans in measured)]) if exact else expected
    lowest, highest = _range(ours, common)
    low, high = _range(measured, common)
    error = np.maximum(np.maximum(low - highest, lowest - high), 0.0)
    pages = _pages(measured[0])
    unit = np.array([PAGE_BYTES if name == "general_profit" else 1.0 for name in COUNTERS])
    slack = SLACK * pages * unit
    slack[COUNTERS.index(_SPLITS)] = SLACK * high[:, COUNTERS.index(_SPLITS)].max(initial=0.0)
    beyond = pd.DataFrame(error > (0.0 if exact else slack), common, COUNTERS)
    shown = ours[0].loc[common, list(COUNTERS)].where(beyond)
    last = common[-1:]
    timed = _common([*simulated, *measured])[-1:]
    counters = pd.DataFrame(
        {
            "simulated": ours[0].loc[last, list(COUNTERS)].to_numpy(float).mean(axis=0),
            "lowest": _range(measured, last)[0].mean(axis=0),
            "highest": _range(measured, last)[1].mean(axis=0),
            "error": error.max(axis=0, initial=0.0),
            "spread": (high - low).max(axis=0, initial=0.0),
        },
        index=pd.Index(COUNTERS, name="counter"),
    )
    counters["error_share"] = counters["error"] / unit / max(pages, 1)
    counters["spread_share"] = counters["spread"] / unit / max(pages, 1)
    return Comparison(
        exact,
        len(common),
        len(expected),
        pages,
        counters,
        shown.dropna(how="all").dropna(axis=1, how="all"),
        _figure(simulated, measured, timed, "time_s", TIME, _stolen_ns(measured, timed) / 1e9),
        _figure(simulated, measured, timed, "ksmd_cpu_ns", CPU, 0.0),  # the kernel does not count stolen time as ksmd's
    )


def in_step(simulated: Scans, measured: Scans, moments_s: Sequence[float]) -> bool:
    """Whether what happens at these times happened between the same two scans on both sides."""
    ours, theirs = (np.searchsorted(each["time_s"].to_numpy(), moments_s) for each in (simulated, measured))
    return np.array_equal(ours, theirs)


def pace(simulated: Scans, measured: Scans) -> float:
    """How many times as long ksmd takes for its work on this kernel as in the simulation."""
    last = _common([simulated, measured])[-1:]
    real, expected = (float(each.loc[last, "ksmd_cpu_ns"].sum()) for each in (measured, simulated))
    return real / expected if expected else 1.0


def keeps_pace(simulated: Scans, measured: Scans) -> bool:
    """Whether all full scans on both sides ended at about the same times: then each has seen the same writes."""
    common = _common([simulated, measured])
    ours, theirs = (each.loc[common, "time_s"].to_numpy(float) for each in (simulated, measured))
    return bool(np.abs(ours - theirs).max(initial=0.0) <= PACE * min(ours[-1], theirs[-1]))


def write_recording(runs: Sequence[Scans], file: Path) -> None:
    """Keep runs of the kernel as a compressed CSV file; equal runs give equal bytes."""
    frame = pd.concat([scans.assign(run=number) for number, scans in enumerate(runs)])
    frame = frame[["run", *_RECORDED]]
    files.publish(file, compressed(frame.to_csv()))


def compressed(text: str) -> bytes:
    """A text as the contents of a gzip file, with no time in them."""
    return gzip.compress(text.encode(), mtime=0)


def read_recording(file: Path) -> list[Scans]:
    """The runs in a file that `write_recording` wrote."""
    runs = pd.read_csv(file, index_col=list(_INDEX))
    for late in ("stolen_ns", _SPLITS):
        if late not in runs:
            runs[late] = 0
    return [scans.drop(columns="run") for _, scans in runs.groupby("run")]


def _common(runs: Sequence[Scans]) -> pd.MultiIndex:
    """The scans that all runs have."""
    index = runs[0].index
    for scans in runs[1:]:
        index = index.intersection(scans.index)
    assert isinstance(index, pd.MultiIndex)
    return index.sort_values()


def _range(runs: Sequence[Scans], index: pd.MultiIndex) -> tuple[Vector, Vector]:
    """Least and largest value of each counter at each scan."""
    values = [scans.loc[index, list(COUNTERS)].to_numpy(float) for scans in runs]
    return np.minimum.reduce(values), np.maximum.reduce(values)


def _pages(scans: Scans) -> int:
    """Pages that KSM knows, at most: those with an item."""
    return int(scans[list(_KINDS)].sum(axis=1).max())


def _stolen_ns(measured: Sequence[Scans], last: pd.MultiIndex) -> float:
    """Time that the hypervisor took from ksmd's core up to a scan, in the run that had least of it."""
    return min(float(scans.loc[last, "stolen_ns"].sum()) for scans in measured)


def _figure(
    simulated: Sequence[Scans],
    measured: Sequence[Scans],
    last: pd.MultiIndex,
    name: str,
    allowed: float,
    stolen: float,
) -> Figure:
    ours = float(np.mean([scans.loc[last, name].sum() for scans in simulated]))
    theirs = [float(scans.loc[last, name].sum()) for scans in measured]
    mean = float(np.mean(theirs))
    return Figure(ours, min(theirs), max(theirs), ours / mean - 1 if mean else 0.0, allowed, stolen)
