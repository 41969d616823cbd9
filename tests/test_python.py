"""What the command line can do, Python can: one function for each verb, with data frames as answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click import Group
from inline import inline

import sim
from sim.cli import main
from sim.document import dump
from sim.errors import UserError

__all__ = ["inline"]

ROOT = Path(__file__).parents[1]
SCENARIO: dict[str, Any] = {
    "name": "small",
    "duration": "3s",
    "hosts": [{"memory": "64MiB"}],
    "vms": [{"name": "g", "memory": "8MiB", "image": {"parts": [{"name": "data", "size": "100%"}]}}],
    "expect": ["oom_kills == 0"],
}
NAMES = {
    "list": "parts",
    "new": "",  # a text to edit
    "validate": "read",
    "lab run": "replay",
    "lab compare": "trial",
    "lab restore": "restore",
    "lab calibrate": "calibrate",
    "lab capture": "capture",
}


def verbs() -> list[str]:
    """Verbs of the command line."""
    found = []
    for name, verb in main.commands.items():
        found += [f"{name} {each}" for each in verb.commands] if isinstance(verb, Group) else [name]
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A scenario that takes no time."""
    file = tmp_path / "small.yaml"
    file.write_text(dump(SCENARIO))
    return file


@pytest.mark.parametrize("verb", verbs())
def test_each_verb_of_the_command_line_has_a_function(verb: str) -> None:
    name = NAMES.get(verb, verb)

    assert not name or (name in sim.__all__ and callable(getattr(sim, name)))


@pytest.mark.parametrize("name", sim.__all__)
def test_each_name_is_documented(name: str) -> None:
    assert getattr(sim, name).__doc__


def test_solve_finds_how_many_fit(file: Path, tmp_path: Path) -> None:
    found = sim.solve(file, "vms.g.count=5..9", out=tmp_path / "out", jobs=1)

    fitting = found.table[found.table["kept"]]["vms.g.count"].max()
    assert found.answer == fitting == 7  # of 64 MiB, eight guests leave nothing for page tables and metadata
    assert found.binding == ["oom_kills == 0"]
    assert found.runs == len(found.table)
    assert sim.solve(file, "vms.g.count=5..9", out=tmp_path / "out", jobs=1).runs == 0


def test_solve_finds_the_best_point_of_a_sweep(file: Path, tmp_path: Path) -> None:
    file.write_text(dump({**SCENARIO, "sweep": {"vms.0.count": [1, 3, 2, 20]}}))

    found = sim.solve(file, maximise="mem_used_bytes", out=tmp_path / "out", jobs=1)

    assert found.answer == {"vms.0.count": 3}
    assert list(found.table["kept"]) == [True, True, True, False]


@pytest.mark.parametrize(
    "asked", [{}, {"vary": "a=1..2", "minimise": "pswpin"}, {"minimise": "pswpin", "smallest": True}]
)
def test_solve_searches_for_one_thing(asked: dict[str, Any], file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--vary"):
        sim.solve(file, **asked, out=tmp_path)


def test_compare_tells_the_difference_of_each_metric(file: Path, tmp_path: Path) -> None:
    table = sim.compare(file, b=["vms.0.count=2"], out=tmp_path / "out", jobs=1, metrics=["mem_used_bytes", "pswpin"])

    used, swapped = table.to_dict("records")
    assert used["difference"] == used["second"] - used["first"] > 0
    assert (used["verdict"], swapped["verdict"]) == ("one pair", "same")


def test_compare_blames_the_side_that_is_wrong(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--b vms\.0\.cuont=2: .*count"):
        sim.compare(file, b=["vms.0.cuont=2"], out=tmp_path)


def test_explain_tells_where_all_memory_is(file: Path, tmp_path: Path) -> None:
    folder = sim.save(sim.run(sim.read(file)), tmp_path / "out")

    with pytest.raises(UserError, match=r"at: .*2"):
        sim.explain(folder, "2")
    table = sim.explain(folder, "2s")

    assert (folder / "report.html").exists()
    assert set(table["time_s"]) == {2}
    assert table.groupby("of")["bytes"].sum()["host memory"] == 64 << 20
    assert table.groupby("of")["bytes"].sum()["promised"] == 8 << 20


def test_a_trace_is_surveyed() -> None:
    assert sim.trace(ROOT / "scenarios" / "traces" / "planetlab", ["every=15min"]).guests > 0


def test_what_scenarios_are_made_of_is_listed() -> None:
    assert {"mechanism", "tuner", "kernel", "prices", "metric", "scenario"} <= {kind for kind, _, _ in sim.parts()}
