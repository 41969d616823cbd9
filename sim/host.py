"""One machine over time: guests, ksmd, its tuner and the sampler as SimPy processes in an environment of their own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import numpy as np
from pydantic import Field, PrivateAttr, field_validator, model_validator

from sim.columns import GUESTS, PAGE_BYTES, SAMPLES
from sim.cost import prices as price_sets
from sim.cost.power import Power
from sim.cost.prices import Prices
from sim.cost.translation import LOOK_EVERY, Runner, Walks
from sim.errors import At, Several
from sim.memory.catalogue import Catalogue, saved
from sim.memory.guest import Activity, Advice, Burst, Vm
from sim.memory.huge import Daemon, Hugetlbfs, Thp
from sim.memory.image import (
    OWN,
    UNTOUCHED,
    Captured,
    ContentSpace,
    Domain,
    PageNumbers,
    Synthetic,
)
from sim.reclaim.balloon import REPORT_EVERY, Ballooning, FreePages, MomBalloon, Sizes
from sim.reclaim.commit import Commit
from sim.reclaim.compression import Algorithm, cpu_ns, packed_of
from sim.reclaim.psi import EVERY, Averages
from sim.reclaim.swap import Swap
from sim.reclaim.watermarks import Watermarks
from sim.reclaim.zswap import Zswap
from sim.sharing import Sharing
from sim.sharing.kernels import KERNELS, Kernel, kernel
from sim.sharing.ksm import KsmChange
from sim.sharing.mechanism import Mechanism, SharesBetween
from sim.sharing.tuners import Choice, Ksmtuned, Mom, Usage
from sim.streams import generator, key
from sim.units import MILLISECOND, SECOND, Block, Bytes, Name, format_bytes

if TYPE_CHECKING:
    import simpy

    from sim.memory.pages import Int32, Int64, UInt16
    from sim.sharing.room import Room, Squeeze
    from sim.sharing.source import AtSource

Steps = Generator[Any, Any, None]
Column = Sequence[str] | np.ndarray[Any, np.dtype[Any]]

_FRESH: Final = -1
_NOTHING: Final = -1
"""Before the start: time up to which nothing is done."""
_OTHER_USES: Final = ("metadata", "deferred", "reserved", "pool", "writeback")
_AVERAGES: Final = tuple(f"psi_{kind}_avg{window}" for kind in ("some", "full") for window in (10, 60, 300))


class _Hardware(Block):
    """What a host is, before what it does."""

    name: Name = "host"
    """Name; the hosts are called NAME-0, NAME-1, ..."""
    preset: str | None = Field(default=None, exclude=True)
    """A kind of host that came along (`overcommit list`), such as debian-12: it has what is not set here."""
    count: int = Field(default=1, ge=1, le=100_000)
    """How many hosts."""
    memory: Bytes = Field(gt=0)
    """Memory of the host for its guests and KSM."""
    cores: int = Field(default=8, ge=1, le=65536)
    """Processor cores, what CPU overhead is measured against."""
    kernel: str = "6.18"
    """Linux version, whose behaviour is simulated."""
    hz: int = Field(default=250, ge=24, le=10_000)
    """Timer ticks per second (CONFIG_HZ)."""
    numa_nodes: int = Field(default=1, ge=1, le=1024)
    """NUMA nodes."""
    shares_between: SharesBetween = "all"
    """Whose equal pages may become one frame: those of all guests; of one tenant's guests, where a guest without
    `tenant` is alone; or of each guest by itself. No host has that but one with ESX, which calls it salting."""
    prices: str = Field(default_factory=price_sets.default)
    """Price set: what work costs in CPU time; by default this machine's own, or the bundled one."""


