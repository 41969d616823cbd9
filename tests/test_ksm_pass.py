import itertools
from collections import Counter

import naive
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from machine import Machine

from sim.memory import pages as memory
from sim.memory.pages import BLOCK
from sim.sharing import ksm_pass as ksmd

IN_TREES = ("pages_shared", "pages_sharing", "pages_unshared")
PAGE_COUNTERS = (*IN_TREES, "pages_volatile")

EVERYTHING = 1 << 40
"""More pages than any guest has: one full scan per batch."""

# --- the plain twin ---------------------------------------------------------------------------------------------------

BLOCKS = 16
MOST_GUESTS = 12

pages_of_guest = st.one_of(
    st.integers(1, 12), st.integers(13, 60), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 40, 1100])
)
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
    st.tuples(st.just("collapse"), place, st.sampled_from([0, 300, 511]), st.sampled_from([0, 256, 511])),
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
        "thp": st.booleans(),
        "split_frees_zero": st.booleans(),
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

    def do_collapse(self, number, *limits):
        guest = self.guest(number)
        if guest is not None:
            self.do("collapse", guest, *limits)

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
    assert counts[memory.HUGE_PAGES] == np.count_nonzero(m.block[:, memory.HUGE])
    assert not np.any((shared | zero | ~present).reshape(-1, BLOCK)[m.block[:, memory.HUGE] != 0])
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


ONE_PAGE = (1, 1, 0.0, 0.0, 0)


def plain_host(**changed):
    """A host with every knob off, but for those given."""
    off = {"smart_scan": False, "use_zero_pages": False, "checksum_first": True, "prune_millisecs": 0}
    return {"max_page_sharing": 2, **off, **changed}


@settings(max_examples=250)
@example(  # an item whose page has gone is freed by the batch that passes it, not by the one before
    plain_host(use_zero_pages=True),
    ([ONE_PAGE, ONE_PAGE, (7, 2, 0.0, 0.0, 0)], [(("batch", 1, 1), ("batch", 6, 5))]),
)
@example(  # smart_scan is switched on in the middle of a block
    plain_host(),
    ([(33, 1, 0.9, 0.2, 1)], [(("batch", 4, 10), ("batch", 18, 1)), (("set_smart_scan", True), ("batch", 1, 4))]),
)
@example(  # a quiet block is written after its last visit and before the next batch
    plain_host(),
    (
        [(512, 1, 0.0, 0.0, 0), ONE_PAGE],
        [
            (("batch", 1, 2), ("batch", 300, 2)),
            (("batch", 1, 1), ("batch", 512, 4)),
            (("write", 0, 0, None), ("batch", 1, 2)),
        ],
    ),
)
@example(  # a page that is not mergeable any more maps a KSM page: its fork was merged in place
    plain_host(use_zero_pages=True, smart_scan=True),
    (
        [(511, 6, 0.0, 0.0, 15), (1, 8, 0.0, 0.0, 75), (1, 7, 0.0, 0.0, 44)],
        [
            (("batch", 38, 7), ("batch", 2, 1)),
            (("fork", 0), ("batch", 37, 4)),
            (("madvise", 0, 0, 400, False), ("batch", 300, 12)),
            (("run", 2), ("batch", 1, 1)),
        ],
    ),
)
@given(hosts, scripts)
def test_compiled_loops_and_their_plain_twin_agree_after_every_batch(host, script):
    WithTwin(Machine(**host), naive.Naive(**host)).perform(*script)


class WithoutQuiet(Play):
    """Two hosts of which the second has every page visited one by one; searches go astray in both."""

    def __init__(self, *hosts):
        super().__init__(*hosts)
        for host in hosts:
            host.k.n[ksmd.MISROUTES] = 1

    def batch(self, pages_to_scan):
        quiet, busy = self.hosts
        busy.settle()
        assert busy.k.n[ksmd.VANISHED] == vanished(busy) or busy.between_scans()
        busy.m.block[:, memory.DIRTY] = 1
        quiet.batch(pages_to_scan)
        busy.batch(pages_to_scan)


