"""Captured memory is what was there: processes, RAM files, cores, one after the other and as one data set."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import one_host
import pytest
import tiny_guest
from child import Child
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

import sim
from sim.cli import main
from sim.errors import MachineError, UserError
from sim.lab import sources
from sim.lab.capture import Taken, capture
from sim.memory.image import load_capture
from sim.scenario import parse
from sim.units import SECOND

NEVER = 255
Arrays = Mapping[str, npt.NDArray[Any]]
SCANNING = {"run": 1, "pages_to_scan": 5000, "smart_scan": 0}
Key = int | None
"""What a page holds, as a number; 0 is zeros, None a page that is not written."""


def page(key: int) -> bytes:
    """The 4096 bytes of a page."""
    return key.to_bytes(8, "little") * 512


def arrays(file: Path) -> Arrays:
    """What is in an image."""
    with np.load(file, allow_pickle=False) as image:
        return dict(image)


def call(*arguments: object) -> Result:
    """Call `overcommit lab capture`."""
    return CliRunner().invoke(main, ["lab", "capture", *map(str, arguments)])


@contextmanager
def staged(*acts: Callable[[], object]) -> Iterator[None]:
    """Have these things happen before each snapshot in turn; waiting moves a clock and takes no time."""
    now_ns = SECOND
    waiting = iter(acts)

    def sleep(seconds: float) -> None:
        nonlocal now_ns
        now_ns += round(seconds * SECOND)
        next(waiting, lambda: None)()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sim.lab.capture.time", SimpleNamespace(sleep=sleep, monotonic_ns=lambda: now_ns))
        yield


class RamFile:
    """A RAM file with holes, which needs no file system."""

    def __init__(self, pages: int) -> None:
        self._file = os.memfd_create("ram")
        self.path = Path(f"/proc/self/fd/{self._file}")
        self.resize(pages)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)

    def resize(self, pages: int) -> None:
        """Cut the file, or add a hole."""
        os.ftruncate(self._file, pages * 4096)

    def put(self, *keys: Key, first: int = 0) -> None:
        """Write pages."""
        for number, key in enumerate(keys, first):
            if key is not None:
                os.pwrite(self._file, page(key), number * 4096)


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    """A process of which only the areas that it was told to make are captured."""
    process = Child()
    mapped = sources.Process._mapped

    def areas(source: sources.Process) -> Iterator[tuple[int, int]]:
        for start, end in mapped(source):
            yield from ((max(start, low), min(end, high)) for low, high in process.areas if low < end and start < high)

    monkeypatch.setattr(sources.Process, "_mapped", areas)
    yield process
    process.end()


@pytest.fixture
def ram() -> Iterator[RamFile]:
    with RamFile(8) as file:
        yield file


# --- what an image says ------------------------------------------------------------------------------------------

Snapshots = Sequence[Sequence[Key]]


def expected(snapshots: Snapshots) -> tuple[list[list[int]], list[int]]:
    """Content and touched_from of an image of these writes, in plain Python."""
    numbers = {0: 0}
    held: list[Key] = [None] * len(snapshots[0])
    touched = [NEVER] * len(held)
    rows = []
    for index, keys in enumerate(snapshots):
        for number, key in enumerate(keys):
            if key is not None:
                held[number] = key
                touched[number] = min(touched[number], index)
                numbers.setdefault(key, len(numbers))
        rows.append([0 if key is None else numbers[key] for key in held])
    return rows, touched


keys = st.none() | st.integers(0, 4)


@given(st.integers(1, 20).flatmap(lambda pages: st.lists(st.lists(keys, min_size=pages, max_size=pages), min_size=1)))
@settings(max_examples=50)
def test_equal_pages_have_equal_numbers_in_the_order_of_appearance(
    tmp_path_factory: pytest.TempPathFactory, snapshots: list[list[Key]]
) -> None:
    snapshots[0][0] = 1
    out = tmp_path_factory.mktemp("image") / "guest.npz"
    length = len(snapshots)

    with RamFile(len(snapshots[0])) as ram, staged(*(lambda keys=keys: ram.put(*keys) for keys in snapshots)):  # type: ignore[misc]
        every = {"every_ns": SECOND, "for_ns": (length - 1) * SECOND} if length > 1 else {}
        capture(out, ram=ram.path, **every)

    image = arrays(out)
    rows, touched = expected(snapshots)
    assert image["content"].tolist() == rows
    assert image["touched_from"].tolist() == touched
    assert image["time_s"].tolist() == list(range(length))


def test_an_image_says_nothing_of_its_secret(ram: RamFile, tmp_path: Path) -> None:
    ram.put(3, 3, 0, 7, None, 9)

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        capture(tmp_path / name / "guest.npz", ram=ram.path)

    first, second = (arrays(tmp_path / name / "guest.npz") for name in ("a", "b"))
    assert {name: array.tolist() for name, array in first.items() if name != "meta"} == {
        name: array.tolist() for name, array in second.items() if name != "meta"
    }
    assert first["content"].tolist() == [[1, 1, 0, 2, 0, 3, 0, 0]]


def test_the_meta_data_say_where_it_is_from_and_not_whose_it_is(ram: RamFile, tmp_path: Path) -> None:
    ram.put(1, 2)

    capture(tmp_path / "guest.npz", ram=ram.path)

    meta = json.loads(str(arrays(tmp_path / "guest.npz")["meta"]))
    assert {name: meta[name] for name in ("source", "pages", "touched_pages", "snapshots", "numbers")} == {
        "source": "RAM file",
        "pages": 8,
        "touched_pages": 2,
        "snapshots": 1,
        "numbers": "salted",
    }
    assert meta.keys() - {"source", "pages", "touched_pages", "snapshots", "numbers"} == {
        "kernel",
        "date",
        "page_bytes",
        "data_set",
    }


def test_lz4_sizes_are_of_each_pages_first_contents(ram: RamFile, tmp_path: Path) -> None:
    noise = np.random.default_rng(1).bytes(4096)
    os.pwrite(ram._file, noise, 4096)

    with staged(lambda: ram.put(5), lambda: ram.put(None, 5, 0, 7)):
        capture(tmp_path / "guest.npz", ram=ram.path, every_ns=SECOND, for_ns=SECOND, compress=True)

    image = arrays(tmp_path / "guest.npz")
    assert image["touched_from"].tolist() == [0, 0, 1, 1, NEVER, NEVER, NEVER, NEVER]
    sizes = image["lz4_bytes"]
    assert sizes.dtype == np.uint16
    assert sizes.tolist() == [sizes[0], 4096, 0, sizes[0], 0, 0, 0, 0]
    assert 10 < sizes[0] < 60


def test_a_page_that_vanished_stays_as_it_was(ram: RamFile, tmp_path: Path) -> None:
    def cut() -> None:
        ram.resize(4)
        ram.resize(8)

    with staged(lambda: ram.put(1, 2, 3, 4, 5, 6, 7, 8), cut, lambda: ram.put(1, first=6)):
        capture(tmp_path / "guest.npz", ram=ram.path, every_ns=SECOND, for_ns=2 * SECOND)

    assert arrays(tmp_path / "guest.npz")["content"].tolist() == [
        [1, 2, 3, 4, 5, 6, 7, 8],
        [1, 2, 3, 4, 5, 6, 7, 8],
        [1, 2, 3, 4, 5, 6, 1, 8],
    ]


def test_long_files_are_read_in_pieces(tmp_path: Path) -> None:
    pages = 3 * sources.RUN_PAGES + 17
    with RamFile(pages) as ram:
        ram.put(*range(1, pages + 1))

        taken = capture(tmp_path / "guest.npz", ram=ram.path)

    assert taken == Taken(tmp_path / "guest.npz", 1, pages, pages, 0, pages)
    assert arrays(tmp_path / "guest.npz")["content"].tolist() == [list(range(1, pages + 1))]


# --- processes ---------------------------------------------------------------------------------------------------


def test_a_captured_process_runs_in_the_simulator_with_the_counters_of_its_contents(
    child: Child, tmp_path: Path
) -> None:
    child.area(200)
    child.put(0, *[7] * 64, *range(100, 132), *[0] * 16)

    def write() -> None:
        child.put(0, *[7] * 32, *[8] * 32)

    with staged(lambda: None, write):
        taken = capture(tmp_path / "real.npz", pid=child.pid, every_ns=60 * SECOND, for_ns=60 * SECOND)

    assert taken == Taken(tmp_path / "real.npz", 2, 200, 112, 16, 34)
    vm = {"name": "real", "memory": one_host.size(200), "image": {"captured": "real.npz"}}
    result = one_host.run(vm, duration="2min", folder=str(tmp_path), ksm=SCANNING)
    early, late = one_host.at(result, 59.0), one_host.at(result, 120.0)
    assert early[["pages_shared", "pages_sharing", "pages_unshared"]].tolist() == [2, 63 + 15, 32]
    assert late[["pages_shared", "pages_sharing", "pages_unshared"]].tolist() == [3, 31 + 31 + 15, 32]
    assert late["cow_ksm"] == 32


def test_what_is_mapped_later_comes_behind(child: Child, tmp_path: Path) -> None:
    child.area(4)

    def grow() -> None:
        child.area(3)
        child.put(1, 1, None, 9)

    with staged(lambda: child.put(0, 1, 2, None, 3), grow):
        capture(tmp_path / "real.npz", pid=child.pid, every_ns=SECOND, for_ns=SECOND)

    image = arrays(tmp_path / "real.npz")
    assert image["content"].tolist() == [[1, 2, 0, 3, 0, 0, 0], [1, 2, 0, 3, 1, 0, 4]]
    assert image["touched_from"].tolist() == [0, 0, NEVER, 0, 1, NEVER, 1]
    assert load_capture(tmp_path / "real.npz").numbers.tolist() == [1, 2, 3, 4]


@pytest.mark.skipif(not sources._zero_frame(), reason="only root sees which pages are the kernel's zero page")
def test_a_page_that_was_only_read_does_not_exist(child: Child, tmp_path: Path) -> None:
    child.area(3)
    child.put(0, 1, None, 0)
    child.do("areas[0][4096]")

    capture(tmp_path / "real.npz", pid=child.pid)

    assert arrays(tmp_path / "real.npz")["touched_from"].tolist() == [0, NEVER, 0]


def test_a_process_that_ends_leaves_its_whole_snapshots(child: Child, tmp_path: Path) -> None:
    child.area(2)

    with staged(lambda: child.put(0, 1, 2), lambda: child.put(0, 3), child.end):
        taken = capture(tmp_path / "real.npz", pid=child.pid, every_ns=SECOND, for_ns=9 * SECOND)

    assert taken.stopped == f"process {child.pid} ended or started another program"
    assert arrays(tmp_path / "real.npz")["content"].tolist() == [[1, 2], [3, 2]]


def test_a_process_that_ends_in_mid_snapshot_loses_that_snapshot_only(
    child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = sources.Process.read
    reads = 0

    def fatal(source: sources.Process, offset: int, buffer: memoryview) -> int:
        nonlocal reads
        reads += 1
        if reads == 4:
            child.end()
        return read(source, offset, buffer)

    monkeypatch.setattr(sources.Process, "read", fatal)
    child.area(3)

    with staged(lambda: child.put(0, 1, None, 2), lambda: child.put(0, 5, None, 6)):
        capture(tmp_path / "real.npz", pid=child.pid, compress=True, every_ns=SECOND, for_ns=SECOND)

    assert arrays(tmp_path / "real.npz")["content"].tolist() == [[1, 0, 2]]


def test_a_process_that_ends_at_once_leaves_nothing(child: Child, tmp_path: Path) -> None:
    with staged(child.end), pytest.raises(UserError, match="ended or started another program; nothing was kept"):
        capture(tmp_path / "real.npz", pid=child.pid)

    assert list(tmp_path.iterdir()) == []


def test_pages_that_vanish_before_they_are_read_are_left_out(
    child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = sources.Process.read

    def late(source: sources.Process, offset: int, buffer: memoryview) -> int:
        if len(buffer) == 6 * 4096:
            child.do(f"ctypes.CDLL(None).munmap(ctypes.c_void_p({offset + 2 * 4096}), 2 * 4096)")
        return read(source, offset, buffer)

    monkeypatch.setattr(sources.Process, "read", late)
    child.area(6)
    child.put(0, 1, 2, 3, 4, 5, 6)

    capture(tmp_path / "real.npz", pid=child.pid)

    assert arrays(tmp_path / "real.npz")["touched_from"].tolist() == [0, 0, NEVER, NEVER, 0, 0]
    assert arrays(tmp_path / "real.npz")["content"].tolist() == [[1, 2, 0, 0, 3, 4]]


def test_a_process_may_capture_itself_from_python(tmp_path: Path) -> None:
    taken = sim.capture(tmp_path / "self.npz", pid=os.getpid())

    assert taken.contents > 1000


def test_a_kernel_thread_and_a_missing_process_have_no_memory(tmp_path: Path) -> None:
    for pid in (2**22 + 1, 2):
        with pytest.raises((UserError, MachineError), match=f"process {pid}"):
            capture(tmp_path / "real.npz", pid=pid)


def test_memory_that_may_not_be_read_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *_: object) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(sources, "os", SimpleNamespace(open=refuse, sysconf=os.sysconf, O_RDONLY=os.O_RDONLY))

    with pytest.raises(MachineError, match="may not be read; be its owner or root"):
        capture(tmp_path / "real.npz", pid=1)


def test_a_process_without_mergeable_memory_is_pointed_to_its_private_memory(child: Child, tmp_path: Path) -> None:
    child.area(1)

    with pytest.raises(UserError, match="use --mappings private"):
        capture(tmp_path / "real.npz", pid=child.pid, mappings="mergeable")


# --- cores -------------------------------------------------------------------------------------------------------

_PROGRAM = {32: lambda at, size: (1, at, 0, 0, size, size, 0, 0), 64: lambda at, size: (1, 0, at, 0, 0, size, size, 0)}
_FORMATS = {32: ("HHIIIIIHHHHHH", "IIIIIIIIII", "IIIIIIII"), 64: ("HHIQQQIHHHHHH", "IIQQQQIIQQ", "IIQQQQQQ")}


def elf(
    *pieces: tuple[int, int], bits: int = 64, order: str = "<", kind: int = 4, many: bool = False, length: int = 0x10000
) -> bytes:
    """An ELF file of so many bytes whose segments lie at (offset, size); page k of the file from 0x1000 holds k."""
    header, section, program = (struct.Struct(order + layout) for layout in _FORMATS[bits])
    programs = 16 + header.size
    sections = programs + len(pieces) * program.size
    count = 0xFFFF if many else len(pieces)
    identity = bytes([*b"\x7fELF", bits // 32, "<>".index(order) + 1, 1, *bytes(9)])
    fields = (kind, 62, 1, 0, programs, sections if many else 0, 0, programs, program.size, count, section.size, 1, 0)
    table = b"".join(program.pack(*_PROGRAM[bits](*piece)) for piece in pieces)
    head = identity + header.pack(*fields) + table + section.pack(0, 0, 0, 0, 0, 0, 0, len(pieces), 0, 0)
    body = b"".join(page(number) for number in range(1, length // 4096))
    return (head.ljust(4096, b"\0") + body)[:length]


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("many", [False, True])
def test_the_pieces_of_a_core_follow_one_another(tmp_path: Path, bits: int, order: str, many: bool) -> None:
    core = tmp_path / "core"
    core.write_bytes(elf((0x3000, 0x2000), (0x5000, 0), (0x1000, 0x1000), bits=bits, order=order, many=many))

    capture(tmp_path / "a.npz", core=core, comparable=tmp_path / "key")
    core.write_bytes(elf((0x1000, 0xF000)))
    capture(tmp_path / "b.npz", core=core, comparable=tmp_path / "key")

    assert arrays(tmp_path / "a.npz")["content"].tolist() == [[1, 2, 3]]
    assert arrays(tmp_path / "b.npz")["content"][0][:5].tolist() == [3, 4, 1, 2, 5]


def test_a_segment_may_begin_anywhere_and_what_the_kernel_left_out_was_never_touched(tmp_path: Path) -> None:
    core = tmp_path / "core"
    start = 0x1000 + 808
    with core.open("wb") as file:
        file.write(elf((start, 64 * 4096)))
        file.truncate(start + 64 * 4096)
        os.pwrite(file.fileno(), page(1), start)
        os.pwrite(file.fileno(), page(2) + page(1), start + 50 * 4096)

    capture(tmp_path / "a.npz", core=core)

    image = arrays(tmp_path / "a.npz")
    content = image["content"][0]
    assert content[[0, 50, 51]].tolist()[0] == content[51] != content[50]
    assert image["touched_from"][[0, 50, 51]].tolist() == [0, 0, 0]
    assert np.count_nonzero(image["touched_from"][20:48] == NEVER) > 20


BAD_CORES = {
    "is no ELF core": b"not a core at all" * 100,
    "is no ELF core ": b"",
    "is no ELF core  ": b"\x7fELF",
    "is an ELF file, but no core": elf((0x1000, 0x1000), kind=2),
    "is cut short by 16KiB": elf((0x1000, 0xF000), length=0xC000),
    "its headers cannot be read": elf((0x1000, 0xF000))[:70],
    "its headers cannot be read ": elf((0x1000, 0xF000), many=True)[:100],
    "holds no memory": elf(),
    "holds no memory ": elf((0x1000, 100)),
    "has the same memory twice": elf((0x1000, 0x2000), (0x2000, 0x1000)),
    "take the dump without": b"KDUMP   " + bytes(5000),
    "is compressed": b"\x28\xb5\x2f\xfd" + bytes(5000),
}


@pytest.mark.parametrize("problem", BAD_CORES)
def test_a_file_that_is_no_core_is_refused(tmp_path: Path, problem: str) -> None:
    (tmp_path / "core").write_bytes(BAD_CORES[problem])

    result = call("--core", tmp_path / "core", "--out", tmp_path / "a.npz")

    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert problem.strip() in result.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["core"]


@given(st.binary(max_size=200), st.integers(0, 200))
@settings(max_examples=200)
def test_a_damaged_core_is_a_message_and_never_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, place: int
) -> None:
    folder = tmp_path_factory.mktemp("core")
    whole = elf((0x1000, 0x2000), (0x4000, 0x1000))
    (folder / "core").write_bytes((whole[:place] + noise + whole[place + len(noise) :])[: len(whole)])

    assert call("--core", folder / "core", "--out", folder / "a.npz").exit_code in (0, 2)


# --- RAM files ---------------------------------------------------------------------------------------------------

BAD_RAM = {
    "has 0 bytes": b"",
    "has 5000 bytes": bytes(5000),
    "a core dump goes to --core": elf((0x1000, 0x1000)),
    "is a disk image, dump or archive": b"QFI\xfb" + bytes(4092),
}


@pytest.mark.parametrize("problem", BAD_RAM)
def test_a_file_that_is_no_ram_is_refused(tmp_path: Path, problem: str) -> None:
    (tmp_path / "ram").write_bytes(BAD_RAM[problem])

    with pytest.raises(UserError, match=problem):
        capture(tmp_path / "a.npz", ram=tmp_path / "ram")


def test_a_ram_file_that_nobody_wrote_to_is_explained(ram: RamFile, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="share=on"):
        capture(tmp_path / "a.npz", ram=ram.path)


@pytest.mark.parametrize("option", ["--ram", "--core"])
def test_only_regular_files_are_read(tmp_path: Path, option: str) -> None:
    os.mkfifo(tmp_path / "fifo")

    for name, problem in (("fifo", "not a regular file"), (".", "not a regular file"), ("no", "No such file")):
        assert problem in call(option, tmp_path / name, "--out", tmp_path / "a.npz").stderr


# --- data sets ---------------------------------------------------------------------------------------------------


def test_captures_with_one_key_number_contents_alike(tmp_path: Path) -> None:
    key = tmp_path / "secret.key"
    contents = [(5, 6, 0, 5), (7, 6, 8, 0), (8, 5, 9, 7)]

    for number, held in enumerate(contents):
        with RamFile(4) as ram:
            ram.put(*held)
            capture(tmp_path / f"{number}.npz", ram=ram.path, comparable=key)

    images = [arrays(tmp_path / f"{number}.npz") for number in range(3)]
    assert [image["content"][0].tolist() for image in images] == [[1, 2, 0, 1], [3, 2, 4, 0], [4, 1, 5, 3]]
    assert len({json.loads(str(image["meta"]))["data_set"] for image in images}) == 1
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.stat().st_size == 32 + 5 * 8


def test_a_key_that_a_crash_left_with_half_an_entry_goes_on(ram: RamFile, tmp_path: Path) -> None:
    ram.put(1, 2)
    capture(tmp_path / "a.npz", ram=ram.path, comparable=tmp_path / "key")
    with (tmp_path / "key").open("ab") as key:
        key.write(b"abc")

    ram.put(3, 1)
    capture(tmp_path / "b.npz", ram=ram.path, comparable=tmp_path / "key")
    capture(tmp_path / "c.npz", ram=ram.path, comparable=tmp_path / "key")

    assert arrays(tmp_path / "b.npz")["content"][0].tolist() == [3, 1, 0, 0, 0, 0, 0, 0]
    assert arrays(tmp_path / "c.npz")["content"][0].tolist() == [3, 1, 0, 0, 0, 0, 0, 0]


def test_a_key_in_use_and_a_file_that_is_no_key_are_refused(ram: RamFile, tmp_path: Path) -> None:
    ram.put(1)
    (tmp_path / "key").write_text("something else entirely")
    with pytest.raises(UserError, match="is no key of a data set"):
        capture(tmp_path / "a.npz", ram=ram.path, comparable=tmp_path / "key")
    assert (tmp_path / "key").read_text() == "something else entirely"

    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="is no key of a data set"):
        capture(tmp_path / "a.npz", ram=ram.path, comparable=tmp_path / "fifo")
    assert (tmp_path / "fifo").exists()

    with (tmp_path / "used").open("wb") as used:
        fcntl.flock(used, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another capture is using it"):
            capture(tmp_path / "a.npz", ram=ram.path, comparable=tmp_path / "used")


def test_a_disk_that_fills_up_leaves_the_key_as_it_was(
    ram: RamFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    ram.put(1)
    (tmp_path / "first").mkdir()
    capture(tmp_path / "first" / "a.npz", ram=ram.path, comparable=tmp_path / "key")
    before = (tmp_path / "key").read_bytes()
    ram.put(2, 3)
    monkeypatch.setattr("os.fsync", full)

    for key in ("key", "new"):
        with pytest.raises(MachineError, match="No space left on device; free some space"):
            capture(tmp_path / "b.npz", ram=ram.path, comparable=tmp_path / key)

    assert (tmp_path / "key").read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["first", "key"]


def test_guests_of_one_data_set_share_in_the_simulator(tmp_path: Path) -> None:
    for name, held in (("a", (5, 6, 0, 9)), ("b", (7, 6, 5, 0))):
        with RamFile(4) as ram:
            ram.put(*held)
            capture(tmp_path / f"{name}.npz", ram=ram.path, comparable=tmp_path / "key")

    vms = [{"name": name, "memory": "16KiB", "image": {"captured": f"{name}.npz"}} for name in "ab"]
    result = one_host.run(*vms, duration="30s", folder=str(tmp_path), ksm=SCANNING)

    last = one_host.at(result, 30.0)
    assert last[["pages_shared", "pages_sharing", "pages_unshared"]].tolist() == [3, 3, 2]


def test_guests_of_different_data_sets_share_nothing(ram: RamFile, tmp_path: Path) -> None:
    """Their numbers are the same and mean different contents, also in one folder."""
    ram.put(5, 6, 5)
    for name in "ab":
        capture(tmp_path / f"{name}.npz", ram=ram.path)

    vms = [{"name": name, "memory": "32KiB", "image": {"captured": f"{name}.npz"}} for name in "ab"]
    result = one_host.run(*vms, duration="30s", folder=str(tmp_path), ksm=SCANNING)

    last = one_host.at(result, 30.0)
    assert last[["pages_shared", "pages_sharing", "pages_unshared"]].tolist() == [2, 2, 2]


# --- the command -------------------------------------------------------------------------------------------------


def test_the_last_line_is_the_image(ram: RamFile, tmp_path: Path) -> None:
    ram.put(1, 1, 0)
    out = tmp_path / "guest.npz"

    result = call("--ram", ram.path, "--out", out)

    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "snapshots           1",
        "pages               8  32KiB",
        "touched             3  12KiB",
        "zeros               1  4KiB",
        "different contents  1  4KiB",
        str(out),
    ]
    assert parse(
        {
            "name": "x",
            "duration": "1s",
            "hosts": [{"memory": "1GiB"}],
            "vms": [{"name": "a", "memory": "32KiB", "image": {"captured": "guest.npz"}}],
        },
        tmp_path,
    )


def test_the_answer_as_json_is_one_object(ram: RamFile, tmp_path: Path) -> None:
    ram.put(1)

    printed = json.loads(call("--ram", ram.path, "--out", tmp_path / "a.npz", "--json").stdout)

    assert (printed["file"], printed["touched_pages"]) == (str(tmp_path / "a.npz"), 1)


def test_a_process_that_ended_early_is_told_on_stderr(child: Child, tmp_path: Path) -> None:
    child.area(1)
    with staged(lambda: child.put(0, 1), child.end):
        result = call("--pid", child.pid, "--out", tmp_path / "a.npz", "--every", "1s", "--for", "5s")

    assert result.exit_code == 0
    assert "ended or started another program; kept what was there before (snapshots: 1)" in result.stderr


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_interrupted_capture_keeps_its_whole_snapshots(ram: RamFile, tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    with staged(lambda: ram.put(1), lambda: ram.put(2), interrupt):
        result = call("--ram", ram.path, "--out", out, "--every", "1s", "--for", "1min")

    assert (result.exit_code, result.stderr) == (130, f"interrupted\nthe result in {out} is complete\n")
    assert arrays(out)["content"][:, 0].tolist() == [1, 2]


def test_an_interruption_before_the_first_snapshot_keeps_nothing(ram: RamFile, tmp_path: Path) -> None:
    with staged(interrupt):
        result = call("--ram", ram.path, "--out", tmp_path / "a.npz", "--comparable", tmp_path / "key")

    assert (result.exit_code, result.stderr) == (130, "interrupted; nothing was kept\n")
    assert list(tmp_path.iterdir()) == []


WRONG_CALLS = {
    "give one of --pid, --ram and --core": ("--out", "a.npz"),
    "--pid and --ram to capture": ("--out", "a.npz", "--pid", "1", "--ram", "x"),
    "need both --every and --for": ("--out", "a.npz", "--pid", "1", "--every", "1s"),
    "a core does not change": ("--out", "a.npz", "--core", "c", "--every", "1s", "--for", "2s"),
    "use --every 15s": ("--out", "a.npz", "--pid", "1", "--every", "1s", "--for", "1h"),
    "end it in .npz": ("--out", "a.zip", "--pid", "1"),
    "must be a duration": ("--out", "a.npz", "--pid", "1", "--every", "10"),
    "exists already": ("--out", "there.npz", "--pid", "1"),
}


@pytest.mark.parametrize("problem", WRONG_CALLS)
def test_a_wrong_call_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.npz").touch()

    result = call(*WRONG_CALLS[problem])

    assert result.exit_code == 2
    assert problem in result.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["there.npz"]


def test_an_image_too_large_to_replay_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with RamFile(1 << 28) as ram:
        ram.put(1)
        with pytest.raises(UserError, match="32 snapshots of 1TiB are too much for one image"):
            capture(tmp_path / "a.npz", ram=ram.path, every_ns=SECOND, for_ns=31 * SECOND)


def test_a_folder_that_is_not_there_is_told(ram: RamFile, tmp_path: Path) -> None:
    ram.put(1)

    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        capture(tmp_path / "no" / "a.npz", ram=ram.path)


@pytest.mark.parametrize("where", ["spool", "image"])
def test_a_full_disk_leaves_nothing(ram: RamFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    ram.put(1)
    if where == "spool":
        monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: os.fdopen(os.open("/dev/full", os.O_RDWR), "r+b", 0))
    else:
        monkeypatch.setattr("os.replace", lambda new, out: Path("/dev/full").write_text("x"))

    result = call("--ram", ram.path, "--out", tmp_path / "a.npz")

    assert (result.exit_code, result.stderr.splitlines()) == (
        4,
        [f"{tmp_path / 'a.npz'}: cannot be written: No space left on device; free some space or choose another --out"],
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["xxhash", "lz4"])
def test_a_missing_package_is_named(
    ram: RamFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    ram.put(1)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "lz4.block", None)

    result = call("--ram", ram.path, "--out", tmp_path / "a.npz", "--compress")

    assert (result.exit_code, result.stderr) == (
        4,
        f"this needs the Python package {package}; run: pip install {package}\n",
    )


# --- a real guest ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(bool(tiny_guest.missing()), reason=tiny_guest.missing())
def test_a_real_guest_is_captured_running_and_stopped(tmp_path: Path) -> None:
    key = tmp_path / "key"

    with tiny_guest.tiny_guest(tmp_path) as guest:
        guest.wait_for("filled")
        capture(tmp_path / "filled.npz", ram=guest.ram, comparable=key)
        guest.say("go on")
        guest.wait_for("copied")
        capture(tmp_path / "copied.npz", ram=guest.ram, comparable=key)
        guest.order("stop")
        capture(tmp_path / "stopped.npz", ram=guest.ram, comparable=key)
        capture(tmp_path / "process.npz", pid=guest.pid, mappings="all", comparable=key)
        guest.order("dump-guest-memory", paging=False, protocol=f"file:{tmp_path / 'core'}")
    capture(tmp_path / "core.npz", core=tmp_path / "core", comparable=key)

    filled, copied, stopped, process, core = (
        arrays(tmp_path / f"{name}.npz") for name in ("filled", "copied", "stopped", "process", "core")
    )
    pages = tiny_guest.MEMORY_MIB * 256
    assert stopped["content"].shape == (1, pages)
    # The dump has the guest's memory in the same order, its firmware behind it.
    assert core["content"][0][:pages].tolist() == stopped["content"][0].tolist()
    assert set(stopped["content"][0]) <= set(process["content"][0])
    equal, duplicated = np.unique(filled["content"][0], return_counts=True)
    assert max(duplicated[equal > 0]) >= tiny_guest.FILE_PAGES
    assert np.count_nonzero(filled["touched_from"] == NEVER) > np.count_nonzero(copied["touched_from"] == NEVER)
    twice = [np.count_nonzero(np.unique(each["content"][0], return_counts=True)[1] == 2) for each in (filled, copied)]
    assert twice[1] - twice[0] > 0.9 * tiny_guest.FILE_PAGES

    vm = {"name": "guest", "memory": f"{tiny_guest.MEMORY_MIB}MiB", "image": {"captured": "stopped.npz"}}
    result = one_host.run(vm, duration="1min", folder=str(tmp_path), ksm=SCANNING)
    _, counts = np.unique(stopped["content"][0][stopped["touched_from"] == 0], return_counts=True)
    groups = np.ceil(counts[counts > 1] / 256)
    last = one_host.at(result, 60.0)
    assert last["pages_sharing"] == pytest.approx(counts[counts > 1].sum() - groups.sum(), rel=0.01)
