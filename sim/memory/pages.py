"""Pages, frames and contents of one host as arrays, and the compiled steps that change them.

A page is present or not; a present page has a frame of its own (its content is then kept in `held`), maps a shared
frame (`held` is that frame's number and the content lives in the frame), or maps the zero page. Content therefore
always belongs to the frame: a wrong merge shows as a wrong read.

Contents are 32-bit numbers. 0 is the zero page; negative ones are held by one page only; all others are equal exactly
when the bytes are equal.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sim.memory.compiled import compiled, inlined

PAGE_BYTES = 4096
BLOCK = 512
"""Pages in a block: the unit that is scanned at once while nothing in it changes (2 MiB, as a huge page)."""

PRESENT, MERGEABLE, SHARED, ZERO, DUE = 1, 2, 4, 8, 16
"""Bits of `Memory.place`; DUE marks a page whose next write is already on the list of due writes."""

NEVER = -(1 << 31)
"""No content: no checksum yet, or a page that was never touched."""
FRESH = -1
"""Asks a write for a content that its page never held before; never a content itself."""

ANON, KSM, REMOVED = 1, 2, 3
"""Kinds of shared frame: shared by fork, a KSM page, a KSM page whose stable node is gone but still has items."""

# Indexes into Memory.counts.
LIMIT, PRIVATE, FRAMES, METADATA, TOUCHED, SHARERS, KSM_ZERO, COW_KSM, COW_FORK, DEATHS, DUE_COUNT = range(11)
FREE_FRAME, FRAME_HIGH, SERIAL, REUSE_LAST_MAPPER, SPLIT_FREES_ZERO = range(11, 16)
HUGE_PAGES, THP_SPLIT, THP_FAULT, THP_FALLBACK, THP_COLLAPSE, RESERVED = range(16, 22)
COUNTS = 22

# Columns of Memory.block, .frame, .guest, .writes and .due.
DIRTY, GUEST, LOOKED, HUGE, ADJACENT = range(5)
BLOCK_COLUMNS = 5
CONTENT, MAPS, KIND = range(3)
FRAME_COLUMNS = 3
FIRST, PAGES, KEY, SINCE, ACTIVE, COPIES, THP = range(7)
GUEST_COLUMNS = 7
WRITES, READS, PERIOD, LOOP_FIRST, LOOP_PAGES, LOWEST, SPAN = range(7)
ACCESS_COLUMNS = 7
TIME, ACTIVE_TIME, PAGE = range(3)
DUE_COLUMNS = 3

END_OF_TIME = 1 << 62
OK, NO_FRAME = 0, 1

UInt8 = npt.NDArray[np.uint8]
UInt16 = npt.NDArray[np.uint16]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


class Memory(NamedTuple):
    """State of a host's memory. Guests lie one after the other, each from a block boundary.

    Few arrays with named columns rather than many: the compiler's time grows with their number.
    """

    place: UInt8  # (pages,) bits PRESENT MERGEABLE SHARED ZERO DUE
    held: Int32  # (pages,) content of a private page, frame number of a shared one
    accesses: UInt16  # (pages,) class of random accesses, 0 none
    block: Int64  # (blocks, BLOCK_COLUMNS) DIRTY changed since the scanner last summed it up, GUEST number,
    #               LOOKED activity time (ns) up to which random writes are in the contents, HUGE 1 while its pages are
    #               one huge page: all private, in one 2 MiB frame, ADJACENT 1 where its frames came as one
    frame: Int32  # (shared frames, FRAME_COLUMNS) CONTENT, MAPS mappings (of an unused entry the next one), KIND
    guest: Int64  # (guests, GUEST_COLUMNS) FIRST page, PAGES, KEY of its stream of writes, host time (ns) SINCE which
    #               the present activity level lasts, ACTIVE activity time (ns) then, COPIES on write, THP 1 if its
    #               page faults ask for huge pages
    level: Float64  # (guests,) activity time per host time
    rates: Float64  # (classes, ACCESS_COLUMNS) WRITES and READS per ns of activity time and page; PERIOD (ns of
    #                 activity time) of a loop that reads LOOP_PAGES pages from LOOP_FIRST of the guest, one after the
    #                 other; LOWEST content left by a write, SPAN number of such contents (0: a fresh one each time);
    #                 classes without writes come last
    due: Int64  # (due, DUE_COLUMNS) heap of writes already drawn: host TIME (ns), ACTIVE_TIME (ns), PAGE
    counts: Int64  # (COUNTS,)


@inlined
def content_of(m: Memory, page: int) -> int:
    """What a read of the page returns."""
    place = m.place[page]
    if place & ZERO:
        return 0
    if place & SHARED:
        return int(m.frame[m.held[page], CONTENT])
    return int(m.held[page])


@inlined
def frames_free(m: Memory) -> int:
    """Frames that nothing uses."""
    counts = m.counts
    used = counts[PRIVATE] + counts[FRAMES] + counts[RESERVED] + (counts[METADATA] + PAGE_BYTES - 1) // PAGE_BYTES
    return int(counts[LIMIT] - used)


@inlined
def fresh_content(m: Memory) -> int:
    """A content that its page never held before."""
    serial = (m.counts[SERIAL] + 1) % ((1 << 31) - 2)
    m.counts[SERIAL] = serial
    return int(FRESH - 1 - serial)


@inlined
def new_frame(m: Memory, content: int, kind: int) -> int:
    """Number of an entry for one more shared frame; the caller made sure that there is room."""
    counts = m.counts
    frame = counts[FREE_FRAME]
    if frame >= 0:
        counts[FREE_FRAME] = m.frame[frame, MAPS]
    else:
        frame = counts[FRAME_HIGH]
        counts[FRAME_HIGH] = frame + 1
    m.frame[frame, CONTENT] = content
    m.frame[frame, KIND] = kind
    m.frame[frame, MAPS] = 0
    counts[FRAMES] += 1
    return int(frame)


@inlined
def forget_frame(m: Memory, frame: int) -> None:
    """Return an entry that no page and no scanner refers to."""
    m.frame[frame, KIND] = 0
    m.frame[frame, MAPS] = m.counts[FREE_FRAME]
    m.counts[FREE_FRAME] = frame


@inlined
def map_frame(m: Memory, page: int, frame: int) -> None:
    """Let a page that has no frame map a shared one."""
    m.place[page] |= SHARED
    m.held[page] = frame
    m.frame[frame, MAPS] += 1
    m.counts[SHARERS] += 1


@inlined
def leave_frame(m: Memory, page: int) -> None:
    """Take away what the page maps; it is then in nobody's frame (its caller gives it another place)."""
    place = m.place[page]
    if place & ZERO:
        m.counts[KSM_ZERO] -= 1
    elif place & SHARED:
        frame = m.held[page]
        m.frame[frame, MAPS] -= 1
        m.counts[SHARERS] -= 1
        if m.frame[frame, MAPS] == 0:
            m.counts[FRAMES] -= 1
            if m.frame[frame, KIND] == ANON:
                forget_frame(m, frame)
            else:
                m.counts[DEATHS] += 1
    else:
        m.counts[PRIVATE] -= 1
    m.place[page] = place & ~(SHARED | ZERO)


