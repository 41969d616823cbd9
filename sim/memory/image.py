"""Images: what a guest's pages hold when it starts, synthetic (parts) or captured (fingerprints of a real guest)."""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, PlainSerializer, PrivateAttr, model_validator

from sim.columns import PAGE_BYTES
from sim.document import by_key
from sim.errors import At, Several, UserError, suggestion
from sim.streams import generator
from sim.units import (
    SECOND,
    Block,
    Bytes,
    Name,
    Rate,
    Share,
    about_bytes,
    format_bytes,
    format_share,
    parse_bytes,
    parse_share,
)

Contents = npt.NDArray[np.int32]
PageNumbers = npt.NDArray[np.int64]

UNTOUCHED: Final = -(1 << 31)
"""Content of a page that does not exist yet."""
OWN: Final = -2
"""Content of a page that equals no other page, until its first write."""

UNIT_BYTES: Final = 16
"""Steps in which sizes of pages that are kept small are told apart."""

NEVER_TOUCHED: Final = 255
"""In a captured image, for a page that no snapshot has."""
MOST_BYTES: Final = 1 << 34
"""Largest array a captured image may hold, uncompressed."""
_MOST_SNAPSHOTS = 1 << 20
MOST_CONTENTS: Final = 1 << 30
"""Contents of a captured image, zeros included."""
_PIECE = 1 << 22
# What zipfile, zlib and numpy raise for bytes that are no archive of arrays; a broken header ends in the tokenizer.
_UNREADABLE = (OSError, zlib.error, EOFError, RuntimeError, ValueError, SyntaxError, TokenError)

_Header = tuple[tuple[int, ...], np.dtype[Any], int]


def _parse_extent(value: object) -> int | float:
    if isinstance(value, str) and "%" in value:
        return parse_share(value)
    try:
        return parse_bytes(value)
    except At as fault:
        remedy = fault.remedy if fault.remedy.startswith("did you mean") else 'write "120MiB" or "30%"'
        raise At("", fault.message.replace("a size in bytes", "a size in bytes or a share"), remedy) from None


def _format_extent(extent: int | float) -> str:
    return format_share(extent) if isinstance(extent, float) else format_bytes(extent)


_ExtentText = Annotated[str, Field(examples=["30%", "120MiB"])]
Extent = Annotated[
    int | float,
    BeforeValidator(_parse_extent, json_schema_input_type=_ExtentText | Literal[0]),
    PlainSerializer(_format_extent, return_type=str),
]
"""Bytes as an integer or a share of the whole as a float inside; "120MiB" or "30%" outside."""


def pages_of(extent: int | float, whole: int) -> int:
    """Pages that an extent means, of a *whole* given in pages."""
    return round(extent * whole) if isinstance(extent, float) else extent // PAGE_BYTES


class ContentSpace:
    """The contents of one host by number: 1 and up, given out to domains as images name them."""

    def __init__(self) -> None:
        self.count = 1
        self._domains: dict[str, Domain] = {}

    def some(self, number: int) -> int:
        """Reserve *number* contents that nobody else has. Returns the first."""
        first = self.count
        self.count += number
        return first

    def domain(self, name: str) -> Domain:
        """The domain of that name; the first one has the zero page's own number for its pages of zeros."""
        if name not in self._domains:
            self._domains[name] = Domain(self, len(self._domains), self.some(1) if self._domains else 0)
        return self._domains[name]


class Domain:
    """Guests that may share with each other; what another domain's guests have has another number, equal or not."""

    def __init__(self, space: ContentSpace, number: int, zeros: int) -> None:
        self.number = number
        self.zeros = zeros
        """Stands for pages of zeros wherever contents are looked up; what such a page holds is 0 in every domain."""
        self.space = space
        self._pools: dict[str, Contents] = {}
        self._data_sets: dict[str, tuple[int, Contents]] = {}

    def some(self, number: int) -> int:
        """Reserve *number* contents that nobody else has. Returns the first."""
        return self.space.some(number)

    def pool(self, name: str, number: int) -> Contents:
        """The first *number* contents of a pool; every user of the name gets the same."""
        known = self._pools.get(name, np.empty(0, np.int32))
        if len(known) < number:
            more = number - len(known)
            known = np.concatenate([known, np.arange(more, dtype=np.int32) + self.some(more)]).astype(np.int32)
            self._pools[name] = known
        return known[:number]

    def add_data_set(self, name: str, captured: Contents) -> None:
        """Number the contents of a data set that occur here, given in their order and each once."""
        self._data_sets[name] = self.some(len(captured)), captured

    def captured(self, name: str, contents: npt.NDArray[np.int64]) -> Contents:
        """Contents of a data set as this domain numbers them; 0 and what is negative stay."""
        first, known = self._data_sets[name]
        numbers = contents.astype(np.int32)
        numbers[contents > 0] = first + np.searchsorted(known, contents[contents > 0])
        return numbers


