"""Laws that hold for every way to share pages: whatever is in the registry is held to them, without a line more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_host import end, guest, part, run, scenario, size
from squeezed import pinned, recount

from sim.errors import UserError
from sim.host import Machine, Rows
from sim.memory import pages as memory
from sim.memory.pages import BLOCK, FRESH, NEVER, PAGE_BYTES
from sim.sharing import MECHANISMS
from sim.units import parse_duration

QUICK: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "ksm": ({"pages_to_scan": 1000, "smart_scan": 0}, "100ms"),
    "tps": ({"ShareScanTime": 10}, "10min"),
    "page_combining": ({"within": "host", "every": "1min"}, "2min"),
    "mergemem": ({"every": "1min"}, "2min"),
    "difference_engine": ({}, "1min"),
    "pfcache": ({}, "10s"),
    "saved_segments": ({"segments": {"boot": {}}}, "1s"),
}
"""Settings with which a mechanism shares soon, and how long that takes it; its defaults and an hour unless given."""

SWAPS = (None, {"device": "nvme", "size": "64MiB"}, {"device": "zram", "size": "64MiB"})
WRITERS = {"pool": "os", "new": "unique", "empty": "zero"}
"""Parts that are written at random, and what is left there."""


def a_while(name: str) -> int:
    """Time (ns) in which the mechanism shares what there is to share."""
    return parse_duration(QUICK.get(name, ({}, "1h"))[1])


def host_with(name: str, between: str = "all", **more: Any) -> Mapping[str, Any]:
    """A host that shares pages by a mechanism, and between whom."""
    quick = dict(QUICK.get(name, ({}, ""))[0])
    if name == "tps":
        return {name: quick | {"ShareForceSalting": 0 if between == "all" else 2}, **more}
    return {name: quick, "shares_between": between, **more}


def possible(*vms: Any, **host: Any) -> bool:
    """Whether such a host can have such guests."""
    try:
        scenario(*vms, duration="1s", **host)
    except UserError:
        return False
    return True


# --- a fleet whose guests come, write and go --------------------------------------------------------------------------


def image(own: int, rate: float) -> list[Mapping[str, Any]]:
    """Parts of a guest, written at random as often as *rate* (a second and page) says."""
    accesses = {"rate": f"{rate:.9f}/s"}
    busy = [part(name, 12, pool="os", writes=accesses | {"leaves": leaves}, reads=accesses)
            for name, leaves in WRITERS.items()]  # fmt: skip
    return [
        part("boot", 40, pool="boot", file=True),
        part("common", 60, pool="os"),
        part("zeros", 20, zero=True),
        part("pairs", 20, duplicates=2),
        part("own", own, similar={"pages": 4, "patch": "1KiB"}),
        *busy,
        part("later", 20, untouched=True),
    ]


def fleet(rate: float) -> list[Mapping[str, Any]]:
    """Guests of two tenants and of none; some are large enough for huge pages."""
    kinds = (("a", 2, "x", 20), ("b", 1, "x", BLOCK), ("c", 2, "y", 20), ("d", 1, None, BLOCK + 50))
    return [guest(name, *image(own, rate), pages=own + 196, count=count, **({"tenant": tenant} if tenant else {}))
            for name, count, tenant, own in kinds]  # fmt: skip


class Fleet:
    """A host and what its guests wrote last, as plain lists."""

    def __init__(self, name: str, between: str, frames: int, swap: Any, thp: bool) -> None:
        host = host_with(name, between, memory=size(frames))
        vms = fleet(0.3e9 / a_while(name))
        forked = [*vms, {"name": "fork", "memory": vms[0]["memory"], "fork_of": "a", "count": 2}]
        wanted = [{"watermarks": {"min_free_kbytes": 16}}, {"swap": SWAPS[1]}, {"swap": swap}] if swap else []
        for extra in [*wanted, {"thp": {"enabled": "always"}}] if thp else wanted:
            host = {**host, **extra} if possible(*vms, **{**host, **extra}) else host
        self.takes_pages_back = possible({**vms[0], "free_page_reporting": True}, **host)
        vms = forked if possible(*forked, **host) else vms
        asked = scenario(*vms, duration="100d", **host)
        [(only, host_name)] = asked.host_names()
        self.machine = Machine(
            only, host_name, asked.assignments()[host_name], seed=1, duration=asked.duration, sample_every=1
        )
        self.room = self.machine.scanner
        self.wrote: dict[int, Any] = {}
        """What each guest wrote last to each page, 0 where it never wrote."""
        self._fill, self.room.fill = self.room.fill, self._note  # type: ignore[method-assign]
        self.room.begin()

    def _note(self, index: int, contents: Any, now: int) -> None:
        self.wrote[index] = np.where(contents == NEVER, 0, contents).astype(np.int64)
        self._fill(index, contents, now)

    @property
    def now(self) -> int:
        """Host time (ns)."""
        return int(self.machine.env.now)

    @property
    def running(self) -> list[Any]:
        """Guests that live."""
        return [each for each in self.machine.guests if each.running]

    @property
    def killed(self) -> list[str]:
        """Guests that found no frame."""
        return [each.name for each in self.machine.guests if each.end == "oom-killed"]

    # --- what happens ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """The next guest starts; a fork has what its parent has."""
        each = next((each for each in self.machine.guests if not each.started), None)
        if each is None or (each.vm.fork_of and self.machine._parent_of(each) is None):
            return
        parent = self.machine._parent_of(each)
        self.machine._start(each)
        if parent:
            for one in (parent, each):
                self._see_names(one.index, self.wrote[parent.index])

    def _see_names(self, index: int, wrote: Any) -> None:
        """A fork numbers contents that one page alone held."""
        read = self.read(index)
        assert np.all((read == wrote) | (wrote < 0) | self._written_at_random(index))
        self.wrote[index] = read

    def read(self, index: int) -> Any:
        """What the guest reads; a page that it never touched reads as zeros."""
        read = self.room.read(index).astype(np.int64)
        return np.where(read == NEVER, 0, read)

    def _written_at_random(self, index: int) -> Any:
        mask = np.zeros(self.machine.guests[index].vm.pages, np.bool_)
        for name in WRITERS:
            mask[self.machine.guests[index].places[name]] = True
        return mask

    def write(self, number: int, first: int, what: list[int]) -> None:
        """A guest writes to its pages from the first one: new contents (-1), zeros, or what others have."""
        if not self.running:
            return
        each = self.running[number % len(self.running)]
        first %= each.vm.pages
        common = each.domain.pool("os", 60)
        contents = np.array([common[content - 1] if content > 0 else content for content in what], np.int32)
        contents = contents[: each.vm.pages - first]
        pages = np.arange(first, first + len(contents))
        self.wrote[each.index][pages] = contents
        self.machine._write(each, pages, contents)

    def discard(self, number: int, first: int, count: int) -> None:
        """A guest gives pages back, if the host takes them."""
        if not (self.running and self.takes_pages_back):
            return
        each = self.running[number % len(self.running)]
        first %= each.vm.pages
        pages = np.arange(first, min(first + count, each.vm.pages))
        self.wrote[each.index][pages] = 0
        self.room.discard(each.index, pages)

    def stop(self, number: int) -> None:
        """A guest ends."""
        if self.running:
            each = self.running[number % len(self.running)]
            self.machine._finish(each, self.now)
            self.machine._leave(each, "stopped", self.now)

    def wait(self, time: int) -> None:
        """Time (ns) goes by."""
        until = self.now + max(time, 1)
        self.machine._advance(until)
        self.machine.env.run(until=until)
        for source in self.room.sources:
            if source.every:
                source.act(until)

    # --- laws -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Whatever happened, these hold."""
        recount(self.room, [each.index for each in self.running])
        self._check_contents()
        self._check_domains()
        self._check_savings()

    def _check_contents(self) -> None:
        """Every guest reads what it wrote last, or what its random writes leave."""
        for each in self.running:
            read, wrote = self.read(each.index), self.wrote[each.index]
            fine = (read == wrote) | ((wrote == FRESH) & (read < 0))
            left = {"pool": np.isin(read, each.domain.pool("os", 60)), "new": read < 0, "empty": read == 0}
            for name, allowed in left.items():
                pages = each.places[name]
                fine[pages] |= allowed[pages]
            assert np.all(fine), (each.name, np.flatnonzero(~fine), read[~fine], wrote[~fine])

    def _check_domains(self) -> None:
        """No frame, and no slot of swap, is shared by guests of two domains, and no page built from another's."""
        m = self.room.m
        pages = np.flatnonzero(m.place & memory.SHARED)
        pairs = set(zip(m.held[pages].tolist(), self._domains_of(pages), strict=True))
        assert len(pairs) == len({frame for frame, _ in pairs})
        if hasattr(self.room, "s"):
            pages = np.flatnonzero((m.place & memory.SWAPPED != 0) & (m.seen & memory.PATCHED != 0))
            owners = m.frame_lru[self.room.s.base[pages] - 1, memory.OWNER]
            assert self._domains_of(pages) == [self.machine.guests[owner].domain.number for owner in owners]

    def _domains_of(self, pages: Any) -> list[int]:
        owners = self.room.m.block[pages // BLOCK, memory.GUEST]
        return [self.machine.guests[owner].domain.number for owner in owners]

    def _check_savings(self) -> None:
        """The table says how many frames are saved, and how many there are."""
        m, row = self.room.m, self.row()
        shared = m.place & (memory.PRESENT | memory.SHARED) == memory.PRESENT | memory.SHARED
        mappers, frames = np.count_nonzero(shared), len(set(m.held[shared].tolist()) | pinned(self.room))
        zeros = np.count_nonzero(m.place & memory.ZERO)
        assert row["saved_bytes"] == (mappers - frames + zeros) * PAGE_BYTES
        assert row["mem_shared_bytes"] == frames * PAGE_BYTES
        assert row["mem_used_bytes"] + row["mem_free_bytes"] == row["mem_total_bytes"]
        assert row["write_private_ns"] <= row["write_latency_worst_ns"]

    def row(self) -> Mapping[str, int]:
        """The host's sample of this moment."""
        rows = Rows()
        self.machine._record(rows, self.room.snapshot(self.now)[np.newaxis])
        return {name: int(values[0]) for name, values in self.machine._table(rows).items() if name != "host"}


deeds = st.one_of(
    st.tuples(st.just("start")),
    st.tuples(st.just("write"), st.integers(0, 7), st.integers(0, 800), st.lists(st.integers(-1, 12), max_size=30)),
    st.tuples(st.just("discard"), st.integers(0, 7), st.integers(0, 800), st.integers(1, 60)),
    st.tuples(st.just("stop"), st.integers(0, 7)),
)
waits = st.sampled_from([0.001, 0.1, 1.0, 3.0])
"""Parts of the time that sharing takes."""


@pytest.mark.parametrize("name", MECHANISMS)
@settings(max_examples=20)
@given(
    between=st.sampled_from(["all", "tenants", "guests"]),
    frames=st.sampled_from([400, 1200, 2000, 100_000]),
    swap=st.sampled_from(SWAPS),
    thp=st.booleans(),
    script=st.lists(st.tuples(deeds, waits), max_size=10),
)
def test_nothing_is_lost_and_everything_is_counted_once_whatever_happens(name, between, frames, swap, thp, script):
    host = Fleet(name, between, frames, swap, thp)
    for _ in range(3):
        host.start()
        host.check()
    for (deed, *about), time in script:
        getattr(host, deed)(*about)
        host.check()
        host.wait(round(time * a_while(name)))
        host.check()


@pytest.mark.parametrize("name", MECHANISMS)
def test_who_finds_no_frame_is_killed_and_nothing_else_is_lost(name):
    host = Fleet(name, "all", 720, {"device": "nvme", "size": "40KiB"}, False)
    for _ in range(6):
        host.start()
        host.wait(a_while(name) // 10)
        host.check()

    assert host.killed
    assert host.running


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize(("frames", "swap"), [(1000, SWAPS[1]), (1400, SWAPS[2])], ids=["disk", "zram"])
def test_contents_survive_swap(name, frames, swap):
    host = Fleet(name, "all", frames, swap, False)
    for _ in range(6):
        host.start()
    for step in range(6):
        host.wait(a_while(name))
        host.write(step, 0, [-1, 3] * 30)
        host.check()

    assert not host.killed
    away = ("mem_swapped_bytes", "mem_ballooned_bytes", "mem_compressed_bytes")
    assert max(host.row()[column] for column in away) > 0


# --- whole runs -------------------------------------------------------------------------------------------------------


def lives(name: str) -> list[Mapping[str, Any]]:
    """The fleet, whose guests come and go and write at random and in bursts."""
    unit = a_while(name)
    bursts = [{"part": "common", "at": f"{2 * unit}ns", "share": 0.5}]
    times = [(0, 0), (1, 0), (0, 3), (2, 5)]
    return [{**vm, "start": f"{start * unit}ns", "bursts": bursts, **({"stop": f"{stop * unit}ns"} if stop else {})}
            for vm, (start, stop) in zip(fleet(0.1e9 / unit), times, strict=True)]  # fmt: skip


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("swap", SWAPS[:2], ids=["roomy", "short"])
def test_a_run_has_the_same_bits_twice_and_whatever_the_sampling_interval(name, swap):
    unit = a_while(name)
    host = host_with(name, memory="2900KiB" if swap else "64MiB", **({"swap": swap} if swap else {}))
    often, again, seldom = (run(*lives(name), duration=f"{6 * unit}ns", sample_every=f"{every}ns", **host)
                            for every in (unit // 10, unit // 10, 3 * unit))  # fmt: skip

    assert often.samples.equals(again.samples)
    assert often.guests.equals(again.guests)
    assert often.guests.equals(seldom.guests)
    assert end(often).to_dict() == end(seldom).to_dict()


def still(name: str, count: int, **tenant: str) -> Mapping[str, Any]:
    """A guest at rest."""
    parts = [part("boot", 50, pool="boot", file=True), part("common", 50, pool="os"), part("zeros", 30, zero=True),
             part("pairs", 40, duplicates=2), part("own", 30, similar={"pages": 3, "patch": "1KiB"})]  # fmt: skip
    return guest(name, *parts, pages=200, count=count, **tenant)


def saved(name: str, *vms: Mapping[str, Any], between: str = "all") -> int:
    """Pages saved once there is nothing left to share."""
    result = run(*vms, duration=f"{15 * a_while(name)}ns", sample_every="1d", **host_with(name, between))
    return int(end(result)["saved_bytes"]) // PAGE_BYTES


@pytest.mark.parametrize("name", MECHANISMS)
def test_keeping_tenants_apart_saves_as_much_as_a_host_for_each(name):
    of_one, of_other = still("a", 2, tenant="x"), still("b", 3, tenant="y")

    assert saved(name, of_one, of_other, between="tenants") == saved(name, of_one) + saved(name, of_other)


@pytest.mark.parametrize("name", MECHANISMS)
def test_keeping_guests_apart_saves_as_much_as_a_host_for_each(name):
    assert saved(name, still("a", 2), still("b", 1), between="guests") == 3 * saved(name, still("a", 1))
