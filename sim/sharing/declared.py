"""Sharing that nobody has to look for: pages that are told to come from one file or saved segment map one frame."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sim.memory import pages as memory
from sim.memory.pages import Int32, Int64
from sim.sharing.room import longer
from sim.sharing.source import AtSource

if TYPE_CHECKING:
    from sim.sharing.mechanism import Source
    from sim.sharing.pfcache import Pfcache
    from sim.sharing.room import Room, Site


class Declared(AtSource):
    """Shares every page of which it is told where it comes from, when it comes; it costs nothing."""

    def __init__(self, settings: Source | None, room: Room, site: Site) -> None:
        """*settings* are complete for the kernel; a shared kernel's page cache has none."""
        super().__init__(settings, room, site)
        self._frame_of = np.zeros(site.contents, np.int32)

    def more_contents(self, contents: int) -> None:
        """See `AtSource`."""
        super().more_contents(contents)
        self._frame_of = longer(self._frame_of, contents)

    def came(self, guest: int, pages: Int64, now: int) -> None:
        """The guest's pages were filled or written."""
        origins = self.room.origins.get(guest)
        if origins is not None:
            self._join(guest, pages[self._shared(origins[pages])], now)

    def _shared(self, origins: Int32) -> npt.NDArray[np.bool_]:
        """Which pages with these origins are shared."""
        return np.asarray(origins != 0)

    def _join(self, guest: int, pages: Int64, now: int) -> None:
        """Let pages of a guest map the frames of their contents."""
        self.room.share(self._frame_of, self.room.pages_of(guest).start + pages, now)


class FileCache(Declared):
    """pfcached: files that several containers have in use are copied once, and the copy is what all then read."""

    def __init__(self, settings: Pfcache, room: Room, site: Site) -> None:
        """*settings* are complete for the kernel."""
        super().__init__(settings, room, site)
        self.every = settings.TIMEOUT
        self._settings = settings
        self._sha1_ps = site.sha1_ps
        self._used: dict[int, int] = {}
        """When each file in the cache was last in use, by its origin; those in use at the last pass may lag behind."""
        self._taken = 0
        """What the files in the cache take (bytes)."""
        self._pages: Counter[int] = Counter()
        """Pages of each file, as many as any container had of it."""
        self._users: Counter[int] = Counter()
        """How many containers had each file in use at the last pass."""
        self._passed = -1
        """When that was."""
        self._held = -1
        """Pages that guests held then, if all was as it should be."""
        self._writes = bool(site.rates[:, memory.WRITES].any())

    def came(self, guest: int, pages: Int64, now: int) -> None:
        """See `Declared`; who uses what has changed."""
        self._held = -1
        super().came(guest, pages, now)

    def left(self, guest: int) -> None:
        """A guest ended."""
        self._held = -1

    def _shared(self, origins: Int32) -> npt.NDArray[np.bool_]:
        return np.isin(origins, list(self._used))

    def act(self, now: int) -> None:
        """Look what is in use, copy what is worth it, and make room."""
        counts = self.room.m.counts
        held = int(counts[memory.TOUCHED] + counts[memory.SWAPPED_PAGES])
        if held == self._held and not self._writes:
            self._passed = now  # nothing is there that was not there at the last pass, nor is anything gone
            return
        self._used |= dict.fromkeys(self._used.keys() & self._users.keys(), self._passed)
        self._users, self._passed, self._held = self._look_who_uses_what(), now, held
        self._used |= dict.fromkeys(self._used.keys() & self._users.keys(), now)
        self._taken = sum(map(self._bytes, self._used))
        new = ((file, number) for file, number in self._users.items() if file not in self._used)
        wanted = sorted(file for file, number in new if self._is_wanted(file, number))
        for file in wanted:
            self._make_room(self._bytes(file))
            self._used[file] = now
            self._taken += self._bytes(file)
            self.cpu_ns += self._pages[file] * self._sha1_ps // 1000
        if wanted:
            self._held = -1  # what made room may be wanted again
        for guest, origins in self.room.origins.items() if wanted else ():
            self._join(guest, np.flatnonzero(np.isin(origins, wanted)), now)

    def _look_who_uses_what(self) -> Counter[int]:
        users: Counter[int] = Counter()
        for guest, origins in self.room.origins.items():
            files, pages = np.unique(origins[(origins != 0) & (self.room.read(guest) > 0)], return_counts=True)
            for file, number in zip(files.tolist(), pages.tolist(), strict=True):
                users[file] += number >= self._settings.PAGEMIN
                self._pages[file] = max(self._pages[file], number)
        return users

    def _is_wanted(self, file: int, users: int) -> bool:
        size = self._bytes(file)
        fits = self._settings.MINSIZE <= size <= min(self._settings.MAXSIZE, self._settings.image)
        return fits and users >= self._settings.COUNT

    def _bytes(self, file: int) -> int:
        return self._pages[file] * memory.PAGE_BYTES

    def _make_room(self, size: int) -> None:
        """Let the files go that were in use longest ago, and some more for those to come, if there is no room."""
        if self._taken + size <= self._settings.image:
            return
        most = self._settings.image * (100 - self._settings.purge_ahead_percent) // 100 - size
        for file in sorted(self._used, key=lambda each: (self._used[each], each)):
            if self._taken <= max(most, 0):
                return
            del self._used[file]
            self._taken -= self._bytes(file)
