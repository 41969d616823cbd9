"""What work costs: price sets measured on a machine or taken from a publication, and the time they make of counts."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import Field, model_validator

from sim.document import Document, read
from sim.errors import At, UserError, suggestion
from sim.units import Block, Bytes

FOLDER: Final = Path(__file__).parent / "prices"
DEFAULT: Final = "emerald-rapids"

Found = TypeVar("Found")

Nanoseconds = Annotated[float, Field(ge=0, le=1e9)]
Source = Annotated[str, Field(min_length=10)]


class Price(Block):
    """One price and where it comes from."""

    ns: Nanoseconds
    """Nanoseconds."""
    low: Nanoseconds | None = None
    """Lower end of the 95 % confidence interval, in ns, where one is known."""
    high: Nanoseconds | None = None
    """Upper end of it."""
    source: Source
    """Measurement, or paper and table."""

    @model_validator(mode="after")
    def _in_order(self) -> Price:
        low, high = (self.ns if end is None else end for end in (self.low, self.high))
        if not low <= self.ns <= high:
            raise At("", "must lie between its low and its high", "correct the three")
        return self


class Factor(Block):
    """A factor without a unit, and where it comes from."""

    factor: float = Field(ge=0, le=100)
    """The factor."""
    source: Source
    """Measurement, or paper and table."""


class Provenance(Block):
    """The machine on which a set was measured."""

    cpu: str
    """What the processor calls itself."""
    cores: int = Field(ge=1)
    """Processor cores that the measurement could use."""
    kernel: str
    """Release of its Linux."""
    hz: int = Field(ge=1, le=10_000)
    """Timer ticks per second."""
    virtualised: bool
    """Whether it runs under a hypervisor."""


class PageFaults(Block):
    """First touch of memory, with the zeroing of the page, paid by who touches it."""

    small: Price
    """4 KiB."""
    huge: Price
    """2 MiB."""


class HugePages(Block):
    """Work of making and unmaking transparent huge pages."""

    split: Price
    """Splitting one, paid by ksmd."""
    collapse: Price
    """Copying the pages of a 2 MiB area into one, paid by khugepaged."""
    look: Price
    """Looking at the pages of such an area, paid by khugepaged."""


class Access(Block):
    """One random load that depends on the one before, with memory in small and in huge pages."""

    working_set: Bytes = Field(gt=0)
    """Memory over which the loads are spread."""
    small: Price
    """In pages of 4 KiB."""
    huge: Price
    """In pages of 2 MiB."""


class Compressor(Block):
    """Work of one compression algorithm of zram for a page of 4 KiB, without finding the page."""

    compress: Price
    """Compress and store a page, whatever it becomes; all of it for a page that is kept as it is."""
    compress_byte: Price | None = None
    """The same for each byte that the page becomes; nothing unless given."""
    decompress: Price
    """Load and decompress a page, whatever it is; all of it for a page that was kept as it is."""
    decompress_byte: Price | None = None
    """The same for each byte that the page is; nothing unless given."""
    bytes_per_page: float = Field(gt=0, le=65536)
    """Memory that a page of the measurement took in the end."""

    def ns(self, size: float) -> tuple[float, float]:
        """What compressing a page to so many bytes takes, and decompressing it."""
        out, back = (each.ns if each else 0.0 for each in (self.compress_byte, self.decompress_byte))
        return self.compress.ns + size * out, self.decompress.ns + size * back


class SwapDevice(Block):
    """Time that a swap file takes, most of it waiting and not CPU."""

    read: Price
    """Random read of 4 KiB, one at a time."""
    write: Price
    """4 KiB of a sequential write."""
    swap_in: Price
    """Fault on a page that was swapped out, readahead included."""
    swap_out: Price
    """4 KiB that a guest pushes out by touching more than its limit."""
    drop: Price | None = None
    """CPU time of taking a page from a process that the file has unchanged; the bundled default's unless given."""


class Paging(Block):
    """Work of the kernel for a page on its way to swap and back, without the device and without compression."""

    page_in: Price
    """Fault on a page that was swapped out."""
    page_out: Price
    """Taking a page from a process and handing it to the device."""
    look: Price | None = None
    """Finding out that a page was used of late, so that it stays; the bundled default's unless given."""


class Fork(Block):
    """Copying page tables for a fork, paid by who forks."""

    page: Price
    """Entry of a page of 4 KiB, and all that is done for the page."""
    huge: Price | None = None
    """Entry of a huge page of 2 MiB; the bundled default's unless given."""


