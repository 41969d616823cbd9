"""Who turns KSM's knobs: ksmtuned, MOM and the kernel's own advisor, by themselves and on a running host."""

import math

import pytest
from one_host import at, end, events, guest, part, run

from sim.sharing.tuners import Choice, Ksmtuned, Mom, Usage
from sim.units import GIB, KIB, MIB

SHORT = Usage(total=16 * GIB, free=1 * GIB, committed=15 * GIB)
AMPLE = Usage(total=16 * GIB, free=8 * GIB, committed=15 * GIB)
"""Memory is free, since KSM merged it, but committed all the same."""
IDLE = Usage(total=16 * GIB, free=14 * GIB, committed=2 * GIB)


def npages(daemon, usage, looks):
    """What a daemon writes to pages_to_scan."""
    return [daemon.look(usage).pages_to_scan for _ in range(looks)]


# --- the rule --------------------------------------------------------------------------------------------------------


def test_ksmtuned_looks_once_a_minute():
    assert Ksmtuned().start().every == 60_000_000_000


def test_pages_to_scan_climbs_by_300_to_1250_while_memory_is_short():
    assert npages(Ksmtuned().start(), SHORT, 6) == [300, 600, 900, 1200, 1250, 1250]


def test_pages_to_scan_falls_by_50_to_64_while_memory_is_committed_but_free():
    daemon = Ksmtuned().start()
    npages(daemon, SHORT, 5)

    fall = npages(daemon, AMPLE, 25)
    assert fall == [*range(1200, 64, -50), 64, 64]
    assert fall.index(64) + 1 == 24


def test_ksmtuned_begins_with_64_pages_if_memory_is_not_short():
    assert npages(Ksmtuned().start(), AMPLE, 1) == [64]


@pytest.mark.parametrize(
    ("free", "committed", "run"),
    [(14, 2, 0), (14, 14, 1), (3, 2, 1), (3, 14, 1)],
    ids=["neither", "committed", "not free", "both"],
)
def test_ksmtuned_stops_only_if_memory_is_both_free_and_not_committed(free, committed, run):
    usage = Usage(total=16 * GIB, free=free * GIB, committed=committed * GIB)

    assert Ksmtuned().start().look(usage).run == run


def test_at_the_threshold_itself_ksmtuned_runs_and_slows_down():
    threshold = 100 * GIB * 20 // 100
    usage = Usage(total=100 * GIB, free=threshold, committed=1 * GIB)

    assert Ksmtuned().choose(usage, 1000) == (Choice(run=1, pages_to_scan=950, sleep_millisecs=10), 950)


def test_a_stop_leaves_the_other_knobs_alone_and_npages_survives_it():
    daemon = Ksmtuned().start()

    assert npages(daemon, SHORT, 3) == [300, 600, 900]
    assert daemon.look(IDLE) == Choice(run=0)
    assert npages(daemon, SHORT, 1) == [1200]


@pytest.mark.parametrize(("memory", "sleep"), [(4, 40), (8, 20), (16, 10), (32, 10), (256, 10)])
def test_ksmd_sleeps_longer_on_a_host_with_less_memory(memory, sleep):
    usage = Usage(total=memory * GIB, free=0, committed=memory * GIB)

    assert Ksmtuned().start().look(usage).sleep_millisecs == sleep


@pytest.mark.parametrize(("memory", "sleep"), [(4, 400), (16, 100), (64, 25), (256, 10)])
def test_on_proxmox_ksmd_sleeps_ten_times_as_long(memory, sleep):
    """Its ksmtuned.conf has KSM_SLEEP_MSEC=100."""
    usage = Usage(total=memory * GIB, free=0, committed=memory * GIB)

    assert Ksmtuned(sleep_msec=100).start().look(usage).sleep_millisecs == sleep


@pytest.mark.parametrize(("free", "run"), [(2049 * KIB, 0), (2047 * KIB, 1)])
def test_memory_is_short_below_2_mib_whatever_the_percentage(free, run):
    usage = Usage(total=8 * MIB, free=free, committed=0)

    assert Ksmtuned(thres_coef=0).start().look(usage).run == run


