"""Guests as a scenario describes them: memory, image, life, and what they write when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from sim.columns import PAGE_BYTES
from sim.errors import At, Several, suggestion
from sim.memory.image import Captured, Image, Part, Synthetic
from sim.units import Block, Bytes, Duration, Name, Rate, Share, format_bytes, format_duration


class Burst(Block):
    """Writes to many pages of a part at one moment, once or again and again."""

    part: str
    """The part of the synthetic image."""
    at: Duration = 0
    """First time, after the guest's start."""
    every: Duration | None = None
    """Time from one burst to the next; once only unless given."""
    share: Share = 1.0
    """Share of the part's pages, chosen anew each time."""
    leaves: Literal["unique", "zero", "original", "files", "free"] = "unique"
    """What is left in the pages: contents never seen before, zeros, or what the guest started with; files that it never
    read before, but every guest with such a burst of a part of this name reads into the same pages when it comes to it;
    or the guest frees the pages without writing, for a balloon or a report of free pages to take."""


class Advice(Block):
    """madvise() in the middle of a guest's life."""

    at: Duration
    """When, after the guest's start."""
    advice: Literal["mergeable", "unmergeable"]
    """MADV_MERGEABLE or MADV_UNMERGEABLE."""
    part: str | None = None
    """The part of the synthetic image; all of the guest unless given."""


class Activity(Block):
    """A level that scales the random writes over time."""

    every: Duration = Field(gt=0)
    """How long each level lasts."""
    levels: tuple[float, ...] = Field(min_length=1)
    """Factors, the first from the guest's start."""
    repeat: bool = True
    """Start over after the last level; otherwise the last one stays."""

    @model_validator(mode="after")
    def _levels_are_factors(self) -> Activity:
        bad = [At(f"levels.{i}", "must not be negative", "write 0 for a guest at rest")
               for i, level in enumerate(self.levels) if level < 0]  # fmt: skip
        if bad:
            raise Several(*bad)
        return self


class Balloon(Block):
    """The guest has a balloon, which the host's rules fill."""

    min: Bytes = 0
    """Memory that the guest keeps however little the host has (in oVirt, its guaranteed memory)."""


