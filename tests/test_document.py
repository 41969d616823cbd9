"""What the strict YAML reader accepts, refuses, and says."""

# ruff: noqa: E501 - one mistake and its message read best on one line

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field, ValidationInfo, model_validator

from sim.document import MAX_BYTES, MAX_MISTAKES, MAX_VALUES, Document, by_key, dump, read
from sim.errors import At, Several, UserError
from sim.units import GIB, SECOND, Block, Bytes, Duration, Share


class Ksm(Block):
    """A block with whole numbers and a closed list."""

    pages_to_scan: Annotated[int, Field(ge=1)] = 100
    sleep_millisecs: int = 20
    advisor_mode: Literal["none", "scan-time"] = "none"
    smart_scan: Literal[0, 1] = 1


class Host(Block):
    """A block with a required quantity and a nested block."""

    memory: Bytes
    kernel: Literal["6.8", "6.18"] = "6.18"
    ksm: Ksm | None = None
    swap: bool = False


class Captured(Block):
    """One member of the image union."""

    captured: str


class Part(Block):
    """A part of a synthetic image; its size is a union of two quantities."""

    size: Bytes | Share


class Synthetic(Block):
    """The other member of the image union."""

    parts: tuple[Part, ...]
    unique: Share = 0.0


class Vm(Block):
    """A block with a union recognised by its key."""

    name: str
    image: Annotated[Captured | Synthetic, by_key(captured=Captured, parts=Synthetic)]


class Question(Block):
    """A small scenario."""

    name: str
    duration: Duration = 60 * SECOND
    hosts: Annotated[tuple[Host, ...], Field(min_length=1)]
    vms: Annotated[tuple[Vm, ...], Field(min_length=1)] = ()

    @model_validator(mode="after")
    def _vms_have_different_names(self) -> Question:
        names = [vm.name for vm in self.vms]
        doubles = [
            At(f"vms.{i}.name", "is used twice", "rename it") for i in range(len(names)) if names[i] in names[:i]
        ]
        if doubles:
            raise Several(*doubles)
        return self


GOOD = """\
name: web
hosts:
  - memory: 16GiB
    ksm: {pages_to_scan: 1000}
vms:
  - name: a
    image: {captured: a.npz}
  - name: b
    image:
      parts:
        - size: 50%
        - size: 1GiB
"""


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "s.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def complaints(path: Path) -> list[str]:
    """Return the problems of a file, without its folder."""
    with pytest.raises(UserError) as caught:
        read(path).check(Question)
    return [str(problem).replace(f"{path.parent}/", "") for problem in caught.value.problems]


def test_a_good_file_becomes_a_frozen_block(tmp_path: Path) -> None:
    question = read(written(tmp_path, GOOD)).check(Question)

    assert question.hosts == (Host(memory="16GiB", ksm=Ksm(pages_to_scan=1000)),)
    assert question.vms[0].image == Captured(captured="a.npz")
    assert question.vms[1].image == Synthetic(parts=(Part(size="50%"), Part(size="1GiB")))


def test_the_resolved_block_reads_back_as_itself(tmp_path: Path) -> None:
    question = read(written(tmp_path, GOOD)).check(Question)

    again = read(written(tmp_path, dump(question.model_dump(mode="json")))).check(Question)

    assert again == question


