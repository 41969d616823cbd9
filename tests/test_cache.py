"""What shared frames save in the last-level cache."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machine import empty_memory
from one_host import end, run, size

from sim.cost import prices as price_sets
from sim.cost.cache import Cache, Reader
from sim.cost.lru import misses
from sim.cost.prices import Llc, Price
from sim.memory import pages as memory
from sim.memory.pages import BLOCK, CONTENT, KIND, KSM, MAPS, Memory

PRICES = price_sets.load("emerald-rapids")
MISS_NS = 50.0


def cache(pages: int) -> Cache:
    """A cache for so many pages."""
    miss = Price(ns=MISS_NS, source="made up for this test")
    llc = Llc(per_core=size(pages), miss=miss, source="made up for this test")
    return Cache(PRICES.model_copy(update={"llc": llc}), 1)


def guests(number: int, pages: int, shared: int) -> Memory:
    """Guests of which so many first pages are the same in all of them."""
    blocks = -(-pages // BLOCK)
    m = empty_memory(pages=number * blocks * BLOCK, guests=number, frames=number * blocks * BLOCK)
    for guest in range(number):
        first = guest * blocks * BLOCK
        m.guest[guest, [memory.FIRST, memory.PAGES]] = first, pages
        m.place[first : first + pages] = memory.PRESENT
        m.accesses[first : first + pages] = 1
        m.place[first : first + shared] |= memory.SHARED
        m.held[first : first + shared] = np.arange(shared)
    m.frame[:shared, [CONTENT, KIND, MAPS]] = 1, KSM, number
    m.counts[memory.FRAME_HIGH] = shared
    return m


def readers(m: Memory, rate: float) -> list[Reader]:
    """All guests, each page of which is accessed at that rate (per ns)."""
    spans = m.guest[:, [memory.FIRST, memory.PAGES]].tolist()
    return [Reader(first, pages, np.array([0, pages]), np.array([0.0, rate])) for first, pages in spans]


@pytest.mark.parametrize("number", [2, 5])
def test_pages_that_all_guests_share_need_the_cache_once(number):
    m = guests(number, pages=1000, shared=1000)

    saved = cache(400).saved(m, readers(m, 1e-6))

    accesses = number * 1000 * 1e-6
    assert saved == pytest.approx(accesses * (400 / 1000 - 400 / (number * 1000)) * MISS_NS)


@pytest.mark.parametrize(("shared", "pages"), [(0, 400), (1000, 2000)])
def test_nothing_shared_or_everything_in_the_cache_anyway_saves_nothing(shared, pages):
    m = guests(2, pages=1000, shared=shared)

    assert cache(pages).saved(m, readers(m, 1e-6)) == 0


def test_the_zero_page_is_one_frame():
    m = guests(1, pages=1000, shared=0)
    m.place[:500] |= memory.ZERO

    together = misses(np.array([500, 1]), np.array([1e-6, 500e-6]), 400) @ np.array([500, 1])
    apart = 1000 * 1e-6 * (1 - 400 / 1000)
    assert cache(400).saved(m, readers(m, 1e-6)) == pytest.approx((apart - together) * MISS_NS)


@given(data=st.data())
def test_sharing_never_costs_cache_and_frames_may_be_grouped(data):
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    m = guests(3, pages=600, shared=data.draw(st.integers(1, 600)))
    shared = np.flatnonzero(m.place & memory.SHARED)
    m.held[shared] = draw.integers(0, len(shared), len(shared))
    m.counts[memory.FRAME_HIGH] = len(shared)
    rates = [np.array([0.0, rate]) for rate in draw.uniform(1e-9, 1e-3, 3)]
    all_readers = [Reader(each.first, 600, each.counts, rate) for each, rate in zip(readers(m, 0), rates, strict=True)]
    capacity = data.draw(st.integers(1, 2000))

    saved = cache(capacity).saved(m, all_readers)

    of_page = np.concatenate([np.full(600, rate[1]) for rate in rates])
    where = np.concatenate([np.arange(each.first, each.first + 600) for each in all_readers])
    is_shared = m.place[where] & memory.SHARED != 0
    frames = np.bincount(m.held[where[is_shared]], of_page[is_shared])
    each = np.concatenate([of_page[~is_shared], frames[frames > 0]])
    ones = np.ones(len(of_page), np.int64)
    exact = misses(ones, of_page, capacity).sum() - misses(ones[: len(each)], each, capacity).sum()
    assert saved >= -1e-9
    assert saved == pytest.approx(exact * MISS_NS, abs=0.01 * of_page.sum() * MISS_NS)


def test_guests_of_a_run_gain_once_their_pages_are_merged():
    parts = [{"name": "system", "size": "100%", "pool": "system", "reads": {"rate": "1/s"}}]
    vm = {"name": "web", "count": 4, "memory": size(8 * BLOCK), "load": 0.5, "image": {"parts": parts}}
    result = run(vm, duration="6s", cores=1, ksm={"run": 1, "pages_to_scan": 20_000}, prices="emerald-rapids")

    saved = result.samples["llc_saved_ns"]
    assert saved.iloc[0] == 0
    assert saved.iloc[-1] > saved.iloc[-2] > 0
    assert result.summary["llc_gain_percent"] == pytest.approx(
        100 * saved.iloc[-1] / (end(result)["work_cpu_ns"] + end(result)["walk_cpu_ns"] - saved.iloc[-1])
    )
