"""What became of the rows of a trace: each is used, mended or left out, and none silently."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from sim.columns import PAGE_BYTES
from sim.errors import Problem, UserError
from sim.units import DAY

LONGEST_LINE: Final = 1 << 16
"""Bytes of a line of text; a longer one is a bad row and is skipped without being held."""
LARGEST_FILE: Final = 1 << 26
"""Bytes of one guest's file in a folder or an archive."""
MOST_LEVELS: Final = 1 << 20
"""Samples of one guest: ten years in steps of five minutes."""
LATEST: Final = 36_500 * DAY
"""No trace goes on for more than a hundred years (ns)."""
_MOST_MEMORY = 1 << 50
_MOST_VCPUS = 4096


class BadRow(Exception):
    """A row that cannot be used, and why; the reason holds no value, so that rows can be counted by it."""


@dataclass
class Noted:
    """How many rows have one fault, and where the first one is: the same text wherever the trace lies."""

    first: str
    count: int = 0


@dataclass
class Rows:
    """The account of a trace's rows."""

    read: int = 0
    """Rows seen, headers and empty lines at the end not counted."""
    left_out: dict[str, Noted] = field(default_factory=dict)
    """Bad rows by reason."""
    mended: dict[str, Noted] = field(default_factory=dict)
    """Rows that were used with a value other than what they say, by reason."""

    @property
    def bad(self) -> int:
        """Rows left out."""
        return sum(noted.count for noted in self.left_out.values())

    def leave_out(self, reason: str, place: str, count: int = 1) -> None:
        """Count bad rows."""
        self.left_out.setdefault(reason, Noted(place)).count += count

    def mend(self, reason: str, place: str, count: int = 1) -> None:
        """Count rows that were used differently."""
        self.mended.setdefault(reason, Noted(place)).count += count

    def lines(self) -> Iterator[str]:
        """Say what was left out and mended, one line for each reason."""
        for what, faults in (("left out", self.left_out), ("mended", self.mended)):
            for reason, noted in faults.items():
                yield f"{noted.count:,} of {self.read:,} rows {what}: {reason} (first: {noted.first})"

    def check(self, path: Path, form: str) -> None:
        """Refuse a trace without a row, or with more bad rows than good ones."""
        if not self.read:
            raise UserError(Problem(file=shown(path), message="holds no rows", remedy=f"is it a trace of {form}?"))
        if 2 * self.bad > self.read:
            faults = "; ".join(f"{reason} ({noted.first})" for reason, noted in self.left_out.items())
            message = f"{self.bad:,} of {self.read:,} rows are bad: {faults}"
            raise UserError(Problem(file=shown(path), message=message, remedy=f"is it a trace of {form}?"))


def shown(path: Path | str) -> str:
    """A path as text that every terminal takes."""
    return os.fsencode(path).decode("utf-8", "replace")


def fault(path: Path | str, message: str, remedy: str) -> UserError:
    """What is wrong with a whole file."""
    return UserError(Problem(file=shown(path), message=message, remedy=remedy))


def listed(folder: Path) -> list[Path]:
    """What a folder holds, in order of name."""
    try:
        return sorted(folder.iterdir(), key=lambda file: os.fsencode(file.name))
    except OSError as error:
        raise fault(folder, f"cannot be read: {error.strerror}", "check its rights") from None


@contextmanager
def readable(path: Path) -> Iterator[IO[bytes]]:
    """Open a plain file for reading; whatever keeps it from being read is the user's to mend."""
    try:
        # What is no plain file, such as a pipe, might never end or never begin.
        if not path.is_file():
            missing = "is no plain file" if os.path.exists(path) else "no such file"
            raise fault(path, missing, "name a file that can be read from its beginning to its end")
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise fault(path, f"cannot be read: {error.strerror or error}", "check the file and its rights") from None


def text_lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line with its number from 1, without its end; None for one that is too long."""
    number = 0
    while line := stream.readline(LONGEST_LINE):
        number += 1
        whole = line.endswith(b"\n") or len(line) < LONGEST_LINE
        yield number, line.rstrip(b"\r\n") if whole else None
        rest = b"" if whole else b"..."
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(LONGEST_LINE)


def number(text: bytes | float | None, what: str, least: float = 0.0) -> float:
    """The finite number that a field says, 0 or more unless *least* is lower."""
    try:
        value = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise BadRow(f"{what} is no number") from None
    # Python reads 1_000 as a thousand; no trace writes that.
    if not math.isfinite(value) or (isinstance(text, bytes) and b"_" in text):
        raise BadRow(f"{what} is no number")
    if value < least:
        raise BadRow(f"{what} is negative")
    return value


def moment(value: float, unit: int, what: str) -> int:
    """Nanoseconds of so many units."""
    if abs(value) * unit > LATEST:
        raise BadRow(f"{what} is more than a hundred years away")
    return round(value * unit)


def whole_pages(size: float) -> int:
    """Bytes rounded up to pages of 4 KiB."""
    if size <= 0:
        raise BadRow("memory is 0")
    if size > _MOST_MEMORY:
        raise BadRow("memory is more than 1 PiB")
    return max(1, math.ceil(round(size / PAGE_BYTES, 6))) * PAGE_BYTES


def whole_vcpus(cores: float) -> int:
    """Virtual processors for so many cores: rounded up, at least one."""
    if cores > _MOST_VCPUS:
        raise BadRow(f"more than {_MOST_VCPUS} processors")
    # Tenths of a core are not exact in binary: 0.1 x 30 is a little more than 3.
    return max(1, math.ceil(round(cores, 6)))


def lasting(start: int, end: int) -> int:
    """The *end* of a life that begins at *start* and lasts a while."""
    if end < start:
        raise BadRow("ends before it starts")
    if end == start:
        raise BadRow("ends as it starts")
    return end
