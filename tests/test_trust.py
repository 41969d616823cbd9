"""A sweep is there whole or not at all, whatever goes wrong; tests/torture.py does the same at length."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torture

from sim import files
from sim.errors import UserError
from sim.results import Result
from sim.scenario import Scenario
from sim.study import plan, run_points, sweeps


def test_operations_that_fail_leave_nothing_half_published_and_lose_nothing(tmp_path: Path) -> None:
    failed = torture.fail_each(tmp_path, torture.sweeping(1), every=9)

    assert failed.total() >= 6
    assert {"open", "fsync"} <= failed.keys()


def test_what_replaces_a_result_leaves_the_old_one_if_it_fails(tmp_path: Path) -> None:
    failed = torture.fail_each(tmp_path, torture.sweeping(1), every=14, code=errno.ENOSPC, again=True)

    assert failed.total() >= 4


def test_a_run_that_cannot_write_its_report_has_kept_its_result(tmp_path: Path) -> None:
    failed = torture.fail_each(tmp_path, torture.calling(torture.alone(), "run"), every=23, resumes=False)

    assert failed.total() >= 4


def test_a_check_that_cannot_write_what_it_found_computes_nothing_twice(tmp_path: Path) -> None:
    failed = torture.fail_each(tmp_path, torture.calling(torture.alone(), "check", *torture.CHECK), every=9)

    assert failed.total() >= 6


def test_a_file_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    files.publish(file, b"old")
    for at in range(1, 20):
        with torture.failing(tmp_path, at, errno.EIO) as done:
            try:
                files.publish(file, b"new" * 1000)
            except OSError:
                # Only what comes after the exchange may leave the new one.
                assert file.read_bytes() == (b"new" * 1000 if "replace" in done[: at - 1] else b"old")
            else:
                break
        assert torture.leftovers(tmp_path) == []
        files.publish(file, b"old")

    assert at > 5
    assert file.read_bytes() == b"new" * 1000


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(1)
    monkeypatch.setattr("time.time", lambda: dice.uniform(0.0, 4e9))
    monkeypatch.setattr("time.time_ns", lambda: dice.randrange(4 * 10**18))
    scenario = torture.asked(3)
    torture.inline(scenario, tmp_path / "at once", {})
    torture.inline(torture.asked(2), tmp_path / "in parts", {})
    for file in (tmp_path / "in parts").rglob("*"):
        os.utime(file, (dice.uniform(0.0, 4e9), dice.uniform(0.0, 4e9)))

    todo = plan(scenario, tmp_path / "in parts", 1)
    torture.inline(scenario, tmp_path / "in parts", {})

    assert len(todo.left) == 1
    assert torture.bits(todo.folder) == torture.bits(plan(scenario, tmp_path / "at once", 1).folder)
    for mark in (tmp_path / "in parts").rglob("_SUCCESS"):
        assert torture.bits(mark.parent) == torture.bits(
            tmp_path / "at once" / mark.parent.relative_to(tmp_path / "in parts")
        )


def test_two_sweeps_into_one_folder_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, known = torture.asked(6), {}
    torture.inline(scenario, tmp_path / "alone", known)
    monkeypatch.setattr(sweeps, "simulate", lambda point: known[point.digest("")])
    monkeypatch.setattr(sweeps, "run_all", lambda do, tasks, jobs: enumerate(map(do, tasks)))
    todo = [plan(scenario, tmp_path / "together", 1) for _ in range(2)]

    with ThreadPoolExecutor() as both:
        ended = list(both.map(run_points, todo))

    assert [swept.failures for swept in ended] == [{}, {}]
    assert torture.bits(tmp_path / "together") == torture.bits(tmp_path / "alone")
    assert torture.leftovers(tmp_path / "together") == []


def free(disk: Path) -> int:
    """Bytes that a disk has room for."""
    told = os.statvfs(disk)
    return told.f_bavail * told.f_bsize


def test_a_full_disk_keeps_what_there_was_room_for_and_goes_on_when_there_is_more(small_disk: Path) -> None:
    scenario, known = torture.asked(4), {}
    before = free(small_disk)
    torture.inline(torture.asked(1), small_disk, known)
    one = before - free(small_disk)
    (small_disk / "ballast").write_bytes(bytes(free(small_disk) - one // 2))

    failures = torture.inline(scenario, small_disk, known).failures

    assert [failure.exit_code for failure in failures.values()] == [4, 4, 4]
    assert all("No space left" in failure.text for failure in failures.values())
    published = list(small_disk.rglob("_SUCCESS"))
    assert len(published) == 1
    assert torture.leftovers(small_disk) == []
    (small_disk / "ballast").unlink()
    assert len(plan(scenario, small_disk, 1).left) == 3
    assert not torture.inline(scenario, small_disk, known).failures


def test_a_disk_that_cannot_be_written_is_told(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

    with pytest.raises(UserError, match="Read-only file system; choose another --out"):
        torture.inline(torture.asked(1), small_disk, {})


def test_a_bug_in_a_point_is_noted_with_its_trace_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sweeps.simulate

    def faulty(point: object) -> object:
        if point.hosts[0].ksm.pages_to_scan == 2:  # type: ignore[attr-defined]
            raise RuntimeError("what nobody thought of")
        return real(point)  # type: ignore[arg-type]

    monkeypatch.setattr(sweeps, "simulate", faulty)
    monkeypatch.setattr(sweeps, "run_all", lambda do, tasks, jobs: enumerate(map(do, tasks)))

    swept = run_points(plan(torture.asked(3), tmp_path, 1))

    assert [bool(error) for error in swept.table["error"]] == [False, True, False]
    assert "what nobody thought of" in (swept.folder / "errors.txt").read_text()
    assert "Traceback" in (swept.folder / "errors.txt").read_text()


@pytest.mark.slow
def test_a_sweep_survives_being_killed_at_random_moments(tmp_path: Path) -> None:
    told = torture.kill_often(tmp_path, kills=4, points=6)

    assert told["main killed"] + told["worker killed"] == 4


def test_what_is_behind_a_link_is_written_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")

    files.publish(tmp_path / "link", b"told")

    assert (tmp_path / "target").read_bytes() == b"told"
    assert (tmp_path / "link").is_symlink()


def test_what_a_killed_program_left_half_written_is_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "table") as new:
        new.write_bytes(b"half")
        kept = new.with_name(new.name.replace("table", "other"))
        kept.write_bytes(b"half")
        raise KeyboardInterrupt

    files.heal(tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_a_point_without_memory_is_a_failed_point_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = sweeps.simulate

    def simulate(scenario: Scenario) -> Result:
        if scenario.hosts[0].ksm is not None and scenario.hosts[0].ksm.pages_to_scan == 2:
            raise MemoryError
        return done(scenario)

    monkeypatch.setattr(sweeps, "simulate", simulate)
    monkeypatch.setattr(sweeps, "run_all", lambda do, tasks, jobs: enumerate(map(do, tasks)))

    swept = run_points(plan(torture.asked(3), tmp_path, 1))

    assert [(each.exit_code, each.text) for each in swept.failures.values()] == [(4, "not enough memory")]
    assert len(list(tmp_path.rglob("_SUCCESS"))) == 2
