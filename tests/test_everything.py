"""Alternatives held against each other over the phases of a run: the figures, the words, the picture, and the scenario
that has every system.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import sim
from sim.errors import UserError
from sim.report import everything, sweep_page
from sim.sharing import MECHANISMS
from sim.study import Swept, plan, run_points
from sim.study.sweeps import FOLLOWED
from sim.units import GIB

ROOT = Path(__file__).parents[1]
BASE: dict[str, Any] = {
    "name": "small",
    "duration": "60s",
    "sample_every": "10s",
    "phases": {"fill": "0s", "storm": "20s", "shortage": "40s"},
    "hosts": [{"memory": "4GiB", "cores": 2, "ksm": None}],
    "vms": [{"name": "web", "memory": "16MiB"}],
}
SYSTEMS = {"nothing": {}, "half": {"hosts.0.ksm": {}}, "none left": {"hosts.0.ksm": {"run": 0}}}


@cache
def asked() -> sim.Scenario:
    return sim.read(ROOT / "scenarios" / "everything.yaml")


def swept(*timelines: Mapping[str, Sequence[float]], folder: Path = Path("results")) -> Swept:
    """A finished sweep: each point has seven samples, ten seconds apart, all other columns zero."""
    scenario = sim.parse({**BASE, "sweep": {"system": dict(list(SYSTEMS.items())[: len(timelines)])}})
    parts = [
        pd.DataFrame({"time_s": range(0, 70, 10), "point": number} | dict.fromkeys(FOLLOWED, 0) | dict(each))
        for number, each in enumerate(timelines)
    ]
    table = pd.DataFrame({"system": list(SYSTEMS)[: len(timelines)], "error": "", "progress_percent": 97.5})
    return Swept(plan(scenario, folder), table, {}, pd.concat(parts, ignore_index=True))


def used(*gib: float) -> Mapping[str, Sequence[float]]:
    return {"mem_used_bytes": [each * GIB for each in gib]}


def cell(found: pd.DataFrame, name: str, phase: str) -> Any:
    return found.set_index(["name", "phase"]).loc[(name, phase)]


# --- figures -----------------------------------------------------------------------------------------------------


def test_memory_of_a_phase_is_that_of_its_own_samples() -> None:
    found = everything.figures(swept(used(1, 2, 3, 4, 3, 5, 6)))

    assert [(row["phase"], row["used"] / GIB, row["peak"] / GIB) for _, row in found.iterrows()] == [
        ("fill", 2, 2), ("storm", 4, 4), ("shortage", 6, 6),
    ]  # fmt: skip


def test_a_saving_is_there_when_nine_tenths_of_it_stay() -> None:
    half = swept(used(2, 2, 2, 2, 2, 2, 2), used(2, 1, 1, 2, 1.05, 1.2, 1))

    found = everything.figures(half)

    assert cell(found, "half", "fill")["saved"] == GIB
    assert cell(found, "half", "fill")["settled"] == 10
    assert cell(found, "half", "storm")["saved"] == 0
    assert pd.isna(cell(found, "half", "storm")["settled"])
    assert cell(found, "half", "shortage")["settled"] == 20  # 1.2 GiB in between are too much


def test_no_saving_is_known_where_the_first_lost_guests() -> None:
    first = {**used(2, 2, 2, 2, 2, 1, 1), "oom_kills": [0, 0, 0, 0, 0, 1, 1]}

    found = everything.figures(swept(first, used(1, 1, 1, 1, 1, 1, 1)))

    assert pd.isna(cell(found, "half", "shortage")["saved"])
    assert cell(found, "half", "storm")["saved"] == GIB
    assert cell(found, "nothing", "shortage")["killed"] == 1
    assert cell(found, "nothing", "storm")["killed"] == 0


def test_counters_are_told_by_phase() -> None:
    cpu = {"scan_cpu_ns": [0, 4e9, 4e9, 4e9, 4e9, 4e9, 4e9], "cow_cpu_ns": [0, 0, 0, 0, 0, 0, 2e9]}

    found = everything.figures(swept({**used(*[1] * 7), **cpu}))

    assert [row["scan"] for _, row in found.iterrows()] == [10, 0, 0]
    assert [row["cpu"] for _, row in found.iterrows()] == [10, 0, 5]


# --- table, words, picture ---------------------------------------------------------------------------------------


def test_the_table_leaves_out_what_no_point_has() -> None:
    header, nothing, half = everything.rows(swept(used(*[2] * 7), used(2, *[1] * 6)))

    assert header[:5] == ["system", "memory after fill", "less than the first", "90 % of it after", "CPU"]
    assert "shortage: guests killed" not in header
    assert nothing[:4] == ["nothing", "2GiB", "0 %", ""]
    assert half[:4] == ["half", "1GiB", "50 %", "10s"]


def test_a_point_without_a_result_is_in_the_table_with_its_error() -> None:
    done = swept(used(*[2] * 7), used(*[2] * 7))
    assert done.timeline is not None
    table = done.table.assign(error=["", "no memory"])

    lines = everything.rows(Swept(done.plan, table, {}, done.timeline[done.timeline["point"] == 0]))

    assert lines[2][:2] == ["half", "no memory"]
    assert {len(line) for line in lines} == {len(lines[0])}


def test_the_words_name_the_least_memory_and_who_lost_no_guest() -> None:
    killed = {"oom_kills": [0, 0, 0, 0, 0, 3, 3]}

    text = everything.conclusion(swept({**used(*[2] * 7), **killed}, used(2, *[1] * 6)))

    assert text == (
        "After fill, half needs least memory: 1GiB, where nothing needs 2GiB. 1 of 2 lose no guest in shortage; of "
        "these half costs them least of their work, 2.5 %."
    )


def test_the_picture_has_a_line_for_each_the_least_memory_on_top() -> None:
    canvas = everything.draw(swept(used(*[2] * 7), used(2, *[1] * 6), used(*[3] * 7)))

    memory, times, cpu, broken = canvas.axes
    assert [label.get_text() for label in memory.get_yticklabels()] == ["half", "nothing", "none left"]
    assert memory.yaxis_inverted()
    assert [text.get_text() for text in times.texts] == ["held against this", "saves nothing"]
    assert [text.get_text() for text in broken.texts] == ["none; guests lost 2.5 % of their work"] * 3
    assert cpu.get_title() == "CPU (% of the host)"


# --- a sweep with phases -----------------------------------------------------------------------------------------


def test_a_sweep_with_phases_keeps_what_became_of_each_point(tmp_path: Path) -> None:
    pool = {"parts": [{"name": "system", "pool": "debian", "size": "100%"}]}
    vms = [{"name": "web", "count": 4, "memory": "16MiB", "image": pool}]
    systems = {"nothing": {}, "KSM": {"hosts.0.ksm": {"pages_to_scan": 5000}}}

    done = run_points(plan(sim.parse({**BASE, "vms": vms, "sweep": {"system": systems}}), tmp_path, 1))
    sweep_page.write(done)

    assert done.timeline is not None
    pd.testing.assert_frame_equal(pd.read_parquet(done.folder / "timeline.parquet"), done.timeline)
    assert cell(everything.figures(done), "KSM", "fill")["saved"] > 40 << 20
    assert {file.name for file in (done.folder / "pictures").iterdir()} == {"everything.png", "everything.svg"}
    assert "KSM needs least memory" in (done.folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ({"a": "0s", "b": "0s"}, "phases.b: does not begin after the phase above it"),
        ({"a": "2h"}, "phases.a: is after the end of the run"),
    ],
)
def test_phases_come_one_after_the_other_within_the_run(phases: Mapping[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sim.parse({**BASE, "phases": phases})


# --- the scenario that has every system --------------------------------------------------------------------------


UNDECLARED = {"saved_segments"}
"""A captured guest has no parts that one could declare to be shared."""


def test_every_mechanism_is_in_the_comparison() -> None:
    compared = {name for point in asked().points for host in point.scenario.hosts for name in host.mechanisms}

    assert compared == set(MECHANISMS) - UNDECLARED


def test_every_answer_finds_its_systems() -> None:
    told = [{"point": number, "name": point.settings["system"], "phase": phase, "used": GIB, "saved": GIB,
             "settled": 60.0, "killed": 0, "lost": 0.0, "cpu": 1.0}
            for number, point in enumerate(asked().points) for phase in asked().phases]  # fmt: skip

    for answer in everything.ANSWERS:
        assert answer(everything.Told(pd.DataFrame(told), everything.phases(asked()))).endswith(".")


def test_every_point_has_the_same_memory_and_the_same_guests() -> None:
    kinds = {tuple((vm.name, vm.count, vm.memory, vm.start) for vm in point.scenario.vms) for point in asked().points}

    assert len(kinds) == 1
    assert {point.scenario.hosts[0].memory for point in asked().points} == {3 * GIB}


def test_the_first_alternative_shares_and_squeezes_nothing() -> None:
    host = asked().points[0].scenario.hosts[0]

    assert (list(host.mechanisms), host.swap, host.zswap, host.balloon) == ([], None, None, None)
