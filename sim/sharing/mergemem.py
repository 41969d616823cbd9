"""mergemem for Linux 2.0.33: a program that its user runs, which merges the memory of programs of one name.

Source: Richter and Reisner, mergemem 0.09 (TU Wien, January 1999), its README: processes of equal name are compared at
equal addresses, and equal pages become one, copied on write. There is no daemon: after a run, writes only take sharing
away. Assumed: a checksum of each page is compared first, and the program has one core to itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from sim.sharing.mechanism import InPasses, Looked
from sim.units import MINUTE, Duration


class Mergemem(InPasses):
    """When its user runs it. Guests of one entry of `vms` are processes of one name."""

    refused: ClassVar[tuple[str, ...]] = ("thp", "hugetlbfs", "zswap", "balloon", "ksmtuned", "mom")

    at: Duration = MINUTE
    """When it is run; a minute after the start unless given, when most programs have initialised their memory."""
    every: Duration | None = Field(default=None, gt=0)
    """Time from one run to the next, if cron runs it; once only unless given."""

    def following(self, began: int | None) -> int | None:
        """See `InPasses`."""
        if began is None:
            return self.at
        return began + self.every if self.every else None

    def groups(self, guests: Sequence[Looked]) -> Iterator[npt.NDArray[np.int64]]:
        """A group for each name and address."""
        names = sorted({each.name for each in guests})
        yield from (np.arange(each.pages) * len(names) + names.index(each.name) for each in guests)
