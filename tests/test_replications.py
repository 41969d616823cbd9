"""Replications, their intervals, metrics over a part of a run, and comparisons of runs paired by seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from inline import inline
from scipy import stats

import sim
from sim.cli import main
from sim.columns import METRICS, SAMPLES, Window
from sim.document import dump
from sim.errors import MachineError, UserError
from sim.results import summarise
from sim.scenario import Scenario
from sim.study import comparison, sweeps
from sim.study.comparison import Side
from sim.study.intervals import interval

__all__ = ["inline"]

WRITES = {"name": "system", "pool": "debian", "size": "90%", "writes": {"rate": "20/min"}}
ASKED: dict[str, Any] = {
    "name": "web",
    "duration": "6s",
    "hosts": [{"memory": "256MiB", "ksm": {"pages_to_scan": 2000}}],
    "vms": [{"name": "web", "count": 2, "memory": "4MiB", "image": {"parts": [WRITES]}}],
    "expect": ["cow_ksm >= 1"],
    "replications": 3,
}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


# --- intervals ---------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30), st.sampled_from([0.9, 0.95, 0.999]))
def test_the_interval_is_students(values: list[float], confidence: float) -> None:
    found = interval(values, confidence)

    if min(values) == max(values):
        assert found == (values[0], values[0], values[0])
    elif np.std(values) > 1e-6:
        expected = stats.t.interval(confidence, len(values) - 1, np.mean(values), stats.sem(values))
        assert (found.low, found.high) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    draws = np.random.default_rng(7).normal(3, 2, size=(2000, 5))

    held = sum(found.low <= 3 <= found.high for found in (interval(list(row)) for row in draws))

    assert 0.93 < held / len(draws) < 0.97


def test_a_single_value_has_no_ends() -> None:
    assert interval([5.0]) == (5.0, float("-inf"), float("inf"))


# --- replications ------------------------------------------------------------------------------------------------


def test_seeds_follow_from_the_scenarios_seed_alone_and_more_replications_keep_those_before() -> None:
    def seeds(**changes: Any) -> list[int]:
        return [run.seed for run in sim.parse({**ASKED, **changes}).runs]

    assert seeds(replications=5)[:3] == seeds() == seeds(duration="9s")
    assert seeds()[0] == sim.parse(ASKED).seed
    assert len({*seeds(replications=50), *seeds(replications=50, seed=2)}) == 100


def test_a_sweep_tells_each_replication_their_means_and_intervals(tmp_path: Path) -> None:
    file = tmp_path / "web.yaml"
    file.write_text(dump({**ASKED, "sweep": {"hosts.0.ksm.pages_to_scan": [10, 2000]}}))

    printed = call("sweep", file, "--out", tmp_path / "out", "--jobs", "1", "--no-report")
    again = call("sweep", file, "--out", tmp_path / "out", "--jobs", "1", "--no-report", "--set", "replications=2")

    folder = Path(printed.stdout.splitlines()[-1])
    points, runs, intervals = (
        pd.read_parquet(folder / name) for name in (sweeps.TABLE, sweeps.REPLICATIONS, sweeps.INTERVALS)
    )
    assert (list(points["digest"]), len(runs)) == ([runs["digest"][0], runs["digest"][3]], 6)
    assert list(runs["seed"][:3]) == list(runs["seed"][3:]) == [run.seed for run in sim.parse(ASKED).runs]
    assert "2 points in 4 runs, 4 of them known" in again.stderr
    for point, found in runs.groupby("point"):
        alone = [sim.load(tmp_path / "out/web" / digest).summary["cow_ksm"] for digest in found["digest"]]
        [told] = intervals[(intervals["point"] == point) & (intervals["metric"] == "cow_ksm")].to_dict("records")
        assert alone == list(found["cow_ksm"])
        assert points["cow_ksm"][point] == told["mean"] == np.mean(alone)
        assert (told["low"], told["high"], told["runs"]) == (*interval(alone)[1:], 3)
    assert "fewer than 5 say little" in printed.stdout


def test_replications_without_a_sweep_are_one_point(tmp_path: Path) -> None:
    still = {**ASKED, "vms": [{"name": "web", "memory": "1MiB"}], "replications": 2, "expect": []}

    table = sim.sweep(sim.parse(still), tmp_path, jobs=1)
    (tmp_path / "still.yaml").write_text(dump(still))
    printed = call("sweep", tmp_path / "still.yaml", "--out", tmp_path)

    assert len(table) == 1
    assert "nothing in this scenario is random" in printed.stdout


# --- a part of a run ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> sim.Result:
    return sim.run(sim.parse({**ASKED, "duration": "20s"}))


def test_a_window_changes_the_metrics_and_nothing_else(whole: sim.Result) -> None:
    part = sim.run(sim.parse({**ASKED, "duration": "20s", "warmup": "5s", "measure": "10s"}))

    pd.testing.assert_frame_equal(part.samples, whole.samples)
    rows = whole.samples.set_index("time_s")
    for name in ("cow_ksm", "full_scans"):
        assert part.summary[name] == rows[name][15.0] - rows[name][5.0]
    used = rows["ksmd_cpu_ns"][15.0] - rows["ksmd_cpu_ns"][5.0]
    assert part.summary["ksmd_cpu_percent"] == pytest.approx(100 * used / 10e9)
    assert part.summary["mem_used_bytes"] == rows["mem_used_bytes"][15.0]
    assert part.summary["progress_percent"] is None


@given(cut=st.integers(1, 18))
@settings(max_examples=18)
def test_counters_of_two_parts_add_up_to_the_whole(cut: int, whole: sim.Result) -> None:
    tables = whole.samples, whole.scans, whole.guests
    parts = [summarise(*tables, Window(a * 10**9, b * 10**9)) for a, b in ((0, cut), (cut, 20))]

    for name in (column.name for column in SAMPLES if column.counts):
        if name in whole.summary:
            total = sum(part[name] or 0 for part in parts)
            assert total == whole.summary[name], name


def test_a_window_of_the_whole_run_is_no_window() -> None:
    assert sim.parse({**ASKED, "measure": "6s"}).window is None


def test_the_worst_write_is_known_only_if_it_is_in_the_window(whole: sim.Result) -> None:
    samples = whole.samples.assign(write_latency_worst_ns=[5 if time < 8 else 9 for time in whole.samples["time_s"]])
    worst = [
        summarise(samples, whole.scans, whole.guests, Window(start * 10**9, 20 * 10**9))["write_latency_worst_ns"]
        for start in (0, 4, 12)
    ]

    assert worst == [9, 9, None]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"warmup": "6s"}, "leaves nothing of the run"),
        ({"measure": "7s"}, "goes on after the end"),
        ({"warmup": "1.5s"}, "write a multiple of 1s"),
        ({"warmup": "1s", "measure": "1.5s"}, "measure: does not end at a sample"),
        ({"replications": 0}, "replications"),
        ({"tolerances": {"oom_kils": 1}}, "did you mean oom_kills"),
        ({"sweep": {"replications": [1, 2]}}, "is the same in all points"),
    ],
)
def test_mistakes(changes: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        sim.parse({**ASKED, **changes})


# --- compare -----------------------------------------------------------------------------------------------------


def sides(first: list[float], second: list[float], name: str = "saved_bytes") -> tuple[Side, Side]:
    def side(values: list[float]) -> Side:
        return Side("x", {seed: {name: value} for seed, value in enumerate(values)}, None)

    return side(first), side(second)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([5, 5, 5], [5, 5, 5], "same"),
        ([5, 9, 1], [6, 10, 2], "differs"),
        ([5, 9, 1], [105, 108.9, 101.1], "differs"),
        ([5, 9, 1], [6, 2, 9], "not shown"),
        ([5], [6], "one pair"),
        ([5, 9], [6, None], "no data"),
    ],
)
def test_a_difference_is_real_if_its_paired_interval_leaves_out_0(first: Any, second: Any, verdict: str) -> None:
    [found] = comparison.compare(*sides(first, second), ["saved_bytes"]).differences

    assert found.verdict == verdict


def test_pairs_show_what_unpaired_runs_would_not() -> None:
    """The seeds scatter a hundred times more than the two sides differ."""
    noise = np.random.default_rng(3).normal(0, 100, 8)
    first, second = [float(each) for each in noise], [each + 1 + 0.01 * i for i, each in enumerate(map(float, noise))]

    [found] = comparison.compare(*sides(first, second), ["saved_bytes"]).differences

    assert found.real
    assert stats.ttest_ind(first, second).pvalue > 0.9


def test_of_many_metrics_that_only_scatter_few_are_called_different() -> None:
    """With 20 metrics at 95 % each, two comparisons of three would find one; together it is to be one of twenty."""
    draw, names = np.random.default_rng(11), [metric.name for metric in METRICS[:20]]
    wrong = 0
    for _ in range(100):
        first, second = (
            Side(
                "x", {seed: dict(zip(names, map(float, draw.normal(size=20)), strict=True)) for seed in range(6)}, None
            )
            for _ in range(2)
        )
        found = comparison.compare(first, second, names)
        wrong += any(each.real for each in found.differences)
    assert found.tested == 20
    assert wrong < 12


def test_compare_runs_both_pairs_seeds_and_leaves_with_1_if_a_difference_is_real(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text(dump({**ASKED, "replications": 5, "tolerances": {"ksmd_cpu_percent": 100}}))
    more = ("--out", tmp_path / "out", "--jobs", "1")
    asked = ("--b", "hosts.0.ksm.run=0", "--metric", "saved_bytes", "--metric", "ksmd_cpu_percent")

    other = call("compare", tmp_path / "web.yaml", *asked, *more)
    told = json.loads(call("compare", tmp_path / "web.yaml", *asked, *more, "--json").stdout)
    same = call("compare", tmp_path / "web.yaml", tmp_path / "web.yaml", *more)
    runs = sorted(Path(tmp_path, "out/web").glob("*/manifest.json"))
    folders = call("compare", runs[0].parent, tmp_path / "out/web", *more)
    one = call("compare", runs[0].parent, runs[0].parent, "--quiet")

    by_name = {each["metric"]: each for each in told["differences"]}
    assert (other.exit_code, same.exit_code, one.exit_code) == (1, 0, 0)
    assert (told["pairs"], by_name["saved_bytes"]["verdict"]) == (5, "differs")
    assert by_name["saved_bytes"]["high"] < 0 == by_name["saved_bytes"]["second"]
    assert by_name["ksmd_cpu_percent"]["verdict"] == "tolerated"
    assert "5 pairs of runs with equal seeds" in other.stdout
    assert (folders.exit_code, "holds runs of 2 different scenarios" in folders.stderr) == (2, True)
    assert one.stdout == "no difference is shown to be real\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["web.yaml"], "nothing to compare with"),
        (["web.yaml", "--b", "seed=5", "--replications", "1"], "no run of one has the seed"),
        (["web.yaml", "--b", "seed=1", "--metric", "saved_byte", "--replications", "1"], "did you mean saved_bytes"),
        (["web.yaml", "--b", "hosts.0.kms=1"], "did you mean ksm"),
        (["web.yaml", "nowhere"], "no such file"),
        ([".", "web.yaml", "--a", "seed=1"], "which no setting changes"),
        (["empty", "web.yaml"], "no run here"),
    ],
)
def test_mistakes_of_compare(
    arguments: list[str], said: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.getbasetemp() / "mistakes"
    (folder / "empty").mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(folder)
    Path("web.yaml").write_text(dump({**ASKED, "replications": 1}))

    result = call("compare", *arguments, "--jobs", "1")

    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


def test_few_pairs_and_runs_in_no_pair_are_remarked(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text(dump(ASKED))
    more = ("--metric", "saved_bytes", "--out", tmp_path / "out", "--jobs", "1")
    assert call("sweep", tmp_path / "web.yaml", "--out", tmp_path / "out", "--jobs", "1", "--no-report").exit_code == 0

    told = call("compare", tmp_path / "web.yaml", "--b", "hosts.0.ksm.run=0", *more)

    assert f"fewer than {comparison.FEW} pairs" in told.stdout


def test_a_run_that_fails_is_what_compare_ends_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "web.yaml").write_text(dump(ASKED))

    def simulate(scenario: Scenario) -> sim.Result:
        raise MachineError("no room for it")

    monkeypatch.setattr(sweeps, "simulate", simulate)

    told = call("compare", tmp_path / "web.yaml", "--b", "hosts.0.ksm.run=0", "--out", tmp_path / "out", "--jobs", "1")

    assert told.exit_code == 4
    assert "no room for it" in told.stderr
