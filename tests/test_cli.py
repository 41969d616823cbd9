"""What each verb prints, where it prints it, and the code it leaves with; the simulation itself is a stand-in here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sim.cli import main
from sim.columns import FLEET_METRICS, HEADLINES, METRICS
from sim.document import read
from sim.errors import MachineError, Problem, UserError
from sim.limits import processors
from sim.scenario.expect import Verdict

PROBLEM = Problem(file="x.yaml", line=9, path="hosts.0.ksm.rn", message="unknown key", remedy="did you mean run?")
MET = Verdict("consolidation_ratio >= 1.6", 2.0, met=True, margin=0.4)
UNMET = Verdict("saved_bytes >= 2GiB", 1 << 30, met=False, margin=-(1 << 30))


@dataclass
class World:
    """Stands in for everything behind the command line, and remembers how it was called."""

    problems: dict[str, list[Problem]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=lambda: [MET])
    raised_by_run: BaseException | None = None
    datacenter: object = None
    workers: list[tuple[int, str | None]] = field(default_factory=list)
    raised_by_report: BaseException | None = None
    loaded: list[tuple[Any, ...]] = field(default_factory=list)
    reports: list[Path] = field(default_factory=list)
    progress: list[object] = field(default_factory=list)

    def load(self, path: Path, overrides: Sequence[str] = (), seed: int | None = None) -> SimpleNamespace:
        self.loaded.append((path, tuple(overrides), seed))
        if str(path) in self.problems:
            raise UserError(*self.problems[str(path)])
        resolved = {"name": "web", "hosts": [{"memory": "16GiB"}]}
        return SimpleNamespace(
            name="web", points=(), replications=1, datacenter=self.datacenter, resolved=lambda: resolved
        )

    def run(
        self, scenario: SimpleNamespace, progress: Callable[[float, str], None] | None, jobs: int, cluster: str | None
    ) -> SimpleNamespace:
        self.progress.append(progress)
        self.workers.append((jobs, cluster))
        if self.raised_by_run:
            raise self.raised_by_run
        summary = {metric.name: None if metric in FLEET_METRICS else 3 for metric in METRICS}
        manifest = {"digest": "ab12", "wall_s": 1.5}
        return SimpleNamespace(
            scenario=scenario, samples=None, guests=None, summary=summary, manifest=manifest, verdicts=self.verdicts
        )

    def estimate(self, scenario: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(rows=lambda: [("pages", "6,291,456"), ("memory", "96MiB")])

    def write(self, result: SimpleNamespace, out: Path) -> Path:
        return out / result.scenario.name / result.manifest["digest"]

    def report(self, result: SimpleNamespace, folder: Path) -> None:
        if self.raised_by_report:
            raise self.raised_by_report
        self.reports.append(folder)


def stand_in(name: str, **members: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    world = World()
    scenario = stand_in("sim.scenario", load=world.load, schema=lambda: {"title": "Scenario"})
    monkeypatch.setitem(sys.modules, "sim.scenario", scenario)
    monkeypatch.setitem(sys.modules, "sim.run", stand_in("sim.run", run=world.run))
    monkeypatch.setitem(sys.modules, "sim.sizing", stand_in("sim.sizing", estimate=world.estimate))
    monkeypatch.setattr("sim.results.write", world.write)
    monkeypatch.setattr("sim.report.write", world.report)
    monkeypatch.setattr("sim.report.words.conclusion", lambda samples, guests, summary: "Four guests fit.")
    monkeypatch.chdir(tmp_path)
    return world


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_the_result_folder_is_the_last_line_of_a_run(world: World) -> None:
    result = call("run", "x.yaml")

    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "results/web/ab12")
    assert world.reports == [Path("results/web/ab12")]


def test_a_run_prints_its_conclusion_every_headline_and_each_expectation_with_its_margin(world: World) -> None:
    world.verdicts = [MET, UNMET]

    lines = call("run", "x.yaml").stdout.splitlines()

    assert lines[0] == "Four guests fit."
    assert [line.split()[0] for line in lines[2 : 2 + len(HEADLINES)]] == [metric.name for metric in HEADLINES]
    assert lines[-4:-2] == [
        "met      consolidation_ratio >= 1.6  actual 2     margin 0.4",
        "NOT MET  saved_bytes >= 2GiB         actual 1GiB  margin -1GiB",
    ]


def test_a_run_that_misses_an_expectation_reports_first_and_leaves_with_1(world: World) -> None:
    world.verdicts = [MET, UNMET]

    assert call("run", "x.yaml").exit_code == 1
    assert world.reports == [Path("results/web/ab12")]


def test_a_quiet_run_prints_only_the_folder(world: World) -> None:
    result = call("run", "x.yaml", "-q")

    assert (result.stdout, result.stderr) == ("results/web/ab12\n", "")


def test_a_verbose_run_also_says_what_it_costs(world: World) -> None:
    result = call("run", "x.yaml", "-v")

    assert "memory  96MiB" in result.stderr
    assert "wall_s  1.5" in result.stdout


def test_a_run_as_json_is_one_object(world: World) -> None:
    world.verdicts = [UNMET]

    printed = json.loads(call("run", "x.yaml", "--json").stdout)

    assert (printed["result"], printed["met"]) == ("results/web/ab12", False)
    assert printed["summary"].keys() == {metric.name for metric in METRICS}
    assert printed["expectations"] == [
        {
            "expectation": "saved_bytes >= 2GiB",
            "actual": 1 << 30,
            "met": False,
            "margin": -(1 << 30),
            "severity": "error",
        }
    ]


def test_overrides_and_seed_reach_the_scenario_in_order(world: World) -> None:
    call("run", "x.yaml", "--set", "a=1", "--set", "b={c: 2}", "--seed", "7")

    assert world.loaded == [(Path("x.yaml"), ("a=1", "b={c: 2}"), 7)]


def test_the_hosts_of_a_datacenter_are_spread_over_processes_or_a_cluster(world: World) -> None:
    world.datacenter = object()

    codes = [call("run", "x.yaml", *options).exit_code for options in ((), ("--jobs", "3"), ("--cluster", "tcp://a:1"))]

    assert codes == [0, 0, 0]
    assert world.workers == [(processors(), None), (3, None), (processors(), "tcp://a:1")]


@pytest.mark.parametrize("options", [("--jobs", "3"), ("--cluster", "tcp://a:1"), ("--jobs", "1", "--cluster", "a")])
def test_hosts_that_no_control_plane_has_are_not_spread(options: Sequence[str], world: World) -> None:
    result = call("run", "x.yaml", *options)

    assert (result.exit_code, world.workers) == (2, [])
    assert "leave" in result.stderr


def test_no_report_is_drawn_when_none_is_wanted(world: World) -> None:
    assert call("run", "x.yaml", "--no-report", "--out", "elsewhere").stdout.endswith("elsewhere/web/ab12\n")
    assert world.reports == []


def test_there_is_no_progress_bar_in_a_pipe(world: World) -> None:
    assert call("run", "x.yaml").stderr == ""
    assert world.progress == [None]


def test_a_progress_bar_moves_on_a_terminal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda stream: True, raising=False)

    call("run", "x.yaml")

    assert callable(world.progress[0])
    world.progress[0](0.5, "half way")


def test_a_wrong_scenario_leaves_with_2_and_one_line_per_problem(world: World) -> None:
    world.problems = {"x.yaml": [PROBLEM, PROBLEM]}

    result = call("run", "x.yaml")

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines() == ["x.yaml:9: hosts.0.ksm.rn: unknown key; did you mean run?"] * 2


def test_problems_come_as_json_when_json_is_wanted(world: World) -> None:
    world.problems = {"x.yaml": [PROBLEM]}

    result = call("run", "x.yaml", "--json")

    assert result.exit_code == 2
    assert json.loads(result.stdout)["problems"][0]["line"] == 9


@pytest.mark.parametrize(
    "arguments", [["rnu"], ["run"], ["run", "x.yaml", "--sed", "3"], ["run", "x.yaml", "--seed", "-1"]]
)
def test_a_wrong_command_line_leaves_with_2(arguments: list[str], world: World) -> None:
    result = call(*arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr


def test_a_misspelt_verb_is_answered_with_the_right_one(world: World) -> None:
    assert "validate" in call("validat").stderr


@pytest.mark.parametrize("error", [MachineError("needs root"), MemoryError()])
def test_what_this_machine_cannot_do_leaves_with_4(error: BaseException, world: World) -> None:
    world.raised_by_run = error

    result = call("run", "x.yaml")

    assert (result.exit_code, len(result.stderr.splitlines())) == (4, 1)


def test_a_bug_leaves_with_3_and_a_file_to_paste(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    world.raised_by_run = ZeroDivisionError("division by zero")

    result = call("run", "x.yaml")

    [report] = tmp_path.glob("overcommit-bug-*.txt")
    assert result.exit_code == 3
    assert str(report) in result.stderr
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in report.read_text()
    assert "numpy" in report.read_text()


def test_a_bug_is_told_in_full_when_no_file_can_be_written(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    world.raised_by_run = ZeroDivisionError("division by zero")

    result = call("run", "x.yaml")

    assert result.exit_code == 3
    assert "Traceback" in result.stderr


def test_an_interrupted_run_says_that_nothing_was_kept(world: World) -> None:
    world.raised_by_run = KeyboardInterrupt()

    result = call("run", "x.yaml")

    assert (result.exit_code, result.stderr) == (130, "interrupted; nothing was kept\n")


def test_an_interruption_after_the_result_says_where_it_is(world: World) -> None:
    world.raised_by_report = KeyboardInterrupt()

    result = call("run", "x.yaml")

    assert (result.exit_code, result.stderr) == (130, "interrupted\nthe result in results/web/ab12 is complete\n")


def test_a_results_folder_that_is_a_file_is_refused_before_the_simulation(world: World, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()

    result = call("run", "x.yaml", "--out", "taken/deeper")

    assert (result.exit_code, world.progress) == (2, [])
    assert result.stderr == f"{tmp_path}/taken: not a folder; choose another --out\n"


def test_a_results_folder_that_cannot_be_written_is_refused_before_the_simulation(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    result = call("run", "x.yaml")

    assert (result.exit_code, world.progress) == (2, [])
    assert "not writable; choose another --out" in result.stderr


def test_validate_tells_the_problems_of_all_files(world: World) -> None:
    world.problems = {"bad.yaml": [PROBLEM], "worse.yaml": [PROBLEM, PROBLEM]}

    result = call("validate", "bad.yaml", "good.yaml", "worse.yaml")

    assert (result.exit_code, result.stdout) == (2, "")
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["good.yaml", "x.yaml", "x.yaml", "x.yaml"]


def test_validate_as_json_gives_an_empty_list_for_good_files(world: World) -> None:
    result = call("validate", "good.yaml", "--json")

    assert (result.exit_code, json.loads(result.stdout)) == (0, {"problems": []})


def test_what_explain_prints_is_a_scenario_again(world: World, tmp_path: Path) -> None:
    printed = call("explain", "x.yaml").stdout

    (tmp_path / "explained.yaml").write_text(printed)
    assert printed.startswith("# pages   6,291,456\n# memory  96MiB\n")
    assert read(tmp_path / "explained.yaml").data == {"name": "web", "hosts": [{"memory": "16GiB"}]}


def test_explain_as_json_gives_estimate_and_scenario(world: World) -> None:
    printed = json.loads(call("explain", "x.yaml", "--json").stdout)

    assert printed["estimate"] == {"pages": "6,291,456", "memory": "96MiB"}
    assert printed["scenario"]["name"] == "web"


def test_the_schema_is_printed_as_json(world: World) -> None:
    assert json.loads(call("schema").stdout) == {"title": "Scenario"}


def test_new_writes_a_scenario_with_the_name_of_its_file(world: World, tmp_path: Path) -> None:
    result = call("new", "my-question")

    assert (result.exit_code, result.stdout) == (0, "my-question.yaml\n")
    assert read(tmp_path / "my-question.yaml").data["name"] == "my-question"


def test_new_never_overwrites(world: World, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("precious")

    result = call("new", "mine.yaml")

    assert (result.exit_code, result.stderr) == (2, "mine.yaml exists already; choose another name\n")
    assert (tmp_path / "mine.yaml").read_text() == "precious"


@pytest.mark.parametrize("name", ["", "-x", "a b", "../..", "x:y", ".hidden"])
def test_new_refuses_names_that_are_no_file_names(name: str, world: World, tmp_path: Path) -> None:
    assert call("new", "--", name).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_new_says_why_a_file_cannot_be_written(world: World) -> None:
    said = "missing/x.yaml: cannot be written: No such file or directory; choose another folder\n"
    assert call("new", "missing/x").stderr == said


def in_a_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *arguments], env=environment, text=True, check=False, **options)


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    heavy = "{'numpy', 'pandas', 'pyarrow', 'matplotlib', 'numba', 'pydantic', 'yaml', 'rich', 'simpy'}"

    found = in_a_process("-c", f"import sys, sim.cli; print({heavy} & set(sys.modules))", capture_output=True)

    assert found.stdout == "set()\n"


def test_the_module_is_the_command() -> None:
    found = in_a_process("-m", "sim", "--help", capture_output=True)

    assert found.returncode == 0
    assert found.stdout.startswith("Usage: overcommit [OPTIONS] COMMAND")


def test_a_broken_pipe_is_quiet(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)

    found = in_a_process("-m", "sim", "new", "x", stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path)

    os.close(writer)
    assert (found.returncode, found.stderr) == (141, "")
