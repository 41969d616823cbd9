"""`overcommit solve`: the search by itself, and on scenarios whose limit is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from inline import inline

from sim.cli import main
from sim.document import dump
from sim.errors import MachineError
from sim.results import Result as RunResult
from sim.scenario import Scenario
from sim.study import solver, sweeps

__all__ = ["inline"]

# Guests whose pages all differ: a host of 64 MiB holds so many of 4 MiB and no more.
ASKED: dict[str, Any] = {
    "name": "full",
    "duration": "2s",
    "hosts": [{"memory": "64MiB", "ksm": None}],
    "vms": [{"name": "web", "count": 1, "memory": "4MiB"}],
    "expect": ["oom_kills == 0", "mem_free_min_bytes >= 6MiB", "consolidation_ratio >= 0.5"],
}
FIT = (64 - 6) // 4


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("full.yaml").write_text(dump(ASKED))
    return Path("full.yaml")


@given(st.integers(2, 3000), st.integers(-1, 3000))
def test_the_search_ends_at_the_last_value_that_is_kept(count: int, limit: int) -> None:
    probed: set[int] = set()

    def probe(places: Sequence[int]) -> None:
        assert not probed & set(places) or places == [0, count - 1]
        assert all(0 <= place < count for place in places)
        probed.update(places)

    solver._search(count, probe, lambda place: place <= limit)

    kept = max((place for place in probed if place <= limit), default=None)
    broken = min((place for place in probed if place > limit), default=None)
    if limit < 0:
        assert (kept, broken) == (None, 0)
    elif limit >= count - 1:
        assert broken is None
    else:
        assert (kept, broken) == (limit, limit + 1)
    assert len(probed) <= 2 + 3 * 7  # 4^6 > 3000


@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_whatever_is_kept_the_search_ends_between_a_kept_value_and_a_broken_one(kept: list[bool]) -> None:
    probed: set[int] = set()

    solver._search(len(kept), probed.update, lambda place: kept[place])

    broken = next((place for place in sorted(probed) if not kept[place]), None)
    if broken:
        assert broken - 1 in probed
        assert all(kept[place] for place in probed if place < broken)


def test_the_largest_number_of_guests_that_fit_and_what_they_break(file: Path) -> None:
    first = call("solve", file, "--vary", "vms.web.count=1..40", "--jobs", "1")
    told = json.loads(call("solve", file, "--vary", "vms.web.count=1..40", "--jobs", "2", "--json").stdout)

    assert first.exit_code == 0
    assert (told["answer"], told["broken"], told["runs"]) == (FIT, FIT + 1, 0)
    assert told["binding"] == ["mem_free_min_bytes >= 6MiB"]
    assert f"vms.web.count {FIT}: {FIT + 1} breaks mem_free_min_bytes >= 6MiB" in first.stdout
    assert f"{len(told['probes'])} values in {len(told['probes'])} runs" in first.stdout
    assert call("solve", file, "--vary", "vms.web.count=1..40", "-q").stdout == f"{FIT}\n"


def test_the_smallest_memory_that_is_enough(file: Path) -> None:
    told = json.loads(
        call("solve", file, "--vary", "hosts.0.memory=4MiB..68MiB..2MiB", "--smallest", "--set", "vms.0.count=5",
             "--jobs", "1", "--json").stdout
    )  # fmt: skip

    assert (told["answer"], told["broken"]) == ("26MiB", "24MiB")  # five guests of 4 MiB, and 6 MiB free


@pytest.mark.parametrize(
    ("vary", "code", "said"),
    [
        ("vms.web.count=1..4", 0, "4 keeps every expectation; the limit is beyond it"),
        ("vms.web.count=20..30", 1, "vms.web.count 20 breaks oom_kills == 0 and mem_free_min_bytes >= 6MiB"),
    ],
)
def test_a_limit_outside_the_range_is_told(vary: str, code: int, said: str, file: Path) -> None:
    result = call("solve", file, "--vary", vary, "--jobs", "1")

    assert (result.exit_code, said in result.stdout) == (code, True), result.stdout


def test_what_is_kept_again_further_on_is_told(file: Path) -> None:
    """Six guests leave the very figure that is forbidden."""
    Path("full.yaml").write_text(dump({**ASKED, "expect": ["mem_free_min_bytes != 40MiB", "oom_kills == 0"]}))
    arguments = ("solve", file, "--vary", "vms.web.count=1..20", "--jobs", "1")

    text = call(*arguments).stdout
    told = json.loads(call(*arguments, "--json").stdout)

    assert (told["answer"], told["broken"], told["binding"]) == (5, 6, ["mem_free_min_bytes != 40MiB"])
    assert told["kept_again"] == [11, 15]
    assert "11 and 15 keep every expectation again" in text


def test_every_replication_must_keep_it(file: Path) -> None:
    told = json.loads(
        call("solve", file, "--vary", "vms.web.count=13..16", "--set", "replications=2", "--jobs", "1", "--json").stdout
    )

    assert told["answer"] == FIT
    assert all(len(probe["results"]) == 2 for probe in told["probes"])


def test_the_cheapest_point_of_a_sweep_that_keeps_every_expectation(file: Path) -> None:
    hosts = [{"memory": "64MiB", "ksm": {"pages_to_scan": 1000}}]
    equal = [
        {"name": "web", "count": 4, "memory": "4MiB", "image": {"parts": [{"name": "a", "pool": "p", "size": "100%"}]}}
    ]
    sweep = {"hosts.0.ksm.pages_to_scan": [10, 500, 5000], "hosts.0.ksm.run": [0, 1]}
    Path("full.yaml").write_text(
        dump({**ASKED, "hosts": hosts, "vms": equal, "expect": ["saved_bytes >= 10MiB"], "sweep": sweep})
    )

    least = json.loads(call("solve", file, "--minimise", "cpu_overhead_percent", "--jobs", "1", "--json").stdout)
    most = call("solve", file, "--maximise", "cpu_overhead_percent", "--jobs", "1")
    none = call("solve", file, "--minimise", "oom_kills", "--set", "expect=[saved_bytes >= 1GiB]", "--jobs", "1")

    kept = {
        point["settings"]["hosts.0.ksm.pages_to_scan"]: point["value"] for point in least["points"] if point["kept"]
    }
    assert least["answer"]["hosts.0.ksm.pages_to_scan"] == min(kept, key=lambda scan: kept[scan])
    assert set(kept) < {10, 500, 5000}
    assert "6 values, all known already" in most.stdout
    assert (none.exit_code, "no point keeps every expectation" in none.stdout) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say either what to vary"),
        (["--vary", "a=1..2", "--minimise", "oom_kills"], "say either what to vary"),
        (["--minimise", "oom_kills", "--smallest"], "--smallest belongs to --vary"),
        (["--minimise", "oom_kils"], "did you mean oom_kills"),
        (["--minimise", "oom_kills"], "has nothing to search"),
        (["--vary", "vms.web.count"], "must be PATH=LOW..HIGH"),
        (["--vary", "vms.web.cuont=1..4"], "--vary vms.web.cuont=1"),
        (["--vary", "vms.web.count=1..4", "--set", "durtion=1s"], "--set durtion=1s"),
        (["--vary", "vms.web.count=5"], "must be a range"),
        (["--vary", "vms.web.coutn=1..5"], "did you mean count"),
        (["--vary", "vms.web.count=0..5"], "must be at least 1"),
        (["--vary", "vms.web.count=1..5", "--set", "expect=[]"], "expects nothing"),
    ],
)
def test_mistakes(arguments: list[str], said: str, file: Path) -> None:
    result = call("solve", file, *arguments)

    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


def test_a_run_that_fails_ends_the_search_with_its_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def simulate(scenario: Scenario) -> RunResult:
        raise MachineError("no room for it")

    monkeypatch.setattr(sweeps, "simulate", simulate)

    told = call("solve", file, "--vary", "vms.web.count=1..4", "--jobs", "1")

    assert told.exit_code == 4
    assert "vms.web.count=" in told.stderr
    assert "no room for it" in told.stderr
