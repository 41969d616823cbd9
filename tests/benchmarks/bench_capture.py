"""How fast memory is captured, and how much memory that takes.

By hand, where the package is installed: `python tests/benchmarks/bench_capture.py`. Takes 9 GiB of free memory.
"""

import mmap
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

PAGES = 1 << 20
WORDS = 512
FOLDER = Path("/dev/shm")


def fill(buffer: mmap.mmap) -> None:
    """A guest of 4 GiB: half its pages unique, 30 % with copies, 20 % zeros; the bytes compress to about a half."""
    random = np.random.default_rng(1)
    words = np.frombuffer(buffer, np.uint64).reshape(PAGES, WORDS)
    for begin in range(0, PAGES, 4096):
        kind = random.random(4096)
        block = random.integers(0, 1 << 62, (4096, WORDS), np.uint64)
        block[:, ::2] = 7
        copies = random.integers(0, 4096, np.count_nonzero((kind > 0.5) & (kind < 0.8)))
        block[(kind > 0.5) & (kind < 0.8)] = (copies[:, None] + 1) * np.arange(1, WORDS + 1)
        block[kind >= 0.8] = 0
        words[begin : begin + 4096] = block


@contextmanager
def ram_file(file: Path) -> Iterator[dict[str, Any]]:
    """The memory as a RAM file in the page cache."""
    with file.open("w+b") as stream:
        stream.truncate(PAGES * 4096)
        with mmap.mmap(stream.fileno(), 0) as buffer:
            fill(buffer)
            yield {"ram": file}
    file.unlink()


@contextmanager
def process(_: Path) -> Iterator[dict[str, Any]]:
    """The memory as that of a process."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        area = mmap.mmap(-1, PAGES * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.madvise(mmap.MADV_NOHUGEPAGE)
        fill(area)
        os.write(tell, b"x")
        time.sleep(3600)
    os.read(ready, 1)
    yield {"pid": pid}
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def measure(title: str, **options: Any) -> None:
    """Capture in a process of its own, and print CPU time of reading and hashing, of all, and the peak of memory."""
    if os.fork():
        os.wait()
        return
    from sim.lab.capture import _Recorder, capture

    seconds = {"see": 0.0}
    see: Callable[..., Any] = _Recorder._see

    def timed(*arguments: Any) -> Any:
        before = time.process_time()
        seen = see(*arguments)
        seconds["see"] += time.process_time() - before
        return seen

    _Recorder._see = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        before = time.process_time()
        taken = capture(Path(folder, "guest.npz"), **options)
        total = time.process_time() - before
        size = taken.file.stat().st_size
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    read = taken.touched_pages * taken.snapshots * 4096 / 1e9
    print(
        f"{title}: {read / seconds['see']:.2f} GB/s read and hashed, {total:.1f} s CPU in all for {read:.1f} GB, "
        f"peak {int(found[1]) >> 10 if found else 0} MiB, image of {size >> 10} KiB"
    )
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    """Measure each kind of capture."""
    for kind in (ram_file, process):
        with kind(FOLDER / "bench-capture.ram") as options:
            title = kind.__name__.replace("_", " ")
            measure(title, **options)
            measure(f"{title}, 4 snapshots", every_ns=1, for_ns=3, **options)
            measure(f"{title}, comparable", comparable=FOLDER / "bench-capture.key", **options)
            measure(f"{title}, comparable again", comparable=FOLDER / "bench-capture.key", **options)
            (FOLDER / "bench-capture.key").unlink()
            measure(f"{title}, with --compress", compress=True, **options)


if __name__ == "__main__":
    main()
