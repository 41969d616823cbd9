"""Forks: the time that page tables take, what the host promises and what it refuses; counted by hand."""

from __future__ import annotations

import pytest
from one_host import end, events, guest, part, run, scenario, size

from sim.columns import PAGE_BYTES
from sim.cost import prices
from sim.errors import UserError
from sim.memory.pages import BLOCK
from sim.reclaim.commit import Commit
from sim.units import GIB, KIB, MIB

XEN_NS = 913
"""Of a page by the set redis-xen-pv."""


def forked(pages: int, *parts: object, **about: object):
    """A program and a fork of it, half a second later."""
    child = {"name": "child", "memory": size(pages), "fork_of": "program", "start": "500ms"}
    parent = guest("program", *(parts or (part("all", pages),)), pages=pages)  # type: ignore[arg-type]
    return run(parent, child, **{"duration": "1s", "ksm": {"run": 0}, "prices": "redis-xen-pv"} | about)


def row_of(result, name):
    return result.guests.set_index("guest").loc[name]


# --- time ------------------------------------------------------------------------------------------------------------


def test_a_fork_takes_the_price_of_an_entry_for_each_page_that_is_there():
    result = forked(1000, part("there", 700), part("never-touched", 300, untouched=True))

    assert row_of(result, "child-0")["fork_s"] == 700 * XEN_NS / 1e9
    assert row_of(result, "program-0")["fork_s"] == 0
    assert result.summary["fork_s"] == 700 * XEN_NS / 1e9


def test_a_huge_page_has_one_entry_and_so_costs_next_to_nothing():
    pages = 2 * BLOCK + 100
    result = forked(pages, thp={"enabled": "always"})

    _, huge = prices.fork(prices.load("redis-xen-pv"))
    assert result.summary["fork_s"] == round(100 * XEN_NS + 2 * huge.ns) / 1e9


def test_parent_and_child_do_nothing_while_page_tables_are_copied():
    pages = 50_000
    lost = pages * XEN_NS / 1e9
    result = forked(pages)

    assert row_of(result, "program-0")["progress_percent"] == pytest.approx(100 * (1 - lost))
    assert row_of(result, "child-0")["progress_percent"] == pytest.approx(100 * (0.5 - lost) / 0.5)
    assert row_of(result, "program-0")["stall_s"] == 0  # it does not wait for memory


def test_of_two_processors_one_waits_for_the_fork():
    pages = 50_000
    parent = guest("program", part("all", pages), pages=pages, vcpus=2)
    child = {"name": "child", "memory": size(pages), "fork_of": "program", "start": "500ms"}
    result = run(parent, child, duration="1s", ksm={"run": 0}, prices="redis-xen-pv")

    lost = pages * XEN_NS / 1e9
    assert row_of(result, "program-0")["progress_percent"] == pytest.approx(100 * (1 - lost / 2))


def test_writes_that_were_due_come_later_by_the_time_of_a_fork():
    """Two forks of one parent: its pages' next writes are planned at the first, and the second puts them off."""
    pages, rate = 20_000, 4.0
    parent = guest("program", part("all", pages, writes={"rate": f"{rate}/s"}), pages=pages)
    idle = {"every": "1h", "levels": [0]}
    child = {"name": "child", "count": 2, "every": "100ms", "memory": size(pages), "fork_of": "program"}
    child["activity"] = idle
    result = run(parent, child, duration="300ms", sample_every="10ms", ksm={"run": 0}, prices="redis-xen-pv")

    lost = pages * XEN_NS / 1e9
    copied = row_of(result, "program-0")["cow_breaks"]
    worked = 0.3 - 2 * lost
    assert copied / pages == pytest.approx(_copies(rate, 0.1 - lost) + _copies(rate, 0.2 - lost), rel=0.05)
    assert row_of(result, "program-0")["progress_percent"] == pytest.approx(100 * worked / 0.3)


def _copies(rate: float, seconds: float) -> float:
    """Share of pages that are copied between two forks."""
    return float(1 - 2.718281828459045 ** (-rate * seconds))


