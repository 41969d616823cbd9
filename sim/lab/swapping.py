"""Memory made short: swap areas, and control groups that limit what a guest may hold; all of it can be undone.

Source: Documentation/admin-guide/blockdev/zram.rst, cgroup-v1/memory.rst, cgroup-v2.rst,
Documentation/accounting/psi.rst.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sim.errors import MachineError
from sim.lab.guest import Confinement
from sim.lab.machine import borrowed, vm_events
from sim.lab.undo import ZRAM
from sim.units import MIB, about_bytes

SWAP_FOLDER: Final = Path("/var/tmp")
VMSTAT: Final = {
    "pswpin": "pswpin",
    "pswpout": "pswpout",
    "pgscan": "pgscan_anon",
    "pgsteal": "pgsteal_anon",
    "pgmajfault": "pgmajfault",
    "workingset_refault_anon": "workingset_refault_anon",
    "workingset_activate_anon": "workingset_activate_anon",
    "swap_ra": "swap_ra",
    "swap_ra_hit": "swap_ra_hit",
    "swpin_zero": "swpin_zero",
    "swpout_zero": "swpout_zero",
    "ksm_swpin_copy": "ksm_swpin_copy",
    "thp_swpout": "thp_swpout",
}
"""Figures about swap, and the lines of /proc/vmstat that tell them; pgscan and pgsteal are also counted where a control
group's limit made the kernel look, which those by who looked (pgscan_direct) are not."""

_PSI: Final = tuple(f"psi_{kind}_{name}" for kind in ("some", "full") for name in ("ns", "avg10", "avg60", "avg300"))
SWAP_FIGURES: Final = (*VMSTAT, *_PSI, "swap_used_bytes", "mem_pool_bytes")
"""What is read at every sample, besides zram's orig_data_size and compr_data_size."""

PLACES: Final = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
)
"""Where control groups that limit memory are made, version 1 and 2, with the files of limit and use."""
UNIFIED: Final = Path("/sys/fs/cgroup/unified")
"""Where version 2 is beside version 1: it tells the stalls of a group."""
_SYSCTL: Final = Path("/proc/sys/vm")
_FIRST: Final = "32767"
"""The highest priority of a swap area."""
_SPARE: Final = 64 * MIB


@dataclass(frozen=True)
class Swapping:
    """A swap area and the sysctls that rule its use."""

    size: int
    algorithm: str | None
    """How zram compresses; None for a swap file."""
    page_cluster: int
    swappiness: int


@dataclass(frozen=True)
class Area:
    """A swap area in use."""

    file: str
    statistics: Path | None = None
    """mm_stat of a zram device."""

    def figures(self) -> dict[str, int]:
        """Bytes in use, and what zram's compressed pages are and take."""
        lines = (line.split() for line in Path("/proc/swaps").read_text().splitlines())
        used = next(int(words[3]) << 10 for words in lines if words[0] == self.file)
        if self.statistics is None:
            return {"swap_used_bytes": used}
        names = ("orig_data_size", "compr_data_size", "mem_pool_bytes")
        told = map(int, self.statistics.read_text().split())
        return {"swap_used_bytes": used, **dict(zip(names, told, strict=False))}


@dataclass(frozen=True)
class Groups:
    """Control groups of a run, one for each guest, below one in which all stalls are counted."""

    homes: Sequence[Path]
    """The run's own group in each hierarchy; the first is the one that limits memory."""
    limit: str
    usage: str
    pressure: Path

    def confinement(self, number: int, limit_bytes: int) -> Confinement:
        """What a guest must know to enter its group."""
        entries = [str(home / str(number) / "cgroup.procs") for home in self.homes]
        group = self.homes[0] / str(number)
        return Confinement(entries, str(group / self.limit), str(group / self.usage), limit_bytes)

    def figures(self) -> dict[str, float]:
        """Pressure stall information (PSI): totals in ns, averages in percent."""
        found: dict[str, float] = {}
        for line in self.pressure.read_text().splitlines():
            kind, *words = line.split()
            told = dict(word.split("=") for word in words)
            found[f"psi_{kind}_ns"] = int(told.pop("total")) * 1000
            found |= {f"psi_{kind}_{name}": float(value) for name, value in told.items()}
        return found


