"""A cache that evicts what was not used for longest, under independent accesses: Che's approximation.

Source: Che, Tung, Wang, Hierarchical Web caching systems, IEEE JSAC 20(7), 2002.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def characteristic_time(count: Ints, rate: Floats, capacity: float) -> float:
    """Time after which an entry that nobody uses is evicted; infinite if all entries fit.

    *count* entries of each kind are used at *rate* each, in any unit of time.
    """
    used = (rate > 0) & (count > 0)
    count, rate = count[used], rate[used]
    if count.sum() <= capacity:
        return float("inf")
    time = 0.0
    # Entries used at least once in that time fill the cache. Their number is concave in the time, so Newton's steps
    # come from below and stay there.
    while True:
        unused = np.exp(-rate * time)
        short = capacity - float(count @ (1 - unused))
        step = short / float(count @ (rate * unused))
        if step <= 1e-9 * time:
            return time
        time += step


def misses(count: Ints, rate: Floats, capacity: float) -> Floats:
    """Misses of one entry of each kind, in the unit of the rates."""
    time = characteristic_time(count, rate, capacity)
    if time == float("inf"):
        return np.zeros(len(rate))
    missed: Floats = rate * np.exp(-rate * time)
    return missed
