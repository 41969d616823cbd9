"""Checkpoints: what they hold comes back as it was, what they do not hold is refused, and no code runs from them."""

from __future__ import annotations

import os
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import sim
from sim.datacenter.checkpoint import Broken, opened, pack, seal, unpack
from sim.datacenter.crew import same
from sim.datacenter.messages import Luggage, Newcomer, Start
from sim.lab.machine import restore
from sim.sharing.kernels import KERNELS

SCENARIO = Path(__file__).parents[1] / "scenarios" / "quickstart.yaml"
KEY = bytes(32)

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
numbers = arrays.arrays(
    arrays.integer_dtypes() | arrays.unsigned_integer_dtypes() | arrays.floating_dtypes() | arrays.boolean_dtypes(),
    arrays.array_shapes(min_dims=0, min_side=0),
)
states = st.recursive(
    plain | numbers,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.sets(st.integers())
    ),
    max_leaves=12,
)


@given(states)
@settings(max_examples=150)
def test_what_is_packed_comes_back_to_the_last_bit(state: object) -> None:
    assert same(unpack(pack(state)), state)


def test_objects_of_the_program_and_containers_come_back() -> None:
    guest = Newcomer("web-1", "web", 5, levels=(0.5, 0.25))
    state = [
        guest,
        Start(3, 7, guest),
        Luggage(guest, 9, np.arange(4, dtype=np.int32), {"active": True}),
        KERNELS["6.18"],
        deque([1, 2], maxlen=4),
        OrderedDict(b=1, a=2),
        Counter("abba"),
        defaultdict(list, {"a": [1]}),
        {frozenset({1})},
        range(3),
        Path("images/nginx.npz"),
        np.int64(3),
        np.float32(0.1),
    ]

    back = unpack(pack(state))

    assert same(back, state)
    assert [type(each) for each in back] == [type(each) for each in state]


def test_a_scenario_comes_back() -> None:
    scenario = sim.read(SCENARIO)

    back = unpack(pack(scenario))

    assert back == scenario
    assert back.digest("1") == scenario.digest("1")


def test_a_random_stream_goes_on_where_it_was() -> None:
    stream = np.random.Generator(np.random.PCG64(7))
    stream.integers(10, size=5, dtype=np.int32)  # an odd number of halves: one half is kept for the next call

    back = unpack(pack([stream, stream]))

    assert back[0] is back[1]
    assert back[0].integers(10, size=9, dtype=np.int32).tolist() == stream.integers(10, size=9, dtype=np.int32).tolist()


def test_what_is_shared_stays_shared() -> None:
    table = np.arange(12).reshape(3, 4)
    names = ["a"]
    state = {"table": table, "row": table[1], "column": table[:, 2], "back": table[::-1], "names": (names, names)}
    table.setflags(write=True)

    back = unpack(pack(state))
    back["row"][2] = 77
    back["names"][0].append("b")

    assert back["table"][1, 2] == back["column"][1] == back["back"][1, 2] == 77
    assert back["names"][1] == ["a", "b"]
    assert table[1, 2] == 6


def test_a_cycle_and_an_array_in_two_places_come_back() -> None:
    array = np.ones(3)
    state: dict[str, Any] = {"one": array, "two": [array]}
    state["self"] = state

    back = unpack(pack(state))

    assert back["self"] is back
    assert back["two"][0] is back["one"]


def test_the_order_in_memory_and_protection_from_writes_stay() -> None:
    columns = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    fixed = np.arange(3)
    fixed.setflags(write=False)

    back = unpack(pack([columns, fixed]))

    assert back[0].flags.f_contiguous and not back[0].flags.c_contiguous
    assert not back[1].flags.writeable


def test_a_small_view_does_not_bring_its_large_array() -> None:
    large = np.random.default_rng(1).integers(0, 256, 1 << 20, dtype=np.uint8)

    assert len(pack(large[::1024])) < 3000


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_memory_that_was_never_touched_costs_nothing() -> None:
    state = np.zeros(1 << 28, np.int32)  # 1 GiB
    state[12345678] = 5
    before = resident_bytes()

    packed = pack(state)
    back = unpack(packed)

    assert len(packed) < 10_000
    assert resident_bytes() - before < 64 << 20
    assert back[12345678] == 5 and back.shape == state.shape


