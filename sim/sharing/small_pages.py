"""Pages kept small, as compiled loops: those that were not used since a clock came by last become the difference from a
similar page, or are compressed.

The clock classes a page by what happened since it came by (Gupta and others, OSDI 2008, section 4.2): modified,
used, not used, not used for a whole cycle. Modified pages are left alone; a used one may be shared, and others may be
built from it; an unused one may be kept as a difference; one that was not used for long may be compressed. A page that
is kept small is swapped out and POOLED for the rest of the engine: any access rebuilds it.

A difference needs the frame that it was taken from. Such a frame is pinned: it stays when all who map it write to it.
"""

import math
from typing import NamedTuple

import numpy as np

from sim.memory.compiled import compiled, inlined
from sim.memory.pages import (
    BLOCK,
    DUE,
    DUE_COUNT,
    FIRST,
    FRAME_HIGH,
    FRAMES,
    GUEST,
    HUGE,
    KEY,
    MAPS,
    MERGEABLE,
    NEVER,
    OWNER,
    PATCHED,
    PERIOD,
    PRESENT,
    READS,
    RING,
    SEEN,
    SHARED,
    SPAN,
    SWAPPED,
    UNLISTED,
    WRITES,
    ZERO,
    Int32,
    Int64,
    Memory,
    UInt8,
    UInt16,
    UInt64,
    activity_time,
    charge,
    content_now,
    content_of,
    drawn,
    drawn_with,
    forget_frame,
    frames_free,
    keep_in_memory,
    pool_add,
    pool_growth,
    put,
    shuffled,
    swap_out_page,
    uniform,
)
from sim.reclaim.pressure import note_write, passed_by_loop, use_draw
from sim.sharing.equal_pages import (
    NO_ROOM,
    PAUSED,
    SPENT_PS,
    W_CHECKSUM,
    W_VISIT,
    Equal,
    frame_of,
    look_at_page,
    spend,
)

MODIFIED, USED, UNUSED = range(3)
"""Class of a page: what happened since the clock came by; UNUSED + n is one not used in n scans before that either."""
AWAY = 255
"""Class of a page that was swapped out or kept small when the clock came by."""

ROOM = 4
"""Shared frames and due accesses that one step may need, each."""

# Indexes into Small.n: settings, ...
PASSES, PATCHES, COMPRESSES, LARGEST, PATCH_PS, COMPRESS_PS = range(6)
# ... what was done, ...
VISITED, PATCHED_SO_FAR, COMPRESSED_SO_FAR = range(6, 9)
# ... and what is there now: pages kept as differences, and pinned frames that nobody maps.
PATCHED_NOW, IDLE_FRAMES = range(9, 11)
NUMBERS = 11


class Small(NamedTuple):
    """State of the clock and of the pages that are kept small."""

    kind: UInt8  # (pages,) MODIFIED, USED, UNUSED and more, AWAY
    old: Int32  # (pages,) content when the clock came by
    turn: UInt16  # (pages,) scan of a cycle whose table has the hash of `old`
    draws: UInt64  # (BLOCK,) what was drawn for each page of the block that the clock is at
    came: Int64  # (blocks,) the guest's activity time (ns) then
    packed: UInt8  # (pages,) size of the compressed page, in units of 16 bytes
    patch: UInt8  # (pages,) size of the difference from a page of its family, likewise
    family: Int32  # (pages,) number of the pages that resemble each other, 0 none
    base: Int32  # (pages,) frame + 1 that a PATCHED page is built from
    first: Int32  # (families + 1,) page + 1 that others of a family may be built from, or -(frame + 1), 0 none
    pins: Int32  # (shared frames,) pages that are built from the frame
    n: Int64  # (NUMBERS,)


# --- the clock -------------------------------------------------------------------------------------------------------


