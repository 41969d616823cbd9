"""Datacenters from end to end, hosts with pages among them: same bits however they are run, old reports, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sim
from sim.errors import UserError
from sim.report.fleet import pictures_of
from sim.report.words import conclusion, headlines

SCENARIOS = Path(__file__).parents[1] / "scenarios"


def described(**changes: Any) -> dict[str, Any]:
    """A small datacenter, as a file would say it."""
    host = {"memory": "1GiB", "cores": 4, "power": {"idle": 100, "full": 200},
            "ksm": {"run": 1, "pages_to_scan": 5000, "sleep_millisecs": 1000},
            "swap": {"device": "nvme", "size": "1GiB"}}  # fmt: skip
    parts = [{"name": "system", "pool": "image", "size": "64MiB"},
             {"name": "heap", "size": "64MiB", "writes": {"rate": "1/min"}}]  # fmt: skip
    return {
        "name": "small", "duration": "1h", "scale": 256,
        "hosts": [{"name": "a", "count": 3, **host}, {"name": "b", "count": 2, **host}],
        "vms": [{"name": "guest", "memory": "256MiB", "vcpus": 1, "load": "50%", "image": {"parts": parts}}],
        "datacenter": {
            "placement": "worst-fit", "overcommit": {"memory": 1.5},
            "arrivals": [{"kind": "guest", "rate": "30/h", "lifetime": {"exponential": "30min"}}],
            "consolidation": {"every": "10min"},
            "failures": {"hosts": [{"host": "a-1", "at": "25min"}], "repair": "15min"},
        },
        **changes,
    }  # fmt: skip


def tables_of(result: sim.Result) -> list[str]:
    assert result.fleet is not None and result.hosts is not None
    frames = (result.fleet, result.hosts, result.samples, result.guests, result.events)
    return [frame.to_json(orient="split", double_precision=15) for frame in frames]


@pytest.fixture(scope="module")
def alone() -> sim.Result:
    """The small datacenter, run in this process."""
    return sim.run(sim.parse(described()))


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [2, 3])
def test_any_number_of_processes_finds_the_same(alone: sim.Result, jobs: int) -> None:
    assert tables_of(sim.run(sim.parse(described()), jobs=jobs)) == tables_of(alone)


def test_the_order_of_hosts_in_the_file_does_not_matter(alone: sim.Result) -> None:
    turned = described(hosts=described()["hosts"][::-1])

    assert tables_of(sim.run(sim.parse(turned))) == tables_of(alone)


def test_the_small_datacenter_does_all_that_it_shall(alone: sim.Result) -> None:
    assert alone.summary["host_failures"] == 1
    assert (alone.summary["guests_restarted"] or 0) > 0
    assert (alone.summary["saved_bytes"] or 0) > 0
    assert 0 < (alone.summary["energy_kwh"] or 0) < 1.1


def test_a_fleet_is_told_in_its_own_words(alone: sim.Result) -> None:
    said = conclusion(alone.samples, alone.guests, alone.summary)

    assert "hosts at most" in said
    assert "kWh" in said
    assert "1 hosts failed" in said
    assert all(alone.summary[each.name] is not None for each in headlines(alone.summary))


def test_a_fleet_has_its_own_pictures(alone: sim.Result) -> None:
    assert alone.fleet is not None and alone.hosts is not None

    names = [name for name, *_ in pictures_of(alone.fleet, alone.hosts, alone.samples)]

    assert names == ["hosts-and-guests", "memory", "energy", "happenings", "guests-per-host"]


def test_old_reports_overfill_a_host_and_books_cure_it() -> None:
    """As in shakenfist#3636: a gate that trusts old figures of free memory lets guests in that all come at once. Sizes
    are a sixty-fourth of those there; eight guests of a quarter of the host come between two reports.
    """
    kills = {}
    for counts_own in (False, True):
        overfilled = described()
        for host in overfilled["hosts"]:
            host |= {"swap": {"device": "nvme", "size": "128MiB"}, "ksm": None}
        overfilled["vms"][0]["image"] = {"parts": [{"name": "all", "size": "100%"}]}
        overfilled["datacenter"] = {
            "arrivals": [{"kind": "guest", "batch": 8, "at": "12min"}], "report_every": "10min",
            "admission": {"by": "reported", "counts_own": counts_own},
        }  # fmt: skip
        kills[counts_own] = sim.run(sim.parse(overfilled)).summary["oom_kills"]

    assert (kills[False] or 0) > 0
    assert kills[True] == 0


def test_a_guest_larger_than_any_host_is_one_clear_error_or_refused() -> None:
    large = described()
    large["vms"][0] |= {"memory": "2GiB"}
    try:
        refused = sim.run(sim.parse(large)).summary["guests_refused"]
    except UserError as error:
        assert "memory" in str(error)
    else:
        assert refused


@pytest.mark.parametrize("trace", ["planetlab", "openb"])
def test_guests_of_a_trace_live_on_hosts_with_pages(trace: str) -> None:
    source = {"path": f"traces/{trace}", "format": trace, "kinds": ["guest"], "limit": 5}
    traced = described(duration="30min", datacenter={"arrivals": [source]})
    traced["hosts"][0]["memory"] = "64GiB"

    result = sim.run(sim.parse(traced, SCENARIOS))

    assert len(result.guests) > 0
    assert (result.summary["consolidation_ratio"] or 0) > 1
