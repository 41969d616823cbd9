"""Sharing under Xen: a scanner in rounds, Difference Engine and Satori, by hand-counted examples and laws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_host import at, end, equal, guest, part, run
from squeezed import (
    CONTENTS,
    DISK,
    FRESH,
    POOL,
    READ,
    WATERMARKS,
    WRITTEN,
    Speeds,
    Squeezed,
    check_due,
    check_writes,
    free_frames,
    on_lists,
)

from sim.columns import PAGE_BYTES
from sim.errors import UserError
from sim.memory import pages as memory
from sim.sharing import small_pages as small
from sim.sharing.clock import Clock
from sim.sharing.difference_engine import DifferenceEngine
from sim.sharing.kernels import V6_18
from sim.sharing.room import Site, Squeeze
from sim.units import MIB, MILLISECOND

XEN = {"prices": "xen-2008"}
CYCLE_S = 20
"""A cycle of Difference Engine: five scans, one every 4 s."""


def engine(*vms: Any, duration: str, **options: Any) -> Any:
    """What became of guests on a host with Difference Engine."""
    host = {key: options.pop(key) for key in ("memory", "swap") if key in options}
    return run(*vms, duration=duration, difference_engine=options, **XEN, **host)


# --- the scanner -----------------------------------------------------------------------------------------------------


def test_a_round_shares_equal_pages_of_all_guests_or_of_each():
    vms = [guest(name, part("common", 100, pool="os"), equal("own", 50), pages=512) for name in ("a", "b")]

    everywhere, inside = (
        end(run(*vms, duration="61s", xen={"within": within, "superpages": 0}, **XEN)) for within in ("host", "guest")
    )

    assert (everywhere["pages_shared"], everywhere["pages_sharing"]) == (102, 100 + 2 * 49)
    assert (inside["pages_shared"], inside["pages_sharing"]) == (2, 2 * 49)


def test_a_round_a_minute_takes_the_published_time_for_four_gib():
    """Source: Chiang, Li, Chiueh, VEE 2013, figure 5b: 8 to 10 s. The price is the middle of that: no check of it."""
    last = end(run(guest("windows", part("memory", 1 << 20), pages=1 << 20), duration="119s", xen={}, **XEN))

    assert last["full_scans"] == 1
    assert 8 < last["ksmd_cpu_ns"] / 1e9 < 10


def test_a_superpage_is_split_when_one_of_its_pages_is_shared():
    vms = [guest(name, part("common", 1, pool="os"), part("own", 1023), pages=1024) for name in ("a", "b")]

    last = end(run(*vms, duration="61s", xen={}, **XEN))

    assert (last["pages_sharing"], last["thp_split_page"]) == (1, 2)
    assert last["mem_huge_bytes"] == 2 * 2 * MIB


def test_a_page_of_zeros_in_a_superpage_is_shared_and_not_unmapped():
    last = end(run(guest("vm", part("zero", 512, zero=True), pages=512), duration="61s", xen={}, **XEN))

    assert (last["pages_shared"], last["pages_sharing"], last["mem_touched_bytes"]) == (1, 511, 2 * MIB)


# --- Difference Engine -----------------------------------------------------------------------------------------------


def test_pages_are_left_alone_until_the_clock_has_come_by_twice_and_shared_within_a_cycle():
    vm = guest("vm", equal("equal", 1000), part("groups", 1000, duplicates=10), pages=2048)
    result = engine(vm, duration="40s", patch=0, compress=0)

    assert at(result, 7)["pages_sharing"] == 0
    assert 0 < at(result, 12)["pages_sharing"] < 999 + 900
    assert at(result, 4 + CYCLE_S)["pages_sharing"] == 999 + 900


def similar(pages: int, family: int, size: int) -> Any:
    return part("similar", pages, similar={"pages": family, "patch": f"{size}B"})


def test_similar_pages_become_differences_from_one_of_them():
    """20 families of 5: one page of each stays, and 80 differences of 1 KiB fill 20 frames."""
    last = end(engine(guest("vm", similar(100, 5, 1024), pages=512), duration="30s", compress=0))

    assert (last["pages_patched"], last["patches"], last["rebuilds"]) == (80, 80, 0)
    assert (last["mem_private_bytes"], last["mem_shared_bytes"]) == (0, 20 * PAGE_BYTES)
    assert last["mem_pool_bytes"] == 20 * PAGE_BYTES
    assert last["pages_compressed"] == 0


@pytest.mark.parametrize(("size", "patched"), [(2048, 80), (2064, 0)])
def test_a_difference_is_kept_up_to_half_a_page(size, patched):
    """Source: Gupta and others, OSDI 2008, section 4.4."""
    last = end(engine(guest("vm", similar(100, 5, size), pages=512), duration="30s", compress=0))

    assert last["pages_patched"] == patched


def test_pages_are_compressed_only_when_nobody_used_them_for_a_cycle():
    vm = guest("vm", part("text", 400, compresses_to="25%"), part("noise", 100, compresses_to="90%"), pages=512)
    result = engine(vm, duration="1min")

    assert at(result, 4 + CYCLE_S - 1)["pages_compressed"] == 0
    last = end(result)
    assert (last["pages_compressed"], last["compressions"]) == (400, 400)
    assert last["mem_private_bytes"] == 100 * PAGE_BYTES
    assert last["mem_pool_bytes"] < 400 * PAGE_BYTES * 0.28


def test_pages_in_use_are_shared_but_not_kept_small():
    reads, writes = {"rate": "10/s"}, {"rate": "10/s"}
    vms = [
        guest(
            name, part("read", 100, pool="os", similar={"pages": 5, "patch": "1KiB"}, reads=reads),
            part("own", 100, similar={"pages": 5, "patch": "1KiB"}, reads=reads, compresses_to="10%"),
            part("written", 100, pool="heap", writes=writes), pages=512,
        )
        for name in ("a", "b")
    ]  # fmt: skip
    last = end(engine(*vms, duration="2min"))

    assert last["pages_sharing"] == 100
    assert last["pages_patched"] == last["pages_compressed"] == 0


def test_an_access_rebuilds_a_page_at_the_published_price():
    """Source: OSDI 2008, table 2: 18.6 us to build a page from its difference, 10.4 us to decompress one."""
    seldom = {"rate": "0.01/s"}
    vm = guest(
        "vm", part("patched", 500, similar={"pages": 5, "patch": "1KiB"}, reads=seldom),
        part("packed", 500, compresses_to="20%", reads=seldom), pages=1024,
    )  # fmt: skip
    result = engine(vm, duration="4min")
    last, work = end(result), result.manifest["work"]

    assert min(work["unpatch"], work["uncompress"]) > 30
    assert last["patches"] - work["unpatch"] == last["pages_patched"]
    assert last["compressions"] - work["uncompress"] == last["pages_compressed"]
    assert last["rebuilds"] == work["unpatch"] + work["uncompress"]
    assert last["swap_cpu_ns"] == work["unpatch"] * 18_600 + work["uncompress"] * 10_400


def test_a_host_of_xen_refuses_what_is_linux_own():
    vm = guest("vm", part("memory", 100), pages=512, memory_limit="128KiB")
    for mechanism in ({"xen": {}}, {"difference_engine": {}}, {"satori": {}}):
        with pytest.raises(UserError, match="memory_limit"):
            run(vm, duration="1s", **mechanism)
        with pytest.raises(UserError, match="hugetlbfs"):
            run(guest("vm", pages=512), duration="1s", hugetlbfs={"nr_hugepages": 1}, **mechanism)
    with pytest.raises(UserError, match="zram"):
        run(guest("vm", pages=512), duration="1s", difference_engine={}, swap={"device": "zram", "size": "1GiB"})


# --- laws of Difference Engine ---------------------------------------------------------------------------------------


class OnXen(Squeezed):
    """A host with Difference Engine that is short of memory; each page resembles the one after it or before it."""

    def __init__(self, *, frames: int, slots: int, **options: Any) -> None:
        super().__init__(frames=frames, slots=slots)
        asked = DifferenceEngine.model_validate({"every": "3ms", "passes": 2, **options})
        squeeze = Squeeze(WATERMARKS, swappiness=60, page_cluster=3, slots=slots, device=DISK if slots else None,
                          look_ns=100, compresses=False)  # fmt: skip
        site = Site(
            kernel=V6_18, hz=250, frames=frames, pages=memory.BLOCK, guests=12, contents=CONTENTS, nodes=1,
            work_ps=np.full(len(Clock.WORK), 1000), split_ps=0, cold_milli=0, rates=Speeds().rates(), key=7,
            squeeze=squeeze,
        )  # fmt: skip
        self.engine = Clock(asked, site)
        self.scanner = cast(Any, self.engine)

    def _add(self, pages: int, limit: int | None, level: float, about: Mapping[str, Any]) -> int:
        vm = super()._add(pages, limit, level, about)
        self.engine.set_similar(vm, (1 + np.arange(pages) // 2).astype(np.int32), np.full(pages, 70, np.uint8))
        return vm

    def check(self) -> None:
        """Nothing is lost, and everything that the host counts is as often there."""
        small.count_pins(self.engine.m, self.engine.s)
        for vm, wrote in self.wrote.items():
            for page, (read, written) in enumerate(zip(self.read(vm), wrote, strict=True)):
                kind = self.kinds[vm][page]
                left = (kind == WRITTEN and read == POOL) or (kind == FRESH and read < 0)
                assert read == written or left, f"guest {vm} page {page}: reads {read}, wrote {written}"
        recount_small(self.engine)
        check_due(self.engine.m)


def recount_small(engine: Clock) -> None:
    """Count what every number of the host stands for."""
    m, s = engine.m, engine.s
    present, swapped, shared = (m.place & bit != 0 for bit in (memory.PRESENT, memory.SWAPPED, memory.SHARED))
    own = present & ~shared
    pooled = np.flatnonzero(swapped & ~shared & (m.seen & memory.POOLED != 0))
    patched = pooled[m.seen[pooled] & memory.PATCHED != 0]
    maps = Counter(m.held[present & shared].tolist())
    needed = Counter((s.base[patched] - 1).tolist())
    waits = Counter(m.held[swapped & shared].tolist())

    assert not np.any(m.seen[m.place & memory.SWAPPED == 0] & memory.PATCHED)
    for frame in range(int(m.counts[memory.FRAME_HIGH])):
        kind, mapped = m.frame[frame, [memory.KIND, memory.MAPS]]
        if kind == memory.ANON:
            assert mapped == maps[frame] + (frame in needed)
            assert s.pins[frame] == needed[frame]
    frames = set(maps) | set(needed)
    counted = {
        memory.PRIVATE: np.count_nonzero(own),
        memory.FRAMES: len(frames),
        memory.TOUCHED: np.count_nonzero(present),
        memory.SHARERS: np.count_nonzero(present & shared),
        memory.SWAPPED_PAGES: np.count_nonzero(swapped),
        memory.SLOTS_USED: np.count_nonzero(swapped & ~shared) + len(waits),
        memory.POOLED_PAGES: len(pooled),
        memory.POOL: -(-int(m.packed[pooled].sum()) * 16 // PAGE_BYTES),
    }
    assert {index: int(m.counts[index]) for index in counted} == counted
    assert counted[memory.SLOTS_USED] - len(pooled) <= m.counts[memory.SWAP_SLOTS]
    assert free_frames(m) >= -1
    check_writes(cast(Any, engine))
    for vm in engine.vms:
        pages = engine.pages_of(vm)
        owned = [frame for frame in frames if m.frame_lru[frame, memory.OWNER] == vm]
        assert m.guest[vm, memory.CHARGED] == np.count_nonzero(own[pages]) + len(owned)
        pinned = {-(frame + 1) for frame in owned if frame in needed}
        expected = {page + 1 for page in range(pages.start, pages.stop) if own[page]}
        assert set(on_lists(m, vm)) == (expected | {-(frame + 1) for frame in owned}) - pinned


def test_what_pages_are_built_from_outlives_the_page_it_was():
    """Of 20 pairs one page is kept as a difference; the other one is written, and its frame stays for the first."""
    host = OnXen(frames=400, slots=0, compress=0)
    vm = host.start(list(range(1, 41)), mergeable=True)
    host.pass_time(60 * MILLISECOND)
    patched = host.swapped(vm)
    assert sorted(page // 2 for page in patched) == list(range(20))

    for page in set(range(40)) - set(patched):
        host.write(vm, page, [100 + page])
    host.check()
    assert host.swapped(vm) == patched
    assert (host.engine.s.n[small.IDLE_FRAMES], host.counts["mem_private_bytes"]) == (20, 20 * PAGE_BYTES)

    host.write(vm, patched[0], [7])
    host.check()
    assert host.engine.s.n[small.IDLE_FRAMES] == 19


def test_a_guest_that_ends_leaves_the_frames_that_others_pages_are_built_from():
    host = OnXen(frames=400, slots=0, compress=0)
    first, second = (host.start(list(range(start, start + 40)), mergeable=True) for start in (1, 101))
    host.pass_time(60 * MILLISECOND)
    built = [len(host.swapped(vm)) for vm in (first, second)]
    assert sum(built) == 60
    assert min(built) > 20

    host.exit(first)
    host.check()
    assert len(host.swapped(second)) == built[1]
    assert host.engine.s.n[small.IDLE_FRAMES] == 40 - built[0] > 0


_SOME = st.integers(0, 11)
_KINDS = st.sampled_from([0, WRITTEN, FRESH, READ])
_CONTENTS = st.lists(st.integers(0, 12) | st.just(-2), min_size=4, max_size=40)
_ACTIONS = st.one_of(
    st.tuples(st.just("start"), _CONTENTS, _KINDS),
    st.tuples(st.just("write"), _SOME, st.integers(0, 30), st.lists(st.integers(0, 12), min_size=1, max_size=8)),
    st.tuples(st.just("discard"), _SOME, st.integers(0, 30), st.integers(1, 8)),
    st.tuples(st.just("exit"), _SOME),
    st.tuples(st.just("pass_time"), st.integers(1, 20)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_ACTIONS, max_size=30), st.sampled_from([30, 60, 400]), st.sampled_from([0, 20, 400]))
def test_nothing_is_lost_whatever_guests_do_and_however_little_memory_there_is(actions, frames, slots):
    host = OnXen(frames=frames, slots=slots)
    for name, *what in actions:
        running = sorted(host.wrote)
        if name == "start" and host.count < 12:
            host.start(*what, mergeable=True)
        elif name == "pass_time":
            host.pass_time(what[0] * MILLISECOND)
        elif name != "start" and running:
            vm = running[what[0] % len(running)]
            pages = len(host.wrote[vm])
            first = what[1] % pages if name != "exit" else 0
            if name == "exit":
                host.exit(vm)
            elif name == "write":
                host.write(vm, first, what[2][: pages - first])
            else:
                host.discard(vm, first, min(what[2], pages - first))
        host.check()


# --- Satori ----------------------------------------------------------------------------------------------------------


def test_what_two_guests_read_is_shared_at_the_read_and_nothing_else_is():
    parts = (part("files", 100, pool="disk", file=True), part("heap", 100, pool="heap"))
    vms = [guest("first", *parts, pages=512), guest("second", *parts, pages=512, start="5s")]
    result = run(*vms, duration="10s", satori={}, **XEN)

    assert at(result, 4)["pages_sharing"] == 0
    assert at(result, 5)["pages_sharing"] == 100
    assert end(result)["source_cpu_ns"] == 200 * 8_600 + 100 * 6_200


def test_a_file_that_is_read_again_is_shared_again():
    bursts = [{"part": "files", "at": "2s"}, {"part": "files", "at": "4s", "leaves": "original"}]
    vm = guest("vm", part("files", 100, pool="disk", file=True), pages=512, count=2, bursts=bursts)
    result = run(vm, duration="6s", satori={}, **XEN)

    assert [at(result, second)["pages_sharing"] for second in (1, 3, 5)] == [100, 0, 100]


def test_satori_stands_beside_difference_engine():
    common = {"pool": "os", "compresses_to": "90%"}
    vm = guest("vm", part("files", 100, file=True, **common), part("heap", 100, **{**common, "pool": "heap"}),
               pages=512, count=2)  # fmt: skip
    result = run(vm, duration="30s", satori={}, difference_engine={}, **XEN)

    assert at(result, 1)["pages_sharing"] == 100
    assert end(result)["pages_sharing"] == 200
    with pytest.raises(UserError, match="no system has it beside ksm"):
        run(vm, duration="1s", satori={}, ksm={})
