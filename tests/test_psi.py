"""Pressure stall information: averages as the kernel makes them, and who waits at the same time."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machine import empty_memory, no_pressure

from sim.memory import pages as memory
from sim.reclaim import pressure
from sim.reclaim.psi import EVERY, Averages
from sim.units import MILLISECOND, SECOND

WINDOWS = 10, 60, 300


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=300))
def test_the_averages_are_those_of_a_float_reference_but_for_the_kernels_rounding(shares):
    averages, total, expected = Averages(), 0, [0.0] * 3
    for share in shares:
        total += round(share * EVERY)
        averages.update(total)
        decays = [math.exp(-EVERY / SECOND / window) for window in WINDOWS]
        expected = [old * decay + 100 * share * (1 - decay) for old, decay in zip(expected, decays, strict=True)]

    # The decays have 11 bits, which is 3.4 % of that of the longest window.
    assert [each / 100 for each in averages.hundredths()] == pytest.approx(expected, abs=2.0, rel=0.04)


def test_a_constant_share_is_what_the_averages_come_to():
    averages = Averages()
    for step in range(1, 3000):
        averages.update(step * EVERY // 4)

    assert averages.hundredths() == (2500, 2500, 2500)


def test_no_average_leaves_the_range_of_its_shares():
    averages = Averages()
    averages.update(10 * EVERY)  # more than there was time for
    for step in range(11, 2000):
        averages.update(step * EVERY)

    assert averages.hundredths() == (10000, 10000, 10000)


class Waiting:
    """Guests of which each runs for a share of its time, and waits when told to."""

    def __init__(self, *loads, vcpus=1):
        self.m = empty_memory(pages=len(loads), guests=len(loads), frames=100)
        self.m.guest[:, memory.VCPUS] = vcpus
        self.r = no_pressure(len(loads))
        self.r.load[:] = loads

    def wait(self, guest, at, length):
        """The guest waits from a time on for so many ms."""
        self.r.n[[pressure.WAIT, pressure.PRESSURE_NS]] = length * MILLISECOND
        pressure.stall(self.m, self.r, guest, at * MILLISECOND)

    def until(self, now):
        """Some and full up to a time, in ms."""
        some, full = pressure.pressure_since(self.m, self.r, now * MILLISECOND)
        counts = self.m.counts
        return (counts[memory.PSI_SOME] + some) / 1e6, (counts[memory.PSI_FULL] + full) / 1e6


def test_a_guest_that_waits_alone_is_some_and_full():
    host = Waiting(1.0)
    host.wait(0, 10, 5)

    assert [host.until(now) for now in (10, 12, 15, 100)] == [(0, 0), (2, 2), (5, 5), (5, 5)]


def test_while_another_runs_nothing_is_full():
    host = Waiting(1.0, 1.0)
    host.wait(0, 10, 5)

    assert host.until(20) == (5, 0)


def test_what_is_full_is_when_all_wait_at_once_whoever_waited_first():
    host = Waiting(1.0, 1.0)
    host.wait(0, 10, 6)
    host.wait(1, 12, 10)
    host.wait(0, 19, 1)

    # Somebody waits from 10 to 22, both from 12 to 16 and from 19 to 20.
    assert host.until(30) == (12, 5)


@pytest.mark.parametrize(("load", "full"), [(0.0, 10), (0.25, 7.5), (1.0, 0)])
def test_others_run_for_their_share_of_the_time(load, full):
    host = Waiting(1.0, load)
    host.wait(0, 0, 10)

    assert host.until(20) == (10, full)


@pytest.mark.parametrize(("load", "vcpus", "full"), [(1.0, 1, 10), (1.0, 4, 0), (0.75, 2, 5), (0.0, 4, 10)])
def test_other_processors_of_a_guest_go_on_while_one_waits(load, vcpus, full):
    host = Waiting(load, vcpus=vcpus)
    host.wait(0, 0, 10)

    assert host.until(20) == (10, full)


waits = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 40)), min_size=1, max_size=20)


@given(waits, st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3))
def test_some_and_full_are_what_a_count_millisecond_by_millisecond_gives(steps, loads):
    host, at, ends = Waiting(*loads), 0, []
    for guest, later, length in steps:
        at += later
        host.wait(guest, at, length)
        ends.append((guest, at, at + length))
        some, full = host.until(at)
        assert full <= some <= at
    waiting = [{guest for guest, start, end in ends if start <= time < end} for time in range(at + 50)]
    some = sum(bool(each) for each in waiting)
    full = sum(bool(each) and all(guest in each or not loads[guest] for guest in range(3)) for each in waiting)

    assert host.until(at + 50) == (some, full)
