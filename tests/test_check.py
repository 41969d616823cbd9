"""`overcommit check`: what it finds, the reports it writes for CI servers, and that those take what we give them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from inline import inline

import sim
from sim.cli import main
from sim.columns import METRICS
from sim.document import dump
from sim.errors import At
from sim.results import junit
from sim.scenario.expect import Tolerance
from sim.study import checks

__all__ = ["inline"]

pytest_plugins = "pytester"

ROOT = Path(__file__).parents[1]
MIXED = ["consolidation_ratio >= 1.2", "oom_kills == 0", "pages_sharing > 1e6", "compression_ratio > 1"]


def scenario(name: str, expect: list[str], **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "duration": "5s",
        "hosts": [{"memory": "256MiB", "ksm": {"pages_to_scan": 2000}}],
        "vms": [
            {
                "name": "web",
                "count": 2,
                "memory": "4MiB",
                "image": {"parts": [{"name": "system", "pool": "debian", "size": "90%", "writes": {"rate": "1/min"}}]},
            }
        ],
        "expect": expect,
        **more,
    }


def write(folder: Path, **files: dict[str, Any]) -> None:
    for name, data in files.items():
        (folder / f"{name}.yaml").write_text(dump(data))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of scenarios, with the results of those that can run."""
    folder = tmp_path_factory.mktemp("gallery")
    write(
        folder,
        good=scenario("good", ["oom_kills == 0"]),
        mixed=scenario("mixed", MIXED, warn=["full_scans > 1e6"]),
        silent=scenario("silent", []),
    )
    (folder / "wrong.yaml").write_text(
        "name: wrong\nduration: 5x\nhosts: [{memory: 1GiB}]\nvms: [{name: a, memory: 1MiB}]\n"
    )
    assert call("check", folder, "--out", folder / "results", "--jobs", "1").exit_code == 2
    return folder


def check(folder: Path, *arguments: object) -> Result:
    """Check with the results that are there."""
    return call("check", *arguments, "--out", folder / "results", "--jobs", "1")


def test_every_expectation_is_told_with_actual_value_margin_and_line(gallery: Path) -> None:
    result = check(gallery, gallery / "mixed.yaml", "--json")

    told = json.loads(result.stdout)
    assert (result.exit_code, told["met"], told["exit_code"]) == (1, False, 1)
    assert [each["state"] for each in told["findings"]] == ["met", "met", "not met", "no data", "not met"]
    assert [each["severity"] for each in told["findings"]] == ["error"] * 4 + ["warning"]
    first = told["findings"][0]
    assert first["margin"] == pytest.approx(first["actual"] - 1.2)
    lines = (gallery / "mixed.yaml").read_text().splitlines()
    for each in told["findings"]:
        assert lines[each["line"] - 1].endswith(each["what"])


@pytest.mark.parametrize(
    ("files", "code"), [(["good"], 0), (["good", "silent"], 0), (["mixed"], 1), (["good", "mixed", "wrong"], 2)]
)
def test_the_worst_finding_is_the_exit_code_and_stands_in_the_last_line(
    files: list[str], code: int, gallery: Path
) -> None:
    result = check(gallery, *(gallery / f"{name}.yaml" for name in files))

    assert result.exit_code == code
    assert result.stdout.splitlines()[-1].endswith(f"exit code {code}")


@pytest.mark.parametrize(("file", "code"), [("mixed", 0), ("wrong", 2)])
def test_exit_zero_forgives_what_is_not_met_and_no_mistake(file: str, code: int, gallery: Path) -> None:
    assert check(gallery, gallery / f"{file}.yaml", "--exit-zero").exit_code == code


def test_what_is_only_warned_of_does_not_fail(gallery: Path) -> None:
    write(gallery, mixed2=scenario("mixed", [], warn=["full_scans > 1e6"]))

    result = check(gallery, gallery / "mixed2.yaml")

    (gallery / "mixed2.yaml").unlink()
    assert result.exit_code == 0
    assert "warning  full_scans > 1e6" in result.stdout
    assert "1 only warned of" in result.stdout