class Tlb(Block):
    """The processor's TLB for data, and how the loads of random_access were translated.

    Other processors, for sets made by hand: AMD K10 512 entries and 128 for 2 MiB (AnandTech, March 2008), Zen 2 2048
    for both (WikiChip), Zen 5 4096 for both (AMD, Hot Chips 2024).
    """

    small: int = Field(ge=1, le=1 << 20)
    """Entries of its last level for pages of 4 KiB."""
    huge: int | None = Field(default=None, ge=1, le=1 << 20)
    """Entries for pages of 2 MiB, where those are not the same entries; larger pages are taken to need as many."""
    host_pages: Literal["none", "4KiB", "2MiB", "1GiB"]
    """Pages that the host of the measured machine gave it; none for one that is no guest."""
    source: Source
    """Measurement, or manual."""


class Llc(Block):
    """The last-level cache."""

    per_core: Bytes = Field(gt=0)
    """Bytes for each core of a host."""
    miss: Price
    """What a load from memory takes longer than one from this cache."""
    source: Source
    """Measurement, or manual."""


class SmallPages(Block):
    """Work of Difference Engine, which keeps pages small."""

    patch: Price
    """Finding the difference of a page from a similar one, with the search for that one."""
    unpatch: Price
    """Building a page from its difference, paid by the guest."""
    compress: Price
    """Compressing a page."""
    uncompress: Price
    """Decompressing a page, paid by the guest."""


class Prices(Block):
    """CPU time of every kind of work."""

    name: str
    """Name of the set, that of its file."""
    about: str = Field(min_length=10)
    """Machine, kernel and date."""
    like: str | None = None
    """A bundled set that prices what this one does not, if it does not price all."""
    machine: Provenance | None = None
    """Where `overcommit lab calibrate` measured it."""
    batch: Price
    """Waking up for a batch."""
    scan: Price
    """Beginning a full scan: the LRU caches of all CPUs are drained."""
    visit_ksm: Price
    """Visiting a page that is merged already."""
    visit: Price
    """Visiting any other page, without what follows."""
    checksum: Price
    """Checksum of a page whose frame lies anywhere."""
    stable_level: Price
    """First level of a descent in the stable tree; level n costs n times as much, being colder."""
    unstable_level: Price
    """First level of a descent in the unstable tree; level n costs n times as much."""
    compare_byte: Price
    """Comparing one more equal byte."""
    item: Price
    """Item of a page seen for the first time."""
    skip: Price
    """Page that smart_scan skips."""
    absent: Price
    """Page table entry without a page."""
    insert: Price
    """Insertion into the unstable tree."""
    merge: Price
    """Replacing a page by a KSM page, without comparing."""
    promote: Price
    """Making a page a KSM page."""
    zero_merge: Price
    """Replacing a page by the zero page."""
    attach: Price
    """Attaching the item of a forked KSM page."""
    dup: Price
    """Looking at one more KSM page of a chain."""
    node_level: Price
    """Looking at the stable node of a merged page, once for each doubling of the number of nodes: they are colder."""
    slot: Price
    """Going to a guest's memory: its lock and its mappings, once for each guest and full scan."""
    free: Price
    """Freeing the item of a page that is gone."""
    checksum_adjacent: Price
    """Checksum of a page of memory that came as a huge page, split or not."""
    cow_break: Price
    """Copy on write, paid by the guest: all of the write that needs it."""
    write: Price | None = None
    """The same write to a page that is not shared; where a set does not price it, the bundled default does."""
    cold_caches: Factor
    """Surcharge for caches gone cold while ksmd slept: the factor times ln(1 + v/100) 100/v of the cost of a batch
    with v visits."""

    page_faults: PageFaults | None = None
    """First touches of memory."""
    fork: Fork | None = None
    """Forks; where a set does not price them, the bundled default does."""
    sha1: Price | None = None
    """SHA1 of a page; where a set does not price it, the bundled default does."""
    huge_pages: HugePages | None = None
    """Transparent huge pages; where a set does not price them, the bundled default does."""
    random_access: tuple[Access, ...] = ()
    """Random loads by working set, the smallest first: what large pages save."""
    tlb: Tlb | None = None
    """With random_access, what walks of page tables cost; where a set lacks one, the bundled default prices them."""
    llc: Llc | None = None
    """What the last-level cache saves; where a set does not price it, the bundled default does."""
    zram: Mapping[str, Compressor] = Field(default_factory=dict)
    """Algorithms of zram by their name in the kernel; those that a set does not price, the bundled default does."""
    small_pages: SmallPages | None = None
    """Pages kept small by Difference Engine; where a set does not price them, xen-2008 does."""
    paging: Paging | None = None
    """Swapping without the device; where a set does not price it, the bundled default does."""
    swap: SwapDevice | None = None
    """A swap file on the machine's disk; where a set does not price it, the bundled default does."""

    @model_validator(mode="after")
    def _rising(self) -> Prices:
        sizes = [access.working_set for access in self.random_access]
        if sizes != sorted(set(sizes)):
            raise At("random_access", "must go from the smallest working set to the largest", "sort it")
        return self

    def digest(self) -> str:
        """12 hexadecimal digits that differ for sets of one name with other figures."""
        return blake2b(self.model_dump_json().encode(), digest_size=6).hexdigest()

    def picoseconds(self, kind: str) -> int:
        """The price of one kind of work."""
        price: Price = getattr(small_pages(self) if kind in SmallPages.model_fields else self, kind)
        return round(price.ns * 1000)


