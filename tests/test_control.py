"""The control plane against queueing formulas, and laws: no guest is ever lost from the books, whatever happens."""

from __future__ import annotations

import pickle
from math import exp
from typing import Any

import jsonschema
import numpy as np
import pytest
from fake_fleet import FakeFleet, scenario
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.columns import FLEET, FLEET_METRICS, HOSTS
from sim.datacenter.control import ControlPlane
from sim.datacenter.demand import Demand
from sim.datacenter.messages import NEVER, Fail, Newcomer, Receive, Send, Start
from sim.datacenter.moves import _regression
from sim.datacenter.power import Powered
from sim.errors import UserError
from sim.memory.guest import Vm
from sim.scenario import parse, schema
from sim.units import GIB, HOUR, MINUTE, SECOND

WEB = {"name": "web", "memory": "4GiB"}


def poisson(rate: str, lifetime: str, kind: str = "web") -> dict[str, Any]:
    return {"kind": kind, "rate": rate, "lifetime": {"exponential": lifetime}}


def fates(fleet: FakeFleet) -> dict[str, int]:
    """How many guests had which fate, counted from what the control plane said and heard."""
    ledger = fleet.plane.ledger
    return {
        "running": len(fleet.plane.guests),
        "ended": ledger.ended,
        "refused": ledger.refused,
        "lost": ledger.lost,
        "waiting": len(fleet.plane.waiting),
        "to restart": sum(what == 2 for _, what, _, _ in fleet.plane.events),
    }


# --- queues with known answers ------------------------------------------------------------------------------------


def test_guests_in_the_fleet_are_their_rate_times_their_lifetime() -> None:
    """Little's law: M/M/inf has Poisson(a) guests, correlated over time as exp(-t / lifetime)."""
    asked = scenario(
        duration="20d", sample_every="1h", hosts=[{"name": "node", "count": 20, "memory": "64GiB"}], vms=[WEB],
        datacenter={"epoch": "20min", "arrivals": [poisson("60/h", "1h")]},
    )  # fmt: skip

    fleet = FakeFleet(asked).run()
    rows = fleet.plane.finish().fleet[30:]
    mean = np.mean([int(str(row["guests_running"])) for row in rows])

    # Samples 20 minutes apart count as (1 - r) / (1 + r) independent ones, r being their correlation.
    r = exp(-1 / 3)
    error = (60 / (len(rows) * (1 - r) / (1 + r))) ** 0.5
    assert fleet.plane.ledger.refused == 0
    assert abs(mean - 60) < 4 * error < 5


@pytest.mark.parametrize("epoch", ["20min", "2h"])
def test_refused_guests_are_as_many_as_erlang_b_says(epoch: str) -> None:
    """M/M/c/c; the books know when each guest ends, so that an epoch longer than a life changes nothing."""
    slots, load = 8, 6.0
    blocked = 1.0
    for servers in range(1, slots + 1):
        blocked = load * blocked / (servers + load * blocked)
    asked = scenario(
        duration="20d", sample_every="1h", hosts=[{"name": "node", "memory": "32GiB"}], vms=[WEB],
        datacenter={"epoch": epoch, "arrivals": [poisson("36/h", "10min")]},
    )  # fmt: skip

    plane = FakeFleet(asked).run().plane
    share = plane.ledger.refused / plane.ledger.arrivals

    # Refusals come in runs; an independent count of them would have a third of this error.
    error = 3 * (blocked * (1 - blocked) / plane.ledger.arrivals) ** 0.5
    assert blocked == pytest.approx(0.1219, abs=1e-4)
    assert abs(share - blocked) < error < 0.01


# --- laws ---------------------------------------------------------------------------------------------------------

