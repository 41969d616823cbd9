"""Processes on this machine, each doing one task after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children
from typing import NamedTuple, TypeVar

from sim.processes import CONTEXT, begin

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")


class Died(NamedTuple):
    """What becomes of a task whose process was killed or crashed."""

    reason: str


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
    return ProcessPoolExecutor(1, mp_context=CONTEXT, initializer=begin)


def _renewed(pool: ProcessPoolExecutor) -> ProcessPoolExecutor:
    pool.shutdown(wait=False)
    return _pool()