class Accesses(Block):
    """Random accesses to the pages of a part; each page is a Poisson process of its own."""

    rate: Rate
    """Accesses per page, on average over the part."""
    hot: Share = 1.0
    """Share of the part's pages that is hot: the first ones."""
    zipf: float | None = Field(default=None, gt=0, le=4)
    """Exponent s: page number n of the part gets its accesses in proportion to n^-s; instead of hot pages."""

    def _faults(self, hot_name: str, hot_share: float) -> Iterator[At]:
        """What is wrong with the share *hot_share*, called *hot_name*, of accesses that go to the hot pages."""
        if self.zipf is not None and (self.hot < 1 or hot_share < 1):
            yield At("zipf", "the exponent says which pages are hot", f"remove hot and {hot_name}, or zipf")
        elif self.hot == 0 and hot_share > 0:
            yield At(
                "hot", f"no page is hot, but hot pages get {hot_name.removeprefix('hot_')}", f"set {hot_name} to 0%"
            )
        elif self.hot == 1 and hot_share < 1:
            others = hot_name.removeprefix("hot_")
            yield At(hot_name, f"every page is hot, so no page is left for the other {others}", "set hot below 100%")

    def _pieces(self, pages: int, hot_share: float) -> list[tuple[int, float]]:
        """For *pages* pages in their order: up to which page a rate (per second and page) holds, and the rate."""
        if self.zipf is not None:
            return _zipf_pieces(pages, self.rate, self.zipf)
        hot = round(pages * self.hot)
        hot_rate = self.rate * hot_share / self.hot if self.hot else 0.0
        cold_rate = self.rate * (1 - hot_share) / (1 - self.hot) if self.hot < 1 else 0.0
        if hot in (0, pages):
            return [(pages, hot_rate if hot else cold_rate)]
        return [(hot, hot_rate), (pages, cold_rate)]


class Writes(Accesses):
    """Random writes to the pages of a part: each page is a Poisson process of its own."""

    hot_writes: Share = 1.0
    """Share of all writes that goes to the hot pages."""
    leaves: str = "unique"
    """What a write leaves: unique (a content never seen before), zero, or the name of a pool."""

    @model_validator(mode="after")
    def _some_page_is_hot(self) -> Writes:
        if faults := list(self._faults("hot_writes", self.hot_writes)):
            raise Several(*faults)
        return self

    def pieces(self, pages: int) -> list[tuple[int, float]]:
        """For *pages* pages in their order: up to which page a rate (per second and page) holds, and the rate."""
        return self._pieces(pages, self.hot_writes)


class Reads(Accesses):
    """Accesses that change nothing: they keep pages in memory, bring them back from swap, and use the TLB."""

    hot_reads: Share = 1.0
    """Share of all reads that goes to the hot pages."""
    order: Literal["random", "loop"] = "random"
    """Each page by itself, or one page after the other from the first to the last and again."""

    @model_validator(mode="after")
    def _some_page_is_hot(self) -> Reads:
        faults = list(self._faults("hot_reads", self.hot_reads))
        if self.order == "loop" and (self.zipf is not None or self.hot < 1):
            faults.append(At("order", "a loop visits every page equally often", "remove hot and zipf, or the order"))
        if faults:
            raise Several(*faults)
        return self

    def pieces(self, pages: int) -> list[tuple[int, float]]:
        """For *pages* pages in their order: up to which page a rate (per second and page) holds, and the rate."""
        return self._pieces(pages, self.hot_reads)


