"""What small pages cost when some are hot, measured on this machine in huge pages and small ones, and by the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest
from test_translation import PRICES, longer_in_small_pages

from sim.lab.calibrate import _processor
from sim.lab.machine import exclusive
from sim.lab.memory_costs import HUGE, SMALL, _area
from sim.units import MIB

pytestmark = pytest.mark.kernel

USED_MIB, HOT = 256, 1 / 16
SHARES: Mapping[float, int] = {0.0: 0, 0.5: 128, 0.8: 205}
"""Shares of loads that go to the hot pages, and the same of 256."""
STEPS, ROUNDS = 150_000, 21
MOST_SPREAD = 0.4

Words = npt.NDArray[np.uint64]


def loads(words: Words, hot_share: int, hot_lines: int, lines: int, steps: int) -> int:
    """Dependent loads of random lines, so many in 256 of them from the hot lines alone; see memory_costs."""
    state = np.uint64(steps)
    for _ in range(steps):
        among = hot_lines if (state >> np.uint64(16)) & np.uint64(255) < np.uint64(hot_share) else lines
        line = (state >> np.uint64(34)) % np.uint64(among)
        state = state * np.uint64(0xD1342543DE82EF95) + np.uint64(1) + words[line * np.uint64(8)]
    return int(state >> np.uint64(1))


def test_hot_pages_lower_the_cost_of_small_pages_as_the_model_says(report: Callable[[str], None]) -> None:
    """Loads that hit hot pages against even ones, so that a machine slower than the price set says the same."""
    assert PRICES.machine is not None
    if _processor() != PRICES.machine.cpu:
        pytest.skip("not the machine of the price set")
    compiled: Any = numba.njit(loads)
    lines = USED_MIB * MIB // 64
    found: dict[float, list[float]] = {share: [] for share in SHARES}
    with exclusive(), _area(USED_MIB * MIB, SMALL) as small, _area(USED_MIB * MIB, HUGE) as huge:
        areas = [np.frombuffer(area, np.uint64) for area in (small, huge)]
        for words in areas:
            words[:] = 0
            compiled(words, 0, 1, lines, STEPS)
        for _ in range(ROUNDS):
            for share, of_256 in SHARES.items():
                took = []
                for words in areas:
                    before = time.perf_counter_ns()
                    compiled(words, of_256, round(HOT * lines), lines, STEPS)
                    took.append((time.perf_counter_ns() - before) / STEPS)
                found[share].append(took[0] - took[1])
        del areas, words
    quarters = {share: np.quantile(times, [0.25, 0.5, 0.75]) for share, times in found.items()}
    for share, (low, middle, high) in quarters.items():
        if high - low > MOST_SPREAD * middle:
            pytest.skip(f"too busy: loads took {low:.0f} to {high:.0f} ns longer ({share:.0%} of them hot)")
    even = longer_in_small_pages(USED_MIB, 1, 0.0)
    for share in (0.5, 0.8):
        measured = quarters[share][1] / quarters[0.0][1]
        simulated = longer_in_small_pages(USED_MIB, HOT, share) / even
        report(f"small pages, {share:.0%} of loads hot: {simulated:.2f} of even loads, measured {measured:.2f}")
        assert simulated == pytest.approx(measured, rel=0.25)
