"""What replications tell: a mean and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, sqrt
from statistics import fmean, stdev
from typing import NamedTuple

CONFIDENCE = 0.95
FEW = 5
"""Fewer replications than this say little of how runs scatter."""


class Interval(NamedTuple):
    """A mean and the ends of its Student t interval; of a single value nobody knows how far it scatters."""

    mean: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether it leaves out 0."""
        return self.low > 0 or self.high < 0


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of *values* with its interval."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean, -inf, inf)
    if min(values) == max(values):
        return Interval(values[0], values[0], values[0])
    half = float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * stdev(values) / sqrt(len(values))
    return Interval(mean, mean - half, mean + half)
