"""Huge pages: which page faults bring them, how KSM splits them, and what khugepaged makes of small pages."""

from __future__ import annotations

import machine
import numpy as np
import pytest

from sim.errors import UserError
from sim.memory import pages as memory
from sim.memory.huge import Daemon, Khugepaged, Thp
from sim.memory.pages import BLOCK, NEVER
from sim.run import run
from sim.scenario import parse

X = 7
"""A content that several pages have."""


def host(**changed) -> machine.Machine:
    """A host whose guests get huge pages, and whose ksmd visits every page in every full scan."""
    return machine.Machine(**{"thp": True, "smart_scan": False} | changed)


def unique(pages: int, **held: int) -> list[int | None]:
    """Contents that no other page has, but for those given as p<page number>."""
    contents: list[int | None] = [100 + page for page in range(pages)]
    for name, content in held.items():
        contents[int(name[1:])] = content
    return contents


def after(machine: machine.Machine, scans: int) -> list[tuple[int, int, int, int]]:
    """Shared, sharing and unshared pages and splits at the end of each full scan."""
    names = ("pages_shared", "pages_sharing", "pages_unshared", "thp_split_page")
    return [tuple(row[name] for name in names) for row in machine.scan(scans)]


# --- page faults -----------------------------------------------------------------------------------------------------


def test_the_first_touch_of_a_block_brings_a_huge_page_of_zeros():
    one = host()
    guest = one.start([None] * BLOCK + [None] * 100)
    one.write(guest, 3, X)

    assert one.read(guest) == [0] * 3 + [X] + [0] * (BLOCK - 4) + [None] * 100
    assert one.counters()["thp_fault_alloc"] == one.counters()["huge_pages"] == 1
    assert one.counters()["frames"] == BLOCK


def test_a_block_that_reaches_beyond_the_guest_gets_small_pages():
    one = host()
    guest = one.start([None] * (BLOCK - 1))
    one.write(guest, 3, X)

    assert (one.counters()["thp_fault_alloc"], one.counters()["frames"]) == (0, 1)


def test_a_block_in_which_a_page_is_there_gets_no_huge_page():
    one = host()
    guest = one.start([None] * BLOCK)
    one.write(guest, 3, X)
    one.unmap(guest, 3)
    one.write(guest, 3, X)

    assert (one.counters()["thp_fault_alloc"], one.counters()["huge_pages"]) == (1, 0)


def test_without_512_free_frames_a_fault_brings_a_small_page():
    one = host()
    one.m.counts[memory.LIMIT] = BLOCK - 1
    guest = one.start([None] * BLOCK)
    one.write(guest, 3, X)

    assert (one.counters()["thp_fault_alloc"], one.counters()["frames"]) == (0, 1)
    assert one.m.counts[memory.THP_FALLBACK] == 1


# --- splits, each as measured on Linux 6.18.44 -----------------------------------------------------------------------


def test_a_pair_in_two_huge_pages_merges_at_once_and_splits_both():
    one = host()
    one.start(unique(2 * BLOCK, p5=X, p521=X))

    assert after(one, 3) == [(0, 0, 0, 0), (1, 1, 1022, 2), (1, 1, 1022, 2)]


def test_a_pair_in_one_huge_page_is_split_first_and_merges_a_scan_later():
    one = host()
    one.start(unique(BLOCK, p5=X, p9=X))

    assert after(one, 4) == [(0, 0, 0, 0), (0, 0, 511, 1), (1, 1, 510, 1), (1, 1, 510, 1)]


def test_of_four_copies_in_one_huge_page_the_second_waits_a_scan():
    one = host()
    one.start(unique(BLOCK, p5=X, p9=X, p11=X, p13=X))

    assert after(one, 3) == [(0, 0, 0, 0), (1, 2, 508, 1), (1, 3, 508, 1)]


def test_copies_inside_and_across_huge_pages():
    one = host()
    one.start(unique(2 * BLOCK, p5=X, p9=X, p515=X, p20=X + 1, p516=X + 1))

    assert after(one, 3) == [(0, 0, 0, 0), (2, 2, 1019, 2), (2, 3, 1019, 2)]


