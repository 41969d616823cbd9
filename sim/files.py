"""Files that are whole or not there, whatever ends the program or the machine."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sim.errors import MachineError, UserError

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
    """Put a whole file in place of what was there; a failure leaves that.

    A link, a pipe or a device (`/dev/stdout`) is not replaced: the data go where it leads.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(data)
        return
    with replacing(path) as new:
        write(new, data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name under which to write and sync a file, which takes the place of `path` if nothing fails."""
    new = path.with_name(f".{path.name}{_NEW}")
    try:
        yield new
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def explained(path: Path, remedy: str = "choose another --out") -> Iterator[None]:
    """Turn what the operating system refuses inside this context into a UserError or MachineError about `path`."""
    try:
        yield
    except OSError as error:
        reason = f"{path}: cannot be written: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise MachineError(f"{reason}; free some space or {remedy}") from error
        raise UserError(f"{reason}; {remedy}") from error


def heal(folder: Path) -> None:
    """Remove what a killed program left half written in a folder; nobody else may be writing there."""
    for new in folder.glob(f".*{_NEW}"):
        new.unlink()


def sync(path: Path) -> None:
    """Have the disk know what is in a file, or what names are in a folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
