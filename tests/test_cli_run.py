"""The command line from end to end, on real scenarios."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sim import load, read
from sim.cli import main
from sim.columns import METRICS
from sim.sharing import MECHANISMS
from sim.sharing.kernels import KERNELS
from sim.sharing.tuners import TUNERS

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "scenarios" / "quickstart.yaml"

SMALL = """\
name: small
duration: 20s
hosts: [{memory: 256MiB, ksm: {pages_to_scan: 2000}}]
vms:
  - name: web
    count: 2
    memory: 32MiB
    image: {parts: [{name: system, pool: debian, size: 50%}, {name: data, size: 50%}]}
expect:
  - consolidation_ratio >= 1.2
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SMALL)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def imported(code: str, modules: tuple[str, ...]) -> list[str]:
    """Return which of these modules are loaded after some code has run in a process of its own."""
    code = f"{code}\nimport json, sys\nprint(json.dumps([each for each in {modules} if each in sys.modules]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_run_meets_its_expectations_and_keeps_everything(small: Path) -> None:
    result = call("run", "small.yaml")

    folder = Path(result.stdout.splitlines()[-1])
    assert (result.exit_code, folder.parent) == (0, Path("results/small"))
    assert {"scenario.yaml", "manifest.json", "summary.json", "samples.parquet", "report.html"} <= {
        each.name for each in folder.iterdir()
    }
    assert load(folder).summary["guests_running"] == 2


def test_a_missed_expectation_leaves_with_1_and_says_by_how_much(small: Path) -> None:
    result = call("run", "small.yaml", "--no-report", "--set", "expect=[consolidation_ratio >= 9]")

    assert result.exit_code == 1
    assert "NOT MET  consolidation_ratio >= 9" in result.stdout


def test_an_override_changes_the_run_and_its_folder(small: Path) -> None:
    usual, other = (
        Path(call("run", "small.yaml", "--no-report", "-q", "--out", "o", *more).stdout.strip())
        for more in ([], ["--set", "vms.web.count=3", "--seed", "7"])
    )

    assert usual.parent == other.parent
    assert usual.name != other.name
    assert (load(other).summary["guests_running"], load(other).manifest["seed"]) == (3, 7)


def test_a_run_as_json_holds_every_metric(small: Path) -> None:
    printed = json.loads(call("run", "small.yaml", "--no-report", "--json").stdout)

    assert printed["met"] is True
    assert list(printed["summary"]) == [metric.name for metric in METRICS]


def test_a_run_that_needs_more_than_this_machine_has_leaves_with_4(small: Path) -> None:
    result = call("run", "small.yaml", "--set", "hosts.0.count=10000", "--set", "sample_every=10us")

    assert (result.exit_code, result.stdout) == (4, "")
    assert "needs about" in result.stderr


def test_what_explain_prints_is_the_same_scenario(small: Path) -> None:
    printed = call("explain", "small.yaml").stdout
    Path("explained.yaml").write_text(printed)

    assert read("explained.yaml") == read("small.yaml")
    assert call("validate", "explained.yaml").exit_code == 0
    assert "# guests" in printed


def test_what_a_run_keeps_is_the_same_scenario(small: Path) -> None:
    folder = Path(call("run", "small.yaml", "--no-report", "-q").stdout.strip())

    assert read(folder / "scenario.yaml").resolved() == read("small.yaml").resolved()


def test_a_new_scenario_is_valid_and_meets_its_expectations(small: Path) -> None:
    assert call("new", "mine").stdout == "mine.yaml\n"
    assert call("validate", "mine.yaml").exit_code == 0

    result = call("run", "mine.yaml", "--no-report")

    assert (result.exit_code, "NOT MET" in result.stdout) == (0, False)


def test_the_schema_is_one_json_object() -> None:
    assert json.loads(call("schema").stdout)["title"] == "Scenario"


def test_list_names_everything_that_a_scenario_can_name() -> None:
    parts = json.loads(call("list", "--json").stdout)

    def named(kind: str) -> list[str]:
        return [part["name"] for part in parts if part["kind"] == kind]

    assert named("mechanism") == list(MECHANISMS)
    assert named("tuner") == list(TUNERS)
    assert named("kernel") == list(KERNELS)
    assert named("metric") == [metric.name for metric in METRICS]
    assert str(QUICKSTART) in named("scenario")
    assert [part for part in parts if not part["about"]] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "smal.yaml"], "smal.yaml: no such file; did you mean small.yaml?"),
        (["run", "small.yaml", "--set", "vms.wbe.count=3"], "vms.wbe: no such path; did you mean web?"),
        (["run", "small.yaml", "--set", "memory=3GiB"], "memory: unknown key; it belongs under hosts"),
        (["validate", "small.yaml", "--set", "vms.0.count"], "--set vms.0.count: must be path=value"),
        (["explain", "small.yaml", "--set", "duration=5m"], 'did you mean "5ms" or "5min"?'),
        (["new", "small"], "small.yaml exists already; choose another name"),
        (["new", "my scenario"], "cannot be a scenario's name"),
        (["validate", "."], ".: is a folder; name a file in it; overcommit check takes folders"),
    ],
)
def test_a_slip_on_the_command_line_is_answered_with_what_to_do(arguments: list[str], said: str, small: Path) -> None:
    result = call(*arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_help_imports_nothing_heavy() -> None:
    heavy = ("numpy", "numba", "pandas", "pyarrow", "matplotlib", "simpy", "pydantic", "yaml", "rich")

    assert imported("import sim.cli; sim.cli.main(['--help'], standalone_mode=False)", heavy) == []


def test_validate_imports_nothing_that_only_a_run_needs() -> None:
    heavy = ("numba", "pandas", "pyarrow", "matplotlib", "simpy", "rich")

    arguments = ["validate", str(QUICKSTART)]

    assert imported(f"import sim.cli; sim.cli.main({arguments}, standalone_mode=False)", heavy) == []
