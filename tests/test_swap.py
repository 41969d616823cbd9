"""What each way to swap takes: data sheets, price sets, and figures of the user's own."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from sim.cost import prices
from sim.cost.prices import DEFAULT, Prices
from sim.reclaim.swap import Swap


def swap(**settings: object) -> Swap:
    return Swap.model_validate({"size": "1GiB", **settings})


@pytest.fixture
def priced() -> Prices:
    return prices.load(DEFAULT)


def test_a_data_sheet_says_how_fast_a_device_is(priced: Prices) -> None:
    times = {device: swap(device=device).device_times(priced) for device in ("hdd", "ssd", "nvme")}

    assert [each.read_ns for each in times.values()] == [11_560_000, 110_000, 85_000]
    # Random reads per second that the data sheets promise.
    assert times["ssd"].channels / times["ssd"].read_ns * 1e9 == pytest.approx(72_000, rel=0.02)
    assert times["nvme"].channels / times["nvme"].read_ns * 1e9 == pytest.approx(490_000, rel=0.02)


def test_a_figure_of_the_users_replaces_that_of_the_device(priced: Prices) -> None:
    own = {"read_latency": "1ms", "write_latency": "0ns", "bandwidth": "4096kB", "channels": 3}

    times = swap(device="nvme", **own).device_times(priced)

    assert (times.read_ns, times.write_ns, times.ns_per_page, times.channels) == (1_000_000, 0, 1_000_000, 3)


def test_a_file_is_as_fast_as_the_disk_of_the_price_set(priced: Prices) -> None:
    times = swap(device="file").device_times(priced)

    assert priced.swap is not None
    assert times.read_ns == round(priced.swap.read.ns)
    # A fault with seven pages of readahead, from parts that were measured apart; the rest of the fault of the
    # calibration is reclaim, which a process at its limit does itself.
    predicted = times.read_ns + 7 * times.ns_per_page + 8 * times.cpu_in_ns
    assert predicted == pytest.approx(priced.swap.swap_in.ns, rel=0.1)


def test_zram_takes_processor_time_alone(priced: Prices) -> None:
    lzo, lz4, zstd = (swap(device="zram", algorithm=name).device_times(priced) for name in ("lzo-rle", "lz4", "zstd"))

    assert (lzo.read_ns, lzo.write_ns, lzo.ns_per_page) == (0, 0, 0)
    assert lzo == lz4 == zstd
    assert (lzo.cpu_in_ns, lzo.submit_ns) == (swap(device="nvme").device_times(priced).cpu_in_ns, 0)


def test_a_set_without_prices_of_swapping_has_those_of_the_default(priced: Prices) -> None:
    bare = priced.model_copy(update={"zram": {}, "swap": None, "paging": None})

    for device in ("file", "zram", "hdd"):
        assert swap(device=device).device_times(bare) == swap(device=device).device_times(priced)


def test_what_is_written_out_is_read_again() -> None:
    for settings in ({"device": "zram"}, {"device": "zram", "algorithm": "lz4"}, {"device": "ssd", "channels": 2}):
        assert swap(**swap(**settings).model_dump(mode="json")) == swap(**settings)


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"device": "nvme", "algorithm": "lz4"}, ["nvme does not compress"]),
        ({"device": "zram", "read_latency": "1us", "channels": 4}, ["read_latency", "channels"]),
        ({"device": "ssd", "size": "4kB"}, ["at least one page"]),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(settings: dict[str, object], messages: list[str]) -> None:
    with pytest.raises(ValidationError) as refusal:
        swap(**settings)

    assert all(message in str(refusal.value) for message in messages)


def test_a_page_that_is_unchanged_leaves_sooner_than_one_that_must_be_written(priced: Prices) -> None:
    # results/fidelity.md: Linux 6.18 paid 1 to 3 us for a page that was not written, and 6 us for one that was.
    times = swap(device="file").device_times(priced)

    assert 1000 < times.drop_ns < 3000
    assert times.cpu_out_ns + times.submit_ns == pytest.approx(6000, rel=0.25)
