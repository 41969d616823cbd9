"""Difference Engine for Xen as a scenario describes it: equal pages share a frame, similar ones are kept as
differences, and those that nobody has used for long are compressed.

Source: Gupta and others, Difference Engine, OSDI 2008, and its shorter text in CACM, October 2010: classes of pages,
scans, passes, limits and prices (table 2, price set `xen-2008`). `clock.py` has the behaviour.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from sim.columns import PAGE_BYTES
from sim.errors import At
from sim.memory.image import UNIT_BYTES
from sim.sharing.kernels import Kernel
from sim.sharing.mechanism import InPasses
from sim.sharing.xen import NOT_XEN, swap_faults
from sim.units import SECOND, Bytes, Duration, Switch, format_bytes

if TYPE_CHECKING:
    from sim.reclaim.compression import Algorithm
    from sim.reclaim.swap import Swap
    from sim.sharing.clock import Clock


class DifferenceEngine(InPasses):
    """How often pages are looked at, and what is done with them."""

    system: ClassVar[str] = "Xen"
    refused: ClassVar[tuple[str, ...]] = NOT_XEN
    wants_similar: ClassVar[bool] = True
    packs: ClassVar[bool] = True

    every: Duration = Field(default=4 * SECOND, gt=0)
    """Time from the end of one scan to the start of the next, at least."""
    passes: int = Field(default=5, ge=1, le=1000)
    """Scans in a cycle: each has hashes of one such part of memory in its table."""
    patch: Switch = 1
    """Keep a page that was not used since the last scan as its difference from a similar one."""
    compress: Switch = 1
    """Compress a page that was not used for a whole cycle, with LZO."""
    largest: Bytes = Field(default=PAGE_BYTES // 2, ge=UNIT_BYTES, lt=PAGE_BYTES)
    """Largest difference that is kept; assumed to be the largest compressed page too."""

    @property
    def compressor(self) -> Algorithm | None:
        """LZO."""
        return "lzo" if self.compress else None

    def behaviour(self) -> type[Clock]:
        """A clock that goes through all memory."""
        from sim.sharing.clock import Clock

        return Clock

    def faults(self, kernel: Kernel) -> Iterator[At]:
        """A limit between two sizes that are told apart."""
        if self.largest % UNIT_BYTES:
            remedy = f"write {format_bytes(self.largest // UNIT_BYTES * UNIT_BYTES)}"
            yield At("largest", f"must be a multiple of {UNIT_BYTES} bytes", remedy)

    def swap_faults(self, swap: Swap) -> Iterator[At]:
        """See `xen.swap_faults`."""
        yield from swap_faults(swap)

    def following(self, began: int | None) -> int:
        """See `InPasses`."""
        return (began or 0) + self.every
