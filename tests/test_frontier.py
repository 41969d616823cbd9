"""The frontier between memory and CPU and the crossover: what they recommend, in words and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

import sim
from sim.report import crossover, frontier
from sim.report.words import listed, short_names
from sim.units import GIB

SCAN, SLEEP, THP = "hosts.0.ksm.pages_to_scan", "hosts.0.ksm.sleep_millisecs", "hosts.0.thp.enabled"
AXES = (SCAN, SLEEP, THP)


def points(*rows: tuple[float, float, str], **columns: Sequence[object]) -> pd.DataFrame:
    """Points by CPU, ratio and fault."""
    frame = pd.DataFrame(rows, columns=[frontier.COST, frontier.GAIN, "fault"])
    settings = {SCAN: range(len(rows)), SLEEP: 20, THP: "never", "mark": ""}
    return frame.assign(**{**settings, **columns})


figures = st.lists(
    st.tuples(st.floats(0, 50), st.floats(0.5, 20), st.sampled_from(["", "", "killed guests"])), min_size=1, max_size=30
)


# --- the front ---------------------------------------------------------------------------------------------------


@given(figures)
def test_no_point_of_the_front_is_beaten_and_every_other_is(rows: list[tuple[float, float, str]]) -> None:
    front = frontier.front(points(*rows))
    pairs = list(zip(front[frontier.COST], front[frontier.GAIN], strict=True))
    sound = [(cost, gain) for cost, gain, fault in rows if not fault]

    assert set(pairs) <= set(sound)
    assert not any(c <= cost and g >= gain and (c, g) != (cost, gain) for cost, gain in pairs for c, g in sound)
    assert all(any(c <= cost and g >= gain for c, g in pairs) for cost, gain in sound)
    assert pairs == sorted(set(pairs))


@given(figures)
def test_the_point_to_set_is_the_cheapest_that_is_near_the_best(rows: list[tuple[float, float, str]]) -> None:
    chosen = frontier.choice(points(*rows))
    sound = [(cost, gain) for cost, gain, fault in rows if not fault]

    if chosen is None:
        assert not sound
        return
    enough = 0.98 * max(gain for _, gain in sound)
    assert chosen["fault"] == ""
    assert chosen[frontier.GAIN] >= enough
    assert chosen[frontier.COST] == min(cost for cost, gain in sound if gain >= enough)


def test_a_point_that_kills_guests_never_wins() -> None:
    chosen = frontier.choice(points((0.1, 9.0, "killed guests"), (1.0, 3.0, "")))

    assert chosen is not None
    assert chosen[frontier.GAIN] == 3.0


# --- words -------------------------------------------------------------------------------------------------------


def test_the_conclusion_says_what_to_set_and_what_it_is_held_against() -> None:
    table = points(
        (0.1, 2.0, ""), (0.5, 6.9, ""), (2.0, 7.0, ""), (9.0, 8.0, "killed guests"),
        **{SCAN: [100, 1000, 5000, 9000], "mark": [frontier.DEFAULT, "", "", ""]},
    )  # fmt: skip

    text = frontier.conclusion(table, AXES)

    assert text == (
        "Set ksm.pages_to_scan 1000: a consolidation ratio of 6.9 for 0.5 % of the CPU. "
        "The best ratio there is, 1.4% more, takes 4.0 times the CPU. "
        "With the kernel's default instead: a consolidation ratio of 2 for 0.1 % of the CPU. "
        "Left out: 1 of 4 points (killed guests)."
    )


def test_a_default_with_other_large_pages_is_no_rival() -> None:
    table = points((0.1, 2.0, ""), (0.5, 7.0, ""), **{THP: ["never", "madvise"], "mark": [frontier.DEFAULT, ""]})

    assert "kernel's default" not in frontier.conclusion(table, AXES)


def test_nothing_is_recommended_when_every_point_kills_guests() -> None:
    text = frontier.conclusion(points((0.1, 2.0, "killed guests"), (0.5, 7.0, "killed guests")), AXES)

    assert text == "No point of this sweep can be recommended: 2 of 2 points (killed guests)."


@pytest.mark.parametrize(
    ("host", "mark"),
    [
        ({"ksm": {"run": 1, "pages_to_scan": 100, "sleep_millisecs": 20}}, frontier.DEFAULT),
        ({"ksm": {"run": 0}}, ""),
        ({"ksm": {"pages_to_scan": 1000}}, ""),
        ({"ksm": {"pages_to_scan": 100}, "ksmtuned": {}}, "ksmtuned"),
        ({"mom": {}}, "mom"),
    ],
)
def test_the_kernels_own_setting_and_tuners_are_known(host: Mapping[str, object], mark: str) -> None:
    scenario = sim.parse({"name": "a", "hosts": [{"memory": "1GiB", **host}], "vms": [{"name": "g", "memory": "1MiB"}]})

    assert frontier.mark_of(scenario) == mark


def test_words() -> None:
    assert [listed([]), listed(["a"]), listed(["a", "b", "c"])] == ["", "a", "a, b and c"]
    assert short_names(["hosts.0.ksm.run", "seed", "hosts.0"]) == ["ksm.run", "seed", "hosts.0"]
    assert short_names(["hosts.0.memory", "vms.0.memory"]) == ["hosts.0.memory", "vms.0.memory"]


# --- the picture -------------------------------------------------------------------------------------------------


def drawn(table: pd.DataFrame) -> list[str]:
    """The texts of the picture."""
    ax = frontier.draw(table, AXES, Figure().subplots())
    legend = ax.get_legend()
    assert legend
    return [text.get_text().replace("\n", " ") for text in (*ax.texts, *legend.get_texts())]


def test_the_picture_names_kinds_and_the_points_that_matter() -> None:
    table = points(
        (0.1, 2.0, ""), (0.5, 6.9, ""), (2.0, 7.0, ""), (9.0, 8.0, "killed guests"),
        **{SCAN: [100, 1000, 5000, 9000], THP: ["never", "never", "madvise", "madvise"],
           "mark": [frontier.DEFAULT, "", "", ""]},
    )  # fmt: skip

    assert drawn(table) == [
        "set ksm.pages_to_scan 1000 and thp.enabled never", "the kernel's default",
        "thp.enabled never", "thp.enabled madvise", "killed guests", "the best for their CPU",
    ]  # fmt: skip


def test_a_picture_without_a_point_to_set_has_the_others() -> None:
    assert drawn(points((0.0, 2.0, "killed guests"))) == ["killed guests", "the best for their CPU"]


# --- crossover ---------------------------------------------------------------------------------------------------


def ways(**curves: Sequence[float]) -> pd.DataFrame:
    """Slowdown of each way from 8 GiB of host memory down, one value per GiB; infinity kills guests."""
    rows = [(way, (8 - step) * GIB, value, "killed guests" if value == inf else "")
            for way, values in curves.items() for step, value in enumerate(values)]  # fmt: skip
    return pd.DataFrame(rows, columns=["way", "memory", "slowdown", "fault"])


def test_ways_cross_where_their_lines_do() -> None:
    [first, second] = crossover.reigns(ways(huge=[0, 0, 6], small=[2, 2, 2]))

    assert (first.way, second.way, second.most) == ("huge", "small", 6 * GIB + 2 / 3 * GIB)
    assert (second.least, first.most) == (6 * GIB, 8 * GIB)


def test_a_way_that_kills_guests_is_out_from_the_last_point_before() -> None:
    [_, second] = crossover.reigns(ways(huge=[0, 0, inf], small=[2, 2, 2]))

    assert (second.way, second.most) == ("small", 7 * GIB)


def test_ways_that_are_equal_do_not_take_turns() -> None:
    assert [reign.way for reign in crossover.reigns(ways(a=[2, 1, 1], b=[1, 1, 1]))] == ["b"]


curves = st.lists(st.floats(0, 100) | st.just(inf), min_size=4, max_size=4)


@given(curves, curves, curves)
def test_the_way_that_reigns_is_the_best_at_every_point(a: list[float], b: list[float], c: list[float]) -> None:
    table = ways(a=a, b=b, c=c)

    found = crossover.reigns(table)

    for memory, at in table.groupby("memory"):
        best = at["slowdown"].min()
        reigning = {each.way for each in found if each.least <= float(str(memory)) <= each.most}
        if best < inf and any(each.least <= float(str(memory)) for each in found):
            assert best in set(at.loc[at["way"].isin(reigning), "slowdown"])
    assert all(one.most >= one.least for one in found)


def test_the_crossover_in_words_and_in_a_picture() -> None:
    table = ways(huge=[0, 1, inf], small=[2, 2, 2.5])

    text = crossover.conclusion(table, 12 * GIB)
    ax = crossover.draw(table, 12 * GIB, Figure().subplots())

    assert text == (
        "With 8GiB of host memory, huge slows guests least; below 7GiB, when guests are promised 1.71 times as much, "
        "small does. Slowdown with 6GiB: huge killed guests and small 2.5 %."
    )
    assert crossover.conclusion(ways(huge=[0, 1, inf], small=[2, 2, inf]), 12 * GIB).startswith(
        "With 8GiB of host memory, huge slows guests least, and nothing beats it down to 7GiB. "
    )
    legend = ax.get_legend()
    assert legend
    assert [text.get_text() for text in (*ax.texts, *legend.get_texts())] == ["7GiB", "huge", "small", "guests killed"]
