"""Strict YAML in, checked block out: every mistake with its file, line, path, value and remedy."""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, TypeAlias, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, core_schema
from yaml.composer import Composer

from sim.errors import At, Problem, Several, UserError, nearest, suggestion

MAX_BYTES: Final = 1 << 20
MAX_VALUES: Final = 25_000
MAX_DEPTH: Final = 64
"""Blocks and lists inside one another."""
MAX_SHOWN: Final = 60
MAX_MISTAKES: Final = 200
"""Mistakes in values that are told; nobody reads more, and each takes a search for what was meant."""

Keys: TypeAlias = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written, and its text there ("" for a block or a list)."""

    file: str
    line: int | None
    text: str


@dataclass(frozen=True)
class Document:
    """A scenario as written: plain data, and the place of every value in it."""

    source: str
    data: dict[str, Any]
    places: Mapping[Keys, Place] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the document start from."""
        return Path(self.source).parent

    def override(self, assignment: str) -> Document:
        """Return the document with one value replaced, as `--set path=value` does; the value is read as strict YAML.

        List items are named by position or by their `name`. Raises UserError for a path that cannot exist.
        """
        source = f"--set {assignment}"
        dotted, equals, text = assignment.partition("=")
        if not equals or not dotted or not text.strip():
            raise UserError(Problem(file=source, message="must be path=value", remedy="for example duration=1h"))
        builder = _Builder(source, numbered=False)
        data = copy.deepcopy(self.data)
        parent, keys = _find(data, dotted.split("."), source)
        parent[keys[-1]] = builder.read(text, keys)
        changed = replace(self, data=data, overrides=(*self.overrides, assignment))
        return changed._placed(keys, Place(source, None, ""), builder.places)

    def at(self, keys: Keys, absent: object = None) -> Any:
        """Return the value at `keys`, or `absent`."""
        return _at(self.data, keys, absent)

    def keys_of(self, dotted: str) -> Keys:
        """Return the keys that a dotted path means, as in `override`. Raises UserError for one that cannot exist."""
        return _find(copy.deepcopy(self.data), dotted.split("."), self.source)[1]

    def copied(self, origin: Document, source: Keys, keys: Keys) -> Document:
        """Return the document with what *origin* has at `source` at `keys`, its place being where it was written."""
        data = copy.deepcopy(self.data)
        value = origin.at(source)
        parent, keys = _find(data, [str(key) for key in keys], self.source)
        parent[keys[-1]] = copy.deepcopy(value)
        size, place = len(source), origin.places.get(source, Place(self.source, None, ""))
        below = {keys: place} if source in origin.places else {}
        if isinstance(value, dict | list):
            below = {(*keys, *at[size:]): each for at, each in origin.places.items() if at[:size] == source}
        return replace(self, data=data)._placed(keys, place, below)

    def with_value(self, keys: Keys, value: object) -> Document:
        """Return the document with another value at `keys`, which stand in it; its place stays, for its parts too."""
        data = copy.deepcopy(self.data)
        _at(data, keys[:-1])[keys[-1]] = value
        return replace(self, data=data)

    def without(self, *names: str) -> Document:
        """Return the document without some of its outermost keys."""
        data = {key: value for key, value in self.data.items() if key not in names}
        places = {at: each for at, each in self.places.items() if not at or at[0] not in names}
        return replace(self, data=data, places=places)

    def _placed(self, keys: Keys, above: Place, below: Mapping[Keys, Place]) -> Document:
        """Return the document with new places at and below `keys`; blocks made to hold them are at `above`."""
        places = {keys[:end]: above for end in range(1, len(keys))}
        places |= {at: place for at, place in self.places.items() if at[: len(keys)] != keys}
        return replace(self, places={**places, **below})

    def check(self, model: type[Model], **context: object) -> Model:
        """Return the document as a block of type `model`; `context` reaches its validators.

        A model with a function `completed` has the document completed first: it returns the whole document and what
        could not be completed. Raises UserError with every mistake, in the order of the file.
        """
        complete = getattr(model, "completed", None)
        document, problems = complete(self) if complete else (self, [])
        try:
            # JSON mode is strict about scalars and still turns a list into the tuple that a frozen block holds.
            block = model.model_validate_json(document._json(), context=context)
        except ValidationError as error:
            details = error.errors(include_url=False)
        else:
            if not problems:
                return block
            details = []
        if (more := len(details) - MAX_MISTAKES) > 0:
            problems = [*problems, Problem(file=document.source, message=f"and {more:,} more mistakes")]
        faults = _settle_unions(
            fault for detail in details[:MAX_MISTAKES] for fault in _faults(detail, document.data, model)
        )
        blocks = {problem.path.rpartition(".")[0] for problem in problems}
        # Of a block that lacks what it was to be completed with, nobody wants to hear which keys that leaves missing.
        found = (each for each in map(document._locate, faults)
                 if each.message != _WORDS["missing"][0] or each.path.rpartition(".")[0] not in blocks)  # fmt: skip
        raise UserError(*in_order([*problems, *found]))

    def _json(self) -> str:
        try:
            return json.dumps(self.data)
        except (TypeError, ValueError, RecursionError):
            message = "holds more than text, numbers, true, false, lists and blocks"
            raise UserError(Problem(file=self.source, message=message, remedy="convert what it was made of")) from None

    def problem(self, keys: str | Keys, message: str, remedy: str = "", *, show_value: bool = True) -> Problem:
        """Return a problem at a path of the document, with the place and the value found there."""
        keys = _keys(keys)
        nearest_first = (self.places.get(keys[:end]) for end in range(len(keys), -1, -1))
        place = next(filter(None, nearest_first), Place(self.source, None, ""))
        value = _shown(_at(self.data, keys), self.places.get(keys)) if show_value else ""
        path = _dotted(keys)
        return Problem(file=place.file, line=place.line, path=path, value=value, message=message, remedy=remedy)

    def _locate(self, fault: _Fault) -> Problem:
        return self.problem(fault.keys, fault.message, fault.remedy, show_value=fault.show_value)


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Return each problem once, in the order of the file."""
    return sorted(dict.fromkeys(problems), key=lambda problem: (problem.line is None, problem.line or 0))


def read(path: str | Path) -> Document:
    """Read a YAML file strictly; raises UserError for anything that is not one plain mapping of keys."""
    source = str(path)
    builder = _Builder(source)
    data = builder.read(_load(Path(path)), ())
    if not isinstance(data, dict):
        message = "the file is empty" if data is None else "the file must be a block of keys"
        raise UserError(Problem(file=source, line=1, message=message, remedy="start with name: and memory sizes"))
    return Document(source, data, builder.places)


@contextmanager
def blamed(option: str, *assignments: str) -> Iterator[None]:
    """Blame the option by which values were given, and not `--set`, for what is wrong with them."""
    known = {f"--set {assignment}": f"{option} {assignment}" for assignment in assignments}
    try:
        yield
    except UserError as error:
        raise UserError(*(replace(each, file=known.get(each.file, each.file)) for each in error.problems)) from None


def dump(data: object) -> str:
    """Write plain data as YAML text that `read` gives back unchanged, keys in their order and no aliases."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def dump_line(data: object) -> str:
    """Write plain data as YAML in one line."""
    text = yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=MAX_BYTES, default_flow_style=True
    )
    return str(text).strip()


