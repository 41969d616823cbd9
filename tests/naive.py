"""KSM once more, slow and plain: objects, one page at a time and no time, for the compiled loops to agree with.

Trees are dictionaries from content to what holds it, so three things stand for the tree walks of the kernel: an equal
page put in the unstable tree in this full scan is found, one that changed since is not, and a search stops at one that
vanished or that is the same frame. Dead nodes are met by searches for their own content only, and the header of a
chain that lost its last node by the next search for any.

Source: Linux 6.18 mm/ksm.c.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ITEM_BYTES, NODE_BYTES, SLOT_BYTES = 64, 64, 48
BLOCK = 512
"""Pages of a huge page."""


@dataclass(eq=False)
class Frame:
    """A frame of the host: what it holds, and who maps it."""

    content: int
    mappers: set[tuple[Mm, int]] = field(default_factory=set)
    node: StableNode | None = None


@dataclass(eq=False)
class StableNode:
    """A KSM page in the stable tree."""

    frame: Frame
    items: set[Item] = field(default_factory=set)
    chain: Chain | None = None

    @property
    def dead(self) -> bool:
        """Whether nobody maps the KSM page any more."""
        return not self.frame.mappers


@dataclass(eq=False)
class Chain:
    """Several KSM pages with one content."""

    pruned: int
    dups: list[StableNode] = field(default_factory=list)


@dataclass(eq=False)
class Item:
    """What ksmd remembers of a page."""

    mm: Mm
    page: int
    old: int | None = None
    age: int = 0
    remaining: int = 0
    node: StableNode | None = None
    unstable: bool = False
    sought: int = 0
    """Content under which it was put in the unstable tree."""

    @property
    def frame(self) -> Frame:
        """The frame that the page maps."""
        return self.mm.frames[self.page]


@dataclass(eq=False)
class Mm:
    """An address space: page table, mergeable pages, and ksmd's items."""

    size: int
    frames: dict[int, Frame] = field(default_factory=dict)
    mergeable: set[int] = field(default_factory=set)
    items: dict[int, Item] = field(default_factory=dict)
    exiting: bool = False
    thp: bool = False
    huge: set[int] = field(default_factory=set)
    """Blocks that are huge pages."""

    def block(self, page: int) -> range:
        """The pages of the block around a page."""
        return range(page - page % BLOCK, page - page % BLOCK + BLOCK)

    def map(self, page: int, frame: Frame) -> None:
        """Let a page map a frame in place of the one it has."""
        self.unmap(page)
        self.frames[page] = frame
        frame.mappers.add((self, page))

    def unmap(self, page: int) -> None:
        """Take a page's frame away, if it has one."""
        frame = self.frames.pop(page, None)
        if frame:
            frame.mappers.remove((self, page))


def skip_count(age: int) -> int:
    """Full scans for which smart_scan skips a page of this age."""
    if age <= 3:
        return 1
    if age <= 5:
        return 2
    return 4 if age <= 8 else 8


