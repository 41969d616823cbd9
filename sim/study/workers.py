"""Processes on this machine, each doing one task after the other."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from threading import Thread
from typing import Final, NamedTuple, TypeVar

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")

# A new interpreter: a copy of this one would copy whatever its threads were holding.
_CONTEXT: Final = get_context("spawn")


class Died(NamedTuple):
    """What becomes of a task whose process was killed or crashed."""

    reason: str


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def run_all(do: Callable[[Task], Outcome], tasks: Sequence[Task], jobs: int) -> Iterator[tuple[int, Outcome | Died]]:
    """Yield the number of each task with what became of it, as they end; never more than *jobs* at once.

    A process that dies takes only its own task with it. *do* must be a function of a module.
    """
    waiting = iter(enumerate(tasks))
    running: dict[Future[Outcome], tuple[int, ProcessPoolExecutor]] = {}
    # One pool for each process: a pool of several could not tell whose task killed it.
    idle = [_pool() for _ in range(min(jobs, len(tasks)))]
    try:
        while True:
            for number, task in _while_any(idle, waiting):
                pool = idle.pop()
                running[pool.submit(do, task)] = number, pool
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, pool = running.pop(future)
                came_to = _outcome(future)
                idle.append(_renewed(pool) if isinstance(came_to, Died) else pool)
                yield number, came_to
    finally:
        if running:
            for child in active_children():
                child.terminate()
        for pool in [*idle, *(pool for _, pool in running.values())]:
            pool.shutdown(wait=False, cancel_futures=True)


def _outcome(future: Future[Outcome]) -> Outcome | Died:
    try:
        return future.result()
    except BrokenProcessPool:
        return Died("its process crashed or was killed, for lack of memory perhaps")


def _while_any(idle: Sequence[object], waiting: Iterator[tuple[int, Task]]) -> Iterator[tuple[int, Task]]:
    while idle and (item := next(waiting, None)):
        yield item


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=_CONTEXT, initializer=_begin)


def _renewed(pool: ProcessPoolExecutor) -> ProcessPoolExecutor:
    pool.shutdown(wait=False)
    return _pool()


def _begin() -> None:
    """Leave Ctrl-C to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)