@dataclass(frozen=True)
class ByKey:
    """Annotation for a union of blocks, each member being recognised by the key that only it has.

    `Annotated[Captured | Synthetic, by_key(captured=Captured, parts=Synthetic)]` reads `{captured: a.npz}` as Captured.
    """

    members: Mapping[str, type[BaseModel]] = field(hash=False)

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Build the tagged union; its tags cannot be mistaken for keys of the document."""
        return core_schema.tagged_union_schema(
            {_tag(key): handler.generate_schema(member) for key, member in self.members.items()},
            discriminator=self._choose,
            custom_error_type="one_key_of",
            custom_error_message="needs exactly one of the keys",
            custom_error_context={"keys": ", ".join(self.members)},
        )

    def _choose(self, value: object) -> str | None:
        given: Iterable[str] = type(value).model_fields if isinstance(value, BaseModel) else ()
        given = value if isinstance(value, Mapping) else given
        present = [key for key in self.members if key in given]
        return _tag(present[0]) if len(present) == 1 else None


def by_key(**members: type[BaseModel]) -> ByKey:
    """Return the annotation that picks a union's member by which of these keys is present."""
    return ByKey(members)


def _tag(key: str) -> str:
    return f"<{key}>"


# --- reading -----------------------------------------------------------------------------------------------------

