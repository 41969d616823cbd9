"""Recorded traces become guests that arrive: nothing lost, nothing invented, every bad row counted."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from traces import make

import sim
from sim.cli import main
from sim.columns import PAGE_BYTES
from sim.datacenter.messages import NEVER, Newcomer
from sim.datacenter.traces import Reading, Rows, Trace, format_of, newcomers, nodes, openb, percent
from sim.datacenter.traces.rows import LONGEST_LINE
from sim.document import Document
from sim.errors import MachineError, UserError
from sim.units import DAY, GIB, HOUR, MIB, MINUTE, SECOND

REAL = Path(os.environ.get("OVERCOMMIT_TRACES", "none"))
"""Folder of real traces, which are not part of the project: alibaba, planetlab/20110303, gcd, bitbrains-small."""
MACHINE = {"memory": "512GiB", "cores": 64}
FORMATS = ("openb", "planetlab", "google", "bitbrains", "azure")


def block(path: Path, form: str, **options: object) -> Trace:
    """The block of a trace as a scenario would hold it."""
    needed = {"machine": MACHINE} if form == "azure" else {}
    given = {"path": str(path), "format": form, "kinds": ["web"], **needed, **options}
    return Document("scenario.yaml", given).check(Trace, folder="")


def read(path: Path, form: str, **options: object) -> list[Newcomer]:
    return list(newcomers(block(path, form, **options)))


def pods(folder: Path, *rows: str) -> Path:
    """A folder of openb with these rows of cpu_milli, memory_mib, creation, deletion and scheduled time."""
    fields = (row.split(",", 2) for row in rows)
    lines = (f"pod,{cpu},{memory},0,0,,LS,Running,{times}" for cpu, memory, times in fields)
    return make.write_openb(folder, lines, {(4000, 8192): 2, (2000, 4096): 1})


def sample(folder: Path, form: str) -> Path:
    """A small trace of any format."""
    match form:
        case "openb":
            return make.write_openb(folder / "openb", make.pods(1, 50, 3600), {(4000, 8192): 3})
        case "planetlab":
            return make.write_planetlab(folder / "planetlab", 3, 12)
        case "google":
            return make.write_google(folder / "google.tar.gz", make.google_files(3, 12))
        case "google-tar":
            packed = make.write_google(folder / "google.tar.gz", make.google_files(3, 12))
            packed.write_bytes(gzip.decompress(packed.read_bytes()))
            return packed
        case "bitbrains":
            return make.write_bitbrains(folder / "bitbrains", 3, 12)
        case _:
            return make.write_azure(folder / "azure.sqlite", make.azure_rows(50))


# --- what each format says ----------------------------------------------------------------------------------------


def test_pods_of_openb(tmp_path: Path) -> None:
    folder = pods(tmp_path, "2500,1000,10,400,30", "12000,16384,5,65,", "1000,1,5,7,5")
    first, second, third = read(folder, "openb", kinds=["web", "db"], vcpus_per_core=2.0)
    # In order of arrival; a pod runs from when it was scheduled, and one that never was asks for what it waited.
    assert first == Newcomer("openb-0", "web", 5 * SECOND, 60 * SECOND, 16384 * MIB, 24)
    assert second == Newcomer("openb-1", "db", 5 * SECOND, 2 * SECOND, MIB, 2)
    assert third == Newcomer("openb-2", "web", 10 * SECOND, 370 * SECOND, 1000 * MIB, 5)


def test_nodes_of_openb_are_counted_by_size(tmp_path: Path) -> None:
    trace, rows = block(pods(tmp_path, "1000,1,0,1,0"), "openb"), Rows()
    assert [kind.host() for kind in nodes(trace, rows)] == [
        {"name": "2c-4GiB", "count": 1, "memory": "4GiB", "cores": 2},
        {"name": "4c-8GiB", "count": 2, "memory": "8GiB", "cores": 4},
    ]
    with (tmp_path / openb.NODES).open("a") as file:
        file.write("node,500,4096,0,\n")
    assert len(nodes(trace, rows := Rows())) == 2
    assert rows.left_out["less than a core"].count == 1


def test_guests_of_planetlab(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("0\n50\n100\n25")
    (tmp_path / "a").write_text("7\r\n")
    first, second = read(tmp_path, "planetlab", name="day")
    assert first == Newcomer("day-0", "web", 0, NEVER, None, None, (0.07,), 5 * MINUTE)
    assert second.levels == (0.0, 0.5, 1.0, 0.25)
    _, coarse = read(tmp_path, "planetlab", every="15min")
    assert coarse.every == 15 * MINUTE
    assert coarse.levels == pytest.approx((0.5, 0.25))


def test_guests_of_google_are_the_same_packed_and_unpacked(tmp_path: Path) -> None:
    files = dict(make.google_files(5, 12))
    for name, content in files.items():
        (tmp_path / "unpacked" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "unpacked" / name).write_bytes(content)
    packed = make.write_google(tmp_path / "a.tar.gz", reversed(files.items()))
    (tmp_path / "a.tar").write_bytes(gzip.decompress(packed.read_bytes()))
    for options in ({}, {"machine": MACHINE, "every": "10min"}):
        expected = read(tmp_path / "unpacked", "google", **options)
        assert read(packed, "google", **options) == expected
        assert read(tmp_path / "a.tar", "google", **options) == expected
        assert len(expected) == 5


def test_google_percentages_of_a_machine(tmp_path: Path) -> None:
    (tmp_path / "vm").write_text("10 12.5\n30.0 25\n20 150\n")
    reading = Reading(block(tmp_path, "google", machine={"memory": "64GiB", "cores": 8}))
    (guest,) = reading.newcomers()
    assert (guest.memory, guest.vcpus) == (64 * GIB, 3)
    assert guest.levels == pytest.approx((0.8 / 3, 2.4 / 3, 1.6 / 3))
    assert reading.rows.mended["memory use is above 100 %, taken as 100 %"].count == 1
    (plain,) = read(tmp_path, "google")
    assert (plain.memory, plain.vcpus, plain.levels) == (None, None, (0.1, 0.3, 0.2))


@pytest.mark.parametrize("later", [False, True], ids=["meta-and-trace", "tasks-and-fragments"])
def test_guests_of_bitbrains(tmp_path: Path, later: bool) -> None:
    guests = read(make.write_bitbrains(tmp_path, 4, 24, later=later), "bitbrains")
    assert [(guest.time, guest.vcpus, guest.memory) for guest in guests] == [
        (0, 1, 2 * GIB), (0, 4, 8 * GIB), (HOUR, 2, 4 * GIB), (HOUR, 8, 16 * GIB),
    ]  # fmt: skip
    assert all(guest.lifetime == 2 * HOUR and guest.every == 5 * MINUTE for guest in guests)
    for guest, name in zip(guests, ("1000", "1002", "1001", "1003"), strict=True):
        assert guest.levels == pytest.approx(make.day(1, name, 24) / 100)


def test_guests_of_azure(tmp_path: Path) -> None:
    rows = [(0, 0, 1, 0, 1.5, 2.0), (1, 0, 2, 0, -3.0, 1.0), (2, 0, 0, 1, -1.0, None), (3, 0, 0, 0, -2.0, -1.0)]
    file = make.write_azure(tmp_path / "zone.sqlite", rows)
    there, gone, late = read(file, "azure")
    # Who was there already arrives at once, for the rest of its life; who had left before is not there.
    assert there == Newcomer("azure-0", "web", 0, DAY, 24 * GIB, 6)
    assert gone == Newcomer("azure-2", "web", 0, NEVER, 8 * GIB, 2)
    assert late == Newcomer("azure-3", "web", DAY * 3 // 2, DAY // 2, 16 * GIB, 4)
    assert read(file, "azure", machine_id=1)[2] == late
    with pytest.raises(UserError, match="does not run on machine 9"):
        read(file, "azure", machine_id=9)


def test_a_sliver_of_a_machine_is_a_page_and_a_processor(tmp_path: Path) -> None:
    file = make.write_azure(tmp_path / "zone.sqlite", [(0, 0, 7, 0, 0.0, 1.0)])
    with sqlite3.connect(file) as database:
        database.execute("INSERT INTO vmType VALUES (9, 7, 0, 1e-12, 1e-15, 0, 0, 0)")
    (guest,) = read(file, "azure")
    assert (guest.memory, guest.vcpus) == (PAGE_BYTES, 1)


def test_the_window_cuts_and_keeps_names(tmp_path: Path) -> None:
    folder = pods(tmp_path, "1000,1,0,100,0", "1000,1,50,70,50", "1000,1,80,300,80", "1000,1,200,300,200")
    cut = read(folder, "openb", begin="75s", end="200s")
    assert [(each.name, each.time, each.lifetime) for each in cut] == [
        ("openb-0", 0, 25 * SECOND), ("openb-2", 5 * SECOND, 220 * SECOND),
    ]  # fmt: skip
    assert read(folder, "openb", limit=2) == read(folder, "openb")[:2]
    (tmp_path / "day").mkdir()
    (tmp_path / "day" / "a").write_text("1\n2\n3")
    assert read(tmp_path / "day", "planetlab", begin="7min")[0].levels == (0.02, 0.03)
    assert read(tmp_path / "day", "planetlab", begin="1h")[0].levels == (0.03,)


# --- laws ---------------------------------------------------------------------------------------------------------

times = st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 9000), st.integers(0, 9000), times), min_size=1, max_size=30))
def test_openb_against_plain_sorting(rows: Sequence[tuple[int, int, tuple[int, int, int]]]) -> None:
    """Pods in any order of the file come in order of creation, and in that of the file where it is equal."""
    good = [row for row in rows if row[1] > 0 and row[2][0] <= row[2][2] < row[2][1]]
    with TemporaryDirectory() as folder:
        written = (f"{cpu},{memory},{made},{gone},{placed}" for cpu, memory, (made, gone, placed) in rows)
        trace = block(pods(Path(folder), *written), "openb")
        if 2 * len(good) < len(rows):
            with pytest.raises(UserError, match="rows are bad"):
                Reading(trace)
            return
        reading = Reading(trace)
        found = [(each.time, each.lifetime, each.memory, each.vcpus) for each in reading.newcomers()]
    good.sort(key=lambda row: row[2][0])
    assert found == [
        (made * SECOND, (gone - placed) * SECOND, memory * MIB, -(-cpu // 1000))
        for cpu, memory, (made, gone, placed) in good
    ]
    assert (reading.rows.read, reading.rows.bad) == (len(rows), len(rows) - len(good))


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.integers(1, 12))
def test_averages_keep_the_work(levels: Sequence[int], together: int) -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / "a").write_text("\n".join(map(str, levels)))
        (guest,) = read(Path(folder), "planetlab", every=f"{5 * together}min")
    lengths = np.diff(np.append(np.arange(0, len(levels), together), len(levels)))
    assert np.dot(guest.levels, lengths) == pytest.approx(sum(levels) / 100)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 2000), st.floats(0, 2600)), min_size=1, max_size=30),
    st.sampled_from(["1min", "5min", "7min", "1h"]),
    st.randoms(use_true_random=False),
)
def test_samples_of_any_length_keep_the_work(samples: list[tuple[int, float]], every: str, random: Any) -> None:
    """MHz times seconds are the same before and after, in whatever order the samples stand in the file."""
    ends = np.cumsum([seconds for seconds, _ in samples]).tolist()
    rows = [(end * 1000, usage) for end, (_, usage) in zip(ends, samples, strict=True)]
    random.shuffle(rows)
    with TemporaryDirectory() as folder:
        listed = {"id": ["a"], "start_time": [0], "stop_time": [ends[-1] * 1000], "cpu_count": [1]}
        table = pa.table({**listed, "cpu_capacity": [2600.0], "mem_capacity": [4]})
        parquet.write_table(table, Path(folder) / "meta.parquet")
        columns = {"timestamp": [at for at, _ in rows], "cpu_usage": [usage for _, usage in rows]}
        parquet.write_table(pa.table({"id": ["a"] * len(rows), **columns}), Path(folder) / "trace.parquet")
        (guest,) = read(Path(folder), "bitbrains", every=every)
    step = guest.every / SECOND
    lengths = np.minimum(np.arange(1, len(guest.levels) + 1) * step, ends[-1]) - np.arange(len(guest.levels)) * step
    work = sum(seconds * usage for seconds, usage in samples) / 2600
    assert np.dot(guest.levels, lengths) == pytest.approx(work, abs=1e-6)
    assert guest.lifetime == ends[-1] * SECOND


@pytest.mark.parametrize("form", FORMATS)
def test_every_trace_is_the_same_twice_and_in_order(tmp_path: Path, form: str) -> None:
    path = sample(tmp_path, form)
    trace = block(path, form)
    guests = list(newcomers(trace))
    assert guests == list(newcomers(trace))
    assert [guest.time for guest in guests] == sorted(guest.time for guest in guests)
    assert len({guest.name for guest in guests}) == len(guests) > 0
    for guest in guests:
        assert guest.lifetime > 0
        assert guest.memory is None or guest.memory % PAGE_BYTES == 0 < guest.memory
        assert all(0 <= level <= 1 for level in guest.levels)
        assert bool(guest.levels) == bool(guest.every)
    assert format_of(path) == form


@pytest.mark.parametrize("text", [b"0\n7\n100\n", b"1.5\r\n99.25\r\n", b"3\n\n4\n", b"5\n101\n6\n", b"8", b"1e1\n2\n"])
def test_a_file_is_the_same_read_at_once_and_line_by_line(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, line_by_line = Rows(), Rows()
    found = percent._samples(io.BytesIO(text), "file", 1, at_once)
    monkeypatch.setattr(percent, "_MOST_PLAIN", 0)

    assert percent._samples(io.BytesIO(text), "file", 1, line_by_line) == found
    assert at_once == line_by_line


def test_the_digest_tells_contents_and_names_apart(tmp_path: Path) -> None:
    trace = block(make.write_planetlab(tmp_path, 2, 12), "planetlab")
    before = trace.digest()
    assert trace.digest() == before
    first, second = trace.files()
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert trace.digest() != before
    first.write_bytes(kept)
    assert trace.digest() == before
    first.rename(tmp_path / "other")
    assert trace.digest() != before


def test_a_trace_has_one_digest_and_account_wherever_it_lies(tmp_path: Path) -> None:
    first, second = (block(pods(tmp_path / name, GOOD_POD, "1000,0,0,5,0"), "openb") for name in "ab")
    assert first.digest() == second.digest()
    assert list(Reading(first).rows.lines()) == list(Reading(second).rows.lines())


# --- bad rows -----------------------------------------------------------------------------------------------------

GOOD_POD = "1000,1,0,5,0"
BAD_PODS = {
    "1000,0,0,5,0": "memory is 0",
    "1000,-1,0,5,0": "memory_mib is negative",
    "x,1,0,5,0": "cpu_milli is no number",
    "1_000,1,0,5,0": "cpu_milli is no number",
    "nan,1,0,5,0": "cpu_milli is no number",
    "1000,inf,0,5,0": "memory_mib is no number",
    "1000,1e300,0,5,0": "memory is more than 1 PiB",
    "1e300,1,0,5,0": "more than 4096 processors",
    "1000,1,5,2,5": "ends before it starts",
    "1000,1,5,5,5": "ends as it starts",
    "1000,1,5,9,2": "is placed before it was made",
    f"1000,1,1{'0' * 18},5,0": "creation_time is more than a hundred years away",
    f"1000,1,0,{'9' * 5000},": "deletion_time is no number",
}


@pytest.mark.parametrize("row", BAD_PODS, ids=lambda row: BAD_PODS[row].replace(" ", "-") + row[:8])
def test_a_bad_pod_is_counted_with_its_line(tmp_path: Path, row: str) -> None:
    reading = Reading(block(pods(tmp_path, GOOD_POD, row, GOOD_POD, row), "openb"))
    assert len(list(reading.newcomers())) == 2
    (reason, noted), = reading.rows.left_out.items()  # fmt: skip
    assert (reason, noted.count) == (BAD_PODS[row], 2)
    assert noted.first == f"{openb.PODS}:3"
    assert list(reading.rows.lines()) == [f"2 of 4 rows left out: {reason} (first: {noted.first})"]


def test_lines_that_are_too_long_empty_or_short_are_counted(tmp_path: Path) -> None:
    lines = [make.POD_HEADER, *["pod,1000,1,0,0,,LS,Running,0,5,0"] * 4, "x" * (3 * LONGEST_LINE), "", "a,b", "", ""]
    (tmp_path / openb.PODS).write_text("\n".join(lines))
    reading = Reading(block(tmp_path, "openb"))
    assert {reason: noted.first.rpartition(":")[2] for reason, noted in reading.rows.left_out.items()} == {
        "a line of more than 64KiB": "6", "empty line": "7", "too few columns": "8",
    }  # fmt: skip
    assert len(list(reading.newcomers())) == 4


def test_a_bad_sample_keeps_its_place_in_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x\n10\n101\n-1\nnan\n20\n30\n40\n")
    (tmp_path / "b").write_text("1\n2\n")
    (tmp_path / "c").write_text("")
    reading = Reading(block(tmp_path, "planetlab"))
    first, second = reading.newcomers()
    assert first.levels == (0.0, 0.1, 0.1, 0.1, 0.1, 0.2, 0.3, 0.4)
    assert second.levels == (0.01, 0.02)
    assert {reason: noted.count for reason, noted in reading.rows.left_out.items()} == {
        "CPU use is no number": 2,
        "CPU use is above 100 %": 1,
        "CPU use is negative": 1,
        "a file without any sample": 1,
    }


def test_a_trace_with_more_bad_rows_than_good_ones_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1 2\n3 4\n5\n")
    with pytest.raises(UserError, match=r"2 of 3 rows are bad: not one number .*a:1\); is it a trace of planetlab\?"):
        read(tmp_path, "planetlab")
    assert len(read(tmp_path, "google")) == 1


def test_bad_rows_of_azure(tmp_path: Path) -> None:
    good = [(0, 0, 0, 0, 1.0, 2.0)] * 6
    bad = [(0, 0, 99, 0, 1.0, 2.0), (0, 0, 0, 0, 2.0, 1.0), (0, 0, 0, 0, None, 1.0), (0, 0, 0, 0, "x", 1.0)]
    file = make.write_azure(tmp_path / "a.sqlite", [*good, *bad, (0, 0, 0, 0, 9e999, None)])
    with sqlite3.connect(file) as database:
        database.execute("INSERT INTO vmType VALUES (9, 8, 0, 2.0, 0.5, 0, 0, 0)")
    reading = Reading(block(file, "azure"))
    assert len(list(reading.newcomers())) == 6
    counts = {reason: (noted.count, noted.first.rpartition(": ")[2]) for reason, noted in reading.rows.left_out.items()}
    assert counts == {
        "is larger than a machine": (1, "vmType row 7"),
        "its type is not in vmType": (1, "vm row 7"),
        "ends before it starts": (1, "vm row 8"),
        "starttime is no number": (3, "vm row 9"),
    }


def test_bad_rows_of_bitbrains(tmp_path: Path) -> None:
    make.write_bitbrains(tmp_path, 2, 12)
    table = parquet.read_table(tmp_path / "trace.parquet").to_pydict()
    table["id"][0] = "nobody"
    table["cpu_usage"][1:4] = [math.nan, None, -1.0]
    table["cpu_usage"][4:6] = [2600 * 1.1, 2600 * 2.0]
    parquet.write_table(pa.table(table), tmp_path / "trace.parquet")
    reading = Reading(block(tmp_path, "bitbrains"))
    first, _ = reading.newcomers()
    # The first good sample says what was used since the start.
    assert first.levels[:5] == (1.0,) * 5
    assert {reason: noted.count for reason, noted in reading.rows.left_out.items()} == {
        "a sample of a guest that is not listed": 1,
        "cpu_usage is no number": 2,
        "cpu_usage is negative": 1,
        "CPU use is above 125% of the capacity": 1,
    }
    assert reading.rows.mended["CPU use is above the capacity, taken as all of it"].count == 1


# --- whole files --------------------------------------------------------------------------------------------------


def archive(*members: tarfile.TarInfo, cut: int | None = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as packed:
        for member in members:
            packed.addfile(member, io.BytesIO(b"5 5\n" * (member.size // 4)))
    return stream.getvalue()[:cut]


def member(name: str, size: int = 4000, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


def lying_header(size: int) -> bytes:
    """An archive whose first header says it is followed by so many bytes of names."""
    return gzip.compress(member("././@PaxHeader", size, tarfile.XHDTYPE).tobuf() + bytes(1 << 16))


WRONG_ARCHIVES: dict[str, tuple[bytes, str]] = {
    "leaves": (archive(member("../vm")), "leaves the archive"),
    "absolute": (archive(member("/etc/vm")), "leaves the archive"),
    "link": (archive(member("vm", 0, tarfile.SYMTYPE)), "neither file nor folder"),
    "cut": (archive(member("vm"), member("vm2"), cut=-30), "cut short"),
    "no-archive": (b"hello, world\n" * 100, "cut short"),
    "empty": (archive(), "holds no rows"),
    "nothing": (b"", "cut short"),
    "lies": (lying_header(1 << 40), "cut short"),
    "huge": (gzip.compress(member("vm", 1 << 50).tobuf() + bytes(1 << 16)), "more than 64MiB"),
    "check-sum": (archive(member("vm"))[:-8] + bytes(8), "damaged"),
}


@pytest.mark.parametrize("name", WRONG_ARCHIVES)
def test_a_wrong_archive_is_one_clear_error(tmp_path: Path, name: str) -> None:
    content, message = WRONG_ARCHIVES[name]
    (tmp_path / "a.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.tar.gz", "google")
    assert not (tmp_path.parent / "vm").exists()


def test_wrong_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "days" / "20110303").mkdir(parents=True)
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "header").write_text("name,cpu_milli\n")
    os.mkfifo(tmp_path / "pipe")
    parts = tmp_path / "parts"
    make.write_bitbrains(parts, 1)
    parquet.write_table(pa.table({"id": ["a"]}), parts / "meta.parquet")
    with sqlite3.connect(tmp_path / "tables.sqlite") as database:
        database.execute("CREATE TABLE vm (vmId)")
    for path, form, message in (
        ("empty", "planetlab", "holds no files"),
        ("days", "planetlab", "name one of the folders in it, such as 20110303"),
        ("text", "planetlab", "is no folder"),
        ("text", "openb", "has no column cpu_milli, memory_mib"),
        ("header", "openb", "has no column memory_mib, creation_time, deletion_time, scheduled_time"),
        ("empty", "openb", "no such file"),
        ("pipe", "openb", "is no plain file"),
        ("empty", "bitbrains", "it must hold meta.parquet and trace.parquet or tasks.parquet and fragments.parquet"),
        ("parts", "bitbrains", "has no column start_time, stop_time"),
        ("text", "azure", "is no SQLite file"),
        ("tables.sqlite", "azure", "has no column vmTypeId, starttime, endtime in its table vm"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read(tmp_path / path, form)
        assert len(error.value.problems) == 1 and error.value.problems[0].remedy


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = block(make.write_planetlab(tmp_path, 1, 12), "planetlab")
    monkeypatch.setattr(Path, "iterdir", lambda folder: os.scandir(tmp_path / "node000_example_org_slice"))
    for look in (trace.digest, lambda: Reading(trace), lambda: format_of(tmp_path)):
        with pytest.raises(UserError, match="cannot be read: Not a directory; check its rights"):
            look()


def test_every_mistake_of_the_block_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        block(tmp_path / "none", "planetlab", begin="2h", end="1h", every="7min", vcpus_per_core=2.0, machine=MACHINE)
    assert {problem.path for problem in error.value.problems} == {"path", "end", "every", "vcpus_per_core", "machine"}
    with pytest.raises(UserError, match="say how large it is"):
        block(make.write_azure(tmp_path / "a", []), "azure", machine=None)


def test_a_resolved_block_reads_back(tmp_path: Path) -> None:
    for form in FORMATS:
        trace = block(sample(tmp_path, form), form)
        assert Document("", trace.model_dump(mode="json")).check(Trace, folder="") == trace


def broken(path: Path, form: str) -> Iterator[Path]:
    """The files to spoil."""
    yield from [path] if path.is_file() else [path / openb.PODS] if form == "openb" else sorted(path.iterdir())


@pytest.mark.parametrize("form", [*FORMATS, "google-tar"])
@settings(max_examples=40)
@given(data=st.data())
def test_no_bytes_give_a_traceback(form: str, data: st.DataObject) -> None:
    """Any bytes instead of a file, or anywhere in a sound one: a clear error, or rows that are accounted for."""
    with TemporaryDirectory() as folder:
        path = sample(Path(folder), form)
        file = data.draw(st.sampled_from(list(broken(path, form))))
        sound = file.read_bytes()
        if data.draw(st.booleans()):
            file.write_bytes(data.draw(st.binary(max_size=200)))
        else:
            at = data.draw(st.integers(0, len(sound)))
            drop = data.draw(st.integers(0, 20))
            file.write_bytes(sound[:at] + data.draw(st.binary(max_size=20)) + sound[at + drop :])
        try:
            reading = Reading(block(path, form.removesuffix("-tar")))
            found = list(reading.newcomers())
        except UserError as error:
            assert str(error)
            return
        except MachineError:
            raise AssertionError("a wrong file is not the machine's fault") from None
        assert all(0 <= guest.time < NEVER and 0 < guest.lifetime <= NEVER for guest in found)
        assert 2 * reading.rows.bad <= reading.rows.read


# --- streaming ----------------------------------------------------------------------------------------------------

STREAM = """
import re, sys
from pathlib import Path
from traces import make
from sim.datacenter.traces import Trace, newcomers

