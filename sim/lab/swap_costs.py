"""What it costs to push a page out and bring it back: zram by algorithm, and a swap file on this machine's disk.

Source: Documentation/admin-guide/blockdev/zram.rst.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from sim.cost.prices import Compressor, Paging, Price, SwapDevice
from sim.errors import MachineError
from sim.lab.machine import TOKEN_VARIABLE, Ksm, vm_events
from sim.lab.memory_costs import typical
from sim.lab.swapping import SWAP_FOLDER, limited_group, swap_file, swapped_to, zram_device
from sim.lab.undo import ZRAM
from sim.units import MIB, about_bytes

Numbers = np.ndarray[Any, np.dtype[np.float64]]

PAGE: Final = 4096
_BLOCK: Final = MIB
_ZRAM_BYTES: Final = 32 * MIB
_ZRAM_BLOCK: Final = MIB // 4
_ZRAM_ROUNDS: Final = 5
_LEAST: Final = 200
_MOST: Final = 3600
_FILE_BYTES: Final = 384 * MIB
_READS: Final = 1000
_LIMIT: Final = 128 * MIB
_GUEST_BYTES: Final = 320 * MIB
_TOUCHES: Final = 500
_TOUCH_ROUNDS: Final = 12
_MADV_PAGEOUT: Final = 21
"""linux/mman.h, 5.4 and later."""
_PAGED: Final = 8 * MIB
_PAGED_ROUNDS: Final = 15
_WRITING: Final = 0.3
"""Time (s) in which a swap file has surely been written."""


def algorithms() -> list[str]:
    """Compression algorithms that this kernel's zram offers; none where it has no zram."""
    if not ZRAM.is_dir():
        return []
    with zram_device() as number:
        text = Path(f"/sys/block/zram{number}/comp_algorithm").read_text()
    return text.replace("[", "").replace("]", "").split()


