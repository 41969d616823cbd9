"""Resident workers, each of which holds a part of the hosts for a whole run: here, in processes, or on a cluster.

All get their orders at once and work side by side; answers come back in the order of the parts. A worker that dies is
replaced: a new one takes the last checkpoint of its part, is told again what was said since, and must answer the same.
"""

from __future__ import annotations

import heapq
import pickle
import secrets
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, is_dataclass
from multiprocessing.connection import Connection
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import Any, Final, Generic, NoReturn, Protocol, TypeVar

import numpy as np

from sim.cluster import Cluster, connected
from sim.datacenter.checkpoint import opened, seal
from sim.errors import MachineError, OvercommitError
from sim.processes import CONTEXT, begin, how_it_ended

Spec = TypeVar("Spec")
Orders = TypeVar("Orders")
Answer = TypeVar("Answer")
Tables = TypeVar("Tables")
Spec_contra = TypeVar("Spec_contra", contravariant=True)
Orders_contra = TypeVar("Orders_contra", contravariant=True)
Answer_co = TypeVar("Answer_co", covariant=True)
Tables_co = TypeVar("Tables_co", covariant=True)

WINDOW: Final = 12
"""Epochs between two checkpoints."""
_SAVING: Final = 0.05
"""Share of the time that checkpoints may take: a window in which they would take more is left out."""
SAVING_S: Final = 1.0
"""What checkpoints are taken to need (s) before the first: a run that is over in 20 s is begun anew without."""
_DEATHS: Final = 3
"""How many workers in a row may die of the same orders."""
_IN_MEMORY: Final = 16 << 20
"""A larger checkpoint (bytes) lies in a file without a name, which is gone with this process."""


class Shard(Protocol[Orders_contra, Answer_co, Tables_co]):
    """A part of the hosts of a run: the same orders always get the same answers, which nobody changes afterwards."""

    def advance(self, orders: Orders_contra, /) -> Answer_co:
        """Follow orders up to the moment that they name."""

    def save(self) -> bytes | None:
        """All that `restore` needs to go on from here; None at a moment at which it cannot be stored."""

    def finish(self) -> Tables_co:
        """What is known at the end of the run."""


class Kind(Protocol[Spec_contra, Orders_contra, Answer_co, Tables_co]):
    """The class of a shard: a name in a module, since that is how workers get it."""

    def __call__(self, spec: Spec_contra, /) -> Shard[Orders_contra, Answer_co, Tables_co]:
        """Make a shard at the beginning of its run."""

    def restore(self, spec: Spec_contra, saved: bytes, /) -> Shard[Orders_contra, Answer_co, Tables_co]:
        """Make a shard as it was when it was saved."""


def split(weights: Sequence[int], workers: int) -> list[list[int]]:
    """Spread things over workers so that their weights (bytes of memory) are balanced; return the numbers of each.

    The heaviest goes first, each to whoever has least (Graham 1969: at most 4/3 of the best balance). Workers that
    would have nothing are left out.
    """
    parts: list[list[int]] = [[] for _ in range(min(workers, len(weights)))]
    loads = [(0, worker) for worker in range(len(parts))]
    for number in sorted(range(len(weights)), key=lambda number: (-weights[number], number)):
        load, worker = heapq.heappop(loads)
        parts[worker].append(number)
        heapq.heappush(loads, (load + weights[number], worker))
    return [sorted(part) for part in parts if part]


