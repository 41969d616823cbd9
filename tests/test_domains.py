"""Guests that are kept apart, and what the time of a write tells of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_host import end, equal, guest, part, run, scenario, size
from squeezed import DISK, READ, Squeezed

import sim
from sim.cost import prices
from sim.document import dump
from sim.errors import UserError
from sim.lab.replay import workload
from sim.memory import pages as memory
from sim.memory.image import ContentSpace
from sim.run import Result
from sim.units import SECOND

SCENARIOS = Path(__file__).parents[1] / "scenarios"
FAST = {"pages_to_scan": 2000, "smart_scan": 0}


def settled(*vms: Any, **host: Any) -> Any:
    """The last sample of a run in which everything was merged."""
    return end(run(*vms, duration="3s", ksm={**FAST, **host.pop("ksm", {})}, **host))


def shared(*vms: Any, **host: Any) -> tuple[int, int]:
    """Frames that pages share, and pages saved."""
    row = settled(*vms, **host)
    return int(row["pages_shared"]), int(row["pages_sharing"])


# --- who shares with whom -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "tenant", "domain"),
    [
        ("all", None, "all"),
        ("all", "bank", "all"),
        ("tenants", "bank", "tenant bank"),
        ("tenants", None, "guest vm-0"),
        ("guests", "bank", "guest vm-0"),
    ],
)
def test_a_guest_without_a_tenant_is_alone_where_tenants_are_kept_apart(between, tenant, domain):
    vm = guest("vm", part("all", 1), pages=1, **({"tenant": tenant} if tenant else {}))
    asked = scenario(vm, duration="1s", shares_between=between)

    assert asked.hosts[0].domain_of(asked.vms[0], "vm-0") == domain


@pytest.mark.parametrize(
    ("mode", "tenant", "salt", "domain"),
    [
        (0, "bank", "x", "all"),
        (1, None, None, "all"),
        (1, "bank", None, "tenant bank"),
        (2, None, None, "guest vm-0"),
        (2, "bank", None, "tenant bank"),
        (2, "bank", "x", "tenant x"),
    ],
)
def test_esx_tells_tenants_apart_by_their_salts(mode, tenant, salt, domain):
    """Source: VMware KB 2097593 for the modes of ShareForceSalting."""
    vm = guest("vm", part("all", 1), pages=1, **({"tenant": tenant} if tenant else {}))
    options = {"ShareForceSalting": mode, "guests": {"vm": {"salt": salt}} if salt else {}}
    asked = scenario(vm, duration="1s", tps=options)

    assert asked.hosts[0].domain_of(asked.vms[0], "vm-0") == domain


IMAGE = (part("common", 100, pool="os"), part("zeros", 20, zero=True), part("pairs", 40, duplicates=2), part("own", 10))
FLEET = (
    guest("a", *IMAGE, pages=170, count=2, tenant="x"),
    guest("b", *IMAGE, pages=170, tenant="x"),
    guest("c", *IMAGE, pages=170, count=2, tenant="y"),
    guest("d", *IMAGE, pages=170),
)
PAIRS = 6 * 20
"""Frames of what each of the six guests has twice."""


@pytest.mark.parametrize(
    ("between", "frames", "sharing"),
    [
        ("all", 100 + 1, 5 * 100 + 6 * 20 - 1),
        ("tenants", 2 * 100 + 3, (2 + 1) * 100 + 6 * 20 - 3),
        ("guests", 6, 6 * 20 - 6),
    ],
)
def test_ksm_shares_within_a_domain_and_between_no_two(between, frames, sharing):
    assert shared(*FLEET, shares_between=between) == (PAIRS + frames, PAIRS + sharing)


def test_the_kernels_zero_page_is_everybodys():
    """What is merged with it follows from the guest's own page alone, so that its time tells nothing of others."""
    rows = {between: settled(*FLEET, shares_between=between, ksm={"use_zero_pages": 1})
            for between in ("all", "guests")}  # fmt: skip

    assert {between: int(row["ksm_zero_pages"]) for between, row in rows.items()} == {"all": 120, "guests": 120}
    assert (rows["guests"]["pages_shared"], rows["guests"]["pages_sharing"]) == (PAIRS, PAIRS)


def test_numa_nodes_and_tenants_are_kept_apart_at_once():
    vms = [guest(f"{tenant}{node}", *IMAGE[:2], pages=120, tenant=tenant, numa_node=node, count=2)
           for tenant in "xy" for node in (0, 1)]  # fmt: skip

    host = {"numa_nodes": 2, "ksm": {"merge_across_nodes": 0}, "shares_between": "tenants"}
    assert shared(*vms, **host) == (4 * 101, 4 * (100 + 40 - 1))


