"""Quantities as users write them, and back."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sim import units
from sim.errors import At
from sim.units import GIB, KIB, MIB, Block, Bytes, Duration, Rate, Share


class Sample(Block):
    """One field of each quantity."""

    size: Bytes = 5 * GIB
    """How large."""
    wait: Duration | None = None
    part: Share = 0.02
    often: Rate = 0.5
    count: int = 1
    on: bool = False
    level: float = 0.0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("64GiB", 64 * GIB),
        ("512MiB", 512 * MIB),
        ("4KiB", 4096),
        ("1.5GiB", 1536 * MIB),
        ("16GB", 16 * 10**9),
        ("16 GB", 16 * 10**9),
        (" 2TiB ", 2048 * GIB),
        ("7B", 7),
        ("0GiB", 0),
        (0, 0),
    ],
)
def test_sizes_are_read_exactly(text: object, count: int) -> None:
    assert units.parse_bytes(text) == count


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("20ms", 20_000_000),
        ("1.5s", 1_500_000_000),
        ("30min", 1800 * 10**9),
        ("1h", 3600 * 10**9),
        ("2d", 172_800 * 10**9),
        ("250us", 250_000),
        ("3ns", 3),
        (0, 0),
    ],
)
def test_durations_are_read_exactly(text: object, nanoseconds: int) -> None:
    assert units.parse_duration(text) == nanoseconds


@pytest.mark.parametrize(
    ("text", "per_second"),
    [("0.5/s", 0.5), ("30/min", 0.5), ("2/h", 2 / 3600), ("12/d", 12 / 86400), (0, 0.0)],
)
def test_rates_are_read_per_second(text: object, per_second: float) -> None:
    assert units.parse_rate(text) == per_second


@pytest.mark.parametrize(
    ("text", "share"), [("2%", 0.02), ("12.5%", 0.125), (0.02, 0.02), ("100%", 1.0), (0, 0.0), (1, 1.0)]
)
def test_shares_are_fractions_of_one(text: object, share: float) -> None:
    assert units.parse_share(text) == share


REFUSED: list[tuple[Callable[[object], object], object, str]] = [
    (units.parse_bytes, 64, 'must be a size in bytes with its unit; write a unit, such as "16GiB"'),
    (units.parse_bytes, 1.5, 'must be a size in bytes with its unit; write a unit, such as "16GiB"'),
    (units.parse_bytes, "64", 'must be a size in bytes; write a unit, such as "16GiB"'),
    (units.parse_bytes, "64G", 'must be a size in bytes; did you mean "64GiB" or "64GB"?'),
    (units.parse_bytes, "64 gib", 'must be a size in bytes; did you mean "64GiB"?'),
    (units.parse_bytes, "0xyz", "must be a size in bytes; known units: B, KiB, MiB, GiB, TiB, PiB, kB, MB, GB, TB"),
    (units.parse_bytes, "-1GiB", "must be a size in bytes, not negative"),
    (units.parse_bytes, "1_000B", 'must be a size in bytes; write a number with a unit such as "16GiB"'),
    (units.parse_bytes, "٣GiB", 'must be a size in bytes; write a number with a unit such as "16GiB"'),
    (units.parse_bytes, "", 'must be a size in bytes; write a number with a unit such as "16GiB"'),
    (units.parse_bytes, True, 'must be a size in bytes; write a number with a unit such as "16GiB"'),
    (units.parse_bytes, False, 'must be a size in bytes; write a number with a unit such as "16GiB"'),
    (units.parse_bytes, None, 'must be a size in bytes; write a number with a unit such as "16GiB"'),
    (units.parse_bytes, "0.3B", "must be a size in bytes that is a whole number of B; round it or use a smaller unit"),
    (units.parse_bytes, "8192PiB", "must be a size in bytes below 2^63 B; use a smaller number"),
    (units.parse_bytes, "9" * 400 + "TiB", "must be a size in bytes; write a number with a unit such as \"16GiB\""),
    (units.parse_duration, "5m", 'must be a duration; did you mean "5ms" or "5min"?'),
    (units.parse_duration, "5 minutes", 'must be a duration; did you mean "5min"?'),
    (units.parse_duration, "12:30", 'must be a duration; write a number with a unit such as "20ms"'),
    (units.parse_rate, "5", 'must be a rate; write a unit, such as "0.5/s"'),
    (units.parse_rate, "5/sec", 'must be a rate; did you mean "5/s"?'),
    (units.parse_rate, "9" * 400 + "/s", "must be a rate; write a number with a unit such as \"0.5/s\""),
    (units.parse_share, 2, 'must be a share between 0% and 100%; did you mean "2%"?'),
    (units.parse_share, "101%", "must be a share between 0% and 100%"),
    (units.parse_share, float("nan"), "must be a share between 0% and 100%"),
    (units.parse_duration, "1min 30s", 'must be a duration; write one number and one unit, such as "20ms"'),
    (units.parse_bytes, "8Mbit", "must be a size in bytes; known units: B, KiB, MiB, GiB, TiB, PiB, kB, MB, GB, TB"),
    (units.parse_rate, "1min", 'must be a rate; did you mean "1/min"?'),
    (units.parse_share, "0.5", 'must be a share such as "2%" or 0.02; add a percent sign'),
    (units.parse_share, True, 'must be a share; write a number with a unit such as "2%"'),
]  # fmt: skip


@pytest.mark.parametrize(("parse", "value", "message"), REFUSED)
def test_a_wrong_quantity_is_refused_with_a_remedy(
    parse: Callable[[object], object], value: object, message: str
) -> None:
    with pytest.raises(At) as caught:
        parse(value)

    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0B"),
        (4096, "4KiB"),
        (64 * GIB, "64GiB"),
        (1536 * MIB, "1536MiB"),
        (16 * 10**9, "16GB"),
        (10_000 * KIB, "10000KiB"),
        (1_000_000 * 4096, "4000000KiB"),
        (1_234_567, "1234567B"),
    ],
)
def test_sizes_are_written_in_the_unit_with_the_fewest_digits(count: int, text: str) -> None:
    assert units.format_bytes(count) == text


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(0, "0ns"), (20_000_000, "20ms"), (90 * 10**9, "90s"), (600 * 10**9, "10min"), (86_400 * 10**9, "1d")],
)
def test_durations_are_written_in_the_unit_with_the_fewest_digits(nanoseconds: int, text: str) -> None:
    assert units.format_duration(nanoseconds) == text


@given(st.integers(0, 2**63 - 1))
def test_every_size_reads_back_as_itself(count: int) -> None:
    assert units.parse_bytes(units.format_bytes(count)) == count


@given(st.integers(0, 2**63 - 1))
def test_every_duration_reads_back_as_itself(nanoseconds: int) -> None:
    assert units.parse_duration(units.format_duration(nanoseconds)) == nanoseconds


@given(st.floats(0, 1))
def test_every_share_reads_back_as_itself(share: float) -> None:
    assert units.parse_share(units.format_share(share)) == share


@given(
    st.floats(0, 1e15) | st.builds(lambda n, per: n / per, st.integers(0, 10**6), st.sampled_from([60, 3600, 86400]))
)
def test_every_rate_reads_back_as_itself(per_second: float) -> None:
    assert units.parse_rate(units.format_rate(per_second)) == per_second


def test_a_rate_written_per_hour_stays_readable() -> None:
    assert units.format_rate(units.parse_rate("2/h")) == "2/h"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0B"), (1023, "1023B"), (8.93 * GIB, "8.93GiB"), (-1.5 * GIB, "-1.5GiB"), (600 * MIB, "600MiB")],
)
def test_sizes_for_reading_have_three_digits(count: float, text: str) -> None:
    assert units.about_bytes(count) == text


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(5, "5ns"), (24_000_000, "24ms"), (90 * 10**9, "1.5min"), (5400 * 10**9, "1.5h")],
)
def test_durations_for_reading_have_three_digits(nanoseconds: float, text: str) -> None:
    assert units.about_duration(nanoseconds) == text


def test_a_block_is_written_as_users_write_it() -> None:
    block = Sample(size="16GB", wait="90s", part=0.125, often="2/h")

    assert block.model_dump(mode="json") == {
        "size": "16GB", "wait": "90s", "part": "12.5%", "often": "2/h", "count": 1, "on": False, "level": 0.0,
    }  # fmt: skip


@given(
    st.builds(
        Sample,
        size=st.integers(0, 2**63 - 1).map(units.format_bytes),
        wait=st.none() | st.integers(0, 2**63 - 1).map(units.format_duration),
        part=st.floats(0, 1),
        often=st.floats(0, 1e9).map(units.format_rate),
    )
)
def test_every_block_survives_being_written_and_read(block: Sample) -> None:
    assert Sample.model_validate_json(block.model_dump_json()) == block


@pytest.mark.parametrize(
    "fields",
    [
        {"count": "8"},
        {"count": True},
        {"count": 8.0},
        {"on": 1},
        {"on": "true"},
        {"level": True},
        {"level": "1"},
        {"kount": 1},
    ],
    ids=str,
)
def test_a_block_never_coerces_and_knows_no_other_keys(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Sample(**fields)


@pytest.mark.parametrize("level", [float("inf"), float("nan")])
def test_a_block_refuses_numbers_that_are_not_finite(level: float) -> None:
    with pytest.raises(ValidationError):
        Sample(level=level)


def test_a_block_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Sample().count = 3  # type: ignore[misc]


def test_the_schema_describes_what_users_write() -> None:
    properties = Sample.model_json_schema()["properties"]

    texts = {name: properties[name]["anyOf"][0] for name in ("size", "wait", "part", "often")}
    assert {name: text["type"] for name, text in texts.items()} == dict.fromkeys(texts, "string")
    for text in texts.values():
        assert all(re.fullmatch(text["pattern"], example) for example in text["examples"])
    assert properties["size"]["default"] == "5GiB"
    assert properties["size"]["description"] == "How large."
