"""When hosts fail: at given times, and at random."""

from __future__ import annotations

from collections.abc import Mapping

from sim.datacenter.blocks import Failures
from sim.datacenter.messages import NEVER
from sim.streams import generator


class Breakdowns:
    """The failures to come of every host."""

    def __init__(self, failures: Failures, numbers: Mapping[str, int], seed: int) -> None:
        """*numbers* has the number of each host by its name."""
        self.failures = failures
        self.names = {number: name for name, number in numbers.items()}
        self.seed = seed
        self.count: dict[int, int] = {}
        """How many random failures each host has drawn."""
        self.planned = [(each.at, numbers[each.host], False) for each in failures.hosts]

    def first(self) -> list[tuple[int, int, bool]]:
        """Time and host of the planned failures, and of each host's first one at random; which of them it is."""
        drawn = [(self.following(host, 0), host, True) for host in sorted(self.names)] if self.failures.mtbf else []
        return sorted([*self.planned, *drawn])

    def following(self, host: int, since: int) -> int:
        """When a host that is sound since then (ns) fails at random; NEVER if it does not."""
        if self.failures.mtbf is None:
            return NEVER
        number = self.count[host] = self.count.get(host, -1) + 1
        gap = generator(self.seed, "failures", self.names[host], number).exponential(self.failures.mtbf)
        return min(since + max(int(min(gap, NEVER)), 1), NEVER)
