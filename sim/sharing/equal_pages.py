"""Letting pages with equal content map one frame, as the compiled loop of mechanisms that look at pages in passes.

For each content the table has a holder: a page that was seen with it, or the frame that pages with it map. A holder
is a hint, checked whenever it is used: the page may have changed since, and the frame may be gone.
"""

from typing import NamedTuple

import numpy as np

from sim.memory.compiled import compiled, inlined
from sim.memory.pages import (
    ANON,
    BLOCK,
    BORN,
    CONTENT,
    DIRTY,
    DUE_COUNT,
    FRAME_HIGH,
    KIND,
    MAPS,
    MERGEABLE,
    PRESENT,
    SHARED,
    ZERO,
    Int32,
    Int64,
    Memory,
    content_now,
    is_large,
    leave_frame,
    map_frame,
    name_of,
    plan_write,
    share_own_frame,
    split_huge,
)

WORK = ("visit", "checksum", "insert", "compare_byte", "merge", "promote")
"""Kinds of work in the order of their counts; each has a price (see cost/prices.py)."""
W_VISIT, W_CHECKSUM, W_INSERT, W_COMPARE_BYTE, W_MERGE, W_PROMOTE = range(len(WORK))

ROOM = 4
"""Shared frames and due writes that one look at a page may need, each."""
PAUSED, NO_ROOM = range(2)

# Indexes into Equal.n.
SPLITS, VISITS, SHARES, SPENT_PS = range(4)
PRICE = 4
DONE = PRICE + len(WORK)
NUMBERS = DONE + len(WORK)

HOLDER, GROUP, HELD_SINCE = range(3)
ROW_COLUMNS = 3


class Equal(NamedTuple):
    """What is known of contents."""

    row: Int32  # (contents, ROW_COLUMNS): HOLDER page + 1 or -(frame + 1), 0 none; GROUP of pages among which it was
    #             found; HELD_SINCE of a frame its BORN: an entry that is used again may be anybody's
    n: Int64  # (NUMBERS,) SPLITS 1 if huge pages are split for a page that is shared; VISITS and SHARES so far;
    #           SPENT_PS of the work of this turn; PRICE in picoseconds of each kind of work, and how often it was DONE


def forget_holders(e: Equal, first: int, end: int) -> None:
    """Forget pages from *first* up to *end*: they are somebody else's from now on."""
    holder = e.row[:, HOLDER]
    holder[(holder > first) & (holder <= end)] = 0


def table(contents: int, work_ps: Int64) -> Equal:
    """A table in which nothing stands yet, for so many contents, with the price of each kind of work."""
    e = Equal(row=np.zeros((contents, ROW_COLUMNS), np.int32), n=np.zeros(NUMBERS, np.int64))
    e.n[PRICE:DONE] = work_ps
    return e


def longer_table(e: Equal, contents: int) -> Equal:
    """The same table with room for so many contents."""
    row = np.zeros((contents, ROW_COLUMNS), np.int32)
    row[: len(e.row)] = e.row
    return e._replace(row=row)


@inlined
def spend(e: Equal, kind: int, times: int) -> None:
    """Count work."""
    e.n[DONE + kind] += times
    e.n[SPENT_PS] += e.n[PRICE + kind] * times


@inlined
def is_offered(m: Memory, page: int) -> bool:
    """Whether the page is there and may be shared."""
    return bool(m.place[page] & (PRESENT | MERGEABLE | ZERO) == PRESENT | MERGEABLE)


@inlined
def holds(m: Memory, holder: int, since: int, content: int, page: int, now: int) -> bool:
    """Whether a holder, other than the page itself, still has the content; *since* tells a frame from a later one."""
    if holder < 0:
        frame = -holder - 1
        lives = m.frame[frame, KIND] == ANON and m.frame[frame, MAPS] > 0 and m.frame[frame, BORN] == since
        return bool(lives and m.frame[frame, CONTENT] == content)
    other = holder - 1
    return bool(holder > 0 and other != page and is_offered(m, other) and content_now(m, other, now) == content)


@inlined
def may_part(m: Memory, e: Equal, page: int) -> bool:
    """Whether the page is a small one, or its huge page may be split."""
    return bool(e.n[SPLITS] or not is_large(m, page // BLOCK))


@inlined
def part(m: Memory, page: int, now: int) -> bool:
    """Split the huge page that the page may be in. Returns whether the page is still there: zeros may not be."""
    if is_large(m, page // BLOCK):
        split_huge(m, page // BLOCK, now)
    return bool(m.place[page] & PRESENT)


@inlined
def frame_of(m: Memory, e: Equal, page: int, content: int, now: int) -> int:
    """The shared frame that the page maps, which its own frame becomes if it has one."""
    if not m.place[page] & SHARED:
        share_own_frame(m, page, content, ANON, now)
        plan_write(m, page, now)
        m.block[page // BLOCK, DIRTY] = 1
        spend(e, W_PROMOTE, 1)
    return int(m.held[page])


@compiled
def look_at_page(m: Memory, e: Equal, page: int, group: int, now: int) -> None:
    """Look at one page: let it share a frame with one that is equal and of its group, or remember it."""
    if not is_offered(m, page) or not may_part(m, e, page):
        return
    e.n[VISITS] += 1
    spend(e, W_VISIT, 1)
    spend(e, W_CHECKSUM, 1)
    content = content_now(m, page, now)
    if content < 0:
        return
    row = name_of(m, page, content)
    holder, since = (e.row[row, HOLDER] if e.row[row, GROUP] == group else 0), e.row[row, HELD_SINCE]
    if holder > 0 and m.place[holder - 1] & SHARED and is_offered(m, holder - 1):
        holder = -(m.held[holder - 1] + 1)
        since = m.frame[-holder - 1, BORN]
    if not holds(m, holder, since, content, page, now) or (holder > 0 and not may_part(m, e, holder - 1)):
        e.row[row, HOLDER] = page + 1
        e.row[row, GROUP] = group
        spend(e, W_INSERT, 1)
        return
    if m.place[page] & SHARED and -holder - 1 == m.held[page]:
        return
    spend(e, W_COMPARE_BYTE, 4096)
    if not part(m, page, now) or (holder > 0 and not part(m, holder - 1, now)):
        return
    frame = frame_of(m, e, holder - 1, content, now) if holder > 0 else -holder - 1
    e.row[row, HOLDER] = -(frame + 1)
    e.row[row, HELD_SINCE] = m.frame[frame, BORN]
    leave_frame(m, page)
    map_frame(m, page, frame)
    plan_write(m, page, now)
    m.block[page // BLOCK, DIRTY] = 1
    e.n[SHARES] += 1
    spend(e, W_MERGE, 1)


@compiled
def look_at_pages(
    m: Memory, e: Equal, pages: Int64, groups: Int32, start: int, most_ps: int, now: int
) -> tuple[int, int]:
    """Look at pages from number *start* of a list on, each with its group, until so much CPU time is spent.

    Returns PAUSED or NO_ROOM (to be called again), and the number to go on with.
    """
    at = start
    while at < pages.size and e.n[SPENT_PS] < most_ps:
        if m.counts[FRAME_HIGH] + ROOM > m.frame.shape[0] or m.counts[DUE_COUNT] + ROOM > m.due.shape[0]:
            return NO_ROOM, at
        look_at_page(m, e, pages[at], groups[at], now)
        at += 1
    return PAUSED, at
