"""Which pages a guest accesses, how often, and in what kind of frame each lies: compiled loops."""

from __future__ import annotations

from sim.memory.compiled import compiled
from sim.memory.pages import (
    BLOCK,
    GUEST,
    HUGE,
    PERIOD,
    PRESENT,
    READS,
    SHARED,
    WRITES,
    ZERO,
    Float64,
    Int64,
    Memory,
)

IN_SMALL, IN_HUGE, IN_LAST = range(3)
"""Columns of a tally: pages in small frames, in huge ones, and in a last block that is too short for a huge one."""
TALLIED = 3


@compiled
def tally(m: Memory, first: int, pages: int, rates: Float64, counts: Int64, areas: Float64, huge: Int64) -> None:
    """Count accessed pages by class (rows) and by where they lie, and add up the rates in each whole block.

    *counts* and *areas* are zeros at first; *huge* is set to 1 for each block that is one huge page, else to 0.
    """
    for area in range(areas.size):
        huge[area] = m.block[first // BLOCK + area, HUGE]
    for page in range(first, first + pages):
        kind = m.accesses[page]
        if kind and m.place[page] & PRESENT:
            area = (page - first) // BLOCK
            if area >= areas.size:
                counts[kind, IN_LAST] += 1
            else:
                counts[kind, IN_HUGE if huge[area] else IN_SMALL] += 1
                areas[area] += rates[kind]


@compiled
def accesses(m: Memory, block: int) -> float:
    """Accesses per ns, by guests as active as now, to the pages of a block."""
    rate = 0.0
    for page in range(block * BLOCK, block * BLOCK + BLOCK):
        kind = m.accesses[page]
        if kind and m.place[page] & PRESENT:
            rate += m.rates[kind, WRITES] + m.rates[kind, READS]
            if m.rates[kind, PERIOD] > 0.0:
                rate += 1.0 / m.rates[kind, PERIOD]
    return float(rate * m.level[m.block[block, GUEST]])


@compiled
def add_frames(m: Memory, first: int, pages: int, rates: Float64, alone: Int64, frames: Float64) -> None:
    """Add the rates of pages in shared frames to those of the frames; count by class those in frames of their own.

    The last of *frames* is the kernel's zero page.
    """
    for page in range(first, first + pages):
        kind = m.accesses[page]
        place = m.place[page]
        if kind and place & PRESENT:
            if place & ZERO:
                frames[frames.size - 1] += rates[kind]
            elif place & SHARED:
                frames[m.held[page]] += rates[kind]
            else:
                alone[kind] += 1
