"""What this process may use of the machine: memory and processors, as control groups (containers) leave them.

Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of Linux 6.18.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PROCESS: Final = Path("/proc/self")
_MEMINFO: Final = Path("/proc/meminfo")


def available_bytes(process: Path = _PROCESS, meminfo: Path = _MEMINFO) -> int:
    """Memory that this process may still use, without swap."""
    return min([_figures(meminfo)["MemAvailable:"] * 1024, *_left_bytes(process)])


def processors(process: Path = _PROCESS) -> int:
    """Processors that this process may use at a time."""
    return min([len(os.sched_getaffinity(0)), *_quotas(process)])


def _left_bytes(process: Path) -> Iterator[int]:
    """What each control group leaves below its limit, counting cached files that can go."""
    for group in _groups(process, "memory"):
        for limit, usage, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            if (group / limit).exists() and (most := (group / limit).read_text().strip()) != "max":
                used = int((group / usage).read_text()) - _figures(group / "memory.stat")[cached]
                yield max(0, int(most) - used)


def _quotas(process: Path) -> Iterator[int]:
    """Processors that each control group leaves, rounded up."""
    for group in _groups(process, "cpu"):
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        elif (group / "cpu.cfs_quota_us").exists():
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        else:
            continue
        if quota not in ("max", "-1"):
            yield max(1, math.ceil(int(quota) / int(period)))


def _groups(process: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that a process is in, from its own outwards, as far as they can be seen."""
    try:
        memberships = (process / "cgroup").read_text().splitlines()
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:
        return
    own = {name: path for line in memberships for _, names, path in [line.split(":", 2)] for name in names.split(",")}
    for mount in mounts:
        place, _, source = mount.partition(" - ")
        root, at = map(_unescaped, place.split()[3:5])
        kind, *_, options = source.split()
        name = controller if kind == "cgroup" and controller in options.split(",") else ""
        if (name or kind == "cgroup2") and name in own and Path(own[name]).is_relative_to(root):
            inner = Path(own[name]).relative_to(root)
            yield from (Path(at, each) for each in (inner, *inner.parents))


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda escaped: chr(int(escaped[1], 8)), path)


def _figures(file: Path) -> dict[str, int]:
    """The figures of a file with a name and a number in each line."""
    return {name: int(figure) for name, figure, *_ in map(str.split, file.read_text().splitlines())}