BAD_SHAPE = {
    "unknown key": ("ksm: {pages_to_scan", "ksm: {pages_to_scann", "s.yaml:4: hosts.0.ksm.pages_to_scann: unknown key; did you mean pages_to_scan?"),
    "key of another block": ("  - memory: 16GiB", "  - memory: 16GiB\n    pages_to_scan: 3", "s.yaml:4: hosts.0.pages_to_scan: unknown key; it belongs under hosts.ksm"),
    "key of a block in a union": ("name: web", "name: web\nunique: 3%", "s.yaml:2: unique: unknown key; it belongs under vms.image"),
    "key of the top": ("{captured: a.npz}", "{captured: a.npz, duration: 1s}", "s.yaml:7: vms.0.image.duration: unknown key; it belongs at the top of the file"),
    "nothing near": ("name: web", "name: web\nzzz: 1", "s.yaml:2: zzz: unknown key; known: name, duration, hosts, vms"),
    "missing key": ("- memory: 16GiB\n    ksm", "- ksm", "s.yaml:3: hosts.0.memory: the key is missing; add it"),
    "text for a number": ("1000", '"8"', 's.yaml:4: hosts.0.ksm.pages_to_scan: must be a whole number, got "8"'),
    "true for a number": ("1000", "true", "s.yaml:4: hosts.0.ksm.pages_to_scan: must be a whole number, got true"),
    "octal": ("1000", "010", "s.yaml:4: hosts.0.ksm.pages_to_scan: must be a whole number, got 010"),
    "exponent for a whole number": ("1000", "1e3", "s.yaml:4: hosts.0.ksm.pages_to_scan: must be a whole number, got 1e3"),
    "too small": ("1000", "0", "s.yaml:4: hosts.0.ksm.pages_to_scan: must be at least 1, got 0"),
    "on is not true": ("ksm:", "swap: on\n    ksm:", "s.yaml:4: hosts.0.swap: must be true or false, got on"),
    "naked size": ("16GiB", "16", 's.yaml:3: hosts.0.memory: must be a size in bytes with its unit, got 16; write a unit, such as "16GiB"'),
    "half a unit": ("16GiB", "16G", 's.yaml:3: hosts.0.memory: must be a size in bytes, got 16G; did you mean "16GiB" or "16GB"?'),
    "nothing for a size": ("16GiB", "", 's.yaml:3: hosts.0.memory: must be a size in bytes, got nothing; write a number with a unit such as "16GiB"'),
    "no items": ("vms:", "vms: []\nhosts_:", "s.yaml:5: vms: has 0 items, needs at least 1"),
    "list for a size": ("16GiB", "[16GiB]", 's.yaml:3: hosts.0.memory: must be a size in bytes; write a number with a unit such as "16GiB"'),
    "near choice": ("pages_to_scan: 1000", "advisor_mode: scan_time", "s.yaml:4: hosts.0.ksm.advisor_mode: must be none or scan-time, got scan_time; did you mean scan-time?"),
    "on for a choice of numbers": ("pages_to_scan: 1000", "smart_scan: on", "s.yaml:4: hosts.0.ksm.smart_scan: must be 0 or 1, got on"),
    "version without quotes": ("ksm:", "kernel: 6.18\n    ksm:", 's.yaml:4: hosts.0.kernel: must be 6.8 or 6.18, got 6.18; put it in quotes: "6.18"'),
    "number for text": ("name: web", "name: 12", "s.yaml:1: name: must be text, got 12; put it in quotes"),
    "value for a block": ("{pages_to_scan: 1000}", "fast", "s.yaml:4: hosts.0.ksm: must be a block of keys, got fast"),
    "block for a list": ("vms:", "vms: {}\nvm_s:", "s.yaml:5: vms: must be a list, got a block; start each item with a dash"),
    "no key of the union": ("{captured: a.npz}", "{capture: a.npz}", "s.yaml:7: vms.0.image: must have exactly one of the keys captured, parts; did you mean captured instead of capture?"),
    "two keys of the union": ("{captured: a.npz}", "{captured: a, parts: []}", "s.yaml:7: vms.0.image: must have exactly one of the keys captured, parts; found captured and parts"),
    "unknown key in a union": ("{captured: a.npz}", "{captured: a.npz, uniq: 2%}", "s.yaml:7: vms.0.image.uniq: unknown key; known: captured"),
    "misspelt key in a union": ("      parts:", "      uniqe: 2%\n      parts:", "s.yaml:10: vms.1.image.uniqe: unknown key; did you mean unique?"),
    "neither of two quantities": ("50%", "lots", 's.yaml:11: vms.1.image.parts.0.size: must be a size in bytes or a share, got lots; write a number with a unit such as "16GiB"'),
    "nearly one of two quantities": ("50%", "50M", 's.yaml:11: vms.1.image.parts.0.size: must be a size in bytes or a share such as "2%" or 0.02, got 50M; did you mean "50MiB" or "50MB"?'),
    "check across fields": ("name: b", "name: a", "s.yaml:8: vms.1.name: is used twice, got a; rename it"),
    "duplicate key": ("vms:", "name: again\nvms:", "s.yaml:5: name: the key is given twice; keep this one or the one on line 1"),
    "key that is not text": ("name: web", "1: web", "s.yaml:1: keys must be plain text; quote it"),
    "tag": ("name: web", "name: !!binary aGk=", "s.yaml:1: name: the tag !!binary is not allowed here; remove it"),
    "object tag": ("name: web", "name: !!python/object:os.system {}", "s.yaml:1: name: the tag !!python/object:os.system is not allowed here; remove it"),
    "tag that lies": ("name: web", "name: !!int web", "s.yaml:1: name: the text does not fit the tag !!int; remove the tag"),
    "half a character": ("name: web", 'name: "\\ud800"', "s.yaml:1: the text holds half a character; remove the \\ud800 to \\udfff escapes"),
    "merge of a value": ("ksm: {", "ksm: {<<: 3, ", "s.yaml:4: hosts.0.ksm: << must name a block; use an alias such as *base"),
    "tab": ("    ksm", "\tksm", "s.yaml:4: a tab is used for indentation; use spaces"),
    "colon": ("name: web", "name: web: tier", "s.yaml:1: a colon where none can stand; check the indentation, or quote the text"),
    "two documents": ("vms:", "---\nvms:", "s.yaml:5: the file holds more than one document; remove the line ---"),
    "control character": ("name: web", "name: w\x07b", "s.yaml:1: a control character"),
    "open quote": ("name: web", 'name: "web', "s.yaml:1: a text whose quote is never closed; close it, or double the quote inside"),
    "mapping tagged as a scalar": ("name: web", "name: !!int {}", "s.yaml:1: name: the tag !!int is not allowed here; remove it"),
    "scalar tagged as a mapping": ("name: web", "name: !!map web", "s.yaml:1: name: the tag !!map is not allowed here; remove it"),
    "infinite number": ("name: web", "name: 1e999", "s.yaml:1: name: must be text, got 1e999; put it in quotes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SHAPE)
def test_each_mistake_gives_one_line_with_its_place_value_and_remedy(case: str, tmp_path: Path) -> None:
    old, new, expected = BAD_SHAPE[case]
    assert old in GOOD

    assert complaints(written(tmp_path, GOOD.replace(old, new, 1)))[:1] == [expected]


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = GOOD.replace("16GiB", "16").replace("pages_to_scan", "pages").replace("name: b", "nam: b")

    assert [line.split(": ")[:2] for line in complaints(written(tmp_path, text))] == [
        ["s.yaml:3", "hosts.0.memory"],
        ["s.yaml:4", "hosts.0.ksm.pages"],
        ["s.yaml:8", "vms.1.name"],
        ["s.yaml:8", "vms.1.nam"],
    ]


UNREADABLE = {
    "empty": (b"", "s.yaml:1: the file is empty; start with name: and memory sizes"),
    "only a comment": (b"# nothing", "s.yaml:1: the file is empty; start with name: and memory sizes"),
    "a list": (b"- a\n", "s.yaml:1: the file must be a block of keys; start with name: and memory sizes"),
    "UTF-16": ("name: web".encode("utf-16"), "s.yaml: the file is UTF-16; save it as UTF-8"),
    "NUL": (b"name: \0", "s.yaml: the file is binary, not YAML"),
    "Latin-1": (b"name: x\nb: \xe9", "s.yaml:2: a byte that is not UTF-8; save it as UTF-8"),
    "too large": (b"#" * (MAX_BYTES + 1), f"s.yaml: the file is larger than {MAX_BYTES} bytes"),
    "deep": (b"a: " + b"[" * 5000, "s.yaml: values nest too deeply or contain themselves"),
    "self-containing": (b"a: &a [*a]", "s.yaml: values nest too deeply or contain themselves"),
    "self-merging": (b"a: &a {<<: *a}", "s.yaml: values nest too deeply or contain themselves"),
    "alias bomb": (
        b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 10)),
        "s.yaml: the file expands to more than 25000 values",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_that_is_no_scenario_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    raw, expected = UNREADABLE[case]

    assert complaints(written(tmp_path, raw)) == [expected]


def test_a_merge_bomb_is_refused(tmp_path: Path) -> None:
    levels = [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}], k{i}: 1}}" for i in range(1, 9)]

    assert complaints(written(tmp_path, "\n".join(["m0: &m0 {k0: 1}", *levels]))) == [
        "s.yaml: the file expands to more than 25000 values"
    ]


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    written(tmp_path, GOOD).rename(tmp_path / "quickstart.yaml")

    with pytest.raises(UserError, match=r"quikstart.yaml: no such file; did you mean .*/quickstart.yaml\?"):
        read(tmp_path / "quikstart.yaml")


