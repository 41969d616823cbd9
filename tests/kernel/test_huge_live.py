"""Huge pages on this machine's kernel: khugepaged's pace, and settings that are put back however a lab ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sim.lab import memory_costs
from sim.lab.machine import STATE, THP, exclusive, restore
from sim.lab.replay import replay
from sim.run import run
from sim.scenario import load

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(not THP.is_dir(), reason="this kernel has no huge pages")]

TUG_OF_WAR = """
name: lab-khugepaged
description: khugepaged puts back together what ksmd takes apart, twice a second.
duration: 5s
hosts:
  - memory: 1GiB
    ksm: {pages_to_scan: 5000, smart_scan: 0}
    thp: {enabled: madvise, khugepaged: {scan_sleep_millisecs: 500, pages_to_scan: 10000000}}
vms:
  - name: guest
    count: 2
    memory: 32MiB
    image:
      parts:
        - {name: os, pool: os, size: 20%}
        - {name: library, pool: library, size: 64KiB, run: 4KiB}
        - {name: own, size: 75%, run: 64KiB}
"""
MADE_AT_ONCE = 20
"""Huge pages that khugepaged makes each time it wakes up: all but those with too many shared pages."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file of the scenario."""
    file = tmp_path / "lab-khugepaged.yaml"
    file.write_text(TUG_OF_WAR)
    return file


def settings() -> dict[str, str]:
    """Settings of huge pages, and how khugepaged is scheduled."""
    found = {str(each): each.read_text() for each in (THP / "khugepaged").iterdir() if each.stat().st_mode & 0o200}
    pid = khugepaged()
    scheduling = f"{os.sched_getscheduler(pid)} {os.getpriority(os.PRIO_PROCESS, pid)}"
    return found | {"enabled": (THP / "enabled").read_text(), "scheduling": scheduling}


def khugepaged() -> int:
    """The process number of khugepaged."""
    return int(subprocess.run(["pgrep", "-x", "khugepaged"], capture_output=True, check=True).stdout)


@pytest.fixture
def put_back() -> Iterator[None]:
    """Everything as it was before, afterwards."""
    before = settings()
    yield
    assert settings() == before
    assert not STATE.exists()


def waited_s() -> float:
    """How long khugepaged has waited for a core since boot."""
    return int(Path(f"/proc/{khugepaged()}/schedstat").read_text().split()[1]) / 1e9


@pytest.mark.usefixtures("put_back")
def test_khugepaged_makes_as_many_huge_pages_as_simulated(file: Path) -> None:
    scenario = load(file)
    expected = run(scenario).samples["thp_collapse_alloc"].iloc[-1]
    before = waited_s()
    samples = replay(scenario).samples
    if waited_s() - before > 0.1:
        pytest.skip("khugepaged waited for a core: this machine is too busy")

    assert expected > 5 * MADE_AT_ONCE
    assert samples["thp_collapse_alloc"].iloc[-1] == pytest.approx(expected, rel=0.1, abs=MADE_AT_ONCE)
    assert samples["thp_split_page"].iloc[-1] > samples["thp_collapse_alloc"].iloc[-1] - 2 * MADE_AT_ONCE


@pytest.mark.usefixtures("put_back")
def test_a_killed_lab_leaves_settings_that_the_next_one_puts_back(file: Path, tmp_path: Path) -> None:
    before = settings()
    command = [sys.executable, "-m", "sim", "lab", "run", str(file), "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while settings() == before and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)

    assert settings() != before
    assert restore()


@pytest.mark.usefixtures("put_back")
def test_a_huge_page_costs_more_to_split_than_to_look_at_and_most_to_make() -> None:
    with exclusive(1 << 30) as ksm:
        costs = memory_costs.huge_pages(ksm)

    assert 1_000 < costs.look.ns < costs.split.ns < costs.collapse.ns < 100_000_000
