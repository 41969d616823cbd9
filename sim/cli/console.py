"""How a call talks: data, remarks, progress and failures, each with its exit code."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from sim.errors import MachineError, OvercommitError, UserError

Progress = Callable[[float, str], None]

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
            click.echo(text, err=True)

    def complain(self, text: str) -> None:
        """Print why the call failed, however quiet."""
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

    def invoke(self, ctx: click.Context) -> None:
        """Run the verb and leave with its code."""
        console = ctx.ensure_object(Console)
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
        except (click.ClickException, click.exceptions.Exit, SystemExit):
            raise  # click words its own usage errors, which end with 2
        except BaseException as error:
            code = _explain_failure(error, console)
        ctx.exit(code or 0)


def _explain_failure(error: BaseException, console: Console) -> int:
    """Tell the user why the call failed and return the exit code."""
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
            kept = f"the result in {console.kept} is complete" if console.kept else console.kept_so_far
            console.complain(f"interrupted; {kept}")
            return EXIT_INTERRUPTED
        case BrokenPipeError():
            # Python flushes stdout again at exit, and would complain there.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_BROKEN_PIPE
        case _:
            console.complain(_bug_report(error))
            return EXIT_BUG


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
