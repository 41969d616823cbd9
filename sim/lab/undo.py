"""What a lab sets up besides KSM's settings, and how each kind of it is undone, whether or not it came to be.

Source: Documentation/admin-guide/blockdev/zram.rst (hot_remove), swapoff(8), cgroups(7).
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal

from sim.errors import MachineError

Kind = Literal["zram", "swap", "file", "cgroup", "setting"]

ZRAM: Final = Path("/sys/class/zram-control")
_TIMEOUT_S: Final = 10.0


def undo(kind: Kind, what: str) -> None:
    """Remove a zram device by its number, a swap area, a file or a control group, or write a setting, FILE=VALUE."""
    _WAYS[kind](what)


def _remove_zram(number: str) -> None:
    if Path(f"/sys/block/zram{number}").exists():
        _insist(lambda: (ZRAM / "hot_remove").write_text(number), f"zram{number} cannot be removed")


def _stop_swap(file: str) -> None:
    if any(line.split()[0] == file for line in Path("/proc/swaps").read_text().splitlines()):
        result = subprocess.run(["swapoff", file], capture_output=True, text=True, check=False)
        if result.returncode:
            raise MachineError(f"swapping to {file} cannot be stopped: {result.stderr.strip()}")


def _remove_file(file: str) -> None:
    Path(file).unlink(missing_ok=True)


def _remove_cgroup(folder: str) -> None:
    if Path(folder).exists():
        _insist(lambda: Path(folder).rmdir(), f"the control group {folder} cannot be removed")


def _write_setting(file_and_value: str) -> None:
    file, _, value = file_and_value.partition("=")
    Path(file).write_text(value)


def _insist(act: Callable[[], object], failure: str) -> None:
    """Try until it succeeds: who used the thing may need a moment to let go of it."""
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        with contextlib.suppress(OSError):
            act()
            return
        if time.monotonic() > deadline:
            raise MachineError(failure)
        time.sleep(0.05)


_WAYS: Final[Mapping[Kind, Callable[[str], None]]] = {
    "zram": _remove_zram,
    "swap": _stop_swap,
    "file": _remove_file,
    "cgroup": _remove_cgroup,
    "setting": _write_setting,
}