def test_a_split_gives_back_the_pages_that_hold_zeros():
    """100 of the first huge page's 512 pages: two of them were visited before, so their items stay a scan longer."""
    one = host()
    zeros = {f"p{page}": 0 for page in range(100, 200)}
    one.start(unique(2 * BLOCK, p5=X, p521=X, **zeros))
    rows = one.scan(3)

    assert [row["thp_split_page"] for row in rows] == [0, 2, 2]
    assert [row["frames"] for row in rows] == [1024, 923, 923]
    assert [row["pages_scanned"] for row in rows] == [1024, 1024 + 926, 1024 + 926 + 924]


def test_zeros_are_found_in_one_huge_page_a_scan():
    """The zero page put in the unstable tree is gone with the split, and searches stop where it was."""
    one = host()
    one.start([None] * (3 * BLOCK))
    for page in (5, BLOCK + 6, 2 * BLOCK + 7):
        one.write(0, page, 1000 + page)
    rows = one.scan(5)

    assert [row["thp_split_page"] for row in rows] == [0, 1, 2, 3, 3]
    assert [row["frames"] for row in rows] == [3 * BLOCK, 2 * BLOCK + 1, BLOCK + 2, 3, 3]


def test_with_use_zero_pages_a_split_leaves_no_ksm_zero_page():
    one = host(use_zero_pages=True)
    one.start(unique(BLOCK, **{f"p{page}": 0 for page in range(100, 110)}))
    rows = one.scan(3)

    assert [(row["thp_split_page"], row["ksm_zero_pages"], row["frames"]) for row in rows[1:]] == [(1, 0, 502)] * 2


def test_before_6_12_a_split_kept_the_zeros():
    one = host(split_frees_zero=False)
    one.start(unique(2 * BLOCK, p5=X, p521=X, p6=0))

    assert [row["frames"] for row in one.scan(2)] == [1024, 1023]


def test_no_split_without_an_equal_page():
    one = host()
    one.start(unique(2 * BLOCK))

    assert after(one, 3)[-1] == (0, 0, 1024, 0)


def test_a_fork_maps_huge_pages_page_by_page():
    one = host()
    parent = one.start(unique(BLOCK))
    child = one.fork(parent)
    one.write(child, 0, X)

    assert (one.counters()["huge_pages"], one.counters()["thp_split_page"]) == (0, 0)
    assert one.counters()["frames"] == BLOCK + 1


# --- huge pages given back in part, as measured on Linux 6.18.44 ----------------------------------------------------