def test_mom_decides_at_every_second_look_each_five_seconds():
    daemon = Mom().start()

    choices = [daemon.look(SHORT) for _ in range(10)]
    assert daemon.every == 5_000_000_000
    assert choices[::2] == [None] * 5
    assert [choice.pages_to_scan for choice in choices[1::2]] == [300, 600, 900, 1200, 1250]


def test_mom_averages_free_memory_over_ten_looks():
    """3.2 GiB is the threshold: one look with nothing free leaves the average of ten above it, two do not."""
    daemon = Mom().start()
    enough = Usage(total=16 * GIB, free=39 * GIB // 10, committed=15 * GIB)
    nothing = Usage(total=16 * GIB, free=0, committed=15 * GIB)

    def decide(*looks):
        return [choice.pages_to_scan for usage in looks if (choice := daemon.look(usage))]

    assert decide(*[enough] * 10) == [64] * 5
    assert decide(enough, nothing) == [64]
    assert decide(nothing, enough) == [364]
    assert decide(*[enough] * 10) == [664, 964, 1250, 1200, 1150]


# --- on a running host -----------------------------------------------------------------------------------------------


def filled(name, mebibytes, **more):
    """A guest whose memory is all in use."""
    pages = mebibytes * 256
    return guest(name, part("memory", pages), pages=pages, **more)


def series(result, column, times):
    """A column at certain times (s)."""
    return [int(at(result, time)[column]) for time in times]


def test_ksmtuned_climbs_on_a_host_whose_memory_is_short():
    result = run(filled("g", 900), memory="1GiB", duration="400s", sample_every="10s", ksm={"run": 0}, ksmtuned={})

    minutes = range(70, 400, 60)
    assert series(result, "pages_to_scan", [50, *minutes]) == [100, 300, 600, 900, 1200, 1250, 1250]
    assert series(result, "run", [50, *minutes]) == [0, 1, 1, 1, 1, 1, 1]
    assert series(result, "sleep_millisecs", [50, *minutes]) == [20, *[160] * 6]


def test_mom_climbs_every_ten_seconds_on_a_host_whose_memory_is_short():
    result = run(filled("g", 900), memory="1GiB", duration="60s", sample_every="1s", ksm={"run": 0}, mom={})

    assert series(result, "pages_to_scan", [9, 11, 21, 31, 41, 51]) == [100, 300, 600, 900, 1200, 1250]


def test_ksmtuned_stops_when_guests_leave_and_goes_on_where_it_was():
    vms = [filled("early", 900, stop="200s"), filled("late", 900, start="290s")]
    result = run(*vms, memory="1GiB", duration="380s", sample_every="10s", ksm={"run": 0}, ksmtuned={})

    assert series(result, "pages_to_scan", [190, 250, 310, 370]) == [900, 900, 1200, 1250]
    assert series(result, "run", [190, 250, 310, 370]) == [1, 0, 1, 1]
    assert (240.0, "setting") in events(result)


def test_on_a_host_that_merges_every_choice_of_ksmtuned_is_that_of_the_rule():
    """Merging frees memory but does not lower what is committed, so ksmtuned slows down and never stops."""
    pages = 460 * 256
    twins = guest("twin", part("common", pages, pool="common"), pages=pages, count=2)
    result = run(twins, memory="1GiB", duration="15min", sample_every="30s", ksm={"run": 0}, ksmtuned={})

    rule, remembered = Ksmtuned(), 0
    for time in range(60, 900, 60):
        before = at(result, time)
        usage = Usage(1 * GIB, free=int(before["mem_free_bytes"]), committed=int(before["mem_touched_bytes"]))
        choice, remembered = rule.choose(usage, remembered)
        assert series(result, "pages_to_scan", [time + 30]) == [choice.pages_to_scan]
        assert series(result, "run", [time + 30]) == [choice.run] == [1]
    fastest, slowest = result.samples["pages_to_scan"].max(), end(result)["pages_to_scan"]
    assert end(result)["pages_sharing"] == pages
    assert fastest > slowest > 64


# --- the kernel's advisor --------------------------------------------------------------------------------------------


class Advisor:
    """The scan-time advisor once more, from its description; times in s, CPU time in ms."""

    def __init__(self, target, most, max_cpu=70):
        self.target, self.most, self.max_cpu = target, most, max_cpu
        self.cpu = self.previous = self.change = 0

    def advise(self, pages, seconds, cpu):
        seconds = max(1, seconds)
        percent = max(1, (cpu - self.cpu) * 100 // (seconds * 1000))
        factor = max(1, self.target * 100 // seconds)
        change = max(1, seconds * 100 // (self.previous or seconds))
        self.change = (70 * self.change + 30 * change) // 100
        self.cpu, self.previous = cpu, seconds
        wanted = pages * 100 // factor * self.change // 100
        unit = max(1, pages // percent)
        return min(max(min(wanted, unit * self.max_cpu), unit * 10), self.most)


@pytest.fixture(scope="module")
def advised():
    """An eighth of the host of the advisor's patch in pages, and a quarter of its target time: half the speed.

    At the whole speed ksmd needs more than its 70 % of a core for these pages at the bundled prices.
    """
    pages = 20_000_000 // 8
    settings = {"smart_scan": 0, "advisor_mode": "scan-time", "advisor_target_scan_time": 200 // 4}
    return run(guest("g", part("own", pages), pages=pages), memory="16GiB", duration="40min", ksm=settings)


def test_the_advisor_reaches_its_target_scan_time(advised):
    """Source: S. Roesch, KSM advisor v5, Dec 2023. Its moving average ends at 97 %, so scans take a little longer."""
    assert advised.summary["scan_time_s"] == pytest.approx(50, rel=0.05)
    assert advised.summary["ksmd_cpu_percent_settled"] < 70


def test_the_advisor_begins_with_its_least_pages_to_scan(advised):
    assert at(advised, 0.0)["pages_to_scan"] == 500


def test_every_step_of_the_advisor_is_that_of_its_formulas(advised):
    """A full scan begins when ksmd wakes up after the one before: at HZ=250, 20 ms are 5 ticks and one more."""
    advisor, pages, began = Advisor(target=50, most=30_000), 500, 0.0
    steps = []
    for row in advised.scans.itertuples():
        pages = advisor.advise(pages, int(row.time_s - began), row.ksmd_cpu_ns // 1_000_000)
        steps.append(pages)
        began = (math.floor(row.time_s * 250) + 6) / 250

    assert len(steps) > 20
    assert len(set(steps)) > 10
    assert list(advised.scans["pages_to_scan"]) == steps


def test_the_advisor_never_lets_ksmd_use_more_than_its_share_of_a_core():
    settings = {"smart_scan": 0, "advisor_mode": "scan-time", "advisor_target_scan_time": 5, "advisor_max_cpu": 30}
    pages = 2_000_000
    result = run(guest("g", part("own", pages), pages=pages), memory="16GiB", duration="10min", ksm=settings)

    assert result.summary["ksmd_cpu_percent_settled"] == pytest.approx(30, abs=2)
    assert result.summary["scan_time_s"] > 5


def test_pages_to_scan_cannot_be_written_while_the_advisor_is_on():
    """Switching it on and off sets pages_to_scan to 500 and to 100."""
    settings = {
        "changes": [
            {"at": "1s", "advisor_mode": "scan-time"},
            {"at": "2s", "pages_to_scan": 300},
            {"at": "3s", "advisor_mode": "none"},
            {"at": "4s", "pages_to_scan": 300},
        ]
    }
    result = run(filled("g", 900), duration="5s", sample_every="500ms", ksm=settings)

    assert series(result, "pages_to_scan", [0.5, 1.5, 2.5, 3.5, 4.5]) == [100, 500, 500, 100, 300]
    assert events(result)[1] == (2.0, "setting-refused")
    assert result.events["detail"].iloc[1].startswith("pages_to_scan = 300: EINVAL")
