import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from sim.columns import METRICS
from sim.errors import At
from sim.scenario.expect import Expectation, ExpectationText, Verdict
from sim.units import GIB


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("consolidation_ratio >= 1.6", 1.6),
        ("pswpin == 0", 0),
        ("pages_sharing>=1e3", 1000.0),
        ("saved_bytes > 4GiB", 4 * GIB),
        ("saved_bytes > 4096", 4096),
        ("general_profit >= -1KiB", -1024),
        ("scan_time_s <= 45", 45),
        ("scan_time_s <= 1.5min", 90.0),
        ("cpu_overhead_percent < 5%", 5),
        ("cpu_overhead_percent < 2.5 %", 2.5),
        ("cpu_overhead_percent < 5", 5),
    ],
)
def test_a_value_is_read_in_the_unit_of_its_metric(text, bound):
    assert Expectation.parse(text).bound == bound


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("consolidation_ration >= 2", "did you mean consolidation_ratio"),
        ("oom_kills", "must be a metric, a comparison"),
        ("oom_kills = 0", "must be a metric, a comparison"),
        ("oom_kills => 0", "must be a metric, a comparison"),
        ("", "must be a metric, a comparison"),
        (5, "must be a metric, a comparison"),
        ("consolidation_ratio >= 160%", "without a unit"),
        ("pages_sharing >= 4GiB", "without a unit"),
        ("oom_kills == nan", "without a unit"),
        ("cpu_overhead_percent < 5s", "is a percentage"),
        ("saved_bytes > 4G", "4GiB"),
        ("scan_time_s < 4x", "known units"),
        ("scan_time_s < --4", "must be a duration"),
    ],
)
def test_a_wrong_expectation_says_what_is_wrong_and_what_to_write(text, message):
    with pytest.raises(At) as raised:
        Expectation.parse(text)

    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("op", "actual", "met", "margin"),
    [
        (">=", 10, True, 0),
        (">", 10, False, 0),
        (">", 12, True, 2),
        ("<=", 10, True, 0),
        ("<", 10, False, 0),
        ("<", 7, True, 3),
        ("<", 12, False, -2),
        ("==", 10, True, 0),
        ("==", 13, False, -3),
        ("!=", 13, True, 3),
        ("!=", 10, False, 0),
    ],
)
def test_the_margin_is_the_distance_on_the_right_side_of_the_bound(op, actual, met, margin):
    verdict = Expectation.parse(f"oom_kills {op} 10").check({"oom_kills": actual})

    assert verdict == Verdict(f"oom_kills {op} 10", actual, met, margin)


@pytest.mark.parametrize("summary", [{}, {"scan_time_s": None}, {"scan_time_s": float("nan")}])
@pytest.mark.parametrize("op", ["<", "!="])
def test_a_metric_without_data_is_not_met(summary, op):
    verdict = Expectation.parse(f"scan_time_s {op} 9").check(summary)

    assert verdict == Verdict(f"scan_time_s {op} 9", None, met=False, margin=None)


@given(st.sampled_from(METRICS), st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_exactly_one_of_less_equal_and_greater_is_met(metric, bound, actual):
    verdicts = [
        Expectation.parse(f"{metric.name} {op} {bound}").check({metric.name: actual}) for op in ("<", "==", ">")
    ]

    assert sum(verdict.met for verdict in verdicts) == 1


def test_an_expectation_in_a_scenario_is_written_back_as_it_was_read():
    lines = TypeAdapter(tuple[ExpectationText, ...])
    parsed = lines.validate_json(json.dumps(["saved_bytes  >=  4GiB", "pswpin==0"]))

    assert lines.dump_python(parsed, mode="json") == ["saved_bytes >= 4GiB", "pswpin == 0"]


def test_an_editor_sees_an_expectation_as_text():
    assert TypeAdapter(ExpectationText).json_schema()["type"] == "string"
