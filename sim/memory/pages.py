"""Pages, frames and contents of one host as arrays, and the compiled steps that change them.

A page is present, swapped out, or neither; a present page has a frame of its own (its content is then kept in `held`),
maps a shared frame (`held` is that frame's number and the content lives in the frame), or maps the zero page. Content
therefore always belongs to the frame: a wrong merge shows as a wrong read. The content of a swapped page is kept in
`held`, or in an entry of the same table where several pages wait for one slot of swap.

Where memory can be reclaimed (`LRU` is set) each guest has an inactive and an active list of what it can lose: pages of
its own, huge pages (by their first page) and shared frames that are charged to it.

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

PRESENT, MERGEABLE, SHARED, ZERO, DUE, SWAPPED, DUE_READ, SLOT = 1, 2, 4, 8, 16, 32, 64, 128
"""Bits of `Memory.place`; DUE and DUE_READ mark a page whose next write or read is already on the list of what is due;
SLOT a page that is present and has an equal copy in swap."""

ACTIVE_LIST, REFERENCED, YOUNG, WORKINGSET, READ_AHEAD, POOLED, UNLISTED, PATCHED = 1, 2, 4, 8, 16, 32, 64, 128
"""Bits of `Memory.seen`: on the active list; found accessed once; accessed at a known moment since it was looked at;
has been on the active list; was read from swap before anyone asked for it; is swapped out and compressed in memory; is
a shared frame on no list, for it cannot be reclaimed; is POOLED as the difference from another page."""

NEVER = -(1 << 31)
"""No content: no checksum yet, or a page that was never touched."""
FRESH = -1
"""Asks a write for a content that its page never held before; never a content itself."""

ANON, KSM, REMOVED, SWAP_ENTRY = 1, 2, 3, 4
"""Kinds of shared frame: shared by fork, a KSM page, a KSM page whose stable node is gone but still has items; and one
that is no frame: a slot of swap for which several pages wait."""

# Indexes into Memory.counts.
LIMIT, PRIVATE, FRAMES, METADATA, TOUCHED, SHARERS, KSM_ZERO, COW_KSM, COW_FORK, DEATHS, DUE_COUNT = range(11)
FREE_FRAME, FRAME_HIGH, SERIAL, REUSE_LAST_MAPPER, SPLIT_FREES_ZERO = range(11, 16)
HUGE_PAGES, THP_SPLIT, THP_FAULT, THP_FALLBACK, THP_COLLAPSE, RESERVED = range(16, 22)
LRU, SWAP_SLOTS, SLOTS_USED, SWAPPED_PAGES, POOL, WRITEBACK, KEEPS_SLOTS, GONE = range(22, 30)
PSWPIN, PSWPOUT, SWPIN_ZERO, SWPOUT_ZERO, THP_SWPOUT, KSM_SWPIN_COPY, SWAP_RA, SWAP_RA_HIT = range(30, 38)
PGSCAN_KSWAPD, PGSCAN_DIRECT, PGSTEAL_KSWAPD, PGSTEAL_DIRECT, ALLOCSTALL = range(38, 43)
PGMAJFAULT, REFAULT, REFAULT_ACTIVE = range(43, 46)
PSI_SOME, PSI_FULL, KSWAPD_PS, DIRECT_PS, SWAP_PS, STALLED_NS = range(46, 52)
POOLED_PAGES, ZSWPIN, ZSWPOUT, ZSWPWB, KSM_STAYS, SWPIN_WAIT_NS, SWPIN_CACHED, UNPATCHED = range(52, 60)
POOL_HAS_NO_SLOTS, DISK_TOP, DISK_KEPT = range(60, 63)
WRITE_WAIT_NS, COPY_WAIT_NS, BIRTHS = range(63, 66)
"""The longest that a write to a page of its own has waited for memory, and that one which copied the page has."""
STANDS_FOR, POOL_WHOLE = range(66, 68)
"""How many pages each page stands for, and the frames of compressed pages if each were one."""
SPLITS_LATER, THP_DEFERRED_SPLIT, LATE_SPLITS, DEFERRED = range(68, 72)
"""Whether a huge page that is given back in part is split only when memory is short, how many were given back in part,
how many of them shortage has split since, which are in THP_SPLIT too, and the frames that a split would free."""
COUNTS = 72

# Columns of Memory.block, .frame, .guest, .writes and .due.
DIRTY, GUEST, LOOKED, HUGE, ADJACENT, TEMPER, IN_USE, GIVEN_BACK = range(8)
WORD = 64
"""Bits of a column of `Memory.block` from GIVEN_BACK on."""
BLOCK_COLUMNS = GIVEN_BACK + BLOCK // WORD
CONTENT, MAPS, KIND, BORN = range(4)
FRAME_COLUMNS = 4
FIRST, PAGES, KEY, SINCE, ACTIVE, COPIES, THP = range(7)
CHARGED, CHARGE_LIMIT, OUT, AGE, STALLED, VCPUS, LAST_READ, WINDOW, HITS = range(7, 16)
INACTIVE, STAYS, ZEROS, TORN = 16, 22, 23, 24
GUEST_COLUMNS = 25
HEAD, TAIL, SIZE = range(3)
"""Columns of a list in `Memory.guest`: the inactive one from INACTIVE on, then the active one."""
LIST_COLUMNS = 3
NEXT, PREVIOUS, STAMP = range(3)
LRU_COLUMNS = 3
OWNER, RING, SEEN = range(3, 6)
FRAME_LRU_COLUMNS = 6
OBJECTS, ZSPAGE_PAGES, WEIGHT, STORED = range(1, 5)
ZSPAGE_COLUMNS = 5
WRITES, READS, PERIOD, LOOP_FIRST, LOOP_PAGES, LOWEST, SPAN, FROM_DISK = range(8)
ACCESS_COLUMNS = 8
TIME, ACTIVE_TIME, PAGE = range(3)
DUE_COLUMNS = 3

ANY, HOT, COLD, REPEATED = range(4)
"""What a block is: nobody judged it; accessed often; seldom; seldom, and many of its pages equal others."""

END_OF_TIME = 1 << 62
STAMP_SHIFT = 16
"""Stamps are activity times in units of 2^16 ns, modulo 2^32."""
OK, NO_FRAME = 0, 1

UInt8 = npt.NDArray[np.uint8]
UInt16 = npt.NDArray[np.uint16]
UInt64 = npt.NDArray[np.uint64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


class Memory(NamedTuple):
    """State of a host's memory. Guests lie one after the other, each from a block boundary.

    Few arrays with named columns rather than many: the compiler's time grows with their number.
    """

    place: UInt8  # (pages,) bits PRESENT MERGEABLE SHARED ZERO DUE SWAPPED DUE_READ SLOT
    held: Int32  # (pages,) content of a private page, frame number of a shared one
    lru: Int32  # (pages, LRU_COLUMNS), empty without LRU: NEXT and PREVIOUS entry of its list (page + 1, or
    #             -(frame + 1), 0 none), of a page that maps a shared frame page + 1 of the frame's other mappers in a
    #             ring; STAMP when it was last looked at, of a swapped page the AGE of its guest when that happened, and
    #             in NEXT and PREVIOUS until when it is being written (see `note_write` in reclaim/pressure.py)
    seen: UInt8  # (pages,), empty without LRU: bits ACTIVE_LIST REFERENCED YOUNG WORKINGSET READ_AHEAD POOLED
    packed: UInt8  # (pages,), empty where nothing is compressed: size in units of 16 bytes, see reclaim/compression.py
    zspage: Int64  # (256, ZSPAGE_COLUMNS): for each `packed` its class, OBJECTS and PAGES of a zspage, and the WEIGHT
    #                of such a page in objects; for each class how many are STORED
    frame_lru: Int32  # (shared frames, FRAME_LRU_COLUMNS), empty without LRU: as lru; OWNER the guest it is charged to,
    #                   RING page + 1 of a mapper, SEEN as seen; of a swap entry SEEN POOLED and STAMP its `packed`
    gone: Int32  # (GONE entries,) mergeable pages that were swapped out (page + 1) or came back (-(page + 1)) of late
    from_disk: Int32  # (entries,), empty where nobody asks: page + 1 of pages that guests read from their disks of
    #                   late, a ring with the last one at DISK_TOP, of which DISK_KEPT are still to be told
    accesses: UInt16  # (pages,) class of random accesses, 0 none
    block: Int64  # (blocks, BLOCK_COLUMNS) DIRTY changed since the scanner last summed it up, GUEST number,
    #               LOOKED activity time (ns) up to which random writes are in the contents, HUGE 1 while its pages are
    #               one huge page: all private, in one 2 MiB frame, ADJACENT 1 where its frames came as one, TEMPER
    #               as judged: only ANY and REPEATED ones are split for a merge, and ANY and HOT ones made huge; IN_USE
    #               pages that still map a huge page of which a part is given back, 0 for no such one, and from
    #               GIVEN_BACK on a bit for each page, set where its part of that huge page is nobody's
    frame: Int32  # (shared frames, FRAME_COLUMNS) CONTENT, MAPS mappings (of an unused entry the next one), KIND,
    #              BORN how many frames were shared when this one was, which tells it from one with its entry before
    guest: Int64  # (guests, GUEST_COLUMNS) FIRST page, PAGES, KEY of its stream of writes, host time (ns) SINCE which
    #               the present activity level lasts, ACTIVE activity time (ns) then, COPIES on write, THP 1 if its
    #               page faults ask for huge pages; CHARGED frames and CHARGE_LIMIT of its memory cgroup, OUT swapped
    #               pages, AGE evictions and activations so far, STALLED ns, VCPUS, LAST_READ page from swap, WINDOW and
    #               HITS of readahead; the two lists; STAYS 1 if its pages are never reclaimed; ZEROS
    #               what stands for the content 0 where its pages are looked up (see `name_of`), TORN huge pages of
    #               which a part is given back
    level: Float64  # (guests,) activity time per host time
    rates: Float64  # (classes, ACCESS_COLUMNS) WRITES and READS per ns of activity time and page; PERIOD (ns of
    #                 activity time) of a loop that reads LOOP_PAGES pages from LOOP_FIRST of the guest, one after the
    #                 other; LOWEST content left by a write, SPAN number of such contents (0: a fresh one each time);
    #                 FROM_DISK 1 if a write is a page read from a disk; classes without writes come last
    due: Int64  # (due, DUE_COLUMNS) heap of accesses already drawn: host TIME (ns), ACTIVE_TIME (ns), PAGE * 2, plus 1
    #             for a read
    counts: Int64  # (COUNTS,)


@inlined
def content_of(m: Memory, page: int) -> int:
    """What a read of the page returns, once it is present."""
    place = m.place[page]
    if place & ZERO:
        return 0
    if place & SHARED:
        return int(m.frame[m.held[page], CONTENT])
    return int(m.held[page])


@inlined
def name_of(m: Memory, page: int, content: int) -> int:
    """Under what number the page's content is looked up: guests that must not share with each other have no common one.

    Their contents differ anyway, but for that of an empty page.
    """
    return int(content if content != 0 else m.guest[m.block[page // BLOCK, GUEST], ZEROS])


@inlined
def frames_free(m: Memory) -> int:
    """Frames that nothing uses."""
    counts = m.counts
    used = counts[PRIVATE] + counts[FRAMES] + counts[RESERVED] + (counts[METADATA] + PAGE_BYTES - 1) // PAGE_BYTES
    return int(counts[LIMIT] - used - counts[DEFERRED] - counts[POOL] - counts[WRITEBACK])


@inlined
def fresh_content(m: Memory) -> int:
    """A content that its page never held before."""
    serial = (m.counts[SERIAL] + 1) % ((1 << 31) - 2)
    m.counts[SERIAL] = serial
    return int(FRESH - 1 - serial)


@inlined
def charge(m: Memory, guest: int, frames: int) -> None:
    """Charge frames to a guest's memory cgroup, or fewer than none."""
    m.guest[guest, CHARGED] += frames


