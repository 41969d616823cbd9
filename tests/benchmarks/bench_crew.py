"""What it costs to have hosts in other processes: parallel efficiency, messages, and checkpoints.

By hand, where the package is installed: `python tests/benchmarks/bench_crew.py [ADDRESS]`, where ADDRESS is that of a
Dask scheduler. The machine should do nothing else.
"""

import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sim.columns import SAMPLES
from sim.datacenter.checkpoint import opened, pack, seal, unpack
from sim.datacenter.crew import Crew
from sim.datacenter.messages import NEVER, REPORT, Answer, Newcomer, Order, Orders, Start

HOSTS = 10_000
EPOCHS = 8


@dataclass(frozen=True)
class Part:
    """A part of the hosts, and how much it has to compute in an epoch."""

    hosts: int
    sorts: int


class Busy:
    """A shard that sorts numbers, and reports for each host."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._stream = np.random.Generator(np.random.PCG64(1))

    @classmethod
    def restore(cls, part: Part, saved: bytes) -> "Busy":
        busy = cls(part)
        busy._stream = unpack(saved)
        return busy

    def save(self) -> bytes:
        return pack(self._stream)

    def advance(self, orders: Orders) -> Answer:
        for _ in range(self._part.sorts):
            np.sort(self._stream.integers(0, 1 << 40, 10_000))
        numbers = np.arange(self._part.hosts)
        reports = self._stream.integers(0, 1 << 40, (self._part.hosts, len(REPORT)))
        return Answer(numbers, reports, {"host": np.zeros(len(SAMPLES), np.int64)}, (), (), ())

    def finish(self) -> Mapping[str, int]:
        return {}


def seconds(do: Callable[[], object], times: int = 3) -> float:
    """The shortest time that it takes."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        do()
        found.append(time.perf_counter() - began)
    return min(found)


def epoch(parts: Sequence[Part], jobs: int, cluster: str | None, orders: Sequence[Order] = ()) -> float:
    """The shortest time of an epoch (s)."""
    told = [Orders(0, True, orders)] * len(parts)
    with Crew(Busy, jobs=jobs, cluster=cluster) as crew:
        crew.begin(parts)
        return seconds(lambda: crew.advance(told), EPOCHS)


def tell_of_checkpoints(what: str, state: np.ndarray) -> None:
    """Measure how an array is kept."""
    key = bytes(32)
    data = pack(state)
    sealed = seal(data, key)
    write, read, check = (
        1000 * seconds(do) for do in (lambda: pack(state), lambda: unpack(data), lambda: opened(sealed, key))
    )
    print(f"{state.nbytes >> 20} MiB of {what}: {len(data)} bytes")
    print(f"ms to write {write:.0f}, to read {read:.0f}, to check {check:.0f}")


def main() -> None:
    """Measure and print."""
    cluster = sys.argv[1] if len(sys.argv) > 1 else None
    alone = epoch([Part(HOSTS, 4000)], 1, None)
    two = epoch([Part(HOSTS // 2, 2000)] * 2, 2, cluster)
    print(f"an epoch of {alone:.3f} s takes two workers {two:.3f} s: {alone / two / 2:.3f} of ideal")

    orders = [Start(host, 0, Newcomer(f"guest-{host}", "web", 0, NEVER)) for host in range(0, HOSTS, 100)]
    answer = Busy(Part(HOSTS, 0)).advance(Orders(0, True, orders))
    sent, back = (len(pickle.dumps(each, 5)) for each in (Orders(0, True, orders), answer))
    here = epoch([Part(HOSTS // 2, 0)] * 2, 1, None)
    there = epoch([Part(HOSTS // 2, 0)] * 2, 2, cluster, orders[: len(orders) // 2])
    print(f"{HOSTS} reports and {len(orders)} orders: {sent} bytes there, {back} back")
    print(f"ms an epoch {1000 * (there - here):.1f}")

    contents = np.random.Generator(np.random.PCG64(1)).integers(0, 200, 1 << 24).astype(np.int32)
    tell_of_checkpoints("contents", contents)
    tell_of_checkpoints("memory never touched", np.zeros(1 << 28, np.int32))


if __name__ == "__main__":
    main()
