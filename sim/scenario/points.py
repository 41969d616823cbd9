"""The points of a sweep: the scenario as it would be written with one value of each axis set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

from pydantic import BaseModel, JsonValue

from sim.columns import METRICS
from sim.document import Document, Keys, in_order
from sim.errors import Problem, UserError

MOST_POINTS: Final = 10_000
UNCHANGED: Final = "as written"
"""What stands for an axis of alternatives at a point that takes none of them."""
_SWEEP: Final = "sweep"
DERIVED: Final = (_SWEEP, "published", "replications")
"""What makes further runs of a scenario; those runs do not have it."""
FIXED: Final = (*DERIVED, "name")
"""What all points have in common: they are one study, in one folder."""
_TAKEN: Final = frozenset({"digest", "error", "met", *(metric.name for metric in METRICS)})
"""Columns that the table of all points has beside its axes."""

Axes: TypeAlias = dict[str, tuple[JsonValue, ...] | dict[str, JsonValue]]
"""Paths, as in `--set`, and the values that each takes; or an axis by a name of its own, and its alternatives by
theirs: each the paths that it sets."""
Model = TypeVar("Model", bound=BaseModel)


class Setting(NamedTuple):
    """A value of the document that goes to a path."""

    written: Keys
    """Where the value stands."""
    keys: Keys
    """What the path means."""


class Value(NamedTuple):
    """One value of an axis: what it sets."""

    written: Keys
    """Where it stands in the document."""
    settings: tuple[Setting, ...]


class Axis(NamedTuple):
    """What a sweep varies: a path, or alternatives by name."""

    name: str
    """The path, or the name that the scenario gives it."""
    values: tuple[Value, ...]
    is_path: bool

    def paths(self) -> Mapping[Keys, Keys]:
        """What it sets, each with its place in the document."""
        settings = (setting for value in self.values for setting in value.settings)
        return {setting.keys: setting.written[: -1 if self.is_path else None] for setting in settings}


class Point(NamedTuple, Generic[Model]):
    """One point of a sweep."""

    settings: Mapping[str, Any]
    """What each axis of the sweep has: what is written at its path, or the default; or an alternative's name."""
    scenario: Model


Choice: TypeAlias = Mapping[Axis, Value]
"""The value that each axis has at a point."""


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
    reader = _Reader(document, model)
    crosses = [reader.axes(written, block) for written, block in products(sweep)]
    problems = reader.problems
    if sum(prod(len(axis.values) for axis in cross) for cross in crosses) > MOST_POINTS:
        too_many = f"makes more than {MOST_POINTS:,} points"
        raise UserError(document.problem(_SWEEP, too_many, "give fewer values", show_value=False))
    choices = [choice for cross in crosses for choice in _choices(cross)]
    axes = list({axis.name: axis for cross in crosses for axis in cross}.values())
    found: list[Point[Model]] = []
    faulty: dict[Problem, list[Choice]] = defaultdict(list)
    for choice in choices:
        written = _written(document, choice)
        try:
            found.append(_point(written, written.check(model, **context), choice, axes))
        except UserError as error:
            for problem in error.problems:
                faulty[problem].append(choice)
    problems += [_explained(document, each, where, choices) for each, where in faulty.items()]
    if problems:
        raise UserError(*in_order(problems))
    return found


# --- what the document says --------------------------------------------------------------------------------------


