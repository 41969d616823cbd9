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
from sim.errors import At, Problem, UserError
from sim.scenario.ranges import Range
from sim.streams import generator

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

ZIP: Final = "zip"
LIST: Final = "list"
HYPERCUBE: Final = "latin_hypercube"
POINTS: Final = "points"
"""How many points a Latin hypercube has."""
Axes: TypeAlias = dict[str, tuple[JsonValue, ...] | dict[str, JsonValue]]
"""Paths, as in `--set`, and the values that each takes; or an axis by a name of its own, and its alternatives by
theirs: each the paths that it sets. Three names mean axes of several paths that change together: `zip`, paths with
lists of equal length; `list`, blocks of paths and values; `latin_hypercube`, paths with ranges, and how many points."""
Model = TypeVar("Model", bound=BaseModel)


class Setting(NamedTuple):
    """A value of the document that goes to a path."""

    written: Keys
    """Where the value stands."""
    keys: Keys
    """What the path means."""
    path: Keys
    """Where the path stands."""


class Value(NamedTuple):
    """One value of an axis: what it sets."""

    written: Keys
    """Where it stands in the document."""
    settings: tuple[Setting, ...]


class Axis(NamedTuple):
    """What a sweep varies: a path, paths that change together, or alternatives by name."""

    name: str
    """The path, the name that the scenario gives it, or what it is."""
    values: tuple[Value, ...]
    has_names: bool
    """Whether its values are alternatives with names, and not values of paths."""

    def paths(self) -> Mapping[Keys, Keys]:
        """What it sets, each with the place of the path in the document."""
        return {setting.keys: setting.path for value in self.values for setting in value.settings}

    def columns(self) -> Mapping[str, Keys]:
        """What tells its values apart: the paths and what they mean, or its own name alone."""
        return {self.name: ()} if self.has_names else {str(path[-1]): keys for keys, path in self.paths().items()}


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
    problems, document = reader.problems, reader.document
    if sum(prod(len(axis.values) for axis in cross) for cross in crosses) > MOST_POINTS:
        too_many = f"makes more than {MOST_POINTS:,} points"
        raise UserError(document.problem(_SWEEP, too_many, "give fewer values", show_value=False))
    choices = [choice for cross in crosses for choice in _choices(cross)]
    columns = {name: keys for cross in crosses for axis in cross for name, keys in axis.columns().items()}
    found: list[Point[Model]] = []
    faulty: dict[Problem, list[Choice]] = defaultdict(list)
    base = document.without(*DERIVED)
    for choice in choices:
        written = _written(base, document, choice)
        try:
            found.append(_point(written, written.check(model, **context), choice, columns))
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
            axis = self._axis(at, name, values)
            if len(self.problems) == faults:
                self._clash(axis, found)
            if len(self.problems) == faults:
                found.append(axis)
        return found

    def _axis(self, at: Keys, name: str, values: Sequence[JsonValue] | Mapping[str, JsonValue]) -> Axis:
        match name:
            case str() if name == ZIP:
                return self._zip(at, values)
            case str() if name == LIST:
                return self._list(at, values)
            case str() if name == HYPERCUBE:
                return self._hypercube(at, values)
        self._count(at, list(values.items()) if isinstance(values, Mapping) else list(enumerate(values)))
        if isinstance(values, Mapping):
            self._name(at)
            return Axis(name, tuple(self._alternative((*at, each)) for each in values), has_names=True)
        return self._together(name, {at: [(*at, number) for number in range(len(values))]})

    def _together(self, name: str, written: Mapping[Keys, Sequence[Keys]]) -> Axis:
        """The axis on which paths change together: places of the values of each, by the place of the path."""
        meant = {at: self._keys_of(at) for at in written}
        settings = [[Setting(value, meant[at], at) for value in values] for at, values in written.items()]
        return Axis(name, tuple(Value(each[0].written, each) for each in zip(*settings, strict=True)), has_names=False)

    def _zip(self, at: Keys, values: object) -> Axis:
        """The first value of each list together, then the second of each, and so on."""
        lists = values if isinstance(values, Mapping) else {}
        if not lists or not all(isinstance(each, list) and each for each in lists.values()):
            self._note(at, "must be paths, each with a list of values", "write {path: [value, value], path: [...]}")
            return Axis(ZIP, (), has_names=False)
        length = len(next(iter(lists.values())))
        for path, each in lists.items():
            if len(each) != length:
                self._note((*at, path), f"has {len(each)} values, the first list {length}", "give all lists one length")
                return Axis(ZIP, (), has_names=False)
        return self._together(ZIP, {(*at, path): [(*at, path, number) for number in range(length)] for path in lists})

    def _list(self, at: Keys, values: object) -> Axis:
        """The points themselves, each with the paths that it sets; what one does not set is as written."""
        if isinstance(values, Mapping) or not values:
            self._note(at, "must be a list of blocks", "write - {path: value, path: value} for each point")
            return Axis(LIST, (), has_names=False)
        self._count(at, list(enumerate(values)))  # type: ignore[arg-type]
        return Axis(LIST, tuple(self._alternative((*at, number)) for number in range(len(values))), has_names=False)  # type: ignore[arg-type]

    def _hypercube(self, at: Keys, values: object) -> Axis:
        """Points all over the ranges of the paths: of n, each nth part of each range has one.

        Each path has a random stream of its own, so that another path changes none of its values. Source: McKay,
        Beckman and Conover, Technometrics 21(2), 1979.
        """
        ranges = {path: each for path, each in values.items() if path != POINTS} if isinstance(values, Mapping) else {}
        count = values.get(POINTS) if isinstance(values, Mapping) else None
        if not ranges:
            self._note(at, "must be paths with ranges", f"write {{{POINTS}: 20, path: 100..5000}}")
        elif isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_POINTS:
            self._note(
                (*at, POINTS), f"must be how many points, 1 to {MOST_POINTS:,}", f"write {POINTS}: 20", show_value=True
            )
        else:
            seed = self.document.data.get("seed")
            drawn = {path: self._draw((*at, path), given, count, seed if isinstance(seed, int) else 1)
                     for path, given in ranges.items()}  # fmt: skip
            if all(drawn.values()):
                for path, each in drawn.items():
                    self.document = self.document.with_value((*at, path), each)
                places = {(*at, path): [(*at, path, number) for number in range(count)] for path in ranges}
                return self._together(HYPERCUBE, places)
        return Axis(HYPERCUBE, (), has_names=False)

    def _draw(self, at: Keys, given: object, count: int, seed: int) -> list[JsonValue]:
        try:
            steps = Range.parse(given)
        except At as fault:
            self._note(at, fault.message, fault.remedy, show_value=True)
            return []
        draw = generator(seed, HYPERCUBE, str(at[-1]))
        shares = (draw.permutation(count) + draw.random(count)) / count
        return [steps.value(int(share * (steps.last + 1))) for share in shares]

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
            found.append(Setting((*at, path), keys, (*at, path)))
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


