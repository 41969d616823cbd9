"""Quantities at the edge, "64GiB" to integers and back, and `Block`, the strict base of every scenario part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
)

from sim.errors import At

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

MICROSECOND: Final = 1_000
MILLISECOND: Final = 1_000_000
SECOND: Final = 1_000_000_000
MINUTE: Final = 60 * SECOND
HOUR: Final = 60 * MINUTE
DAY: Final = 24 * HOUR

# Order settles ties when a number is written: binary units before decimal ones.
_BYTES: Final[Mapping[str, int]] = {
    "B": 1,
    "KiB": KIB,
    "MiB": MIB,
    "GiB": GIB,
    "TiB": TIB,
    "PiB": 1 << 50,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_TIME: Final[Mapping[str, int]] = {
    "ns": 1,
    "us": MICROSECOND,
    "ms": MILLISECOND,
    "s": SECOND,
    "min": MINUTE,
    "h": HOUR,
    "d": DAY,
}
_PER_SECOND: Final[Mapping[str, Fraction]] = {
    f"/{name}": Fraction(SECOND, _TIME[name]) for name in ("s", "min", "h", "d")
}

Scale = TypeVar("Scale", int, Fraction)

_LIMIT: Final = 2**63
_NUMBER: Final = r"[0-9]{1,30}(?:\.[0-9]+)?"
_QUANTITY: Final = re.compile(rf"({_NUMBER})\s*([A-Za-zµ/%].*)?")
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_LONGEST_NAME: Final = 100


def parse_bytes(value: object) -> int:
    """Return the bytes that a text such as "64GiB" or "16GB" (16 * 10^9) says; a bare 0 is allowed."""
    return _whole(value, _BYTES, "a size in bytes", "16GiB")


def parse_duration(value: object) -> int:
    """Return the nanoseconds that a text such as "20ms", "1.5s" or "30min" says; a bare 0 is allowed."""
    return _whole(value, _TIME, "a duration", "20ms")


def parse_share(value: object) -> float:
    """Return the fraction from 0 to 1 that "2%" or 0.02 says."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        share = Fraction(value) if 0 <= value <= 1 else None
    else:
        number, unit = _split(value, "a share", "2%")
        if unit != "%":
            raise At("", 'must be a share such as "2%" or 0.02', "add a percent sign" if not unit else "")
        share = number / 100
    if share is None or share > 1:
        bare = isinstance(value, int | float) and 1 < value <= 100
        raise At("", "must be a share between 0% and 100%", f'did you mean "{value}%"?' if bare else "")
    return float(share)


def parse_rate(value: object) -> float:
    """Return the events per second that a text such as "0.5/s" or "30/min" says; a bare 0 is allowed."""
    number, scale = _unit(value, _PER_SECOND, "a rate", "0.5/s")
    return float(number * scale)


def format_bytes(count: int) -> str:
    """Write bytes exactly, in the unit that needs the fewest digits."""
    return _write(count, _BYTES)


def format_duration(nanoseconds: int) -> str:
    """Write nanoseconds exactly, in the unit that needs the fewest digits."""
    return _write(nanoseconds, _TIME)


def format_share(share: float) -> str:
    """Write a fraction from 0 to 1 as an exact percentage."""
    return f"{_plain(Decimal(repr(share)) * 100)}%"


def format_rate(per_second: float) -> str:
    """Write events per second in the unit with the shortest text that reads back as the same number."""
    texts = [f"{_plain(Decimal(repr(per_second)))}/s"]
    texts += [f"{_plain(Decimal(format(per_second / per, '.12g')))}{unit}" for unit, per in _PER_SECOND.items()]
    return min((text for text in texts if parse_rate(text) == per_second), key=len)


def about_bytes(count: float) -> str:
    """Write bytes for reading, with three significant digits in a binary unit: "8.93GiB"."""
    for unit in ("PiB", "TiB", "GiB", "MiB", "KiB"):
        if abs(count) >= _BYTES[unit]:
            return f"{_three_digits(count / _BYTES[unit])}{unit}"
    return f"{count:.0f}B"


