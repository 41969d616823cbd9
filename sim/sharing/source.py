"""What a host asks of a mechanism that lets pages share a frame where they come from, beside whatever scans it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sim.memory.pages import Int64
from sim.sharing import equal_pages

if TYPE_CHECKING:
    from sim.memory.guest import Vm
    from sim.sharing.mechanism import Source
    from sim.sharing.room import Room, Site


class AtSource:
    """Shares pages of a room where they come from. Times are host times in ns."""

    WORK: ClassVar[tuple[str, ...]] = ()
    """Kinds of work that it is paid for; each has a price (see cost/prices.py)."""

    every: int | None = None
    """Time (ns) from one `act` to the next; it never acts by itself unless given."""

    def __init__(self, settings: Source | None, room: Room, site: Site) -> None:
        """*settings* are complete for the kernel."""
        self.room = room
        self.cpu_ns = 0
        """CPU time that it has taken."""
        self._equal = equal_pages.table(site.contents, np.zeros(len(equal_pages.WORK), np.int64))

    def more_contents(self, contents: int) -> None:
        """Make room for so many contents in all."""
        self._equal = equal_pages.longer_table(self._equal, contents)

    def started(self, guest: int, vm: Vm) -> None:
        """A guest starts: its memory is still untouched."""

    def came(self, guest: int, pages: Int64, now: int) -> None:
        """The guest's pages were filled or written."""

    def act(self, now: int) -> None:
        """What it does by itself every so often."""

    def left(self, guest: int) -> None:
        """A guest ended."""

    def share(self, pages: Int64, now: int) -> int:
        """Let equal pages of these (of the host's memory) and of those before map one frame. Returns how many more."""
        before = int(self._equal.n[equal_pages.SHARES])
        self.room.look_at(self._equal, pages, now)
        return int(self._equal.n[equal_pages.SHARES]) - before