@inlined
def copies_on_write(m: Memory, page: int) -> bool:
    """Whether a write to the page needs a new frame."""
    place = m.place[page]
    if place & ZERO:
        return True
    if place & SHARED:
        frame = m.held[page]
        alone = m.frame[frame, MAPS] == 1
        return not (alone and (m.frame[frame, KIND] == ANON or m.counts[REUSE_LAST_MAPPER] != 0))
    return False


@inlined
def may_be_huge(m: Memory, block: int) -> bool:
    """Whether a page fault in the block may bring a huge page: asked for, all inside the guest, nothing there yet."""
    guest = m.block[block, GUEST]
    if not m.guest[guest, THP] or (block + 1) * BLOCK > m.guest[guest, FIRST] + m.guest[guest, PAGES]:
        return False
    there = 0
    for page in range(block * BLOCK, block * BLOCK + BLOCK):
        there |= m.place[page]
    return not there & PRESENT


@compiled
def fault_huge(m: Memory, block: int) -> bool:
    """Let a page fault bring a huge page full of zeros, if it may. Returns whether it did."""
    if not may_be_huge(m, block):
        return False
    if frames_free(m) < BLOCK:
        m.counts[THP_FALLBACK] += 1
        return False
    for page in range(block * BLOCK, block * BLOCK + BLOCK):
        m.place[page] |= PRESENT
        m.held[page] = 0
    m.block[block, HUGE] = 1
    m.block[block, ADJACENT] = 1
    m.counts[TOUCHED] += BLOCK
    m.counts[PRIVATE] += BLOCK
    m.counts[HUGE_PAGES] += 1
    m.counts[THP_FAULT] += 1
    return True


