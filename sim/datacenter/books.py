"""What the control plane knows of each guest."""

from __future__ import annotations

from dataclasses import dataclass

from sim.datacenter.messages import Newcomer
from sim.datacenter.placement import NOWHERE, Need


@dataclass(slots=True)
class Placed:
    """A guest that has a host."""

    guest: Newcomer
    need: Need
    host: int
    here: int
    """When it came to that host (ns)."""
    end: int
    """When it is expected to end."""
    row: int
    """Its row in the books of CPU demand."""
    target: int = NOWHERE
    """Host that it moves to, where its room is kept."""
    sent: bool = False
    """Whether that move is under way."""
    gone: bool = False
    """Whether its end has come, by the books; no host has said so yet."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A guest that found no room."""

    guest: Newcomer
    need: Need
    since: int
    until: int
    """When its patience ends."""
    again: bool
    """Whether it ran before on a host that failed."""
