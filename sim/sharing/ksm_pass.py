"""ksmd's work as compiled loops: batches, full scans, the decision for each page, and the two trees.

Trees are arrays indexed by content. A block in which nothing changed since the last full scan is *quiet*: its pages
are either merged already or lonely, what a full scan does to it is known, and it is passed by arithmetic. Anything
that touches a quiet block settles it first, which leaves every page as if it had been visited one by one.

Source: Linux 6.18 mm/ksm.c for behaviour; `kernels.py` for what older versions did otherwise.
"""

import math
from typing import NamedTuple

import numpy as np

from sim.cost.accessed import accesses
from sim.memory.compiled import compiled, inlined
from sim.memory.pages import (
    ADJACENT,
    ANON,
    ANY,
    BLOCK,
    COLD,
    CONTENT,
    DEATHS,
    DIRTY,
    DISK_KEPT,
    DUE,
    DUE_COUNT,
    END_OF_TIME,
    FIRST,
    FRAME_HIGH,
    FREE_FRAME,
    GONE,
    GUEST,
    HOT,
    KIND,
    KSM,
    KSM_STAYS,
    KSM_ZERO,
    LATE_SPLITS,
    LRU,
    MAPS,
    MERGEABLE,
    METADATA,
    NEVER,
    NO_FRAME,
    OK,
    PAGES,
    PRESENT,
    REMOVED,
    REPEATED,
    SHARED,
    SWAPPED,
    TEMPER,
    THP_SPLIT,
    WRITES,
    ZERO,
    Float64,
    Int32,
    Int64,
    Memory,
    UInt8,
    content_of,
    drop_pages,
    forget_frame,
    is_large,
    keep_in_memory,
    last_read,
    leave_frame,
    look,
    map_frame,
    name_of,
    next_due,
    plan_write,
    share_own_frame,
    shuffled,
    split_huge,
    uniform,
    write_due,
    write_page,
)
from sim.reclaim.pressure import TRIES, Pressure, make_room, stall

ITEM_BYTES, NODE_BYTES, SLOT_BYTES = 64, 64, 48
"""Sizes of ksm_rmap_item, ksm_stable_node and ksm_mm_slot (6.18, x86-64, /sys/kernel/slab)."""

# Bits of Ksm.item: the number of visits so far (as far as it matters), then flags.
VISITS, ITEM, UNSTABLE, PARITY = 31, 32, 64, 128

SMART_VISITS = 22
"""Visits of an item that smart_scan tells apart: after the last one comes SMART_CYCLE again."""
SMART_CYCLE = 13
SMART_PROCESSED = (0, 1, 2, 3, 5, 8, 13)

WORK = (
    "batch", "scan", "visit_ksm", "visit", "checksum", "stable_level", "unstable_level", "compare_byte", "item",
    "skip", "absent", "insert", "merge", "promote", "zero_merge", "attach", "dup", "node_level",
    "slot", "free", "checksum_adjacent",
)  # fmt: skip
"""What ksmd does, counted: each has a price (see cost/prices.py)."""
(
    W_BATCH, W_SCAN, W_VISIT_KSM, W_VISIT, W_CHECKSUM, W_STABLE_LEVEL, W_UNSTABLE_LEVEL, W_COMPARE_BYTE, W_ITEM,
    W_SKIP, W_ABSENT, W_INSERT, W_MERGE, W_PROMOTE, W_ZERO_MERGE, W_ATTACH, W_DUP, W_NODE_LEVEL,
    W_SLOT, W_FREE, W_CHECKSUM_ADJACENT,
) = range(len(WORK))  # fmt: skip
MERGE_WORK = ("merge", "promote", "zero_merge", "attach")

# Indexes into Ksm.n: first the counters, ...
PAGES_SHARED, PAGES_SHARING, PAGES_UNSHARED, ITEMS, PAGES_SCANNED, PAGES_SKIPPED, FULL_SCANS = range(7)
CHAINS, DUPS, NODES, SLOTS = range(7, 11)
COUNTERS = 11
# ... where ksmd is, ...
PHASE, WAKE, BATCH_START, BATCH_PS, TOTAL_PS, QUOTA, BATCH_VISITS, SLOT, CURSOR, SCAN, PASS_START = range(11, 22)
CALM, QUIET_DONE, QUIET_PS, STABLE_TREE, UNSTABLE_TREE, STARVED, LOGGED, CHAIN_HIGH, CHAIN_FREE = range(22, 31)
ADVISOR_CPU, ADVISOR_LAST, ADVISOR_CHANGE, TREE_CHANGES, VANISHED, EMPTY_CHAINS = range(31, 37)
# ... its settings and the kernel's ways, ...
RUN, PAGES_TO_SCAN, SLEEP_MILLISECS, SMART_SCAN, MAX_PAGE_SHARING, USE_ZERO_PAGES, PRUNE_MILLISECS = range(37, 44)
ADVISOR, TARGET_SCAN_TIME, MAX_CPU, MAX_PAGES_TO_SCAN, MAX_KERNEL_PAGES, HZ = range(44, 50)
CHECKSUM_FIRST, NODE_HOLDS_PAGE, COUNTS_LAST_BATCH, EXACT_SLEEP, PROMPT_TIMERS, COLD_MILLI = range(50, 56)
MISROUTES, KEY, SPLIT_PS, HINTS_TO_SCAN, HINT_QUOTA = range(56, 61)
# ... how many pages each page stands for, and what a wake-up stands for (see `begin_batch`), ...
SCALE, BATCHES, PAGES_OVER = range(61, 64)
# ... and for each kind of work its price (ps) and how much of it was done.
PRICE = 64
DONE = PRICE + len(WORK)
NUMBERS = DONE + len(WORK)

# Columns of Ksm.node, .chain, .block and .slot, and rows of Ksm.smart.
MEMBERS, NEXT, PREVIOUS, CHAIN, SPARE = range(5)
NODE_COLUMNS = 5
LINKED, PRUNED, FULL = range(3)
CHAIN_COLUMNS = 3
QUIET, SCANNED, PASSED, MERGED, INSERTED, ENTERED, RANK, CHANGED, LONELY = range(9)
QUIET_COLUMNS = LONELY + SMART_VISITS
FOLLOWING, BEFORE, EXITING, MERGEABLE_PAGES, DIFFERS_AT, TREE = range(6)
SLOT_COLUMNS = 6
PROCESSED, NEXT_VISIT = range(2)

IDLE, SLEEPING, WORKING = 0, 1, 2
"""Phases of ksmd."""

PAUSED, STARVING, NO_ROOM, LOG_FULL = range(4)
"""Why `advance` returned: time is up, a due write found no frame, arrays must grow, the log is full."""

ROOM = 4
"""Shared frames, due writes and chains that one step may need."""

FEWEST = 16
"""Pages that a wake-up visits, at least, where each stands for several: it then does the work of several wake-ups."""

FEW = 1000
"""Millionths of the searches that may be stopped by vanished nodes without being looked at."""

NO_CHAIN = 0


class Ksm(NamedTuple):
    """State of KSM on one host. A link or head of 0 means none; see each array for how it is encoded."""

    item: UInt8  # (pages,) bits VISITS ITEM UNSTABLE PARITY
    old: Int32  # (pages,) content at the last checksum, NEVER before the first
    link: Int32  # (pages,) frame + 1 of the stable node to which the item is attached
    head: Int32  # (contents,) page + 1 last put in the unstable tree, or -(frame + 1) of the first stable node
    node: Int32  # (shared frames, NODE_COLUMNS) MEMBERS items attached, NEXT and PREVIOUS frame + 1 in the chain,
    #              CHAIN + 1, SPARE of the first node: page + 1 in the unstable tree with the same content
    chain: Int64  # (chains, CHAIN_COLUMNS) LINKED dups (of an unused chain the next one), PRUNED at (ns),
    #               FULL: all dups were full when so many KSM pages had died, -1 unknown
    block: Int64  # (blocks, QUIET_COLUMNS) QUIET, SCANNED scan number of the last visit, PASSED full scans since the
    #               items were brought up to date, MERGED pages attached and in place, INSERTED lonely pages put into
    #               the unstable tree at the last visit, ENTERED host time (ns) of the last visit, RANK nodes that the
    #               tree had then, CHANGED nodes of the tree written at once in this scan before it,
    #               LONELY + v lonely pages whose next visit is v
    slot: Int64  # (guests + 1, SLOT_COLUMNS) list of registered guests FOLLOWING and BEFORE (-1: not on it), the last
    #              row is its head; EXITING, MERGEABLE_PAGES, DIFFERS_AT bytes that two different pages have in common
    #              at their start, TREE first index into head (per NUMA node unless merged across nodes)
    hot: Float64  # (classes, 2) randomly written pages in the unstable tree by class: their number and the sum
    #               of their guests' activity levels
    smart: UInt8  # (2, SMART_VISITS) PROCESSED 1 or skipped 0, NEXT_VISIT number of the visit after
    n: Int64  # (NUMBERS,)
    log: Int64  # (rows, SNAPSHOT + COUNTERS + COUNTS) a row at the end of every full scan


