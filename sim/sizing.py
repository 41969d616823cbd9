"""What a run will take: pages, memory and CPU time, known before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from sim.columns import PAGE_BYTES
from sim.cost.translation import LOOK_EVERY
from sim.datacenter.blocks import Batch, BootStorm, Datacenter, Poisson
from sim.errors import UserError
from sim.host import Assignment, Host
from sim.memory.guest import Vm
from sim.memory.image import Captured, Reads, Writes, captured_shape, pages_of
from sim.reclaim.compression import cpu_ns, usual_packed
from sim.scenario import Scenario
from sim.units import MIB, SECOND, about_bytes, about_duration

MOST_PAGES: Final = 1 << 30
"""Pages that can be simulated on one host."""

# Measured by the runs named in `estimate`: what a run takes for each thing it holds or does.
_BASE_BYTES: Final = 240 * MIB
_PAGE_BYTES: Final = 20
_ROW_BYTES: Final = 1300
_START_S: Final = 1.4
_PAGE_S: Final = 1.2e-7
_GUEST_S: Final = 4e-4
_SAMPLE_S: Final = 4.5e-5
_BATCH_S: Final = 4e-7
_SCAN_S: Final = 5e-6
_CALM_VISIT_S: Final = 1e-9
_PICK_S: Final = 5e-7
_CHANGING_VISIT_S: Final = 2.7e-8
_BURST_WRITE_S: Final = 1.1e-7
_LOOK_S: Final = 2e-8
# 4 to 16 us on a busy machine: the longer a guest waits, the more often what it will do is put off.
_FAULT_S: Final = 8e-6

# Of a datacenter (tests/benchmarks/bench_fleet.py).
_EPOCH_S: Final = 1e-6
_REPORT_S: Final = 1e-4
_HOST_S: Final = 1.5e-3
_HOST_BYTES: Final = 250_000
_HOST_PAGE_BYTES: Final = 34

_LISTED_BYTES: Final = 14
"""Of a page on a list (`Memory.lru`, `seen`, `packed`)."""
_SWAPPED_BYTES: Final = 100
"""Of a swapped page: its next read and write in the list of what is due, while that is copied into a longer one."""
_COMPRESSED_TO: Final = 1 / 3

_KSMD_VISIT_NS: Final = 1000
_LEAST_OF_BATCH: Final = 16
"""Pages that a wake-up of ksmd visits at least where each stands for several (`ksm_pass.FEWEST`)."""
_SKIPPED_AFTER: Final = 4
_SKIPPED_VISITS: Final = 8
_CAPTURED_LONELY: Final = 1 / 3


@dataclass(frozen=True)
class Estimate:
    """What a run will take on this machine."""

    scale: int
    """How many pages each simulated page stands for; pages and visits are those simulated."""
    hosts: int
    guests: int
    pages: int
    peak_pages: int
    """Pages of the fullest host at its busiest moment."""
    visits: float
    """Most page visits ksmd can make."""
    memory_bytes: int
    cpu_seconds: float
    samples: int

    def fits(self, memory: int) -> bool:
        """Whether so many bytes are enough, and no host has more pages than can be simulated."""
        return self.peak_pages <= MOST_PAGES and self.memory_bytes <= memory

    def rows(self) -> list[tuple[str, str]]:
        """Names and values to print."""
        return [
            ("hosts", f"{self.hosts:,}"),
            ("guests", f"{self.guests:,}"),
            ("guest pages", f"{self.pages * self.scale:,} ({about_bytes(self.pages * self.scale * PAGE_BYTES)})"),
            ("page visits", f"at most {self.visits * self.scale:,.0f}"),
            *([("scale", f"{self.scale}: {self.pages:,} pages are simulated")] if self.scale > 1 else []),
            ("samples", f"{self.samples:,}"),
            ("memory needed", about_bytes(self.memory_bytes)),
            ("CPU time needed", about_duration(self.cpu_seconds * SECOND)),
        ]


@dataclass(frozen=True)
class _Load:
    """What one host has to do: pages at the busiest moment, and counts over the whole run."""

    peak: int
    pages: int
    visits: float
    scans: float
    cpu_seconds: float
    list_bytes: float = 0.0
    """What its lists take where memory can be reclaimed."""


def chosen_scale(scenario: Scenario) -> int:
    """The scale of a run: what the scenario says, or the least that keeps its budget. Raises UserError if none does."""
    if scenario.scale != "auto":
        return scenario.scale
    budget, scale, most = scenario.budget, 1, scenario.largest_scale()
    while True:
        need = estimate(scenario, scale)
        if need.fits(budget.memory) and need.cpu_seconds * SECOND <= budget.cpu:
            return scale
        if scale == most:
            took = f"{about_bytes(need.memory_bytes)} and {about_duration(need.cpu_seconds * SECOND)} of CPU time"
            raise UserError(
                f"{scenario.name}: at scale {most}, the largest that leaves its guests enough pages, it takes {took}; "
                "raise budget.memory or budget.cpu"
            )
        scale *= 2


def estimate(scenario: Scenario, scale: int | None = None) -> Estimate:
    """What running the scenario will take, at its own scale or another one; compiling, once after an installation,
    takes 20 s more.

    CPU time and peak memory were within a factor of two of those measured for 16 runs of 64 MiB to 200 GiB of guests
    over 2 min to 24 h (Intel Xeon, Emerald Rapids; Python 3.11). Settings changed in mid-run are not foreseen.
    """
    scale = chosen_scale(scenario) if scale is None else scale
    scenario = scenario.shrunk(scale, sampled=False)
    if scenario.datacenter:
        return _fleet(scenario, scenario.datacenter, scale)
    assignments = scenario.assignments()
    loads = [_load(host, assignments[name], scenario.duration) for host, name in scenario.host_names()]
    guests = sum(map(len, assignments.values()))
    samples = (scenario.duration // scenario.sample_every + 1) * len(loads)
    peak = max(load.peak for load in loads)
    lists = max(load.list_bytes for load in loads)
    rows = samples + sum(load.scans for load in loads)
    images = sum(3 * snapshots * pages * 4 for snapshots, pages in
                 (captured_shape(image.path) for image in scenario.captured()))  # fmt: skip
    return Estimate(
        scale=scale,
        hosts=len(loads),
        guests=guests,
        pages=sum(load.pages for load in loads),
        peak_pages=peak,
        visits=sum(load.visits for load in loads),
        memory_bytes=round(_BASE_BYTES + peak * _PAGE_BYTES + lists + rows * _ROW_BYTES + images),
        cpu_seconds=_START_S + guests * _GUEST_S + samples * _SAMPLE_S + sum(load.cpu_seconds for load in loads),
        samples=samples,
    )


def _fleet(scenario: Scenario, rules: Datacenter, scale: int) -> Estimate:
    """What a datacenter will take, all of its hosts being full all the time."""
    hosts = [host for host, _ in scenario.host_names()]
    pages = [host.memory // PAGE_BYTES for host in hosts]
    epochs, reports = (-(-scenario.duration // every) for every in (rules.epoch, rules.report_period))
    visits = batches = 0.0
    for host, frames in zip(hosts, pages, strict=True):
        if host.ksm is None:
            lives = [(frames, scenario.duration)]
            visits += host.scanner.visits(lives)
            continue
        per_second = host.ksm.pages_to_scan * 1000 / max(host.ksm.sleep_millisecs, 1) * host.ksm.run / scale
        visits += per_second * scenario.duration / SECOND
        batches += per_second * scenario.duration / SECOND / min(host.ksm.pages_to_scan, _LEAST_OF_BATCH)
    come = _arrivals(scenario, rules)
    kinds = max(vm.pages for vm in scenario.vms)
    cpu = _START_S + come * (_GUEST_S + kinds * _PAGE_S) + epochs * len(hosts) * _EPOCH_S
    cpu += len(hosts) * (_HOST_S + reports * _REPORT_S) + batches * _BATCH_S + visits * _CHANGING_VISIT_S
    rows = (come + epochs + len(hosts)) * _ROW_BYTES
    return Estimate(
        scale=scale,
        hosts=len(hosts),
        guests=come,
        pages=sum(pages),
        peak_pages=max(pages),
        visits=visits,
        memory_bytes=round(_BASE_BYTES + sum(pages) * _HOST_PAGE_BYTES + len(hosts) * _HOST_BYTES + rows),
        cpu_seconds=cpu,
        samples=reports * len(scenario.hosts),
    )


def _arrivals(scenario: Scenario, rules: Datacenter) -> int:
    """Guests that come, on average; how many a trace has is not known before it is read."""
    span = scenario.duration
    named = {kind for source in rules.arrivals for kind in source.kinds}
    come = float(sum(vm.count for vm in scenario.vms if vm.name not in named))
    for source in rules.arrivals:
        if isinstance(source, Poisson):
            come += source.rate * (sum(source.day) / len(source.day) if source.day else 1) * span / SECOND
        elif isinstance(source, Batch | BootStorm):
            times = 1 + (max(span - source.at, 0) // source.every if source.every else 0)
            come += times * (source.batch if isinstance(source, Batch) else source.boot_storm)
    return round(come)


def _load(host: Host, guests: Sequence[Assignment], duration: int) -> _Load:
    pages = sum(each.vm.pages for each in guests)
    writes = sum(_burst_writes(each) for each in guests)
    if not pages:
        return _Load(0, 0, 0.0, 0.0, 0.0)
    looks = sum(each.vm.pages * (each.stop - each.start) / LOOK_EVERY for each in guests if each.vm.load)
    ksm = host.ksm
    if ksm is None:
        visits = host.scanner.visits([(each.vm.pages, each.stop - each.start) for each in guests])
        cpu = pages * _PAGE_S + looks * _LOOK_S + writes * _BURST_WRITE_S + visits * _PICK_S
        return _Load(_peak_pages(guests, duration), pages, visits, 0.0, cpu)
    ticks = -(-ksm.sleep_millisecs * host.hz // 1000) + 1 if ksm.sleep_millisecs else 0
    batches = duration / max(ticks * SECOND // host.hz + ksm.pages_to_scan * _KSMD_VISIT_NS, _KSMD_VISIT_NS)
    visits = batches * ksm.pages_to_scan * ksm.run / host.scale
    batches = min(batches, visits / _LEAST_OF_BATCH) if host.scale > 1 else batches
    lonely = sum(_lonely_pages(each.vm) for each in guests)
    scans = visits / pages
    if scans > _SKIPPED_AFTER and ksm.smart_scan:
        visited = 1 - lonely / pages * (1 - 1 / _SKIPPED_VISITS)
        scans = _SKIPPED_AFTER + (scans - _SKIPPED_AFTER) / visited
    changing = sum(_changing_pages(each.vm) for each in guests)
    cpu = pages * _PAGE_S + looks * _LOOK_S + writes * _BURST_WRITE_S + batches * _BATCH_S
    cpu += scans * (_SCAN_S + pages * _CALM_VISIT_S + changing * _CHANGING_VISIT_S)
    cpu += _faults(host, guests, duration) * _FAULT_S
    peak = _peak_pages(guests, duration)
    lists = peak * _LISTED_BYTES + _pages_out(host, guests, duration) * _SWAPPED_BYTES if host.swap else 0.0
    return _Load(peak, pages, visits, scans, cpu, lists)


def _pages_out(host: Host, guests: Sequence[Assignment], duration: int) -> float:
    """Pages that do not fit the host, or the limits of the guests: those must wait in swap."""
    if host.swap is None:
        return 0.0
    over = float(max(_peak_pages(guests, duration) - host.memory // PAGE_BYTES, 0))
    if host.swap.device == "zram":
        over /= 1 - _COMPRESSED_TO
    limits = (each.vm.pages - each.vm.memory_limit // PAGE_BYTES for each in guests if each.vm.memory_limit)
    return min(max(over, sum(limits)), host.swap.size // PAGE_BYTES)


def _faults(host: Host, guests: Sequence[Assignment], duration: int) -> float:
    """Times that a guest finds a page in swap, if all pages are used alike; who waits for pages asks for fewer."""
    out = _pages_out(host, guests, duration)
    if host.swap is None or not out:
        return 0.0
    share = min(out / _peak_pages(guests, duration), 1.0)
    times = host.swap.device_times(host.price_set)
    wait = (times.read_ns + times.cpu_in_ns + times.cpu_out_ns + times.submit_ns) / SECOND
    if algorithm := host.swap.compresses_with:
        wait += int(cpu_ns(host.price_set, algorithm)[usual_packed(algorithm)].sum()) / SECOND
    faults = 0.0
    for each in guests:
        asked = _accesses(each.vm) * share
        faults += asked / (1 + asked * wait / each.vm.vcpus) * (each.stop - each.start) / SECOND
    return faults


def _accesses(vm: Vm) -> float:
    """Random reads and writes of a guest per second."""
    image = vm.content
    if vm.fork_of:
        return 0.0
    if isinstance(image, Captured):
        return _rate(image.reads, vm.pages)
    sizes = [(part, pages_of(part.size, vm.pages)) for part in image.parts]
    return sum(_rate(part.reads, pages) + _rate(part.writes, pages) for part, pages in sizes)


def _rate(accesses: Reads | Writes | None, pages: int) -> float:
    """Accesses per second to so many pages."""
    total, start = 0.0, 0
    for end, rate in accesses.pieces(pages) if accesses else ():
        total += (end - start) * rate
        start = end
    return total


def _peak_pages(guests: Sequence[Assignment], duration: int) -> int:
    changes = [(each.start, each.vm.pages) for each in guests]
    changes += [(each.stop, -each.vm.pages) for each in guests if each.stop < duration]
    return max(accumulate(pages for _, pages in sorted(changes)))


def _changing_pages(vm: Vm) -> int:
    """Pages that are written at random."""
    image = vm.content
    if vm.fork_of or isinstance(image, Captured):
        return 0
    return sum(pages_of(part.size, vm.pages) for part in image.parts if part.writes)


def _lonely_pages(vm: Vm) -> int:
    """Pages that smart_scan will come to skip."""
    image = vm.content
    if vm.fork_of or isinstance(image, Captured):
        return round(vm.pages * _CAPTURED_LONELY)
    lonely = (part for part in image.parts
              if part.writes or not (part.pool or part.duplicates or part.zero or part.untouched))  # fmt: skip
    return sum(pages_of(part.size, vm.pages) for part in lonely)


def _burst_writes(guest: Assignment) -> float:
    """Pages that the guest's bursts write."""
    image = guest.vm.content
    sizes = {} if isinstance(image, Captured) else {part.name: part.size for part in image.parts}
    written = 0.0
    for burst in guest.vm.bursts:
        times = 1 + ((guest.stop - guest.start) // burst.every if burst.every else 0)
        written += times * burst.share * pages_of(sizes.get(burst.part, 1.0), guest.vm.pages)
    return written
