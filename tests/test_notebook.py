"""The notebooks run from the project's folder and show what they show now; run as a script, this executes them anew."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 300_000


def executed(file: Path) -> Any:
    """A notebook with fresh outputs. Raises nbclient's error when a cell fails."""
    notebook = nbformat.read(file, as_version=4)
    with patch.dict(os.environ):
        os.environ.pop("MPLBACKEND", None)  # where it is set, notebooks have no pictures
        NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}, timeout=300).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which change at every execution
    return notebook


def texts(notebook: Any) -> Iterator[str]:
    """What the code cells show, pictures left out."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            yield output.get("text") or output.get("data", {}).get("text/plain", "")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_shows_what_was_committed(file: Path) -> None:
    committed = list(texts(nbformat.read(file, as_version=4)))

    assert list(texts(executed(file))) == committed, "run: python tests/test_notebook.py"
    assert committed


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_small(file: Path) -> None:
    assert file.stat().st_size < MOST_BYTES


if __name__ == "__main__":
    for each in NOTEBOOKS:
        nbformat.write(executed(each), each)
