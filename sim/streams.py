"""One random stream per named thing, so that adding a guest or a process never changes another's numbers."""

from __future__ import annotations

import hashlib

import numpy as np


def key(seed: int, *names: str | int) -> int:
    """Return the 64-bit key of the stream that belongs to `names` under the scenario's `seed`."""
    digest = hashlib.blake2b(digest_size=8)
    for name in (seed, *names):
        # The type and the length keep ("a", "b") apart from ("ab",) and 1 from "1".
        text = str(name).encode()
        digest.update(f"{type(name).__name__}:{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest(), "big")


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """Return a fresh generator of the stream that belongs to `names`, always at its beginning."""
    return np.random.Generator(np.random.PCG64(key(seed, *names)))