def test_a_folder_is_not_a_scenario(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        read(tmp_path)


def test_a_merged_block_keeps_its_own_keys_and_the_first_source_wins(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {<<: [*a, *b], x: 3}\n"

    assert read(written(tmp_path, text)).data["c"] == {"x": 3, "y": 1, "z": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000.0),
        ("-1.5", -1.5),
        ("007", "007"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("12:30:00", "12:30:00"),
        ("2024-01-01", "2024-01-01"),
        ("yes", "yes"),
        ("True", "True"),
        (".inf", ".inf"),
        ("true", True),
        ("~", None),
        ("12", 12),
    ],
)
def test_plain_scalars_have_no_surprises(text: str, value: object, tmp_path: Path) -> None:
    found = read(written(tmp_path, f"a: {text}")).data["a"]

    assert (found, type(found)) == (value, type(value))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**29), 10**29) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-zA-Z0-9_.~-]+", fullmatch=True), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@example(value="\x85")
@example(value="a\u2028b")
@given(value=PLAIN)
def test_dumped_data_reads_back_unchanged(value: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = written(tmp_path_factory.getbasetemp(), dump({"value": value}))

    assert repr(read(path).data) == repr({"value": value})


def overridden(tmp_path: Path, *assignments: str) -> Question:
    document = read(written(tmp_path, GOOD))
    for assignment in assignments:
        document = document.override(assignment)
    return document.check(Question)


def test_an_override_replaces_adds_and_finds_list_items_by_name(tmp_path: Path) -> None:
    question = overridden(
        tmp_path,
        "duration=90s",
        "hosts.0.memory=8GiB",
        "hosts.0.ksm.smart_scan=0",
        "vms.b.image={captured: b.npz}",
    )

    assert question.duration == 90 * SECOND
    assert question.hosts == (Host(memory="8GiB", ksm=Ksm(pages_to_scan=1000, smart_scan=0)),)
    assert question.vms[1].image == Captured(captured="b.npz")


def test_an_override_makes_the_blocks_that_the_file_left_out() -> None:
    document = Document("", {"name": "x", "hosts": [{"memory": "1GiB", "ksm": None}]})

    assert document.override("hosts.0.ksm.pages_to_scan=7").check(Question).hosts[0].ksm == Ksm(pages_to_scan=7)


def test_an_override_leaves_the_document_as_it_was(tmp_path: Path) -> None:
    document = read(written(tmp_path, GOOD))

    changed = document.override("hosts.0.memory=1GiB")

    assert document.check(Question).hosts[0].memory == 16 * GIB
    assert (document.overrides, changed.overrides) == ((), ("hosts.0.memory=1GiB",))


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("duration", "--set duration: must be path=value; for example duration=1h"),
        ("duration=", "--set duration=: must be path=value; for example duration=1h"),
        ("=1h", "--set =1h: must be path=value; for example duration=1h"),
        ("hots.0.memory=1GiB", "--set hots.0.memory=1GiB: hots: no such path; did you mean hosts?"),
        ("hosts.1.memory=1GiB", "--set hosts.1.memory=1GiB: hosts.1: no such path; known: 0"),
        ("vms.c.name=x", "--set vms.c.name=x: vms.c: no such path; known: 0, 1, a, b"),
        ("name.x=1", "--set name.x=1: name.x: no such path; name is a single value"),
        ("hosts.0.memory=8", '--set hosts.0.memory=8: hosts.0.memory: must be a size in bytes with its unit, got 8; write a unit, such as "16GiB"'),
        ("hosts.0.ksm.run_=1", "--set hosts.0.ksm.run_=1: hosts.0.ksm.run_: unknown key; known: pages_to_scan, sleep_millisecs, advisor_mode, smart_scan"),
        ("hosts.0.kms.run=1", "--set hosts.0.kms.run=1: hosts.0.kms: unknown key; did you mean ksm?"),
        ("name=[", "--set name=[: a value is missing; write one, or remove the open bracket"),
        ("name={a: 1, a: 2}", "--set name={a: 1, a: 2}: name.a: the key is given twice; keep this one or the one on line 1"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_reported_as_typed(assignment: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        overridden(tmp_path, assignment)

    assert str(caught.value) == expected


def test_a_problem_inside_a_missing_block_is_placed_at_the_nearest_line(tmp_path: Path) -> None:
    problem = read(written(tmp_path, GOOD)).problem("hosts.0.swap.device", "is missing", show_value=False)

    assert (problem.line, problem.path) == (3, "hosts.0.swap.device")


def test_validators_see_the_context_of_the_check() -> None:
    class Reader(Block):
        """Keeps what it was told."""

        folder: str = ""

        @model_validator(mode="before")
        @classmethod
        def _from_context(cls, data: dict[str, str], info: ValidationInfo) -> dict[str, str]:
            return {**data, "folder": info.context["folder"]} if info.context else data

    assert Document("", {}).check(Reader, folder="images").folder == "images"


def test_a_document_made_in_python_reports_paths_without_a_file() -> None:
    with pytest.raises(UserError) as caught:
        Document("", {"name": "x", "hosts": [{"memory": 5}]}).check(Question)

    assert str(caught.value).startswith("hosts.0.memory: must be a size in bytes with its unit, got 5")


def test_no_value_can_write_control_characters_to_the_terminal(tmp_path: Path) -> None:
    text = GOOD.replace("16GiB", '"\\e[31m\\n16"')

    assert all(line.isprintable() for line in complaints(written(tmp_path, text)))


def test_the_schema_of_a_union_by_key_offers_each_member() -> None:
    image = Question.model_json_schema()["$defs"]["Vm"]["properties"]["image"]

    assert image["oneOf"] == [{"$ref": "#/$defs/Captured"}, {"$ref": "#/$defs/Synthetic"}]


def test_of_very_many_mistakes_the_first_are_told_and_the_others_counted(tmp_path: Path) -> None:
    more = "".join(f"key{number}: 1\n" for number in range(MAX_MISTAKES + 50))

    with pytest.raises(UserError) as caught:
        read(written(tmp_path, GOOD + more)).check(Question)

    assert len(caught.value.problems) == MAX_MISTAKES + 1
    assert str(caught.value).endswith(": and 50 more mistakes")


def test_more_nodes_than_a_scenario_can_hold_are_not_even_put_together(tmp_path: Path) -> None:
    many = "a: [" + "1," * (3 * MAX_VALUES) + "]"

    with pytest.raises(UserError, match=f"more than {MAX_VALUES} values"):
        read(written(tmp_path, many))
