"""Comparisons with the kernel are fair and can fail, the lab refuses what it cannot do, the fidelity page is fresh."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import finished
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from sim import document, report, results
from sim.cli import main
from sim.errors import UserError
from sim.lab import fidelity, pressure
from sim.lab.compare import (
    COUNTERS,
    SLACK,
    Scans,
    compare,
    in_step,
    keeps_pace,
    numbered,
    pace,
    read_recording,
    write_recording,
)
from sim.lab.guest import PACKED, _Arrivals, _Clock, _Loop, _swap_cached, _Writer, mix, render
from sim.lab.pressure import REQUIRED, PressureTrial
from sim.lab.record import Disturbance, Level, Loop, Rate, Reads, Setting
from sim.lab.recordings import about, kept
from sim.lab.replay import workload
from sim.lab.swapping import Swapping
from sim.lab.trial import Busy, disturbances, is_static, judge, moments_s, simulate, visited
from sim.results import partial, summarise
from sim.run import run
from sim.scenario import load, parse

ROOT = Path(__file__).parents[1]
CASES = ROOT / "tests/kernel/cases"
RECORDINGS = ROOT / "tests/kernel/recordings"
PAGE = ROOT / "results/fidelity.md"
MS = 1_000_000

PARTS = [
    {"name": "os", "size": "50%", "pool": "os"},
    {"name": "cache", "size": "20%", "pool": "files", "writes": {"rate": "2/s", "leaves": "files"}},
    {"name": "scratch", "size": "10%", "writes": {"rate": "2/s", "leaves": "zero"}},
    {"name": "heap", "size": "20%", "writes": {"rate": "1/s"}},
]


def scenario(name: str = "lab", vm: Mapping[str, Any] = {}, parts: Any = PARTS[:1], **host: Any) -> Any:
    """A small scenario."""
    guest = {"name": "guest", "count": 2, "memory": "4MiB", "image": {"parts": parts}, **vm}
    hosts = [{"memory": "64MiB", "ksm": {"pages_to_scan": 5000, "sleep_millisecs": 100}, **host}]
    return parse({"name": name, "duration": "2s", "hosts": hosts, "vms": [guest]})


def scans(count: int = 10, pages: int = 1000, **changed: Any) -> Scans:
    """Made-up scans of a run, 100 ms each, all counters at half of the pages."""
    columns: dict[str, Any] = dict.fromkeys(COUNTERS, pages // 4)
    times = 0.1 * np.arange(1, count + 1)
    columns |= {"full_scans": range(1, count + 1), "time_s": times, "ksmd_cpu_ns": 1e6 * times, "stolen_ns": 0}
    return numbered(pd.DataFrame(columns | {"proven": True} | changed))


def invoke(*arguments: object) -> Result:
    """Call the command line."""
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_of_two_rows_for_one_scan_the_one_that_was_read_whole_counts() -> None:
    columns = {"full_scans": [1, 2, 2, 3, 3], "proven": [True, False, True, True, False], "time_s": range(5)}

    found = numbered(pd.DataFrame(columns))

    assert found.index.tolist() == [(0, 1), (0, 2), (0, 3)]
    assert found["time_s"].tolist() == [0, 2, 3]


# --- comparing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_equal_runs_agree(exact: bool) -> None:
    found = compare([scans()], [scans(), scans()], exact)

    assert found.faults() == []
    assert (found.error, found.spread, found.scans, found.pages) == (0, 0, 10, 1000)


@given(st.sampled_from(COUNTERS), st.integers(-30, 30).filter(bool))
def test_static_memory_must_be_exact_to_the_page(counter: str, difference: int) -> None:
    found = compare([scans(**{counter: 250 + difference})], [scans()], exact=True)

    assert list(found.outside.columns) == [counter]
    assert len(found.outside) == 10
    assert found.counters.loc[counter, "error"] == abs(difference)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_changing_memory_may_leave_the_kernels_spread_by_a_share_of_the_pages(low: int, width: int, ours: int) -> None:
    runs = [scans(pages_sharing=each, pages_shared=500) for each in (low, low + width)]

    found = compare([scans(pages_sharing=ours, pages_shared=500)], runs, exact=False)

    outside = max(low - ours, ours - low - width, 0)
    assert found.counters.loc["pages_sharing", "error"] == outside
    assert found.outside.empty == (outside <= SLACK * found.pages)


def test_kernel_runs_that_differ_widely_prove_nothing() -> None:
    runs = [scans(pages_volatile=each) for each in (150, 300)]

    assert compare([scans()], runs, exact=False).counter_faults() == [
        "the kernel's runs differ by 17% of the pages and prove nothing"
    ]


def test_a_simulator_that_varies_itself_agrees_where_its_range_meets_the_kernels() -> None:
    kernel = [scans(pages_sharing=each) for each in (300, 310)]

    assert compare([scans(pages_sharing=each) for each in (200, 295)], kernel, exact=False).outside.empty
    assert not compare([scans(pages_sharing=each) for each in (200, 210)], kernel, exact=False).outside.empty


def test_a_scan_that_was_not_read_whole_proves_nothing_about_static_memory() -> None:
    odd = scans(pages_shared=[250] * 9 + [1], proven=[True] * 9 + [False])

    found = compare([scans()], [odd], exact=True)

    assert found.faults() == []
    assert (found.scans, found.expected) == (9, 10)


def test_too_few_scans_are_no_agreement() -> None:
    half = scans(proven=[True, False] * 5)

    assert compare([scans()], [half], exact=True).counter_faults() == ["only 5 of 10 scans can be compared"]
    assert compare([scans(2)], [scans(2)], exact=True).counter_faults() == ["only 2 of 2 scans can be compared"]


def test_times_and_cpu_have_tolerances_of_their_own() -> None:
    slow = scans(time_s=0.104 * np.arange(1, 11), ksmd_cpu_ns=1.2e5 * np.arange(1, 11))

    assert compare([slow], [scans()], exact=True).faults() == [
        "scan time +4.0% (allowed 3%)",
        "ksmd CPU +20.0% (allowed 10%)",
    ]


def test_time_that_the_hypervisor_took_may_be_missing_in_the_simulation() -> None:
    late = 0.11 * np.arange(1, 11)

    assert compare([scans()], [scans(time_s=late, stolen_ns=1e7 * np.arange(1, 11))], exact=True).faults() == []
    assert compare([scans()], [scans(time_s=late)], exact=True).faults() != []


def test_a_scan_number_that_was_set_back_is_another_scan() -> None:
    frame = pd.DataFrame({"full_scans": [1, 2, 3, 1, 2], "time_s": range(5)})

    assert numbered(frame).index.tolist() == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]


def test_what_happens_between_two_scans_must_do_so_on_both_sides() -> None:
    late = scans(time_s=0.1 * np.arange(1, 11) + 0.03)

    assert in_step(scans(), late, [0.25, 0.76])
    assert not in_step(scans(), late, [0.25, 0.71])


def test_pace_is_ksmds_cpu_time_against_the_simulated() -> None:
    slow = scans(time_s=0.11 * np.arange(1, 11), ksmd_cpu_ns=3e5 * np.arange(1, 11))

    assert pace(scans(), slow) == pytest.approx(3)
    assert keeps_pace(scans(), scans())
    assert not keeps_pace(scans(), slow)


def test_a_recording_is_read_back_as_it_was(tmp_path: Path) -> None:
    runs = [scans(), scans(8, pages_shared=3)]

    write_recording(runs, tmp_path / "kept.csv.gz")
    first = (tmp_path / "kept.csv.gz").read_bytes()
    write_recording(runs, tmp_path / "kept.csv.gz")

    assert (tmp_path / "kept.csv.gz").read_bytes() == first
    for kernel, found in zip(runs, read_recording(tmp_path / "kept.csv.gz"), strict=True):
        pd.testing.assert_frame_equal(found, kernel[found.columns], check_dtype=False)


# --- pressure ----------------------------------------------------------------------------------------------------


def samples(stall_s: float = 2.0, progress: float = 80.0, **ends: float) -> pd.DataFrame:
    """Made-up samples of a run that began when 500 of everything had been counted."""
    columns = {name: 500 + np.linspace(0, ends.get(name, 1000.0), 11) for name in (*REQUIRED, "swap_used_bytes")}
    return pd.DataFrame({"time_s": np.arange(11.0), **columns}).assign(stall_s=stall_s, progress_percent=progress)


@given(st.sampled_from([name for name in REQUIRED if name != "mem_pool_bytes"]), st.floats(0.3, 3))
def test_what_a_run_swaps_and_waits_must_be_near_the_kernels_mean(name: str, ratio: float) -> None:
    found = pressure.compare([samples(**{name: 1000 * ratio})], [samples(), samples()])

    assert found.figures[name].error == pytest.approx(ratio - 1)
    assert bool(found.faults()) == (abs(ratio - 1) > REQUIRED[name])
    assert all(name in fault for fault in found.faults())


@given(st.integers(50, 150).filter(lambda percent: abs(percent - 100) != 5), st.integers(1, 5000))
def test_zrams_memory_counts_when_guests_are_filled_and_is_told_at_the_end(percent: int, at_end: int) -> None:
    ours = samples(mem_pool_bytes=at_end)
    ours["mem_pool_bytes"] += 5 * percent - 500

    found = pressure.compare([ours], [samples()])

    assert found.figures["mem_pool_bytes"].simulated == 5 * percent
    assert found.figures["mem_pool_bytes_at_end"].simulated == 5 * percent + at_end
    assert bool(found.faults()) == (abs(percent - 100) > 5)


def test_a_run_may_also_lie_in_the_kernels_own_spread() -> None:
    kernel = [samples(pswpin=600), samples(pswpin=1400)]

    assert pressure.compare([samples(pswpin=1390)], kernel).faults() == []
    assert pressure.compare([samples(pswpin=1410)], kernel).faults() != []


def test_figures_that_only_one_side_has_are_left_out() -> None:
    found = pressure.compare([samples()], [samples().drop(columns="mem_pool_bytes")])

    assert "mem_pool_bytes" not in found.figures
    assert "pswpin" in found.figures


def test_runs_under_pressure_are_read_back_as_they_were(tmp_path: Path) -> None:
    trial = PressureTrial(scenario(), [], [samples(), samples(pswpin=7)], pressure.Pressure({}))

    trial.write_recording(tmp_path / "kept.csv.gz")

    for kernel, found in zip(trial.measured, pressure.read_recording(tmp_path / "kept.csv.gz"), strict=True):
        pd.testing.assert_frame_equal(found.reset_index(drop=True), kernel)


# --- trials ------------------------------------------------------------------------------------------------------


def test_a_slower_machine_is_met_at_its_own_pace_and_can_still_disagree() -> None:
    asked = scenario(vm={"memory": "40MiB"}, parts=PARTS, ksm={"pages_to_scan": 2000, "sleep_millisecs": 20})
    kernel = [simulate(asked, draw, factor=4.0).assign(proven=True, stolen_ns=0) for draw in (7, 8, 9)]

    trial = judge(asked, kernel, exact=False)

    assert trial.pace == pytest.approx(4, rel=0.1)
    assert trial.comparison.counter_faults() == []
    assert trial.comparison.faults() != []  # its prices are not this machine's

    wrong = [run.assign(pages_volatile=run["pages_volatile"] + 2000) for run in kernel]
    assert judge(asked, wrong, exact=False).comparison.counter_faults() != []


def test_draws_differ_only_where_guests_write_at_random() -> None:
    pd.testing.assert_frame_equal(simulate(scenario(), 0), simulate(scenario(), 1))
    assert not simulate(scenario(parts=PARTS), 0).equals(simulate(scenario(parts=PARTS), 1))


def test_memory_is_static_where_nobody_writes() -> None:
    burst = {"bursts": [{"part": "os", "at": "1s"}]}

    assert is_static(workload(scenario(vm={"madvise": [{"at": "1s", "advice": "unmergeable"}]})))
    assert not is_static(workload(scenario(vm=burst)))
    assert not is_static(workload(scenario(parts=PARTS)))
    assert moments_s(workload(scenario(vm=burst))) == [1.0, 1.0]


def test_where_ksmd_was_at_a_planned_moment_is_told_in_whole_batches() -> None:
    """Batches of 100 pages some 110 ms apart; the scan of 812 pages ends with one of 12."""
    burst = {"count": 1, "bursts": [{"part": "os", "at": "350ms"}, {"part": "os", "at": "1s"}]}
    asked = scenario(vm=burst, ksm={"pages_to_scan": 100, "sleep_millisecs": 100})

    assert visited(asked) == visited(asked, 2.5) == [400, 812 + 100]
    assert visited(asked, 200.0) < visited(asked)


def test_a_disturbed_run_is_known_by_its_own_evidence() -> None:
    assert list(disturbances(Disturbance(0, 10 * MS, 5 * MS), 1000 * MS)) == []
    assert len(list(disturbances(Disturbance(3, 50 * MS, 60 * MS), 1000 * MS))) == 3


# --- what the lab's guests do ------------------------------------------------------------------------------------


def written(writer: _Writer, until_ns: float) -> tuple[int, set[int]]:
    """How many writes are due by then, and their keys."""
    keys = np.concatenate([np.empty(0, np.uint64), *(keys for _, keys in writer.due(until_ns))])
    return len(keys), {int(key) for key in keys}


@given(st.floats(0.1, 5), st.integers(0, 1000))
def test_a_level_scales_random_writes(level: float, seed: int) -> None:
    clock = _Clock(0, level)
    writer = _Writer(np.arange(100), 50.0, seed, np.empty(0, np.uint64))

    count, keys = written(writer, clock.read(1000 * MS))
    assert count == pytest.approx(5000 * level, abs=6 * np.sqrt(5000 * level))
    assert len(keys) == count

    clock.set_level(0.0, 1000 * MS)
    assert written(writer, clock.read(2000 * MS))[0] == 0
    assert clock.real_ns(writer.next_ns()) == np.inf

    clock.set_level(2.0, 2000 * MS)
    assert written(writer, clock.read(3000 * MS))[0] == pytest.approx(10_000, abs=600)


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 500), st.sampled_from([0.0, 0.5, 3.0])), max_size=20))
def test_a_guest_that_waits_does_the_same_later(steps: list[tuple[int, int, float]]) -> None:
    """Its clock shows what it worked: the time at each level, without the stalls; progress is the share of that."""
    clock, now, worked, lost, level = _Clock(0), 0, 0.0, 0.0, 1.0
    for work_ns, stall_ns, after in steps:
        now += work_ns + stall_ns
        clock.stand(stall_ns)
        worked, lost = worked + work_ns * level, lost + stall_ns * level
        assert clock.read(now) == pytest.approx(worked)
        assert clock.progress(now) == pytest.approx(worked / (worked + lost) if lost else 1.0)
        clock.set_level(after, now)
        level = after


def test_a_write_may_leave_one_of_some_contents() -> None:
    writer = _Writer(np.arange(10), 100.0, 1, np.array([3, 4], np.uint64))

    assert written(writer, 1000 * MS)[1] == {3, 4}


@given(st.integers(0, 1000))
def test_pages_of_each_class_are_read_as_often_as_it_says(seed: int) -> None:
    classes = [(np.arange(50), 100.0), (np.arange(50, 200), 4.0), (np.arange(200, 210), 40.0)]
    arrivals = _Arrivals(classes, np.random.default_rng(seed), after_ns=0.0)

    pages = np.concatenate([*arrivals.due(1000 * MS)])

    counts = np.bincount(pages, minlength=210)
    for where, per_second in classes:
        expected = per_second * len(where)
        assert counts[where].sum() == pytest.approx(expected, abs=6 * np.sqrt(expected))
    assert arrivals.next_ns() > 1000 * MS


@given(st.lists(st.integers(0, 400), min_size=1, max_size=30), st.integers(1, 50), st.integers(50, 500))
def test_a_loop_reads_pages_in_order_whenever_it_is_asked(gaps: list[int], pages: int, period: int) -> None:
    loop, now, read = _Loop(7, pages, period, after_ns=0.0), 0, []
    for gap in gaps:
        now += gap
        read += [page for batch in loop.due(now) for page in batch.tolist()]

    assert read == [7 + number % pages for number in range(len(read))]
    assert len(read) == int(now // (period / pages)) + 1
    assert loop.next_ns() >= now


@given(st.integers(0, 1 << 40), st.integers(0, 255))
def test_pages_are_packed_as_their_keys_say(number: int, packed: int) -> None:
    templates = np.zeros((256, 4, 512), np.uint64) + np.arange(256, dtype=np.uint64)[:, None, None]
    keys = (mix(np.array([number, number + 1, number], np.uint64)) & ~PACKED) | np.uint64(packed)

    first, second, again = render(keys, "packed", templates)

    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    if packed == 0:
        assert np.all(first == keys[0])
    elif packed == 255:
        assert len(np.unique(first)) == 512
    else:
        assert np.all(first[1:] == packed)


def test_activity_and_what_writes_leave_reach_the_labs_guests() -> None:
    asked = scenario(parts=PARTS, vm={"activity": {"every": "500ms", "levels": [0.5, 2, 0]}})

    actions = workload(asked).actions
    levels = [
        (each.time_ns // MS, each.level) for each in actions if isinstance(each, Level) if each.guest == "guest-0"
    ]
    rates = {round(each.per_second): each for each in actions if isinstance(each, Rate) if each.guest == "guest-0"}
    choices = [len(each.choices) for each in actions if isinstance(each, Rate) if each.guest == "guest-0"]

    assert levels == [(0, 0.5), (500, 2), (1000, 0), (1500, 0.5), (2000, 2)]
    assert sorted(choices) == [0, 1, 205]
    assert sorted(rates) == [1, 2]


SHORT = {
    "memory_limit": "2MiB",
    "image": {
        "parts": [
            {"name": "os", "size": "25%", "pool": "os", "reads": {"rate": "2/s", "hot": "25%", "hot_reads": "75%"}},
            {"name": "table", "size": "50%", "reads": {"rate": "0.5/s", "order": "loop"}},
            {"name": "heap", "size": "25%", "writes": {"rate": "1/s"}, "reads": {"rate": "1/s"}},
        ]
    },
}
ZRAM = {"device": "zram", "size": "64MiB", "algorithm": "lz4"}


def test_reads_limits_and_swap_reach_the_labs_guests() -> None:
    asked = scenario(vm=SHORT, swap=ZRAM, watermarks={"page_cluster": 0, "swappiness": 100})

    plan = workload(asked)

    assert plan.swapping == Swapping(64 << 20, "lz4", page_cluster=0, swappiness=100)
    assert [guest.memory_limit for guest in plan.guests] == [2 << 20] * 2
    [reads] = [each for each in plan.actions if isinstance(each, Reads) and each.guest == "guest-1"]
    assert {(len(pages), round(rate, 3)) for pages, rate in reads.classes} == {(64, 6), (192, 0.667), (256, 1)}
    assert [each for each in plan.actions if isinstance(each, Loop) and each.guest == "guest-0"] == [
        Loop("guest-0", 256, 512, 2_000_000_000)
    ]


def test_equal_pages_are_equal_and_compress_as_the_scenario_says() -> None:
    first, second = workload(scenario(vm=SHORT, swap=ZRAM)).guests

    assert np.array_equal(first.keys[:256], second.keys[:256])
    assert not set(first.keys[256:]) & set(second.keys[256:])
    assert 0.3 * 4096 < 16 * (first.keys & PACKED).astype(int).mean() < 0.6 * 4096
    part = {"name": "heap", "size": "100%", "compresses_to": "25%"}
    [small, _] = workload(scenario(vm={"memory_limit": "2MiB"}, parts=[part], swap=ZRAM)).guests
    assert set(small.keys & PACKED) == {65}  # 1024 bytes under LZ4 and a handle of 8 are more than 64 times 16


def test_a_simulated_fork_writes_as_its_parent_does() -> None:
    guests = scenario(parts=PARTS).resolved()["vms"]
    clone = {"name": "clone", "memory": "4MiB", "fork_of": "guest", "start": "1s"}
    asked = parse({"name": "forks", "duration": "2s", "hosts": [{"memory": "64MiB"}], "vms": [*guests, clone]})

    written = run(asked).guests.set_index("guest")["pages_written"]

    assert written["clone-0"] == pytest.approx(written["guest-0"] / 2, rel=0.01)


def test_another_drawing_of_random_writes_has_other_seeds() -> None:
    seeds = [{each.seed for each in workload(scenario(parts=PARTS), draw=draw).actions if isinstance(each, Rate)}
             for draw in range(3)]  # fmt: skip

    assert [len(each) for each in seeds] == [6, 6, 6]
    assert len(set.union(*seeds)) == 18


def test_a_tuner_turns_the_kernels_knobs_as_it_does_the_simulated_ones() -> None:
    parts = [{"name": "own", "size": "95%"}]
    asked = scenario(memory="17MiB", vm={"memory": "8MiB"}, parts=parts, ksmtuned={"monitor_interval": "200ms"})

    settings = [each for each in workload(asked).actions if isinstance(each, Setting)]

    events = run(asked).events
    told = [f"{each.knob} = {each.value}" for each in settings]
    assert told == events.loc[events["kind"] == "setting", "detail"].tolist()
    assert len(told) > 3


def test_a_setting_that_is_refused_is_not_written_and_one_at_the_start_is() -> None:
    changes = [{"at": "0s", "smart_scan": 0}, {"at": "1s", "max_page_sharing": 4}]
    asked = scenario(ksm={"pages_to_scan": 5000, "changes": changes})

    settings = [each for each in workload(asked).actions if isinstance(each, Setting)]

    assert settings == [Setting(0, "smart_scan", 0)]


# --- results of a kernel ------------------------------------------------------------------------------------------


def as_a_kernel_tells_it() -> Any:
    """A finished run without what a kernel does not tell."""
    whole = finished.result()
    told = [*whole.samples.columns[:14], "ksmd_cpu_ns", "guests_running", "mem_promised_bytes", "cores"]
    samples, scans = (partial("samples", each[told]) for each in (whole.samples, whole.scans))
    guests = partial("guests", whole.guests.drop(columns="cow_breaks"))
    return replace(
        whole, samples=samples, scans=scans, guests=guests, summary=summarise(samples, scans, guests), verdicts=()
    )


def test_figures_that_a_kernel_does_not_tell_are_no_data() -> None:
    summary = as_a_kernel_tells_it().summary

    assert {name for name in ("consolidation_ratio", "oom_kills", "cpu_cow_percent", "mem_free_min_bytes", "pswpin")
            if summary[name] is not None} == set()  # fmt: skip
    assert summary["saved_ksm_bytes"] > 0
    assert summary["ksmd_cpu_percent"] > 0


def test_a_result_without_them_is_kept_and_read_back_and_has_a_report(tmp_path: Path) -> None:
    told = as_a_kernel_tells_it()

    folder = results.write(told, tmp_path)
    page = report.write(told, folder).read_text()

    pd.testing.assert_frame_equal(results.load(folder).samples, told.samples, check_dtype=False)
    assert "less because of KSM, on a real kernel" in page
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
    assert {each.stem for each in (folder / "pictures").iterdir()} == {"cost", "counters"}


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ({"count": 2}, "keep one entry of hosts, with count 1"),
        ({"numa_nodes": 2}, "set hosts.0.numa_nodes=1"),
        ({"ksm": {"hints": {}}}, "remove hosts.0.ksm.hints"),
        ({"ksm": {"mixed_pages": {}}}, "remove hosts.0.ksm.mixed_pages"),
        ({"kernel": "5.10"}, "set hosts.0.kernel="),
        ({"swap": {"device": "nvme", "size": "1GiB"}}, "set hosts.0.swap.device to one of them"),
        ({"swap": {"device": "file", "size": "1GiB", "bandwidth": "1MiB"}}, "remove hosts.0.swap.bandwidth"),
        ({"swap": ZRAM, "memory": "7MiB"}, "give each of vms a memory_limit, or set hosts.0.memory=16MiB"),
    ],
)
def test_the_lab_refuses_what_it_cannot_replay_with_a_remedy(host: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        workload(scenario(**host))


@pytest.mark.parametrize(
    ("host", "vm", "message"),
    [
        ({}, {}, "needs hosts.0.swap"),
        ({"swap": {"device": "zram", "size": "3MiB"}}, {}, "set hosts.0.swap.size=4MiB"),
        ({"swap": ZRAM}, {"start": "1s"}, "remove vms.0.start"),
        ({"swap": ZRAM}, {"every": "1s"}, "remove vms.0.every"),
        ({"swap": ZRAM}, {"vcpus": 2}, "set vms.0.vcpus=1"),
        ({"swap": ZRAM}, {"load": "10%"}, "set vms.0.load=0%"),
    ],
)
def test_limited_guests_that_the_lab_cannot_run_are_refused(
    host: Mapping[str, Any], vm: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        workload(scenario(vm={"memory_limit": "2MiB", **vm}, **host))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The file of a small scenario."""
    file = tmp_path / "lab.yaml"
    file.write_text(document.dump(scenario().resolved()))
    return file


