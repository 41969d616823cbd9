"""Balloons and free page reporting: oVirt's rules, the guest's free memory, and what the host gets back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.errors import UserError
from sim.host import Machine
from sim.lab.replay import workload
from sim.memory.image import UNTOUCHED
from sim.memory.pages import BLOCK, IN_USE, Int64
from sim.reclaim.balloon import Ballooning, FreePages, MomBalloon, Sizes
from sim.scenario import parse
from sim.units import MILLISECOND
from tests.one_host import at, end, guest, part, run, scenario

GIB = 1 << 30
RULES = MomBalloon()


def wanted(host_free: float, used: float, now: int = 1000, least: int = 0, most: int = 1000) -> int | None:
    return RULES.wanted(host_free, used, now, Sizes(least, most))


def test_a_guest_with_much_free_memory_loses_a_twentieth_at_a_time() -> None:
    assert wanted(0.10, used=100) == 950
    assert wanted(0.10, used=100, now=950) == round(950 * 0.95)


def test_a_guest_keeps_free_what_the_hosts_free_memory_is_worth() -> None:
    # 20 % at the threshold of 20 %, half of that at 10 %, nothing at the critical 5 % and less than nothing below.
    assert wanted(0.10, used=880) == 980
    assert wanted(0.199, used=800) is None
    assert wanted(0.05, used=970) == 970
    assert wanted(0.02, used=1000) == 970


def test_a_guest_keeps_its_guaranteed_memory() -> None:
    assert wanted(0.05, used=100, least=990) == 990
    assert wanted(0.05, used=100, least=1000) is None


def test_balloons_empty_when_the_host_has_memory() -> None:
    assert wanted(0.30, used=100, now=500) == 525
    assert wanted(0.30, used=700, now=700) == round(700 + 0.20 * 0.30 / 0.20 * 700)
    assert wanted(0.30, used=100, now=999) is None  # a change of less than 0.25 %
    assert wanted(0.30, used=100, now=990) == 1000


@given(st.floats(0, 1), st.integers(0, 1000), st.integers(1, 1000), st.integers(0, 1000))
def test_a_guest_never_gets_more_than_it_was_promised_nor_less_than_it_was_guaranteed(
    free: float, used: int, now: int, least: int
) -> None:
    now = max(now, least)
    size = wanted(free, min(used, now), now, least)

    assert size is None or least <= size <= 1000
    assert size is None or free < 0.20 or size >= now
    assert size is None or free >= 0.20 or size <= now


def test_rules_look_at_averages_and_act_at_every_second_look() -> None:
    daemon = Ballooning(RULES, 1000)
    pages = FreePages(np.ones(1000, np.bool_))
    guests = {7: (pages, Sizes(0, 1000))}

    found = [daemon.look(free, guests) for free in (400, 100, 0, 0, 0, 0)]

    # Of 1000, free are on average 250 at the second look, 125 at the fourth and 83 at the sixth.
    assert found == [{}, {}, {}, {7: 50}, {}, {7: 50}]


def test_a_balloon_takes_what_has_frames_first_and_nothing_that_is_in_use() -> None:
    pages = FreePages(np.array([False, True, True, True, True]))
    present = np.array([True, False, True, False, True])

    assert pages.resize(1, present).tolist() == [2]
    assert pages.resize(3, present).tolist() == [4]
    assert pages.resize(9, np.zeros(5, np.bool_)).tolist() == []
    assert (pages.balloon, pages.unused) == (4, 0)
    assert pages.resize(1, present).tolist() == []
    assert (pages.balloon, pages.unused) == (1, 3)


def test_a_guest_that_needs_pages_gets_them_from_its_balloon_when_it_has_no_others() -> None:
    pages = FreePages(np.ones(6, np.bool_))
    present = np.array([True, True, False, False, True, True])
    pages.resize(3, present)  # pages 0, 1 and 4
    present[[0, 1, 4]] = False

    assert pages.use(np.array([0]), present).tolist() == [5]
    assert pages.balloon == 3
    assert pages.use(np.array([1, 2, 3, 4, 5]), present).tolist() == []
    assert (pages.balloon, pages.unused) == (0, 0)


@given(st.data())
def test_what_is_in_the_balloon_is_free_and_counts_add_up(data: st.DataObject) -> None:
    count = 64
    pages = FreePages(np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count))))
    present = np.ones(count, np.bool_)
    used = np.flatnonzero(~pages.free)
    for _ in range(5):
        some = np.unique(np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1)), np.int64))
        step = data.draw(st.sampled_from(["resize", "use", "give"]))
        before = pages.balloon
        gone: Any = []
        if step == "resize":
            gone = pages.resize(data.draw(st.integers(0, count)), present)
        elif step == "use":
            gone = pages.use(some, present)
            present[some] = True
            used = np.union1d(used, some)
            assert not pages.held[some].any()
            assert pages.balloon == min(before, count - len(used))
        else:
            pages.give(some)
            used = np.setdiff1d(used, some)
        assert not np.isin(gone, used).any()
        present[gone] = False
        assert not (pages.held & ~pages.free).any()
        assert pages.balloon + pages.unused + len(used) == count


def test_only_whole_free_blocks_are_reported_and_a_sixteenth_at_a_time() -> None:
    free = np.ones(1040 * 512, np.bool_)
    free[7] = False
    pages, present = FreePages(free), free.copy()

    first = pages.report(present)
    assert first[0] == 512
    assert len(first) == 3 * 32 * 512  # 1039 free blocks are 2.03 times 16 lots of 32
    rounds = 0
    while len(told := pages.report(present)):
        present[told] = False
        rounds += 1
    assert rounds == 11
    assert present.sum() == 511


# --- in a run ---------------------------------------------------------------------------------------------------------

IDLE = [part("kernel", 2 * BLOCK), part("old", 6 * BLOCK, free=True)]


def test_free_pages_are_reported_two_seconds_after_the_start_and_after_they_are_freed() -> None:
    bursts = [{"part": "old", "at": "4500ms"}, {"part": "old", "at": "5500ms", "leaves": "free"}]
    vm = guest("vm", *IDLE, pages=10 * BLOCK, free_page_reporting=True, mergeable=False, bursts=bursts)

    result = run(vm, duration="9s", sample_every="500ms")

    held = {time: at(result, time).mem_touched_bytes // (BLOCK * 4096) for time in (1.5, 2.5, 4, 5, 7, 8)}
    assert held == {1.5: 8, 2.5: 2, 4: 2, 5: 8, 7: 8, 8: 2}
    row = result.guests.iloc[0]
    assert row.reported_bytes == 12 * BLOCK * 4096
    assert row.balloon_bytes == 0


def test_a_large_guest_reports_for_half_a_minute() -> None:
    vm = guest("vm", part("old", 520 * BLOCK, free=True), pages=520 * BLOCK, free_page_reporting=True, mergeable=False)

    result = run(vm, duration="40s")

    left = [at(result, time).mem_touched_bytes // (BLOCK * 4096) for time in (1, 3, 5, 20, 40)]
    assert left == [520, 520 - 64, 520 - 128, 0, 0]


def test_balloons_fill_while_the_host_is_short_and_empty_afterwards() -> None:
    # Two guests of 400 MiB on 1 GiB, with 300 MiB free each; a third takes what is left, and goes.
    mib = 256
    idle = guest("idle", part("used", 100 * mib), part("old", 300 * mib, free=True), pages=400 * mib, count=2,
                 balloon={"min": "120MiB"}, mergeable=False)  # fmt: skip
    third = guest("third", part("data", 150 * mib), pages=150 * mib, start="20s", stop="5min", mergeable=False)

    result = run(idle, third, duration="20min", memory="1GiB", balloon={})

    before, short, after = (at(result, time) for time in (19, 299, 1200))
    assert before.mem_touched_bytes == 800 * mib * 4096  # 22 % are free
    assert short.mem_free_bytes >= 0.195 * GIB  # the guests gave what it takes
    assert short.mem_touched_bytes < before.mem_touched_bytes + 150 * mib * 4096 - 100 * mib * 4096
    assert short.oom_kills == 0
    # The memory is the guests' again, and they have no use for it: nothing is touched.
    assert after.mem_touched_bytes == short.mem_touched_bytes - 150 * mib * 4096
    assert result.guests.balloon_bytes.tolist() == [0, 0, 0]


def test_a_balloon_ends_where_free_memory_ends() -> None:
    mib = 256
    vms = [
        guest("small", part("used", 90 * mib), part("old", 10 * mib, free=True), pages=100 * mib, balloon={}),
        guest("kept", part("old", 100 * mib, free=True), pages=100 * mib, balloon={"min": "95MiB"}),
        guest("without", part("old", 100 * mib, free=True), pages=100 * mib),
    ]

    result = run(*({**vm, "mergeable": False} for vm in vms), duration="5min", memory="310MiB", balloon={})

    small, kept, without = result.guests.balloon_bytes / (1 << 20)
    assert small == pytest.approx(10, abs=0.3)  # a change of less than 0.25 % is not made
    assert (kept, without) == (5, 0)


def test_a_guest_reads_what_it_wrote_whatever_its_balloon_does() -> None:
    mib = 256
    bursts = [{"part": "old", "at": "1min", "share": "50%", "leaves": "zero"}]
    vm = guest("vm", part("used", 20 * mib, pool="os"), part("old", 100 * mib, free=True), pages=120 * mib, count=2,
               balloon={}, free_page_reporting=True, bursts=bursts)  # fmt: skip

    result = run(vm, duration="3min", memory="300MiB", balloon={}, ksm={"run": 1, "pages_to_scan": 20_000})

    last = end(result)
    assert last.oom_kills == 0
    # Twice 20 MiB of equal pages and twice 50 MiB of equal zeros, which KSM merges; nothing else has frames.
    assert last.mem_touched_bytes == 2 * 70 * mib * 4096
    assert last.pages_sharing + last.pages_shared == 2 * 70 * mib


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vms.0.balloon": {}}, "no host has rules that fill balloons"),
        ({"hosts.0.balloon": {}}, "no guest here has a balloon"),
        (
            {"hosts.0.tps": {}, "hosts.0.ksm": None, "vms.0.free_page_reporting": True},
            "ESX takes no reports of free pages",
        ),
        ({"hosts.0.balloon": {"pressure_critical": "30%"}, "vms.0.balloon": {}}, "is above pressure_threshold"),
        ({"hosts.0.balloon": {}, "vms.0.balloon": {"min": "1GiB"}}, "leaves nothing for the balloon"),
        ({"vms.0.free_page_reporting": True, "vms.0.huge_pages": "hugetlbfs"}, "are not given back"),
        ({"vms.0.image.parts.0.free": True, "vms.0.image.parts.0.writes": {"rate": "1/s"}}, "nobody writes free pages"),
        ({"vms.0.image.parts.0.free": True, "vms.0.image.parts.0.untouched": True}, "is free by itself"),
        (
            {"vms.0.image.parts.0.reads": {"rate": "1/s"}, "vms.0.bursts": [{"part": "a", "leaves": "free"}]},
            "part a has random reads: it stays in use",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    data: Any = scenario(guest("vm", part("a", 100), pages=200), duration="1s").resolved()
    for path, value in changes.items():
        *way, last = (int(step) if step.isdigit() else step for step in path.split("."))
        block = data
        for step in way:
            block = block[step]
        block[last] = value

    with pytest.raises(UserError, match=message):
        parse(data)


def memory_of_two(pages: int, **host: object) -> tuple[Any, Int64]:
    """A scanner with two guests whose pages are pairwise equal, and the contents of both."""
    vm = guest(
        "vm", part("a", pages, duplicates=50), pages=pages, count=2
    )  # so many that the host knows seven contents
    each = scenario(vm, duration="1s", ksm={"run": 1, "pages_to_scan": 500, "max_page_sharing": 3}, **host)
    machine = Machine(each.hosts[0], "host-0", each.assignments()["host-0"], seed=1, duration=1, sample_every=1)
    scanner = machine.scanner
    contents = np.tile(1 + np.arange(pages, dtype=np.int32) % 7, (2, 1))
    for number in range(2):
        scanner.add(number, pages, vm=each.vms[0], key=number, now=0, level=1.0, node=0, thp=number == 0)
        scanner.advise(number, 0, pages, True, 0)
        scanner.fill(number, contents[number], 0)
    scanner.begin()
    return scanner, contents.astype(np.int64)


@settings(max_examples=40)
@given(
    st.data(), st.sampled_from([{"memory": "64MiB"}, {"memory": "4MiB", "swap": {"device": "zram", "size": "32MiB"}}])
)
def test_what_is_given_back_is_gone_and_all_else_reads_as_written_wherever_it_was(
    data: st.DataObject, host: dict[str, Any]
) -> None:
    pages = 600
    scanner, contents = memory_of_two(pages, **host)
    now = 0
    for _ in range(data.draw(st.integers(1, 6))):
        number = data.draw(st.integers(0, 1))
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, pages)] * 2)))
        some = np.arange(first, last, data.draw(st.integers(1, 3)))
        if data.draw(st.booleans()):
            scanner.discard(number, some)
            contents[number, some] = UNTOUCHED
        else:
            contents[number, some] = data.draw(st.integers(1, 7))
            scanner.write(number, some, contents[number, some].astype(np.int32), now)
        now += data.draw(st.sampled_from([1, 50, 400])) * MILLISECOND
        for _ in scanner.advance(now):
            pass

        for each in range(2):
            assert scanner.read(each).tolist() == contents[each].tolist()
            assert scanner.backed(each).tolist() == (contents[each] != UNTOUCHED).tolist()
        columns = scanner.columns(scanner.snapshot(now)[np.newaxis])
        assert columns["mem_touched_bytes"][0] == np.sum(contents != UNTOUCHED) * 4096
        used = int(columns["mem_private_bytes"][0] + columns["mem_shared_bytes"][0]) // 4096
        torn = scanner.m.block[
            scanner.m.block[:, IN_USE] > 0, IN_USE
        ]  # a huge page is free when no part of it is in use
        kept = np.sum(BLOCK - torn)
        assert len(np.unique(contents[contents != UNTOUCHED])) <= used - kept <= np.sum(contents != UNTOUCHED)


def test_the_lab_says_that_its_guests_have_no_balloon() -> None:
    asked = scenario(guest("vm", part("a", 100), pages=200, free_page_reporting=True), duration="1s")

    with pytest.raises(UserError, match=r"remove vms\.0\.free_page_reporting"):
        workload(asked)
