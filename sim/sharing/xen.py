"""Page sharing under Xen by an engine that goes through all memory in rounds.

Sources: Chiang, Li, Chiueh, VEE 2013 (Xen 4.1: a round a minute, 8 to 10 s for a guest of 4 GiB); Xen 4's own
mem_sharing, which shares the pages it is told of, finds none by itself, and splits a superpage when one of its pages is
shared. Assumed: the engine takes one core at most, and pages are found wherever they are unless it looks into one guest
at a time, as in the published runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from sim.errors import At
from sim.sharing.mechanism import InPasses, Looked
from sim.units import MINUTE, Duration, Switch

if TYPE_CHECKING:
    from sim.memory.guest import Vm
    from sim.reclaim.swap import Swap

NOT_XEN: tuple[str, ...] = ("kernel", "hz", "thp", "hugetlbfs", "zswap", "balloon", "ksmtuned", "mom")
"""Settings of a host that are Linux' own."""


def swap_faults(swap: Swap) -> Iterator[At]:
    """What a swap daemon in Xen's first domain does not have."""
    if swap.device == "zram":
        yield At("device", "Xen has no zram", "write a disk, a file or a solid-state disk")


class Xen(InPasses):
    """How often all memory is gone through, and what is compared."""

    system: ClassVar[str] = "Xen"
    refused: ClassVar[tuple[str, ...]] = NOT_XEN
    splits: ClassVar[bool] = True

    every: Duration = Field(default=MINUTE, gt=0)
    """Time from the start of one round to that of the next."""
    within: Literal["host", "guest"] = "host"
    """host: pages of all guests share frames; guest: each guest is looked at by itself."""
    superpages: Switch = 1
    """Back guests with pages of 2 MiB until one of their pages is shared."""

    def following(self, began: int | None) -> int:
        """See `InPasses`."""
        return (began or 0) + self.every

    def groups(self, guests: Sequence[Looked]) -> Iterator[npt.NDArray[np.int64]]:
        """All guests are one group, or each is one."""
        yield from (np.full(each.pages, each.guest if self.within == "guest" else 0) for each in guests)

    def has_huge_pages(self, vm: Vm, asked: bool) -> bool:
        """See `InPasses`: superpages are Xen's own."""
        return bool(self.superpages) and vm.huge_pages == "madvise"

    def swap_faults(self, swap: Swap) -> Iterator[At]:
        """See `swap_faults`."""
        yield from swap_faults(swap)
