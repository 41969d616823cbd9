"""What memory costs a guest: copies on write, first touches, and random loads in small and in huge pages."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt

from sim.cost.prices import Access, Fork, HugePages, PageFaults, Price
from sim.errors import MachineError
from sim.lab.guest import GuestServer
from sim.lab.machine import THP, Ksm, thread_cpu_ns
from sim.units import MIB, about_bytes, format_bytes

Words = npt.NDArray[np.uint64]

SMALL: Final = 4096
HUGE: Final = 2 * MIB
_LINE: Final = 64
WORKING_SETS: Final = tuple(MIB << power for power in (0, 2, 4, 6, 8, 10, 11))
"""1 MiB to 2 GiB: from what a core's own caches hold to far more than its TLB reaches."""

_MADV_COLLAPSE: Final = 25
"""linux/mman.h, 6.1 and later."""
_BLOCKS: Final = 100
_LOOKED_S: Final = 0.5
_COPIES: Final = 20_000
_PARTS: Final = 100
_ROUNDS: Final = 9
_TOUCHED: Final = 128 * MIB
_HASHED: Final = 64 * MIB
_FORKED: Final = 512 * MIB
_FORKS: Final = 25
_LOADS: Final = 50_000
_LOAD_ROUNDS: Final = 25


def typical(samples: Sequence[float] | npt.NDArray[np.float64], source: str) -> Price:
    """The median of some times in ns with its 95 % confidence interval, which needs no law of their spread.

    Source: order statistics around the median, their ranks binomial (David and Nagaraja, Order Statistics, 7.1).
    """
    ordered = np.sort(np.asarray(samples, np.float64))
    spread = 1.96 * np.sqrt(len(ordered)) / 2
    low = max(0, int(np.floor(len(ordered) / 2 - spread)))
    high = min(len(ordered) - 1, int(np.ceil(len(ordered) / 2 + spread)))
    price, lowest, highest = (round(float(each), 2) for each in (np.median(ordered), ordered[low], ordered[high]))
    return Price(ns=price, low=lowest, high=highest, source=source)


def writes(ksm: Ksm) -> dict[str, Price]:
    """A guest's write to a KSM page, and its next write to the same page, which then is its own."""
    pages = np.arange(_COPIES)
    keys = pages.astype(np.uint64) + np.uint64(1)
    ksm.reset(smart_scan=0, pages_to_scan=_COPIES, sleep_millisecs=1)
    with contextlib.closing(GuestServer(ksm.token)) as server:
        for name in ("one", "other"):
            guest = server.spawn(name, _COPIES, "early")
            guest.write(pages, keys)
            guest.madvise(0, _COPIES, "MERGEABLE")
        ksm.set(run=1)
        deadline = time.monotonic() + 60
        while ksm.read("pages_sharing") < _COPIES:
            if time.monotonic() > deadline:
                raise MachineError("ksmd did not merge two equal guests within a minute: this machine is too busy")
            time.sleep(0.01)
        ksm.set(run=0)
        merged, own = ([guest.touch(part, word) / len(part) for part in np.array_split(pages, _PARTS)]
                       for word in (1, 2))  # fmt: skip
    return {
        "cow_break": typical(merged, f"measured: writes of a guest to {_COPIES} KSM pages, median of {_PARTS} parts"),
        "write": typical(own, f"measured: second writes to those {_COPIES} pages, median of {_PARTS} parts"),
    }


def has_huge_pages() -> bool:
    """Whether a process can ask for 2 MiB pages."""
    return THP.exists() and "[never]" not in (THP / "enabled").read_text()


def huge_pages(ksm: Ksm) -> HugePages:
    """Splitting huge pages when one of their pages merges, making them of small pages, and looking where to."""
    splits = [(_merging(ksm, True) - _merging(ksm, False)) / (2 * _BLOCKS) for _ in range(_ROUNDS)]
    _collapses()  # a hypervisor may have to find memory for what this machine has not used yet
    collapses, looks = _collapses(), [_look(ksm) for _ in range(_ROUNDS)]
    return HugePages(
        split=typical(splits, f"measured: {2 * _BLOCKS} pairs merged in huge pages and in small ones, {_ROUNDS} times"),
        collapse=typical(collapses, f"measured: MADV_COLLAPSE of {_BLOCKS} areas of 2 MiB, median"),
        look=typical(looks, f"measured: khugepaged before {_BLOCKS} areas that lack a page, {_ROUNDS} times"),
    )


