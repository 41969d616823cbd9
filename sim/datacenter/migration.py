"""Live migration by pre-copy: memory is sent while the guest runs, what it writes meanwhile is sent again.

Source: Clark and others, Live Migration of Virtual Machines, NSDI 2005, sections 3 and 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import Field

from sim.columns import PAGE_BYTES
from sim.units import MIB, MILLISECOND, SECOND, Block, Bytes, Duration


class Migration(Block):
    """How guests move from one host to another while they run."""

    bytes_per_s: Bytes = Field(default=1192 * MIB, gt=0)
    """What one move may send per second: 10 Gbit/s unless given."""
    downtime_limit: Duration = Field(default=300 * MILLISECOND, gt=0)
    """The guest is stopped as soon as what is left can be sent in this time (QEMU's default of downtime-limit)."""
    max_rounds: int = Field(default=30, ge=1, le=10_000)
    """The guest is stopped after so many rounds at the latest (Xen's limit; NSDI 2005)."""


@dataclass(frozen=True)
class Course:
    """How a move went: all pages that were sent, those sent again included."""

    rounds: int
    sent_pages: int
    downtime_ns: int
    duration_ns: int


def precopy(
    pages: int, written: Callable[[int, int], int], bytes_per_s: int, limit_ns: int, most_rounds: int
) -> Course:
    """The course of a move of a guest that holds so many pages.

    *written* tells how many different pages the guest writes between two times (ns) after the move began.
    """

    def time_of(number: int) -> int:
        return number * PAGE_BYTES * SECOND // bytes_per_s

    now, sent, left, rounds = 0, 0, pages, 0
    while rounds < most_rounds and (rounds == 0 or time_of(left) > limit_ns):
        end = now + time_of(left)
        sent, left, now, rounds = sent + left, min(written(now, end), pages), end, rounds + 1
    return Course(rounds=rounds + 1, sent_pages=sent + left, downtime_ns=time_of(left), duration_ns=now + time_of(left))
