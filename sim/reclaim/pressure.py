"""Reclaim as compiled loops: who needs a frame gets one, at the cost of pages that nobody used of late.

A guest's pages lie on two lists. New pages enter the inactive one at its head; pages are taken from its tail: one that
was used since it was last looked at stays, and one that was used twice moves to the active list; the others are
swapped out. kswapd does that for all guests when free memory falls below the low watermark, until it is above the high
one; a guest that finds less than the lowest watermark, or its own limit reached, does it itself and waits meanwhile.

Whether a page was used is drawn only when somebody looks; when a swapped page is used next is drawn when it leaves.

Source: Linux 6.18 mm/vmscan.c, mm/workingset.c, mm/swap_state.c, mm/memcontrol.c and kernel/sched/psi.c for behaviour.
Guests are all that can be reclaimed: the host's own page cache is not part of the model.
"""

import math
from typing import NamedTuple

import numpy as np

from sim.memory.compiled import compiled, inlined
from sim.memory.pages import (
    ACTIVE,
    ACTIVE_LIST,
    ACTIVE_TIME,
    AGE,
    ALLOCSTALL,
    BLOCK,
    CHARGED,
    CONTENT,
    COPIES,
    COPY_WAIT_NS,
    DEFERRED,
    DIRECT_PS,
    DUE,
    DUE_COUNT,
    DUE_READ,
    END_OF_TIME,
    FIRST,
    FRAME_HIGH,
    FRESH,
    GUEST,
    HITS,
    HUGE,
    INACTIVE,
    KIND,
    KSM_SWPIN_COPY,
    KSWAPD_PS,
    LAST_READ,
    LIST_COLUMNS,
    LRU,
    MAPS,
    NEVER,
    NEXT,
    NO_FRAME,
    OK,
    OWNER,
    PAGE,
    PAGES,
    PATCHED,
    PERIOD,
    PGMAJFAULT,
    PGSCAN_DIRECT,
    PGSCAN_KSWAPD,
    PGSTEAL_DIRECT,
    PGSTEAL_KSWAPD,
    POOL,
    POOL_HAS_NO_SLOTS,
    POOLED,
    POOLED_PAGES,
    PRESENT,
    PREVIOUS,
    PSI_FULL,
    PSI_SOME,
    PSWPIN,
    PSWPOUT,
    READ_AHEAD,
    READS,
    REFAULT,
    REFAULT_ACTIVE,
    REFERENCED,
    RING,
    SEEN,
    SHARED,
    SINCE,
    SIZE,
    SLOT,
    SLOTS_USED,
    STALLED,
    STALLED_NS,
    STAMP,
    STAMP_SHIFT,
    STAYS,
    SWAP_ENTRY,
    SWAP_PS,
    SWAP_RA,
    SWAP_RA_HIT,
    SWAP_SLOTS,
    SWAPPED,
    SWPIN_CACHED,
    SWPIN_WAIT_NS,
    SWPIN_ZERO,
    SWPOUT_ZERO,
    TAIL,
    THP_SPLIT,
    THP_SWPOUT,
    TIME,
    UNPATCHED,
    VCPUS,
    WINDOW,
    WORKINGSET,
    WRITE_WAIT_NS,
    WRITEBACK,
    WRITES,
    YOUNG,
    ZERO,
    ZSWPIN,
    ZSWPOUT,
    ZSWPWB,
    Float64,
    Int32,
    Int64,
    Memory,
    activity_time,
    age_of,
    bits_of,
    charge,
    copies_on_write,
    drawn,
    due_in_time,
    find_frames,
    forget_due,
    frames_free,
    fresh_content,
    look,
    look_at,
    may_be_huge,
    next_due,
    next_in_loop,
    part_huge,
    pool_add,
    pool_growth,
    pool_remove,
    put,
    set_bits,
    shuffled,
    split_torn,
    swap_in_page,
    swap_out_frame,
    swap_out_page,
    take,
    uniform,
    weight,
    within_limit,
    write_page,
    written_content,
)

ZIP, UNZIP = range(2)
"""Columns of Pressure.zip_ns."""

BATCH = 32
"""Pages that a guest wants when it reclaims (SWAP_CLUSTER_MAX)."""
FIRST_PRIORITY = 12
"""Priority p looks at the 2^-p part of a list (DEF_PRIORITY)."""
TRIES = 16
"""How often reclaim is tried in vain before a guest is killed (MAX_RECLAIM_RETRIES); what brings a frame is not."""
MOST_AT_ONCE = 1024
"""Most pages that kswapd looks at before something else may happen."""
ROOM = 8192
"""Shared frames and due accesses that one step may need."""
MOST_MAPPERS = 1024
"""A shared frame that more pages map stays in memory."""

# Indexes into Pressure.n: the watermarks, in pages, and settings, ...
W_MIN, W_LOW, W_HIGH, SWAPPINESS, PAGE_CLUSTER = range(5)
# ... CPU time (ns) of looking at a page, and of a page's way in and out without compression and device, ...
LOOK_NS, IN_NS, OUT_NS = range(5, 8)
# ... the device: latencies, time for a page at full bandwidth (ns), whether it waits for nothing but CPU time, ...
READ_NS, WRITE_NS, PAGE_NS, SYNCHRONOUS, PIPE, BACK_FIRST, BACK_COUNT = range(8, 15)
# ... kswapd: whether it is awake, when it goes on, its priority, the guest it is at, what this round over all guests
# and what it in all has done, and how often in vain, ...
AWAKE, GOES_ON, PRIORITY, AT_GUEST, ROUND_SCANNED, ROUND_STOLEN, STOLEN, FAILURES = range(15, 23)
# ... zswap: the largest pool and what it must come down to before it takes pages again (pages; 0: no zswap), whether it
# refuses them now, and the ring of what it has; and of the device: the host time (ns) at which the page that was given
# to it last will be written, the CPU time of giving it one, the host time up to which writes have ended, and the CPU
# time of taking a page from its guest that it still has, ...
POOL_MOST, POOL_AGAIN, POOL_FULL, OLDEST, QUEUED, WRITTEN, SUBMIT_NS, ENDED, DROP_NS = range(28, 37)
# ... what a page costs that is kept as the difference from another (ns), ...
PATCH_IN_NS = 37
# ... how many pages each page stands for, and by that BATCH and MOST_AT_ONCE, ...
SCALE, CLUSTER, STEP = range(38, 41)
# ... CPU time (ns) of splitting a huge page, ...
SPLIT_NS = 41
# ... and the access under way: how long it waits, how much of that is pressure, who reclaims next; and the host time
# (ns) up to which pressure is counted, and until which somebody is known to wait.
WAIT, PRESSURE_NS, DIRECT_GUEST, COUNTED, SOME_UNTIL = range(23, 28)
NUMBERS = 42


