"""Mechanisms that look at pages in passes, by examples counted by hand."""

from typing import Any

import pytest
from one_host import after_scan, at, end, equal, guest, part, run

from sim.run import Result

NOTHING: Any = None
"""`ksm: null`: a host that scans nothing."""


def shared(result: Result, time_s: float | None = None) -> tuple[int, int]:
    row = end(result) if time_s is None else at(result, time_s)
    return int(row["pages_shared"]), int(row["pages_sharing"])


# --- no scanner ------------------------------------------------------------------------------------------------------


def test_a_host_without_a_scanner_shares_only_what_was_forked():
    parent = guest("parent", equal("copies", 100), part("own", 28), pages=128)
    child = {"name": "child", "memory": "512KiB", "fork_of": "parent", "start": "10s"}

    result = run(parent, child, duration="1min", ksm=NOTHING)

    assert shared(result, 5.0) == (0, 0)
    assert shared(result) == (128, 128)
    assert end(result)["ksmd_cpu_ns"] == 0
    assert end(result)["mem_used_bytes"] == 128 * 4096


def test_a_host_without_a_scanner_has_due_writes_done():
    parent = guest("parent", part("own", 100, writes={"rate": "1/s"}), pages=100)
    child = {"name": "child", "memory": "400KiB", "fork_of": "parent"}

    result = run(parent, child, duration="1min", ksm=NOTHING)

    assert shared(result) == (0, 0)
    assert end(result)["cow_ksm"] == 0
    assert int(result.guests["cow_breaks"].sum()) == 100


# --- mergemem --------------------------------------------------------------------------------------------------------

KINDS = (part("initialised", 80, pool="interpreter"), part("own", 20))


@pytest.mark.parametrize("count", [2, 5])
def test_mergemem_leaves_one_copy_of_what_programs_of_one_name_have(count):
    lisp, prolog = guest("lisp", *KINDS, pages=100, count=count), guest("prolog", *KINDS, pages=100)

    result = run(lisp, prolog, duration="5min", mergemem={})

    assert shared(result, 59.0) == (0, 0)
    assert shared(result) == (80, (count - 1) * 80)
    row = after_scan(result, 1)
    assert row["pages_scanned"] == (count + 1) * 100
    assert end(result)["full_scans"] == 1


def test_mergemem_compares_equal_addresses_only():
    moved = guest("lisp", part("own", 20), part("initialised", 80, pool="interpreter"), pages=100)
    twice = guest("scheme", part("a", 40, pool="library"), part("b", 40, pool="library"), pages=80)

    result = run(moved, twice, guest("prolog", *KINDS, pages=100), duration="5min", mergemem={})

    assert shared(result) == (0, 0)


def test_what_is_written_after_mergemem_ran_stays_private_until_it_runs_again():
    kinds = (part("initialised", 80, pool="interpreter"),)
    bursts = [{"part": "initialised", "at": "2min", "leaves": "unique", "share": 0.5},
              {"part": "initialised", "at": "3min", "leaves": "original"}]  # fmt: skip
    lisp = guest("lisp", *kinds, pages=80, count=2, bursts=bursts)

    once = run(lisp, duration="10min", mergemem={})
    again = run(lisp, duration="10min", mergemem={"every": "5min"})

    assert shared(once, 90.0) == (80, 80)
    assert shared(once) == (0, 0)
    assert shared(again) == (80, 80)


# --- page combining --------------------------------------------------------------------------------------------------


def test_page_combining_takes_private_pages_of_one_system_at_a_time():
    parts = (
        equal("copies", 10),
        part("dlls", 30, pool="windows", file=True),
        part("files", 4, duplicates=2, file=True),
    )

    result = run(guest("desktop", *parts, pages=44, count=3), duration="20min", page_combining={})

    assert shared(result, 899.0) == (0, 0)
    assert shared(result) == (3, 27)


def test_page_combining_of_one_system_takes_pages_of_all_its_programs():
    program = guest("program", part("heap", 50, pool="heap"), part("own", 14), pages=64, count=4)

    result = run(program, duration="20min", page_combining={"within": "host", "every": "5min"})

    assert shared(result) == (50, 150)
    assert end(result)["full_scans"] == 4


def test_page_combining_leaves_large_pages_alone():
    desktop = guest("desktop", equal("copies", 1024), pages=1024)

    result = run(desktop, duration="20min", thp={"enabled": "always"}, page_combining={})

    assert end(result)["mem_huge_bytes"] == 4 << 20
    assert shared(result) == (0, 0)


# --- what they have in common ----------------------------------------------------------------------------------------


def test_a_pass_takes_the_time_that_its_work_costs():
    pages = 2_000_000
    desktop = guest("desktop", part("copies", pages, pool="heap"), pages=pages, count=2)

    result = run(desktop, duration="40min", memory="64GiB", sample_every="10s", page_combining={"within": "host"})

    row = after_scan(result, 1)
    work_s = row["ksmd_cpu_ns"] / 1e9
    assert work_s > 5
    assert row["time_s"] == pytest.approx(900 + work_s, abs=1)
    assert shared(result) == (pages, pages)


def test_guests_that_leave_are_not_looked_at_any_more():
    early = guest("early", part("heap", 40, pool="heap"), pages=40, stop="14min")
    late = guest("late", part("heap", 40, pool="heap"), pages=40, start="16min", count=2)

    result = run(early, late, duration="40min", page_combining={"within": "host"})

    assert shared(result, 20 * 60.0) == (0, 0)
    assert shared(result) == (40, 40)
