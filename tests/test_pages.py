import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machine import Machine, empty_memory, no_pressure

from sim.memory import pages as memory
from sim.memory.pages import BLOCK, FRESH, NEVER, NO_FRAME, OK
from sim.reclaim import pressure

SECOND = 1_000_000_000
WRITTEN = 1
"""The class of random writes that tests give their pages."""


def one_guest(contents, *, frames=1 << 40, due=64, guests=4):
    """Memory with one guest of these contents, and room for copies of it."""
    blocks = -(-len(contents) // BLOCK)
    m = empty_memory(pages=guests * blocks * BLOCK, guests=guests, frames=frames, due=due)
    for guest in range(guests):
        m.guest[guest, [memory.FIRST, memory.PAGES]] = guest * blocks * BLOCK, len(contents)
        m.guest[guest, memory.KEY] = (guest + 1) << 40
        m.block[guest * blocks : (guest + 1) * blocks, memory.GUEST] = guest
    memory.fill_pages(m, 0, np.array(contents, np.int32))
    return m


def read(m, page):
    """What a read of a page returns, None where it was never touched."""
    place = m.place[page]
    if not place & memory.PRESENT:
        return None
    if place & memory.ZERO:
        return 0
    return int(m.frame[m.held[page], memory.CONTENT] if place & memory.SHARED else m.held[page])


def frames_used(m):
    """Frames that pages have."""
    return int(m.counts[memory.PRIVATE] + m.counts[memory.FRAMES])


# --- writes, copies, forks --------------------------------------------------------------------------------------------

PAGES = 6
actions = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 3), st.integers(0, PAGES - 1), st.integers(0, 9)),
        st.tuples(st.just("drop"), st.integers(0, 3), st.integers(0, PAGES - 1)),
        st.tuples(st.just("fork"), st.integers(0, 2)),
    ),
    max_size=40,
)


images = st.lists(st.one_of(st.just(NEVER), st.integers(0, 9)), min_size=PAGES, max_size=PAGES)


@given(images, st.integers(6, 30), actions)
def test_every_page_reads_as_last_written_and_no_frame_is_used_beyond_the_limit(contents, frames, actions):
    m = one_guest(contents, frames=frames)
    expected = {(0, page): content for page, content in enumerate(contents) if content != NEVER}
    forked = 0
    for name, number, *rest in actions:
        guest = min(number, forked)
        if name == "fork" and forked < 3:
            forked += 1
            memory.fork_pages(m, guest * BLOCK, forked * BLOCK, PAGES, 0)
            expected |= {(forked, page): expected[guest, page] for page in range(PAGES) if (guest, page) in expected}
        elif name == "drop":
            memory.drop_page(m, guest * BLOCK + rest[0])
            expected.pop((guest, rest[0]), None)
        elif name == "write" and memory.write_page(m, guest * BLOCK + rest[0], rest[1]) == OK:
            expected[guest, rest[0]] = rest[1]

        assert expected == {
            (each, page): read(m, each * BLOCK + page)
            for each, page in itertools.product(range(4), range(PAGES))
            if read(m, each * BLOCK + page) is not None
        }
        shared = m.place & memory.SHARED != 0
        present = m.place & memory.PRESENT != 0
        assert frames_used(m) == np.count_nonzero(present & ~shared) + len(set(m.held[shared].tolist())) <= frames
        assert m.counts[memory.TOUCHED] == len(expected)
        assert m.counts[memory.SHARERS] == np.count_nonzero(shared)


def test_a_write_that_finds_no_frame_changes_nothing():
    m = one_guest([1, 2, NEVER], frames=2)
    memory.fork_pages(m, 0, BLOCK, 3, 0)
    before = [array.copy() for array in m]

    assert memory.write_page(m, 2, 9) == NO_FRAME
    assert memory.write_page(m, 0, 9) == NO_FRAME
    assert all(np.array_equal(old, new) for old, new in zip(before, m, strict=True))


def store(m, pages, contents):
    """Let the guest write; return how many pages it could."""
    return pressure.store_pages(m, no_pressure(len(m.guest)), 0, pages, contents, 0, True, 0)


def test_metadata_takes_whole_frames_from_the_guests():
    m = one_guest([NEVER] * 3, frames=3)
    m.counts[memory.METADATA] = memory.PAGE_BYTES + 1

    assert [memory.write_page(m, page, 5) for page in (0, 1)] == [OK, NO_FRAME]


def test_filling_and_writing_stop_where_the_frames_end_and_say_how_far_they_came():
    m = one_guest([NEVER] * 10, frames=4)

    assert memory.fill_pages(m, 0, np.array([1, NEVER, 2, 3], np.int32)) == 4
    assert store(m, np.array([0, 5, 6]), np.array([7, 8, 9], np.int32)) == 2
    assert [read(m, page) for page in (0, 5, 6)] == [7, 8, None]


