"""zsmalloc's pool as compiled steps: objects come and go, and a zspage is there while one of its class needs it.

Objects of a class are taken to lie in as few zspages as they can. The kernel fills holes before it takes a new
zspage, but does not close those that are left until memory is so short that it compacts: on Linux 6.18 a pool whose
pages left at random and were followed by others at once was 5 % larger than here, and one from which half of the pages
had gone and none had come 2.2 times as large, until it was compacted; then it was as large as here to the byte.
"""

from typing import NamedTuple

import numpy as np

from sim.memory.compiled import inlined
from sim.memory.pages import Int64
from sim.reclaim.compression import zsmalloc_classes


class Pool(NamedTuple):
    """Compressed pages of a host."""

    classes: Int64  # (256, 3) for each `packed`: number of the class, objects and pages of its zspages
    objects: Int64  # (classes,) objects of each class


def empty_pool() -> Pool:
    """A pool that holds nothing."""
    classes = zsmalloc_classes()
    return Pool(classes, np.zeros(classes[:, 0].max() + 1, np.int64))


@inlined
def put(pool: Pool, packed: int) -> int:
    """Store a page of that size. Returns pages of memory that the pool has more."""
    number, objects, pages = pool.classes[packed]
    fits = pool.objects[number] % objects
    pool.objects[number] += 1
    return 0 if fits else int(pages)


@inlined
def take(pool: Pool, packed: int) -> int:
    """Remove a page of that size. Returns pages of memory that the pool has less."""
    number, objects, pages = pool.classes[packed]
    pool.objects[number] -= 1
    return 0 if pool.objects[number] % objects else int(pages)
