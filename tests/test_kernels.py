"""Every change between kernels as a host shows it, and what a kernel does when memory runs out or guests fork."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_host import after_scan, at, end, equal, events, guest, part, run, scenario

from sim.columns import PAGE_BYTES
from sim.errors import UserError
from sim.sharing.kernels import KERNELS, kernel

ALL_AT_ONCE = {"pages_to_scan": 1_000_000, "sleep_millisecs": 20}
"""One full scan per batch, one batch each 24 ms."""

# --- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("2.6.32", "2.6.32"),
        ("2.6.38", "2.6.38"),
        ("3.4", "2.6.38"),
        ("3.10", "3.9"),
        ("4.19", "4.13"),
        ("4.x", "4.13"),
        ("5.4", "5.1"),
        ("5.x", "5.9"),
        ("6.9", "6.8"),
        ("6.10", "6.10"),
        ("6.12", "6.12"),
        ("6.12.117", "6.12"),
        ("6.18", "6.18"),
        ("7.0", "6.18"),
    ],
)
def test_a_version_behaves_like_the_last_change_before_it(asked, found):
    assert kernel(asked).version == found


@given(st.sampled_from(list(KERNELS)), st.integers(0, 200))
def test_a_stable_release_behaves_like_the_version_it_maintains(version, patch):
    assert kernel(f"{version}.{patch}") == KERNELS[version]


@pytest.mark.parametrize("text", ["2.6.31", "1.0", "", "six", "6.18-rc1", "6..18", "x", "6.18.44-fc"])
def test_text_that_is_no_kernel_with_ksm_is_refused_with_the_versions_there_are(text):
    with pytest.raises(UserError) as refused:
        scenario(guest("g", part("page", 1), pages=1), duration="1s", kernel=text)

    assert "is no Linux version with KSM" in str(refused.value)
    assert 'write "2.6.32" to "6.18"' in str(refused.value)


@pytest.mark.parametrize(
    ("setting", "since", "before"),
    [
        ({"smart_scan": 1}, "6.7", "6.6"),
        ({"advisor_mode": "scan-time"}, "6.8", "6.7"),
        ({"ksmd_cpu_before": "1h"}, "6.8", "6.7"),
        ({"max_page_sharing": 10}, "4.13", "4.12"),
        ({"use_zero_pages": 1}, "4.11", "4.10"),
        ({"merge_across_nodes": 0}, "3.9", "3.8"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else each,
)
def test_a_setting_is_refused_before_the_kernel_that_brought_it(setting, since, before):
    vm = guest("g", part("page", 1), pages=1)

    assert scenario(vm, duration="1s", kernel=since, ksm=setting)
    with pytest.raises(UserError) as refused:
        scenario(vm, duration="1s", kernel=before, ksm=setting)
    assert next(iter(setting)) in str(refused.value)
    assert f"came with kernel {since}" in str(refused.value)


def test_max_kernel_pages_is_refused_after_the_kernel_that_had_it():
    with pytest.raises(UserError, match=r"max_kernel_pages.*went away with kernel 2\.6\.33"):
        scenario(guest("g", part("page", 1), pages=1), duration="1s", kernel="2.6.33", ksm={"max_kernel_pages": 10})


@pytest.mark.parametrize(("before", "choices"), [("0s", [500, 5000, 30_000]), ("1h", [500, 70, 700, 7000, 30_000])])
def test_the_advisors_first_step_counts_all_that_ksmd_ever_used(before, choices):
    """On 6.18, after 744 s of ksmd's CPU time, scans took as long as with 500, 70, 700 pages and on."""
    ksm = {"advisor_mode": "scan-time", "advisor_target_scan_time": 1, "ksmd_cpu_before": before}
    result = run(guest("g", part("own", 2000), pages=2000), duration="3s", sample_every="10ms", ksm=ksm)

    assert list(dict.fromkeys(result.samples["pages_to_scan"])) == choices


# --- changes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "shared"), [(10, 10), (0, 100), (None, 100)])
def test_kernel_2_6_32_makes_no_more_than_max_kernel_pages(limit, shared):
    ksm = ALL_AT_ONCE | ({} if limit is None else {"max_kernel_pages": limit})
    vm = guest("g", part("common", 100, pool="common"), pages=100, count=2)
    result = run(vm, duration="1s", kernel="2.6.32", ksm=ksm)

    assert (end(result)["pages_shared"], end(result)["pages_sharing"]) == (shared, shared)


