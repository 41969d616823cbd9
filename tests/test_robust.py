"""What happens to a run when the user, the machine or the file system gets in its way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sim import estimate, parse, run
from sim.document import dump

ROOT = Path(__file__).parents[1]

STORM = {
    "name": "storm",
    "duration": "1min",
    "hosts": [{"memory": "42MiB", "ksm": {"pages_to_scan": 2000}}],
    "vms": [
        {
            "name": "web",
            "count": 2,
            "memory": "16MiB",
            "image": {"parts": [{"name": "system", "pool": "debian", "size": "100%", "writes": {"rate": "3/min"}}]},
        },
        {"name": "hog", "memory": "16MiB", "start": "3s", "stop": "50s"},
    ],
}
"""Guests share memory, write to it, and lose one of them to lack of memory."""

ENDLESS = STORM | {
    "name": "endless",
    "duration": "100d",
    "sample_every": "100d",
    "hosts": [{"memory": "1GiB", "ksm": {"pages_to_scan": 1}}],
}


def write_scenario(folder: Path, data: dict[str, object]) -> Path:
    file = folder / f"{data['name']}.yaml"
    file.write_text(dump(data))
    return file


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "sim", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def overcommit(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), check=False, env=environment(**more), capture_output=True, text=True, timeout=300
    )


def tables(folder: str | Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(folder).glob("*.parquet"))}


def started(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def storm(tmp_path: Path) -> Path:
    return write_scenario(tmp_path, STORM)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Compile what a run needs, so that no test waits for it."""
    run(parse(STORM))


def test_ctrl_c_ends_a_long_run_at_once_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    file = write_scenario(tmp_path, ENDLESS)

    with started("run", file, "--out", tmp_path / "out", "-v") as process:
        assert process.stderr is not None
        while "CPU time needed" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        stdout, stderr = process.communicate(timeout=60)

    assert (process.returncode, stdout, stderr) == (130, "", "interrupted; nothing was kept\n")
    assert time.monotonic() - began < 10
    assert not (tmp_path / "out").exists()


