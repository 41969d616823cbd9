"""Guests as light processes: each holds one private anonymous area whose pages are made from 64-bit keys."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, Final, Literal, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
from numpy.random import default_rng

from sim.errors import MachineError
from sim.lab.machine import TOKEN_VARIABLE

Pattern = Literal["early", "late", "random"]
Advice = Literal["MERGEABLE", "UNMERGEABLE", "DONTNEED"]
Keys = npt.NDArray[np.uint64]
Pages = npt.NDArray[np.int64]

PAGE_BYTES: Final = 4096
HUGE_BYTES: Final = 2 << 20
_WORDS: Final = PAGE_BYTES // 8
_CHUNK_PAGES: Final = 256
_WRITER_TICK_NS: Final = 1_000_000
_WRITER_CHUNK: Final = 4096
_REPLY_TIMEOUT_S: Final = 120.0
_PRESENT: Final = np.uint64(0b11 << 62)
"""Bits of a pagemap entry: in memory, or in swap (Documentation/admin-guide/mm/pagemap.rst)."""


class Act(NamedTuple):
    """Something a guest does by itself at a time after the start of the run."""

    time_ns: int
    verb: str
    arguments: tuple[Any, ...]


class Done(NamedTuple):
    """When a planned act began and ended, in ns after the start of the run."""

    time_ns: int
    verb: str
    began_ns: int
    ended_ns: int


class Farewell(NamedTuple):
    """What a guest says at its end: what it did by plan, when it ended (ns), and what became of its memory."""

    deeds: list[Done]
    ended_ns: int
    touched_pages: int
    written_pages: int
    ksm_stat: dict[str, int]
    """The figures of /proc/PID/ksm_stat."""


def mix(values: Keys) -> Keys:
    """Scramble 64-bit numbers one to one (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def render(keys: Keys, pattern: Pattern) -> Keys:
    """The contents of pages with these keys, as 64-bit words, shape (pages, 512).

    Equal keys give equal bytes, different keys different bytes, and key 0 is the zero page.
    Pages differ in their first 8 bytes (`early`), only in their last 8 (`late`), or everywhere (`random`).
    """
    counter = np.arange(1, _WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    if pattern == "random":
        words = mix(keys[:, None] + counter)
    else:
        words = np.tile(mix(counter), (len(keys), 1))
        words[:, 0 if pattern == "early" else -1] = keys
    words[keys == 0] = 0
    return words


def digests(words: Keys) -> Keys:
    """A 64-bit fingerprint of each page, shape (pages,), from its words, shape (pages, 512)."""
    marks = [hashlib.blake2b(page.data, digest_size=8).digest() for page in words]
    return np.frombuffer(b"".join(marks), dtype=np.uint64)


class GuestServer:
    """Starts guests quickly and cheaply, as forks of one small process that has nothing but numpy loaded."""

    def __init__(self, token: str) -> None:
        ours, theirs = socket.socketpair()
        environment = {TOKEN_VARIABLE: token, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", f"from sim.lab.guest import serve; serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        self._guests: list[GuestProcess] = []

    def spawn(self, name: str, pages: int, pattern: Pattern, huge_pages: bool = False) -> GuestProcess:
        """A new guest with an area of `pages` pages, none of them present and none mergeable."""
        guest = self._adopt(name, self._hand_over_line)
        guest.call("map", pages, pattern, huge_pages)
        return guest

    def fork(self, parent: GuestProcess, name: str, plan: Sequence[Act] = ()) -> GuestProcess:
        """A copy of `parent` made now by fork, sharing its pages until one of them writes."""
        child, line = self.reserve(parent, name)
        parent.call("fork", line, list(plan))
        child.answer()
        return child

    def reserve(self, parent: GuestProcess, name: str) -> tuple[GuestProcess, int]:
        """A guest that `parent` will fork when its plan says so, and the number of its line inside `parent`."""
        line = 0

        def hand_over(ends: socket.socket) -> None:
            nonlocal line
            line = parent.hand_over(ends)

        return self._adopt(name, hand_over), line

    def close(self) -> None:
        """End all guests and the server."""
        for guest in self._guests:
            guest.hang_up()
        self._connection.close()
        self._process.wait()

    def _hand_over_line(self, end: socket.socket) -> None:
        self._connection.send("spawn")
        send_handle(self._connection, end.fileno(), self._process.pid)

    def _adopt(self, name: str, hand_over: Callable[[socket.socket], None]) -> GuestProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            hand_over(theirs)
        guest = GuestProcess(name, Connection(ours.detach()))
        self._guests.append(guest)
        return guest


class GuestProcess:
    """The lab's end of the line to one guest; every call waits until the guest has done it."""

    def __init__(self, name: str, connection: Connection) -> None:
        self.name = name
        self._connection = connection

    def write(self, pages: Pages, keys: Keys) -> None:
        """Fill these pages with the contents of these keys."""
        self.call("write", pages, keys)

    def digests(self, pages: Pages) -> Keys:
        """Fingerprints of what these pages hold now (see `digests`)."""
        marks: Keys = self.call("digests", pages)
        return marks

    def madvise(self, first: int, count: int, advice: Advice) -> None:
        """Advise the kernel about `count` pages from page `first`."""
        self.call("madvise", first, count, advice)

    def touch(self, pages: Pages, word: int) -> int:
        """Store `word` at the start of each page; return the time taken in ns."""
        elapsed: int = self.call("touch", pages, word)
        return elapsed

    def pid(self) -> int:
        """The guest's process id."""
        number: int = self.call("pid")
        return number

    def hand_over(self, end: socket.socket) -> int:
        """Give the guest the far end of a new guest's line; return its number there."""
        self._connection.send(("take_line", ()))
        send_handle(self._connection, end.fileno(), 0)
        line: int = self.answer()
        return line

    def plan(self, acts: Sequence[Act]) -> None:
        """Tell the guest what to do by itself; it waits for `begin`."""
        self.call("plan", list(acts))

    def begin(self, start_ns: int) -> None:
        """Set the zero of the plan's times, on the monotonic clock; a guest not forked yet inherits it."""
        self.call("begin", start_ns)

    def end(self) -> Farewell:
        """End the guest, unless its plan already did, and return its last words."""
        if not self._connection.poll():
            self._connection.send(("exit", ()))
        farewell: Farewell = self.answer()
        self.hang_up()
        return farewell

    def hang_up(self) -> None:
        """Close the line; a living guest ends when it notices."""
        self._connection.close()

    def call(self, verb: str, *arguments: object) -> Any:
        """Have the guest do something and return its reply; MachineError if it failed."""
        with contextlib.suppress(BrokenPipeError):  # it ended, and may have said why
            self._connection.send((verb, arguments))
        return self.answer()

    def answer(self) -> Any:
        """Wait for the guest's reply to a call; MachineError if it failed or ended."""
        if not self._connection.poll(_REPLY_TIMEOUT_S):
            raise MachineError(f"guest {self.name} does not answer for {_REPLY_TIMEOUT_S:.0f} s")
        try:
            failure, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise MachineError(f"guest {self.name} ended unexpectedly (killed for lack of memory?)") from None
        if failure:
            raise MachineError(f"guest {self.name} failed:\n{failure}")
        return value


def serve(descriptor: int) -> None:
    """The server's process: forks a guest for every line it is given, until the lab hangs up."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # The lab decides when guests end, also when Ctrl-C reaches the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError):
        while connection.recv() == "spawn":
            line = recv_handle(connection)
            if os.fork() == 0:
                connection.close()
                _Guest(line).run()
            os.close(line)


class _Writer:
    """Rewrites random pages of a set, each at its own exponential gaps, while its guest is active.

    A write leaves one of `choices`, or, where there are none, a content nobody else has. Times are kept on a clock
    that runs `level` times as fast as the real one: with a new level, writes drawn already move.
    """

    def __init__(
        self, pages: Pages, per_second: float, seed: int, choices: Keys, start_ns: int, level: float = 1.0
    ) -> None:
        self._pages = pages
        self._mean_gap_ns = 1e9 / (per_second * len(pages))
        self._seed = np.uint64(seed << 32)
        self._choices = choices
        self._generator = default_rng(seed)
        self._count = 0
        self._level, self._since_ns, self._active_ns = level, start_ns, 0.0
        self._times, self._picks = self._draw(0.0)

    def set_level(self, level: float, now_ns: int) -> None:
        """Write `level` times as often as the rate says from now on."""
        self._active_ns, self._since_ns = self._active(now_ns), now_ns
        self._level = level

    def next_ns(self) -> float:
        """When the next write is due; infinity for a guest at rest."""
        ahead_ns = self._times[0] - self._active_ns
        return self._since_ns + ahead_ns / self._level if self._level else math.inf

    def due(self, now_ns: int) -> Iterator[tuple[Pages, Keys]]:
        """Batches of pages and the keys to write to them now."""
        active_ns = self._active(now_ns)
        while self._times[0] <= active_ns:
            count = int(np.searchsorted(self._times, active_ns, side="right"))
            yield self._picks[:count], self._keys(count)
            self._count += count
            last_ns = self._times[count - 1]
            self._times, self._picks = self._times[count:], self._picks[count:]
            if not len(self._times):
                self._times, self._picks = self._draw(last_ns)

    def _active(self, now_ns: int) -> float:
        return self._active_ns + (now_ns - self._since_ns) * self._level

    def _keys(self, count: int) -> Keys:
        if len(self._choices):
            return self._generator.choice(self._choices, count)
        return mix(self._seed + np.arange(self._count + 1, self._count + count + 1, dtype=np.uint64))

    def _draw(self, after_ns: float) -> tuple[npt.NDArray[np.float64], Pages]:
        """The next writes after a moment: their times in ns and their pages."""
        gaps = self._generator.exponential(self._mean_gap_ns, _WRITER_CHUNK)
        return after_ns + np.cumsum(gaps), self._generator.choice(self._pages, _WRITER_CHUNK)


class _Guest:
    """The process that is the guest: obeys its line, follows its plan, and rewrites pages at given rates."""

    def __init__(self, line: int) -> None:
        self._connection = Connection(line)
        self._plan: list[Act] = []
        self._writers: list[_Writer] = []
        self._level = 1.0
        self._wrote_ns = 0
        self._written_pages = 0
        self._done: list[Done] = []
        self._start_ns: int | None = None

    def run(self) -> None:
        """Work until told to exit, or until the lab hangs up."""
        try:
            while True:
                if select.select([self._connection], [], [], self._idle_s())[0]:
                    self._obey(*self._connection.recv())
                self._follow_plan()
                self._rewrite()
        except (EOFError, ConnectionResetError, BrokenPipeError):
            os._exit(0)
        except BaseException:
            self._connection.send((traceback.format_exc(), None))
            os._exit(1)

    def map(self, pages: int, pattern: Pattern, huge_pages: bool) -> None:
        """Reserve the area, from a 2 MiB boundary; a page comes into being when it or its huge page is written."""
        self._pattern = pattern
        size = pages * PAGE_BYTES
        self._area = mmap.mmap(-1, size + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._offset = -np.frombuffer(self._area, np.uint8).ctypes.data % HUGE_BYTES
        self._area.madvise(mmap.MADV_NOHUGEPAGE)
        if huge_pages:
            self._area.madvise(mmap.MADV_HUGEPAGE, self._offset, size)
        words = np.frombuffer(self._area, np.uint64, pages * _WORDS, self._offset)
        self._words = words.reshape(pages, _WORDS)

    def write(self, pages: Pages, keys: Keys) -> None:
        """Fill pages with the contents of keys, a cache-sized part at a time."""
        for at in range(0, len(pages), _CHUNK_PAGES):
            part = slice(at, at + _CHUNK_PAGES)
            self._words[pages[part]] = render(keys[part], self._pattern)
        self._written_pages += len(pages)

    def digests(self, pages: Pages) -> Keys:
        """Fingerprints of pages."""
        return digests(self._words[pages])

    def madvise(self, first: int, count: int, advice: Advice) -> None:
        """Pass advice about a range to the kernel."""
        self._area.madvise(getattr(mmap, f"MADV_{advice}"), self._offset + first * PAGE_BYTES, count * PAGE_BYTES)

    def touch(self, pages: Pages, word: int) -> int:
        """Store a word in each page and time it."""
        before = time.perf_counter_ns()
        self._words[pages, 0] = word
        return time.perf_counter_ns() - before

    def rate(self, pages: Pages, per_second: float, seed: int, choices: Keys) -> None:
        """Start to rewrite pages at random."""
        self._writers.append(_Writer(pages, per_second, seed, choices, time.monotonic_ns(), self._level))

    def level(self, level: float) -> None:
        """Scale all rates from now on."""
        self._level = level
        for writer in self._writers:
            writer.set_level(level, time.monotonic_ns())

    def plan(self, acts: list[Act]) -> None:
        """Learn what to do later."""
        self._plan = sorted(acts, key=lambda act: act.time_ns)

    def begin(self, start_ns: int) -> None:
        """Start following the plan, with its times counted from this moment of the monotonic clock."""
        self._start_ns = start_ns
        self._written_pages = 0

    def take_line(self) -> int:
        """Receive a line for a future child."""
        return recv_handle(self._connection)

    def fork(self, line: int, plan: list[Act]) -> None:
        """Become two; the child has its own line and its own plan, and no writers."""
        if os.fork():
            os.close(line)
            return
        self._connection.close()
        self._connection = Connection(line)
        self._writers = []
        self._level = 1.0
        self._written_pages = 0
        self._done = []
        self.plan(plan)

    def pid(self) -> int:
        """The process id."""
        return os.getpid()

    def exit(self) -> NoReturn:
        """Report, and end."""
        ended_ns = time.monotonic_ns() - (self._start_ns or 0)
        report = Farewell(self._done, ended_ns, self._touched_pages(), self._written_pages, _ksm_stat())
        self._connection.send(("", report))
        os._exit(0)

    def _touched_pages(self) -> int:
        """Pages of the area that are present, by /proc/PID/pagemap."""
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            entries = os.pread(pagemap.fileno(), 8 * len(self._words), self._words.ctypes.data // PAGE_BYTES * 8)
        return int(np.count_nonzero(np.frombuffer(entries, np.uint64) & _PRESENT))

    def _obey(self, verb: str, arguments: tuple[Any, ...]) -> None:
        value = getattr(self, verb)(*arguments)
        self._connection.send(("", value))

    def _follow_plan(self) -> None:
        while self._start_ns is not None and self._plan:
            began_ns = time.monotonic_ns() - self._start_ns
            if self._plan[0].time_ns > began_ns:
                return
            act = self._plan.pop(0)
            getattr(self, act.verb)(*act.arguments)
            self._done.append(Done(act.time_ns, act.verb, began_ns, time.monotonic_ns() - self._start_ns))

    def _rewrite(self) -> None:
        if not self._writers:
            return
        self._wrote_ns = time.monotonic_ns()
        for writer in self._writers:
            for pages, keys in writer.due(self._wrote_ns):
                self.write(pages, keys)

    def _idle_s(self) -> float | None:
        """How long the guest may sleep, in s; None when nothing is planned."""
        times: list[float] = []
        if self._plan and self._start_ns is not None:
            times.append(self._start_ns + self._plan[0].time_ns)
        if self._writers:
            # Writes are gathered for a millisecond: waking for each one would cost more than the write.
            first_ns = min(writer.next_ns() for writer in self._writers)
            times.append(max(first_ns, self._wrote_ns + _WRITER_TICK_NS))
        idle_s = (min(times, default=math.inf) - time.monotonic_ns()) / 1e9
        return max(0.0, idle_s) if idle_s < math.inf else None


def _ksm_stat() -> dict[str, int]:
    """This process's figures in /proc/PID/ksm_stat; none where the kernel has no such file."""
    with contextlib.suppress(FileNotFoundError), open("/proc/self/ksm_stat", encoding="ascii") as lines:
        words = (line.split() for line in lines)
        return {name: int(value) for name, value in words if not name.endswith(":")}
    return {}
