"""Every wrong scenario in tests/bad gives exactly the messages that its first lines announce."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.cli import main
from sim.cost.prices import DEFAULT, FOLDER
from sim.document import dump, read
from sim.errors import UserError
from sim.scenario import load, parse

BAD = Path(__file__).parent / "bad"
CASES = sorted(BAD.glob("*.yaml"))

CONTENT = np.arange(2 * 64, dtype=np.uint32).reshape(2, 64)
TIMES = np.array([0.0, 5.0])
SOUND = {"content": CONTENT, "time_s": TIMES}
WRONG_ARRAYS = {
    "no-content": {"time_s": TIMES},
    "no-times": {"content": CONTENT},
    "pickled": {"content": np.array([[object()]]), "time_s": TIMES},
    "pickled-times": {"content": CONTENT, "time_s": np.array([{}, {}], dtype=object)},
    "signed": {"content": CONTENT.astype(np.int64), "time_s": TIMES},
    "fractions": {"content": CONTENT.astype(np.float64), "time_s": TIMES},
    "flat": {"content": CONTENT[0], "time_s": TIMES[:1]},
    "no-snapshots": {"content": CONTENT[:0], "time_s": TIMES[:0]},
    "no-pages": {"content": CONTENT[:, :0], "time_s": TIMES},
    "times-too-few": {"content": CONTENT, "time_s": TIMES[:1]},
    "times-text": {"content": CONTENT, "time_s": np.array(["a", "b"])},
    "times-back": {"content": CONTENT, "time_s": TIMES[::-1]},
    "times-nan": {"content": CONTENT, "time_s": np.array([0.0, np.nan])},
    "touched-short": {**SOUND, "touched_from": np.zeros(3, np.uint8)},
    "touched-type": {**SOUND, "touched_from": np.zeros(64)},
    "ids": {"content": CONTENT + np.uint32(1 << 30), "time_s": TIMES},
    "ids64": {"content": CONTENT.astype(np.uint64) + np.uint64(1 << 40), "time_s": TIMES},
    "large": {"content": np.ones((1, 1 << 17), np.uint32), "time_s": TIMES[:1]},
}


def archive(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def raw_archive(content: bytes) -> bytes:
    """Return an archive whose array `content` is these very bytes."""
    times, stream = io.BytesIO(), io.BytesIO()
    np.save(times, TIMES)
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("content.npy", content)
        file.writestr("time_s.npy", times.getvalue())
    return stream.getvalue()


def header(*shape: int) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<u4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def encrypted(data: bytes) -> bytes:
    """Return the archive with its first member marked as encrypted."""
    marked = bytearray(data)
    marked[6] |= 1
    marked[marked.index(b"PK\x01\x02") + 8] |= 1
    return bytes(marked)


def damaged(data: bytes) -> bytes:
    at = data.index(b"content.npy") + 60
    return data[:at] + b"\xff" * 40 + data[at + 40 :]


def single_array(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def make_files(folder: Path) -> None:
    """Write the images and the price set that the scenarios of the corpus name."""
    good = archive(**SOUND)
    images = {f"{name}.npz": archive(**arrays) for name, arrays in WRONG_ARRAYS.items()} | {
        "good.npz": good,
        "text.npz": b"not an archive",
        "array.npy": single_array(CONTENT),
        "empty.npz": b"",
        "truncated.npz": good[: len(good) // 2],
        "damaged.npz": damaged(good),
        "short-array.npz": raw_archive(header(2, 64) + bytes(100)),
        "huge.npz": raw_archive(header(2, 1 << 60)),
        "lies.npz": raw_archive(header(2, -64) + bytes(512)),
        "header.npz": raw_archive(b"\x93NUMPY\x01\x00\x10\x00{'descr: ( \n\n   "),
        "encrypted.npz": encrypted(raw_archive(header(2, 64) + CONTENT.tobytes())),
    }
    (folder / "images").mkdir(exist_ok=True)
    for name, data in images.items():
        (folder / "images" / name).write_bytes(data)
    prices = read(FOLDER / f"{DEFAULT}.yaml").data | {"name": "incomplete"}
    del prices["batch"]
    (folder / "prices").mkdir(exist_ok=True)
    (folder / "prices" / "incomplete.yaml").write_text(dump(prices))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus with the files that it names."""
    folder = tmp_path_factory.mktemp("corpus") / "bad"
    shutil.copytree(BAD, folder)
    make_files(folder)
    return folder


