"""Guests as light processes: each holds one private anonymous area whose pages are made from 64-bit keys."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import math
import mmap
import os
import resource
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
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
from numpy.random import default_rng

from sim.errors import MachineError
from sim.lab.machine import TOKEN_VARIABLE

Pattern = Literal["early", "late", "random", "packed"]
Advice = Literal["MERGEABLE", "UNMERGEABLE", "DONTNEED"]
Keys = npt.NDArray[np.uint64]
Pages = npt.NDArray[np.int64]

PAGE_BYTES: Final = 4096
HUGE_BYTES: Final = 2 << 20
_WORDS: Final = PAGE_BYTES // 8
PACKED: Final = np.uint64(255)
"""Bits of a key that say, under the pattern `packed`, how small zram makes the page, in units of 16 bytes."""
_VARIANT_SHIFT: Final = np.uint64(8)
_CHUNK_PAGES: Final = 256
_LIMITED_CHUNK_PAGES: Final = 16
"""The same where memory is limited: what is rendered counts against the limit until it is written."""
_TICK_NS: Final = 1_000_000
_DRAWN: Final = 4096
_REPLY_TIMEOUT_S: Final = 120.0
_RESIDENT: Final = np.uint64(1 << 63)
_SWAPPED: Final = np.uint64(1 << 62)
"""Bits of a pagemap entry: in memory, or in swap (Documentation/admin-guide/mm/pagemap.rst)."""
_ENTRIES: Final = 4096
"""Entries of pagemap read at once."""
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4
"""Flags of mlockall (linux/mman.h)."""


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


class Confinement(NamedTuple):
    """A control group that limits a guest's memory."""

    entries: Sequence[str]
    """The cgroup.procs of each hierarchy."""
    limit: str
    """The file with the limit."""
    usage: str
    """The file with what counts against it."""
    limit_bytes: int
    """What the guest's own pages may take."""


class Farewell(NamedTuple):
    """What a guest says at its end: what it did by plan, when it ended (ns), and what became of its memory."""

    deeds: list[Done]
    ended_ns: int
    touched_pages: int
    written_pages: int
    ksm_stat: dict[str, int]
    """The figures of /proc/PID/ksm_stat."""
    swapped_pages: int = 0
    """Touched pages that are in swap."""
    reads: int = 0
    """Reads of pages at random and in loops."""
    stalled_ns: int = 0
    """Time for which it waited for its memory."""
    progress: float = 1.0
    """Share of what it would have done by itself had it never waited."""


def mix(values: Keys) -> Keys:
    """Scramble 64-bit numbers one to one (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def render(keys: Keys, pattern: Pattern, templates: Keys | None = None) -> Keys:
    """The contents of pages with these keys, as 64-bit words, shape (pages, 512).

    Equal keys give equal bytes, different keys different bytes, and key 0 is the zero page.
    Pages differ in their first 8 bytes (`early`), only in their last 8 (`late`), or everywhere (`random`). Those that
    are `packed` differ in their first 8 bytes, and are else one of the *templates* of their size (`lab.templates`).
    """
    counter = np.arange(1, _WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    if pattern == "packed" and templates is not None:
        packed = keys & PACKED
        words: Keys = templates[packed, (keys >> _VARIANT_SHIFT) % np.uint64(templates.shape[1])]
        words[:, 0] = keys
        words[packed == 0] = keys[packed == 0, None]
        words[packed == PACKED] = mix(keys[packed == PACKED, None] + counter)
    elif pattern == "random":
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

    def __init__(self, token: str, templates: Keys | None = None) -> None:
        """*templates* are those of the pattern `packed`."""
        self._templates = templates
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

    def spawn(
        self, name: str, pages: int, pattern: Pattern, huge_pages: bool = False, limited: bool = False
    ) -> GuestProcess:
        """A new guest with an area of `pages` pages, none of them present and none mergeable.

        One that will be *limited* keeps in memory what is not its area.
        """
        guest = self._adopt(name, self._hand_over_line)
        if self._templates is not None:
            guest.call("take_templates", self._templates)
        if limited:
            guest.call("stay")
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

    def confine(self, group: Confinement, pages: Pages) -> None:
        """Limit the guest's memory before these pages, all that it will have, are written."""
        self.call("confine", group, pages)

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


