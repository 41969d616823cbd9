"""Where captured memory comes from: a living process, the RAM file of a QEMU guest, or a core dump.

Sources: Documentation/admin-guide/mm/pagemap.rst, Documentation/filesystems/proc.rst (smaps), lseek(2), elf(5).
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

from sim.columns import PAGE_BYTES
from sim.errors import MachineError, UserError
from sim.units import about_bytes

Mask = npt.NDArray[np.bool_]
Mappings = Literal["mergeable", "private", "all"]
MAPPINGS: Final[Sequence[Mappings]] = get_args(Mappings)

RUN_PAGES: Final = 256
"""Longest run: 1 MiB stays in a core's second-level cache between reading and hashing."""
_ENTRY_BYTES: Final = 8
_ENTRIES: Final = 1 << 15
_MOST_MAPPED_PAGES: Final = 1 << 30
_USER_END: Final = 1 << 63
"""What lies above belongs to the kernel, the vsyscall page among it."""
_PRESENT, _SWAPPED, _FILE_OR_SHARED = (np.uint64(1 << bit) for bit in (63, 62, 61))
_FRAME: Final = np.uint64((1 << 55) - 1)
# Of a mapping with one of these, KSM sees nothing: shared, raw frames, device memory, hugetlb, mixed, droppable.
_NEVER_MERGED: Final = frozenset(("sh", "ms", "pf", "io", "de", "ht", "mm", "dp"))
_NO_MEMORY: Final = frozenset(("pf", "io"))


class Run(NamedTuple):
    """Pages that exist one after the other, at most RUN_PAGES."""

    first: int
    """Number of the first page in the image."""
    offset: int
    """Where its bytes are in the file, or its address in the process."""
    pages: int


class Stopped(Exception):
    """No further snapshot can be taken; the text says why."""


class Source(Protocol):
    """Memory that can be looked at again and again; its image may grow, and pages keep their numbers."""

    kind: str
    pages: int

    def look(self) -> None:
        """Find out which pages there are now."""

    def runs(self) -> Iterator[Run]:
        """Pages that exist at this moment."""

    def read(self, offset: int, buffer: memoryview) -> int:
        """Fill *buffer* from there and return the bytes read; fewer where memory has vanished meanwhile."""

    def close(self) -> None:
        """Release the files."""


class RamFile:
    """The file behind a QEMU guest's memory (memory-backend-file, share=on); its holes were never touched."""

    kind = "RAM file"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _open(path)
        size = os.fstat(self._file).st_size
        head = os.pread(self._file, 8, 0)
        if head.startswith(b"\x7fELF"):
            raise UserError(f"{path}: is an ELF file, not the memory of a guest; a core dump goes to --core")
        if head.startswith((b"QFI\xfb", b"KDUMP", b"PK\3\4")):
            raise UserError(f"{path}: is a disk image, dump or archive, not the memory of a guest")
        if size % PAGE_BYTES or not size:
            raise UserError(f"{path}: has {size} bytes, which are not whole pages of 4KiB; is it a RAM file?")
        self.pages = size // PAGE_BYTES

    def look(self) -> None:
        """Refuse a file that the guest does not write to."""
        if not any(True for _ in self.runs()):
            raise UserError(f"{self._path}: nothing was ever written to it; does its memory backend have share=on?")

    def runs(self) -> Iterator[Run]:
        """Pages with data."""
        return _data_runs(self._file, 0, self.pages, 0)

    def read(self, offset: int, buffer: memoryview) -> int:
        """Read from the file."""
        return _read_file(self._path, self._file, offset, buffer)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class Segment(NamedTuple):
    """A piece of memory in a core: where it begins in the file, and how many whole pages of it are there."""

    offset: int
    pages: int


class Core:
    """An ELF core: of a process, or of a guest by QEMU's dump-guest-memory; its pieces follow one another."""

    kind = "core"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _open(path)
        self._segments = _segments(path, self._file)
        self.pages = sum(segment.pages for segment in self._segments)

    def look(self) -> None:
        """A core does not change."""

    def runs(self) -> Iterator[Run]:
        """Pages with data; what the kernel left out as a hole was never touched."""
        first = 0
        for segment in self._segments:
            yield from _data_runs(self._file, segment.offset, segment.pages, first)
            first += segment.pages

    def read(self, offset: int, buffer: memoryview) -> int:
        """Read from the file."""
        return _read_file(self._path, self._file, offset, buffer)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class _Area(NamedTuple):
    """Addresses of a process that have numbers in the image."""

    start: int
    end: int
    first: int


