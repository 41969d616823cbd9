"""Traces with a file for each guest and a line for each five minutes: PlanetLab's, and the one made of Google's.

PlanetLab (CoMon project; github.com/beloglazov/planetlab-workload-traces): CPU use in percent. Google
(github.com/dnhua/CPU-and-Memory-resource-usage-from-Google-Cluster-Data, of May 2011): CPU and memory in percent.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Final

import numpy as np
import numpy.typing as npt

from sim.datacenter.traces.rows import (
    LARGEST_FILE,
    MOST_LEVELS,
    BadRow,
    Rows,
    fault,
    listed,
    number,
    readable,
    shown,
    text_lines,
    whole_pages,
    whole_vcpus,
)
from sim.datacenter.traces.spool import Guest
from sim.datacenter.traces.trace import STEP, Trace
from sim.errors import UserError

_GZIP: Final = b"\x1f\x8b"
_PIECE: Final = 1 << 16
_NUMBER: Final = rb"\d{1,18}(?:\.\d{1,18})?"
_PLAIN: Final = {
    columns: re.compile(rb"(?:" + rb" ".join([_NUMBER] * columns) + rb"\r?\n)+") for columns in (1, 2)
}  # fmt: skip
"""Files that hold numbers alone, by their columns."""
_MOST_PLAIN: Final = 1 << 16
"""Bytes of a file that is read in one go: more than ten days."""
Shares = npt.NDArray[np.float64]
_Files = Iterator[tuple[bytes, str, IO[bytes]]]
"""Name of a guest's file, what to call it in messages, and its bytes."""


def read_planetlab(trace: Trace, rows: Rows) -> Iterator[Guest]:
    """Yield the guests in order of their files' names; all are there from the beginning and stay."""
    for name, place, stream in _in_folder(trace.source):
        cpu, _, good = _samples(stream, place, 1, rows)
        if good:
            yield Guest(0, name, None, None, None, _coarse(cpu, trace.step).tobytes())


def read_google(trace: Trace, rows: Rows) -> Iterator[Guest]:
    """Yield the guests of a folder in order of their files' names, of an archive as they lie in it."""
    files = _in_folder(trace.source) if trace.source.is_dir() else _in_archive(trace.source)
    for name, place, stream in files:
        cpu, memory, good = _samples(stream, place, 2, rows)
        if not good:
            continue
        levels, size, vcpus = _coarse(cpu, trace.step), None, None
        if trace.machine:
            try:
                size = whole_pages(memory * trace.machine.memory)
            except BadRow as bad:
                rows.leave_out(str(bad), place, good)
                continue
            vcpus = whole_vcpus(max(cpu) * trace.machine.cores)
            levels = np.minimum(levels * (trace.machine.cores / vcpus), 1.0)
        yield Guest(0, name, None, size, vcpus, levels.tobytes())


def _in_folder(folder: Path) -> _Files:
    """Every file of a folder, in order of name."""
    if not folder.is_dir():
        raise fault(folder, "is no folder", "name the folder with a file for each guest")
    inside = listed(folder)
    files = [file for file in inside if not file.is_dir()]
    if not files:
        days = ", ".join(shown(file.name) for file in inside[:3])
        remedy = f"name one of the folders in it, such as {days}" if days else "unpack the trace there"
        raise fault(folder, "holds no files", remedy)
    for file in files:
        with readable(file) as stream:
            if os.fstat(stream.fileno()).st_size > LARGEST_FILE:
                raise fault(file, "is larger than 64MiB", "a file holds the samples of one guest, a line for each")
            yield os.fsencode(file.name), shown(file.name), stream


def _in_archive(file: Path) -> _Files:
    """Every file of a tar archive, packed with gzip or not; nothing is unpacked to disk."""
    with readable(file) as raw, _whole(file):
        packed = raw.read(2) == _GZIP
        raw.seek(0)
        stream = _Bounded(gzip.GzipFile(fileobj=raw) if packed else raw)
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                stream.left = LARGEST_FILE
                _refuse_strange(file, member)
                if member.isfile() and (content := archive.extractfile(member)):
                    # Read whole: the archive hands out members only one after the other.
                    place = shown(member.name)
                    yield os.fsencode(member.name), place, io.BytesIO(content.read())
        while stream.read(_PIECE):  # to the end, where gzip keeps its check sum
            stream.left = LARGEST_FILE


