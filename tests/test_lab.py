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
from sim.lab import fidelity
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
from sim.lab.guest import _Writer
from sim.lab.record import Disturbance, Level, Rate, Setting
from sim.lab.recordings import about, kept
from sim.lab.replay import workload
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


def written(writer: _Writer, until_ns: int) -> tuple[int, set[int]]:
    """How many writes are due by then, and their keys."""
    keys = np.concatenate([np.empty(0, np.uint64), *(keys for _, keys in writer.due(until_ns))])
    return len(keys), {int(key) for key in keys}


@given(st.floats(0.1, 5), st.integers(0, 1000))
def test_a_level_scales_random_writes(level: float, seed: int) -> None:
    writer = _Writer(np.arange(100), 50.0, seed, np.empty(0, np.uint64), start_ns=0, level=level)

    count, keys = written(writer, 1000 * MS)
    assert count == pytest.approx(5000 * level, abs=6 * np.sqrt(5000 * level))
    assert len(keys) == count

    writer.set_level(0.0, 1000 * MS)
    assert written(writer, 2000 * MS)[0] == 0
    assert writer.next_ns() == np.inf

    writer.set_level(2.0, 2000 * MS)
    assert written(writer, 3000 * MS)[0] == pytest.approx(10_000, abs=600)


def test_a_write_may_leave_one_of_some_contents() -> None:
    writer = _Writer(np.arange(10), 100.0, 1, np.array([3, 4], np.uint64), start_ns=0)

    assert written(writer, 1000 * MS)[1] == {3, 4}


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
        ({"kernel": "5.10"}, "set hosts.0.kernel="),
    ],
)
def test_the_lab_refuses_what_it_cannot_replay_with_a_remedy(host: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        workload(scenario(**host))


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
