"""The limits of zswap's pool, and when it takes pages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.errors import At
from sim.reclaim.pressure import is_full
from sim.reclaim.swap import Swap
from sim.reclaim.zswap import Zswap
from sim.units import GIB, MIB
from tests.one_host import end, guest, part, run

MEMTOTAL_KB = 24_684_092


def swap(device: str, **settings: object) -> Swap:
    return Swap.model_validate({"device": device, "size": "1GiB", **settings})


def test_limits_are_those_that_a_kernel_had() -> None:
    pool = Zswap(max_pool_percent=1).pool(MEMTOTAL_KB * 1024)

    assert pool.most * 4 == 246_840  # Zswap in /proc/meminfo when the pool was full
    assert pool.again * 4 == pytest.approx(222_144, abs=16)  # and when it had written back: zspages have 4 pages


def test_a_full_pool_takes_pages_again_at_its_threshold() -> None:
    most, again = Zswap(max_pool_percent=10).pool(GIB)
    full, takes = False, []
    for pages in (most - 1, most, most - 1, again + 1, again, most - 1):
        full = is_full(pages, full, most, again)
        takes.append(not full)

    assert takes == [True, False, False, False, True, True]


@given(st.integers(1, 100), st.integers(0, 100), st.integers(1 << 20, 1 << 40), st.booleans())
def test_a_pool_that_is_full_takes_nothing_and_one_below_its_threshold_everything(
    percent: int, accept: int, memory: int, was_full: bool
) -> None:
    most, again = Zswap(max_pool_percent=percent, accept_threshold_percent=accept).pool(memory)

    assert 0 <= again <= most <= memory // 4096
    assert is_full(most, was_full, most, again)
    assert again == most or not is_full(again, was_full, most, again)


@pytest.mark.parametrize(("behind", "message"), [(None, "has none"), (swap("zram"), "twice")])
def test_a_pool_before_nothing_is_refused(behind: Swap | None, message: str) -> None:
    with pytest.raises(At, match=message):
        Zswap().check(behind)
    Zswap().check(swap("ssd"))


def test_a_page_that_does_not_get_smaller_takes_one_of_the_pool() -> None:
    # tests/kernel/test_zswap_live.py does the same on the kernel.
    vm = guest("vm", part("a", 4000, compresses_to="100%"), pages=4000, mergeable=False)

    result = run(vm, duration="5s", memory="12MiB", swap={"device": "ssd", "size": "64MiB"}, zswap={})

    last = end(result)
    assert last.zswpout > 0
    assert last.mem_pool_bytes == 4096 * (last.zswpout - last.zswpwb)
    assert last.mem_pool_bytes <= 0.2 * 12 * MIB