def _found(prices: Prices, price_of: Callable[[Prices], Found | None]) -> Found:
    """What this set says, or else the bundled default, which says everything."""
    found = price_of(prices) or price_of(load(DEFAULT))
    assert found is not None
    return found


def huge_pages(prices: Prices) -> HugePages:
    """What huge pages cost by this set, or else by the bundled default."""
    return _found(prices, lambda each: each.huge_pages)


def fork(prices: Prices) -> tuple[Price, Price]:
    """What a fork costs for each page of 4 KiB and for each huge page, by this set, or else by the bundled default."""
    known = load(DEFAULT).fork
    found = prices.fork or known
    assert found is not None and known is not None and known.huge is not None  # the bundled default has both
    return found.page, found.huge or known.huge


def sha1(prices: Prices) -> Price:
    """What the SHA1 of a page costs by this set, or else by the bundled default."""
    return _found(prices, lambda each: each.sha1)


def translation(prices: Prices) -> tuple[Tlb, tuple[Access, ...]]:
    """The TLB and the loads that tell what a walk costs, by this set, or else by the bundled default."""
    found = prices if prices.tlb and prices.random_access else load(DEFAULT)
    assert found.tlb is not None  # the bundled default has one
    return found.tlb, found.random_access


def llc(prices: Prices) -> Llc:
    """The last-level cache by this set, or else by the bundled default."""
    return _found(prices, lambda each: each.llc)


def compressor(prices: Prices, algorithm: str) -> Compressor:
    """What an algorithm of zram costs by this set, or else by the bundled default."""
    return prices.zram.get(algorithm) or load(DEFAULT).zram[algorithm]


def small_pages(prices: Prices) -> SmallPages:
    """What keeping pages small costs by this set, or else by the one with Difference Engine's own figures."""
    found = prices.small_pages or load("xen-2008").small_pages
    assert found is not None  # that set has them
    return found


def paging(prices: Prices) -> Paging:
    """What swapping costs, the device apart, by this set, or else by the bundled default."""
    return _found(prices, lambda each: each.paging)


def look(prices: Prices) -> Price:
    """What it costs to find out that a page was used of late, by this set, or else by the bundled default."""
    found = paging(prices).look or paging(load(DEFAULT)).look
    assert found is not None  # the bundled default has it
    return found


def swap_device(prices: Prices) -> SwapDevice:
    """How fast a swap file is by this set, or else by the bundled default."""
    return _found(prices, lambda each: each.swap)


def submission(prices: Prices) -> float:
    """Nanoseconds of handing a page to a disk, besides taking it from its process.

    By this set, or else by the bundled default: what a process at its limit waits for each page that it touches first,
    less that first touch and less what the page's way out takes where there is no device.
    """
    found = prices if prices.swap and prices.page_faults and prices.paging else load(DEFAULT)
    assert found.swap and found.page_faults and found.paging  # the bundled default has them
    return max(found.swap.swap_out.ns - found.page_faults.small.ns - found.paging.page_out.ns, 0.0)


def write(prices: Prices) -> Price:
    """What a write to a page that is not shared takes, by this set, or else by the bundled default."""
    return _found(prices, lambda each: each.write)


def drop(prices: Prices) -> Price:
    """What taking an unchanged page costs that swap still has, by this set, or else by the bundled default."""
    found = swap_device(prices).drop or swap_device(load(DEFAULT)).drop
    assert found is not None  # the bundled default has it
    return found


