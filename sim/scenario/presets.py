"""Presets: kinds of host and of guest that came along, each value with its source beside it in `presets/`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from sim.document import Document, read
from sim.errors import Problem, suggestion
from sim.scenario.extends import over

PRESET: Final = "preset"
KINDS: Final = {"hosts": "host preset", "vms": "guest preset"}
"""Lists of a scenario whose items may have a preset, and what one is called."""
_ABOUT: Final = "about"
_FOLDER: Final = Path(__file__).with_name("presets")


class Preset(NamedTuple):
    """What a preset sets, and what it is in one sentence."""

    about: str
    settings: Document


@cache
def names(kind: str) -> tuple[str, ...]:
    """Presets for items of `hosts` or of `vms`."""
    return tuple(sorted(file.stem for file in (_FOLDER / kind).glob("*.yaml")))


@cache
def load(kind: str, name: str) -> Preset:
    """Return the preset of that name, which there is."""
    document = read(_FOLDER / kind / f"{name}.yaml")
    return Preset(str(document.data[_ABOUT]), document.without(_ABOUT))


def filled(document: Document) -> tuple[Document, list[Problem]]:
    """Return the document with what its presets say below what it says itself, and the presets that do not exist."""
    problems: list[Problem] = []
    for kind, at, name in list(_asked(document)):
        keys = (kind, at, PRESET)
        if name in names(kind):
            document = over(document, load(kind, name).settings, keys[:2], document.places.get(keys))
        else:
            problems.append(document.problem(keys, "no such preset", suggestion(name, names(kind))))
    return document, problems


def _asked(document: Document) -> Iterator[tuple[str, int, str]]:
    for kind in KINDS:
        items = document.data.get(kind)
        for at, item in enumerate(items if isinstance(items, list) else ()):
            name = item.get(PRESET) if isinstance(item, dict) else None
            if isinstance(name, str):
                yield kind, at, name