class Pressure(NamedTuple):
    """State of reclaim on one host."""

    n: Int64  # (NUMBERS,)
    channel: Int64  # (channels,) host time (ns) at which a channel of the device is free
    back: Int64  # (writes, 2) ring of writes under way: when done (ns), and frames that are then free
    queue: Int32  # (entries,) ring of what zswap has, the oldest first: page + 1, or -(swap entry + 1)
    zip_ns: Int64  # (256, 2) CPU time (ns) of compressing a page, and of decompressing it, by `Memory.packed`
    load: Float64  # (guests,) share of time for which a guest runs when it does not wait, 0 once it ended
    until: Int64  # (guests,) host time (ns) until which a guest waits for memory


# --- the device ------------------------------------------------------------------------------------------------------


@compiled
def submit(r: Pressure, now: int, latency: int) -> int:
    """Let the device read or write a page. Returns when it is done (ns)."""
    first = 0
    for channel in range(1, r.channel.size):
        if r.channel[channel] < r.channel[first]:
            first = channel
    r.n[PIPE] = max(r.n[PIPE], now) + r.n[PAGE_NS]
    r.channel[first] = max(max(r.channel[first], now) + latency, r.n[PIPE])
    return int(r.channel[first])


@compiled
def end_writes(m: Memory, r: Pressure, now: int) -> None:
    """Free the frames whose pages have been written by now."""
    r.n[ENDED] = max(r.n[ENDED], now)
    while r.n[BACK_COUNT] > 0 and r.back[r.n[BACK_FIRST], 0] <= now:
        m.counts[WRITEBACK] -= r.back[r.n[BACK_FIRST], 1]
        r.n[BACK_FIRST] = (r.n[BACK_FIRST] + 1) % r.back.shape[0]
        r.n[BACK_COUNT] -= 1


@compiled
def write_to_device(m: Memory, r: Pressure, now: int) -> None:
    """Write a page to the swap device: its frame is free when that is done.

    Pages lie in swap in the order in which they leave, so one that comes while another is written goes with it.
    """
    m.counts[PSWPOUT] += 1
    done = submit(r, now, r.n[WRITE_NS] if r.n[WRITTEN] <= now else 0)
    r.n[WRITTEN] = done
    m.counts[WRITEBACK] += 1
    last = (r.n[BACK_FIRST] + r.n[BACK_COUNT] - 1) % r.back.shape[0]
    if r.n[BACK_COUNT] == r.back.shape[0] or (r.n[BACK_COUNT] > 0 and r.back[last, 0] >= done):
        r.back[last, 0] = max(r.back[last, 0], done)
        r.back[last, 1] += 1
        return
    last = (last + 1) % r.back.shape[0]
    r.back[last, 0] = done
    r.back[last, 1] = 1
    r.n[BACK_COUNT] += 1


@inlined
def note_write(m: Memory, page: int, done: int) -> None:
    """Remember until when (ns) a swapped page is being written, where its list had its links; 0 for not at all."""
    m.lru[page, NEXT] = done >> 31
    m.lru[page, PREVIOUS] = done & 0x7FFFFFFF


@inlined
def written_until(m: Memory, page: int) -> int:
    """Host time (ns) until which a swapped page is being written."""
    return int(np.int64(m.lru[page, NEXT]) << 31 | np.int64(m.lru[page, PREVIOUS]))


@inlined
def still_written(m: Memory, r: Pressure, page: int, now: int) -> bool:
    """Whether a swapped page of a frame of its own is on its way to the device, its frame not yet free."""
    return not m.place[page] & SHARED and written_until(m, page) > max(now, r.n[ENDED])


@compiled
def keep_frame(m: Memory, r: Pressure, done: int) -> None:
    """A page whose write ends then is mapped again meanwhile: its frame will not be free."""
    first, last = 0, r.n[BACK_COUNT] - 1
    while first < last:
        middle = (first + last) // 2
        if r.back[(r.n[BACK_FIRST] + middle) % r.back.shape[0], 0] < done:
            first = middle + 1
        else:
            last = middle
    r.back[(r.n[BACK_FIRST] + first) % r.back.shape[0], 1] -= 1
    m.counts[WRITEBACK] -= 1


@compiled
def write_oldest_back(m: Memory, r: Pressure, now: int) -> None:
    """Let zswap write what it has had for longest to the device, until it takes pages again or a batch is done.

    Each page needs a frame on its way, from the last reserve.
    """
    left = r.n[CLUSTER]
    while left > 0 and r.n[QUEUED] > 0 and m.counts[POOL] > r.n[POOL_AGAIN] and frames_free(m) > r.n[W_MIN] // 2:
        entry = r.queue[r.n[OLDEST]]
        r.n[OLDEST] = (r.n[OLDEST] + 1) % r.queue.size
        r.n[QUEUED] -= 1
        packed, page = -1, -1
        if entry > 0 and m.place[entry - 1] & (SWAPPED | SHARED) == SWAPPED and m.seen[entry - 1] & POOLED:
            m.seen[entry - 1] &= ~POOLED
            packed, page = int(m.packed[entry - 1]), entry - 1
        elif entry < 0 and m.frame[-entry - 1, KIND] == SWAP_ENTRY and m.frame_lru[-entry - 1, SEEN] & POOLED:
            m.frame_lru[-entry - 1, SEEN] &= ~POOLED
            packed = int(m.frame_lru[-entry - 1, STAMP])
        if packed >= 0:
            pool_remove(m, packed)
            write_to_device(m, r, now)
            if page >= 0:
                note_write(m, page, r.n[WRITTEN])
            m.counts[ZSWPWB] += 1
            left -= 1


