"""Virtuozzo's pfcache: containers whose files lie on disks of their own share those that are equal, file by file.

Sources: Virtuozzo 7 command line reference (names and defaults), Virtuozzo 6 user's guide, Memory and IOPS
deduplication (the kernel finds the copy by the SHA1 that a file has as an attribute; the least recently used files make
room). Assumed: a pool is one file, and so is a page of a captured image; what containers have read of a file before it
is copied is given up when it is; a file that makes room stays with those who have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from sim.errors import At
from sim.sharing.kernels import Kernel
from sim.sharing.mechanism import Source
from sim.units import GIB, SECOND, Bytes, Duration, format_bytes

if TYPE_CHECKING:
    from sim.sharing.declared import FileCache


class Pfcache(Source):
    """Which files are copied to the cache."""

    beside: ClassVar[tuple[str, ...]] = ("ksm",)

    COUNT: int = Field(default=2, ge=1, le=1_000_000)
    """Containers that must have a file in use."""
    TIMEOUT: Duration = Field(default=5 * SECOND, gt=0)
    """Time from one pass to the next."""
    PAGEMIN: int = Field(default=1, ge=0, le=1 << 40)
    """Pages of a file that a container must have in memory to count as having it in use."""
    MINSIZE: Bytes = 0
    """Smallest file that is copied."""
    MAXSIZE: Bytes = 2 * GIB
    """Largest file that is copied."""
    image: Bytes = Field(default=10 * GIB, gt=0)
    """What the cache holds, on disk; the least recently used files make room."""
    purge_ahead_percent: int = Field(default=20, ge=0, le=100)
    """How much of it is then freed at once."""

    def behaviour(self) -> type[FileCache]:
        """A pass every so often."""
        from sim.sharing.declared import FileCache

        return FileCache

    def faults(self, kernel: Kernel) -> Iterator[At]:
        """Sizes between which there is nothing."""
        if self.MINSIZE > self.MAXSIZE:
            most = format_bytes(self.MAXSIZE)
            yield At("MINSIZE", "is more than MAXSIZE: no file is copied", f"write {most} or less")
