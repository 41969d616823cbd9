"""A real QEMU guest of 128 MiB: a Debian kernel and busybox that fill memory, wait for a word, and copy pages."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

QEMU = "qemu-system-x86_64"
ROOT_VARIABLE = "OVERCOMMIT_GUEST_ROOT"
"""Names the folder into which a kernel and a static busybox were unpacked, if not into the root."""
MEMORY_MIB = 128
FILE_PAGES = 2048
"""Pages of each file that the guest makes: one of equal pages, one of unique ones, later a copy of that."""

_INIT = b"""#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t tmpfs tmp /tmp
/bin/busybox yes equal-to-others | /bin/busybox head -c 8388608 > /tmp/equal
/bin/busybox head -c 8388608 /dev/urandom > /tmp/unique
echo filled > /dev/ttyS0
read word < /dev/ttyS0
/bin/busybox cp /tmp/unique /tmp/copy
echo copied > /dev/ttyS0
/bin/busybox sleep 1000
"""
_CONSOLE = (5, 1)
_PATIENCE_S = 240


def found(pattern: str) -> Path | None:
    """The last readable file of that pattern."""
    files = [file for file in Path(os.environ.get(ROOT_VARIABLE, "/")).glob(pattern) if os.access(file, os.R_OK)]
    return max(files, default=None)


def kernel() -> Path | None:
    """A kernel to boot."""
    return found("boot/vmlinuz-*-amd64")


def busybox() -> Path | None:
    """A busybox that needs no libraries."""
    file = found("usr/bin/busybox") or found("bin/busybox")
    dynamic = file and subprocess.run(["ldd", file], capture_output=True, check=False).returncode == 0
    return None if dynamic else file


def missing() -> str:
    """Why no guest can run here, or nothing."""
    if not shutil.which(QEMU):
        return f"{QEMU} is not installed"
    if not busybox():
        return f"no static busybox, nor a folder with one in {ROOT_VARIABLE}"
    return "" if kernel() else f"no kernel to boot, nor a folder with one in {ROOT_VARIABLE}"


def archive(*entries: tuple[str, int, bytes, tuple[int, int]]) -> bytes:
    """A cpio archive (newc) of name, mode, contents and device number."""
    parts = []
    for number, (name, mode, data, device) in enumerate([*entries, ("TRAILER!!!", 0, b"", (0, 0))], start=1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]
    return b"".join(parts)


class TinyGuest:
    """A running guest; its memory is in the file `ram`."""

    def __init__(self, process: subprocess.Popen[str], monitor: socket.socket, ram: Path) -> None:
        self.ram = ram
        self.pid = process.pid
        self._process = process
        self._monitor = monitor.makefile("rw", encoding="utf-8")
        self._monitor.readline()
        self.order("qmp_capabilities")

    def wait_for(self, word: str) -> None:
        """Read the guest's console until it says the word."""
        assert self._process.stdout
        while (line := self._process.stdout.readline()).strip() != word:
            assert line, f"the guest ended before it said {word}"

    def say(self, word: str) -> None:
        """Type a word on the guest's console."""
        assert self._process.stdin
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def order(self, command: str, **arguments: object) -> Any:
        """Have QEMU do something and return its answer."""
        self._monitor.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._monitor.flush()
        while "event" in (answer := json.loads(self._monitor.readline())):
            pass
        assert "return" in answer, answer
        return answer["return"]


def _command(folder: Path, monitor: int) -> Sequence[str | Path]:
    return [
        *(QEMU, "-nodefaults", "-display", "none", "-no-reboot", "-accel", "tcg", "-m", f"{MEMORY_MIB}M"),
        *("-machine", "q35,mem-merge=off,memory-backend=ram", "-serial", "stdio"),
        *("-object", f"memory-backend-file,id=ram,size={MEMORY_MIB}M,mem-path={folder / 'ram'},share=on"),
        *("-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control"),
        *("-kernel", str(kernel()), "-initrd", folder / "initrd", "-append", "console=ttyS0 quiet panic=-1"),
    ]


@contextmanager
def tiny_guest(folder: Path) -> Iterator[TinyGuest]:
    """A guest that has just been switched on; it ends with the block."""
    program = busybox()
    assert program
    directories = ((name, 0o40755, b"", (0, 0)) for name in ("bin", "dev", "tmp"))
    programs = (("bin/busybox", 0o100755, program.read_bytes(), (0, 0)), ("init", 0o100755, _INIT, (0, 0)))
    (folder / "initrd").write_bytes(archive(*directories, ("dev/console", 0o20600, b"", _CONSOLE), *programs))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            _command(folder, theirs.fileno()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            text=True,
            errors="replace",
        )
        deadline = Timer(_PATIENCE_S, process.kill)
        deadline.start()
        with process:
            try:
                yield TinyGuest(process, ours, folder / "ram")
            finally:
                deadline.cancel()
                process.kill()
