"""`scale: n`: each simulated page stands for n pages that are alike, so that a host needs 1/n of the time and memory.

Sizes and rates are divided before a host is built (`shrunk_host`, `shrunk_vm`), what a page costs is multiplied, and
what was counted is multiplied afterwards (`enlarged`). Settings that daemons read and write stay the real ones.

What is divided is what the kernel computes at the real size: its watermarks go by the square root of the memory. Huge
pages stay 512 pages: a host has 1/n of them, whole. Contents that n guests have stay with n guests. A content that one
guest has many times, as zeros, has 1/n of its copies; a frame for it then stands for n, which is n - 1 too many.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import PrivateAttr

from sim.columns import GUESTS, PAGE_BYTES, SAMPLES, Column
from sim.host import Host
from sim.memory.guest import Vm
from sim.memory.huge import Hugetlbfs, Khugepaged, Thp
from sim.memory.image import (
    UNTOUCHED,
    Accesses,
    Capture,
    Captured,
    PageNumbers,
    Part,
    Reads,
    Synthetic,
    Writes,
    load_capture,
    pages_of,
)
from sim.reclaim.swap import Swap
from sim.reclaim.watermarks import Watermarks
from sim.sharing.ksm import Ksm
from sim.sharing.pfcache import Pfcache
from sim.sharing.tps import Tps
from sim.units import Block

MOST: Final = 1 << 16
"""Largest scale."""
FEWEST_PAGES: Final = 64
"""Pages that a guest must have left: a size is at most half a page wrong then, less than 1 %."""
FEWEST_HUGE: Final = 8
"""Huge pages that a guest must have left where it gets such."""
_BLOCK: Final = 512

Thinned = TypeVar("Thinned", bound=Block)
Ints = npt.NDArray[np.int64]


# --- what is smaller -------------------------------------------------------------------------------------------------


def whole_pages(size: int, scale: int) -> int:
    """Bytes that stand for so many, in whole pages and at least one."""
    return max(round(size / PAGE_BYTES / scale), 1) * PAGE_BYTES


def shrunk_host(host: Host, scale: int) -> Host:
    """The host with a page for each *scale* pages."""
    if scale == 1:
        return host
    changes: dict[str, Any] = {
        "memory": whole_pages(host.memory, scale),
        "watermarks": _thin(_Watermarks, host.watermarks, scale, memory=host.memory),
        "thp": host.thp.model_copy(update={"khugepaged": _khugepaged(host.thp, host.hz, scale)}),
    }
    if host.hugetlbfs:
        changes["hugetlbfs"] = _thin(_Hugetlbfs, host.hugetlbfs, scale)
    if host.swap:
        changes["swap"] = _swap(host.swap, host, scale)
    if host.ksm:
        changes["ksm"] = _ksm(host.ksm, scale)
    if host.tps:
        changes["tps"] = _tps(host.tps, scale)
    if host.pfcache:
        changes["pfcache"] = _pfcache(host.pfcache, scale)
    small = host.model_copy(update=changes)
    small._scale = scale
    return small


class _Watermarks(Watermarks):
    """The watermarks of the real host in pages that stand for several."""

    _scale: int = PrivateAttr(default=1)
    _memory: int = PrivateAttr(default=0)

    def pages(self, memory: int) -> tuple[int, int, int]:
        """See `Watermarks`; the real size is known here."""
        lowest, low, high = (-(-pages // self._scale) for pages in super().pages(self._memory))
        return lowest, max(low, lowest + 1), max(high, lowest + 2)


class _Hugetlbfs(Hugetlbfs):
    """A part of each huge page."""

    _scale: int = PrivateAttr(default=1)

    @property
    def bytes(self) -> int:
        """See `Hugetlbfs`."""
        return super().bytes // self._scale // PAGE_BYTES * PAGE_BYTES


class _Tps(Tps):
    """ESX with the rates and thresholds of the real host."""

    _scale: int = PrivateAttr(default=1)

    def rates(self, pages: Sequence[int]) -> list[float]:
        """See `Tps`."""
        return [rate / self._scale for rate in super().rates([each * self._scale for each in pages])]

    def min_free(self, memory: int) -> int:
        """See `Tps`."""
        return super().min_free(memory * self._scale) // self._scale


def _thin(kind: type[Thinned], block: Block, scale: int, **known: object) -> Thinned:
    """The block as one of a kind that knows the scale."""
    thin = kind.model_construct(_fields_set=set(block.model_fields_set), **dict(block))
    for name, value in {"scale": scale, **known}.items():
        setattr(thin, f"_{name}", value)
    return thin


def _khugepaged(thp: Thp, hz: int, scale: int) -> Khugepaged:
    """The daemon at the same pace: it looks at a huge page at a time, so where that is too much it sleeps longer."""
    settings = thp.khugepaged
    pages = max(settings.pages_to_scan // scale, _BLOCK)
    sleep = max(settings.scan_sleep_millisecs, 1000 / hz) * pages * scale / settings.pages_to_scan
    return settings.model_copy(update={"pages_to_scan": pages, "scan_sleep_millisecs": round(sleep)})


def _swap(swap: Swap, host: Host, scale: int) -> Swap:
    """Swap that takes as long for a page as the real one for so many: reads one after the other, writes in a row."""
    changes: dict[str, Any] = {"size": whole_pages(swap.size, scale)}
    if swap.device != "zram":
        times = swap.device_times(host.price_set)
        changes["read_latency"] = times.read_ns * scale
        changes["write_latency"] = times.write_ns + (scale - 1) * times.ns_per_page
        changes["bandwidth"] = PAGE_BYTES * 1_000_000_000 / times.ns_per_page / scale
    return swap.model_copy(update=changes)


def _ksm(ksm: Ksm, scale: int) -> Ksm:
    """KSM with less room; what it is told to do stays (see `ksm_pass.begin_batch`)."""
    changes: dict[str, Any] = {}
    if ksm.max_kernel_pages:
        changes["max_kernel_pages"] = max(ksm.max_kernel_pages // scale, 1)
    if ksm.hints:
        changes["hints"] = ksm.hints.model_copy(update={"entries": max(ksm.hints.entries // scale, 1)})
    return ksm.model_copy(update=changes)


def _tps(tps: Tps, scale: int) -> Tps:
    """ESX; what VMs are promised is in bytes, and shares are so many for each of them unless given."""
    guests = {
        name: guest.model_copy(update={"min": guest.min // scale, "shares": guest.shares and guest.shares / scale})
        for name, guest in tps.guests.items()
    }
    return _thin(_Tps, tps.model_copy(update={"guests": guests}), scale)


def _pfcache(pfcache: Pfcache, scale: int) -> Pfcache:
    """The cache of files, whose sizes are all smaller."""
    sizes = {name: getattr(pfcache, name) // scale for name in ("MINSIZE", "MAXSIZE", "image")}
    return pfcache.model_copy(update={**sizes, "PAGEMIN": -(-pfcache.PAGEMIN // scale)})


def too_few_pages(host: Host, vm: Vm, scale: int) -> str:
    """What the scale leaves such a guest on such a host, if that is too little, or nothing."""
    pages = vm.pages // scale
    if scale > 1 and pages < FEWEST_PAGES:
        return f"{pages} pages, and they need {FEWEST_PAGES}"
    if scale > 1 and has_huge_pages(host, vm) and pages < FEWEST_HUGE * _BLOCK:
        return f"{pages} pages, and for huge pages of {_BLOCK} they need {FEWEST_HUGE * _BLOCK}"
    return ""


def has_huge_pages(host: Host, vm: Vm) -> bool:
    """Whether such a guest touches its memory in huge pages on such a host."""
    if vm.huge_pages == "hugetlbfs":
        return False
    if host.tps:
        return bool(host.tps.AllocGuestLargePage)
    return host.thp.gives(vm.huge_pages == "madvise") or bool(host.xen and host.xen.superpages)


# --- guests ----------------------------------------------------------------------------------------------------------


def shrunk_vm(vm: Vm, scale: int, samples: Mapping[Path, Capture] | None = None, huge: bool = False) -> Vm:
    """The kind of guest with a page for each *scale* pages.

    *samples* has those of captured images (`samples_of`), taken of this kind alone unless given; *huge* says that hosts
    give it huge pages (`has_huge_pages`).
    """
    if scale == 1:
        return vm
    changes: dict[str, Any] = {"memory": whole_pages(vm.memory, scale)}
    if vm.memory_limit is not None:
        changes["memory_limit"] = whole_pages(vm.memory_limit, scale)
    if vm.balloon:
        changes["balloon"] = vm.balloon.model_copy(update={"min": vm.balloon.min // scale})
    if isinstance(vm.image, Captured):
        samples = samples_of([vm], scale) if samples is None else samples
        reads = vm.image.reads and _thin(_Reads, vm.image.reads, scale)
        changes["image"] = vm.image.model_copy(update={"reads": reads}).sampled(samples.get(vm.image.path))
    elif vm.image:
        parts = _parts(vm.image, vm.pages, changes["memory"] // PAGE_BYTES, scale)
        changes["image"] = (_InBlocks if huge else Synthetic).model_construct(parts=parts)
    return vm.model_copy(update=changes)


def _parts(image: Synthetic, pages: int, left: int, scale: int) -> tuple[Part, ...]:
    """The parts of an image in guests of *left* pages instead of *pages*; the largest takes what rounding leaves over.

    Pools are cut alike in all guests, so rather a part that is no pool is taken for that.
    """
    real = [pages_of(part.size, pages) for part in image.parts]
    sizes = [round(size / scale) for size in real]
    largest = max(range(len(real)), key=lambda i: (image.parts[i].pool is None and sizes[i] > 0, real[i]))
    sizes[largest] = max(sizes[largest] + min(round(sum(real) / scale), left) - sum(sizes), 0)
    return tuple(_part(part, size, scale) for part, size in zip(image.parts, sizes, strict=True))


class _InBlocks(Synthetic):
    """An image in which parts begin where huge pages do.

    A real guest has a huge page in which one part ends and the next begins; here it would stand for many. So what a
    part has besides whole blocks, its last pages, comes behind all blocks, next to that of other parts of its kind.
    """

    def layout(self, memory: int, seed: int, name: str) -> Mapping[str, PageNumbers]:
        """See `Synthetic`; the pieces of parts with a `run` lie in one area."""
        real = super().layout(memory, seed, name)
        whole = [part for part in self.parts if not part.run]
        areas = [(_is_repeated(part), real[part.name]) for part in whole if not _in_loop(part)]
        pieces = [real[part.name] for part in self.parts if part.run]
        if pieces:
            areas.append((True, np.sort(np.concatenate(pieces))))
        areas.sort(key=lambda area: int(area[1][0]) if len(area[1]) else 0)
        heads = [pages[: len(pages) // _BLOCK * _BLOCK] for _, pages in areas]
        tails = [(repeated, pages[len(pages) // _BLOCK * _BLOCK :]) for repeated, pages in areas]
        tails.sort(key=lambda tail: tail[0])
        loops = [real[part.name] for part in whole if _in_loop(part)]
        order = np.concatenate([*heads, *(pages for _, pages in tails), *loops])
        address = np.empty(memory // PAGE_BYTES, np.int64)
        address[order] = np.arange(len(order))
        return {name: address[pages] for name, pages in real.items()}


def _is_repeated(part: Part) -> bool:
    """Whether pages of a part equal others."""
    return bool(part.pool or part.duplicates or part.zero)


def _in_loop(part: Part) -> bool:
    return part.reads is not None and part.reads.order == "loop"


def _part(part: Part, pages: int, scale: int) -> Part:
    accesses = {
        "writes": part.writes and _thin(_Writes, part.writes, scale),
        "reads": part.reads and _thin(_Reads, part.reads, scale),
    }
    return part.model_copy(update={"size": pages * PAGE_BYTES, **accesses})


class _Writes(Writes):
    """Writes to pages each of which stands for several."""

    _scale: int = PrivateAttr(default=1)

    def pieces(self, pages: int) -> list[tuple[int, float]]:
        """See `Writes`."""
        return _mean_rates(self, super().pieces(pages * self._scale), self._scale)


class _Reads(Reads):
    """Reads of pages each of which stands for several."""

    _scale: int = PrivateAttr(default=1)

    def pieces(self, pages: int) -> list[tuple[int, float]]:
        """See `Reads`."""
        return _mean_rates(self, super().pieces(pages * self._scale), self._scale)


def _mean_rates(accesses: Accesses, pieces: list[tuple[int, float]], scale: int) -> list[tuple[int, float]]:
    """Pieces of pages that each stand for *scale* pages, with the mean rate of those."""
    ends = np.array([0, *(end for end, _ in pieces)], float)
    total = np.concatenate([[0.0], np.cumsum(np.diff(ends) * [rate for _, rate in pieces])])
    cuts = np.unique(np.concatenate([np.floor(ends / scale), np.ceil(ends / scale)]))
    rates = np.diff(np.interp(cuts * scale, ends, total)) / np.diff(cuts) / scale
    return [(int(end), float(rate)) for end, rate in zip(cuts[1:], rates, strict=True)]


# --- captured images -------------------------------------------------------------------------------------------------


def samples_of(vms: Iterable[Vm], scale: int) -> Mapping[Path, Capture]:
    """A sample of each captured image of these guests: one page for each *scale* pages.

    Contents that are found on more than one page of a data set are put into groups of *scale* that the same images
    have about equally often; each group becomes one content, and each image keeps one page for each *scale* pages of a
    group. So every content is in the sample of each image that has it, and what guests share they still share.
    """
    images: dict[Path, str] = {}
    for vm in vms:
        if not vm.fork_of and isinstance(vm.content, Captured):
            images.setdefault(vm.content.path, vm.content.data_set_name)
    samples: dict[Path, Capture] = {}
    for name in dict.fromkeys(images.values()):
        paths = sorted(path for path in images if images[path] == name)
        samples |= zip(paths, _thinned([load_capture(path) for path in paths], scale), strict=True)
    return samples


@lru_cache(maxsize=64)
def _last(capture: Capture) -> Ints:
    """What each page holds at the end, UNTOUCHED if it never holds anything."""
    last = capture.first.copy()
    for _, pages, contents in capture.changes:
        last[pages] = contents
    return last


@lru_cache(maxsize=64)
def _occurrences(capture: Capture) -> Ints:
    """(contents, 2) each content and page that ever go together, zeros left out."""
    pages = [np.arange(len(capture.first)), *(pages for _, pages, _ in capture.changes)]
    contents = [capture.first, *(contents for _, _, contents in capture.changes)]
    pairs = np.stack([np.concatenate(contents), np.concatenate(pages)], axis=1)
    return np.unique(pairs[pairs[:, 0] > 0], axis=0)


def _thinned(captures: Sequence[Capture], scale: int) -> list[Capture]:
    """Samples of images of one data set."""
    lasts = [_last(capture) for capture in captures]
    found = [_occurrences(capture)[:, 0] for capture in captures]
    contents, pages = np.unique(np.concatenate(found), return_counts=True)
    common = contents[pages > 1]
    order = _alike(common, lasts)
    group = np.empty(len(common), np.int64)
    group[order] = np.arange(len(common)) // scale
    named = common[order][::scale][group] if len(common) else common
    rank = np.empty(len(common), np.int64)
    rank[order] = np.arange(len(common))
    return [_sample(capture, last, common, rank, named, scale) for capture, last in zip(captures, lasts, strict=True)]


def _alike(contents: Ints, lasts: Sequence[Ints]) -> Ints:
    """The order of contents in which those stand together that the same images have equally often."""
    counts = np.zeros((len(lasts), len(contents)), np.int64)
    for row, last in zip(counts, lasts, strict=True):
        held, times = np.unique(last[np.isin(last, contents)], return_counts=True)
        row[np.searchsorted(contents, held)] = times
    return np.lexsort([contents, *counts[::-1], *(counts[::-1] > 0)])


def _sample(capture: Capture, last: Ints, common: Ints, rank: Ints, named: Ints, scale: int) -> Capture:
    """The pages of one image that are kept, every *scale*-th of those that go together."""
    kept = _kept(capture, last, common, rank, scale)

    def mapped(captured: Ints) -> Ints:
        group = captured.copy()
        is_common = np.isin(captured, common)
        group[is_common] = named[np.searchsorted(common, captured[is_common])]
        return group

    first = mapped(capture.first[kept])
    changes = []
    for time, pages, captured in capture.changes:
        chosen = np.isin(pages, kept)
        changes.append((time, np.searchsorted(kept, pages[chosen]), mapped(captured[chosen])))
    occurring = np.unique(np.concatenate([first, *(contents for _, _, contents in changes)]))
    lz4_bytes = capture.lz4_bytes[kept] if len(capture.lz4_bytes) else capture.lz4_bytes
    numbers = occurring[occurring > 0].astype(np.int32)
    return Capture(capture.path, first, tuple(changes), numbers, lz4_bytes, capture.free[kept])


def _kept(capture: Capture, last: Ints, common: Ints, rank: Ints, scale: int) -> PageNumbers:
    """Page numbers in order: of pages never touched as many as bring the sample to its size."""
    touched = np.flatnonzero(last != UNTOUCHED)
    changed = np.zeros(len(last), np.int64)
    for _, pages, _ in capture.changes:
        changed[pages] += 1
    held, is_common = last[touched], np.isin(last[touched], common)
    place = np.full(len(touched), -1)
    place[is_common] = rank[np.searchsorted(common, held[is_common])]
    kind = np.where(held == 0, 0, np.where(is_common, 1, 2))
    # Neighbours in this order are alike; zeros and what is found once go by when they came and how often they change.
    came = capture.first[touched] == UNTOUCHED
    order = np.lexsort([touched, changed[touched], came, place, kind])
    chosen = touched[order][scale // 2 :: scale]
    total = max(round(len(last) / scale), len(chosen))
    empty = np.flatnonzero(last == UNTOUCHED)
    spread = np.linspace(0, len(empty), min(total - len(chosen), len(empty)), endpoint=False).astype(np.int64)
    return np.sort(np.concatenate([chosen, empty[spread]]))


# --- how far it may be off -------------------------------------------------------------------------------------------

COARSER: Final = (2, 4)
"""How much larger the scales are of the runs that tell how far a run may be off."""
CHECKED: Final = (
    "consolidation_ratio", "consolidation_ratio_mean", "saved_bytes", "mem_used_bytes", "cpu_overhead_percent",
    "cpu_scan_percent", "cpu_merge_percent", "cpu_swap_percent", "cpu_cow_percent", "cpu_tlb_percent",
    "ksmd_cpu_percent", "scan_time_s", "stall_percent", "pswpin", "pswpout",
)  # fmt: skip
"""Metrics that have an error bar."""
_COUNTED: Final = ("pswpin", "pswpout")


def error_bars(summary: Mapping[str, Any], coarser: Sequence[Mapping[str, Any]], scale: int) -> dict[str, float]:
    """How far the metrics of a run may be off, each in its unit: the largest of three estimates.

    Two are from the same run at COARSER scales. What rounding and frames for single contents do grows with the scale,
    so at twice the scale it is as much again; what chance does grows with its root. At four times the scale both are at
    least as much twice again. The third is what it would be if pages were drawn one by one: a count of n of them is
    then off by its root. They are not, each class of pages is in proportion, but two runs may agree by chance.
    """
    used = _used_pages(summary, scale)
    bars = {}
    for name in CHECKED:
        values = [each[name] for each in (summary, *coarser)]
        if None not in values:
            own, double, fourfold = values
            drawn = math.sqrt(own * scale) if name in _COUNTED else abs(own) / math.sqrt(used)
            bars[name] = float(max(abs(double - own), abs(fourfold - own) / 2, drawn))
    return bars


def fleet_error_bars(summary: Mapping[str, Any], vms: Iterable[Vm], scale: int) -> dict[str, float]:
    """The same for a datacenter, which is not run again: two standard deviations if pages were drawn one by one.

    At least it is half a page of those that the smallest guest has left, by which rounding may make each of its parts
    wrong. What is saved is off by as many bytes as what is used.
    """
    fewest = min(vm.memory for vm in vms) / PAGE_BYTES / scale
    share = max(2 / math.sqrt(_used_pages(summary, scale)), 0.5 / fewest)
    bars = {name: abs(summary[name]) * share for name in CHECKED if summary[name] is not None}
    counted = {name: max(bars[name], 2 * math.sqrt(summary[name] * scale)) for name in _COUNTED if name in bars}
    saved = {"saved_bytes": summary["mem_used_bytes"] * share} if summary["mem_used_bytes"] is not None else {}
    return bars | counted | saved


def _used_pages(summary: Mapping[str, Any], scale: int) -> float:
    """Simulated pages that are in use at the end."""
    return max((summary["mem_used_bytes"] or 0) / PAGE_BYTES / scale, 1.0)


# --- what is larger --------------------------------------------------------------------------------------------------

_COUNTS: Final = {
    "stable_node_chains", "stable_node_dups", "thp_split_page", "thp_deferred_split_page", "thp_fault_alloc",
    "thp_fault_fallback",
    "thp_collapse_alloc", "thp_swpout", "cow_ksm", "pgmajfault", "ksm_rmap_items", "cow_breaks",
}  # fmt: skip
"""Counts that grow with the number of pages, besides what is in pages and in bytes."""
_SETTINGS: Final = {"pages_to_scan"}
_OF_ONE_PAGE: Final = {"write_private_ns", "write_merged_ns", "write_latency_worst_ns"}
_NOT_OF_PAGES: Final = {"batch", "scan", "slot"}
"""Work that is counted as it is."""
_TABLE: Final = "page_tables_bytes"


def _grows(column: Column) -> bool:
    return column.name in _COUNTS or (column.unit in ("pages", "bytes") and column.name not in _SETTINGS)


_GROWING: Final = frozenset(column.name for column in (*SAMPLES, *GUESTS) if _grows(column))


def enlarged(columns: Mapping[str, Any], scale: int) -> dict[str, Any]:
    """Columns of a table, or one row of it, with what each page stands for."""
    return {name: _real(name, values, scale) for name, values in columns.items()}


def _real(name: str, values: Any, scale: int) -> Any:
    if name in _GROWING:
        return values * scale
    if name == "allocstall":  # a guest that reclaims takes 32 pages at once
        return values * max(scale // 32, 1)
    return values // scale if name in _OF_ONE_PAGE else values


def enlarged_guest(row: Mapping[str, Any], scale: int) -> dict[str, Any]:
    """A row of the table of guests; a page table for a last block that is short stands for fewer than *scale*."""
    pages = row["memory_bytes"] // PAGE_BYTES
    whole = pages / (-(-pages // _BLOCK) * _BLOCK)
    tables = round(row[_TABLE] // PAGE_BYTES * whole * scale) * PAGE_BYTES
    return enlarged(row, scale) | {_TABLE: tables}


def enlarged_work(work: Mapping[str, int], scale: int) -> dict[str, int]:
    """Counts of work done for so many pages each."""
    return {kind: times if kind in _NOT_OF_PAGES else times * scale for kind, times in work.items()}