def rows(count):
    # Every second pod lies before the one above it, so that the file must be put in order.
    return (f"p,1000,{1 + n % 64},0,0,,LS,Running,{n ^ 1},{n + 60},{n ^ 1}" for n in range(count))

def peak(count):
    folder = make.write_openb(Path(sys.argv[1]) / str(count), rows(count), {(4000, 8192): 1})
    last = -1
    trace = Trace(path=str(folder), format="openb", kinds=("web",))
    for number, guest in enumerate(newcomers(trace)):
        assert guest.time >= last
        last = guest.time
    assert number == count - 1
    # Not ru_maxrss, which an exec takes over from the process before it.
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

first = peak(int(sys.argv[2]))
print(peak(int(sys.argv[3])) - first)
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Thirty times as many guests, out of order, in little more memory; held, they take 18 MiB."""
    command = [sys.executable, "-c", STREAM, str(tmp_path), "2000", "60000"]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 9 << 10


@pytest.mark.slow
def test_traces_run_in_a_datacenter(tmp_path: Path) -> None:
    """Guests of two traces, one with CPU use and one with sizes and lives, come and go as they say."""
    make.write_planetlab(tmp_path / "day", 3, 12)
    pods(tmp_path / "pods", "1000,8,60,300,60", "1000,16,0,100000,0")
    arrivals = [
        {"path": "day", "format": "planetlab", "kinds": ["web"]},
        {"path": "pods", "format": "openb", "kinds": ["web"]},
    ]
    scenario = {
        "name": "recorded",
        "duration": "10min",
        "sample_every": "1min",
        "hosts": [{"count": 2, "memory": "256MiB", "cores": 4}],
        "vms": [{"name": "web", "memory": "4MiB"}],
        "datacenter": {"arrivals": arrivals},
    }
    guests = sim.run(sim.parse(scenario, tmp_path)).guests.set_index("guest")
    assert sorted(guests.index) == ["openb-0", "openb-1", "planetlab-0", "planetlab-1", "planetlab-2"]
    assert guests.loc["openb-1", "stop_s"] == 300


# --- the command and what comes along -----------------------------------------------------------------------------


def call(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["trace", *map(str, arguments)])


def test_the_verb_shows_what_a_trace_holds(tmp_path: Path) -> None:
    folder = pods(tmp_path, "1000,1024,0,100,0", "2000,2048,50,70,50", "1000,0,80,300,80")
    done = call(folder)
    assert done.exit_code == 0
    assert "guests           2, the last after 50s" in done.stdout
    assert "most memory      3GiB promised at once" in done.stdout
    assert f"1 of 3 rows left out: memory is 0 (first: {openb.PODS}:4)" in done.stdout
    told = json.loads(call(folder, "--json", "--set", "begin=60s").stdout)
    assert (told["guests"], told["most_guests"], told["most_vcpus"]) == (2, 2, 3)
    assert call(folder, "--hosts").stdout.startswith("hosts:\n- name: 2c-4GiB\n  count: 1\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-here"], "no such file or folder"),
        (["nothing-here", "--set", "format=azure"], "no such file or folder"),
        ([".", "--set", "format=openbb"], "format"),
        ([__file__], "is in no format that is known"),
    ],
)
def test_the_verb_refuses_clearly(arguments: Sequence[str], message: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_bundled_traces_are_what_the_script_makes(tmp_path: Path) -> None:
    make.bundled(tmp_path)
    made = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    kept = (file for file in make.FOLDER.rglob("*") if file.is_file() and file.name != "README.md")
    assert made == {file.relative_to(make.FOLDER): file.read_bytes() for file in kept}


REAL_TRACES: dict[str, tuple[str, Callable[[Reading], object], object]] = {
    "openb": ("alibaba", lambda reading: (reading.rows.read, reading.rows.bad), (8152, 2)),
    "openb-nodes": ("alibaba", lambda reading: sum(kind.count for kind in nodes(reading.trace, Rows())), 1523),
    "planetlab": ("planetlab/20110303", lambda reading: (reading.survey().guests, reading.rows.read), (1052, 302_976)),
    "google": ("gcd/GCD_VMs.tar.gz", lambda reading: (reading.survey().guests, reading.rows.read), (1600, 460_800)),
    "bitbrains": (
        "bitbrains-small",
        lambda reading: (reading.survey().guests, reading.survey().most_vcpus, reading.rows.read),
        (50, 194, 277_029),
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="set OVERCOMMIT_TRACES to a folder of real traces")
@pytest.mark.parametrize("name", REAL_TRACES)
def test_real_traces_hold_what_is_known_of_them(name: str) -> None:
    folder, look, known = REAL_TRACES[name]
    assert look(Reading(block(REAL / folder, name.partition("-")[0]))) == known