def test_other_expectations_of_the_same_run_need_no_new_run(gallery: Path) -> None:
    made = {each: each.stat().st_mtime_ns for each in gallery.rglob("summary.json")}
    write(gallery, other=scenario("good", ["oom_kills == 0", "full_scans >= 1"], tolerances={"full_scans": 3}))

    assert check(gallery, gallery / "other.yaml").exit_code == 0

    (gallery / "other.yaml").unlink()
    assert {each: each.stat().st_mtime_ns for each in gallery.rglob("summary.json")} == made


def test_the_worst_replication_counts(tmp_path: Path) -> None:
    asked = scenario("many", ["full_scans >= 1", "cow_ksm < 0"], replications=3)
    write(tmp_path, many=asked)

    told = json.loads(check(tmp_path, tmp_path / "many.yaml", "--json").stdout)["findings"]

    runs = [run.summary["cow_ksm"] for run in map(sim.run, sim.parse(asked).runs)]
    assert len(set(runs)) > 1
    assert told[1]["actual"] == max(runs)


# --- baseline ----------------------------------------------------------------------------------------------------


def test_a_baseline_finds_every_metric_that_moved_further_than_tolerated(gallery: Path, tmp_path: Path) -> None:
    file, folder = gallery / "good.yaml", tmp_path / "base"
    missing = check(gallery, file, "--baseline", folder)
    written = check(gallery, file, "--baseline", folder, "--update")
    same = check(gallery, file, "--baseline", folder)
    before = json.loads((folder / "good.json").read_text())
    (folder / "good.json").write_text(
        json.dumps({**before, "full_scans": before["full_scans"] + 3, "fork_s": None, "old": 1})
    )
    moved = check(gallery, file, "--baseline", folder)

    assert (missing.exit_code, written.exit_code, same.exit_code, moved.exit_code) == (1, 0, 0, 1)
    assert "write it with --update" in missing.stdout
    assert re.search(r"MOVED +full_scans +actual .*, moved by -3", moved.stdout)
    assert re.search(r"MOVED +fork_s +had no data", moved.stdout)
    assert re.search(r"MOVED +old +is no metric any more", moved.stdout)
    assert "3 moved" in moved.stdout


def test_a_tolerance_is_for_its_metric_alone(gallery: Path, tmp_path: Path) -> None:
    check(gallery, gallery / "good.yaml", "--baseline", tmp_path, "--update")
    before = json.loads((tmp_path / "good.json").read_text())
    moved = {"full_scans": before["full_scans"] + 3, "saved_bytes": before["saved_bytes"] * 1.05}
    (tmp_path / "good.json").write_text(json.dumps(before | moved))
    write(tmp_path, good=scenario("good", ["oom_kills == 0"], tolerances={"full_scans": 3, "saved_bytes": "1%"}))

    result = check(gallery, tmp_path / "good.yaml", "--baseline", tmp_path)

    assert (result.exit_code, result.stdout.count("MOVED")) == (1, 1)
    assert "MOVED  saved_bytes" in result.stdout


@pytest.mark.parametrize("text", ["", "[]", '{"full_scans": "many"}', "\xff"])
def test_a_damaged_baseline_is_a_finding(text: str, gallery: Path, tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(text, encoding="latin-1")

    result = check(gallery, gallery / "good.yaml", "--baseline", tmp_path)

    assert (result.exit_code, "cannot be read" in result.stdout) == (1, True)


def test_two_scenarios_of_one_name_cannot_have_a_baseline(gallery: Path, tmp_path: Path) -> None:
    write(tmp_path, good=scenario("good", []))

    result = check(gallery, gallery / "good.yaml", tmp_path, "--baseline", tmp_path / "base")

    assert (result.exit_code, "are all named good" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("given_", "before", "now", "holds"),
    [
        (0, 5, 5, True),
        (0, 5, 5.000001, False),
        ("1%", 200, 202, True),
        ("1%", -200, -203, False),
        ("1KiB", 0, 1024, True),
        ("1KiB", 0, -1025, False),
        (5, 10, 15, True),
    ],
)
def test_a_tolerance_is_a_share_or_an_amount(given_: str | int, before: float, now: float, holds: bool) -> None:
    metric = next(each for each in METRICS if each.name == "saved_bytes")

    assert Tolerance.parse(given_, metric).holds(before, now) is holds


@pytest.mark.parametrize("given_", ["", "-1%", "-5", "much", True, "1s"])
def test_what_is_no_tolerance_is_refused(given_: object) -> None:
    with pytest.raises(At):
        Tolerance.parse(given_, next(each for each in METRICS if each.name == "saved_bytes"))


# --- command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shard", "5/4"], "5/4 is no part; write 1/4"),
        (["--shard", "0/4"], "is no part"),
        (["--shard", "half"], "is no part"),
        (["--update"], "say where with --baseline"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], said: str, gallery: Path) -> None:
    result = check(gallery, gallery / "good.yaml", *arguments)

    assert (result.exit_code, said in result.stderr) == (2, True)