def zram(algorithm: str) -> Compressor:
    """Write and read a zram device, in blocks of pages that compress alike, large enough for the call not to matter."""
    blocks = _sorted_blocks(_ZRAM_BYTES)
    with zram_device() as number:
        folder = Path(f"/sys/block/zram{number}")
        (folder / "comp_algorithm").write_text(algorithm)
        (folder / "disksize").write_text(str(_ZRAM_BYTES))
        sizes, writes, reads = [], [], []
        with _direct(Path(f"/dev/zram{number}")) as device, mmap.mmap(-1, _ZRAM_BLOCK) as aligned:
            for at, block in enumerate(blocks):
                aligned[:] = block
                before = _compressed_bytes(folder)
                writes.append(_median_cpu_ns(partial(os.pwrite, device, aligned, at * _ZRAM_BLOCK)))
                sizes.append(_compressed_bytes(folder) - before)
                reads.append(_median_cpu_ns(partial(os.preadv, device, [aligned], at * _ZRAM_BLOCK)))
        taken = int((folder / "mm_stat").read_text().split()[2])
    pages = _ZRAM_BLOCK // PAGE
    source = f"measured: {about_bytes(_ZRAM_BYTES)} of program files through zram, a line through {len(blocks)} blocks"
    compress, compress_byte = _line(np.array(sizes) / pages, np.array(writes) / pages, source)
    decompress, decompress_byte = _line(np.array(sizes) / pages, np.array(reads) / pages, source)
    return Compressor(
        compress=compress,
        compress_byte=compress_byte,
        decompress=decompress,
        decompress_byte=decompress_byte,
        bytes_per_page=round(taken / (_ZRAM_BYTES // PAGE), 1),
    )


def _sorted_blocks(size: int) -> list[bytes]:
    """Blocks of ordinary pages, those first that compress best; pages that do not compress are left out."""
    found = ordinary_bytes(size)
    pages = [found[at : at + PAGE] for at in range(0, len(found) // PAGE * PAGE, PAGE)]
    sizes = [len(zlib.compress(page, 1)) for page in pages]
    ordered = [pages[number] for number in np.argsort(sizes, kind="stable") if _LEAST < sizes[number] < _MOST]
    step = _ZRAM_BLOCK // PAGE
    return [b"".join(ordered[at : at + step]) for at in range(0, len(ordered) // step * step, step)]


def _compressed_bytes(folder: Path) -> int:
    """What the pages of a zram device were compressed to."""
    return int((folder / "mm_stat").read_text().split()[1])


def _median_cpu_ns(call: Callable[[], object]) -> float:
    """CPU time (ns) of a call: zram works in the thread that calls, so what else the machine does matters little."""
    times = []
    for _ in range(_ZRAM_ROUNDS):
        before = time.thread_time_ns()
        call()
        times.append(time.thread_time_ns() - before)
    return float(np.median(times))


def _line(sizes: Numbers, times: Numbers, source: str) -> tuple[Price, Price]:
    """The time that a page takes whatever its size, and that for each byte, by least squares; neither is negative."""
    (slope, start), variances = np.polyfit(sizes, times, 1, cov=True)
    errors = 1.96 * np.sqrt(np.diag(variances))

    def price(value: float, error: float) -> Price:
        ns, low, high = (round(max(each, 0.0), 3) for each in (value, value - error, value + error))
        return Price(ns=ns, low=low, high=high, source=source)

    return price(start, errors[1]), price(slope, errors[0])


def paging() -> Paging:
    """Swap out and in pages of which zram only notes the word that fills them, so that nothing is compressed."""
    with zram_device() as number:
        device = f"/dev/zram{number}"
        Path(f"/sys/block/zram{number}/disksize").write_text(str(2 * _PAGED))
        with swapped_to(device):
            times = [_paged() for _ in range(_PAGED_ROUNDS)]
    outs, ins = zip(*times, strict=True)
    source = f"measured: {about_bytes(_PAGED)} of same-filled pages to zram and back, median of {_PAGED_ROUNDS} times"
    return Paging(page_in=typical(ins, source), page_out=typical(outs, source))


def _paged() -> tuple[float, float]:
    """CPU times (ns) of one page out and of one page in."""
    with _written_area() as area:
        words = np.frombuffer(area, np.uint64).reshape(-1, PAGE // 8)
        faults, start = _major_faults(), time.thread_time_ns()
        _page_out(area)
        gone = time.thread_time_ns()
        int(words[np.random.default_rng(1).permutation(len(words)), 0].sum())
        back = time.thread_time_ns()
        faults, pages = _major_faults() - faults, len(words)
        del words
    if faults < 0.9 * pages:
        raise MachineError(f"only {faults} of {pages} pages were swapped: this machine swaps elsewhere")
    return (gone - start) / pages, (back - gone) / faults


def _dropped() -> float:
    """CPU time (ns) of one page out that came back from the swap file and was not written since."""
    with _written_area() as area:
        _page_out(area)
        time.sleep(_WRITING)
        _page_out(area)  # what was on its way the first time
        words = np.frombuffer(area, np.uint64).reshape(-1, PAGE // 8)
        int(words[:, 0].sum())
        pages, written = len(words), vm_events("pswpout")["pswpout"]
        del words
        before = time.thread_time_ns()
        _page_out(area)
        spent, written = time.thread_time_ns() - before, vm_events("pswpout")["pswpout"] - written
    if written > 0.1 * pages:
        raise MachineError(f"{written} of {pages} unchanged pages were written again: this machine swaps elsewhere")
    return spent / pages


@contextlib.contextmanager
def _written_area() -> Iterator[mmap.mmap]:
    """Memory in which each page has a word of its own; pages of zeros would not even reach zram."""
    with mmap.mmap(-1, _PAGED, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_NOHUGEPAGE)
        words = np.frombuffer(area, np.uint64).reshape(-1, PAGE // 8)
        words[:] = np.arange(1, len(words) + 1, dtype=np.uint64)[:, np.newaxis]
        del words
        yield area


def _page_out(area: mmap.mmap) -> None:
    try:
        area.madvise(_MADV_PAGEOUT)
    except OSError as error:
        raise MachineError(f"this kernel has no MADV_PAGEOUT: {error.strerror}") from None


def swap(ksm: Ksm) -> SwapDevice:
    """A swap file: written and read directly, then swapped to by a process that touches more than it may hold."""
    with swap_file(_FILE_BYTES, ksm.token) as file:
        reads, writes = _file_times(file)
        with swapped_to(str(file)):
            drops = [_dropped() for _ in range(_PAGED_ROUNDS)]
            with limited_group(ksm.token, _LIMIT) as group:
                swap_outs, swap_ins = _thrashed(group, ksm.token)
    source = f"measured: a file on the disk of {SWAP_FOLDER}, past the page cache, median"
    faults = f"measured: a process of {about_bytes(_GUEST_BYTES)} with a limit of {about_bytes(_LIMIT)}, median"
    again = (
        f"measured: {about_bytes(_PAGED)} that came back from a swap file unchanged, median of {_PAGED_ROUNDS} times"
    )
    return SwapDevice(
        read=typical(reads, source),
        write=typical(writes, source),
        swap_in=typical(swap_ins, faults),
        swap_out=typical(swap_outs, faults),
        drop=typical(drops, again),
    )


def ordinary_bytes(size: int) -> bytes:
    """What fills a computer's memory: code and data of the Python packages at hand."""
    files = sorted(each for each in Path(np.__file__).parents[1].rglob("*") if each.suffix in (".py", ".so", ".pyc"))
    found = bytearray()
    for file in files:
        found += file.read_bytes()
        if len(found) >= size:
            break
    return bytes(found[:size])


def _ordinary_blocks(size: int) -> list[bytes]:
    found = ordinary_bytes(size)
    return [found[at : at + _BLOCK] for at in range(0, len(found) // _BLOCK * _BLOCK, _BLOCK)]


@contextlib.contextmanager
def _direct(file: Path) -> Iterator[int]:
    """The file open past the page cache."""
    descriptor = os.open(file, os.O_RDWR | os.O_DIRECT)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _written(descriptor: int, number: int, block: bytes) -> int:
    """Time (ns) to write a block of 1 MiB."""
    with mmap.mmap(-1, _BLOCK) as aligned:
        aligned[:] = block
        before = time.perf_counter_ns()
        os.pwrite(descriptor, aligned, number * _BLOCK)
        return time.perf_counter_ns() - before


def _read(descriptor: int, at: int, size: int) -> int:
    """Time (ns) to read so many bytes."""
    with mmap.mmap(-1, size) as aligned:
        aligned[:] = bytes(size)
        before = time.perf_counter_ns()
        os.preadv(descriptor, [aligned], at)
        return time.perf_counter_ns() - before


def _file_times(file: Path) -> tuple[list[float], list[float]]:
    """Times (ns) of random reads of 4 KiB, and of each 4 KiB of sequential writes, which make the file."""
    (block,) = _ordinary_blocks(_BLOCK)
    pages = np.random.default_rng(1).integers(_FILE_BYTES // PAGE, size=_READS)
    with _direct(file) as descriptor:
        writes = [_written(descriptor, number, block) * PAGE / _BLOCK for number in range(_FILE_BYTES // _BLOCK)]
        os.fsync(descriptor)
        reads = [float(_read(descriptor, int(page) * PAGE, PAGE)) for page in pages]
    return reads, writes


def _thrashed(group: Path, token: str) -> tuple[list[float], list[float]]:
    """What `thrash` measures, in a process of its own inside the group."""
    result = subprocess.run(
        [sys.executable, "-c", f"from sim.lab.swap_costs import thrash; thrash({str(group)!r})"],
        env={**os.environ, TOKEN_VARIABLE: token, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [[float(word) for word in line.split()] for line in result.stdout.splitlines()]
    if result.returncode or len(lines) != 2 or not all(lines):
        reason = (result.stderr.splitlines() or ["killed"])[-1]
        raise MachineError(f"the process that was to swap failed: {reason}")
    return lines[0], lines[1]


def thrash(group: str) -> None:
    """Fill more memory than the group may hold, then read it at random; print ns of each page out and each page in."""
    with mmap.mmap(-1, _GUEST_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_NOHUGEPAGE)
        words = np.frombuffer(area, np.uint64).reshape(-1, PAGE // 8)
        rng = np.random.default_rng(1)
        fresh = rng.integers(1 << 63, size=(_BLOCK // PAGE, PAGE // 8), dtype=np.uint64)
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
        outs = []
        for at in range(0, len(words), len(fresh)):
            swapped, before = vm_events("pswpout")["pswpout"], time.perf_counter_ns()
            words[at : at + len(fresh)] = fresh
            elapsed = time.perf_counter_ns() - before
            if count := vm_events("pswpout")["pswpout"] - swapped:
                outs.append(elapsed / count)
        ins = []
        for _ in range(_TOUCH_ROUNDS):
            pages = rng.integers(len(words), size=_TOUCHES)
            faults, before = _major_faults(), time.perf_counter_ns()
            int(words[pages, 0].sum())
            elapsed = time.perf_counter_ns() - before
            if count := _major_faults() - faults:
                ins.append(elapsed / count)
        del words
    sys.stdout.write("\n".join(" ".join(map(str, times)) for times in (outs, ins)))


def _major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
