"""zsmalloc's pool as compiled steps: objects come and go, and a zspage is there while one of its class needs it.

Objects of a class are taken to lie in as few zspages as they can: holes that freed objects leave are filled before
there is a new zspage, as the kernel does, and what is left over is compacted at once, as it does when memory is short.
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