@pytest.fixture
def corpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def announced(case: Path) -> list[str]:
    """Return the messages that the comment at the head of a file announces."""
    lines = case.read_text(encoding="latin-1").split("\n")
    comments = next((number for number, line in enumerate(lines) if not line.startswith("# ")), len(lines))
    return [line.removeprefix("# ") for line in lines[:comments]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_a_wrong_scenario_gives_exactly_the_messages_that_it_announces(case: Path, corpus: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(case.name)

    assert str(caught.value).split("\n") == announced(case)


def test_every_announced_message_begins_with_its_file() -> None:
    assert [case.name for case in CASES if not announced(case)] == []
    assert [line for case in CASES for line in announced(case) if not line.startswith(f"{case.name}:")] == []


def test_no_message_shows_the_words_of_the_programming_language() -> None:
    words = r"pydantic|\b(None|NoneType|str|int|float|dict|tuple|bool|input|literal|instance|Errno|\w+Error)\b"

    assert [line for case in CASES for line in announced(case) if re.search(words, line)] == []


@pytest.mark.parametrize("name", ["several-in-order", "yaml-tab", "captured-pickled", "prices-wrong-file"])
def test_validate_prints_the_messages_and_leaves_with_2(name: str, corpus: Path) -> None:
    result = CliRunner().invoke(main, ["validate", f"{name}.yaml"])

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines() == announced(BAD / f"{name}.yaml")


def test_validate_reads_every_file_that_it_is_given(corpus: Path) -> None:
    names = ["several-in-order.yaml", "unit-minutes.yaml"]

    result = CliRunner().invoke(main, ["validate", *names])

    assert result.stderr.splitlines() == [line for name in names for line in announced(BAD / name)]


def test_validate_as_json_gives_the_parts_of_every_message(corpus: Path) -> None:
    result = CliRunner().invoke(main, ["validate", "unit-minutes.yaml", "--json"])

    assert result.exit_code == 2
    assert json.loads(result.stdout) == {
        "problems": [
            {
                "file": "unit-minutes.yaml",
                "line": 3,
                "path": "duration",
                "value": "10m",
                "message": "must be a duration",
                "remedy": 'did you mean "10ms" or "10min"?',
            }
        ]
    }


@pytest.mark.parametrize("verb", ["run", "explain"])
def test_every_verb_that_reads_a_scenario_gives_the_same_messages(verb: str, corpus: Path) -> None:
    result = CliRunner().invoke(main, [verb, "several-in-order.yaml"])

    assert (result.exit_code, result.stderr.splitlines()) == (2, announced(BAD / "several-in-order.yaml"))


PIECES = st.tuples(st.integers(0, len(archive(**SOUND)) - 1), st.binary(min_size=1, max_size=8))


@settings(deadline=None)
@given(pieces=st.lists(PIECES, min_size=1, max_size=4), length=st.integers(0, len(archive(**SOUND))))
def test_no_damage_to_a_captured_image_is_mistaken_for_a_bug(
    pieces: list[tuple[int, bytes]], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(archive(**SOUND))
    for at, piece in pieces:
        data[at : at + len(piece)] = piece
    folder = tmp_path_factory.getbasetemp()
    (folder / "fuzzed.npz").write_bytes(data[: max(length, 1)] if length % 2 else data)
    vm = {"name": "web", "memory": "256KiB", "image": {"captured": "fuzzed.npz"}}

    try:
        parse({"name": "fuzz", "hosts": [{"memory": "1GiB"}], "vms": [vm]}, folder)
    except UserError as error:
        assert [problem.path for problem in error.problems] == ["vms.0.image.captured"]
