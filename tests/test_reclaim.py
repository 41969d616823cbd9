"""Reclaim: nothing is lost, everything is counted, and the two lists are those of a plain twin."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_host import equal, guest, part, run, scenario, size
from squeezed import FRESH, LOOP, READ, WRITTEN, Speeds, Squeezed, on_lists
from two_lists import TwoLists

from sim.cost.prices import DEFAULT, load
from sim.memory import pages as memory
from sim.memory.pages import BLOCK, NEVER
from sim.reclaim.compression import cpu_ns, usual_packed
from sim.reclaim.swap import DeviceTimes
from sim.reclaim.zswap import Pool
from sim.run import run as simulate
from sim.sharing.room import OutOfFrames
from sim.sizing import _faults
from sim.units import MILLISECOND, SECOND

NO_TIME = DeviceTimes(0, 0, 0, 1, 0, 0)
NEVER_SHORT = {"frames": 100_000, "watermarks": (0, 0, 0)}

# --- laws -------------------------------------------------------------------------------------------------------------

hosts = st.fixed_dictionaries(
    {
        "frames": st.sampled_from([60, 150, 700, 1500]),
        "slots": st.sampled_from([0, 20, 200, 5000, 5000]),
        "thp": st.booleans(),
        "page_cluster": st.sampled_from([0, 3]),
    }
)
swaps = st.sampled_from([{}, {}, {"zram": True}, {"zswap": Pool(30, 20)}, {"zswap": Pool(3, 2)}])
kernels = st.sampled_from(
    [{"use_zero_pages": 1, "max_page_sharing": 2}, {"max_page_sharing": 256}, {"version": "5.1"}, {"version": "2.6.32"}]
)
contents = st.one_of(
    st.lists(st.sampled_from([0, 5, 6, 7, NEVER]), min_size=1, max_size=8),
    st.lists(st.integers(8, 50), min_size=1, max_size=8),
    st.lists(st.integers(-(10**6), -3), min_size=1, max_size=8),
)
starts = st.tuples(
    st.sampled_from([5, 40, 120, 300, BLOCK, BLOCK + 30]),
    contents,
    st.sampled_from([0, WRITTEN, FRESH, READ, LOOP]),
    st.fixed_dictionaries(
        {
            "mergeable": st.booleans(),
            "limit": st.sampled_from([None, None, None, 60, 3]),
            "level": st.sampled_from([1.0, 1.0, 0.5]),
        }
    ),
)
where = st.tuples(st.integers(0, 11), st.integers(0, 2000), st.integers(1, 60))
operations = st.one_of(
    st.tuples(st.just("start"), starts),
    st.tuples(st.just("write"), where, contents),
    st.tuples(st.just("discard"), where),
    st.tuples(st.just("advise"), where, st.booleans()),
    st.tuples(st.just("fork"), where),
    st.tuples(st.just("exit"), where),
    st.tuples(st.just("run"), st.sampled_from([0, 1, 1, 2])),
    st.tuples(st.just("collapse")),
    st.tuples(st.just("activity"), where, st.sampled_from([0.0, 0.5, 2.0])),
)
times = st.sampled_from([1, 10, 100, 1000])
scripts = st.tuples(
    st.lists(starts, min_size=1, max_size=3), st.lists(st.tuples(operations, times), min_size=1, max_size=10)
)


def repeated(some: list[int], length: int) -> list[int]:
    return (some * length)[:length]


def do(host: Squeezed, name: str, *about) -> None:
    """Carry out one operation of a script, if there is a guest for it."""
    if name == "start":
        pages, some, kind, how = about[0]
        if host.count < 12:
            host.start(repeated(some, pages), kind, **how)
        return
    if name == "run":
        host.run(about[0])
        return
    if name == "collapse":
        host.collapse()
        return
    if not host.wrote:
        return
    (number, first, pages), *rest = about
    chosen = sorted(host.wrote)[number % len(host.wrote)]
    first %= len(host.wrote[chosen])
    pages = min(pages, len(host.wrote[chosen]) - first)
    if name == "write":
        host.write(chosen, first, [content if content != NEVER else 3 for content in repeated(rest[0], pages)])
    elif name == "discard":
        host.discard(chosen, first, pages)
    elif name == "advise":
        host.advise(chosen, first, pages, rest[0])
    elif name == "fork" and host.count < 12:
        host.fork(chosen)
    elif name == "exit":
        host.exit(chosen)
    elif name == "activity":
        host.change_activity(chosen, rest[0])


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(hosts, swaps, kernels, scripts)
def test_nothing_is_lost_and_everything_is_counted_once_whatever_happens(host, swap, kernel, script):
    squeezed = Squeezed(**host, **swap, **kernel)
    first, then = script
    for each in first:
        do(squeezed, "start", each)
        squeezed.check()
    squeezed.run(1)
    for operation, time in then:
        do(squeezed, *operation)
        squeezed.pass_time(time * MILLISECOND)
        squeezed.check()


# --- the plain twin ---------------------------------------------------------------------------------------------------

LOOPS_A_SECOND = 2
bursts = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 999), st.integers(1, 200)), max_size=5
)  # steps of the loop since the last one, first page, pages


def in_step(pages, limit, keeps, writes):
    """A guest that reads its pages in a loop and writes some at once, and the twin that sees every access."""
    host = Squeezed(
        **NEVER_SHORT, page_cluster=0, device=NO_TIME, look_ns=0, zram=not keeps,
        speeds=Speeds(loop=LOOPS_A_SECOND, loop_pages=pages),
    )  # fmt: skip
    twin = TwoLists(limit=limit, keeps=keeps)
    number = host.start(list(range(5, 5 + pages)), LOOP, limit=limit)
    for page in range(pages):
        twin.access(page, True)
    period = SECOND // LOOPS_A_SECOND
    done = 1

    def reach(now):
        nonlocal done
        host.pass_time(now - host.now)
        while done // pages * period + period * (done % pages) // pages <= now - 1:
            twin.access(done % pages)
            done += 1

    step = 0
    for later, place, most in writes:
        step += later
        reach((10 * step + 4) * period // pages // 10)
        first = place % pages
        length = min(most, pages - first)
        host.write(number, first, [9] * length)
        for page in range(first, first + length):
            twin.access(page, True)
    reach((step + 3 * pages) * period // pages)
    return host, number, twin


@settings(deadline=None, max_examples=25)
@given(st.integers(20, 400), st.integers(1, 99), st.booleans(), bursts)
def test_loops_and_bursts_leave_every_page_where_the_plain_twin_has_it(pages, percent, keeps, writes):
    host, number, twin = in_step(pages, max(2, pages * percent // 100), keeps, writes)

    assert {name: host.counts[name] for name in ("pswpin", "pswpout", "pgscan", "workingset_activate_anon")} == {
        name: twin.counts[name] for name in ("pswpin", "pswpout", "pgscan", "workingset_activate_anon")
    }
    lists = [*reversed(twin.inactive), *reversed(twin.active)]
    assert [entry - 1 for entry in on_lists(host.scanner.m, number)] == lists
    assert host.swapped(number) == sorted(twin.out)


@pytest.mark.parametrize(("hot", "limit"), [(0, 250), (100, 250), (200, 300)])
def test_random_accesses_swap_as_often_as_in_the_plain_twin(hot, limit):
    pages, seconds = 400, 60
    speeds = Speeds(writes=20.0, reads=5.0)
    host = Squeezed(**NEVER_SHORT, page_cluster=0, device=NO_TIME, look_ns=0, zram=True, speeds=speeds)
    host.start(list(range(5, 5 + pages)), [WRITTEN] * hot + [READ] * (pages - hot), limit=limit)
    host.pass_time(seconds * SECOND)
    twin = TwoLists(limit=limit, keeps=False)
    for page in range(pages):
        twin.access(page)
    rates = np.array([speeds.writes] * hot + [speeds.reads] * (pages - hot))
    draw = np.random.default_rng(5)
    accesses = draw.poisson(rates.sum() * seconds)
    for page in draw.choice(pages, accesses, p=rates / rates.sum()).tolist():
        twin.access(page)

    assert twin.counts["pswpin"] > 20_000
    assert host.counts["pswpin"] == pytest.approx(twin.counts["pswpin"], rel=0.02)


# --- who reclaims, and when -------------------------------------------------------------------------------------------


def free(host):
    return host.scanner.usage()[0] // 4096


@pytest.mark.parametrize("limited", [True, False])
def test_huge_pages_given_back_in_part_are_split_before_anything_is_swapped(limited):
    # 8 huge pages, half of each given back, and then 1,000 pages more than fit: by the guest's limit or the host's end.
    host = Squeezed(frames=40 * BLOCK if limited else 8 * BLOCK + 100, thp=True)
    number = host.start([9] * 8 * BLOCK, limit=8 * BLOCK + 100 if limited else None)
    for block in range(8):
        host.discard(number, block * BLOCK, BLOCK // 2)
    assert host.counts["mem_private_bytes"] == host.counts["mem_deferred_bytes"] == 4 * BLOCK * 4096

    other = number if limited else host.start([0] * 2 * BLOCK)
    host.write(other, 0, [8] * (BLOCK // 2))
    host.write(other, BLOCK, [8] * (BLOCK // 2))

    assert host.counts["thp_deferred_split_page"] == 8
    assert 1 <= host.counts["thp_split_page"] <= 8
    assert host.counts["pswpout"] == 0
    host.check()


def test_kswapd_wakes_below_the_low_watermark_and_sleeps_at_the_high_one():
    host = Squeezed(frames=2000, watermarks=(20, 100, 300), slots=5000)
    number = host.start([9] * 1895)
    host.pass_time(SECOND)
    assert (free(host), host.counts["pgscan"]) == (105, 0)

    host.discard(number, 0, 1)
    host.write(number, 0, [9])
    other = host.start([9] * 10)
    host.pass_time(SECOND)
    counts = host.counts

    assert 300 <= free(host) < 300 + 64
    assert counts["kswapd_cpu_ns"] > 0
    assert (counts["allocstall"], counts["reclaim_cpu_ns"]) == (0, 0)
    assert len(host.swapped(number)) + len(host.swapped(other)) == counts["pgsteal"]


def test_below_the_lowest_watermark_a_guest_reclaims_itself_and_waits_but_not_for_what_it_starts_with():
    host = Squeezed(frames=1000, watermarks=(50, 60, 70), slots=5000)
    number = host.start([9] * 1500)

    assert host.counts["allocstall"] > 0
    assert host.counts["reclaim_cpu_ns"] > 0
    assert free(host) >= 49
    assert host.scanner.stalled(number) == 0

    host.scanner.write(number, np.arange(1500), np.full(1500, 8, np.int32), SECOND)

    assert host.scanner.stalled(number) > 0


def test_a_guest_at_its_own_limit_takes_only_from_itself():
    host = Squeezed(**NEVER_SHORT)
    other, limited = host.start([9] * 300), host.start([9] * 300, limit=100)

    assert host.scanner.m.guest[limited, memory.CHARGED] <= 100
    assert len(host.swapped(limited)) >= 200
    assert host.swapped(other) == []


def test_a_limit_without_swappiness_kills():
    host = Squeezed(**NEVER_SHORT, swappiness=0)
    host.start([9] * 300, limit=100)

    assert (host.killed, host.counts["pswpout"]) == ([0], 0)


def test_guests_whose_pages_were_all_used_still_find_frames():
    host = Squeezed(**NEVER_SHORT, page_cluster=0)
    number = host.start([9] * 40, READ, limit=2)
    host.pass_time(5 * SECOND)

    assert host.killed == []
    assert len(host.swapped(number)) >= 38
    assert host.counts["pgmajfault"] > 20


# --- swapping ---------------------------------------------------------------------------------------------------------


def test_readahead_reads_neighbours_and_grows_where_they_are_used():
    runs = {}
    for cluster in (0, 3):
        host = Squeezed(**NEVER_SHORT, page_cluster=cluster, speeds=Speeds(loop=1.0, loop_pages=300))
        host.start(list(range(5, 305)), LOOP, limit=100)
        host.pass_time(10 * SECOND)
        runs[cluster] = host.counts

    assert (runs[0]["swap_ra"], runs[0]["swap_ra_hit"]) == (0, 0)
    assert runs[3]["swap_ra_hit"] > 0.8 * runs[3]["swap_ra"] > 0
    assert runs[3]["pgmajfault"] < 0.5 * runs[0]["pgmajfault"]
    assert runs[3]["pgmajfault"] + runs[3]["swap_ra"] == runs[3]["pswpin"]


def test_pages_full_of_zeros_take_a_slot_but_never_the_device():
    host = Squeezed(**NEVER_SHORT, page_cluster=0)
    host.start([0] * 200, READ, limit=50)
    host.pass_time(SECOND)
    counts = host.counts

    assert (counts["pswpin"], counts["pswpout"]) == (0, 0)
    assert min(counts["swpin_zero"], counts["swpout_zero"]) > 100
    assert counts["swap_used_bytes"] > 0


def test_a_disk_keeps_a_copy_until_the_page_is_written_and_zram_keeps_none():
    counts = {}
    for zram in (False, True):
        host = Squeezed(**NEVER_SHORT, zram=zram, page_cluster=0)
        host.start([9] * 200, READ, limit=100)
        host.pass_time(5 * SECOND)
        counts[zram] = host.counts

    assert counts[False]["pswpout"] == 200
    assert counts[True]["pswpout"] > counts[True]["pswpin"] > 1000


SLOW = DeviceTimes(
    read_ns=MILLISECOND, write_ns=SECOND, ns_per_page=0, channels=1, cpu_in_ns=1000, cpu_out_ns=2000, drop_ns=500,
    submit_ns=3000,
)  # fmt: skip


def test_a_page_that_is_still_being_written_comes_back_without_a_read():
    host = Squeezed(**NEVER_SHORT, device=SLOW, page_cluster=0)
    guest = host.start([*range(1, 101)], limit=60)
    first, second, *_ = host.swapped(guest)
    on_their_way = host.counts["mem_writeback_bytes"]

    host.write(guest, first, [500])
    host.check()
    during = host.counts
    host.pass_time(5 * SECOND)
    host.write(guest, second, [501])
    host.check()
    after = host.counts

    assert (during["swpin_cached"], during["pswpin"], during["pgmajfault"]) == (1, 0, 0)
    assert during["mem_writeback_bytes"] < on_their_way + 32 * 4096
    assert (after["swpin_cached"], after["pswpin"], after["pgmajfault"]) == (1, 1, 1)


def test_a_guest_pays_for_what_becomes_of_its_pages():
    """Guests of 100 pages with a limit of 99 touch the last one, and wait for the reclaim of others."""
    waits = {}
    for name, about in {"disk": {"device": SLOW}, "zram": {"zram": True}, "zswap": {"zswap": Pool(5000, 4000)}}.items():
        host = Squeezed(**NEVER_SHORT, page_cluster=0, look_ns=0, **about)
        guest = host.start([*range(1, 100), NEVER], limit=99)
        host.write(guest, 99, [500])
        waits[name] = host.counts["stalled_ns"], host.counts["pswpout"] + host.counts["zswpout"]

    each = {name: stalled / pages for name, (stalled, pages) in waits.items()}
    assert each == {"disk": SLOW.cpu_out_ns + SLOW.submit_ns, "zram": 2000 + 7000, "zswap": 2000 + 7000}


def test_how_long_a_page_takes_to_come_back_is_told():
    result = run(
        guest("reader", part("all", 4000, reads={"rate": "2/s"}), pages=4000, memory_limit=size(2000)),
        duration="5s",
        ksm={"run": 0},
        swap={"device": "zram", "size": "64MiB", "algorithm": "lz4"},
    )

    usual = cpu_ns(load(DEFAULT), "lz4")[usual_packed("lz4"), 1] + load(DEFAULT).paging.page_in.ns
    assert result.summary["swap_in_s"] == pytest.approx(usual / SECOND, rel=0.1)
    last = result.samples.iloc[-1]
    assert result.summary["compression_ratio"] == last["mem_compressed_bytes"] / last["mem_pool_bytes"] > 1.5


def test_a_huge_page_leaves_as_a_whole_if_swap_has_room_and_is_split_if_not():
    whole, split = (Squeezed(frames=2 * BLOCK + 100, thp=True, slots=slots) for slots in (5000, BLOCK - 1))
    for host in (whole, split):
        number = host.start([9] * BLOCK * 2)
        host.start([9] * 100)
        host.pass_time(SECOND)
        host.check()
        assert host.place(number).size == 2 * BLOCK

    assert (whole.counts["thp_swpout"], whole.counts["thp_split_page"]) == (1, 0)
    assert whole.counts["pswpout"] == BLOCK
    assert split.counts["thp_swpout"] == 0
    assert split.counts["thp_split_page"] >= 1
    assert 0 < split.counts["pswpout"] < BLOCK


def test_ksm_pages_come_back_as_pages_of_their_own_and_only_the_first_is_read():
    host = Squeezed(**NEVER_SHORT, page_cluster=0, pages_to_scan=100_000)
    number = host.start([5] * 40, READ, mergeable=True)
    host.run(1)
    host.pass_time(200 * MILLISECOND)
    host.run(0)
    assert host.counts["mem_shared_bytes"] == 4096
    host.scanner.m.guest[number, memory.CHARGE_LIMIT] = 2
    while not host.swapped(number):
        host.write(number, 0, [7, 8, 9])
        host.pass_time(MILLISECOND)
    host.scanner.m.guest[number, memory.CHARGE_LIMIT] = 0
    host.pass_time(5 * SECOND)

    assert host.counts["ksm_swpin_copy"] > 30
    assert host.counts["mem_shared_bytes"] == 0
    assert host.read(number) == [7, 8, 9] + [5] * 37


def test_before_2_6_33_ksm_pages_stay_in_memory():
    swapped = {}
    for version in ("2.6.32", "2.6.33"):
        host = Squeezed(frames=200, version=version, pages_to_scan=1000, slots=5000)
        number = host.start([5, 6] * 20, mergeable=True)
        host.run(1)
        host.pass_time(SECOND)
        host.start([9] * 300, READ)
        host.pass_time(SECOND)
        host.check()
        swapped[version] = len(host.swapped(number))

    assert swapped["2.6.32"] == 0
    assert swapped["2.6.33"] > 0


# --- unmerging when memory is short -----------------------------------------------------------------------------------


def merged(**host):
    """A guest all of whose pages are one KSM page, and whatever swap there is."""
    squeezed = Squeezed(pages_to_scan=100_000, **host)
    number = squeezed.start([5] * 200, mergeable=True)
    squeezed.run(1)
    squeezed.pass_time(SECOND)
    squeezed.run(0)
    assert squeezed.counts["mem_shared_bytes"] == 4096
    return squeezed, number


def test_unmerging_without_room_is_refused_and_loses_nothing():
    host, number = merged(frames=250, slots=0)
    host.start([9] * 100)

    assert host.advise(number, 0, 200, False) is False
    assert host.run(2).startswith("ENOMEM")
    host.check()


def test_unmerging_swaps_other_pages_out():
    host, number = merged(frames=250, slots=5000)
    host.start([9] * 100)

    assert host.advise(number, 0, 200, False) is True
    assert host.counts["pswpout"] > 0
    assert host.counts["mem_shared_bytes"] == 0
    host.check()


def test_pages_that_are_not_merged_are_unmerged_without_any_reclaim():
    host = Squeezed(**NEVER_SHORT)
    number = host.start(list(range(5, 105)), mergeable=True, limit=100)

    assert host.advise(number, 0, 100, False) is True
    assert host.counts["pgscan"] == 0


# --- whole runs -------------------------------------------------------------------------------------------------------

SHORT = {"memory": "8MiB", "watermarks": {"min_free_kbytes": 64}, "prices": "emerald-rapids"}
BUSY = {"reads": {"rate": "20/s"}}


def test_a_guest_that_waits_for_memory_reads_and_writes_less():
    parts = part("all", 1024, writes={"rate": "5/s"})
    limited = guest("limited", parts, pages=1024, memory_limit=size(700), load="100%")
    result = run(
        limited, guest("free", parts, pages=1024), duration="5s", memory="64MiB", swap={"device": "ssd", "size": "1GiB"}
    )
    rows = result.guests.set_index("vm")

    assert rows.loc["free", "progress_percent"] == 100
    assert rows.loc["limited", "progress_percent"] < 90
    assert rows.loc["limited", "pages_written"] < 0.9 * rows.loc["free", "pages_written"]
    # One processor: what the guest did not wait it worked.
    lost = 1 - rows.loc["limited", "progress_percent"] / 100
    assert rows.loc["limited", "stall_s"] == pytest.approx(5 * lost, abs=0.02)


def test_of_several_processors_one_waits():
    stalls = {}
    for vcpus in (1, 4):
        each = guest("vm", part("all", 1000, **BUSY), pages=1000, memory_limit=size(800), vcpus=vcpus)
        result = run(each, duration="5s", memory="64MiB", swap={"device": "ssd", "size": "1GiB"})
        stalls[vcpus] = result.guests["progress_percent"].iloc[0]

    assert stalls[1] < stalls[4] < 100


def test_with_swap_full_the_guest_that_is_worst_to_keep_is_killed():
    vms = [guest(name, part("all", pages), pages=pages, start=start, oom_score_adj=adj)
           for name, pages, start, adj in [("spared", 900, "0s", -1000), ("chosen", 400, "1s", 500),
                                           ("late", 1300, "2s", 0)]]  # fmt: skip
    result = run(*vms, duration="4s", swap={"device": "nvme", "size": size(300)}, **SHORT)

    killed = result.guests[result.guests["end"] == "oom-killed"]["vm"].tolist()
    assert killed == ["chosen"]
    assert result.guests.set_index("vm").loc["spared", "end"] == "running"


def test_pages_of_hugetlbfs_are_never_reclaimed():
    pool = guest("pool", part("all", 1024), pages=1024, huge_pages="hugetlbfs")
    other = guest("other", part("all", 1500, **BUSY), pages=1500, start="1s")
    result = run(
        pool, other, duration="3s", hugetlbfs={"nr_hugepages": 2}, swap={"device": "nvme", "size": "64MiB"}, **SHORT
    )
    rows = result.guests.set_index("vm")

    assert rows.loc["pool", "swapped_bytes"] == 0
    assert rows.loc["other", "swapped_bytes"] > 0


def squeezed_run(**about):
    vms = [guest(name, part("all", 900, **BUSY), equal("same", 300), pages=1200, count=2, host=host, load="50%")
           for name, host in (("a", "host-0"), ("b", "host-1"))]  # fmt: skip
    return run(*vms, duration="3s", count=2, ksm={"pages_to_scan": 2000},
               swap={"device": "zram", "size": "64MiB"}, **SHORT, **about)  # fmt: skip


def test_a_run_has_the_same_bits_twice_and_whatever_the_sampling_interval():
    one, same, finer = squeezed_run(), squeezed_run(), squeezed_run(sample_every="100ms")
    every_second = finer.samples[finer.samples["time_s"] % 1 == 0]

    assert one.samples.equals(same.samples)
    assert one.guests.equals(same.guests)
    assert one.samples.equals(every_second.reset_index(drop=True))
    assert one.guests.equals(finer.guests)
    assert (one.samples.groupby("host")["pswpin"].last() > 0).all()
    assert (one.samples["psi_full_ns"] <= one.samples["psi_some_ns"]).all()


def test_the_guest_that_finds_no_frame_is_named():
    host = Squeezed(frames=50, slots=0)
    number = host._add(100, None, 1.0, {})

    with pytest.raises(OutOfFrames) as starved:
        host.scanner.fill(number, np.full(100, 9, np.int32), 0)

    assert starved.value.guest == number


@pytest.mark.parametrize(("limit", "swap"), [(None, "nvme"), (None, "zram"), (2000, "ssd")])
def test_it_is_known_before_a_run_about_how_often_guests_will_wait_for_pages(limit, swap):
    busy = part("all", 3000, reads={"rate": "2/s"})
    limits = {"memory_limit": size(limit)} if limit else {}
    about = {"memory": "20MiB", "watermarks": {"min_free_kbytes": 64}, "swap": {"device": swap, "size": "1GiB"}}
    planned = scenario(guest("vm", busy, pages=3000, count=2, **limits), duration="10s", **about)
    [(host, name)] = planned.host_names()

    foreseen = _faults(host, planned.assignments()[name], planned.duration)

    assert 0.5 < foreseen / simulate(planned).samples["pgmajfault"].iloc[-1] < 2
