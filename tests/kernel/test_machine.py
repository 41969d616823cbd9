"""The lab takes KSM for itself, puts everything back, and its guests hold exactly what they were told to write."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.errors import MachineError
from sim.lab.guest import Act, GuestServer, Pattern, digests, render
from sim.lab.machine import KSM, STATE, TOKEN_VARIABLE, Ksm, exclusive, restore
from sim.lab.record import Guest, Madvise, Rate, Recording, Setting, Workload, Write, record
from sim.lab.trial import ATTEMPTS

MS = 1_000_000
FRESH = np.empty(0, np.uint64)
PATTERNS: tuple[Pattern, ...] = ("early", "late", "random")

HOLD_KSM = """
import sys, time
from sim.lab.guest import GuestServer
from sim.lab.machine import exclusive
with exclusive() as ksm:
    ksm.set(pages_to_scan=4321, sleep_millisecs=55)
    ksm.isolate()
    guest = GuestServer(ksm.token).spawn("orphan", 1, "early")
    print(guest.pid(), flush=True)
    time.sleep(60)
"""

USE_KSM = """
import mmap, time
area = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_MERGEABLE)
print("ready", flush=True)
time.sleep(60)
"""


def guest(name: str, keys: list[int] | np.ndarray, **rest: object) -> Guest:
    """A guest whose pages all exist."""
    words = np.asarray(keys, dtype=np.uint64)
    return Guest(name, words, np.ones(len(words), bool), **rest)  # type: ignore[arg-type]


def at_scan(recording: Recording, number: int) -> dict[str, int]:
    """The proven counters at the end of a full scan."""
    scans = recording.scans.set_index("full_scans")
    assert scans.loc[number, "proven"]
    return dict(scans.loc[number, ["pages_shared", "pages_sharing", "pages_unshared", "pages_volatile"]])


def counts(shared: int, sharing: int, unshared: int, volatile: int) -> dict[str, int]:
    """What `at_scan` returns."""
    return {
        "pages_shared": shared,
        "pages_sharing": sharing,
        "pages_unshared": unshared,
        "pages_volatile": volatile,
    }


def knobs() -> dict[str, str]:
    """Every writable setting, as the kernel shows it."""
    return {file.name: file.read_text() for file in sorted(KSM.iterdir()) if file.stat().st_mode & 0o200}


@contextlib.contextmanager
def started(script: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that runs the script, and the first line it prints."""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.fixture
def odd_knobs() -> Iterator[dict[str, str]]:
    """Settings that are nobody's defaults, so that putting them back is not the same as resetting."""
    old = knobs()
    for name, value in {"pages_to_scan": 777, "sleep_millisecs": 33, "max_page_sharing": 99, "smart_scan": 0}.items():
        (KSM / name).write_text(str(value))
    yield knobs()
    for name in ("pages_to_scan", "sleep_millisecs", "max_page_sharing", "smart_scan"):
        (KSM / name).write_text(old[name])


@given(st.lists(st.integers(0, 2**64 - 1), unique=True, min_size=1, max_size=8), st.sampled_from(PATTERNS))
def test_different_keys_give_different_pages_and_key_0_the_zero_page(keys: list[int], pattern: Pattern) -> None:
    pages = render(np.array(keys, dtype=np.uint64), pattern)

    assert len({page.tobytes() for page in pages}) == len(keys)
    assert [not page.any() for page in pages] == [key == 0 for key in keys]


@pytest.mark.parametrize(("pattern", "differing"), [("early", [0]), ("late", [511]), ("random", list(range(512)))])
def test_a_pattern_says_which_words_of_two_pages_differ(pattern: Pattern, differing: list[int]) -> None:
    one, other = render(np.array([1, 2], dtype=np.uint64), pattern)

    assert np.flatnonzero(one != other).tolist() == differing


def test_a_workload_names_only_guests_it_has() -> None:
    with pytest.raises(ValueError, match=r"no guest is named .*typo"):
        Workload([guest("one", [1])], {}, MS, [Madvise(0, "typo", 0, 1, "DONTNEED")])


