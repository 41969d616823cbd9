"""The points of a sweep: the scenario as it would be written with one value of each axis set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

from pydantic import BaseModel, JsonValue

from sim.document import Document, Keys, in_order
from sim.errors import Problem, UserError

MOST_POINTS: Final = 10_000
_SWEEP: Final = "sweep"
DERIVED: Final = (_SWEEP, "published")
"""What makes further runs of a scenario; those runs do not have it."""
FIXED: Final = (*DERIVED, "name")
"""What all points have in common: they are one study, in one folder."""

Axes: TypeAlias = dict[str, tuple[JsonValue, ...]]
"""Paths, as in `--set`, and the values that each takes."""
Model = TypeVar("Model", bound=BaseModel)


class Axis(NamedTuple):
    """A path that takes several values."""

    path: str
    keys: Keys
    """What the path means in the document."""
    written: Keys
    """Where the values stand in the document."""
    size: int


class Point(NamedTuple, Generic[Model]):
    """One point of a sweep."""

    settings: Mapping[str, Any]
    """What stands at the path of every axis of the sweep: as written, or the default."""
    scenario: Model


Choice: TypeAlias = Mapping[Axis, int]
"""The number of the value that each axis has at a point."""


def products(sweep: Axes | Sequence[Axes]) -> Sequence[tuple[Keys, Axes]]:
    """The full products that a sweep is made of, each with its keys in the document."""
    if isinstance(sweep, Mapping):
        return [((_SWEEP,), sweep)] if sweep else []
    return [((_SWEEP, number), axes) for number, axes in enumerate(sweep)]


def expand(
    document: Document, sweep: Axes | Sequence[Axes], model: type[Model], **context: object
) -> list[Point[Model]]:
    """Return every point of the sweep, its scenario being of type `model`, in order, the last axis changing fastest.

    Raises UserError with every mistake in any point.
    """
    problems: list[Problem] = []
    crosses = [_axes(document, written, axes, problems) for written, axes in products(sweep)]
    if sum(prod(axis.size for axis in axes) for axes in crosses) > MOST_POINTS:
        too_many = f"makes more than {MOST_POINTS:,} points"
        raise UserError(document.problem(_SWEEP, too_many, "give fewer values", show_value=False))
    choices = [choice for axes in crosses for choice in _choices(axes)]
    paths = {axis.path: axis.keys for axes in crosses for axis in axes}
    found: list[Point[Model]] = []
    faulty: dict[Problem, list[Choice]] = defaultdict(list)
    for choice in choices:
        written = _written(document, choice)
        try:
            found.append(_point(written, written.check(model, **context), paths))
        except UserError as error:
            for problem in error.problems:
                faulty[problem].append(choice)
    problems += [_explained(document, each, where, choices) for each, where in faulty.items()]
    if problems:
        raise UserError(*in_order(problems))
    return found


def _axes(document: Document, written: Keys, axes: Axes, problems: list[Problem]) -> list[Axis]:
    """The axes of one product that make sense; what is wrong with the others goes to *problems*."""
    found: list[Axis] = []
    for path, values in axes.items():
        at = (*written, path)
        faults = [*_list_faults(document, at, values), *_path_faults(document, at, path, found)]
        if not faults:
            found.append(Axis(path, document.keys_of(path), at, len(values)))
        problems += faults
    return found


def _path_faults(document: Document, at: Keys, path: str, before: Sequence[Axis]) -> Iterator[Problem]:
    try:
        keys = document.keys_of(path)
    except UserError as error:
        place = document.problem(at, "")
        yield from (replace(each, file=place.file, line=place.line) for each in error.problems)
    else:
        for axis in before:
            if axis.keys == keys:
                yield document.problem(at, f"means the same as {axis.path}", "remove one of them", show_value=False)


def _list_faults(document: Document, at: Keys, values: Sequence[JsonValue]) -> Iterator[Problem]:
    """What is wrong with an axis, whatever its path means."""
    if str(at[-1]).split(".")[0] in FIXED:
        yield document.problem(at, "is the same in all points", "sweep something else", show_value=False)
    if not values:
        yield document.problem(at, "has no values", "write at least one", show_value=False)
    for number, value in enumerate(values):
        if any(value == other and type(value) is type(other) for other in values[:number]):
            yield document.problem((*at, number), "is in this list already", "remove one of them")


def _choices(axes: Sequence[Axis]) -> Iterator[Choice]:
    for numbers in product(*(range(axis.size) for axis in axes)):
        yield dict(zip(axes, numbers, strict=True))


def _written(document: Document, choice: Choice) -> Document:
    """The document of one point. Outer paths come first: an axis may change a part of a block that another one sets."""
    point = document
    for axis in sorted(choice, key=lambda axis: len(axis.keys)):
        point = point.copied((*axis.written, choice[axis]), axis.keys)
    return point.without(*DERIVED)


def _point(document: Document, scenario: Model, paths: Mapping[str, Keys]) -> Point[Model]:
    defaults = Document(document.source, scenario.model_dump(mode="json"))
    settings = {path: document.at(keys, defaults.at(keys)) for path, keys in paths.items()}
    return Point(settings, scenario)


def _explained(document: Document, problem: Problem, where: Sequence[Choice], choices: Sequence[Choice]) -> Problem:
    """The problem, with those values of other axes that bring it about."""
    axes = dict.fromkeys(axis for choice in where for axis in choice)
    brought = []
    for axis in axes:
        values, all_values = ({choice[axis] for choice in some if axis in choice} for some in (where, choices))
        if values != all_values and not problem.path.startswith(".".join(map(str, axis.keys))):
            shown = (document.problem((*axis.written, number), "").value for number in sorted(values))
            brought.append(f"{axis.path} is {' or '.join(shown)}")
    return replace(problem, message=f"{problem.message} (when {' and '.join(brought)})") if brought else problem
