"""What happened in the fleet, epoch by epoch and host by host: the tables of the control plane, and its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np

from sim.columns import PAGE_BYTES, Window
from sim.datacenter.demand import THOUSANDTHS
from sim.datacenter.messages import REPORT, Int64, Moved
from sim.datacenter.placement import Rooms
from sim.datacenter.power import FAILED, MICRO, Powered
from sim.host import Host
from sim.units import DAY, MILLISECOND, SECOND

Row = dict[str, object]

STALLED: Final = 0.1
"""Share of the time between two reports for which some guest waits for memory: with more, the host counts as stalled.
The figure is a choice of this project."""

_COLUMN: Final = {name: place for place, name in enumerate(REPORT)}


@dataclass(frozen=True)
class Tables:
    """Rows of the tables `fleet`, `hosts` and `events` (`sim.columns`), and the values of the metrics of a fleet."""

    fleet: Sequence[Row]
    hosts: Sequence[Row]
    events: Sequence[Row]
    metrics: Mapping[str, int | float | None]


@dataclass(frozen=True)
class Totals:
    """What was counted since the start of the run, of which the metrics of a fleet are made."""

    energy: int = 0
    """Microjoules."""
    moves: int = 0
    moved_bytes: int = 0
    move_ns: int = 0
    downtime_ns: int = 0
    refused: int = 0
    lost: int = 0
    restarts: int = 0
    waited_ns: int = 0
    starts: int = 0
    oom_kills: int = 0
    stalls: int = 0
    asked: int = 0
    short: int = 0
    failures: int = 0

    def since(self, earlier: Totals) -> Totals:
        """The same, counted from another moment on."""
        return Totals(**{each.name: getattr(self, each.name) - getattr(earlier, each.name) for each in fields(self)})


class Ledger:
    """Counts what happens."""

    def __init__(self, names: Sequence[str], hosts: Sequence[Host], report_period: int, window: Window) -> None:
        """*report_period* is the time (ns) from one report to the next; metrics are about the *window*."""
        self.names = names
        self.kinds = [host.name for host in hosts]
        self.report_period = report_period
        self.window = window
        self.before = self.after = Totals()
        """What was counted when the window began, and when it ended."""
        self.rows: list[Row] = []
        self.row: Row = {}
        """What is known of the epoch that is not over."""
        self.span = 0
        self.events: list[Row] = []
        self.arrivals = self.refused = self.starts = self.ended = self.lost = 0
        self.failures = self.restarts = 0
        self.moves = self.moved_bytes = self.move_ns = self.downtime_ns = self.waited_ns = 0
        self.stalls = 0
        self.asked = self.short = 0
        """CPU time (ns) that guests asked for, and that their hosts did not have."""
        zeros = np.zeros(len(names), np.int64)
        self.started, self.left, self.entered = zeros.copy(), zeros.copy(), zeros.copy()
        self.failed = zeros.copy()
        self.most_guests, self.most_promised = zeros.copy(), zeros.copy()
        self.guest_ms, self.asked_ms, self.short_ms = zeros.copy(), zeros.copy(), zeros.copy()
        self.used = zeros.copy()

    def event(self, time: int, host: int | None, kind: str, detail: str, guest: str = "") -> None:
        """Note a row of the table of events, of a host if one is meant."""
        name = "" if host is None else self.names[host]
        self.events.append({"time_s": time / SECOND, "host": name, "guest": guest, "kind": kind, "detail": detail})

    def start(self, host: int, waited: int) -> None:
        """A guest starts after waiting so long (ns)."""
        self.starts += 1
        self.waited_ns += waited
        self.started[host] += 1

    def move(self, now: int, source: int, move: Moved) -> None:
        """A guest has left its host to move."""
        self.moves += 1
        self.moved_bytes += move.sent_pages * PAGE_BYTES
        self.move_ns += move.duration_ns
        self.downtime_ns += move.downtime_ns
        self.left[source] += 1
        sent = f"{move.sent_pages} pages in {move.rounds} rounds"
        self.event(now, source, "migrated", sent, move.guest)

    def fail(self, time: int, host: int) -> None:
        """A host fails."""
        self.failures += 1
        self.failed[host] += 1
        self.event(time, host, "host-failed", "")

    def report(self, last: Int64, before: Int64) -> None:
        """Hosts report."""
        column = _COLUMN["psi_some_ns"]
        self.used = last[:, _COLUMN["mem_used_bytes"]].copy()
        self.stalls += int(np.sum(last[:, column] - before[:, column] > STALLED * self.report_period))

    def epoch(
        self, now: int, until: int, hosts_on: int, cores: Int64, asked: Int64, overhead: Int64, watts: Int64
    ) -> None:  # fmt: skip
        """Hosts are about to live through an epoch, their guests asking for so many thousandths of a core at its
        beginning, besides what overcommit takes; its row is written when it is over.
        """
        span = until - now
        short = np.minimum(np.maximum(asked + overhead - cores * THOUSANDTHS, 0), asked)
        self.asked += int(asked.sum()) * span // THOUSANDTHS
        self.short += int(short.sum()) * span // THOUSANDTHS
        self.asked_ms += asked * (span // MILLISECOND) // THOUSANDTHS
        self.short_ms += short * (span // MILLISECOND) // THOUSANDTHS
        self.span = span
        self.row = {
            "time_s": until / SECOND,
            "hosts_on": hosts_on,
            "cpu_asked_cores": int(asked.sum()) / THOUSANDTHS,
            "cpu_short_cores": int(short.sum()) / THOUSANDTHS,
            "power_w": int(watts.sum()) / MICRO,
        }

    def close(self, now: int, power: Powered, rooms: Rooms, guests: Int64, waiting: int, reports: Int64) -> None:
        """The epoch is over: *guests* are those of each host at its end."""
        if not self.row:
            return
        if now == self.window.start:
            self.before = self._totals(power, reports)
        if now == self.window.end:
            self.after = self._totals(power, reports)
        self.guest_ms += guests * (self.span // MILLISECOND)
        np.maximum(self.most_guests, guests, out=self.most_guests)
        np.maximum(self.most_promised, rooms.promised, out=self.most_promised)
        self.rows.append({
            **self.row,
            "hosts_used": int(np.sum(guests > 0)),
            "hosts_failed": int(np.sum(power.state == FAILED)),
            "guests_running": int(guests.sum()),
            "guests_waiting": waiting,
            "mem_promised_bytes": int(rooms.promised.sum()),
            "mem_reported_bytes": int(self.used.sum()),
            "energy_j": int(power.energy.sum()) // MICRO,
            "arrivals": self.arrivals,
            "guests_started": self.starts,
            "guests_refused": self.refused,
            "guests_ended": self.ended,
            "guests_lost": self.lost,
            "guests_restarted": self.restarts,
            "host_failures": self.failures,
            "migrations": self.moves,
            "migration_bytes": self.moved_bytes,
            "migration_ns": self.move_ns,
            "downtime_ns": self.downtime_ns,
            "waited_ns": self.waited_ns,
        })  # fmt: skip
        self.row = {}

    def tables(self, power: Powered, reports: Int64, duration: int) -> Tables:
        """What became of it all."""
        hosts: list[Row] = [
            {
                "host": name,
                "kind": self.kinds[host],
                "on_s": int(power.on_ns[host]) / SECOND,
                "energy_j": int(power.energy[host]) // MICRO,
                "guests_started": int(self.started[host]),
                "guests_mean": int(self.guest_ms[host]) * MILLISECOND / duration,
                "guests_max": int(self.most_guests[host]),
                "mem_promised_max_bytes": int(self.most_promised[host]),
                "cpu_asked_s": int(self.asked_ms[host]) / 1000,
                "cpu_short_s": int(self.short_ms[host]) / 1000,
                "migrations_out": int(self.left[host]),
                "migrations_in": int(self.entered[host]),
                "failures": int(self.failed[host]),
                "oom_kills": int(reports[host, _COLUMN["oom_kills"]]),
            }
            for host, name in enumerate(self.names)
        ]
        return Tables(self.rows, hosts, self.events, self._metrics(power.known))

    def _totals(self, power: Powered, reports: Int64) -> Totals:
        return Totals(
            energy=int(power.energy.sum()), moves=self.moves, moved_bytes=self.moved_bytes, move_ns=self.move_ns,
            downtime_ns=self.downtime_ns, refused=self.refused, lost=self.lost, restarts=self.restarts,
            waited_ns=self.waited_ns, starts=self.starts, oom_kills=int(reports[:, _COLUMN["oom_kills"]].sum()),
            stalls=self.stalls, asked=self.asked, short=self.short, failures=self.failures,
        )  # fmt: skip

    def _metrics(self, knows_power: bool) -> dict[str, int | float | None]:
        counted = self.after.since(self.before)
        within = [row for row in self.rows if self.window.start < round(float(str(row["time_s"])) * SECOND)
                  <= self.window.end]  # fmt: skip

        def column(name: str) -> list[int]:
            return [int(str(row[name])) for row in within]

        days = (self.window.end - self.window.start) / DAY
        on, used, running = (sum(column(name)) for name in ("hosts_on", "hosts_used", "guests_running"))
        return {
            "guests_per_host": _ratio(running, used),
            "hosts_needed": max(column("hosts_used"), default=0),
            "hosts_on_mean": _ratio(on, len(within)),
            "energy_kwh": counted.energy / MICRO / 3.6e6 if knows_power else None,
            "migrations": counted.moves,
            "migration_bytes": counted.moved_bytes,
            "migration_s": _ratio(counted.move_ns / SECOND, counted.moves),
            "migration_downtime_s": _ratio(counted.downtime_ns / SECOND, counted.moves),
            "guests_refused": counted.refused,
            "guests_lost": counted.lost,
            "guests_restarted": counted.restarts,
            "waiting_s": _ratio(counted.waited_ns / SECOND, counted.starts),
            "oom_kills_per_day": counted.oom_kills / days,
            "stalls_per_day": counted.stalls / days,
            "cpu_short_percent": _ratio(100 * counted.short, counted.asked),
            "host_failures": counted.failures,
        }


def _ratio(dividend: float, divisor: float) -> float | None:
    return dividend / divisor if divisor else None