class _Reader:
    """Reads the axes of a sweep; what is wrong with them goes to `problems`."""

    def __init__(self, document: Document, model: type[BaseModel]) -> None:
        self.document = document
        self.top = model.model_fields.keys()
        self.problems: list[Problem] = []

    def axes(self, written: Keys, axes: Axes) -> list[Axis]:
        """The axes of one product that make sense."""
        found: list[Axis] = []
        for name, values in axes.items():
            at, faults = (*written, name), len(self.problems)
            self._count(at, list(values.items()) if isinstance(values, Mapping) else list(enumerate(values)))
            if isinstance(values, Mapping):
                self._name(at)
                axis = Axis(name, tuple(self._alternative((*at, each)) for each in values), is_path=False)
            else:
                keys = self._keys_of(at)
                given = (Value((*at, each), (Setting((*at, each), keys),)) for each in range(len(values)))
                axis = Axis(name, tuple(given), is_path=True)
            if len(self.problems) == faults:
                self._clash(axis, found)
            if len(self.problems) == faults:
                found.append(axis)
        return found

    def _note(self, at: Keys, message: str, remedy: str, *, show_value: bool = False) -> None:
        self.problems.append(self.document.problem(at, message, remedy, show_value=show_value))

    def _count(self, at: Keys, values: Sequence[tuple[str | int, JsonValue]]) -> None:
        """Note an axis without values, and values that stand there already."""
        if not values:
            self._note(at, "has no values", "write at least one")
        for number, (key, value) in enumerate(values):
            same = [name for name, other in values[:number] if value == other and type(value) is type(other)]
            if same:
                message = f"sets the same as {same[0]}" if isinstance(key, str) else "is in this list already"
                self._note((*at, key), message, "remove one of them", show_value=not isinstance(key, str))

    def _name(self, at: Keys) -> None:
        """Note an axis of alternatives whose name means something else."""
        name = str(at[-1])
        if "." in name or name in self.top:
            remedy = "write a list of values, or give the alternatives a name of their own"
            self._note(at, "is a path, which takes a list", remedy)
        elif name in _TAKEN:
            self._note(at, "is a column of the table of all points already", "choose another name")

    def _alternative(self, at: Keys) -> Value:
        settings = self.document.at(at)
        if not isinstance(settings, Mapping):
            remedy = "write {} for the scenario as it stands, or {path: value}"
            self._note(at, "must be a block of paths and their values", remedy, show_value=True)
            return Value(at, ())
        found: list[Setting] = []
        for path in settings:
            keys = self._keys_of((*at, path))
            same = [other.written[-1] for other in found if keys and other.keys == keys]
            if same:
                self._note((*at, path), f"means the same as {same[0]}", "remove one of them")
            found.append(Setting((*at, path), keys))
        return Value(at, tuple(found))

    def _keys_of(self, at: Keys) -> Keys:
        """What the path that stands last in *at* means; nothing if there is no such path."""
        path = str(at[-1])
        if path.split(".", maxsplit=1)[0] in FIXED:
            self._note(at, "is the same in all points", "sweep something else")
        try:
            return self.document.keys_of(path)
        except UserError as error:
            place = self.document.problem(at, "")
            self.problems += [replace(each, file=place.file, line=place.line) for each in error.problems]
            return ()

    def _clash(self, axis: Axis, before: Sequence[Axis]) -> None:
        """Note what this axis and one before it both set."""
        taken = {keys: path for other in before for keys, path in other.paths().items()}
        for keys, at in axis.paths().items():
            if keys in taken:
                self._note(at, f"means the same as {taken[keys][-1]}", "remove one of them")


# --- points ------------------------------------------------------------------------------------------------------


def _choices(axes: Sequence[Axis]) -> Iterator[Choice]:
    for values in product(*(axis.values for axis in axes)):
        yield dict(zip(axes, values, strict=True))


def _written(document: Document, choice: Choice) -> Document:
    """The document of one point. Outer paths come first: an axis may change a part of a block that another one sets."""
    point = document
    settings = [setting for value in choice.values() for setting in value.settings]
    for setting in sorted(settings, key=lambda each: len(each.keys)):
        point = point.copied(setting.written, setting.keys)
    return point.without(*DERIVED)


def _point(document: Document, scenario: Model, choice: Choice, axes: Sequence[Axis]) -> Point[Model]:
    defaults = Document(document.source, scenario.model_dump(mode="json"))

    def setting(axis: Axis) -> Any:
        if axis.is_path:
            keys = axis.values[0].settings[0].keys
            return document.at(keys, defaults.at(keys))
        return choice[axis].written[-1] if axis in choice else UNCHANGED

    return Point({axis.name: setting(axis) for axis in axes}, scenario)


def _explained(document: Document, problem: Problem, where: Sequence[Choice], choices: Sequence[Choice]) -> Problem:
    """The problem, with those values of other axes that bring it about."""
    axes = dict.fromkeys(axis for choice in where for axis in choice)
    brought = []
    for axis in axes:
        values, all_values = ({choice[axis]: None for choice in some if axis in choice} for some in (where, choices))
        below = [".".join(map(str, setting.keys)) for value in values for setting in value.settings]
        if values.keys() != all_values.keys() and not problem.path.startswith(tuple(below)):
            shown = (document.problem(value.written, "").value if axis.is_path else str(value.written[-1])
                     for value in axis.values if value in values)  # fmt: skip
            brought.append(f"{axis.name} is {' or '.join(shown)}")
    return replace(problem, message=f"{problem.message} (when {' and '.join(brought)})") if brought else problem
