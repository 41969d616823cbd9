import itertools
from collections import Counter

import machine
import naive
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from machine import Machine

from sim.memory import pages as memory
from sim.memory.pages import BLOCK
from sim.sharing import ksm_pass as ksmd

EVERYTHING = 1 << 40
"""More pages than any guest has: one full scan per batch."""

# --- the plain twin ---------------------------------------------------------------------------------------------------

BLOCKS = 16
MOST_GUESTS = 12

pages_of_guest = st.one_of(st.integers(1, 12), st.integers(13, 60), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 40, 1100]))
images = st.tuples(
    pages_of_guest,
    st.integers(1, 8),  # different contents
    st.sampled_from([0.0, 0.3, 0.9]),  # share of pages with a content of their own
    st.sampled_from([0.0, 0.2]),  # share of pages never touched
    st.integers(0, 99),
)
place = st.integers(0, 2000)
content = st.one_of(st.none(), st.integers(0, 7))
batches = st.tuples(
    st.just("batch"), st.one_of(st.integers(1, 40), st.sampled_from([300, BLOCK, 1500, EVERYTHING])), st.integers(1, 12)
)
operations = st.one_of(
    batches,
    st.tuples(st.just("start"), images, st.booleans()),
    st.tuples(st.just("write"), place, place, content),
    st.tuples(st.just("write many"), place, place, st.integers(1, 40), content),
    st.tuples(st.just("unmap"), place, place, st.integers(1, 20)),
    st.tuples(st.just("exit"), place),
    st.tuples(st.just("fork"), place),
    st.tuples(st.just("madvise"), place, place, st.integers(1, 600), st.booleans()),
    st.tuples(st.just("run"), st.sampled_from([0, 1, 1, 2])),
    st.tuples(st.just("set_smart_scan"), st.booleans()),
    st.tuples(st.just("set_use_zero_pages"), st.booleans()),
)
scripts = st.tuples(
    st.lists(images, min_size=1, max_size=3), st.lists(st.tuples(operations, batches), min_size=1, max_size=12)
)
hosts = st.fixed_dictionaries(
    {
        "max_page_sharing": st.sampled_from([2, 3, 8, 256]),
        "smart_scan": st.booleans(),
        "use_zero_pages": st.booleans(),
        "checksum_first": st.booleans(),
        "prune_millisecs": st.sampled_from([0, 100, 2000]),
    }
)


class Play:
    """Carries a script out on two hosts alike and compares them after every batch."""

    def __init__(self, *hosts):
        self.hosts = hosts
        self.alive = []
        self.sizes = []
        self.blocks = 0
        self.own = itertools.count(-2, -1)

    def perform(self, images, steps):
        for image in images:
            self.step("start", image, True)
        for operation, then in steps:
            self.step(*operation)
            self.step(*then)

    def step(self, name, *arguments):
        getattr(self, "do_" + name.replace(" ", "_"), lambda *rest: self.do(name, *rest))(*arguments)

    def do(self, name, *arguments):
        for host in self.hosts:
            getattr(host, name)(*arguments)

    def has_room(self, pages):
        return len(self.sizes) < MOST_GUESTS and self.blocks + -(-pages // BLOCK) <= BLOCKS

    def add(self, pages):
        self.alive.append(len(self.sizes))
        self.sizes.append(pages)
        self.blocks += -(-pages // BLOCK)

    def guest(self, number):
        return self.alive[number % len(self.alive)] if self.alive else None

    def contents(self, image):
        pages, different, own, untouched, seed = image
        draw = np.random.default_rng(seed)
        kinds = draw.random(pages)
        common = draw.integers(0, different, pages)
        for kind, value in zip(kinds, common, strict=True):
            if kind < untouched:
                yield None
            else:
                yield next(self.own) if kind < untouched + own else int(value)

    def do_start(self, image, mergeable):
        if self.has_room(image[0]):
            self.do("start", list(self.contents(image)), mergeable)
            self.add(image[0])

    def do_write_many(self, number, first, pages, value):
        for page in range(first, first + pages):
            self.do_write(number, page, value)

    def do_write(self, number, page, value):
        guest = self.guest(number)
        if guest is not None:
            value = next(self.own) if value is None else value
            self.do("write", guest, page % self.sizes[guest], value)

    def do_unmap(self, number, first, pages):
        guest = self.guest(number)
        for page in range(first, first + pages) if guest is not None else ():
            self.do("unmap", guest, page % self.sizes[guest])

    def do_exit(self, number):
        guest = self.guest(number)
        if guest is not None:
            self.do("exit", guest)
            self.alive.remove(guest)

    def do_fork(self, number):
        guest = self.guest(number)
        if guest is not None and self.has_room(self.sizes[guest]):
            self.do("fork", guest)
            self.add(self.sizes[guest])

    def do_madvise(self, number, first, pages, mergeable):
        guest = self.guest(number)
        if guest is not None:
            first %= self.sizes[guest]
            self.do("madvise", guest, first, min(pages, self.sizes[guest] - first), mergeable)

    def do_batch(self, pages_to_scan, times):
        for _ in range(times):
            self.batch(pages_to_scan)
            self.compare()

    def batch(self, pages_to_scan):
        raise NotImplementedError

    def compare(self):
        one, other = self.hosts
        assert one.counters() == other.counters()


class WithTwin(Play):
    """The compiled loops and their plain twin."""

    def batch(self, pages_to_scan):
        compiled, plain = self.hosts
        compiled.batch(pages_to_scan)
        plain.batch(pages_to_scan, compiled.now)

    def compare(self):
        super().compare()
        compiled, plain = self.hosts
        check_arrays(compiled.m, compiled.k)
        for guest in self.alive:
            assert plain.read(guest) == compiled.read(guest)


def check_arrays(m, k):
    """Every sum kept along the way is what a recount gives."""
    present, shared, zero = (m.place & bit != 0 for bit in (memory.PRESENT, memory.SHARED, memory.ZERO))
    kinds = m.frame[:, memory.KIND]
    maps = np.bincount(m.held[shared], minlength=len(m.frame))
    links = np.bincount(k.link[k.link > 0] - 1, minlength=len(m.frame))
    used = kinds != 0
    counts = m.counts

    assert not np.any((shared | zero) & ~present)
    assert not np.any(shared & zero)
    assert np.array_equal(maps[used], m.frame[used, memory.MAPS])
    assert not maps[~used].any()
    assert np.array_equal(links[used], k.node[used, ksmd.MEMBERS] * (kinds[used] != memory.ANON))
    assert not links[~used].any()
    assert counts[memory.PRIVATE] == np.count_nonzero(present & ~shared & ~zero)
    assert counts[memory.FRAMES] == np.count_nonzero(maps)
    assert counts[memory.SHARERS] == np.count_nonzero(shared)
    assert counts[memory.KSM_ZERO] == np.count_nonzero(zero)
    assert counts[memory.TOUCHED] == np.count_nonzero(present)
    assert k.n[ksmd.NODES] == np.count_nonzero(kinds == memory.KSM)
    assert free_entries(m) == counts[memory.FRAME_HIGH] - np.count_nonzero(used)


def free_entries(m):
    """Length of the list of entries for shared frames that nothing uses."""
    at, length = m.counts[memory.FREE_FRAME], 0
    while at >= 0:
        assert m.frame[at, memory.KIND] == 0
        at, length = m.frame[at, memory.MAPS], length + 1
        assert length <= len(m.frame)
    return length


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(hosts, scripts)
def test_compiled_loops_and_their_plain_twin_agree_after_every_batch(host, script):
    WithTwin(Machine(**host), naive.Naive(**host)).perform(*script)