def test_numbers_of_contents_are_compressed_and_noise_is_not_made_larger() -> None:
    few = np.random.default_rng(1).integers(0, 200, 1 << 18).astype(np.int64)
    noise = np.random.default_rng(1).integers(0, 256, 1 << 20, dtype=np.uint8)

    assert len(pack(few)) < few.nbytes / 2
    assert noise.nbytes <= len(pack(noise)) < noise.nbytes + 1000


@pytest.mark.parametrize(
    "make",
    [
        lambda: os.system,
        lambda: lambda: None,
        lambda: [].append,
        object,
        lambda: np.array([object()]),
        lambda: np.ma.masked_array([1]),
        lambda: np.random.Generator(np.random.MT19937(1)),
        lambda: (each for each in ()),
        lambda: Broken("an exception"),
        lambda: Newcomer,
    ],
)
def test_what_no_checkpoint_holds_is_refused_when_it_is_written(make: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match="a checkpoint"):
        pack({"state": [make()]})


class Calls:
    """Pickles as a call of something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize(
    "evil",
    [
        Calls(os.system, "touch broken-in"),
        Calls(eval, "open('broken-in', 'w')"),
        Calls(getattr, "text", "format"),
        Calls(open, "broken-in", "w"),
        Calls(restore),
        Calls(Path.touch, Path("broken-in")),
        Calls(Newcomer, "a", "b", 3),
        Calls(np.frombuffer, b"12345678"),
        Calls(np.load, "broken-in"),
        np.array([1, 2]),
        np.dtype("O"),
    ],
)
@pytest.mark.parametrize("place", ["apart", "state"])
def test_no_code_runs_from_a_checkpoint(
    evil: object, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    empty = pickle.dumps(((), (), ()))
    data = pickle.dumps(evil) if place == "apart" else empty + pickle.dumps([evil])

    with pytest.raises(Broken, match="nothing that a checkpoint holds"):
        unpack(data)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "sim.cli:main",
        "sim.cli:Path",
        "sim.lab.machine:restore",
        "sim.__main__:main",
        "sim.datacenter.messages:Newcomer.name",
        "sim.nothing:Newcomer",
        "simpy:Environment",
        "sim:run",
    ],
)
def test_only_classes_of_the_program_are_made(name: str) -> None:
    with pytest.raises(Broken, match="no class of this program"):
        unpack(renamed(name))


def renamed(name: str) -> bytes:
    """A checkpoint of a guest that says it is of the class of that name."""
    data = pack(Newcomer("a", "b", 3))
    ours = b"sim.datacenter.messages:Newcomer"
    start = data.index(b"\x80\x05\x95", 3)  # the frame that follows says how long it is, and may be left out
    data = data[: start + 2] + data[start + 11 :]
    assert data.count(bytes([len(ours)]) + ours) == 1
    return data.replace(bytes([len(ours)]) + ours, bytes([len(name)]) + name.encode())


def test_the_class_that_was_written_is_made() -> None:
    assert unpack(renamed("sim.datacenter.messages:Newcomer")) == Newcomer("a", "b", 3)


def test_an_array_of_objects_is_not_made_from_bytes() -> None:
    placed = (0, "|O", (1,), 0, (8,), True)
    data = pickle.dumps((((8, (b"12345678",)),), (placed,), ())) + pickle.dumps(None)

    with pytest.raises(Broken, match="objects"):
        unpack(data)


def test_what_was_sealed_opens_with_its_key() -> None:
    assert opened(seal(b"state", KEY), KEY) == b"state"


@given(st.integers(0, 8 * len(seal(b"state", KEY)) - 1))
def test_a_changed_bit_is_seen_before_anything_is_read(bit: int) -> None:
    sealed = bytearray(seal(b"state", KEY))
    sealed[bit // 8] ^= 1 << bit % 8

    with pytest.raises(Broken, match="changed"):
        opened(bytes(sealed), KEY)


@pytest.mark.parametrize("sealed", [b"", b"short", seal(b"state", bytes(31) + b"1"), seal(b"state", KEY)[:-1]])
def test_another_key_or_a_part_does_not_open_it(sealed: bytes) -> None:
    with pytest.raises(Broken):
        opened(sealed, KEY)