def _merging(ksm: Ksm, huge: bool) -> float:
    """CPU time (ns) of ksmd for merging one page of each 2 MiB of two guests."""
    ksm.reset(smart_scan=0, pages_to_scan=4 * _BLOCKS, sleep_millisecs=20)
    per_block = HUGE // SMALL
    pages = np.arange(_BLOCKS * per_block)
    with contextlib.closing(GuestServer(ksm.token)) as server:
        for number in range(2):
            keys = pages.astype(np.uint64) + np.uint64(1 + number * len(pages))
            keys[::per_block] = np.arange(1, _BLOCKS + 1) + (1 << 40)
            guest = server.spawn(str(number), len(pages), "early", huge)
            guest.write(pages, keys)
            for page in pages[::per_block].tolist():
                guest.madvise(page, 1, "MERGEABLE")
        before = ksm.ksmd_cpu_ns()
        ksm.set(run=1)
        deadline = time.monotonic() + 60
        while ksm.read("pages_sharing") < _BLOCKS or not ksm.ksmd_asleep():
            if time.monotonic() > deadline:
                raise MachineError("ksmd did not merge two equal guests within a minute: this machine is too busy")
            time.sleep(0.001)
        ksm.set(run=0)
        return ksm.ksmd_cpu_ns() - before