@pytest.mark.parametrize("verb", ["run", "compare"])
def test_the_lab_needs_root_and_says_so(
    verb: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    called = invoke("lab", verb, small, "--out", tmp_path / "out")

    assert called.exit_code == 4
    assert "needs root" in called.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["run", "compare"])
def test_the_lab_needs_ksm_and_says_so(verb: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("sim.lab.machine.KSM", tmp_path / "missing")

    called = invoke("lab", verb, small, "--out", tmp_path / "out")

    assert called.exit_code == 4
    assert "has no KSM" in called.stderr


def test_a_busy_machine_is_told_apart_from_a_difference(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturbed(*_: object, **__: object) -> None:
        raise Busy("lab: this machine is too busy for a comparison")

    monkeypatch.setattr("sim.lab.trial.live", disturbed)
    monkeypatch.setattr("sim.lab.machine.check_abilities", lambda: None)

    called = invoke("lab", "compare", small, small, "--json", "--write", tmp_path / "page.md")

    assert called.exit_code == 4
    assert called.stderr.count("too busy") == 2
    assert "page.md was not written" in called.stderr
    assert len(json.loads(called.stdout)["too_busy"]) == 2
    assert not (tmp_path / "page.md").exists()


def test_a_comparison_that_finds_a_difference_ends_with_1(tmp_path: Path) -> None:
    other = (RECORDINGS / "smart-scan-0.csv.gz").read_bytes()
    (tmp_path / "smart-scan-1.csv.gz").write_bytes(other)

    called = invoke(
        "lab",
        "compare",
        CASES / "static/smart-scan-1.yaml",
        "--recorded",
        tmp_path,
        "--json",
        "--out",
        tmp_path / "out",
    )

    assert called.exit_code == 1
    [told] = json.loads(called.stdout)["comparisons"]
    assert "pages_skipped" in told["faults"][0]
    assert told["counters"]["pages_skipped"]["error"] > 0
    assert {each.name for each in Path(told["result"]).iterdir()} >= {
        "comparison.json",
        "kernel.csv.gz",
        "samples.parquet",
    }
    assert (Path(told["result"]) / "pictures/kernel.png").stat().st_size > 10_000


def test_a_comparison_prints_figures_verdict_and_folder(tmp_path: Path) -> None:
    called = invoke(
        "lab", "compare", CASES / "static/several-batches.yaml", "--recorded", RECORDINGS, "--out", tmp_path
    )

    lines = called.stdout.splitlines()
    assert "every counter must be the kernel's" in lines[0]
    assert any(line.startswith("pages_sharing  ") for line in lines)
    assert any(line.startswith("several-batches: exact") for line in lines)
    assert Path(lines[-1]).is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recorded", "here", "--runs", "2"], "remove --record and --runs"),
        (["--recorded", "here"], "make it with --record"),
        (["--recorded", RECORDINGS], "no such recording"),
    ],
)
def test_a_comparison_without_runs_says_what_to_do(
    arguments: list[object], message: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    called = invoke("lab", "compare", small, *arguments)

    assert called.exit_code == 2
    assert message in called.stderr


def test_a_damaged_recording_is_a_message(small: Path, tmp_path: Path) -> None:
    (tmp_path / "lab.csv.gz").write_bytes(b"not gzip")

    called = invoke("lab", "compare", small, "--recorded", tmp_path)

    assert called.exit_code == 2
    assert "not a recording" in called.stderr


def test_an_empty_folder_has_no_scenario_to_compare(tmp_path: Path) -> None:
    called = invoke("lab", "compare", tmp_path, "--recorded", tmp_path)

    assert called.exit_code == 2
    assert "no scenario in this folder" in called.stderr


# --- the page ----------------------------------------------------------------------------------------------------


def test_the_fidelity_page_says_what_the_recordings_say() -> None:
    trials = [kept(load(file), RECORDINGS) for file in sorted(CASES.rglob("*.yaml"))]

    page = fidelity.page(trials, about(RECORDINGS), PAGE.stem)

    [command] = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert page in PAGE.read_text(), f"run: {command}"


def test_only_the_generated_part_of_a_page_is_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Mine\n<!-- begin cases -->\nold\n<!-- end cases -->\nmine\n")
    case = CASES / "static/several-batches.yaml"

    called = invoke("lab", "compare", case, "--recorded", RECORDINGS, "--write", page)

    text = page.read_text()
    assert called.exit_code in (0, 1)
    assert text.startswith("# Mine\n<!-- begin cases -->\n1 cases on Linux 6.18")
    assert text.endswith("<!-- end cases -->\nmine\n")
    assert "old" not in text
    assert {each.name for each in tmp_path.iterdir()} == {"page.md", "page-overview.png", "page-cases.png"}


def test_a_page_without_a_place_for_the_table_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("mine\n")

    called = invoke("lab", "compare", CASES / "static/tiny.yaml", "--recorded", RECORDINGS, "--write", page)

    assert called.exit_code == 2
    assert "begin cases" in called.stderr
    assert page.read_text() == "mine\n"


@pytest.mark.parametrize(("text", "expected"), [("cache 5\nswapcached 8192\n", 8192), ("anon 4096\n", 0)])
def test_what_a_control_group_has_in_the_swap_cache_is_read_from_its_statistics(
    tmp_path: Path, text: str, expected: int
) -> None:
    (tmp_path / "memory.stat").write_text(text)

    assert _swap_cached(tmp_path / "memory.stat") == expected
