"""mergemem for Linux 2.0.33: a program that its user runs, which merges the memory of programs of one name.

Source: Richter and Reisner, mergemem 0.09 (TU Wien, January 1999), its README: processes of equal name are compared at
equal addresses, and equal pages become one, copied on write. There is no daemon: after a run, writes only take sharing
away. Assumed: a checksum of each page is compared first, and the program has one core to itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from sim.sharing.mechanism import Scans
from sim.units import MINUTE, Duration

if TYPE_CHECKING:
    from sim.sharing.passes import SameNames


class Mergemem(Scans):
    """When its user runs it. Guests of one entry of `vms` are processes of one name."""

    refused: ClassVar[tuple[str, ...]] = ("thp", "hugetlbfs", "zswap", "balloon", "ksmtuned", "mom")

    at: Duration = MINUTE
    """When it is run; a minute after the start unless given, when most programs have initialised their memory."""
    every: Duration | None = Field(default=None, gt=0)
    """Time from one run to the next, if cron runs it; once only unless given."""

    def behaviour(self) -> type[SameNames]:
        """A pass at each of these times."""
        from sim.sharing.passes import SameNames

        return SameNames