class Naive:
    """Memory and KSM of a host; guests are numbered in the order in which they come."""

    def __init__(
        self, *, max_page_sharing: int = 256, smart_scan: bool = True, use_zero_pages: bool = False,
        checksum_first: bool = True, prune_millisecs: int = 2000, thp: bool = False, split_frees_zero: bool = True,
    ) -> None:  # fmt: skip
        self.thp = thp
        self.split_frees_zero = split_frees_zero
        self.thp_split_page = self.thp_fault_alloc = self.thp_collapse_alloc = 0
        self.max_page_sharing = max_page_sharing
        self.smart_scan = smart_scan
        self.use_zero_pages = use_zero_pages
        self.checksum_first = checksum_first
        self.prune_ns = prune_millisecs * 1_000_000
        self.guests: list[Mm] = []
        self.zero_page = Frame(0)
        self.slots: list[Mm] = []
        self.cursor: Mm | None = None
        self.address = 0
        self.met_area = False
        self.stable: dict[int, StableNode | Chain] = {}
        self.empty_chains = 0
        self.unstable: dict[int, Item] = {}
        self.running = 1
        self.full_scans = self.pages_scanned = self.pages_skipped = self.cow_ksm = self.cow_other = 0

    # --- guests ---------------------------------------------------------------------------------------------------

    def start(self, contents: list[int | None], mergeable: bool = True) -> int:
        """A guest with these contents starts; None is a page never touched. Returns its number."""
        mm = Mm(len(contents), thp=self.thp)
        self.guests.append(mm)
        for page, content in enumerate(contents):
            if content is not None:
                self._fault(mm, page)
                mm.map(page, Frame(content))
        if mergeable:
            self._mark(mm, range(mm.size))
        return len(self.guests) - 1

    def write(self, guest: int, page: int, content: int) -> None:
        """Write a page, with the page fault or copy that this needs."""
        mm = self.guests[guest]
        self._fault(mm, page)
        frame = mm.frames.get(page)
        if frame and frame.mappers == {(mm, page)} and not frame.node and frame is not self.zero_page:
            frame.content = content
            return
        if frame and frame.node:
            self.cow_ksm += 1
        elif frame:
            self.cow_other += 1
        mm.map(page, Frame(content))

    def unmap(self, guest: int, page: int) -> None:
        """Discard a page; the huge page it was in is none any more."""
        mm = self.guests[guest]
        if page in mm.frames:
            mm.huge.discard(page // BLOCK)
        mm.unmap(page)

    def _fault(self, mm: Mm, page: int) -> None:
        """Bring a huge page of zeros where a page fault may."""
        block = mm.block(page)
        if mm.thp and block.stop <= mm.size and not any(each in mm.frames for each in block):
            self.thp_fault_alloc += 1
            mm.huge.add(page // BLOCK)
            for each in block:
                mm.map(each, Frame(0))

    def _split(self, mm: Mm, page: int) -> bool:
        """Split the huge page around a page, if there is one. Returns whether the page is still there."""
        if page // BLOCK in mm.huge:
            mm.huge.remove(page // BLOCK)
            self.thp_split_page += 1
            for each in mm.block(page) if self.split_frees_zero else ():
                if mm.frames[each].content == 0:
                    mm.unmap(each)
        return page in mm.frames

    def collapse(self, guest: int, max_ptes_none: int, max_ptes_shared: int) -> None:
        """khugepaged goes through a guest."""
        mm = self.guests[guest]
        for block in range(mm.size // BLOCK if not mm.exiting else 0):
            pages = mm.block(block * BLOCK)
            none = sum(mm.frames.get(page, self.zero_page) is self.zero_page for page in pages)
            frames = [mm.frames[page] for page in pages if page in mm.frames and mm.frames[page] is not self.zero_page]
            shared = sum(len(frame.mappers) > 1 for frame in frames)
            if block in mm.huge or len(frames) == 0 or none > max_ptes_none or shared > max_ptes_shared:
                continue
            for page in pages:
                mm.map(page, Frame(mm.frames[page].content if page in mm.frames else 0))
            mm.huge.add(block)
            self.thp_collapse_alloc += 1

    def exit(self, guest: int) -> None:
        """The guest ends; its items go when ksmd comes by."""
        mm = self.guests[guest]
        for page in range(mm.size):
            mm.unmap(page)
        mm.huge.clear()
        mm.exiting = True
        if mm not in self.slots or mm is self.cursor:
            return
        self.slots.remove(mm)
        if mm.items:
            self.slots.insert(self.slots.index(self.cursor) + 1 if self.cursor else 0, mm)

    def fork(self, guest: int) -> int:
        """The guest forks. Returns the number of the child."""
        parent = self.guests[guest]
        child = Mm(parent.size, mergeable=set(parent.mergeable), thp=parent.thp)
        parent.huge.clear()
        self.guests.append(child)
        for page, frame in parent.frames.items():
            child.map(page, frame)
        if parent in self.slots:
            self._register(child)
        return len(self.guests) - 1

    def madvise(self, guest: int, first: int, pages: int, mergeable: bool) -> None:
        """Advise a range of pages to be mergeable or not."""
        mm = self.guests[guest]
        if mergeable:
            self._mark(mm, range(first, first + pages))
            return
        self._unmerge(mm, range(first, first + pages))
        mm.mergeable.difference_update(range(first, first + pages))

    def read(self, guest: int) -> list[int | None]:
        """What each page of the guest holds, None where it was never touched."""
        mm = self.guests[guest]
        return [mm.frames[page].content if page in mm.frames else None for page in range(mm.size)]

    def _mark(self, mm: Mm, pages: range) -> None:
        mm.mergeable.update(pages)
        if pages and mm not in self.slots:
            self._register(mm)

    def _register(self, mm: Mm) -> None:
        if self.cursor is None or self.running == 2:
            self.slots.append(mm)
        else:
            self.slots.insert(self.slots.index(self.cursor), mm)

    def _unmerge(self, mm: Mm, pages: range) -> None:
        for page in pages:
            frame = mm.frames.get(page)
            if page in mm.mergeable and frame and (frame.node or frame is self.zero_page):
                self.cow_ksm += frame is not self.zero_page
                self.cow_other += frame is self.zero_page
                mm.map(page, Frame(frame.content))

    # --- knobs and counters ---------------------------------------------------------------------------------------

    def run(self, value: int) -> None:
        """Write the knob `run`."""
        if value == 2 and self.running != 2:
            self._unmerge_all()
        self.running = value

    def set_smart_scan(self, on: bool) -> None:
        """Write the knob `smart_scan`."""
        self.smart_scan = on

    def set_use_zero_pages(self, on: bool) -> None:
        """Write the knob `use_zero_pages`."""
        self.use_zero_pages = on

    def _unmerge_all(self) -> None:
        for mm in list(self.slots):
            self._unmerge(mm, range(mm.size))
            self._free_items(mm, 0, mm.size)
            if mm.exiting:
                self.slots.remove(mm)
        for node in self._nodes():
            self._remove(node)
        self.empty_chains = 0
        self.full_scans = 0
        self.cursor = None

    def _nodes(self) -> list[StableNode]:
        nodes: list[StableNode] = []
        for entry in self.stable.values():
            nodes += entry.dups if isinstance(entry, Chain) else [entry]
        return nodes

    def counters(self) -> dict[str, int]:
        """Every counter, recounted from the objects."""
        nodes = self._nodes()
        chains = [entry for entry in self.stable.values() if isinstance(entry, Chain)]
        items = [item for mm in self.guests for item in mm.items.values()]
        shared = sum(1 for node in nodes if node.items)
        sharing = sum(len(node.items) - 1 for node in nodes if node.items)
        unshared = sum(item.unstable for item in items)
        slots, headers = len(self.slots), len(nodes) + len(chains) + self.empty_chains
        frames = {frame for mm in self.guests for frame in mm.frames.values()} - {self.zero_page}
        return {
            "pages_shared": shared,
            "pages_sharing": sharing,
            "pages_unshared": unshared,
            "pages_volatile": max(0, len(items) - shared - sharing - unshared),
            "pages_scanned": self.pages_scanned,
            "pages_skipped": self.pages_skipped,
            "full_scans": self.full_scans,
            "stable_node_chains": len(chains) + self.empty_chains,
            "stable_node_dups": sum(len(chain.dups) for chain in chains),
            "ksm_zero_pages": len(self.zero_page.mappers),
            "items": len(items),
            "frames": len(frames),
            "metadata": len(items) * ITEM_BYTES + headers * NODE_BYTES + slots * SLOT_BYTES,
            "cow_ksm": self.cow_ksm,
            "cow_other": self.cow_other,
            "huge_pages": sum(len(mm.huge) for mm in self.guests),
            "thp_split_page": self.thp_split_page,
            "thp_fault_alloc": self.thp_fault_alloc,
            "thp_collapse_alloc": self.thp_collapse_alloc,
        }

    # --- ksmd -----------------------------------------------------------------------------------------------------

    def batch(self, pages_to_scan: int, now: int) -> None:
        """One batch of ksmd at host time *now* (ns)."""
        if self.running != 1 or not self.slots:
            return
        for _ in range(pages_to_scan):
            item = self._fetch()
            if item is None:
                return
            self._decide(item, now)
            self.pages_scanned += 1

    def _fetch(self) -> Item | None:
        if self.cursor is None:
            self.unstable.clear()
            self._enter(self.slots[0])
        while self.cursor:
            item = self._next_item(self.cursor)
            if item:
                return item
            self._next_slot(self.cursor)
        self.full_scans += 1
        return None

    def _enter(self, mm: Mm | None) -> None:
        self.cursor = mm
        self.address = 0
        self.met_area = False

    def _next_item(self, mm: Mm) -> Item | None:
        if mm.exiting:
            return None
        self.met_area = self.met_area or bool(mm.mergeable)
        while self.address < mm.size:
            page = self.address
            self.address += 1
            if not self._in_place(mm, page):
                self._free_items(mm, page, page + 1)
                continue
            item = mm.items.setdefault(page, Item(mm, page))
            if not self._skips(item):
                return item
        return None

    def _next_slot(self, mm: Mm) -> None:
        index = self.slots.index(mm) + 1
        following = self.slots[index] if index < len(self.slots) else None
        if mm.exiting:
            self._free_items(mm, 0, mm.size)
        if mm.exiting or not self.met_area:
            self.slots.remove(mm)
        self._enter(following)

    def _in_place(self, mm: Mm, page: int) -> bool:
        return page in mm.mergeable and page in mm.frames and mm.frames[page] is not self.zero_page

    def _free_items(self, mm: Mm, first: int, end: int) -> None:
        for page in range(first, end):
            item = mm.items.pop(page, None)
            if item:
                self._detach(item)

    def _skips(self, item: Item) -> bool:
        if not self.smart_scan or item.frame.node:
            return False
        age = item.age
        item.age = min(255, age + 1)
        if age < 3:
            return False
        if item.remaining == 0:
            item.remaining = skip_count(age)
            return False
        item.remaining -= 1
        self.pages_skipped += 1
        self._detach(item)
        return True

    def _decide(self, item: Item, now: int) -> None:
        frame = item.frame
        if frame.node:
            if item.node is not frame.node:
                self._detach(item)
                self._attach(item, frame.node)
            return
        if not self.checksum_first and self._merges(item, frame, now):
            return
        self._detach(item)
        if item.old != frame.content:
            item.old = frame.content
            return
        if frame.content == 0 and self.use_zero_pages and self._split(item.mm, item.page):
            item.mm.map(item.page, self.zero_page)
            return
        if self.checksum_first and self._merges(item, frame, now):
            return
        self._seek_equal(item, frame, now)

    # --- the stable tree ------------------------------------------------------------------------------------------

    def _merges(self, item: Item, frame: Frame, now: int) -> bool:
        node = self._stable_search(frame.content, now)
        if node is None:
            return False
        self._detach(item)
        if self._split(item.mm, item.page):
            item.mm.map(item.page, node.frame)
            self._attach(item, node)
        return True

    def _stable_search(self, content: int, now: int) -> StableNode | None:
        self.empty_chains = 0
        entry = self.stable.get(content)
        if isinstance(entry, Chain):
            return self._choose(entry, content, now)
        if entry and entry.dead:
            self._remove(entry)
            return None
        return entry if entry and self._takes_more(entry) else None

    def _takes_more(self, node: StableNode) -> bool:
        return 1 <= len(node.items) < self.max_page_sharing

    def _choose(self, chain: Chain, content: int, now: int) -> StableNode | None:
        whole = now - chain.pruned >= self.prune_ns
        if whole:
            chain.pruned = now
        best: StableNode | None = None
        for node in list(chain.dups):
            if node.dead:
                self._remove(node)
            elif self._takes_more(node) and (best is None or len(node.items) > len(best.items)):
                best = node
                if not whole:
                    break
        self.empty_chains = 0
        if len(chain.dups) == 1:
            self._dissolve(chain, content)
        elif best and best is not chain.dups[0] and len(best.items) + 1 < self.max_page_sharing:
            chain.dups.remove(best)
            chain.dups.insert(0, best)
        return best

    def _dissolve(self, chain: Chain, content: int) -> None:
        [node] = chain.dups
        node.chain = None
        self.stable[content] = node

    def _stable_insert(self, node: StableNode, now: int) -> None:
        content = node.frame.content
        entry = self.stable.get(content)
        if isinstance(entry, Chain) and len(entry.dups) == 1:
            self._dissolve(entry, content)
            entry = self.stable[content]
        if isinstance(entry, StableNode):
            chain = Chain(now, [entry])
            entry.chain = chain
            self.stable[content] = entry = chain
        if entry is None:
            self.stable[content] = node
        else:
            node.chain = entry
            entry.dups.insert(0, node)

    def _remove(self, node: StableNode) -> None:
        for item in node.items:
            item.node = None
        node.frame.node = None
        if node.chain:
            node.chain.dups.remove(node)
        if not node.chain or not node.chain.dups:
            del self.stable[node.frame.content]
            self.empty_chains += bool(node.chain)

    def _attach(self, item: Item, node: StableNode) -> None:
        item.node = node
        node.items.add(item)

    def _detach(self, item: Item) -> None:
        if item.node and item.node.dead:
            self._remove(item.node)
        elif item.node:
            item.node.items.remove(item)
            item.node = None
        elif item.unstable:
            item.unstable = False
            if self.unstable.get(item.sought) is item:
                del self.unstable[item.sought]

    # --- the unstable tree ----------------------------------------------------------------------------------------

    def _seek_equal(self, item: Item, frame: Frame, now: int) -> None:
        content = frame.content
        other = self.unstable.get(content)
        if other and (not self._in_place(other.mm, other.page) or other.frame is frame):
            return
        if other and other.frame.content == content:
            self._promote(item, other, now)
            return
        self.unstable[content] = item
        item.unstable = True
        item.sought = content

    def _promote(self, item: Item, other: Item, now: int) -> None:
        together = (
            item.page // BLOCK in item.mm.huge and item.mm is other.mm and item.page // BLOCK == other.page // BLOCK
        )
        if not self._split(item.mm, item.page) or together or not self._split(other.mm, other.page):
            return
        node = StableNode(item.frame)
        item.frame.node = node
        self._detach(other)
        other.mm.map(other.page, item.frame)
        self._stable_insert(node, now)
        self._attach(other, node)
        self._attach(item, node)
