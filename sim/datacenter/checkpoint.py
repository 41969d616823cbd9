"""The state of hosts as bytes from which no code can run, and that nobody has changed since they were written.

The state is a pickle, but a poor one: arrays and random streams lie beside it as plain numbers; objects are made
without their constructors, and only of this package's own classes; nothing else can be named but a few containers.
"""

from __future__ import annotations

import copyreg
import ctypes
import io
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from hashlib import blake2b
from importlib import import_module
from importlib.util import find_spec
from pathlib import PosixPath, PurePosixPath
from typing import Any, Final, NamedTuple

import lz4.block
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_CONTAINERS: Final[frozenset[type]] = frozenset({
    Counter, OrderedDict, PosixPath, PurePosixPath, bytearray, complex, defaultdict, deque, dict, frozenset, int, list,
    range, set, slice, tuple,
})  # fmt: skip
_BLOCK: Final = 1 << 18
"""Memory is kept in pieces of so many bytes; those full of zeros cost nothing, neither here nor in the new process."""
_SMALL: Final = 1 << 10
"""A smaller piece is kept as it is."""
_WORTH: Final = 0.9
"""A piece is kept compressed if LZ4 makes it smaller than this share."""
_DIGEST_BYTES: Final = 32


class Broken(Exception):
    """A checkpoint that is not what was written, or that names what no checkpoint holds."""


def seal(data: bytes, key: bytes) -> bytes:
    """Return *data* after a digest that only the owner of *key* can make."""
    return _digest(data, key) + data


def opened(sealed: bytes, key: bytes) -> bytes:
    """Return what was sealed with *key*. Raises Broken if it has changed since, or another key sealed it."""
    data = sealed[_DIGEST_BYTES:]
    # The run made the key and asks by itself: there is nobody to learn anything from the time this takes.
    if sealed[:_DIGEST_BYTES] != _digest(data, key):
        raise Broken("a checkpoint has changed since it was written")
    return data


def _digest(data: bytes, key: bytes) -> bytes:
    return blake2b(data, key=key, digest_size=_DIGEST_BYTES).digest()


def pack(state: object) -> bytes:
    """Return a state as bytes. Raises TypeError if it holds a function, a file, or an object of another package.

    What is shared stays shared: objects, and the memory of arrays that are views of each other.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(state)
    return pickle.dumps(tuple(_Apart(*_memory(pickler.arrays), pickler.streams)), 5) + stream.getvalue()


def unpack(data: bytes) -> Any:
    """Return the state in *data*. Raises Broken if that names anything that a state does not hold."""
    stream = io.BytesIO(data)
    apart = _Apart(*_Unpickler(stream, _Apart([], [], [])).load())
    return _Unpickler(stream, apart).load()


class _Placed(NamedTuple):
    """An array in a piece of memory."""

    memory: int
    dtype: Any
    shape: Sequence[int]
    offset: int
    strides: Sequence[int]
    writeable: bool


class _Apart(NamedTuple):
    """What lies beside the pickle."""

    memories: Sequence[tuple[int, Sequence[bytes | None]]]
    """Size in bytes, and the pieces."""
    arrays: Sequence[Sequence[Any]]
    """Each one as in `_Placed`; a scalar of NumPy is an array without dimensions."""
    streams: Sequence[Any]
    """State of each random stream."""


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, 5)
        self.arrays: list[Array] = []
        self.streams: list[Any] = []
        self._known: dict[int, tuple[object, tuple[str, int]]] = {}  # the object itself keeps its id from being reused

    def persistent_id(self, value: object) -> tuple[str, int] | None:
        """Name what lies beside the pickle: called for every object, so the common ones leave first."""
        if not isinstance(value, np.ndarray | np.generic | np.random.Generator):
            return None
        if id(value) not in self._known:
            self._known[id(value)] = value, self._set_apart(value)
        return self._known[id(value)][1]

    def _set_apart(self, value: Array | np.generic | np.random.Generator) -> tuple[str, int]:
        if isinstance(value, np.random.Generator):
            if type(value.bit_generator) is not np.random.PCG64:
                raise TypeError(f"a checkpoint holds random streams of PCG64, not {value.bit_generator!r}")
            self.streams.append(value.bit_generator.state)
            return "stream", len(self.streams) - 1
        if (isinstance(value, np.ndarray) and type(value) is not np.ndarray) or value.dtype.hasobject:
            raise TypeError(f"a checkpoint holds plain arrays, not {type(value).__name__} of {value.dtype}")
        self.arrays.append(np.asarray(value))
        return "scalar" if isinstance(value, np.generic) else "array", len(self.arrays) - 1

    def reducer_override(self, value: Any) -> Any:
        """Take objects of this package apart so that `_new` can make them, and refuse all that is foreign."""
        cls: Any = type(value)
        if cls in _CONTAINERS or value is _new or (cls is type and value in _CONTAINERS):
            return NotImplemented
        if not _is_own(cls):
            raise TypeError(f"a checkpoint cannot hold {value!r}, a {cls.__module__}.{cls.__qualname__}")
        made_by, arguments, *rest = value.__reduce_ex__(4)
        if made_by is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise TypeError(f"a checkpoint cannot hold a {cls.__qualname__}, whose objects are made by {made_by!r}")
        return _new, (_name(cls), *arguments[1:]), *rest


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, apart: _Apart) -> None:
        super().__init__(stream)
        memories = [_filled(size, pieces) for size, pieces in apart.memories]
        self._arrays = [_placed(memories, _Placed(*each)) for each in apart.arrays]
        self._scalars: dict[int, object] = {}
        self._streams = [_stream(state) for state in apart.streams]

    def persistent_load(self, name: Any) -> object:
        """Return what lies beside the pickle under that name."""
        kind, number = name
        if kind == "scalar":
            return self._scalars.setdefault(number, self._arrays[number][()])
        return (self._arrays if kind == "array" else self._streams)[number]

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few things that a checkpoint may call."""
        try:
            return _CALLED[module, name]
        except KeyError:
            raise Broken(f"a checkpoint names {module}.{name}, which is nothing that a checkpoint holds") from None


