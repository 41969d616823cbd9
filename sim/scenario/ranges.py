"""A range of values as written, "100..5000" or "1GiB..8GiB..512MiB": what can be stepped through from end to end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from pydantic import JsonValue

from sim.errors import At

_QUANTITY = re.compile(r"(-?[0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-zµ/%]*)")
_EXAMPLE = 'write LOW..HIGH in one unit, such as 1..64, "20ms..500ms" or, with a step, "1GiB..8GiB..0.5GiB"'


@dataclass(frozen=True)
class Range:
    """Values from `low` in equal steps, `last` of them; a value is a whole number, a fraction, or has a unit."""

    low: Decimal
    step: Decimal
    last: int
    unit: str

    @classmethod
    def parse(cls, given: object) -> Range:
        """Return the range that a text says. A step that is not written is one in the last digit. Raises At."""
        parts = [_QUANTITY.fullmatch(part.strip()) for part in given.split("..")] if isinstance(given, str) else []
        found = [(Decimal(part[1]), part[2]) for part in parts if part]
        if len(found) != len(parts) or not 2 <= len(parts) <= 3:
            raise At("", "must be a range", _EXAMPLE)
        if len({unit for _, unit in found}) > 1:
            raise At("", "must have one unit", _EXAMPLE)
        (low, unit), (high, _), *rest = found
        finest = Decimal(1).scaleb(min(int(number.as_tuple().exponent) for number in (low, high)))
        step = rest[0][0] if rest else finest
        if low >= high:
            raise At("", "must go from a lower to a higher value", _EXAMPLE)
        if step <= 0 or step > high - low:
            raise At("", "must have a step that fits into it", _EXAMPLE)
        return cls(low, step, int((high - low) / step), unit)

    def value(self, number: int) -> JsonValue:
        """The value after so many steps, as a scenario has it."""
        size = self.low + number * self.step
        if self.unit:
            return f"{size:f}{self.unit}"
        return int(size) if size == size.to_integral_value() else float(size)