def about_duration(nanoseconds: float) -> str:
    """Write nanoseconds for reading, with three significant digits in the largest unit they fill: "1.5h"."""
    for unit in ("d", "h", "min", "s", "ms", "us"):
        if abs(nanoseconds) >= _TIME[unit]:
            return f"{_three_digits(nanoseconds / _TIME[unit])}{unit}"
    return f"{nanoseconds:.0f}ns"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _split(value: object, noun: str, example: str) -> tuple[Fraction, str]:
    """Return number and unit text of a quantity; refuse what is neither a text nor a bare 0."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value == 0:
            return Fraction(0), ""
        raise At("", f"must be {noun} with its unit", f'write a unit, such as "{example}"')
    text = value.strip() if isinstance(value, str) else ""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        if _QUANTITY.fullmatch(text.removeprefix("-")):
            raise At("", f"must be {noun}, not negative")
        raise At("", f"must be {noun}", f'write a number with a unit such as "{example}"')
    return Fraction(match[1]), match[2] or ""


def _unit(value: object, units: Mapping[str, Scale], noun: str, example: str) -> tuple[Fraction, Scale | int]:
    """Return the number of a quantity and the scale of its unit."""
    number, unit = _split(value, noun, example)
    if unit not in units and (number or unit):
        raise At("", f"must be {noun}", _unit_remedy(value, unit, units, example))
    return number, units.get(unit, 1)


def _whole(value: object, units: Mapping[str, int], noun: str, example: str) -> int:
    number, scale = _unit(value, units, noun, example)
    total = number * scale
    smallest = next(iter(units))
    if total.denominator != 1:
        raise At("", f"must be {noun} that is a whole number of {smallest}", "round it or use a smaller unit")
    if total >= _LIMIT:
        raise At("", f"must be {noun} below 2^63 {smallest}", "use a smaller number")
    return int(total)


def _unit_remedy(value: object, unit: str, units: Iterable[str], example: str) -> str:
    """Say how to write a quantity whose unit is missing or unknown, guessing the unit from its first letters."""
    if not unit:
        return f'write a unit, such as "{example}"'
    if any(letter.isdigit() for letter in unit):
        return f'write one number and one unit, such as "{example}"'
    start = unit.lower()
    meant = [known for known in units if _alike(start, known.lower())]
    if meant:
        digits = str(value).strip().removesuffix(unit).strip()
        return "did you mean " + " or ".join(f'"{digits}{known}"' for known in meant) + "?"
    return f"known units: {', '.join(units)}"


def _alike(unit: str, known: str) -> bool:
    """Whether a unit looks like a known one; bits are not taken for bytes."""
    return known in (unit, f"/{unit}") or known.startswith(unit) or (unit.startswith(known) and "bit" not in unit)


def parse_name(value: str) -> str:
    """Return a name if it can be part of file names and tables."""
    if len(value) > _LONGEST_NAME:
        raise At("", f"must have at most {_LONGEST_NAME} characters, has {len(value)}", "shorten it")
    if not re.fullmatch(_NAME, value):
        better = re.sub(r"[^A-Za-z0-9_.-]+", "-", value).strip("-._")
        message = "must be made of letters, digits, dots, dashes and underscores, a letter or digit first"
        raise At("", message, f"for example {better}" if better else "")
    return value


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise At("", "must be a number, not true or false", f"write {int(value)}")
    return value


def _write(count: int, units: Mapping[str, int]) -> str:
    if not count:
        return f"0{next(iter(units))}"
    texts = [(str(count // scale), unit) for unit, scale in units.items() if count % scale == 0]
    number, unit = min(texts, key=lambda text: (len(text[0].rstrip("0")), len(text[0])))
    return number + unit


def _plain(number: Decimal) -> str:
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _pattern(units: Iterable[str]) -> str:
    return rf"^{_NUMBER} ?({'|'.join(units)})$"


_BytesText = Annotated[str, Field(pattern=_pattern(_BYTES), examples=["64GiB", "512MiB", "4KiB"])]
_DurationText = Annotated[str, Field(pattern=_pattern(_TIME), examples=["20ms", "1.5s", "30min", "1h"])]
_ShareText = Annotated[str, Field(pattern=_pattern("%"), examples=["2%"])]
_ShareNumber = Annotated[float, Field(ge=0, le=1)]
_RateText = Annotated[str, Field(pattern=_pattern(_PER_SECOND), examples=["0.5/s", "30/min"])]

Bytes = Annotated[
    int,
    BeforeValidator(parse_bytes, json_schema_input_type=_BytesText | Literal[0]),
    PlainSerializer(format_bytes, return_type=str),
]
"""Bytes as an integer inside, a text such as "64GiB" outside."""

Duration = Annotated[
    int,
    BeforeValidator(parse_duration, json_schema_input_type=_DurationText | Literal[0]),
    PlainSerializer(format_duration, return_type=str),
]
"""Nanoseconds as an integer inside, a text such as "20ms" outside."""

Share = Annotated[
    float,
    BeforeValidator(parse_share, json_schema_input_type=_ShareText | _ShareNumber),
    PlainSerializer(format_share, return_type=str),
]
"""A fraction from 0 to 1 inside, "2%" or 0.02 outside."""

Rate = Annotated[
    float,
    BeforeValidator(parse_rate, json_schema_input_type=_RateText | Literal[0]),
    PlainSerializer(format_rate, return_type=str),
]
"""Events per second inside, a text such as "30/min" outside."""

Name = Annotated[
    str,
    AfterValidator(parse_name),
    WithJsonSchema({"type": "string", "pattern": f"^{_NAME}$", "maxLength": _LONGEST_NAME}),
]
"""A name that becomes part of file names and tables."""

not_boolean: Final = BeforeValidator(_no_boolean)
"""Annotation that refuses true and false where 1 and 0 would be taken for them."""

Switch = Annotated[Literal[0, 1], not_boolean]
"""0 or 1, as in a file of /sys."""


def _write_defaults(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Show defaults as a user writes them: "5GiB", where pydantic would show 5368709120."""
    written = model.model_construct().model_dump(mode="json", warnings=False)
    for name, entry in schema.get("properties", {}).items():
        if "default" in entry and name in written:
            entry["default"] = written[name]


class Block(BaseModel):
    """One part of a scenario: frozen, no unknown keys, no silent coercion; each field's docstring is its reference."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra=_write_defaults,
    )
