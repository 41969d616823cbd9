"""Workers that hold hosts: the same bits whatever their number and place, and whoever of them dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

import fake_hosts
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from fake_hosts import HOSTS, Forgetful, Hosts, Part, Wrong, conversation, parts_for
from hypothesis import given
from hypothesis import strategies as st

import sim
from sim.cli import main
from sim.cluster import build, connected, differences
from sim.datacenter import fleet
from sim.datacenter.crew import Crew, same, split
from sim.document import dump
from sim.engine import engine
from sim.errors import MachineError, UserError
from sim.results import write
from sim.study import plan, run_points, sweeps
from sim.study.sweeps import TABLE

ROOT = Path(__file__).parents[1]
History = Sequence[Mapping[int, int]]


def told(crew: Crew[Any, Any, Any, Any], parts: Sequence[Part]) -> History:
    """All that the hosts of a crew say, in the order of hosts."""
    with crew:
        return [dict(sorted(values.items())) for values in conversation(crew, parts)]


@pytest.fixture(scope="module")
def alone() -> History:
    """What the hosts say when this process is the only worker."""
    return told(Crew(Hosts), parts_for(1))


def wait_until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- who gets what -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1 << 40)), st.integers(1, 9))
def test_every_host_is_in_one_part_and_the_parts_are_balanced(weights: list[int], workers: int) -> None:
    parts = split(weights, workers)

    assert sorted(number for part in parts for number in part) == list(range(len(weights)))
    assert len(parts) == min(workers, len(weights))
    loads = [sum(weights[number] for number in part) for part in parts]
    assert not loads or max(loads) - min(loads) <= max(weights)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (0.0, 1.0),
        ([1, 2], (1, 2)),
        ({"a": 1}, {"a": 2}),
        ([1], [1, 2]),
        (np.zeros(2), np.zeros(3)),
        (np.zeros(2), np.zeros(2, int)),
        (np.zeros(2), np.array([0.0, -0.0])),
        (fake_hosts.Heard([1], np.array([1])), fake_hosts.Heard([1], np.array([2]))),
    ],
)
def test_answers_that_differ_in_anything_are_not_the_same(one: object, other: object) -> None:
    assert not same(one, other)
    assert same(one, one) and same(other, other)


# --- in processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("jobs", "parts"), [(1, 3), (2, 2), (3, 3), (6, 6)])
def test_the_number_of_workers_changes_no_bit(jobs: int, parts: int, alone: History) -> None:
    before = set(multiprocessing.active_children())

    assert told(Crew(Hosts, jobs=jobs), parts_for(parts)) == alone
    assert set(multiprocessing.active_children()) <= before


def test_workers_that_die_are_replaced_and_no_bit_changes(tmp_path: Path, alone: History) -> None:
    first, second = deaths = (
        {moment: tmp_path / moment for moment in ("begin", "before 0", "after 5", "restore", "before 4")},
        {moment: tmp_path / moment for moment in ("after 2", "save", "before 7", "finish")},
    )
    for file in [*first.values(), *second.values()]:
        file.touch()

    assert told(Crew(Hosts, jobs=2, window=3, saving_s=0), parts_for(2, die0=first, die1=second)) == alone
    assert not any(file.exists() for part in deaths for file in part.values())


def test_workers_killed_at_any_moment_change_no_bit() -> None:
    parts = [replace(part, work=30_000) for part in parts_for(2)]
    expected = told(Crew(Hosts), parts)
    delays = np.random.default_rng(5).uniform(0, 0.02, len(expected))  # an epoch takes a few milliseconds
    killed: list[int] = []

    def kill() -> None:
        pids = [child.pid or 0 for child in multiprocessing.active_children()]
        victim = next(pid for pid in pids if pid not in killed)  # while one is being replaced, the other is there
        os.kill(victim, signal.SIGKILL)
        killed.append(victim)

    with Crew(Hosts, jobs=2, window=2, saving_s=0) as crew:
        again, killer = [], Timer(0, kill)
        for values, delay in zip(conversation(crew, parts), delays, strict=True):
            again.append(dict(sorted(values.items())))
            if len(again) in (1, 4, 7):
                if len(again) > 1:
                    killer.join()
                killer = Timer(delay, kill)
                killer.start()
        killer.join()

    assert len(killed) == 3
    assert again == expected


def test_whose_place_nobody_can_take_ends_the_run(tmp_path: Path) -> None:
    death = tmp_path / "death"
    death.touch()

    with pytest.raises(MachineError, match=r"part 2 of 2 .* lost 4 workers in a row: it was killed by SIGKILL"):
        told(Crew(Hosts, jobs=2), parts_for(2, die1={"always before 4": death}))

    assert multiprocessing.active_children() == []


def test_a_new_worker_that_answers_differently_is_seen(tmp_path: Path) -> None:
    death = tmp_path / "death"
    death.touch()

    with pytest.raises(AssertionError, match="part 1 of the hosts answered its orders differently"):
        told(Crew(Forgetful, jobs=2), parts_for(2, die0={"before 4": death}))


def test_no_room_for_a_checkpoint_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.datacenter.crew._IN_MEMORY", 1)
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")

    with pytest.raises(MachineError, match=r"no room for a checkpoint of hosts: .*TMPDIR"):
        told(Crew(Hosts, jobs=2, window=1, saving_s=0), parts_for(2))


def test_a_large_checkpoint_lies_in_a_file_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: History
) -> None:
    monkeypatch.setattr("sim.datacenter.crew._IN_MEMORY", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "death").touch()

    assert told(Crew(Hosts, jobs=2, window=2, saving_s=0), parts_for(2, die0={"before 7": tmp_path / "death"})) == alone
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    ("epoch", "error", "says"),
    [(1, UserError, "a mistake of the user's"), (3, Exception, "of the program's")],
)
def test_what_goes_wrong_in_a_worker_is_raised_here(
    jobs: int, epoch: int, error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error, match=says) as raised, Crew(Wrong, jobs=jobs) as crew:
        crew.begin(parts_for(jobs))
        crew.advance([fake_hosts.Told(epoch, dict.fromkeys(range(HOSTS), 0))] * jobs)

    if epoch == 3 and jobs == 2:
        assert "ZeroDivisionError" in str(raised.value)
        assert "fake_hosts.py" in raised.value.__notes__[0]
    assert multiprocessing.active_children() == []


def test_an_answer_that_cannot_be_sent_is_raised_here() -> None:
    with pytest.raises(RuntimeError, match=r"in a worker: .*pickle"), Crew(Wrong, jobs=2) as crew:
        crew.begin(parts_for(2))
        crew.advance([fake_hosts.Told(4, {})] * 2)


COORDINATOR = """
from fake_hosts import Slow, conversation, parts_for
from sim.datacenter.crew import Crew