@contextlib.contextmanager
def swap_area(wanted: Swapping, token: str) -> Iterator[Area]:
    """Swap to a new zram device or file until the end. Only inside `exclusive`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_setting(_SYSCTL / "page-cluster", wanted.page_cluster))
        stack.enter_context(_setting(_SYSCTL / "swappiness", wanted.swappiness))
        area = stack.enter_context(
            _zram_area(wanted.size, wanted.algorithm) if wanted.algorithm else _file_area(wanted.size, token)
        )
        stack.enter_context(swapped_to(area.file))
        yield area


@contextlib.contextmanager
def swapped_to(file: str) -> Iterator[None]:
    """Swap to a device or file, before all others, until the end. Only inside `exclusive`."""
    _command("mkswap", file)
    with borrowed("swap", file):
        _command("swapon", "-p", _FIRST, file)
        yield


@contextlib.contextmanager
def groups(guests: int, token: str) -> Iterator[Groups]:
    """Make a control group for each guest, numbered from 0. Only inside `exclusive`."""
    root, limit, usage = place()
    beside = UNIFIED if (UNIFIED / "cgroup.controllers").exists() else None
    homes = [each / f"overcommit-{token}" for each in (root, beside) if each]
    stalls = homes[-1] / "memory.pressure"
    with contextlib.ExitStack() as stack:
        for home in homes:
            stack.enter_context(_group(home))
            if limit == "memory.max":
                (home / "cgroup.subtree_control").write_text("+memory")
            for number in range(guests):
                stack.enter_context(_group(home / str(number)))
        yield Groups(homes, limit, usage, stalls if stalls.exists() else Path("/proc/pressure/memory"))


@contextlib.contextmanager
def limited_group(token: str, limit_bytes: int) -> Iterator[Path]:
    """A single control group with a limit. Only inside `exclusive`."""
    root, limit, _ = place()
    with _group(root / f"overcommit-{token}") as group:
        (group / limit).write_text(str(limit_bytes))
        yield group


@contextlib.contextmanager
def swap_file(size: int, token: str) -> Iterator[Path]:
    """A new file that may be swapped to. Only inside `exclusive`."""
    _check_room(size)
    file = SWAP_FOLDER / f"overcommit-{token}.swap"
    with borrowed("file", str(file)):
        file.touch(0o600, exist_ok=False)
        yield file


@contextlib.contextmanager
def zram_device() -> Iterator[int]:
    """A new zram device, never one that exists: the kernel gives the lowest free number."""
    number = 0
    while Path(f"/sys/block/zram{number}").exists():
        number += 1
    with borrowed("zram", str(number)):
        given = int((ZRAM / "hot_add").read_text())
        if given != number:
            (ZRAM / "hot_remove").write_text(str(given))
            raise MachineError("another process makes zram devices at this moment: run it again")
        yield number


def _check_room(size: int) -> None:
    """Raise MachineError where the disk has no room for a swap file."""
    space = os.statvfs(SWAP_FOLDER)
    if space.f_bavail * space.f_frsize < size + _SPARE:
        raise MachineError(f"{SWAP_FOLDER} has no room for a swap file of {about_bytes(size)}")


def _command(*words: str) -> None:
    """Run a program of the system."""
    try:
        result = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MachineError(f"the command {words[0]} is missing") from None
    if result.returncode:
        raise MachineError(f"{' '.join(words)} failed: {result.stderr.strip()}")


def events() -> Mapping[str, int]:
    """The figures of VMSTAT, since boot."""
    lines = vm_events(*VMSTAT.values())
    return {name: lines[line] for name, line in VMSTAT.items()}


@contextlib.contextmanager
def _zram_area(size: int, algorithm: str) -> Iterator[Area]:
    if not ZRAM.is_dir():
        raise MachineError("this kernel has no zram (CONFIG_ZRAM, or the module is not loaded: modprobe zram)")
    with zram_device() as number:
        folder = Path(f"/sys/block/zram{number}")
        offered = (folder / "comp_algorithm").read_text().replace("[", "").replace("]", "").split()
        if algorithm not in offered:
            raise MachineError(f"this kernel's zram has no {algorithm}, only {', '.join(offered)}")
        (folder / "comp_algorithm").write_text(algorithm)
        (folder / "disksize").write_text(str(size))
        yield Area(f"/dev/zram{number}", folder / "mm_stat")


@contextlib.contextmanager
def _file_area(size: int, token: str) -> Iterator[Area]:
    with swap_file(size, token) as file:
        _command("fallocate", "-l", str(size), str(file))
        yield Area(str(file))


@contextlib.contextmanager
def _setting(file: Path, value: int) -> Iterator[None]:
    """Write a sysctl until the end."""
    with borrowed("setting", f"{file}={file.read_text().strip()}"):
        file.write_text(str(value))
        yield


@contextlib.contextmanager
def _group(folder: Path) -> Iterator[Path]:
    with borrowed("cgroup", str(folder)):
        folder.mkdir()
        yield folder


def place() -> tuple[Path, str, str]:
    """The folder in which control groups that limit memory are made, and the files of limit and use."""
    for folder, limit, usage in PLACES:
        controllers = folder / "cgroup.subtree_control"
        if (folder / limit).exists() or (controllers.exists() and "memory" in controllers.read_text().split()):
            return folder, limit, usage
    raise MachineError("this machine has no control groups that limit memory")
