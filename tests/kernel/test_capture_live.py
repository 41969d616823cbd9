"""Captured processes against the real kernel: which memory it may scan, and what it makes of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import one_host
import pytest
from child import Child

from sim.lab.capture import capture
from sim.lab.machine import exclusive
from sim.lab.sources import MAPPINGS

pytestmark = pytest.mark.kernel
COUNTERS = ["pages_shared", "pages_sharing", "pages_unshared", "pages_volatile"]
KSM = {"pages_to_scan": 20_000, "sleep_millisecs": 20, "smart_scan": 0}


@pytest.fixture
def child() -> Iterator[Child]:
    process = Child()
    yield process
    process.end()


def test_each_kind_of_mappings_holds_the_narrower_one(child: Child, tmp_path: Path) -> None:
    with exclusive():
        child.area(4)
        child.put(0, 11, 12, 0, 13)
        child.do("areas[0].madvise(mmap.MADV_MERGEABLE)")
        child.do("areas.append(mmap.mmap(-1, 8192)) or areas[1].write((77).to_bytes(8, 'little') * 1024)")
        found = {}
        for kind in MAPPINGS:
            capture(tmp_path / f"{kind}.npz", pid=child.pid, mappings=kind, comparable=tmp_path / "key")
            with np.load(tmp_path / f"{kind}.npz") as image:
                found[kind] = set(image["content"][0][image["touched_from"] == 0].tolist())

    assert found["mergeable"] == {0, 1, 2, 3}
    assert found["mergeable"] < found["private"] < found["all"]


def test_the_kernel_makes_of_a_process_what_the_simulator_makes_of_its_image(child: Child, tmp_path: Path) -> None:
    pages = 20_000
    keys = np.random.default_rng(7).zipf(1.3, pages) % 9_000
    child.area(pages)
    child.put(0, *keys.tolist())
    capture(tmp_path / "before.npz", pid=child.pid, comparable=tmp_path / "key")

    with exclusive() as ksm:
        child.do("areas[0].madvise(mmap.MADV_MERGEABLE)")
        capture(tmp_path / "real.npz", pid=child.pid, mappings="mergeable", comparable=tmp_path / "key")
        ksm.reset(**KSM)
        ksm.set(run=1)
        while ksm.read("full_scans") < 4:
            time.sleep(0.01)
        measured = ksm.counters()
        capture(tmp_path / "merged.npz", pid=child.pid, mappings="mergeable", comparable=tmp_path / "key")

    vm = {"name": "real", "memory": one_host.size(pages), "image": {"captured": "real.npz"}}
    result = one_host.run(vm, duration="1min", folder=str(tmp_path), ksm={"run": 1, **KSM})
    assert one_host.after_scan(result, 4)[COUNTERS].to_dict() == {name: measured[name] for name in COUNTERS}
    with np.load(tmp_path / "real.npz") as real, np.load(tmp_path / "merged.npz") as merged:
        assert real["content"].tolist() == merged["content"].tolist()