def test_kernel_2_6_32_goes_on_merging_into_the_pages_it_has_at_the_limit():
    vms = [
        guest("g", part("common", 100, pool="common"), pages=100, count=2),
        guest("late", part("common", 100, pool="common"), pages=100, start="500ms"),
    ]
    result = run(*vms, duration="1s", kernel="2.6.32", ksm=ALL_AT_ONCE | {"max_kernel_pages": 10})

    assert (end(result)["pages_shared"], end(result)["pages_sharing"]) == (10, 20)


def test_until_2_6_32_merged_pages_are_searched_for_again_in_every_scan():
    def levels_searched(version, duration):
        vm = guest("g", part("common", 100, pool="common"), pages=100, count=2)
        return run(vm, duration=duration, kernel=version, ksm=ALL_AT_ONCE).manifest["work"]["stable_level"]

    assert levels_searched("2.6.32", "2s") > levels_searched("2.6.32", "1s")
    assert levels_searched("2.6.33", "2s") == levels_searched("2.6.33", "1s")


@pytest.mark.parametrize(("version", "period_ms"), [("4.7", 20), ("4.8", 24)])
def test_timers_fire_a_tick_late_since_4_8(version, period_ms):
    """With HZ=250, 20 ms are 5 ticks of 4 ms."""
    result = run(guest("g", part("page", 1), pages=1), duration="1s", kernel=version)

    assert result.summary["scan_time_s"] == pytest.approx(period_ms / 1000, abs=1e-4)


@pytest.mark.parametrize(("version", "expected"), [("4.12", (1, 299)), ("4.13", (2, 298))])
def test_since_4_13_no_more_than_256_pages_share_a_frame(version, expected):
    result = run(guest("g", equal("equal", 300), pages=300), duration="1s", kernel=version, ksm=ALL_AT_ONCE)

    assert (end(result)["pages_shared"], end(result)["pages_sharing"]) == expected


@pytest.mark.parametrize(("version", "wakes"), [("4.20", False), ("5.0", True)])
def test_a_change_of_sleep_millisecs_wakes_ksmd_since_5_0(version, wakes):
    result = run(
        guest("g", part("page", 1), pages=1),
        duration="9s",
        kernel=version,
        ksm={"sleep_millisecs": 20_000, "changes": [{"at": "1s", "sleep_millisecs": 20}]},
    )

    scans = end(result)["full_scans"]
    assert scans > 300 if wakes else scans == 1


@pytest.mark.parametrize(("version", "copies"), [("5.0", 40), ("5.1", 20), ("5.8", 20), ("5.9", 40)])
def test_the_last_mapper_of_a_ksm_page_writes_in_place_from_5_1_to_5_8(version, copies):
    vms = [
        guest(name, part("common", 20, pool="common"), pages=20, bursts=[{"part": "common", "at": moment}])
        for name, moment in (("first", "1s"), ("last", "1001ms"))
    ]
    result = run(*vms, duration="1010ms", kernel=version, ksm={"changes": [{"at": "900ms", "run": 0}]})

    assert at(result, 1.0)["pages_sharing"] == 20
    assert end(result)["cow_ksm"] == copies
    assert end(result)["mem_private_bytes"] == 40 * PAGE_BYTES


@pytest.mark.parametrize(("version", "kills"), [("5.8", 0), ("5.9", 1)])
def test_writing_in_place_needs_no_frame_when_memory_is_full(version, kills):
    """64 frames: 1 of metadata, 20 merged, 23 of a filler, and 20 for the copies of whoever writes first."""
    vms = [
        *(
            guest(name, part("common", 20, pool="common"), pages=20, bursts=[{"part": "common", "at": moment}])
            for name, moment in (("first", "1s"), ("last", "1001ms"))
        ),
        guest("filler", part("own", 23), pages=23, start="500ms", mergeable=False),
    ]
    changes = [{"at": "900ms", "run": 0}]
    result = run(*vms, duration="2s", sample_every="1ms", kernel=version, memory="256KiB", ksm={"changes": changes})

    assert at(result, 1.0)["mem_free_bytes"] == 0
    assert end(result)["oom_kills"] == kills