class _Clock:
    """A guest's activity time (ns): it runs `level` times as fast as the real one, and stands while the guest waits."""

    def __init__(self, now_ns: int, level: float = 1.0) -> None:
        self.level = level
        self._since_ns, self._active_ns = float(now_ns), 0.0
        self._lost_ns = 0.0

    def read(self, now_ns: float) -> float:
        """The activity time at a real time."""
        return self._active_ns + (now_ns - self._since_ns) * self.level

    def real_ns(self, active_ns: float) -> float:
        """When an activity time will come; infinity for a guest at rest."""
        return self._since_ns + (active_ns - self._active_ns) / self.level if self.level else math.inf

    def set_level(self, level: float, now_ns: int) -> None:
        """Go `level` times as fast as the real clock from now on."""
        self._active_ns, self._since_ns = self.read(now_ns), now_ns
        self.level = level

    def stand(self, stalled_ns: int) -> None:
        """Leave out time that has just passed."""
        self._since_ns += stalled_ns
        self._lost_ns += stalled_ns * self.level

    def progress(self, now_ns: int) -> float:
        """The activity time as a share of what it would be had the clock never stood."""
        active_ns = self.read(now_ns)
        return active_ns / (active_ns + self._lost_ns) if self._lost_ns else 1.0


class _Arrivals:
    """Random accesses to pages, those of each class at exponential gaps of its own, on a clock of activity time."""

    def __init__(self, classes: Sequence[tuple[Pages, float]], generator: np.random.Generator, after_ns: float) -> None:
        """*classes* are pages and how often a second each of them is accessed; the first access is after *after_ns*."""
        self._pages = np.concatenate([pages for pages, _ in classes])
        self._sizes = np.array([len(pages) for pages, _ in classes])
        self._firsts = np.cumsum(self._sizes) - self._sizes
        rates = np.array([len(pages) * per_second for pages, per_second in classes])
        self._shares = np.cumsum(rates / rates.sum())
        self._mean_gap_ns = 1e9 / float(rates.sum())
        self._generator = generator
        self._times, self._picks = self._draw(after_ns)

    def next_ns(self) -> float:
        """When the next access is due."""
        return float(self._times[0])

    def due(self, active_ns: float) -> Iterator[Pages]:
        """Batches of pages to access now."""
        while self._times[0] <= active_ns:
            count = int(np.searchsorted(self._times, active_ns, side="right"))
            yield self._picks[:count]
            last_ns = float(self._times[count - 1])
            self._times, self._picks = self._times[count:], self._picks[count:]
            if not len(self._times):
                self._times, self._picks = self._draw(last_ns)

    def _draw(self, after_ns: float) -> tuple[npt.NDArray[np.float64], Pages]:
        """The next accesses after a moment: their times and their pages."""
        random = self._generator
        times = after_ns + np.cumsum(random.exponential(self._mean_gap_ns, _DRAWN))
        kind = np.minimum(np.searchsorted(self._shares, random.random(_DRAWN), side="right"), len(self._sizes) - 1)
        return times, self._pages[self._firsts[kind] + random.integers(self._sizes[kind])]


class _Writer:
    """Rewrites random pages of a set, each at its own exponential gaps of activity time.

    A write leaves one of `choices`, or, where there are none, a content nobody else has.
    """

    def __init__(self, pages: Pages, per_second: float, seed: int, choices: Keys, after_ns: float = 0.0) -> None:
        self._generator = default_rng(seed)
        self._arrivals = _Arrivals([(pages, per_second)], self._generator, after_ns)
        self._seed = np.uint64(seed << 32)
        self._choices = choices
        self.chooses = bool(len(choices))
        self._count = 0
        self.next_ns = self._arrivals.next_ns

    def due(self, active_ns: float) -> Iterator[tuple[Pages, Keys]]:
        """Batches of pages and the keys to write to them now."""
        for pages in self._arrivals.due(active_ns):
            yield pages, self._keys(len(pages))

    def _keys(self, count: int) -> Keys:
        if self.chooses:
            return self._generator.choice(self._choices, count)
        first = self._count + 1
        self._count += count
        return mix(self._seed + np.arange(first, first + count, dtype=np.uint64))


