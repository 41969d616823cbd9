"""What a user or a machine can get wrong, with the exit code that says so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Final

SUGGESTED: Final = 12
"""How many names a message lists at most."""


class OvercommitError(Exception):
    """An expected failure: the command prints it without a traceback and ends with `exit_code`."""

    exit_code: ClassVar[int] = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One mistake: where it is, what is wrong, the value as the user wrote it, and what to do."""

    file: str = ""
    line: int | None = None
    path: str = ""
    value: str = ""
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        """Render as one line, `file:line: path: message, got value; remedy`, leaving out what is not known."""
        place = f"{self.file}:{self.line}" if self.file and self.line is not None else self.file
        said = f"{self.message}, got {self.value}" if self.value else self.message
        text = ": ".join(part for part in (place, self.path, said) if part)
        return f"{text}; {self.remedy}" if self.remedy else text


class UserError(OvercommitError):
    """The scenario or the command line is wrong; holds every problem found, a plain text being one of them."""

    exit_code = 2

    def __init__(self, *problems: Problem | str) -> None:
        super().__init__(*problems)
        self.problems = tuple(Problem(message=each) if isinstance(each, str) else each for each in problems)

    def __str__(self) -> str:
        """Render one line per problem."""
        return "\n".join(str(problem) for problem in self.problems)


class MachineError(OvercommitError):
    """This machine cannot do what was asked: no root, no KSM, too little memory or disk."""

    exit_code = 4


class At(ValueError):
    """What a validator raises: the `path` relative to the block being validated ("" is the block itself)."""

    def __init__(self, path: str, message: str, remedy: str = "") -> None:
        super().__init__(path, message, remedy)
        self.path = path
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        """Render as text for callers outside a document."""
        return str(Problem(path=self.path, message=self.message, remedy=self.remedy))


class Several(ValueError):
    """Several `At` found by one validator."""

    def __init__(self, *faults: At) -> None:
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        """Render one line per fault."""
        return "\n".join(str(fault) for fault in self.faults)


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that `name` most likely meant, or None when none is close."""
    return _nearest(name, tuple(candidates))


@lru_cache(maxsize=1024)
def _nearest(name: str, candidates: Sequence[str]) -> str | None:
    folded = {_fold(candidate): candidate for candidate in candidates}
    close = difflib.get_close_matches(_fold(name), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def _fold(name: str) -> str:
    return name.lower().replace("-", "_")


def suggestion(name: str, candidates: Iterable[str]) -> str:
    """Return a remedy for an unknown `name`: the nearest candidate, or the first dozen when none is close."""
    known = list(candidates)
    close = nearest(name, known)
    if close:
        return f"did you mean {close}?"
    more = f" and {len(known) - SUGGESTED} more" if len(known) > SUGGESTED else ""
    return f"known: {', '.join(known[:SUGGESTED])}{more}"
