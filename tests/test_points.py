"""Axes of several paths that change together: zip, list and Latin hypercube; and ranges."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sim
from sim.errors import At, UserError
from sim.scenario.ranges import Range

SCAN, COUNT, MEMORY = "hosts.0.ksm.pages_to_scan", "vms.web.count", "hosts.0.memory"
BASE: dict[str, Any] = {
    "name": "small",
    "hosts": [{"memory": "256MiB", "ksm": {"pages_to_scan": 2000}}],
    "vms": [{"name": "web", "count": 2, "memory": "16MiB"}],
}


def told(sweep: object, **changes: object) -> list[tuple[Any, ...]]:
    """Settings of each point, and what its scenario has there."""
    points = sim.parse({**BASE, **changes, "sweep": sweep}).points
    for point in points:
        host, vm = point.scenario.hosts[0], point.scenario.vms[0]
        assert host.ksm is not None
        has = {SCAN: host.ksm.pages_to_scan, COUNT: vm.count, "seed": point.scenario.seed}
        assert {name: has[name] for name in point.settings if name in has} == {
            name: value for name, value in point.settings.items() if name in has
        }
    return [tuple(point.settings.values()) for point in points]


def test_zip_changes_its_paths_together_and_is_one_axis_of_the_product() -> None:
    assert told({"zip": {SCAN: [1, 2], COUNT: [3, 4]}, "seed": [7, 8]}) == [(1, 3, 7), (1, 3, 8), (2, 4, 7), (2, 4, 8)]


def test_a_list_is_the_points_themselves() -> None:
    assert told({"list": [{SCAN: 1}, {COUNT: 4}, {}, {SCAN: 5, COUNT: 6}]}) == [(1, 2), (2000, 4), (2000, 2), (5, 6)]


def test_blocks_may_be_of_different_kinds() -> None:
    assert told([{"zip": {SCAN: [1], COUNT: [3]}}, {"list": [{COUNT: 9}]}, {"seed": [4]}]) == [
        (1, 3, 1), (2000, 9, 1), (2000, 2, 4),
    ]  # fmt: skip


@given(st.integers(2, 40), st.integers(0, 99))
@settings(max_examples=25)
def test_each_part_of_each_range_has_one_point_of_a_latin_hypercube(count: int, seed: int) -> None:
    asked = {"latin_hypercube": {"points": count, SCAN: f"0..{count * 5 - 1}", COUNT: f"1..{count}"}}

    found = told(asked, seed=seed)

    assert sorted(scan // 5 for scan, _ in found) == list(range(count))
    assert sorted(number for _, number in found) == list(range(1, count + 1))
    assert found == told(asked, seed=seed)


def test_another_path_of_a_latin_hypercube_changes_no_value_of_the_others() -> None:
    few = told({"latin_hypercube": {"points": 9, SCAN: "1..1000"}})
    more = told({"latin_hypercube": {"points": 9, COUNT: "1..50", SCAN: "1..1000", MEMORY: "256MiB..1024MiB"}})

    assert [scan for _, scan, _ in more] == [scan for (scan,) in few]
    assert all(memory.endswith("MiB") for _, _, memory in more)


def test_another_seed_gives_another_latin_hypercube() -> None:
    asked = {"latin_hypercube": {"points": 9, SCAN: "1..1000"}}

    assert told(asked, seed=1) != told(asked, seed=2)


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"zip": {SCAN: [1, 2], COUNT: [3]}}, "has 1 values, the first list 2"),
        ({"zip": [1]}, "must be paths, each with a list"),
        ({"zip": {SCAN: 5}}, "must be paths, each with a list"),
        ({"zip": {"hosts.0.kms.run": [1]}}, "kms"),
        ({"zip": {SCAN: [1], COUNT: [3]}, SCAN: [4]}, "means the same as"),
        ({"zip": {SCAN: [1, -2], COUNT: [3, 4]}}, "must be at least 0, got -2"),
        ({"list": {SCAN: 1}}, "must be a list of blocks"),
        ({"list": []}, "must be a list of blocks"),
        ({"list": [5]}, "must be a block of paths"),
        ({"list": [{SCAN: 1}, {SCAN: 1}]}, "is in this list already"),
        ({"latin_hypercube": {SCAN: "1..4"}}, "must be how many points"),
        ({"latin_hypercube": {"points": True, SCAN: "1..4"}}, "must be how many points"),
        ({"latin_hypercube": {"points": 5}}, "must be paths with ranges"),
        ({"latin_hypercube": [5]}, "must be paths with ranges"),
        ({"latin_hypercube": {"points": 5, SCAN: "4..1"}}, "from a lower to a higher"),
        ({"latin_hypercube": {"points": 5, SCAN: 7}}, "must be a range"),
        ({"latin_hypercube": {"points": 6000, SCAN: "1..4"}, COUNT: [1, 2]}, "more than 10,000 points"),
        ({"latin_hypercube": {"points": 5, "replications": "1..4"}}, "is the same in all points"),
    ],
)
def test_mistakes(sweep: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        sim.parse({**BASE, "sweep": sweep})

    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("text", "first", "second", "last", "steps"),
    [
        ("1..64", 1, 2, 64, 63),
        ("1GiB..8GiB", "1GiB", "2GiB", "8GiB", 7),
        ("1GiB..8GiB..0.5GiB", "1.0GiB", "1.5GiB", "8.0GiB", 14),
        ("20ms .. 500ms .. 100ms", "20ms", "120ms", "420ms", 4),
        ("0.5..0.75", 0.5, 0.51, 0.75, 25),
        ("10%..90%", "10%", "11%", "90%", 80),
        ("-2..2", -2, -1, 2, 4),
    ],
)
def test_a_range_steps_in_its_last_digit_or_as_written(
    text: str, first: Any, second: Any, last: Any, steps: int
) -> None:
    found = Range.parse(text)

    assert (found.value(0), found.value(1), found.value(found.last), found.last) == (first, second, last, steps)


@pytest.mark.parametrize(
    "text", ["", "5", "1..", "..5", "1..2..3..4", "5..5", "9..1", "1GiB..8MiB", "1..5..9", "1..5..0", "a..b", 7]
)
def test_what_is_no_range_is_refused(text: object) -> None:
    with pytest.raises(At):
        Range.parse(text)


@given(st.integers(-1000, 1000), st.integers(1, 1000), st.integers(0, 3))
def test_all_values_of_a_range_are_inside(low: int, size: int, places: int) -> None:
    ends = [Decimal(low).scaleb(-places), Decimal(low + size).scaleb(-places)]

    found = Range.parse(f"{ends[0]:f}..{ends[1]:f}")

    values = [found.value(number) for number in range(found.last + 1)]
    assert (values[0], values[-1]) == (float(ends[0]), float(ends[1]))
    assert values == sorted(set(values))  # type: ignore[type-var]
