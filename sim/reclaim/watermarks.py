"""When reclaim begins and ends, and what it prefers: the host's sysctls, by the kernel's names and defaults.

Source: Documentation/admin-guide/sysctl/vm.rst and mm/page_alloc.c of Linux 6.18, checked on that kernel; the host's
memory is taken as one zone.
"""

from __future__ import annotations

import math

from pydantic import Field

from sim.columns import PAGE_BYTES
from sim.units import Block

_LEAST_KBYTES = 128
_MOST_KBYTES = 262_144


class Watermarks(Block):
    """The sysctls under vm. that say when the host reclaims memory and how."""

    min_free_kbytes: int | None = Field(default=None, ge=0, le=1 << 40)
    """Memory kept free for the kernel itself: below it a guest that needs a frame must reclaim one first; unless
    given, 4 times the square root of the memory in KiB, from 128 KiB to 256 MiB."""
    watermark_scale_factor: int = Field(default=10, ge=1, le=3000)
    """Distance between two watermarks, in ten-thousandths of the memory; at least a quarter of the lowest."""
    swappiness: int = Field(default=60, ge=0, le=200)
    """How much rather guests' memory is taken than page cache; 0 keeps guests until the page cache is gone."""
    page_cluster: int = Field(default=3, ge=0, le=30)
    """Pages that are read from swap at once, as the power of 2."""

    def pages(self, memory: int) -> tuple[int, int, int]:
        """The watermarks min, low and high, in pages, of a host with so many bytes."""
        kbytes = self.min_free_kbytes
        if kbytes is None:
            kbytes = min(max(math.isqrt(memory // 1024 * 16), _LEAST_KBYTES), _MOST_KBYTES)
        lowest = kbytes * 1024 // PAGE_BYTES
        step = max(lowest // 4, memory // PAGE_BYTES * self.watermark_scale_factor // 10_000)
        return lowest, lowest + step, lowest + 2 * step
