"""`extends:` a scenario that takes what another file says and changes some of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from sim.document import Document, Keys, Place, read
from sim.errors import UserError, nearest

EXTENDS: Final = "extends"
MOST_FILES: Final = 8
"""Files one behind the other."""

_EITHER: Final = frozenset({"captured", "parts"})
"""Keys of one block (an image) of which the upper file's takes the place of the lower one's."""


def extended(document: Document, folder: str | Path | None = None) -> Document:
    """Return the document with what the file that it extends says below it, and so on.

    *folder* is where paths of the document start, its own unless given. Raises UserError.
    """
    if EXTENDS not in document.data:
        return document
    top = Path(folder if folder is not None else document.folder).resolve()
    chain = [Path(document.source).resolve()]
    documents = [document]
    while EXTENDS in documents[-1].data:
        last = documents[-1]
        path = _base(last, Path(last.source).parent if len(documents) > 1 else top, top, chain)
        chain.append(path.resolve())
        documents.append(read(path))
    below = documents.pop().without(EXTENDS)
    while documents:
        below = over(documents.pop().without(EXTENDS), below)
    return replace(below, source=document.source)


def _base(document: Document, folder: Path, top: Path, chain: Sequence[Path]) -> Path:
    """The file that a document extends; *chain* are those that led to it."""

    def refuse(message: str, remedy: str) -> UserError:
        return UserError(document.problem(EXTENDS, message, remedy))

    given = document.data[EXTENDS]
    if not isinstance(given, str) or not given.strip() or "\0" in given:
        raise refuse("must be the path of a scenario file", "for example base.yaml")
    path = folder / given
    resolved = path.resolve()
    if Path(given).is_absolute() or not resolved.is_relative_to(top):
        raise refuse("leaves the folder of the scenario", f"put the file into {top} or a folder in it")
    if resolved in chain:
        names = " extends ".join(each.name for each in [*chain[chain.index(resolved) :], resolved])
        raise refuse(f"goes round in a circle: {names}", "let one of them stand alone")
    if len(chain) > MOST_FILES:
        raise refuse(f"is more than {MOST_FILES} files deep", "merge some of them")
    if not resolved.is_file():
        siblings = [each.name for each in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        remedy = f"did you mean {Path(given).with_name(close)}?" if close else "check the path"
        raise refuse("no such file", remedy)
    return path


def over(above: Document, below: Document, at: Keys = (), place: Place | None = None) -> Document:
    """Return *above* with what *below* says where it says nothing, at the keys *at* of *above*.

    Blocks are merged key by key and lists of blocks by `name`; of anything else the upper value stands alone. What
    comes from below is placed where it was written, or all of it at *place*.
    """
    merger = _Merger(below, above, place)
    data = merger.value(at, (), at)
    if not at:
        return replace(above, data=data, places=merger.places)
    places = {keys: where for keys, where in above.places.items() if keys[: len(at)] != at}
    return replace(above, data=_with(above.data, at, data), places={**places, **merger.places})


def _with(data: Any, keys: Keys, value: object) -> Any:
    """The data with another value at *keys*, which exist."""
    if not keys:
        return value
    key, *rest = keys
    changed = data.copy()
    changed[key] = _with(data[key], tuple(rest), value)
    return changed


@dataclass
class _Merger:
    """Puts one document over another; `places` says where each value of the outcome was written."""

    below: Document
    above: Document
    place: Place | None
    places: dict[Keys, Place] = field(default_factory=dict)

    def value(self, keys: Keys, low: Keys, high: Keys) -> Any:
        """What the outcome has at *keys* of what stands at *low* and at *high*."""
        lower, upper = self.below.at(low), self.above.at(high)
        if isinstance(lower, dict) and isinstance(upper, dict):
            self._note(keys, self.above.places.get(high))
            return {
                key: self._choose((*keys, key), (*low, key) if key in lower else None,
                                  (*high, key) if key in upper else None)
                for key in self._keys(lower, upper)
            }  # fmt: skip
        if isinstance(lower, list) and isinstance(upper, list):
            names = [_names(low, lower), _names(high, upper)]
            if all(names):
                self._note(keys, self.above.places.get(high))
                return self._items(keys, low, high, *names)
        return self._copy(self.above, high, keys)

    def _keys(self, lower: Mapping[str, object], upper: Mapping[str, object]) -> list[str]:
        left_out = _EITHER - upper.keys() if _EITHER & upper.keys() else frozenset()
        kept = lower if not left_out & lower.keys() else {}
        return [*kept, *(key for key in upper if key not in kept)]

    def _items(
        self, keys: Keys, low: Keys, high: Keys, lower: Mapping[str, int], upper: Mapping[str, int]
    ) -> list[Any]:
        names = [*lower, *(name for name in upper if name not in lower)]
        return [
            self._choose((*keys, at), (*low, lower[name]) if name in lower else None,
                         (*high, upper[name]) if name in upper else None)
            for at, name in enumerate(names)
        ]  # fmt: skip

    def _choose(self, keys: Keys, low: Keys | None, high: Keys | None) -> Any:
        if low is None or high is None:
            return self._copy(self.below, low, keys) if low is not None else self._copy(self.above, high or (), keys)
        return self.value(keys, low, high)

    def _copy(self, document: Document, source: Keys, keys: Keys) -> Any:
        value = document.at(source)
        self._note(keys, (self.place if document is self.below else None) or document.places.get(source))
        copy: Callable[[str | int], Any] = lambda key: self._copy(document, (*source, key), (*keys, key))  # noqa: E731
        if isinstance(value, dict):
            return {key: copy(key) for key in value}
        return [copy(at) for at in range(len(value))] if isinstance(value, list) else value

    def _note(self, keys: Keys, place: Place | None) -> None:
        if place is not None:
            self.places[keys] = place


def _names(keys: Keys, items: Sequence[object]) -> Mapping[str, int]:
    """The position of each item by its name; nothing unless all are blocks with names of their own.

    A host without a name is called host, as it will be.
    """
    default = "host" if keys == ("hosts",) else None
    names = [item.get("name", default) if isinstance(item, dict) else None for item in items]
    found = {name: at for at, name in enumerate(names) if isinstance(name, str)}
    return found if len(found) == len(items) else {}
