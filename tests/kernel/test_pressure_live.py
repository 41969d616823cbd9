"""Guests with limited memory on this kernel: what they hold, what zram makes of it, and what is left behind."""

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from sim.errors import MachineError
from sim.lab import swapping
from sim.lab.guest import HUGE_BYTES, PAGE_BYTES, render
from sim.lab.machine import STATE, exclusive, restore
from sim.lab.replay import replay, workload
from sim.lab.swapping import zram_device
from sim.lab.templates import templates
from sim.memory.image import load_capture
from sim.reclaim.compression import packed_of, pool_bytes, stored_bytes
from sim.scenario import Scenario, parse

pytestmark = pytest.mark.kernel

IMAGES = Path(__file__).parents[2] / "scenarios/images"
SYSCTLS = [Path("/proc/sys/vm") / name for name in ("page-cluster", "swappiness")]
SCENARIO = """
name: short
duration: {duration}
hosts: [{{memory: 1GiB, ksm: {{run: 0}}, swap: {{device: {device}, size: 256MiB}}, watermarks: {{page_cluster: 1}}}}]
vms:
  - name: guest
    memory: 96MiB
    memory_limit: 64MiB
    image: {{parts: [{{name: heap, size: 100%, reads: {{rate: 0.4/s}}, writes: {{rate: 0.1/s}}}}]}}
"""


def short(device: str, duration: str = "3s") -> Scenario:
    """A guest of twice its limit."""
    return parse(yaml.safe_load(SCENARIO.format(device=device, duration=duration)))


def left_behind() -> list[str]:
    """Swap areas, swap files, control groups, zram devices and sysctls that are there now."""
    swaps = Path("/proc/swaps").read_text().splitlines()[1:]
    groups = [each for folder, *_ in (*swapping.PLACES, (swapping.UNIFIED,)) for each in folder.glob("overcommit-*")]
    files = [*swapping.SWAP_FOLDER.glob("overcommit-*"), *Path("/sys/block").glob("zram*"), *groups]
    return sorted([*swaps, *map(str, files), *(file.read_text() for file in SYSCTLS)])


@pytest.fixture(scope="module", params=["zram", "file"])
def device(request: pytest.FixtureRequest) -> str:
    """Where pages go; skipped where the kernel has no control groups that limit memory."""
    try:
        swapping.place()
    except MachineError as error:
        pytest.skip(str(error))
    if request.param == "zram" and not swapping.ZRAM.is_dir():
        pytest.skip("this kernel has no zram")
    return str(request.param)


def test_a_guest_holds_what_its_limit_allows_and_does_the_rest_later(device: str) -> None:
    before = left_behind()

    on_their_way = 100 if device == "zram" else 1000  # to a file, which is slower than the guest
    for attempt in range(3):
        run = replay(short(device))
        assert left_behind() == before
        [end] = run.farewells.values()
        assert end.touched_pages == (96 << 20) // PAGE_BYTES
        left = (64 << 20) // PAGE_BYTES - (end.touched_pages - end.swapped_pages)
        # One run in five on a file ends with some hundred pages more than the limit, for a reason that is not known.
        if -100 <= left <= on_their_way or attempt == 2:
            break
    assert -100 <= left <= on_their_way
    last = run.readings.iloc[-1]
    assert last["pswpin"] > 1000
    assert last["psi_some_ns"] < end.stalled_ns * 1.05 < 3.2e9
    accesses = end.reads + end.written_pages
    assert accesses == pytest.approx(3 * 0.5 * end.touched_pages * end.progress, rel=0.05)
    assert 0.02 < end.progress < 0.99


def test_a_killed_run_under_pressure_is_healed(device: str, tmp_path: Path) -> None:
    before = left_behind()
    file = tmp_path / "short.yaml"
    file.write_text(SCENARIO.format(device=device, duration="1min"))
    verb = [sys.executable, "-m", "sim", "lab", "run", str(file), "--out", str(tmp_path)]
    with subprocess.Popen(verb, stderr=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None and len(Path("/proc/swaps").read_text().splitlines()) < 2:
                time.sleep(0.05)
            time.sleep(1)
            assert process.poll() is None
        finally:
            process.kill()

    assert left_behind() != before
    assert restore()
    assert left_behind() == before
    assert not STATE.exists()


@pytest.mark.parametrize(("image", "algorithm"), [("pg-a", "lz4"), ("nginx-a", "lzo-rle")])
def test_zram_takes_the_memory_that_a_captured_guest_is_said_to_take(image: str, algorithm: str) -> None:
    """Pages of the captured guest's sizes, written to zram one after the other."""
    swap = {"device": "zram", "size": "1GiB", "algorithm": algorithm}
    host = {"memory": "2GiB", "swap": swap, "ksm": {"run": 0}}
    vm = {"name": "guest", "memory": "512MiB", "image": {"captured": str(IMAGES / f"{image}.npz")}}
    asked = parse({"name": "packed", "duration": "1ms", "hosts": [host], "vms": [vm]})
    [guest] = workload(asked).guests
    there = np.flatnonzero(guest.keys != 0)
    capture = load_capture(IMAGES / f"{image}.npz")
    packed = packed_of(capture, algorithm, asked.seed, "guest-0", len(guest.keys), {})[there]

    with exclusive():
        used, stored = _in_zram(algorithm, guest.keys[there], templates(algorithm))

    assert used == pytest.approx(pool_bytes(packed), rel=0.05)
    assert stored == pytest.approx(stored_bytes(packed), rel=0.05)


def _in_zram(algorithm: str, keys: np.ndarray, shapes: np.ndarray) -> tuple[int, int]:
    """mem_used_total and compr_data_size of zram after pages of these keys were written."""
    with zram_device() as number:
        folder = Path(f"/sys/block/zram{number}")
        (folder / "comp_algorithm").write_text(algorithm)
        (folder / "disksize").write_text(str(len(keys) * PAGE_BYTES))
        device = os.open(f"/dev/zram{number}", os.O_RDWR | os.O_DIRECT)
        with mmap.mmap(-1, HUGE_BYTES) as aligned:
            step = HUGE_BYTES // PAGE_BYTES
            for at in range(0, len(keys), step):
                words = render(keys[at : at + step], "packed", shapes)
                aligned[: words.nbytes] = words.tobytes()
                os.pwrite(device, memoryview(aligned)[: words.nbytes], at * PAGE_BYTES)
        os.close(device)
        _, stored, used, *_ = map(int, (folder / "mm_stat").read_text().split())
    return used, stored
