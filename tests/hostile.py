"""Any bytes as a scenario, an image or a trace: read, or refused with an error for users, soon and in little memory.

Nothing but the reading is done: `overcommit validate` and not `run`. fuzz.py invents such bytes.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch
from zipfile import ZipFile

from sim.datacenter.traces import Trace, newcomers, openb
from sim.document import Document
from sim.errors import At, UserError
from sim.memory.image import Captured, load_capture
from sim.scenario import Scenario, load, parse, points

CORPUS = Path(__file__).with_name("corpus.zip")
"""Inputs that fuzz.py invented: the shortest for each message that it met, and those that once were a failure."""
SEPARATOR = b"\n%%%%\n"
"""What stands between the files, or a file and its overrides, of one input."""
MOST_POINTS = 50
"""Points of a sweep that are read here: each is a scenario of its own, and ten thousand of them take their time."""
MOST_GUESTS = 10_000
SLOWEST_S = 1.0
SLOWED = 4.0  # a busy machine, or instrumented code
MOST_BYTES = 200 << 20


def scenario(data: bytes, folder: Path) -> None:
    """A scenario file, the file that it may extend, and what `--set` says."""
    first, *others = data.split(SEPARATOR, 2)
    (folder / "s.yaml").write_bytes(first)
    (folder / "base.yaml").write_bytes(b"".join(others[:1]))
    overrides = others[1].decode(errors="replace").splitlines()[:4] if len(others) > 1 else []
    found = load(folder / "s.yaml", overrides)
    assert isinstance(found, Scenario)
    parse(found.resolved(), folder)  # what is written to the results can be read again


def image(data: bytes, folder: Path) -> None:
    """A captured image."""
    (folder / "image.npz").write_bytes(data)
    captured = Document(str(folder / "s.yaml"), {"captured": "image.npz"}).check(Captured, folder=str(folder))
    captured.check_size(1 << 40)
    load_capture.cache_clear()
    assert captured.data_set_name
    load_capture(captured.path)


def trace(data: bytes, folder: Path) -> None:
    """A trace: the first byte says of which format and whether it is a folder, the rest is its files."""
    kind, files = data[:1], data[1:].split(SEPARATOR, 1)
    form, names = TRACES[ord(kind or b"0") % len(TRACES)]
    path = folder / f"trace-{form}{'-folder' if names else ''}"
    path.mkdir(exist_ok=True) if names else path.write_bytes(data[1:])
    for name, content in zip(names, files, strict=False):
        (path / name).write_bytes(content)
    machine = {"machine": {"memory": "512GiB", "cores": 64}} if form in ("azure", "google") else {}
    given = {"path": path.name, "format": form, "kinds": ["web"], **machine}
    block = Document(str(folder / "s.yaml"), given).check(Trace, folder=str(folder))
    for _ in islice(newcomers(block), MOST_GUESTS):
        pass


TRACES = (
    ("openb", (openb.PODS, openb.NODES)),
    ("planetlab", ("a", "b")),
    ("google", ("a", "b")),
    ("google", ()),
    ("bitbrains", ("meta.parquet", "trace.parquet")),
    ("azure", ()),
)
KINDS = {b"s": scenario, b"i": image, b"t": trace}
"""What an input is about, by its first byte."""


@dataclass
class Worst:
    """What an input took at most."""

    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: bytes = b""
    bytes: int = 0
    """Resident memory that the process had at most more than before the first input."""

    def told(self) -> str:
        """All that in a line."""
        return (
            f"{self.inputs:,} inputs, {self.refused:,} of them refused; the slowest took {self.seconds:.3f} s "
            f"({self.slowest[:60]!r}); memory grew by {self.bytes / (1 << 20):.0f} MiB"
        )


class Reader:
    """Reads inputs and keeps account of what they take."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.worst = Worst()
        self._before = _peak_bytes()

    def __call__(self, data: bytes) -> None:
        """Read one input. Anything but an error for users is raised, as is AssertionError if it took too much."""
        began = time.process_time()
        try:
            KINDS.get(data[:1], scenario)(data[1:] if data[:1] in KINDS else data, self.folder)
        except (UserError, At) as error:
            self.worst.refused += 1
            _check(error)
        took = time.process_time() - began
        self.worst.inputs += 1
        if took > self.worst.seconds:
            self.worst.seconds, self.worst.slowest = took, data
        self.worst.bytes = max(self.worst.bytes, _peak_bytes() - self._before)
        assert took < SLOWEST_S * SLOWED, f"took {took:.2f} s"
        assert self.worst.bytes < MOST_BYTES, f"took {self.worst.bytes >> 20} MiB"


def _check(error: UserError | At) -> None:
    """An error is a few lines of text that a terminal takes, each of which says what is wrong."""
    said = str(error)
    assert said.strip(), "says nothing"
    said.encode()
    for problem in error.problems if isinstance(error, UserError) else ():
        assert problem.message and "\n" not in problem.message, problem
        assert "Traceback" not in problem.message and "object at 0x" not in problem.message, problem


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextmanager
def reader() -> Iterator[Reader]:
    """A reader with a folder of its own, in memory if there is such a disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with TemporaryDirectory(dir=memory) as folder, patch.object(points, "MOST_POINTS", MOST_POINTS):
        yield Reader(Path(folder))


def replay(archive: Path) -> Worst:
    """Read all inputs in an archive, each of which may hold nothing worse than mistakes."""
    with ZipFile(archive) as inputs, reader() as read:
        for name in inputs.namelist():
            try:
                read(inputs.read(name))
            except Exception as error:
                error.add_note(f"input {name} of {archive}")
                raise
        return read.worst
