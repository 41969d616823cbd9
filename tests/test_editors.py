"""What editors and shells need: the schema, the line that names it, and completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from sim.cli import main

ROOT = Path(__file__).parents[1]
REQUIRED = ("name", "hosts", "vms")
"""What a scenario must have that extends no other."""
SCHEMA = ROOT / "sim" / "scenario" / "schema.json"


def test_the_schema_that_editors_read_is_the_one_of_the_program() -> None:
    assert CliRunner().invoke(main, ["schema"]).stdout == SCHEMA.read_text(), "run: python tests/test_readme.py"


def test_every_field_of_the_schema_says_what_it_is_and_has_its_default() -> None:
    schema = json.loads(SCHEMA.read_text())
    blocks = {**schema["$defs"], "Scenario": schema}

    del blocks["JsonValue"]  # anything: a value of a sweep

    def is_told(entry: dict[str, Any]) -> bool:
        """A field that says the same as its block leaves it to the block."""
        return bool({**blocks.get(entry.get("$ref", "").rpartition("/")[2], {}), **entry}.get("description"))

    assert [name for name, block in blocks.items() if not block.get("description")] == []
    assert [path for path, entry in fields(blocks) if not is_told(entry)] == []
    optional = {path for path, entry in fields(blocks) if path[1] not in blocks[path[0]].get("required", ())}
    silent = {path for path, entry in fields(blocks) if path in optional and "default" not in entry}
    found_out = {("Host", "prices")}
    empty = {("Figure", "against"), ("Figure", "set"), ("Tps", "guests"),
             *(("Scenario", key) for key in ("phases", "sweep", "tolerances"))}  # fmt: skip
    required = {("Host", "memory"), ("Vm", "memory"), ("Vm", "name"), *(("Scenario", key) for key in REQUIRED)}
    assert silent == found_out | empty | required


def fields(blocks: dict[str, dict[str, Any]]) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """Every property of every block."""
    for name, block in blocks.items():
        for key, entry in block.get("properties", {}).items():
            yield (name, key), entry


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("name: a\nhosts: [{memory: 1GiB}]\nvms: [{name: b, memory: 1MiB}]", True),
        ("name: a\nhosts: [{memory: 1GiB}]\nvms: [{name: b, preset: debian-12-pg}]", True),
        ("extends: other.yaml\nvms: [{name: b, count: 3}]", True),
        ("name: a\nhosts: [{memory: 1GiB}]\nvms: [{name: b}]", False),
        ("name: a\nhosts: [{memory: 1GiB}]", False),
        ("name: a\nhosts: [{memory: 1GiB}]\nvms: [{name: b, preset: debian-12}]", False),
    ],
)
def test_the_schema_asks_for_what_neither_a_preset_nor_another_file_can_say(text: str, fits: bool) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))

    assert validator.is_valid(yaml.safe_load(text)) == fits


def test_a_new_scenario_tells_editors_where_the_schema_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert CliRunner().invoke(main, ["new", "mine"]).exit_code == 0

    first = (tmp_path / "mine.yaml").read_text().splitlines()[0]
    key, _, url = first.partition("=")
    assert key == "# yaml-language-server: $schema"
    assert Path(unquote(urlparse(url).path)) == SCHEMA


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_verbs(shell: str) -> None:
    def ask(instruction: str, **words: str) -> str:
        asked = {**os.environ, "_OVERCOMMIT_COMPLETE": f"{shell}_{instruction}", **words}
        # The program's name tells click how its variable is called.
        run = "import sys; sys.argv = ['overcommit']; from sim.cli import main; main(prog_name='overcommit')"
        return subprocess.run([sys.executable, "-c", run], env=asked, capture_output=True, text=True, check=True).stdout

    script = ask("source")
    found = ask("complete", COMP_WORDS="overcommit vali", COMP_CWORD="vali" if shell == "fish" else "1")

    assert "_OVERCOMMIT_COMPLETE" in script
    assert "validate" in found and "sweep" not in found
    assert f"_OVERCOMMIT_COMPLETE={shell}_source overcommit" in (ROOT / "README.md").read_text()