# Columns of Ksm.log before the counters.
ROW_TIME, ROW_RUN, ROW_PAGES_TO_SCAN, ROW_SLEEP_MILLISECS, ROW_KSMD_PS, ROW_MERGE_PS = range(6)
SNAPSHOT = 6


@inlined
def spend(k: Ksm, kind: int, times: int) -> None:
    """Count work and let it take its time."""
    k.n[DONE + kind] += times
    k.n[BATCH_PS] += times * k.n[PRICE + kind]


@inlined
def checksum_of(m: Memory, block: int) -> int:
    """The kind of work that a checksum is in a block: frames that lie one after the other are read faster."""
    return W_CHECKSUM_ADJACENT if m.block[block, ADJACENT] else W_CHECKSUM


@inlined
def levels(k: Ksm, nodes: int) -> int:
    """Levels of a balanced tree that a search for something absent passes; a node stands for as many as a page."""
    depth = 0
    nodes *= k.n[SCALE]
    while nodes > 0:
        nodes >>= 1
        depth += 1
    return depth


@inlined
def descent(depth: int) -> int:
    """Price units of a search through so many levels: the deeper a level, the more nodes, the colder the cache."""
    return depth * (depth + 1) // 2


@inlined
def moment(k: Ksm) -> int:
    """Host time (ns) of ksmd within its batch."""
    return int(k.n[BATCH_START] + k.n[BATCH_PS] // 1000)


@inlined
def in_place(m: Memory, page: int) -> bool:
    """Whether ksmd sees an anonymous page here."""
    return bool(m.place[page] & (PRESENT | MERGEABLE | ZERO) == PRESENT | MERGEABLE)


@inlined
def is_ksm_page(m: Memory, page: int) -> bool:
    """Whether the page maps a KSM page."""
    return bool(m.place[page] & SHARED and m.frame[m.held[page], KIND] == KSM)


# --- the stable tree -------------------------------------------------------------------------------------------------


@inlined
def node_lives(m: Memory, frame: int) -> bool:
    """Whether somebody still maps the node's page."""
    return bool(m.frame[frame, MAPS] > 0)


@inlined
def takes_more(m: Memory, k: Ksm, frame: int) -> bool:
    """Whether the node is a candidate for one more page."""
    items = k.node[frame, MEMBERS]
    return bool(node_lives(m, frame) and 1 <= items < k.n[MAX_PAGE_SHARING])


@inlined
def spare_of(k: Ksm, key: int) -> int:
    """Page + 1 that was last put in the unstable tree with this content."""
    head = k.head[key]
    return int(k.node[-head - 1, SPARE] if head < 0 else head)


@inlined
def put_spare(m: Memory, k: Ksm, key: int, spare: int) -> None:
    """Make page + 1 the content's page in the unstable tree; the block of the one before must be looked at again."""
    before = spare_of(k, key)
    if before > 0 and before != spare:
        m.block[(before - 1) // BLOCK, DIRTY] = 1
    if k.head[key] < 0:
        k.node[-k.head[key] - 1, SPARE] = spare
    else:
        k.head[key] = spare


@inlined
def tree_key(m: Memory, k: Ksm, page: int, content: int) -> int:
    """Index of a content in `Ksm.head`, for the trees of the page's NUMA node."""
    return int(k.slot[m.block[page // BLOCK, GUEST], TREE] + name_of(m, page, content))


@inlined
def unlink_dup(k: Ksm, key: int, frame: int) -> None:
    """Take a node out of its content's list of nodes."""
    following, previous = k.node[frame, NEXT], k.node[frame, PREVIOUS]
    if previous > 0:
        k.node[previous - 1, NEXT] = following
    else:
        spare = k.node[frame, SPARE]
        k.head[key] = -following if following > 0 else spare
        if following > 0:
            k.node[following - 1, SPARE] = spare
    if following > 0:
        k.node[following - 1, PREVIOUS] = previous
    k.node[frame, NEXT] = 0
    k.node[frame, PREVIOUS] = 0
    k.node[frame, SPARE] = 0


@inlined
def link_first(k: Ksm, key: int, frame: int) -> None:
    """Put a node at the head of its content's list of nodes."""
    head = k.head[key]
    if head < 0:
        first = -head - 1
        k.node[frame, NEXT] = first + 1
        k.node[first, PREVIOUS] = frame + 1
        k.node[frame, SPARE] = k.node[first, SPARE]
        k.node[first, SPARE] = 0
    else:
        k.node[frame, NEXT] = 0
        k.node[frame, SPARE] = head
    k.node[frame, PREVIOUS] = 0
    k.head[key] = -(frame + 1)


@inlined
def new_chain(m: Memory, k: Ksm, frame: int, now: int) -> int:
    """Give a node that stands alone a chain. Returns chain + 1."""
    chain = k.n[CHAIN_FREE]
    if chain > 0:
        k.n[CHAIN_FREE] = k.chain[chain - 1, LINKED]
    else:
        k.n[CHAIN_HIGH] += 1
        chain = k.n[CHAIN_HIGH]
    k.chain[chain - 1, LINKED] = 1
    k.chain[chain - 1, PRUNED] = now
    k.chain[chain - 1, FULL] = -1
    k.node[frame, CHAIN] = chain
    k.n[CHAINS] += 1
    k.n[DUPS] += 1
    m.counts[METADATA] += NODE_BYTES
    return int(chain)


@inlined
def end_empty_chains(m: Memory, k: Ksm) -> None:
    """Free the headers of chains without dups: a search of the stable tree frees each one that it passes.

    The next search is taken to pass them all: in a scan there are many, and most nodes near the root are passed soon.
    """
    k.n[CHAINS] -= k.n[EMPTY_CHAINS]
    m.counts[METADATA] -= k.n[EMPTY_CHAINS] * NODE_BYTES
    k.n[EMPTY_CHAINS] = 0


@inlined
def leave_chain(k: Ksm, frame: int) -> None:
    """Take a node's membership of a chain away; the header of an empty chain stays until a search meets it."""
    chain = k.node[frame, CHAIN]
    if chain != NO_CHAIN:
        k.node[frame, CHAIN] = NO_CHAIN
        k.n[DUPS] -= 1
        k.chain[chain - 1, LINKED] -= 1
        k.chain[chain - 1, FULL] = -1
        if k.chain[chain - 1, LINKED] == 0:
            k.chain[chain - 1, LINKED] = k.n[CHAIN_FREE]
            k.n[CHAIN_FREE] = chain
            k.n[EMPTY_CHAINS] += 1


@inlined
def remove_node(m: Memory, k: Ksm, key: int, frame: int) -> None:
    """Take a stable node out of the tree; all its items are in no tree from now on.

    Its page is gone, or all its items are: then it is an ordinary shared frame for whoever still maps it.
    """
    unlink_dup(k, key, frame)
    leave_chain(k, frame)
    if k.head[key] >= 0:
        k.n[STABLE_TREE] -= 1
    items = k.node[frame, MEMBERS]
    if items > 0:
        k.n[PAGES_SHARED] -= 1
        k.n[PAGES_SHARING] -= items - 1
    k.n[NODES] -= 1
    m.counts[METADATA] -= NODE_BYTES
    m.frame[frame, KIND] = ANON if node_lives(m, frame) else REMOVED
    if items == 0 and not node_lives(m, frame):
        forget_frame(m, frame)


@inlined
def dissolve_chain(m: Memory, k: Ksm, frame: int) -> None:
    """Let the one dup that is left in a chain stand alone again."""
    chain = k.node[frame, CHAIN]
    if chain != NO_CHAIN and k.chain[chain - 1, LINKED] == 1:
        leave_chain(k, frame)
        end_empty_chains(m, k)


@inlined
def look_again(k: Ksm, frame: int) -> None:
    """Forget that all dups of the node's chain were found full: its items have changed."""
    chain = k.node[frame, CHAIN]
    if chain != NO_CHAIN:
        k.chain[chain - 1, FULL] = -1


@inlined
def attach(m: Memory, k: Ksm, page: int, frame: int) -> None:
    """Attach the page's item to a stable node."""
    look_again(k, frame)
    k.node[frame, MEMBERS] += 1
    k.n[PAGES_SHARED if k.node[frame, MEMBERS] == 1 else PAGES_SHARING] += 1
    k.link[page] = frame + 1


@inlined
def passers(k: Ksm, page: int) -> int:
    """Millionths of the later searches that pass a page's node in the unstable tree.

    The earlier a node was put in the tree the nearer it is to the root: a search passes the i-th node of a tree of
    random keys with probability 2 / (i + 1) while nothing is rebalanced. Measured on 6.18 with 4,096 nodes: 2.0 to
    2.4 / i behind the first tenth, about 1 / i near the root. The page of zeros has the least of all keys, so that
    searches come to it from one side only: 1.1 / i in the mean of 48 trees with it in places 1 to 400.
    """
    whole = 1_100_000 if k.old[page] == 0 else 2_200_000
    return int(whole // (k.block[page // BLOCK, RANK] + page % BLOCK + 2))


@inlined
def detach(m: Memory, k: Ksm, page: int) -> None:
    """Take the page's item out of whatever tree it is in."""
    link = k.link[page]
    if link > 0:
        frame = link - 1
        k.link[page] = 0
        if m.frame[frame, KIND] == KSM and not node_lives(m, frame):
            remove_node(m, k, tree_key(m, k, page, int(m.frame[frame, CONTENT])), frame)
        k.node[frame, MEMBERS] -= 1
        left = k.node[frame, MEMBERS]
        if m.frame[frame, KIND] == REMOVED:
            if left == 0:
                forget_frame(m, frame)
            return
        k.n[PAGES_SHARING if left > 0 else PAGES_SHARED] -= 1
        look_again(k, frame)
    item = k.item[page]
    if item & UNSTABLE:
        k.item[page] = item & ~(UNSTABLE | PARITY)
        k.n[PAGES_UNSHARED] -= 1
        if (item & PARITY != 0) == (k.n[SCAN] & 1 != 0):
            k.n[UNSTABLE_TREE] -= 1
            if not in_place(m, page):
                k.n[VANISHED] -= passers(k, page)
            kind = m.accesses[page]
            if kind:
                k.hot[kind, 1] -= k.hot[kind, 1] / k.hot[kind, 0]
                k.hot[kind, 0] -= 1.0


@inlined
def chosen_dup(m: Memory, k: Ksm, key: int) -> int:
    """The node of a content that takes one more page, or -1. Meets the dead on its way and removes them."""
    limit = k.n[MAX_PAGE_SHARING]
    first = -k.head[key] - 1
    if k.node[first, CHAIN] == NO_CHAIN:
        if not node_lives(m, first):
            remove_node(m, k, key, first)
            return -1
        return first if takes_more(m, k, first) else -1
    chain = k.node[first, CHAIN] - 1
    now = moment(k)
    prune = now - k.chain[chain, PRUNED] >= k.n[PRUNE_MILLISECS] * 1_000_000
    if not prune and k.chain[chain, FULL] == m.counts[DEATHS]:
        spend(k, W_DUP, k.chain[chain, LINKED])
        return -1
    if prune:
        k.chain[chain, PRUNED] = now
    best, frame, walked = -1, first, 0
    while frame >= 0:
        following = k.node[frame, NEXT] - 1
        walked += 1
        if not node_lives(m, frame):
            remove_node(m, k, key, frame)
        elif takes_more(m, k, frame) and (best < 0 or k.node[frame, MEMBERS] > k.node[best, MEMBERS]):
            best = frame
            if not prune:
                break
        frame = following
    spend(k, W_DUP, walked)
    if k.head[key] >= 0:
        end_empty_chains(m, k)
        return -1
    first = -k.head[key] - 1
    if best < 0:
        if k.node[first, CHAIN] != NO_CHAIN:
            k.chain[chain, FULL] = m.counts[DEATHS]
    elif best != first and k.node[best, MEMBERS] + 1 < limit:
        unlink_dup(k, key, best)
        link_first(k, key, best)
    dissolve_chain(m, k, -k.head[key] - 1)
    return best


@inlined
def stable_search(m: Memory, k: Ksm, page: int, content: int) -> int:
    """Frame of the KSM page with this content that takes one more page, or -1."""
    end_empty_chains(m, k)
    depth = levels(k, k.n[STABLE_TREE])
    spend(k, W_STABLE_LEVEL, descent(depth))
    spend(k, W_COMPARE_BYTE, depth * k.slot[m.block[page // BLOCK, GUEST], DIFFERS_AT])
    if content < 0:
        return -1
    key = tree_key(m, k, page, content)
    if k.head[key] >= 0:
        return -1
    spend(k, W_COMPARE_BYTE, 4096)
    return chosen_dup(m, k, key)


@inlined
def stable_insert(m: Memory, k: Ksm, key: int, frame: int) -> None:
    """Make a shared frame a stable node, as one more dup if the content has a node already."""
    k.n[NODES] += 1
    m.counts[METADATA] += NODE_BYTES
    k.node[frame, MEMBERS] = 0
    k.node[frame, CHAIN] = NO_CHAIN
    if k.head[key] < 0:
        first = -k.head[key] - 1
        dissolve_chain(m, k, first)
        chain = k.node[first, CHAIN]
        if chain == NO_CHAIN:
            chain = new_chain(m, k, first, moment(k))
        k.node[frame, CHAIN] = chain
        k.chain[chain - 1, LINKED] += 1
        k.chain[chain - 1, FULL] = -1
        k.n[DUPS] += 1
    else:
        k.n[STABLE_TREE] += 1
    link_first(k, key, frame)


# --- the decision for one page ---------------------------------------------------------------------------------------


@inlined
def merge_into(m: Memory, k: Ksm, page: int, frame: int) -> None:
    """Let the page map a KSM page in place of its own frame."""
    leave_frame(m, page)
    map_frame(m, page, frame)
    plan_write(m, page, moment(k))


@inlined
def in_unstable_tree(m: Memory, k: Ksm, page: int) -> bool:
    """Whether the page's item was put in the unstable tree in the present full scan."""
    block = page // BLOCK
    item = k.item[page]
    if not k.block[block, QUIET]:
        return bool(item & UNSTABLE and (item & PARITY != 0) == (k.n[SCAN] & 1 != 0))
    if k.block[block, SCANNED] != k.n[SCAN] or not item & ITEM or k.link[page] > 0:
        return False
    return inserted_at_last_visit(k, visit_after(k, item & VISITS, k.block[block, PASSED]))


@inlined
def may_split(m: Memory, block: int) -> bool:
    """Whether ksmd may take the block apart, should it be a huge page."""
    temper = m.block[block, TEMPER]
    return bool(not is_large(m, block) or temper in (ANY, REPEATED))


@compiled
def passers_of_vanished(m: Memory, k: Ksm, block: int) -> int:
    """Millionths of the later searches that pass nodes of the block whose pages are gone."""
    passed = 0
    for page in range(block * BLOCK, block * BLOCK + BLOCK):
        if not m.place[page] & PRESENT and in_unstable_tree(m, k, page):
            passed += passers(k, page)
    return passed


@inlined
def on_its_own(m: Memory, k: Ksm, page: int) -> bool:
    """Split the huge page that the page may be in, as a merge must.

    Returns False if that unmapped the page, or if the huge page must stay.
    """
    block = page // BLOCK
    if not may_split(m, block):
        return False
    if is_large(m, block):
        before = passers_of_vanished(m, k, block)
        k.n[BATCH_PS] += k.n[SPLIT_PS]
        split_huge(m, block, moment(k))
        k.n[VANISHED] += passers_of_vanished(m, k, block) - before
    return bool(m.place[page] & PRESENT)


@inlined
def merge_with_stable(m: Memory, k: Ksm, page: int, frame: int) -> None:
    """Merge the page into a KSM page that exists."""
    detach(m, k, page)
    if not on_its_own(m, k, page):
        return
    spend(k, W_COMPARE_BYTE, 4096)
    spend(k, W_MERGE, 1)
    merge_into(m, k, page, frame)
    attach(m, k, page, frame)


@inlined
def promote_pair(m: Memory, k: Ksm, page: int, tree_page: int, content: int) -> None:
    """Make the page a KSM page and let the page from the unstable tree map it.

    Huge pages are split first; both pages stay as they are if they were in the same one, or one that must stay, or if a
    split unmaps one.
    """
    if not may_split(m, page // BLOCK) or not may_split(m, tree_page // BLOCK):
        return
    settle(m, k, tree_page // BLOCK)
    m.block[tree_page // BLOCK, DIRTY] = 1
    together = is_large(m, page // BLOCK) and page // BLOCK == tree_page // BLOCK
    if not on_its_own(m, k, page) or together or not on_its_own(m, k, tree_page):
        return
    key = tree_key(m, k, page, content)
    put_spare(m, k, key, 0)
    depth = levels(k, k.n[STABLE_TREE])
    spend(k, W_STABLE_LEVEL, descent(depth))
    spend(k, W_COMPARE_BYTE, 2 * 4096 + depth * k.slot[m.block[page // BLOCK, GUEST], DIFFERS_AT])
    spend(k, W_PROMOTE, 1)
    spend(k, W_MERGE, 1)
    if m.place[page] & SHARED:
        frame = int(m.held[page])
        m.frame[frame, KIND] = KSM
        if m.counts[KSM_STAYS]:
            keep_in_memory(m, frame)
    else:
        frame = share_own_frame(m, page, content, KSM, moment(k))
    detach(m, k, tree_page)
    merge_into(m, k, tree_page, frame)
    stable_insert(m, k, key, frame)
    attach(m, k, tree_page, frame)
    attach(m, k, page, frame)
    plan_write(m, page, moment(k))


@compiled
def changed_share(m: Memory, k: Ksm, block: int) -> float:
    """Expected share of the nodes above those of a block's pages that changed since these were put in the tree.

    The nodes above a page were there before it, so they had all the time since to change.
    """
    waited = moment(k) - k.block[block, ENTERED]
    changed = float(k.n[TREE_CHANGES] - k.block[block, CHANGED])
    for kind in range(1, k.hot.shape[0]):
        pages = k.hot[kind, 0]
        if m.rates[kind, WRITES] <= 0.0:
            break
        if pages > 0.0:
            changed -= pages * math.expm1(-m.rates[kind, WRITES] * k.hot[kind, 1] / pages * waited)
    return float(min(1.0, changed / k.n[UNSTABLE_TREE]))


@inlined
def luck(k: Ksm, page: int) -> float:
    """A number from 0 up to 1 that belongs to the page's search in this scan."""
    return uniform(shuffled(shuffled(np.uint64(k.n[KEY]) ^ np.uint64(page)) ^ np.uint64(k.n[SCAN])))


@inlined
def goes_astray(m: Memory, k: Ksm, page: int, tree_page: int) -> bool:
    """Whether the search for a page in the unstable tree is led past it by nodes that changed since it was put there.

    A changed node at depth d leads a search astray with probability 1/2 - 2^-(d+2) (measured on 6.18: 0, 4.4, 8.9,
    23.5, 41, 64, 94, 99.7 % of pairs missed when 0, 1, 2, 5, 10, 20, 50, 100 % of 20,000 nodes had changed).
    """
    if not k.n[MISROUTES]:
        return False
    share = changed_share(m, k, tree_page // BLOCK)
    if share <= 0.0:
        return False
    found = 1.0
    for depth in range(levels(k, k.n[UNSTABLE_TREE]) - 3):
        found *= 1.0 - share * (0.5 - 0.25 / (1 << depth))
    return bool(luck(k, page) >= found)


@inlined
def stops_short(k: Ksm, page: int) -> bool:
    """Whether the search for a page in the unstable tree meets one that vanished, and so neither merges nor inserts.

    The kernel leaves the nodes of vanished pages in the tree until their items are freed.
    """
    if k.n[VANISHED] <= FEW or not k.n[MISROUTES]:
        return False
    return bool(luck(k, page) >= math.exp(-k.n[VANISHED] / 1e6))


@inlined
def unstable_insert(m: Memory, k: Ksm, page: int) -> None:
    """Put the page's item in the unstable tree."""
    spend(k, W_INSERT, 1)
    kind = m.accesses[page]
    if kind:
        k.hot[kind, 0] += 1.0
        k.hot[kind, 1] += m.level[m.block[page // BLOCK, GUEST]]
    k.item[page] |= UNSTABLE | (PARITY if k.n[SCAN] & 1 else 0)
    k.n[PAGES_UNSHARED] += 1
    k.n[UNSTABLE_TREE] += 1
    if not in_place(m, page):  # a split has just unmapped it
        k.n[VANISHED] += passers(k, page)


@inlined
def unstable_search_insert(m: Memory, k: Ksm, page: int, content: int) -> bool:
    """Find an equal page in the unstable tree and merge the two, or insert this one. Returns True if inserted."""
    depth = levels(k, k.n[UNSTABLE_TREE])
    spend(k, W_UNSTABLE_LEVEL, descent(depth))
    spend(k, W_COMPARE_BYTE, depth * k.slot[m.block[page // BLOCK, GUEST], DIFFERS_AT])
    if stops_short(k, page):
        return False
    if content < 0:
        unstable_insert(m, k, page)
        return True
    key = tree_key(m, k, page, content)
    tree_page = spare_of(k, key) - 1
    if tree_page >= 0 and tree_page != page and in_unstable_tree(m, k, tree_page):
        if not in_place(m, tree_page):
            return False
        if m.accesses[tree_page] and tree_page // BLOCK != page // BLOCK:
            look(m, tree_page // BLOCK, moment(k))
        same_frame = m.place[page] & m.place[tree_page] & SHARED and m.held[page] == m.held[tree_page]
        if same_frame:
            return False
        unchanged = content_of(m, tree_page) == content and not is_ksm_page(m, tree_page)
        if unchanged and not goes_astray(m, k, page, tree_page):
            if k.n[NODES] >= k.n[MAX_KERNEL_PAGES]:
                return False
            promote_pair(m, k, page, tree_page, content)
            return False
    put_spare(m, k, key, page + 1)
    unstable_insert(m, k, page)
    return True


@inlined
def visit_merged(k: Ksm) -> None:
    """The visit of a page whose item is attached to the KSM page it maps: nothing is to be done."""
    spend(k, W_VISIT_KSM, 1)
    spend(k, W_NODE_LEVEL, levels(k, k.n[NODES]))
    if k.n[NODE_HOLDS_PAGE] == 0:
        spend(k, W_STABLE_LEVEL, descent(levels(k, k.n[STABLE_TREE])))
        spend(k, W_COMPARE_BYTE, 4096)


@inlined
def visit(m: Memory, k: Ksm, page: int) -> bool:
    """The decision for any other page that is not skipped. Returns True if it was put in the unstable tree."""
    if is_ksm_page(m, page):
        frame = int(m.held[page])
        detach(m, k, page)
        spend(k, W_VISIT, 1)
        spend(k, W_ATTACH, 1)
        attach(m, k, page, frame)
        return False
    content = content_of(m, page)
    spend(k, W_VISIT, 1)
    if k.n[CHECKSUM_FIRST] == 0:
        frame = stable_search(m, k, page, content)
        if frame >= 0:
            merge_with_stable(m, k, page, frame)
            return False
    detach(m, k, page)
    spend(k, checksum_of(m, page // BLOCK), 1)
    if k.old[page] != content:
        k.old[page] = content
        return False
    if content == 0 and k.n[USE_ZERO_PAGES] and on_its_own(m, k, page):
        spend(k, W_COMPARE_BYTE, 4096)
        spend(k, W_ZERO_MERGE, 1)
        leave_frame(m, page)
        m.place[page] |= ZERO
        m.counts[KSM_ZERO] += 1
        plan_write(m, page, moment(k))
        return False
    if k.n[CHECKSUM_FIRST]:
        frame = stable_search(m, k, page, content)
        if frame >= 0:
            merge_with_stable(m, k, page, frame)
            return False
    return unstable_search_insert(m, k, page, content)


@inlined
def new_item(m: Memory, k: Ksm, page: int) -> None:
    """Give a page that ksmd sees for the first time its item."""
    spend(k, W_ITEM, 1)
    k.item[page] = ITEM
    k.old[page] = NEVER
    k.n[ITEMS] += 1
    m.counts[METADATA] += ITEM_BYTES


@inlined
def free_item(m: Memory, k: Ksm, page: int) -> None:
    """Free the item of a page that is gone."""
    detach(m, k, page)
    k.item[page] = 0
    k.n[ITEMS] -= 1
    m.counts[METADATA] -= ITEM_BYTES


@inlined
def stays_lonely(m: Memory, k: Ksm, page: int) -> bool:
    """Whether the next processed visit will put the page in the unstable tree, if nothing happens before."""
    content = m.held[page]
    if m.place[page] & SHARED or k.old[page] != content or (content == 0 and k.n[USE_ZERO_PAGES]):
        return False
    return bool(content < 0 or k.head[tree_key(m, k, page, int(content))] == page + 1)


# --- quiet blocks ----------------------------------------------------------------------------------------------------


@inlined
def visit_after(k: Ksm, visit_number: int, visits: int) -> int:
    """Number of the next visit of an item that was passed so many times more."""
    if not k.n[SMART_SCAN]:
        return int(visit_number)
    number = visit_number + visits
    if number >= SMART_VISITS:
        number = SMART_CYCLE + (number - SMART_CYCLE) % (SMART_VISITS - SMART_CYCLE)
    return int(number)


@inlined
def inserted_at_last_visit(k: Ksm, next_visit: int) -> bool:
    """Whether a lonely item with this next visit was processed at its last one."""
    return bool(not k.n[SMART_SCAN] or (next_visit >= 1 and k.smart[PROCESSED, next_visit - 1]))


@compiled
def settle(m: Memory, k: Ksm, block: int) -> None:
    """Bring the items of a quiet block up to date one by one; it is not quiet any more."""
    if not k.block[block, QUIET]:
        return
    k.block[block, QUIET] = 0
    passes = k.block[block, PASSED]
    parity = PARITY if k.block[block, SCANNED] & 1 else 0
    parity_now = PARITY if k.n[SCAN] & 1 else 0
    under_way = k.n[SLOT] == m.block[block, GUEST] and k.n[CURSOR] // BLOCK == block
    visits_left = k.n[QUIET_DONE] if under_way else 0
    for page in range(block * BLOCK, block * BLOCK + BLOCK):
        item = k.item[page]
        if not item & ITEM:
            continue
        if k.link[page] > 0:
            if visits_left > 0:
                visits_left -= 1
                k.n[DONE + W_VISIT_KSM] += 1
                k.n[CURSOR] = page + 1
            continue
        number = visit_after(k, item & VISITS, passes)
        flags = UNSTABLE | parity if inserted_at_last_visit(k, number) else 0
        if visits_left > 0:
            k.n[PAGES_UNSHARED] -= 1 if flags else 0
            if k.smart[PROCESSED, number]:
                visits_left -= 1
                flags = UNSTABLE | parity_now
                k.n[PAGES_UNSHARED] += 1
                k.n[UNSTABLE_TREE] += 1
                k.n[DONE + W_VISIT] += 1
                k.n[DONE + checksum_of(m, block)] += 1
                k.n[DONE + W_INSERT] += 1
            else:
                flags = 0
                k.n[PAGES_SKIPPED] += 1
                k.n[DONE + W_SKIP] += 1
            number = k.smart[NEXT_VISIT, number]
            k.n[CURSOR] = page + 1
        k.item[page] = ITEM | flags | number
    if under_way:
        k.n[QUIET_DONE] = 0
        k.n[CALM] = 0


@compiled
def settle_all(m: Memory, k: Ksm) -> None:
    """Settle every block, before a setting changes that decides what a visit does."""
    k.n[CALM] = 0
    for block in range(k.block.shape[0]):
        settle(m, k, block)


@inlined
def priced(k: Ksm, kind: int, number: int, times: int) -> int:
    """Picoseconds of so much work; counts it *times* times."""
    k.n[DONE + kind] += number * times
    return int(number * k.n[PRICE + kind])


@inlined
def quiet_work(m: Memory, k: Ksm, block: int, inserted: int, skipped: int, times: int) -> int:
    """Picoseconds for one full scan's visit of a quiet block; counts the work *times* times."""
    merged = int(k.block[block, MERGED])
    # A block that stands for many adds to the tree that it is looked up in.
    growth = inserted // 2 if k.n[SCALE] > 1 else 0
    stable, unstable = levels(k, k.n[STABLE_TREE]), levels(k, k.n[UNSTABLE_TREE] + growth)
    searches = merged if k.n[NODE_HOLDS_PAGE] == 0 else 0
    differing = inserted * (stable + unstable) * k.slot[m.block[block, GUEST], DIFFERS_AT]
    return int(
        priced(k, W_VISIT_KSM, merged, times)
        + priced(k, W_NODE_LEVEL, merged * levels(k, k.n[NODES]), times)
        + priced(k, W_VISIT, inserted, times)
        + priced(k, checksum_of(m, block), inserted, times)
        + priced(k, W_INSERT, inserted, times)
        + priced(k, W_STABLE_LEVEL, (inserted + searches) * descent(stable), times)
        + priced(k, W_UNSTABLE_LEVEL, inserted * descent(unstable), times)
        + priced(k, W_COMPARE_BYTE, differing + searches * 4096, times)
        + priced(k, W_SKIP, skipped, times)
        + priced(k, W_ABSENT, BLOCK - merged - inserted - skipped, times)
    )


@inlined
def quiet_inserts(k: Ksm, block: int) -> tuple[int, int]:
    """Lonely pages of a quiet block that the next visit inserts, and that it skips."""
    inserted, skipped = 0, 0
    for number in range(SMART_VISITS):
        lonely = int(k.block[block, LONELY + number])
        if k.smart[PROCESSED, number]:
            inserted += lonely
        else:
            skipped += lonely
    return inserted, skipped


@inlined
def quiet_so_far(k: Ksm, block: int) -> tuple[int, int]:
    """What the visits to a quiet block under way have added to pages_unshared and to pages_skipped."""
    left, unshared, skipped = k.n[QUIET_DONE], 0, 0
    for page in range(block * BLOCK, block * BLOCK + BLOCK):
        item = k.item[page]
        if left == 0 or not item & ITEM:
            continue
        if k.link[page] > 0:
            left -= 1
            continue
        number = visit_after(k, item & VISITS, k.block[block, PASSED])
        unshared -= inserted_at_last_visit(k, number)
        if k.smart[PROCESSED, number]:
            left -= 1
            unshared += 1
        else:
            skipped += 1
    return unshared, skipped


@inlined
def enter_block(k: Ksm, block: int) -> None:
    """Note when a block's pages are put in the unstable tree, and what was written before."""
    k.block[block, ENTERED] = moment(k)
    k.block[block, RANK] = k.n[UNSTABLE_TREE]
    k.block[block, CHANGED] = k.n[TREE_CHANGES]


@inlined
def pass_quiet_block(m: Memory, k: Ksm, block: int, limit_ps: int) -> bool:
    """Visit a quiet block, or as much of it as quota and time allow. Returns True when it is behind."""
    n = k.n
    inserted, skipped = quiet_inserts(k, block)
    visits = k.block[block, MERGED] + inserted
    done = n[QUIET_DONE]
    if done == 0:
        enter_block(k, block)
        n[QUIET_PS] = quiet_work(m, k, block, inserted, skipped, 0)
    whole = n[QUIET_PS]
    if visits > 0:
        until = min(done + n[QUOTA], visits)
        ahead = limit_ps - n[BATCH_PS] + whole * done // visits
        if whole > 0 and ahead < whole:
            until = min(until, max(done + 1, (ahead * visits + whole - 1) // whole))
        n[BATCH_PS] += whole * until // visits - whole * done // visits
        n[QUOTA] -= until - done
        n[BATCH_VISITS] += until - done
        k.n[PAGES_SCANNED] += until - done
        if until < visits or n[QUOTA] == 0:  # the pages skipped behind the last visit belong to the next batch
            n[QUIET_DONE] = until
            return False
    else:
        n[BATCH_PS] += whole
    quiet_work(m, k, block, inserted, skipped, 1)
    n[QUIET_DONE] = 0
    n[UNSTABLE_TREE] += inserted
    k.n[PAGES_SKIPPED] += skipped
    k.n[PAGES_UNSHARED] += inserted - k.block[block, INSERTED]
    k.block[block, INSERTED] = inserted
    k.block[block, PASSED] += 1
    k.block[block, SCANNED] = n[SCAN]
    if k.n[SMART_SCAN]:
        last = k.block[block, LONELY + SMART_VISITS - 1]
        for column in range(LONELY + SMART_VISITS - 1, LONELY, -1):
            k.block[block, column] = k.block[block, column - 1]
        k.block[block, LONELY] = 0
        k.block[block, LONELY + SMART_CYCLE] += last
    return True


# --- scanning --------------------------------------------------------------------------------------------------------


@inlined
def room_left(m: Memory, k: Ksm) -> bool:
    """Whether one more step cannot overrun the arrays."""
    return bool(
        (m.counts[FREE_FRAME] >= 0 or m.counts[FRAME_HIGH] + ROOM <= m.frame.shape[0])
        and m.counts[DUE_COUNT] + ROOM <= m.due.shape[0]
        and k.n[CHAIN_HIGH] + ROOM <= k.chain.shape[0]
    )


@inlined
def next_write(m: Memory) -> int:
    """Host time (ns) of the next due write; where memory is reclaimed that is another's business."""
    return END_OF_TIME if m.counts[LRU] else next_due(m)


@inlined
def limit_of(m: Memory, k: Ksm, horizon: int) -> int:
    """Batch time (ps) at which ksmd must pause: the horizon or the next due write."""
    return int((min(horizon, next_write(m)) - k.n[BATCH_START]) * 1000)


@inlined
def begin_block(m: Memory, k: Ksm, block: int) -> None:
    """Prepare the sums of a block that is about to be visited page by page."""
    m.block[block, DIRTY] = 0
    enter_block(k, block)
    k.block[block, MERGED] = 0
    for number in range(SMART_VISITS):
        k.block[block, LONELY + number] = 0
    k.n[CALM] = 0 if look(m, block, moment(k)) else 1


@inlined
def end_block(m: Memory, k: Ksm, block: int) -> None:
    """Call a block quiet if every page in it was found merged or lonely."""
    if k.n[CALM] and not m.block[block, DIRTY]:
        k.block[block, QUIET] = 1
        k.block[block, SCANNED] = k.n[SCAN]
        k.block[block, PASSED] = 0
        inserted = 0
        for number in range(SMART_VISITS):
            if inserted_at_last_visit(k, number):
                inserted += k.block[block, LONELY + number]
        k.block[block, INSERTED] = inserted


@inlined
def visit_block(m: Memory, k: Ksm, block: int, end: int, horizon: int) -> bool:
    """Visit the pages of a block one by one up to *end*, or as far as quota, time and room allow.

    Returns True when the block is behind.
    """
    n, smart = k.n, k.smart
    page = n[CURSOR]
    limit_ps = limit_of(m, k, horizon)
    planned = m.counts[DUE_COUNT]
    while page < end and n[QUOTA] > 0:
        if not in_place(m, page):
            spend(k, W_ABSENT, 1)
            if k.item[page] & ITEM:
                free_item(m, k, page)
                spend(k, W_FREE, 1)
                n[CALM] = 0
            page += 1
            continue
        if n[BATCH_PS] >= limit_ps or not room_left(m, k):
            break
        if not k.item[page] & ITEM:
            new_item(m, k, page)
            n[CALM] = 0
        merged = is_ksm_page(m, page)
        number = k.item[page] & VISITS
        if not merged:
            k.item[page] = (k.item[page] & ~VISITS) | smart[NEXT_VISIT, number]
        if not merged and not smart[PROCESSED, number]:
            detach(m, k, page)
            spend(k, W_SKIP, 1)
            k.n[PAGES_SKIPPED] += 1
            lonely = stays_lonely(m, k, page)
        else:
            n[QUOTA] -= 1
            n[BATCH_VISITS] += 1
            k.n[PAGES_SCANNED] += 1
            if merged and k.link[page] == m.held[page] + 1:
                visit_merged(k)
                k.block[block, MERGED] += 1
                page += 1
                continue
            lonely = visit(m, k, page) and stays_lonely(m, k, page)
            if m.counts[DUE_COUNT] != planned:
                planned = m.counts[DUE_COUNT]
                limit_ps = limit_of(m, k, horizon)
        if lonely:
            k.block[block, LONELY + smart[NEXT_VISIT, number]] += 1
        else:
            n[CALM] = 0
        page += 1
    n[CURSOR] = page
    return bool(page == end)


@compiled
def visit_hinted(m: Memory, k: Ksm, page: int) -> None:
    """Visit a page that was just read from a disk, out of turn.

    It is taken to stay as it is: ksmd does not wait for its checksum to be the same a full scan later.
    """
    if not in_place(m, page):
        return
    block = page // BLOCK
    settle(m, k, block)
    m.block[block, DIRTY] = 1
    k.n[QUOTA] -= 1
    k.n[BATCH_VISITS] += 1
    k.n[PAGES_SCANNED] += 1
    if not k.item[page] & ITEM:
        new_item(m, k, page)
    if is_ksm_page(m, page) and k.link[page] == m.held[page] + 1:
        visit_merged(k)
        return
    if m.accesses[page] and not m.place[page] & DUE:
        look(m, block, moment(k))
    k.old[page] = content_of(m, page)
    visit(m, k, page)


@inlined
def free_slot_items(m: Memory, k: Ksm, guest: int) -> None:
    """Free all items of a guest."""
    first = m.guest[guest, FIRST]
    for page in range(first, first + m.guest[guest, PAGES]):
        if page % BLOCK == 0:
            settle(m, k, page // BLOCK)
            m.block[page // BLOCK, DIRTY] = 1
        if k.item[page] & ITEM:
            free_item(m, k, page)


@inlined
def unlink_slot(m: Memory, k: Ksm, guest: int) -> None:
    """Take a guest off the list."""
    following, previous = k.slot[guest, FOLLOWING], k.slot[guest, BEFORE]
    k.slot[previous, FOLLOWING] = following
    k.slot[following, BEFORE] = previous
    k.slot[guest, BEFORE] = -1
    k.slot[guest, EXITING] = 0
    k.n[SLOTS] -= 1
    m.counts[METADATA] -= SLOT_BYTES


@inlined
def enter_slot(m: Memory, k: Ksm, guest: int) -> None:
    """Move the cursor to the start of a guest (or to the head of the list)."""
    k.n[SLOT] = guest
    k.n[CALM] = 0
    k.n[QUIET_DONE] = 0
    if guest < m.guest.shape[0]:
        spend(k, W_SLOT, 1)
        k.n[CURSOR] = m.guest[guest, FIRST]


@inlined
def advise(k: Ksm, now: int) -> None:
    """One step of the scan-time advisor at the end of a full scan (6.8 and later); every division floors."""
    n = k.n
    seconds = max(1, (now - n[PASS_START]) // 1_000_000_000)
    cpu_ps = n[TOTAL_PS] + n[BATCH_PS]
    cpu_ms = (cpu_ps - n[ADVISOR_CPU]) // 1_000_000_000
    percent = max(1, cpu_ms * 100 // (seconds * 1000))
    n[ADVISOR_CPU] = cpu_ps
    factor = max(1, n[TARGET_SCAN_TIME] * 100 // seconds)
    last = n[ADVISOR_LAST] if n[ADVISOR_LAST] > 0 else seconds
    change = max(1, seconds * 100 // last)
    change = (70 * n[ADVISOR_CHANGE] + 30 * change) // 100
    pages = n[PAGES_TO_SCAN] * 100 // factor * change // 100
    per_percent = max(1, n[PAGES_TO_SCAN] // percent)
    pages = max(min(pages, per_percent * n[MAX_CPU]), per_percent * 10)
    n[PAGES_TO_SCAN] = min(pages, n[MAX_PAGES_TO_SCAN])
    n[ADVISOR_LAST] = seconds
    n[ADVISOR_CHANGE] = change


@compiled
def snapshot(m: Memory, k: Ksm, now: int, index: int) -> None:
    """Write every counter as it is now into a row of the log."""
    n, row = k.n, k.log[index]
    spent = n[TOTAL_PS] + (n[BATCH_PS] if n[PHASE] == WORKING else 0)
    merging = (m.counts[THP_SPLIT] - m.counts[LATE_SPLITS]) * n[SPLIT_PS]
    for kind in (W_MERGE, W_PROMOTE, W_ZERO_MERGE, W_ATTACH):
        merging += k.n[DONE + kind] * k.n[PRICE + kind]
    row[ROW_TIME] = now
    row[ROW_RUN] = k.n[RUN]
    row[ROW_PAGES_TO_SCAN] = k.n[PAGES_TO_SCAN]
    row[ROW_SLEEP_MILLISECS] = k.n[SLEEP_MILLISECS]
    row[ROW_KSMD_PS] = spent
    row[ROW_MERGE_PS] = merging
    for i in range(COUNTERS):
        row[SNAPSHOT + i] = n[i]
    for i in range(m.counts.size):
        row[SNAPSHOT + COUNTERS + i] = m.counts[i]
    if n[QUIET_DONE] > 0:
        unshared, skipped = quiet_so_far(k, n[CURSOR] // BLOCK)
        row[SNAPSHOT + PAGES_UNSHARED] += unshared
        row[SNAPSHOT + PAGES_SKIPPED] += skipped


@inlined
def end_scan(m: Memory, k: Ksm) -> None:
    """A full scan is complete: count it, log it, and let the advisor choose."""
    n = k.n
    now = moment(k)
    if k.n[ADVISOR]:
        advise(k, now)
    n[SCAN] += 1
    k.n[FULL_SCANS] += 1
    if not k.n[COUNTS_LAST_BATCH]:
        n[PAGES_SCANNED] -= n[BATCH_VISITS]
    n[QUOTA] = 0
    snapshot(m, k, now, n[LOGGED])
    n[LOGGED] += 1


@inlined
def next_slot(m: Memory, k: Ksm) -> None:
    """Go on to the next guest; behind the last one the full scan ends."""
    guest = k.n[SLOT]
    following = k.slot[guest, FOLLOWING]
    enter_slot(m, k, following)
    if following == m.guest.shape[0]:
        end_scan(m, k)


@inlined
def has_gone(m: Memory, k: Ksm, guest: int) -> bool:
    """Whether the guest under the cursor exits, or offered no page when the cursor came to it."""
    arrived = k.n[CURSOR] == m.guest[guest, FIRST] and k.n[QUIET_DONE] == 0
    return bool(k.slot[guest, EXITING] or (arrived and k.slot[guest, MERGEABLE_PAGES] == 0))


@inlined
def begin_scan(m: Memory, k: Ksm) -> None:
    """Start a full scan at the first guest with an empty unstable tree."""
    spend(k, W_SCAN, 1)
    k.n[UNSTABLE_TREE] = 0
    k.n[PASS_START] = moment(k)
    k.n[VANISHED] = 0
    k.n[TREE_CHANGES] = 0
    for kind in range(k.hot.shape[0]):
        k.hot[kind, 0] = 0.0
        k.hot[kind, 1] = 0.0
    enter_slot(m, k, k.slot[m.guest.shape[0], FOLLOWING])


@inlined
def work_on(m: Memory, k: Ksm, horizon: int) -> int:
    """Go on with the present batch until it ends (OK) or must pause (PAUSED, STARVING, NO_ROOM, LOG_FULL)."""
    n = k.n
    head = m.guest.shape[0]
    while n[QUOTA] > 0:
        now = moment(k)
        if now >= horizon:
            return PAUSED
        if next_write(m) <= now:
            starved = write_due(m, now)
            if starved >= 0:
                n[STARVED] = starved
                return STARVING
        if not room_left(m, k):
            return NO_ROOM
        if n[LOGGED] == k.log.shape[0]:
            return LOG_FULL
        guest = n[SLOT]
        if guest == head:
            begin_scan(m, k)
        elif n[HINT_QUOTA] > 0 and m.counts[DISK_KEPT] > 0:
            n[HINT_QUOTA] -= 1
            visit_hinted(m, k, last_read(m))
        elif has_gone(m, k, guest):
            items = n[ITEMS]
            free_slot_items(m, k, guest)
            spend(k, W_FREE, items - n[ITEMS])
            unlink_slot(m, k, guest)
            next_slot(m, k)
        else:
            guest_end = m.guest[guest, FIRST] + m.guest[guest, PAGES]
            if n[CURSOR] >= guest_end:
                next_slot(m, k)
                continue
            block = n[CURSOR] // BLOCK
            if k.block[block, QUIET] and (m.block[block, DIRTY] or k.n[VANISHED] > FEW or k.n[EMPTY_CHAINS] > 0):
                settle(m, k, block)
            elif k.block[block, QUIET]:
                behind = pass_quiet_block(m, k, block, limit_of(m, k, horizon))
                if behind:
                    n[CURSOR] = (block + 1) * BLOCK
            else:
                if n[CURSOR] % BLOCK == 0:
                    begin_block(m, k, block)
                behind = visit_block(m, k, block, min((block + 1) * BLOCK, guest_end), horizon)
                if behind:
                    end_block(m, k, block)
    return -1


@inlined
def sleep_end(k: Ksm, now: int) -> int:
    """Host time (ns) at which a sleep that begins now ends: since 4.8 the timer wheel fires late, never early."""
    hz = k.n[HZ]
    millisecs = k.n[SLEEP_MILLISECS]
    tick = now * hz // 1_000_000_000
    ticks = (millisecs * hz + 999) // 1000
    if not k.n[EXACT_SLEEP] and millisecs >= 1000:
        rest = (tick + ticks) % hz
        ticks += -rest if rest < hz // 4 else hz - rest
        ticks = max(ticks, 1)
    expiry = tick + ticks
    if not k.n[PROMPT_TIMERS]:
        shift, reach = 0, 63
        while ticks >= reach and shift < 24:
            shift += 3
            reach <<= 3
        expiry = ((expiry >> shift) + 1) << shift
    return int((expiry * 1_000_000_000 + hz - 1) // hz)


@inlined
def begin_batch(k: Ksm) -> None:
    """ksmd wakes up; where a page stands for many it does the work of several batches at once, and sleeps as long."""
    n = k.n
    n[BATCH_PS] = 0
    n[BATCH_VISITS] = 0
    n[BATCHES] = 1
    if n[SCALE] > 1 and n[PAGES_TO_SCAN] > 0:
        n[BATCHES] = (FEWEST * n[SCALE] + n[PAGES_TO_SCAN] - 1) // n[PAGES_TO_SCAN]
    pages = n[PAGES_OVER] + n[BATCHES] * n[PAGES_TO_SCAN]
    n[QUOTA] = pages // n[SCALE]
    n[PAGES_OVER] = pages % n[SCALE]
    n[HINT_QUOTA] = n[QUOTA] * n[HINTS_TO_SCAN] // 1_000_000
    spend(k, W_BATCH, 1)


@inlined
def batches_done(k: Ksm) -> int:
    """Batches that this wake-up stood for: the end of a full scan cuts it short."""
    n = k.n
    if n[BATCHES] == 1 or n[PAGES_TO_SCAN] == 0:
        return 1
    visits = n[BATCH_VISITS] * n[SCALE]
    return int(max(1, min(n[BATCHES], (visits + n[PAGES_TO_SCAN] - 1) // n[PAGES_TO_SCAN])))


@inlined
def batches_end(k: Ksm, now: int, batches: int) -> int:
    """Host time (ns) at which so many equal batches, whose work is done now, and the sleep after each have ended."""
    if k.n[SLEEP_MILLISECS] == 0:
        return now + 1
    if batches == 1:
        return sleep_end(k, now)
    work = (now - k.n[BATCH_START]) // batches
    first = sleep_end(k, k.n[BATCH_START] + work)
    # From the first wake-up on, which is at a tick of the timer wheel, one batch takes as long as the other.
    return int(max(first + (batches - 1) * (sleep_end(k, first + work) - first), now + 1))


@inlined
def end_batch(k: Ksm) -> None:
    """ksmd goes to sleep; the caches it works in will be cold when it wakes, which is charged to this batch."""
    n = k.n
    batches = batches_done(k)
    spend(k, W_BATCH, batches - 1)
    visits = n[BATCH_VISITS] * n[SCALE] / batches
    if visits > 0:
        n[BATCH_PS] += np.int64(n[BATCH_PS] * (n[COLD_MILLI] / 1000.0) * math.log1p(visits / 100.0) * 100.0 / visits)
    now = moment(k)
    n[WAKE] = batches_end(k, now, batches)
    n[TOTAL_PS] += n[BATCH_PS]
    n[BATCH_PS] = 0
    n[BATCH_START] = now
    n[PHASE] = SLEEPING


@compiled
def advance(m: Memory, k: Ksm, horizon: int, batch_only: bool) -> int:
    """Let host time reach *horizon* (ns): run every batch and due write before it. Returns why it stopped.

    With *batch_only* only the batch under way is brought to its end.
    """
    n = k.n
    head = m.guest.shape[0]
    while True:
        if n[PHASE] == WORKING:
            stopped = work_on(m, k, horizon)
            if stopped >= 0:
                return stopped
            end_batch(k)
        if batch_only:
            return PAUSED
        wake = n[WAKE] if n[PHASE] == SLEEPING else END_OF_TIME
        now = min(wake, horizon)
        if next_write(m) < now:
            starved = write_due(m, now - 1)
            if starved >= 0:
                n[STARVED] = starved
                return STARVING
        if wake >= horizon:
            return PAUSED
        if n[RUN] != 1 or k.slot[head, FOLLOWING] == head:
            n[PHASE] = IDLE
            continue
        n[PHASE] = WORKING
        n[BATCH_START] = wake
        begin_batch(k)


@compiled
def wake_up(k: Ksm, now: int) -> None:
    """ksmd, if it waits for something to do, looks again."""
    if k.n[PHASE] == IDLE:
        k.n[PHASE] = SLEEPING
        k.n[WAKE] = now


# --- what others do to KSM -------------------------------------------------------------------------------------------


@compiled
def note_writes(m: Memory, k: Ksm, first: int, pages: Int64) -> None:
    """Pages from `first + pages` are about to be written: those in the unstable tree will lead searches astray."""
    for i in range(pages.size):
        page = first + pages[i]
        if in_unstable_tree(m, k, page):
            k.n[TREE_CHANGES] += 1
            absent = m.place[page] & (PRESENT | SWAPPED) == 0 or m.place[page] & ZERO
            if absent and m.place[page] & MERGEABLE:
                k.n[VANISHED] -= passers(k, page)


@compiled
def note_moves(m: Memory, k: Ksm) -> None:
    """Pages of the unstable tree that were swapped out stop searches, until they come back."""
    for i in range(m.counts[GONE]):
        page = abs(m.gone[i]) - 1
        if in_unstable_tree(m, k, page):
            k.n[VANISHED] += passers(k, page) if m.gone[i] > 0 else -passers(k, page)
    m.counts[GONE] = 0


@compiled
def unmap_pages(m: Memory, k: Ksm, first: int, pages: int) -> None:
    """Unmap a range of pages (exit, discard); searches will stop at those in the unstable tree."""
    for page in range(first, first + pages):
        settle(m, k, page // BLOCK)
        if in_place(m, page) and in_unstable_tree(m, k, page):
            k.n[VANISHED] += passers(k, page)
    drop_pages(m, first, pages)


@compiled
def register(m: Memory, k: Ksm, guest: int) -> None:
    """Put a guest on the list: just before the cursor, so that it is reached last; at the tail while unmerging."""
    head = m.guest.shape[0]
    before = head if k.n[RUN] == 2 else k.n[SLOT]
    previous = k.slot[before, BEFORE]
    k.slot[previous, FOLLOWING] = guest
    k.slot[guest, BEFORE] = previous
    k.slot[guest, FOLLOWING] = before
    k.slot[before, BEFORE] = guest
    k.slot[guest, EXITING] = 0
    k.n[SLOTS] += 1
    m.counts[METADATA] += SLOT_BYTES


@compiled
def has_items(m: Memory, k: Ksm, guest: int) -> bool:
    """Whether ksmd ever saw a page of the guest."""
    first = m.guest[guest, FIRST]
    for page in range(first, first + m.guest[guest, PAGES]):
        if k.item[page] & ITEM:
            return True
    return False


@compiled
def leave(m: Memory, k: Ksm, guest: int) -> bool:
    """A guest exits (its pages are unmapped already). Returns True if it is off the list at once."""
    if k.n[SLOT] != guest:
        if not has_items(m, k, guest):
            unlink_slot(m, k, guest)
            return True
        following, previous = k.slot[guest, FOLLOWING], k.slot[guest, BEFORE]
        k.slot[previous, FOLLOWING] = following
        k.slot[following, BEFORE] = previous
        cursor = k.n[SLOT]
        after = k.slot[cursor, FOLLOWING]
        k.slot[cursor, FOLLOWING] = guest
        k.slot[guest, BEFORE] = cursor
        k.slot[guest, FOLLOWING] = after
        k.slot[after, BEFORE] = guest
    k.slot[guest, EXITING] = 1
    return False


@compiled
def judge_blocks(m: Memory, k: Ksm, copies: Int32, cold: float, repeated: int, splits: bool, now: int) -> None:
    """Say which blocks are hot, with *cold* accesses per ns and more, and which of the others have many equal pages.

    Many are *repeated* ones; with *splits* not set no block has. *copies* are zeros, one for each content and tree.
    """
    for page in range(m.place.size):
        if page % BLOCK == 0:
            look(m, page // BLOCK, now)
        if m.place[page] & (PRESENT | MERGEABLE) == PRESENT | MERGEABLE:
            content = content_of(m, page)
            if content >= 0:
                copies[tree_key(m, k, page, content)] += 1
    for block in range(m.block.shape[0]):
        if accesses(m, block) >= cold:
            m.block[block, TEMPER] = HOT
            continue
        equal = 0
        for page in range(block * BLOCK, block * BLOCK + BLOCK):
            if m.place[page] & (PRESENT | MERGEABLE) == PRESENT | MERGEABLE:
                content = content_of(m, page)
                equal += content >= 0 and copies[tree_key(m, k, page, content)] > 1
        m.block[block, TEMPER] = REPEATED if splits and equal >= repeated else COLD


@compiled
def unmerge_pages(m: Memory, first: int, pages: int) -> int:
    """Give every mergeable page of a range that maps a KSM page or KSM's zero page a frame of its own.

    Returns OK or NO_FRAME.
    """
    for page in range(first, first + pages):
        place = m.place[page]
        if not place & MERGEABLE or not (place & ZERO or is_ksm_page(m, page)):
            continue
        if write_page(m, page, content_of(m, page)) != OK:
            return NO_FRAME
    return OK


@compiled
def unmerge_for_guest(m: Memory, r: Pressure, guest: int, first: int, pages: int, now: int) -> int:
    """Do what `unmerge_pages` does while each frame may first have to be reclaimed, for which the guest waits."""
    done = OK
    for page in range(first, first + pages):
        if not m.place[page] & MERGEABLE or not (m.place[page] & ZERO or is_ksm_page(m, page)):
            continue
        if not make_room(m, r, guest, 1, TRIES, now):
            done = NO_FRAME
            break
        done = unmerge_pages(m, page, 1)
    stall(m, r, guest, now)
    return done


@compiled
def unmerge_all(m: Memory, k: Ksm) -> int:
    """run = 2: unmerge every guest on the list, then forget all items and nodes. Returns OK or NO_FRAME."""
    head = m.guest.shape[0]
    guest = k.slot[head, FOLLOWING]
    while guest != head:
        if not k.slot[guest, EXITING]:
            if unmerge_pages(m, m.guest[guest, FIRST], m.guest[guest, PAGES]) != OK:
                return NO_FRAME
        following = k.slot[guest, FOLLOWING]
        free_slot_items(m, k, guest)
        if k.slot[guest, EXITING]:
            unlink_slot(m, k, guest)
        guest = following
    for key in range(k.head.size):
        while k.head[key] < 0:
            remove_node(m, k, key, -k.head[key] - 1)
        k.head[key] = 0
    end_empty_chains(m, k)
    k.n[FULL_SCANS] = 0
    k.n[SCAN] = 0
    enter_slot(m, k, head)
    return OK


@compiled
def advise_mergeable(m: Memory, k: Ksm, guest: int, first: int, pages: int, mergeable: bool) -> None:
    """Mark pages of a guest as in a mergeable area, or not."""
    for page in range(first, first + pages):
        was = m.place[page] & MERGEABLE != 0
        if was != mergeable:
            settle(m, k, page // BLOCK)
            before = in_place(m, page)
            m.place[page] ^= MERGEABLE
            if in_unstable_tree(m, k, page):
                k.n[VANISHED] += (before - in_place(m, page)) * passers(k, page)
            k.slot[guest, MERGEABLE_PAGES] += 1 if mergeable else -1
            m.block[page // BLOCK, DIRTY] = 1


@compiled
def items_of(m: Memory, k: Ksm, guest: int) -> tuple[int, int, int]:
    """Items of a guest: all, those attached to a stable node, and its KSM zero pages (/proc/PID/ksm_stat)."""
    items, merging, zero = 0, 0, 0
    first = m.guest[guest, FIRST]
    for page in range(first, first + m.guest[guest, PAGES]):
        items += k.item[page] & ITEM != 0
        merging += k.link[page] > 0 and m.frame[k.link[page] - 1, KIND] == KSM
        zero += m.place[page] & ZERO != 0
    return items, merging, zero