_TAG: Final = "tag:yaml.org,2002:"
_MERGE: Final = f"{_TAG}merge"
_SCALARS: Final[Mapping[str, tuple[re.Pattern[str], Callable[[str], object]]]] = {
    f"{_TAG}null": (re.compile(r"null|~|"), lambda text: None),
    f"{_TAG}bool": (re.compile(r"true|false"), lambda text: text == "true"),
    f"{_TAG}int": (re.compile(r"[-+]?(?:0|[1-9][0-9]{0,29})"), int),
    f"{_TAG}float": (re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"), float),
    f"{_TAG}str": (re.compile(r".*", re.DOTALL), str),
}
_CONTAINERS: Final = (f"{_TAG}map", f"{_TAG}seq")
_MANY: Final = f"the file expands to more than {MAX_VALUES} values"
_DEEP: Final = "values nest too deeply or contain themselves"

_SYNTAX: Final = (
    ("found a tab", "a tab is used for indentation", "use spaces"),
    ("mapping values are not allowed", "a colon where none can stand", "check the indentation, or quote the text"),
    ("could not find expected ':'", "a key without its colon", 'write "key: value"'),
    ("did not find expected key", "the indentation does not fit the lines above", "align the keys of one block"),
    ("expected '-' indicator", "the indentation does not fit the lines above", "align the dashes of one list"),
    ("while parsing a flow mapping", "braces that do not close, or lack a comma", "write {key: value, key: value}"),
    ("while parsing a flow sequence", "brackets that do not close, or lack a comma", "write [value, value]"),
    ("while parsing a flow node", "a value is missing", "write one, or remove the open bracket"),
    ("found undefined alias", "an alias (*) of nothing above it", "quote the text if it is no alias"),
    ("found unknown escape", "a backslash that means nothing in double quotes", "double it, or use single quotes"),
    ("invalid Unicode", "the text holds half a character", "remove the \\ud800 to \\udfff escapes"),
    ("expected a single document", "the file holds more than one document", "remove the line ---"),
    ("while scanning a quoted scalar", "a text whose quote is never closed", "close it, or double the quote inside"),
    ("that cannot start any token", "a character that cannot start a value", "quote the text"),
)
"""Parts of what libyaml says, in plain words."""


class _TooMuch(Exception):
    """More than a scenario may hold; says what."""


class _Loader(Composer, yaml.CSafeLoader):
    """YAML whose plain scalars are only null, true, false and decimal numbers; all else is text.

    It is taken apart by libyaml and put together here, where its size is bounded meanwhile: libyaml's own composer
    ends the process if values nest deeply.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        yaml.CSafeLoader.__init__(self, text)
        self.anchors: dict[str, yaml.Node] = {}
        self.count = self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Put together what comes next."""
        self.count += 1
        self.depth += 1
        if self.count > MAX_VALUES * 2:  # keys are nodes too
            raise _TooMuch(_MANY)
        if self.depth > MAX_DEPTH:
            raise _TooMuch(_DEEP)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this loader, or a YAML 1.1 loader, would read as something else."""

    def ignore_aliases(self, data: object) -> bool:
        """Write shared values out in full."""
        return True

    def text(self, data: str) -> yaml.ScalarNode:
        """Write a text; PyYAML folds Unicode's line breaks away unless they are escaped in double quotes."""
        style = '"' if _BREAKS.intersection(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_BREAKS: Final = frozenset("\x85\u2028\u2029")
_Dumper.add_representer(str, _Dumper.text)
for _name, (_pattern, _) in _SCALARS.items():
    if not _name.endswith("str"):
        for _class in (_Loader, _Dumper):
            _class.add_implicit_resolver(_name, re.compile(rf"(?:{_pattern.pattern})\Z"), None)
_Loader.add_implicit_resolver(_MERGE, re.compile("<<$"), None)


def _load(path: Path) -> str:
    """Return the text of a file, refusing what cannot be a scenario before YAML sees it."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        siblings = {each.stem: each for each in path.parent.glob("*.y*ml")}
        close = nearest(path.stem, siblings)
        remedy = f"did you mean {siblings[close]}?" if close else "check the path"
        raise UserError(Problem(file=str(path), message="no such file", remedy=remedy)) from None
    except IsADirectoryError:
        remedy = "name a file in it; overcommit check takes folders"
        raise UserError(Problem(file=str(path), message="is a folder", remedy=remedy)) from None
    except OSError as error:
        raise UserError(Problem(file=str(path), message=f"cannot be read: {error.strerror}")) from None
    if len(raw) > MAX_BYTES:
        raise UserError(Problem(file=str(path), message=f"the file is larger than {MAX_BYTES} bytes"))
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(Problem(file=str(path), message="the file is UTF-16", remedy="save it as UTF-8"))
    if b"\0" in raw:
        raise UserError(Problem(file=str(path), message="the file is binary, not YAML"))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        message = "a byte that is not UTF-8"
        raise UserError(Problem(file=str(path), line=line, message=message, remedy="save it as UTF-8")) from None


class _Builder:
    """Builds plain data from YAML nodes, noting the place of each value and every mistake of form."""

    def __init__(self, source: str, *, numbered: bool = True) -> None:
        self.source = source
        self.numbered = numbered
        self.places: dict[Keys, Place] = {}
        self.problems: list[Problem] = []
        self.count = 0

    def read(self, text: str, keys: Keys) -> Any:
        """Return the data that `text` says, its places starting with `keys`."""
        try:
            node = _Loader(text).get_single_node()
            data = self.build(node, keys) if node else None
        except yaml.YAMLError as error:
            raise UserError(self._syntax(error, text)) from None
        except _TooMuch as error:
            raise UserError(Problem(file=self.source, message=str(error))) from None
        if self.problems:
            raise UserError(*self.problems)
        return data

    def build(self, node: yaml.Node, keys: Keys, line: int | None = None) -> Any:
        """Return the data of one node and note its place."""
        self._visit(keys)
        line = line or self._line(node)
        self.places[keys] = Place(self.source, line if self.numbered else None, _quoted(node))
        if node.tag not in (_SCALARS if isinstance(node, yaml.ScalarNode) else _CONTAINERS):
            self._note(node, keys, f"the tag {node.tag.replace(_TAG, '!!')} is not allowed here", "remove it")
            return None
        if isinstance(node, yaml.MappingNode):
            pairs = self._pairs(node, keys)
            return {name: self.build(value, (*keys, name), self._line(key)) for name, (key, value) in pairs.items()}
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*keys, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, keys)

    def _visit(self, keys: Keys) -> None:
        self.count += 1
        if self.count > MAX_VALUES:
            raise _TooMuch(_MANY)
        if len(keys) > MAX_DEPTH:
            raise _TooMuch(_DEEP)

    def _pairs(self, node: yaml.MappingNode, keys: Keys) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Return the named children of a mapping, those merged in by `<<` standing behind its own."""
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if key.tag == _MERGE:
                for source in reversed(value.value) if isinstance(value, yaml.SequenceNode) else [value]:
                    merged |= self._merged(source, keys)
            elif key.tag != f"{_TAG}str" or not key.value.isprintable():
                self._note(key, keys, "keys must be plain text", "quote it" if isinstance(key, yaml.ScalarNode) else "")
            elif key.value in own:
                remedy = f"keep this one or the one on line {self._line(own[key.value][0])}"
                self._note(key, (*keys, key.value), "the key is given twice", remedy)
            else:
                own[key.value] = (key, value)
        return {**merged, **own}

    def _merged(self, node: yaml.Node, keys: Keys) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        self._visit(keys)
        if isinstance(node, yaml.MappingNode):
            self.count += len(node.value)
            return self._pairs(node, (*keys, "<<"))
        self._note(node, keys, "<< must name a block", "use an alias such as *base")
        return {}

    def _scalar(self, node: yaml.Node, keys: Keys) -> object:
        pattern, convert = _SCALARS[node.tag]
        if not pattern.fullmatch(node.value):
            self._note(node, keys, f"the text does not fit the tag {node.tag.replace(_TAG, '!!')}", "remove the tag")
        else:
            return convert(node.value)
        return None

    def _note(self, node: yaml.Node, keys: Keys, message: str, remedy: str) -> None:
        path = _dotted(keys)
        line = self._line(node) if self.numbered else None
        self.problems.append(Problem(file=self.source, line=line, path=path, message=message, remedy=remedy))

    def _line(self, node: yaml.Node) -> int:
        return int(node.start_mark.line) + 1

    def _syntax(self, error: yaml.YAMLError, text: str) -> Problem:
        said, line = "a control character", 1
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            # What goes on to the end of the text is told where it begins.
            ended = not text[error.problem_mark.index :].strip()
            mark = (ended and error.context_mark) or error.problem_mark
            has_tab = text[mark.index : mark.index + 1] == "\t"
            said = "found a tab" if has_tab else " ".join(filter(None, (error.context, error.problem)))
            line = mark.line + 1
        elif isinstance(error, yaml.reader.ReaderError):
            line = text.encode().count(b"\n", 0, error.position) + 1
        if "nesting depth" in said:  # newer versions of libyaml look ahead, and give up, before `compose_node` does
            return Problem(file=self.source, message=_DEEP)
        known = (plain for part, *plain in _SYNTAX if part in said)
        message, remedy = next(known, (said, ""))
        return Problem(file=self.source, line=line if self.numbered else None, message=message, remedy=remedy)


def _quoted(node: yaml.Node) -> str:
    """Return the text of a scalar as written, quotes included, and nothing for a block or a list."""
    if not isinstance(node, yaml.ScalarNode):
        return ""
    return str(node.value) if not node.style else json.dumps(node.value, ensure_ascii=False)


# --- paths -------------------------------------------------------------------------------------------------------


def _keys(path: str | Keys) -> Keys:
    if not isinstance(path, str):
        return path
    return tuple(int(part) if _is_position(part) else part for part in path.split(".") if part)


def _is_position(part: str) -> bool:
    """Whether a part of a path can number an item of a list."""
    return part.isascii() and part.isdecimal() and len(part) <= len(str(MAX_VALUES))


def _dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))