@cache
def _is_own(cls: type) -> bool:
    return cls.__module__.startswith("sim.") and cls.__module__ != "sim.__main__" and "." not in cls.__qualname__


@cache
def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


@cache
def _own(name: str) -> Any:
    """The class of this package with that name."""
    module, _, attribute = name.partition(":")
    if module.startswith("sim.") and module != "sim.__main__" and find_spec(module):
        found = getattr(import_module(module), attribute, None)
        if isinstance(found, type) and _is_own(found) and _name(found) == name:
            return found
    raise Broken(f"a checkpoint names {name}, which is no class of this program")


def _new(name: str, *values: Any) -> object:
    """An object of this package without its constructor; its attributes follow."""
    cls = _own(name)
    return cls.__new__(cls, *values)


_CALLED: Final[Mapping[tuple[str, str], Any]] = {
    (each.__module__, each.__qualname__): each for each in [*_CONTAINERS, *list[Any]([_new])]
}


# --- arrays ------------------------------------------------------------------------------------------------------


def _memory(arrays: Sequence[Array]) -> tuple[list[tuple[int, list[bytes | None]]], list[tuple[Any, ...]]]:
    """Return the memory that arrays lie in, and where in it each one lies."""
    memories: list[tuple[int, list[bytes | None]]] = []
    placed: dict[int, _Placed] = {}
    arrays = list(arrays)
    reaches = [_reach(array) for array in arrays]
    for reach, group in _overlapping(reaches):
        low, high = reach
        if len(group) == 1 and high - low > arrays[group[0]].nbytes:  # a view of something that nobody keeps
            arrays[group[0]] = np.ascontiguousarray(arrays[group[0]])
            low, high = _reach(arrays[group[0]])
        for number in group:
            array = arrays[number]
            offset = _address(array) - low if array.size else 0
            dtype = np.lib.format.dtype_to_descr(array.dtype)
            placed[number] = _Placed(len(memories), dtype, array.shape, offset, array.strides, array.flags.writeable)
        memories.append((high - low, list(_pieces(low, high))))
    return memories, [tuple(placed[number]) for number in range(len(arrays))]


def _address(array: Array) -> int:
    """Where the first element is."""
    address: int = array.__array_interface__["data"][0]
    return address


def _reach(array: Array) -> tuple[int, int]:
    """Addresses of an array's first byte and behind its last one; an empty one has none."""
    if not array.size:
        return 0, 0
    first = _address(array)
    if array.flags.forc:
        return first, first + array.nbytes
    steps = [(length - 1) * stride for length, stride in zip(array.shape, array.strides, strict=True)]
    back, ahead = (sum(step for step in steps if step * sign > 0) for sign in (-1, 1))
    return first + back, first + ahead + array.itemsize


def _overlapping(reaches: Sequence[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """Yield groups of arrays that lie in the same memory, with its addresses."""
    group: list[int] = []
    start = end = 0
    for number in sorted(range(len(reaches)), key=reaches.__getitem__):
        low, high = reaches[number]
        if group and low >= end:
            yield (start, end), group
            group = []
        if not group:
            start = low
        group.append(number)
        end = max(end, high)
    if group:
        yield (start, end), group


def _pieces(low: int, high: int) -> Iterator[bytes | None]:
    """Yield the memory between two addresses piece by piece; None is one full of zeros."""
    for start in range(low, high, _BLOCK):
        size = min(_BLOCK, high - start)
        if size < _SMALL:
            yield ctypes.string_at(start, size)
            continue
        piece: Array = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(start))
        if not piece.any():
            yield None
            continue
        packed = lz4.block.compress(piece, store_size=False)
        yield packed if len(packed) < _WORTH * size else piece.tobytes()


def _filled(size: int, pieces: Sequence[bytes | None]) -> Array:
    """Memory of these pieces; where they are zeros, it is not touched and so takes no room."""
    memory = np.zeros(size, np.uint8)
    for start, piece in zip(range(0, size, _BLOCK), pieces, strict=True):
        if piece is not None:
            room = memory[start : start + _BLOCK]
            whole = piece if len(piece) == room.size else lz4.block.decompress(piece, uncompressed_size=room.size)
            room[:] = np.frombuffer(whole, np.uint8)
    return memory


def _placed(memories: Sequence[Array], place: _Placed) -> Array:
    dtype = np.lib.format.descr_to_dtype(place.dtype)
    if dtype.hasobject:
        raise Broken("a checkpoint has an array of objects")
    array: Array = np.ndarray(place.shape, dtype, memories[place.memory], place.offset, place.strides)
    array.setflags(write=place.writeable)
    return array


def _stream(state: Any) -> np.random.Generator:
    bits = np.random.PCG64()
    bits.state = state
    return np.random.Generator(bits)