@inlined
def part_huge(m: Memory, block: int) -> None:
    """Let the pages of a huge page be ordinary pages from now on."""
    m.block[block, HUGE] = 0
    m.block[block, DIRTY] = 1
    m.counts[HUGE_PAGES] -= 1


@compiled
def split_huge(m: Memory, block: int, now: int) -> None:
    """Split a huge page (see `part_huge`); since Linux 6.12 pages full of zeros are then unmapped."""
    part_huge(m, block)
    m.counts[THP_SPLIT] += 1
    if m.counts[SPLIT_FREES_ZERO]:
        look(m, block, now)
        for page in range(block * BLOCK, block * BLOCK + BLOCK):
            if m.held[page] == 0:
                drop_page(m, page)


@compiled
def write_page(m: Memory, page: int, content: int) -> int:
    """One write by a guest, with its page fault or copy on write. Returns OK or NO_FRAME (nothing changed)."""
    place = m.place[page]
    if not place & PRESENT:
        if not fault_huge(m, page // BLOCK):
            if frames_free(m) < 1:
                return NO_FRAME
            m.place[page] = place | PRESENT
            m.counts[TOUCHED] += 1
            m.counts[PRIVATE] += 1
    elif place & (SHARED | ZERO):
        if copies_on_write(m, page):
            if frames_free(m) < 1:
                return NO_FRAME
            m.guest[m.block[page // BLOCK, GUEST], COPIES] += 1
            if place & SHARED and m.frame[m.held[page], KIND] == KSM:
                m.counts[COW_KSM] += 1
            else:
                m.counts[COW_FORK] += 1
        leave_frame(m, page)
        m.counts[PRIVATE] += 1
    m.held[page] = content
    m.block[page // BLOCK, DIRTY] = 1
    return OK


@compiled
def write_pages(m: Memory, first: int, pages: Int64, contents: Int32) -> int:
    """Write contents to pages `first + pages`. Returns how many are done: not all when no frame is left."""
    for i in range(pages.size):
        content = int(contents[i])
        if content == FRESH:
            content = fresh_content(m)
        if write_page(m, first + pages[i], content) != OK:
            return i
    return int(pages.size)


@compiled
def drop_page(m: Memory, page: int) -> None:
    """Unmap one page (exit, discard): its frame is free if nobody else maps it, and a huge page it was in is none."""
    place = m.place[page]
    if place & PRESENT:
        if m.block[page // BLOCK, HUGE]:
            part_huge(m, page // BLOCK)
        leave_frame(m, page)
        m.counts[TOUCHED] -= 1
        m.place[page] &= ~PRESENT
        m.block[page // BLOCK, DIRTY] = 1


@compiled
def drop_pages(m: Memory, first: int, pages: int) -> None:
    """Unmap a range of pages."""
    for page in range(first, first + pages):
        drop_page(m, page)


@compiled
def fill_pages(m: Memory, first: int, contents: Int32) -> int:
    """Touch pages from `first` for the first time; NEVER leaves a page untouched. Returns how many are done."""
    counts = m.counts
    for i in range(contents.size):
        content = contents[i]
        if content == NEVER:
            continue
        page = first + i
        if not m.place[page] & PRESENT and not fault_huge(m, page // BLOCK):
            if frames_free(m) < 1:
                return i
            m.place[page] |= PRESENT
            counts[TOUCHED] += 1
            counts[PRIVATE] += 1
        m.held[page] = content
    for block in range(first // BLOCK, (first + contents.size + BLOCK - 1) // BLOCK):
        m.block[block, DIRTY] = 1
    return int(contents.size)


@inlined
def shuffled(x: np.uint64) -> np.uint64:
    """A 64-bit number with all bits mixed (the finaliser of SplitMix64; Steele, Lea, Flood, OOPSLA 2014)."""
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@inlined
def uniform(draw: np.uint64) -> float:
    """A number from 0 up to 1 made of 64 random bits."""
    return float(draw >> np.uint64(11)) * (1.0 / (1 << 53))


@inlined
def drawn(m: Memory, guest: int, page: int, active: int) -> np.uint64:
    """The 64 random bits that belong to this page of this guest at this activity time."""
    within = np.uint64(page - m.guest[guest, FIRST])
    return shuffled(shuffled(np.uint64(m.guest[guest, KEY]) ^ within) ^ np.uint64(active))


@inlined
def activity_time(m: Memory, guest: int, now: int) -> int:
    """Host time to the guest's activity time (both ns): the integral of its activity level."""
    return int(m.guest[guest, ACTIVE] + np.int64((now - m.guest[guest, SINCE]) * m.level[guest]))


@inlined
def host_time(m: Memory, guest: int, active: int) -> int:
    """The inverse of `activity_time` while the present level lasts; the end of time for a guest at rest."""
    level = m.level[guest]
    ahead = (active - m.guest[guest, ACTIVE]) / level if level > 0.0 else math.inf
    if ahead > 4e18:
        return END_OF_TIME
    return int(m.guest[guest, SINCE] + np.int64(ahead) + 1)


@inlined
def written_content(m: Memory, kind: int, draw: np.uint64) -> int:
    """What a random write of this class leaves."""
    span = m.rates[kind, SPAN]
    if span == 0:
        return fresh_content(m)
    return int(m.rates[kind, LOWEST] + np.int64(shuffled(draw) % np.uint64(span)))


@compiled
def look(m: Memory, block: int, now: int) -> bool:
    """Bring the contents of a block's randomly written private pages up to now. Returns whether it has any."""
    guest = m.block[block, GUEST]
    active = activity_time(m, guest, now)
    before = m.block[block, LOOKED]
    m.block[block, LOOKED] = active
    kind_before = 0
    threshold = np.uint64(0)
    found = False
    for page in range(block * BLOCK, block * BLOCK + BLOCK):
        kind = m.accesses[page]
        if m.rates[kind, WRITES] == 0.0:
            continue
        found = True
        if m.place[page] & (PRESENT | SHARED | ZERO) != PRESENT:
            continue
        if kind != kind_before:
            written = -math.expm1(-m.rates[kind, WRITES] * (active - before))
            threshold = np.uint64(written * 2.0**63)
            kind_before = kind
        draw = drawn(m, guest, page, active)
        if draw >> np.uint64(1) < threshold:
            m.held[page] = written_content(m, kind, draw)
    return found


@inlined
def may_collapse(m: Memory, block: int, max_ptes_none: int, max_ptes_shared: int) -> bool:
    """Whether khugepaged takes the block: something is there, and not too much is missing or shared."""
    none, shared = 0, 0
    for page in range(block * BLOCK, block * BLOCK + BLOCK):
        place = m.place[page]
        if not place & PRESENT or place & ZERO:
            none += 1
        elif place & SHARED and m.frame[m.held[page], MAPS] > 1:
            shared += 1
    return none < BLOCK and none <= max_ptes_none and shared <= max_ptes_shared


@inlined
def collapse(m: Memory, block: int, now: int) -> None:
    """Copy what a block holds into a new huge page; what was shared is shared no more."""
    look(m, block, now)
    for page in range(block * BLOCK, block * BLOCK + BLOCK):
        content = 0
        if m.place[page] & PRESENT:
            content = content_of(m, page)
            leave_frame(m, page)
        else:
            m.place[page] |= PRESENT
            m.counts[TOUCHED] += 1
        m.held[page] = content
        m.counts[PRIVATE] += 1
    m.block[block, HUGE] = 1
    m.block[block, ADJACENT] = 1
    m.block[block, DIRTY] = 1
    m.counts[HUGE_PAGES] += 1
    m.counts[THP_COLLAPSE] += 1


@compiled
def collapse_blocks(
    m: Memory, guest: int, skip: int, most: int, max_ptes_none: int, max_ptes_shared: int, now: int
) -> tuple[int, int, bool]:
    """Let khugepaged look at up to *most* blocks of a guest behind the first *skip*, while frames last.

    Returns blocks looked at, huge pages made, and whether the guest's last whole block is behind.
    """
    first = m.guest[guest, FIRST] // BLOCK
    end = first + m.guest[guest, PAGES] // BLOCK
    looked, made = 0, 0
    for block in range(first + skip, min(first + skip + most, end)):
        looked += 1
        if m.block[block, HUGE] or not may_collapse(m, block, max_ptes_none, max_ptes_shared):
            continue
        if frames_free(m) < BLOCK:
            break
        collapse(m, block, now)
        made += 1
    return looked, made, first + skip + looked >= end


@inlined
def _before(m: Memory, a: int, b: int) -> bool:
    if m.due[a, TIME] == m.due[b, TIME]:
        return bool(m.due[a, PAGE] < m.due[b, PAGE])
    return bool(m.due[a, TIME] < m.due[b, TIME])


@inlined
def _swap(m: Memory, a: int, b: int) -> None:
    for column in range(DUE_COLUMNS):
        m.due[a, column], m.due[b, column] = m.due[b, column], m.due[a, column]


@inlined
def _sift_down(m: Memory, hole: int) -> None:
    size = m.counts[DUE_COUNT]
    while True:
        least = hole
        for child in (2 * hole + 1, 2 * hole + 2):
            if child < size and _before(m, child, least):
                least = child
        if least == hole:
            return
        _swap(m, hole, least)
        hole = least


@compiled
def plan_write(m: Memory, page: int, now: int) -> None:
    """Draw when a page that just became shared is written next, and put that on the list of due writes."""
    kind = m.accesses[page]
    if kind == 0 or m.place[page] & DUE or m.rates[kind, WRITES] <= 0.0:
        return
    guest = m.block[page // BLOCK, GUEST]
    active = activity_time(m, guest, now)
    wait = -math.log1p(-uniform(shuffled(drawn(m, guest, page, active)))) / m.rates[kind, WRITES]
    if wait > 4e18:
        return
    m.place[page] |= DUE
    at = m.counts[DUE_COUNT]
    m.counts[DUE_COUNT] = at + 1
    m.due[at, ACTIVE_TIME] = active + np.int64(wait) + 1
    m.due[at, TIME] = host_time(m, guest, m.due[at, ACTIVE_TIME])
    m.due[at, PAGE] = page
    while at > 0 and _before(m, at, (at - 1) // 2):
        _swap(m, at, (at - 1) // 2)
        at = (at - 1) // 2


@compiled
def next_due(m: Memory) -> int:
    """Host time (ns) of the earliest due write."""
    return int(m.due[0, TIME]) if m.counts[DUE_COUNT] > 0 else END_OF_TIME


@compiled
def write_due(m: Memory, now: int) -> int:
    """Perform the due writes up to now. Returns -1, or the page whose write found no frame (it stays due)."""
    while m.counts[DUE_COUNT] > 0 and m.due[0, TIME] <= now:
        page = m.due[0, PAGE]
        if m.place[page] & PRESENT and m.place[page] & (SHARED | ZERO):
            guest = m.block[page // BLOCK, GUEST]
            draw = drawn(m, guest, page, m.due[0, ACTIVE_TIME])
            if write_page(m, page, written_content(m, m.accesses[page], draw)) != OK:
                return int(page)
        m.place[page] &= ~DUE
        m.counts[DUE_COUNT] -= 1
        last = m.counts[DUE_COUNT]
        _swap(m, 0, last)
        _sift_down(m, 0)
    return -1


@compiled
def change_activity(m: Memory, guest: int, now: int, level: float) -> None:
    """Let the guest's activity level be *level* from now on; writes already drawn move with it."""
    m.guest[guest, ACTIVE] = activity_time(m, guest, now)
    m.guest[guest, SINCE] = now
    m.level[guest] = level
    for i in range(m.counts[DUE_COUNT]):
        if m.block[m.due[i, PAGE] // BLOCK, GUEST] == guest:
            m.due[i, TIME] = host_time(m, guest, m.due[i, ACTIVE_TIME])
    for i in range(m.counts[DUE_COUNT] // 2, -1, -1):
        _sift_down(m, i)


@compiled
def fork_pages(m: Memory, parent: int, child: int, pages: int, now: int) -> None:
    """Let the child map what the parent maps; huge pages are then mapped page by page.

    The caller made sure that no content is negative and that shared frames and due writes have room.
    """
    for i in range(pages):
        page, copy = parent + i, child + i
        if page % BLOCK == 0 and m.block[page // BLOCK, HUGE]:
            part_huge(m, page // BLOCK)
        place = m.place[page]
        m.accesses[copy] = m.accesses[page]
        m.place[copy] = place & ~(SHARED | DUE)
        if not place & PRESENT:
            continue
        m.counts[TOUCHED] += 1
        if place & ZERO:
            m.counts[KSM_ZERO] += 1
        else:
            if not place & SHARED:
                frame = new_frame(m, int(m.held[page]), ANON)
                m.counts[PRIVATE] -= 1
                map_frame(m, page, frame)
                m.block[page // BLOCK, DIRTY] = 1
            map_frame(m, copy, int(m.held[page]))
        plan_write(m, page, now)
        plan_write(m, copy, now)
    for block in range(child // BLOCK, (child + pages + BLOCK - 1) // BLOCK):
        m.block[block, DIRTY] = 1
        m.block[block, LOOKED] = activity_time(m, m.block[block, GUEST], now)