@pytest.mark.parametrize(
    ("version", "counted"), [("6.5", 250), ("6.6", 200), ("6.9", 200), ("6.10", 250), ("6.18", 250)]
)
def test_the_last_batch_of_a_scan_is_left_out_of_pages_scanned_from_6_6_to_6_9(version, counted):
    result = run(guest("g", part("own", 250), pages=250), duration="1s", kernel=version)

    assert after_scan(result, 1)["pages_scanned"] == counted
    assert after_scan(result, 3)["pages_scanned"] == 3 * counted


@pytest.mark.parametrize(("version", "skipped"), [("6.6", 0), ("6.7", 100)])
def test_pages_that_never_merge_are_skipped_since_6_7(version, skipped):
    result = run(guest("g", part("own", 100), pages=100), duration="1s", kernel=version, ksm=ALL_AT_ONCE)

    assert after_scan(result, 5)["pages_skipped"] == skipped


@pytest.mark.parametrize(("version", "period_s"), [("6.7", 2.0), ("6.8", 1.5)])
def test_sleeps_of_a_second_and_more_end_at_whole_seconds_before_6_8(version, period_s):
    """Up to an eight-tick step of the timer wheel."""
    result = run(guest("g", part("page", 1), pages=1), duration="30s", kernel=version, ksm={"sleep_millisecs": 1500})

    ends = result.scans["time_s"].iloc[1:]
    assert result.summary["scan_time_s"] == pytest.approx(period_s, abs=0.04)
    assert ((ends % 1 < 0.04).all()) == (version == "6.7")


@pytest.mark.parametrize(("version", "visits"), [("6.10", 1), ("6.11", 2)])
def test_a_page_with_a_merged_twin_merges_at_its_first_visit_before_6_11(version, visits):
    twins = guest("twin", part("common", 10, pool="common"), pages=10, count=2)
    late = guest("late", part("common", 10, pool="common"), pages=10, start="500ms")
    result = run(twins, late, duration="1s", kernel=version, ksm=ALL_AT_ONCE | {"smart_scan": 0})

    seen = result.scans[(result.scans["time_s"] > 0.5)].reset_index(drop=True)
    merged = seen.index[seen["pages_sharing"] == 20]
    assert merged[0] + 1 == visits


# --- memory runs out -------------------------------------------------------------------------------------------------

FULL_HOST = {"memory": "256KiB", "sample_every": "1ms"}
"""64 frames, one of them for KSM's own records."""


def pair(**more):
    """Two guests that share their 20 pages."""
    return guest("pair", part("common", 20, pool="common"), pages=20, count=2, **more)


def filler(pages):
    """A guest that takes frames once the pair has merged."""
    return guest("filler", part("own", pages), pages=pages, start="500ms", mergeable=False)


@pytest.mark.parametrize(("free", "refused"), [(19, 2), (21, 0)])
def test_madvise_unmergeable_is_refused_when_memory_is_short_and_nothing_is_lost(free, refused):
    """To unmerge both guests takes 20 frames more than they have, and one to begin with."""
    advice = [{"at": "1s", "advice": "unmergeable"}]
    result = run(pair(madvise=advice), filler(43 - free), duration="2s", **FULL_HOST)

    assert at(result, 1.0)["pages_sharing"] == 20
    assert events(result) == [(1.0, "madvise-refused")] * refused
    assert end(result)["oom_kills"] == 0
    assert list(result.guests["touched_bytes"].iloc[:2]) == [20 * PAGE_BYTES] * 2


def test_a_refused_madvise_says_eagain_and_leaves_the_guest_mergeable():
    advice = [{"at": "1s", "advice": "unmergeable"}]
    result = run(pair(madvise=advice), filler(43), duration="3s", **FULL_HOST)

    assert "EAGAIN" in result.events["detail"].iloc[0]
    assert (end(result)["pages_shared"], end(result)["pages_sharing"]) == (20, 20)


@pytest.mark.parametrize("free", [19, 21])
def test_run_2_unmerges_everything_or_stops_ksmd_and_loses_nothing(free):
    result = run(pair(), filler(43 - free), duration="2s", ksm={"changes": [{"at": "1s", "run": 2}]}, **FULL_HOST)

    last = end(result)
    assert at(result, 0.999)["pages_sharing"] == 20
    assert at(result, 0.999)["full_scans"] > 0
    assert last["oom_kills"] == 0
    assert last["mem_touched_bytes"] == (40 + 43 - free) * PAGE_BYTES
    if free < 20:
        assert events(result) == [(1.0, "setting-refused")]
        assert last["run"] == 0
        assert last["full_scans"] == at(result, 0.999)["full_scans"]
        assert last["mem_shared_bytes"] > 0
    else:
        assert events(result) == [(1.0, "setting")]
        assert last["run"] == 2
        assert (last["pages_shared"], last["pages_sharing"], last["full_scans"]) == (0, 0, 0)
        assert last["mem_shared_bytes"] == 0
        assert last["pages_scanned"] == at(result, 0.999)["pages_scanned"]


