"""What a host asks of the settings of whatever shares pages.

A host has at most one `Scanner`, which looks for equal pages (`room.py` has what is asked of its behaviour), and any
number of `Source`s, which share pages where they come from (`source.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from sim.errors import At
from sim.sharing.kernels import Kernel
from sim.units import Block

if TYPE_CHECKING:
    from sim.memory.guest import Vm
    from sim.reclaim.compression import Algorithm
    from sim.reclaim.swap import Swap
    from sim.sharing.room import Room
    from sim.sharing.source import AtSource


SharesBetween = Literal["all", "tenants", "guests"]


class Mechanism(Block):
    """A way for equal pages to become one frame, as a scenario describes it."""

    system: ClassVar[str] = "Linux"
    """What the host runs; guests of another system than Linux do without what only Linux has."""
    refused: ClassVar[tuple[str, ...]] = ()
    """Settings of a host that mean nothing beside this mechanism."""

    @property
    def wants_files(self) -> bool:
        """Whether it must know which pages hold what was read from files."""
        return False

    def completed(self, kernel: Kernel) -> Self:
        """The block with the defaults that depend on the kernel written out."""
        return self

    def faults(self, kernel: Kernel) -> Iterator[At]:
        """Settings that go wrong on this kernel."""
        yield from ()

    def swap_faults(self, swap: Swap) -> Iterator[At]:
        """What the host's swap has that this mechanism cannot use."""
        yield from ()

    def guest_faults(self, vm: Vm) -> Iterator[At]:
        """What the guest asks for that a host with this mechanism does not have."""
        if self.system == "Linux":
            return
        if vm.kernel == "shared":
            yield At("kernel", f"a guest of {self.system} has a kernel of its own", "remove it")
        if vm.madvise:
            yield At("madvise", f"{self.system} takes no advice from its guests", "remove it or choose Linux")
        if vm.fork_of:
            yield At("fork_of", f"{self.system} does not fork its guests", "give these guests an image of their own")
        if vm.memory_limit is not None:
            yield At("memory_limit", f"is a cgroup of Linux, which {self.system} does not have", "remove it")
        if vm.balloon:
            yield At("balloon", f"is filled by oVirt's MOM, which {self.system} does not have", "remove it")
        if vm.free_page_reporting:
            yield At("free_page_reporting", f"{self.system} takes no reports of free pages", "remove it")


class Scans(Mechanism):
    """A mechanism that looks for equal pages; a host has one at most. This one finds none."""

    refused: ClassVar[tuple[str, ...]] = ("ksmtuned", "mom")
    packs: ClassVar[bool] = False
    """Whether it takes pages from guests by itself and keeps them small."""
    wants_similar: ClassVar[bool] = False
    """Whether it must know which pages resemble each other."""

    @property
    def compressor(self) -> Algorithm | None:
        """How the sizes of compressed pages are told, if it keeps compressed pages of its own."""
        return None

    def behaviour(self) -> type[Room]:
        """The class that does it; imported when a run begins, for it brings the compiler."""
        from sim.sharing.room import Room

        return Room

    def domain_of(self, vm: Vm, guest: str, shares_between: SharesBetween) -> str:
        """Name of the guest's domain: its pages equal none of a guest of another."""
        return domain_name(shares_between, vm.tenant, guest)

    def visits(self, guests: Sequence[tuple[int, int]]) -> float:
        """Most pages that it can visit, for guests of so many pages that live so long (ns); not asked of KSM."""
        return 0.0


class Looked(NamedTuple):
    """A guest whose pages a pass may look at."""

    guest: int
    """Its number on the host."""
    name: str
    """Its kind's name."""
    pages: int
    files: npt.NDArray[np.bool_]
    """(pages,) whether each holds what was read from a file, if the mechanism wants to know."""


class InPasses(Scans):
    """A mechanism that looks for equal pages in passes, at known moments; each takes the time that its work costs."""

    splits: ClassVar[bool] = False
    """Whether huge pages are taken apart for a page that can be shared, or left alone."""

    @abstractmethod
    def following(self, began: int | None) -> int | None:
        """When (ns) the pass after the one that *began* then begins, or the first one; None for never."""

    def groups(self, guests: Sequence[Looked]) -> Iterable[npt.NDArray[np.int64]]:
        """For each guest the group of each of its pages, -1 to leave it alone: equal pages of a group share a frame.

        Groups are looked at in order. All pages are of one group unless a mechanism says otherwise.
        """
        return [np.zeros(each.pages, np.int64) for each in guests]

    def has_huge_pages(self, vm: Vm, asked: bool) -> bool:
        """Whether the guest touches memory in huge pages; *asked* is what the host's `thp` says."""
        return asked

    def behaviour(self) -> type[Room]:
        """See `Scans`."""
        from sim.sharing.passes import Passes

        return Passes

    def visits(self, guests: Sequence[tuple[int, int]]) -> float:
        """See `Scans`."""
        first = self.following(None)
        second = None if first is None else self.following(first)
        visits = 0.0
        for pages, life in guests:
            if first is not None and life >= first:
                visits += pages * (1 if second is None else 1 + (life - first) // (second - first))
        return visits


class Source(Mechanism):
    """A mechanism that lets pages share a frame where they come from."""

    beside: ClassVar[tuple[str, ...]] = ()
    """Names of the scanners that hosts are known to run beside it."""

    @abstractmethod
    def behaviour(self) -> type[AtSource]:
        """The class that does it; imported when a run begins, for it brings the compiler."""


def domain_name(shares_between: SharesBetween, tenant: str | None, guest: str) -> str:
    """Name of the domain of a tenant's guest; where tenants are kept apart a guest without one is alone."""
    if shares_between == "all":
        return "all"
    return f"tenant {tenant}" if shares_between == "tenants" and tenant else f"guest {guest}"
