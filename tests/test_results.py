import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import finished
import pandas as pd
import pyarrow.parquet as pq
import pytest
from pandas.testing import assert_frame_equal

from sim import results
from sim.columns import METRICS, PAGE_BYTES, SAMPLES
from sim.errors import MachineError, UserError
from sim.results import store
from sim.results.tables import TABLES

FILES = {f"{table}.parquet" for table in TABLES} | {"scenario.yaml", "manifest.json", "summary.json", "_SUCCESS"}


@pytest.fixture
def run():
    return finished.result(seconds=200)


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def samples(*rows):
    """Return samples with the given figures, 0 elsewhere; a row without a host is of host `h`."""
    blank = {column.name: 0 for column in SAMPLES} | {"host": "h", "hosts": 1}
    return results.frame("samples", [blank | row for row in rows])


def summarise(samples, scans):
    """Return the metrics of a run without guests."""
    return results.summarise(samples, scans, results.frame("guests", []))


# --- summary ---


def test_the_summary_has_every_metric_in_the_order_of_its_definition(run):
    assert list(run.summary) == [metric.name for metric in METRICS]


def test_a_run_without_samples_has_no_data():
    assert set(summarise(samples(), samples()).values()) == {None}


def test_the_consolidation_ratio_is_that_of_the_last_sample_with_a_running_guest():
    table = samples(
        {"time_s": 0, "guests_running": 2, "mem_promised_bytes": 80, "mem_used_bytes": 80, "saved_bytes": 3},
        {"time_s": 1, "guests_running": 1, "mem_promised_bytes": 40, "mem_used_bytes": 10, "saved_bytes": 7},
        {"time_s": 2},
    )
    summary = summarise(table, samples())

    assert summary["consolidation_ratio"] == 4.0
    assert summary["saved_bytes"] == 7
    assert summary["mem_used_bytes"] == 10
    assert summary["guests_running"] == 0


def test_hosts_are_summed_before_the_ratio_is_taken():
    table = samples(
        {"host": "a", "guests_running": 1, "mem_promised_bytes": 90, "mem_used_bytes": 10},
        {"host": "b", "guests_running": 1, "mem_promised_bytes": 10, "mem_used_bytes": 10},
    )

    assert summarise(table, samples())["consolidation_ratio"] == 5.0


def test_the_mean_ratio_weighs_each_sample_by_the_time_to_the_next():
    table = samples(
        {"time_s": 0, "guests_running": 1, "mem_promised_bytes": 10, "mem_used_bytes": 10},
        {"time_s": 9, "guests_running": 1, "mem_promised_bytes": 20, "mem_used_bytes": 10},
        {"time_s": 10, "guests_running": 1, "mem_promised_bytes": 90, "mem_used_bytes": 10},
    )

    assert summarise(table, samples())["consolidation_ratio_mean"] == pytest.approx(1.1)


def test_nothing_in_use_gives_no_ratio():
    summary = summarise(samples({"guests_running": 1, "mem_promised_bytes": 10}), samples())

    assert summary["consolidation_ratio"] is None
    assert summary["consolidation_ratio_mean"] is None


def test_cpu_overhead_is_the_sum_of_its_parts_over_all_cores():
    second = 10**9
    spent = {"scan_cpu_ns": second, "merge_cpu_ns": 2 * second, "ksmd_cpu_ns": 3 * second, "cow_cpu_ns": second}
    summary = summarise(samples({"time_s": 10, "cores": 4, "tlb_cpu_ns": 4 * second} | spent), samples())

    assert summary["cpu_overhead_percent"] == pytest.approx(20.0)
    parts = [summary[f"cpu_{part}_percent"] for part in ("scan", "merge", "cow", "tlb")]
    assert parts == pytest.approx([2.5, 5.0, 2.5, 10.0])
    assert summary["ksmd_cpu_percent"] == pytest.approx(30.0)


def test_speeds_compare_the_time_that_guests_took_with_what_they_might_have_taken():
    spent = {"work_cpu_ns": 700, "walk_cpu_ns": 300, "native_walk_cpu_ns": 100, "tlb_cpu_ns": 200, "llc_saved_ns": 250}
    summary = summarise(samples({"time_s": 10, "cores": 4} | spent), samples())

    assert summary["tlb_slowdown_percent"] == pytest.approx(25.0)
    assert summary["native_speed_percent"] == pytest.approx(80.0)
    assert summary["llc_gain_percent"] == pytest.approx(100 * 250 / 750)


def test_cpu_shares_have_no_data_at_time_zero():
    assert summarise(samples({"time_s": 0, "cores": 4}), samples())["cpu_overhead_percent"] is None


def test_scan_time_is_the_mean_of_the_last_nine_scans_the_cycle_of_smart_scan():
    ends = samples(*({"time_s": at} for at in (50, 150, 160, 171, 171.5, 172, 190, 200, 210, 220, 240)))

    assert summarise(samples(), ends)["scan_time_s"] == pytest.approx(10.0)


def test_one_full_scan_gives_no_scan_time():
    assert summarise(samples(), samples({"time_s": 50}))["scan_time_s"] is None