def test_contents_never_seen_before_are_all_different_and_of_one_page_alone():
    m = one_guest([NEVER] * 300)
    store(m, np.arange(300), np.full(300, FRESH, np.int32))
    contents = m.held[:300]

    assert len(set(contents.tolist())) == 300
    assert contents.min() > NEVER
    assert contents.max() < FRESH


def test_the_last_page_that_maps_a_forked_frame_is_written_in_place():
    m = one_guest([5])
    memory.fork_pages(m, 0, BLOCK, 1, 0)
    memory.write_page(m, 0, 6)
    copied = m.counts[memory.COW_FORK]
    memory.write_page(m, BLOCK, 7)

    assert (copied, m.counts[memory.COW_FORK]) == (1, 1)
    assert (read(m, 0), read(m, BLOCK)) == (6, 7)
    assert 2 == m.counts[memory.PRIVATE] == frames_used(m)


@pytest.mark.parametrize(("reuse", "copies"), [(0, 2), (1, 1)])
def test_the_last_page_that_maps_a_ksm_page_is_copied_except_in_5_1_to_5_8(reuse, copies):
    host = Machine()
    host.m.counts[memory.REUSE_LAST_MAPPER] = reuse
    guest = host.start([5, 5])
    host.scan(2)
    host.write(guest, 0, 6)
    host.write(guest, 1, 7)

    assert copies == host.counters()["cow_ksm"] == host.m.guest[guest, memory.COPIES]


def test_entries_for_shared_frames_are_used_again():
    m = one_guest([5])
    for _ in range(100):
        memory.fork_pages(m, 0, BLOCK, 1, 0)
        memory.write_page(m, BLOCK, 6)
        memory.drop_page(m, BLOCK)
        memory.write_page(m, 0, 5)

    assert m.counts[memory.FRAME_HIGH] == 1


# --- random writes ----------------------------------------------------------------------------------------------------


def written_at_random(pages, *, rate, lowest=0, span=0, due=0):
    """A guest whose pages hold 1000 and are written so often a second each."""
    m = one_guest([1000] * pages, due=due or 64)
    m.accesses[:pages] = WRITTEN
    m.rates[WRITTEN, [memory.WRITES, memory.LOWEST, memory.SPAN]] = rate / SECOND, lowest, span
    return m


