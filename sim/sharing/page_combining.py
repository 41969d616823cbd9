"""Windows' page combining: equal private pages of one system become one, every so often.

Sources: Huffman, Microsoft TechNet, 29 November 2012 (on by default in Windows 8, off in Server 2012); Windows Server
tuning guide (private and pageable memory only: no file cache, no large pages); Windows Internals, 7th edition (trees by
checksum, copy on write). The period of 15 minutes is told without a source that we could read. Assumed: it takes one
core at most. Hyper-V shares nothing between its guests: each Windows combines its own memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from sim.sharing.mechanism import InPasses, Looked
from sim.units import MINUTE, Duration


class PageCombining(InPasses):
    """Which memory belongs to one Windows, and how often it is combined."""

    system: ClassVar[str] = "Windows"
    refused: ClassVar[tuple[str, ...]] = ("ksmtuned", "mom")

    within: Literal["guest", "host"] = "guest"
    """guest: each guest is a Windows of its own, and what it combines is free memory of the host. host: the guests are
    programs that run under one Windows."""
    every: Duration = Field(default=15 * MINUTE, gt=0)
    """Time from the start of one pass to that of the next."""

    @property
    def wants_files(self) -> bool:
        """To leave them alone."""
        return True

    def following(self, began: int | None) -> int:
        """See `InPasses`."""
        return (began or 0) + self.every

    def groups(self, guests: Sequence[Looked]) -> Iterator[npt.NDArray[np.int64]]:
        """A group for each Windows, without what it read from files."""
        for each in guests:
            yield np.where(each.files, -1, each.guest if self.within == "guest" else 0)