@compiled
def is_full(pool_pages: int, was_full: bool, most: int, again: int) -> bool:
    """Whether the pool refuses pages and writes back, asked before each page that would go to it."""
    return pool_pages >= most or (was_full and pool_pages > again)


@compiled
def write_out(m: Memory, r: Pressure, page: int, now: int) -> bool:
    """Write the content of a page that will be swapped out. Returns whether it is now compressed in memory."""
    if r.n[SYNCHRONOUS]:
        m.counts[PSWPOUT] += 1
        r.n[WAIT] += r.zip_ns[m.packed[page], ZIP]
        pool_add(m, m.packed[page])
        return True
    if r.n[POOL_MOST]:
        r.n[POOL_FULL] = is_full(m.counts[POOL], r.n[POOL_FULL] != 0, r.n[POOL_MOST], r.n[POOL_AGAIN])
        if not r.n[POOL_FULL] and pool_growth(m, m.packed[page]) <= frames_free(m):
            m.counts[ZSWPOUT] += 1
            r.n[WAIT] += r.zip_ns[m.packed[page], ZIP]
            pool_add(m, m.packed[page])
            return True
        write_oldest_back(m, r, now)
    r.n[WAIT] += r.n[SUBMIT_NS]
    write_to_device(m, r, now)
    return False


@inlined
def queue_up(r: Pressure, entry: int) -> None:
    """Remember what came to zswap last; where the ring is full the oldest is forgotten and stays in the pool."""
    if r.n[POOL_MOST] == 0:
        return
    if r.n[QUEUED] == r.queue.size:
        r.n[OLDEST] = (r.n[OLDEST] + 1) % r.queue.size
        r.n[QUEUED] -= 1
    r.queue[(r.n[OLDEST] + r.n[QUEUED]) % r.queue.size] = entry
    r.n[QUEUED] += 1


# --- what was used ---------------------------------------------------------------------------------------------------


@compiled
def rate_unseen(m: Memory, page: int) -> float:
    """Accesses per ns of activity time to a page, without those whose time is known already."""
    kind, place = m.accesses[page], m.place[page]
    rate = 0.0
    if not place & DUE:
        rate += m.rates[kind, WRITES]
    if not place & DUE_READ:
        rate += m.rates[kind, READS]
    return rate


@compiled
def passed_by_loop(m: Memory, page: int, before: int, active: int) -> bool:
    """Whether a loop came to the page between two activity times (ns)."""
    kind = m.accesses[page]
    if m.rates[kind, PERIOD] <= 0.0 or m.place[page] & DUE_READ:
        return False
    return next_in_loop(m, page, kind, before) <= active


@inlined
def use_draw(draw: np.uint64) -> np.uint64:
    """The random bits that say whether a page was used, from those that belong to it."""
    return shuffled(shuffled(shuffled(draw)))