@inlined
def within_limit(m: Memory, guest: int, frames: int) -> bool:
    """Whether a guest may have so many frames more."""
    limit = m.guest[guest, CHARGE_LIMIT]
    return bool(limit == 0 or m.guest[guest, CHARGED] + frames <= limit)


@inlined
def weight(m: Memory, entry: int) -> int:
    """Frames that an entry of a list stands for."""
    return BLOCK if entry > 0 and m.block[(entry - 1) // BLOCK, HUGE] else 1


@inlined
def neighbour(m: Memory, entry: int, side: int) -> int:
    """The NEXT or PREVIOUS entry of a list."""
    return int(m.lru[entry - 1, side] if entry > 0 else m.frame_lru[-entry - 1, side])


@inlined
def set_neighbour(m: Memory, entry: int, side: int, other: int) -> None:
    """Set the NEXT or PREVIOUS entry of a list."""
    if entry > 0:
        m.lru[entry - 1, side] = other
    else:
        m.frame_lru[-entry - 1, side] = other


@inlined
def bits_of(m: Memory, entry: int) -> int:
    """What is known of an entry: the bits of `Memory.seen`."""
    return int(m.seen[entry - 1] if entry > 0 else m.frame_lru[-entry - 1, SEEN])


@inlined
def set_bits(m: Memory, entry: int, bits: int) -> None:
    """Set what is known of an entry."""
    if entry > 0:
        m.seen[entry - 1] = bits
    else:
        m.frame_lru[-entry - 1, SEEN] = bits


@inlined
def list_of(m: Memory, entry: int) -> int:
    """First column of the list that an entry is on."""
    return INACTIVE + LIST_COLUMNS if bits_of(m, entry) & ACTIVE_LIST else INACTIVE


@compiled
def put(m: Memory, guest: int, entry: int, active: bool) -> None:
    """Put an entry at the head of one of a guest's lists."""
    bits = bits_of(m, entry) & ~ACTIVE_LIST
    set_bits(m, entry, bits | ACTIVE_LIST if active else bits)
    column = INACTIVE + LIST_COLUMNS if active else INACTIVE
    first = m.guest[guest, column + HEAD]
    set_neighbour(m, entry, NEXT, first)
    set_neighbour(m, entry, PREVIOUS, 0)
    if first:
        set_neighbour(m, first, PREVIOUS, entry)
    else:
        m.guest[guest, column + TAIL] = entry
    m.guest[guest, column + HEAD] = entry
    m.guest[guest, column + SIZE] += weight(m, entry)


@compiled
def take(m: Memory, guest: int, entry: int) -> None:
    """Take an entry off its list."""
    column = list_of(m, entry)
    following, previous = neighbour(m, entry, NEXT), neighbour(m, entry, PREVIOUS)
    if previous:
        set_neighbour(m, previous, NEXT, following)
    else:
        m.guest[guest, column + HEAD] = following
    if following:
        set_neighbour(m, following, PREVIOUS, previous)
    else:
        m.guest[guest, column + TAIL] = previous
    m.guest[guest, column + SIZE] -= weight(m, entry)


@compiled
def put_behind(m: Memory, guest: int, entry: int, before: int) -> None:
    """Put an entry on the list of another one, right behind it."""
    bits = bits_of(m, before)
    set_bits(m, entry, bits)
    column = list_of(m, before)
    following = neighbour(m, before, NEXT)
    set_neighbour(m, entry, NEXT, following)
    set_neighbour(m, entry, PREVIOUS, before)
    set_neighbour(m, before, NEXT, entry)
    if following:
        set_neighbour(m, following, PREVIOUS, entry)
    else:
        m.guest[guest, column + TAIL] = entry
    m.guest[guest, column + SIZE] += weight(m, entry)


@compiled
def replace(m: Memory, guest: int, page: int, frame: int, now: int) -> None:
    """Let a shared frame have the place of the page on its list; its stamps are host times."""
    m.frame_lru[frame, OWNER] = guest
    m.frame_lru[frame, RING] = 0
    age, level = age_of(m.lru[page, STAMP], activity_time(m, guest, now)), m.level[guest]
    since = now - np.int64(age / level) if level > 0.0 and age < now * level else 0
    m.frame_lru[frame, STAMP] = np.int32(since >> STAMP_SHIFT)
    put_behind(m, guest, -(frame + 1), page + 1)
    take(m, guest, page + 1)
    if m.counts[KSM_STAYS] and m.frame[frame, KIND] == KSM:
        keep_in_memory(m, frame)


@compiled
def keep_in_memory(m: Memory, frame: int) -> None:
    """Take a shared frame off its list for good: it cannot be reclaimed."""
    if not m.frame_lru[frame, SEEN] & UNLISTED:
        take(m, m.frame_lru[frame, OWNER], -(frame + 1))
        m.frame_lru[frame, SEEN] = UNLISTED


@compiled
def join_ring(m: Memory, page: int, frame: int) -> None:
    """Enter the page among the mappers of a shared frame."""
    other = m.frame_lru[frame, RING]
    if other == 0:
        m.lru[page, NEXT] = m.lru[page, PREVIOUS] = page + 1
        m.frame_lru[frame, RING] = page + 1
    else:
        behind = m.lru[other - 1, NEXT]
        m.lru[page, NEXT], m.lru[page, PREVIOUS] = behind, other
        m.lru[other - 1, NEXT] = page + 1
        m.lru[behind - 1, PREVIOUS] = page + 1


@compiled
def leave_ring(m: Memory, page: int, frame: int) -> None:
    """Strike the page from the mappers of a shared frame."""
    following, previous = m.lru[page, NEXT], m.lru[page, PREVIOUS]
    if following == page + 1:
        m.frame_lru[frame, RING] = 0
    else:
        m.lru[previous - 1, NEXT] = following
        m.lru[following - 1, PREVIOUS] = previous
        m.frame_lru[frame, RING] = following


@inlined
def drop_slot(m: Memory, page: int) -> None:
    """Give back the slot of swap that a present page may still have."""
    if m.place[page] & SLOT:
        m.place[page] &= ~SLOT
        m.counts[SLOTS_USED] -= 1


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
    counts[BIRTHS] += 1
    m.frame[frame, BORN] = counts[BIRTHS]
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
    if m.counts[LRU]:
        join_ring(m, page, frame)


@compiled
def own_frame(m: Memory, page: int) -> None:
    """Give a page that maps nothing a frame of its own."""
    m.counts[PRIVATE] += 1
    if m.counts[LRU]:
        m.seen[page] = YOUNG
        charge(m, m.block[page // BLOCK, GUEST], 1)
        put(m, m.block[page // BLOCK, GUEST], page + 1, False)


# --- huge pages of which a part is given back -------------------------------------------------------------------------


@inlined
def is_large(m: Memory, block: int) -> bool:
    """Whether a huge page lies behind the block, mapped as one or page by page since a part of it was given back."""
    return bool(m.block[block, HUGE] or m.block[block, IN_USE])


@inlined
def in_torn_page(m: Memory, page: int) -> bool:
    """Whether the page maps its part of a huge page of which other parts are given back."""
    if m.block[page // BLOCK, IN_USE] == 0:
        return False
    word = m.block[page // BLOCK, GIVEN_BACK + page % BLOCK // WORD]
    return bool((word >> np.int64(page % WORD)) & 1 == 0)


@compiled
def end_torn(m: Memory, block: int) -> None:
    """Free the parts of a huge page that are given back: those in use are ordinary pages from now on."""
    guest, kept = m.block[block, GUEST], BLOCK - m.block[block, IN_USE]
    m.block[block, IN_USE:] = 0
    m.guest[guest, TORN] -= 1
    m.counts[DEFERRED] -= kept
    if m.counts[LRU]:
        charge(m, guest, -kept)


@compiled
def leave_torn(m: Memory, page: int) -> None:
    """Give a page's part of a huge page back: its frame is free only with all others, or by a split."""
    block, column = page // BLOCK, GIVEN_BACK + page % BLOCK // WORD
    m.block[block, column] |= np.int64(1) << np.int64(page % WORD)
    m.block[block, IN_USE] -= 1
    m.counts[DEFERRED] += 1
    if m.block[block, IN_USE] == 0:
        end_torn(m, block)


@compiled
def tear(m: Memory, block: int) -> None:
    """Let a huge page be mapped page by page: what is given back of it from now on stays with it."""
    part_huge(m, block)
    m.block[block, IN_USE] = BLOCK
    m.guest[m.block[block, GUEST], TORN] += 1


@compiled
def split_torn(m: Memory, guest: int) -> int:
    """Split all huge pages of a guest of which parts are given back. Returns how many.

    The kernel also unmaps those of their other pages that are full of zeros.
    """
    if m.guest[guest, TORN] == 0:
        return 0
    split = 0
    first = m.guest[guest, FIRST] // BLOCK
    for block in range(first, first + m.guest[guest, PAGES] // BLOCK):
        if m.block[block, IN_USE]:
            end_torn(m, block)
            split += 1
    m.counts[THP_SPLIT] += split
    m.counts[LATE_SPLITS] += split
    return split


@compiled
def find_frames(m: Memory, frames: int) -> bool:
    """Whether so many frames are free, once huge pages given back in part are split if they must be."""
    guest = 0
    while frames_free(m) < frames and guest < m.guest.shape[0]:
        split_torn(m, guest)
        guest += 1
    return frames_free(m) >= frames


# --- frames of pages --------------------------------------------------------------------------------------------------


@compiled
def share_own_frame(m: Memory, page: int, content: int, kind: int, now: int) -> int:
    """Make the page's own frame a shared one that it maps; there is room. Returns the frame's number."""
    if in_torn_page(m, page):
        end_torn(m, page // BLOCK)
    frame = new_frame(m, content, kind)
    m.counts[PRIVATE] -= 1
    drop_slot(m, page)
    if m.counts[LRU]:
        replace(m, m.block[page // BLOCK, GUEST], page, frame, now)
    map_frame(m, page, frame)
    return int(frame)


@compiled
def leave_frame(m: Memory, page: int) -> None:
    """Take away what the page maps; it is then in nobody's frame (its caller gives it another place)."""
    place = m.place[page]
    if place & ZERO:
        m.counts[KSM_ZERO] -= 1
    elif place & SHARED:
        frame = m.held[page]
        m.frame[frame, MAPS] -= 1
        m.counts[SHARERS] -= 1
        if m.counts[LRU]:
            leave_ring(m, page, frame)
        if m.frame[frame, MAPS] == 0:
            m.counts[FRAMES] -= 1
            if m.counts[LRU]:
                charge(m, m.frame_lru[frame, OWNER], -1)
                if not m.frame_lru[frame, SEEN] & UNLISTED:
                    take(m, m.frame_lru[frame, OWNER], -(frame + 1))
            if m.frame[frame, KIND] == ANON:
                forget_frame(m, frame)
            else:
                m.counts[DEATHS] += 1
    else:
        drop_slot(m, page)
        if m.counts[LRU]:
            take(m, m.block[page // BLOCK, GUEST], page + 1)
        m.counts[PRIVATE] -= 1
        if in_torn_page(m, page):
            leave_torn(m, page)
        elif m.counts[LRU]:
            charge(m, m.block[page // BLOCK, GUEST], -1)
    m.place[page] &= ~(SHARED | ZERO)


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


@compiled
def may_be_huge(m: Memory, block: int) -> bool:
    """Whether a page fault in the block may bring a huge page: asked for, all inside the guest, nothing there yet."""
    guest = m.block[block, GUEST]
    if not m.guest[guest, THP] or (block + 1) * BLOCK > m.guest[guest, FIRST] + m.guest[guest, PAGES]:
        return False
    there = 0
    for page in range(block * BLOCK, block * BLOCK + BLOCK):
        there |= m.place[page]
    return not there & (PRESENT | SWAPPED)


@compiled
def own_huge(m: Memory, block: int) -> None:
    """Give the pages of a block, which map nothing, a huge page."""
    m.block[block, HUGE] = 1
    m.block[block, ADJACENT] = 1
    m.counts[PRIVATE] += BLOCK
    m.counts[HUGE_PAGES] += 1
    if m.counts[LRU]:
        m.seen[block * BLOCK] = YOUNG
        charge(m, m.block[block, GUEST], BLOCK)
        put(m, m.block[block, GUEST], block * BLOCK + 1, False)


@compiled
def fault_huge(m: Memory, block: int) -> bool:
    """Let a page fault bring a huge page full of zeros, if it may. Returns whether it did."""
    if not may_be_huge(m, block):
        return False
    if frames_free(m) < BLOCK or not within_limit(m, m.block[block, GUEST], BLOCK):
        m.counts[THP_FALLBACK] += 1
        return False
    for page in range(block * BLOCK, block * BLOCK + BLOCK):
        m.place[page] |= PRESENT
        m.held[page] = 0
    m.counts[TOUCHED] += BLOCK
    own_huge(m, block)
    m.counts[THP_FAULT] += 1
    return True


@compiled
def part_huge(m: Memory, block: int) -> None:
    """Let the pages of a huge page be ordinary pages from now on."""
    m.block[block, HUGE] = 0
    if m.counts[LRU]:
        guest, first = m.block[block, GUEST], block * BLOCK
        m.guest[guest, list_of(m, first + 1) + SIZE] -= BLOCK - 1
        for page in range(first + 1, first + BLOCK):
            put_behind(m, guest, page + 1, page)
            m.lru[page, STAMP] = m.lru[first, STAMP]
    m.block[block, DIRTY] = 1
    m.counts[HUGE_PAGES] -= 1


@compiled
def split_huge(m: Memory, block: int, now: int) -> None:
    """Split a huge page, whole or given back in part; since Linux 6.12 pages full of zeros are then unmapped."""
    if m.block[block, HUGE]:
        tear(m, block)
    m.counts[THP_SPLIT] += 1
    if m.counts[SPLIT_FREES_ZERO]:
        look(m, block, now)
        for page in range(block * BLOCK, block * BLOCK + BLOCK):
            if in_torn_page(m, page) and m.held[page] == 0:
                drop_page(m, page)
    if m.block[block, IN_USE]:
        end_torn(m, block)


@compiled
def write_page(m: Memory, page: int, content: int) -> int:
    """One write by a guest to a page that is not swapped out, with its page fault or copy on write.

    Returns OK or NO_FRAME (nothing changed).
    """
    place = m.place[page]
    if not place & PRESENT:
        if not fault_huge(m, page // BLOCK):
            if not find_frames(m, 1):
                return NO_FRAME
            m.place[page] = place | PRESENT
            m.counts[TOUCHED] += 1
            own_frame(m, page)
    elif place & (SHARED | ZERO):
        if copies_on_write(m, page):
            if not find_frames(m, 1):
                return NO_FRAME
            m.guest[m.block[page // BLOCK, GUEST], COPIES] += 1
            if place & SHARED and m.frame[m.held[page], KIND] == KSM:
                m.counts[COW_KSM] += 1
            else:
                m.counts[COW_FORK] += 1
        leave_frame(m, page)
        own_frame(m, page)
    else:
        drop_slot(m, page)
    m.held[page] = content
    m.block[page // BLOCK, DIRTY] = 1
    return OK


@compiled
def drop_page(m: Memory, page: int) -> None:
    """Unmap one page (exit, discard): its frame is free if it is no part of a huge page, and nobody else maps it."""
    place, block = m.place[page], page // BLOCK
    if place & PRESENT:
        if m.block[block, HUGE] and m.counts[SPLITS_LATER]:
            tear(m, block)
            m.counts[THP_DEFERRED_SPLIT] += 1
        elif m.block[block, HUGE]:
            part_huge(m, block)
        leave_frame(m, page)
        m.counts[TOUCHED] -= 1
        m.place[page] &= ~PRESENT
        m.block[page // BLOCK, DIRTY] = 1
    elif place & SWAPPED:
        leave_swap(m, page)


@compiled
def drop_pages(m: Memory, first: int, pages: int) -> None:
    """Unmap a range of pages; a huge page that is all in it is free at once."""
    for page in range(first, first + pages):
        if page % BLOCK == 0 and page + BLOCK <= first + pages and m.block[page // BLOCK, HUGE]:
            part_huge(m, page // BLOCK)
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
            if not find_frames(m, 1):
                return i
            m.place[page] |= PRESENT
            counts[TOUCHED] += 1
            own_frame(m, page)
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
def drawn_with(key: np.uint64, within: np.uint64, active: int) -> np.uint64:
    """The 64 random bits that belong to a page of the guest with this key at an activity time."""
    return shuffled(shuffled(key ^ within) ^ np.uint64(active))


@inlined
def drawn(m: Memory, guest: int, page: int, active: int) -> np.uint64:
    """The 64 random bits that belong to this page of this guest at this activity time."""
    return drawn_with(np.uint64(m.guest[guest, KEY]), np.uint64(page - m.guest[guest, FIRST]), active)


@inlined
def activity_time(m: Memory, guest: int, now: int) -> int:
    """Host time to the guest's activity time (both ns): the integral of its activity level, stalls left out."""
    return int(m.guest[guest, ACTIVE] + np.int64(max(now - m.guest[guest, SINCE], 0) * m.level[guest]))


@inlined
def age_of(stamp: int, time: int) -> int:
    """Time (ns) from a stamp to a time; none if the stamp lies a little ahead, as that of a guest which waits may."""
    ticks = ((time >> STAMP_SHIFT) - np.int64(stamp)) & 0xFFFFFFFF
    return 0 if ticks > 0xFF000000 else int(ticks << STAMP_SHIFT)


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
    before = m.block[block, LOOKED]
    active = max(activity_time(m, guest, now), before)  # what a guest that now waits had foreseen is not undone
    m.block[block, LOOKED] = active
    kind_before = 0
    threshold = np.uint64(0)
    found = False
    for page in range(block * BLOCK, block * BLOCK + BLOCK):
        kind = m.accesses[page]
        if m.rates[kind, WRITES] == 0.0:
            continue
        found = True
        if m.place[page] & (PRESENT | SHARED | ZERO | DUE) != PRESENT:
            continue
        if kind != kind_before:
            written = -math.expm1(-m.rates[kind, WRITES] * (active - before))
            threshold = np.uint64(written * 2.0**63)
            kind_before = kind
        draw = drawn(m, guest, page, active)
        if draw >> np.uint64(1) < threshold:
            m.held[page] = written_content(m, kind, draw)
            drop_slot(m, page)
    return found


@inlined
def content_now(m: Memory, page: int, now: int) -> int:
    """The page's content now, its random writes done; what is unique and only ever made unique is left as it is."""
    kind = m.accesses[page]
    changes = m.rates[kind, WRITES] != 0.0 and not m.place[page] & (SHARED | ZERO)
    if changes and (m.held[page] >= 0 or m.rates[kind, SPAN] != 0):
        look(m, page // BLOCK, now)
    return content_of(m, page)


# --- swap ------------------------------------------------------------------------------------------------------------


@inlined
def note_gone(m: Memory, page: int, entry: int) -> None:
    """Let whoever scans know that a mergeable page was swapped out or came back, if there is room for the note."""
    if m.place[page] & MERGEABLE and m.counts[GONE] < m.gone.size:
        m.gone[m.counts[GONE]] = entry
        m.counts[GONE] += 1


@inlined
def new_swap_entry(m: Memory, content: int) -> int:
    """Number of an entry for a slot of swap for which several pages wait; the caller made sure that there is room."""
    frame = new_frame(m, content, SWAP_ENTRY)
    m.counts[FRAMES] -= 1
    return frame


@compiled
def unmap_to_swap(m: Memory, page: int, now: int) -> None:
    """Let a page, which has left its frame, wait in swap for its next access."""
    guest = m.block[page // BLOCK, GUEST]
    m.place[page] = m.place[page] & ~(PRESENT | SLOT) | SWAPPED
    m.counts[TOUCHED] -= 1
    m.counts[SWAPPED_PAGES] += 1
    m.guest[guest, OUT] += 1
    m.block[page // BLOCK, DIRTY] = 1
    m.lru[page, NEXT] = m.lru[page, PREVIOUS] = 0
    m.lru[page, STAMP] = m.guest[guest, AGE]
    note_gone(m, page, page + 1)
    plan_read(m, page, now)
    plan_write(m, page, now)


@inlined
def pool_pages(m: Memory, packed: int, stored: int) -> int:
    """Frames that so many objects of this size take, each standing for as many as a page does, in whole zspages."""
    zspages = (stored * m.counts[STANDS_FOR] + m.zspage[packed, OBJECTS] - 1) // m.zspage[packed, OBJECTS]
    return int(zspages * m.zspage[packed, ZSPAGE_PAGES])


@inlined
def one_more(m: Memory, packed: int) -> int:
    """What `POOL_WHOLE` grows by with one more compressed page of this size: none, or zspages."""
    stored = m.zspage[m.zspage[packed, 0], STORED]
    return pool_pages(m, packed, stored + m.zspage[packed, WEIGHT]) - pool_pages(m, packed, stored)


@inlined
def pool_of(m: Memory, whole: int) -> int:
    """`POOL` for a `POOL_WHOLE`."""
    return int((whole + m.counts[STANDS_FOR] - 1) // m.counts[STANDS_FOR])


@inlined
def pool_growth(m: Memory, packed: int) -> int:
    """Frames that one more compressed page of this size takes."""
    return int(pool_of(m, m.counts[POOL_WHOLE] + one_more(m, packed)) - m.counts[POOL])


@compiled
def pool_add(m: Memory, packed: int) -> None:
    """Store one more compressed page of this size in memory."""
    m.counts[POOL_WHOLE] += one_more(m, packed)
    m.counts[POOL] = pool_of(m, m.counts[POOL_WHOLE])
    m.zspage[m.zspage[packed, 0], STORED] += m.zspage[packed, WEIGHT]
    m.counts[POOLED_PAGES] += 1


@compiled
def pool_remove(m: Memory, packed: int) -> None:
    """Forget a compressed page of this size; those that are left are taken to lie close together."""
    m.zspage[m.zspage[packed, 0], STORED] -= m.zspage[packed, WEIGHT]
    m.counts[POOL_WHOLE] -= one_more(m, packed)
    m.counts[POOL] = pool_of(m, m.counts[POOL_WHOLE])
    m.counts[POOLED_PAGES] -= 1


@compiled
def look_at(m: Memory, page: int, active: int) -> None:
    """Bring the content of one page, which is about to be swapped out, up to an activity time."""
    kind, block = m.accesses[page], page // BLOCK
    before = m.block[block, LOOKED]
    if m.rates[kind, WRITES] > 0.0 and active > before and not m.place[page] & DUE:
        draw = drawn(m, m.block[block, GUEST], page, active)
        if uniform(draw) < -math.expm1(-m.rates[kind, WRITES] * (active - before)):
            m.held[page] = written_content(m, kind, draw)
            drop_slot(m, page)


@compiled
def swap_out_page(m: Memory, page: int, now: int, pooled: bool) -> None:
    """Swap a page of its own frame out, into the slot it has or a new one: there is one; *pooled* says in what form."""
    content, bits = m.held[page], m.seen[page] & ~POOLED
    if not m.place[page] & SLOT:
        m.counts[SLOTS_USED] += 1
    m.place[page] &= ~SLOT
    leave_frame(m, page)
    m.held[page] = content
    m.seen[page] = bits | POOLED if pooled else bits
    unmap_to_swap(m, page, now)


@compiled
def swap_out_frame(m: Memory, frame: int, now: int, pooled: bool) -> None:
    """Swap a shared frame out, for all that map it, into a new slot: there is one, and room for an entry."""
    content, maps = int(m.frame[frame, CONTENT]), int(m.frame[frame, MAPS])
    bits = m.frame_lru[frame, SEEN] & ~(ACTIVE_LIST | POOLED)
    entry = new_swap_entry(m, content) if maps > 1 else 0
    m.counts[SLOTS_USED] += 1
    if maps > 1:
        m.frame_lru[entry, SEEN] = POOLED if pooled else 0
        m.frame_lru[entry, STAMP] = m.packed[m.frame_lru[frame, RING] - 1] if pooled else 0
    for _ in range(maps):
        page = m.frame_lru[frame, RING] - 1
        leave_frame(m, page)
        if maps > 1:
            m.place[page] |= SHARED
            m.held[page] = entry
            m.frame[entry, MAPS] += 1
            m.seen[page] = bits
        else:
            m.held[page] = content
            m.seen[page] = bits | POOLED if pooled else bits
        unmap_to_swap(m, page, now)


@compiled
def leave_swap(m: Memory, page: int) -> int:
    """Take a page out of swap; its slot is free if nobody else waits for it. Returns the content."""
    content = int(m.held[page])
    if m.place[page] & SHARED:
        entry = m.held[page]
        content = int(m.frame[entry, CONTENT])
        m.frame[entry, MAPS] -= 1
        if m.frame[entry, MAPS] == 0:
            m.counts[SLOTS_USED] -= 1
            if m.frame_lru[entry, SEEN] & POOLED:
                pool_remove(m, m.frame_lru[entry, STAMP])
            forget_frame(m, entry)
    else:
        m.counts[SLOTS_USED] -= 1
        if m.seen[page] & POOLED:
            pool_remove(m, m.packed[page])
    m.seen[page] &= ~(POOLED | PATCHED)
    m.place[page] &= ~(SWAPPED | SHARED)
    m.counts[SWAPPED_PAGES] -= 1
    m.guest[m.block[page // BLOCK, GUEST], OUT] -= 1
    return content


@compiled
def swap_in_page(m: Memory, page: int, now: int, ahead: bool) -> None:
    """Bring a page back from swap into a frame of its own: there is one.

    It keeps a slot of its own where slots are kept: until swap is half full, or it was read *ahead* of its use.
    """
    if m.rates[m.accesses[page], WRITES] > 0.0:
        look(m, page // BLOCK, now)
    plenty = ahead or 2 * m.counts[SLOTS_USED] <= m.counts[SWAP_SLOTS]
    keeps = m.counts[KEEPS_SLOTS] and plenty and not m.place[page] & SHARED and not m.seen[page] & POOLED
    bits = m.seen[page]
    m.held[page] = leave_swap(m, page)
    m.place[page] |= PRESENT
    m.counts[TOUCHED] += 1
    if keeps:
        m.place[page] |= SLOT
        m.counts[SLOTS_USED] += 1
    own_frame(m, page)
    m.seen[page] |= bits & WORKINGSET
    m.lru[page, STAMP] = np.int32(activity_time(m, m.block[page // BLOCK, GUEST], now) >> STAMP_SHIFT)
    m.block[page // BLOCK, DIRTY] = 1
    note_gone(m, page, -(page + 1))


@compiled
def share_slot(m: Memory, page: int, copy: int) -> None:
    """Let a second page, which maps nothing, wait for the slot of swap of the first."""
    if not m.place[page] & SHARED:
        entry = new_swap_entry(m, int(m.held[page]))
        m.frame[entry, MAPS] = 1
        m.frame_lru[entry, SEEN] = m.seen[page] & POOLED
        m.frame_lru[entry, STAMP] = m.packed[page] if m.seen[page] & POOLED else 0
        m.seen[page] &= ~POOLED
        m.place[page] |= SHARED
        m.held[page] = entry
    m.place[copy] |= SHARED | SWAPPED
    m.held[copy] = m.held[page]
    m.frame[m.held[page], MAPS] += 1
    m.seen[copy] = 0
    m.lru[copy, STAMP] = m.guest[m.block[copy // BLOCK, GUEST], AGE]
    m.counts[SWAPPED_PAGES] += 1
    m.guest[m.block[copy // BLOCK, GUEST], OUT] += 1


# --- khugepaged ------------------------------------------------------------------------------------------------------


@inlined
def may_collapse(m: Memory, block: int, max_ptes_none: int, max_ptes_shared: int, max_ptes_swap: int) -> bool:
    """Whether khugepaged takes the block: something is there, and not too much is missing, shared or swapped out.

    It takes none that was judged cold, and one that was judged hot however much of it is shared.
    """
    if m.block[block, TEMPER] == HOT:
        max_ptes_shared = BLOCK
    elif m.block[block, TEMPER] != ANY:
        return False
    none, shared, swapped = 0, 0, 0
    for page in range(block * BLOCK, block * BLOCK + BLOCK):
        place = m.place[page]
        if place & SWAPPED:
            swapped += 1
        elif not place & PRESENT or place & ZERO:
            none += 1
        elif place & SHARED and m.frame[m.held[page], MAPS] > 1:
            shared += 1
    few = none <= max_ptes_none and shared <= max_ptes_shared and swapped <= max_ptes_swap
    return bool(few and none + swapped < BLOCK)


@inlined
def collapse(m: Memory, block: int, now: int) -> None:
    """Copy what a block holds into a new huge page; what was shared is shared no more."""
    look(m, block, now)
    for page in range(block * BLOCK, block * BLOCK + BLOCK):
        content = 0
        if m.place[page] & PRESENT:
            content = content_of(m, page)
            leave_frame(m, page)
        elif m.place[page] & SWAPPED:
            content = leave_swap(m, page)
            m.counts[SWPIN_ZERO if content == 0 else PSWPIN] += 1
            note_gone(m, page, -(page + 1))
            m.place[page] |= PRESENT
            m.counts[TOUCHED] += 1
        else:
            m.place[page] |= PRESENT
            m.counts[TOUCHED] += 1
        m.held[page] = content
    own_huge(m, block)
    m.block[block, DIRTY] = 1
    m.counts[THP_COLLAPSE] += 1


@compiled
def collapse_blocks(
    m: Memory, guest: int, skip: int, most: int, max_ptes_none: int, max_ptes_shared: int, max_ptes_swap: int, now: int
) -> tuple[int, int, bool]:
    """Let khugepaged look at up to *most* blocks of a guest behind the first *skip*, while frames last.

    Returns blocks looked at, huge pages made, and whether the guest's last whole block is behind.
    """
    first = m.guest[guest, FIRST] // BLOCK
    end = first + m.guest[guest, PAGES] // BLOCK
    looked, made = 0, 0
    for block in range(first + skip, min(first + skip + most, end)):
        looked += 1
        if m.block[block, HUGE] or not may_collapse(m, block, max_ptes_none, max_ptes_shared, max_ptes_swap):
            continue
        if frames_free(m) < BLOCK:
            break
        if m.counts[LRU] and not within_limit(m, guest, BLOCK):
            continue
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
def _sift_up(m: Memory, at: int) -> None:
    while at > 0 and _before(m, at, (at - 1) // 2):
        _swap(m, at, (at - 1) // 2)
        at = (at - 1) // 2


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


@inlined
def _sift_all(m: Memory) -> None:
    for at in range(m.counts[DUE_COUNT] // 2, -1, -1):
        _sift_down(m, at)


@inlined
def _put_due(m: Memory, page: int, active: int, code: int) -> None:
    """Put an access at an activity time on the list of what is due."""
    at = m.counts[DUE_COUNT]
    m.counts[DUE_COUNT] = at + 1
    m.due[at, ACTIVE_TIME] = active
    m.due[at, TIME] = host_time(m, m.block[page // BLOCK, GUEST], active)
    m.due[at, PAGE] = code
    _sift_up(m, at)


@compiled
def plan_write(m: Memory, page: int, now: int) -> None:
    """Draw when a page that cannot be written unseen is written next, and put that on the list of what is due."""
    kind = m.accesses[page]
    if kind == 0 or m.place[page] & DUE or m.rates[kind, WRITES] <= 0.0:
        return
    guest = m.block[page // BLOCK, GUEST]
    active = activity_time(m, guest, now)
    wait = -math.log1p(-uniform(shuffled(drawn(m, guest, page, active)))) / m.rates[kind, WRITES]
    if wait > 4e18:
        return
    m.place[page] |= DUE
    _put_due(m, page, int(active + np.int64(wait) + 1), 2 * page)


@inlined
def next_in_loop(m: Memory, page: int, kind: int, active: int) -> int:
    """Activity time (ns) at which a loop comes to the page next, after *active*."""
    period, pages = np.int64(m.rates[kind, PERIOD]), np.int64(m.rates[kind, LOOP_PAGES])
    rank = page - m.guest[m.block[page // BLOCK, GUEST], FIRST] - np.int64(m.rates[kind, LOOP_FIRST])
    phase = period * rank // pages
    return int(phase + ((active - phase) // period + 1) * period)


@compiled
def plan_read(m: Memory, page: int, now: int) -> None:
    """Draw when a page that is swapped out is read next, and put that on the list of what is due."""
    kind = m.accesses[page]
    if kind == 0 or m.place[page] & DUE_READ:
        return
    guest = m.block[page // BLOCK, GUEST]
    active = activity_time(m, guest, now)
    if m.rates[kind, PERIOD] > 0.0:
        then = next_in_loop(m, page, kind, active)
    elif m.rates[kind, READS] > 0.0:
        draw = shuffled(shuffled(drawn(m, guest, page, active)))
        wait = -math.log1p(-uniform(draw)) / m.rates[kind, READS]
        if wait > 4e18:
            return
        then = int(active + np.int64(wait) + 1)
    else:
        return
    m.place[page] |= DUE_READ
    _put_due(m, page, then, 2 * page + 1)


@compiled
def tell_read(m: Memory, page: int, now: int) -> None:
    """Note that a page was read from a disk; the oldest note is lost if there is no room. Plan the next such read."""
    if not m.place[page] & (PRESENT | SWAPPED):
        return
    size = m.from_disk.size
    m.counts[DISK_TOP] = (m.counts[DISK_TOP] + 1) % size
    m.counts[DISK_KEPT] = min(m.counts[DISK_KEPT] + 1, size)
    m.from_disk[m.counts[DISK_TOP]] = page + 1
    if m.rates[m.accesses[page], FROM_DISK] != 0.0:
        plan_write(m, page, now)


@compiled
def tell_reads(m: Memory, first: int, pages: Int64, now: int) -> None:
    """Note that pages `first + pages` were read from a disk; there is room for what that plans."""
    for i in range(pages.size):
        tell_read(m, first + pages[i], now)


@inlined
def last_read(m: Memory) -> int:
    """The page that was last read from a disk of those not yet told; there is one."""
    size = m.from_disk.size
    page = m.from_disk[m.counts[DISK_TOP]] - 1
    m.counts[DISK_TOP] = (m.counts[DISK_TOP] + size - 1) % size
    m.counts[DISK_KEPT] -= 1
    return int(page)


@compiled
def next_due(m: Memory) -> int:
    """Host time (ns) before which nothing is due."""
    return int(m.due[0, TIME]) if m.counts[DUE_COUNT] > 0 else END_OF_TIME


@inlined
def due_in_time(m: Memory) -> bool:
    """Whether the first of what is due is due at its time: not if its guest has stalled since, and it moves back."""
    then = host_time(m, m.block[m.due[0, PAGE] // 2 // BLOCK, GUEST], m.due[0, ACTIVE_TIME])
    if then <= m.due[0, TIME]:
        return True
    m.due[0, TIME] = then
    _sift_down(m, 0)
    return False


@inlined
def forget_due(m: Memory) -> None:
    """Strike the first of what is due off the list; where reads from disks are told, the page's next one is planned."""
    code, then = m.due[0, PAGE], m.due[0, TIME]
    page = code // 2
    m.place[page] &= ~(DUE_READ if code & 1 else DUE)
    m.counts[DUE_COUNT] -= 1
    last = m.counts[DUE_COUNT]
    _swap(m, 0, last)
    _sift_down(m, 0)
    if code & 1 == 0 and m.from_disk.size and m.rates[m.accesses[page], FROM_DISK] != 0.0:
        tell_read(m, page, then)


@compiled
def forget_accesses(m: Memory, first: int, pages: int) -> None:
    """Strike all accesses to a range of pages off the list of what is due: their guest has ended."""
    kept = 0
    for at in range(m.counts[DUE_COUNT]):
        if first <= m.due[at, PAGE] // 2 < first + pages:
            continue
        for column in range(DUE_COLUMNS):
            m.due[kept, column] = m.due[at, column]
        kept += 1
    if kept < m.counts[DUE_COUNT]:
        m.counts[DUE_COUNT] = kept
        _sift_all(m)


@compiled
def write_due(m: Memory, now: int) -> int:
    """Perform the due writes up to now, where nothing is ever swapped out.

    Returns -1, or the page whose write found no frame (it stays due).
    """
    while m.counts[DUE_COUNT] > 0 and m.due[0, TIME] <= now:
        page = m.due[0, PAGE] // 2
        if m.place[page] & DUE and m.place[page] & PRESENT:
            draw = drawn(m, m.block[page // BLOCK, GUEST], page, m.due[0, ACTIVE_TIME])
            if write_page(m, page, written_content(m, m.accesses[page], draw)) != OK:
                return int(page)
        forget_due(m)
    return -1


@compiled
def change_activity(m: Memory, guest: int, now: int, level: float) -> None:
    """Let the guest's activity level be *level* from now on; writes already drawn move with it."""
    m.guest[guest, ACTIVE] = activity_time(m, guest, now)
    m.guest[guest, SINCE] = max(m.guest[guest, SINCE], now)
    m.level[guest] = level
    for i in range(m.counts[DUE_COUNT]):
        if m.block[m.due[i, PAGE] // 2 // BLOCK, GUEST] == guest:
            m.due[i, TIME] = host_time(m, guest, m.due[i, ACTIVE_TIME])
    _sift_all(m)


@compiled
def name_contents(m: Memory, first: int, pages: int, content: int) -> int:
    """Number contents that one page alone held from *content* on. Returns the next unused number."""
    for page in range(first, first + pages):
        own = not m.place[page] & (SHARED | ZERO) and m.place[page] & (PRESENT | SWAPPED)
        if own and m.held[page] < 0:
            m.held[page] = content
            content += 1
            m.block[page // BLOCK, DIRTY] = 1
    return content


@compiled
def fork_pages(m: Memory, parent: int, child: int, pages: int, now: int) -> None:
    """Let the child map what the parent maps; huge pages are then mapped page by page.

    The caller made sure that no content is negative and that shared frames and due writes have room.
    """
    m.guest[m.block[child // BLOCK, GUEST], ZEROS] = m.guest[m.block[parent // BLOCK, GUEST], ZEROS]
    for i in range(pages):
        page, copy = parent + i, child + i
        if page % BLOCK == 0 and m.block[page // BLOCK, HUGE]:
            part_huge(m, page // BLOCK)
        m.accesses[copy] = m.accesses[page]
        if m.packed.size:
            m.packed[copy] = m.packed[page]
        m.place[copy] = m.place[page] & ~(SHARED | DUE | DUE_READ | SLOT)
        if m.place[page] & SWAPPED:
            share_slot(m, page, copy)
            plan_read(m, copy, now)
            plan_write(m, copy, now)
        if not m.place[page] & PRESENT:
            continue
        m.counts[TOUCHED] += 1
        if m.place[page] & ZERO:
            m.counts[KSM_ZERO] += 1
        else:
            if not m.place[page] & SHARED:
                share_own_frame(m, page, int(m.held[page]), ANON, now)
                m.block[page // BLOCK, DIRTY] = 1
            map_frame(m, copy, int(m.held[page]))
        plan_write(m, page, now)
        plan_write(m, copy, now)
    for block in range(child // BLOCK, (child + pages + BLOCK - 1) // BLOCK):
        m.block[block, DIRTY] = 1
        m.block[block, LOOKED] = activity_time(m, m.block[block, GUEST], now)
