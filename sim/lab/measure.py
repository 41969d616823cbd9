"""What ksmd's work costs on this machine: workloads timed on the kernel, counted in the simulator, and prices fitted.

`python -m sim.lab.measure NAME > NAME.yaml` writes a price set; it takes about seven minutes on a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sim.columns import PAGE_BYTES
from sim.cost.prices import DEFAULT, load
from sim.document import dump
from sim.lab.guest import GuestServer, Pattern
from sim.lab.machine import exclusive
from sim.lab.replay import observe, replay
from sim.memory.pages import Int64
from sim.scenario import Scenario, parse
from sim.sharing.ksm_pass import DONE, PAGES_SCANNED, SNAPSHOT, WORK
from sim.sharing.scanner import ROW, Scanner

Vector = npt.NDArray[np.float64]

REPEATS: Final = 4
"""Runs of each workload; of every full scan the fastest counts, since other work only ever slows ksmd down."""
_COLD_FACTORS: Final = np.arange(0, 4.01, 0.05)
_LEAST_NS: Final = 50_000.0
_MOST_SCANS: Final = 24
_PRIOR_WEIGHT: Final = 0.3
_COPIES: Final = 20_000
_CONTENTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "pool": {"pool": "pool"},
    "copies": {"duplicates": 64},
    "zero": {"zero": True},
}


@dataclass(frozen=True)
class Scans:
    """Full scans of one or more runs: the work of each, by kind, its visits per batch and its CPU time."""

    work: Vector  # (scans, kinds)
    cold: Vector  # (scans,) what the factor of cold caches is multiplied by
    cpu_ns: Vector  # (scans,)


class _Meter(Scanner):
    """A scanner that notes how much work was done by the end of each full scan."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.k = self.k._replace(log=np.zeros((1, ROW), np.int64))
        self.done: list[Int64] = []

    def advance(self, horizon: int) -> Iterator[Int64]:
        """Note the work when a row is logged; the log has room for one."""
        for log in super().advance(horizon):
            self.done.append(np.append(self.k.n[DONE : DONE + len(WORK)], log[0, SNAPSHOT + PAGES_SCANNED]))
            yield log


def workloads() -> Iterator[tuple[Scenario, Pattern]]:
    """Small scenarios that between them do every kind of work, each kind more in some than in others."""
    for pages, batch in ((1_000, 100), (4_000, 100), (10_000, 1_000), (40_000, 5_000), (100_000, 10_000)):
        yield _workload(f"unique-{pages}-by-{batch}", _guest(pages, "own"), pages_to_scan=batch, seconds=6), "early"
    yield _workload("differ-late", _guest(10_000, "own", differs_at=PAGE_BYTES - 8), pages_to_scan=1_000), "late"
    yield _workload("pairs", _guest(20_000, "pool", count=2), pages_to_scan=4_000), "random"
    yield _workload("merged", _guest(10_000, "pool", count=2), pages_to_scan=200, seconds=8), "random"
    for pages, batch in ((4_000, 1_000), (30_000, 5_000)):
        guests = [_guest(pages, "pool", count=2), _guest(pages, "own") | {"name": "other"}]
        yield _workload(f"both-trees-{pages}", *guests, pages_to_scan=batch), "random"
    yield _workload("copies", _guest(20_000, "copies"), pages_to_scan=2_000), "random"
    yield _workload("chain", _guest(20_000, "zero"), pages_to_scan=2_000, max_page_sharing=16), "random"
    yield _workload("zero", _guest(20_000, "zero"), pages_to_scan=2_000, use_zero_pages=1), "random"
    yield _workload("skipped", _guest(40_000, "own"), pages_to_scan=20_000, smart_scan=1), "early"
    yield _workload("holes", _guest(4_000, "holes"), pages_to_scan=1_000), "early"
    yield _workload("tiny", _guest(1, "own"), pages_to_scan=100), "early"
    volatile = _guest(5_000, "own") | {"bursts": [{"part": "own", "at": "100ms", "every": "160ms"}]}
    yield _workload("volatile", volatile, pages_to_scan=10_000, sleep_millisecs=200), "early"
    parent = _guest(20_000, "copies")
    child = {"name": "child", "memory": parent["memory"], "fork_of": "guest", "start": "2500ms"}
    yield _workload("forked", parent, child, pages_to_scan=5_000), "early"