def test_no_two_rates_of_a_workload_write_equal_contents() -> None:
    rates = [Rate("one", np.arange(1), 1.0, seed=5), Rate("one", np.arange(1), 2.0, seed=5)]

    with pytest.raises(ValueError, match="two rates with one seed"):
        Workload([guest("one", [1])], {}, MS, rates)


@pytest.mark.kernel
@pytest.mark.parametrize("limit", [2, 3, 256])
@pytest.mark.parametrize("copies", [1, 2, 10, 257, 513])
def test_equal_pages_merge_as_the_kernel_selftest_says(copies: int, limit: int) -> None:
    """Source: Linux tools/testing/selftests/mm/ksm_tests.c, assert_ksm_pages_count."""
    settings = {"pages_to_scan": copies, "max_page_sharing": limit}

    recording = record(Workload([guest("one", [7] * copies)], settings, 5_000 * MS, until_scans=2))

    full, rest = divmod(copies, limit)
    shared = full + (rest > 1)
    assert at_scan(recording, 2) == counts(shared, copies - shared - (rest == 1), rest == 1, 0)


@pytest.mark.kernel
def test_zero_pages_go_to_the_zero_page_when_the_kernel_is_told_so() -> None:
    recording = record(Workload([guest("one", [0] * 9 + [5])], {"use_zero_pages": 1}, 5_000 * MS, until_scans=3))

    assert at_scan(recording, 3) == counts(0, 0, 1, 0)
    assert recording.scans["ksm_zero_pages"].tolist() == [0, 9, 9]


@pytest.mark.kernel
def test_every_one_of_many_short_scans_is_seen_and_proven() -> None:
    settings = {"sleep_millisecs": 10, "smart_scan": 0}

    # Where the recorder itself waits for a core it cannot prove what it read: it says so, and the run is made again.
    for _ in range(ATTEMPTS):
        recording = record(Workload([guest("one", [1, 2, 3])], settings, 5_000 * MS, until_scans=40))
        if recording.scans["proven"].all() and len(recording.scans) == 40:
            break
    else:
        pytest.skip(f"this machine is too busy: {ATTEMPTS} runs each had a scan that was read too late")
    assert recording.scans["full_scans"].tolist() == list(range(1, 41))
    assert recording.scans["pages_scanned"].tolist() == list(range(3, 123, 3))


@pytest.mark.kernel
def test_a_run_starts_with_counters_at_0_whatever_ran_before() -> None:
    workload = Workload([guest("one", [7, 7])], {}, 200 * MS, sample_every_ns=50 * MS)
    record(workload)

    samples = record(workload).samples

    assert len(samples) == 5
    counters = samples.drop(columns=["time_s", "pages_to_scan", "sleep_millisecs", "stolen_ns"])
    assert not counters.iloc[0].any()
    assert samples.iloc[-1]["pages_sharing"] == 1


@pytest.mark.kernel
def test_guests_and_settings_change_when_the_workload_says() -> None:
    ones = np.ones(4, np.uint64)
    workload = Workload(
        guests=[guest("early", ones), guest("late", ones, start_ns=300 * MS), guest("brief", ones, stop_ns=600 * MS)],
        actions=[
            Write(900 * MS, "early", np.arange(2), np.array([8, 9], np.uint64)),
            Madvise(1_200 * MS, "late", 0, 3, "DONTNEED"),
            Setting(1_500 * MS, "pages_to_scan", 5),
        ],
        ksm={"smart_scan": 0},
        duration_ns=1_700 * MS,
        sample_every_ns=100 * MS,
    )

    recording = record(workload)

    # In order, at whatever moment: a busy machine looks at the guests late.
    items = recording.samples[["pages_shared", "pages_sharing", "pages_unshared", "pages_volatile"]].sum(axis=1)
    seen = iter(items)
    assert all(each in seen for each in [8, 12, 8, 5])
    assert recording.samples["cow_ksm"].unique().tolist() in ([0, 2], [0, 1, 2])
    assert recording.samples["pages_to_scan"].unique().tolist() == [100, 5]
    assert (recording.deeds["began_s"] >= recording.deeds["planned_s"]).all()
    assert recording.deeds[["guest", "deed"]].to_numpy().tolist() == [
        ["early", "write"],
        ["late", "madvise"],
        ["late", "madvise"],
    ]


