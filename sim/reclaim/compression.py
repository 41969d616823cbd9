"""How small pages become, and the memory that takes: zram and zswap keep compressed pages in zsmalloc.

Source of the size classes: Documentation/mm/zsmalloc.rst (Linux 6.18), checked on that kernel. Sizes were measured, as
said beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from sim.columns import PAGE_BYTES
from sim.cost.prices import Prices, compressor
from sim.memory.image import Capture, PageNumbers, Part, Synthetic
from sim.streams import generator

Algorithm = Literal["lzo-rle", "lzo", "lz4", "lz4hc", "zstd", "842", "copy"]
"""Those of zram, by the kernel's names, and `copy`, which makes nothing smaller."""
Sizes = npt.NDArray[np.float64]
Packed = npt.NDArray[np.uint8]
Times = npt.NDArray[np.int64]

AS_IS: Final = 255
"""`packed` of a page that is kept as it is: compressed, it would take a whole page too."""
_UNIT: Final = 16
"""Bytes between two size classes."""
_SMALLEST: Final = 32
_HANDLE: Final = 8
"""Bytes that zsmalloc puts before an object."""
_CHAIN: Final = 8
"""CONFIG_ZSMALLOC_CHAIN_SIZE, the most pages that a zspage is made of."""
_SAME_FILLED: Final = 26
"""LZ4 size of a page in which one byte stands 4096 times; captured guests have 1,600 of them and 1 to 5 of 27."""

_GUEST_SIZES: Final = np.array(
    [
        26,
        59,
        315,
        402,
        577,
        751,
        949,
        1059,
        1208,
        1359,
        1499,
        1726,
        1922,
        2226,
        2514,
        2856,
        3162,
        3365,
        3616,
        4096,
        4096,
    ]
)
"""LZ4 sizes of pages of guests, every twentieth part of them: 677,170 pages, zeros apart, of 12 captured Debian guests
(idle, nginx, PostgreSQL, Python, Java), mean 44 % of a page."""

# Compressed page by page by zram of Linux 6.18 (zstd: by the library zstandard, level 3), in proportion to the size
# that the library lz4 gives; means of five sets of 10,000 to 39,000 pages: memory of a Python process, /usr/lib,
# /usr/bin, /usr/share, Python packages. Each set is met within 5 % by the means of the other four.
_LZ4_SIZES: Final = (46, 167, 391, 784, 1292, 1798, 2300, 2761, 3300, 3821)
_PROPORTIONS: Final[Mapping[str, tuple[float, ...]]] = {
    "lz4": (0.998, 0.997, 1.0, 1.001, 1.003, 1.003, 0.993, 0.986, 0.978, 1.007),
    "lzo": (1.367, 1.076, 0.996, 0.963, 0.949, 0.948, 0.953, 0.957, 0.981, 1.008),
    "lzo-rle": (1.264, 1.049, 0.998, 0.97, 0.957, 0.956, 0.959, 0.961, 0.982, 1.009),
    "zstd": (0.843, 0.797, 0.738, 0.703, 0.702, 0.71, 0.726, 0.747, 0.771, 0.889),
    # By the library lz4, level 9, of sets like those of 2,400 to 5,000 pages; each is met within 2 % by the others.
    "lz4hc": (0.942, 0.899, 0.883, 0.866, 0.881, 0.894, 0.914, 0.927, 0.934, 0.958),
    # Not measured: the 1.1 GB of Zram Performance Analysis (Linux Reviews) became 538.6 MB, and with lz4 403.4 MB.
    "842": (1.335,) * 10,
}


