"""Who comes when: rates, days, batches and storms as stated, in order of time, and never all at once in memory."""

from __future__ import annotations

import tracemalloc
from collections import Counter, deque
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_fleet import scenario

from sim.datacenter.arrivals import newcomers, read_traces
from sim.datacenter.control import ControlPlane
from sim.datacenter.messages import NEVER, Newcomer
from sim.scenario import parse
from sim.units import DAY, HOUR, MINUTE, SECOND


def arrivals(*sources: dict[str, Any], seed: int = 1, duration: str = "10d", **vm: Any) -> Iterator[Newcomer]:
    """Guests of these sources, of a kind that is called web."""
    asked = scenario(
        duration=duration,
        seed=seed,
        sample_every="1h",
        vms=[{"name": "web", "memory": "1GiB", **vm}],
        datacenter={"arrivals": [{"kind": "web", **source} for source in sources]},
    )
    assert asked.datacenter
    return newcomers(asked.datacenter, asked.vms, asked.seed, asked.duration, read_traces(asked.datacenter))


def times(guests: Iterator[Newcomer]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([guest.time for guest in guests])


def test_poisson_arrivals_come_at_their_rate_with_exponential_gaps() -> None:
    found = times(arrivals({"rate": "60/h"}))

    expected = 60 * 24 * 10
    assert abs(len(found) - expected) < 4 * expected**0.5
    gaps = np.diff(found) / MINUTE
    assert abs(gaps.mean() - 1) < 4 / len(gaps) ** 0.5
    assert abs(np.mean(gaps > 2) - np.exp(-2)) < 4 * (np.exp(-2) / len(gaps)) ** 0.5


def test_the_day_shapes_arrivals_and_an_hour_of_zero_has_none() -> None:
    curve = [0.0, 1.0, 3.0, 0.0]

    found = times(arrivals({"rate": "100/h", "day": curve}))
    quarter = found % DAY // (DAY // 4)

    for place, factor in enumerate(curve):
        expected = 100 * factor * 6 * 10
        assert abs(np.sum(quarter == place) - expected) <= 4 * expected**0.5


def test_a_batch_comes_at_one_moment_again_and_again() -> None:
    found = Counter(guest.time for guest in arrivals({"batch": 5000, "at": "1h", "every": "4d"}))

    assert found == {HOUR: 5000, HOUR + 4 * DAY: 5000, HOUR + 8 * DAY: 5000}


def test_a_storm_fills_its_window_every_morning() -> None:
    found = times(arrivals({"boot_storm": 300, "at": "8h", "within": "30min", "every": "1d"}, duration="3d"))

    assert len(found) == 900
    clock = found % DAY
    assert clock.min() >= 8 * HOUR and clock.max() < 8 * HOUR + 30 * MINUTE
    assert abs(clock.mean() / HOUR - 8.25) < 4 * 0.5 / 12**0.5 / 900**0.5


@pytest.mark.parametrize(
    ("lifetime", "mean", "deviation"),
    [
        ({"fixed": "2h"}, 2.0, 0.0),
        ({"exponential": "2h"}, 2.0, 2.0),
        # e^(1/2) = 1.6487 times the median, and a deviation of sqrt(e - 1) = 1.3108 means.
        ({"lognormal": "1h", "sigma": 1.0}, 1.6487, 1.6487 * 1.3108),
    ],
    ids=["fixed", "exponential", "lognormal"],
)
def test_lifetimes_have_the_stated_mean(lifetime: dict[str, Any], mean: float, deviation: float) -> None:
    lives = np.array([guest.lifetime for guest in arrivals({"rate": "100/h", "lifetime": lifetime})]) / HOUR

    assert abs(lives.mean() - mean) <= 4 * deviation / len(lives) ** 0.5 + 1e-9


def test_no_guest_outlives_what_its_kind_allows() -> None:
    source = {"rate": "10/h", "lifetime": {"exponential": "1d"}}
    found = list(arrivals(source, lifetime="5h", stop="2d"))

    assert max(guest.lifetime for guest in found) == 5 * HOUR
    assert all(guest.time + guest.lifetime <= 2 * DAY for guest in found)


def test_kinds_without_a_source_come_as_their_entry_says() -> None:
    asked = scenario(vms=[{"name": "web", "memory": "1GiB", "count": 3, "start": "1h", "every": "10min"}])
    assert asked.datacenter
    found = list(newcomers(asked.datacenter, asked.vms, 1, asked.duration, {}))

    first = [HOUR, HOUR + 10 * MINUTE, HOUR + 20 * MINUTE]
    assert found == [Newcomer(f"web-{n}", "web", time, NEVER) for n, time in enumerate(first)]


def test_sources_are_merged_in_order_and_numbered_as_they_come() -> None:
    found = list(arrivals({"rate": "20/h"}, {"rate": "20/h"}, {"batch": 100, "at": "5h"}))

    assert all(a.time <= b.time for a, b in pairwise(found))
    assert [guest.name for guest in found] == [f"web-{number}" for number in range(len(found))]
    alone = times(arrivals({"rate": "20/h"}))
    assert set(alone) < {guest.time for guest in found}, "another source does not change this one's moments"


def test_another_seed_gives_other_moments_and_the_same_seed_the_same() -> None:
    source = {"rate": "20/h", "lifetime": {"exponential": "1h"}}
    assert list(arrivals(source)) == list(arrivals(source))
    assert list(arrivals(source)) != list(arrivals(source, seed=2))


def test_arrivals_are_streamed_and_not_held() -> None:
    source = {"rate": "1000/s", "lifetime": {"exponential": "1h"}}

    def peak(guests: int) -> int:
        tracemalloc.start()
        (last,) = deque(islice(arrivals(source), guests), maxlen=1)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert abs(last.time / SECOND - guests / 1000) < 5 * guests**0.5 / 1000
        return most

    peak(1000)
    assert peak(80_000) < 1.2 * peak(10_000)


def test_a_trace_is_a_source_like_any_other_and_says_which_rows_it_left_out(tmp_path: Path) -> None:
    header = (
        "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time"
    )
    rows = [f"pod-{n},2000,1024,0,0,,LS,Running,{60 * n},{60 * n + 600},{60 * n}" for n in range(20)]
    rows[7] = "pod-7,2000,oops,0,0,,LS,Running,420,1020,420"
    (tmp_path / "pods.csv").write_text("\n".join([header, *rows]) + "\n")
    sources = [
        {"path": "pods.csv", "format": "openb", "kinds": ["web", "db"]},
        {"kind": "web", "batch": 2, "at": "5min"},
    ]
    asked = parse(
        {
            "name": "fleet", "duration": "15min", "hosts": [{"memory": "64GiB"}], "datacenter": {"arrivals": sources},
            "vms": [{"name": "web", "memory": "4GiB"}, {"name": "db", "memory": "4GiB"}],
        },
        tmp_path,
    )  # fmt: skip
    plane = ControlPlane(asked)
    for now in range(0, asked.duration, plane.rules.epoch):
        plane.decide(now)

    names = {placed.guest.name for placed in plane.guests.values()}
    assert plane.ledger.arrivals == 14 + 2
    assert {"openb-0", "openb-13", "web-0", "web-1"} < names and "openb-14" not in names
    (row,) = (event for event in plane.finish().events if event["kind"] == "trace-rows")
    assert "1 of 20 rows left out" in str(row["detail"])