@compiled
def happened(m: Memory, page: int, rate: float, since: int, active: int) -> bool:
    """Whether something that happens at a rate (per ns) did since an activity time (ns); drawn for the page."""
    if rate <= 0.0 or since >= active:
        return False
    draw = use_draw(drawn(m, m.block[page // BLOCK, GUEST], page, active))
    return bool(uniform(draw) < -math.expm1(-rate * (active - since)))


@compiled
def mapper_used(m: Memory, page: int, stamp: int, now: int) -> bool:
    """Whether one of the mappers of a shared frame used it since a stamp of host time."""
    guest = m.block[page // BLOCK, GUEST]
    active = activity_time(m, guest, now)
    before = int(active - np.int64(age_of(stamp, now) * m.level[guest]))
    return happened(m, page, rate_unseen(m, page), before, active) or passed_by_loop(m, page, before, active)


@compiled
def page_used(m: Memory, page: int, now: int) -> bool:
    """Whether a page of its own frame was used since it was last looked at, or since the huge page was."""
    active = activity_time(m, m.block[page // BLOCK, GUEST], now)
    before = active - age_of(m.lru[page, STAMP], active)
    if not m.block[page // BLOCK, HUGE]:
        used = happened(m, page, rate_unseen(m, page), before, active) or passed_by_loop(m, page, before, active)
    else:
        rate = 0.0
        for each in range(page, page + BLOCK):
            rate += rate_unseen(m, each)
        used = happened(m, page, rate, before, active)
        used = used or passed_by_loop(m, page, before, active)
        used = used or passed_by_loop(m, page + BLOCK - 1, before, active)
    m.lru[page, STAMP] = active >> STAMP_SHIFT
    return bool(used)


@compiled
def uses(m: Memory, entry: int, now: int) -> int:
    """How many of those who map what an entry stands for used it since it was last looked at; 2 means several."""
    bits = bits_of(m, entry)
    set_bits(m, entry, bits & ~YOUNG)
    if entry > 0:
        used = page_used(m, entry - 1, now)
        return 1 if used or bits & YOUNG else 0
    frame = -entry - 1
    count = 1 if bits & YOUNG else 0
    page = m.frame_lru[frame, RING] - 1
    for _ in range(m.frame[frame, MAPS]):
        if count > 1:
            break
        if mapper_used(m, page, m.frame_lru[frame, STAMP], now):
            count += 1
        page = m.lru[page, NEXT] - 1
    m.frame_lru[frame, STAMP] = np.int32(now >> STAMP_SHIFT)
    return count


# --- the lists -------------------------------------------------------------------------------------------------------


@inlined
def slots_left(m: Memory) -> int:
    """Slots of swap that nobody uses."""
    without = m.counts[POOLED_PAGES] if m.counts[POOL_HAS_NO_SLOTS] else 0
    return int(m.counts[SWAP_SLOTS] - m.counts[SLOTS_USED] + without)


@inlined
def has_room(m: Memory, places: int) -> bool:
    """Whether so many due accesses and one shared frame more fit into the arrays."""
    return bool(m.counts[DUE_COUNT] + places <= m.due.shape[0] and m.counts[FRAME_HIGH] + 2 <= m.frame.shape[0])


@compiled
def evict_page(m: Memory, r: Pressure, page: int, now: int) -> None:
    """Swap a page of its own frame out, and write it unless swap has it."""
    active = activity_time(m, m.block[page // BLOCK, GUEST], now)
    look_at(m, page, active - age_of(m.lru[page, STAMP], active))
    r.n[WAIT] += r.n[DROP_NS] if m.place[page] & SLOT else r.n[OUT_NS]
    pooled, done = False, 0
    if m.held[page] == 0:
        m.counts[SWPOUT_ZERO] += not m.place[page] & SLOT
    elif not m.place[page] & SLOT:
        pooled = write_out(m, r, page, now)
        done = 0 if pooled else r.n[WRITTEN]
    swap_out_page(m, page, now, pooled)
    note_write(m, page, done)
    if pooled:
        queue_up(r, page + 1)


@compiled
def evict_huge(m: Memory, r: Pressure, block: int, now: int) -> None:
    """Swap a huge page out as a whole; its pages come back one by one."""
    look(m, block, now)
    part_huge(m, block)
    m.counts[THP_SWPOUT] += 1
    zeros = True
    for page in range(block * BLOCK, block * BLOCK + BLOCK):
        zeros = zeros and m.held[page] == 0
    for page in range(block * BLOCK, block * BLOCK + BLOCK):
        pooled, done = False, 0
        if zeros:
            m.counts[SWPOUT_ZERO] += 1
        else:
            pooled = write_out(m, r, page, now)
            done = 0 if pooled else r.n[WRITTEN]
        swap_out_page(m, page, now, pooled)
        note_write(m, page, done)
        if pooled:
            queue_up(r, page + 1)


@compiled
def evict_frame(m: Memory, r: Pressure, frame: int, now: int) -> None:
    """Swap a shared frame out for all that map it."""
    pooled = False
    page = m.frame_lru[frame, RING] - 1
    if m.frame[frame, CONTENT] == 0:
        m.counts[SWPOUT_ZERO] += 1
    else:
        pooled = write_out(m, r, page, now)
    swap_out_frame(m, frame, now, pooled)
    if pooled:
        queue_up(r, -(m.held[page] + 1) if m.place[page] & SHARED else page + 1)


@inlined
def fits_in_zram(m: Memory, r: Pressure, page: int) -> bool:
    """Whether zram, if there is one, finds the memory for one more page: that page's own comes free only after it."""
    return bool(not r.n[SYNCHRONOUS] or pool_growth(m, m.packed[page]) <= frames_free(m))


@compiled
def evict(m: Memory, r: Pressure, entry: int, now: int) -> bool:
    """Take an entry's frames from its guest, if swap and the arrays have room. Returns whether it did."""
    if entry < 0:
        maps = m.frame[-entry - 1, MAPS]
        stays = maps > MOST_MAPPERS or slots_left(m) < 1 or not fits_in_zram(m, r, m.frame_lru[-entry - 1, RING] - 1)
        if stays or not has_room(m, 2 * maps):
            return False
        r.n[WAIT] += r.n[OUT_NS] + (maps - 1) * r.n[LOOK_NS]
        evict_frame(m, r, -entry - 1, now)
        return True
    page = entry - 1
    if m.block[page // BLOCK, HUGE]:
        if not has_room(m, 2 * BLOCK):
            return False
        if slots_left(m) < BLOCK or (r.n[SYNCHRONOUS] and frames_free(m) < BLOCK):
            part_huge(m, page // BLOCK)
            m.counts[THP_SPLIT] += 1
            return False
        r.n[WAIT] += BLOCK * r.n[OUT_NS]
        evict_huge(m, r, page // BLOCK, now)
        return True
    if (slots_left(m) < 1 and not m.place[page] & SLOT) or not has_room(m, 2) or not fits_in_zram(m, r, page):
        return False
    evict_page(m, r, page, now)
    return True


@inlined
def inactive_is_low(m: Memory, r: Pressure, guest: int) -> bool:
    """Whether pages of the active list are due to become inactive."""
    inactive, active = m.guest[guest, INACTIVE + SIZE], m.guest[guest, INACTIVE + LIST_COLUMNS + SIZE]
    gigabytes = (inactive + active) * r.n[SCALE] >> 18
    ratio = np.int64(math.sqrt(10.0 * gigabytes)) if gigabytes else 1
    return bool(inactive * ratio < active)


@compiled
def deactivate(m: Memory, r: Pressure, guest: int, pages: int, now: int) -> None:
    """Move so many pages from the tail of a guest's active list to the head of its inactive one."""
    while pages > 0:
        entry = m.guest[guest, INACTIVE + LIST_COLUMNS + TAIL]
        if entry == 0:
            return
        pages -= weight(m, entry)
        r.n[WAIT] += r.n[LOOK_NS]
        uses(m, entry, now)
        take(m, guest, entry)
        put(m, guest, entry, False)
        set_bits(m, entry, bits_of(m, entry) | WORKINGSET)


@compiled
def shrink_inactive(m: Memory, r: Pressure, guest: int, pages: int, now: int) -> int:
    """Look at so many pages at the tail of a guest's inactive list. Returns how many frames it lost."""
    stolen, looked = 0, 0
    while looked < pages:
        entry = m.guest[guest, INACTIVE + TAIL]
        if entry == 0:
            break
        size = weight(m, entry)
        looked += size
        r.n[WAIT] += r.n[LOOK_NS]
        used = uses(m, entry, now)
        bits = bits_of(m, entry)
        if used == 0:
            if evict(m, r, entry, now):
                stolen += size
                m.guest[guest, AGE] += size
                continue
            entry = m.guest[guest, INACTIVE + TAIL]  # what could not be evicted may have been split
            size = weight(m, entry)
        take(m, guest, entry)
        if used == 1 and not bits & REFERENCED:
            set_bits(m, entry, bits | REFERENCED)
            put(m, guest, entry, False)
        else:
            set_bits(m, entry, bits & ~REFERENCED)
            put(m, guest, entry, True)
            m.guest[guest, AGE] += size
    r.n[ROUND_SCANNED] += looked
    return stolen


@compiled
def shrink_guest(m: Memory, r: Pressure, guest: int, priority: int, wanted: int, most: int, now: int) -> int:
    """Look at a guest's lists as a priority says, at most so many pages of each, until it lost what is wanted.

    Returns how many frames it lost.
    """
    stolen = 0
    if m.guest[guest, STAYS]:
        return 0
    inactive = min(m.guest[guest, INACTIVE + SIZE] >> priority, most)
    low = inactive_is_low(m, r, guest)
    active = min(m.guest[guest, INACTIVE + LIST_COLUMNS + SIZE] >> priority, most) if low else 0
    while (inactive > 0 or active > 0) and stolen < wanted:
        if active > 0:
            deactivate(m, r, guest, min(active, r.n[CLUSTER]), now)
            active -= r.n[CLUSTER]
        if inactive > 0:
            stolen += shrink_inactive(m, r, guest, min(inactive, r.n[CLUSTER]), now)
            inactive -= r.n[CLUSTER]
    if inactive_is_low(m, r, guest):
        deactivate(m, r, guest, r.n[CLUSTER], now)
    return stolen


# --- who reclaims ----------------------------------------------------------------------------------------------------


@inlined
def can_swap(m: Memory) -> bool:
    """Whether there is anywhere to go."""
    return slots_left(m) > 0


@compiled
def reclaim_from(m: Memory, r: Pressure, guest: int, wanted: int, now: int) -> int:
    """Let a guest reclaim its own pages. Returns frames."""
    stolen = 0
    priority = FIRST_PRIORITY
    while priority >= 0 and stolen < wanted:
        stolen += shrink_guest(m, r, guest, priority, wanted - stolen, END_OF_TIME, now)
        priority -= 1
    return stolen


@compiled
def reclaim_from_all(m: Memory, r: Pressure, wanted: int, now: int) -> int:
    """Let a guest reclaim from one guest after the other. Returns frames."""
    stolen = 0
    guests = m.guest.shape[0]
    priority = FIRST_PRIORITY
    while priority >= 0 and stolen < wanted:
        for _ in range(guests):
            guest = r.n[DIRECT_GUEST] % guests
            r.n[DIRECT_GUEST] = guest + 1
            stolen += shrink_guest(m, r, guest, priority, wanted - stolen, END_OF_TIME, now)
            if stolen >= wanted:
                break
        priority -= 1
    return stolen


@compiled
def split_first(m: Memory, r: Pressure, first: int, guests: int, wanted: int) -> int:
    """Split huge pages given back in part, of one of these guests after the other, before anything is swapped for them.

    Returns frames that this freed: what is wanted, or more, or all there are.
    """
    before, guest = m.counts[DEFERRED], first
    while guest < first + guests and before - m.counts[DEFERRED] < wanted:
        r.n[WAIT] += split_torn(m, guest) * r.n[SPLIT_NS]
        guest += 1
    return int(before - m.counts[DEFERRED])


@inlined
def count_direct(m: Memory, r: Pressure, before: int, stolen: int, waited: int) -> None:
    """Book what a guest reclaimed itself: pages looked at since *before*, and its waiting since *waited*."""
    m.counts[PGSCAN_DIRECT] += r.n[ROUND_SCANNED] - before
    r.n[ROUND_SCANNED] = before
    m.counts[PGSTEAL_DIRECT] += stolen
    m.counts[DIRECT_PS] += (r.n[WAIT] - waited) * 1000
    r.n[PRESSURE_NS] += r.n[WAIT] - waited


@compiled
def make_room(m: Memory, r: Pressure, guest: int, frames: int, tries: int, now: int) -> bool:
    """Let a guest have so many frames more, in its limit and on the host. Returns whether it may."""
    if not m.counts[LRU]:
        return find_frames(m, frames)
    wanted = max(frames, r.n[CLUSTER])
    failures = 0
    while failures < tries and not within_limit(m, guest, frames):
        before, waited = r.n[ROUND_SCANNED], r.n[WAIT]
        freed, stolen = split_first(m, r, guest, 1, wanted), 0
        if freed == 0 and r.n[SWAPPINESS] > 0 and can_swap(m):
            stolen = reclaim_from(m, r, guest, wanted, now + waited)
        count_direct(m, r, before, stolen, waited)
        failures += freed == 0 and (stolen == 0 or frames > 1)
    if not within_limit(m, guest, frames):
        return False
    end_writes(m, r, now + r.n[WAIT])
    if frames_free(m) - frames < r.n[W_LOW] and not r.n[AWAKE] and r.n[FAILURES] < TRIES:
        r.n[AWAKE] = 1
        r.n[GOES_ON] = now + r.n[WAIT]
        r.n[PRIORITY] = FIRST_PRIORITY
        r.n[AT_GUEST] = r.n[ROUND_SCANNED] = r.n[ROUND_STOLEN] = r.n[STOLEN] = 0
    if frames_free(m) - frames >= r.n[W_MIN]:
        return True
    m.counts[ALLOCSTALL] += 1
    failures = 0
    while failures < tries and frames_free(m) - frames < r.n[W_MIN]:
        before, waited = r.n[ROUND_SCANNED], r.n[WAIT]
        freed, stolen = split_first(m, r, 0, m.guest.shape[0], wanted), 0
        if freed == 0 and can_swap(m):
            stolen = reclaim_from_all(m, r, wanted, now + waited)
        count_direct(m, r, before, stolen, waited)
        if r.n[BACK_COUNT] > 0 and frames_free(m) - frames < r.n[W_MIN]:
            waits = max(r.back[r.n[BACK_FIRST], 0] - now - r.n[WAIT], 0)
            r.n[WAIT] += waits
            r.n[PRESSURE_NS] += waits
            end_writes(m, r, now + r.n[WAIT])
            stolen += 1
        # What brings frames goes on for long, as reclaim does that nothing else can take the place of.
        failures += freed == 0 and (stolen == 0 or frames > 1 or frames_free(m) < frames)
        if freed or stolen:
            r.n[FAILURES] = 0
    return bool(frames_free(m) >= frames)


@compiled
def run_kswapd(m: Memory, r: Pressure) -> None:
    """Let kswapd take one step."""
    n = r.n
    now = n[GOES_ON]
    end_writes(m, r, now)
    free = frames_free(m)
    if free >= n[W_HIGH]:
        n[AWAKE] = 0
        n[FAILURES] = 0
        return
    if free + m.counts[WRITEBACK] >= n[W_HIGH]:
        n[GOES_ON] = r.back[n[BACK_FIRST], 0]
        return
    while n[AT_GUEST] < m.guest.shape[0] and m.guest[n[AT_GUEST], CHARGED] == 0:
        n[AT_GUEST] += 1
    if n[AT_GUEST] == m.guest.shape[0]:
        end_round(m, r, now)
        return
    before, n[WAIT] = n[WAIT], 0
    scanned = n[ROUND_SCANNED]
    freed, stolen = split_first(m, r, 0, m.guest.shape[0], n[W_HIGH] - free), 0
    if freed == 0 and can_swap(m):
        stolen = shrink_guest(m, r, n[AT_GUEST], n[PRIORITY], END_OF_TIME, n[STEP], now)
    m.counts[PGSCAN_KSWAPD] += n[ROUND_SCANNED] - scanned
    m.counts[PGSTEAL_KSWAPD] += stolen
    m.counts[KSWAPD_PS] += n[WAIT] * 1000
    n[GOES_ON] = now + n[WAIT] + 1
    n[WAIT] = before
    n[ROUND_STOLEN] += freed + stolen
    n[AT_GUEST] += freed == 0


@compiled
def end_round(m: Memory, r: Pressure, now: int) -> None:
    """kswapd has been through all guests: it looks harder then, and gives up if that is in vain too often."""
    n = r.n
    n[STOLEN] += n[ROUND_STOLEN]
    if n[ROUND_SCANNED] < n[W_HIGH] or n[ROUND_STOLEN] == 0:
        n[PRIORITY] -= 1
    n[AT_GUEST] = n[ROUND_SCANNED] = n[ROUND_STOLEN] = 0
    n[GOES_ON] = now + 1
    if n[PRIORITY] < 1:
        n[FAILURES] = 0 if n[STOLEN] else n[FAILURES] + 1
        n[AWAKE] = n[FAILURES] < TRIES
        n[PRIORITY] = FIRST_PRIORITY
        n[STOLEN] = 0


# --- waiting ---------------------------------------------------------------------------------------------------------


@compiled
def stall(m: Memory, r: Pressure, guest: int, now: int) -> None:
    """Let the guest wait for what its access took, and forget that; of several processors one waits."""
    wait, pressure = r.n[WAIT], r.n[PRESSURE_NS]
    r.n[WAIT] = r.n[PRESSURE_NS] = 0
    if wait > 0:
        m.guest[guest, ACTIVE] = activity_time(m, guest, now)
        m.guest[guest, SINCE] = max(m.guest[guest, SINCE], now) + wait // m.guest[guest, VCPUS]
        m.guest[guest, STALLED] += wait
        m.counts[STALLED_NS] += wait
    if pressure > 0:
        some, full = pressure_since(m, r, now)
        m.counts[PSI_SOME] += some
        m.counts[PSI_FULL] += full
        r.n[COUNTED] = max(r.n[COUNTED], now)
        r.until[guest] = max(r.until[guest], now + pressure)
        r.n[SOME_UNTIL] = max(r.n[SOME_UNTIL], now + pressure)


@compiled
def pressure_since(m: Memory, r: Pressure, now: int) -> tuple[int, int]:
    """For how long (ns) somebody waited, and nobody ran for that, from when it was last counted until *now*."""
    at, end = int(r.n[COUNTED]), int(min(now, r.n[SOME_UNTIL]))
    some, full = max(end - at, 0), 0
    while at < end:
        following = end
        nobody = 1.0
        for guest in range(r.load.size):
            idle = 1.0 - r.load[guest]
            if r.until[guest] > at:
                following = min(following, r.until[guest])
                idle = idle ** (1.0 - 1.0 / m.guest[guest, VCPUS])
            nobody *= idle
        full += int((following - at) * nobody)
        at = following
    return some, full


# --- accesses --------------------------------------------------------------------------------------------------------


@compiled
def readahead(m: Memory, r: Pressure, guest: int, page: int) -> tuple[int, int]:
    """First page and number of pages to read from swap when this one is needed, by how that went of late."""
    most = 1 << r.n[PAGE_CLUSTER]
    last, hits, before = m.guest[guest, LAST_READ], m.guest[guest, HITS], m.guest[guest, WINDOW]
    pages = hits + 2
    if pages == 2:
        pages = 2 if abs(page - last) == 1 else 1
    else:
        rounded = 4
        while rounded < pages:
            rounded *= 2
        pages = rounded
    pages = max(min(pages, most), before // 2, 1) if most > 1 else 1
    m.guest[guest, LAST_READ], m.guest[guest, HITS], m.guest[guest, WINDOW] = page, 0, pages
    if page == last - 1:
        return page - pages + 1, pages
    if page == last + 1:
        return page, pages
    return page - (pages - 1) // 2, pages


@compiled
def come_back(m: Memory, page: int, now: int, ahead: bool) -> None:
    """Bring a page back, to the list that the distance from its eviction says."""
    guest = m.block[page // BLOCK, GUEST]
    distance = (m.guest[guest, AGE] - np.int64(m.lru[page, STAMP])) & 0xFFFFFFFF
    m.counts[REFAULT] += 1
    recent = distance <= m.guest[guest, INACTIVE + LIST_COLUMNS + SIZE]
    swap_in_page(m, page, now, ahead)
    if recent:
        m.counts[REFAULT_ACTIVE] += 1
        m.guest[guest, AGE] += 1
        take(m, guest, page + 1)
        put(m, guest, page + 1, True)
    if ahead:
        set_bits(m, page + 1, (bits_of(m, page + 1) & ~YOUNG) | READ_AHEAD)


@compiled
def read_ahead(m: Memory, r: Pressure, page: int, first: int, pages: int, now: int) -> None:
    """Read the swapped pages around one that is needed with it."""
    guest = m.block[page // BLOCK, GUEST]
    start = max(first, m.guest[guest, FIRST])
    end = min(first + pages, m.guest[guest, FIRST] + m.guest[guest, PAGES])
    for other in range(start, end):
        wanted = other != page and m.place[other] & (SWAPPED | SHARED) == SWAPPED and m.held[other] != 0
        wanted = wanted and not m.seen[other] & POOLED and not still_written(m, r, other, now)
        if wanted and make_room(m, r, guest, 1, 1, now) and m.place[other] & SWAPPED:
            m.counts[PSWPIN] += 1
            m.counts[SWAP_RA] += 1
            r.n[PIPE] = max(r.n[PIPE], now) + r.n[PAGE_NS]
            come_back(m, other, now, True)


@inlined
def in_swap_cache(m: Memory, page: int) -> bool:
    """Whether somebody who waited for the same slot has read it already, so that its content can be copied.

    Source: ksm_might_need_to_copy(); what was read is taken to stay in memory until the last one has come for it.
    """
    if not m.place[page] & SHARED:
        return False
    entry = m.held[page]
    read = m.frame_lru[entry, SEEN] & YOUNG != 0
    m.frame_lru[entry, SEEN] |= YOUNG
    return bool(read)


@inlined
def in_pool(m: Memory, page: int) -> bool:
    """Whether a swapped page is compressed in memory."""
    bits = m.frame_lru[m.held[page], SEEN] if m.place[page] & SHARED else m.seen[page]
    return bool(bits & POOLED)


@compiled
def fault_in(m: Memory, r: Pressure, page: int, now: int) -> bool:
    """Read a swapped page, for a guest that waits. Returns False if there is no frame for it."""
    guest = m.block[page // BLOCK, GUEST]
    if not make_room(m, r, guest, 1, TRIES, now):
        return False
    began = r.n[WAIT]
    if still_written(m, r, page, now + began):
        keep_frame(m, r, written_until(m, page))
        m.counts[SWPIN_CACHED] += 1
        m.counts[SWAP_PS] += 1000 * r.n[IN_NS]
        r.n[WAIT] += r.n[IN_NS]
        swap_in_page(m, page, now, False)
        return True
    m.counts[PGMAJFAULT] += 1
    first, pages = page, 1
    if in_swap_cache(m, page):
        m.counts[KSM_SWPIN_COPY] += 1
    elif (m.frame[m.held[page], CONTENT] if m.place[page] & SHARED else m.held[page]) == 0:
        m.counts[SWPIN_ZERO] += 1
    elif in_pool(m, page):
        patched = m.seen[page] & PATCHED != 0
        packed = m.frame_lru[m.held[page], STAMP] if m.place[page] & SHARED else m.packed[page]
        spent = r.n[PATCH_IN_NS] if patched else r.n[IN_NS] + r.zip_ns[packed, UNZIP]
        m.counts[PSWPIN if r.n[SYNCHRONOUS] else ZSWPIN] += 1
        m.counts[UNPATCHED] += patched
        m.counts[SWAP_PS] += 1000 * spent
        r.n[WAIT] += spent
    else:
        m.counts[PSWPIN] += 1
        m.counts[SWAP_PS] += 1000 * r.n[IN_NS]
        r.n[WAIT] += r.n[IN_NS]
        first, pages = readahead(m, r, guest, page)
        r.n[WAIT] = submit(r, now + r.n[WAIT], r.n[READ_NS]) - now
    m.counts[SWPIN_WAIT_NS] += r.n[WAIT] - began
    if m.seen[page] & WORKINGSET:
        r.n[PRESSURE_NS] += r.n[WAIT] - began
    come_back(m, page, now, False)
    if pages > 1:
        active = bits_of(m, page + 1) & ACTIVE_LIST != 0
        take(m, guest, page + 1)  # who waits for it holds on to it
        read_ahead(m, r, page, first, pages, now)
        put(m, guest, page + 1, active)
    return True


@compiled
def note_use(m: Memory, page: int) -> None:
    """Remember that a page is used at this moment, for whoever looks at its list next."""
    entry = page + 1
    if m.place[page] & ZERO:
        return
    if m.place[page] & SHARED:
        entry = -(m.held[page] + 1)
    elif m.block[page // BLOCK, HUGE]:
        entry = page // BLOCK * BLOCK + 1
    bits = bits_of(m, entry)
    if bits & READ_AHEAD:
        m.counts[SWAP_RA_HIT] += 1
        m.guest[m.block[page // BLOCK, GUEST], HITS] += 1
    set_bits(m, entry, (bits & ~READ_AHEAD) | YOUNG)


@compiled
def bring_in(m: Memory, r: Pressure, page: int, now: int) -> bool:
    """Let an access find a swapped page in memory. Returns False if there is no frame for it."""
    if m.place[page] & SWAPPED and not fault_in(m, r, page, now):
        return False
    if m.counts[LRU] and m.place[page] & PRESENT:
        note_use(m, page)
    return True


@inlined
def note_wait(m: Memory, r: Pressure, guest: int, waited: int, copies: int) -> None:
    """Note how long a guest's write waited if none did for longer; *waited* and *copies* are those before it."""
    kind = COPY_WAIT_NS if m.guest[guest, COPIES] > copies else WRITE_WAIT_NS
    m.counts[kind] = max(m.counts[kind], r.n[WAIT] - waited)


@compiled
def store(m: Memory, r: Pressure, page: int, content: int, now: int) -> int:
    """One write by a guest, who waits for what it takes. Returns OK or NO_FRAME (the page is as it was)."""
    guest = m.block[page // BLOCK, GUEST]
    if m.counts[LRU]:
        if not bring_in(m, r, page, now):
            return NO_FRAME
        if not m.place[page] & PRESENT:
            huge = may_be_huge(m, page // BLOCK) and make_room(m, r, guest, BLOCK, 1, now)
            if not huge and not make_room(m, r, guest, 1, TRIES, now):
                return NO_FRAME
        elif copies_on_write(m, page):
            if not make_room(m, r, guest, 1, TRIES, now):
                return NO_FRAME
            if m.place[page] & SWAPPED and not bring_in(m, r, page, now):
                return NO_FRAME
    return write_page(m, page, content)


@compiled
def store_pages(
    m: Memory, r: Pressure, first: int, pages: Int64, contents: Int32, done: int, waits: bool, now: int
) -> int:
    """Write contents to pages `first + pages` behind the first *done* of them, and let the guest wait for that, or not.

    NEVER leaves a page alone. Returns how many are done: not all when no frame is left or arrays must grow.
    """
    guest = m.block[first // BLOCK, GUEST]
    while done < pages.size and (not m.counts[LRU] or has_room(m, ROOM)):
        content = int(contents[done])
        if content == FRESH:
            content = fresh_content(m)
        waited, copies = r.n[WAIT], m.guest[guest, COPIES]
        if content != NEVER and store(m, r, first + pages[done], content, now) != OK:
            break
        if waits:
            note_wait(m, r, guest, waited, copies)
        done += 1
    if not waits:
        r.n[WAIT] = r.n[PRESSURE_NS] = 0
    stall(m, r, guest, now)
    return done


@compiled
def next_event(m: Memory, r: Pressure) -> int:
    """Host time (ns) before which no access is due and kswapd does nothing."""
    return int(min(next_due(m), r.n[GOES_ON] if r.n[AWAKE] else END_OF_TIME))


@compiled
def run_access(m: Memory, r: Pressure) -> int:
    """Perform the access that is due first. Returns OK or NO_FRAME (it stays due)."""
    code, now = m.due[0, PAGE], m.due[0, TIME]
    page = code // 2
    reads = code & 1 != 0
    if m.place[page] & (DUE_READ if reads else DUE) and m.place[page] & (PRESENT | SWAPPED):
        guest = m.block[page // BLOCK, GUEST]
        if reads:
            done = bring_in(m, r, page, now)
        else:
            draw = drawn(m, guest, page, m.due[0, ACTIVE_TIME])
            copies = m.guest[guest, COPIES]
            done = store(m, r, page, written_content(m, m.accesses[page], draw), now) == OK
            note_wait(m, r, guest, 0, copies)
        stall(m, r, guest, now)
        if not done:
            return NO_FRAME
    forget_due(m)
    return OK


@compiled
def run_until(m: Memory, r: Pressure, now: int) -> int:
    """Perform what is due up to now. Returns -1, or the page whose access found no frame (it stays due)."""
    while True:
        if m.counts[LRU] and not has_room(m, ROOM):
            return -1
        if r.n[AWAKE] and r.n[GOES_ON] <= min(now, next_due(m)):
            run_kswapd(m, r)
            continue
        if next_due(m) > now:
            return -1
        if due_in_time(m) and run_access(m, r) != OK:
            return int(m.due[0, PAGE] // 2)


# --- guests that end -------------------------------------------------------------------------------------------------


@compiled
def hand_over(m: Memory, guest: int) -> None:
    """Charge the shared frames of a guest that ended to somebody who still maps them."""
    for active in range(2):
        column = INACTIVE + LIST_COLUMNS * active
        while m.guest[guest, column + TAIL] != 0:
            entry = m.guest[guest, column + TAIL]
            frame = -entry - 1
            heir = m.block[(m.frame_lru[frame, RING] - 1) // BLOCK, GUEST]
            take(m, guest, entry)
            m.guest[guest, CHARGED] -= 1
            m.guest[heir, CHARGED] += 1
            m.frame_lru[frame, OWNER] = heir
            put(m, heir, entry, active == 1)
    for frame in range(m.counts[FRAME_HIGH] if m.guest[guest, CHARGED] else 0):
        if m.frame[frame, KIND] not in (0, SWAP_ENTRY) and m.frame[frame, MAPS] and m.frame_lru[frame, OWNER] == guest:
            heir = m.block[(m.frame_lru[frame, RING] - 1) // BLOCK, GUEST]
            charge(m, guest, -1)
            charge(m, heir, 1)
            m.frame_lru[frame, OWNER] = heir