@lru_cache
def zsmalloc_classes(chain: int = _CHAIN) -> npt.NDArray[np.int64]:
    """For each `packed`: number of its size class, objects in a zspage and pages in a zspage.

    A class has as many pages to a zspage, at most *chain*, as waste the least; neighbours with equal zspages are one
    class. What is same-filled (0) has a class of its own, which takes no pages.
    """
    table = np.zeros((AS_IS + 1, 3), np.int64)
    for packed in range(AS_IS, _SMALLEST // _UNIT - 1, -1):
        size = PAGE_BYTES if packed == AS_IS else packed * _UNIT
        pages = min(range(1, chain + 1), key=lambda count: count * PAGE_BYTES % size)
        zspage = pages * PAGE_BYTES // size, pages
        number, *larger = table[packed + 1] if packed < AS_IS else (-1, 0, 0)
        table[packed] = number + (zspage != tuple(larger)), *zspage
    table[1] = table[2]
    table[0] = table[2, 0] + 1, 1, 0
    return table


def pool_bytes(packed: Packed) -> int:
    """Memory that pages take, compressed (mm_stat's mem_used_total); zspages but the last of each class are full.

    The kernel fills holes before it takes a new zspage, but does not close those that are left until memory is so
    short that it compacts. On Linux 6.18 a pool whose pages left at random and were followed by others at once was 5 %
    larger than this, and one from which half of the pages had gone and none had come 2.2 times as large.
    """
    classes = zsmalloc_classes()
    counts = np.bincount(classes[packed, 0], minlength=int(classes[0, 0]) + 1)
    objects, pages = (np.zeros_like(counts) for _ in range(2))
    objects[classes[:, 0]], pages[classes[:, 0]] = classes[:, 1], classes[:, 2]
    return int((-(-counts // np.maximum(objects, 1)) * pages).sum()) * PAGE_BYTES


def stored_bytes(packed: Packed) -> float:
    """Bytes that pages were compressed to (mm_stat's compr_data_size), as if sizes were spread evenly in each unit."""
    shared = packed[(packed > 0) & (packed < AS_IS)].astype(np.int64)
    return float((shared * _UNIT - _HANDLE - (_UNIT - 1) / 2).sum() + PAGE_BYTES * np.sum(packed == AS_IS))


def packed_sizes(lz4_bytes: npt.ArrayLike, algorithm: Algorithm) -> Packed:
    """Stored size in units of 16 bytes of pages with these sizes under LZ4: 0 same-filled, 255 kept as they are."""
    sizes = np.asarray(lz4_bytes, np.float64)
    if algorithm == "copy":
        return np.full(sizes.shape, AS_IS, np.uint8)
    compressed = sizes * np.interp(sizes, _LZ4_SIZES, _PROPORTIONS[algorithm])
    packed = np.maximum(np.ceil((compressed + _HANDLE) / _UNIT), _SMALLEST // _UNIT)
    packed[packed > _largest_shared()] = AS_IS
    packed[sizes <= _SAME_FILLED] = 0
    return packed.astype(np.uint8)


def usual_packed(algorithm: Algorithm) -> int:
    """Stored size of a page of captured guests, in units of 16 bytes, on average."""
    return round(float(packed_sizes(_GUEST_SIZES, algorithm).mean()))


def cpu_ns(prices: Prices, algorithm: Algorithm) -> Times:
    """CPU time (ns) of compressing a page, and of decompressing it, by its stored size in units of 16 bytes.

    What is same-filled is seen in passing. A page that is kept as it is costs what no byte of a smaller one costs:
    lz4 and lzo soon give up on random bytes (measured: 1.6 and 0.4 us, where pages of 3 KiB took 12 and 4).
    """
    work = compressor(prices, algorithm)
    sizes = np.arange(AS_IS + 1) * float(_UNIT) - _HANDLE - (_UNIT - 1) / 2
    sizes[AS_IS] = 0
    table = np.array([work.ns(max(size, 0)) for size in sizes])
    table[0] = 0
    return np.asarray(np.rint(table), np.int64)


def _largest_shared() -> int:
    """The largest `packed` whose objects share a zspage; what is larger has a page to itself (the huge class)."""
    return int(np.flatnonzero(zsmalloc_classes()[:, 1] > 1)[-1])


def packed_of(
    image: Synthetic | Capture,
    algorithm: Algorithm,
    seed: int,
    guest: str,
    pages: int,
    places: Mapping[str, PageNumbers],
) -> Packed:
    """`packed` of each page of a guest that has so many pages; *places* has those of each part of its image."""
    return packed_sizes(lz4_sizes(image, seed, guest, pages, places), algorithm)


def lz4_sizes(
    image: Synthetic | Capture, seed: int, guest: str, pages: int, places: Mapping[str, PageNumbers]
) -> Sizes:
    """Size under LZ4 (bytes) of each of a guest's pages, which it keeps whatever the page holds later, zeros apart.

    Equal pages of a pool or of duplicates have equal sizes.
    """
    if isinstance(image, Capture):
        return _captured_sizes(image, seed, guest, pages)
    sizes = np.zeros(pages)
    for part in image.parts:
        sizes[places[part.name]] = _part_sizes(part, len(places[part.name]), seed, guest)
    return sizes


def _part_sizes(part: Part, pages: int, seed: int, guest: str) -> Sizes:
    if part.compresses_to is not None:
        return np.full(pages, part.compresses_to * PAGE_BYTES)
    owner = ("pool", part.pool) if part.pool else ("guest", guest, part.name)
    contents = -(-pages // part.duplicates) if part.duplicates else pages
    drawn = _drawn(_GUEST_SIZES, contents, seed, *owner)
    return drawn[np.arange(pages) % contents]


def _captured_sizes(capture: Capture, seed: int, guest: str, pages: int) -> Sizes:
    """Sizes that the capture noted; a page that was zero or missing when it did may hold what other pages hold."""
    known = capture.lz4_bytes
    usual = np.sort(known[known > 0]) if np.any(known > 0) else _GUEST_SIZES
    sizes = _drawn(usual, pages, seed, "guest", guest)
    noted = np.flatnonzero(known)
    sizes[noted] = known[noted]
    return sizes


def _drawn(quantiles: npt.NDArray[Any], number: int, seed: int, *names: str) -> Sizes:
    draws = generator(seed, "compression", *names).random(number)
    return np.asarray(np.interp(draws, np.linspace(0, 1, len(quantiles)), quantiles))