def _zipf_pieces(pages: int, rate: float, exponent: float) -> list[tuple[int, float]]:
    """Rates that fall with the page's number, each the mean of a piece; ten pieces a factor of ten in number."""
    weights = np.cumsum(np.arange(1.0, pages + 1) ** -exponent)
    steps = np.round(10 ** (np.arange(10 * math.log10(max(pages, 1)) + 1) / 10)).astype(int)
    ends = np.unique(np.minimum(np.append(steps, pages), pages))
    sums = np.diff(weights[ends - 1], prepend=0.0)
    rates = rate * pages * sums / weights[-1] / np.diff(ends, prepend=0)
    return list(zip(ends.tolist(), rates.tolist(), strict=True))


class Similar(Block):
    """Pages of a part that resemble others without being equal, for Difference Engine; a page keeps this whatever is
    written to it."""

    pages: int = Field(ge=2)
    """How many pages of the part resemble each other: it falls into families of so many."""
    patch: Bytes = Field(gt=0, le=PAGE_BYTES)
    """What a page takes as the difference from another one of its family, in steps of 16 bytes."""


class Part(Block):
    """One part of a synthetic image; exactly one of pool, duplicates, zero and untouched may be given."""

    name: Name
    """How bursts and advice call the part."""
    size: Extent
    """How much of the guest: bytes, or a share of its memory."""
    pool: str | None = None
    """Pages that every part with the same pool has: an operating system's, an application's."""
    duplicates: int | None = Field(default=None, ge=2)
    """Each content stands so many times inside this guest and nowhere else."""
    zero: bool = False
    """Pages filled with zeros."""
    untouched: bool = False
    """Memory the guest has not touched: no frame, not seen by KSM."""
    free: bool = False
    """Memory the guest has used and freed: its contents stay until a balloon or a report of free pages takes them."""
    file: bool = False
    """Memory that the guest's kernel read from files on its disk; a pool of such memory is files of a common image."""
    kernel: bool = False
    """Memory of the guest's own kernel, which a container does not have."""
    run: Bytes = 0
    """Length of the pieces in which the part lies about in the guest's memory; 0 keeps it in one piece."""
    writes: Writes | None = None
    """Random writes."""
    reads: Reads | None = None
    """Accesses that change nothing."""
    similar: Similar | None = None
    """Pages resemble each other; with a pool those of all parts with that pool do."""
    compresses_to: Share | None = None
    """Size of each page under LZ4, as a share of the page, for zram and zswap; 0% is a page of one repeated word.
    Unless given, sizes are drawn from those of captured guests' pages, 44% on average."""

    @model_validator(mode="after")
    def _one_kind(self) -> Part:
        kinds = [name for name in ("pool", "duplicates", "zero", "untouched") if getattr(self, name)]
        if len(kinds) > 1:
            raise At(kinds[1], f"a part is either {' or '.join(kinds)}", "keep one of them")
        for kind in ("writes", "reads"):
            if self.untouched and getattr(self, kind):
                raise At(kind, f"random {kind} need pages that were touched", "use a burst to touch memory later")
            if self.free and getattr(self, kind):
                raise At(kind, f"nobody {kind} free pages", "use a burst to bring them into use")
        if self.file and (self.zero or self.untouched):
            raise At("file", "what was read from a file is neither empty nor untouched", "remove it")
        if self.similar and (self.zero or self.untouched):
            raise At("similar", "pages of zeros are equal, and untouched ones hold nothing", "remove it")
        if self.free and self.untouched:
            raise At("free", "what was never touched is free by itself", "remove it")
        if self.reads and self.reads.order == "loop" and self.run:
            raise At("reads.order", "a loop needs the part in one piece", "remove run")
        if self.run % PAGE_BYTES:
            raise At("run", "must be whole pages of 4KiB", f"write {format_bytes(-(-self.run // PAGE_BYTES) * 4096)}")
        return self


