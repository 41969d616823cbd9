"""Processes of this machine that work for this one and end with it."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Final

# A new interpreter: a copy of this one would copy whatever its threads were holding.
CONTEXT: Final = get_context("spawn")


def begin() -> None:
    """What a process does first: leave Ctrl-C to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def how_it_ended(exit_code: int | None) -> str:
    """Say how a process ended that should not have."""
    if exit_code is None:
        return "it closed its end of the pipe"
    if exit_code >= 0:
        return f"it ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else f"signal {-exit_code}"
    return f"it was killed by {name}" + (", for lack of memory perhaps" if name == "SIGKILL" else "")


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)
