"""What a host draws from the mains by how busy its processors are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from sim.document import by_key
from sim.errors import At
from sim.units import Block

STEPS: Final = 11
"""Figures of a power curve: at loads of 0 %, 10 %, ... 100 %, as SPECpower_ssj2008 reports them."""

Watts = Annotated[float, Field(ge=0, le=1e6)]
Model = Literal["hp-proliant-ml110-g4", "hp-proliant-ml110-g5"]

_MODELS: Final[Mapping[Model, tuple[float, ...]]] = {
    "hp-proliant-ml110-g4": (86, 89.4, 92.6, 96, 99.5, 102, 106, 108, 112, 114, 117),
    "hp-proliant-ml110-g5": (93.7, 97, 101, 105, 110, 116, 121, 125, 129, 133, 135),
}
"""SPECpower_ssj2008 results of these servers, as CloudSim's power models of the same names have them."""


class Linear(Block):
    """Power that rises in a straight line with load."""

    idle: Watts
    """Watts of a host that does nothing."""
    full: Watts
    """Watts with all cores busy."""

    @property
    def curve(self) -> tuple[float, ...]:
        """Watts at each step of load."""
        return tuple(self.idle + (self.full - self.idle) * step / (STEPS - 1) for step in range(STEPS))

    @model_validator(mode="after")
    def _rises(self) -> Linear:
        if self.full < self.idle:
            raise At("full", "is less than idle", f"write {self.idle:g} or more")
        return self


class Table(Block):
    """Power measured at each tenth of load."""

    watts: tuple[Watts, ...] = Field(min_length=STEPS, max_length=STEPS)
    """Watts at 0 %, 10 %, ... 100 % load; in a straight line between them."""

    @property
    def curve(self) -> tuple[float, ...]:
        """Watts at each step of load."""
        return self.watts


class Server(Block):
    """Power of a server whose measurement was published."""

    server: Model
    """Which server: HP ProLiant ML110 G4 or G5 (SPECpower_ssj2008)."""

    @property
    def curve(self) -> tuple[float, ...]:
        """Watts at each step of load."""
        return _MODELS[self.server]


Power = Annotated[Linear | Table | Server, by_key(idle=Linear, watts=Table, server=Server)]
"""What a host draws: a straight line, a table, or a server by name."""
