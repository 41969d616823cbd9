"""What a sweep goes through: killed at any moment, and every operation on its files failing once.

Run as a script, this takes some minutes and tells what it did; the suite runs a part of it (test_trust.py).
"""

from __future__ import annotations

import errno
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import sim
from sim.document import dump
from sim.errors import MachineError, UserError
from sim.scenario import Scenario
from sim.study import plan, run_points, sweeps

ROOT = Path(__file__).parents[1]
ASKED: dict[str, Any] = {
    "name": "tiny",
    "duration": "2s",
    "hosts": [{"memory": "64MiB", "ksm": {"pages_to_scan": 100}}],
    "vms": [
        {"name": "web", "count": 2, "memory": "1MiB", "image": {"parts": [{"name": "a", "pool": "p", "size": "100%"}]}}
    ],
}


def asked(points: int) -> Scenario:
    """A sweep of so many points, each of which takes some milliseconds."""
    return sim.parse({**ASKED, "sweep": {"hosts.0.ksm.pages_to_scan": list(range(1, points + 1))}})


def bits(folder: Path) -> Mapping[str, bytes]:
    """All that a sweep leaves which has to be the same: tables and summaries, by name."""
    names = ("*.parquet", "summary.json", "scenario.yaml", "errors.txt")
    return {str(file.relative_to(folder)): file.read_bytes() for name in names for file in sorted(folder.rglob(name))}


def leftovers(folder: Path) -> list[str]:
    """What is there that has not been published."""
    return [each.name for each in folder.rglob(".*") if each.name != ".lock"]


# --- every operation fails once ----------------------------------------------------------------------------------


class Fault(OSError):
    """What an operation fails with here."""


OPERATIONS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


@contextmanager
def failing(root: Path, at: int, code: int, forever: bool = False) -> Iterator[list[str]]:
    """Let operation number *at* on files below *root* fail, or all from there on; yield the names of those done."""
    done: list[str] = []
    numbers: set[int] = set()

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(what: Any, *rest: Any, **options: Any) -> Any:
            below = what in numbers if isinstance(what, int) else str(what).startswith(str(root))
            if below:
                done.append(name)
                if len(done) == at or (forever and len(done) > at):
                    raise Fault(code, os.strerror(code), str(what))
            made = real(what, *rest, **options)
            if below and name == "open" and isinstance(made, int):
                numbers.add(made)
            return made

        return call

    def close(number: int) -> None:
        below = number in numbers
        numbers.discard(number)
        real_close(number)  # a close that fails has closed the file all the same: close(2)
        if below:
            done.append("close")
            if len(done) == at or (forever and len(done) > at):
                raise Fault(code, os.strerror(code))

    real_close = os.close
    with patch.object(os, "close", close), patch.object(io, "open", counted("open", io.open)):
        patches = [patch.object(os, name, counted(name, getattr(os, name))) for name in OPERATIONS]
        for each in patches:
            each.start()
        try:
            yield done
        finally:
            for each in patches:
                each.stop()


def inline(scenario: Scenario, out: Path, known: dict[str, Any]) -> sweeps.Swept:
    """Sweep in this process; runs whose result is *known* are not simulated again, only written."""

    def simulate(point: Scenario) -> Any:
        name = point.digest("")
        known.setdefault(name, None)
        known[name] = known[name] or sim.run(point)
        return known[name]

    def run_all(do: Any, tasks: Any, jobs: int) -> Any:
        return enumerate(map(do, tasks))

    with patch.object(sweeps, "simulate", simulate), patch.object(sweeps, "run_all", run_all):
        return run_points(plan(scenario, out, 1))


def fail_each(
    folder: Path, points: int = 2, every: int = 1, code: int = errno.EIO, again: bool = False, forever: bool = False
) -> Counter[str]:
    """Let each operation of a sweep fail in turn (or one of *every* so many); return how often each kind did.

    With *again*, results that are there already are replaced meanwhile; with *forever*, all operations after it fail.
    """
    scenario = asked(points)
    known: dict[str, Any] = {}
    reference = folder / "reference"
    inline(scenario, reference, known)
    expected = bits(reference)
    failed: Counter[str] = Counter()
    for at in range(1, 10_000, every):
        out = folder / f"out-{at}"
        if again:
            inline(scenario, out, known)
            for mark in out.rglob("_SUCCESS"):
                mark.unlink()  # so the sweep takes them as not whole, and replaces them
        with failing(out, at, code, forever) as done:
            outcome = attempt(scenario, out, known)
        if len(done) < at:
            assert outcome is None, outcome
            return failed
        failed[done[at - 1]] += 1
        for mark in out.rglob("_SUCCESS"):
            assert sim.load(mark.parent).summary, mark  # what is published is whole
        published = {mark.parent: mark.stat().st_ino for mark in out.rglob("_SUCCESS") if ".new-" not in str(mark)}
        assert attempt(scenario, out, known) is None, (at, done[at - 1])
        assert {folder: (folder / "_SUCCESS").stat().st_ino for folder in published} == published, "computed twice"
        assert bits(out) == expected, (at, done[at - 1])
        assert leftovers(out) == [], (at, done[at - 1])
    raise AssertionError("there is no end to the operations")


