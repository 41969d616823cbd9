"""Who comes when: every source of guests as a stream, and all of them merged in order of time."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, repeat, takewhile
from typing import Any, Final

import numpy as np

from sim.datacenter.blocks import (
    Batch,
    BootStorm,
    Datacenter,
    Exponential,
    Fixed,
    Lifetime,
    Lognormal,
    Poisson,
)
from sim.datacenter.messages import NEVER, Int64, Newcomer
from sim.datacenter.traces import Reading, Trace
from sim.memory.guest import Vm
from sim.streams import generator
from sim.units import DAY, SECOND

_DRAWN: Final = 4096
"""Random numbers drawn at a time."""

Random = np.random.Generator
Plain = tuple[int, str, int]
"""A guest that is as its kind says: when it comes, its kind, how long it lives."""


def read_traces(datacenter: Datacenter) -> dict[int, Reading]:
    """Each trace, read once, by its place among the sources. Raises UserError for one that cannot be read."""
    return {place: Reading(each) for place, each in enumerate(datacenter.arrivals) if isinstance(each, Trace)}


def newcomers(
    datacenter: Datacenter, vms: Sequence[Vm], seed: int, duration: int, readings: Mapping[int, Reading]
) -> Iterator[Newcomer]:
    """Every guest that comes before the end (ns), in order of time; guests of a kind are numbered as they come, those
    of a trace as it numbers them. Nothing but the next guest of each source is held.
    """
    kinds = {vm.name: vm for vm in vms}
    named = {kind for source in datacenter.arrivals for kind in source.kinds}
    streams: list[Iterator[Plain | Newcomer]] = [_listed(vm, duration) for vm in vms if vm.name not in named]
    sources = {name: count() for name in named}
    for number, source in enumerate(datacenter.arrivals):
        if isinstance(source, Trace):
            streams.append(_traced(readings[number], duration))
        else:
            random = generator(seed, "arrivals", source.kind, next(sources[source.kind]))
            streams.append(_cut(_stream(source, random, duration), kinds[source.kind], duration))
    numbers = {name: count() for name in kinds}
    for guest in heapq.merge(*streams, key=_time):
        if isinstance(guest, Newcomer):
            yield guest
        else:
            time, kind, lifetime = guest
            yield Newcomer(f"{kind}-{next(numbers[kind])}", kind, time, lifetime)


def _time(guest: Plain | Newcomer) -> int:
    return guest.time if isinstance(guest, Newcomer) else guest[0]


def _listed(vm: Vm, duration: int) -> Iterator[Plain]:
    """Guests that an entry of `vms` lists by itself."""
    for start, stop in vm.lives(NEVER):
        if start >= duration:
            return
        yield start, vm.name, stop - start if stop < NEVER else NEVER


def _traced(reading: Reading, duration: int) -> Iterator[Newcomer]:
    """Guests of a trace before the end."""
    return takewhile(lambda guest: guest.time < duration, reading.newcomers())


def _cut(stream: Iterator[Plain], vm: Vm, duration: int) -> Iterator[Plain]:
    """Guests before the end, none of which outlives what its kind allows."""
    last = min(duration, vm.stop) if vm.stop is not None else duration
    longest = vm.lifetime or NEVER
    for time, kind, lifetime in stream:
        if time >= last:
            return
        yield time, kind, min(lifetime, longest, vm.stop - time if vm.stop is not None else NEVER)


def _stream(source: Poisson | Batch | BootStorm, random: Random, duration: int) -> Iterator[Plain]:
    if isinstance(source, Poisson):
        moments = _poisson(source, random, duration)
    elif isinstance(source, Batch):
        moments = _batches(source, duration)
    else:
        moments = _storms(source, random, duration)
    for times in moments:
        lives = _lifetimes(source.lifetime, random, len(times))
        yield from zip(times.tolist(), repeat(source.kind), lives.tolist(), strict=False)


def _poisson(source: Poisson, random: Random, duration: int) -> Iterator[Int64]:
    """Moments of a Poisson process; one whose rate changes is thinned from one at the highest rate (Lewis & Shedler
    1979), which is exact.
    """
    day = np.array(source.day or (1.0,))
    highest = day.max()
    mean_gap = SECOND / (source.rate * highest)
    now, stop = source.start, min(duration, source.stop if source.stop is not None else duration)
    while now < stop:
        # Whole ns, so that a sum of many gaps loses nothing; a gap beyond any run is as good as endless.
        gaps = np.minimum(random.exponential(mean_gap, _DRAWN), NEVER / (2 * _DRAWN)).round().astype(np.int64)
        kept = random.random(_DRAWN) * highest
        times = now + np.cumsum(gaps)
        now = int(times[-1])
        level = day[times % DAY * len(day) // DAY]
        yield times[(kept < level) & (times < stop)]


def _batches(source: Batch, duration: int) -> Iterator[Int64]:
    for time in range(source.at, duration, source.every or duration):
        for first in range(0, source.batch, _DRAWN):
            yield np.full(min(_DRAWN, source.batch - first), time)


def _storms(source: BootStorm, random: Random, duration: int) -> Iterator[Int64]:
    for time in range(source.at, duration, source.every or duration):
        yield time + np.sort(random.integers(0, source.within, source.boot_storm))


def _lifetimes(lifetime: Lifetime | None, random: Random, guests: int) -> Int64:
    """How long so many guests live (ns), at least 1 ns and at most NEVER."""
    drawn: np.ndarray[Any, np.dtype[np.float64]]
    if isinstance(lifetime, Fixed):
        return np.full(guests, lifetime.fixed)
    if isinstance(lifetime, Exponential):
        drawn = random.exponential(lifetime.exponential, guests)
    elif isinstance(lifetime, Lognormal):
        drawn = lifetime.lognormal * np.exp(lifetime.sigma * random.standard_normal(guests))
    else:
        return np.full(guests, NEVER)
    return np.clip(drawn, 1, NEVER).astype(np.int64)
