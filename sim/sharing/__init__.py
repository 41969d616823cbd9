"""Ways for equal pages to become one frame: each is a file of its own and a name in `Sharing`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, get_args, get_type_hints

from pydantic import model_validator

from sim.errors import At
from sim.sharing.difference_engine import DifferenceEngine
from sim.sharing.ksm import Ksm
from sim.sharing.mechanism import Mechanism, Scans, Source
from sim.sharing.mergemem import Mergemem
from sim.sharing.page_combining import PageCombining
from sim.sharing.pfcache import Pfcache
from sim.sharing.satori import Satori
from sim.sharing.saved_segments import SavedSegments
from sim.sharing.tps import Tps
from sim.sharing.xen import Xen
from sim.units import Block


class Sharing(Block):
    """The mechanisms by name. A host has KSM unless it is given another one; with `ksm: null` it has none."""

    ksm: Ksm | None = Ksm()
    """Kernel Samepage Merging; a host with another mechanism has none."""

    tps: Tps | None = None
    """VMware's transparent page sharing, on a host with ESX."""

    xen: Xen | None = None
    """Page sharing under Xen, by an engine that goes through all memory in rounds."""

    satori: Satori | None = None
    """Satori for Xen: what guests read from a virtual disk is shared at the read."""

    difference_engine: DifferenceEngine | None = None
    """Difference Engine for Xen: equal pages shared, similar ones kept as differences, unused ones compressed."""

    page_combining: PageCombining | None = None
    """Windows' page combining, within one system."""

    mergemem: Mergemem | None = None
    """mergemem for Linux 2.0: a program that its user runs, which merges memory of programs of one name."""

    pfcache: Pfcache | None = None
    """Virtuozzo's file cache: containers share equal files of disks of their own."""

    saved_segments: SavedSegments | None = None
    """Named saved systems and segments of VM/370 and z/VM."""

    @property
    def mechanisms(self) -> Mapping[str, Mechanism]:
        """All that share pages here, by name."""
        found = {name: getattr(self, name) for name in MECHANISMS}
        return {name: settings for name, settings in found.items() if settings is not None}

    @property
    def scanner(self) -> Scans:
        """What looks for equal pages here."""
        return next((each for each in self.mechanisms.values() if isinstance(each, Scans)), Scans())

    @property
    def sources(self) -> Mapping[str, Source]:
        """What shares pages where they come from."""
        return {name: each for name, each in self.mechanisms.items() if isinstance(each, Source)}

    @model_validator(mode="after")
    def _fit_together(self) -> Sharing:
        given = [name for name in MECHANISMS if name in self.model_fields_set and getattr(self, name) is not None]
        scanners = [name for name in given if isinstance(getattr(self, name), Scans)]
        if len(scanners) > 1:
            raise At(scanners[1], f"a host looks for equal pages by {' or by '.join(scanners)}", "keep one of them")
        for name in given:
            settings = getattr(self, name)
            if isinstance(settings, Source) and scanners and scanners[0] not in settings.beside:
                raise At(name, f"no system has it beside {scanners[0]}", "keep one of them")
        # Frozen, but not handed out yet: the default gives way to what was given.
        if given and "ksm" not in given:
            self.__dict__["ksm"] = None
        return self


def _named(kind: type[Mechanism]) -> tuple[str, ...]:
    hints = get_type_hints(Sharing)
    return tuple(name for name in Sharing.model_fields if issubclass(get_args(hints[name])[0], kind))


MECHANISMS: Final = _named(Mechanism)
"""Names of all mechanisms, which are the keys that they have in a host."""
SCANNERS: Final = _named(Scans)
"""Names of those that look for equal pages."""
SOURCES: Final = _named(Source)
"""Names of those that share pages where they come from."""