@pytest.mark.kernel
def test_a_forked_guest_joins_its_parents_merged_pages_at_its_first_visit() -> None:
    child = Guest("child", start_ns=200 * MS, fork_of="parent")
    grandchild = Guest("grandchild", start_ns=400 * MS, fork_of="child")

    recording = record(Workload([guest("parent", [7] * 10), child, grandchild], {}, 700 * MS))

    assert set(recording.scans["pages_sharing"]) == {0, 9, 19, 29}
    assert recording.scans["pages_shared"].iloc[-1] == 1


@pytest.mark.kernel
def test_a_guest_that_the_run_did_not_live_to_see_is_no_failure() -> None:
    unborn = Guest("unborn", start_ns=60_000 * MS, fork_of="parent")

    recording = record(Workload([guest("parent", [7, 8]), unborn], {}, 90_000 * MS, until_scans=2))

    assert at_scan(recording, 2) == counts(0, 0, 2, 0)


@pytest.mark.kernel
def test_unmerged_pages_shared_by_fork_meet_themselves_and_stay_volatile() -> None:
    guests = [guest("parent", np.arange(1, 11)), Guest("child", fork_of="parent")]

    recording = record(Workload(guests, {}, 5_000 * MS, until_scans=2))

    assert at_scan(recording, 2) == counts(0, 0, 10, 10)


@pytest.mark.kernel
@pytest.mark.parametrize("pattern", PATTERNS)
def test_guests_read_back_what_they_wrote_after_merging_and_breaking(pattern: Pattern) -> None:
    pages = np.arange(300)
    keys = (pages % 3).astype(np.uint64)
    with exclusive() as ksm, contextlib.closing(GuestServer(ksm.token)) as server:
        ksm.set(pages_to_scan=1000, sleep_millisecs=1)
        one = server.spawn("one", len(pages), pattern)
        one.write(pages, keys)
        one.madvise(0, len(pages), "MERGEABLE")
        other = server.fork(one, "other")
        ksm.set(run=1)
        wait_for_scans(4, ksm)
        merged = ksm.counters()
        other.write(pages[:50], keys[:50] + np.uint64(40))

        assert merged["pages_sharing"] > len(pages)
        assert one.digests(pages).tolist() == digests(render(keys, pattern)).tolist()
        keys[:50] += np.uint64(40)
        assert other.digests(pages).tolist() == digests(render(keys, pattern)).tolist()
        assert ksm.counters()["cow_ksm"] - merged["cow_ksm"] == 50


def wait_for_scans(number: int, ksm: Ksm) -> None:
    """Wait until ksmd has ended this many full scans."""
    deadline = time.monotonic() + 10
    while ksm.read("full_scans") < number:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.kernel
def test_a_rate_rewrites_its_pages_with_fresh_contents_and_no_others() -> None:
    pages = np.arange(200)
    with exclusive() as ksm, contextlib.closing(GuestServer(ksm.token)) as server:
        one = server.spawn("one", len(pages), "random")
        one.write(pages, np.full(len(pages), 7, np.uint64))
        before = one.digests(pages)
        one.plan([Act(0, "rate", (pages[:100], 50.0, 1, FRESH))])
        one.begin(time.monotonic_ns())
        time.sleep(0.5)
        after = one.digests(pages)

    assert (after[100:] == before[100:]).all()
    assert (after[:100] != before[:100]).all()
    assert len(set(after[:100].tolist())) == 100


@pytest.mark.kernel
def test_a_rate_leaves_as_many_pages_alone_as_chance_says() -> None:
    """Of pages rewritten r times a second, exp(-r t) are untouched after t seconds."""
    pages = np.arange(4000)
    with exclusive() as ksm, contextlib.closing(GuestServer(ksm.token)) as server:
        one = server.spawn("one", len(pages), "early")
        one.write(pages, np.full(len(pages), 7, np.uint64))
        before = one.digests(pages)
        one.plan([Act(0, "rate", (pages, 1.0, 1, FRESH))])
        began = time.monotonic()
        one.begin(time.monotonic_ns())
        time.sleep(1)
        elapsed = time.monotonic() - began
        after = one.digests(pages)

    assert np.mean(after == before) == pytest.approx(np.exp(-elapsed), abs=0.04)


