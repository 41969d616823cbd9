"""What control groups leave of a machine to a process: as both of their versions tell it, and as this kernel does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torture

from sim.errors import MachineError
from sim.lab.swapping import place
from sim.lab.undo import undo
from sim.limits import available_bytes, processors

ROOT = Path(__file__).parents[1]
MIB = 1 << 20


@pytest.fixture
def process(tmp_path: Path) -> Path:
    """A folder such as /proc/self, and a machine with 1 GiB free."""
    (tmp_path / "meminfo").write_text("MemTotal: 2097152 kB\nMemAvailable: 1048576 kB\nHugePages_Total: 0\n")
    (tmp_path / "cgroup").write_text("")
    (tmp_path / "mountinfo").write_text("")
    return tmp_path


def put(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def left(process: Path) -> int:
    return available_bytes(process, process / "meminfo") // MIB


def test_without_control_groups_there_is_all_that_is_free(process: Path) -> None:
    assert left(process) == 1024
    assert processors(process) == len(os.sched_getaffinity(0))
    (process / "cgroup").unlink()
    assert left(process) == 1024


def test_a_unified_hierarchy_limits_by_each_group_above(process: Path) -> None:
    top = process / "sys fs"
    (process / "cgroup").write_text("0::/a/b\n")
    escaped = str(top).replace(" ", r"\040")
    (process / "mountinfo").write_text(f"30 24 0:26 / {escaped} rw - cgroup2 cgroup2 rw\n")
    put(top)
    put(top / "a", memory__max=str(300 * MIB), memory__current=str(200 * MIB), memory__stat=f"inactive_file {50 * MIB}")
    put(top / "a/b", memory__max="max", memory__current="0", memory__stat="inactive_file 0", cpu__max="50000 100000")

    assert left(process) == 150
    assert processors(process) == 1

    put(top / "a/b", memory__max=str(100 * MIB), memory__current=str(120 * MIB), cpu__max="max 100000")
    assert left(process) == 0
    assert processors(process) == len(os.sched_getaffinity(0))


def test_a_container_of_the_older_kind_sees_its_own_group_only(process: Path) -> None:
    memory, cpu = process / "memory", process / "cpu"
    (process / "cgroup").write_text("4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n")
    (process / "mountinfo").write_text(
        f"31 24 0:27 /docker/abc {memory} ro - cgroup cgroup rw,memory\n"
        f"32 24 0:28 /docker/abc {cpu} ro master:9 - cgroup cgroup rw,cpu,cpuacct\n"
        f"33 24 0:29 /elsewhere {process} ro - cgroup cgroup rw,memory\n"
    )
    put(
        memory,
        memory__limit_in_bytes=str(400 * MIB),
        memory__usage_in_bytes=str(100 * MIB),
        memory__stat=f"inactive_file 0\ntotal_inactive_file {20 * MIB}",
    )
    put(cpu, cpu__cfs_quota_us="150000", cpu__cfs_period_us="100000")

    assert left(process) == 320
    assert processors(process) == min(2, len(os.sched_getaffinity(0)))

    put(cpu, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert processors(process) == len(os.sched_getaffinity(0))


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group for memory, with a limit of 640 MiB, on this kernel."""
    try:
        root, limit, _ = place()
        made = root / f"overcommit-test-{os.getpid()}"
        made.mkdir()
    except (MachineError, OSError) as error:
        pytest.skip(f"limiting memory needs root and a control group for memory: {error}")
    try:
        (made / limit).write_text(str(640 * MIB))
        yield made
    finally:
        undo("cgroup", str(made))


def inside(group: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run Python in a control group."""
    enter = "import os, sys; open(sys.argv[1], 'w').write('0'); os.execv(sys.executable, sys.argv[2:])"
    return subprocess.run(
        [sys.executable, "-c", enter, group / "cgroup.procs", sys.executable, *map(str, command)],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_scenario_too_big_for_the_container_is_refused(group: Path, tmp_path: Path) -> None:
    file = tmp_path / "big.yaml"
    file.write_text("name: big\nhosts: [{memory: 128GiB}]\nvms: [{name: web, count: 30, memory: 4GiB}]\n")

    result = inside(group, "-m", "sim", "run", file, "--out", tmp_path / "out")

    assert result.returncode == 4
    assert "of memory for 31,457,280 guest pages, only" in result.stderr
    assert "MiB can be used here; write scale: " in result.stderr


def test_a_worker_out_of_memory_takes_only_its_own_task_with_it(group: Path) -> None:
    result = inside(group, torture.__file__, "--starve")

    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "0: 1 MiB", "1: its process crashed or was killed, for lack of memory perhaps", "2: 2 MiB"
    ]  # fmt: skip
