"""Transparent page sharing and ESX's ways to reclaim memory as compiled loops over pages.

The table of hashes has an entry for each shared frame, and one for a page that was looked at and found unique: a hint,
which lets the page be written without a fault. A hash is taken to tell contents apart (64 bits), so that the key of an
entry is the content itself (salted, by what numbers contents) with the NUMA node.

Source: Waldspurger, OSDI 2002, sections 4.2, 4.3 and 5.3; see `tps.py`.
"""

import math
from typing import NamedTuple

import numpy as np

from sim.cost.accessed import accesses
from sim.memory.compiled import compiled, inlined
from sim.memory.pages import (
    ACTIVE_TIME,
    BLOCK,
    COPIES,
    DUE_COUNT,
    FIRST,
    FRAME_HIGH,
    FRESH,
    GUEST,
    HUGE,
    KIND,
    MAPS,
    MERGEABLE,
    NO_FRAME,
    OK,
    OUT,
    PAGE,
    PAGES,
    PERIOD,
    PGMAJFAULT,
    PRESENT,
    PSWPIN,
    PSWPOUT,
    READS,
    SHARED,
    SLOTS_USED,
    SWAP_PS,
    SWAPPED_PAGES,
    SWPIN_WAIT_NS,
    THP_SPLIT,
    TIME,
    TOUCHED,
    WRITES,
    ZERO,
    Int32,
    Int64,
    Memory,
    UInt8,
    content_now,
    content_of,
    drawn,
    due_in_time,
    forget_due,
    forget_frame,
    frames_free,
    fresh_content,
    leave_frame,
    look,
    map_frame,
    name_of,
    new_frame,
    own_frame,
    part_huge,
    plan_read,
    plan_write,
    shuffled,
    uniform,
    write_page,
    written_content,
)
from sim.memory.pages import SWAPPED as AWAY
from sim.reclaim.pressure import IN_NS, PAGE_NS, PIPE, PRESSURE_NS, READ_NS, WAIT, Pressure, note_wait, stall, submit

TPS = 5
"""Kind of shared frame: one that page sharing made, copied on every write."""
ENTRY_BYTES = 16
"""Size of an entry of the table of hashes (OSDI 2002, section 4.3)."""
ZIPPED_BYTES = 2048
"""Memory that a compressed page takes; one that would take more is swapped (vSphere 4.1 resource management guide)."""
ROOM = 4
"""Shared frames, due accesses and entries that one step may need."""

WORK = ("visit", "checksum", "insert", "compare_byte", "merge", "promote")
"""What the scan does, counted: each has a price (see cost/prices.py)."""
W_VISIT, W_CHECKSUM, W_INSERT, W_COMPARE_BYTE, W_MERGE, W_PROMOTE = range(len(WORK))

UNZIP_NS = 10_400
"""Time to bring a compressed page back (Gupta and others, OSDI 2008, table 2)."""

SWAPPED, ZIPPED, BALLOONED = 1, 2, 3
"""Where a page that is not present is, if it was taken: in the VM's swap file, compressed in memory, or with the
guest's own kernel, which gave its frame to the balloon."""

# Indexes into Tps.n: counters, ...
PICKED, HINTS, SHARES, GUEST_OUTS, GUEST_INS, ZERO_SHARED, SWAPPED_NOW, ZIPPED_NOW, BALLOONED_NOW, STATE = range(10)
COUNTERS = 10
# ... where the loops are and what they keep to, ...
SERIAL, KEY, ENTRY_HIGH, ENTRY_FREE, BREAKS, FLOOR, MOST_SWAPPED, COLD_BELOW = range(10, 18)
# ... and for each kind of work how much was done.
DONE = 18
NUMBERS = DONE + len(WORK)

# Columns of Tps.entry and .guest.
NAME, VALUE, FOLLOWING = range(3)
ENTRY_COLUMNS = 3
RATE, CREDIT, NODE, RUNS, BALLOON, GIVEN, SWAPPED_OUT, ZIPPED_OUT, ZIP_MOST, HAND, SEEN, EQUAL = range(12)
GUEST_COLUMNS = 12

PAUSED, STARVING, NO_ROOM = range(3)
"""Why a loop returned: it is done, there are too few free frames, arrays must grow."""

_UNIQUE = -1
_CREDIT = 1_000_000


