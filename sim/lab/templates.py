"""Pages that zram makes as small as a simulated guest's: memory of this machine's programs, cut to measure.

What compression costs depends on what a page holds: random bytes and zeros take a tenth of the time that ordinary
memory takes to the same size.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Final

import numpy as np

from sim.lab.guest import PAGE_BYTES, Keys, mix
from sim.lab.swap_costs import ordinary_bytes
from sim.lab.swapping import zram_device
from sim.reclaim.compression import AS_IS

_VARIANTS: Final = 4
"""Pages for each size, so that they are not all alike."""
_CUTS: Final = (4096, 4096, 3072, 2048, 1024, 512, 256, 128, 64)
"""How many bytes of a page are ordinary memory; the rest is zeros."""
_CANDIDATES: Final = 900
"""Pages tried of each cut."""
_UNIT: Final = 16
_HANDLE: Final = 8
"""Bytes between two size classes, and bytes that zsmalloc puts before an object (Documentation/mm/zsmalloc.rst)."""


def templates(algorithm: str) -> Keys:
    """Pages by their `packed` (see `sim.reclaim.compression`) and variant, shape (256, variants, words).

    The first word of each is for whoever uses it. Sizes without a page have that of the nearest size; `packed` 0 and
    AS_IS are left to `render`. Only inside `exclusive`.
    """
    pages = _candidates()
    packed = np.ceil((_zram_sizes(pages, algorithm) + _HANDLE) / _UNIT).astype(int)
    found = np.zeros((AS_IS + 1, _VARIANTS, pages.shape[1]), np.uint64)
    by_size = np.argsort(packed, kind="stable")
    for wanted in range(AS_IS):
        nearest = np.argsort(np.abs(packed[by_size] - wanted), kind="stable")[:_VARIANTS]
        found[wanted] = pages[by_size[nearest]]
    return found


def _candidates() -> Keys:
    data = np.frombuffer(ordinary_bytes(len(_CUTS) * _CANDIDATES * PAGE_BYTES), np.uint64)
    pages = data[: len(data) // (PAGE_BYTES // 8) * (PAGE_BYTES // 8)].reshape(-1, PAGE_BYTES // 8).copy()
    for number, cut in enumerate(_CUTS):
        pages[number :: len(_CUTS), cut // 8 :] = 0
    pages[:, 0] = mix(np.arange(1, len(pages) + 1, dtype=np.uint64))
    return pages


def _zram_sizes(pages: Keys, algorithm: str) -> Keys:
    """Bytes that zram makes of each page."""
    sizes = np.zeros(len(pages), np.uint64)
    with zram_device() as number, mmap.mmap(-1, PAGE_BYTES) as aligned:
        folder = Path(f"/sys/block/zram{number}")
        (folder / "comp_algorithm").write_text(algorithm)
        (folder / "disksize").write_text(str(pages.nbytes))
        device = os.open(f"/dev/zram{number}", os.O_RDWR | os.O_DIRECT)
        statistics = os.open(folder / "mm_stat", os.O_RDONLY)
        try:
            stored = 0
            for at, page in enumerate(pages):
                aligned[:] = page.tobytes()
                os.pwrite(device, aligned, at * PAGE_BYTES)
                before, stored = stored, int(os.pread(statistics, 256, 0).split()[1])
                sizes[at] = stored - before
        finally:
            os.close(statistics)
            os.close(device)
    return sizes
