"""A pool of zswap that fills, refuses, writes back and takes pages again, as `sim.reclaim.zswap` says."""

from __future__ import annotations

import itertools
import mmap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sim.lab.machine import exclusive, vm_events
from sim.lab.swap_costs import _MADV_PAGEOUT
from sim.lab.swapping import swap_file, swapped_to
from sim.reclaim.zswap import Zswap
from sim.units import GIB, MIB

pytestmark = pytest.mark.kernel

PARAMETERS = Path("/sys/module/zswap/parameters")
_STEP = 8 * MIB


def meminfo(name: str) -> int:
    """Bytes."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


@pytest.fixture
def limited() -> Iterator[int]:
    """A pool of 1 % of the memory before a swap file; the file's size in bytes."""
    if not PARAMETERS.is_dir() or meminfo("MemTotal") > 64 * GIB:
        pytest.skip("this kernel has no zswap, or 1 % of its memory is too much to fill")
    before = {name: (PARAMETERS / name).read_text() for name in ("enabled", "max_pool_percent")}
    size = (Zswap(max_pool_percent=1).pool(meminfo("MemTotal")).most * 4096 // MIB + 160) * MIB
    with exclusive() as ksm, swap_file(size, ksm.token) as file:
        file.write_bytes(bytes(size))  # a swap file has no holes
        with swapped_to(str(file)):
            try:
                (PARAMETERS / "max_pool_percent").write_text("1")
                (PARAMETERS / "enabled").write_text("Y")
                yield size
            finally:
                for name, value in before.items():
                    (PARAMETERS / name).write_text(value)


def test_a_full_pool_refuses_and_writes_back_to_its_threshold(limited: int) -> None:
    pool = Zswap(max_pool_percent=1).pool(meminfo("MemTotal"))
    size = (limited - 32 * MIB) // _STEP * _STEP
    held = []
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_NOHUGEPAGE)
        words = np.frombuffer(area, np.uint64)
        words[:] = np.resize(np.random.default_rng(1).integers(1 << 63, size=MIB // 8, dtype=np.uint64), len(words))
        names = "zswpout", "pswpout", "zswpwb"
        before = vm_events(*names)
        out = 0
        deadline = time.monotonic() + 20
        # Pages that are refused ask for others to be written back, sooner or later: the last ones ask again and again.
        last = range(size - 8 * _STEP, size, _STEP)
        for at in itertools.chain(range(0, size, _STEP), itertools.cycle(last)):
            words[at // 8 : (at + _STEP) // 8] += 1
            area.madvise(_MADV_PAGEOUT, at, _STEP)
            out += _STEP // 4096
            held.append(meminfo("Zswap") // 4096)
            if out * 4096 >= size and (vm_events("zswpwb")["zswpwb"] > before["zswpwb"] or time.monotonic() > deadline):
                break
        while len({*held[-3:]}) > 1 and time.monotonic() < deadline + 10:
            time.sleep(0.3)
            held.append(meminfo("Zswap") // 4096)
        took, swapped, written = (now - before[name] for name, now in vm_events(*names).items())
        del words

    # Nothing can be compressed: each page takes one of the pool.
    assert max(held) == pytest.approx(pool.most, abs=8)
    assert held[-1] == pytest.approx(took - written, abs=8)
    assert swapped == pytest.approx(out - took + written, rel=0.01)
    assert written > 0
    after = held[held.index(max(held)) :]
    assert min(after) >= pool.again - 8