if __name__ == "__main__":
    with Crew(Slow, {where}) as crew:
        list(conversation(crew, parts_for(2)))
"""


def coordinator(folder: Path, where: str) -> subprocess.Popen[bytes]:
    """A process that waits for two workers who take too long."""
    program = folder / "coordinator.py"
    program.write_text(COORDINATOR.format(where=where))
    return subprocess.Popen([sys.executable, program], env=environment(), cwd=folder, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_when_the_run_ends_by_force_no_process_is_left(ending: signal.Signals, tmp_path: Path) -> None:
    running = coordinator(tmp_path, "jobs=2")
    wait_until(lambda: len(list(tmp_path.glob("busy-*"))) == 2)
    workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    running.send_signal(ending)
    running.wait(10)

    assert len(workers) >= 2
    wait_until(lambda: not any(Path("/proc", worker).exists() for worker in workers))


# --- on a cluster ------------------------------------------------------------------------------------------------


def environment(package: Path = ROOT) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{package}:{ROOT / 'tests'}"}


class Dask:
    """A scheduler and its workers, each a process on the loopback interface."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "scheduler.json"
        self._folder = folder
        self._scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-show")
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        wait_until(lambda: self._file.exists() and self._file.read_text().endswith("}"))
        self.address: str = json.loads(self._file.read_text())["address"]

    def start(self, name: str, package: Path = ROOT) -> None:
        """Start a worker."""
        self._workers[name] = self._start("worker", "--nthreads", "1", "--no-nanny", "--name", name, package=package)

    def kill(self, name: str) -> None:
        """Kill a worker."""
        self._kill(self._workers.pop(name))

    def kill_one(self) -> None:
        """Kill the worker that was started first."""
        self.kill(next(name for name, worker in self._workers.items() if worker.poll() is None))

    def kill_scheduler(self) -> None:
        """Kill the scheduler."""
        self._kill(self._scheduler)

    def alive(self) -> int:
        """How many workers are."""
        return sum(worker.poll() is None for worker in self._workers.values())

    def ensure(self, workers: int) -> None:
        """Start workers in the place of dead ones, and wait until the scheduler knows who is there."""
        for number in range(workers - self.alive()):
            self.start(f"worker-{time.monotonic_ns()}-{number}")
        with connected(self.address) as cluster:
            wait_until(lambda: len(cluster.workers()) == workers)

    def end(self) -> None:
        """Kill all."""
        for process in (*self._workers.values(), self._scheduler):
            self._kill(process)

    def _start(self, kind: str, *options: str, package: Path = ROOT) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", kind, "--no-dashboard", "--scheduler-file", str(self._file), *options]
        with (self._folder / f"{kind}.log").open("a") as log:
            return subprocess.Popen(command, env=environment(package), cwd=self._folder, stderr=log, stdout=log)

    @staticmethod
    def _kill(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait(10)


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dask]:
    pytest.importorskip("distributed", reason="Dask is not installed")
    cluster = Dask(tmp_path_factory.mktemp("dask"))
    try:
        yield cluster
    finally:
        cluster.end()


