"""The verbs of the lab on this machine's kernel: what they keep, what they refuse, and what a killed one leaves."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import sim
from sim.cli import main
from sim.columns import GUESTS, KSM_COUNTERS, SAMPLES
from sim.lab.machine import KSM, STATE
from sim.lab.trial import Busy, live

pytestmark = pytest.mark.kernel

STATIC = """
name: lab-static
duration: 1500ms
sample_every: 250ms
hosts: [{memory: 256MiB, ksm: {pages_to_scan: 10000, sleep_millisecs: 100}}]
vms:
  - {name: guest, count: 2, memory: 8MiB, image: {parts: [{name: os, size: 50%, pool: os}, {name: own, size: 40%}]}}
expect: [pages_sharing == 1024, oom_kills == 0]
"""

ACTIVE = """
name: lab-active
description: Random writes that leave a pool's contents, zeros or new ones, at a rate that changes.
duration: 3s
hosts: [{memory: 256MiB, ksm: {pages_to_scan: 20000, sleep_millisecs: 300}}]
vms:
  - name: guest
    count: 2
    memory: 16MiB
    image:
      parts:
        - {name: os, size: 40%, pool: os, run: 32KiB}
        - {name: cache, size: 20%, pool: files, writes: {rate: 2/s, leaves: files}}
        - {name: scratch, size: 10%, writes: {rate: 3/s, leaves: zero}}
        - {name: heap, size: 20%, writes: {rate: 1/s}}
    activity: {every: 1s, levels: [0.5, 3, 0]}
  - {name: clone, memory: 16MiB, fork_of: guest, start: 850ms}
"""


@pytest.fixture
def static(tmp_path: Path) -> Path:
    """The file of a scenario of static memory."""
    file = tmp_path / "lab-static.yaml"
    file.write_text(STATIC)
    return file


def invoke(*arguments: object) -> Result:
    """Call the command line."""
    return CliRunner().invoke(main, [str(each) for each in arguments])


def knobs() -> dict[str, str]:
    """Every writable setting, as the kernel shows it."""
    return {file.name: file.read_text() for file in sorted(KSM.iterdir()) if file.stat().st_mode & 0o200}


@contextlib.contextmanager
def running(file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A `lab run` of a minute, past its preparations."""
    verb = ["lab", "run", str(file), "--set", "duration=1min", "--out", str(file.parent)]
    with subprocess.Popen([sys.executable, "-m", "sim", *verb], stderr=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None and (KSM / "full_scans").read_text() in ("0\n", "1\n"):
                time.sleep(0.02)
            assert process.poll() is None
            yield process
        finally:
            process.kill()


def test_a_run_on_the_kernel_keeps_what_a_simulated_one_does(static: Path) -> None:
    before = knobs()

    called = invoke("lab", "run", static, "--out", static.parent / "out")

    assert called.exit_code == 0, called.output
    assert knobs() == before
    kept, simulated = sim.load(Path(called.stdout.splitlines()[-1])), sim.run(sim.read(static))
    assert str(kept.manifest["engine"]).startswith("kernel ")
    for table, columns in (("samples", SAMPLES), ("scans", SAMPLES), ("guests", GUESTS)):
        assert list(getattr(kept, table)) == [column.name for column in columns]
    for name in [column.name for column in KSM_COUNTERS if column.name != "full_scans"]:
        assert kept.samples[name].iloc[4:].nunique() >= 1
    assert kept.samples["pages_sharing"].iloc[-1] == simulated.samples["pages_sharing"].iloc[-1] == 1024
    same = ["guest", "vm", "touched_bytes", "ksm_merging_pages", "ksm_rmap_items", "ksm_process_profit"]
    assert kept.guests[same].to_dict() == simulated.guests[same].to_dict()
    assert (kept.folder / "report.html").stat().st_size > 10_000


def test_what_a_kernel_does_not_tell_is_left_out_and_not_expected(static: Path) -> None:
    called = invoke("lab", "run", static, "--out", static.parent / "out", "--json", "--no-report")

    told = json.loads(called.stdout)
    assert [each["expectation"] for each in told["expectations"]] == ["pages_sharing == 1024"]
    assert told["summary"]["consolidation_ratio"] is None
    assert told["summary"]["cpu_overhead_percent"] is None
    assert told["summary"]["saved_ksm_bytes"] == 4 << 20
    last = sim.load(Path(told["result"])).samples.iloc[-1]
    assert all(math.isnan(last[name]) for name in ("mem_used_bytes", "scan_cpu_ns", "pswpin", "oom_kills"))
    assert (last["guests_running"], last["cores"]) == (2, os.cpu_count())


def test_static_memory_compares_exactly(static: Path) -> None:
    called = invoke("lab", "compare", static, "--out", static.parent / "out", "--record", static.parent, "--json")

    if called.exit_code == 4 and "too busy" in called.stderr:
        pytest.skip(called.stderr)
    [told] = json.loads(called.stdout)["comparisons"]
    assert [each for each in told["faults"] if "scans" in each] == []
    assert called.exit_code == bool(told["faults"])
    again = invoke("lab", "compare", static, "--out", static.parent / "out", "--recorded", static.parent, "--json")
    assert json.loads(again.stdout)["comparisons"][0]["counters"] == told["counters"]


def test_guests_write_what_the_scenario_says_and_as_often(tmp_path: Path) -> None:
    file = tmp_path / "lab-active.yaml"
    file.write_text(ACTIVE)

    try:
        comparison = live(sim.read(file)).comparison
    except Busy as busy:
        pytest.skip(str(busy))

    assert not comparison.exact
    assert comparison.counter_faults() == [], comparison.outside


def test_a_killed_run_is_healed_by_restore(static: Path) -> None:
    before = knobs()
    with running(static) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert STATE.exists()
    assert knobs() != before

    assert json.loads(invoke("lab", "restore", "--json").stdout) == {"restored": True}
    assert knobs() == before
    assert json.loads(invoke("lab", "restore", "--json").stdout) == {"restored": False}


def test_a_killed_run_is_healed_by_the_next(static: Path) -> None:
    before = knobs()
    with running(static) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()

    assert invoke("lab", "run", static, "--out", static.parent / "out", "-q", "--no-report").exit_code == 0
    assert knobs() == before
    assert not STATE.exists()


def test_an_interrupted_run_puts_everything_back(static: Path) -> None:
    before = knobs()
    with running(static) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130

    assert knobs() == before
    assert not STATE.exists()


@pytest.mark.parametrize("verb", ["run", "compare"])
def test_the_lab_waits_for_no_one(verb: str, static: Path) -> None:
    with running(static):
        called = invoke("lab", verb, static, "--out", static.parent / "out")

    assert called.exit_code == 4
    assert "another lab is running" in called.stderr
    invoke("lab", "restore")


def test_guests_that_do_not_fit_are_refused(static: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.lab.machine._MEMORY_RESERVE", 1 << 60)

    called = invoke("lab", "run", static, "--out", static.parent / "out")

    assert called.exit_code == 4
    assert "use fewer or smaller guests" in called.stderr
