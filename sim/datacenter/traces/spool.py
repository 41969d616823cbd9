"""Guests of a trace in order of arrival: put on disk as they are read, taken back one by one."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from sim.errors import MachineError

_CACHE_KIB: Final = 8192
"""What SQLite holds in memory of a spool, and again of a sort."""


class Guest(NamedTuple):
    """One guest as its trace has it; times in ns of the trace's clock."""

    time: int
    place: int | bytes
    """What decides between guests of one time: row, or name of the file."""
    end: int | None
    memory: int | None
    """Bytes, whole pages."""
    vcpus: int | None
    levels: bytes
    """CPU use as shares of the virtual processors, float64; may be empty."""


@contextmanager
def temporary() -> Iterator[sqlite3.Connection]:
    """A database of its own on disk, gone afterwards; small ones never leave memory."""
    database = scratch()
    try:
        with on_disk():
            yield database
    finally:
        database.close()


def scratch() -> sqlite3.Connection:
    """A new temporary database."""
    database = sqlite3.connect("", isolation_level=None)
    for setting in ("journal_mode=OFF", "synchronous=OFF", "temp_store=FILE", f"cache_size=-{_CACHE_KIB}"):
        database.execute(f"PRAGMA {setting}")
    return database


@contextmanager
def on_disk() -> Iterator[None]:
    """Turn a full disk into a clear error."""
    try:
        yield
    except sqlite3.OperationalError as error:
        remedy = "free some space, or set SQLITE_TMPDIR to a folder with more"
        raise MachineError(f"cannot put a trace in order on disk: {error}; {remedy}") from None


class Spool:
    """All guests of a trace, on disk."""

    def __init__(self, guests: Iterable[Guest]) -> None:
        self.count = 0
        self._ordered = True
        self._database = scratch()
        with on_disk():
            self._database.execute("CREATE TABLE guest (time INTEGER, place, end INTEGER, memory, vcpus, levels BLOB)")
            # One transaction, or every row would be one.
            self._database.execute("BEGIN")
            self._database.executemany("INSERT INTO guest VALUES (?, ?, ?, ?, ?, ?)", self._counted(guests))
            self._database.execute("COMMIT")

    def _counted(self, guests: Iterable[Guest]) -> Iterator[Guest]:
        latest: Guest | None = None
        for guest in guests:
            if latest is not None and (guest.time, guest.place) < (latest.time, latest.place):
                self._ordered = False
            latest = guest
            self.count += 1
            yield guest

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Yield the fields of each guest, in order of time, then of place."""
        order = "rowid" if self._ordered else "time, place, rowid"
        with on_disk():
            yield from self._database.execute(f"SELECT * FROM guest ORDER BY {order}")

    def median_lifetime(self) -> int | None:
        """Median of how long guests live (ns), those without an end being the longest; None if that is no number."""
        middle = "SELECT end - time AS life FROM guest ORDER BY life IS NULL, life LIMIT 1 OFFSET ?"
        with on_disk():
            row = self._database.execute(middle, ((self.count - 1) // 2,)).fetchone()
        return row[0] if row else None