def test_the_cpu_of_the_last_scans_leaves_out_what_was_before():
    ends = samples({"time_s": 10, "ksmd_cpu_ns": 9 * 10**9}, {"time_s": 20, "ksmd_cpu_ns": 10 * 10**9})

    assert summarise(samples(), ends)["ksmd_cpu_percent_settled"] == pytest.approx(10.0)


def test_the_time_to_90_percent_is_the_first_sample_that_has_them():
    table = samples(*({"time_s": at, "guests_running": 1, "saved_bytes": at * 10} for at in range(11)))

    assert summarise(table, samples())["time_to_90_percent_s"] == 9.0


def test_nothing_saved_gives_no_time_to_90_percent():
    assert summarise(samples({"guests_running": 1}), samples())["time_to_90_percent_s"] is None


def test_counters_are_summed_over_hosts_at_the_last_sample():
    rows = [{"time_s": at, "host": host, "pages_sharing": at + 1} for at in (0, 1) for host in "ab"]

    assert summarise(samples(*rows), samples())["pages_sharing"] == 4


def test_free_memory_is_that_of_the_tightest_host_and_moment():
    rows = [
        {"time_s": at, "host": host, "mem_free_bytes": free}
        for at, host, free in [(0, "a", 9), (0, "b", 3), (1, "a", 5)]
    ]

    assert summarise(samples(*rows), samples())["mem_free_min_bytes"] == 3


def test_ksm_savings_are_counted_in_whole_pages():
    summary = summarise(samples({"guests_running": 1, "pages_sharing": 5, "ksm_zero_pages": 2}), samples())

    assert summary["saved_ksm_bytes"] == 7 * PAGE_BYTES


# --- files ---


def test_a_written_run_is_loaded_as_it_was(run, tmp_path):
    loaded = results.load(results.write(run, tmp_path))

    for table in TABLES:
        assert_frame_equal(getattr(loaded, table), getattr(run, table))
    assert loaded.summary == run.summary
    assert loaded.manifest == run.manifest
    assert loaded.scenario == run.scenario.resolved()


def test_a_run_lands_whole_in_its_scenario_and_digest(run, tmp_path):
    folder = results.write(run, tmp_path / "new" / "results")

    assert folder == tmp_path / "new" / "results" / "web-tier" / "0123456789abcdef"
    assert set(visible(folder)) == FILES
    assert visible(folder.parent) == [folder.name]


def test_equal_frames_give_equal_bytes(run, tmp_path):
    first, second = results.write(run, tmp_path / "a"), results.write(finished.result(seconds=200), tmp_path / "b")

    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_column_carries_its_unit_meaning_and_kernel_name(run, tmp_path):
    schema = pq.read_schema(results.write(run, tmp_path) / "samples.parquet")

    assert schema.names == [column.name for column in SAMPLES]
    assert schema.field("pages_sharing").metadata[b"kernel"] == b"/sys/kernel/mm/ksm/pages_sharing"
    assert schema.field("pages_sharing").metadata[b"unit"] == b"pages"


def test_an_empty_table_keeps_its_columns_and_types(run, tmp_path):
    empty = dataclasses.replace(run, events=results.frame("events", []))
    loaded = results.load(results.write(empty, tmp_path))

    assert_frame_equal(loaded.events, empty.events)


def test_a_frame_with_an_unknown_column_is_a_bug(run, tmp_path):
    odd = dataclasses.replace(run, events=run.events.assign(colour="red"))

    with pytest.raises(ValueError, match="colour"):
        results.write(odd, tmp_path)
    assert visible(tmp_path / "web-tier") == []


def test_the_same_digest_replaces_the_run_and_its_report(run, tmp_path):
    folder = results.write(run, tmp_path)
    (folder / "report.html").write_text("of the first run")
    again = dataclasses.replace(run, manifest={**run.manifest, "seed": 2})

    assert results.write(again, tmp_path) == folder
    assert set(visible(folder)) == FILES
    assert results.load(folder).manifest["seed"] == 2
    assert visible(folder.parent) == [folder.name]


def fail_at(monkeypatch, error):
    def refuse(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(store, "_write_json", refuse)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), MachineError),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), MachineError),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failed_write_keeps_the_old_run_and_leaves_nothing_of_the_new(run, tmp_path, monkeypatch, error, expected):
    folder = results.write(run, tmp_path)
    fail_at(monkeypatch, error)

    with pytest.raises(expected):
        results.write(dataclasses.replace(run, manifest={**run.manifest, "seed": 2}), tmp_path)
    assert visible(folder.parent) == [folder.name]
    assert results.load(folder).manifest["seed"] == 1