class _Loop:
    """Reads pages one after the other, and again from the first, each once in a period of activity time."""

    def __init__(self, first: int, pages: int, period_ns: int, after_ns: float) -> None:
        self._first, self._pages = first, pages
        self._gap_ns = period_ns / pages
        self._began_ns = after_ns
        self._count = 0

    def next_ns(self) -> float:
        """When the next read is due."""
        return self._began_ns + self._count * self._gap_ns

    def due(self, active_ns: float) -> Iterator[Pages]:
        """Pages to read now."""
        count = int((active_ns - self._began_ns) // self._gap_ns) + 1
        if count > self._count:
            yield self._first + np.arange(self._count, count) % self._pages
            self._count = count


class _Guest:
    """The process that is the guest: obeys its line, follows its plan, and reads and rewrites pages at given rates."""

    def __init__(self, line: int) -> None:
        self._connection = Connection(line)
        self._plan: list[Act] = []
        self._start_ns: int | None = None
        self._chunk_pages = _CHUNK_PAGES
        self._limited = False
        self._templates: Keys | None = None
        self._group: Confinement | None = None
        self._be_born()

    def _be_born(self) -> None:
        """Nothing is done yet, and nothing is to be done at random."""
        self._writers: list[_Writer] = []
        self._readers: list[_Arrivals | _Loop] = []
        self._clock = _Clock(time.monotonic_ns())
        self._worked_ns = 0
        self._written_pages = 0
        self._reads = 0
        self._stalled_ns = 0
        self._done: list[Done] = []

    def run(self) -> None:
        """Work until told to exit, or until the lab hangs up."""
        try:
            while True:
                if select.select([self._connection], [], [], self._idle_s())[0]:
                    self._obey(*self._connection.recv())
                self._follow_plan()
                self._work()
        except (EOFError, ConnectionResetError, BrokenPipeError):
            os._exit(0)
        except BaseException:
            self._connection.send((traceback.format_exc(), None))
            os._exit(1)

    def take_templates(self, templates: Keys) -> None:
        """Learn what packed pages look like."""
        self._templates = templates

    def stay(self) -> None:
        """Keep this process in memory, what it has and what it will have, with copies of what it shares."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mlockall(_MCL_CURRENT) or libc.mlockall(_MCL_FUTURE | _MCL_ONFAULT):
            raise OSError(ctypes.get_errno(), "memory cannot be locked")
        self._limited, self._chunk_pages = True, _LIMITED_CHUNK_PAGES

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
        self._packed = np.zeros(pages, np.uint64)
        if self._limited:
            ctypes.CDLL(None).munlock(ctypes.c_void_p(words.ctypes.data), ctypes.c_size_t(words.nbytes))

    def confine(self, group: Confinement, pages: Pages) -> None:
        """Join a control group in which *pages* of the area count, and little else; that is added to the limit."""
        for entry in group.entries:
            Path(entry).write_text(str(os.getpid()))
        render(np.arange(self._chunk_pages, dtype=np.uint64), self._pattern, self._templates)
        self._load(pages)  # maps the zero page, which counts nowhere, and makes the page tables, which do
        Path(group.limit).write_text(str(group.limit_bytes + int(Path(group.usage).read_text())))
        self._group = group

    def _settle_limit(self) -> None:
        """Let the limit hold for the area alone, whatever this process has come to need by now.

        Pages of the area that were written to swap and are still in their frames count as well.
        """
        if self._group:
            area = PAGE_BYTES * self._pages(_RESIDENT) + _swap_cached(Path(self._group.usage).with_name("memory.stat"))
            others = int(Path(self._group.usage).read_text()) - area
            Path(self._group.limit).write_text(str(self._group.limit_bytes + others))

    def write(self, pages: Pages, keys: Keys) -> None:
        """Fill pages with the contents of keys, a cache-sized part at a time."""
        for at in range(0, len(pages), self._chunk_pages):
            part = slice(at, at + self._chunk_pages)
            self._store(pages[part], render(keys[part], self._pattern, self._templates))
        self._packed[pages] = keys & PACKED
        self._written_pages += len(pages)

    def _store(self, pages: Pages, words: Keys) -> None:
        began = self._wait_begins()
        self._words[pages] = words
        self._wait_ends(*began)

    def _load(self, pages: Pages) -> None:
        """Read a word of each page."""
        for at in range(0, len(pages), _CHUNK_PAGES):
            began = self._wait_begins()
            self._words[pages[at : at + _CHUNK_PAGES], 0].max()
            self._wait_ends(*began)

    def _wait_begins(self) -> tuple[int, int]:
        return (_faults(), time.monotonic_ns()) if self._limited else (0, 0)

    def _wait_ends(self, faults: int, began_ns: int) -> None:
        """Count the time of an access as a stall if it met page faults: the guest does nothing else meanwhile."""
        if self._limited and _faults() > faults:
            stalled_ns = time.monotonic_ns() - began_ns
            self._stalled_ns += stalled_ns
            self._clock.stand(stalled_ns)

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
        self._writers.append(_Writer(pages, per_second, seed, choices, self._active_ns()))
        self._settle_limit()

    def reads(self, classes: Sequence[tuple[Pages, float]], seed: int) -> None:
        """Start to read pages at random."""
        self._readers.append(_Arrivals(classes, default_rng(seed), self._active_ns()))
        self._settle_limit()

    def loop(self, first: int, pages: int, period_ns: int) -> None:
        """Start to read pages in a loop."""
        self._readers.append(_Loop(first, pages, period_ns, self._active_ns()))
        self._settle_limit()

    def level(self, level: float) -> None:
        """Scale all rates from now on."""
        self._clock.set_level(level, time.monotonic_ns())

    def _active_ns(self) -> float:
        return self._clock.read(time.monotonic_ns())

    def plan(self, acts: list[Act]) -> None:
        """Learn what to do later."""
        self._plan = sorted(acts, key=lambda act: act.time_ns)

    def begin(self, start_ns: int) -> None:
        """Start following the plan, with its times counted from this moment of the monotonic clock."""
        self._start_ns = start_ns
        self._be_born()

    def take_line(self) -> int:
        """Receive a line for a future child."""
        return recv_handle(self._connection)

    def fork(self, line: int, plan: list[Act]) -> None:
        """Become two; the child has its own line and its own plan, and does nothing at random yet."""
        if os.fork():
            os.close(line)
            return
        self._connection.close()
        self._connection = Connection(line)
        self._be_born()
        self.plan(plan)

    def pid(self) -> int:
        """The process id."""
        return os.getpid()

    def exit(self) -> NoReturn:
        """Report, and end."""
        ended_ns = time.monotonic_ns() - (self._start_ns or 0)
        touched, swapped = self._pages(_RESIDENT | _SWAPPED), self._pages(_SWAPPED)
        report = Farewell(
            self._done, ended_ns, touched, self._written_pages, _ksm_stat(), swapped, self._reads, self._stalled_ns,
            self._clock.progress(time.monotonic_ns()),
        )  # fmt: skip
        self._connection.send(("", report))
        os._exit(0)

    def _pages(self, bits: np.uint64) -> int:
        """Pages of the area with any of these bits in /proc/PID/pagemap."""
        first, count = self._words.ctypes.data // PAGE_BYTES, 0
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            for at in range(0, len(self._words), _ENTRIES):
                size = min(_ENTRIES, len(self._words) - at)
                entries = np.frombuffer(os.pread(pagemap.fileno(), 8 * size, 8 * (first + at)), np.uint64)
                count += int(np.count_nonzero(entries & bits))
        return count

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

    def _work(self) -> None:
        """Do what is due at random and in loops."""
        if not (self._writers or self._readers):
            return
        self._worked_ns = time.monotonic_ns()
        active_ns = self._clock.read(self._worked_ns)
        for reader in self._readers:
            for pages in reader.due(active_ns):
                self._load(pages)
                self._reads += len(pages)
        for writer in self._writers:
            for pages, keys in writer.due(active_ns):
                fresh = self._pattern == "packed" and not writer.chooses
                self.write(pages, keys & ~PACKED | self._packed[pages] if fresh else keys)

    def _idle_s(self) -> float | None:
        """How long the guest may sleep, in s; None when nothing is planned."""
        times: list[float] = []
        if self._plan and self._start_ns is not None:
            times.append(self._start_ns + self._plan[0].time_ns)
        if self._writers or self._readers:
            # Accesses are gathered for a millisecond: waking for each one would cost more than the access.
            first_ns = min(each.next_ns() for each in (*self._writers, *self._readers))
            times.append(max(self._clock.real_ns(first_ns), self._worked_ns + _TICK_NS))
        idle_s = (min(times, default=math.inf) - time.monotonic_ns()) / 1e9
        return max(0.0, idle_s) if idle_s < math.inf else None


def _faults() -> int:
    """Page faults of this thread so far."""
    used = resource.getrusage(resource.RUSAGE_THREAD)
    return used.ru_minflt + used.ru_majflt


def _swap_cached(statistics: Path) -> int:
    """Bytes of the swap cache that a control group is charged."""
    words = dict(line.split() for line in statistics.read_text().splitlines())
    return int(words.get("swapcached", 0))


def _ksm_stat() -> dict[str, int]:
    """This process's figures in /proc/PID/ksm_stat; none where the kernel has no such file."""
    with contextlib.suppress(FileNotFoundError), open("/proc/self/ksm_stat", encoding="ascii") as lines:
        words = (line.split() for line in lines)
        return {name: int(value) for name, value in words if not name.endswith(":")}
    return {}
