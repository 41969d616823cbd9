"""The project keeps its own rules: the import law, sources of prices, where printing happens, and words left out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

import sim
from sim.cost import prices
from sim.sharing.ksm_pass import WORK

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sim"
FILES = sorted(
    file for file in PACKAGE.rglob("*.py") if file.name not in ("__main__.py",) and file != PACKAGE / "__init__.py"
)
TEXTS = sorted(
    file
    for file in ROOT.rglob("*")
    if file.suffix in (".py", ".md", ".yaml", ".toml", ".ipynb", ".css") or file.parent.name == ".ci"
    if file.is_file() and not any(part.startswith(".") and part != ".ci" for part in file.relative_to(ROOT).parts)
)
LISTED = re.findall(r"^    ([a-z_]+)/?  ", str(sim.__doc__), re.MULTILINE)

UNWANTED = ("TO" + "DO", "FIX" + "ME", "lorem " + "ipsum")


def name(file: Path) -> str:
    """A file's name, or its folder's, in the list."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """Names in the list of what a file imports, inside functions and for types too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "sim":
            modules = [f"sim.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [str(node.module)]
        else:
            continue
        yield from (module.split(".")[1] for module in modules if module.startswith("sim."))


def test_the_reading_order_lists_every_file_and_folder_once() -> None:
    assert sorted(LISTED) == sorted({name(file) for file in FILES})


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_only_from_what_stands_above_it(file: Path) -> None:
    allowed = LISTED[: LISTED.index(name(file)) + 1]

    assert sorted(set(imported(file)) - set(allowed)) == []


def test_a_wrong_import_would_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "pages.py"
    file.write_text("def f():\n    from sim.host import Host\n    from sim import run\n    import sim.cli as c\n")

    assert list(imported(file)) == ["host", "run", "cli"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_the_command_line_prints(file: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]

    assert name(file) in ("cli", "lab") or not [f for f in calls if isinstance(f, ast.Name) and f.id == "print"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_module_says_in_its_first_line_what_it_is(file: Path) -> None:
    text = file.read_text()

    assert not text or ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("price_set", prices.names())
def test_every_price_has_a_source(price_set: str) -> None:
    priced = prices.load(price_set).model_dump(include={*WORK, "cow_break", "cold_caches"})

    assert [kind for kind, price in priced.items() if len(price["source"]) < 10] == []


def test_a_price_without_a_source_is_refused() -> None:
    priced = prices.load(prices.DEFAULT).model_dump()
    del priced["merge"]["source"]

    with pytest.raises(ValidationError, match=r"merge\.source"):
        prices.Prices.model_validate(priced)


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_has_words_of_unfinished_work_or_of_one_machine(file: Path) -> None:
    text = file.read_text(errors="replace")  # some files of tests/bad are no text

    assert [word for word in UNWANTED if word in text] == []
