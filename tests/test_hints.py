"""Hints of disk reads for ksmd (XLH): what is hinted, in what order hints are followed, and what they find."""

from __future__ import annotations

import machine
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_host import at, end, guest, part, run

from sim.errors import UserError
from sim.memory import pages as memory
from sim.sharing import ksm_pass as ksmd

SLOW = {"pages_to_scan": 10, "smart_scan": 0}
"""417 pages a second: a full scan of the guests below takes longer than the runs."""


def late_reader(**files):
    """Two guests with the same files and much that is their own, the second of which starts at 10 s."""
    parts = (part("files", 100, pool="os", file=True, **files), part("own", 20_000))
    return guest("g", *parts, pages=20_100, count=2, every="10s")


def sharing(*vms, time_s=20, **ksm):
    """Pages saved at a time."""
    result = run(*vms, duration="30s", kernel="3.4", ksm=SLOW | {"smart_scan": None} | ksm)
    return int(at(result, time_s)["pages_sharing"])


def test_pages_that_a_guest_reads_when_it_starts_are_merged_long_before_the_scan_comes_to_them():
    assert sharing(late_reader(), hints={}) == 100
    assert sharing(late_reader()) == 0


def test_pages_that_are_not_of_files_are_not_hinted():
    other = guest("g", part("heap", 100, pool="os"), part("own", 20_000), pages=20_100, count=2, every="10s")

    assert sharing(other, hints={}) == 0


def test_only_the_last_hints_are_kept():
    assert sharing(late_reader(), hints={"entries": 30}) == 30


def test_hints_take_no_more_than_their_share_of_a_batch_and_add_nothing_to_it():
    """Half of 10 pages in a batch, 41.7 batches a second: 100 hints take half a second."""
    vms = late_reader()
    hinted = run(vms, duration="12s", sample_every="100ms", kernel="3.4", ksm={"pages_to_scan": 10, "hints": {}})
    plain = run(vms, duration="12s", sample_every="100ms", kernel="3.4", ksm={"pages_to_scan": 10})

    reached = hinted.samples[hinted.samples["pages_sharing"] == 100]["time_s"].iloc[0]
    assert reached == pytest.approx(10 + 100 / (5 / 0.020), abs=0.2)
    assert end(hinted)["pages_scanned"] == pytest.approx(end(plain)["pages_scanned"], rel=0.01)


def test_a_page_that_a_guest_reads_at_random_is_hinted_at_that_time():
    """Each page of the cache is read anew once in 5 s, into a page cache of 50 files that every guest reads."""
    cache = part("cache", 200, pool="os", file=True, writes={"rate": "0.2/s", "leaves": "os"})
    vms = guest("g", cache, part("own", 20_000), pages=20_200, count=2)

    assert sharing(vms, hints={"share": "90%"}) > 4 * max(sharing(vms), 1)


def test_guests_find_equal_files_in_a_burst_and_other_ones_in_the_next():
    burst = {"part": "cache", "at": "5s", "every": "10s", "leaves": "files"}
    vms = guest("g", part("cache", 300, file=True), pages=300, count=3, bursts=[burst])
    result = run(vms, duration="20s", ksm={"pages_to_scan": 1000})

    assert [int(at(result, time)[name]) for time in (4, 14) for name in ("pages_shared", "pages_sharing")] == [
        0, 0, 300, 600,
    ]  # fmt: skip
    assert end(result)["cow_ksm"] == 900
    assert end(result)["pages_sharing"] == 600


def test_a_share_of_the_files_is_the_same_in_every_guest():
    burst = {"part": "cache", "at": "5s", "share": "50%", "leaves": "files"}
    vms = guest("g", part("cache", 300, file=True), pages=300, count=2, bursts=[burst])

    assert end(run(vms, duration="10s", ksm={"pages_to_scan": 1000}))["pages_sharing"] == 150


def test_a_burst_of_files_needs_a_part_with_files():
    vms = guest("g", part("heap", 10), pages=10, bursts=[{"part": "heap", "leaves": "files"}])

    with pytest.raises(UserError, match=r"part heap holds no files; write file: true in that part"):
        run(vms, duration="1s")


@given(
    contents=st.lists(st.integers(0, 5), min_size=20, max_size=20),
    hints=st.lists(st.integers(0, 19), max_size=60),
    writes=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 5)), max_size=20),
    batch=st.integers(1, 30),
)
@settings(max_examples=60, deadline=None)
def test_whatever_is_hinted_guests_read_what_they_wrote_and_counters_add_up(contents, hints, writes, batch):
    one = machine.Machine(pages=4 * memory.BLOCK, smart_scan=False)
    one.m = one.m._replace(from_disk=np.zeros(16, np.int32))
    one.k.n[[ksmd.HINTS_TO_SCAN, ksmd.MISROUTES]] = 500_000, 0
    guests = [one.start(contents[:10]), one.start(contents[10:])]
    expected = list(contents)
    for step in range(max(len(hints), len(writes))):
        if step < len(hints):
            which, page = divmod(hints[step], 10)
            memory.tell_read(one.m, one.first(guests[which]) + page, one.now)
        if step < len(writes):
            place, content = writes[step]
            one.write(guests[place // 10], place % 10, content)
            expected[place] = content
        one.batch(batch)
    assert one.read(guests[0]) + one.read(guests[1]) == expected

    last = one.scan(3)[-1]
    assert one.m.counts[memory.DISK_KEPT] == 0
    assert last["pages_shared"] + last["pages_sharing"] + last["pages_unshared"] == 20
    assert last["frames"] == 20 - last["pages_sharing"]
    assert last["frames"] == len(set(expected))