class Crew(Generic[Spec, Orders, Answer, Tables]):
    """The workers of a run: in this process (one job), in so many processes, or on the cluster at an address."""

    def __init__(
        self,
        kind: Kind[Spec, Orders, Answer, Tables],
        jobs: int = 1,
        cluster: str | None = None,
        window: int = WINDOW,
        saving_s: float = SAVING_S,
    ) -> None:
        """Get ready. Raises UserError if the cluster cannot be reached or has another program.

        A checkpoint ends each *window* of so many epochs, or none if it takes too long: *saving_s* until one was taken.
        """
        self._kind = kind
        self._window = window
        self._key = secrets.token_bytes(32)
        self._members: list[_Member] = []
        self._epochs = 0
        self._saved_at = 0.0
        self._saving = saving_s
        self._closing = ExitStack()
        self._place: _Place = _Here()
        if cluster is not None:
            self._place = _Machines(self._closing.enter_context(connected(cluster)))
        elif jobs > 1:
            self._place = _Processes(jobs)

    @property
    def workers(self) -> int:
        """How many parts it is worth to make."""
        return self._place.workers

    def __enter__(self) -> Crew[Spec, Orders, Answer, Tables]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Send the workers home, busy or not."""
        with self._closing:
            for member in self._members:
                member.end()

    def begin(self, specs: Sequence[Spec]) -> None:
        """Make a shard of each spec, each with a worker of its own as far as there are so many."""
        self._members = [_Member(number, spec, self._place.hire()) for number, spec in enumerate(specs)]
        self._exchange("begin", [self._beginning(member) for member in self._members])
        self._saved_at = time.monotonic()

    def advance(self, orders: Sequence[Orders]) -> list[Answer]:
        """Let each shard follow its orders; return their answers, in the order of the specs."""
        answers: list[Answer] = self._exchange("advance", orders)
        if self._place.mortal:
            for member, told, answer in zip(self._members, orders, answers, strict=True):
                member.since.append((told, answer))
            self._save_in_time()
        return answers

    def finish(self) -> list[Tables]:
        """What each shard knows at the end."""
        return self._exchange("finish", [None] * len(self._members))

    def _exchange(self, what: str, subjects: Sequence[object]) -> list[Any]:
        """Ask all, then wait for each."""
        pairs = list(zip(self._members, subjects, strict=True))
        for member, subject in pairs:
            member.ask(what, subject)
        return [self._reply(member, what, subject) for member, subject in pairs]

    def _reply(self, member: _Member, what: str, subject: object) -> Any:
        """What a shard answers, by a new worker if need be."""
        deaths = 0
        while True:
            try:
                return member.reply()
            except Lost as death:
                deaths += 1
                if deaths > _DEATHS:
                    raise MachineError(
                        f"part {member.number + 1} of {len(self._members)} of the hosts lost {deaths} workers in a "
                        f"row: {death}; with less memory in use at a time (fewer --jobs, smaller hosts) it may fit"
                    ) from None
                self._replace(member, what, subject)

    def _replace(self, member: _Member, what: str, subject: object) -> None:
        """Get a new worker to where the old one was, and ask it again what that one did not answer."""
        member.seat.leave()
        member.seat = self._place.hire()
        member.missing = None
        try:
            if what != "begin":
                member.say("begin", self._beginning(member))
                for orders, answer in member.since:
                    if not same(member.say("advance", orders), answer):
                        raise AssertionError(
                            f"part {member.number + 1} of the hosts answered its orders differently when told again"
                        )
        except Lost as death:
            member.missing = death
            return
        member.ask(what, subject)

    def _beginning(self, member: _Member) -> _Beginning:
        return _Beginning(self._kind, member.spec, self._key, member.saved())

    def _save_in_time(self) -> None:
        """Take checkpoints at the end of a window, unless they would take too much of the time since the last ones."""
        began = time.monotonic()
        self._epochs += 1
        if self._epochs % self._window or self._saving > _SAVING * (began - self._saved_at):
            return
        for member, checkpoint in zip(self._members, self._exchange("save", [None] * len(self._members)), strict=True):
            if checkpoint:
                member.keep(checkpoint)
        self._saved_at = time.monotonic()
        self._saving = self._saved_at - began


class Lost(Exception):
    """A worker is no more; says how it ended."""


@dataclass(frozen=True)
class _Beginning:
    """What a worker must know first."""

    kind: Kind[Any, Any, Any, Any]
    spec: object
    key: bytes
    checkpoint: bytes | None
    """Sealed with the key; None is the beginning of the run."""


class _Seat(Protocol):
    """Where a shard lives."""

    def ask(self, what: str, subject: object) -> None:
        """Begin to do something. Raises Lost."""

    def reply(self) -> object:
        """What was asked for. Raises Lost, or what went wrong there."""

    def leave(self) -> None:
        """End it, busy or not."""


class _Place(Protocol):
    """Where workers come from."""

    workers: int
    mortal: bool
    """Whether workers may die alone."""

    def hire(self) -> _Seat:
        """A new worker. Raises MachineError if there is none to be had."""


@dataclass
class _Member:
    """A shard as the crew knows it."""

    number: int
    spec: object
    seat: _Seat
    since: list[tuple[Any, Any]] = field(default_factory=list)
    """Orders and answers since the checkpoint."""
    missing: Lost | None = None
    """How its worker died, if that was noticed while it was asked."""
    checkpoint: Any = None

    def ask(self, what: str, subject: object) -> None:
        """Begin to do something; whether that went well is told by `reply`."""
        try:
            self.seat.ask(what, subject)
        except Lost as death:
            self.missing = death

    def reply(self) -> object:
        """What was asked for. Raises Lost."""
        if self.missing:
            raise self.missing
        return self.seat.reply()

    def say(self, what: str, subject: object) -> object:
        """Ask and wait. Raises Lost."""
        self.ask(what, subject)
        return self.reply()

    def keep(self, checkpoint: bytes) -> None:
        """Remember the state and forget how it came to be. Raises MachineError if there is no room."""
        file = SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
        try:
            file.write(checkpoint)
            file.flush()
        except OSError as error:
            file.close()
            raise MachineError(f"no room for a checkpoint of hosts: {error}; TMPDIR may name another folder") from None
        if self.checkpoint:
            self.checkpoint.close()
        self.checkpoint, self.since = file, []

    def saved(self) -> bytes | None:
        """The last checkpoint, if there is one."""
        if self.checkpoint is None:
            return None
        self.checkpoint.seek(0)
        data: bytes = self.checkpoint.read()
        return data

    def end(self) -> None:
        """Send the worker home and forget the state."""
        self.seat.leave()
        if self.checkpoint:
            self.checkpoint.close()


def same(one: object, other: object) -> bool:
    """Whether two answers are equal to the last bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and one.tobytes() == other.tobytes()
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if is_dataclass(one):
        return all(same(getattr(one, each.name), getattr(other, each.name)) for each in fields(one))
    return one == other or (one != one and other != other)