FLEETS = st.fixed_dictionaries({
    "epoch": st.sampled_from(["5min", "20min"]),
    "report_every": st.sampled_from([None, "1h"]),
    "placement": st.sampled_from(["first-fit", "best-fit", "worst-fit", "random"]),
    "overcommit": st.fixed_dictionaries({"memory": st.sampled_from([1.0, 1.5]), "cpu": st.sampled_from([None, 1.0])}),
    "admission": st.fixed_dictionaries({
        "by": st.sampled_from(["promised", "reported", "predicted"]), "patience": st.sampled_from([0, "40min"]),
    }),
    "migration": st.fixed_dictionaries({
        "bytes_per_s": st.sampled_from(["5MB", "1GB"]), "per_host": st.integers(1, 3), "in_all": st.integers(1, 5),
        "hot": st.sampled_from([None, {"memory": "70%"}, {"cpu": "50%"}, {"local_regression": 1.2},
                                {"memory": "60%", "select": "smallest-sufficient"}]),
    }),
    "consolidation": st.sampled_from([None, {"every": "1h"}, {"begin": "22h", "end": "3h", "every": "20min"}]),
    "evacuations": st.sampled_from([[], [{"host": "node-1", "at": "30min", "until": "5h"}]]),
    "failures": st.sampled_from([
        None, {"mtbf": "8h", "repair": "30min"}, {"hosts": [{"host": "node-0", "at": "55min"}], "restart": False},
    ]),
})  # fmt: skip
ARRIVALS = [poisson("14/h", "40min"), {"kind": "db", "batch": 2, "every": "2h", "lifetime": {"lognormal": "1h"}}]
KINDS = [
    WEB | {"load": "60%", "vcpus": 2, "activity": {"every": "30min", "levels": [0.2, 1.0, 0.6]}},
    {"name": "db", "memory": "6GiB", "load": "90%", "vcpus": 3},
]


def busy(rules: dict[str, Any], seed: int, hours: int = 10) -> Any:
    return scenario(
        duration=f"{hours}h", seed=seed, vms=KINDS, datacenter=rules | {"arrivals": ARRIVALS},
        hosts=[{"name": "node", "count": 4, "memory": "16GiB", "cores": 8, "power": {"idle": 100, "full": 200}}],
    )  # fmt: skip


@given(rules=FLEETS, seed=st.integers(1, 50), hours=st.integers(1, 10))
@settings(max_examples=60)
def test_every_guest_has_one_fate_and_the_books_agree_with_the_hosts(
    rules: dict[str, Any], seed: int, hours: int
) -> None:
    fleet = FakeFleet(busy(rules, seed, hours), used=0.7)
    plane = fleet.plane
    fleet.run()
    plane.finish()
    assert sum(fates(fleet).values()) == plane.ledger.arrivals
    there = {name: host.number for host in fleet.hosts for name in host.guests}
    arrived = {order.luggage.newcomer.name for order in plane.orders if isinstance(order, Receive)}
    known = {name: placed.host for name, placed in plane.guests.items()}
    assert known.keys() - there.keys() <= arrived | set(fleet.moved)
    assert there.items() <= known.items()
    for host, guests in enumerate(plane.at):
        here = [placed for placed in plane.guests.values() if placed.host == host and not placed.gone]
        coming = [placed for placed in plane.guests.values() if placed.target == host]
        assert sorted(guests) == sorted(placed.guest.name for placed in here)
        assert plane.rooms.promised[host] == sum(each.need.memory for each in here + coming)
        assert plane.rooms.promised_vcpus[host] == sum(each.need.vcpus for each in here + coming)
        assert plane.movers.coming[host] == sum(each.need.memory for each in coming)
        most = plane.rooms.limit[host]
        assert plane.rooms.promised[host] <= most


@given(rules=FLEETS, seed=st.integers(1, 50))
@settings(max_examples=15)
def test_the_run_does_not_depend_on_how_hosts_are_grouped_or_whether_the_plane_was_stored(
    rules: dict[str, Any], seed: int
) -> None:
    asked = busy(rules, seed)
    whole, split, stored = FakeFleet(asked), FakeFleet(asked, groups=3), FakeFleet(asked)

    def store(now: int) -> None:
        if now % (2 * HOUR) == 0:
            stored.plane = pickle.loads(pickle.dumps(stored.plane))

    whole.run()
    split.run()
    stored.run(store)

    assert whole.orders_as_text() == split.orders_as_text() == stored.orders_as_text()
    assert whole.plane.finish() == split.plane.finish() == stored.plane.finish()


@given(rules=FLEETS, seed=st.integers(1, 50))
@settings(max_examples=15)
def test_the_tables_have_their_columns_and_the_metrics_follow_from_them(rules: dict[str, Any], seed: int) -> None:
    fleet = FakeFleet(busy(rules, seed)).run()
    tables = fleet.plane.finish()

    assert all(row.keys() == {column.name for column in FLEET} for row in tables.fleet)
    assert all(row.keys() == {column.name for column in HOSTS} for row in tables.hosts)
    assert tables.metrics.keys() == {metric.name for metric in FLEET_METRICS}
    last = tables.fleet[-1]
    for metric, column in (("migrations", "migrations"), ("guests_refused", "guests_refused"),
                           ("migration_bytes", "migration_bytes"), ("guests_lost", "guests_lost"),
                           ("host_failures", "host_failures"), ("guests_restarted", "guests_restarted")):  # fmt: skip
        assert tables.metrics[metric] == last[column]
    assert tables.metrics["hosts_needed"] == max(int(str(row["hosts_used"])) for row in tables.fleet)
    energy = sum(int(str(row["energy_j"])) for row in tables.hosts)
    assert tables.metrics["energy_kwh"] == pytest.approx(energy / 3.6e6, abs=4 / 3.6e6)
    drawn = sum(float(str(row["power_w"])) for row in tables.fleet) * fleet.rules.epoch / SECOND
    assert drawn == pytest.approx(energy, abs=8)
    assert sum(int(str(row["migrations_out"])) for row in tables.hosts) == last["migrations"]


