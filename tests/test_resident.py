"""Hosts whose guests come, go and move: nothing is lost on the way, and a stored host goes on as if it had not been."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.datacenter.messages import (
    REPORT,
    SUMMED,
    Answer,
    Fail,
    Newcomer,
    Order,
    Orders,
    Receive,
    Send,
    Start,
    Stop,
)
from sim.datacenter.migration import Migration, precopy
from sim.datacenter.shard import WINDOW, Shard, Spec, digest_of_files
from sim.errors import UserError
from sim.memory.image import OWN, UNTOUCHED
from sim.scenario import parse
from sim.units import HOUR, MIB, MINUTE, SECOND

EPOCH = 5 * MINUTE
PARTS: list[dict[str, Any]] = [
    {"name": "system", "size": "25%", "pool": "debian"},
    {"name": "heap", "size": "40%", "writes": {"rate": "0.001/s", "hot": "50%", "hot_writes": "90%"}},
    {"name": "copies", "size": "15%", "duplicates": 4},
    {"name": "empty", "size": "10%", "zero": True},
]
WEB: dict[str, Any] = {
    "name": "web", "memory": "4MiB", "image": {"parts": PARTS},
    "bursts": [{"part": "heap", "at": "7min", "every": "11min", "share": "20%"}],
}  # fmt: skip
DATABASE: dict[str, Any] = {
    "name": "database", "memory": "6MiB", "load": "20%", "image": {"parts": PARTS},
    "activity": {"every": "10min", "levels": [1.0, 0.1, 2.0]},
    "bursts": [{"part": "heap", "at": "2min", "every": "3min", "share": "10%", "leaves": "original"}],
}  # fmt: skip
KSM = {"pages_to_scan": 20, "sleep_millisecs": 1000}


def spec(hosts: int = 4, numbers: Sequence[int] | None = None, **host: Any) -> Spec:
    kinds = {"memory": "32MiB", "count": hosts, "ksm": KSM, **host}
    scenario = parse({"name": "fleet", "duration": "12h", "hosts": [kinds], "vms": [WEB, DATABASE]})
    names = [(name, kind) for kind, name in scenario.host_names()]
    return Spec(
        hosts=names, numbers=range(hosts) if numbers is None else numbers, vms=scenario.vms, seed=1,
        duration=scenario.duration, scale=1, migration=Migration(), fingerprints=True,
        files=digest_of_files(scenario.hosts, scenario.vms),
    )  # fmt: skip


def web(number: int, **other: Any) -> Newcomer:
    return Newcomer(f"web-{number}", "web", 0, **other)


def database(number: int, **other: Any) -> Newcomer:
    return Newcomer(f"database-{number}", "database", 0, **other)


def in_turn(orders: Sequence[Order], until: int) -> Orders:
    return Orders(until, True, sorted(orders, key=lambda each: (each.host, each.time)))


def first_epoch(hosts: int = 4) -> Orders:
    starts: list[Order] = []
    for host in range(hosts):
        starts += [Start(host, host * SECOND, web(2 * host)), Start(host, 9 * SECOND, database(host))]
        starts.append(Start(host, 20 * SECOND, web(2 * host + 1, lifetime=40 * MINUTE)))
    return in_turn(starts, EPOCH)


def seen(answer: Answer) -> object:
    """An answer as plain data."""
    sums = {name: row.tolist() for name, row in answer.sums.items()}
    held = {number: bits.tobytes() for number, bits in answer.fingerprints.items()}
    return answer.reports.tolist(), sums, [(each.host, each.row) for each in answer.ended], answer.events, held


def moved_on(shard: Shard, source: int, target: int, guest: str, time: int) -> tuple[Any, Any]:
    """Let a guest move, over two epochs from *time*. Returns its memory before and after."""
    answer = shard.advance(in_turn([Send(source, time, guest, 100 * MIB)], time + EPOCH))
    [(host, moved)] = answer.moved
    assert (host, moved.guest) == (source, guest)
    there = shard._host(target)
    there.follow(time + EPOCH, [Receive(target, time + EPOCH, moved.luggage)])
    found = there._find(guest)
    assert found is not None
    return moved.luggage, there.scanner.read(found.index)


def test_guests_run_on_the_host_that_was_told_to_start_them() -> None:
    shard = Shard(spec())

    answer = shard.advance(first_epoch())

    assert answer.hosts.tolist() == [0, 1, 2, 3]
    running = answer.reports[:, REPORT.index("guests_running")]
    assert running.tolist() == [3, 3, 3, 3]
    assert answer.sums["host"][SUMMED.index("guests_running")] == 12


def test_a_guest_ends_when_its_time_has_come_and_its_number_is_given_to_another() -> None:
    shard = Shard(spec(1))
    shard.advance(first_epoch(1))

    ended = [row for epoch in range(2, 12) for row in shard.advance(Orders(epoch * EPOCH, True, [])).ended]

    assert [(each.row["guest"], each.row["end"]) for each in ended] == [("web-1", "stopped")]
    assert ended[0].time == 20 * SECOND + 40 * MINUTE
    again = [Start(0, 12 * EPOCH + number, web(number)) for number in range(100, 103)]
    shard.advance(in_turn(again, 13 * EPOCH))
    assert sum(each.running for each in shard._host(0).guests) == 5


def test_more_guests_than_there_was_room_for_share_what_they_have_in_common() -> None:
    few = Shard(spec(1, memory="256MiB", ksm={"pages_to_scan": 1000, "sleep_millisecs": 1000}))
    slots = few._empty["host"]._slots
    many = [Start(0, number * SECOND, web(number)) for number in range(slots + 3)]

    few.advance(in_turn(many, EPOCH))
    answer = few.advance(Orders(HOUR, True, []))

    assert answer.reports[0, REPORT.index("guests_running")] == slots + 3
    system = round(0.25 * (4 << 20)) // 4096
    assert answer.sums["host"][SUMMED.index("pages_sharing")] > 0.9 * system * (slots + 2)


def test_a_host_that_was_stored_goes_on_as_if_it_had_not_been() -> None:
    one, other = Shard(spec()), Shard(spec())
    for shard in (one, other):
        shard.advance(first_epoch())
    for epoch in range(2, WINDOW + 1):
        assert seen(one.advance(Orders(epoch * EPOCH, True, []))) == seen(
            other.advance(Orders(epoch * EPOCH, True, []))
        )

    other = Shard.restore(spec(), other.save())

    for epoch in range(WINDOW + 1, 3 * WINDOW):
        orders = in_turn(
            [Start(1, epoch * EPOCH, web(100 + epoch)), Stop(2, epoch * EPOCH, "web-4")], (epoch + 1) * EPOCH
        )
        assert seen(one.advance(orders)) == seen(other.advance(orders))
    assert repr(one.finish()) == repr(other.finish())  # a guest that runs has stopped at NaN


def test_hosts_do_not_depend_on_who_is_beside_them() -> None:
    whole = Shard(spec())
    halves = [Shard(spec(numbers=numbers)) for numbers in ([0, 3], [1, 2])]

    for epoch in range(1, 8):
        orders = first_epoch() if epoch == 1 else Orders(epoch * EPOCH, True, [])
        together = whole.advance(orders)
        for half in halves:
            mine = [each for each in orders.orders if each.host in half._spec.numbers]
            part = half.advance(replace(orders, orders=mine))
            for number, row in zip(part.hosts, part.reports, strict=True):
                assert row.tolist() == together.reports[number].tolist()


def test_a_host_is_made_when_it_is_needed_and_nobody_can_tell() -> None:
    """Host 2 gets its first guest when all have been through a window; host 3 never has one."""
    late = Start(2, 20 * EPOCH + SECOND, web(9))
    lazy, eager = Shard(spec()), Shard(spec())
    for number in range(4):
        eager._host(number)

    for epoch in range(30):
        orders = [late] if epoch == 20 else [Start(0, 0, web(1)), Start(1, 0, database(1))] if epoch == 0 else []
        asked = in_turn(orders, (epoch + 1) * EPOCH)
        assert seen(lazy.advance(asked)) == seen(eager.advance(asked))
    assert sorted(lazy._residents) == [0, 1, 2]
    assert lazy.finish().work == eager.finish().work


def test_a_guest_that_moves_takes_every_content_along() -> None:
    shard = Shard(spec())
    shard.advance(first_epoch())
    shard.advance(Orders(4 * EPOCH, True, []))

    luggage, after = moved_on(shard, 0, 1, "database-0", 4 * EPOCH)

    before, kinds = luggage.contents, shard._kinds
    assert (before == UNTOUCHED).tolist() == (after == UNTOUCHED).tolist()
    common = (before >= 0) & (before < kinds.common)
    assert before[common].tolist() == after[common].tolist()
    own = before >= kinds.common
    # What stands several times inside the guest still does, under numbers of its new place.
    assert (
        np.unique(before[own], return_inverse=True)[1].tolist()
        == np.unique(after[own], return_inverse=True)[1].tolist()
    )
    alone = (before == OWN) & (after != UNTOUCHED)
    assert len(np.unique(after[alone])) in (1, np.count_nonzero(alone))
    assert (after[alone] < 0).all()


def test_a_guest_that_moves_works_on_where_it_was() -> None:
    shard = Shard(spec())
    shard.advance(first_epoch())
    shard.advance(Orders(4 * EPOCH, True, []))
    source = shard._host(0)
    before = source._find("database-0")
    assert before is not None

    luggage, _ = moved_on(shard, 0, 1, "database-0", 4 * EPOCH)

    after = shard._host(1)._find("database-0")
    assert after is not None
    assert source._find("database-0") is None
    assert shard._host(1).scanner.activity(after.index, 5 * EPOCH) == luggage.state["lived"]["active_ns"]
    assert after.level == 2.0  # the third of its levels, 25 minutes after it started
    [row] = [each.row for each in shard.finish().guests if each.row["guest"] == "database-0"]
    assert row["host"] == "host-1"
    assert row["progress_percent"] == pytest.approx(100)


def test_sharing_is_lost_by_a_move_and_found_again() -> None:
    shard = Shard(spec())
    shard.advance(first_epoch())
    settled = shard.advance(Orders(4 * EPOCH, True, []))

    moved_on(shard, 0, 1, "web-0", 4 * EPOCH)

    saved = REPORT.index("saved_bytes")
    just = shard.advance(Orders(5 * EPOCH + SECOND, True, []))
    later = shard.advance(Orders(7 * EPOCH + 2 * MINUTE, True, []))
    assert settled.reports[0, saved] > just.reports[0, saved]
    assert later.reports[1, saved] > just.reports[1, saved]


def test_a_host_that_fails_loses_its_guests_and_takes_new_ones() -> None:
    shard = Shard(spec())
    shard.advance(first_epoch())

    answer = shard.advance(in_turn([Fail(2, EPOCH + SECOND)], 2 * EPOCH))
    after = shard.advance(in_turn([Start(2, 2 * EPOCH, web(50))], 3 * EPOCH))

    assert sorted(each.row["guest"] for each in answer.ended) == ["database-2", "web-4", "web-5"]
    assert {each.row["end"] for each in answer.ended} == {"host-failed"}
    assert after.reports[2, REPORT.index("guests_running")] == 1


def test_an_epoch_without_a_report_moves_only_who_has_to_do_something() -> None:
    shard = Shard(spec())
    shard.advance(first_epoch())

    answer = shard.advance(Orders(2 * EPOCH, False, [Stop(1, EPOCH + SECOND, "web-2")]))

    assert answer.hosts.tolist() == []
    assert [each.now for each in shard._residents.values()] == [EPOCH, 2 * EPOCH, EPOCH, EPOCH]
    assert [each.row["guest"] for each in answer.ended] == ["web-2"]


def test_a_guest_that_is_gone_cannot_be_sent() -> None:
    shard = Shard(spec())
    shard.advance(first_epoch())

    answer = shard.advance(in_turn([Stop(0, EPOCH, "web-0"), Send(0, EPOCH + 1, "web-0", MIB)], 2 * EPOCH))

    assert not answer.moved


@pytest.mark.parametrize("rate", [0, 1000, 20_000])
def test_precopy_sends_again_what_was_written_meanwhile(rate: int) -> None:
    """Clark and others, NSDI 2005: with w pages written a second and r sent, rounds shrink by w/r each."""
    pages, per_second = 100_000, 25_000

    course = precopy(pages, lambda begin, end: rate * (end - begin) // SECOND, per_second * 4096, SECOND // 10, 30)

    ratio = rate / per_second
    rounds = course.rounds - 1
    expected = pages * sum(ratio**number for number in range(rounds + 1))
    assert course.sent_pages == pytest.approx(expected, rel=0.001)
    assert course.duration_ns == pytest.approx(expected / per_second * SECOND, rel=0.001)
    assert course.downtime_ns <= SECOND // 10 or rounds == 30


def test_a_guest_that_writes_faster_than_the_network_is_stopped_after_the_last_round() -> None:
    course = precopy(1000, lambda begin, end: 10_000, 4096 * 1000, SECOND // 100, 30)

    assert course.rounds == 31
    assert course.sent_pages == 31 * 1000
    assert course.downtime_ns == SECOND


def test_a_worker_with_other_files_is_refused() -> None:
    with pytest.raises(UserError, match="has not the images and prices of this scenario"):
        Shard(replace(spec(), files="0123456789abcdef"))


def known_contents(shard: Shard, host: int, guest: str) -> np.ndarray[Any, Any] | None:
    """What a guest reads there that others may have too, and -1 for the rest of what it holds."""
    resident = shard._host(host)
    found = resident._find(guest)
    if found is None:
        return None
    resident.scanner.settle(found.index, resident.now)
    contents = resident.scanner.read(found.index)
    own = (contents != UNTOUCHED) & ((contents < 0) | (contents >= shard._kinds.common))
    return np.where(own, -1, contents)


@pytest.mark.parametrize("swap", [None, {"device": "ssd", "size": "64MiB"}, {"device": "zram", "size": "64MiB"}])
@given(turns=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 2)), min_size=3, max_size=12))
@settings(max_examples=15, deadline=None)
def test_whatever_moves_no_guest_and_no_content_is_lost(
    swap: dict[str, Any] | None, turns: list[tuple[int, int, int]]
) -> None:  # fmt: skip
    """Guests start, stop and move between three hosts that are too small for them all, but for their swap."""
    shard = Shard(spec(3, memory="14MiB", swap=swap))
    where: dict[str, int] = {}
    gone: set[str] = set()
    waiting: list[Order] = []
    packed: dict[str, tuple[int, Any]] = {}
    now = 0
    for number, (what, source, target) in enumerate(turns):
        for name, (host, before) in packed.items():
            shard._host(host).follow(now, [each for each in waiting if each.host == host])
            after = known_contents(shard, host, name)
            assert after is None or after.tolist() == before.tolist()
        orders: list[Order] = []
        here = sorted(name for name, host in where.items() if host == source)
        if what < 3 or not here:
            orders.append(Start(source, now, (database if what % 2 else web)(number)))
        elif what == 3:
            orders.append(Stop(source, now, here[0]))
        else:
            orders.append(Send(source, now, here[0], 100 * MIB))
        for order in orders:
            if isinstance(order, Start):
                where[order.guest.name] = order.host
        now += EPOCH
        answer = shard.advance(in_turn(orders, now))
        waiting, packed = [], {}
        for each in answer.ended:
            del where[str(each.row["guest"])]
            gone.add(str(each.row["guest"]))
        for _, moved in answer.moved:
            where[moved.guest] = target
            waiting.append(Receive(target, now, moved.luggage))
            held = moved.luggage.contents
            own = (held != UNTOUCHED) & ((held < 0) | (held >= shard._kinds.common))
            packed[moved.guest] = target, np.where(own, -1, held)
        running = {guest.name for each in shard._residents.values() for guest in each.guests if guest.running}
        assert running | {each.luggage.newcomer.name for each in waiting if isinstance(each, Receive)} == set(where)
        for row in answer.reports:
            total, used, free = (row[REPORT.index(f"mem_{kind}_bytes")] for kind in ("total", "used", "free"))
            assert 0 <= used <= total and used + free == total
    assert not gone & set(where)
