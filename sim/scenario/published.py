"""Published figures: what others measured, the run that should give the same, and how near it must come."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Final, Generic, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, Field, JsonValue, PlainSerializer, PlainValidator, model_validator

from sim.columns import GUESTS, METRICS, PAGE_BYTES, SAMPLES
from sim.document import Document, Keys, in_order
from sim.errors import At, Problem, Several, UserError, suggestion
from sim.scenario.points import DERIVED, FIXED
from sim.units import GIB, KIB, MIB, SECOND, Block, parse_duration

Number = int | float
Values = Mapping[str, Number | None]
"""What the names of a formula stand for; None where a run has no data."""
Model = TypeVar("Model", bound=BaseModel)

PUBLISHED: Final = "published"
CONSTANTS: Final[Mapping[str, int]] = {"page": PAGE_BYTES, "KiB": KIB, "MiB": MIB, "GiB": GIB, "MB": 10**6}
"""Names that mean the same in every formula."""
_COLUMNS: Final = frozenset(column.name for column in SAMPLES if column.dtype != "string")
_METRICS: Final = frozenset(metric.name for metric in METRICS)
_GUEST_COLUMNS: Final = frozenset(column.name for column in GUESTS if column.dtype != "string")
_ARITHMETIC: Final[Mapping[type[ast.operator], Callable[[Number, Number], Number]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARE: Final[Mapping[str, Callable[[Number, Number], bool]]] = {">=": operator.ge, "<=": operator.le}
_CONDITION: Final = re.compile(r"\s*([A-Za-z_]\w*)\s*(>=|<=)\s*([0-9]+(?:\.[0-9]+)?)\s*")
_NUMBER: Final = r"([0-9]+(?:\.[0-9]+)?)"
_BOUNDS: Final = ("at least", "at most")


@dataclass(frozen=True)
class Formula:
    """A metric or column, or arithmetic of such."""

    text: str
    tree: ast.expr = field(compare=False)

    @classmethod
    def parse(cls, text: object) -> Formula:
        """Return the formula that *text* says. Raises At when it says none."""
        try:
            tree = ast.parse(text if isinstance(text, str) else "", mode="eval").body
            names = [_name(each) for each in _leaves(tree)]
        except (SyntaxError, ValueError, RecursionError):
            said = "must be a metric, a column, or arithmetic (+ - * / and brackets) of such and numbers"
            raise At("", said, 'for example "100 * pages_sharing * page / mem_promised_bytes"') from None
        for name in filter(None, names):
            _check_name(name)
        return cls(str(text).strip(), tree)

    @property
    def names(self) -> Sequence[str]:
        """Metrics and columns in it; `GUESTS.COLUMN` is one of the kind of guest of that name."""
        found = dict.fromkeys(name for name in map(_name, _leaves(self.tree)) if name)
        return [name for name in found if name not in CONSTANTS]

    def value(self, values: Values) -> float | None:
        """Compute it; None where a name has no data or a divisor is 0."""
        try:
            result = float(_value(self.tree, {**values, **CONSTANTS}))
        except (TypeError, ZeroDivisionError):
            return None
        return None if math.isnan(result) else result


def _leaves(tree: ast.expr) -> Iterator[ast.expr]:
    """The names and numbers of an expression. Raises ValueError if it is more than arithmetic."""
    match tree:
        case ast.BinOp() if type(tree.op) in _ARITHMETIC:
            yield from _leaves(tree.left)
            yield from _leaves(tree.right)
        case ast.UnaryOp(op=ast.USub()):
            yield from _leaves(tree.operand)
        case _:
            yield tree


def _name(leaf: ast.expr) -> str:
    """The name that a leaf is; "" for a number. Raises ValueError if it is neither."""
    match leaf:
        case ast.Name():
            return leaf.id
        case ast.Attribute(value=ast.Name()):
            return ast.unparse(leaf)
        case ast.Constant(value=int() | float()) if not isinstance(leaf.value, bool):
            return ""
        case _:
            raise ValueError


def _check_name(name: str) -> None:
    """Raise At for a name that no run gives."""
    kind, _, column = name.rpartition(".")
    known = _GUEST_COLUMNS if kind else _METRICS | _COLUMNS | set(CONSTANTS)
    if column not in known:
        noun = "column of guests" if kind else "metric or column"
        raise At("", f"unknown {noun} {column}", suggestion(column, known))


def _value(tree: ast.expr, values: Values) -> Number:
    match tree:
        case ast.BinOp():
            return _ARITHMETIC[type(tree.op)](_value(tree.left, values), _value(tree.right, values))
        case ast.UnaryOp():
            return -_value(tree.operand, values)
        case ast.Constant(value=int() | float() as number):
            return number
        case _:
            found = values[_name(tree)]
            if found is None:
                raise TypeError
            return found


@dataclass(frozen=True)
class Moment:
    """A time, or the first time at which a column has come so far."""

    text: str
    time_s: float | None = None
    column: str = ""
    op: str = ""
    bound: float = 0.0

    @classmethod
    def parse(cls, text: object) -> Moment:
        """Return the moment that *text* says. Raises At when it says none."""
        if not isinstance(text, str) or (match := _CONDITION.fullmatch(text)) is None:
            try:
                return cls(str(text), time_s=parse_duration(text) / SECOND)
            except At:
                said = "must be a time, or a column, >= or <=, and a number"
                raise At("", said, 'for example "12s" or "full_scans >= 2"') from None
        column, op, bound = match.groups()
        if column not in _COLUMNS:
            raise At("", f"unknown column {column}", suggestion(column, _COLUMNS))
        return cls(f"{column} {op} {bound}", column=column, op=op, bound=float(bound))

    def has_come(self, value: float) -> bool:
        """Whether a column's value is as far as that."""
        return _COMPARE[self.op](value, self.bound)


