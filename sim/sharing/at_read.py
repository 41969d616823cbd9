"""Satori over time: what a guest reads from its disk is hashed, and shares a frame from then on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim.memory.pages import Int64
from sim.sharing import equal_pages
from sim.sharing.source import AtSource

if TYPE_CHECKING:
    from sim.sharing.mechanism import Source
    from sim.sharing.room import Room, Site


class AtRead(AtSource):
    """Satori."""

    WORK = equal_pages.WORK

    def __init__(self, settings: Source, room: Room, site: Site) -> None:
        """See `AtSource`."""
        super().__init__(settings, room, site)
        self._equal = equal_pages.table(site.contents, site.work_ps)

    def came(self, guest: int, pages: Int64, now: int) -> None:
        """See `AtSource`; what was read from the disk is hashed and shared."""
        read = pages[self.room.files[guest][pages]]
        self.share(read + self.room.pages_of(guest).start, now)
        done, price = self._equal.n[equal_pages.DONE :], self._equal.n[equal_pages.PRICE : equal_pages.DONE]
        self.cpu_ns = int((done * price).sum()) // 1000

    def left(self, guest: int) -> None:
        """See `AtSource`."""
        span = self.room.pages_of(guest)
        equal_pages.forget_holders(self._equal, span.start, span.stop)