# --- moves --------------------------------------------------------------------------------------------------------


def ordered(fleet: FakeFleet, kind: type) -> list[Any]:
    return [order for order in fleet.orders if isinstance(order, kind)]


def hosts_of(fleet: FakeFleet) -> list[list[str]]:
    return [sorted(host.guests) for host in fleet.hosts]


def test_a_busy_host_sends_its_smallest_guests_until_it_is_below_the_threshold() -> None:
    asked = scenario(
        duration="30min",
        hosts=[{"name": "node", "count": 2, "memory": "16GiB", "cores": 4}],
        vms=[
            {"name": "large", "memory": "6GiB", "vcpus": 2, "load": "100%"},
            {"name": "middle", "memory": "4GiB", "vcpus": 1, "load": "100%"},
            {"name": "small", "memory": "2GiB", "vcpus": 1, "load": "50%"},
        ],
        datacenter={"migration": {"hot": {"memory": None, "cpu": 0.5}}},
    )

    fleet = FakeFleet(asked).run()

    # 3.5 cores are asked for and 2 allowed: the small guest and the middle one, whose moves take least, leave.
    assert [(send.host, send.guest) for send in ordered(fleet, Send)] == [(0, "small-0"), (0, "middle-0")]
    assert hosts_of(fleet) == [["large-0"], ["middle-0", "small-0"]]
    assert fleet.plane.finish().metrics["cpu_short_percent"] == 0


def test_a_full_host_may_send_the_one_guest_that_is_enough() -> None:
    asked = scenario(
        duration="30min",
        vms=[{"name": f"vm{size}", "memory": f"{size}GiB"} for size in (2, 3, 5, 6)],
        datacenter={"migration": {"hot": {"memory": "80%", "cpu": None, "select": "smallest-sufficient"}}},
    )

    fleet = FakeFleet(asked).run()

    assert [send.guest for send in ordered(fleet, Send)] == ["vm5-0"], "16 GiB used, and 12.8 GiB allowed"


def test_a_host_that_is_evacuated_ends_empty_and_takes_guests_again_later() -> None:
    asked = scenario(
        duration="3h",
        vms=[WEB | {"count": 8}, {"name": "late", "memory": "4GiB", "start": "40min"},
             {"name": "later", "memory": "4GiB", "start": "2h"}],
        datacenter={"migration": {"per_host": 1, "bytes_per_s": "100MB"},
                    "evacuations": [{"host": "node-0", "at": "30min", "until": "100min"}]},
    )  # fmt: skip

    fleet = FakeFleet(asked).run()

    assert hosts_of(fleet)[0] == ["later-0"]
    assert sum(map(len, hosts_of(fleet))) == 10
    sends = ordered(fleet, Send)
    assert [send.host for send in sends] == [0] * 4
    assert len({send.time for send in sends}) == 4, "one at a time"


def test_hosts_that_are_not_needed_are_emptied_at_night_and_switched_off_until_they_are() -> None:
    asked = scenario(
        duration="12h",
        hosts=[{"name": "node", "count": 4, "memory": "16GiB", "power": {"idle": 100, "full": 200}}],
        vms=[WEB | {"count": 4, "start": "1min"}, {"name": "morning", "memory": "8GiB", "count": 4, "start": "8h"}],
        datacenter={"placement": "worst-fit",
                    "consolidation": {"begin": "1h", "end": "6h", "every": "30min", "boot_time": "7min"}},
    )  # fmt: skip

    fleet = FakeFleet(asked).run()
    tables = fleet.plane.finish()
    on = {float(str(row["time_s"])) / 3600: row["hosts_on"] for row in tables.fleet}

    assert len(ordered(fleet, Send)) == 3 and len(ordered(fleet, Receive)) == 3
    assert (on[1.0], on[6.0], on[10.0]) == (4, 1, 3)
    starts = {start.guest.name: start.time for start in ordered(fleet, Start) if start.guest.kind == "morning"}
    assert set(starts.values()) == {8 * HOUR + 10 * MINUTE}, "the first epoch after the boot"
    assert tables.metrics["guests_refused"] == 0
    assert tables.metrics["waiting_s"] == pytest.approx(600 * 4 / 8)
    # Hosts without load draw 100 W: 4 for about an hour, 1 until 8:00, then 3.
    assert tables.metrics["energy_kwh"] == pytest.approx(0.1 * (4 * 1 + 1 * 7 + 3 * 4), rel=0.1)