def _has(data: object, key: str | int) -> bool:
    if isinstance(data, dict):
        return key in data
    return isinstance(data, list) and isinstance(key, int) and 0 <= key < len(data)


def _at(data: Any, keys: Keys, absent: object = None) -> Any:
    for key in keys:
        if not _has(data, key):
            return absent
        data = data[key]
    return data


def _find(data: Any, parts: Sequence[str], source: str) -> tuple[Any, Keys]:
    """Return the container that holds a dotted path's last part, made where absent, and the path's keys."""
    keys: Keys = ()
    for depth, part in enumerate(parts):
        key = _step(data, part, keys, source)
        keys = (*keys, key)
        if depth == len(parts) - 1:
            break
        if not _has(data, key) or data[key] is None:
            if _is_position(parts[depth + 1]):
                raise UserError(_unknown(source, keys, suggestion(part, data)))
            data[key] = {}
        data = data[key]
    return data, keys


def _step(data: object, part: str, keys: Keys, source: str) -> str | int:
    """Return the key that one part of a `--set` path means inside `data`."""
    if isinstance(data, dict):
        return part
    if not isinstance(data, list):
        raise UserError(_unknown(source, (*keys, part), f"{_dotted(keys)} is a single value"))
    if _is_position(part) and int(part) < len(data):
        return int(part)
    names = {str(item["name"]): index for index, item in enumerate(data) if isinstance(item, dict) and "name" in item}
    if part in names:
        return names[part]
    known = [*map(str, range(len(data))), *names]
    raise UserError(_unknown(source, (*keys, part), suggestion(part, known)))