def test_after_run_2_everything_merges_again_with_run_1():
    changes = [{"at": "1s", "run": 2}, {"at": "1500ms", "run": 1}]
    result = run(pair(), duration="2s", ksm={"changes": changes})

    assert (end(result)["pages_shared"], end(result)["pages_sharing"]) == (20, 20)
    assert end(result)["cow_ksm"] == 40


@pytest.mark.parametrize(("unmerged_first", "kind"), [(False, "setting-refused"), (True, "setting")])
def test_max_page_sharing_cannot_be_changed_while_pages_are_shared(unmerged_first, kind):
    changes = [{"at": "1s", "run": 2}] * unmerged_first + [{"at": "2s", "max_page_sharing": 10, "run": 1}]
    result = run(guest("g", equal("equal", 100), pages=100), duration="3s", ksm={"changes": changes})

    shared = 10 if unmerged_first else 1
    assert (2.0, kind) in events(result)
    assert (end(result)["pages_shared"], end(result)["pages_sharing"]) == (shared, 100 - shared)


def test_a_guest_that_finds_no_frame_is_killed_and_recorded_and_the_others_go_on():
    bursts = [{"part": "common", "at": "1s"}]
    writer = guest("writer", part("common", 20, pool="common"), pages=20, bursts=bursts, oom_score_adj=1000)
    other = guest("other", part("common", 20, pool="common"), pages=20)
    result = run(writer, other, filler(33), duration="3s", **FULL_HOST)

    guests = result.guests.set_index("guest")
    before, last = at(result, 0.999), end(result)
    assert (1.0, "oom-killed") in events(result)
    assert guests["end"].to_dict() == {"writer-0": "oom-killed", "other-0": "running", "filler-0": "running"}
    assert guests.loc["writer-0", "stop_s"] == 1.0
    assert (last["oom_kills"], last["guests_running"]) == (1, 2)
    assert last["mem_promised_bytes"] == 53 * PAGE_BYTES
    assert last["mem_touched_bytes"] == 53 * PAGE_BYTES
    assert last["full_scans"] > before["full_scans"]
    assert (last["pages_shared"], last["pages_sharing"]) == (20, 0)


# --- forks -----------------------------------------------------------------------------------------------------------


def fork(**more):
    """A fork of the pair's first guest."""
    return {"name": "child", "memory": "80KiB", "fork_of": "pair", "start": "1s", **more}


def test_a_fork_shares_ksm_pages_and_is_counted_when_ksmd_comes_by():
    result = run(pair(), fork(), duration="2s", sample_every="1ms")

    forked, last = at(result, 1.0), end(result)
    assert forked["pages_sharing"] == 20
    assert (last["pages_shared"], last["pages_sharing"]) == (20, 40)
    assert last["mem_shared_bytes"] == forked["mem_shared_bytes"] == 20 * PAGE_BYTES


def test_a_fork_may_exceed_max_page_sharing():
    result = run(pair(), fork(count=3), duration="2s", ksm={"max_page_sharing": 2})

    assert (end(result)["pages_shared"], end(result)["pages_sharing"]) == (20, 80)


def test_a_forks_ordinary_pages_are_shared_without_ksm_until_one_of_them_writes():
    parent = guest("pair", part("own", 20), pages=20, bursts=[{"part": "own", "at": "2s"}], mergeable=False)
    result = run(parent, fork(), duration="3s")

    assert at(result, 0.0)["mem_private_bytes"] == 20 * PAGE_BYTES
    assert at(result, 1.0)["saved_bytes"] == 20 * PAGE_BYTES
    assert at(result, 1.0)["pages_sharing"] == 0
    assert end(result)["saved_bytes"] == 0
    assert result.guests.set_index("guest").loc["pair-0", "cow_breaks"] == 20


def test_a_fork_of_a_guest_that_is_gone_does_not_start():
    result = run(pair(stop="500ms"), fork(), duration="2s")

    assert (1.0, "not-started") in events(result)
    assert end(result)["guests_running"] == 0
