"""What the guests of a run may hold and do, by number: contents, captures, classes of accesses.

Made before anything runs: every guest whose memory may come here is a member of it, by itself or by one of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from sim.memory.access import Group, Kind, by_activity, groups, numbered
from sim.memory.guest import Vm
from sim.memory.image import (
    UNTOUCHED,
    Capture,
    Captured,
    ContentSpace,
    Domain,
    PageNumbers,
    Synthetic,
)
from sim.units import SECOND

Version = Callable[[str, int], int]
"""Which version of a saved segment a guest has that starts then; 0 the first, or what is no such segment."""


class Member(Protocol):
    """A guest, as far as its memory goes."""

    @property
    def vm(self) -> Vm: ...
    @property
    def domain(self) -> Domain: ...
    @property
    def start(self) -> int: ...


def _alike(one: Kind, other: Kind) -> bool:
    """Whether two classes differ in numbers only."""
    loops = bool(one.period) == bool(other.period)
    return loops and (one.leaves, one.file, one.domain) == (other.leaves, other.file, other.domain)


def _distance(one: Kind, other: Kind) -> tuple[float, int, int, Kind]:
    """How far two classes are from each other, the rates first."""
    rates = abs(one.writes - other.writes) + abs(one.reads - other.reads)
    return rates, abs(one.period - other.period), abs(one.pages - other.pages), one


def saved(segment: str, version: int) -> str:
    """The pool that holds a version of a saved segment."""
    return f"{segment}, saved anew {version}" if version else segment


class Catalogue:
    """Contents and classes of accesses of the members, all of them numbered once."""

    def __init__(self, seed: int, duration: int, version: Version) -> None:
        """Nothing is in it yet, but domains may be asked for."""
        self.seed: Final = seed
        self.space = ContentSpace()
        self.captures: dict[Path, Capture] = {}
        self.classes: dict[Kind, int] = {}
        """A number for each class of random accesses."""
        self.files: dict[tuple[str, int], int] = {}
        """First content of the files that the bursts of a part, of that number, ever read."""
        self.contents = 0
        """Contents that the members can ever name."""
        self._duration = duration
        self._version = version
        self._members: Sequence[Member] = ()
        self._layouts: dict[tuple[str, int], Mapping[str, PageNumbers]] = {}
        self._groups: dict[tuple[str, int], Sequence[Group]] = {}
        self._commons: dict[str, npt.NDArray[np.int32]] = {}

    def register(self, members: Sequence[Member]) -> None:
        """Number everything that these hold and do."""
        self._members = members
        self._load_captures()
        own = {(each.vm.name, each.vm.memory, each.domain): each for each in members if not each.vm.fork_of}.values()
        self.classes = numbered(kind for each in own for kind, _ in self.accesses_of(each.vm, each.domain))
        self.rates = self._access_table()
        self.files = self._reserve_files()
        self.contents = self._reserve_contents()

    @property
    def kinds(self) -> Iterator[Vm]:
        """The kind of each member."""
        yield from (each.vm for each in self._members)

    def places_of(self, vm: Vm) -> Mapping[str, PageNumbers]:
        """The pages of each part of the image of a kind of guest."""
        name = vm.name, vm.memory
        if name not in self._layouts:
            image = vm.content
            if isinstance(image, Captured):
                capture = self.captures[image.path]
                changes = [pages for _, pages, _ in capture.changes]
                touched = np.unique(np.concatenate([np.flatnonzero(capture.first != UNTOUCHED), *changes]))
                self._layouts[name] = {"": by_activity(changes, touched)} if image.reads else {}
            else:
                self._layouts[name] = dict(image.layout(vm.memory, self.seed, vm.name))
        return self._layouts[name]

    def accesses_of(self, vm: Vm, domain: Domain) -> Iterator[tuple[Kind, PageNumbers]]:
        """Which pages of such a guest are accessed at random, by class."""
        for kind, pages in self.groups_of(vm):
            yield kind.within(domain.number), pages

    def groups_of(self, vm: Vm) -> Sequence[Group]:
        """The same for guests of no domain."""
        name = vm.name, vm.memory
        if name not in self._groups:
            self._groups[name] = tuple(groups(vm.content, self.places_of(vm)))
        return self._groups[name]

    def class_of(self, kind: Kind) -> int:
        """The number of a class of accesses, or of that which is nearest to it in how often it writes and reads: where
        guests of a kind differ in size, a page that is partly hot has rates of its own, and a loop is longer or
        shorter. A page of a loop is read as often in any of them, at another moment.
        """
        if kind not in self.classes:
            nearest = min((each for each in self.classes if _alike(each, kind)), key=lambda each: _distance(each, kind))
            self.classes[kind] = self.classes[nearest]
        return self.classes[kind]

    def of_files(self, image: Captured, captured: npt.NDArray[np.signedinteger[Any]]) -> npt.NDArray[np.bool_]:
        """Which contents of a capture were read from files: those that another one of its data set has too."""
        if image.data_set_name not in self._commons:
            images = {each.vm.content.path for each in self._members if isinstance(each.vm.content, Captured)
                      and not each.vm.fork_of and each.vm.content.data_set_name == image.data_set_name}  # fmt: skip
            found = [self.captures[path].numbers for path in sorted(images)]
            contents, captures = np.unique(np.concatenate(found), return_counts=True)
            self._commons[image.data_set_name] = contents[captures > 1]
        return np.isin(captured, self._commons[image.data_set_name])

    def _load_captures(self) -> None:
        used: dict[tuple[Domain, str], set[Path]] = {}
        for each in self._members:
            image = each.vm.content
            if isinstance(image, Captured) and not each.vm.fork_of:
                self.captures[image.path] = image.capture()
                used.setdefault((each.domain, image.data_set_name), set()).add(image.path)
        for (domain, name), paths in used.items():
            numbers = [self.captures[path].numbers for path in paths]
            domain.add_data_set(name, numbers[0] if len(numbers) == 1 else np.unique(np.concatenate(numbers)))

    def _access_table(self) -> npt.NDArray[np.float64]:
        """What `Memory.rates` says of each class of accesses."""
        from sim.memory.pages import (
            ACCESS_COLUMNS,
            FROM_DISK,
            LOOP_FIRST,
            LOOP_PAGES,
            LOWEST,
            PERIOD,
            READS,
            SPAN,
            WRITES,
        )  # fmt: skip

        table = np.zeros((len(self.classes) + 1, ACCESS_COLUMNS))
        domains = {each.domain.number: each.domain for each in self._members}
        for kind, number in self.classes.items():
            table[number, [WRITES, READS]] = kind.writes / SECOND, kind.reads / SECOND
            table[number, [PERIOD, LOOP_FIRST, LOOP_PAGES]] = kind.period, kind.first, kind.pages
            if kind.leaves == "zero":
                table[number, SPAN] = 1
            elif kind.leaves != "unique":
                domain = domains[kind.domain]
                contents = domain.pool(kind.leaves, self._pool_sizes().get((domain, kind.leaves), 1))
                table[number, [LOWEST, SPAN]] = contents[0], len(contents)
                table[number, FROM_DISK] = kind.file
        return table

    def _pool_sizes(self) -> dict[tuple[Domain, str], int]:
        sizes: dict[tuple[Domain, str], int] = {}
        for each in self._members:
            image = each.vm.content
            if isinstance(image, Synthetic) and not each.vm.fork_of:
                for pool, pages in image.pool_pages(each.vm.memory):
                    for name in {pool, saved(pool, self._version(pool, each.start))}:
                        sizes[each.domain, name] = max(sizes.get((each.domain, name), 0), pages)
        return sizes

    def _reserve_contents(self) -> int:
        """Contents that the run can ever name: pools, captures, duplicates, and what forks give a number."""
        for (domain, pool), pages in self._pool_sizes().items():
            domain.pool(pool, pages)
        later = 0
        for each in self._members:
            image = each.vm.content
            if each.vm.fork_of:
                later += each.vm.pages
            elif isinstance(image, Synthetic):
                later += image.duplicate_contents(each.vm.memory)
        return self.space.count + later

    def _reserve_files(self) -> dict[tuple[str, int], int]:
        most: dict[tuple[str, int], int] = {}
        for each in self._members:
            for number, burst in enumerate(each.vm.bursts):
                if burst.leaves == "files":
                    pages = len(self.places_of(self._own(each.vm))[burst.part])
                    turns = 1 + (max(self._duration - burst.at, 0) // burst.every if burst.every else 0)
                    name = burst.part, number
                    most[name] = max(most.get(name, 0), turns * round(burst.share * pages))
        return {name: self.space.some(contents) for name, contents in most.items()}

    def _own(self, vm: Vm) -> Vm:
        """The kind of guest whose image a kind has: its own, or that of its parent."""
        return next(each.vm for each in self._members if each.vm.name == vm.fork_of) if vm.fork_of else vm
