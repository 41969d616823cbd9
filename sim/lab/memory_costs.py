"""What memory costs a guest: copies on write, first touches, and random loads in small and in huge pages."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt

from sim.cost.prices import Access, PageFaults, Price
from sim.errors import MachineError
from sim.lab.guest import GuestServer
from sim.lab.machine import Ksm
from sim.units import MIB, about_bytes, format_bytes

Words = npt.NDArray[np.uint64]

SMALL: Final = 4096
HUGE: Final = 2 * MIB
_LINE: Final = 64
WORKING_SETS: Final = tuple(MIB << power for power in (0, 2, 4, 6, 8, 10, 11))
"""1 MiB to 2 GiB: from what a core's own caches hold to far more than its TLB reaches."""

_THP: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_COPIES: Final = 20_000
_PARTS: Final = 100
_ROUNDS: Final = 9
_TOUCHED: Final = 128 * MIB
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


def cow_break(ksm: Ksm) -> Price:
    """A guest's write to a KSM page."""
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
        times = [guest.touch(part, 1) / len(part) for part in np.array_split(pages, _PARTS)]
    return typical(times, f"measured: writes of a guest to {_COPIES} KSM pages, median of {_PARTS} parts")


def has_huge_pages() -> bool:
    """Whether a process can ask for 2 MiB pages."""
    return _THP.exists() and "[never]" not in _THP.read_text()


def page_faults() -> PageFaults:
    """First touches of fresh memory."""
    source = f"measured: first writes to {about_bytes(_TOUCHED)}, median of {_ROUNDS} times"
    small, huge = ([_touch(page) for _ in range(_ROUNDS)] for page in (SMALL, HUGE))
    return PageFaults(small=typical(small, source), huge=typical(huge, source))


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