@inlined
def was_rewritten(m: Memory, page: int, since: int, active: int) -> bool:
    """Whether random writes hit a page, since an activity time (ns), that leave no trace in its content."""
    kind = m.accesses[page]
    if m.rates[kind, WRITES] <= 0.0 or m.place[page] & (DUE | SHARED | ZERO):
        return False
    if m.rates[kind, SPAN] > 1 or (m.rates[kind, SPAN] == 0 and m.held[page] >= 0):
        return False
    draw = shuffled(shuffled(shuffled(shuffled(drawn(m, m.block[page // BLOCK, GUEST], page, active)))))
    return bool(uniform(draw) < -math.expm1(-m.rates[kind, WRITES] * (active - since)))


@inlined
def draw_uses(m: Memory, s: Small, block: int, active: int) -> None:
    """Draw for every page of a block what says whether it was used, in a loop plain enough for vector instructions."""
    guest = m.block[block, GUEST]
    key, first = np.uint64(m.guest[guest, KEY]), np.uint64(block * BLOCK - m.guest[guest, FIRST])
    for at in range(BLOCK):
        s.draws[at] = use_draw(drawn_with(key, first + np.uint64(at), active))


@inlined
def remember(s: Small, page: int, content: int) -> None:
    """Note what the page holds, and in which scan of a cycle the hash of that is in the table."""
    s.old[page] = content
    name = content if content >= 0 else page
    s.turn[page] = shuffled(np.uint64(name)) % np.uint64(s.n[PASSES])


@inlined
def has_room(m: Memory, places: int) -> bool:
    """Whether so many shared frames and due accesses more fit into the arrays."""
    return bool(m.counts[FRAME_HIGH] + places <= m.frame.shape[0] and m.counts[DUE_COUNT] + places <= m.due.shape[0])


@inlined
def pass_by(m: Memory, s: Small, page: int) -> None:
    """The clock finds that a page is not there."""
    if m.place[page] & SWAPPED:
        s.kind[page] = AWAY
    else:
        s.kind[page] = MODIFIED
        s.old[page] = NEVER


@compiled
def come_by_block(m: Memory, e: Equal, s: Small, first: int, end: int, scan: int, active: int, now: int) -> None:
    """Let the clock come by some pages of one block: class each, and share it if this scan's table has its hash."""
    since, turn, oldest = s.came[first // BLOCK], scan % s.n[PASSES], UNUSED + s.n[PASSES]
    known, chance, writes, loops, has_drawn = -1, 0.0, False, False, False
    visited, classed, summed = 0, 0, 0
    for page in range(first, end):
        if not m.place[page] & PRESENT:
            pass_by(m, s, page)
            continue
        visited += 1
        kind, before = m.accesses[page], s.kind[page]
        if kind != known:
            known = kind
            chance = -math.expm1(-m.rates[kind, READS] * (active - since)) if since < active else 0.0
            writes, loops = m.rates[kind, WRITES] > 0.0, m.rates[kind, PERIOD] > 0.0
            if chance > 0.0 and not has_drawn:
                draw_uses(m, s, page // BLOCK, active)
                has_drawn = True
        content = content_now(m, page, now) if writes else content_of(m, page)
        if content != s.old[page]:
            remember(s, page, content)
            s.kind[page] = MODIFIED
        elif writes and was_rewritten(m, page, since, active):
            s.kind[page] = MODIFIED
        else:
            used = (before == AWAY) | (chance > 0.0 and uniform(s.draws[page % BLOCK]) < chance)
            used = used or (loops and passed_by_loop(m, page, since, active))
            s.kind[page] = USED if used else min(max(before + 1, UNUSED), oldest)
            if s.turn[page] == turn:
                look_at_page(m, e, page, scan, now)
                continue
            summed += 1
        classed += 1
    s.n[VISITED] += visited
    spend(e, W_VISIT, classed)
    spend(e, W_CHECKSUM, summed)


@compiled
def come_by(
    m: Memory, e: Equal, s: Small, first: int, pages: int, scan: int, most_ps: int, now: int
) -> tuple[int, int]:
    """Let the clock come by pages from *first* on, block by block, until so much CPU time is spent; share them.

    Returns PAUSED or NO_ROOM (to be called again), and how many pages it has done.
    """
    done = 0
    while done < pages and e.n[SPENT_PS] < most_ps:
        if not has_room(m, ROOM * BLOCK):
            return NO_ROOM, done
        block = (first + done) // BLOCK
        active = activity_time(m, m.block[block, GUEST], now)
        end = min(done + BLOCK, pages)
        come_by_block(m, e, s, first + done, first + end, scan, active, now)
        s.came[block] = active
        done = end
    return PAUSED, done


# --- pinned frames ---------------------------------------------------------------------------------------------------


@inlined
def pin(m: Memory, s: Small, frame: int) -> None:
    """One more page is built from a frame."""
    if s.pins[frame] == 0:
        m.frame[frame, MAPS] += 1
        keep_in_memory(m, frame)
    s.pins[frame] += 1


@inlined
def unpin(m: Memory, s: Small, frame: int) -> None:
    """No page is built from a frame any more: it is free, or belongs to those who map it."""
    s.pins[frame] = 0
    m.frame[frame, MAPS] -= 1
    m.frame_lru[frame, SEEN] &= ~UNLISTED
    if m.frame[frame, MAPS] > 0:
        put(m, m.frame_lru[frame, OWNER], -(frame + 1), False)
        return
    m.counts[FRAMES] -= 1
    charge(m, m.frame_lru[frame, OWNER], -1)
    forget_frame(m, frame)


@inlined
def is_patched(m: Memory, page: int) -> bool:
    """Whether the page is kept as a difference."""
    return bool(m.place[page] & SWAPPED and m.seen[page] & PATCHED)


@compiled
def count_pins(m: Memory, s: Small) -> None:
    """Find the pages that are kept as differences, and let go of frames that none of them needs any more."""
    frames = m.counts[FRAME_HIGH]
    s.n[PATCHED_NOW] = s.n[IDLE_FRAMES] = 0
    for frame in range(frames):
        s.pins[frame] = -1 if s.pins[frame] else 0
    for page in range(m.place.size):
        if is_patched(m, page):
            s.n[PATCHED_NOW] += 1
            s.pins[s.base[page] - 1] = max(s.pins[s.base[page] - 1], 0) + 1
    for frame in range(frames):
        if s.pins[frame] < 0:
            unpin(m, s, frame)
        elif s.pins[frame] > 0 and m.frame_lru[frame, RING] == 0:
            s.n[IDLE_FRAMES] += 1


@compiled
def hand_over_pinned(m: Memory, s: Small, guest: int) -> None:
    """Charge pinned frames that nobody maps, of a guest that ends, to one whose pages are built from them."""
    for page in range(m.place.size):
        if not is_patched(m, page):
            continue
        frame, heir = s.base[page] - 1, m.block[page // BLOCK, GUEST]
        if m.frame_lru[frame, OWNER] == guest and m.frame_lru[frame, RING] == 0:
            charge(m, guest, -1)
            charge(m, heir, 1)
            m.frame_lru[frame, OWNER] = heir


# --- pages kept small ------------------------------------------------------------------------------------------------


@inlined
def may_be_base(m: Memory, s: Small, page: int, now: int) -> bool:
    """Whether others may be built from the page: it is there, and was not modified since before the clock came by."""
    there = m.place[page] & (PRESENT | MERGEABLE | ZERO) == PRESENT | MERGEABLE and not m.block[page // BLOCK, HUGE]
    return bool(there and s.kind[page] != MODIFIED and content_now(m, page, now) == s.old[page])


@inlined
def has_base(m: Memory, s: Small, page: int, now: int) -> bool:
    """Whether the page can be built from another one of its family; if not, others may be built from it."""
    first = s.first[s.family[page]]
    if first < 0:
        found = s.pins[-first - 1] > 0
    else:
        same = first > 0 and first - 1 != page and s.family[first - 1] == s.family[page]
        found = same and may_be_base(m, s, first - 1, now)
    if not found:
        s.first[s.family[page]] = page + 1
    return bool(found)


@inlined
def base_of(m: Memory, e: Equal, s: Small, family: int, now: int) -> int:
    """The frame that pages of a family are built from; it becomes a shared one."""
    first = s.first[family]
    frame = frame_of(m, e, first - 1, s.old[first - 1], now) if first > 0 else -first - 1
    s.first[family] = -(frame + 1)
    return int(frame)


@inlined
def put_away(m: Memory, s: Small, page: int, units: int, now: int) -> bool:
    """Keep a page in so many units of 16 bytes, if there is the memory for them. Returns whether that was done."""
    if pool_growth(m, units) > frames_free(m):
        return False
    m.packed[page] = units
    pool_add(m, units)
    swap_out_page(m, page, now, True)
    note_write(m, page, 0)
    s.kind[page] = AWAY
    return True


@inlined
def patch(m: Memory, e: Equal, s: Small, page: int, now: int) -> bool:
    """Keep a page as the difference from its family's base. Returns whether that was done."""
    frame = base_of(m, e, s, s.family[page], now)
    pin(m, s, frame)
    s.base[page] = frame + 1
    e.n[SPENT_PS] += s.n[PATCH_PS]
    if not put_away(m, s, page, int(s.patch[page]), now):
        return False
    m.seen[page] |= PATCHED
    s.n[PATCHED_SO_FAR] += 1
    return True


@compiled
def shrink(m: Memory, e: Equal, s: Small, page: int, now: int) -> None:
    """Keep a page small if it was not used, does not share a frame and is worth it."""
    if s.old[page] == 0 or not may_be_base(m, s, page, now):
        return
    similar = s.n[PATCHES] and s.family[page] and s.patch[page] <= s.n[LARGEST] and has_base(m, s, page, now)
    if s.kind[page] < UNUSED or m.place[page] & SHARED or (similar and patch(m, e, s, page, now)):
        return
    if s.n[COMPRESSES] and s.kind[page] >= UNUSED + s.n[PASSES] and s.packed[page] <= s.n[LARGEST]:
        e.n[SPENT_PS] += s.n[COMPRESS_PS]
        s.n[COMPRESSED_SO_FAR] += put_away(m, s, page, int(s.packed[page]), now)


@compiled
def shrink_pages(
    m: Memory, e: Equal, s: Small, first: int, pages: int, scan: int, most_ps: int, now: int
) -> tuple[int, int]:
    """Keep pages from *first* on small, of those that this scan had in its table, until so much CPU time is spent.

    Returns PAUSED or NO_ROOM (to be called again), and how many pages it has done.
    """
    turn = scan % s.n[PASSES]
    done = 0
    while done < pages and e.n[SPENT_PS] < most_ps:
        page = first + done
        if s.turn[page] == turn and m.place[page] & PRESENT and s.kind[page] != MODIFIED:
            if not has_room(m, ROOM):
                return NO_ROOM, done
            shrink(m, e, s, page, now)
        done += 1
    return PAUSED, done