def _guest(pages: int, kind: str, count: int = 1, differs_at: int = 0) -> dict[str, Any]:
    """A kind of guest whose pages are all of one kind; between `holes` the pages lie alone."""
    size = f"{pages * PAGE_BYTES // 1024}KiB"
    contents: dict[str, dict[str, Any]] = {
        "pool": {"pool": "pool"},
        "copies": {"duplicates": 64},
        "zero": {"zero": True},
    }
    part = {"name": kind, "size": size, **contents.get(kind, {})}
    holes = {"name": "untouched", "size": f"{31 * pages * PAGE_BYTES // 1024}KiB", "untouched": True, "run": "128KiB"}
    parts = [part | {"run": "4KiB"}, holes] if kind == "holes" else [part]
    memory = f"{pages * PAGE_BYTES // 1024 * (32 if kind == 'holes' else 1)}KiB"
    return {
        "name": "guest",
        "count": count,
        "memory": memory,
        "differs_at": f"{differs_at}B",
        "image": {"parts": parts},
    }


def _workload(name: str, *vms: Mapping[str, Any], seconds: int = 4, **ksm: int) -> Scenario:
    host = {"memory": "4GiB", "ksm": {"smart_scan": 0, **ksm}}
    return parse({"name": name, "duration": f"{seconds}s", "hosts": [host], "vms": [*vms]})


def measured(cases: Sequence[tuple[Scenario, Pattern]], repeats: int = REPEATS) -> list[Scans]:
    """The full scans of each scenario: work as the simulator counts it, CPU time as the kernel takes it."""
    counts = [np.array([np.zeros(len(WORK) + 1), *observe(scenario, _Meter).done]) for scenario, _ in cases]
    # All workloads in turn, again and again: other work on the machine then slows no workload in all its runs.
    runs = [[_timed(*case, len(done)) for case, done in zip(cases, counts, strict=True)] for _ in range(repeats)]
    taken = [np.fmin.reduce(times) for times in zip(*runs, strict=True)]
    return [_scans(scenario, *each) for (scenario, _), *each in zip(cases, counts, taken, strict=True)]


def _timed(scenario: Scenario, pattern: Pattern, ends: int) -> Vector:
    """CPU time of each full scan in ns, NaN where ksmd was not seen asleep before and after it."""
    frame = replay(scenario, pattern).scans
    frame = frame[frame["proven"] & (frame["full_scans"] < ends)]
    cpu = np.full(ends, np.nan)
    cpu[0] = 0
    cpu[frame["full_scans"]] = frame["ksmd_cpu_ns"]
    return np.diff(cpu)


def _scans(scenario: Scenario, done: Vector, taken: Vector) -> Scans:
    seen = np.flatnonzero(~np.isnan(taken))[:_MOST_SCANS]
    each = np.diff(done, axis=0)[seen]
    work, visits = each[:, :-1], each[:, -1]
    batch = scenario.hosts[0].ksm.pages_to_scan
    work[:, WORK.index("batch")] = visits // batch + 1
    return Scans(work, _cold(visits, batch), taken[seen])


def _cold(visits: Vector, batch: int) -> Vector:
    """Share of the cost that the factor of cold caches adds again, for full batches and a last one (see `Prices`)."""
    full, rest = np.divmod(visits, batch)
    share: Vector = 100 * (full * np.log1p(batch / 100) + np.log1p(rest / 100)) / np.maximum(visits, 1)
    return share


def predicted(scans: Scans, prices: Vector, factor: float) -> Vector:
    """CPU time in ns of each full scan at these prices (ns by kind)."""
    time: Vector = (scans.work @ prices) * (1 + factor * scans.cold)
    return time


