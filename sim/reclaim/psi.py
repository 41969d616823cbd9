"""Pressure stall information: the running averages that the kernel makes of how long guests waited for memory.

Source: Documentation/accounting/psi.rst and kernel/sched/psi.c of Linux 6.18.
"""

from __future__ import annotations

from typing import Final

from sim.units import SECOND

EVERY: Final = 2 * SECOND
"""Time (ns) from one update to the next."""

_FIXED: Final = 1 << 11
# e^(-2 s / window) in units of 2^-11, for windows of 10 s, 60 s and 300 s.
_DECAY: Final = (1677, 1981, 2034)


class Averages:
    """The averages over 10 s, 60 s and 300 s of the share of time for which somebody waited."""

    def __init__(self) -> None:
        self._total = 0
        self._averages = [0, 0, 0]

    def update(self, total: int) -> None:
        """Two seconds have passed, and the time spent waiting is *total* (ns) by now."""
        share = min(total - self._total, EVERY) * 100 * _FIXED // EVERY
        self._total = total
        self._averages = [_decayed(old, decay, share) for old, decay in zip(self._averages, _DECAY, strict=True)]

    def hundredths(self) -> tuple[int, ...]:
        """The averages, in hundredths of a percent."""
        return tuple(100 * average // _FIXED for average in self._averages)


def _decayed(old: int, decay: int, share: int) -> int:
    summed = old * decay + share * (_FIXED - decay)
    if share >= old:
        summed += _FIXED - 1
    return summed // _FIXED