# --- failures -----------------------------------------------------------------------------------------------------


def failing(**failures: Any) -> FakeFleet:
    asked = scenario(
        duration="4h",
        vms=[
            WEB | {"count": 3, "lifetime": "2h"},
            {"name": "brief", "memory": "4GiB", "lifetime": "33min"},
            {"name": "late", "memory": "4GiB", "start": "2h", "lifetime": "1h"},
        ],
        datacenter={"failures": {"hosts": [{"host": "node-0", "at": "31min"}], **failures}},
    )
    return FakeFleet(asked).run()


def test_guests_of_a_failed_host_start_elsewhere_for_the_rest_of_their_lives() -> None:
    fleet = failing(detection="2min")

    *again, late = ordered(fleet, Start)[4:]
    assert [(each.host, each.guest.name, each.guest.lifetime) for each in again] == [
        (1, "brief-0~1", 2 * MINUTE),
        *((1, f"web-{number}~1", 89 * MINUTE) for number in range(3)),
    ]
    # It is known when the epoch is over, at 35 minutes.
    assert {each.time for each in again} == {35 * MINUTE}
    assert ordered(fleet, Fail) == [Fail(0, 31 * MINUTE)]
    metrics = fleet.plane.finish().metrics
    assert (metrics["host_failures"], metrics["guests_restarted"], metrics["guests_lost"]) == (1, 4, 0)
    assert (late.host, fleet.plane.ledger.ended) == (0, 5), "the host that was repaired ends its guests as any other"


def test_guests_are_lost_if_nobody_restarts_them() -> None:
    assert failing(restart=False).plane.finish().metrics["guests_lost"] == 4


def test_random_failures_come_as_often_as_stated() -> None:
    asked = scenario(
        duration="100d", sample_every="1h", hosts=[{"name": "node", "count": 30, "memory": "16GiB"}],
        vms=[WEB], datacenter={"epoch": "6h", "failures": {"mtbf": "10d", "repair": "1s"}},
    )  # fmt: skip

    assert abs(FakeFleet(asked).run().plane.ledger.failures - 300) < 4 * 300**0.5


def test_a_guest_whose_new_host_fails_on_the_way_goes_to_another() -> None:
    asked = scenario(
        duration="1h", vms=[WEB],
        datacenter={"migration": {"bytes_per_s": "10MB"}, "evacuations": [{"host": "node-0", "at": "5min"}],
                    "failures": {"hosts": [{"host": "node-1", "at": "6min"}]}},
    )  # fmt: skip

    fleet = FakeFleet(asked).run()

    assert [send.time for send in ordered(fleet, Send)] == [5 * MINUTE]
    assert [(each.host, each.time) for each in ordered(fleet, Receive)] == [(2, 15 * MINUTE)]
    assert hosts_of(fleet)[2] == ["web-0"]


# --- what guests ask for ------------------------------------------------------------------------------------------


