"""Satori for Xen: a virtual disk that knows sharing. What two guests read from it shares a frame from the read on.

Source: Milos, Murray, Hand, Fetterman, Satori: Enlightened page sharing, USENIX ATC 2009, abstract and introduction;
and the tables that Xen kept of it (tools/memshr, 2009): one by image and block, one by the hash of what was read.
Assumed: all that is read is hashed, and compared with what has its hash. What is done with the memory gained is left
out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from sim.errors import At
from sim.sharing.mechanism import Source
from sim.sharing.xen import NOT_XEN, swap_faults

if TYPE_CHECKING:
    from sim.reclaim.swap import Swap
    from sim.sharing.at_read import AtRead


class Satori(Source):
    """Parts of images that are files (`file: true`) share frames when a guest reads them; nothing else does."""

    system: ClassVar[str] = "Xen"
    refused: ClassVar[tuple[str, ...]] = NOT_XEN
    wants_files: ClassVar[bool] = True
    beside: ClassVar[tuple[str, ...]] = ("difference_engine", "xen")

    def behaviour(self) -> type[AtRead]:
        """Sharing at the read."""
        from sim.sharing.at_read import AtRead

        return AtRead

    def swap_faults(self, swap: Swap) -> Iterator[At]:
        """See `xen.swap_faults`."""
        yield from swap_faults(swap)