def test_an_interrupt_between_the_two_renames_puts_the_old_run_back(run, tmp_path, monkeypatch):
    folder = results.write(run, tmp_path)
    rename = Path.rename

    def interrupted(self, target):
        if self.name.startswith(".new-"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results.write(run, tmp_path)
    assert visible(folder.parent) == [folder.name]
    assert results.load(folder).manifest == run.manifest


def test_a_full_disk_is_told_with_its_place_and_a_remedy(run, tmp_path, monkeypatch):
    fail_at(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    with pytest.raises(MachineError, match=r"web-tier.*No space left on device; free some space"):
        results.write(run, tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_within_a_table_is_told_so(run, tmp_path, monkeypatch):
    full = tmp_path / "full"  # a link, because pyarrow removes the file it could not write
    full.symlink_to("/dev/full")
    write_table = pq.write_table
    monkeypatch.setattr(pq, "write_table", lambda table, path, **options: write_table(table, full, **options))

    with pytest.raises(MachineError, match="free some space"):
        results.write(run, tmp_path / "out")


@pytest.mark.parametrize("blocked", ["out", "out/web-tier", "out/web-tier/0123456789abcdef"])
def test_a_file_in_the_way_is_told_in_one_sentence_and_kept(run, tmp_path, blocked):
    way = tmp_path / blocked
    way.parent.mkdir(parents=True, exist_ok=True)
    way.write_text("mine")

    with pytest.raises(UserError, match="cannot be written") as raised:
        results.write(run, tmp_path / "out")
    assert len(raised.value.problems) == 1
    assert way.read_text() == "mine"


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "..", ""])
def test_a_scenario_name_cannot_lead_out_of_the_folder(run, tmp_path, name):
    with pytest.raises(UserError, match="cannot be a folder name"):
        results.write(dataclasses.replace(run, scenario=finished.Scenario(name)), tmp_path)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
import finished
from sim import results
from sim.results import store
store._write_json = lambda *_: (print("writing", flush=True), time.sleep(60))
results.write(finished.result(seconds=10), Path(sys.argv[1]))
"""


def test_the_next_write_cleans_up_after_a_killed_one(run, tmp_path):
    path = os.pathsep.join(str(folder) for folder in (Path(__file__).parent, Path(__file__).parents[1]))
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    with writer:
        assert writer.stdout.readline() == b"writing\n"
        writer.send_signal(signal.SIGKILL)
    left = visible(tmp_path / "web-tier")
    folder = results.write(run, tmp_path)

    assert len(left) == 1
    assert left[0].startswith(".new-")
    assert visible(folder.parent) == [folder.name]


def test_a_run_killed_between_the_two_renames_is_put_back_by_the_next_write(run, tmp_path):
    folder = results.write(run, tmp_path)
    folder.rename(folder.with_name(f".old-{folder.name}"))
    other = dataclasses.replace(run, manifest={**run.manifest, "digest": "fedcba9876543210"})
    results.write(other, tmp_path)

    assert visible(folder.parent) == ["0123456789abcdef", "fedcba9876543210"]
    assert results.load(folder).manifest == run.manifest


# --- loading ---


def test_a_scenario_folder_loads_its_newest_run(run, tmp_path):
    old = results.write(run, tmp_path)
    results.write(dataclasses.replace(run, manifest={"digest": "aaaa"}), tmp_path)
    os.utime(old / "_SUCCESS", (time.time() - 60, time.time() - 60))

    assert results.load(tmp_path / "web-tier").manifest["digest"] == "aaaa"


def broken(folder, how):
    if how == "incomplete":
        (folder / "_SUCCESS").unlink()
    elif how == "cut":
        (folder / "samples.parquet").write_bytes((folder / "samples.parquet").read_bytes()[:100])
    elif how == "absent":
        (folder / "guests.parquet").unlink()
    else:
        (folder / "summary.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("incomplete", "not complete"),
        ("cut", "missing or damaged"),
        ("absent", "missing or damaged"),
        ("no json", "missing or damaged"),
    ],
)
def test_a_damaged_run_is_refused(run, tmp_path, how, message):
    with pytest.raises(UserError, match=message):
        results.load(broken(results.write(run, tmp_path), how))


def test_a_wrong_path_names_the_nearest_folder(run, tmp_path):
    results.write(run, tmp_path)

    with pytest.raises(UserError, match="did you mean web-tier"):
        results.load(tmp_path / "web-tear")


def test_a_folder_of_scenarios_says_which_it_holds(run, tmp_path):
    results.write(run, tmp_path)

    with pytest.raises(UserError, match="look in web-tier"):
        results.load(tmp_path)


def test_a_folder_whose_only_run_is_unfinished_holds_no_run(run, tmp_path):
    folder = broken(results.write(run, tmp_path), "incomplete")
    shutil.move(folder, folder.with_name(".new-abc"))

    with pytest.raises(UserError, match="no complete run"):
        results.load(folder.parent)


def test_the_summary_on_disk_is_flat_json(run, tmp_path):
    summary = json.loads((results.write(run, tmp_path) / "summary.json").read_text())

    assert summary == run.summary
    assert {type(value) for value in run.summary.values() if value is not None} == {int, float}


def test_a_frame_has_the_types_of_its_columns_when_there_are_no_rows():
    empty = results.frame("samples", [])

    assert empty["pages_shared"].dtype == "int64"
    assert empty["host"].dtype == pd.Series(["h"]).dtype
