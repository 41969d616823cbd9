"""Sweeps read back, and what the documentation says of reading them with other tools."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import sim
from sim.errors import UserError
from sim.report import pictures

ROOT = Path(__file__).parents[1]
SCENARIO: dict[str, Any] = {
    "name": "small",
    "duration": "3s",
    "hosts": [{"memory": "64MiB"}],
    "vms": [{"name": "g", "memory": "1MiB", "count": 2}],
    "sweep": {"hosts.0.ksm.pages_to_scan": [100, 1000], "vms.0.count": [1, 2]},
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with one sweep."""
    folder = tmp_path_factory.mktemp("out") / "results"
    sim.sweep(sim.parse(SCENARIO), folder, jobs=1)
    return folder


def test_a_sweep_is_read_back_with_its_axes_as_columns(out: Path) -> None:
    swept = sim.load(out / "small")

    assert isinstance(swept.points, pd.DataFrame)
    assert swept.axes == ["hosts.0.ksm.pages_to_scan", "vms.0.count"]
    assert list(swept.samples.columns[:4]) == [*swept.axes, "point", "time_s"]
    ends = swept.samples.groupby("point").last()
    assert (
        list(ends["vms.0.count"]) == list(ends["guests_running"]) == list(swept.points["vms.0.count"]) == [1, 2, 1, 2]
    )
    assert len(swept.guests) == 6
    assert swept.events.empty
    assert set(swept.scans["point"]) == {0, 1, 2, 3}


def test_a_point_of_a_sweep_is_a_run(out: Path) -> None:
    swept = sim.load(next((out / "small").glob("sweep-*")))

    run = swept.run(3)

    assert run.summary["guests_running"] == 2
    assert sim.load(run.folder).manifest == run.manifest
    assert all(isinstance(draw(run.samples, Figure().subplots()), Axes) for draw in (pictures.memory, pictures.cpu))


def test_the_newest_is_read_whatever_it_is(out: Path, tmp_path: Path) -> None:
    from sim.results import write

    later = write(sim.run(sim.parse(SCENARIO | {"seed": 9})), out)
    os.utime(later / "manifest.json", ns=(1 << 61, 1 << 61))

    assert sim.load(out / "small").manifest["seed"] == 9


def test_a_sweep_without_its_runs_says_so(out: Path, tmp_path: Path) -> None:
    import shutil

    swept = next((out / "small").glob("sweep-*"))
    alone = tmp_path / "small" / swept.name
    shutil.copytree(swept, alone)
    assert len(sim.load(alone).points) == 4
    with pytest.raises(UserError, match="no run of this sweep"):
        _ = sim.load(alone).samples

    (alone / "points.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="missing or damaged"):
        sim.load(alone)


def test_nothing_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete run"):
        sim.load(tmp_path)


@pytest.mark.parametrize("tool", ["duckdb", "polars"])
def test_a_recipe_of_the_documentation_works(tool: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(tool, reason=f"{tool} is not installed")
    text = (ROOT / "results" / "README.md").read_text()
    recipes = re.findall(rf"```python\n(import {tool}\b[^\n]*\n.*?)```", text, re.DOTALL)
    monkeypatch.chdir(out.parent)

    assert recipes
    for recipe in recipes:
        names: dict[str, Any] = {}
        exec(recipe.replace("results/frontier", "results/small"), names)
        found = names["found"]
        assert found.shape[0] == 4
        assert set(found.columns) >= {"consolidation_ratio", "most_saved"}