@pytest.mark.parametrize(
    ("name", "ms_per_gib"),
    [
        ("redis-physical", (9.0, 13.1)),
        ("redis-vmware", (12.8, 12.9)),
        ("redis-kvm", (23.3, 23.4)),
        ("redis-xen-pv", (239.3, 239.4)),
    ],
)
def test_published_times_of_forks_are_those_of_their_price_sets(name, ms_per_gib):
    page, _ = prices.fork(prices.load(name))
    low, high = ms_per_gib

    assert low <= page.ns * (GIB // PAGE_BYTES) / 1e6 <= high
    for end_ns, ms in ((page.low, low), (page.high, high)):
        assert end_ns is None or end_ns * (GIB // PAGE_BYTES) / 1e6 == pytest.approx(ms, rel=0.01)


def test_a_price_set_that_is_like_another_has_its_other_prices():
    mine, whole = prices.load("redis-kvm"), prices.load("emerald-rapids")

    assert mine.checksum == whole.checksum
    assert mine.machine is None
    assert prices.fork(mine)[1] == prices.fork(whole)[1]


@pytest.mark.parametrize("other", ["nobody", "redis-kvm", 7])
def test_a_price_set_can_only_be_like_a_bundled_one_that_prices_all(tmp_path, other):
    (tmp_path / "mine.yaml").write_text(f"name: mine\nabout: as told elsewhere\nlike: {other}\n")

    with pytest.raises(UserError, match="no such bundled price set that prices all"):
        scenario(guest("g", part("page", 1), pages=1), duration="1s", folder=str(tmp_path), prices="mine.yaml")


# --- page tables -----------------------------------------------------------------------------------------------------


def test_page_tables_take_a_page_for_each_2_mib_in_which_something_is():
    pages = 3 * BLOCK + 10
    result = forked(pages, part("there", BLOCK + 1), part("never-touched", 2 * BLOCK + 9, untouched=True))

    assert row_of(result, "program-0")["page_tables_bytes"] == 2 * PAGE_BYTES
    assert result.summary["page_tables_bytes"] == 4 * PAGE_BYTES


def test_a_guest_that_ended_has_no_page_tables():
    one = guest("short", part("all", 100), pages=100, lifetime="100ms")
    result = run(one, guest("long", part("all", 100), pages=100), duration="1s")

    assert row_of(result, "short-0")["page_tables_bytes"] == PAGE_BYTES
    assert result.summary["page_tables_bytes"] == PAGE_BYTES


# --- what the host promises ------------------------------------------------------------------------------------------

NO_OVERCOMMIT = {"overcommit_memory": 2, "overcommit_ratio": 100}
"""As Solaris: memory and disk together are all that is promised."""


@pytest.mark.parametrize(("more", "running"), [(0, 2), (1, 1)], ids=["half", "a page more than half"])
def test_without_overcommit_no_program_of_more_than_half_of_virtual_memory_forks(more, running):
    pages = 3 * MIB // PAGE_BYTES
    result = forked(
        pages + more, part("there", 10), memory="4MiB", swap={"device": "nvme", "size": "2MiB"}, commit=NO_OVERCOMMIT
    )  # fmt: skip

    assert end(result)["guests_running"] == running
    assert ((0.5, "not-started") in events(result)) == bool(more)


def test_a_refusal_says_what_was_asked_and_what_the_limit_is():
    result = forked(512, part("there", 10), memory="3MiB", commit=NO_OVERCOMMIT)

    assert list(result.events["detail"]) == ["fork gets ENOMEM: 2MiB more make 4MiB promised, and the limit is 3MiB"]


def test_what_a_guest_was_promised_is_free_again_when_it_ends():
    vms = [guest(f"g{i}", part("p", 1), pages=256, start=f"{i}s", lifetime="1500ms") for i in range(4)]
    result = run(*vms, duration="10s", memory="2MiB", ksm={"run": 0}, commit=NO_OVERCOMMIT)

    assert [kind for _, kind in events(result)] == []
    crowded = run(*vms, duration="10s", memory="1MiB", ksm={"run": 0}, commit=NO_OVERCOMMIT)
    assert events(crowded) == [(1.0, "not-started"), (3.0, "not-started")]


def test_by_default_only_what_is_more_than_memory_and_swap_is_refused():
    vms = [guest("large", part("p", 1), pages=513), guest("whole", part("p", 1), pages=512, count=3)]

    assert end(run(*vms, duration="1s", memory="2MiB", ksm={"run": 0}))["guests_running"] == 3
    always = run(*vms, duration="1s", memory="2MiB", ksm={"run": 0}, commit={"overcommit_memory": 1})
    assert end(always)["guests_running"] == 4


def test_memory_of_hugetlbfs_is_neither_promised_nor_counted():
    large = {"name": "large", "memory": "4MiB", "huge_pages": "hugetlbfs"}
    small = guest("small", part("p", 1), pages=1024)
    about = {"duration": "1s", "memory": "8MiB", "hugetlbfs": {"nr_hugepages": 2}, "commit": NO_OVERCOMMIT}

    assert end(run(large, small, **about))["guests_running"] == 2
    assert end(run(large, {**small, "memory": size(1025)}, **about))["guests_running"] == 1


def test_the_limit_is_that_of_the_kernel():
    """Source: Documentation/mm/overcommit-accounting.rst."""
    strict = Commit(overcommit_memory=2)

    assert strict.limit(8 * GIB, 2 * GIB) == 6 * GIB
    assert Commit(overcommit_memory=2, overcommit_kbytes=100).limit(8 * GIB, 2 * GIB) == 2 * GIB + 100 * KIB


@pytest.mark.parametrize(
    ("commit", "message"),
    [
        ({"overcommit_ratio": 80}, "commit.overcommit_ratio: means nothing unless overcommit_memory is 2"),
        ({"overcommit_kbytes": 80}, "commit.overcommit_kbytes: means nothing unless overcommit_memory is 2"),
        (
            {"overcommit_memory": 2, "overcommit_ratio": 80, "overcommit_kbytes": 80},
            "commit.overcommit_ratio: overcommit_kbytes says the same otherwise",
        ),
        ({"overcommit_memory": 3}, "commit.overcommit_memory"),
    ],
)
def test_settings_without_effect_are_refused(commit, message):
    with pytest.raises(UserError) as refused:
        scenario(guest("g", part("p", 1), pages=1), duration="1s", commit=commit)

    assert f"hosts.0.{message}" in str(refused.value)


def test_esx_promises_by_its_own_rules():
    with pytest.raises(UserError, match=r"hosts\.0\.commit: means nothing on a host with tps"):
        scenario(guest("g", part("p", 1), pages=1), duration="1s", tps={}, commit={"overcommit_memory": 1})