def _unknown(source: str, keys: Keys, remedy: str) -> Problem:
    return Problem(file=source, path=_dotted(keys), message="no such path", remedy=remedy)


def _shown(value: object, place: Place | None) -> str:
    """Return a value as the user wrote it, short and printable."""
    if isinstance(value, dict):
        return "a block"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    text = place.text if place else json.dumps(value, ensure_ascii=False)
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


# --- from pydantic's errors to problems --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fault:
    """One error of pydantic in plain words; `branches` are the unions on its way and the member taken in each."""

    keys: Keys
    message: str
    remedy: str = ""
    show_value: bool = True
    is_shape: bool = False
    branches: tuple[tuple[Keys, str], ...] = ()


_WORDS: Final[Mapping[str, tuple[str, str]]] = {
    "missing": ("the key is missing", "add it"),
    "int_type": ("must be a whole number", ""),
    "int_parsing_size": ("is too large a number", ""),
    "float_type": ("must be a number", ""),
    "finite_number": ("must be a finite number", ""),
    "bool_type": ("must be true or false", ""),
    "string_type": ("must be text", ""),
    "tuple_type": ("must be a list", "start each item with a dash"),
    "list_type": ("must be a list", "start each item with a dash"),
    "dict_type": ("must be a block of keys", ""),
    "model_type": ("must be a block of keys", ""),
    "none_required": ("must be left out", ""),
    "greater_than": ("must be more than {gt}", ""),
    "greater_than_equal": ("must be at least {ge}", ""),
    "less_than": ("must be less than {lt}", ""),
    "less_than_equal": ("must be at most {le}", ""),
    "multiple_of": ("must be a multiple of {multiple_of}", ""),
    "too_short": ("has {actual_length} items, needs at least {min_length}", ""),
    "too_long": ("has {actual_length} items, may have at most {max_length}", ""),
    "string_too_short": ("must have at least {min_length} characters", ""),
    "string_too_long": ("must have at most {max_length} characters", ""),
    "string_pattern_mismatch": ("must match {pattern}", ""),
    "union_tag_not_found": ("needs the key {discriminator}", ""),
}