def test_a_killed_run_leaves_no_result_and_the_next_run_is_not_disturbed(storm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    undisturbed = overcommit("run", storm, "--out", tmp_path / "other", "--no-report", "-q").stdout.strip()
    for delay in (0.5, 1.0, 1.5, 2.0, 2.5):
        with started("run", storm, "--out", out) as process:
            time.sleep(delay)
            process.kill()

    folder = overcommit("run", storm, "--out", out, "--no-report", "-q").stdout.strip()

    assert tables(folder) == tables(undisturbed)
    assert [each.name for each in (out / "storm").iterdir() if each.name.startswith((".new-", ".old-"))] == []


def test_a_run_killed_while_it_writes_is_cleaned_up_by_the_next(storm: Path, tmp_path: Path) -> None:
    folder = Path(overcommit("run", storm, "--out", tmp_path, "--no-report", "-q").stdout.strip())
    before = tables(folder)
    half = folder.with_name(".new-abandoned")
    half.mkdir()
    (half / "samples.parquet").write_bytes(b"half")
    folder.rename(folder.with_name(f".old-{folder.name}"))

    assert overcommit("run", storm, "--out", tmp_path, "--no-report").returncode == 0
    assert tables(folder) == before
    assert sorted(each.name for each in folder.parent.iterdir()) == [".lock", folder.name]


def test_the_same_scenario_gives_the_same_bytes_whatever_the_hash_seed(storm: Path, tmp_path: Path) -> None:
    folders = [
        overcommit("run", storm, "--out", tmp_path / seed, "--no-report", "-q", PYTHONHASHSEED=seed).stdout.strip()
        for seed in ("0", "1")
    ]

    assert len(tables(folders[0])) == 4
    assert tables(folders[0]) == tables(folders[1])


@pytest.mark.parametrize("sample_every", ["70ms", "7s", "1min"])
def test_looking_more_often_changes_nothing_but_the_samples(sample_every: str) -> None:
    usual, other = run(parse(STORM)), run(parse(STORM | {"sample_every": sample_every}))

    assert usual.summary["oom_kills"] == 1
    for table in ("scans", "guests", "events"):
        assert getattr(other, table).equals(getattr(usual, table)), table


def test_guests_killed_for_lack_of_memory_end_at_the_moment_of_their_write() -> None:
    result = run(parse(STORM | {"sample_every": "1min"}))

    [killed] = result.guests[result.guests["end"] == "oom-killed"].to_dict("records")
    assert list(result.events["time_s"]) == [killed["stop_s"]]
    assert 3 < killed["stop_s"] < 50


def test_a_results_folder_that_is_a_file_is_refused_before_the_run(storm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("")

    result = overcommit("run", storm, "--out", out)

    assert (result.returncode, result.stderr) == (2, f"{out}: not a folder; choose another --out\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_results_folder_of_another_user_is_refused_before_the_run(storm: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, str(storm), str(tmp_path / "out")],
        check=False, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert result.returncode == 2
    assert result.stderr.endswith(": not writable; choose another --out\n")


# The program is imported as root, for it may lie where nobody else can read it.
_AS_NOBODY = """
import os, pwd, sys
import sim.cli, sim.processes, sim.results, sim.run, sim.scenario
scenario = sim.scenario.load(sys.argv[1])
sim.scenario.load = lambda *arguments: scenario
os.setuid(pwd.getpwnam("nobody").pw_uid)
sim.cli.main(["run", sys.argv[1], "--out", sys.argv[2]])
"""


def test_a_full_disk_leaves_with_4_and_no_half_result(storm: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - (16 << 10)))

    result = overcommit("run", storm, "--out", small_disk, "--no-report")

    assert result.returncode == 4
    assert "No space left on device; free some space or choose another --out" in result.stderr
    assert [each.name for each in (small_disk / "storm").iterdir()] == [".lock"]


def test_a_disk_that_cannot_be_written_is_refused_before_the_run(storm: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

    result = overcommit("run", storm, "--out", small_disk)

    assert (result.returncode, result.stderr) == (2, f"{small_disk}: not writable; choose another --out\n")


def test_a_scenario_too_big_for_this_machine_is_refused_at_once(tmp_path: Path) -> None:
    vm = {"name": "web", "count": 1000, "memory": "2GiB"}
    huge = {"name": "huge", "hosts": [{"count": 100, "memory": "1GiB"}], "vms": [vm], "sample_every": "60us"}
    began = time.monotonic()

    result = overcommit("run", write_scenario(tmp_path, huge), "--out", tmp_path / "out")

    assert result.returncode == 4
    assert "of memory for 524,288,000 guest pages, only" in result.stderr
    assert time.monotonic() - began < 20
    assert not (tmp_path / "out").exists()


def test_more_guests_than_page_numbers_are_refused_whatever_the_machine_has(tmp_path: Path) -> None:
    huge = {"name": "huge", "hosts": [{"memory": "1GiB"}], "vms": [{"name": "web", "count": 9000, "memory": "1GiB"}]}

    result = overcommit("run", write_scenario(tmp_path, huge), "--out", tmp_path / "out")

    assert result.returncode == 2
    assert (
        result.stderr
        == "huge: a host would hold 8.79TiB of guests, more than 4TiB; write scale: 4, or spread them over more hosts\n"
    )


@pytest.mark.parametrize("verb", ["explain", "list", "schema"])
def test_a_reader_that_goes_away_is_not_told_so(verb: str, storm: Path) -> None:
    with started(verb, *([storm] if verb == "explain" else [])) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        complaint = process.stderr.read()

    assert (process.returncode, complaint) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("call", ["--help", "run --help", "--version", "list --json", "validate no.yaml --json"])
def test_what_cannot_be_printed_is_said_where_it_can(call: str) -> None:
    command = [sys.executable, "-m", "sim", *call.split()]

    with open("/dev/full", "w") as full:
        told = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        untold = subprocess.run(command, cwd=ROOT, stdout=full, stderr=full, check=False)

    assert told.returncode == 4
    assert told.stderr.splitlines()[-1] == "standard output: No space left on device"
    assert untold.returncode == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_result_that_cannot_be_printed_is_kept_and_said_to_be(storm: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sim", "run", storm, "--out", tmp_path, "--no-report"]

    with open("/dev/full", "w") as full:
        result = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    (mark,) = tmp_path.rglob("_SUCCESS")
    assert result.returncode == 4
    assert result.stderr.endswith(
        f"standard output: No space left on device\nthe result in {mark.parent} is complete\n"
    )


def test_nowhere_to_print_is_no_failure() -> None:
    result = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m sim list >&-"], cwd=ROOT, stderr=subprocess.PIPE, check=False
    )

    assert (result.returncode, result.stderr) == (0, b"")


SIZES = {
    "small": STORM,
    "written": STORM
    | {
        "duration": "5min",
        "hosts": [{"memory": "4GiB", "ksm": {"pages_to_scan": 2000}}],
        "vms": [
            {
                "name": "web",
                "count": 4,
                "memory": "256MiB",
                "image": {"parts": [{"name": "data", "size": "100%", "writes": {"rate": "1/min"}}]},
            }
        ],
    },
    "large": STORM | {"hosts": [{"memory": "64GiB"}], "vms": [{"name": "web", "count": 12, "memory": "2GiB"}]},
    "long": STORM | {"duration": "1h", "hosts": [{"memory": "1GiB"}], "sample_every": "200ms"},
}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_estimate_of_memory_is_within_a_factor_of_two_and_that_of_time_within_four(
    size: str, tmp_path: Path
) -> None:
    """Processors differ more than memory does, and this one may be busy."""
    need = estimate(parse(SIZES[size]))
    file = write_scenario(tmp_path, SIZES[size])
    folder = Path(overcommit("run", file, "--out", tmp_path / "out", "--no-report", "-q").stdout.strip())
    took = json.loads((folder / "manifest.json").read_text())

    assert took["peak_bytes"] / 2 < need.memory_bytes < 2 * took["peak_bytes"]
    assert took["cpu_s"] / 4 < need.cpu_seconds < 4 * (took["cpu_s"] + 1)