def given_back_in_part() -> tuple[machine.Machine, int]:
    """A host with a guest of 32 huge pages, of which 16 have lost their first half and one a single page."""
    one = host(pages=40 * BLOCK, contents=1 << 16, splits_later=True)
    guest = one.start(unique(32 * BLOCK))
    for block in range(16):
        one.unmap(guest, block * BLOCK, BLOCK // 2)
    one.unmap(guest, 16 * BLOCK + 7)
    return one, guest


def frames_and_splits(one: machine.Machine) -> tuple[int, int, int]:
    """Frames in use, huge pages whose split is put off, and huge pages that were split."""
    counted = one.counters()
    return counted["frames"], int(one.m.counts[memory.THP_DEFERRED_SPLIT]), counted["thp_split_page"]


def test_a_huge_page_given_back_in_part_keeps_all_its_memory():
    one, guest = given_back_in_part()

    assert frames_and_splits(one) == (32 * BLOCK, 17, 0)
    assert one.counters()["huge_pages"] == 15
    assert one.read(guest)[: BLOCK // 2 + 1] == [None] * (BLOCK // 2) + [100 + BLOCK // 2]


def test_a_huge_page_given_back_whole_is_free_at_once_in_one_go_or_two():
    one, guest = given_back_in_part()
    one.unmap(guest, 20 * BLOCK, BLOCK)
    assert frames_and_splits(one) == (31 * BLOCK, 17, 0)

    one.unmap(guest, BLOCK // 2, BLOCK // 2)
    assert frames_and_splits(one) == (30 * BLOCK, 17, 0)


def test_what_was_given_back_is_touched_anew_in_a_small_page():
    one, guest = given_back_in_part()
    one.write(guest, 5, X)
    assert frames_and_splits(one) == (32 * BLOCK + 1, 17, 0)

    one.unmap(guest, 5)
    assert frames_and_splits(one) == (32 * BLOCK, 17, 0)


def test_shortage_splits_what_is_given_back_in_part():
    one, guest = given_back_in_part()
    one.m.counts[memory.LIMIT] = 32 * BLOCK
    one.write(guest, 5, X)

    assert frames_and_splits(one) == (32 * BLOCK - 16 * BLOCK // 2, 17, 17)
    assert one.read(guest)[4:7] == [None, X, None]


def test_a_merge_and_a_collapse_end_what_was_put_off():
    one, guest = given_back_in_part()
    one.start([60_000 + page for page in range(BLOCK - 1)] + [100 + BLOCK - 1])
    one.scan(2)
    assert frames_and_splits(one)[2] == 2  # the one in which an equal page was, and that page's own
    assert one.counters()["frames"] == 33 * BLOCK - BLOCK // 2 - 1

    one.collapse(guest, BLOCK - 1, BLOCK)
    assert one.counters()["huge_pages"] == 32
    assert not one.m.block[:, memory.IN_USE].any()


def test_before_4_5_what_is_given_back_is_free_at_once():
    one = host()
    guest = one.start(unique(BLOCK))
    one.unmap(guest, 0)

    assert frames_and_splits(one) == (BLOCK - 1, 0, 0)


# --- khugepaged ------------------------------------------------------------------------------------------------------


def small_pages(*blocks: int) -> machine.Machine:
    """A host with one guest that has so many touched pages in each block, small ones, and may have huge ones."""
    one = host(thp=False)
    contents: list[int | None] = []
    for number, touched in enumerate(blocks):
        contents += [1000 * number + page + 1 for page in range(touched)] + [None] * (BLOCK - touched)
    one.start(contents)
    one.m.guest[:, memory.THP] = 1
    return one


def huge(one: machine.Machine) -> list[int]:
    """Which blocks are huge pages."""
    return np.flatnonzero(one.m.block[:, memory.HUGE]).tolist()


@pytest.mark.parametrize(("max_ptes_none", "taken"), [(511, [0, 2, 3]), (112, [2, 3]), (111, [3]), (0, [3])])
def test_khugepaged_takes_blocks_with_few_enough_untouched_pages(max_ptes_none, taken):
    one = small_pages(1, 0, 400, 512)
    one.collapse(0, max_ptes_none, 256)

    assert huge(one) == taken
    assert one.counters()["frames"] == BLOCK * len(taken) + sum(
        touched for block, touched in enumerate((1, 0, 400, 512)) if block not in taken
    )


@pytest.mark.parametrize(("shared", "taken"), [(256, [0, 1]), (257, [])])
def test_khugepaged_leaves_blocks_with_too_many_shared_pages(shared, taken):
    """Two equal blocks; once one of them is copied the pages of the other are shared no more."""
    one = small_pages(0, 0)
    for page in range(BLOCK):
        one.write(0, page, page + 1)
        one.write(0, BLOCK + page, page + 1 if page < shared else 5000 + page)
    one.m.block[:, memory.HUGE] = 0  # written page by page, but asked for as huge pages
    one.m.counts[memory.HUGE_PAGES] = 0
    one.scan(3)
    assert one.counters()["pages_sharing"] == shared
    one.collapse(0, 511, 256)

    assert huge(one) == taken


def test_what_khugepaged_copied_merges_again_at_the_next_scan_and_is_split_again():
    one = small_pages(512, 512)
    one.write(0, BLOCK + 9, 4)
    rows = one.scan(2)
    one.collapse(0, 511, 256)
    unshared = one.counters()["frames"]
    again = one.scan(1)[0]

    assert (rows[-1]["pages_sharing"], rows[-1]["frames"], unshared) == (1, 1023, 1024)
    assert (again["pages_sharing"], again["frames"], again["thp_split_page"]) == (1, 1023, 2)


def test_khugepaged_needs_512_free_frames():
    one = small_pages(512)
    one.m.counts[memory.LIMIT] = 2 * BLOCK - 1
    one.collapse(0, 511, 256)

    assert huge(one) == []


def daemon(**settings: int) -> Daemon:
    """A khugepaged that has seen nothing yet."""
    return Daemon(Khugepaged.model_validate(settings))


def test_khugepaged_goes_on_where_it_stopped():
    one = small_pages(512, 512, 512)
    khugepaged = daemon(pages_to_scan=2 * BLOCK)
    khugepaged.register(0)

    assert [(khugepaged.wake(one.m, 0), huge(one)) for _ in range(3)] == [
        ((2, 2), [0, 1]),
        ((1 + 1, 1), [0, 1, 2]),
        ((2, 0), [0, 1, 2]),
    ]


def test_khugepaged_looks_at_nothing_twice_in_one_go():
    one = small_pages(512, 512, 512)
    khugepaged = daemon(pages_to_scan=100 * BLOCK)
    khugepaged.register(0)

    assert khugepaged.wake(one.m, 0) == (3, 3)


def test_khugepaged_goes_on_with_the_next_guest_when_one_ends():
    one = host(thp=False)
    for _ in range(3):
        one.start(unique(2 * BLOCK))
    one.m.guest[:, memory.THP] = 1
    khugepaged = daemon(pages_to_scan=BLOCK)
    for guest in range(3):
        khugepaged.register(guest)
    khugepaged.wake(one.m, 0)
    one.exit(0)
    khugepaged.forget(0)
    khugepaged.wake(one.m, 0)

    assert huge(one) == [2]
    khugepaged.forget(99)
    khugepaged.forget(1)
    khugepaged.forget(2)
    assert khugepaged.wake(one.m, 0) == (0, 0)


# --- scenarios -------------------------------------------------------------------------------------------------------


def scenario(**changed):
    """Two guests whose memory is partly equal, on a host with huge pages."""
    parts = [
        {"name": "pool", "pool": "os", "size": "20%"},
        {"name": "zero", "zero": True, "size": "20%", "run": "64KiB"},
        {"name": "own", "size": "40%", "run": "64KiB"},
    ]
    vm = {"name": "vm", "count": 2, "memory": "16MiB", "image": {"parts": parts}}
    thp = {"enabled": "madvise", "khugepaged": {"scan_sleep_millisecs": 200}}
    ksm = {"pages_to_scan": 4000, "smart_scan": 0}
    whole = {"name": "huge", "duration": "2s", "hosts": [{"memory": "64MiB", "thp": thp, "ksm": ksm}], "vms": [vm]}
    return parse(whole | changed)


def test_a_run_reports_huge_pages_splits_and_collapses():
    samples = run(scenario()).samples

    assert samples["thp_fault_alloc"].iloc[-1] == 14
    assert samples["thp_split_page"].iloc[-1] > 4
    assert samples["thp_collapse_alloc"].iloc[-1] > 0
    made = samples["thp_fault_alloc"] + samples["thp_collapse_alloc"] - samples["thp_split_page"]
    assert (samples["mem_huge_bytes"] == made * BLOCK * 4096).all()
    assert (samples["mem_huge_bytes"] <= samples["mem_private_bytes"]).all()


def test_khugepaged_that_need_not_sleep_waits_a_timer_tick_where_there_is_nothing_to_do():
    """A guest that stops leaves it without memory; the run must end all the same."""
    thp = {"enabled": "always", "khugepaged": {"scan_sleep_millisecs": 0}}
    vm = {"name": "vm", "memory": "4MiB", "lifetime": "100ms"}
    result = run(scenario(hosts=[{"memory": "64MiB", "thp": thp}], vms=[vm]))

    assert result.samples["time_s"].iloc[-1] == 2.0
    assert 0 < result.samples["khugepaged_cpu_ns"].iloc[-1] < 100e6


def test_a_host_without_room_for_huge_pages_says_how_often():
    thp = {"enabled": "always"}
    vm = {"name": "vm", "memory": "4MiB", "image": {"parts": [{"name": "own", "size": "3MiB"}]}}
    result = run(scenario(hosts=[{"memory": "3584KiB", "thp": thp, "commit": {"overcommit_memory": 1}}], vms=[vm]))

    last = result.samples.iloc[-1]
    assert (last["thp_fault_alloc"], last["oom_kills"]) == (1, 0)
    assert last["thp_fault_fallback"] == 1  # the page table that the first one leaves asks for small pages


def test_sampling_changes_nothing_with_huge_pages():
    fine, coarse = (run(scenario(sample_every=every)).scans for every in ("10ms", "1s"))

    assert fine.equals(coarse)


@pytest.mark.parametrize(
    ("enabled", "asks", "given"),
    [("always", False, True), ("madvise", True, True), ("madvise", False, False), ("never", True, False)],
)
def test_who_gets_huge_pages(enabled, asks, given):
    assert Thp(enabled=enabled).gives(asks) is given


def hugetlbfs(**changed):
    """Guests of 16 MiB in hugetlbfs, of which one touches 4 MiB, and a guest of small pages with equal contents."""
    parts = [{"name": "pool", "pool": "os", "size": "4MiB"}]
    vm = {"memory": "16MiB", "image": {"parts": parts}}
    vms = [
        vm | {"name": "large", "huge_pages": "hugetlbfs", "count": 2, "every": "200ms", "stop": "900ms"},
        vm | {"name": "small"},
    ]
    hosts = [{"memory": "64MiB", "hugetlbfs": {"nr_hugepages": 12}, "ksm": {"pages_to_scan": 10000}}]
    return parse({"name": "pool", "duration": "1s", "sample_every": "100ms", "hosts": hosts, "vms": vms} | changed)


def test_hugetlbfs_holds_its_pages_back_gives_whole_guests_and_shares_nothing():
    result = run(hugetlbfs())
    samples = result.samples.set_index("time_s")
    mib = samples[["mem_reserved_bytes", "mem_private_bytes", "mem_used_bytes"]] // 2**20

    assert mib.loc[0.1].tolist()[:2] == [8, 16 + 4]
    assert mib.loc[0.9, "mem_reserved_bytes"] == 24
    assert samples["pages_sharing"].max() == 0
    assert result.events.loc[result.events["kind"] == "not-started", "guest"].tolist() == ["large-1"]
    assert result.guests.set_index("guest")["touched_bytes"].to_dict() == {"large-0": 16 << 20, "small-0": 4 << 20}


MADVISE = [{"at": "1ms", "advice": "mergeable"}]
REFUSED = [
    (
        ({"hugetlbfs": {"nr_hugepages": 32}}, {}),
        "hosts.0.hugetlbfs.nr_hugepages: 64MiB of huge pages leave nothing of the host's memory; write at most 31",
    ),
    (
        ({"hugetlbfs": None}, {}),
        "vms.0.huge_pages: host host has no hugetlbfs; give the host hugetlbfs.nr_hugepages",
    ),
    (({}, {"memory": "5MiB"}), "vms.0.memory: must be whole pages of 2MiB; write 6MiB"),
    (
        ({}, {"memory": "32MiB"}),
        "vms.0.memory: is more than the hugetlbfs of host host; set hugetlbfs.nr_hugepages to 16 or more",
    ),
    (
        ({}, {"madvise": MADVISE}),
        "vms.0.madvise: KSM takes no memory of hugetlbfs; remove madvise or huge_pages",
    ),
    (
        ({}, {"fork_of": "small", "image": None}),
        "vms.0.huge_pages: a fork has its parent's memory; remove huge_pages or fork_of",
    ),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_what_hugetlbfs_cannot_do_is_refused(changed, message):
    host, vm = changed
    sound = hugetlbfs().model_dump()
    hosts = [{"memory": "64MiB", "hugetlbfs": {"nr_hugepages": 12}} | host]
    large = {"name": "large", "memory": "16MiB", "huge_pages": "hugetlbfs"} | vm
    small = {"name": "small", "memory": sound["vms"][1]["memory"]}

    with pytest.raises(UserError) as refused:
        hugetlbfs(hosts=hosts, vms=[large, small])

    assert message in [f"{each.path}: {each.message}; {each.remedy}" for each in refused.value.problems]


def test_memory_of_hugetlbfs_is_not_forked():
    large = {"name": "large", "memory": "16MiB", "huge_pages": "hugetlbfs"}

    with pytest.raises(UserError, match="memory of hugetlbfs is not forked"):
        hugetlbfs(vms=[large, {"name": "child", "memory": "16MiB", "fork_of": "large", "start": "1ms"}])


def test_a_kernel_without_huge_pages_refuses_them():
    with pytest.raises(UserError, match=r"hosts\.0\.thp\.enabled.*2\.6\.38"):
        parse(
            {
                "name": "old",
                "duration": "1s",
                "hosts": [{"memory": "1GiB", "kernel": "2.6.33", "thp": {"enabled": "always"}}],
                "vms": [{"name": "vm", "memory": "1MiB"}],
            }
        )


def test_never_touched_memory_reads_as_never_touched_without_huge_pages():
    one = host(thp=False)
    guest = one.start([None] * BLOCK)

    assert set(one._contents(one.span(guest)).tolist()) == {NEVER}