def test_what_random_writes_leave_is_a_content_of_the_domain():
    writes = {"rate": "40/s", "leaves": "four"}
    vms = [guest(name, part("four", 4, pool="four"), part("busy", 300, writes=writes), pages=304)
           for name in ("a", "b")]  # fmt: skip
    bursts = [{"part": "busy", "at": "1s", "leaves": "zero"}]
    still = [{**vm, "activity": {"every": "500ms", "levels": [1, 0], "repeat": False}} for vm in vms]

    assert shared(*still) == (4, 2 * 304 - 4)
    assert shared(*still, shares_between="guests") == (8, 2 * 304 - 8)
    zeroed = [{**vm, "bursts": bursts} for vm in still]
    frames = 2 * 4 + 2 * 2  # 256 pages share a frame at most
    assert shared(*zeroed, shares_between="guests") == (frames, 2 * 304 - frames)


def captures(folder: Path) -> list[Any]:
    """Two guests of one data set: 50 contents in common at the start, and 30 that both write after a second."""
    for name, own in (("a", 1000), ("b", 5000)):
        content = np.array([[*range(900, 950), *range(own, own + 50)], [*range(900, 950), *range(own, own + 50)]])
        content[1, 60:90] = np.arange(300, 330)
        np.savez(folder / f"{name}.npz", content=content.astype(np.uint32), time_s=np.array([0.0, 1.0]))
    return [{"name": name, "memory": size(100), "image": {"captured": f"{name}.npz"}} for name in ("a", "b")]


@pytest.mark.parametrize(("between", "expected"), [("all", (80, 80)), ("guests", (0, 0))])
def test_captured_contents_are_equal_within_a_domain_only(tmp_path, between, expected):
    assert shared(*captures(tmp_path), folder=str(tmp_path), shares_between=between) == expected


