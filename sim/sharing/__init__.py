"""Ways for equal pages to become one frame: each is a file of its own and a name in `Sharing`."""

from __future__ import annotations

from pydantic import model_validator

from sim.errors import At
from sim.sharing.ksm import Ksm
from sim.sharing.mechanism import Mechanism
from sim.sharing.tps import Tps
from sim.units import Block


class Sharing(Block):
    """The mechanisms by name; a host has one of them, KSM unless it is given another."""

    ksm: Ksm | None = Ksm()
    """Kernel Samepage Merging; a host with another mechanism has none."""

    tps: Tps | None = None
    """VMware's transparent page sharing, on a host with ESX."""

    @property
    def sharing(self) -> tuple[str, Mechanism]:
        """Name and settings of the host's mechanism."""
        found = ((name, getattr(self, name)) for name in MECHANISMS)
        return next((name, settings) for name, settings in found if settings is not None)

    @model_validator(mode="after")
    def _one_mechanism(self) -> Sharing:
        given = [name for name in MECHANISMS if name in self.model_fields_set and getattr(self, name) is not None]
        if len(given) > 1:
            raise At(given[1], f"a host shares pages by {' or by '.join(given)}", "keep one of them")
        if not given and "ksm" in self.model_fields_set:
            raise At("ksm", "a host needs a way to share pages", "write {} for its defaults, or leave the key out")
        # Frozen, but not handed out yet: the default gives way to what was given.
        for name in MECHANISMS:
            if given and name not in given:
                self.__dict__[name] = None
        return self


MECHANISMS: tuple[str, ...] = tuple(Sharing.model_fields)
"""Names of all mechanisms, which are the keys that they have in a host."""