def fit(scans: Scans, prior: Vector) -> tuple[Vector, float]:
    """Prices in ns by kind, none below 0, and factor of cold caches with the least relative errors.

    Some kinds of work nearly always come together; *prior*, prices in ns, says how they divide their sum.
    """
    weight = 1 / (scans.cpu_ns + _LEAST_NS)
    goal = np.append(scans.cpu_ns * weight, np.full(len(prior), _PRIOR_WEIGHT))

    def solve(factor: float) -> tuple[Vector, float]:
        rows = np.vstack([scans.work * ((1 + factor * scans.cold) * weight)[:, None], np.diag(_PRIOR_WEIGHT / prior)])
        prices = nonnegative_least_squares(rows, goal)
        return prices, float(np.sum((rows @ prices - goal) ** 2))

    best = min(_COLD_FACTORS, key=lambda factor: solve(factor)[1])
    return solve(best)[0], float(best)


def nonnegative_least_squares(rows: Vector, goal: Vector) -> Vector:
    """The x >= 0 with the least |rows x - goal|.

    Source: Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23 (active sets).
    """
    scale = np.linalg.norm(rows, axis=0)
    scale[scale == 0] = 1
    rows = rows / scale
    x = np.zeros(rows.shape[1])
    free = np.zeros(len(x), bool)
    for _ in range(3 * len(x)):
        gradient = rows.T @ (goal - rows @ x)
        if free.all() or gradient[~free].max() <= 1e-10 * len(goal):
            break
        free[np.argmax(np.where(free, -np.inf, gradient))] = True
        while True:
            trial = np.zeros(len(x))
            trial[free] = np.linalg.lstsq(rows[:, free], goal, rcond=None)[0]
            blocked = free & (trial <= 0)
            if not blocked.any():
                break
            step = np.min(x[blocked] / (x[blocked] - trial[blocked]))
            x += step * (trial - x)
            free &= x > 1e-12
            x[~free] = 0
        x = trial
    solution: Vector = x / scale
    return solution


def cow_break_ns() -> float:
    """Time of a guest's write to a KSM page in ns, the median of some thousands."""
    pages = np.arange(_COPIES)
    keys = pages.astype(np.uint64) + np.uint64(1)
    with exclusive(2 * _COPIES * PAGE_BYTES) as ksm, contextlib.closing(GuestServer(ksm.token)) as server:
        ksm.set(smart_scan=0, pages_to_scan=_COPIES, sleep_millisecs=1)
        for name in ("one", "other"):
            guest = server.spawn(name, _COPIES, "early")
            guest.write(pages, keys)
            guest.madvise(0, _COPIES, "MERGEABLE")
        ksm.set(run=1)
        while ksm.read("pages_sharing") < _COPIES:
            pass
        ksm.set(run=0)
        return float(np.median([guest.touch(part, 1) / len(part) for part in np.array_split(pages, 100)]))


def price_set(name: str) -> dict[str, Any]:
    """Measure this machine and return its price set as plain data."""
    everything = measured([*workloads()])
    scans = Scans(
        np.concatenate([each.work for each in everything]),
        np.concatenate([each.cold for each in everything]),
        np.concatenate([each.cpu_ns for each in everything]),
    )
    known = load(DEFAULT)
    prices, factor = fit(scans, np.array([known.picoseconds(kind) / 1000 for kind in WORK]))
    error = np.median(np.abs(predicted(scans, prices, factor) / scans.cpu_ns - 1))
    source = (
        f"fitted to {len(scans.cpu_ns)} full scans of {len(everything)} workloads, median error {error:.1%} "
        "(sim/lab/measure.py)"
    )
    ksmd = {kind: {"ns": round(float(price), 2), "source": source} for kind, price in zip(WORK, prices, strict=True)}
    return {
        "name": name,
        "about": f"{_processor()}, Linux {platform.release()}, {datetime.date.today():%B %Y}",
        **ksmd,
        "cow_break": {"ns": round(cow_break_ns()), "source": "measured: writes of a guest to KSM pages, median"},
        "cold_caches": {"factor": round(factor, 2), "source": source},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


def main() -> None:
    """Write the price set of this machine to the standard output."""
    parser = argparse.ArgumentParser(description="Measure what ksmd's work costs on this machine (root, about 7 min).")
    parser.add_argument("name", help="name of the price set and of its file")
    sys.stdout.write(dump(price_set(parser.parse_args().name)))


if __name__ == "__main__":
    main()
