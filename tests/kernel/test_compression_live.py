"""What zram itself says that pages take, page by page and in all."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lz4.block
import numpy as np
import pytest

from sim.lab.machine import exclusive
from sim.lab.swap_costs import _direct, algorithms
from sim.lab.swapping import zram_device
from sim.reclaim.compression import packed_sizes, pool_bytes, stored_bytes

pytestmark = pytest.mark.kernel

PAGE = 4096
Pages = np.ndarray[Any, np.dtype[np.uint8]]

# Another set of modules than that of the sizes in sim/reclaim/compression.py; the process is read while it waits.
PROCESS = """
import asyncio, decimal, email.message, http.client, logging, numpy, sqlite3, unittest, xml.dom.minidom
words = {str(number): [number, str(number * number)] for number in range(100_000)}
print("ready", flush=True)
input()
"""


def memory_of_a_process() -> Pages:
    """Pages of a running program that are no zeros: its data, its code and its libraries."""
    command = [sys.executable, "-c", PROCESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        pages = np.array([*_mapped_pages(process.pid)])
        process.stdin.write("\n")
    return pages[pages.any(axis=1)]


def _mapped_pages(pid: int) -> Iterator[Pages]:
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            limits, access, *_ = line.split()
            first, last = (int(each, 16) for each in limits.split("-"))
            if access.startswith("r") and "[v" not in line:
                yield from np.frombuffer(os.pread(memory.fileno(), last - first, first), np.uint8).reshape(-1, PAGE)


@pytest.fixture(scope="module")
def memory() -> Pages:
    return memory_of_a_process()


def stored(pages: Pages, algorithm: str) -> tuple[Any, int]:
    """Compressed size of each page, and the memory that all take in the end."""
    with exclusive(), zram_device() as number:
        folder = Path(f"/sys/block/zram{number}")
        (folder / "comp_algorithm").write_text(algorithm)
        (folder / "disksize").write_text(str(len(pages) * PAGE))
        totals = [0]
        with _direct(Path(f"/dev/zram{number}")) as device, mmap.mmap(-1, PAGE) as aligned:
            for at, page in enumerate(pages):
                aligned[:] = page.tobytes()
                os.pwrite(device, aligned, at * PAGE)
                totals.append(int((folder / "mm_stat").read_text().split()[1]))
        return np.diff(totals), int((folder / "mm_stat").read_text().split()[2])


def test_pages_take_to_the_byte_what_the_size_classes_say(memory: Pages) -> None:
    sizes, taken = stored(memory, "lzo-rle")
    packed = np.where(sizes >= PAGE, 255, np.ceil((sizes + 8) / 16))
    packed[sizes == 0] = 0

    assert pool_bytes(packed.astype(np.uint8)) == taken


@pytest.mark.parametrize("algorithm", ["lzo-rle", "lzo", "lz4"])
def test_the_memory_of_a_program_takes_what_its_lz4_sizes_say(memory: Pages, algorithm: Any) -> None:
    with exclusive():
        known = algorithms()
    if algorithm not in known:
        pytest.skip(f"this kernel's zram has no {algorithm}")
    lz4_bytes = [min(PAGE, len(lz4.block.compress(page.tobytes(), store_size=False))) for page in memory]

    sizes, taken = stored(memory, algorithm)
    packed = packed_sizes(lz4_bytes, algorithm)

    assert len(memory) > 5000
    assert pool_bytes(packed) == pytest.approx(taken, rel=0.05)
    assert stored_bytes(packed) == pytest.approx(sizes.sum(), rel=0.05)
