"""Invent inputs for hostile.py and keep those that take new branches.

    unzip -d found tests/corpus.zip; python tests/fuzz.py found -runs=500000 -seed=1

needs atheris; the options are libFuzzer's. The first input of each kind of failure is written to FOUND-*, and what one
took at most is told at the end.
"""

from __future__ import annotations

import atexit
import json
import sys
import traceback
from pathlib import Path
from tempfile import NamedTemporaryFile

import atheris

INSTRUMENTED = [
    *("sim.document", "sim.errors", "sim.units", "sim.scenario", "sim.datacenter.traces", "sim.datacenter.blocks"),
    *("sim.memory.image", "sim.host", "yaml.composer", "zipfile"),
]
"""Modules whose branches are followed. What numba compiles must not be among them."""

TOLD_EVERY = 10_000
"""Inputs after which the account is printed; a program that is stopped has no time for it."""

with atheris.instrument_imports(include=INSTRUMENTED):
    import hostile

from sim.scenario import schema  # noqa: E402


def words() -> set[str]:
    """Words that a scenario may use: its keys, and what closed lists allow."""
    found: set[str] = set()

    def collect(value: object) -> None:
        if isinstance(value, dict):
            found.update(value.get("properties", {}))
            found.update(each for each in value.get("enum", ()) if isinstance(each, str))
            for each in value.values():
                collect(each)
        elif isinstance(value, list):
            for each in value:
                collect(each)

    collect(schema())
    return found | {"64GiB", "4KiB", "10min", "1s", "5%", "1/min", "<<: *a", "&a ", "{", "}", "[", "]", ": ", "- "}


class Finder:
    """Reads inputs and keeps the first of each kind that fails."""

    def __init__(self, read: hostile.Reader) -> None:
        self.read = read
        self.kinds: set[tuple[str, ...]] = set()

    def __call__(self, data: bytes) -> None:
        """Read one input."""
        if self.read.worst.inputs % TOLD_EVERY == TOLD_EVERY - 1:
            self.told()
        try:
            self.read(data)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            kind = (type(error).__name__, frame.name, str(frame.lineno))
            if kind not in self.kinds:
                self.kinds.add(kind)
                Path(f"FOUND-{'-'.join(kind)}").write_bytes(data)
                print(f"found {kind}: {error}", flush=True)

    def told(self) -> None:
        """Print what became of all of them."""
        print(f"{self.read.worst.told()}; {len(self.kinds)} kinds of failure", flush=True)


def main() -> None:
    """Let libFuzzer invent inputs until it is told to end."""
    with NamedTemporaryFile("w", suffix=".dict") as dictionary, hostile.reader() as read:
        dictionary.writelines(f"{json.dumps(word)}\n" for word in sorted(words()))
        dictionary.flush()
        find = Finder(read)
        atexit.register(find.told)
        atheris.Setup([*sys.argv, f"-dict={dictionary.name}"], find)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