def vanished(host):
    """How many nodes of the unstable tree whose page is gone a search passes, in millionths, one by one."""
    scan = ksmd.UNSTABLE | (ksmd.PARITY if host.k.n[ksmd.SCAN] & 1 else 0)
    in_tree = host.k.item & (ksmd.UNSTABLE | ksmd.PARITY) == scan
    bits = memory.PRESENT | memory.MERGEABLE
    [pages] = np.nonzero(in_tree & (host.m.place & (bits | memory.ZERO) != bits))
    ranks = host.k.block[pages // BLOCK, ksmd.RANK] + pages % BLOCK
    return sum(np.where(host.k.old[pages] == 0, 1_100_000, 2_200_000) // (ranks + 2))


@settings(max_examples=200)
@given(hosts, scripts)
def test_quiet_blocks_never_change_an_outcome(host, script):
    WithoutQuiet(Machine(**host), Machine(**host)).perform(*script)


def test_a_static_memory_is_all_quiet_in_the_end():
    """Without this the tests above would say nothing about quiet blocks."""
    host = Machine()
    host.start([5] * 700 + list(range(-2, -800, -1)))
    host.scan(20)

    assert host.k.block[:3, ksmd.QUIET].all()


# --- time -------------------------------------------------------------------------------------------------------------

SECOND = 1_000_000_000
PRICES_PS = [
    2_000_000, 1_000_000, 200_000, 300_000, 400_000, 50_000, 80_000, 80, 100_000, 20_000, 100, 200_000, 1_000_000,
    1_000_000, 500_000, 300_000, 20_000, 15_000, 5_000_000, 60_000, 150_000,
]  # fmt: skip
CLASSES = [(0.0, 0, 0), (0.2, 0, 0), (3.0, 1, 6), (40.0, 0, 1)]
"""Random writes: writes per second and page, lowest content left, number of contents (0: always a fresh one)."""


def busy_host(seed, pages_to_scan, smart_scan):
    """Three guests that write at random on a host whose ksmd takes time for its work."""
    host = Machine(smart_scan=smart_scan, max_page_sharing=8, due=16 * BLOCK, use_zero_pages=True)
    host.k.n[ksmd.PRICE : ksmd.DONE] = PRICES_PS
    host.k.n[[ksmd.COLD, ksmd.MISROUTES, ksmd.KEY]] = 200, 1, seed
    host.k.n[ksmd.PAGES_TO_SCAN] = pages_to_scan
    for number, (rate, lowest, span) in enumerate(CLASSES):
        host.m.rates[number, [memory.WRITES, memory.LOWEST, memory.SPAN]] = rate / SECOND, lowest, span
    draw = np.random.default_rng(seed)
    for _ in range(3):
        pages = int(draw.integers(200, 900))
        guest = host.start(draw.integers(0, 40, pages).tolist())
        host.m.accesses[host.span(guest)] = draw.choice(len(CLASSES), pages, p=[0.7, 0.1, 0.1, 0.1])
    return host


def live(host, cuts):
    """Let three seconds pass, with a few events on the way, in pieces that end at *cuts* (ns)."""
    events = {
        SECOND // 2: lambda: host.write(0, 7, 3),
        SECOND: lambda: host.fork(1),
        SECOND * 3 // 2: lambda: host.exit(2),
        SECOND * 2: lambda: memory.change_activity(host.m, 0, 2 * SECOND, 0.25),
    }
    for moment in sorted({*cuts, *events, 3 * SECOND}):
        host.advance(moment)
        host.now = moment
        events.get(moment, lambda: None)()


def state(host):
    """Everything a host holds, as bytes, without what lies beyond the end of its lists."""
    k = host.k._replace(log=host.k.log[: host.k.n[ksmd.LOGGED]])
    m = host.m._replace(due=host.m.due[: host.m.counts[memory.DUE_COUNT]])
    return {name: array.tobytes() for arrays in (k, m) for name, array in arrays._asdict().items()}


@settings(max_examples=40)
@given(
    st.integers(0, 999),
    st.sampled_from([50, 400, 5000]),
    st.booleans(),
    st.lists(st.integers(1, 3 * SECOND), max_size=60),
)
def test_a_run_is_the_same_to_the_bit_however_its_time_is_cut(seed, pages_to_scan, smart_scan, cuts):
    whole, pieces = (busy_host(seed, pages_to_scan, smart_scan) for _ in range(2))
    live(whole, [])
    live(pieces, cuts)

    assert whole.k.n[ksmd.LOGGED] >= 2
    assert whole.m.counts[memory.COW_KSM] > 0
    assert state(whole) == state(pieces)


def test_looking_at_the_counters_changes_nothing():
    watched, alone = busy_host(1, 50, True), busy_host(1, 50, True)
    for moment in range(0, 3 * SECOND, 7_000_000):
        for host in (watched, alone):
            host.advance(moment)
            host.now = moment
        watched.counters()

    assert state(watched) == state(alone)


@pytest.mark.parametrize(
    ("hz", "millisecs", "period_ms"),
    [(250, 1, 8), (250, 10, 16), (250, 20, 24), (250, 100, 104), (250, 300, 320)],
)
def test_a_sleep_at_250_ticks_takes_as_long_as_measured_on_6_18(hz, millisecs, period_ms):
    assert period_ms * 1_000_000 == sleep_length(hz, millisecs, 0)


def sleep_length(hz, millisecs, moment):
    """How long ksmd sleeps (ns) after a batch that ends at *moment* (ns)."""
    host = Machine()
    host.start([5])
    host.k.n[[ksmd.HZ, ksmd.SLEEP_MILLISECS, ksmd.WAKE]] = hz, millisecs, moment
    host.batch(100)
    return int(host.k.n[ksmd.WAKE]) - moment


@given(st.sampled_from([100, 250, 300, 1000]), st.integers(1, 20_000), st.integers(0, 10**6))
def test_a_sleep_ends_at_the_first_step_of_the_timer_wheel_that_is_not_early(hz, millisecs, tick):
    """A wheel of 63 steps of one tick, then of 8, 64, ... ticks; expiry is the first step after the time asked for."""
    moment = -(-tick * SECOND // hz)
    ticks = -(-millisecs * hz // 1000)
    step = next(step for step in (8**level for level in range(8)) if ticks < 63 * step)
    wake = next(wake for wake in itertools.count(tick + ticks + 1) if wake % step == 0)

    assert -(-wake * SECOND // hz) - moment == sleep_length(hz, millisecs, moment)


def test_a_batch_of_more_than_a_tick_makes_the_period_longer_by_whole_ticks():
    host = Machine()
    host.start([5])
    host.k.n[ksmd.PRICE + ksmd.W_BATCH] = 5_000_000_000
    host.advance(10_000_000)

    assert host.k.n[ksmd.WAKE] == 28_000_000


def test_before_6_8_a_sleep_of_a_second_and_more_ended_at_whole_seconds():
    host = Machine()
    host.start([5])
    host.k.n[[ksmd.SLEEP_MILLISECS, ksmd.EXACT_SLEEP, ksmd.WAKE]] = 2600, 0, 50_000_000
    host.batch(100)

    assert 3 * SECOND <= host.k.n[ksmd.WAKE] <= 3.3 * SECOND


def advised(pages_to_scan, seconds, cpu_ms, target, max_cpu, before):
    """The scan-time advisor as the kernel writes it; *before* is (change, seconds) of the last step."""
    change_before, seconds_before = before
    percent = max(1, cpu_ms * 100 // (seconds * 1000))
    factor = max(1, target * 100 // seconds)
    change = max(1, seconds * 100 // (seconds_before or seconds))
    change = (70 * change_before + 30 * change) // 100
    pages = pages_to_scan * 100 // factor
    pages = pages * change // 100
    per_percent = max(1, pages_to_scan // percent)
    pages = max(min(pages, per_percent * max_cpu), per_percent * 10)
    return min(pages, 30_000), (change, seconds)


@pytest.mark.parametrize(
    ("sleep_millisecs", "target", "max_cpu"), [(200, 10, 70), (200, 2, 70), (20, 200, 70), (20, 1, 12)]
)
def test_the_advisor_takes_the_steps_of_its_formulas(sleep_millisecs, target, max_cpu):
    host = Machine(smart_scan=False)
    n = host.k.n
    n[ksmd.PRICE : ksmd.DONE] = PRICES_PS
    n[[ksmd.ADVISOR, ksmd.PAGES_TO_SCAN, ksmd.SLEEP_MILLISECS]] = 1, 500, sleep_millisecs
    n[[ksmd.TARGET_SCAN_TIME, ksmd.MAX_CPU, ksmd.MAX_PAGES_TO_SCAN]] = target, max_cpu, 30_000
    host.start(list(range(-2, -6000, -1)))
    pages_to_scan, cpu_ps, before, chosen = 500, 0, (0, 0), set()
    for scan in range(12):
        while n[ksmd.LOGGED] == scan:
            host.now += SECOND // 100
            host.advance(host.now)
        row = host.k.log[scan]
        seconds = max(1, int(row[ksmd.ROW_TIME] - n[ksmd.PASS_START]) // SECOND)
        cpu_ms = int(row[ksmd.ROW_KSMD_PS] - cpu_ps) // 10**9
        pages_to_scan, before = advised(pages_to_scan, seconds, cpu_ms, target, max_cpu, before)
        cpu_ps = row[ksmd.ROW_KSMD_PS]
        chosen.add(pages_to_scan)

        assert pages_to_scan == row[ksmd.ROW_PAGES_TO_SCAN]

    assert len(chosen) > 1


# --- batches and full scans -------------------------------------------------------------------------------------------


def own(pages):
    """Contents of pages that are unlike any other."""
    return list(range(-2, -2 - pages, -1))


def columns(rows, *names):
    """Some counters of each row."""
    return [tuple(row[name] for name in names) for row in rows]


def test_a_tiny_workload_is_scanned_once_per_batch():
    host = Machine()
    host.start(own(16))
    for batch in range(50):
        host.batch(100)

        assert batch + 1 == host.counters()["full_scans"]


def test_what_is_left_of_the_quota_at_the_end_of_a_full_scan_is_lost():
    host = Machine(smart_scan=False)
    host.start(own(10))
    scanned = []
    for _ in range(6):
        host.batch(7)
        scanned.append(host.counters()["pages_scanned"])

    assert scanned == [7, 10, 17, 20, 27, 30]


@given(st.integers(1, 2000), st.integers(1, 2500))
def test_a_full_scan_takes_one_batch_more_than_its_quota_holds(pages, pages_to_scan):
    host = Machine(smart_scan=False)
    host.start(own(pages))
    batches = 0
    while host.k.n[ksmd.FULL_SCANS] < 3:
        host.batch(pages_to_scan)
        batches += 1

    assert 3 * (pages // pages_to_scan + 1) == batches


def test_a_quota_of_nothing_does_nothing():
    host = Machine()
    host.start(own(10))
    host.batch(0)

    assert (host.counters()["pages_scanned"], host.counters()["full_scans"]) == (0, 0)


def test_kernels_6_6_to_6_9_leave_the_last_batch_of_a_scan_out_of_pages_scanned():
    host = Machine(smart_scan=False)
    host.k.n[ksmd.COUNTS_LAST_BATCH] = 0
    host.start(own(10))

    assert [row["pages_scanned"] for row in host.scan(3, pages_to_scan=7)] == [7, 14, 21]


# --- smart_scan -------------------------------------------------------------------------------------------------------


def test_a_lonely_page_is_processed_at_its_visits_0_1_2_3_5_8_13_and_then_every_ninth():
    host = Machine()
    host.start(own(1))
    scanned = [0] + [row["pages_scanned"] for row in host.scan(50)]
    processed = np.flatnonzero(np.diff(scanned)).tolist()

    assert processed == [0, 1, 2, 3, 5, 8, 13, 22, 31, 40, 49]


def test_unique_pages_alternate_between_unshared_and_volatile():
    pages = 1000
    host = Machine()
    host.start(own(pages))
    rows = columns(host.scan(23), "pages_scanned", "pages_skipped", "pages_unshared", "pages_volatile")
    in_pages = [tuple(count // pages for count in row) for row in rows]

    assert in_pages[:6] == [(1, 0, 0, 1), (2, 0, 1, 0), (3, 0, 1, 0), (4, 0, 1, 0), (4, 1, 0, 1), (5, 1, 1, 0)]
    assert in_pages[6:9] == [(5, 2, 0, 1), (5, 3, 0, 1), (6, 3, 1, 0)]
    assert [(6, skipped, 0, 1) for skipped in (4, 5, 6, 7)] == in_pages[9:13]
    assert in_pages[13:14] == [(7, 7, 1, 0)]
    assert [(7, skipped, 0, 1) for skipped in range(8, 16)] == in_pages[14:22]
    assert in_pages[22:23] == [(8, 15, 1, 0)]


def test_a_full_scan_that_skips_everything_takes_one_batch():
    host = Machine()
    host.start(own(1000))
    ended, batches = [], 0
    while len(ended) < 23:
        host.batch(100)
        batches += 1
        ended += [batches] * int(host.k.n[ksmd.FULL_SCANS] - len(ended))
    lengths = np.diff([0, *ended])

    assert {1, 2, 3, 4, 6, 9, 14, 23} == set(np.flatnonzero(lengths == 11) + 1)
    assert {1, 11} == set(lengths)


MERGED_IN = {0: 1, 1: 2, 2: 3, 3: 5, 4: 5, 5: 8, 6: 8, 7: 8, 8: 13, 9: 22, 10: 13, 11: 13, 12: 13, 14: 22}


@pytest.mark.parametrize("apart", range(25))
def test_two_equal_pages_born_apart_meet_as_measured_on_6_18_or_never(apart):
    host = Machine()
    host.start([5, *own(15)])
    host.scan(apart)
    host.start([5, *range(-100, -115, -1)])
    merged = [row["pages_sharing"] for row in host.scan(46)]
    first = merged.index(1) if 1 in merged else None

    assert (first is None) == (apart >= 13 and apart % 9 in (4, 6, 7))
    if apart in MERGED_IN:
        assert MERGED_IN[apart] - apart == first


# --- counters: the kernel's own selftest, derived trajectories, published examples ------------------------------------


def shared_and_sharing(pages, most):
    """pages_shared and pages_sharing of equal pages (assert_ksm_pages_count in the kernel's ksm_tests.c)."""
    if pages % most in (0, 1):
        return pages // most, pages // most * (most - 1)
    return pages // most + 1, pages - pages // most - 1


@pytest.mark.parametrize("pages", [1, 2, 10, 255, 256, 257, 258, 511, 512, 513])
@pytest.mark.parametrize("most", [2, 3, 10, 256])
def test_the_counting_rule_of_the_kernels_selftest_holds_after_two_scans(pages, most):
    host = Machine(max_page_sharing=most)
    host.start([5] * pages)
    row = host.scan(2)[-1]

    assert shared_and_sharing(pages, most) == (row["pages_shared"], row["pages_sharing"])
    assert row["pages_unshared"] == (pages % most == 1)


def test_300_mib_of_equal_pages_share_as_in_the_ksm_auto_run_test():
    host = Machine(pages=76_800)
    host.start([5] * 76_800)
    row = host.scan(2)[-1]

    assert (row["pages_shared"], row["pages_sharing"]) == (300, 76_500)


def test_zero_pages_are_no_ksm_pages_with_use_zero_pages():
    """DedupeResearch's example: a hundred equal pages, and fifty of them empty."""
    host = Machine(use_zero_pages=True)
    host.start([5] * 50 + [0] * 50)
    row = host.scan(3)[-1]

    assert tuple(row[name] for name in ("ksm_zero_pages", "pages_shared", "pages_sharing", "items")) == (50, 1, 49, 50)


def test_a_zero_page_found_unique_before_use_zero_pages_becomes_the_zero_page_at_its_next_processed_visit():
    host = Machine()
    host.start([0])
    host.scan(6)
    host.set_use_zero_pages(True)

    assert [row["ksm_zero_pages"] for row in host.scan(3)] == [0, 0, 1]


def test_pages_that_were_all_rewritten_are_shared_no_more_after_a_scan():
    host = Machine()
    guest = host.start([5, 5])
    host.scan(2)
    host.write(guest, 0, 6)
    host.write(guest, 1, 7)
    before, after = host.counters(), host.scan(1)[-1]

    assert (before["pages_shared"], before["pages_sharing"]) == (1, 1)
    assert (after["pages_shared"], after["pages_sharing"]) == (0, 0)


def test_four_processes_share_as_in_the_hand_counted_example():
    """netdata issue 3304: A = B, C0-3 = A0-3, D4-7 = C4-7, D0-3 unlike anything."""
    host = Machine()
    for contents in (range(8), range(8), [0, 1, 2, 3, 10, 11, 12, 13], [-2, -3, -4, -5, 10, 11, 12, 13]):
        host.start(list(contents))
    row = host.scan(2)[-1]

    assert columns([row], *PAGE_COUNTERS) == [(12, 16, 4, 0)]


def test_a_thousand_equal_pages_make_a_chain_of_four():
    host = Machine()
    host.start([5] * 1000)
    names = (*PAGE_COUNTERS, "stable_node_chains", "stable_node_dups")

    assert columns(host.scan(10), *names) == [(0, 0, 0, 1000, 0, 0)] + [(4, 996, 0, 0, 1, 4)] * 9


def test_the_odd_page_of_1025_is_unshared_when_processed_and_volatile_when_skipped():
    host = Machine()
    host.start([5] * 1025)
    rows = columns(host.scan(15), *PAGE_COUNTERS)

    assert rows[1] == (4, 1020, 1, 0)
    assert [scan for scan, row in enumerate(rows, 1) if row == (4, 1020, 1, 0)] == [2, 3, 4, 6, 9, 14]
    assert [scan for scan, row in enumerate(rows, 1) if row == (4, 1020, 0, 1)] == [5, 7, 8, 10, 11, 12, 13, 15]


@given(st.integers(1, 2000), st.integers(2, 300))
def test_equal_pages_fill_ksm_pages_and_only_a_single_one_is_left_over(pages, most):
    host = Machine(max_page_sharing=most)
    host.start([5] * pages)
    row = host.scan(2)[-1]
    full, rest = divmod(pages, most)
    shared, unshared = full + (rest >= 2), int(rest == 1)

    assert [(shared, pages - shared - unshared, unshared)] == columns([row], *IN_TREES)


def test_a_write_to_a_shared_page_is_counted_when_the_page_is_visited():
    host = Machine()
    guest = host.start([5] * 100)
    host.scan(2)
    host.write(guest, 40, -2)
    rows = [host.counters(), *host.scan(1)]

    assert columns(rows, "pages_shared", "pages_sharing", "pages_volatile") == [(1, 99, 0), (1, 98, 1)]


def test_the_first_visit_after_all_pages_were_written_removes_the_node_for_all_of_them():
    host = Machine()
    guest = host.start([5] * 100)
    host.scan(2)
    for page, content in enumerate(own(100)):
        host.write(guest, page, content)
    rows = [host.counters()]
    host.batch(1)
    rows.append(host.counters())

    assert columns(rows, "pages_shared", "pages_sharing", "pages_volatile") == [(1, 99, 0), (0, 0, 100)]


@pytest.mark.parametrize("searched", [False, True])
def test_the_header_of_a_chain_outlives_its_dups_until_a_search_meets_it(searched):
    """Measured on 6.18: 154 headers without dups at the end of a scan of changed pages, none after the next scan."""
    host = Machine(max_page_sharing=2, smart_scan=False)
    guest = host.start([5] * 4)
    host.start([-2] if searched else [None])
    host.scan(2)
    for page, content in enumerate(own(4)):
        host.write(guest, page, content)
    chains = columns(host.scan(2), "stable_node_chains", "stable_node_dups")

    assert chains == [(not searched, 0), (0, 0)]


def with_a_vanishing_guest(going, staying, vanish):
    """A host whose searches may stop: a guest vanishes when ksmd has put its pages in the unstable tree."""
    host = Machine(smart_scan=False)
    host.k.n[[ksmd.MISROUTES, ksmd.KEY]] = 1, 99
    guest = host.start(list(range(1, going + 1)))
    host.start(list(range(going + 1, going + staying + 1)))
    host.scan(2)
    host.batch(going + 1)
    vanish(host, guest, going)
    return host


@pytest.mark.parametrize("vanish", [
    lambda host, guest, pages: host.madvise(guest, 0, pages, False),
    lambda host, guest, pages: host.exit(guest),
    lambda host, guest, pages: [host.unmap(guest, page) for page in range(pages)],
])  # fmt: skip
def test_searches_stop_at_pages_that_vanished_from_the_unstable_tree_until_the_next_scan(vanish):
    host = with_a_vanishing_guest(400, 300, vanish)
    before, after = columns(host.scan(2, 1000), "pages_unshared", "pages_volatile")

    assert before[1] == 299
    assert after == (300, 0)


@pytest.mark.parametrize(("first", "pages", "measured"), [(512, 64, 0.205), (512, 256, 0.578), (2048, 820, 0.560)])
def test_the_later_vanished_pages_were_put_in_the_tree_the_fewer_searches_they_stop(first, pages, measured):
    """Measured on 6.18: a guest of 4,096 unique pages takes some back before one of 2,048 is scanned."""
    host = with_a_vanishing_guest(4096, 2048, lambda host, guest, _: host.madvise(guest, first, pages, False))
    stopped = host.scan(1)[0]["pages_volatile"] / 2048

    assert stopped == pytest.approx(measured, abs=0.08)


def test_pages_that_come_back_before_they_are_looked_for_stop_no_search():
    host = with_a_vanishing_guest(400, 300, lambda host, guest, pages: host.madvise(guest, 0, pages, False))
    host.madvise(0, 0, 400, True)

    assert columns(host.scan(1), "pages_unshared", "pages_volatile") == [(700, 0)]


@given(st.integers(1, 5000), st.floats(0.01, 50), st.floats(0.001, 2))
def test_the_nodes_above_a_page_had_all_the_time_since_it_was_put_there_to_change(nodes, rate, seconds):
    host = Machine()
    host.m.rates[1, memory.WRITES] = rate / SECOND
    host.k.hot[1] = nodes, nodes
    host.k.n[ksmd.UNSTABLE_TREE] = 2 * nodes
    host.k.block[3, ksmd.ENTERED] = SECOND
    host.k.n[ksmd.BATCH_START] = SECOND + round(seconds * SECOND)

    assert ksmd.changed_share(host.m, host.k, 3) == pytest.approx(0.5 - 0.5 * np.exp(-rate * seconds), abs=1e-6)


def test_a_page_that_was_written_at_random_since_it_was_put_in_the_tree_is_not_merged():
    host = Machine(smart_scan=False)
    writer = host.start([*range(1, 301)])
    host.start([*range(1, 301)])
    host.m.accesses[host.span(writer)] = 1
    host.scan(1)
    host.batch(300)
    host.m.rates[1, memory.WRITES] = 1.0

    assert columns(host.scan(1), *PAGE_COUNTERS) == [(0, 0, 600, 0)]


def difference_engine_memory():
    """Pages of three guests as the Difference Engine counted them (OSDI 2008, table 1), groups of nearly one size."""
    zero, sharable, groups, unique = 149_038, 52_436, 3_577, 191_646
    size, larger = divmod(sharable, groups)
    contents = [0] * zero
    for group in range(groups):
        contents += [group + 1] * (size + (group < larger))
    return contents + own(unique)


def test_a_ksm_page_that_only_a_fork_still_maps_takes_pages_again_when_the_fork_was_visited():
    host = Machine(max_page_sharing=2, smart_scan=False)
    parent = host.start([5] * 4)
    host.start([5])
    host.scan(3)
    child = host.fork(parent)
    host.write(parent, 0, -2)
    host.write(parent, 1, -3)
    host.unmap(child, 1)

    assert columns(host.scan(2), *IN_TREES) == [(2, 3, 1), (2, 4, 2)]


@pytest.mark.parametrize(("most", "shared"), [(1 << 40, 3_578), (256, 583 + 3_577)])
def test_the_difference_engines_memory_shares_as_much_as_published(most, shared):
    contents = difference_engine_memory()
    host = Machine(pages=len(contents) + 3 * BLOCK, max_page_sharing=most, smart_scan=False)
    third = len(contents) // 3
    for part in (contents[:third], contents[third : 2 * third], contents[2 * third :]):
        host.start(part)
    row = host.scan(2)[-1]

    assert [(shared, 149_038 + 52_436 - shared, 191_646)] == columns([row], *IN_TREES)
    assert row["frames"] == 191_646 + shared


# --- what versions do otherwise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("checksum_first", "visits"), [(True, 2), (False, 1)])
def test_before_6_11_a_page_with_a_twin_in_the_stable_tree_merged_at_its_first_visit(checksum_first, visits):
    host = Machine(checksum_first=checksum_first)
    host.start([5, 5])
    host.scan(2)
    host.start([5])
    merged = [row["pages_sharing"] for row in host.scan(3)]

    assert visits == merged.index(2) + 1


# --- the list of guests -----------------------------------------------------------------------------------------------


def test_guests_are_scanned_in_the_order_in_which_they_registered():
    host = Machine()
    guests = [host.start([content]) for content in range(3)]

    assert guests == host.listed()


def test_a_guest_that_registers_in_mid_scan_goes_just_before_the_cursor():
    host = Machine()
    first, second, third = (host.start(own(10)) for _ in range(3))
    host.batch(15)
    late = host.start(own(5))
    row = host.scan(1)[-1]

    assert [first, late, second, third] == host.listed()
    assert row["items"] == 30


def test_a_guest_that_registers_between_two_scans_goes_to_the_tail_and_is_scanned_next():
    host = Machine()
    first, second = (host.start(own(10)) for _ in range(2))
    host.scan(1)
    late = host.start(own(5))
    row = host.scan(1)[-1]

    assert [first, second, late] == host.listed()
    assert row["items"] == 25


def test_a_guest_that_registers_while_unmerging_goes_to_the_tail():
    host = Machine()
    first, second = (host.start(own(10)) for _ in range(2))
    host.batch(15)
    host.run(2)
    late = host.start(own(5))

    assert [first, second, late] == host.listed()


def test_a_guest_that_ksmd_never_saw_leaves_the_list_at_once():
    host = Machine()
    first, second = (host.start(own(10)) for _ in range(2))
    host.batch(5)
    host.exit(second)

    assert [first] == host.listed()


def test_a_guest_that_exits_is_forgotten_when_ksmd_comes_by_which_is_next_and_costs_no_quota():
    host = Machine()
    first, second, third = (host.start(own(10)) for _ in range(3))
    host.scan(1)
    host.batch(5)
    host.exit(third)
    waiting, items = host.listed(), host.counters()["items"]
    host.batch(6)
    row = host.counters()

    assert [first, third, second] == waiting
    assert items == 30
    assert [first, second] == host.listed()
    assert (row["items"], row["pages_scanned"]) == (20, 41)


def test_a_guest_that_exits_under_the_cursor_stays_there_until_the_next_batch():
    host = Machine()
    first, second = (host.start(own(10)) for _ in range(2))
    host.scan(1)
    host.batch(5)
    host.exit(first)
    waiting = host.listed()
    host.batch(1)

    assert [first, second] == waiting
    assert [second] == host.listed()
    assert host.counters()["items"] == 10


def test_dead_guests_stay_counted_while_ksmd_is_stopped():
    host = Machine()
    guest = host.start([5] * 10)
    host.scan(2)
    host.run(0)
    host.exit(guest)
    host.batch(100)
    row = host.counters()

    assert (row["pages_shared"], row["pages_sharing"], row["items"], row["frames"]) == (1, 9, 10, 0)


def test_stopping_and_starting_ksmd_goes_on_at_the_same_page():
    host = Machine()
    host.start(own(10))
    host.batch(4)
    host.run(0)
    host.batch(4)
    stopped = host.counters()["pages_scanned"]
    host.run(1)
    host.batch(4)

    assert (stopped, host.counters()["pages_scanned"]) == (4, 8)


def test_unmerging_gives_every_page_its_own_frame_and_keeps_what_was_counted_so_far():
    host = Machine(use_zero_pages=True)
    guest = host.start([5] * 10 + [0] * 3)
    host.scan(3)
    scanned = host.counters()["pages_scanned"]
    host.run(2)
    row = host.counters()
    host.run(1)
    again = host.scan(2)[-1]

    assert Counter({5: 10, 0: 3}) == Counter(host.read(guest))
    assert tuple(row[name] for name in ("pages_shared", "items", "ksm_zero_pages", "full_scans", "frames")) == (
        0,
        0,
        0,
        0,
        13,
    )
    assert scanned == row["pages_scanned"]
    assert (again["pages_sharing"], again["ksm_zero_pages"]) == (9, 3)
