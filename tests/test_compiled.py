"""Calls of compiled loops that skip the search for types."""

from sim.memory.compiled import quick
from sim.reclaim.pressure import is_full


def test_a_quick_call_gives_what_the_loop_gives_every_time() -> None:
    fast = quick(is_full)
    calls = [(5, False, 4, 3), (3, True, 4, 3), (4, True, 5, 3), (1, False, 4, 3)]

    assert [fast(*call) for call in calls] == [is_full(*call) for call in calls] == [True, False, True, False]
