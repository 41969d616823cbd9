"""Random streams belong to names and to nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.streams import generator, key

NAME = st.text(max_size=4) | st.integers()
NAMES = st.lists(NAME, max_size=4).map(tuple)


def test_keys_are_the_same_on_every_machine_and_for_ever() -> None:
    assert key(1, "host", 3, "writes") == 12539273291905251896


@given(st.tuples(st.integers(0), NAMES), st.tuples(st.integers(0), NAMES))
def test_different_names_have_different_keys(
    one: tuple[int, tuple[str | int, ...]], other: tuple[int, tuple[str | int, ...]]
) -> None:
    assert (key(one[0], *one[1]) == key(other[0], *other[1])) == (repr(one) == repr(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [(("ab",), ("a", "b")), (("1",), (1,)), (("a",), ("a", "")), ((12, 3), (1, 23)), (("a:1",), ("a", 1))],
)
def test_names_that_look_alike_have_different_keys(one: tuple[str | int, ...], other: tuple[str | int, ...]) -> None:
    assert key(1, *one) != key(1, *other)


def test_a_stream_always_starts_at_its_beginning() -> None:
    first, again = generator(7, "guest", 1), generator(7, "guest", 1)

    assert np.array_equal(first.integers(0, 1 << 62, 100), again.integers(0, 1 << 62, 100))


def test_drawing_from_one_stream_leaves_the_others_alone() -> None:
    alone = generator(7, "guest", 2).random(10)

    generator(7, "guest", 1).random(1000)

    assert np.array_equal(generator(7, "guest", 2).random(10), alone)


def test_streams_of_neighbouring_names_are_uncorrelated() -> None:
    draws = np.array([generator(1, "guest", number).standard_normal(4000) for number in range(20)])

    correlations = np.corrcoef(draws)[np.triu_indices(20, 1)]

    assert np.abs(correlations).max() < 5 / np.sqrt(4000)


@pytest.mark.parametrize("hash_seed", ["0", "1", "random"])
def test_keys_do_not_depend_on_python_s_hash_seed(hash_seed: str) -> None:
    program = "from sim.streams import key; print(key(1, 'host', 3, 'writes'))"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}

    printed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)

    assert int(printed.stdout) == key(1, "host", 3, "writes")
