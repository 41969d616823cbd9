"""A process that does what it is told, line by line, with areas of memory whose places are known."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import ctypes, mmap, os, sys
areas = []

def area(pages):
    made = mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made.madvise(mmap.MADV_NOHUGEPAGE)
    areas.append(made)
    start = ctypes.addressof(ctypes.c_char.from_buffer(made))
    return start, start + pages * 4096

def put(area, *keys):
    for number, key in enumerate(keys):
        if key is not None:
            areas[area][number * 4096 : (number + 1) * 4096] = key.to_bytes(8, "little") * 512

print(flush=True)
for line in sys.stdin:
    print(eval(line), flush=True)
"""


class Child:
    """The process; `areas` are the addresses of the memory it was told to make."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, "-S", "-c", _PROGRAM], stdin=pipe, stdout=pipe, text=True)
        self.pid = self._process.pid
        self.areas: list[tuple[int, int]] = []
        assert self._process.stdout
        self._process.stdout.readline()

    def do(self, expression: str) -> str:
        """Have it evaluate a Python expression, and return what that prints as."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(expression + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def area(self, pages: int) -> None:
        """Have it map private memory, none of which exists yet."""
        start, end = map(int, self.do(f"area({pages})").strip("()").split(","))
        self.areas.append((start, end))

    def put(self, area: int, *keys: int | None) -> None:
        """Have it fill pages of an area with the contents of these keys."""
        self.do(f"put({area}, *{keys!r})")

    def end(self) -> None:
        """End it and wait until it is gone."""
        self._process.kill()
        self._process.communicate()