@dataclass(frozen=True)
class Band:
    """How far a simulated figure may be from a published one."""

    text: str
    kind: Literal["absolute", "relative", "factor", "at least", "at most"]
    amount: float = 0.0

    @classmethod
    def parse(cls, given: object) -> Band:
        """Return the band that a number or a text says. Raises At when it says none."""
        if isinstance(given, int | float) and not isinstance(given, bool) and given >= 0:
            return cls("exact" if given == 0 else f"{given:g}", "absolute", float(given))
        text = given.strip() if isinstance(given, str) else ""
        if text in _BOUNDS:
            return cls(text, "at least" if text == "at least" else "at most")
        if match := re.fullmatch(rf"{_NUMBER} ?%", text):
            return cls(f"{match[1]} %", "relative", float(match[1]) / 100)
        if (match := re.fullmatch(rf"{_NUMBER} ?x", text)) and float(match[1]) > 1:
            return cls(f"{match[1]}x", "factor", float(match[1]))
        if text == "exact":
            return cls(text, "absolute")
        remedy = 'write "5 %", "2x", "at least", "at most", or a number in the unit of the figure; 0 is exact'
        raise At("", "must be how far off a figure may be", remedy)

    def holds(self, actual: float, low: float, high: float) -> bool:
        """Whether *actual* is near enough to what was published, which is *low* to *high*."""
        match self.kind:
            case "absolute":
                # What is exact in the page was computed in floating point.
                slack = self.amount + 1e-9 * max(abs(low), abs(high))
                return low - slack <= actual <= high + slack
            case "relative":
                return low - abs(low) * self.amount <= actual <= high + abs(high) * self.amount
            case "factor":
                return low / self.amount <= actual <= high * self.amount
            case _:
                return low <= actual <= high

    def written(self) -> str | float:
        """The band as a scenario has it."""
        return self.amount if self.kind == "absolute" else self.text


_FormulaText = Annotated[
    Formula,
    PlainValidator(Formula.parse, json_schema_input_type=Annotated[str, Field(examples=["consolidation_ratio"])]),
    PlainSerializer(lambda formula: formula.text, return_type=str),
]
_MomentText = Annotated[
    Moment,
    PlainValidator(Moment.parse, json_schema_input_type=Annotated[str, Field(examples=["12s", "full_scans >= 2"])]),
    PlainSerializer(lambda moment: moment.text, return_type=str),
]
_BandText = Annotated[
    Band,
    PlainValidator(Band.parse, json_schema_input_type=Annotated[str | float, Field(examples=["5 %", "2x", 0])]),
    PlainSerializer(Band.written, return_type=JsonValue),
]
Overrides = dict[str, JsonValue]
"""Paths, as in `--set`, and the value of each."""


