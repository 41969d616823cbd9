"""zswap: compressed pages in memory before the swap device, which gets what the pool has no room for.

Source: Documentation/admin-guide/mm/zswap.rst, and what Linux 6.18 did with a pool of 1 % of 24 GiB that 800 MiB of
pages went to: it took pages up to 61,710 of its own, 1 % of MemTotal rounded down; then it refused all and wrote its
oldest pages to the device until it had 55,536, the threshold of 90 % rounded down to what pages allow; then it took
pages again. pswpout counts pages that it refused and pages that it wrote back, and not those that it took.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from pydantic import Field

from sim.columns import PAGE_BYTES
from sim.errors import At
from sim.reclaim.compression import Algorithm
from sim.reclaim.swap import Swap
from sim.units import Block

SAME_FILLED: Final = 3
"""`packed` of a page of one repeated word: zswap compresses it (zram only notes the word)."""


class Pool(NamedTuple):
    """How many pages of memory the pool may have."""

    most: int
    """With so many it is full: it takes nothing, and writes its oldest pages back."""
    again: int
    """With so many, or fewer, it stops writing back and takes pages again."""


class Zswap(Block):
    """Compressed pages in memory before the swap device; the pool's oldest pages go there when it is full."""

    compressor: Algorithm = "lzo"
    """How pages are compressed."""
    max_pool_percent: int = Field(default=20, ge=1, le=100)
    """Largest pool, in percent of the host's memory."""
    accept_threshold_percent: int = Field(default=90, ge=0, le=100)
    """A pool that was full takes pages again when it is down to so many percent of the largest pool."""

    def pool(self, memory: int) -> Pool:
        """Limits of the pool of a host with so many bytes."""
        most = memory // PAGE_BYTES * self.max_pool_percent // 100
        return Pool(most, most * self.accept_threshold_percent // 100)

    def check(self, swap: Swap | None) -> None:
        """Raise At if there is no swap device that the pool could stand before."""
        if swap is None:
            raise At("", "zswap stands before a swap device, and the host has none", "give the host swap")
        if swap.device == "zram":
            raise At("", "zswap before zram compresses pages twice", "keep one of them")
