"""What a host asks of the settings of whatever shares pages.

A host has at most one `Scanner`, which looks for equal pages (`room.py` has what is asked of its behaviour), and any
number of `Source`s, which share pages where they come from (`source.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

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

    refused: ClassVar[tuple[str, ...]] = ()
    """Settings of a host that mean nothing beside this mechanism."""
    wants_files: ClassVar[bool] = False
    """Whether it must know which pages hold what was read from files."""

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
        yield from ()


class Scans(Mechanism):
    """A mechanism that looks for equal pages; a host has one at most. This one finds none."""

    refused: ClassVar[tuple[str, ...]] = ("ksmtuned", "mom")

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


class Source(Mechanism):
    """A mechanism that lets pages share a frame where they come from."""

    beside: ClassVar[tuple[str, ...]] = ()
    """Names of the scanners that hosts are known to run beside it."""

    def behaviour(self) -> type[AtSource]:
        """The class that does it; imported when a run begins, for it brings the compiler."""
        raise NotImplementedError


def domain_name(shares_between: SharesBetween, tenant: str | None, guest: str) -> str:
    """Name of the domain of a tenant's guest; where tenants are kept apart a guest without one is alone."""
    if shares_between == "all":
        return "all"
    return f"tenant {tenant}" if shares_between == "tenants" and tenant else f"guest {guest}"
