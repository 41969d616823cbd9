"""What fuzzing found stays mended, and the largest inputs are refused soon: tests/fuzz.py goes on from here."""

from __future__ import annotations

from pathlib import Path

import hostile
import pytest

HEAD = b"name: x\nhosts: [{memory: 1GiB}]\nvms: [{name: a, memory: 1MiB}]\n"
LARGEST = {
    "brackets": b"a: " + b"[" * 900_000,
    "braces": b"a: " + b"{b: " * 200_000,
    "anchors": b"a: &a [1]\nb: [" + b"*a, " * 200_000 + b"]",
    "merges": b"a: &a {" + b"".join(b"k%d: 1, " % n for n in range(10_000)) + b"}\n" + b"b: {<<: *a}\n" * 5_000,
    "merged in itself": b"a: &a\n" + b"  <<: *a\n" * 50_000,
    "unknown keys": HEAD + b"".join(b"k%d: 1\n" % n for n in range(24_000)),
    "one long key": HEAD + b"k" * 900_000 + b": 1\n",
    "one long text": HEAD + b"duration: " + b"9" * 900_000,
    "faulty points": HEAD + b"lount: 1\nsweep: {seed: [" + b",".join(b"%d" % n for n in range(50)) + b"]}\n",
    "empty lines": b"\n" * 1_000_000,
}


def test_the_corpus_holds_nothing_worse_than_mistakes() -> None:
    worst = hostile.replay(hostile.CORPUS)

    assert worst.inputs > 100
    assert 0 < worst.refused < worst.inputs


@pytest.mark.parametrize("data", LARGEST.values(), ids=LARGEST)
def test_the_largest_inputs_are_refused_soon(data: bytes) -> None:
    with hostile.reader() as read:
        read(b"s" + data)

    assert read.worst.refused == 1


def test_a_reader_sees_what_is_no_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes, folder: Path) -> None:
        raise KeyError("a bug")

    monkeypatch.setitem(hostile.KINDS, b"s", broken)
    with hostile.reader() as read, pytest.raises(KeyError):
        read(b"s")


def test_a_reader_sees_what_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "SLOWEST_S", 0.0)
    with hostile.reader() as read, pytest.raises(AssertionError, match="took"):
        read(b"s" + HEAD)
