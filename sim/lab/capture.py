"""Fingerprints of real memory as a captured image: which pages are equal and when they change, and nothing they hold.

A page's fingerprint is its xxh3_64 hash (https://xxhash.com) under a secret seed. Only numbers are written, 1 and up in
the order in which contents appear: without the secret, nobody can look up a known page. Among n contents the chance
that two get the same fingerprint is about n^2 / 2^65: 3e-8 for a guest of 4 GiB, 3e-4 for a data set of 400 GiB.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from sim import files
from sim.columns import PAGE_BYTES
from sim.errors import MachineError, UserError
from sim.lab.sources import RUN_PAGES, Mappings, Source, Stopped, opened
from sim.memory.image import MOST_BYTES, MOST_CONTENTS, NEVER_TOUCHED
from sim.units import SECOND, about_bytes, format_duration

Marks = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.uint32]
Seen = npt.NDArray[np.bool_]
Progress = Callable[[float, str], None]

_MOST_SNAPSHOTS: Final = NEVER_TOUCHED
_NUMBER_BYTES: Final = 4
_MARK_BYTES: Final = 8
_KEY_MAGIC: Final = b"overcommit key 1"
_SECRET_BYTES: Final = 16
_KEY_HEAD_BYTES: Final = len(_KEY_MAGIC) + _SECRET_BYTES
_REPORTED_PAGES: Final = 1 << 14


@dataclass(frozen=True)
class Taken:
    """What a capture kept."""

    file: Path
    snapshots: int
    pages: int
    touched_pages: int
    """Pages that exist in some snapshot."""
    zero_pages: int
    """Pages of zeros in the last snapshot."""
    contents: int
    """Different contents in the last snapshot, zeros not counted."""
    stopped: str = ""
    """Why there are fewer snapshots than were asked for."""


def capture(
    out: str | Path,
    *,
    pid: int | None = None,
    ram: str | Path | None = None,
    core: str | Path | None = None,
    mappings: Mappings = "private",
    every_ns: int = 0,
    for_ns: int = 0,
    comparable: str | Path | None = None,
    compress: bool = False,
    progress: Progress | None = None,
) -> Taken:
    """Capture a process, a guest's RAM file or a core into the image *out*; a scenario reads it as `{captured: out}`.

    With *comparable*, a key file that is made when it is missing, equal pages of all captures under that key get equal
    numbers. Interrupted after its first snapshot, it keeps what it has and raises KeyboardInterrupt all the same.
    """
    out = Path(out)
    count = _planned(every_ns, for_ns, core)
    _refuse_name(out)
    with ExitStack() as stack:
        source = stack.enter_context(opened(pid, _path(ram), _path(core), mappings))
        numbering = _Numbering(stack.enter_context(_key(_path(comparable))))
        with files.explained(out):
            rows = stack.enter_context(tempfile.TemporaryFile(dir=out.parent))
        recorder = _Recorder(source, numbering, _Rows(rows, out), count, compress)
        stopped, interrupted = "", None
        try:
            recorder.record(every_ns, progress)
        except Stopped as reason:
            stopped = str(reason)
        except KeyboardInterrupt as error:
            interrupted = error
        if not recorder.times:
            raise interrupted or UserError(f"{stopped}; nothing was kept")
        with files.explained(out):
            numbering.save()
            taken = recorder.write(out, numbering.key)
        if interrupted:
            raise interrupted
        return replace(taken, stopped=stopped)


def _path(name: str | Path | None) -> Path | None:
    return None if name is None else Path(name)


def _planned(every_ns: int, for_ns: int, core: object) -> int:
    """How many snapshots to take."""
    if bool(every_ns) != bool(for_ns):
        raise UserError("several snapshots need both --every and --for")
    if every_ns and core:
        raise UserError("a core does not change; leave out --every and --for")
    count = for_ns // every_ns + 1 if every_ns else 1
    if count > _MOST_SNAPSHOTS:
        remedy = f"use --every {format_duration(-(-for_ns // ((_MOST_SNAPSHOTS - 1) * SECOND)) * SECOND)}"
        raise UserError(f"an image holds at most {_MOST_SNAPSHOTS} snapshots, not {count}; {remedy}")
    return count


class _Numbering:
    """Dense numbers for fingerprints: 0 for the page of zeros, the others in order of appearance."""

    def __init__(self, key: _Key) -> None:
        self.key = key
        self._digest = _package("xxhash").xxh3_64_intdigest
        self.zero = np.uint64(self._digest(bytes(PAGE_BYTES), key.seed))
        known = np.append(self.zero, key.marks)
        order = np.argsort(known)
        self._known, self._numbers = known[order], order.astype(np.uint32)
        self._fresh: list[Marks] = []

    def marks(self, pages: Sequence[memoryview]) -> Marks:
        """The fingerprints of pages."""
        digest, seed = self._digest, self.key.seed
        return np.fromiter((digest(page, seed) for page in pages), np.uint64, len(pages))

    def numbers(self, marks: Marks) -> Numbers:
        """The numbers of fingerprints."""
        different, first, which = np.unique(marks, return_index=True, return_inverse=True)
        place = np.searchsorted(self._known, different)
        known = self._known[np.minimum(place, len(self._known) - 1)] == different
        fresh = np.flatnonzero(~known)
        appearing = fresh[np.argsort(first[fresh])]
        begin = len(self._known)
        if begin + len(fresh) > MOST_CONTENTS:
            raise Stopped(f"the data set has {MOST_CONTENTS} contents, as many as an image can name")
        numbers = np.empty(len(different), np.uint32)
        numbers[known] = self._numbers[place[known]]
        numbers[appearing] = np.arange(begin, begin + len(fresh))
        self._fresh.append(different[appearing])
        self._known = np.insert(self._known, place[fresh], different[fresh])
        self._numbers = np.insert(self._numbers, place[fresh], numbers[fresh])
        return numbers[which]

    def save(self) -> None:
        """Let later captures know the numbers."""
        self.key.append(np.concatenate([np.empty(0, np.uint64), *self._fresh]))
        self._fresh = []


class _Rows:
    """Numbers of each snapshot, which wait on disk beside the image until all are there."""

    def __init__(self, file: IO[bytes], out: Path) -> None:
        self._file = file
        self._out = out
        self._lengths: list[int] = []

    def add(self, numbers: Numbers) -> None:
        """Append a snapshot; pages that appear later make later rows longer."""
        with files.explained(self._out):
            self._file.write(numbers.tobytes())
        self._lengths.append(len(numbers))

    def write(self, stream: IO[bytes], count: int, pages: int) -> None:
        """Write the first *count* rows as one array, each filled up to *pages*."""
        shape = {"descr": "<u4", "fortran_order": False, "shape": (count, pages)}
        np.lib.format.write_array_header_1_0(stream, shape)
        self._file.seek(0)
        for length in self._lengths[:count]:
            stream.write(self._file.read(length * _NUMBER_BYTES))
            stream.write(bytes((pages - length) * _NUMBER_BYTES))


class _Recorder:
    """Takes snapshots of a source and remembers what the last one saw."""

    def __init__(self, source: Source, numbering: _Numbering, rows: _Rows, count: int, compress: bool) -> None:
        self.times: list[float] = []
        self._source = source
        self._numbering = numbering
        self._rows = rows
        self._count = count
        self._buffer = memoryview(bytearray(RUN_PAGES * PAGE_BYTES))
        self._views = [self._buffer[at : at + PAGE_BYTES] for at in range(0, len(self._buffer), PAGE_BYTES)]
        self._marks = np.empty(0, np.uint64)
        self._numbers = np.empty(0, np.uint32)
        self._touched = np.empty(0, np.uint8)
        self._lz4_bytes = np.empty(0, np.uint16)
        self._lz4_size = _lz4_size() if compress else None

    def record(self, every_ns: int, progress: Progress | None) -> None:
        """Take all snapshots, each at its time or as soon as the one before is done."""
        began_ns = 0
        for index in range(self._count):
            time.sleep(max(0, began_ns + index * every_ns - time.monotonic_ns()) / SECOND)
            now_ns = time.monotonic_ns()
            began_ns = began_ns or now_ns
            self._source.look()
            self._grow(self._source.pages)
            self._keep(index, *self._see(index, progress))
            self.times.append((now_ns - began_ns) / SECOND)

    def write(self, out: Path, key: _Key) -> Taken:
        """Write the image, whole or not at all, and say what is in it."""
        count = len(self.times)
        # An interruption may have left marks of a snapshot that was not kept.
        never = self._touched >= count
        self._touched[never], self._lz4_bytes[never] = NEVER_TOUCHED, 0
        last = self._numbers[~never]
        taken = Taken(
            file=out,
            snapshots=count,
            pages=len(self._touched),
            touched_pages=len(last),
            zero_pages=int(np.count_nonzero(last == 0)),
            contents=len(np.unique(last[last > 0])),
        )
        arrays = {"time_s": np.array(self.times), "touched_from": self._touched}
        if self._lz4_size:
            arrays["lz4_bytes"] = self._lz4_bytes
        arrays["meta"] = np.array(json.dumps(_meta(self._source, key, taken)))
        with files.replacing(out) as new:
            with zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                with archive.open("content.npy", "w", force_zip64=True) as stream:
                    self._rows.write(stream, count, taken.pages)
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w") as stream:
                        np.lib.format.write_array(stream, array, allow_pickle=False)
            files.sync(new)
        return taken

    def _grow(self, pages: int) -> None:
        """Make room for pages that were mapped since the last snapshot."""
        planned = len(self.times) + 1 if self.times else self._count
        if planned * pages * _NUMBER_BYTES > MOST_BYTES:
            raise Stopped(f"{planned} snapshots of {about_bytes(pages * PAGE_BYTES)} are too much for one image")
        more = pages - len(self._marks)
        self._marks = np.append(self._marks, np.zeros(more, np.uint64))
        self._numbers = np.append(self._numbers, np.zeros(more, np.uint32))
        self._touched = np.append(self._touched, np.full(more, NEVER_TOUCHED, np.uint8))
        self._lz4_bytes = np.append(self._lz4_bytes, np.zeros(more, np.uint16))

    def _see(self, index: int, progress: Progress | None) -> tuple[Marks, Seen]:
        """The fingerprints of all pages now, and which pages exist."""
        marks, seen = self._marks.copy(), np.zeros(len(self._marks), np.bool_)
        done = 0
        for run in self._source.runs():
            if progress and done % _REPORTED_PAGES + run.pages >= _REPORTED_PAGES:
                progress((index + done / len(seen)) / self._count, f"snapshot {index + 1} of {self._count}")
            done += run.pages
            at = 0
            while at < run.pages:
                rest = self._buffer[: (run.pages - at) * PAGE_BYTES]
                held = self._source.read(run.offset + at * PAGE_BYTES, rest) // PAGE_BYTES
                part = slice(run.first + at, run.first + at + held)
                marks[part] = self._numbering.marks(self._views[:held])
                seen[part] = True
                if self._lz4_size:
                    self._compress(part, marks[part])
                at += held or 1  # what cannot be read has vanished since `runs` saw it
        return marks, seen

    def _compress(self, part: slice, marks: Marks) -> None:
        """Note the LZ4 sizes of the pages in the buffer that are seen for the first time; 0 for zeros."""
        assert self._lz4_size
        fresh = (self._touched[part] == NEVER_TOUCHED) & (marks != self._numbering.zero)
        for at in np.flatnonzero(fresh).tolist():
            self._lz4_bytes[part.start + at] = self._lz4_size(self._views[at])

    def _keep(self, index: int, marks: Marks, seen: Seen) -> None:
        """Number the pages that differ from the snapshot before; one that vanished stays as it was."""
        fresh = seen & (self._touched == NEVER_TOUCHED)
        differs = fresh | (seen & (marks != self._marks))
        numbers = self._numbers.copy()
        numbers[differs] = self._numbering.numbers(marks[differs])
        self._rows.add(numbers)
        self._marks, self._numbers = marks, numbers
        self._touched[fresh] = index


class _Key:
    """The secret of a data set and, where it has a file, the fingerprints of its contents, number 1 first.

    The file only grows, so that whatever interrupts a capture leaves earlier numbers valid: 16 bytes of magic, 16 of
    secret, then 8 for each content.
    """

    def __init__(self, secret: bytes, file: int | None = None) -> None:
        self.seed = int.from_bytes(secret[:8], "little")
        self.data_set = secret[8:].hex()
        self.shared = file is not None
        self.marks = np.empty(0, np.uint64)
        self._secret = secret
        self._file = file
        if file is not None:
            with open(file, "rb", closefd=False) as stream:
                stream.seek(_KEY_HEAD_BYTES)
                entries = stream.read()
            # A crash may have left half an entry at the end.
            self.marks = np.frombuffer(entries[: len(entries) // _MARK_BYTES * _MARK_BYTES], "<u8")

    def append(self, marks: Marks) -> None:
        """Add contents to the file, if there is one; all of them or none."""
        if self._file is None:
            return
        before = os.fstat(self._file).st_size
        try:
            with open(self._file, "r+b", closefd=False) as stream:
                stream.seek(0)
                stream.write(_KEY_MAGIC + self._secret)
                stream.seek(_KEY_HEAD_BYTES + len(self.marks) * _MARK_BYTES)
                stream.write(marks.astype("<u8").tobytes())
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, before)
            raise


@contextmanager
def _key(path: Path | None) -> Iterator[_Key]:
    """The key of a data set, held by this capture alone; without a file, one that is thrown away."""
    if path is None:
        yield _Key(secrets.token_bytes(_SECRET_BYTES))
        return
    is_new = not os.path.lexists(path)
    with files.explained(path, "choose another --comparable"):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield _Key(_secret(path, file), file)
    finally:
        if is_new and not os.fstat(file).st_size:
            path.unlink(missing_ok=True)
        os.close(file)


def _secret(path: Path, file: int) -> bytes:
    """Lock a key file and return its secret, a new one if it is empty."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        head = os.pread(file, _KEY_HEAD_BYTES, 0)
    except BlockingIOError:
        raise UserError(f"{path}: another capture is using it; wait for its end") from None
    except OSError:
        head = b"unreadable"
    if head and not (head.startswith(_KEY_MAGIC) and len(head) == _KEY_HEAD_BYTES):
        raise UserError(f"{path}: is no key of a data set; name a new file to begin one")
    return head[len(_KEY_MAGIC) :] or secrets.token_bytes(_SECRET_BYTES)


