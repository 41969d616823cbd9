"""Files that are whole or not there, whatever ends the program or the machine."""

from __future__ import annotations

import os
from pathlib import Path

_NEW = ".new"


def write(path: Path, data: bytes) -> None:
    """Write a file of a folder that is not published yet; the disk has it when this returns."""
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(number, rest) :]
        os.fsync(number)
    finally:
        os.close(number)


def publish(path: Path, data: bytes) -> None:
    """Put a whole file in place of what was there; a failure leaves that."""
    new = path.with_name(f".{path.name}{_NEW}")
    try:
        write(new, data)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync(path.parent)


def heal(folder: Path) -> None:
    """Remove what a killed program left half written in a folder; nobody else may be writing there."""
    for new in folder.glob(f".*{_NEW}"):
        new.unlink()


def sync(folder: Path) -> None:
    """Have the disk know what names are in a folder."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