class Process:
    """A living process; its mappings follow one another, and what is mapped later comes behind."""

    kind = "process"

    def __init__(self, pid: int, mappings: Mappings) -> None:
        if os.sysconf("SC_PAGE_SIZE") != PAGE_BYTES:
            raise MachineError("pages of this machine are not 4KiB; capture the guest's RAM file instead")
        self.pages = 0
        self._pid = pid
        self._mappings = mappings
        self._areas: list[_Area] = []
        self._now: list[_Area] = []
        self._zero_frame = np.uint64(0)
        # Opened files stay with this memory: another process that gets the number later is never read.
        self._files: list[int] = []
        try:
            self._smaps, self._pagemap, self._memory = (self._open(name) for name in ("smaps", "pagemap", "mem"))
        except BaseException:
            self.close()
            raise

    def look(self) -> None:
        """Read the mappings, and give numbers to new ones."""
        try:
            mapped = list(self._mapped())
        except ProcessLookupError:
            raise self._ended() from None
        if sum(end - start for start, end in mapped) > _MOST_MAPPED_PAGES * PAGE_BYTES:
            raise UserError(f"process {self._pid} maps more than {about_bytes(_MOST_MAPPED_PAGES * PAGE_BYTES)}")
        if not mapped and self._areas:
            raise self._ended()
        self._now = [area for start, end in mapped for area in self._place(start, end)]
        self._zero_frame = np.uint64(0) if _merged_with_zero(self._pid) else _zero_frame()
        if not self._now and self._mappings == "mergeable":
            raise UserError(f"no memory of process {self._pid} is mergeable; use --mappings private")
        if not self._now:
            raise self._absent()

    def runs(self) -> Iterator[Run]:
        """Pages that are present or in swap."""
        for area in self._now:
            for start in range(area.start, area.end, _ENTRIES * PAGE_BYTES):
                count = min(_ENTRIES, (area.end - start) // PAGE_BYTES)
                raw = os.pread(self._pagemap, count * _ENTRY_BYTES, start // PAGE_BYTES * _ENTRY_BYTES)
                if len(raw) < count * _ENTRY_BYTES:
                    raise self._ended()
                first = area.first + (start - area.start) // PAGE_BYTES
                for begin, end in _stretches(self._exist(np.frombuffer(raw, np.uint64))):
                    yield from _cut(Run(first + begin, start + begin * PAGE_BYTES, end - begin))

    def read(self, offset: int, buffer: memoryview) -> int:
        """Read at an address."""
        try:
            count = os.preadv(self._memory, [buffer], offset)
        except OSError as error:
            if error.errno in (errno.EIO, errno.EFAULT):
                return 0
            raise MachineError(f"process {self._pid}: its memory cannot be read: {error.strerror}") from error
        if not count:
            raise self._ended()
        return count

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            os.close(file)

    def _absent(self) -> UserError:
        return UserError(f"there is no process {self._pid} with memory of its own")

    def _ended(self) -> Stopped:
        return Stopped(f"process {self._pid} ended or started another program")

    def _open(self, name: str) -> int:
        try:
            file = os.open(f"/proc/{self._pid}/{name}", os.O_RDONLY)
        except (FileNotFoundError, ProcessLookupError):
            raise self._absent() from None
        except PermissionError:
            remedy = "be its owner or root (see also /proc/sys/kernel/yama/ptrace_scope)"
            raise MachineError(f"the memory of process {self._pid} may not be read; {remedy}") from None
        self._files.append(file)
        return file

    def _mapped(self) -> Iterator[tuple[int, int]]:
        """Addresses of the mappings asked for."""
        os.lseek(self._smaps, 0, os.SEEK_SET)
        start = end = 0
        with open(self._smaps, "rb", closefd=False) as lines:
            for line in lines:
                first, *rest = line.split()
                if not first.endswith(b":"):
                    start, end = (int(address, 16) for address in first.split(b"-"))
                elif first == b"VmFlags:" and end <= _USER_END and self._wanted({flag.decode() for flag in rest}):
                    yield start, end

    def _wanted(self, flags: set[str]) -> bool:
        """Whether to capture a mapping with these flags of smaps; memory that may not be read is only reserved."""
        if "rd" not in flags:
            return False
        if self._mappings == "all":
            return not flags & _NO_MEMORY
        return not flags & _NEVER_MERGED and ("mg" in flags or self._mappings == "private")

    def _place(self, start: int, end: int) -> Iterator[_Area]:
        """Cut a mapping where it meets areas that have numbers already, and number the rest."""
        while start < end:
            index = bisect_right(self._areas, start, key=lambda area: area.start)
            before = self._areas[index - 1] if index else None
            if not before or before.end <= start:
                limit = self._areas[index].start if index < len(self._areas) else end
                before = _Area(start, min(end, limit), self.pages)
                self._areas.insert(index, before)
                self.pages += (before.end - before.start) // PAGE_BYTES
            stop = min(end, before.end)
            yield _Area(start, stop, before.first + (start - before.start) // PAGE_BYTES)
            start = stop

    def _exist(self, entries: npt.NDArray[np.uint64]) -> Mask:
        """Which of these pages exist; one that was read but never written is only the kernel's zero page."""
        exist: Mask = (entries & (_PRESENT | _SWAPPED)) != 0
        if self._mappings != "all":
            exist &= (entries & _FILE_OR_SHARED) == 0
        if self._zero_frame:
            exist &= ((entries & _PRESENT) == 0) | ((entries & _FRAME) != self._zero_frame)
        return exist


@contextmanager
def opened(pid: int | None, ram: Path | None, core: Path | None, mappings: Mappings) -> Iterator[Source]:
    """The one source that was asked for; closed in the end."""
    asked = [name for name, value in (("--pid", pid), ("--ram", ram), ("--core", core)) if value is not None]
    if len(asked) != 1:
        raise UserError(f"{' and '.join(asked) or 'nothing'} to capture; give one of --pid, --ram and --core")
    source: Source
    if pid is not None:
        source = Process(pid, mappings)
    elif ram is not None:
        source = RamFile(ram)
    else:
        assert core is not None
        source = Core(core)
    try:
        yield source
    finally:
        source.close()


def _open(path: Path) -> int:
    """Open a regular file. Raises UserError if that is impossible."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UserError(f"{path}: is not a regular file")
    return file


def _read_file(path: Path, file: int, offset: int, buffer: memoryview) -> int:
    try:
        return os.preadv(file, [buffer], offset)
    except OSError as error:
        raise MachineError(f"{path}: cannot be read: {error.strerror}") from error


def _data_runs(file: int, offset: int, pages: int, first: int) -> Iterator[Run]:
    """Runs of the *pages* pages from *offset* of a file that hold data; the image numbers them from *first*."""
    done, end = 0, offset + pages * PAGE_BYTES
    for start, stop in _data(file, offset, end):
        begin = max(done, (start - offset) // PAGE_BYTES)
        done = max(done, -(-(stop - offset) // PAGE_BYTES))
        yield from _cut(Run(first + begin, offset + begin * PAGE_BYTES, done - begin))


def _data(file: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Parts of a file that are not holes."""
    while start < end:
        try:
            start = os.lseek(file, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if start >= end:
            return
        stop = min(os.lseek(file, start, os.SEEK_HOLE), end)
        yield start, stop
        start = stop


def _cut(run: Run) -> Iterator[Run]:
    """Pieces of a run that are not too long."""
    for begin in range(0, run.pages, RUN_PAGES):
        yield Run(run.first + begin, run.offset + begin * PAGE_BYTES, min(RUN_PAGES, run.pages - begin))


def _stretches(mask: Mask) -> Iterator[tuple[int, int]]:
    """Begin and end of each stretch of True."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
    yield from zip(edges[::2], edges[1::2], strict=True)


def _zero_frame() -> np.uint64:
    """Number of the frame that the kernel maps where memory is read before it is written; 0 unless root asks."""
    area = mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page = np.frombuffer(area, np.uint64)
    page.max()
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(page.ctypes.data // PAGE_BYTES * _ENTRY_BYTES)
        return np.uint64(np.frombuffer(pagemap.read(_ENTRY_BYTES), np.uint64)[0] & _FRAME)


def _merged_with_zero(pid: int) -> bool:
    """Whether KSM has put the kernel's zero page in the place of written pages (use_zero_pages)."""
    try:
        lines = Path(f"/proc/{pid}/ksm_stat").read_text().splitlines()
    except OSError:
        return False
    return any(line.split()[0] == "ksm_zero_pages" and int(line.split()[1]) > 0 for line in lines)


# --- ELF ---------------------------------------------------------------------------------------------------------

_CORE_TYPE: Final = 4
_LOAD: Final = 1
_MANY: Final = 0xFFFF
"""Number of program headers that means: the first section header tells."""
_SECTION_INFO: Final = 7


class _Layout(NamedTuple):
    """What differs between 32 and 64 bits: formats, and where a program header has its offset and bytes in the file."""

    header: str
    section: str
    program: str
    offset: int
    file_bytes: int


_LAYOUTS: Final = {
    1: _Layout("HHIIIIIHHHHHH", "IIIIIIIIII", "IIIIIIII", 1, 4),
    2: _Layout("HHIQQQIHHHHHH", "IIQQQQIIQQ", "IIQQQQQQ", 2, 5),
}
_ORDERS: Final = {1: "<", 2: ">"}
_COMPRESSED: Final = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"\x04\x22\x4d\x18", b"BZh")


def _segments(path: Path, file: int) -> Sequence[Segment]:
    """The pieces of memory in a core, in the order of its headers, without those that its writer left out."""
    head = os.pread(file, 64, 0)
    if head.startswith(_COMPRESSED):
        raise UserError(f"{path}: is compressed; unpack it first")
    if head.startswith((b"KDUMP", b"makedumpfile")):
        raise UserError(f"{path}: is a kdump file; take the dump without -z, -l and -s to get an ELF core")
    identity = head[:16].ljust(16)
    layout, order = _LAYOUTS.get(identity[4]), _ORDERS.get(identity[5])
    if identity[:4] != b"\x7fELF" or not layout or not order:
        raise UserError(f"{path}: is no ELF core")
    size = os.fstat(file).st_size
    try:
        loads = [(each[layout.offset], each[layout.file_bytes]) for each in _loads(file, layout, order, head, size)]
    except (struct.error, OverflowError, OSError):
        raise UserError(f"{path}: is cut short or damaged: its headers cannot be read") from None
    if struct.unpack_from(f"{order}H", head, 16) != (_CORE_TYPE,):
        raise UserError(f"{path}: is an ELF file, but no core")
    if (missing := max((offset + held - size for offset, held in loads), default=0)) > 0:
        raise UserError(f"{path}: is cut short by {about_bytes(missing)}")
    ordered = sorted((offset, held) for offset, held in loads if held)
    if any(offset + held > later for (offset, held), (later, _) in pairwise(ordered)):
        raise UserError(f"{path}: has the same memory twice; dump it by physical addresses (without paging)")
    segments = [Segment(offset, held // PAGE_BYTES) for offset, held in loads if held >= PAGE_BYTES]
    if not segments:
        raise UserError(f"{path}: holds no memory")
    return segments


def _loads(file: int, layout: _Layout, order: str, head: bytes, size: int) -> Iterator[tuple[int, ...]]:
    """The program headers that describe memory."""
    *_, programs, sections, _, _, length, count, _, _, _ = struct.unpack_from(order + layout.header, head, 16)
    if count == _MANY:
        section = struct.Struct(order + layout.section)
        count = section.unpack(os.pread(file, section.size, sections))[_SECTION_INFO]
    program = struct.Struct(order + layout.program)
    raw = os.pread(file, min(length * count, size), programs)
    headers = (program.unpack_from(raw, at * length) for at in range(count))
    yield from (header for header in headers if header[0] == _LOAD)