def _written(base: Document, document: Document, choice: Choice) -> Document:
    """The document of one point, *base* with what its axes set. Outer paths come first: an axis may change a part of a
    block that another one sets."""
    point = base
    settings = [setting for value in choice.values() for setting in value.settings]
    for setting in sorted(settings, key=lambda each: len(each.keys)):
        point = point.copied(document, setting.written, setting.keys)
    return point


def _point(document: Document, scenario: Model, choice: Choice, columns: Mapping[str, Keys]) -> Point[Model]:
    defaults = Document(document.source, scenario.model_dump(mode="json"))
    names = {axis.name: value.written[-1] for axis, value in choice.items() if axis.has_names}

    def setting(column: str, keys: Keys) -> Any:
        return document.at(keys, defaults.at(keys)) if keys else names.get(column, UNCHANGED)

    return Point({column: setting(column, keys) for column, keys in columns.items()}, scenario)


def _explained(document: Document, problem: Problem, where: Sequence[Choice], choices: Sequence[Choice]) -> Problem:
    """The problem, with those values of other axes that bring it about."""
    axes = dict.fromkeys(axis for choice in where for axis in choice)
    brought = []
    for axis in axes:
        values, all_values = ({choice[axis]: None for choice in some if axis in choice} for some in (where, choices))
        below = [".".join(map(str, setting.keys)) for value in values for setting in value.settings]
        if values.keys() != all_values.keys() and not problem.path.startswith(tuple(below)):
            shown = [_told(document, axis, value) for value in axis.values if value in values]
            brought.append(f"{axis.name} is {' or '.join(shown)}")
    return replace(problem, message=f"{problem.message} (when {' and '.join(brought)})") if brought else problem


def _told(document: Document, axis: Axis, value: Value) -> str:
    """A value of an axis, for a message."""
    if axis.has_names:
        return str(value.written[-1])
    given = [document.problem(setting.written, "").value for setting in value.settings]
    return given[0] if len(given) == 1 else f"({', '.join(given)})"