@given(st.sets(st.text("abc", min_size=1), max_size=30), st.integers(1, 8))
def test_the_parts_together_are_all_files_each_once(names: set[str], parts: int) -> None:
    files = [Path(name) for name in names]

    found = [file for number in range(parts) for file in checks.shard(files, number + 1, parts)]

    assert sorted(found) == sorted(files)


def test_python_gets_a_data_frame(gallery: Path) -> None:
    table = sim.check([gallery / "good.yaml"], gallery / "results", jobs=1)

    assert list(table["state"]) == ["met"]


# --- reports -----------------------------------------------------------------------------------------------------


def test_junit_counts_failures_and_errors_and_is_written_before_the_exit(gallery: Path, tmp_path: Path) -> None:
    result = check(gallery, *sorted(gallery.glob("*.yaml")), "--junit", tmp_path / "report.xml")

    root = ElementTree.parse(tmp_path / "report.xml").getroot()
    told = {each.get("name"): (each.get("tests"), each.get("failures"), each.get("errors")) for each in root}
    assert result.exit_code == 2
    assert told == {
        "good": ("1", "0", "0"),
        "mixed": ("5", "1", "1"),
        "silent": ("1", "0", "0"),
        "wrong": ("1", "0", "1"),
    }
    assert root.get("tests") == "8"
    assert "must be a duration" in str(root[3][0][0].get("message"))


@given(st.text(), st.text(), st.sampled_from(["passed", "failure", "error", "skipped"]))
def test_junit_is_well_formed_whatever_it_holds(name: str, text: str, state: Any) -> None:
    written = junit.document([junit.Suite(name, "file.yaml", [junit.Case(name, state, text)])])

    case = ElementTree.fromstring(written.encode())[0][0]
    if state == "passed" and text.isprintable():
        assert (case[0].text or "") == text


def test_github_is_told_file_line_and_level(gallery: Path) -> None:
    said = check(gallery, gallery / "mixed.yaml", "--github").stdout.splitlines()

    commands = [line for line in said if line.startswith("::")]
    lines = (gallery / "mixed.yaml").read_text().splitlines()
    assert [line.split()[0] for line in commands] == ["::error", "::error", "::warning"]
    for command in commands:
        found = re.fullmatch(r"::\w+ file=(.*),line=(\d+),title=(.*?)::(.*)", command)
        assert found and lines[int(found[2]) - 1].endswith(found[3])


def test_a_command_to_github_cannot_be_broken_out_of() -> None:
    finding = checks.Finding("a,b::c\n", "not met", line=3)

    told = checks.command(Path("odd:name,x.yaml"), finding, "100%\r\n::error::no")

    assert told == "::error file=odd%3Aname%2Cx.yaml,line=3,title=a%2Cb%3A%3Ac%0A::100%25%0D%0A::error::no"


# --- ready-made CI -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        (".github/workflows/check.yml", ["--builtin-schema", "vendor.github-workflows"]),
        (".gitlab-ci.yml", ["--builtin-schema", "vendor.gitlab-ci", "--data-transform", "gitlab-ci"]),
    ],
)
def test_the_workflow_is_one_by_its_schema(file: str, arguments: list[str]) -> None:
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", *arguments, ROOT / file]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert ended.returncode == 0, ended.stdout + ended.stderr


def steps_of(file: str) -> list[str]:
    data = yaml.safe_load((ROOT / file).read_text())
    if "jobs" in data:
        return [step["run"] for step in data["jobs"]["check"]["steps"] if "run" in step]
    return list(data["check"]["script"])