# --- what a worker does ------------------------------------------------------------------------------------------


class Resident:
    """A worker's side: one shard, and what is asked of it."""

    def __init__(self) -> None:
        self._shard: Any = None
        self._key = b""

    def do(self, what: str, subject: Any) -> object:
        """Do what the crew asks for."""
        if what == "begin":
            self._begin(subject)
            return None
        if what == "advance":
            return self._shard.advance(subject)
        if what == "save":
            state = self._shard.save()
            return state and seal(state, self._key)
        return self._shard.finish()

    def serve(self, request: bytes) -> bytes:
        """The same by messages, whatever goes wrong."""
        try:
            return pickle.dumps((None, self.do(*pickle.loads(request))), pickle.HIGHEST_PROTOCOL)
        except (OvercommitError, MemoryError) as error:
            return pickle.dumps((error, None), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            told = RuntimeError(f"in a worker: {type(error).__name__}: {error}")
            told.add_note(f"there:\n{traceback.format_exc()}")
            return pickle.dumps((told, None), pickle.HIGHEST_PROTOCOL)

    def _begin(self, beginning: _Beginning) -> None:
        self._key = beginning.key
        if beginning.checkpoint is None:
            self._shard = beginning.kind(beginning.spec)
        else:
            self._shard = beginning.kind.restore(beginning.spec, opened(beginning.checkpoint, self._key))


def _request(what: str, subject: object) -> bytes:
    return pickle.dumps((what, subject), pickle.HIGHEST_PROTOCOL)


def _answer(reply: bytes) -> object:
    error, answer = pickle.loads(reply)
    if error:
        raise error
    return answer


# --- in this process ---------------------------------------------------------------------------------------------


class _Here:
    """This process is the only worker."""

    workers = 1
    mortal = False

    def hire(self) -> _Seat:
        """A shard in this process."""
        return _Own()


class _Own:
    def __init__(self) -> None:
        self._resident = Resident()
        self._asked: tuple[str, object] = "", None

    def ask(self, what: str, subject: object) -> None:
        """Remember what to do."""
        self._asked = what, subject

    def reply(self) -> object:
        """Do it."""
        return self._resident.do(*self._asked)

    def leave(self) -> None:
        """Forget the shard."""
        self._resident = Resident()


# --- in processes of this machine --------------------------------------------------------------------------------


class _Processes:
    """Processes of this machine."""

    mortal = True

    def __init__(self, jobs: int) -> None:
        self.workers = jobs

    def hire(self) -> _Seat:
        """A new process."""
        return _Process()


class _Process:
    def __init__(self) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_work, args=(theirs,), daemon=True, name="overcommit hosts")
        self._process.start()
        theirs.close()  # so that the pipe ends with the process

    def ask(self, what: str, subject: object) -> None:
        """Send it a message."""
        try:
            self._pipe.send_bytes(_request(what, subject))
        except OSError:
            self._say_how_it_died()

    def reply(self) -> object:
        """Wait for its answer."""
        try:
            reply = self._pipe.recv_bytes()
        except (EOFError, OSError):
            self._say_how_it_died()
        return _answer(reply)

    def leave(self) -> None:
        """End it at once: it holds nothing that would be missed."""
        self._pipe.close()
        self._process.kill()
        self._process.join()
        self._process.close()

    def _say_how_it_died(self) -> NoReturn:
        self._process.join(1)
        raise Lost(how_it_ended(self._process.exitcode))