class Synthetic(Block):
    """An image made of parts; what they leave over is untouched."""

    parts: tuple[Part, ...] = Field(min_length=1)
    """The parts, in the order of the guest's memory."""

    @model_validator(mode="after")
    def _names_differ(self) -> Synthetic:
        names = [part.name for part in self.parts]
        twice = [At(f"parts.{i}.name", "is taken by another part", "choose another name")
                 for i, name in enumerate(names) if name in names[:i]]  # fmt: skip
        if twice:
            raise Several(*twice)
        return self

    def without_kernel(self) -> Synthetic:
        """The same image for a guest that has no kernel of its own: what belongs to one is never touched."""
        nothing = {"pool": None, "duplicates": None, "zero": False, "free": False, "file": False, "writes": None}
        bare = {**nothing, "reads": None, "kernel": False, "untouched": True}
        parts = (part.model_copy(update=bare) if part.kernel else part for part in self.parts)
        return self.model_copy(update={"parts": tuple(parts)})

    def check_size(self, memory: int) -> None:
        """Raise At if the parts do not fit into *memory* bytes."""
        total = sum(pages_of(part.size, memory // PAGE_BYTES) for part in self.parts) * PAGE_BYTES
        if total > memory:
            said = f"parts add up to {about_bytes(total)}, more than the guest's memory of {format_bytes(memory)}"
            raise At("parts", said, "make parts smaller")

    def pool_pages(self, memory: int) -> Iterator[tuple[str, int]]:
        """Pools named, with the pages used of each."""
        for part in self.parts:
            if part.pool:
                yield part.pool, pages_of(part.size, memory // PAGE_BYTES)

    def layout(self, memory: int, seed: int, name: str) -> Mapping[str, PageNumbers]:
        """Page numbers of each part; parts with a `run` are cut up and the pieces of all such parts shuffled."""
        pages = memory // PAGE_BYTES
        pieces: list[tuple[int, int, int]] = []
        loose: list[int] = []
        for index, part in enumerate(self.parts):
            size = pages_of(part.size, pages)
            step = part.run // PAGE_BYTES or max(size, 1)
            for first in range(0, size, step):
                if part.run:
                    loose.append(len(pieces))
                pieces.append((index, first, min(step, size - first)))
        order = list(range(len(pieces)))
        shuffled = generator(seed, "layout", name).permutation(len(loose))
        for place, source in zip(loose, shuffled, strict=True):
            order[place] = loose[source]
        places = {part.name: np.empty(pages_of(part.size, pages), np.int64) for part in self.parts}
        at = 0
        for piece in order:
            index, first, length = pieces[piece]
            places[self.parts[index].name][first : first + length] = np.arange(at, at + length)
            at += length
        return places

    def duplicate_contents(self, memory: int) -> int:
        """Contents that this guest alone has several times."""
        sizes = ((pages_of(part.size, memory // PAGE_BYTES), part.duplicates) for part in self.parts)
        return sum(-(-size // each) for size, each in sizes if each)

    def similar(
        self, memory: int, places: Mapping[str, PageNumbers], space: Domain
    ) -> tuple[Contents, npt.NDArray[np.uint8]]:
        """Of each page the number of its family in *space*, 0 none, and the size of a difference in units."""
        family = np.zeros(memory // PAGE_BYTES, np.int32)
        patch = np.zeros(memory // PAGE_BYTES, np.uint8)
        for part in self.parts:
            where = places[part.name]
            if part.similar and len(where):
                number = np.arange(len(where)) // part.similar.pages
                families = int(number[-1]) + 1
                family[where] = space.pool(part.pool, families)[number] if part.pool else space.some(families) + number
                patch[where] = min(-(-part.similar.patch // UNIT_BYTES), 255)
        return family, patch

    def free(self, memory: int, places: Mapping[str, PageNumbers]) -> npt.NDArray[np.bool_]:
        """Whether the guest has each page on its list of free pages when it starts."""
        free = np.ones(memory // PAGE_BYTES, np.bool_)
        for part in self.parts:
            free[places[part.name]] = part.free or part.untouched
        return free

    def contents(self, memory: int, places: Mapping[str, PageNumbers], space: Domain) -> Contents:
        """The content of each page when the guest starts."""
        contents = np.full(memory // PAGE_BYTES, UNTOUCHED, np.int32)
        for part in self.parts:
            where = places[part.name]
            if part.pool:
                contents[where] = space.pool(part.pool, len(where))
            elif part.duplicates:
                kinds = -(-len(where) // part.duplicates)
                contents[where] = space.some(kinds) + np.arange(len(where)) % kinds
            elif part.zero:
                contents[where] = 0
            elif not part.untouched:
                contents[where] = OWN
        return contents


class Captured(Block):
    """An image taken from a real guest, replayed snapshot by snapshot."""

    captured: str
    """The .npz file, relative to the scenario file."""
    diverge: Share = 0.0
    """Share of the touched pages that differ in every copy of the guest."""
    data_set: str | None = None
    """Files of one data set number contents alike; unless given what the file says of itself, else its folder."""
    reads: Reads | None = None
    """Accesses that change nothing, to all pages; the first pages, the hottest ones, are those that change most."""

    _folder: Path = PrivateAttr(default=Path())
    _sample: Capture | None = PrivateAttr(default=None)

    def model_post_init(self, context: Any) -> None:
        """Remember what the path is relative to."""
        self._folder = Path((context or {}).get("folder", "."))

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self._folder / self.captured

    @model_validator(mode="after")
    def _readable(self) -> Captured:
        if not os.path.isfile(self.path):
            folder = self.path.parent
            others = sorted(each.name for each in folder.glob("*.npz")) if os.path.isdir(folder) else []
            remedy = suggestion(self.path.name, others) if others else "paths are relative to the scenario file"
            raise At("captured", "no such file", remedy)
        if problem := _defect(self.path):
            raise At("captured", problem, _NPZ_REMEDY)
        return self

    @property
    def data_set_name(self) -> str:
        """What tells this file's data set from others."""
        return self.data_set or _noted_data_set(self.path) or str(Path(self.captured).parent)

    def capture(self) -> Capture:
        """What was captured, or the sample of it that is simulated (`sim/scale.py`)."""
        return self._sample or load_capture(self.path)

    def sampled(self, sample: Capture | None) -> Captured:
        """The same image, of which only a sample of pages is simulated."""
        copy = self.model_copy()
        copy._sample = sample
        return copy

    def check_size(self, memory: int) -> None:
        """Raise At if the captured guest is larger than *memory* bytes."""
        size = captured_shape(self.path)[1] * PAGE_BYTES
        if size > memory:
            remedy = f"make memory at least {format_bytes(size)}"
            raise At("captured", f"the captured guest has {format_bytes(size)}", remedy)


Image = Annotated[Synthetic | Captured, by_key(parts=Synthetic, captured=Captured)]

_NPZ_REMEDY = "an image is an .npz with the arrays content [snapshots, pages] and time_s [snapshots]"


def _defect(path: Path) -> str:
    """What is wrong with the file of a captured image, or nothing; looks again only when the file has changed."""
    told = os.stat(path)
    return _defect_found(path, told.st_mtime_ns, told.st_size)


@lru_cache(maxsize=1024)
def _defect_found(path: Path, mtime_ns: int, size: int) -> str:
    """Look for it; holds no more than a piece of the file in memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _wrong_layout(_headers(archive)) or _wrong_times(archive) or _wrong_contents(archive)
    except zipfile.BadZipFile:
        return "is no .npz file, or is cut short"
    except PermissionError:
        return "may not be read"
    except _UNREADABLE:
        return "is damaged"


def _headers(archive: zipfile.ZipFile) -> Mapping[str, _Header]:
    arrays = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
    return {entry.filename.removesuffix(".npy"): _header(archive, entry) for entry in arrays}


def _wrong_layout(headers: Mapping[str, _Header]) -> str:
    """What is wrong with the shapes and types of the arrays, or nothing."""
    for name in ("content", "time_s"):
        if name not in headers:
            return f"has no array {name}"
    objects = [name for name, (_, dtype, _) in headers.items() if dtype.hasobject]
    if objects:
        return f"{objects[0]} holds Python objects, which are never read"
    (shape, dtype, _), (times, time_dtype, _) = headers["content"], headers["time_s"]
    if dtype not in (np.uint32, np.uint64):
        return f"content must be uint32 or uint64, not {dtype}"
    if len(shape) != 2 or min(shape) < 1:
        return f"content must be [snapshots, pages], not of shape {list(shape)}"
    if time_dtype.kind not in "fiu" or times != (shape[0],):
        return f"time_s must hold one number for each of the {shape[0]} snapshots"
    for name, of_page in (("touched_from", np.uint8), ("lz4_bytes", np.uint16), ("free", np.bool_)):
        if headers.get(name, ((shape[1],), of_page, 0))[:2] != ((shape[1],), of_page):
            return f"{name} must hold one {np.dtype(of_page)} for each of the {shape[1]} pages"
    size = math.prod(shape) * dtype.itemsize
    if size > MOST_BYTES or shape[0] > _MOST_SNAPSHOTS:
        return f"content is {about_bytes(size)} in {shape[0]} snapshots, too large to replay"
    cut = [name for name, (shape, dtype, held) in headers.items() if math.prod(shape) * dtype.itemsize != held]
    return f"{cut[0]} is cut short" if cut else ""


def _wrong_times(archive: zipfile.ZipFile) -> str:
    with archive.open("time_s.npy") as stream:
        times = np.lib.format.read_array(stream, allow_pickle=False).astype(np.float64)
    if not np.all(np.isfinite(times)) or not np.all(np.diff(times) > 0):
        return "time_s must increase from snapshot to snapshot"
    return ""


def _wrong_contents(archive: zipfile.ZipFile) -> str:
    """Whether a content number is out of range; reads piece by piece."""
    _, dtype, held = _header(archive, archive.getinfo("content.npy"))
    with archive.open("content.npy") as stream:
        stream.read(archive.getinfo("content.npy").file_size - held)
        while piece := stream.read(_PIECE):
            if np.frombuffer(piece, dtype).max() >= MOST_CONTENTS:
                return "content numbers must be below 2^30; number the contents of the data set from 1"
    return ""


def captured_shape(path: Path) -> tuple[int, int]:
    """Snapshots and pages of a captured guest, from the header of its file."""
    with zipfile.ZipFile(path) as archive:
        snapshots, pages = _header(archive, archive.getinfo("content.npy"))[0]
        return snapshots, pages


@lru_cache(maxsize=1024)
def _noted_data_set(path: Path) -> str:
    """The data set that a capture noted in its `meta`, or nothing."""
    with np.load(path, allow_pickle=False) as arrays:
        try:
            meta = json.loads(str(arrays["meta"]))
        except (KeyError, *_UNREADABLE):
            return ""
    return str(meta.get("data_set", "")) if isinstance(meta, dict) else ""


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> _Header:
    """Shape and type of an array as its header states them, and the bytes of data behind it."""
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        return shape, dtype, entry.file_size - stream.tell()


@dataclass(frozen=True, eq=False)
class Capture:
    """A captured image in memory: contents as numbers from 1 (0 the zero page), UNTOUCHED where no page is."""

    path: Path
    first: npt.NDArray[np.int64]  # (pages,) contents at the start
    changes: Sequence[tuple[int, PageNumbers, npt.NDArray[np.int64]]] = field(default_factory=tuple)
    numbers: Contents = field(default_factory=lambda: np.zeros(0, np.int32))
    """Contents that occur, but for the zero page; in order and each once."""
    lz4_bytes: npt.NDArray[np.uint16] = field(default_factory=lambda: np.zeros(0, np.uint16))
    """(pages,) or none: sizes in the first snapshot under LZ4; 0 for a page of zeros or one that was not there."""
    free: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """(pages,) whether the guest's kernel had the page free at the end, or the page was never there."""


@lru_cache(maxsize=64)
def load_capture(path: Path) -> Capture:
    """Read a captured image. Raises UserError if it cannot be read."""
    problem = _defect(path)
    if problem:
        raise UserError(f"{path}: {problem}; {_NPZ_REMEDY}")
    with np.load(path, allow_pickle=False) as arrays:
        content, time_s = arrays["content"], arrays["time_s"].astype(np.float64)
        touched = arrays["touched_from"] if "touched_from" in arrays else np.zeros(content.shape[1], np.uint8)
        lz4_bytes = np.minimum(arrays["lz4_bytes"], PAGE_BYTES) if "lz4_bytes" in arrays else np.zeros(0, np.uint16)
        free = (touched == NEVER_TOUCHED) | arrays.get("free", False)
    content = content.astype(np.int64)
    first = np.where(touched == 0, content[0], UNTOUCHED)
    changes = []
    for snapshot in range(1, len(content)):
        appears = touched == snapshot
        differs = (content[snapshot] != content[snapshot - 1]) & (touched < snapshot) & (touched != NEVER_TOUCHED)
        pages = np.flatnonzero(appears | differs)
        changes.append((round((time_s[snapshot] - time_s[0]) * SECOND), pages, content[snapshot][pages]))
    occurring = np.unique(np.concatenate([first, *(contents for _, _, contents in changes)]))
    return Capture(path, first, tuple(changes), occurring[occurring > 0].astype(np.int32), lz4_bytes, free)
