"""What calibration sets up on the real machine is undone however it ends, and its figures are plausible."""

import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sim.cost.prices import Compressor
from sim.errors import MachineError
from sim.lab import memory_costs, swap_costs, swapping
from sim.lab.ksmd_costs import measured, trials
from sim.lab.machine import STATE, exclusive, restore

pytestmark = pytest.mark.kernel


def left_behind() -> list[str]:
    """Zram devices, swap files, and files and control groups of the lab that exist now."""
    swaps = Path("/proc/swaps").read_text().splitlines()[1:]
    places = [*Path("/var/tmp").glob("overcommit-*")]
    places += itertools.chain.from_iterable(folder.glob("overcommit-*") for folder, *_ in swapping.PLACES)
    return sorted([*swaps, *map(str, places), *(path.name for path in Path("/sys/block").glob("zram*"))])


@pytest.fixture
def clean() -> Iterator[None]:
    """As it was before, afterwards."""
    before = left_behind()
    yield
    assert left_behind() == before
    assert not STATE.exists()


SWAP = """
from sim.lab import swap_costs, swapping
from sim.lab.machine import exclusive
with exclusive() as ksm:
    swap_costs._thrashed = lambda *_: (print("ready", flush=True), __import__("time").sleep(60))
    swap_costs.swap(ksm)
"""
ZRAM = """
from sim.lab import swap_costs, swapping
from sim.lab.machine import exclusive
with exclusive(), swapping.zram_device():
    print("ready", flush=True)
    __import__("time").sleep(60)
"""


@pytest.mark.parametrize("script", [SWAP, ZRAM], ids=["swap", "zram"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_what_was_set_up_is_undone_however_the_lab_ends(script: str, number: signal.Signals, clean: None) -> None:
    if script == ZRAM and not swapping.ZRAM.is_dir():
        pytest.skip("this kernel has no zram")
    before = left_behind()
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        if process.stdout.readline().strip() != "ready":
            pytest.skip(process.stderr.read().splitlines()[-1])
        assert left_behind() != before
        process.send_signal(number)
        process.wait(20)

    assert restore() == (number == signal.SIGKILL)


def zip_ns(costs: Compressor) -> float:
    """What compressing an ordinary page takes."""
    return costs.compress.ns + costs.bytes_per_page * costs.compress_byte.ns


def unzip_ns(costs: Compressor) -> float:
    """What decompressing it takes."""
    return costs.decompress.ns + costs.bytes_per_page * costs.decompress_byte.ns


def test_a_page_costs_zram_some_microseconds_and_shrinks(clean: None) -> None:
    with exclusive():
        for algorithm in swap_costs.algorithms():
            costs = swap_costs.zram(algorithm)
            assert 200 < unzip_ns(costs) < zip_ns(costs) < 500_000
            assert 500 < costs.bytes_per_page < 4096


def test_swapping_costs_less_without_compression_than_compressing(clean: None) -> None:
    with exclusive():
        costs, compressed = swap_costs.paging(), swap_costs.zram("lzo-rle")

    assert 300 < costs.page_in.ns < 30_000
    assert 300 < costs.page_out.ns < zip_ns(compressed)


def test_a_swapped_page_costs_more_than_a_page_in_memory(clean: None) -> None:
    with exclusive() as ksm:
        try:
            costs = swap_costs.swap(ksm)
        except MachineError as refusal:
            pytest.skip(str(refusal))

    assert memory_costs.page_faults().small.ns < costs.swap_in.ns


def test_a_copy_on_write_takes_a_microsecond_or_more_and_the_next_write_much_less() -> None:
    with exclusive() as ksm:
        costs = memory_costs.writes(ksm)

    assert 500 < costs["cow_break"].ns < 200_000
    assert costs["write"].ns < costs["cow_break"].ns / 5


def test_a_workload_takes_ksmd_the_more_time_the_more_it_does() -> None:
    small, large = (trial for trial in trials() if trial.scenario.name in ("skipped-2000", "pairs-in-one"))
    parts = measured([small, large], 1, lambda _done, _text: None)

    assert all(part.cpu_ns.min() > 10_000 for part in parts)
    assert all(part.cpu_ns[1] > part.cpu_ns[0] for part in parts)  # searching and merging after a first look