def _work(pipe: Connection) -> None:
    """What a process does all its life."""
    begin()
    resident = Resident()
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(resident.serve(request))


# --- on other machines -------------------------------------------------------------------------------------------


class _Machines:
    """Workers of a Dask cluster; a shard is an actor there."""

    mortal = True

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._checked = set(cluster.workers())
        self._hired: list[str] = []
        self.workers = len(self._checked)

    def hire(self) -> _Seat:
        """A new actor on the worker that has fewest. Raises MachineError if there is no worker any more."""
        there = self._cluster.wait_for_workers()
        if new := [worker for worker in there if worker not in self._checked]:
            self._cluster.check(new)
            self._checked.update(new)
        worker = min(there, key=lambda worker: (self._hired.count(worker), worker))
        self._hired.append(worker)
        return _Actor(self._cluster, worker)


class _Actor:
    def __init__(self, cluster: Cluster, worker: str) -> None:
        self._cluster = cluster
        self._worker = worker
        self._made: Any = cluster.client.submit(Resident, actor=True, workers=[worker], pure=False)
        self._actor: Any = None
        self._asked: Any = None

    def ask(self, what: str, subject: object) -> None:
        """Send it a message."""
        actor = self._there()
        try:
            self._asked = actor.serve(_request(what, subject))
        except RuntimeError as error:  # Dask knows already that the worker is lost
            self._gone(error)

    def _there(self) -> Any:
        """The actor, once it is made."""
        while self._actor is None:
            try:
                self._actor = self._made.result(timeout=1)
            except TimeoutError:
                if self._worker not in self._cluster.workers():
                    raise Lost(f"{self._worker} left the cluster") from None
            except Exception as error:
                self._gone(error)
        return self._actor

    def reply(self) -> object:
        """Wait for its answer."""
        try:
            reply = self._asked.result()
        except Exception as error:
            self._gone(error)
        return _answer(reply)

    def leave(self) -> None:
        """Let the worker forget the shard."""
        self._actor = self._asked = None
        self._made.release()

    def _gone(self, error: Exception) -> NoReturn:
        """Raise Lost, or MachineError if the whole cluster is."""
        self._cluster.workers()
        raise Lost(f"{self._worker} left the cluster ({error})") from None
