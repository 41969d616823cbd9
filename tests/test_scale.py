"""`scale: n`: what is divided and multiplied, what a scaled run may lose, and what it says of that."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.columns import GUESTS, PAGE_BYTES, SAMPLES
from sim.cost import prices
from sim.errors import MachineError, UserError
from sim.host import Host
from sim.memory.guest import Vm
from sim.memory.image import Synthetic, pages_of
from sim.report.words import uncertainty
from sim.run import Result, run
from sim.scale import enlarged, enlarged_guest, error_bars, samples_of, shrunk_host, shrunk_vm
from sim.scenario import Scenario, parse
from sim.sizing import chosen_scale, estimate
from sim.units import GIB

KEPT = {"full_scans", "hosts", "guests_running", "oom_kills", "cores", "pages_to_scan", "allocstall"}
"""Counts that do not grow in proportion to the pages, and settings."""
PARTS = [
    {"name": "os", "size": "20%", "pool": "os", "run": "64KiB"},
    {"name": "copies", "size": "5%", "duplicates": 4},
    {"name": "zero", "size": "10%", "zero": True},
    {"name": "hot", "size": "10%", "writes": {"rate": "1/min", "hot": "20%", "hot_writes": "80%"}},
    {"name": "own", "size": "45%"},
]


def scenario(scale: int | str = 1, *, duration: str = "3min", memory: str = "256MiB", **more: Any) -> Scenario:
    """Four guests on a host of 4 GiB; *more* goes to the host, to the guests or, by its key, to the scenario."""
    host = {"memory": "4GiB", "cores": 4, "ksm": {"pages_to_scan": 2000}} | more.pop("host", {})
    guest = {"name": "g", "count": 4, "memory": memory, "image": {"parts": PARTS}} | more.pop("guest", {})
    return parse({"name": "s", "duration": duration, "scale": scale, "hosts": [host], "vms": [guest], **more})


def ratio(result: Result, whole: Result, name: str) -> float:
    """A metric against that of the whole run."""
    value, real = result.summary[name], whole.summary[name]
    assert value is not None and real is not None
    return value / real


# --- what comes out ----------------------------------------------------------------------------------------------


def test_a_small_fleet_keeps_the_stated_error() -> None:
    whole, small = run(scenario()), run(scenario(64))

    assert ratio(small, whole, "consolidation_ratio") == pytest.approx(1, abs=0.01)
    assert ratio(small, whole, "cpu_overhead_percent") == pytest.approx(1, abs=0.03)
    assert ratio(small, whole, "scan_time_s") == pytest.approx(1, abs=0.01)
    assert small.summary["full_scans"] == pytest.approx(whole.summary["full_scans"], abs=1)


def rack(scale: int) -> Scenario:
    """Three hosts under a control plane, whose guests come and go; no other test of scale has such guests."""
    heap = {"name": "heap", "size": "35%", "writes": {"rate": "0.3/min", "hot": "30%", "hot_writes": "90%"}}
    parts = [{"name": "system", "size": "22%", "pool": "base", "run": "32KiB"}, heap, {"name": "rest", "size": "25%"}]
    repeated = [{"name": "zero", "size": "7%", "zero": True}, {"name": "twice", "size": "6%", "duplicates": 2}]
    ksm = {"pages_to_scan": 400, "sleep_millisecs": 50}
    batch = {"kind": "batch", "rate": "12/h", "lifetime": {"exponential": "20min"}}
    return parse({
        "name": "rack", "duration": "40min", "scale": scale,
        "hosts": [{"name": "node", "count": 3, "memory": "1GiB", "cores": 4, "ksm": ksm}],
        "vms": [{"name": "web", "memory": "96MiB", "image": {"parts": [*parts, *repeated]}},
                {"name": "batch", "memory": "192MiB", "image": {"parts": parts}}],
        "datacenter": {"placement": "worst-fit", "overcommit": {"memory": 1.3},
                       "arrivals": [{"kind": "web", "batch": 18}, batch]},
    })  # fmt: skip


@pytest.mark.slow
def test_a_scaled_datacenter_is_within_what_it_says_of_itself() -> None:
    whole = run(rack(1))
    assert "error" not in whole.manifest

    for small in map(run, map(rack, (16, 64))):
        for name in ("consolidation_ratio", "cpu_overhead_percent", "saved_bytes"):
            assert small.summary[name] == pytest.approx(whole.summary[name], abs=small.manifest["error"][name]), name
            assert small.manifest["error"][name] < 0.1 * float(small.summary[name] or 0), "the bar says something"


@pytest.mark.parametrize("pages_to_scan", [20, 200, 5000])
def test_ksmd_goes_at_the_real_pace_whatever_a_batch_is(pages_to_scan: int) -> None:
    image = {"parts": [{"name": "own", "size": "100%"}]}
    about: dict[str, Any] = {
        "host": {"ksm": {"pages_to_scan": pages_to_scan, "smart_scan": 0}},
        "guest": {"count": 1, "memory": "512MiB", "image": image},
        "duration": f"{1_200_000 // pages_to_scan + 60}s",
        "sample_every": "1min",
    }
    whole, small = run(scenario(**about)), run(scenario(16, **about))

    pages = [result.samples["pages_scanned"].iloc[-1] for result in (small, whole)]
    batches = [result.manifest["work"]["batch"] for result in (small, whole)]
    assert pages[0] == pytest.approx(pages[1], rel=0.02)
    assert batches[0] == pytest.approx(batches[1], rel=0.02)
    assert ratio(small, whole, "ksmd_cpu_percent") == pytest.approx(1, abs=0.03)


def test_a_tuner_reads_and_writes_real_figures() -> None:
    tuned: dict[str, Any] = {"host": {"ksm": {"run": 0}, "ksmtuned": {"thres_coef": 80, "monitor_interval": "10s"}}}
    whole, small = run(scenario(**tuned)), run(scenario(32, **tuned))

    for setting in ("pages_to_scan", "sleep_millisecs", "run"):
        assert small.samples[setting].tolist() == whole.samples[setting].tolist()


def test_compressed_pages_take_as_much_memory() -> None:
    heap = {"name": "heap", "size": "90%", "reads": {"rate": "2/min"}}
    about: dict[str, Any] = {
        "host": {"memory": "900MiB", "ksm": None, "swap": {"device": "zram", "size": "1GiB"}},
        "guest": {"image": {"parts": [heap]}},
        "duration": "1min",
    }
    whole, small = run(scenario(**about)), run(scenario(16, **about))

    assert whole.summary["mem_swapped_bytes"]
    # Some 2,000 sizes are drawn instead of 36,000, and pages swapped out are those and what a batch takes too many.
    assert ratio(small, whole, "compression_ratio") == pytest.approx(1, abs=0.04)
    assert ratio(small, whole, "mem_swapped_bytes") == pytest.approx(1, abs=0.06)
    assert ratio(small, whole, "cpu_swap_percent") == pytest.approx(1, abs=0.08)


def test_sizes_read_as_they_were_written() -> None:
    full: dict[str, Any] = {"guest": {"image": {"parts": [{"name": "own", "size": "100%"}]}}, "duration": "10s"}
    whole, small = run(scenario(**full)), run(scenario(64, **full))

    assert set(small.samples["mem_total_bytes"]) == {4 * GIB}
    assert set(small.samples["mem_promised_bytes"]) == {1 * GIB}
    for name in ("memory_bytes", "touched_bytes", "page_tables_bytes"):
        assert small.guests[name].tolist() == whole.guests[name].tolist()


def test_every_count_is_known_to_grow_or_not() -> None:
    for column in (*SAMPLES, *GUESTS):
        grows = enlarged({column.name: 1}, 16) == {column.name: 16}
        if column.unit in ("pages", "bytes", "count"):
            assert grows != (column.name in KEPT), column.name
        else:
            assert not grows, column.name


def test_page_tables_of_a_last_block_that_is_short_stand_for_fewer() -> None:
    row = {"memory_bytes": 64 * PAGE_BYTES, "page_tables_bytes": PAGE_BYTES}

    assert enlarged_guest(row, 4096)["page_tables_bytes"] == GIB // PAGE_BYTES * 8


def test_a_scaled_run_says_how_far_it_may_be_off_and_a_whole_one_does_not() -> None:
    small = run(scenario(32, duration="20s"))
    bars = small.manifest["error"]

    assert (small.manifest["scale"], "error" in run(scenario(duration="1s")).manifest) == (32, False)
    assert 0 < bars["consolidation_ratio"] < 0.1
    said = uncertainty(32, bars, small.summary)
    assert "stands for 32 pages" in said and "consolidation_ratio" in said and "±" in said


def test_an_error_bar_is_the_largest_of_its_estimates() -> None:
    own = dict.fromkeys(error_bars.__globals__["CHECKED"], 10.0) | {"mem_used_bytes": 64 * 10_000 * PAGE_BYTES}

    def bar(double: float, fourfold: float) -> float:
        coarser = [own | {"consolidation_ratio": value} for value in (double, fourfold)]
        return error_bars(own, coarser, 64)["consolidation_ratio"]

    assert bar(10, 10) == pytest.approx(0.1)  # 10,000 pages in use, off by their root
    assert bar(11, 10) == pytest.approx(1)
    assert bar(10, 7) == pytest.approx(1.5)
    assert error_bars(own | {"pswpin": 640_000}, [own, own], 64)["pswpin"] >= 6400


# --- what goes in ------------------------------------------------------------------------------------------------


SHARES = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(
    lambda each: sum(each) < 100
)  # each is rounded to a page


@given(shares=SHARES, mebibytes=st.integers(16, 4096), power=st.integers(1, 6))
def test_parts_keep_their_sizes_to_a_page_and_fit(shares: list[int], mebibytes: int, power: int) -> None:
    scale = 1 << power
    parts = [{"name": f"p{i}", "size": f"{share}%"} for i, share in enumerate(shares)]
    vm = Vm.model_validate({"name": "g", "memory": f"{mebibytes}MiB", "image": {"parts": tuple(parts)}})
    small = shrunk_vm(vm, scale)
    assert isinstance(vm.content, Synthetic) and isinstance(small.content, Synthetic)
    real = [pages_of(part.size, vm.pages) for part in vm.content.parts]
    sizes = [pages_of(part.size, small.pages) for part in small.content.parts]

    assert small.pages == pytest.approx(vm.pages / scale, abs=0.5)
    assert sum(sizes) <= small.pages
    assert all(abs(size - pages / scale) <= len(sizes) / 2 for size, pages in zip(sizes, real, strict=True))


@given(pages=st.integers(1, 200), power=st.integers(1, 6), hot=st.integers(1, 99), zipf=st.none() | st.floats(0.2, 2.0))
def test_accesses_are_as_many(pages: int, power: int, hot: int, zipf: float | None) -> None:
    scale = 1 << power
    skew = {"zipf": zipf} if zipf else {"hot": f"{hot}%", "hot_reads": "90%"}
    part = {"name": "heap", "size": "100%", "reads": {"rate": "1/s", **skew}}
    vm = Vm.model_validate({"name": "g", "memory": f"{pages * scale * 4}KiB", "image": {"parts": (part,)}})

    def total(vm: Vm) -> float:
        assert isinstance(vm.content, Synthetic) and vm.content.parts[0].reads
        pieces = vm.content.parts[0].reads.pieces(vm.pages)
        ends = [0, *(end for end, _ in pieces)]
        assert ends[-1] == vm.pages
        return float(np.diff(ends) @ [rate for _, rate in pieces])

    assert total(shrunk_vm(vm, scale)) * scale == pytest.approx(total(vm))


def test_watermarks_swap_and_huge_pages_are_those_of_the_real_host() -> None:
    swap = {"device": "ssd", "size": "2GiB"}
    thp = {"enabled": "madvise"}
    host = Host.model_validate({"memory": "64GiB", "swap": swap, "thp": thp, "hugetlbfs": {"nr_hugepages": 512}})
    small = shrunk_host(host, 64)

    real = host.watermarks.pages(host.memory)
    assert small.watermarks.pages(small.memory) == tuple(-(-pages // 64) for pages in real)
    assert host.swap and small.swap and host.hugetlbfs and small.hugetlbfs
    assert (small.swap.size * 64, small.hugetlbfs.bytes * 64) == (host.swap.size, host.hugetlbfs.bytes)
    before, after = host.swap.device_times(host.price_set), small.swap.device_times(small.price_set)
    assert after.read_ns == 64 * before.read_ns
    assert after.write_ns == before.write_ns + 63 * before.ns_per_page
    for name in ("ns_per_page", "cpu_in_ns", "cpu_out_ns", "drop_ns", "submit_ns"):
        assert getattr(after, name) == pytest.approx(64 * getattr(before, name), rel=1e-3)
    daemon = small.thp.khugepaged
    assert daemon.pages_to_scan * 64 / daemon.scan_sleep_millisecs == pytest.approx(4096 / 10_000)


@pytest.mark.parametrize("name", prices.bundled())
def test_prices_of_pages_grow_and_those_of_wake_ups_do_not(name: str) -> None:
    one = prices.load(name)
    many = prices.of_pages(one, 8)

    assert (many.batch, many.scan, many.slot, many.llc) == (one.batch, one.scan, one.slot, one.llc)
    assert many.visit.ns == 8 * one.visit.ns
    assert prices.submission(many) == pytest.approx(8 * prices.submission(one))
    assert prices.fork(many)[1].ns == 8 * prices.fork(one)[1].ns
    assert prices.compressor(many, "lz4").ns(100) == pytest.approx(
        [8 * ns for ns in prices.compressor(one, "lz4").ns(100)]
    )


# --- captured images ---------------------------------------------------------------------------------------------


def captures(folder: Path) -> list[Vm]:
    """Two guests of 8,192 pages: 1,600 contents in common, one of them 400 times, 800 zeros, the rest their own."""
    vms = []
    for number, name in enumerate(("a", "b")):
        content = np.zeros((2, 8192), np.uint32)
        common = np.concatenate([np.arange(1, 1601), np.full(399, 7)])
        content[0, 800:2799] = common
        content[0, 2799:] = 10_000 + 10_000 * number + np.arange(8192 - 2799)
        content[1] = content[0]
        content[1, -400:] = 40_000 + 10_000 * number + np.arange(400)
        np.savez(folder / f"{name}.npz", content=content, time_s=np.array([0.0, 10.0]))
        image = {"captured": f"{name}.npz"}
        vms.append(
            Vm.model_validate({"name": name, "memory": "32MiB", "image": image}, context={"folder": str(folder)})
        )
    return vms


def test_samples_of_captured_images_share_what_the_images_share(tmp_path: Path) -> None:
    a, b = samples_of(captures(tmp_path), 8).values()

    assert len(a.first) == len(b.first) == 1024
    assert np.count_nonzero(a.first == 0) == 100
    common = np.intersect1d(a.first, b.first)
    common = common[common > 0]
    assert len(common) == 200  # 1,600 / 8
    assert np.count_nonzero(np.isin(a.first, common)) == pytest.approx(1999 / 8, abs=1)
    (_, pages, contents), *_ = a.changes
    assert len(pages) == 50 and len(np.unique(contents)) == 50  # 400 / 8, each still a content of its own


def test_captured_guests_keep_what_they_save(tmp_path: Path) -> None:
    captures(tmp_path)
    vms = [{"name": name, "count": 2, "memory": "32MiB", "image": {"captured": f"{name}.npz"}} for name in "ab"]
    host = {"memory": "1GiB", "ksm": {"pages_to_scan": 2000}}
    whole, small = (
        run(parse({"name": "c", "duration": "30s", "scale": scale, "hosts": [host], "vms": vms}, tmp_path))
        for scale in (1, 8)
    )

    assert ratio(small, whole, "saved_bytes") == pytest.approx(1, abs=0.01)
    assert ratio(small, whole, "consolidation_ratio") == pytest.approx(1, abs=0.01)


# --- what is refused, and what is chosen -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "more", "said"),
    [
        (3, {}, "scale: must be a power of two from 1 to 65,536, or auto, got 3; write 64, or auto"),
        (2048, {}, "leaves the guests of vms.0 32 pages, and they need 64, got 2048; write 1024 or less"),
        (
            64,
            {"host": {"thp": {"enabled": "always"}}},
            "1024 pages, and for huge pages of 512 they need 4096, got 64; write 16 or less",
        ),
        (64, {"budget": {"cpu": "1s"}}, "budget: means nothing unless scale is auto"),
    ],
)
def test_a_scale_that_cannot_be(scale: int, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        scenario(scale, **more)


def test_auto_takes_the_least_scale_that_keeps_the_budget() -> None:
    needs = {scale: estimate(scenario(scale)) for scale in (1, 2, 4)}
    assert needs[1].memory_bytes > needs[2].memory_bytes > needs[4].memory_bytes

    assert chosen_scale(scenario("auto")) == 1
    assert chosen_scale(scenario("auto", budget={"memory": f"{needs[2].memory_bytes}B"})) == 2
    assert run(scenario("auto", duration="1s", budget={"memory": f"{needs[4].memory_bytes}B"})).manifest["scale"] == 4
    with pytest.raises(UserError, match=r"at scale 1024, the largest that leaves its guests enough pages, it takes"):
        run(scenario("auto", budget={"memory": "1MiB"}))


def test_a_scenario_too_large_for_this_machine_is_told_the_scale_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = estimate(scenario(4)).memory_bytes
    monkeypatch.setattr(sys.modules["sim.run"], "available_bytes", lambda: fits)

    with pytest.raises(MachineError, match=r"write scale: 4, or give fewer or smaller guests"):
        run(scenario())


def test_a_result_is_named_by_its_scale_too() -> None:
    assert len({scenario(scale).digest("1") for scale in (1, 2, "auto")}) == 3