class Vm(Block):
    """One kind of guest and how many there are of it."""

    name: Name
    """Name; its guests are called NAME-0, NAME-1, ..."""
    preset: str | None = Field(default=None, exclude=True)
    """A kind of guest that came along (`overcommit list`), such as debian-12-nginx: it has what is not set here."""
    count: int = Field(default=1, ge=1, le=1_000_000)
    """How many guests."""
    memory: Bytes = Field(gt=0)
    """Memory promised to each guest."""
    image: Image | None = None
    """What the memory holds; unique pages unless given. A fork has its parent's."""
    start: Duration = 0
    """When the first guest starts."""
    every: Duration = 0
    """Time from one guest's start to the next."""
    stop: Duration | None = None
    """When all guests of this kind stop."""
    lifetime: Duration | None = Field(default=None, gt=0)
    """How long each guest lives."""
    fork_of: str | None = None
    """Guests are forked from the first guest of this kind, which must be running on the same host."""
    kernel: Literal["own", "shared"] = "own"
    """own: a virtual machine. shared: a container, processes of the host's kernel: it has none of the parts that belong
    to a kernel, and a file that several containers read from one image is in memory once (see pfcache for images of
    their own). What it does not read from files is offered to KSM if `mergeable` says so (PR_SET_MEMORY_MERGE)."""
    tenant: Name | None = None
    """Whose guests they are, for hosts that keep tenants apart (`shares_between`); ESX takes it for their salt. A fork
    is its parent's."""
    host: str | None = None
    """The host they run on; in turn over all hosts unless given."""
    numa_node: int | None = Field(default=None, ge=0)
    """The NUMA node of their memory; in turn over all nodes unless given."""
    mergeable: bool = True
    """Whether their memory is offered to KSM (MADV_MERGEABLE); hugetlbfs takes no such offer."""
    huge_pages: Literal["madvise", "none", "hugetlbfs"] = "madvise"
    """Ask for transparent huge pages, as QEMU does for its guests; do not; or take pages of the host's hugetlbfs: all
    of the memory from the start, and never for KSM."""
    memory_limit: Bytes | None = Field(default=None, gt=0)
    """Limit of the guest's memory cgroup (memory.max): what is more is reclaimed, by the guest itself."""
    vcpus: int = Field(default=1, ge=1, le=4096)
    """Virtual processors: one of them waits for a page that must be read, the others go on."""
    load: Share = 0.0
    """Share of its time for which the guest runs on a processor when it does not wait for memory (for PSI `full`
    and for the cost of TLB misses, which is none for a guest that never runs)."""
    memory_accesses: Rate = 3_500_000.0
    """Accesses to memory of a virtual processor per second of work, each to a page chosen anew, in proportion to the
    reads and writes of the image; accesses to the page of the one before do not count. As many as a kernel build makes
    that loses 13 % by nested paging, if it works on 64 MiB (see scenarios/published/nested-paging-4k.yaml)."""
    guest_pages: Literal["4KiB", "2MiB", "1GiB"] = "2MiB"
    """Pages in which the guest's own tables map its memory. 2 MiB is what Linux has for programs since its option
    TRANSPARENT_HUGEPAGE_ALWAYS is the default (commit 13ece886d99c); files are in 4 KiB."""
    nested_paging: bool = True
    """Whether the guest has page tables of its own under the host's, as a virtual machine; a process has none."""
    oom_score_adj: int = Field(default=0, ge=-1000, le=1000)
    """Thousandths of the host's memory to add to the guest's size when a guest must be killed; -1000 never."""
    differs_at: Bytes = Field(default=0, le=PAGE_BYTES)
    """How many bytes at their start two different pages of these guests have in common: what ksmd compares in vain."""
    balloon: Balloon | None = None
    """Let the rules of the host's balloon take what the guest has free."""
    free_page_reporting: bool = False
    """The guest tells the host of 2 MiB blocks that it has free, and the host takes their frames."""
    activity: Activity | None = None
    """Scales the random writes over time."""
    bursts: tuple[Burst, ...] = ()
    """Writes to many pages at once."""
    madvise: tuple[Advice, ...] = ()
    """Advice given in the middle of life."""

    @property
    def pages(self) -> int:
        """Pages of one guest."""
        return self.memory // PAGE_BYTES

    @property
    def content(self) -> Synthetic | Captured:
        """The image, the default being one part of unique pages; a container has nothing of a kernel's."""
        image = self.image or Synthetic(parts=(Part.model_validate({"name": "memory", "size": "100%"}),))
        return image.without_kernel() if self.kernel == "shared" and isinstance(image, Synthetic) else image

    @property
    def is_nested(self) -> bool:
        """Whether it has page tables of its own under the host's."""
        return self.nested_paging and self.kernel == "own"

    def lives(self, end: int) -> Iterator[tuple[int, int]]:
        """Start and stop (ns) of each guest; a stop at or after *end* means never."""
        for index in range(self.count):
            start = self.start + index * self.every
            stops = [stop for stop in (self.stop, self.lifetime and start + self.lifetime) if stop]
            yield start, min([*stops, end])

    def part_faults(self, image: Synthetic | Captured) -> Iterator[At]:
        """Yield bursts and advice for parts that *image*, the guest's own or its parent's, does not have."""
        parts = [part.name for part in image.parts] if isinstance(image, Synthetic) else []
        named = [(f"bursts.{i}", burst.part) for i, burst in enumerate(self.bursts)]
        named += [(f"madvise.{i}", advice.part) for i, advice in enumerate(self.madvise) if advice.part is not None]
        for path, part in named:
            if part not in parts:
                remedy = suggestion(part, parts) if parts else "only a synthetic image has parts"
                yield At(f"{path}.part", "no such part in the guest's image", remedy)
        files = [part.name for part in image.parts if part.file] if isinstance(image, Synthetic) else []
        for i, burst in enumerate(self.bursts):
            if burst.leaves == "files" and burst.part in parts and burst.part not in files:
                yield At(f"bursts.{i}.leaves", f"part {burst.part} holds no files", "write file: true in that part")

    @model_validator(mode="after")
    def _consistent(self) -> Vm:
        faults = [*self._size_faults(), *self._time_faults()]
        faults += self._fork_faults() if self.fork_of else self.part_faults(self.content)
        faults += self._balloon_faults()
        if faults:
            raise Several(*faults)
        return self

    def _balloon_faults(self) -> Iterator[At]:
        if self.balloon and self.balloon.min >= self.memory:
            yield At("balloon.min", "leaves nothing for the balloon", f"write less than {format_bytes(self.memory)}")
        for name in ("balloon", "free_page_reporting"):
            if getattr(self, name) and self.kernel == "shared":
                yield At(name, "a container has no kernel of its own to give memory back", "remove it or kernel")
            if getattr(self, name) and self.huge_pages == "hugetlbfs":
                yield At(name, "pages of hugetlbfs are not given back", "remove it or huge_pages")
            if getattr(self, name) and self.fork_of:
                yield At(name, "only a guest that boots by itself has one", "remove it or fork_of")
        for i, burst in enumerate(self.bursts):
            parts = self.content.parts if isinstance(self.content, Synthetic) and not self.fork_of else ()
            part = next((each for each in parts if each.name == burst.part), None)
            if burst.leaves == "free" and part and (part.writes or part.reads):
                kind = "writes" if part.writes else "reads"
                yield At(f"bursts.{i}.leaves", f"part {part.name} has random {kind}: it stays in use", f"remove {kind}")

    def _size_faults(self) -> Iterator[At]:
        if self.memory % PAGE_BYTES:
            pages = -(-self.memory // PAGE_BYTES)
            yield At("memory", "must be whole pages of 4KiB", f"write {format_bytes(pages * PAGE_BYTES)}")
        if self.memory_limit is not None and self.memory_limit < PAGE_BYTES:
            yield At("memory_limit", "must hold at least one page", 'write "4KiB" or more')
        if self.memory_limit is not None and self.memory_limit > self.memory:
            said = f"the guest has no more than {format_bytes(self.memory)}: it never comes to its limit"
            yield At("memory_limit", said, "write less, or remove it")
        if self.image:
            try:
                self.image.check_size(self.memory)
            except At as fault:
                yield At(f"image.{fault.path}", fault.message, fault.remedy)

    def _time_faults(self) -> Iterator[At]:
        last = self.start + (self.count - 1) * self.every
        if self.stop is not None and self.stop <= last:
            late = "start" if last == self.start else f"the last of {self.count} guests starts"
            yield At("stop", f"must come after {late}", f"write more than {format_duration(last)}")
        if self.huge_pages == "hugetlbfs" and self.memory_limit:
            yield At("memory_limit", "pages of hugetlbfs do not count for it", "remove memory_limit or huge_pages")
        if self.huge_pages == "hugetlbfs" and self.kernel == "shared":
            yield At("huge_pages", "a container's files are not in hugetlbfs", "remove it or kernel")
        if self.huge_pages == "hugetlbfs" and self.madvise:
            yield At("madvise", "KSM takes no memory of hugetlbfs", "remove madvise or huge_pages")
        for i, burst in enumerate(self.bursts):
            if burst.every == 0:
                yield At(f"bursts.{i}.every", "must be longer than 0", "leave it out for a single burst")

    def _fork_faults(self) -> Iterator[At]:
        if self.huge_pages == "hugetlbfs":
            yield At("huge_pages", "a fork has its parent's memory", "remove huge_pages or fork_of")
        if self.tenant:
            yield At("tenant", "a fork has its parent's tenant", "remove tenant or fork_of")
        if self.image:
            yield At("image", "a fork has its parent's image", "remove image or fork_of")
        for i, burst in enumerate(self.bursts):
            if burst.leaves == "original":
                yield At(f"bursts.{i}.leaves", "a fork has no contents of its own to return to", "write unique or zero")
