"""What ksmd's work costs: workloads timed on the kernel, counted in the simulator, and prices fitted to both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sim.columns import PAGE_BYTES
from sim.lab.guest import Pattern
from sim.lab.machine import THP
from sim.lab.record import record
from sim.lab.replay import observe, workload
from sim.memory.pages import Int64
from sim.scenario import Scenario, parse
from sim.sharing.ksm_pass import DONE, PAGES_SCANNED, SNAPSHOT, WORK
from sim.sharing.scanner import ROW, Scanner

Vector = npt.NDArray[np.float64]

ALONE: Final = WORK.index("visit")
WITH_NODE: Final = WORK.index("visit_ksm")
"""Two kinds with one price: ksmd walks to a merged page as to any other, and `node_level` has what comes after."""

_LEAST_NS: Final = 20_000.0
"""Errors are relative to the CPU time of a scan, but for so much that no scan goes without."""
_TOLERATED: Final = 0.08
"""Relative error beyond which a scan counts less and less: an interrupt or the hypervisor came between."""
_ROUNDS: Final = 8
_PRIOR_WEIGHT: Final = 0.01
_SMALL_NS: Final = 100.0
"""A price known to be less than this may as well be this."""
_MOST_COLD: Final = 3.0
_RESAMPLES: Final = 200
_TOGETHER: Final = 0.9


@dataclass(frozen=True)
class Trial:
    """A workload, how its pages differ, and after how many full scans it is over."""

    scenario: Scenario
    pattern: Pattern
    scans: int


@dataclass(frozen=True)
class Scans:
    """Full scans of one workload or more."""

    work: Vector  # (scans, kinds)
    cold: Vector  # (scans,) what the factor of cold caches is multiplied by
    cpu_ns: Vector  # (scans,)
    weight: Vector  # (scans,) 1 / the number of scans of its workload

    @staticmethod
    def joined(parts: Sequence[Scans]) -> Scans:
        """All scans of several workloads."""
        columns = (np.concatenate(column) for column in zip(*map(dataclasses.astuple, parts), strict=True))
        return Scans(*columns)


@dataclass(frozen=True)
class Fit:
    """Prices in ns by kind of work, and the factor of cold caches."""

    prices: Vector
    factor: float

    def predict(self, scans: Scans) -> Vector:
        """CPU time in ns of each full scan."""
        time: Vector = (scans.work @ self.prices) * (1 + self.factor * scans.cold)
        return time

    def error(self, scans: Scans) -> float:
        """Relative error of the CPU time of all the scans together."""
        return float(self.predict(scans).sum() / scans.cpu_ns.sum() - 1)


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


# --- the workloads -------------------------------------------------------------------------------------------------


def trials() -> Iterator[Trial]:
    """Small workloads that between them do every kind of work, each kind more in some than in others."""
    for pages, batch, scans in ((1_000, 100, 10), (4_000, 100, 4), (10_000, 1_000, 7), (40_000, 5_000, 6)):
        yield _trial(f"unique-{pages}-by-{batch}", scans, [_guest(own=pages)], pages_to_scan=batch, pattern="early")
    yield _trial("unique-100000", 4, [_guest(own=100_000)], pages_to_scan=10_000, pattern="early")
    for pages, batch, scans in ((10_000, 1_000, 6), (2_000, 2_000, 8)):
        guests = [_guest(own=pages, differs_at=PAGE_BYTES - 8)]
        yield _trial(f"differ-late-{pages}", scans, guests, pages_to_scan=batch, pattern="late")
    yield _trial("pairs", 6, [_guest(pool=20_000, count=2)], pages_to_scan=4_000)
    yield _trial("pairs-in-one", 8, [_guest(pairs=6_000)], pages_to_scan=6_000)
    yield _trial("merged-by-200", 4, [_guest(pool=5_000, count=2)], pages_to_scan=200)
    for pages, batch, scans in ((4_000, 1_000, 6), (30_000, 5_000, 4)):
        guests = [_guest(pool=pages, count=2), _guest(own=pages, name="other")]
        yield _trial(f"both-trees-{pages}", scans, guests, pages_to_scan=batch)
    for pages, batch, scans in ((20_000, 2_000, 8), (3_000, 400, 8), (3_000, 100, 4), (2_000, 4_000, 16)):
        yield _trial(f"copies-{pages}-by-{batch}", scans, [_guest(copies=pages)], pages_to_scan=batch)
    for pages, limit, scans in ((20_000, 16, 8), (4_000, 3, 10)):
        guests = [_guest(zero=pages)]
        yield _trial(f"chain-of-{limit}", scans, guests, pages_to_scan=2_000, max_page_sharing=limit)
    for pages in (20_000, 5_000):
        yield _trial(f"zero-{pages}", 8, [_guest(zero=pages)], pages_to_scan=2_000, use_zero_pages=1)
    for pages, batch, scans in ((40_000, 20_000, 12), (2_000, 4_000, 24), (4_000, 300, 12)):
        guests = [_guest(own=pages)]
        yield _trial(f"skipped-{pages}", scans, guests, pages_to_scan=batch, smart_scan=1, pattern="early")
    yield _trial("holes", 10, [_guest(own=4_000, holes=31)], pages_to_scan=1_000, pattern="early")
    for pages in (1, 4):
        yield _trial(f"tiny-{pages}", 40, [_guest(own=pages)], pages_to_scan=100, pattern="early")
    yield _trial("few-by-10", 4, [_guest(own=200)], pages_to_scan=10, pattern="early")
    for count, pages, scans in ((24, 2, 20), (12, 3, 30), (6, 100, 16)):
        yield _trial(f"guests-{count}", scans, [_guest(own=pages, pool=pages, count=count)], pages_to_scan=2_000)
    volatile = _guest(own=5_000) | {"bursts": [{"part": "own", "at": "100ms", "every": "160ms"}]}
    yield _trial("volatile", 12, [volatile], pages_to_scan=10_000, sleep_millisecs=200, pattern="early")
    for pages in (20_000, 4_000):
        parent = _guest(copies=pages)
        child = {"name": "child", "memory": parent["memory"], "fork_of": "guest", "start": "1100ms"}
        guests = [parent, child]
        yield _trial(f"forked-{pages}", 8, guests, pages_to_scan=2 * pages, sleep_millisecs=200, pattern="early")
    if THP.is_dir():
        yield from _in_huge_pages()
    yield from _mixtures()


def _in_huge_pages() -> Iterator[Trial]:
    """Guests whose frames lie one after the other."""
    for pages, batch, scans in ((10_240, 1_000, 7), (40_960, 5_000, 6)):
        guests = [_guest(own=pages)]
        yield _trial(f"huge-{pages}-by-{batch}", scans, guests, pages_to_scan=batch, pattern="early", thp=True)
    guests = [_guest(own=20_480), _guest(own=10_240, name="other") | {"huge_pages": "none"}]
    yield _trial("huge-and-small", 6, guests, pages_to_scan=5_000, thp=True)


def _mixtures() -> Iterator[Trial]:
    """Guests with some of everything, as they are in life."""
    small = [_guest(pool=500, own=250, count=2)]
    for sleep, smart, batch, scans in ((20, 1, 5_000, 24), (200, 1, 5_000, 14), (200, 0, 5_000, 10), (20, 1, 300, 14)):
        name = f"small-{sleep}-{smart}-by-{batch}"
        yield _trial(name, scans, small, sleep_millisecs=sleep, smart_scan=smart, pages_to_scan=batch)
    for smart in (0, 1):
        guests = [_guest(pool=1_500, copies=600, own=800, count=3)]
        yield _trial(f"middle-{smart}", 10, guests, pages_to_scan=3_000, smart_scan=smart)
    large = [_guest(pool=10_000, pairs=2_000, own=7_000, count=2)]
    yield _trial("large", 10, large, pages_to_scan=10_000, smart_scan=1)


def _guest(name: str = "guest", count: int = 1, differs_at: int = 0, holes: int = 0, **pages: int) -> dict[str, Any]:
    """A kind of guest with so many pages of each content; with `holes`, so many untouched ones before each."""
    contents: Mapping[str, dict[str, Any]] = {
        "own": {},
        "pool": {"pool": "pool"},
        "pairs": {"duplicates": 2},
        "copies": {"duplicates": 64},
        "zero": {"zero": True},
    }
    parts = [{"name": kind, "size": _size(number), **contents[kind]} for kind, number in pages.items()]
    if holes:
        parts = [part | {"run": "4KiB"} for part in parts]
        untouched = {"untouched": True, "run": _size(holes + 1)}
        parts.append({"name": "untouched", "size": _size(holes * sum(pages.values())), **untouched})
    memory = _size((1 + holes) * sum(pages.values()))
    image = {"parts": parts}
    return {"name": name, "count": count, "memory": memory, "differs_at": f"{differs_at}B", "image": image}


def _size(pages: int) -> str:
    return f"{pages * PAGE_BYTES // 1024}KiB"


def _trial(
    name: str, scans: int, vms: Sequence[Mapping[str, Any]], pattern: Pattern = "random", thp: bool = False, **ksm: int
) -> Trial:
    # khugepaged sleeps all the time: it would take ksmd's caches.
    large = {"enabled": "madvise", "khugepaged": {"scan_sleep_millisecs": 100_000}} if thp else {}
    host = {"memory": "4GiB", "ksm": {"smart_scan": 0, **ksm}, "thp": large}
    return Trial(parse({"name": name, "duration": "12s", "hosts": [host], "vms": [*vms]}), pattern, scans)


# --- the measurement -----------------------------------------------------------------------------------------------


def measured(trials: Sequence[Trial], rounds: int, tell: Callable[[float, str], None]) -> list[Scans]:
    """The full scans of each workload: work as the simulator counts it, CPU time as the kernel takes it.

    All workloads in turn, again and again: a machine that is slow for a minute slows no workload in all its rounds.
    """
    counts = [_counted(trial) for trial in trials]
    taken: list[list[Vector]] = [[] for _ in trials]
    for number in range(rounds):
        for index, trial in enumerate(trials):
            done = (number + index / len(trials)) / rounds
            tell(done, f"ksmd: {trial.scenario.name}, round {number + 1} of {rounds}")
            taken[index].append(_timed(trial, len(counts[index])))
    return [_scans(*each) for each in zip(trials, counts, taken, strict=True)]


def _counted(trial: Trial) -> Int64:
    """Work done by kind, and visits, by the end of each full scan, from the start of the run."""
    done = observe(trial.scenario, _Meter).done[: trial.scans]
    return np.array([np.zeros(len(WORK) + 1, np.int64), *done])


def _timed(trial: Trial, ends: int) -> Vector:
    """CPU time of each full scan in ns, NaN where ksmd was not seen asleep before and after it."""
    plan = dataclasses.replace(workload(trial.scenario, trial.pattern), until_scans=trial.scans)
    frame = record(plan).scans
    frame = frame[frame["proven"] & (frame["full_scans"] < ends)]
    cpu = np.full(ends, np.nan)
    cpu[0] = 0
    cpu[frame["full_scans"]] = frame["ksmd_cpu_ns"]
    return np.diff(cpu)


def _scans(trial: Trial, done: Int64, taken: Sequence[Vector]) -> Scans:
    """Of every full scan the median: other work slows some, and the fastest would be luck."""
    runs = np.array(taken)
    seen = np.flatnonzero(~np.isnan(runs).all(axis=0))
    times = np.nanmedian(runs[:, seen], axis=0)
    each = np.diff(done, axis=0)[seen].astype(np.float64)
    ksm = trial.scenario.hosts[0].ksm
    assert ksm is not None  # every trial is one of ksmd
    cold = _cold(each[:, -1], ksm.pages_to_scan)
    return Scans(each[:, :-1], cold, times, np.full(len(seen), 1 / max(1, len(seen))))


def _cold(visits: Vector, batch: int) -> Vector:
    """Share of the cost that the factor of cold caches adds again, for full batches and a last one (see `Prices`)."""
    full, rest = np.divmod(visits, batch)
    share: Vector = 100 * (full * np.log1p(batch / 100) + np.log1p(rest / 100)) / np.maximum(visits, 1)
    return share


# --- the fit -------------------------------------------------------------------------------------------------------


def fit(scans: Scans, known: Vector) -> Fit:
    """Prices of 0 and more, and the factor of cold caches, with the least relative errors.

    A kind of work that the scans do not tell apart keeps close to its *known* price (ns); see `_rows`.
    """
    from scipy.optimize import minimize_scalar

    def loss(factor: float) -> float:
        return _solved(scans, known, factor)[1]

    factor = float(minimize_scalar(loss, bounds=(0, _MOST_COLD), method="bounded", options={"xatol": 0.01}).x)
    return Fit(_solved(scans, known, factor)[0], factor)


def _solved(scans: Scans, known: Vector, factor: float) -> tuple[Vector, float]:
    """Prices by non-negative least squares with disturbed scans weighted down, and what is left of the errors.

    Source: Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23; the weights are Cauchy's
    (Holland and Welsch, Robust regression using iteratively reweighted least-squares, 1977).
    """
    from scipy.optimize import nnls

    trust = np.ones(len(scans.cpu_ns))
    for _ in range(_ROUNDS):
        rows, goal = _rows(scans, known, factor, trust)
        prices = _shared(nnls(rows, goal)[0])
        errors = (Fit(prices, factor).predict(scans) - scans.cpu_ns) / (scans.cpu_ns + _LEAST_NS) / _TOLERATED
        trust = 1 / (1 + errors**2)
    prior = _PRIOR_WEIGHT * (prices - known) / np.maximum(known, _SMALL_NS)
    return prices, float((scans.weight * np.log1p(errors**2)).sum() + (prior**2).sum())


def _rows(scans: Scans, known: Vector, factor: float, trust: Vector) -> tuple[Vector, Vector]:
    """The equations: one for each scan, and a weak one for each price that says it is what it was known to be."""
    weight = np.sqrt(trust * scans.weight) / ((scans.cpu_ns + _LEAST_NS) * _TOLERATED)
    work = scans.work.copy()
    work[:, ALONE] += work[:, WITH_NODE]
    work[:, WITH_NODE] = 0
    prior = np.diag(_PRIOR_WEIGHT / np.maximum(known, _SMALL_NS))
    rows = np.vstack([work * ((1 + factor * scans.cold) * weight)[:, None], prior])
    return rows, np.append(scans.cpu_ns * weight, prior @ known)


def _shared(prices: Vector) -> Vector:
    """Give the two kinds with one price that price."""
    prices[WITH_NODE] = prices[ALONE]
    return prices


@dataclass(frozen=True)
class Certainty:
    """How well the prices are known: 95 % intervals in ns by kind, and kinds of which only the sum is known well."""

    low: Vector
    high: Vector
    together: Sequence[tuple[str, str]]


def certainty(parts: Sequence[Scans], known: Vector) -> Certainty:
    """Fit again and again to workloads drawn from those measured, each as often as chance has it.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 7 and 13.
    """
    rng = np.random.default_rng(1)
    draws = (rng.integers(len(parts), size=len(parts)) for _ in range(_RESAMPLES))
    found = np.array([fit(Scans.joined([parts[index] for index in draw]), known).prices for draw in draws])
    low, high = np.percentile(found, [2.5, 97.5], axis=0)
    return Certainty(low, high, _together(Scans.joined(parts), known))


def _together(scans: Scans, known: Vector) -> list[tuple[str, str]]:
    """Pairs of kinds whose prices can be traded for each other: their errors would be the opposite of each other."""
    rows, _ = _rows(scans, known, fit(scans, known).factor, np.ones(len(scans.cpu_ns)))
    rows = rows[: len(scans.cpu_ns)]
    done = np.flatnonzero(rows.any(axis=0))
    columns = rows[:, done] / np.linalg.norm(rows[:, done], axis=0)
    covariance = np.linalg.inv(columns.T @ columns + 1e-9 * np.eye(len(done)))
    spread = np.sqrt(np.diag(covariance))
    related = covariance / np.outer(spread, spread)
    pairs = [(a, b) for a in range(len(done)) for b in range(a) if related[a, b] < -_TOGETHER]
    return [(WORK[done[b]], WORK[done[a]]) for a, b in pairs]


def left_out(parts: Sequence[Scans], known: Vector) -> list[float]:
    """Relative error of the CPU time of each workload at prices fitted to all the others."""
    return [
        fit(Scans.joined([*parts[:index], *parts[index + 1 :]]), known).error(part) for index, part in enumerate(parts)
    ]
