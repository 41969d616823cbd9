"""Where guests go: every way to choose against a plain packer, and what admission lets in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_fleet import scenario
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.datacenter.blocks import Admission, Overcommit
from sim.datacenter.control import ControlPlane
from sim.datacenter.messages import REPORT, Answer, Start
from sim.datacenter.placement import NOWHERE, Likeness, Need, Placement, Rooms
from sim.streams import generator
from sim.units import GIB

HOSTS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6)
GUESTS = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 4), st.integers(0, 4)), max_size=40)
"""Memory, virtual processors, and how many guests later each ends (0 never)."""


def rooms(hosts: list[tuple[int, int]], admission: Admission | None = None, **ratios: float) -> Rooms:
    memory, cores = (np.array(column, np.int64) for column in zip(*hosts, strict=True))
    return Rooms(memory, cores, Overcommit(**ratios), admission or Admission())


def packed(policy: str, hosts: list[tuple[int, int]], guests: list[tuple[int, int, int]]) -> list[int]:
    """A plain packer: for each guest its host, or NOWHERE."""
    free = [list(host) for host in hosts]
    chosen: list[int] = []
    leaving: dict[int, list[tuple[int, int, int]]] = {}
    for turn, (memory, vcpus, stays) in enumerate(guests):
        for host, mem, cpu in leaving.pop(turn, []):
            free[host][0] += mem
            free[host][1] += cpu
        fitting = [host for host, (mem, cpu) in enumerate(free) if mem >= memory and cpu >= vcpus]
        if not fitting:
            chosen.append(NOWHERE)
            continue
        host = fitting[0]
        if policy == "best-fit":
            host = min(fitting, key=lambda each: free[each][0])
        elif policy == "worst-fit":
            host = max(fitting, key=lambda each: free[each][0])
        elif policy == "dot-product":
            wanted = memory, vcpus
            products = {
                each: sum(
                    want / has * (left / has) for want, has, left in zip(wanted, hosts[each], free[each], strict=True)
                )
                for each in fitting
            }
            host = max(fitting, key=products.__getitem__)
        chosen.append(host)
        free[host][0] -= memory
        free[host][1] -= vcpus
        if stays:
            leaving.setdefault(turn + stays, []).append((host, memory, vcpus))
    return chosen


@pytest.mark.parametrize("policy", ["first-fit", "best-fit", "worst-fit", "dot-product"])
@given(hosts=HOSTS, guests=GUESTS)
@settings(max_examples=150)
def test_placement_is_that_of_a_plain_packer(
    policy: str, hosts: list[tuple[int, int]], guests: list[tuple[int, int, int]]
) -> None:
    room = rooms(hosts, cpu=1.0)
    placement = Placement(policy, room, Likeness({}, len(hosts)), generator(1))
    everywhere = np.ones(len(hosts), bool)
    chosen: list[int] = []
    leaving: dict[int, list[tuple[int, Need]]] = {}
    for turn, (memory, vcpus, stays) in enumerate(guests):
        for host, need in leaving.pop(turn, []):
            room.give(host, need, reported=False)
        need = Need(0, memory, vcpus)
        host = placement.choose(need, everywhere)
        chosen.append(host)
        if host != NOWHERE:
            room.take(host, need)
            if stays:
                leaving.setdefault(turn + stays, []).append((host, need))

    assert chosen == packed(policy, hosts, guests)


def test_random_placement_takes_every_host_with_room_and_no_other() -> None:
    room = rooms([(4, 1), (9, 1), (9, 1), (9, 1)])
    placement = Placement("random", room, Likeness({}, 4), generator(1))
    among = np.array([True, True, False, True])

    chosen = [placement.choose(Need(0, 5, 1), among) for _ in range(400)]

    assert set(chosen) == {1, 3}
    assert 140 < chosen.count(1) < 260


def test_sharing_aware_placement_goes_where_most_of_the_contents_are() -> None:
    web, database = (np.packbits(np.array(bits, np.uint8)) for bits in ([1] * 12 + [0] * 12, [0] * 10 + [1] * 14))
    likeness = Likeness({0: web, 1: database}, 3)
    placement = Placement("sharing-aware", rooms([(10, 1)] * 3), likeness, generator(1))
    everywhere = np.ones(3, bool)
    likeness.report(1, database)

    assert placement.choose(Need(0, 1, 1), everywhere) == 1, "two contents in common are better than none"
    likeness.report(2, web)
    assert placement.choose(Need(0, 1, 1), everywhere) == 2
    assert placement.choose(Need(1, 1, 1), everywhere) == 1
    likeness.add(0, 1)
    assert placement.choose(Need(1, 1, 1), everywhere) == 0, "what was placed since the report counts"


def test_reports_admit_what_they_show_as_free_less_what_was_placed_since() -> None:
    room = rooms([(100, 8)], Admission(by="reported", share=0.8))
    assert room.memory.tolist() == [80]
    for _ in range(3):
        room.take(0, Need(0, 20, 1))
    assert room.memory.tolist() == [20]
    room.report(np.array([30]), np.array([0]))
    assert room.memory.tolist() == [50], "three guests use half of what they were promised"
    room.take(0, Need(0, 20, 1))
    room.give(0, Need(0, 20, 1), reported=True)
    assert room.memory.tolist() == [30], "the report still counts the one that has gone"
    room.give(0, Need(0, 20, 1), reported=False)
    assert room.memory.tolist() == [50]
    room.report(np.array([30]), np.array([20]))
    assert room.memory.tolist() == [30], "room for a guest on its way is kept"


def test_a_prediction_is_the_mean_of_reports_and_so_many_standard_deviations() -> None:
    room = rooms([(100, 8), (100, 8)], Admission(by="predicted", share=1.0, sigmas=2.0, reports=3))
    for used in ([90, 90], [10, 40], [20, 40], [30, 40]):
        room.report(np.array(used), np.zeros(2, np.int64))

    peak = int(20 + 2 * np.std([10, 20, 30]))
    assert room.memory.tolist() == [100 - peak, 60]


def test_an_overcommit_ratio_holds_for_reports_too_if_it_is_given() -> None:
    room = rooms([(100, 8)], Admission(by="reported", share=1.0), memory=1.5)
    for _ in range(3):
        room.take(0, Need(0, 50, 1))
        room.report(np.array([10]), np.array([0]))
    assert room.memory.tolist() == [0]


def placed(asked: Any, orders: list[Any]) -> dict[str, str]:
    names = ControlPlane(asked).names
    return {order.guest.name: names[order.host] for order in orders if isinstance(order, Start)}


def test_placements_that_trust_an_old_report_fill_a_host_over() -> None:
    def run(counts_own: bool) -> int:
        asked = scenario(
            hosts=[{"name": "node", "memory": "64GiB"}],
            vms=[{"name": "web", "memory": "16GiB"}],
            datacenter={
                "arrivals": [{"kind": "web", "batch": 8, "at": "6min"}],
                "admission": {"by": "reported", "share": 1.0, "counts_own": counts_own},
            },
        )
        plane = ControlPlane(asked)
        plane.decide(0)
        report = np.zeros((1, len(REPORT)), np.int64)
        report[0, REPORT.index("mem_used_bytes")] = 8 * GIB
        plane.hear(plane.rules.epoch, Answer(np.array([0]), report, {}, [], [], []))
        return len(placed(asked, plane.decide(plane.rules.epoch)))

    assert run(counts_own=True) == 3
    assert run(counts_own=False) == 8, "each sees the 56 GiB of the report"


@given(order=st.permutations(range(4)), policy=st.sampled_from(["first-fit", "best-fit", "worst-fit", "random"]))
@settings(max_examples=12)
def test_the_order_of_hosts_in_the_file_does_not_matter(order: list[int], policy: str) -> None:
    kinds = [
        {"name": "a", "count": 2, "memory": "8GiB"},
        {"name": "b", "count": 11, "memory": "4GiB"},
        {"name": "c", "memory": "24GiB"},
        {"name": "d", "count": 3, "memory": "12GiB"},
    ]

    def run(hosts: list[dict[str, Any]]) -> dict[str, str]:
        asked = scenario(
            hosts=hosts,
            duration="2h",
            vms=[{"name": "web", "memory": "3GiB"}, {"name": "db", "memory": "7GiB", "count": 9}],
            datacenter={
                "placement": policy,
                "arrivals": [{"kind": "web", "rate": "30/h", "lifetime": {"exponential": "30min"}}],
            },
        )
        plane = ControlPlane(asked)
        return placed(
            asked, [each for now in range(0, asked.duration, plane.rules.epoch) for each in plane.decide(now)]
        )

    assert run([kinds[place] for place in order]) == run(kinds)


def test_guests_with_a_host_stay_on_hosts_of_that_name_or_kind() -> None:
    asked = scenario(
        hosts=[{"name": "big", "count": 2, "memory": "16GiB"}, {"name": "small", "count": 2, "memory": "8GiB"}],
        vms=[
            {"name": "one", "memory": "4GiB", "count": 5, "host": "small"},
            {"name": "other", "memory": "4GiB", "count": 2, "host": "big-1"},
        ],
    )
    plane = ControlPlane(asked)

    found = placed(asked, plane.decide(0))

    assert [found.get(f"one-{n}") for n in range(5)] == ["small-0"] * 2 + ["small-1"] * 2 + [None]
    assert [found[f"other-{n}"] for n in range(2)] == ["big-1"] * 2
    assert plane.ledger.refused == 1
