"""Workers on other machines: a Dask cluster, each of whose workers must run this very program.

Whoever reaches a Dask scheduler can run any code on its workers and in the programs that use it: a cluster is trusted
as this machine is.
"""

from __future__ import annotations

import gc
import logging
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from sim.engine import package_version, source_digest
from sim.errors import MachineError, Problem, UserError

if TYPE_CHECKING:
    from distributed import Client, Future

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")

PATIENCE_S: Final = 10
"""How long an address may take to answer, and a cluster to have a worker."""
_PACKAGES: Final = ("overcommit", "llvmlite", "numba", "numpy", "pandas", "pyarrow", "pydantic", "scipy", "simpy")
_LOGGERS: Final = ("distributed", "distributed.client", "tornado.application")
"""Loggers of Dask with levels of their own: what it has to say about lost workers is said by this program."""


@cache
def build() -> Mapping[str, str]:
    """What decides the bits of a result beside the scenario: versions, machine, and the program's own files."""
    packages = {package: package_version(package) for package in _PACKAGES}
    own = {"Python": platform.python_version(), "machine": platform.machine(), "source": source_digest()}
    return {**packages, **own}


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Say in what two builds differ; nothing if in nothing."""
    return ", ".join(
        f"{name} {there.get(name, 'missing')} there and {mine} here"
        for name, mine in here.items()
        if there.get(name) != mine
    )


@contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """Yield the cluster whose scheduler is at an address such as tcp://10.0.0.1:8786.

    Raises UserError if nothing answers there or a worker has another program, MachineError if there is no worker.
    """
    with _silent(), _client(address) as client, client.as_current():  # Dask's actors and futures look for it
        cluster = Cluster(address, client)
        cluster.check(cluster.wait_for_workers())
        yield cluster


class Cluster:
    """A connection to a scheduler."""

    def __init__(self, address: str, client: Client) -> None:
        self.client = client
        self._address = address

    def lost(self, error: BaseException) -> NoReturn:
        """Raise MachineError: the scheduler is gone."""
        raise MachineError(
            f"--cluster {self._address}: the scheduler is lost; what was finished before is kept"
        ) from error

    def workers(self) -> list[str]:
        """Addresses of the workers that are there now. Raises MachineError if the scheduler is gone."""
        try:
            return sorted(self.client.sync(self.client.scheduler.identity, callback_timeout=PATIENCE_S)["workers"])
        except (OSError, ValueError) as error:
            self.lost(error)

    def wait_for_workers(self) -> list[str]:
        """Addresses of the workers once there is one. Raises MachineError if there is none for too long."""
        if not self.workers():
            try:
                self.client.wait_for_workers(1, timeout=PATIENCE_S)
            except OSError:
                raise MachineError(
                    f"--cluster {self._address}: it has no worker; start one with: dask worker {self._address}"
                ) from None
        return self.workers()

    def check(self, workers: Sequence[str]) -> None:
        """Refuse workers that might find other figures. Raises UserError with each one that differs, and in what."""
        found = self.client.run(build, workers=list(workers), on_error="return")
        faults = {worker: _fault(found.get(worker)) for worker in workers}
        problems = [
            Problem(path=f"worker {worker}", message=fault, remedy="install the same on all machines, or stop it")
            for worker, fault in faults.items()
            if fault
        ]
        if problems:
            raise UserError(*problems)

    def run_all(self, do: Callable[[Task], Outcome], tasks: Sequence[Task]) -> Iterator[tuple[int, Outcome | None]]:
        """Yield the number of each task with what became of it, as they end; None if one worker after the other died.

        *do* must be a function of a module.
        """
        from distributed import KilledWorker, as_completed
        from distributed.client import FutureCancelledError

        futures: list[Future] = self.client.map(_checked, [(build(), do, task) for task in tasks], pure=False)
        numbers = {future.key: number for number, future in enumerate(futures)}
        try:
            for future in as_completed(futures):
                try:
                    came_to = future.result()
                except KilledWorker:
                    came_to = None
                except FutureCancelledError as error:
                    self.lost(error)
                yield numbers[future.key], came_to
                future.release()
        finally:
            self.client.cancel(futures)


def _checked(asked: tuple[Mapping[str, str], Callable[[Any], Any], Any]) -> Any:
    """Do a task, if this worker, which may have come later than the others, has the same program."""
    here, do, task = asked
    if fault := differences(build(), here):
        raise UserError(Problem(path=f"worker on {platform.node()}", message=f"has another program: {fault}"))
    return do(task)


def _fault(answer: object) -> str:
    """What is wrong with a worker that gave this answer when it was asked for its build."""
    if isinstance(answer, Mapping):
        found = differences(answer, build())
        return f"has another program: {found}" if found else ""
    return f"cannot run overcommit: {answer}" if answer else "is gone"


def _client(address: str) -> Client:
    try:
        from distributed import Client
    except ImportError:
        raise UserError("--cluster needs Dask; install it with: pip install 'overcommit[cluster]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # versions are checked here, by what matters
            return Client(address, timeout=PATIENCE_S, set_as_default=False, name="overcommit")
    except (OSError, ValueError, TypeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
    gc.collect()  # the client that failed closes itself now: while the next one starts, Dask would wait for itself
    raise UserError(
        f"--cluster {address}: no Dask scheduler can be reached there ({said}); "
        "give the address that `dask scheduler` printed, such as tcp://10.0.0.1:8786"
    )


@contextmanager
def _silent() -> Iterator[None]:
    """Let Dask's loggers say nothing meanwhile."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