def _faults(detail: ErrorDetails, data: object, model: type[BaseModel]) -> Iterator[_Fault]:
    """Translate one error of pydantic; a validator's `Several` gives several."""
    keys, branches = _follow(data, detail["loc"], detail["type"])
    if _is_echo(detail, _at(data, keys)):
        return
    raised = detail.get("ctx", {}).get("error")
    if isinstance(raised, At | Several):
        for each in raised.faults if isinstance(raised, Several) else (raised,):
            below = (*keys, *_keys(each.path))
            is_scalar = not isinstance(_at(data, below, absent={}), dict | list)
            yield _Fault(below, each.message, each.remedy, show_value=is_scalar, branches=branches)
    else:
        fault = _in_words(detail, data, keys, model)
        yield replace(fault, branches=branches, is_shape=detail["type"].endswith("_type"))


def _is_echo(detail: ErrorDetails, value: object) -> bool:
    """Whether a list is called too short only because pydantic did not count its faulty items."""
    return detail["type"] == "too_short" and isinstance(value, list) and len(value) >= detail["ctx"]["min_length"]


def _follow(data: object, location: Sequence[str | int], kind: str) -> tuple[Keys, tuple[tuple[Keys, str], ...]]:
    """Split pydantic's location into the keys that exist in the document and the union members named between them."""
    keys: Keys = ()
    branches: list[tuple[Keys, str]] = []
    for depth, part in enumerate(location):
        if _has(data, part):
            keys, data = (*keys, part), _at(data, (part,))
        elif kind == "missing" and depth == len(location) - 1:
            keys = (*keys, part)
        else:
            branches.append((keys, str(part)))
    return keys, tuple(branches)


def _in_words(detail: ErrorDetails, data: object, keys: Keys, model: type[BaseModel]) -> _Fault:
    kind, context = detail["type"], detail.get("ctx", {})
    value = _at(data, keys)
    if kind == "extra_forbidden":
        remedy = _meant(model, keys, _at(data, keys[:-1]))
        return _Fault(keys, "unknown key", remedy, show_value=False)
    if kind == "one_key_of":
        return _one_key(keys, value, context["keys"].split(", "))
    if kind in ("literal_error", "enum"):
        return _Fault(keys, f"must be {context['expected'].replace(chr(39), '')}", _choice(value, context["expected"]))
    if kind == "union_tag_invalid":
        return _Fault((*keys, context["discriminator"].strip("'")), f"must be one of {context['expected_tags']}")
    if kind == "string_type" and isinstance(value, int | float):
        return _Fault(keys, "must be text", "put it in quotes")
    if kind in ("model_type", "dict_type") and value in (None, True):
        return _Fault(keys, "must be a block of keys", "write {} for its defaults, or leave the key out")
    message, remedy = _WORDS.get(kind, (detail["msg"][:1].lower() + detail["msg"][1:].replace("{", "{{"), ""))
    return _Fault(keys, message.format(**context), remedy, show_value=kind not in ("missing", "too_short", "too_long"))