class Tps(NamedTuple):
    """State of page sharing on one host."""

    out: UInt8  # (pages,) SWAPPED, ZIPPED or BALLOONED where a page was taken; its content stays in `Memory.held`
    small: UInt8  # (pages,) 1 for a page that compresses to ZIPPED_BYTES or less
    hint: Int32  # (pages,) entry + 1 of the page's hint, _UNIQUE for one that no other page can match, 0 none
    bucket: Int32  # (buckets, a power of 2) entry + 1 of the first entry of a hash
    entry: Int64  # (entries, ENTRY_COLUMNS) NAME node and content, VALUE page + 1 of a hint or -(frame + 1),
    #               FOLLOWING entry + 1 of the same bucket (of an unused entry the next one)
    guest: Int64  # (guests, GUEST_COLUMNS) RATE of picks in millionths a second, CREDIT of picks in millionths, NODE
    #               of NUMA, RUNS 1 while it lives, BALLOON pages the balloon holds, GIVEN pages its kernel gave away,
    #               SWAPPED_OUT, ZIPPED_OUT pages, ZIP_MOST pages that may be compressed, HAND where its kernel goes on
    #               looking for pages to give, pages SEEN by the scan and those of them for which it knew an EQUAL one
    n: Int64  # (NUMBERS,)


@inlined
def spend(t: Tps, kind: int, times: int) -> None:
    """Count work."""
    t.n[DONE + kind] += times


# --- the table of hashes ---------------------------------------------------------------------------------------------