# --- the file ----------------------------------------------------------------------------------------------------


def _meta(source: Source, key: _Key, taken: Taken) -> dict[str, object]:
    """Where an image is from, with nothing that tells whose it is."""
    return {
        "source": source.kind,
        "kernel": ".".join(platform.release().split(".")[:2]),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "page_bytes": PAGE_BYTES,
        "pages": taken.pages,
        "touched_pages": taken.touched_pages,
        "snapshots": taken.snapshots,
        "numbers": "comparable" if key.shared else "salted",
        "data_set": key.data_set,
    }


def _refuse_name(out: Path) -> None:
    """Refuse what no image can be written to, before anything is read."""
    if out.suffix != ".npz":
        raise UserError(f"{out}: is no name for an image; end it in .npz")
    if os.path.lexists(out):
        raise UserError(f"{out}: exists already; choose another --out")


# --- packages ----------------------------------------------------------------------------------------------------


def _package(name: str) -> Any:
    """A package that only captures need."""
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise MachineError(f"this needs the Python package {package}; run: pip install {package}") from None


def _lz4_size() -> Callable[[memoryview], int]:
    """What tells the LZ4 size of a page in bytes, that of a page that does not shrink being a page."""
    compress = _package("lz4.block").compress
    return lambda page: min(len(compress(page, store_size=False)), PAGE_BYTES)
