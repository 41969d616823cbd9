"""Huge pages judged by their use and their contents: which may be split, which made, and what that is worth."""

from __future__ import annotations

from pathlib import Path

import machine
import numpy as np
import pytest
from one_host import at, end, guest, part, run

from sim.memory import pages as memory
from sim.memory.pages import ANY, BLOCK, COLD, HOT, REPEATED
from sim.run import run as simulate
from sim.scenario import load
from sim.sharing import ksm_pass as ksmd

SCENARIO = Path(__file__).parents[1] / "scenarios" / "cold-huge-pages.yaml"
X = 7
"""A content that several pages have."""


def unique(first: int) -> list[int]:
    """Contents of a block that no other page has."""
    return list(range(first, first + BLOCK))


def judged(one: machine.Machine, repeated: int = 64, splits: bool = True) -> list[int]:
    """Temper of the blocks with pages, with one access a second or more for a hot one."""
    copies = np.zeros(len(one.k.head), np.int32)
    ksmd.judge_blocks(one.m, one.k, copies, 1e-9, repeated, splits, one.now)
    return one.m.block[: one._next_block, memory.TEMPER].tolist()


def test_blocks_are_hot_or_cold_or_cold_with_many_pages_that_others_have():
    one = machine.Machine(thp=True)
    repeated, just_not = [X] * 64 + unique(2000)[64:], [X] * 63 + unique(3000)[63:]
    first = one.first(one.start([X] * BLOCK + unique(1000) + repeated + just_not))
    one.m.rates[1, memory.READS] = 1e-9 / BLOCK
    one.m.accesses[first : first + BLOCK] = 1

    assert judged(one) == [HOT, COLD, REPEATED, COLD]
    assert judged(one, repeated=65) == [HOT, COLD, COLD, COLD]
    assert judged(one, splits=False) == [HOT, COLD, COLD, COLD]
    one.m.level[0] = 0.5
    assert judged(one)[0] == REPEATED


@pytest.mark.parametrize(("temper", "merged"), [(ANY, 2), (REPEATED, 2), (HOT, 0), (COLD, 0)])
def test_only_what_was_not_judged_or_is_repeated_is_split_for_a_merge(temper, merged):
    """The pages of two huge pages; merged ones are there before a hot one is looked at again."""
    one = machine.Machine(thp=True, smart_scan=False)
    guests = [one.start([X, X + 1, *unique(1000)[2:]]), one.start([X, X + 1, *unique(2000)[2:]])]
    one.m.block[:2, memory.TEMPER] = REPEATED, temper
    last = one.scan(4)[-1]

    assert last["pages_sharing"] == merged
    assert last["huge_pages"] == (0 if merged else 2)
    assert one.read(guests[0])[:2] == one.read(guests[1])[:2] == [X, X + 1]


@pytest.mark.parametrize(("temper", "made"), [(ANY, 0), (HOT, 1), (COLD, 0), (REPEATED, 0)])
def test_khugepaged_makes_hot_blocks_huge_however_much_is_shared_and_cold_ones_never(temper, made):
    one = machine.Machine(smart_scan=False)
    busy = one.start([X] * 300 + unique(1000)[300:])
    one.start([X] * 300)
    one.scan(3)
    assert one.counters()["pages_sharing"] > 500
    one.m.block[0, memory.TEMPER] = temper
    one.collapse(busy, 511, 256)

    assert one.counters()["huge_pages"] == made


def test_a_judgement_is_made_every_so_often_and_of_itself():
    """What turns hot is made huge again; khugepaged looks at all of it each second."""
    busy = {"every": "20s", "levels": [0, 1], "repeat": False}
    parts = (part("system", 4 * BLOCK, pool="system", reads={"rate": "1/s"}),)
    vms = [guest("g", *parts, pages=4 * BLOCK, activity=busy), guest("idle", *parts, pages=4 * BLOCK, activity=busy)]
    khugepaged = {"scan_sleep_millisecs": 1000, "pages_to_scan": 8 * BLOCK}
    result = run(
        *vms, duration="40s", thp={"enabled": "madvise", "khugepaged": khugepaged},
        ksm={"pages_to_scan": 10_000, "mixed_pages": {"every": "2s"}},
    )  # fmt: skip

    assert at(result, 18)["pages_sharing"] == 4 * BLOCK
    assert at(result, 18)["mem_huge_bytes"] == 0
    assert end(result)["mem_huge_bytes"] == 8 << 21
    assert end(result)["pages_sharing"] == 0


@pytest.fixture(scope="module")
def policies():
    """The bundled scenario with each way to treat huge pages."""
    ways = {"mixed": (), "ordinary": ("hosts.0.ksm.mixed_pages=null",), "none": ("hosts.0.ksm.run=0",)}
    return {way: simulate(load(SCENARIO, list(overrides))).summary for way, overrides in ways.items()}


def test_splitting_cold_huge_pages_only_saves_most_and_costs_nothing(policies):
    """SmartMD's abstract: a deduplication rate near KSM's at a speed near that of large pages; no figures."""
    mixed, ordinary, none = (policies[way] for way in ("mixed", "ordinary", "none"))

    assert none["saved_bytes"] == 0
    assert mixed["saved_bytes"] > 0.9 * ordinary["saved_bytes"]
    assert ordinary["tlb_slowdown_percent"] > 2
    assert mixed["tlb_slowdown_percent"] < 0.1