@given(
    levels=st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=30), min_size=1, max_size=30),
    every=st.integers(1, 7), ends=st.sets(st.integers(0, 29)), now=st.integers(0, 50),
)  # fmt: skip
def test_demand_is_that_of_each_guest_by_itself(
    levels: list[list[float]], every: int, ends: set[int], now: int
) -> None:
    demand = Demand([Vm.model_validate_json('{"name": "web", "memory": "1GiB"}')])
    demand.levels = demand.levels[:8].copy()
    rows = {}
    expected = [0] * 3
    for number, own in enumerate(levels):
        guest = Newcomer(f"web-{number}", "web", 0, NEVER, levels=tuple(own), every=every)
        rows[number] = demand.add(guest, 0, 4, number % 3, number)
        if number in ends:
            demand.remove(rows[number])
        elif now >= number:
            level = own[min((now - number) // every, len(own) - 1)]
            expected[number % 3] += round(round(level * 65535) * 4000 / 65535 + 1e-9)

    assert demand.of_hosts(demand.of_guests(now), 3).tolist() == expected


def test_a_regression_goes_on_with_a_straight_line_and_follows_the_latest() -> None:
    rows = np.arange(10.0)[:, np.newaxis]

    assert _regression(np.hstack([3 + 2 * rows, 0 * rows + 5])) == pytest.approx(np.array([23.0, 5.0]))
    bent = np.where(rows < 5, 0.0, rows - 5)
    assert _regression(bent)[0] > np.polyval(np.polyfit(rows[:, 0], bent[:, 0], 1), 10)


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vms": [{"name": "web", "memory": "32GiB"}]}, "vms.0.memory: is more than any host has"),
        ({"vms": [WEB, {"name": "child", "memory": "4GiB", "fork_of": "web"}]}, "vms.1.fork_of: a control plane"),
        ({"vms": [WEB | {"count": 2}], "datacenter": {"arrivals": [poisson("1/h", "1h")]}}, "vms.0.count: these"),
        ({"datacenter": {"arrivals": [poisson("1/h", "1h", "wen")]}}, "datacenter.arrivals.0.kind: no such kind"),
        ({"datacenter": {"epoch": "5min", "report_every": "7min"}}, 'epochs, got "7min"; write 10min'),
        ({"datacenter": {"placement": "dot-product"}}, "set overcommit.cpu"),
        ({"datacenter": {"failures": {"hosts": [{"host": "nod-1", "at": "1h"}]}}}, "did you mean node-1?"),
        ({"datacenter": {"evacuations": [{"host": "node-1", "at": "2d"}]}}, "evacuations.0.at: is after the end"),
        ({"datacenter": {"admission": {"sigmas": 2.0}}}, "means nothing for admission by promised"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_path_and_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        scenario(**changes)

    assert message in str(caught.value)


def test_a_guest_of_a_trace_that_no_host_can_hold_does_not_wait_for_ever() -> None:
    asked = scenario(duration="1h", datacenter={"admission": {"patience": "10d"}}, vms=[WEB | {"start": "59min"}])
    plane = ControlPlane(asked)

    plane._come(Newcomer("a", "web", 0, memory=17 * GIB), 0, again=False)
    plane._come(Newcomer("b", "web", 0, memory=16 * GIB), 0, again=False)

    assert (plane.ledger.refused, len(plane.guests)) == (1, 1)


def test_every_rule_can_be_written_down_and_read_back() -> None:
    asked = scenario(
        hosts=[
            {"name": "old", "memory": "16GiB", "power": {"server": "hp-proliant-ml110-g4"}},
            {"name": "new", "memory": "16GiB", "power": {"watts": [float(50 + step) for step in range(11)]}},
            {"name": "node", "count": 2, "memory": "16GiB", "power": {"idle": 50, "full": 120}},
        ],
        vms=KINDS,
        datacenter={
            "epoch": "10min", "report_every": "1h", "placement": "dot-product",
            "arrivals": [
                {"kind": "web", "rate": "5/h", "day": [0.1, 1.0, 0.5], "start": "1h", "stop": "20h"},
                {"kind": "web", "boot_storm": 50, "within": "20min", "at": "8h", "every": "1d"},
                {"kind": "db", "batch": 2, "every": "2h", "lifetime": {"lognormal": "1h", "sigma": 2.0}},
            ],
            "overcommit": {"memory": 1.5, "cpu": 4.0},
            "admission": {"by": "predicted", "sigmas": 3.0, "reports": 6, "share": "80%", "patience": "1h"},
            "migration": {"hot": {"cpu": None, "local_regression": 1.2, "psi": "10%", "swapped": "5%"}},
            "consolidation": {"begin": "22h", "end": "6h"},
            "evacuations": [{"host": "old-0", "at": "1h"}],
            "failures": {"mtbf": "30d", "hosts": [{"host": "new-0", "at": "2h"}]},
        },
    )  # fmt: skip
    written = asked.resolved()

    assert parse(written) == asked
    jsonschema.validate(written, schema())
    FakeFleet(asked).run()


def test_a_server_draws_what_was_measured_and_a_straight_line_between() -> None:
    power = Powered(scenario(hosts=[{"name": "h", "memory": "8GiB", "cores": 10,
                                     "power": {"server": "hp-proliant-ml110-g4"}}]).hosts)  # fmt: skip
    on = np.ones(1, bool)

    drawn = [int(power.watts(np.array([asked]), on)[0]) for asked in (0, 1000, 1500, 10_000, 99_000)]

    assert drawn == [86_000_000, 89_400_000, 91_000_000, 117_000_000, 117_000_000]
    power.spend(power.watts(np.array([0]), on), on, HOUR)
    assert power.energy.tolist() == [86 * 3600 * 10**6]
