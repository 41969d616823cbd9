"""Named saved systems and discontiguous saved segments of VM/370 and z/VM: shared because an administrator said so.

Sources: z/VM CP Commands, DEFSYS (page descriptor codes: S shared by all, E each its own; R read-only, W written) and
SAVESYS; z/VM System Operation, classes of system data files (P, pending purge: it goes when the last virtual machine
releases it); IBM, Linux NSS. Nothing is scanned, and what is not there yet is shared as it comes. A write to a page
that is shared read-only is a protection exception; VM/370 found it afterwards, threw the page away and stopped the
machine (System Programmer's Guide, release 6). Assumed: of a segment that is saved anew every page is another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from sim.errors import At
from sim.memory.image import Synthetic
from sim.sharing.mechanism import Source
from sim.units import Block, Duration, Name

if TYPE_CHECKING:
    from sim.memory.guest import Vm
    from sim.sharing.declared import Declared


class Segment(Block):
    """A named saved system, or a discontiguous saved segment."""

    type: Literal["SR", "EW"] = "SR"
    """SR: all guests share it, and none may write to it. EW: each guest gets a copy of its own."""
    saved: tuple[Duration, ...] = ()
    """When it is saved anew: guests that start from then on have the new one, the others keep theirs."""

    @model_validator(mode="after")
    def _saved_in_order(self) -> Segment:
        if list(self.saved) != sorted(set(self.saved)):
            raise At("saved", "must be in the order of time", "sort it")
        return self

    def version(self, start: int) -> int:
        """Which version a guest has that starts then: 0 is the one saved before the run."""
        return sum(saved <= start for saved in self.saved)


class SavedSegments(Source):
    """What the administrator has defined and saved."""

    system: ClassVar[str] = "z/VM"
    refused: ClassVar[tuple[str, ...]] = ("kernel", "hz", "thp", "hugetlbfs", "zswap", "commit", "ksmtuned", "mom")

    segments: Mapping[Name, Segment] = Field(min_length=1)
    """Each by its name; a part of a guest's image whose pool has that name is that segment."""

    def behaviour(self) -> type[Declared]:
        """Sharing from the moment at which a guest starts."""
        from sim.sharing.declared import Declared

        return Declared

    def shared(self, pool: str | None) -> bool:
        """Whether all guests share this pool."""
        return pool is not None and pool in self.segments and self.segments[pool].type == "SR"

    def guest_faults(self, vm: Vm) -> Iterator[At]:
        """See `Mechanism`; and writes to what is shared read-only."""
        yield from super().guest_faults(vm)
        image = vm.content
        if not isinstance(image, Synthetic):
            return
        names = {part.name for part in image.parts if self.shared(part.pool)}
        said, remedy = "is shared read-only: a write is a protection exception", "make the segment EW"
        for i, part in enumerate(image.parts):
            if part.writes and part.name in names:
                yield At(f"image.parts.{i}.writes", f"{part.pool} {said}", f"remove the writes, or {remedy}")
        for i, burst in enumerate(vm.bursts):
            if burst.part in names and burst.leaves != "free":
                yield At(f"bursts.{i}.part", f"it {said}", f"write to another part, or {remedy}")