@inlined
def key_of(m: Memory, t: Tps, page: int, content: int) -> int:
    """Key of a content for the VMs that the page may share with."""
    return int((t.guest[m.block[page // BLOCK, GUEST], NODE] << 32) | name_of(m, page, content))


@inlined
def bucket_of(t: Tps, name: int) -> int:
    """The bucket of a key."""
    return int(shuffled(np.uint64(name)) & np.uint64(t.bucket.size - 1))


@inlined
def find(t: Tps, name: int) -> int:
    """Entry + 1 of a key, or 0."""
    entry = t.bucket[bucket_of(t, name)]
    while entry > 0 and t.entry[entry - 1, NAME] != name:
        entry = t.entry[entry - 1, FOLLOWING]
    return int(entry)


@inlined
def new_entry(t: Tps, name: int, value: int) -> int:
    """Enter a key that is not there; the caller made sure that there is room. Returns entry + 1."""
    entry = t.n[ENTRY_FREE]
    if entry > 0:
        t.n[ENTRY_FREE] = t.entry[entry - 1, FOLLOWING]
    else:
        t.n[ENTRY_HIGH] += 1
        entry = t.n[ENTRY_HIGH]
    bucket = bucket_of(t, name)
    t.entry[entry - 1, NAME] = name
    t.entry[entry - 1, VALUE] = value
    t.entry[entry - 1, FOLLOWING] = t.bucket[bucket]
    t.bucket[bucket] = entry
    return int(entry)


@inlined
def remove_entry(t: Tps, entry: int) -> None:
    """Take an entry (given + 1) out of the table."""
    bucket = bucket_of(t, t.entry[entry - 1, NAME])
    at = t.bucket[bucket]
    if at == entry:
        t.bucket[bucket] = t.entry[entry - 1, FOLLOWING]
    else:
        while t.entry[at - 1, FOLLOWING] != entry:
            at = t.entry[at - 1, FOLLOWING]
        t.entry[at - 1, FOLLOWING] = t.entry[entry - 1, FOLLOWING]
    t.entry[entry - 1, VALUE] = 0
    t.entry[entry - 1, FOLLOWING] = t.n[ENTRY_FREE]
    t.n[ENTRY_FREE] = entry


@inlined
def drop_hint(t: Tps, page: int) -> None:
    """Forget the page's hint, if it has one."""
    hint = t.hint[page]
    if hint == 0:
        return
    t.hint[page] = 0
    t.n[HINTS] -= 1
    if hint > 0:
        remove_entry(t, hint)


@inlined
def give_hint(m: Memory, t: Tps, page: int, name: int) -> None:
    """Enter a hint for a page whose content nobody has entered."""
    drop_hint(t, page)
    t.hint[page] = new_entry(t, name, page + 1)
    t.n[HINTS] += 1
    spend(t, W_INSERT, 1)


@compiled
def refill(before_it: Tps, t: Tps) -> None:
    """Enter every entry of a table anew, in one with other buckets and the same entries."""
    for entry in range(1, before_it.n[ENTRY_HIGH] + 1):
        if t.entry[entry - 1, VALUE] != 0:
            bucket = bucket_of(t, t.entry[entry - 1, NAME])
            t.entry[entry - 1, FOLLOWING] = t.bucket[bucket]
            t.bucket[bucket] = entry


@compiled
def sweep(m: Memory, t: Tps) -> None:
    """Take entries of frames that nobody maps any more out of the table."""
    for entry in range(1, t.n[ENTRY_HIGH] + 1):
        value = t.entry[entry - 1, VALUE]
        if value < 0 and m.frame[-value - 1, MAPS] == 0:
            remove_entry(t, entry)
            forget_frame(m, -value - 1)


# --- sharing ---------------------------------------------------------------------------------------------------------


@inlined
def is_shared(m: Memory, page: int) -> bool:
    """Whether page sharing gave the page its frame."""
    return bool(m.place[page] & SHARED and m.frame[m.held[page], KIND] == TPS)


@inlined
def share_frame(m: Memory, t: Tps, page: int, frame: int, now: int) -> None:
    """Let the page map a frame with its content instead of its own."""
    drop_hint(t, page)
    leave_frame(m, page)
    map_frame(m, page, frame)
    plan_write(m, page, now)
    t.n[SHARES] += 1
    spend(t, W_MERGE, 1)


@inlined
def in_large_page(m: Memory, page: int) -> bool:
    """Whether the page is part of a large page."""
    return bool(m.block[page // BLOCK, HUGE])


@compiled
def visit(m: Memory, t: Tps, page: int, now: int) -> None:
    """Look at one page: share it, or leave a hint. Pages of large pages are entered but not shared."""
    if m.place[page] & (PRESENT | MERGEABLE) != PRESENT | MERGEABLE or is_shared(m, page):
        return
    spend(t, W_VISIT, 1)
    spend(t, W_CHECKSUM, 1)
    guest = m.block[page // BLOCK, GUEST]
    content = content_now(m, page, now)
    if content < 0:
        t.guest[guest, SEEN] += 1
        if t.hint[page] != _UNIQUE:
            drop_hint(t, page)
            t.hint[page] = _UNIQUE
            t.n[HINTS] += 1
            spend(t, W_INSERT, 1)
        return
    name = key_of(m, t, page, content)
    entry = find(t, name)
    value = t.entry[entry - 1, VALUE] if entry > 0 else 0
    if value != page + 1:  # the page's own hint says nothing about others
        t.guest[guest, SEEN] += 1
        t.guest[guest, EQUAL] += value != 0
    if value < 0:
        frame = -value - 1
        if m.frame[frame, MAPS] == 0:
            remove_entry(t, entry)
            forget_frame(m, frame)
            give_hint(m, t, page, name)
        elif not in_large_page(m, page):
            spend(t, W_COMPARE_BYTE, 4096)
            share_frame(m, t, page, frame, now)
        return
    other = value - 1
    if other == page:
        return
    if value > 0:
        spend(t, W_CHECKSUM, 1)
        there = m.place[other] & PRESENT != 0
        if not there or content_now(m, other, now) != content:
            drop_hint(t, other)
            value = 0
    if value == 0:
        give_hint(m, t, page, name)
    elif not in_large_page(m, page) and not in_large_page(m, other):
        spend(t, W_COMPARE_BYTE, 4096)
        frame = new_frame(m, content, TPS)
        t.hint[other] = 0
        t.n[HINTS] -= 1
        t.entry[entry - 1, VALUE] = -(frame + 1)
        share_frame(m, t, other, frame, now)
        share_frame(m, t, page, frame, now)
        spend(t, W_PROMOTE, 1)


@inlined
def has_room(m: Memory, t: Tps) -> bool:
    """Whether the arrays have room for one more step."""
    return bool(
        m.counts[FRAME_HIGH] + ROOM <= m.frame.shape[0]
        and m.counts[DUE_COUNT] + ROOM <= m.due.shape[0]
        and bool(t.n[ENTRY_FREE] > 0 or t.n[ENTRY_HIGH] + ROOM <= t.entry.shape[0])
    )


@inlined
def random_page(m: Memory, t: Tps, guest: int) -> int:
    """A page of the guest, each as likely as any other."""
    t.n[SERIAL] += 1
    draw = shuffled(np.uint64(t.n[KEY]) ^ np.uint64(t.n[SERIAL]))
    return int(m.guest[guest, FIRST] + np.int64(uniform(draw) * m.guest[guest, PAGES]))


@inlined
def break_large(m: Memory, page: int) -> None:
    """Let the large page that the page is in be small pages."""
    if in_large_page(m, page):
        part_huge(m, page // BLOCK)
        m.counts[THP_SPLIT] += 1


@inlined
def is_cold(m: Memory, t: Tps, page: int) -> bool:
    """Whether the page is in a large page with fewer accesses than COLD_BELOW (10^-9 a second)."""
    return bool(t.n[COLD_BELOW] > 0 and in_large_page(m, page) and accesses(m, page // BLOCK) * 1e18 < t.n[COLD_BELOW])


@compiled
def break_all(m: Memory) -> None:
    """Break every large page."""
    for block in range(m.block.shape[0]):
        break_large(m, block * BLOCK)


@compiled
def scan(m: Memory, t: Tps, now: int) -> int:
    """Pick as many pages of each guest as its credit allows. Returns PAUSED or NO_ROOM (to be called again)."""
    for guest in range(t.guest.shape[0]):
        while t.guest[guest, RUNS] and t.guest[guest, CREDIT] >= _CREDIT:
            if not has_room(m, t):
                return NO_ROOM
            t.guest[guest, CREDIT] -= _CREDIT
            t.n[PICKED] += 1
            page = random_page(m, t, guest)
            if t.n[BREAKS] or is_cold(m, t, page):
                break_large(m, page)
            visit(m, t, page, now)
    return PAUSED


@compiled
def share_now(m: Memory, t: Tps, guest: int, first: int, most: int, goal: int, now: int) -> tuple[int, int]:
    """Break large pages of a guest and look at its pages from page *first* on, until *goal* frames are free.

    Returns why it stopped, and the page (of the guest) to go on with, at most so many further.
    """
    pages = m.guest[guest, PAGES]
    at = first
    while at < min(first + most, pages) and frames_free(m) < goal:
        if not has_room(m, t):
            return NO_ROOM, at
        page = m.guest[guest, FIRST] + at
        break_large(m, page)
        t.n[PICKED] += 1
        visit(m, t, page, now)
        at += 1
    return PAUSED, at


# --- pages that are taken --------------------------------------------------------------------------------------------


@inlined
def count_out(t: Tps, guest: int, where: int, pages: int) -> None:
    """One page more or less of a guest is somewhere else."""
    if where == SWAPPED:
        t.guest[guest, SWAPPED_OUT] += pages
        t.n[SWAPPED_NOW] += pages
    elif where == ZIPPED:
        t.guest[guest, ZIPPED_OUT] += pages
        t.n[ZIPPED_NOW] += pages
    else:
        t.guest[guest, GIVEN] += pages
        t.n[BALLOONED_NOW] += pages


@inlined
def take_page(m: Memory, t: Tps, page: int, where: int, now: int) -> None:
    """Take the frame of a small page; its content is somewhere else from now on."""
    content = content_now(m, page, now)
    drop_hint(t, page)
    leave_frame(m, page)
    m.place[page] &= ~PRESENT
    m.place[page] |= AWAY
    m.held[page] = content
    m.counts[TOUCHED] -= 1
    m.counts[SLOTS_USED] += 1
    m.counts[SWAPPED_PAGES] += 1
    m.guest[m.block[page // BLOCK, GUEST], OUT] += 1
    t.out[page] = where
    count_out(t, m.block[page // BLOCK, GUEST], where, 1)
    plan_read(m, page, now)
    plan_write(m, page, now)


@inlined
def swap_out_page(m: Memory, t: Tps, r: Pressure, page: int, now: int) -> None:
    """Compress a page, if that is worth it, or write it to the VM's swap file while that has room."""
    guest = m.block[page // BLOCK, GUEST]
    if t.small[page] and t.guest[guest, ZIPPED_OUT] < t.guest[guest, ZIP_MOST]:
        take_page(m, t, page, ZIPPED, now)
    elif t.n[SWAPPED_NOW] < t.n[MOST_SWAPPED]:
        take_page(m, t, page, SWAPPED, now)
        m.counts[PSWPOUT] += 1
        r.n[PIPE] = max(r.n[PIPE], now) + r.n[PAGE_NS]


@inlined
def wait_for(m: Memory, t: Tps, r: Pressure, page: int, now: int) -> None:
    """Let the guest wait for a page that was taken; one that its own kernel took because it was free costs nothing."""
    before, where = r.n[WAIT], t.out[page]
    if where == BALLOONED and m.held[page] == 0:
        return
    if where == ZIPPED:
        r.n[WAIT] += UNZIP_NS
    else:
        r.n[WAIT] = submit(r, now + r.n[WAIT] + r.n[IN_NS], r.n[READ_NS]) - now
        m.counts[SWAP_PS] += 1000 * r.n[IN_NS]
    m.counts[PGMAJFAULT] += 1
    m.counts[SWPIN_WAIT_NS] += r.n[WAIT] - before
    r.n[PRESSURE_NS] += r.n[WAIT] - before


@inlined
def put_back(m: Memory, t: Tps, page: int) -> None:
    """A page that was taken is nowhere else any more."""
    guest = m.block[page // BLOCK, GUEST]
    count_out(t, guest, t.out[page], -1)
    t.out[page] = 0
    m.place[page] &= ~AWAY
    m.counts[SLOTS_USED] -= 1
    m.counts[SWAPPED_PAGES] -= 1
    m.guest[guest, OUT] -= 1


@inlined
def bring_in(m: Memory, t: Tps, r: Pressure, page: int, now: int) -> None:
    """Give a page that was taken a frame again; the caller made sure that one is free."""
    where, content = t.out[page], m.held[page]
    if m.rates[m.accesses[page], WRITES] > 0.0:
        look(m, page // BLOCK, now)
    wait_for(m, t, r, page, now)
    put_back(m, t, page)
    m.place[page] |= PRESENT
    m.counts[TOUCHED] += 1
    own_frame(m, page)
    m.held[page] = content
    if where == BALLOONED:
        t.n[GUEST_INS] += m.held[page] != 0
    elif where == SWAPPED:
        m.counts[PSWPIN] += 1


@compiled
def reclaim(m: Memory, t: Tps, r: Pressure, guest: int, frames: int, now: int) -> tuple[int, int]:
    """Take frames from a guest, of pages picked at random: share, or else compress or swap.

    Returns why it stopped, and how many frames it has yet to find; it gives up after many picks in vain.
    """
    goal = frames_free(m) + frames
    picks = 0
    while frames_free(m) < goal and picks < 16 * frames + 1024:
        if not has_room(m, t):
            return NO_ROOM, goal - frames_free(m)
        picks += 1
        page = random_page(m, t, guest)
        if m.place[page] & (PRESENT | SHARED) != PRESENT:
            continue
        break_large(m, page)
        visit(m, t, page, now)
        if not m.place[page] & SHARED:
            swap_out_page(m, t, r, page, now)
    return PAUSED, max(goal - frames_free(m), 0)


@compiled
def give(m: Memory, t: Tps, guest: int, order: Int32, ends: Int64, pages: int, now: int) -> int:
    """Let the guest's kernel give pages away, those it uses least first, and in turn those it uses equally often.

    *order* has the guest's pages by how often they are used, *ends* where in it each run of those used equally often
    ends. Returns how many it gave.
    """
    first, given, start = m.guest[guest, FIRST], 0, 0
    for end in ends:
        if given == pages:
            break
        hand = t.guest[guest, HAND] if start <= t.guest[guest, HAND] < end else start
        left = end - start if has_room(m, t) else 0
        while left > 0:
            left -= 1
            page = first + order[hand]
            hand = hand + 1 if hand + 1 < end else start
            if m.place[page] & PRESENT:
                break_large(m, page)
                t.n[GUEST_OUTS] += content_of(m, page) != 0
                take_page(m, t, page, BALLOONED, now)
                given += 1
                if given == pages or not has_room(m, t):
                    break
        t.guest[guest, HAND] = hand
        start = end
    return given


# --- what guests do --------------------------------------------------------------------------------------------------


@inlined
def enough(m: Memory, t: Tps) -> bool:
    """Whether a guest may have one more frame without anything being reclaimed first."""
    return bool(frames_free(m) > t.n[FLOOR])


@inlined
def write(m: Memory, t: Tps, r: Pressure, page: int, content: int, now: int) -> int:
    """One write by a guest. Returns OK or NO_FRAME (the page is as it was)."""
    if t.out[page]:
        if not enough(m, t):
            return NO_FRAME
        bring_in(m, t, r, page, now)
    elif not (m.place[page] & PRESENT and not m.place[page] & (SHARED | ZERO)) and not enough(m, t):
        return NO_FRAME
    return write_page(m, page, content)


@compiled
def write_pages(
    m: Memory, t: Tps, r: Pressure, first: int, pages: Int64, contents: Int32, done: int, now: int
) -> int:  # fmt: skip
    """Write contents to pages `first + pages`, but for the *done* first, and let the guest wait for that.

    Returns how many are done: not all when frames are short.
    """
    guest = m.block[first // BLOCK, GUEST]
    while done < pages.size:
        content = int(contents[done])
        if content == FRESH:
            content = fresh_content(m)
        waited, copies = r.n[WAIT], m.guest[guest, COPIES]
        if write(m, t, r, first + pages[done], content, now) != OK:
            break
        note_wait(m, r, guest, waited, copies)
        done += 1
    stall(m, r, guest, now)
    return done


@inlined
def access(m: Memory, t: Tps, r: Pressure, now: int) -> int:
    """Perform the access that is due first. Returns OK or NO_FRAME (it stays due)."""
    code = m.due[0, PAGE]
    page, reads = code // 2, code & 1 != 0
    guest = m.block[page // BLOCK, GUEST]
    if t.out[page]:
        if not enough(m, t):
            return NO_FRAME
        bring_in(m, t, r, page, now)
    done = OK
    if not reads and m.place[page] & PRESENT:
        draw, copies = drawn(m, guest, page, m.due[0, ACTIVE_TIME]), m.guest[guest, COPIES]
        done = write(m, t, r, page, written_content(m, m.accesses[page], draw), now)
        note_wait(m, r, guest, 0, copies)
    stall(m, r, guest, now)
    return done


@compiled
def access_due(m: Memory, t: Tps, r: Pressure, now: int) -> int:
    """Perform the due accesses up to now. Returns PAUSED, or STARVING: the first of them finds too few frames."""
    while m.counts[DUE_COUNT] > 0 and m.due[0, TIME] <= now:
        if due_in_time(m):
            if access(m, t, r, m.due[0, TIME]) != OK:
                return STARVING
            forget_due(m)
    return PAUSED


@compiled
def forget_pages(m: Memory, t: Tps, guest: int) -> None:
    """The guest ends: its hints and its pages that are somewhere else go."""
    first = m.guest[guest, FIRST]
    for page in range(first, first + m.guest[guest, PAGES]):
        drop_hint(t, page)
        if t.out[page]:
            put_back(m, t, page)


@compiled
def zero_shared(m: Memory, t: Tps, keys: Int64) -> int:
    """Pages that map a shared frame of zeros, each of which has one of these keys."""
    pages = 0
    for key in keys:
        entry = find(t, key)
        if entry > 0 and t.entry[entry - 1, VALUE] < 0:
            pages += m.frame[-t.entry[entry - 1, VALUE] - 1, MAPS]
    return int(pages)


@compiled
def consumed(m: Memory, guest: int) -> int:
    """Frames that the guest is charged for: its own, and its part of those it shares with others."""
    frames = 0.0
    first = m.guest[guest, FIRST]
    for page in range(first, first + m.guest[guest, PAGES]):
        if m.place[page] & PRESENT:
            frames += 1.0 / m.frame[m.held[page], MAPS] if m.place[page] & SHARED else 1.0
    return math.ceil(frames)


@compiled
def active_pages(m: Memory, t: Tps, guest: int, samples: int, period: int) -> int:
    """Of so many pages picked at random, how many the guest touched in the last *period* (ns), by their rates."""
    touched = 0
    for _ in range(samples):
        page = random_page(m, t, guest)
        kind = m.accesses[page]
        if kind == 0:
            continue
        active = period * m.level[guest]
        seen = -math.expm1(-(m.rates[kind, WRITES] + m.rates[kind, READS]) * active)
        if m.rates[kind, PERIOD] > 0.0:
            seen = max(seen, min(active / m.rates[kind, PERIOD], 1.0))
        t.n[SERIAL] += 1
        touched += uniform(shuffled(np.uint64(t.n[KEY]) ^ np.uint64(t.n[SERIAL]))) < seen
    return int(touched)
