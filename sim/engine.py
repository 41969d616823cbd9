"""The program itself: its version and its own files, which decide what a run finds beside the scenario."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

_SOURCE: Final = Path(__file__).parent
_AFTER_A_RUN: Final = frozenset({"study", "report", "lab", "cli", "pytest_plugin.py"})
"""What no run needs, for it stands below `run` in the reading order of the package."""


def package_version(package: str) -> str:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@cache
def source_digest(without: Collection[str] = frozenset()) -> str:
    """Digest of the program's files, those that a run reads at work too; not of some files and folders."""
    told = blake2b(digest_size=6)
    for file in sorted([*_SOURCE.rglob("*.py"), *_SOURCE.glob("cost/prices/*.yaml")]):
        name = file.relative_to(_SOURCE)
        if name.parts[0] not in without:
            told.update(f"{name}\n".encode() + file.read_bytes())
    return told.hexdigest()


def engine() -> str:
    """What names a result beside the scenario: a program that was changed does not take the figures of its past."""
    return f"{package_version('overcommit')}+{source_digest(_AFTER_A_RUN)}"
