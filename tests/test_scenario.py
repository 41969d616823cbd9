"""Reading scenarios: any text is either a scenario or the user's mistake, and what is written out reads back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sim.document import dump, read
from sim.errors import UserError
from sim.scenario import Scenario, load, parse, schema
from sim.units import MINUTE

ROOT = Path(__file__).parents[1]
BUNDLED = sorted((ROOT / "scenarios").rglob("*.yaml"))
BAD = Path(__file__).parent / "bad"

EVERYTHING: dict[str, Any] = {
    "name": "everything",
    "description": "Every block of the language at once.",
    "duration": "2min",
    "seed": 7,
    "sample_every": "500ms",
    "hosts": [
        {
            "name": "rack",
            "count": 2,
            "memory": "4GiB",
            "cores": 16,
            "kernel": "6.18",
            "hz": 1000,
            "numa_nodes": 2,
            "ksm": {"pages_to_scan": 500, "changes": [{"at": "30s", "run": 2}, {"at": "40s", "run": 1}]},
            "ksmtuned": {"npages_max": 2000, "monitor_interval": "20s"},
        },
        {"name": "edge", "memory": "1GiB", "ksm": {"advisor_mode": "scan-time"}, "mom": {"sample_history": 3}},
    ],
    "vms": [
        {
            "name": "web",
            "count": 3,
            "memory": "64MiB",
            "image": {
                "parts": [
                    {"name": "system", "pool": "debian", "size": "30%", "run": "64KiB"},
                    {"name": "cache", "duplicates": 3, "size": "8MiB"},
                    {"name": "empty", "zero": True, "size": "10%"},
                    {"name": "later", "untouched": True, "size": "10%"},
                    {
                        "name": "data",
                        "size": "20%",
                        "writes": {"rate": "30/min", "hot": "10%", "hot_writes": "90%", "leaves": "debian"},
                    },
                ]
            },
            "start": "1s",
            "every": "2s",
            "stop": "1min",
            "lifetime": "50s",
            "host": "rack",
            "numa_node": 1,
            "differs_at": "64B",
            "activity": {"every": "10s", "levels": [1, 0.5, 0], "repeat": False},
            "bursts": [{"part": "later", "at": "5s", "every": "10s", "share": "50%", "leaves": "zero"}],
            "madvise": [{"at": "20s", "advice": "unmergeable", "part": "cache"}],
        },
        {"name": "child", "memory": "64MiB", "fork_of": "web", "start": "10s", "mergeable": False, "host": "rack"},
        {"name": "real", "memory": "1MiB", "image": {"captured": "guest.npz", "diverge": "20%", "data_set": "lab"}},
    ],
    "expect": ["consolidation_ratio >= 1.2", "cpu_overhead_percent < 5%", "mem_used_bytes <= 3GiB", "oom_kills == 0"],
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenarios")
    np.savez(folder / "guest.npz", content=np.arange(200, dtype=np.uint32).reshape(2, 100), time_s=np.array([0.0, 9.0]))
    return folder


def places(data: object, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every value in plain data, blocks and lists included."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


def changed(data: dict[str, Any], place: tuple[str | int, ...], value: object) -> dict[str, Any]:
    """Return a copy with one value replaced, or taken away for `...`."""
    data = copy.deepcopy(data)
    parent: Any = data
    for key in place[:-1]:
        parent = parent[key]
    if value is ...:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    return data


WORDS = st.sampled_from(
    ["", "on", "12:30", "010", "1e3", "-1", "0", "5%", "101%", "1GiB", "3kB", "10min", "1ns", "30/min", "none", "web",
     "child", "rack-1", "6.8", "2.6.32", "unique", "zero", "guest.npz", "oom_kills == 0", "scan-time", "99999999999d",
     "\0", "é" * 200]
)  # fmt: skip
SCALARS = WORDS | st.none() | st.booleans() | st.integers(-5, 300) | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | WORDS, inner, max_size=3),
    max_leaves=5,
)
PLACES = list(places(EVERYTHING))


def outcome(data: dict[str, Any], folder: Path) -> Scenario | None:
    """Return the scenario, or None when it is refused with at least one message."""
    try:
        return parse(data, folder)
    except UserError as error:
        assert all(problem.message for problem in error.problems)
        return None


def reread(scenario: Scenario, folder: Path) -> Scenario:
    """Write the resolved scenario out as YAML, next to the files that it names, and load that."""
    file = folder / "resolved.yaml"
    file.write_text(dump(scenario.resolved()), encoding="utf-8")
    return load(file)


def test_every_block_of_the_language_can_be_used_at_once(folder: Path) -> None:
    scenario = parse(EVERYTHING, folder)

    assert scenario.duration == 2 * MINUTE
    assert [host.name for host in scenario.hosts] == ["rack", "edge"]


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(place=st.sampled_from(PLACES), value=VALUES | st.just(...), second=st.sampled_from(PLACES), other=SCALARS)
def test_any_change_to_a_scenario_gives_a_scenario_or_the_users_mistake(
    place: tuple[str | int, ...], value: object, second: tuple[str | int, ...], other: object, folder: Path
) -> None:
    data = changed(EVERYTHING, place, value)
    if second in set(places(data)):
        data = changed(data, second, other)

    scenario = outcome(data, folder)

    if scenario is not None:
        assert reread(scenario, folder) == scenario


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_a_key_that_nobody_knows_is_refused_wherever_it_stands(place: tuple[str | int, ...], folder: Path) -> None:
    parent: Any = EVERYTHING
    for key in place[:-1]:
        parent = parent[key]
    if not isinstance(parent, dict):
        return
    data = changed(EVERYTHING, (*place[:-1], "zzzzzz"), 1)

    with pytest.raises(UserError) as caught:
        parse(data, folder)

    assert [problem.message for problem in caught.value.problems] == ["unknown key"]


STEPS = st.sampled_from(["hosts", "0", "-1", "9" * 5000, "vms", "web", "ksm", "", "é", "\N{ARABIC-INDIC DIGIT THREE}"])
PATHS = st.sampled_from([".".join(map(str, place)) for place in PLACES]) | st.lists(STEPS, max_size=4).map(".".join)
FLOWS = st.sampled_from(["[", "{a: 1", "{}", "[1, 2]", "*a", "&a [*a]", "!!int x", "'", "{ksm: {run: 0}}", "..."])
ASSIGNMENTS = st.builds("{}={}".format, PATHS, WORDS | FLOWS | st.text(max_size=6)) | st.text(max_size=12)


@settings(deadline=None, max_examples=400)
@given(assignments=st.lists(ASSIGNMENTS, max_size=3))
def test_any_override_gives_a_scenario_or_the_users_mistake(assignments: list[str], folder: Path) -> None:
    file = folder / "everything.yaml"
    file.write_text(dump(EVERYTHING), encoding="utf-8")

    try:
        load(file, assignments)
    except UserError as error:
        assert all(problem.message for problem in error.problems)


@settings(deadline=None, max_examples=300)
@given(raw=st.binary(max_size=60) | (st.text(max_size=60) | st.lists(WORDS, max_size=9).map(" ".join)).map(str.encode))
def test_no_file_can_crash_the_reader(raw: bytes, folder: Path) -> None:
    file = folder / "any.yaml"
    file.write_bytes(raw)

    with pytest.raises(UserError):
        load(file)


@pytest.mark.parametrize("value", [object(), {1, 2}, np.int64(3), b"x"])
def test_data_that_no_file_could_hold_is_refused_in_one_line(value: object) -> None:
    with pytest.raises(UserError, match="holds more than text, numbers"):
        parse({"name": "x", "hosts": value})


@pytest.mark.parametrize("file", BUNDLED, ids=lambda file: file.stem)
def test_a_bundled_scenario_written_out_in_full_reads_back_as_itself(file: Path) -> None:
    scenario = load(file)

    assert parse(scenario.resolved(), file.parent) == scenario


def test_a_scenario_written_out_in_full_reads_back_as_itself(folder: Path) -> None:
    scenario = parse(EVERYTHING, folder)

    assert reread(scenario, folder) == scenario
    assert reread(scenario, folder).digest("1") == scenario.digest("1")


@pytest.mark.parametrize(
    "change",
    [("seed", 8), ("duration", "3min"), ("description", "another question"), ("sample_every", "1s")],
)
def test_the_digest_follows_every_value(change: tuple[str, object], folder: Path) -> None:
    key, value = change

    assert parse({**EVERYTHING, key: value}, folder).digest("1") != parse(EVERYTHING, folder).digest("1")


def test_the_digest_follows_the_captured_image(tmp_path: Path) -> None:
    vm = {"name": "real", "memory": "1MiB", "image": {"captured": "guest.npz"}}
    digests = []
    for highest in (100, 101):
        content = np.arange(highest - 100, highest, dtype=np.uint32).reshape(1, 100)
        np.savez(tmp_path / "guest.npz", content=content, time_s=np.zeros(1))
        digests.append(parse({"name": "x", "hosts": [{"memory": "1GiB"}], "vms": [vm]}, tmp_path).digest("1"))

    assert digests[0] != digests[1]


VALIDATOR = jsonschema.Draft202012Validator(schema())


@pytest.mark.parametrize("file", BUNDLED, ids=lambda file: file.stem)
def test_the_schema_accepts_every_bundled_scenario(file: Path) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(read(file).data)] == []


def test_the_schema_accepts_every_block_of_the_language_and_its_resolved_form(folder: Path) -> None:
    resolved = parse(EVERYTHING, folder).resolved()

    assert [error.message for data in (EVERYTHING, resolved) for error in VALIDATOR.iter_errors(data)] == []


@pytest.mark.parametrize(
    "name",
    ["key-ksm-near", "key-missing-memory", "type-text-for-count", "unit-missing-memory", "unit-minutes",
     "value-count-zero", "value-advisor-mode", "name-with-space", "expect-operator", "surprise-on",
     "captured-and-parts"],
)  # fmt: skip
def test_the_schema_refuses_what_an_editor_can_see(name: str) -> None:
    assert not VALIDATOR.is_valid(read(BAD / f"{name}.yaml").data)
