"""A whole run of a datacenter: the control plane and the hosts' shards take turns, an epoch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from sim.columns import Window
from sim.datacenter import control
from sim.datacenter.blocks import Datacenter
from sim.datacenter.control import ControlPlane, Question
from sim.datacenter.crew import SAVING_S, WINDOW, Crew, split
from sim.datacenter.ledger import Tables
from sim.datacenter.messages import REPORT, SUMMED, Answer, Ended, Int64, Order, Orders, UInt8
from sim.datacenter.shard import LARGEST, Shard, Spec, digest_of_files, kinds_of
from sim.datacenter.shard import Tables as ShardTables
from sim.units import SECOND

Progress = Callable[[int, str], None]
"""Told the simulated time (ns), and what is going on."""

_FREE: Final = REPORT.index("mem_free_bytes")
_LARGEST: Final = np.array([name in LARGEST for name in SUMMED])


@dataclass(frozen=True)
class Found:
    """What became of a datacenter. Columns by name, in the order of time and of the kinds of host."""

    samples: Mapping[str, Any]
    """One row for each report and kind of host, whose name it has; columns that mean nothing as a sum are left out."""
    guests: Sequence[Mapping[str, object]]
    events: Sequence[Mapping[str, object]]
    work: Mapping[str, int]
    plane: Tables
    metrics: Mapping[str, int | float | None]
    """Figures that the tables do not tell."""


def simulate(
    question: Question, scale: int = 1, jobs: int = 1, cluster: str | None = None, progress: Progress | None = None
) -> Found:  # fmt: skip
    """Run it in this process, in so many, or on the Dask cluster at an address; it is the same to the last bit.

    Raises UserError if the cluster cannot be reached, MachineError if workers keep dying.
    """
    rules = question.datacenter
    assert rules is not None  # or there is no datacenter
    spec = _spec(question, rules, scale)
    plane = ControlPlane(question, _fingerprints(spec) if spec.fingerprints else None)
    with Crew[Spec, Orders, Answer, ShardTables](Shard, jobs, cluster, WINDOW, SAVING_S) as crew:
        parts = split([host.memory for _, host in spec.hosts], crew.workers)
        crew.begin([_part(spec, numbers) for numbers in parts])
        kinds = [host.name for host in sorted(question.hosts, key=lambda each: each.name)]
        heard = _Heard(kinds, question.window or Window(0, question.duration))
        owner = np.zeros(len(spec.hosts), np.int64)
        for number, numbers in enumerate(parts):
            owner[numbers] = number
        now = 0
        while now < question.duration:
            until = min(now + rules.epoch, question.duration)
            told: list[list[Order]] = [[] for _ in parts]
            for order in plane.decide(now):
                told[owner[order.host]].append(order)
            reports = plane.due_for_report(until)
            answers = crew.advance([Orders(until, reports, orders) for orders in told])
            for answer in answers:
                plane.hear(until, answer)
            heard.take(until, answers)
            now = until
            if progress:
                progress(now, f"{len(plane.guests):,} guests on {len(spec.hosts):,} hosts")
        last = crew.finish()
    tables = plane.finish()
    return Found(
        samples=heard.samples(),
        guests=heard.guests([row for tables in last for row in tables.guests]),
        events=heard.events,
        work=_added(tables.work for tables in last),
        plane=tables,
        metrics={**tables.metrics, "mem_free_min_bytes": heard.least_free},
    )


def _spec(question: Question, rules: Datacenter, scale: int) -> Spec:
    return Spec(
        hosts=control.numbered(question.hosts), numbers=(), vms=question.vms, seed=question.seed,
        duration=question.duration, scale=scale, migration=rules.migration,
        fingerprints=rules.placement == "sharing-aware", files=digest_of_files(question.hosts, question.vms),
    )  # fmt: skip


def _part(spec: Spec, numbers: Sequence[int]) -> Spec:
    return replace(spec, numbers=tuple(numbers))


def _fingerprints(spec: Spec) -> dict[str, UInt8]:
    """The contents of each kind of guest when it starts, one bit for each content of the run."""
    return kinds_of(spec).fingerprints()


def _added(works: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for work in works:
        for name, times in work.items():
            total[name] = total.get(name, 0) + times
    return total


class _Heard:
    """What shards have told so far."""

    def __init__(self, kinds: Sequence[str], window: Window) -> None:
        self._window = window
        self._kinds = list(dict.fromkeys(kinds))
        self._times: list[int] = []
        self._rows: list[Int64] = []
        self._ended: list[Ended] = []
        self.events: list[Mapping[str, object]] = []
        self.least_free: int | None = None
        """Free memory (bytes) of any host in any report of the window, at the least."""

    def take(self, now: int, answers: Sequence[Answer]) -> None:
        """Take the answers of all shards for one epoch."""
        ended = [each for answer in answers for each in answer.ended]
        self._ended += sorted(ended, key=_when)
        events = [event for answer in answers for event in answer.events]
        self.events += sorted(events, key=lambda event: (event["time_s"], event["host"], event["guest"]))
        if self._window.start <= now <= self._window.end:
            free = [int(answer.reports[:, _FREE].min()) for answer in answers if len(answer.reports)]
            self.least_free = min([*free, *([] if self.least_free is None else [self.least_free])], default=None)
        for kind in self._kinds:
            rows = [answer.sums[kind] for answer in answers if kind in answer.sums]
            if rows:
                stacked = np.stack(rows)
                self._rows.append(np.where(_LARGEST, stacked.max(axis=0), stacked.sum(axis=0)))
                self._times.append(now)

    def samples(self) -> dict[str, Any]:
        """The columns of the table of samples that are known."""
        rows = np.stack(self._rows) if self._rows else np.empty((0, len(SUMMED)), np.int64)
        hosts = self._kinds * (len(rows) // max(len(self._kinds), 1))
        times = np.array(self._times) / SECOND
        return {"time_s": times, "host": hosts, **dict(zip(SUMMED, rows.T, strict=True))}

    def guests(self, running: Sequence[Ended]) -> list[Mapping[str, object]]:
        """The rows of all guests: those that ended, in order of time, then those that run."""
        return [each.row for each in [*self._ended, *sorted(running, key=_when)]]


def _when(ended: Ended) -> tuple[int, str]:
    return ended.time, str(ended.row["guest"])