def _refuse_strange(file: Path, member: tarfile.TarInfo) -> None:
    """Refuse what has no place in an archive of plain files."""
    remedy = "pack the folder again with tar, plain files only"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise fault(file, f"holds a path that leaves the archive, {shown(member.name)}", remedy)
    if not (member.isfile() or member.isdir()):
        raise fault(file, f"holds {shown(member.name)}, which is neither file nor folder", remedy)
    if member.size > LARGEST_FILE:
        raise fault(file, f"holds {shown(member.name)} of more than 64MiB", "a file holds the samples of one guest")


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    """Turn what tarfile and gzip raise for bytes that are no archive into a clear error."""
    try:
        yield
    except UserError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError):
        remedy = "fetch it again, or name the folder that it was unpacked to"
        raise fault(file, "is no tar.gz archive, or is cut short or damaged", remedy) from None


class _Bounded(io.RawIOBase):
    """A stream that gives only so much before somebody says that all is well: headers of an archive may lie."""

    def __init__(self, inner: IO[bytes] | gzip.GzipFile) -> None:
        self.left = LARGEST_FILE
        self._inner = inner

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to *size* bytes."""
        piece = self._inner.read(size)
        self.left -= len(piece)
        if self.left < -LARGEST_FILE:
            raise EOFError("more than an archive of small files needs")
        return piece


def _samples(stream: IO[bytes], place: str, columns: int, rows: Rows) -> tuple[array[float], float, int]:
    """CPU samples of a file, the most memory, both as shares, and how many samples are good.

    A bad sample keeps its place in time: the one before it stays, or none is used if it is the first.
    """
    if (plain := _plain(stream, columns)) is not None:
        rows.read += len(plain)
        return array("d", plain[:, 0].tobytes()), float(plain[:, 1:].max(initial=0.0)), len(plain)
    cpu, memory, good = array("d"), 0.0, 0
    for line, text in text_lines(stream):
        if text == b"":
            rows.read += 1
            rows.leave_out("empty line", f"{place}:{line}")
            continue
        if len(cpu) == MOST_LEVELS:
            raise fault(place, f"has more than {MOST_LEVELS:,} samples", "a file holds the samples of one guest")
        rows.read += 1
        level = cpu[-1] if cpu else 0.0
        try:
            share, used = _sample(text, columns)
            if used > 1:
                rows.mend("memory use is above 100 %, taken as 100 %", f"{place}:{line}")
            level, memory, good = share, max(memory, min(used, 1.0)), good + 1
        except BadRow as bad:
            rows.leave_out(str(bad), f"{place}:{line}")
        cpu.append(level)
    if not good:
        rows.read += 1
        rows.leave_out("a file without any sample", place)
    return cpu, memory, good


def _plain(stream: IO[bytes], columns: int) -> Shares | None:
    """Every sample of a file without any fault; None for others, which are looked at line by line."""
    text = stream.read(_MOST_PLAIN + 1)
    stream.seek(0)
    if len(text) > _MOST_PLAIN or not _PLAIN[columns].fullmatch(text):
        return None
    percent = np.array(text.split(), np.float64).reshape(-1, columns)
    return percent / 100 if percent.max() <= 100 else None


@lru_cache(maxsize=1 << 12)
def _sample(text: bytes | None, columns: int) -> tuple[float, float]:
    """CPU and memory of one line, as shares."""
    if text is None:
        raise BadRow("a line of more than 64KiB")
    fields = text.split()
    if len(fields) != columns:
        raise BadRow("not two numbers" if columns == 2 else "not one number")
    cpu = number(fields[0], "CPU use")
    if cpu > 100:
        raise BadRow("CPU use is above 100 %")
    return cpu / 100, number(fields[1], "memory use") / 100 if columns == 2 else 0.0


def _coarse(levels: array[float], step: int) -> npt.NDArray[np.float64]:
    """Levels averaged over *step*; the last average may be over less."""
    together = step // STEP
    values = np.frombuffer(levels, np.float64)
    if together == 1:
        return values
    starts = np.arange(0, len(values), together)
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))
