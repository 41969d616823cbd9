"""What a run, a sweep and a check go through: killed at any moment, and every operation on their files failing once.

Run as a script, this takes some minutes and tells what it did; the suite runs a part of it (test_trust.py).
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from click.testing import CliRunner

import sim
from sim.cli import main
from sim.document import dump
from sim.errors import MachineError, UserError
from sim.scenario import Scenario
from sim.study import plan, run_points, sweeps
from sim.study.workers import Died, run_all

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


def alone() -> Scenario:
    """A scenario that is no sweep, and expects something."""
    return sim.parse({**ASKED, "expect": ["consolidation_ratio >= 1"]})


def bits(folder: Path) -> Mapping[str, bytes]:
    """All that is left which has to be the same, by name: tables, summaries, what a check found, pictures."""
    names = ("*.parquet", "summary.json", "scenario.yaml", "errors.txt", "found.xml", "baseline/*.json", "*.png")
    return {str(file.relative_to(folder)): file.read_bytes() for name in names for file in sorted(folder.rglob(name))}


def leftovers(folder: Path) -> list[str]:
    """What is there that has not been published."""
    return [each.name for each in folder.rglob(".*") if each.name != ".lock"]


# --- every operation fails once ----------------------------------------------------------------------------------


class Fault(OSError):
    """What an operation fails with here."""


CODES = (errno.EIO, errno.ENOSPC)
CHECK = ("--junit", "{out}/found.xml", "--baseline", "{out}/baseline", "--update")
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
    opened = counted("open", io.open)
    with patch.object(os, "close", close), patch.object(io, "open", opened), patch.object(builtins, "open", opened):
        patches = [patch.object(os, name, counted(name, getattr(os, name))) for name in OPERATIONS]
        for each in patches:
            each.start()
        try:
            yield done
        finally:
            for each in patches:
                each.stop()


Action = Callable[[Path], str | None]
"""Does something with a folder; returns the error, which must be one for users, or None if all went well."""


@contextmanager
def here(known: dict[str, Any]) -> Iterator[None]:
    """Have points run in this process; what has its result among those *known* is not simulated again, only written."""
    real = sim.run

    def simulate(point: Scenario, *_: object) -> Any:
        name = point.digest("")
        if name not in known:
            known[name] = real(point)
        return known[name]

    def run_all(do: Any, tasks: Any, jobs: int) -> Any:
        return enumerate(map(do, tasks))

    with (
        patch.object(sweeps, "simulate", simulate),
        patch.object(sweeps, "run_all", run_all),
        patch.object(import_module("sim.run"), "run", simulate),
    ):
        yield


def inline(scenario: Scenario, out: Path, known: dict[str, Any]) -> sweeps.Swept:
    """Sweep in this process."""
    with here(known):
        return run_points(plan(scenario, out, 1))


def sweeping(points: int) -> Action:
    """A sweep, without its report."""
    scenario, known = asked(points), dict[str, Any]()

    def act(out: Path) -> str | None:
        try:
            swept = inline(scenario, out, known)
        except (UserError, MachineError) as error:
            assert str(out) in str(error), error
            return str(error)
        for failure in swept.failures.values():
            assert failure.exit_code in (2, 4), failure
            assert str(out) in failure.text, failure
        return "; ".join(failure.text for failure in swept.failures.values()) or None

    return act


def calling(scenario: Scenario, verb: str, *options: str) -> Action:
    """A verb of the command line on a scenario; in the options {out} is the folder."""
    known: dict[str, Any] = {}

    def act(out: Path) -> str | None:
        file = out.parent / f"{scenario.name}.yaml"
        file.write_text(dump(scenario.resolved()))
        asked_for = [each.format(out=out) for each in options]
        with here(known):
            result = CliRunner().invoke(main, [verb, str(file), "--out", str(out), *asked_for], prog_name="overcommit")
        assert result.exit_code in (0, 2, 4), result.output
        if not result.exit_code:
            return None
        assert str(out) in result.output, result.output
        assert any(os.strerror(code) in result.output for code in CODES) or "not writable" in result.output
        return result.output

    return act


def fail_each(
    folder: Path,
    act: Action,
    every: int = 1,
    code: int = errno.EIO,
    again: bool = False,
    forever: bool = False,
    resumes: bool = True,
) -> Counter[str]:
    """Let each operation on the files of an action fail in turn (or one of *every*); return how often each kind did.

    With *again*, results that are there already are replaced meanwhile; with *forever*, all operations after it fail.
    What *resumes* must not do a second time what was published before the failure.
    """
    reference = folder / "reference"
    assert act(reference) is None
    expected = bits(reference)
    failed: Counter[str] = Counter()
    for at in range(1, 10_000, every):
        out = folder / f"out-{at}"
        if again:
            act(out)
            for mark in out.rglob("_SUCCESS"):
                mark.unlink()  # so they are taken as not whole, and replaced
        with failing(out, at, code, forever) as done:
            outcome = act(out)
        if len(done) < at:
            assert outcome is None, outcome
            return failed
        failed[done[at - 1]] += 1
        for mark in out.rglob("_SUCCESS"):
            assert sim.load(mark.parent).summary, mark  # what is published is whole
        published = {mark.parent: mark.stat().st_ino for mark in out.rglob("_SUCCESS") if ".new-" not in str(mark)}
        assert act(out) is None, (at, done[at - 1])
        if resumes:
            assert {run: (run / "_SUCCESS").stat().st_ino for run in published} == published, "computed twice"
        assert bits(out) == expected, (at, done[at - 1])
        assert leftovers(out) == [], (at, done[at - 1])
        shutil.rmtree(out)
    raise AssertionError("there is no end to the operations")


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


# --- out of memory -----------------------------------------------------------------------------------------------


def eat(mebibytes: int) -> str:
    """Use memory, and say how much."""
    return f"{len(b'x' * (mebibytes << 20)) >> 20} MiB"


def starve() -> None:
    """Have three tasks done by a worker, of which one asks for more than there is; tell what became of them."""
    for number, outcome in sorted(run_all(eat, [1, 1024, 2], 1)):
        print(f"{number}: {outcome.reason if isinstance(outcome, Died) else outcome}")


def everything(kills: int) -> None:
    """Do all of it and tell what was done."""
    for name, act, resumes, code, again, forever in (
        ("sweep, EIO", sweeping(3), True, errno.EIO, False, False),
        ("sweep, ENOSPC", sweeping(3), True, errno.ENOSPC, False, False),
        ("sweep, EIO, replacing", sweeping(3), True, errno.EIO, True, False),
        ("sweep, EIO to the end", sweeping(3), True, errno.EIO, False, True),
        ("sweep, EIO to the end, replacing", sweeping(3), True, errno.EIO, True, True),
        ("run with its report", calling(alone(), "run"), False, errno.EIO, False, False),
        ("run with its report, ENOSPC to the end", calling(alone(), "run"), False, errno.ENOSPC, False, True),
        ("sweep with its report", calling(asked(3), "sweep"), True, errno.EIO, False, False),
        ("check", calling(alone(), "check", *CHECK), True, errno.EIO, False, False),
        ("check, ENOSPC to the end", calling(alone(), "check", *CHECK), True, errno.ENOSPC, False, True),
    ):
        with TemporaryDirectory(prefix="torture-") as folder:
            began = time.monotonic()
            failed = fail_each(Path(folder), act, code=code, again=again, forever=forever, resumes=resumes)
            print(
                f"{name}: {failed.total()} operations failed in turn in {time.monotonic() - began:.0f} s:", dict(failed)
            )
    with TemporaryDirectory(prefix="torture-") as folder:
        began = time.monotonic()
        print(dict(kill_often(Path(folder), kills, points=12)), f"in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:] == ["--starve"]:
        starve()
    else:
        everything(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