def attempt(scenario: Scenario, out: Path, known: dict[str, Any]) -> str | None:
    """Sweep; return the error, which must be one for users, or None if all points are there."""
    try:
        swept = inline(scenario, out, known)
    except (UserError, MachineError) as error:
        assert str(out) in str(error), error
        return str(error)
    for failure in swept.failures.values():
        assert failure.exit_code in (2, 4), failure
        assert str(out) in failure.text, failure
    return "; ".join(failure.text for failure in swept.failures.values()) or None


# --- kill -9 -----------------------------------------------------------------------------------------------------


def start(scenario: Scenario, out: Path) -> subprocess.Popen[bytes]:
    """A sweep in processes of its own. They are no copies of this one: threads of Arrow's do not survive that."""
    file = out.parent / "tiny.yaml"
    file.write_text(dump(scenario.resolved()))
    command = [sys.executable, "-m", "sim", "sweep", str(file), "--no-report", "--jobs", "2", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def kill_often(folder: Path, kills: int, points: int, seed: int = 1) -> Counter[str]:
    """Kill a sweep or one of its workers at so many random moments, and go on each time; return what happened.

    One moment in five is drawn from all the time that a sweep takes, which is mostly start; the others from its end,
    in which points are computed and published. Whenever a sweep comes to its end, its bits are compared and another
    begins.
    """
    dice = random.Random(seed)
    scenario = asked(points)
    inline(scenario, folder / "reference", {})
    expected = bits(folder / "reference")
    began = time.monotonic()
    sweep = start(scenario, folder / "undisturbed")
    wait_for_results(sweep, folder / "undisturbed")
    started = time.monotonic() - began
    assert sweep.wait(600) == 0
    took = time.monotonic() - began
    told: Counter[str] = Counter()
    while told["main killed"] + told["worker killed"] < kills:
        told["sweeps"] += 1
        out = folder / f"out-{told['sweeps']}"
        seen: dict[Path, int] = {}
        while not whole(out, points) and told["main killed"] + told["worker killed"] < kills:
            at_work = dice.random() < 0.8
            kill_once(scenario, out, told, dice, took - started if at_work else took, at_work)
            print(dict(told), flush=True)
            for mark in out.glob("tiny/[!.]*/_SUCCESS"):
                assert sim.load(mark.parent).summary
                assert seen.setdefault(mark, mark.stat().st_ino) == mark.stat().st_ino, "computed twice"
        finish(scenario, out)
        assert {mark: mark.stat().st_ino for mark in seen} == seen, "computed twice"
        assert bits(out) == expected
        assert leftovers(out) == []
    return told


def whole(out: Path, points: int) -> bool:
    """Whether all points are there."""
    return len(list(out.glob("tiny/[!.]*/_SUCCESS"))) == points


def finish(scenario: Scenario, out: Path) -> None:
    """Let a sweep end undisturbed."""
    assert start(scenario, out).wait(600) == 0


def wait_for_results(sweep: subprocess.Popen[bytes], out: Path) -> None:
    """Wait until a sweep begins to write a result, or ends."""
    before = set(out.glob("tiny/*"))
    while sweep.poll() is None and set(out.glob("tiny/*")) <= before:
        time.sleep(0.001)


def kill_once(
    scenario: Scenario, out: Path, told: Counter[str], dice: random.Random, longest: float, at_work: bool
) -> None:
    """Start a sweep and kill it, or a worker, at a random moment; leave no process behind.

    The moment lies up to *longest* (s) after the start, or after the first result is begun if it is *at_work*.
    """
    before = len(list(out.glob("tiny/[!.]*/_SUCCESS")))
    sweep = start(scenario, out)
    if at_work:
        wait_for_results(sweep, out)
    with suppress(subprocess.TimeoutExpired):
        sweep.wait(dice.uniform(0.0, longest))
    pids = [pid for pid in children(sweep.pid) if b"spawn_main" in command_of(pid)]
    if sweep.poll() is not None:
        told["ended before"] += 1
    elif pids and dice.random() < 0.3:
        with suppress(ProcessLookupError):
            os.kill(dice.choice(pids), signal.SIGKILL)
        told["worker killed"] += 1
        sweep.wait(600)  # the point that was in it failed, the others are there
    else:
        sweep.kill()
        told["main killed"] += 1
        sweep.wait(60)
        told["half written"] += any(out.glob("tiny/.new-*"))
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.monotonic() < deadline, "a worker goes on without its sweep"
            time.sleep(0.02)
    told["points published"] += len(list(out.glob("tiny/[!.]*/_SUCCESS"))) - before


def command_of(pid: int) -> bytes:
    """How a process was started."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def main(kills: int) -> None:
    """Do all of it and tell what was done."""
    for name, code, again, forever in (
        ("EIO", errno.EIO, False, False),
        ("ENOSPC", errno.ENOSPC, False, False),
        ("EIO, replacing", errno.EIO, True, False),
        ("EIO to the end", errno.EIO, False, True),
        ("EIO to the end, replacing", errno.EIO, True, True),
    ):
        with TemporaryDirectory(prefix="torture-") as folder:
            began = time.monotonic()
            failed = fail_each(Path(folder), points=3, code=code, again=again, forever=forever)
            print(
                f"{name}: {failed.total()} operations failed in turn in {time.monotonic() - began:.0f} s:", dict(failed)
            )
    with TemporaryDirectory(prefix="torture-") as folder:
        began = time.monotonic()
        print(dict(kill_often(Path(folder), kills, points=12)), f"in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