def looked_at(m, pages, now):
    """Contents of the first pages, brought up to *now* (ns)."""
    for block in range(-(-pages // BLOCK)):
        memory.look(m, block, now)
    return m.held[:pages].copy()


def within(expected, trials, got, sigmas=5):
    """Whether a count lies within some standard deviations of the expected share of *trials*."""
    return abs(got - expected * trials) <= sigmas * math.sqrt(trials * expected * (1 - expected))


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("rate", [0.05, 0.7, 3.0])
def test_a_page_is_written_by_a_time_with_the_probability_of_a_poisson_process(rate, steps):
    pages = 40 * BLOCK
    m = written_at_random(pages, rate=rate)
    for step in range(1, steps + 1):
        contents = looked_at(m, pages, step * SECOND // steps)

    assert within(1 - math.exp(-rate), pages, np.count_nonzero(contents != 1000))


def test_looking_twice_at_the_same_time_shows_the_same():
    m = written_at_random(BLOCK, rate=1.0)
    first = looked_at(m, BLOCK, SECOND)

    assert np.array_equal(first, looked_at(m, BLOCK, SECOND))
    assert not np.array_equal(first, looked_at(m, BLOCK, 2 * SECOND))


def test_writes_leave_contents_of_their_pool_evenly():
    pages, span = 40 * BLOCK, 4
    m = written_at_random(pages, rate=100.0, lowest=7, span=span)
    found = np.bincount(looked_at(m, pages, SECOND), minlength=7 + span)

    assert found[7:].sum() == pages
    assert all(within(1 / span, pages, count) for count in found[7:])


def test_a_guest_at_rest_writes_nothing_and_at_half_activity_half_as_often():
    pages = 40 * BLOCK
    resting, halved = (written_at_random(pages, rate=1.0) for _ in range(2))
    memory.change_activity(resting, 0, 0, 0.0)
    memory.change_activity(halved, 0, 0, 0.5)

    assert np.all(looked_at(resting, pages, 9 * SECOND) == 1000)
    assert within(1 - math.exp(-0.5), pages, np.count_nonzero(looked_at(halved, pages, SECOND) != 1000))


def test_blocks_without_random_writes_say_so():
    m = written_at_random(BLOCK, rate=1.0)

    assert memory.look(m, 0, SECOND)
    assert not memory.look(m, 1, SECOND)


# --- due writes -------------------------------------------------------------------------------------------------------


def forked(pages, rate, *, frames=1 << 40, span=0, lowest=0):
    """A guest written at random and its fork: all their pages are shared, so all their writes are due."""
    m = written_at_random(pages, rate=rate, lowest=lowest, span=span, due=4 * pages)
    m.counts[memory.LIMIT] = frames
    memory.fork_pages(m, 0, -(-pages // BLOCK) * BLOCK, pages, 0)
    return m


def due_times(m):
    """Host times (ns) of the due writes, sorted."""
    return np.sort(m.due[: m.counts[memory.DUE_COUNT], memory.TIME])


def test_shared_pages_are_written_after_exponential_times():
    pages, rate = 4 * BLOCK, 2.0
    times = due_times(forked(pages, rate)) / SECOND
    expected = 1 - np.exp(-rate * times)
    empirical = np.arange(1, len(times) + 1) / len(times)

    assert len(times) == 2 * pages
    assert np.abs(empirical - expected).max() < 1.95 / math.sqrt(len(times))  # Kolmogorov-Smirnov, p = 0.001


def test_due_writes_happen_in_their_order_and_at_their_time():
    m = forked(50, 1.0)
    times = due_times(m)
    written = []
    for moment in times.tolist():
        assert memory.next_due(m) == moment
        memory.write_due(m, moment - 1)
        before = m.counts[memory.PRIVATE]
        memory.write_due(m, moment)
        written.append(m.counts[memory.PRIVATE] - before)

    assert written == [1] * 100
    assert memory.next_due(m) == memory.END_OF_TIME
    assert not np.any(m.place & memory.DUE)
    assert np.all(m.held[:50] != 1000)


def test_a_page_is_due_only_once_and_not_at_all_when_its_rate_is_nothing():
    m = forked(5, 1.0)
    for page in range(5):
        memory.plan_write(m, page, 0)
    still = forked(5, 0.0)

    assert (m.counts[memory.DUE_COUNT], still.counts[memory.DUE_COUNT]) == (10, 0)


def test_a_due_write_comes_also_to_a_page_that_is_shared_no_more_but_not_to_one_that_is_gone():
    m = forked(1, 1.0)
    memory.write_page(m, 0, 77)
    memory.drop_page(m, BLOCK)
    memory.write_due(m, memory.END_OF_TIME - 1)

    assert read(m, 0) < 0
    assert read(m, BLOCK) is None
    assert m.counts[memory.DUE_COUNT] == 0


def test_a_due_write_that_finds_no_frame_stays_due():
    m = forked(1, 1.0, frames=1)
    moment = memory.next_due(m)
    starved = memory.write_due(m, moment)
    left = memory.next_due(m)
    m.counts[memory.LIMIT] = 2

    assert starved in (0, BLOCK)
    assert moment == left
    assert memory.write_due(m, moment) == -1
    assert frames_used(m) == 2


def test_a_change_of_activity_moves_due_writes_with_it():
    m = forked(50, 1.0)
    now = SECOND // 4
    memory.write_due(m, now)
    before = m.due[: m.counts[memory.DUE_COUNT]].copy()
    memory.change_activity(m, 0, now, 0.5)
    parents = {int(page): int(time) for time, _, page in before if page < BLOCK}
    childrens = {int(page): int(time) for time, _, page in before if page >= BLOCK}
    after = {int(page): int(time) for time, _, page in m.due[: m.counts[memory.DUE_COUNT]]}

    assert all(abs(after[page] - (now + 2 * (time - now))) <= 4 for page, time in parents.items())
    assert all(after[page] == time for page, time in childrens.items())
    assert memory.next_due(m) == min(after.values())


def test_a_guest_at_rest_has_no_due_write_until_it_wakes_up():
    m = forked(20, 1.0)
    for guest in (0, 1):
        memory.change_activity(m, guest, 0, 0.0)
    asleep = memory.next_due(m)
    for guest in (0, 1):
        memory.change_activity(m, guest, 5 * SECOND, 1.0)

    assert asleep == memory.END_OF_TIME
    assert 5 * SECOND < memory.next_due(m) < 10 * SECOND


def test_what_a_due_write_leaves_depends_on_its_guest_page_and_time_alone():
    """Changing the order of forks or what else is due must not change a guest's own writes."""
    alone, crowded = (forked(8, 1.0, lowest=1, span=1 << 20) for _ in range(2))
    memory.drop_pages(alone, BLOCK, 8)
    for m in (alone, crowded):
        memory.write_due(m, memory.END_OF_TIME - 1)
    written = crowded.held[:8]

    assert [read(crowded, page) for page in range(8)] == written.tolist()
    assert np.all((written >= 1) & (written <= 1 << 20))
    assert np.array_equal(written, alone.held[:8])