class Host(Sharing, _Hardware):
    """One kind of host and how many there are of it."""

    thp: Thp = Thp()
    """Transparent huge pages."""
    hugetlbfs: Hugetlbfs | None = None
    """Huge pages set aside for guests backed by hugetlbfs."""
    swap: Swap | None = None
    """Where pages go when memory is short; nowhere unless given."""
    zswap: Zswap | None = None
    """Compressed pages in memory before the swap device; none unless given."""
    watermarks: Watermarks = Watermarks()
    """When the host reclaims memory and how."""
    commit: Commit = Commit()
    """How much memory the host promises."""
    balloon: MomBalloon | None = None
    """Let oVirt's MOM fill and empty the guests' balloons."""
    ksmtuned: Ksmtuned | None = None
    """Let ksmtuned turn KSM's knobs."""
    mom: Mom | None = None
    """Let oVirt's MOM turn KSM's knobs."""
    power: Power | None = None
    """What the host draws from the mains, for the energy of a datacenter; not known unless given."""

    _folder: Path = PrivateAttr(default=Path())
    _scale: int = PrivateAttr(default=1)

    def model_post_init(self, context: Any) -> None:
        """Remember what the path of a price set is relative to."""
        self._folder = Path((context or {}).get("folder", "."))

    @property
    def price_set(self) -> Prices:
        """What work costs."""
        return price_sets.load(self.prices, self._folder, self.scale)

    @property
    def scale(self) -> int:
        """How many pages each page of this host stands for (`sim/scale.py`)."""
        return self._scale

    def version(self, pool: str, start: int) -> int:
        """Which version of a saved segment a guest has that starts then; 0 the first, or what is no such segment."""
        segments = self.saved_segments.segments if self.saved_segments else {}
        return segments[pool].version(start) if pool in segments else 0

    def domain_of(self, vm: Vm, guest: str) -> str:
        """Name of the domain of a guest: pages are shared within it, and between no two."""
        return self.scanner.domain_of(vm, guest, self.shares_between)

    @field_validator("kernel")
    @classmethod
    def _known_kernel(cls, version: str) -> str:
        try:
            kernel(version)
        except ValueError:
            oldest, *_, newest = KERNELS
            raise At("", "is no Linux version with KSM", f'write "{oldest}" to "{newest}"') from None
        return version

    @model_validator(mode="after")
    def _consistent(self) -> Host:
        faults = [*self._sharing_faults()]
        if self.memory % PAGE_BYTES:
            pages = -(-self.memory // PAGE_BYTES)
            faults.append(At("memory", "must be whole pages of 4KiB", f"write {format_bytes(pages * PAGE_BYTES)}"))
        try:
            price_sets.load(self.prices, self._folder)
        except At as fault:
            faults.append(At("prices", fault.message, fault.remedy))
        if self.thp.enabled != "never" and not kernel(self.kernel).huge_pages:
            faults.append(At("thp.enabled", f"Linux {self.kernel} has no huge pages", "2.6.38 brought them"))
        if self.hugetlbfs and self.hugetlbfs.bytes >= self.memory:
            most = (self.memory - 1) // self.hugetlbfs.page_bytes
            said = f"{format_bytes(self.hugetlbfs.bytes)} of huge pages leave nothing of the host's memory"
            remedy = f"write at most {most}" if most else "give the host more memory"
            faults.append(At("hugetlbfs.nr_hugepages", said, remedy))
        if self.zswap:
            try:
                self.zswap.check(self.swap)
            except At as fault:
                faults.append(At("zswap", fault.message, fault.remedy))
        faults += self._watermark_faults()
        if self.ksmtuned and self.mom:
            faults.append(At("mom", "ksmtuned and mom would fight over the same knobs", "keep one of them"))
        if faults:
            raise Several(*faults)
        # The only moment at which a frozen block may still change: the kernel's own defaults are part of it.
        for name, settings in self.mechanisms.items():
            self.__dict__[name] = settings.completed(kernel(self.kernel))
        return self

    def _sharing_faults(self) -> Iterator[At]:
        """What is wrong with the mechanisms that share pages here."""
        for name, settings in self.mechanisms.items():
            for fault in settings.faults(kernel(self.kernel)):
                yield At(f"{name}.{fault.path}", fault.message, fault.remedy)
            for fault in settings.swap_faults(self.swap) if self.swap else ():
                yield At(f"swap.{fault.path}", fault.message, fault.remedy)
            yield from self._refused_faults(settings, f"with {name}")
        if self.scanner not in self.mechanisms.values():
            yield from self._refused_faults(self.scanner, "that scans nothing")

    def _refused_faults(self, settings: Mechanism, host: str) -> Iterator[At]:
        for name in settings.refused:
            if getattr(self, name) != type(self).model_fields[name].default:
                yield At(name, f"means nothing on a host {host}", "remove it")

    def _watermark_faults(self) -> Iterator[At]:
        """Watermarks that leave the guests nothing, where anything is ever reclaimed for them."""
        highest = self.watermarks.pages(self.memory)[2] * PAGE_BYTES
        left = self.memory - (self.hugetlbfs.bytes if self.hugetlbfs else 0)
        if (self.swap or self.watermarks.min_free_kbytes is not None) and 0 < left <= highest:
            said = f"the highest watermark is {format_bytes(highest)}, and the host has {format_bytes(left)}"
            yield At("watermarks.min_free_kbytes", said, "write less, or give the host more memory")

    def names(self) -> list[str]:
        """Names of the hosts of this kind."""
        return [f"{self.name}-{index}" for index in range(self.count)]


@dataclass
class Guest:
    """A guest of a run: who it is, when it lives, and what became of it."""

    name: str
    vm: Vm
    index: int
    """Its number on its host."""
    number: int
    """Its number among the guests of its kind."""
    start: int
    stop: int
    node: int
    domain: Domain
    """With whom it may share; for a fork, from its start, its parent's."""
    places: dict[str, PageNumbers] = field(default_factory=dict)
    started: bool = False
    ended: int | None = None
    end: str = "running"
    final: dict[str, int | float] = field(default_factory=dict)
    pages_written: int = 0
    expected_writes: float = 0.0
    level: float = 1.0
    level_since: int = 0
    worked: int = 0
    """Its activity time (ns) so far, stalls left out."""
    planned: float = 0.0
    """What that would be without stalls."""
    original: Int32 | None = None
    """What its pages held at the start, if a burst brings that back."""
    free_pages: FreePages | None = None
    """What it does not use, if it ever gives that to the host."""
    freed: bool = True
    """Whether it has pages free that it did not report yet."""
    frees: simpy.Event | None = None
    """It frees pages, and has reported all that it had free before."""
    reports_at: int | None = None
    """When it reports free pages next."""
    reported: int = 0
    """Pages that the host took because the guest reported them as free."""
    fork_ns: int = 0
    """How long the fork took that made it."""

    @property
    def progress_percent(self) -> float:
        """Work done against what it would have done had it never waited for memory."""
        return 100.0 * self.worked / self.planned if self.planned else 100.0

    @property
    def running(self) -> bool:
        """Whether it lives now."""
        return self.started and self.ended is None


@dataclass(frozen=True)
class Assignment:
    """Guests that one host gets, known before the run: kind, name and life of each (ns)."""

    vm: Vm
    name: str
    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class Report:
    """What a host recorded: tables as columns by name (`sim.columns`), and how much ksmd did of each kind of work."""

    samples: Mapping[str, Column]
    scans: Mapping[str, Column]
    guests: Sequence[Mapping[str, object]]
    events: Sequence[Mapping[str, object]]
    work: Mapping[str, int]


@dataclass
class Rows:
    """Rows of counters as the scanner logged them, with what it does not know."""

    logs: list[Int64] = field(default_factory=list)
    others: list[tuple[int, ...]] = field(default_factory=list)
    """Rows, and for all of them: promised bytes, guests running, OOM kills, CPU times in ns of khugepaged and of
    sharing at the source, and the six averages of pressure stall information in hundredths of a percent."""

    def add(self, log: Int64, *others: int) -> None:
        """Keep a copy of some rows."""
        self.logs.append(log.copy())
        self.others.append((len(log), *others))


class Machine:
    """A running host."""

    STEP: ClassVar[int] = 5 * SECOND
    """Most simulated time (ns) that ksmd works in one compiled call."""

    def __init__(
        self, host: Host, name: str, assignments: Sequence[Assignment], *, seed: int, duration: int, sample_every: int,
        progress: Callable[[int], None] | None = None, make_scanner: Callable[..., Room] | None = None,
        catalogue: Catalogue | None = None,
    ) -> None:  # fmt: skip
        """Times are in ns; *progress* is told the host time now and then; *make_scanner* may put in an observer.

        A *catalogue* that is given knows more guests than these; otherwise one of these alone is made.
        """
        import simpy

        from sim.sharing.declared import Declared
        from sim.sharing.room import Site

        self.host = host
        self.name = name
        self.seed = seed
        self.duration = duration
        self.sample_every = sample_every
        self.progress = progress
        self.env: simpy.Environment = simpy.Environment(initial_time=0)
        self.prices: Prices = host.price_set
        self.huge_prices = price_sets.huge_pages(self.prices)
        self.kernel: Kernel = kernel(host.kernel)
        self.samples = Rows()
        self.scans = Rows()
        self.events: list[dict[str, object]] = []
        self.catalogue = catalogue or Catalogue(seed, duration, host.version)
        self.guests = [self._guest(each, index) for index, each in enumerate(assignments)]
        if catalogue is None:
            self.catalogue.register(self.guests)
        self.oom_kills = 0
        self.promised = 0
        self.committed = 0
        self.running = 0
        self.families = ContentSpace()
        self.origins: dict[str, int] = {}
        """Numbers of pools that are declared to be shared."""
        self.khugepaged = Daemon(host.thp.khugepaged)
        self.khugepaged_ns = 0
        self.collapses_at = self._khugepaged_sleeps
        self.psi = Averages(), Averages()
        tuner = host.ksmtuned or host.mom
        self.tuner = tuner.start() if tuner else None
        self.ballooning = Ballooning(host.balloon, host.memory) if host.balloon else None
        self.hugetlb_taken = 0
        guests, pages, contents = self._room()
        self.walks = Walks(self.prices, cores=host.cores, guests=guests, scale=host.scale)
        behaviour = host.scanner.behaviour()
        make: Callable[..., Room] = make_scanner or behaviour
        site = Site(
            kernel=self.kernel, hz=host.hz, frames=host.memory // PAGE_BYTES, pages=pages,
            guests=guests, contents=contents, nodes=host.numa_nodes, rates=self.catalogue.rates,
            key=key(seed, "host", name), work_ps=self._work_prices(behaviour.WORK),
            split_ps=round(self.huge_prices.split.ns * 1000),
            cold_milli=round(self.prices.cold_caches.factor * 1000), squeeze=self._squeeze(),
            sha1_ps=round(price_sets.sha1(self.prices).ns * 1000), scale=host.scale,
        )  # fmt: skip
        self.scanner = make(host.scanner, site)
        for each in host.sources.values():
            at_source = each.behaviour()
            paid = replace(site, work_ps=self._work_prices(at_source.WORK))
            self.scanner.sources.append(at_source(each, self.scanner, paid))
        if host.pfcache is None and any(vm.kernel == "shared" for vm in self.catalogue.kinds):
            self.scanner.sources.append(Declared(None, self.scanner, site))

    def _guest(self, each: Assignment, index: int) -> Guest:
        node = (each.vm.numa_node if each.vm.numa_node is not None else index) % self.host.numa_nodes
        domain = self.catalogue.space.domain(self.host.domain_of(each.vm, each.name))
        return Guest(each.name, each.vm, index, each.number, each.start, each.stop, node, domain)

    # --- what is known before the run -----------------------------------------------------------------------------

    def _room(self) -> tuple[int, int, int]:
        """Guests, their pages in whole blocks at the busiest moment, and contents that there must be room for."""
        from sim.memory.pages import BLOCK
        from sim.sharing.room import blocks_of

        changes = [(guest.start, blocks_of(guest.vm.pages)) for guest in self.guests]
        changes += [(guest.stop, -blocks_of(guest.vm.pages)) for guest in self.guests if guest.stop < self.duration]
        held = np.cumsum([change for _, change in sorted(changes)])
        return len(self.guests), int(held.max(initial=0)) * BLOCK, self.catalogue.contents

    def _squeeze(self) -> Squeeze | None:
        """How the host reclaims memory, if anything ever makes it do so."""
        from sim.sharing.room import Squeeze

        swap, algorithm = self.host.swap, self._compressor()
        keeps_all = not self.host.scanner.packs and all(vm.memory_limit is None for vm in self.catalogue.kinds)
        if swap is None and keeps_all:
            return None
        return Squeeze(
            watermarks=self.host.watermarks.pages(self.host.memory),
            swappiness=self.host.watermarks.swappiness,
            page_cluster=self.host.watermarks.page_cluster,
            slots=swap.size // PAGE_BYTES if swap else 0,
            device=swap.device_times(self.prices) if swap else None,
            look_ns=round(price_sets.look(self.prices).ns),
            compresses=swap is not None and swap.device == "zram",
            zswap=self.host.zswap.pool(self.host.memory) if self.host.zswap else None,
            zip_ns=cpu_ns(self.prices, algorithm) if algorithm else None,
        )

    def _compressor(self) -> Algorithm | None:
        """How the host compresses pages that are swapped out, if it does."""
        if self.host.scanner.compressor:
            return self.host.scanner.compressor
        if self.host.zswap:
            return self.host.zswap.compressor
        return self.host.swap.compresses_with if self.host.swap else None

    def _work_prices(self, kinds: Sequence[str]) -> Int64:
        return np.array([self.prices.picoseconds(kind) for kind in kinds], np.int64)

    # --- the run --------------------------------------------------------------------------------------------------

    def run(self) -> Report:
        """Simulate the host's whole time."""
        env = self.env
        self._begin()
        for guest in self.guests:
            env.process(self._live(guest))
        env.process(self._sample())
        self._work(0)
        if self._squeeze():
            env.process(self._every(EVERY, self._average, 0))
        if any(vm.load for vm in self.catalogue.kinds):
            env.process(self._look())
        while env.peek() <= self.duration:
            self._wait(int(env.peek()))
            env.step()
        for guest in self.guests:
            if guest.running:
                self._finish(guest, int(env.now))
        report = Report(
            samples=self._table(self.samples),
            scans=self._table(self.scans),
            guests=[self._row_of(each) for each in self.guests if each.started],
            events=self.events,
            work=self.scanner.work_done(),
        )
        # Guests that still wait keep this object alive; its arrays are most of what a run needs.
        del self.scanner
        return report

    def _begin(self) -> None:
        if self.host.hugetlbfs:
            self.scanner.reserve(self.host.hugetlbfs.bytes // PAGE_BYTES)
        self.scanner.begin()

    def _work(self, done: int) -> None:
        """Let everything that works on the host by itself go on after *done*, the time up to which it is done."""
        env = self.env
        if self.host.ksm and self.host.ksm.changes:
            env.process(self._change_settings(self.host.ksm.changes, done))
        if any(self._has_thp(vm) for vm in self.catalogue.kinds):
            env.process(self._collapse())
        for source in self.scanner.sources:
            if source.every:
                env.process(self._every(source.every, partial(self._act, source), done))
        if self.host.balloon:
            env.process(self._every(self.host.balloon.main_loop_interval, self._balloon, done))
        if self.tuner:
            env.process(self._every(self.tuner.every, self._tune, done))

    def _every(self, period: int, act: Callable[[], None], done: int) -> Steps:
        """Act at every multiple of *period* after *done*."""
        yield self.env.timeout(period - done % period)
        while True:
            act()
            yield self.env.timeout(period)

    def _wait(self, until: int) -> None:
        """Let ksmd work up to *until*, in steps short enough for an interruption to be heard between two of them."""
        for step in range(int(self.env.now) + self.STEP, until, self.STEP):
            self._advance(step)
            if self.progress:
                self.progress(step)
        self._advance(until)

    def _advance(self, until: int) -> None:
        """Let ksmd work up to the next thing that happens; a write that finds no frame kills its guest."""
        from sim.sharing.room import OutOfFrames

        while True:
            try:
                for log in self.scanner.advance(until):
                    self._record(self.scans, log)
                break
            except OutOfFrames as starved:
                self._kill(self.guests[starved.guest], starved.time)
        while self.scanner.notes:
            now, kind, detail = self.scanner.notes.pop(0)
            self._note(None, kind, detail, now)

    # --- guests ---------------------------------------------------------------------------------------------------

    def _live(self, guest: Guest) -> Steps:
        if guest.start:
            yield self.env.timeout(guest.start)
        elif guest.vm.fork_of:
            yield self.env.timeout(0)
        if self._start(guest):
            self._go_on(guest, _NOTHING)
            yield from self._expire(guest)

    def _go_on(self, guest: Guest, done: int) -> None:
        """Let a guest do what it has to do after *done*, the time up to which it has done it."""
        vm = guest.vm
        for burst_number, burst in enumerate(vm.bursts):
            self.env.process(self._burst(guest, burst_number, burst, done))
        for advice in vm.madvise:
            if guest.start + advice.at > done:
                self.env.process(self._advise(guest, advice))
        if vm.activity:
            self._begin_to_vary(guest, vm.activity, done)
        if vm.free_page_reporting:
            self.env.process(self._report(guest))
        if not vm.fork_of and isinstance(vm.content, Captured):
            self.env.process(self._replay(guest, vm.content, done))

    def _expire(self, guest: Guest) -> Steps:
        """Stop a guest when its time has come."""
        if guest.stop < self.duration:
            yield self.env.timeout(guest.stop - self.env.now)
            if guest.running:
                self._finish(guest, guest.stop)
                self._leave(guest, "stopped", guest.stop)

    def _start(self, guest: Guest) -> bool:
        """Let the guest begin its life. Returns False if it could not, or died of it."""
        vm, now = guest.vm, int(self.env.now)
        parent = self._parent_of(guest)
        if vm.fork_of and parent is None:
            self._note(guest, "not-started", f"no guest of {vm.fork_of} runs on {self.name}")
            return False
        if vm.huge_pages == "hugetlbfs" and not self._take_reserved(vm):
            self._note(guest, "not-started", f"hugetlbfs of {self.name} has too few free pages")
            return False
        if refusal := self._refusal(vm):
            self._note(guest, "not-started", f"{'fork' if vm.fork_of else 'mmap'} gets ENOMEM: {refusal}")
            return False
        self._enter(guest, now)
        if parent is not None:
            self._fork(parent, guest, now)
            return True
        contents, accesses = self._image_of(guest)
        return self._furnish(guest, contents, accesses, now)

    def _enter(self, guest: Guest, now: int) -> None:
        """Let a guest have its memory here, all of it untouched."""
        vm = guest.vm
        guest.started = True
        guest.level = self._level(vm, max(now - guest.start, 0) // vm.activity.every if vm.activity else 0)
        guest.level_since = now
        self.promised += vm.memory
        self.committed += vm.memory if vm.huge_pages != "hugetlbfs" else 0
        self.running += 1
        self.scanner.add(
            guest.index, vm.pages, vm=vm, key=key(self.seed, "guest", guest.name), now=now, level=guest.level,
            node=guest.node, thp=self._has_thp(vm),
        )  # fmt: skip
        if self._has_thp(vm):
            self.khugepaged.register(guest.index)
        if any(each.wants_files for each in self.host.mechanisms.values()):
            self.scanner.files[guest.index] = self._files_of(vm)
        for source in self.scanner.sources:
            source.started(guest.index, vm)

    def _furnish(self, guest: Guest, contents: Int32, accesses: UInt16, now: int) -> bool:
        """Fill a guest's memory, and say what there is to know of it. Returns whether the guest lives."""
        vm = guest.vm
        self.scanner.set_domain(guest.index, guest.domain.zeros)
        if self._declares(vm):
            self.scanner.origins[guest.index] = self._origins_of(vm)
        if (vm.balloon or vm.free_page_reporting) and guest.free_pages is None:
            guest.free_pages = FreePages(self._free_of(guest), self.host.scale)
        self.scanner.set_accesses(guest.index, accesses)
        if algorithm := self._compressor():
            image = self.catalogue.captures[vm.content.path] if isinstance(vm.content, Captured) else vm.content
            packed = packed_of(image, algorithm, self.seed, guest.name, vm.pages, self.catalogue.places_of(vm))
            self.scanner.set_packed(guest.index, packed)
        if self.host.scanner.wants_similar and isinstance(vm.content, Synthetic):
            families = self.families.domain(str(guest.domain.number))
            self.scanner.set_similar(guest.index, *vm.content.similar(vm.memory, guest.places, families))
        if vm.huge_pages == "hugetlbfs":
            contents[contents == UNTOUCHED] = 0
        elif vm.mergeable:
            self._offer(guest, now)
        if any(burst.leaves == "original" for burst in vm.bursts) and guest.original is None:
            guest.original = np.where(contents < 0, _FRESH, contents).astype(np.int32)
        return self._try(guest, lambda: self.scanner.fill(guest.index, contents, now))

    def _declares(self, vm: Vm) -> bool:
        """Whether the host is told where pages of the guest come from."""
        return vm.kernel == "shared" or self.host.saved_segments is not None

    def _offer(self, guest: Guest, now: int) -> None:
        """Offer the guest's memory to whatever looks for equal pages; a container's files are not its own to offer."""
        if guest.index not in self.scanner.origins:
            self.scanner.advise(guest.index, 0, guest.vm.pages, True, now)
            return
        for first, pages in _pieces(np.flatnonzero(self.scanner.origins[guest.index] == 0)):
            self.scanner.advise(guest.index, first, pages, True, now)

    def _refusal(self, vm: Vm) -> str:
        """Why the host does not promise the guest its memory, or nothing."""
        if vm.huge_pages == "hugetlbfs" or any("commit" in each.refused for each in self.host.mechanisms.values()):
            return ""
        memory = self.host.memory - (self.host.hugetlbfs.bytes if self.host.hugetlbfs else 0)
        swap = self.host.swap.size if self.host.swap else 0
        sizes = (size * self.host.scale for size in (vm.memory, self.committed, memory, swap))
        return self.host.commit.refusal(*sizes)

    def _fork(self, parent: Guest, guest: Guest, now: int) -> None:
        """Let the guest have what its parent has; both wait until the page tables are copied."""
        guest.places, guest.expected_writes, guest.domain = parent.places, parent.expected_writes, parent.domain
        small, huge = self.scanner.table_entries(parent.index)
        for_page, for_huge = price_sets.fork(self.prices)
        guest.fork_ns = round(small * for_page.ns + huge * for_huge.ns)
        self.catalogue.space.count = self.scanner.fork(parent.index, guest.index, self.catalogue.space.count, now)
        for each in (parent, guest):
            self.scanner.delay(each.index, guest.fork_ns, now)

    def _has_thp(self, vm: Vm) -> bool:
        return vm.huge_pages != "hugetlbfs" and self.host.thp.gives(vm.huge_pages == "madvise")

    def _take_reserved(self, vm: Vm) -> bool:
        """Let a guest that starts have pages of hugetlbfs. Returns whether there are enough."""
        pool = self.host.hugetlbfs
        if pool is None or self.hugetlb_taken + vm.memory > pool.bytes:
            return False
        self.hugetlb_taken += vm.memory
        self.scanner.reserve(-vm.pages)
        return True

    def _parent_of(self, guest: Guest) -> Guest | None:
        if not guest.vm.fork_of:
            return None
        return next((each for each in self.guests if each.vm.name == guest.vm.fork_of and each.running), None)

    def _image_of(self, guest: Guest) -> tuple[Int32, UInt16]:
        """What the guest's pages hold at its start, and the class of random accesses of each."""
        vm, image = guest.vm, guest.vm.content
        accesses = np.zeros(vm.pages, np.uint16)
        places = self.catalogue.places_of(vm)
        for kind, pages in self.catalogue.accesses_of(vm, guest.domain):
            accesses[pages] = self.catalogue.class_of(kind)
            guest.expected_writes += len(pages) * kind.writes
        if isinstance(image, Captured):
            capture = self.catalogue.captures[image.path]
            contents = np.full(vm.pages, UNTOUCHED, np.int32)
            contents[: len(capture.first)] = self._captured_contents(guest, image, capture.first, OWN)
            return contents, accesses
        guest.places = dict(places)
        contents = image.contents(vm.memory, guest.places, guest.domain)
        for part in image.parts:
            if part.pool and (version := self.host.version(part.pool, guest.start)):
                where = places[part.name]
                contents[where] = guest.domain.pool(saved(part.pool, version), len(where))
        return contents, accesses

    def _files_of(self, vm: Vm) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of the guest's pages hold what was read from files when it starts."""
        files = np.zeros(vm.pages, np.bool_)
        image = vm.content
        if vm.fork_of:
            return files
        if isinstance(image, Captured):
            first = self.catalogue.captures[image.path].first
            files[: len(first)] = self.catalogue.of_files(image, first)
        else:
            for part in image.parts:
                files[self.catalogue.places_of(vm)[part.name]] = part.file
        return files

    def _origins_of(self, vm: Vm) -> Int32:
        """The file or saved segment that each of the guest's pages comes from by its number, 0 none.

        A pool is one file; so is each content of a capture that another one has too.
        """
        image, segments = vm.content, self.host.saved_segments
        origins = np.zeros(vm.pages, np.int32)
        if isinstance(image, Captured):
            first = self.catalogue.captures[image.path].first
            origins[: len(first)] = np.where(self.catalogue.of_files(image, first), first, 0) if segments is None else 0
            return origins
        for part in image.parts:
            file = vm.kernel == "shared" and part.file
            if part.pool and (file or (segments and segments.shared(part.pool))):
                origins[self.catalogue.places_of(vm)[part.name]] = -1 - self.origins.setdefault(
                    part.pool, len(self.origins)
                )
        return origins

    def _free_of(self, guest: Guest) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which pages the guest has free when it starts."""
        image = guest.vm.content
        if isinstance(image, Synthetic):
            return image.free(guest.vm.memory, guest.places)
        free = np.ones(guest.vm.pages, np.bool_)
        capture = self.catalogue.captures[image.path]
        free[: len(capture.free)] = capture.free
        return free

    def _captured_contents(self, guest: Guest, image: Captured, captured: Int64, own: int) -> Int32:
        """Contents of a capture as this host numbers them; *own* for the pages in which this copy differs."""
        contents = guest.domain.captured(image.data_set_name, captured)
        if image.diverge and len(captured) == len(self._diverging(guest, image)):
            contents[self._diverging(guest, image) & (captured != UNTOUCHED)] = own
        return contents

    def _diverging(self, guest: Guest, image: Captured) -> np.ndarray[Any, np.dtype[np.bool_]]:
        if "diverging" not in guest.places:
            pages = len(self.catalogue.captures[image.path].first)
            draws = generator(self.seed, "diverge", guest.name).random(pages)
            guest.places["diverging"] = np.flatnonzero(draws < image.diverge)
        mask = np.zeros(len(self.catalogue.captures[image.path].first), np.bool_)
        mask[guest.places["diverging"]] = True
        return mask

    def _replay(self, guest: Guest, image: Captured, done: int) -> Steps:
        """Write what the captured guest wrote, at the time of each snapshot after *done*."""
        capture = self.catalogue.captures[image.path]
        for time, pages, captured in capture.changes:
            if guest.start + time <= done:
                continue
            yield self.env.timeout(guest.start + time - self.env.now)
            if not guest.running:
                return
            contents = self._captured_contents(guest, image, captured, _FRESH)
            if guest.index in self.scanner.files:
                self.scanner.files[guest.index][pages] = self.catalogue.of_files(image, captured)
            if guest.vm.kernel == "shared":
                self.scanner.origins[guest.index][pages] = np.where(
                    self.catalogue.of_files(image, captured), captured, 0
                )
            if image.diverge:
                contents[self._diverging(guest, image)[pages]] = _FRESH
            if not self._write(guest, pages, contents):
                return

    def _burst(self, guest: Guest, number: int, burst: Burst, done: int) -> Steps:
        """Do all bursts of a kind after *done*."""
        first = guest.start + burst.at
        where = guest.places[burst.part]
        times = 0
        if first <= done:
            if burst.every is None:
                return
            times = (done - first) // burst.every + 1
        while True:
            yield self.env.timeout(first + times * (burst.every or 0) - self.env.now)
            if not guest.running:
                return
            pages = where
            if burst.share < 1:
                whose = ("files", burst.part) if burst.leaves == "files" else ("guest", guest.name)
                draw = generator(self.seed, *whose, "burst", number, times)
                pages = np.sort(draw.choice(where, round(burst.share * len(where)), replace=False))
            if burst.leaves == "free":
                self._free(guest, pages)
            elif not self._write(guest, pages, self._burst_contents(guest, number, times, pages)):
                return
            if burst.every is None:
                return
            times += 1

    def _burst_contents(self, guest: Guest, number: int, times: int, pages: PageNumbers) -> Int32:
        burst = guest.vm.bursts[number]
        if burst.leaves == "files":
            first = self.catalogue.files[burst.part, number] + times * len(pages)
            return np.arange(first, first + len(pages), dtype=np.int32)
        if burst.leaves == "original":
            assert guest.original is not None  # kept because of this burst
            return guest.original[pages]
        return np.full(len(pages), _FRESH if burst.leaves == "unique" else 0, np.int32)

    def _advise(self, guest: Guest, advice: Advice) -> Steps:
        yield self.env.timeout(guest.start + advice.at - self.env.now)
        if not guest.running:
            return
        now, mergeable = int(self.env.now), advice.advice == "mergeable"
        for first, pages in _ranges(guest, advice.part):
            if not self.scanner.advise(guest.index, first, pages, mergeable, now):
                self._note(guest, "madvise-refused", f"EAGAIN: no frame to unmerge into ({advice.part or 'all'})")
                return

    def _begin_to_vary(self, guest: Guest, activity: Activity, done: int) -> None:
        """Let a guest's level change after *done*."""
        self.env.process(self._vary(guest, activity, done))

    def _vary(self, guest: Guest, activity: Activity, done: int) -> Steps:
        step = max(done - guest.start, 0) // activity.every + 1
        while activity.repeat or step < len(activity.levels):
            yield self.env.timeout(guest.start + step * activity.every - self.env.now)
            if not guest.running:
                return
            self._change_level(guest, step, int(self.env.now))
            step += 1

    def _change_level(self, guest: Guest, step: int, now: int) -> None:
        self._account_writes(guest, now)
        guest.level = self._level(guest.vm, step)
        self.scanner.change_activity(guest.index, now, guest.level)

    def _level(self, vm: Vm, step: int) -> float:
        if vm.activity is None:
            return 1.0
        levels = vm.activity.levels
        return levels[step % len(levels) if vm.activity.repeat else min(step, len(levels) - 1)]

    def _account_writes(self, guest: Guest, now: int) -> None:
        worked = self.scanner.activity(guest.index, now)
        guest.pages_written += round(guest.expected_writes * (worked - guest.worked) / SECOND)
        guest.planned += guest.level * (now - guest.level_since)
        guest.worked, guest.level_since = worked, now

    def _write(self, guest: Guest, pages: PageNumbers, contents: Int32) -> bool:
        guest.pages_written += len(pages)
        if guest.free_pages:
            self.scanner.discard(guest.index, guest.free_pages.use(pages, self.scanner.backed(guest.index)))
        return self._try(guest, lambda: self.scanner.write(guest.index, pages, contents, int(self.env.now)))

    def _free(self, guest: Guest, pages: PageNumbers) -> None:
        """The guest's kernel puts pages on its list of free ones."""
        if guest.free_pages:
            guest.free_pages.give(pages)
        guest.freed = True
        if guest.frees and not guest.frees.triggered:
            guest.frees.succeed()

    def _report(self, guest: Guest) -> Steps:
        """Free page reporting: every two seconds a part of what is free, until all is told."""
        assert guest.free_pages is not None  # it has them because it reports
        while guest.running:
            if guest.reports_at is None:
                if not guest.freed:
                    guest.frees = self.env.event()
                    yield guest.frees
                guest.freed = False
                guest.reports_at = int(self.env.now) + REPORT_EVERY
            yield self.env.timeout(guest.reports_at - self.env.now)
            guest.reports_at = None
            if guest.running and len(pages := guest.free_pages.report(self.scanner.backed(guest.index))):
                self.scanner.discard(guest.index, pages)
                guest.reported += len(pages)
                guest.reports_at = int(self.env.now) + REPORT_EVERY

    def _balloon(self) -> None:
        """MOM: looks at the host and its guests, and sets the sizes of their balloons."""
        assert self.ballooning is not None  # or it would not be asked
        guests = {}
        for guest in self.guests:
            if guest.running and guest.free_pages and guest.vm.balloon:
                sizes = Sizes(guest.vm.balloon.min // PAGE_BYTES, guest.vm.pages)
                guests[guest.index] = guest.free_pages, sizes
        free, _ = self.scanner.usage()
        for index, wanted in self.ballooning.look(free, guests).items():
            self.scanner.discard(index, guests[index][0].resize(wanted, self.scanner.backed(index)))

    def _try(self, guest: Guest, ask: Callable[[], None]) -> bool:
        """Let the guest ask for frames; while there are none, somebody dies. Returns whether it lives."""
        from sim.sharing.room import OutOfFrames

        while guest.running:
            try:
                ask()
                break
            except OutOfFrames:
                self._kill(guest, int(self.env.now))
        return guest.running

    def _kill(self, guest: Guest, now: int) -> None:
        """No frame is left for a guest: it is killed if its own limit is why, else the worst of all."""
        victim, why = guest, f"asked for a frame when {self.name} had none left"
        if self.scanner.over_limit(guest.index):
            why = "asked for a frame beyond its memory_limit when it could not reclaim any"
        else:
            victim = max((each for each in self.guests if each.running), key=lambda each: self._badness(each, guest))
            if victim is not guest:
                why = f"had the most memory when {guest.name} asked for a frame and {self.name} had none left"
        self.oom_kills += 1
        self._note(victim, "oom-killed", why, now)
        self._finish(victim, now)
        self._leave(victim, "oom-killed", now)

    def _badness(self, guest: Guest, asks: Guest) -> tuple[bool, int, bool]:
        """How fit a guest is to be killed: by the pages it has and its oom_score_adj, and on a tie who asked.

        Source: oom_badness() of Linux 6.18, page tables left out. Guests that must not be killed come last.
        """
        adjustment = guest.vm.oom_score_adj * (self.host.memory // PAGE_BYTES) // 1000
        pages = self.scanner.touched(guest.index) if guest.vm.huge_pages != "hugetlbfs" else 0
        return guest.vm.oom_score_adj > -1000, pages + adjustment, guest is asks

    def _finish(self, guest: Guest, now: int) -> None:
        """Keep what the guest's row in the table says, while its pages are there."""
        self._account_writes(guest, now)
        guest.final = {
            "touched_bytes": self.scanner.touched(guest.index) * PAGE_BYTES,
            "swapped_bytes": self.scanner.swapped(guest.index) * PAGE_BYTES,
            "stall_s": self.scanner.stalled(guest.index) / SECOND,
            "progress_percent": guest.progress_percent,
            "fork_s": guest.fork_ns / SECOND,
            "page_tables_bytes": self.scanner.page_tables(guest.index),
            "balloon_bytes": guest.free_pages.balloon * PAGE_BYTES if guest.free_pages else 0,
            "reported_bytes": guest.reported * PAGE_BYTES,
            **self.scanner.counters_of(guest.index),
        }
        self.walks.leave(guest.index, now)

    def _leave(self, guest: Guest, end: str, now: int) -> None:
        guest.ended, guest.end = now, end
        self.promised -= guest.vm.memory
        self.committed -= guest.vm.memory if guest.vm.huge_pages != "hugetlbfs" else 0
        self.running -= 1
        self.khugepaged.forget(guest.index)
        self.scanner.remove(guest.index)
        if guest.vm.huge_pages == "hugetlbfs":
            self.hugetlb_taken -= guest.vm.memory
            self.scanner.reserve(guest.vm.pages)

    # --- settings -------------------------------------------------------------------------------------------------

    def _change_settings(self, changes: Sequence[KsmChange], done: int) -> Steps:
        for change in sorted((each for each in changes if each.at > done or done == 0), key=lambda each: each.at):
            yield self.env.timeout(change.at - self.env.now)
            for name, value in change.knobs():
                self._set(name, value)

    def _set(self, name: str, value: int | str) -> None:
        if name == "run":
            for log in self.scanner.finish_batch():
                self._record(self.scans, log)
        refused = self.scanner.set_knob(name, value, int(self.env.now))
        if refused:
            self._note(None, "setting-refused", f"{name} = {value}: {refused}")
        else:
            self._note(None, "setting", f"{name} = {value}")

    @property
    def _khugepaged_sleeps(self) -> int:
        """How long khugepaged sleeps (ns): a timer tick at least."""
        return max(self.host.thp.khugepaged.scan_sleep_millisecs * MILLISECOND, SECOND // self.host.hz)

    def _collapse(self) -> Steps:
        """khugepaged: sleeps and works; its work takes effect at once and its time after it."""
        while True:
            yield self.env.timeout(self.collapses_at - self.env.now)
            looked, made = self.scanner.wake_khugepaged(self.khugepaged, int(self.env.now))
            spent = round(looked * self.huge_prices.look.ns + made * self.huge_prices.collapse.ns)
            self.khugepaged_ns += spent
            self.collapses_at += spent + self._khugepaged_sleeps

    def _average(self) -> None:
        """Keep the averages of pressure stall information."""
        for averages, total in zip(self.psi, self.scanner.pressure(int(self.env.now)), strict=True):
            averages.update(total)

    def _look(self) -> Steps:
        """See now and then in what pages the guests run, whatever the time between two samples."""
        while True:
            yield self.env.timeout(0)  # after all else that happens now
            self._look_at_guests()
            yield self.env.timeout(LOOK_EVERY)

    def _look_at_guests(self) -> None:
        runners = [Runner(each.index, each.vm, self._host_pages(each.vm)) for each in self.guests if each.running]
        self.walks.look(self.scanner.m, runners, int(self.env.now))

    def _host_pages(self, vm: Vm) -> Literal["2MiB", "1GiB"] | None:
        """Size of the pages of hugetlbfs that the guest has, if it has such."""
        return self.host.hugetlbfs.size if self.host.hugetlbfs and vm.huge_pages == "hugetlbfs" else None

    def _act(self, source: AtSource) -> None:
        """Let a source of shared pages do what it does every so often."""
        source.act(int(self.env.now))

    def _tune(self) -> None:
        assert self.tuner is not None  # or it would not be asked
        total, free, committed = (size * self.host.scale for size in (self.host.memory, *self.scanner.usage()))
        choice = self.tuner.look(Usage(total=total, free=free, committed=committed))
        if choice:
            self._apply(choice)

    def _apply(self, choice: Choice) -> None:
        wanted = {"pages_to_scan": choice.pages_to_scan, "sleep_millisecs": choice.sleep_millisecs, "run": choice.run}
        for name, value in wanted.items():
            if value is not None and self.scanner.knob(name) != value:
                self._set(name, value)

    # --- records --------------------------------------------------------------------------------------------------

    def _sample(self) -> Steps:
        while True:
            now = int(self.env.now)
            self._record(self.samples, self.scanner.snapshot(now)[np.newaxis])
            if self.progress:
                self.progress(now)
            yield self.env.timeout(min(self.sample_every, self.duration - now) or self.sample_every)

    def _record(self, rows: Rows, log: Int64) -> None:
        rows.add(log, *self._others())

    def _others(self) -> tuple[int, ...]:
        """What `Rows.others` has for this moment, but for the number of rows."""
        averages = (each for kind in self.psi for each in kind.hundredths())
        source_ns = sum(source.cpu_ns for source in self.scanner.sources)
        return self.promised, self.running, self.oom_kills, self.khugepaged_ns, source_ns, *averages

    def _note(self, guest: Guest | None, kind: str, detail: str, now: int | None = None) -> None:
        time = (int(self.env.now) if now is None else now) / SECOND
        name = guest.name if guest else ""
        self.events.append({"time_s": time, "host": self.name, "guest": name, "kind": kind, "detail": detail})

    def _table(self, rows: Rows) -> dict[str, Column]:
        """Logged rows as the columns of the samples table."""
        log = np.concatenate(rows.logs) if rows.logs else np.zeros((0, self.scanner.ROW), np.int64)
        others = np.array(rows.others or np.zeros((0, 12)), np.int64)
        others = np.repeat(others[:, 1:], others[:, 0], axis=0)
        columns = self._columns(log, others)
        times = np.rint(np.asarray(columns["time_s"], np.float64) * SECOND).astype(np.int64)
        return {**columns, **self.walks.columns(times)}

    def _columns(self, log: Int64, others: Int64) -> dict[str, Column]:
        """Rows of the scanner's log, and what else there is to know, as columns; without the guests' walks."""
        columns = self.scanner.columns(log)
        private, shared = columns["mem_private_bytes"], columns["mem_shared_bytes"]
        used = private + shared + sum(columns[f"mem_{kind}_bytes"] for kind in _OTHER_USES)
        resident = columns.pop("resident_bytes")
        swap = self.host.swap.size if self.host.swap else 0
        copies, cow_ps = columns.pop("cow_breaks"), self.prices.picoseconds("cow_break")
        write_ns, copy_ns = round(price_sets.write(self.prices).ns), round(self.prices.cow_break.ns)
        waited, copied = columns.pop("write_wait_ns"), columns.pop("copy_wait_ns")
        worst = np.maximum(write_ns + waited, np.where(copies > 0, copy_ns + copied, 0))
        return {
            **dict.fromkeys((column.name for column in SAMPLES), np.zeros(len(log), np.int64)),
            **columns,
            "host": [self.name] * len(log),
            "hosts": np.ones(len(log), np.int64),
            "guests_running": others[:, 1],
            "mem_total_bytes": np.full(len(log), self.host.memory),
            "mem_promised_bytes": others[:, 0],
            "mem_used_bytes": used,
            "mem_free_bytes": self.host.memory - used,
            "saved_bytes": resident - private - shared,
            "swap_total_bytes": np.full(len(log), swap),
            **{name: others[:, 5 + index] / 100 for index, name in enumerate(_AVERAGES)},
            "oom_kills": others[:, 2],
            "khugepaged_cpu_ns": others[:, 3],
            "source_cpu_ns": others[:, 4],
            "cores": np.full(len(log), self.host.cores),
            "cow_cpu_ns": copies * cow_ps // 1000,
            "write_private_ns": np.full(len(log), write_ns),
            "write_merged_ns": np.full(len(log), copy_ns),
            "write_latency_worst_ns": worst,
        }

    def _row_of(self, guest: Guest) -> dict[str, object]:
        """The guest's row of the guests table."""
        return {
            **dict.fromkeys((column.name for column in GUESTS), 0),
            "guest": guest.name,
            "vm": guest.vm.name,
            "host": self.name,
            "start_s": guest.start / SECOND,
            "stop_s": float("nan") if guest.ended is None else guest.ended / SECOND,
            "end": guest.end,
            "memory_bytes": guest.vm.memory,
            **guest.final,
            "cow_breaks": self.scanner.copies(guest.index),
            "pages_written": guest.pages_written,
            "tlb_slowdown_percent": self.walks.slowdown_percent(guest.index),
        }


def _ranges(guest: Guest, part: str | None) -> Iterator[tuple[int, int]]:
    """First page and length of each piece of a part, or of the whole guest."""
    if part is None:
        yield 0, guest.vm.pages
        return
    yield from _pieces(np.sort(guest.places[part]))


def _pieces(pages: PageNumbers) -> Iterator[tuple[int, int]]:
    """First page and length of each piece that rising page numbers make."""
    for piece in np.split(pages, np.flatnonzero(np.diff(pages) != 1) + 1):
        if len(piece):
            yield int(piece[0]), len(piece)
