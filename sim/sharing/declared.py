"""Sharing that nobody has to look for: pages that are told to come from one file or saved segment map one frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

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

_ABSENT: Final = -1


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
        self._files = np.empty(0, np.int32)
        """Every file that was ever in use, by its origin, rising; what follows has a number for each."""
        self._used = np.empty(0, np.int64)
        """When each was last in use, or _ABSENT from the cache; what was in use at the last pass may lag behind."""
        self._pages = np.empty(0, np.int64)
        """Pages of each, as many as any container had of it."""
        self._users = np.empty(0, np.int64)
        """How many containers had each in use at the last pass, _ABSENT where none had a page of it."""
        self._taken = 0
        """What the files in the cache take (bytes)."""
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
        return np.isin(origins, self._files[self._used != _ABSENT])

    def act(self, now: int) -> None:
        """Look what is in use, copy what is worth it, and make room."""
        counts = self.room.m.counts
        held = int(counts[memory.TOUCHED] + counts[memory.SWAPPED_PAGES])
        if held == self._held and not self._writes:
            self._passed = now  # nothing is there that was not there at the last pass, nor is anything gone
            return
        self._note_use(self._passed)
        self._look_who_uses_what()
        self._passed, self._held = now, held
        self._note_use(now)
        sizes = self._pages * memory.PAGE_BYTES
        self._taken = int(sizes[self._used != _ABSENT].sum())
        wanted = np.flatnonzero((self._used == _ABSENT) & (self._users != _ABSENT) & self._is_wanted(sizes))
        if not len(wanted):
            return
        for file, size in zip(wanted.tolist(), sizes[wanted].tolist(), strict=True):
            self._make_room(size)
            self._used[file] = now
            self._taken += size
        self.cpu_ns += int((self._pages[wanted] * self._sha1_ps // 1000).sum())
        self._held = -1  # what made room may be wanted again
        for guest, origins in self.room.origins.items():
            self._join(guest, np.flatnonzero(np.isin(origins, self._files[wanted])), now)

    def _note_use(self, now: int) -> None:
        """Files in the cache that were in use at the last pass are so *now*."""
        self._used[(self._used != _ABSENT) & (self._users != _ABSENT)] = now

    def _look_who_uses_what(self) -> None:
        found = [
            np.unique(origins[(origins != 0) & (self.room.read(guest) > 0)], return_counts=True)
            for guest, origins in self.room.origins.items()
        ]
        files = np.concatenate([self._files[:0], *(each for each, _ in found)])
        pages = np.concatenate([self._pages[:0], *(each for _, each in found)])
        self._know(files)
        at = np.searchsorted(self._files, files)
        np.maximum.at(self._pages, at, pages)
        self._users = np.bincount(at[pages >= self._settings.PAGEMIN], minlength=len(self._files))
        self._users[np.bincount(at, minlength=len(self._files)) == 0] = _ABSENT

    def _know(self, files: Int32) -> None:
        """Make room for files that were never in use before."""
        known = np.union1d(self._files, files)
        before = np.searchsorted(known, self._files)
        used, pages = np.full(len(known), _ABSENT), np.zeros(len(known), np.int64)
        used[before], pages[before] = self._used, self._pages
        self._files, self._used, self._pages = known, used, pages

    def _is_wanted(self, sizes: Int64) -> npt.NDArray[np.bool_]:
        """Which files, of these sizes, are worth a copy."""
        most = min(self._settings.MAXSIZE, self._settings.image)
        return (sizes >= self._settings.MINSIZE) & (sizes <= most) & (self._users >= self._settings.COUNT)

    def _make_room(self, size: int) -> None:
        """Let the files go that were in use longest ago, and some more for those to come, if there is no room."""
        if self._taken + size <= self._settings.image:
            return
        most = self._settings.image * (100 - self._settings.purge_ahead_percent) // 100 - size
        there = np.flatnonzero(self._used != _ABSENT)
        there = there[np.argsort(self._used[there], kind="stable")]
        sizes = self._pages[there] * memory.PAGE_BYTES
        gone = self._taken - np.cumsum(sizes) + sizes > max(most, 0)
        self._used[there[gone]] = _ABSENT
        self._taken -= int(sizes[gone].sum())