@pytest.fixture
def two(dask: Dask) -> Dask:
    """A cluster with two workers."""
    dask.ensure(2)
    return dask


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_cluster_changes_no_bit(two: Dask, parts: int, alone: History) -> None:
    crew = Crew(Hosts, cluster=two.address)

    assert crew.workers == 2
    assert told(crew, parts_for(parts)) == alone


@pytest.mark.parametrize("moment", ["begin", "after 5", "save"])
def test_a_worker_of_a_cluster_that_dies_is_replaced(two: Dask, moment: str, tmp_path: Path, alone: History) -> None:
    death = tmp_path / "death"
    death.touch()

    assert told(Crew(Hosts, cluster=two.address, window=3, saving_s=0), parts_for(2, die1={moment: death})) == alone
    assert not death.exists()
    assert two.alive() == 1


def test_mistakes_on_a_cluster_are_raised_here(two: Dask) -> None:
    with pytest.raises(UserError, match="a mistake of the user's"), Crew(Wrong, cluster=two.address) as crew:
        crew.begin(parts_for(2))
        crew.advance([fake_hosts.Told(1, {})] * 2)


def test_a_cluster_forgets_the_hosts_of_a_run_that_was_killed(
    two: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def actors(dask_worker: Any) -> int:
        return len(dask_worker.state.actors)

    running = coordinator(tmp_path, f"cluster={two.address!r}")
    with connected(two.address) as cluster:
        wait_until(lambda: list(cluster.client.run(actors).values()) == [1, 1])
        running.kill()
        running.wait(10)
        wait_until(lambda: list(cluster.client.run(actors).values()) == [0, 0])
    for _ in range(2):  # what they were told to do they go on doing
        two.kill_one()


FLEET = {
    "name": "fleet",
    "duration": "100min",
    "hosts": [{"name": "node", "count": 3, "memory": "32MiB", "ksm": {"pages_to_scan": 50, "sleep_millisecs": 1000}}],
    "vms": [
        {
            "name": "web",
            "memory": "4MiB",
            "count": 12,
            "every": "7min",
            "lifetime": "40min",
            "image": {"parts": [{"name": "a", "pool": "p", "size": "60%", "writes": {"rate": "0.001/s"}}]},
        }
    ],
    "datacenter": {},
}


def test_a_datacenter_has_the_same_bits_in_processes_that_die_and_on_a_cluster(
    two: Dask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "SAVING_S", 0.0)
    scenario = sim.parse(FLEET)

    def kill(done: float, text: str) -> None:
        if abs(done - 0.75) < 0.01:  # three epochs after a checkpoint
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
            killed.append(done)

    killed: list[float] = []
    alone = sim.run(scenario)
    others = [sim.run(scenario, kill, jobs=2), sim.run(scenario, cluster=two.address)]

    assert len(killed) == 1
    assert alone.samples["pages_sharing"].max() > 0 and len(alone.guests) == 12
    for other in others:
        assert other.summary == alone.summary
        assert other.manifest["work"] == alone.manifest["work"]
        for table in ("samples", "guests", "events", "fleet", "hosts"):
            pd.testing.assert_frame_equal(getattr(other, table), getattr(alone, table), check_exact=True)


SWEPT = {
    "name": "small",
    "duration": "20s",
    "hosts": [{"memory": "256MiB", "ksm": {"pages_to_scan": 2000}}],
    "vms": [
        {"name": "web", "count": 2, "memory": "16MiB", "image": {"parts": [{"name": "a", "pool": "p", "size": "100%"}]}}
    ],
    "sweep": {"hosts.0.ksm.pages_to_scan": [0, 1000, 2000], "vms.web.count": [2, 3]},
}


def test_a_sweep_on_a_cluster_has_the_same_bits_though_a_worker_dies(two: Dask, tmp_path: Path) -> None:
    scenario = sim.parse(SWEPT)
    for point in scenario.points:
        write(sim.run(point.scenario), tmp_path / "here")
    here = run_points(plan(scenario, tmp_path / "here"))

    def kill(done: float, text: str) -> None:
        if text == "1 of 6 points":
            two.kill_one()

    there = run_points(plan(scenario, tmp_path / "there", cluster=two.address), kill)
    again = plan(scenario, tmp_path / "there", cluster="tcp://127.0.0.1:1")

    assert two.alive() == 1
    assert not there.failures and not again.left
    assert (there.folder / TABLE).read_bytes() == (here.folder / TABLE).read_bytes()
    for digest in here.plan.digests:
        one, other = (sim.load(swept.plan.out / "small" / digest) for swept in (here, there))
        pd.testing.assert_frame_equal(one.samples, other.samples, check_exact=True)


def test_a_check_on_a_cluster_finds_what_one_here_finds(two: Dask, tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(dump(SWEPT | {"sweep": {}, "replications": 2, "expect": ["oom_kills == 0", "pages_sharing < 0"]}))

    here = sim.check([file], tmp_path / "here")
    there = sim.check([file], tmp_path / "there", cluster=two.address)

    assert here["state"].tolist() == ["met", "not met"]
    pd.testing.assert_frame_equal(there, here, check_exact=True)


def test_a_worker_without_the_files_of_a_point_says_so(tmp_path: Path) -> None:
    image = tmp_path / "guest.npz"
    np.savez(image, content=np.ones((1, 4), np.uint32), time_s=np.zeros(1))
    guest = {"name": "web", "memory": "16KiB", "image": {"captured": str(image)}}
    scenario = sim.parse({"name": "small", "duration": "1s", "hosts": [{"memory": "256MiB"}], "vms": [guest]})
    digest = scenario.digest(engine())
    np.savez(image, content=np.zeros((1, 4), np.uint32), time_s=np.zeros(1))
    changed = sweeps._find((scenario, digest))
    image.unlink()
    missing = sweeps._find((scenario, digest))

    assert isinstance(changed, sweeps.Failure) and isinstance(missing, sweeps.Failure)
    assert "has not the images and prices of this scenario: some differ" in changed.text
    assert "No such file" in missing.text and "guest.npz" in missing.text
    assert changed.exit_code == missing.exit_code == 2


def test_the_command_says_why_a_cluster_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="Dask is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sim.cluster.PATIENCE_S", 0.5)
    Path("small.yaml").write_text(dump(SWEPT))

    nowhere = CliRunner().invoke(main, ["sweep", "small.yaml", "--cluster", "127.0.0.1:1"])
    both = CliRunner().invoke(main, ["sweep", "small.yaml", "--cluster", "127.0.0.1:1", "--jobs", "2"])
    Path("expects.yaml").write_text(dump(SWEPT | {"expect": ["oom_kills == 0"]}))
    checked = CliRunner().invoke(main, ["check", "expects.yaml", "--cluster", "127.0.0.1:1"])

    assert (nowhere.exit_code, both.exit_code, checked.exit_code) == (2, 2, 2)
    assert "on the cluster at 127.0.0.1:1" in nowhere.stderr
    for each in (nowhere, checked):
        assert "--cluster 127.0.0.1:1: no Dask scheduler can be reached there" in each.stderr
    assert "leave one of them out" in both.stderr


def test_a_worker_with_another_program_is_refused(dask: Dask, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "sim", tmp_path / "sim", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "sim" / "units.py").open("a") as file:
        file.write("# changed\n")
    dask.ensure(2)
    dask.start("stranger", tmp_path)
    try:
        with pytest.raises(UserError) as refused:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                Crew(Hosts, cluster=dask.address).__exit__(None, None, None)
    finally:
        dask.kill("stranger")

    (problem,) = refused.value.problems
    assert problem.path.startswith("worker tcp://127.0.0.1:")
    assert "has another program: source" in problem.message and "numpy" not in problem.message


def test_differences_name_each_version() -> None:
    there = {**build(), "numpy": "1.0", "Python": "3.10.1"}

    assert f"numpy 1.0 there and {np.__version__} here" in differences(there, build())
    assert "Python 3.10.1 there" in differences(there, build())
    assert differences(build(), build()) == ""


@pytest.mark.parametrize(
    "address",
    ["tcp://127.0.0.1:1", "127.0.0.1:1", "tcp://no-such-host.invalid:8786", "tcp://", "http://127.0.0.1:1", "", "x"],
)
def test_an_address_where_nothing_answers_is_one_clear_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="Dask is not installed")
    monkeypatch.setattr("sim.cluster.PATIENCE_S", 0.5)

    with pytest.raises(UserError, match=rf"^--cluster {address}: no Dask scheduler can be reached there \(.*\); give"):
        Crew(Hosts, cluster=address)


def test_without_dask_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)

    with pytest.raises(UserError, match=r"pip install 'overcommit\[cluster\]'"):
        Crew(Hosts, cluster="tcp://127.0.0.1:1")


def test_a_lost_scheduler_ends_the_run(two: Dask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one here: it takes the cluster with it."""
    monkeypatch.setattr("sim.cluster.PATIENCE_S", 1)

    with pytest.raises(MachineError, match="the scheduler is lost"), Crew(Hosts, cluster=two.address) as crew:
        crew.begin(parts_for(1))
        two.kill_scheduler()
        crew.advance([fake_hosts.Told(0, dict.fromkeys(range(HOSTS), 0))])
