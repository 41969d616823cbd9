"""Sweeps: the points they are made of, their results, and that nothing is computed twice or differently."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

import sim
from sim import document
from sim.cli import main
from sim.errors import MachineError, UserError
from sim.study import plan, sweeps
from sim.study.workers import Died, run_all

ROOT = Path(__file__).parents[1]

BASE: dict[str, Any] = {
    "name": "small",
    "duration": "20s",
    "hosts": [{"memory": "256MiB", "ksm": {"pages_to_scan": 2000}}],
    "vms": [
        {
            "name": "web",
            "count": 2,
            "memory": "16MiB",
            "image": {"parts": [{"name": "system", "pool": "debian", "size": "50%"}, {"name": "data", "size": "50%"}]},
        }
    ],
    "expect": ["consolidation_ratio >= 1.2"],
}
SWEEP = {"hosts.0.ksm.pages_to_scan": [0, 2000], "vms.web.count": [2, 3]}
AXES: dict[str, Sequence[Any]] = {
    "hosts.0.ksm": [{}, {"run": 0}, {"pages_to_scan": 5, "max_page_sharing": 4}],
    "hosts.0.ksm.pages_to_scan": [1, 100, 5000],
    "hosts.host.memory": ["256MiB", "1GiB"],
    "hosts.0.swap": [None, {"device": "nvme", "size": "1GiB"}],
    "hosts.0.kernel": ["6.1", "6.18"],
    "vms.web.count": [1, 7],
    "vms.0.image.parts.data.size": ["10%", "4MiB"],
    "seed": [1, 2, 3],
}


def swept(axes: object, **changes: object) -> sim.Scenario:
    return sim.parse({**BASE, **changes, "sweep": axes})


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(document.dump({**BASE, "expect": [], "sweep": SWEEP}))
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def table_of(result: Result) -> Path:
    """The table of all points, by what the command printed last."""
    return Path(result.stdout.splitlines()[-1], sweeps.TABLE)


# --- points ------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from(sorted(AXES)), st.integers(1, 3), min_size=1, max_size=3))
@settings(max_examples=40)
def test_a_point_is_the_scenario_with_those_overrides(sizes: dict[str, int]) -> None:
    base = {**BASE, "hosts": [{"name": "host", **BASE["hosts"][0]}]}
    axes = {path: AXES[path][:size] for path, size in sizes.items()}

    points = sim.parse({**base, "sweep": axes}).points

    assert len(points) == len(list(product(*axes.values())))
    for point, values in zip(points, product(*axes.values()), strict=True):
        written = document.Document("", base)
        for path, value in sorted(zip(axes, values, strict=True), key=lambda axis: len(axis[0].split("."))):
            written = written.override(f"{path}={document.dump_line(value)}")
        assert point.scenario == sim.parse(written.data)


def test_the_last_path_changes_fastest() -> None:
    points = swept(SWEEP).points

    settings = [tuple(point.settings.values()) for point in points]

    assert settings == [(0, 2), (0, 3), (2000, 2), (2000, 3)]


def test_a_path_inside_another_changes_the_block_that_the_other_sets() -> None:
    hosts = [{"name": "plain", "memory": "1GiB"}, {"name": "tuned", "memory": "1GiB", "ksmtuned": {}}]

    points = swept({"hosts.0.memory": ["2GiB", "3GiB"], "hosts.0": hosts}).points

    told = [(point.scenario.hosts[0].name, point.scenario.hosts[0].memory >> 30) for point in points]
    assert told == [("plain", 2), ("tuned", 2), ("plain", 3), ("tuned", 3)]


def test_blocks_come_one_after_the_other_and_fill_up_with_what_stands_in_the_scenario() -> None:
    points = swept([{"seed": [7, 8]}, {"hosts.0.ksmtuned": [{}]}, {}]).points

    assert [point.settings for point in points] == [
        {"seed": 7, "hosts.0.ksmtuned": None},
        {"seed": 8, "hosts.0.ksmtuned": None},
        {"seed": 1, "hosts.0.ksmtuned": {}},
        {"seed": 1, "hosts.0.ksmtuned": None},
    ]


SYSTEMS = {
    "as it stands": {},
    "slow, and few": {"hosts.0.ksm.pages_to_scan": 5, "vms.web.count": 1},
    "another host": {"hosts.0": {"memory": "1GiB", "ksm": {"run": 0}}, "hosts.0.cores": 4},
}


@given(st.lists(st.sampled_from(sorted(SYSTEMS)), min_size=1, unique=True), st.booleans())
@settings(max_examples=20)
def test_an_alternative_is_the_scenario_with_all_that_it_sets(names: list[str], other: bool) -> None:
    axes = {"seed": [1, 2]} if other else {}

    points = swept({"system": {name: SYSTEMS[name] for name in names}, **axes}).points

    assert [point.settings["system"] for point in points] == [name for name in names for _ in range(1 + other)]
    for point in points:
        written = document.Document("", BASE)
        for path, value in [*SYSTEMS[point.settings["system"]].items(), ("seed", point.settings.get("seed", 1))]:
            written = written.override(f"{path}={document.dump_line(value)}")
        assert point.scenario == sim.parse(written.data)


def test_a_block_without_the_axis_of_alternatives_is_the_scenario_as_written() -> None:
    points = swept([{"system": {"slow": SYSTEMS["slow, and few"]}}, {"seed": [7]}]).points

    assert [point.settings for point in points] == [{"system": "slow", "seed": 1}, {"system": "as written", "seed": 7}]
    assert [point.scenario.vms[0].count for point in points] == [1, 2]


def test_alternatives_are_a_column_and_are_computed_once(small: Path) -> None:
    scenario = document.dump({**BASE, "expect": [], "sweep": {"system": SYSTEMS}})
    Path("small.yaml").write_text(scenario)

    first = call("sweep", "small.yaml", "--no-report", "--jobs", "1")
    again = call("sweep", "small.yaml", "--no-report", "--jobs", "1")

    assert list(pd.read_parquet(table_of(first))["system"]) == list(SYSTEMS)
    assert "3 of them known" in again.stderr


def test_a_sweep_changes_neither_the_scenario_nor_its_result() -> None:
    alone = sim.parse(BASE)

    assert swept(SWEEP).digest("1") == alone.digest("1")
    assert alone.points == ()
    assert sim.parse(swept(SWEEP).resolved()).points == swept(SWEEP).points


def test_overrides_come_before_the_sweep(small: Path) -> None:
    points = sim.read("small.yaml", ["vms.0.count=9", "duration=5s"]).points

    assert {(point.scenario.vms[0].count, point.scenario.duration) for point in points} == {
        (2, 5 * 10**9),
        (3, 5 * 10**9),
    }


# --- runs --------------------------------------------------------------------------------------------------------


def test_each_point_is_a_run_with_those_settings_and_is_computed_once_with_the_same_bits(small: Path) -> None:
    first = call("sweep", "small.yaml", "--no-report", "--jobs", "2")
    made = {each: each.stat().st_mtime_ns for each in Path("results").rglob("summary.json")}
    again = call("sweep", "small.yaml", "--no-report")
    one_by_one = call("sweep", "small.yaml", "--no-report", "--jobs", "1", "--out", "elsewhere")

    assert (first.exit_code, again.exit_code, "4 of them known" in again.stderr) == (0, 0, True)
    assert {each: each.stat().st_mtime_ns for each in Path("results").rglob("summary.json")} == made
    assert table_of(first).read_bytes() == table_of(again).read_bytes() == table_of(one_by_one).read_bytes()
    table = pd.read_parquet(table_of(first))
    assert table["saved_bytes"].nunique() == 3
    for row in table.to_dict("records"):
        alone = sim.run(sim.read("small.yaml", [f"{path}={row[path]}" for path in SWEEP]))
        kept = sim.load(Path("results/small", alone.manifest["digest"]))
        assert (kept.folder.name, dict(kept.summary)) == (row["digest"], alone.summary)
        pd.testing.assert_frame_equal(alone.samples, kept.samples)


LONGER = ("--set", "duration=20min")


def start() -> subprocess.Popen[str]:
    """A sweep in a process of its own, in this folder, once it has a result."""
    command = [sys.executable, "-m", "sim", "sweep", "small.yaml", "--no-report", "--jobs", "2", *LONGER]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: any(Path("results").rglob("_SUCCESS")) or running.poll() is not None)
    return running


def wait_until(what: Any) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_sweep_leaves_no_process_and_goes_on_where_it_was(small: Path) -> None:
    running = start()
    workers = children(running.pid)
    running.send_signal(signal.SIGKILL)
    running.communicate()

    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    done = len(list(Path("results").rglob("_SUCCESS")))
    went_on = call("sweep", "small.yaml", "--no-report", "--jobs", "1", *LONGER)
    at_once = call("sweep", "small.yaml", "--no-report", "--jobs", "1", *LONGER, "--out", "at-once")

    assert (running.returncode, len(workers) >= 2) == (-signal.SIGKILL, True)
    assert 1 <= done < 4
    assert f"{done} of them known" in went_on.stderr
    assert table_of(went_on).read_bytes() == table_of(at_once).read_bytes()


def test_an_interrupted_sweep_says_what_is_kept_and_leaves_no_process(small: Path) -> None:
    running = start()
    workers = children(running.pid)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=30)

    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    assert (running.returncode, len(workers) >= 2) == (130, True)
    assert "the points that are done are kept" in said


def test_a_point_that_fails_is_noted_and_the_others_go_on(small: Path) -> None:
    digest = plan(sim.read("small.yaml", ["duration=5s"]), Path("results")).digests[1]
    Path("results/small").mkdir(parents=True)
    Path("results/small", digest).write_text("a file where the result should go")

    result = call("sweep", "small.yaml", "--jobs", "1", "--set", "duration=5s")

    table = pd.read_parquet(table_of(result))
    assert result.exit_code == 2
    assert "a file of that name is in the way" in result.stdout
    assert list(table["error"] != "") == [False, True, False, False]
    assert list(table["consolidation_ratio"].isna()) == [False, True, False, False]


def test_a_process_that_dies_takes_only_its_own_task_with_it() -> None:
    tasks = ["1 + 1", "__import__('os')._exit(1)", "2 + 2", "__import__('os').kill(__import__('os').getpid(), 9)", "3"]

    ended = dict(run_all(eval, tasks, jobs=1))

    assert {number: None if isinstance(each, Died) else each for number, each in ended.items()} == {
        0: 2, 1: None, 2: 4, 3: None, 4: 3,
    }  # fmt: skip


def test_a_missed_expectation_leaves_with_1(small: Path) -> None:
    result = call("sweep", "small.yaml", "--no-report", "--jobs", "1", "--set", "expect=[pages_sharing >= 1]")

    assert result.exit_code == 1
    assert list(pd.read_parquet(table_of(result))["met"]) == [False, False, True, True]


def test_python_gets_a_data_frame(tmp_path: Path) -> None:
    table = sim.sweep(swept({"hosts.0.swap": [None, {"device": "nvme", "size": "1GiB"}]}), tmp_path, jobs=1)

    assert list(table["hosts.0.swap"]) == ["none", "{device: nvme, size: 1GiB}"]
    assert table["consolidation_ratio"].gt(1.2).all()


# --- before the runs ---------------------------------------------------------------------------------------------


def test_the_estimate_is_told_before_anything_runs(small: Path) -> None:
    todo = plan(sim.read("small.yaml"), Path("results"), jobs=2)

    assert len(todo.left) == 4
    assert 0 < todo.cpu_seconds < 60


def test_fewer_processes_run_where_memory_is_short(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = sim.read("small.yaml")
    one = max(sim.estimate(point.scenario).memory_bytes for point in scenario.points)
    monkeypatch.setattr(sweeps, "available_bytes", lambda: 2 * one)

    assert plan(scenario, Path("results"), jobs=8).jobs == 2


def test_a_point_that_this_machine_cannot_run_is_refused_before_anything_runs() -> None:
    with pytest.raises(MachineError, match="needs about"):
        plan(swept({"hosts.0.count": [1, 10_000]}, sample_every="10us"), Path("results"))


def test_a_scenario_without_a_sweep_has_nothing_to_sweep() -> None:
    with pytest.raises(UserError, match="has no sweep"):
        sim.sweep(sim.parse(BASE))
