"""The kernel's two lists of pages of one guest at its limit, in plain Python: each access is seen, nothing drawn."""

from __future__ import annotations

from collections import Counter, OrderedDict

BATCH = 32
TRIES = 16


class TwoLists:
    """A guest with a limit, and swap that keeps a copy of what came back or does not. Lists end with their heads."""

    def __init__(self, *, limit: int, keeps: bool) -> None:
        self.limit = limit
        self.keeps = keeps
        self.inactive: OrderedDict[int, None] = OrderedDict()
        self.active: OrderedDict[int, None] = OrderedDict()
        self.young: set[int] = set()
        self.referenced: set[int] = set()
        self.copies: set[int] = set()
        self.out: dict[int, int] = {}
        """Swapped pages, and the age at which each left."""
        self.age = 0
        self.counts: Counter[str] = Counter()

    def access(self, page: int, write: bool = False) -> None:
        """The guest reads or writes a page."""
        if page not in self.inactive and page not in self.active:
            self._bring(page)
        self.young.add(page)
        if write:
            self.copies.discard(page)

    def _bring(self, page: int) -> None:
        failures = 0
        while len(self.inactive) + len(self.active) >= self.limit:
            assert failures < TRIES
            failures += self._reclaim(BATCH) == 0
        again = page in self.out
        near = again and self.age - self.out.pop(page) <= len(self.active)
        self.counts["pswpin"] += again
        self.counts["workingset_activate_anon"] += near
        self.age += near
        if again and self.keeps:
            self.copies.add(page)
        (self.active if near else self.inactive)[page] = None

    def _low(self) -> bool:
        return len(self.inactive) < len(self.active)

    def _reclaim(self, wanted: int) -> int:
        stolen = 0
        for priority in range(12, -1, -1):
            if stolen >= wanted:
                break
            inactive = len(self.inactive) >> priority
            active = len(self.active) >> priority if self._low() else 0
            while (inactive > 0 or active > 0) and stolen < wanted:
                if active > 0:
                    self._deactivate(min(active, BATCH))
                    active -= BATCH
                if inactive > 0:
                    stolen += self._shrink(min(inactive, BATCH))
                    inactive -= BATCH
            if self._low():
                self._deactivate(BATCH)
        return stolen

    def _deactivate(self, pages: int) -> None:
        for _ in range(min(pages, len(self.active))):
            page, _ = self.active.popitem(last=False)
            self.young.discard(page)
            self.inactive[page] = None

    def _shrink(self, pages: int) -> int:
        stolen = 0
        for _ in range(pages):
            if not self.inactive:
                break
            page, _ = self.inactive.popitem(last=False)
            self.counts["pgscan"] += 1
            if page not in self.young:
                self.counts["pswpout"] += page not in self.copies
                self.copies.discard(page)
                self.out[page] = self.age
                self.referenced.discard(page)
                self.age += 1
                stolen += 1
                continue
            self.young.discard(page)
            if page in self.referenced:
                self.referenced.discard(page)
                self.active[page] = None
                self.age += 1
            else:
                self.referenced.add(page)
                self.inactive[page] = None
        return stolen
