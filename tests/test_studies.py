"""The sweeps that the pages show are those of the bundled scenarios; run as a script, this computes all or some anew.

Their tables are kept in results/; what the pages say and show is drawn from them, and some points are run again.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread

import sim
from sim.columns import METRICS
from sim.report import everything, sweep_page
from sim.scenario import Scenario
from sim.study import Swept, plan, run_points
from sim.study.sweeps import TABLE, TIMELINE

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
GUIDE = ROOT / "scenarios" / "studies.md"
STUDIES = {"frontier": ROOT / "README.md", "crossover": GUIDE, "everything": GUIDE}
"""Each sweep, and the page that says what came out."""
MOST_BYTES = 2 * 1024 * 1024


@cache
def asked(name: str) -> Scenario:
    return sim.read(ROOT / "scenarios" / f"{name}.yaml")


@cache
def shown(name: str) -> Swept:
    """The sweep as its table in results/ has it."""
    table = pq.read_table(RESULTS / f"{name}.parquet").to_pandas()
    timeline = RESULTS / f"{name}-timeline.parquet"
    return Swept(plan(asked(name), RESULTS), table, {}, pd.read_parquet(timeline) if timeline.exists() else None)


def said(name: str) -> str:
    return fill(sweep_page.conclusion(shown(name)), width=118) + "\n"


def between(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- begin {name} sweep -->\n).*?(?=<!-- end {name} sweep -->)", re.DOTALL)


def figures(table: pd.DataFrame, number: int) -> list[float]:
    return [float(value) for value in table.loc[number, [metric.name for metric in METRICS]].fillna(np.nan)]


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_says_what_the_table_says(name: str) -> None:
    found = between(name).search(STUDIES[name].read_text())

    assert found and found[0] == said(name), "run: python tests/test_studies.py"


@pytest.mark.parametrize("name", STUDIES)
def test_the_picture_is_drawn_from_the_table(name: str, tmp_path: Path) -> None:
    sweep_page.draw(shown(name), tmp_path)

    committed, drawn = imread(RESULTS / f"{name}.png"), imread(tmp_path / f"{name}.png")

    assert committed.shape == drawn.shape
    # Another matplotlib may place letters a fraction of a pixel apart.
    assert np.sqrt(np.mean((committed - drawn) ** 2)) < 0.02


@pytest.mark.parametrize("name", STUDIES)
def test_the_report_of_the_largest_sweeps_stays_small(name: str, tmp_path: Path) -> None:
    swept = shown(name)
    there = replace(swept, plan=replace(swept.plan, out=tmp_path))
    there.folder.mkdir(parents=True)

    assert sweep_page.write(there).stat().st_size < MOST_BYTES


def test_the_page_of_the_comparison_says_what_its_table_says() -> None:
    found = (RESULTS / "everything.md").read_text()

    assert found == everything.markdown(shown("everything")), "run: python tests/test_studies.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_the_table_is_what_its_scenario_gives(name: str) -> None:
    swept = shown(name)
    # Not the busiest: that is Difference Engine in the comparison, which takes minutes.
    number = int(swept.table["cpu_overhead_percent"].argsort().iloc[-2])

    summary = sim.run(asked(name).points[number].scenario).summary

    expected = [float("nan") if summary[metric.name] is None else summary[metric.name] for metric in METRICS]
    assert len(swept.table) == len(asked(name).points)
    np.testing.assert_array_equal(figures(swept.table, number), expected)


def write_anew(*names: str) -> None:
    """Run the sweeps and write their tables, pictures and sentences."""
    for name in names or STUDIES:
        swept = run_points(plan(asked(name), RESULTS))
        (RESULTS / f"{name}.parquet").write_bytes((swept.folder / TABLE).read_bytes())
        if swept.timeline is not None:
            (RESULTS / f"{name}-timeline.parquet").write_bytes((swept.folder / TIMELINE).read_bytes())
            (RESULTS / f"{name}.md").write_text(everything.markdown(shown(name)))
        sweep_page.draw(shown(name), RESULTS)
        page = STUDIES[name]
        text = page.read_text()
        place = between(name).search(text)
        assert place, name
        page.write_text(f"{text[: place.start()]}{said(name)}{text[place.end() :]}")


if __name__ == "__main__":
    write_anew(*sys.argv[1:])
