"""How a call talks: data, remarks, progress and failures, each with its exit code."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from sim.errors import MachineError, OvercommitError, UserError

Progress = Callable[[float, str], None]

MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What the operating system refuses that is no mistake of this program, wherever it comes up."""

EXIT_UNMET = 1
EXIT_BUG = 3
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""What a shell reports for any tool that SIGPIPE ends."""

WIDTH = 112
"""Where lists of names are broken."""


@dataclass
class Console:
    """How this call talks: data on stdout, everything else on stderr."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    kept: Path | None = None
    """The result folder that is already whole."""
    kept_so_far: str = "nothing was kept"
    """What an interruption leaves before there is one."""

    def data(self, text: str) -> None:
        """Print what the caller asked for."""
        click.echo(text)

    def say(self, text: str) -> None:
        """Print a remark that is not part of the answer."""
        if not self.quiet:
            self.complain(text)

    def complain(self, text: str) -> None:
        """Print why the call failed, however quiet; the exit code tells where nothing can be printed."""
        with suppress(OSError):
            click.echo(text, err=True)

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress | None]:
        """Yield the callback that moves a progress bar, or None where a bar would be in the way."""
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console as Terminal
        from rich.progress import Progress as Bar

        with Bar(console=Terminal(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=1.0)
            yield lambda done, text: bar.update(task, completed=done, description=text or title)


class Verbs(click.Group):
    """The one place where an exception becomes a message and an exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line; what click prints by itself, such as help, may have no place to go."""
        try:
            return super().main(*args, **options)
        except OSError as error:
            sys.exit(_explain_failure(error, Console()))

    def invoke(self, ctx: click.Context) -> None:
        """Run the verb and leave with its code."""
        console = ctx.ensure_object(Console)
        try:
            code = super().invoke(ctx)
            if sys.stdout:  # None if it is closed
                sys.stdout.flush()
        except (click.ClickException, click.exceptions.Exit, SystemExit):
            raise  # click words its own usage errors, which end with 2
        except BaseException as error:
            code = _explain_failure(error, console)
        ctx.exit(code or 0)


def _explain_failure(error: BaseException, console: Console) -> int:
    """Tell the user why the call failed, and what of its result is there; return the exit code."""
    try:
        code = _complain(error, console)
    except OSError as unprinted:
        code = _complain(unprinted, console)
    if console.kept and code != EXIT_BROKEN_PIPE:
        console.complain(f"the result in {console.kept} is complete")
    return code


def _complain(error: BaseException, console: Console) -> int:
    match error:
        case UserError():
            console.complain(str(error))
            if console.json:
                console.data(as_json({"problems": [asdict(problem) for problem in error.problems]}))
            return error.exit_code
        case OvercommitError():
            console.complain(str(error))
            return error.exit_code
        case MemoryError():
            console.complain("not enough memory; `overcommit explain` estimates what a scenario needs")
            return MachineError.exit_code
        case KeyboardInterrupt():
            console.complain("interrupted" if console.kept else f"interrupted; {console.kept_so_far}")
            return EXIT_INTERRUPTED
        case BrokenPipeError():
            _print_no_more()
            return EXIT_BROKEN_PIPE
        case OSError() if error.errno in MACHINE_ERRORS:
            _print_no_more()
            console.complain(f"{error.filename or 'standard output'}: {error.strerror}")
            return MachineError.exit_code
        case _:
            console.complain(_bug_report(error))
            return EXIT_BUG


def _print_no_more() -> None:
    """Drop what waits to be printed: Python flushes stdout again at exit, and would complain there."""
    with suppress(OSError):  # in a notebook it has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _bug_report(error: BaseException) -> str:
    """Write the traceback to a file and return what to tell the user."""
    lines = [f"{type(error).__name__}: {error}", _versions(), f"command: {' '.join(sys.argv)}"]
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="overcommit-bug-", suffix=".txt", delete=False) as file:
            file.write("\n".join([*lines, "", trace]))
    except OSError:
        return "\n".join(["this is a bug in overcommit; please report all of this text:", *lines, trace])
    return "\n".join(
        ["this is a bug in overcommit, not in your scenario", *lines, f"please report it with {file.name}"]
    )


def _versions() -> str:
    packages = ("overcommit", "numpy", "numba", "pandas", "pyarrow", "pydantic", "simpy")
    found = [f"{package} {version_of(package)}" for package in packages]
    return ", ".join([*found, f"Python {platform.python_version()}", platform.platform()])


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def as_json(data: object) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False)


def table(rows: Iterable[Sequence[str]]) -> str:
    """Return rows of text as aligned columns."""
    cells = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)
