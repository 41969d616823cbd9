"""Huge pages: transparent ones, khugepaged, which makes them of small pages, and hugetlbfs, set aside from the start.

Source: Documentation/admin-guide/mm/transhuge.rst and hugetlbpage.rst (settings and defaults); mm/khugepaged.c and
mm/huge_memory.c of Linux 6.18 for behaviour, checked on that kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sim.units import Block

if TYPE_CHECKING:
    from sim.memory.pages import Memory


class Khugepaged(Block):
    """The daemon that puts the pages of a 2 MiB area into one huge page; by the kernel's names and defaults."""

    pages_to_scan: int = Field(default=4096, ge=512, le=1 << 32)
    """Pages it looks at before it sleeps."""
    scan_sleep_millisecs: int = Field(default=10_000, ge=0, le=1 << 32)
    """How long it sleeps, in ms."""
    max_ptes_none: int = Field(default=511, ge=0, le=511)
    """Most pages of an area that may be untouched; they cost memory from then on."""
    max_ptes_shared: int = Field(default=256, ge=0, le=511)
    """Most pages of an area that may be shared, by KSM or by a fork; they are copied and shared no more."""
    max_ptes_swap: int = Field(default=64, ge=0, le=511)
    """Most pages of an area that may be swapped out; they are read back."""


class Thp(Block):
    """Transparent huge pages of a host."""

    enabled: Literal["always", "madvise", "never"] = "never"
    """Who gets huge pages: everyone, guests that ask (as QEMU does for all guest memory), or nobody."""
    khugepaged: Khugepaged = Khugepaged()
    """Makes huge pages out of small ones."""

    def gives(self, asks: bool) -> bool:
        """Whether a guest gets huge pages that asks for them, or does not."""
        return self.enabled == "always" or (self.enabled == "madvise" and asks)


class Hugetlbfs(Block):
    """Huge pages set aside for guests that are backed by hugetlbfs, and for nobody else."""

    size: Literal["2MiB", "1GiB"] = "2MiB"
    """Size of a page."""
    nr_hugepages: int = Field(ge=1, le=1 << 32)
    """How many pages are set aside."""

    @property
    def page_bytes(self) -> int:
        """Size of a page in bytes."""
        return {"2MiB": 2 << 20, "1GiB": 1 << 30}[self.size]

    @property
    def bytes(self) -> int:
        """All memory set aside."""
        return self.nr_hugepages * self.page_bytes


class Daemon:
    """Where khugepaged is: guests in the order in which they started, and the next block of one of them."""

    def __init__(self, settings: Khugepaged) -> None:
        self._settings = settings
        self._guests: list[int] = []
        self._turn = 0
        self._block = 0

    def register(self, guest: int) -> None:
        """A guest that gets huge pages starts."""
        self._guests.append(guest)

    def forget(self, guest: int) -> None:
        """A guest ends."""
        if guest not in self._guests:
            return
        turn = self._guests.index(guest)
        del self._guests[turn]
        if turn < self._turn:
            self._turn -= 1
        elif turn == self._turn:
            self._block = 0

    def wake(self, m: Memory, now: int) -> tuple[int, int]:
        """Look at as many blocks as the settings allow. Returns blocks looked at, and huge pages made."""
        from sim.memory.pages import BLOCK, collapse_blocks

        settings = self._settings
        left = -(-settings.pages_to_scan // BLOCK)
        looked = collapsed = passes = 0
        while left > 0 and self._guests:
            if self._turn >= len(self._guests):
                self._turn = self._block = 0
            if self._turn == 0 and self._block == 0:
                passes += 1
                if passes > 1:
                    break
            seen, made, ended = collapse_blocks(
                m, self._guests[self._turn], self._block, left, settings.max_ptes_none, settings.max_ptes_shared,
                settings.max_ptes_swap, now,
            )  # fmt: skip
            left, looked, collapsed, self._block = left - seen, looked + seen, collapsed + made, self._block + seen
            if ended:
                self._turn, self._block = self._turn + 1, 0
        return looked, collapsed