def _collapses() -> list[float]:
    """Times (ns) of putting 2 MiB of small pages into a huge page."""
    with _area(_BLOCKS * HUGE, SMALL) as area:
        words = np.frombuffer(area, np.uint64)
        words[:: SMALL // 8] = 1
        first = -words.ctypes.data % HUGE
        del words
        area.madvise(mmap.MADV_HUGEPAGE)
        times = []
        for block in range(_BLOCKS):
            before = time.perf_counter_ns()
            try:
                area.madvise(_MADV_COLLAPSE, first + block * HUGE, HUGE)
            except OSError as error:
                raise MachineError(f"this kernel has no MADV_COLLAPSE: {error.strerror}") from None
            times.append(float(time.perf_counter_ns() - before))
    return times


def _look(ksm: Ksm) -> float:
    """CPU time (ns) of khugepaged for 2 MiB of which only the last page is missing."""
    with _area(_BLOCKS * HUGE, SMALL) as area:
        words = np.frombuffer(area, np.uint64)
        first = -words.ctypes.data % HUGE // 8
        touched = words[first : first + _BLOCKS * HUGE // 8].reshape(-1, HUGE // SMALL, SMALL // 8)[:, :-1, 0]
        touched[:] = 1
        del words, touched
        ksm.set_thp(max_ptes_none=0, pages_to_scan=1 << 30, scan_sleep_millisecs=20)
        others = _pass_of_khugepaged()
        area.madvise(mmap.MADV_HUGEPAGE)
        whole = _pass_of_khugepaged()
        ksm.set_thp(scan_sleep_millisecs=10_000)
    return max(0.0, whole - others) / _BLOCKS


def _pass_of_khugepaged() -> float:
    """CPU time (ns) of khugepaged for going through all memory that it knows, once."""
    passes, spent = _full_scans(), thread_cpu_ns("khugepaged")
    time.sleep(_LOOKED_S)
    passes, spent = _full_scans() - passes, thread_cpu_ns("khugepaged") - spent
    if not passes:
        raise MachineError("khugepaged does not run: this machine is too busy")
    return spent / passes


def _full_scans() -> int:
    return int((THP / "khugepaged" / "full_scans").read_text())


def page_faults() -> PageFaults:
    """First touches of fresh memory."""
    source = f"measured: first writes to {about_bytes(_TOUCHED)}, median of {_ROUNDS} times"
    small, huge = ([_touch(page) for _ in range(_ROUNDS)] for page in (SMALL, HUGE))
    return PageFaults(small=typical(small, source), huge=typical(huge, source))


def fork() -> Fork:
    """Forks of this process with memory in small pages or in huge ones, against such that leave that memory out."""
    with _area(_FORKED, SMALL) as small, _area(_FORKED, HUGE) as huge:
        for area in (small, huge):
            words = np.frombuffer(area, np.uint64)
            words[:: SMALL // 8] = 1
            del words
            area.madvise(mmap.MADV_DONTFORK)
        times = np.array([[_fork(), _fork(small), _fork(huge)] for _ in range(_FORKS)])
    source = f"measured: forks with {about_bytes(_FORKED)} and without, median of {_FORKS} times"
    without, *others = times.T
    pages = (_FORKED // SMALL, _FORKED // HUGE)
    page, block = (typical(np.maximum(each - without, 0.0) / count, source) for each, count in
                   zip(others, pages, strict=True))  # fmt: skip
    return Fork(page=page, huge=block)


def _fork(area: mmap.mmap | None = None) -> float:
    """CPU time (ns) of a fork, with that area in it."""
    if area:
        area.madvise(mmap.MADV_DOFORK)
    before = time.thread_time_ns()
    child = os.fork()
    if not child:
        os._exit(0)
    elapsed = time.thread_time_ns() - before
    os.waitpid(child, 0)
    if area:
        area.madvise(mmap.MADV_DONTFORK)
    return float(elapsed)


def sha1() -> Price:
    """SHA1 of memory that lies in no cache."""
    memory = os.urandom(_HASHED)
    times = []
    for _ in range(_ROUNDS):
        before = time.thread_time_ns()
        hashlib.sha1(memory, usedforsecurity=False).digest()
        times.append((time.thread_time_ns() - before) * SMALL / _HASHED)
    return typical(times, f"measured: SHA1 of {about_bytes(_HASHED)}, median of {_ROUNDS} times")


def random_access(available: int) -> Iterator[Access]:
    """Random loads over growing working sets, as far as the available memory (bytes) allows."""
    for size in WORKING_SETS:
        if 2 * size < available:
            small, huge = _loads(size)
            yield Access.model_validate({"working_set": format_bytes(size), "small": small, "huge": huge})


def _area(size: int, page: int) -> mmap.mmap:
    """Fresh memory in pages of one size; its start may have no room for a huge page, so there is one more."""
    area = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE if page == HUGE else mmap.MADV_NOHUGEPAGE)
    return area


def _touch(page: int) -> float:
    """Time (ns) of the first write to one page of some."""
    with _area(_TOUCHED, page) as area:
        words = np.frombuffer(area, np.uint64)[: _TOUCHED // 8 : page // 8]
        before = time.perf_counter_ns()
        words[:] = 1
        elapsed = time.perf_counter_ns() - before
        count = len(words)
        del words
    return elapsed / count


def _loads(size: int) -> tuple[Price, Price]:
    """One random load out of so many bytes, in small and in huge pages, measured in turns."""
    with _area(size, SMALL) as small, _area(size, HUGE) as huge:
        areas = [np.frombuffer(area, np.uint64) for area in (small, huge)]
        for words in areas:
            words[:] = 0  # the loops read zeros, but from memory of their own
        times = np.array([[_load(words, size) for words in areas] for _ in range(_LOAD_ROUNDS)])
        del areas, words
    source = f"measured: {_LOADS} dependent random loads, median of {_LOAD_ROUNDS - 1} times"
    small_ns, huge_ns = times[1:].T  # the first time fills the caches
    return typical(small_ns, source), typical(huge_ns, source)


def _load(words: Words, size: int) -> float:
    before = time.perf_counter_ns()
    _compiled_chase(words, size // _LINE - 1, _LOADS)
    return (time.perf_counter_ns() - before) / _LOADS


def _chase(words: Words, mask: int, steps: int) -> int:
    """Load from random cache lines, each chosen with what the load before brought: the next cannot begin earlier.

    Source of the multiplier: Steele and Vigna, Computationally easy, spectrally good multipliers, 2022, table 7.
    """
    state, lines, words_per_line = np.uint64(1), np.uint64(mask), np.uint64(8)
    for _ in range(steps):
        loaded = words[((state >> np.uint64(32)) & lines) * words_per_line]
        state = state * np.uint64(0xD1342543DE82EF95) + np.uint64(1) + loaded
    return int(state >> np.uint64(32))


_compiled_chase: Any = numba.njit(_chase)