def test_a_fork_is_in_its_parents_domain():
    parent = guest("parent", part("zeros", 50, zero=True), part("own", 50), pages=100, tenant="x")
    child = {"name": "child", "memory": size(100), "fork_of": "parent", "count": 2}
    other = guest("other", part("zeros", 50, zero=True), pages=50, tenant="y")

    for between, frames in (("all", 1), ("tenants", 2), ("guests", 2)):
        row = settled(parent, child, other, shares_between=between)
        assert (row["pages_shared"], row["saved_bytes"] // 4096) == (frames, 200 - frames + 2 * 50), between


def test_a_guest_that_is_gone_leaves_nothing_to_the_next_one_in_its_place():
    """Frames and pages are used again, by a guest of another tenant with equal pages."""
    parts = (part("zeros", 60, zero=True), equal("equal", 40))
    first = guest("first", *parts, pages=100, count=2, tenant="x", stop="1s")
    then = guest("then", *parts, pages=100, start="1100ms", tenant="y")
    stays = guest("stays", *parts, pages=100, tenant="z")

    assert shared(first, then, stays, shares_between="tenants") == (4, 200 - 4)


def test_domains_number_what_they_have_and_no_more():
    space = ContentSpace()
    one, other = space.domain("one"), space.domain("other")
    for domain in (one, other):
        domain.add_data_set("set", np.array([7, 1 << 29], np.int32))

    known = np.array([7, 0, -5, 1 << 29], np.int64)
    assert space.domain("one") is one
    assert (one.zeros, other.zeros) == (0, 1)
    assert set(one.captured("set", known)) & set(other.captured("set", known)) == {0, -5}
    assert not set(one.pool("os", 5).tolist()) & set(other.pool("os", 5).tolist())
    assert space.count == 2 + 2 * 2 + 2 * 5


# --- what a user can get wrong ----------------------------------------------------------------------------------------


def refusal(*vms: Any, **host: Any) -> str:
    with pytest.raises(UserError) as caught:
        scenario(*vms, duration="1s", **host)
    return str(caught.value)


def test_a_fork_has_no_tenant_of_its_own():
    parent = guest("parent", part("all", 1), pages=1)

    said = refusal(parent, {"name": "child", "memory": size(1), "fork_of": "parent", "tenant": "x"})
    assert "tenant: a fork has its parent's tenant" in said


def test_esx_has_its_own_name_for_that():
    said = refusal(guest("vm", part("all", 1), pages=1), tps={}, shares_between="guests")

    assert "hosts.0.shares_between: means nothing on a host with tps" in said


def test_writes_of_each_domain_to_a_pool_are_counted():
    writes = {"rate": "1/s", "leaves": "os", "zipf": 1.0}
    vms = guest("vm", part("os", 1000, pool="os", writes=writes), pages=1000, count=2500)

    scenario(vms, duration="1s")
    assert "2,500 domains counted each by itself" in refusal(vms, shares_between="guests")


def test_no_kernel_keeps_guests_apart():
    asked = scenario(guest("vm", part("all", 1), pages=1), duration="1s", shares_between="guests")

    with pytest.raises(UserError, match=r"hosts\.0\.shares_between=all"):
        workload(asked)


# --- what the time of a write tells -----------------------------------------------------------------------------------


def latencies(result: Result) -> tuple[int, int, int]:
    """Time (ns) of a write to a page of one's own, to a merged one, and the longest of the run."""
    told = result.summary
    return tuple(told[f"write_{name}_ns"] for name in ("private", "merged", "latency_worst"))  # type: ignore[return-value]


BURST = [{"part": "all", "at": "2s"}]


def two(**more: Any) -> Result:
    """Two equal guests, one of which writes to its pages later."""
    alike = part("all", 100, pool="same")
    vms = guest("writer", alike, pages=100, bursts=BURST), guest("other", alike, pages=100)
    return run(*vms, duration="3s", **{"prices": "emerald-rapids", "ksm": FAST, **more})


def test_the_longest_write_is_an_ordinary_one_unless_something_took_longer():
    private, merged, worst = latencies(two(shares_between="guests"))

    assert private == worst < merged


def test_a_write_to_a_merged_page_takes_as_long_as_its_copy():
    private, merged, worst = latencies(two())

    assert merged == worst > 10 * private


def test_what_a_guest_can_measure_is_told_by_the_price_set(tmp_path):
    source = {"source": "ksm_tests -C, Zhansaya Bagdauletkyzy, linux-mm, 2021"}
    measured = {"name": "selftest", "cow_break": {"ns": 2190.0, **source}, "write": {"ns": 1090.0, **source}}
    own = prices.load("emerald-rapids").model_dump(mode="json", exclude_defaults=True) | measured
    (tmp_path / "selftest.yaml").write_text(dump(own))

    assert latencies(two(prices="selftest.yaml", folder=str(tmp_path))) == (1090, 2190, 2190)


def short(device: str, **host: Any) -> int:
    """Longest write (ns) of a guest that has less memory than it writes to."""
    busy = part("all", 900, writes={"rate": "5/s"})
    swap = {"device": device, "size": "64MiB"}
    watermarks = {} if "tps" in host else {"watermarks": {"min_free_kbytes": 64}}
    result = run(guest("vm", busy, pages=900), duration="5s", memory=size(800), prices="emerald-rapids", swap=swap,
                 **watermarks, **host)  # fmt: skip
    return latencies(result)[2]


def test_a_write_to_a_swapped_page_takes_as_long_as_the_device():
    zram, nvme, hdd = (short(device) for device in ("zram", "nvme", "hdd"))

    assert 1_000 < zram < nvme < hdd
    assert hdd > 4_000_000


def test_on_esx_too():
    assert short("hdd", tps={"version": "esx3", "CtlMaxPercent": 0}) > 4_000_000


def test_a_write_waits_for_its_own_page_and_not_for_those_before_it():
    host = Squeezed(frames=100_000, watermarks=(0, 0, 0), page_cluster=0, look_ns=0)
    number = host.start([9] * 300, limit=100)
    host.scanner.m.guest[number, memory.CHARGE_LIMIT] = 0
    host.pass_time(SECOND)
    assert (host.counts["write_wait_ns"], host.counts["copy_wait_ns"]) == (0, 0)

    away = host.swapped(number)
    for first in away[:5]:
        host.write(number, first, [7])
        host.pass_time()
    host.write(number, away[100], [7] * 20)

    assert host.counts["write_wait_ns"] == DISK.read_ns + DISK.cpu_in_ns
    assert host.counts["copy_wait_ns"] == 0


def test_a_copy_that_must_reclaim_a_frame_first_waits_for_that():
    host = Squeezed(frames=100_000, watermarks=(0, 0, 0), pages_to_scan=100_000)
    number = host.start([5] * 50 + list(range(10, 110)), [READ] * 50 + [0] * 100, mergeable=True)
    host.run(1)
    host.pass_time(SECOND)
    host.run(0)
    host.scanner.m.guest[number, memory.CHARGE_LIMIT] = host.scanner.m.guest[number, memory.CHARGED]
    host.write(number, 0, [7])

    assert host.counts["copy_wait_ns"] >= DISK.cpu_out_ns
    assert host.counts["write_wait_ns"] == 0


# --- the bundled scenarios --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_isolation_costs_copies_nearly_all_and_guests_of_one_distribution_more_than_half():
    saved = {}
    for between in ("all", "guests"):
        overrides = [f"hosts.{i}.shares_between={between}" for i in (0, 1)]
        last = sim.run(sim.read(SCENARIOS / "tenants.yaml", [*overrides, "expect=[]"])).samples.groupby("host").last()
        saved[between] = (100 * last["saved_bytes"] / last["mem_touched_bytes"]).to_dict()

    assert saved["all"] == pytest.approx({"copies-0": 71, "diverse-0": 43}, abs=0.5)
    assert saved["guests"] == pytest.approx({"copies-0": 13, "diverse-0": 17}, abs=0.5)