@pytest.mark.kernel
def test_a_rate_may_leave_some_contents_only_and_pauses_at_level_0() -> None:
    pages = np.arange(50)
    choices = np.array([8, 9], np.uint64)
    with exclusive() as ksm, contextlib.closing(GuestServer(ksm.token)) as server:
        one = server.spawn("one", len(pages), "random")
        one.plan([Act(0, "rate", (pages, 50.0, 1, choices)), Act(300 * MS, "level", (0.0,))])
        one.begin(time.monotonic_ns())
        time.sleep(0.5)
        rested = one.digests(pages)
        time.sleep(0.1)

        assert set(rested.tolist()) == set(digests(render(choices, "random")).tolist())
        assert one.digests(pages).tolist() == rested.tolist()


@pytest.mark.kernel
def test_settings_are_put_back_after_a_run_and_after_a_failure(odd_knobs: dict[str, str]) -> None:
    record(Workload([guest("one", [1])], {"pages_to_scan": 5, "max_page_sharing": 2}, 5_000 * MS, until_scans=1))
    assert knobs() == odd_knobs

    with pytest.raises(RuntimeError), exclusive() as ksm:
        ksm.set(run=1, use_zero_pages=1)
        raise RuntimeError

    assert knobs() == odd_knobs
    assert not STATE.exists()
    assert not marked_processes()


@pytest.mark.kernel
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_settings_are_put_back_when_the_lab_is_told_to_end(odd_knobs: dict[str, str], number: signal.Signals) -> None:
    with started(HOLD_KSM) as (process, _):
        assert knobs() != odd_knobs
        process.send_signal(number)
        process.wait(20)

    assert knobs() == odd_knobs
    assert not STATE.exists()
    assert not marked_processes()


@pytest.mark.kernel
@pytest.mark.parametrize("healer", ["restore", "exclusive"])
def test_a_killed_lab_is_healed_and_its_guests_ended(odd_knobs: dict[str, str], healer: str) -> None:
    """The guest is stopped, so that it cannot notice by itself that the lab is gone."""
    with started(HOLD_KSM) as (process, orphan):
        os.kill(int(orphan), signal.SIGSTOP)
        process.kill()
        process.wait()
        assert knobs() != odd_knobs
        assert orphan in marked_processes()

    if healer == "restore":
        assert restore()
    else:
        with exclusive():
            pass

    assert knobs() == odd_knobs
    assert not restore()
    assert not marked_processes()


@pytest.mark.kernel
def test_two_labs_never_run_at_once() -> None:
    with started(HOLD_KSM), pytest.raises(MachineError, match="another lab is running") as refusal, exclusive():
        pass

    assert refusal.value.exit_code == 4
    assert restore()


@pytest.mark.kernel
def test_the_lab_refuses_to_share_ksm_with_another_process() -> None:
    with started(USE_KSM) as (process, _), pytest.raises(MachineError, match=f"in use .*{process.pid}"), exclusive():
        pass

    assert not STATE.exists()


@pytest.mark.kernel
def test_the_lab_refuses_guests_that_do_not_fit_in_memory() -> None:
    with pytest.raises(MachineError, match="use fewer or smaller guests"), exclusive(needed_bytes=1 << 50):
        pass


@pytest.mark.kernel
def test_a_knob_the_kernel_refuses_is_named() -> None:
    with exclusive() as ksm, pytest.raises(MachineError, match="refuses max_page_sharing = 1"):
        ksm.set(max_page_sharing=1)


@pytest.mark.kernel
def test_a_failure_inside_a_guest_reaches_the_lab() -> None:
    with exclusive() as ksm, contextlib.closing(GuestServer(ksm.token)) as server:
        one = server.spawn("one", 4, "early")

        with pytest.raises(MachineError, match=r"guest one failed(.|\n)*IndexError"):
            one.write(np.array([4]), np.array([1], np.uint64))


def marked_processes() -> list[str]:
    """Processes that carry the lab's mark."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if f"{TOKEN_VARIABLE}=".encode() in (entry / "environ").read_bytes():
                found.append(entry.name)
    return found