def user_folder() -> Path:
    """Where `overcommit lab calibrate` installs price sets."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base) / "overcommit" / "prices"


def own_name() -> str:
    """Name of this machine's own set: its host name, in the letters that names are made of."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", platform.node()).strip("-._")[:100] or "this-machine"


def default() -> str:
    """The set that prices a host which names none: this machine's own if it was calibrated, else the bundled one."""
    own = own_name()
    return own if (user_folder() / f"{own}.yaml").is_file() else DEFAULT


def bundled() -> list[str]:
    """Price sets that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def names() -> list[str]:
    """Price sets that a scenario can name: those of the package and those of the user."""
    return sorted({*bundled(), *(path.stem for path in user_folder().glob("*.yaml"))})


def load(name: str, folder: Path = Path(), pages: int = 1) -> Prices:
    """The price set of that name, or of that .yaml file in *folder*, what it says of a page being said of so many.

    Raises At for one that is unknown or wrong.
    """
    own = name.endswith(".yaml")
    places = [folder / name] if own else [FOLDER / f"{name}.yaml", user_folder() / f"{name}.yaml"]
    path = next(filter(os.path.isfile, places), None)
    if path is None:
        remedy = "paths are relative to the scenario file" if own else suggestion(name, names())
        raise At("", "no such price set", remedy)
    return _of_pages(path, path.stat().st_mtime_ns, pages)


@lru_cache
def _of_pages(path: Path, changed_ns: int, pages: int) -> Prices:
    """The price set in a file, of so many pages; a fleet has it once for all of its hosts."""
    prices = _read(path, changed_ns)
    return prices if pages == 1 else of_pages(prices, pages)


def _whole(document: Document) -> Document:
    """The set with what the one has that it is like."""
    name = document.data.get("like")
    if name is None:
        return document
    whole = read(FOLDER / f"{name}.yaml") if name in bundled() else None
    if whole is None or "like" in whole.data:
        remedy = suggestion(str(name), [each for each in bundled() if "like" not in read(FOLDER / f"{each}.yaml").data])
        raise UserError(document.problem("like", "no such bundled price set that prices all", remedy))
    borrowed = {kind: price for kind, price in whole.data.items() if kind != "machine"}
    return replace(document, data={**borrowed, **document.data})


@lru_cache
def _read(path: Path, _changed_ns: int) -> Prices:
    """The price set in a file that was last changed then."""
    try:
        prices = _whole(read(path)).check(Prices)
    except UserError as error:
        first, *others = error.problems
        more = f" and {len(others)} more" if others else ""
        raise At("", f"is a wrong price set ({first}{more})", "correct that file") from None
    if prices.name != path.stem:
        raise At("", f"says that its name is {prices.name}", f"write name: {path.stem} in it")
    return prices


_NOT_OF_PAGES: Final = ("batch", "scan", "slot", "random_access", "llc")
"""Prices of what does not happen to a page: of wake-ups, guests and single loads."""


def of_pages(prices: Prices, number: int) -> Prices:
    """What the set says of a page, said of so many; what it does not price, the bundled sets do."""
    for_page, for_huge = fork(prices)
    faults, swap = _found(prices, lambda each: each.page_faults), swap_device(prices)
    # What `submission` takes from three blocks, whoever prices them.
    out_ns = submission(prices) + faults.small.ns + paging(prices).page_out.ns
    out = swap.swap_out.model_copy(update={"ns": out_ns, "low": None, "high": None})
    whole = {
        "page_faults": faults,
        "fork": Fork(page=for_page, huge=for_huge),
        "sha1": sha1(prices),
        "huge_pages": huge_pages(prices),
        "zram": {name: compressor(prices, name) for name in {**load(DEFAULT).zram, **prices.zram}},
        "small_pages": small_pages(prices),
        "paging": paging(prices).model_copy(update={"look": look(prices)}),
        "swap": swap.model_copy(update={"drop": drop(prices), "swap_out": out}),
        "write": write(prices),
    }
    whole = {**dict(prices), **whole}
    return prices.model_copy(
        update={name: part if name in _NOT_OF_PAGES else _times(part, number) for name, part in whole.items()}
    )


def _times(part: Any, number: int) -> Any:
    """Every price in a part of a set, so many times."""
    if isinstance(part, Price):
        return part.model_copy(update={"ns": part.ns * number, "low": None, "high": None})
    if isinstance(part, Mapping):
        return {name: _times(each, number) for name, each in part.items()}
    if isinstance(part, Block):
        return part.model_copy(update={name: _times(each, number) for name, each in part})
    return part