class Figure(Block):
    """One published figure, for the table that `overcommit published` makes."""

    figure: str = Field(min_length=1)
    """What was measured, in words."""
    value: float | tuple[float, float]
    """What was published: a number, or the least and the most of several."""
    unit: str = ""
    """Its unit, for reading."""
    metric: _FormulaText
    """What the run has to show for it: a metric, a column of the samples, `GUESTS.COLUMN` for the guests of that kind
    at the end (their sum, or mean of a percentage), or arithmetic of such; `page`, KiB, MiB, GiB and MB are numbers."""
    at: _MomentText | None = None
    """Take columns at this time, or as soon as a column is there ("full_scans >= 2"); at the end unless given."""
    since: _MomentText | None = None
    """Take what columns, `time_s` too, have grown by since this moment."""
    set: Overrides = Field(default_factory=dict)
    """What is different in the run for this figure: paths, as in `--set`, and their values."""
    against: Overrides = Field(default_factory=dict)
    """The same for a second run, to which the first is compared."""
    compared: Literal["ratio", "difference", "percent"] | None = None
    """How: first / second, first - second, or by how many percent the first is more."""
    band: _BandText
    """How far the run may be off: a share ("5 %"), a factor ("2x"), a number in the figure's unit, 0 for exact;
    or "at least" and "at most" if the figure is a bound."""
    source: str = Field(min_length=10)
    """Where it was published: paper or page, with table, figure or section."""
    assumed: str = ""
    """What the source does not tell and the scenario assumes."""
    fitted: str = ""
    """What was chosen so that this figure comes out, if anything was: the figure is no check then."""
    fails: str = ""
    """Why the run does not come near enough; needed if it does not, and wrong if it does."""
    not_modelled: str = ""
    """Why no run can be expected to give the figure; what the run has is shown beside it."""

    @property
    def range(self) -> tuple[float, float]:
        """Least and most that was published; a bound has no end on its other side."""
        low, high = self.value if isinstance(self.value, tuple) else (self.value, self.value)
        return (low if self.band.kind != "at most" else -math.inf, high if self.band.kind != "at least" else math.inf)

    @model_validator(mode="after")
    def _consistent(self) -> Figure:
        if faults := [*self._comparison_faults(), *self._name_faults(), *self._reason_faults()]:
            raise Several(*faults)
        return self

    def _comparison_faults(self) -> Iterator[At]:
        if self.against and self.compared is None:
            yield At("compared", "the key is missing beside against", "write ratio, difference or percent")
        if self.compared and not self.against:
            yield At("compared", "there is nothing to compare with", "write the other run's values under against")
        if self.range[0] > self.range[1]:
            yield At("value", "the least must come first", "swap the two")
        if self.band.kind == "factor" and self.range[0] <= 0:
            yield At("band", "a factor needs a figure above 0", "write how far off it may be in its unit")

    def _name_faults(self) -> Iterator[At]:
        if self.at or self.since:
            for name in self.metric.names:
                if name not in _COLUMNS:
                    remedy = "remove at and since, or name a column" + ("" if "." in name else " of the samples")
                    yield At("metric", f"{name} is known at the end only", remedy)

    def _reason_faults(self) -> Iterator[At]:
        given = [name for name in ("fitted", "fails", "not_modelled") if getattr(self, name)]
        if len(given) > 1:
            yield At(given[1], f"a figure has either {' or '.join(given)}", "keep one of them")


class Claim(NamedTuple, Generic[Model]):
    """A published figure and what to run for it."""

    figure: Figure
    scenario: Model
    against: Model | None


def claims(document: Document, figures: Sequence[Figure], model: type[Model], **context: object) -> list[Claim[Model]]:
    """Return the scenarios of each published figure. Raises UserError with every mistake in them."""
    problems: list[Problem] = []

    def scenario(number: int, which: str) -> Model | None:
        try:
            return _changed(document, (PUBLISHED, number, which)).check(model, **context)
        except UserError as error:
            problems.extend(error.problems)
            return None

    found: list[Claim[Model]] = []
    kinds = {vm.get("name") for vm in document.data.get("vms", ())}
    for number, figure in enumerate(figures):
        problems += _unknown_kinds(document, number, figure, kinds)
        first = scenario(number, "set")
        second = scenario(number, "against") if figure.against else None
        if first is not None:
            found.append(Claim(figure, first, second))
    if problems:
        raise UserError(*in_order(problems))
    return found


def _unknown_kinds(document: Document, number: int, figure: Figure, kinds: set[str]) -> Iterator[Problem]:
    for kind in {name.rpartition(".")[0] for name in figure.metric.names} - {""} - kinds:
        at = (PUBLISHED, number, "metric")
        yield document.problem(at, f"no guests are called {kind}", suggestion(kind, sorted(kinds)))


def _changed(document: Document, written: Keys) -> Document:
    """The document with the values under the keys *written* in force, and nothing that makes further runs.

    Outer paths come first: a value may be a part of a block that another one sets.
    """
    keys: dict[str, Keys] = {}
    problems: list[Problem] = []
    for path in document.at(written, {}):
        try:
            keys[path] = _keys_of(document, path)
        except UserError as error:
            place = document.problem((*written, path), "", show_value=False)
            problems += [replace(place, message=each.message, remedy=each.remedy) for each in error.problems]
    if problems:
        raise UserError(*problems)
    changed = document
    for path in sorted(keys, key=lambda path: len(keys[path])):
        changed = changed.copied(document, (*written, path), keys[path])
    return changed.without(*DERIVED)


def _keys_of(document: Document, path: str) -> Keys:
    """The keys that a path means. Raises UserError for one that cannot exist or be changed."""
    if path.partition(".")[0] in FIXED:
        raise UserError(Problem(message="is the same in all runs", remedy="change something else"))
    return document.keys_of(path)
