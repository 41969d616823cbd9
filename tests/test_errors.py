"""Messages and exit codes of expected failures."""

from __future__ import annotations

import pickle

import pytest

from sim.errors import At, MachineError, OvercommitError, Problem, Several, UserError, nearest, suggestion

WHOLE = Problem(
    file="scenarios/x.yaml",
    line=9,
    path="hosts.0.memory",
    value="8",
    message="must be a size in bytes",
    remedy='write a unit, such as "16GiB"',
)


def test_a_problem_reads_as_place_path_message_value_remedy() -> None:
    assert str(WHOLE) == (
        'scenarios/x.yaml:9: hosts.0.memory: must be a size in bytes, got 8; write a unit, such as "16GiB"'
    )


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem(message="no such file"), "no such file"),
        (
            Problem(file="x.yaml", message="no such file", remedy="check the path"),
            "x.yaml: no such file; check the path",
        ),
        (Problem(line=9, message="a line without a file is not shown"), "a line without a file is not shown"),
    ],
)
def test_a_problem_leaves_out_what_is_not_known(problem: Problem, text: str) -> None:
    assert str(problem) == text


def test_a_user_error_shows_every_problem_on_its_own_line() -> None:
    error = UserError(WHOLE, "and a plain text")

    assert str(error) == f"{WHOLE}\nand a plain text"
    assert error.problems == (WHOLE, Problem(message="and a plain text"))


@pytest.mark.parametrize(("error", "code"), [(UserError("x"), 2), (OvercommitError("x"), 3), (MachineError("x"), 4)])
def test_each_kind_of_failure_has_its_exit_code(error: OvercommitError, code: int) -> None:
    assert error.exit_code == code


@pytest.mark.parametrize("error", [UserError(WHOLE, "x"), MachineError("no root"), At("a.b", "m", "r")])
def test_failures_travel_between_processes_unchanged(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))

    assert (type(again), str(again)) == (type(error), str(error))


def test_validators_failures_read_well_outside_a_document() -> None:
    assert str(Several(At("a.b", "is wrong", "fix it"), At("", "is odd"))) == "a.b: is wrong; fix it\nis odd"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("sleep_milisecs", "sleep_millisecs"),
        ("Sleep-Millisecs", "sleep_millisecs"),
        ("pages", None),
        ("", None),
    ],
)
def test_the_nearest_name_ignores_case_and_dashes(name: str, meant: str | None) -> None:
    assert nearest(name, ["run", "sleep_millisecs", "smart_scan"]) == meant


def test_a_suggestion_lists_the_known_names_when_none_is_near() -> None:
    assert suggestion("zzz", ["run", "smart_scan"]) == "known: run, smart_scan"


def test_a_suggestion_never_lists_more_than_a_dozen_names() -> None:
    assert suggestion("zzz", [f"n{i}" for i in range(40)]).endswith("n11 and 28 more")
