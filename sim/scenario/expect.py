"""Expectations: "metric op value" lines of a scenario, checked against the summary of its run."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Annotated, Literal

from pydantic import Field, PlainSerializer, PlainValidator

from sim.columns import METRICS, Metric
from sim.errors import At, suggestion
from sim.units import SECOND, parse_bytes, parse_duration

Number = int | float
Severity = Literal["error", "warning"]

_EXAMPLE = 'write it like "consolidation_ratio >= 1.6"'
_LINE = re.compile(r"\s*([A-Za-z_]\w*)\s*(>=|<=|==|!=|>|<)\s*([^\s<>=!].*?)\s*")
_METRICS: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}
_COMPARE: Mapping[str, Callable[[Number, Number], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True)
class Verdict:
    """What became of one expectation.

    `actual` is None when the run gave no data for the metric, which counts as not met. `margin` is how far `actual`
    is on the right side of the bound, in the metric's unit: negative when not met, 0 on the bound.
    """

    expectation: str
    actual: Number | None
    met: bool
    margin: Number | None
    severity: Severity = "error"

    @property
    def failed(self) -> bool:
        """Whether it fails the run: it is no mere warning and not met."""
        return not self.met and self.severity == "error"


@dataclass(frozen=True)
class Expectation:
    """One condition on one metric; `bound` is in the metric's own unit."""

    text: str
    metric: Metric
    op: str
    bound: Number

    @classmethod
    def parse(cls, text: object) -> "Expectation":
        """Return the expectation that `text` says. Raises At when it says none."""
        match = _LINE.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise At("", "must be a metric, a comparison (>= > <= < == !=) and a value", _EXAMPLE)
        name, op, value = match.groups()
        if name not in _METRICS:
            raise At("", f"unknown metric {name}", suggestion(name, _METRICS))
        metric = _METRICS[name]
        return cls(text=f"{name} {op} {value}", metric=metric, op=op, bound=_bound(value, metric))

    def check(self, summary: Mapping[str, Number | None], severity: Severity = "error") -> Verdict:
        """Compare with the metric's value in `summary`; a missing, None or NaN value is no data."""
        actual = summary.get(self.metric.name)
        if actual is None or math.isnan(actual):
            return Verdict(self.text, None, met=False, margin=None, severity=severity)
        met = _COMPARE[self.op](actual, self.bound)
        return Verdict(self.text, actual, met, self._margin(actual), severity)

    def _margin(self, actual: Number) -> Number:
        match self.op:
            case ">=" | ">":
                return actual - self.bound
            case "<=" | "<":
                return self.bound - actual
            case "==":
                return -abs(actual - self.bound)
            case _:
                return abs(actual - self.bound)


def worst(replications: Sequence[Sequence[Verdict]]) -> list[Verdict]:
    """Return each expectation's verdict where it fared worst; no data is worse than any value."""

    def standing(verdict: Verdict) -> tuple[bool, float]:
        return verdict.met, -math.inf if verdict.margin is None else verdict.margin

    return [min(each, key=standing) for each in zip(*replications, strict=True)]


@dataclass(frozen=True)
class Tolerance:
    """How far a metric may move: by a share of what it was, or by an amount in its own unit."""

    share: float = 0.0
    amount: Number = 0

    @classmethod
    def parse(cls, given: object, metric: Metric) -> "Tolerance":
        """Return the tolerance that a number, a quantity or a share says. Raises At when it says none."""
        text = str(given).strip() if isinstance(given, str | int | float) and not isinstance(given, bool) else ""
        if text.endswith("%") and (percent := _plain(text.removesuffix("%").rstrip())) is not None:
            return cls(share=percent / 100)
        if not text or text.startswith("-"):
            raise At("", "must be how far the metric may move", 'write a share such as "1%", or an amount; 0 is exact')
        return cls(amount=_size(text, metric))

    def holds(self, before: Number, now: Number) -> bool:
        """Whether the metric has not moved further than that."""
        return abs(now - before) <= max(self.amount, self.share * abs(before))


def _bound(text: str, metric: Metric) -> Number:
    """Return the value in the metric's unit; a bare number already is."""
    sign, size = (-1, text[1:]) if text.startswith("-") else (1, text)
    return sign * _size(size.strip(), metric)


def _size(text: str, metric: Metric) -> Number:
    if (plain := _plain(text)) is not None:
        return plain
    match metric.unit:
        case "bytes":
            return parse_bytes(text)
        case "s":
            return parse_duration(text) / SECOND
        case "ns":
            return parse_duration(text)
        case "%":
            if (share := _plain(text.removesuffix("%").rstrip())) is not None:
                return share
            raise At("", f"{metric.name} is a percentage", 'write a number such as "5%"')
        case unit:
            raise At("", f"{metric.name} is a plain number ({unit})", "write a number without a unit")


def _plain(text: str) -> Number | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    if not text[0].isdigit() or not number.is_finite():
        return None
    return int(text) if text.isdecimal() else float(number)


ExpectationText = Annotated[
    Expectation,
    PlainValidator(
        Expectation.parse,
        json_schema_input_type=Annotated[
            str,
            Field(
                pattern=r"^\s*[A-Za-z_]\w*\s*(>=|<=|==|!=|>|<)\s*\S+",
                examples=["consolidation_ratio >= 1.6", "pswpin == 0"],
            ),
        ],
    ),
    PlainSerializer(lambda expectation: expectation.text, return_type=str),
]
"""The type of a line under `expect` in a scenario: read from text, written back as text."""