def _one_key(keys: Keys, value: object, allowed: Sequence[str]) -> _Fault:
    message = f"must have exactly one of the keys {', '.join(allowed)}"
    if not isinstance(value, dict):
        return _Fault(keys, message, f"write {' or '.join(f'{{{key}: ...}}' for key in allowed)}")
    present = [key for key in allowed if key in value]
    close = {key: nearest(key, allowed) for key in value if not present}
    remedy = next((f"did you mean {meant} instead of {key}?" for key, meant in close.items() if meant), "")
    return _Fault(keys, message, remedy or f"found {' and '.join(present or value) or 'none'}", show_value=False)


def _choice(value: object, expected: str) -> str:
    """Return the remedy for a value outside a closed list, given as pydantic writes it: "'a', 'b' or 3"."""
    allowed = re.findall(r"'([^']*)'", expected)
    if isinstance(value, int | float) and not isinstance(value, bool) and str(value) in allowed:
        return f'put it in quotes: "{value}"'
    close = nearest(str(value), allowed)
    return f"did you mean {close}?" if close else ""


def _settle_unions(faults: Iterable[_Fault], depth: int = 0) -> Iterator[_Fault]:
    """Keep, of the complaints of all members of a union, those of the member the user meant."""
    unions: dict[Keys, dict[str, list[_Fault]]] = defaultdict(lambda: defaultdict(list))
    for fault in faults:
        if len(fault.branches) <= depth:
            yield fault
        else:
            base, member = fault.branches[depth]
            unions[base][member].append(fault)
    for base, members in unions.items():
        settled = [list(_settle_unions(found, depth + 1)) for found in members.values()]
        fitting = [found for found in settled if any(len(fault.keys) > len(base) for fault in found)]
        if fitting or len(settled) == 1:
            yield from min(fitting or settled, key=len)
        else:
            yield _either([fault for found in settled for fault in found])


def _either(faults: Sequence[_Fault]) -> _Fault:
    """Join complaints about one value that no member of a union accepts."""
    telling = [fault for fault in faults if not fault.is_shape] or faults
    said = dict.fromkeys(fault.message.removeprefix("must be ") for fault in telling)
    remedies = sorted((fault.remedy for fault in telling), key=lambda remedy: not remedy.startswith("did you mean"))
    return replace(telling[0], message=f"must be {' or '.join(said)}", remedy=remedies[0])


# --- what a model knows ------------------------------------------------------------------------------------------


def _meant(model: type[BaseModel], keys: Keys, siblings: Any) -> str:
    """Return the remedy for an unknown key: its right place elsewhere, a near name beside it, or all known names."""
    name = str(keys[-1])
    candidates = _models_at(model, keys[:-1])
    here = max(candidates, key=lambda each: len(each.model_fields.keys() & siblings.keys()), default=model)
    required = [key for key, field in here.model_fields.items() if field.is_required() and key not in siblings]
    if absent := nearest(name, required):
        return f"did you mean {absent}?"
    home = _homes(model).get(name)
    if home is not None:
        return f"it belongs under {'.'.join(home)}" if home else "it belongs at the top of the file"
    return suggestion(name, here.model_fields)


def _members(annotation: Any) -> Iterator[Any]:
    """Yield the plain types of an annotation: the members of unions, without `Annotated`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _is_model(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _below(annotation: Any, key: str | int) -> Iterator[Any]:
    """Yield the annotations of what stands under one key of an annotated value."""
    for member in _members(annotation):
        if _is_model(member) and key in member.model_fields:
            yield member.model_fields[key].annotation
        elif get_origin(member) in (list, tuple, dict, Mapping, Sequence):
            arguments = [each for each in get_args(member) if each is not ...]
            yield arguments[-1]


def _models_at(model: type[BaseModel], keys: Keys) -> list[type[BaseModel]]:
    found: list[Any] = [model]
    for key in keys:
        found = [below for annotation in found for below in _below(annotation, key)]
    return [member for annotation in found for member in _members(annotation) if _is_model(member)]


@cache
def _homes(model: type[BaseModel]) -> Mapping[str, tuple[str, ...]]:
    """The path of the first block, at or below `model`, that knows each key; no path visits a key twice."""
    homes: dict[str, tuple[str, ...]] = {}

    def walk(block: type[BaseModel], path: tuple[str, ...]) -> None:
        for name in block.model_fields:
            homes.setdefault(name, path)
        for key in (key for key in block.model_fields if key not in path):
            for below in (*_models_at(block, (key,)), *_models_at(block, (key, 0))):
                walk(below, (*path, key))

    walk(model, ())
    return homes