@pytest.mark.parametrize("file", [".github/workflows/check.yml", ".gitlab-ci.yml"])
def test_the_steps_of_the_workflow_run(file: str, gallery: Path, tmp_path: Path) -> None:
    """All but the installation, in a repository of ours."""
    (tmp_path / "scenarios").mkdir()
    for name in ("good", "mixed"):
        (tmp_path / "scenarios" / f"{name}.yaml").write_bytes((gallery / f"{name}.yaml").read_bytes())
    (tmp_path / "results").symlink_to(gallery / "results")
    install, check_step = steps_of(file)
    check_step = check_step.replace("${{ matrix.part }}/4", "2/2")
    command = tmp_path / "overcommit"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m sim "$@"\n')
    command.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    part = {"CI_NODE_INDEX": "2", "CI_NODE_TOTAL": "2"}

    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", check_step], cwd=tmp_path, env={**os.environ, **path, **part},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert install == "pip install ."
    assert ended.returncode == 1, ended.stderr
    assert "scenarios/mixed.yaml" in ended.stdout
    assert [each.get("name") for each in ElementTree.parse(tmp_path / "overcommit.xml").getroot()] == ["mixed"]


def test_the_hooks_run_in_a_repository(gallery: Path, tmp_path: Path) -> None:
    pytest.importorskip("pre_commit")
    pre_commit = [sys.executable, "-m", "pre_commit"]
    valid = subprocess.run([*pre_commit, "validate-manifest", ROOT / ".pre-commit-hooks.yaml"], check=False, timeout=60)
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    for hook in hooks:  # the tool itself is here already, and need not be installed for the hook
        program, *rest = shlex.split(hook["entry"])
        assert program == "overcommit"
        hook |= {"language": "system", "entry": shlex.join([sys.executable, "-m", "sim", *rest])}
    repository = tmp_path / "repository"
    (repository / "scenarios").mkdir(parents=True)
    (repository / ".pre-commit-config.yaml").write_text(dump({"repos": [{"repo": "local", "hooks": hooks}]}))
    for name in ("mixed", "wrong"):
        (repository / "scenarios" / f"{name}.yaml").write_bytes((gallery / f"{name}.yaml").read_bytes())
    (repository / "results").symlink_to(gallery / "results")
    git = ["git", "-C", str(repository), "-c", "init.defaultBranch=main"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "scenarios"], check=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PRE_COMMIT_HOME": str(tmp_path / "home")}

    ended = subprocess.run(
        [*pre_commit, "run", "--all-files"], cwd=repository, env=environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert valid.returncode == 0
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout.count("Failed") == 2
    assert "scenarios/wrong.yaml:2: duration" in ended.stdout
    assert "NOT MET  pages_sharing > 1e6" in ended.stdout


# --- pytest ------------------------------------------------------------------------------------------------------

PLUGIN = ("-p", "no:overcommit", "-p", "sim.pytest_plugin")


def test_the_plugin_is_installed_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert project["entry-points"]["pytest11"] == {"overcommit": "sim.pytest_plugin"}


def test_pytest_takes_each_expectation_as_a_test_if_asked(pytester: pytest.Pytester) -> None:
    write(pytester.path, mixed=scenario("mixed", MIXED, warn=["full_scans > 1e6"]))

    unasked = pytester.runpytest(*PLUGIN)
    asked = pytester.runpytest(*PLUGIN, "--overcommit", "-rA", "-W", "default")

    unasked.assert_outcomes()
    asked.assert_outcomes(passed=3, failed=2, warnings=1)
    asked.stdout.fnmatch_lines(["*pages_sharing > 1e6: actual *, margin -*", "*Warned: full_scans > 1e6: actual *"])
    assert "Traceback" not in asked.stdout.str()


def test_pytest_tells_what_is_wrong_with_a_scenario(pytester: pytest.Pytester, gallery: Path) -> None:
    (pytester.path / "wrong.yaml").write_bytes((gallery / "wrong.yaml").read_bytes())
    (pytester.path / "other.yml").write_text("no: scenario")
    pytester.makeini("[pytest]\novercommit = true\novercommit_files = w*.yaml")

    told = pytester.runpytest(*PLUGIN)

    told.assert_outcomes(errors=1)
    told.stdout.fnmatch_lines(["*wrong.yaml:2: duration: *"])
