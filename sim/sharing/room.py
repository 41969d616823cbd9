"""A host's memory with the guests in it, and what the host asks of a mechanism that shares their pages.

`sim/memory/pages.py` has the steps, the file of each mechanism its behaviour.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final, TypeVar

import numpy as np
import numpy.typing as npt

from sim.memory import pages as memory
from sim.memory.guest import Vm
from sim.memory.huge import Daemon
from sim.memory.pages import BLOCK, Float64, Int32, Int64, Memory, UInt16

Number = TypeVar("Number", bound=np.generic)

ROOM: Final = 4
"""Shared frames and due accesses that one step may need."""

_FIRST_DUE: Final = 1024


class OutOfFrames(Exception):
    """A guest asked for a frame and there is none."""

    def __init__(self, guest: int, time: int = 0) -> None:
        """*time* is the host time (ns) of a write that was due; what a guest does now needs none."""
        super().__init__(guest, time)
        self.guest = guest
        self.time = time


def blocks_of(pages: int) -> int:
    """Blocks that a guest of so many pages takes."""
    return -(-pages // BLOCK)


class Room(ABC):
    """Memory of one host and its guests; a subclass shares their pages. Times are host times in ns."""

    WORK: ClassVar[tuple[str, ...]]
    """Kinds of work that it counts; each has a price (see cost/prices.py)."""
    ROW: ClassVar[int]
    """Numbers in a row of its log."""

    m: Memory
    notes: list[tuple[int, str, str]]
    """What happened of itself, for the table of events: time (ns), kind, particulars."""

    def __init__(self, *, frames: int, pages: int, guests: int, rates: Float64) -> None:
        """*frames* of the host; *pages* is room to begin with, *guests* the most."""
        blocks = blocks_of(pages)
        room = blocks * BLOCK
        self.m = Memory(
            place=np.zeros(room, np.uint8),
            held=np.zeros(room, np.int32),
            accesses=np.zeros(room, np.uint16),
            block=np.zeros((blocks, memory.BLOCK_COLUMNS), np.int64),
            frame=np.zeros((room + ROOM, memory.FRAME_COLUMNS), np.int32),
            guest=np.zeros((guests, memory.GUEST_COLUMNS), np.int64),
            level=np.ones(guests),
            rates=rates,
            due=np.zeros((_FIRST_DUE, memory.DUE_COLUMNS), np.int64),
            counts=np.zeros(memory.COUNTS, np.int64),
        )
        self.m.counts[memory.LIMIT] = frames
        self.m.counts[memory.FREE_FRAME] = -1
        self.notes = []
        self._free_blocks: list[tuple[int, int]] = [(0, blocks)] if blocks else []

    # --- what a mechanism does ------------------------------------------------------------------------------------

    @abstractmethod
    def begin(self) -> None:
        """The run begins."""

    @abstractmethod
    def advance(self, horizon: int) -> Iterator[Int64]:
        """Let everything that is due by *horizon* happen; yields rows of the table of scans. Raises OutOfFrames."""

    @abstractmethod
    def snapshot(self, now: int) -> Int64:
        """Every counter as it is now, a row of ROW numbers."""

    @abstractmethod
    def columns(self, log: Int64) -> dict[str, npt.NDArray[Any]]:
        """Rows as the columns of the tables that it knows (`sim.columns.SAMPLES`), and `cow_breaks`."""

    @abstractmethod
    def counters_of(self, guest: int) -> Mapping[str, int]:
        """What the guest's row in the table of guests says of sharing."""

    @abstractmethod
    def work_done(self) -> dict[str, int]:
        """How much was done of each kind of WORK."""

    @abstractmethod
    def advise(self, guest: int, first: int, pages: int, mergeable: bool, now: int) -> bool:
        """Offer a range for sharing, or take it back. Returns False if that is refused (nothing is lost)."""

    @abstractmethod
    def remove(self, guest: int) -> None:
        """The guest exits."""

    # --- settings that change in a run, for mechanisms that have such -----------------------------------------------

    def knob(self, name: str) -> int:
        """Read a setting."""
        raise KeyError(name)

    def set_knob(self, name: str, value: int | str, now: int) -> str:
        """Write a setting. Returns why it was refused (as errno), or nothing."""
        return f"EINVAL: no setting {name}"

    def finish_batch(self) -> Iterator[Int64]:
        """Let the scanner end what cannot be interrupted, before a setting is written; yields as `advance` does."""
        yield from ()

    # --- guests ---------------------------------------------------------------------------------------------------

    def add(
        self, guest: int, pages: int, *, vm: Vm, key: int, now: int, level: float, node: int, thp: bool
    ) -> None:  # fmt: skip
        """Give a guest that starts now its address space, all of it untouched; with *thp* it faults in huge pages."""
        first = self._place_blocks(blocks_of(pages))
        m = self.m
        m.guest[guest, memory.FIRST] = first * BLOCK
        m.guest[guest, memory.PAGES] = pages
        m.guest[guest, memory.KEY] = np.uint64(key).astype(np.int64)
        m.guest[guest, memory.SINCE] = now
        m.guest[guest, memory.THP] = thp
        m.level[guest] = level
        blocks = slice(first, first + blocks_of(pages))
        m.block[blocks, memory.GUEST] = guest
        m.block[blocks, memory.LOOKED] = 0
        m.block[blocks, memory.ADJACENT] = 0
        m.accesses[self.pages_of(guest)] = 0

    def pages_of(self, guest: int) -> slice:
        """Where the guest's pages are."""
        first, pages = self.m.guest[guest, [memory.FIRST, memory.PAGES]]
        return slice(int(first), int(first + pages))

    def reserve(self, pages: int) -> None:
        """Set so many frames aside, or hand them back."""
        self.m.counts[memory.RESERVED] += pages

    def wake_khugepaged(self, daemon: Daemon, now: int) -> tuple[int, int]:
        """Let khugepaged work once. Returns blocks looked at, and huge pages made."""
        return daemon.wake(self.m, now)

    def fill(self, guest: int, contents: Int32) -> None:
        """Touch the guest's pages for the first time. Raises OutOfFrames."""
        done = memory.fill_pages(self.m, int(self.m.guest[guest, memory.FIRST]), contents)
        if done < len(contents):
            raise OutOfFrames(guest)

    def write(self, guest: int, pages: Int64, contents: Int32) -> None:
        """Write contents to the guest's pages. Raises OutOfFrames."""
        done = memory.write_pages(self.m, int(self.m.guest[guest, memory.FIRST]), pages, contents)
        if done < len(pages):
            raise OutOfFrames(guest)

    def set_accesses(self, guest: int, accesses: UInt16) -> None:
        """Say which class of random accesses each page gets (before the guest is filled)."""
        self.m.accesses[self.pages_of(guest)] = accesses

    def change_activity(self, guest: int, now: int, level: float) -> None:
        """Scale the guest's random writes from now on."""
        memory.change_activity(self.m, guest, now, level)

    def fork(self, parent: int, child: int, next_content: int, now: int) -> int:
        """Let the child (added already) share what the parent has. Returns the next unused content."""
        raise NotImplementedError(f"{type(self).__name__} has no forked guests")

    def copies(self, guest: int) -> int:
        """Copies on write that the guest had to make."""
        return int(self.m.guest[guest, memory.COPIES])

    def usage(self) -> tuple[int, int]:
        """Free memory and the sum of resident set sizes, in bytes."""
        counts = self.m.counts
        taken = counts[[memory.PRIVATE, memory.FRAMES, memory.RESERVED]].sum()
        frames = int(counts[memory.LIMIT] - taken)
        resident = int(counts[memory.TOUCHED] - counts[memory.KSM_ZERO])
        return frames * memory.PAGE_BYTES - int(counts[memory.METADATA]), resident * memory.PAGE_BYTES

    def touched(self, guest: int) -> int:
        """Pages the guest holds."""
        return int(np.count_nonzero(self.m.place[self.pages_of(guest)] & memory.PRESENT))

    def read(self, guest: int) -> Int32:
        """Content of each of the guest's pages as a read returns it, NEVER where there is none."""
        span = self.pages_of(guest)
        place, held = self.m.place[span], self.m.held[span]
        shared = place & memory.SHARED != 0
        contents = held.copy()
        contents[shared] = self.m.frame[held[shared], memory.CONTENT]
        contents[place & memory.ZERO != 0] = 0
        contents[place & memory.PRESENT == 0] = memory.NEVER
        return contents

    # --- room -----------------------------------------------------------------------------------------------------

    def _place_blocks(self, wanted: int) -> int:
        for index, (first, length) in enumerate(self._free_blocks):
            if length >= wanted:
                self._free_blocks[index : index + 1] = [(first + wanted, length - wanted)] if length > wanted else []
                return first
        return self._more_blocks(wanted)

    def _more_blocks(self, wanted: int) -> int:
        first = len(self.m.block)
        room = (first + wanted) * BLOCK
        self.m = self.m._replace(
            place=longer(self.m.place, room),
            held=longer(self.m.held, room),
            accesses=longer(self.m.accesses, room),
            block=longer(self.m.block, first + wanted),
        )
        return first

    def _give_back(self, guest: int) -> None:
        span = self.pages_of(guest)
        self.m.place[span] = 0
        self._free_blocks.append((span.start // BLOCK, blocks_of(span.stop - span.start)))
        self._free_blocks.sort()
        merged: list[tuple[int, int]] = []
        for first, length in self._free_blocks:
            if merged and merged[-1][0] + merged[-1][1] == first:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((first, length))
        self._free_blocks = merged

    def _make_room(self, frames: int = ROOM, due: int = ROOM) -> None:
        """Lengthen each array that has no room for so many more entries."""
        counts = self.m.counts
        if counts[memory.FRAME_HIGH] + frames > len(self.m.frame):
            self.m = self.m._replace(frame=longer(self.m.frame, 2 * len(self.m.frame) + frames))
        if counts[memory.DUE_COUNT] + due > len(self.m.due):
            self.m = self.m._replace(due=longer(self.m.due, 2 * len(self.m.due) + due))


def longer(array: npt.NDArray[Number], length: int) -> npt.NDArray[Number]:
    """A copy of an array with zeros behind it."""
    copy = np.zeros((length, *array.shape[1:]), array.dtype)
    copy[: len(array)] = array
    return copy


def memory_columns(counts: Int64) -> dict[str, Int64]:
    """Rows of `Memory.counts` as the columns of the tables, and `cow_breaks`."""

    def count(index: int) -> Int64:
        return counts[:, index]

    return {
        "cow_ksm": count(memory.COW_KSM),
        "thp_split_page": count(memory.THP_SPLIT),
        "thp_fault_alloc": count(memory.THP_FAULT),
        "thp_fault_fallback": count(memory.THP_FALLBACK),
        "thp_collapse_alloc": count(memory.THP_COLLAPSE),
        "mem_huge_bytes": count(memory.HUGE_PAGES) * memory.PAGE_BYTES * BLOCK,
        "mem_touched_bytes": count(memory.TOUCHED) * memory.PAGE_BYTES,
        "mem_private_bytes": count(memory.PRIVATE) * memory.PAGE_BYTES,
        "mem_reserved_bytes": count(memory.RESERVED) * memory.PAGE_BYTES,
        "mem_shared_bytes": count(memory.FRAMES) * memory.PAGE_BYTES,
        "mem_metadata_bytes": -(-count(memory.METADATA) // memory.PAGE_BYTES) * memory.PAGE_BYTES,
        "cow_breaks": count(memory.COW_KSM) + count(memory.COW_FORK),
    }
