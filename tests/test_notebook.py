"""The notebook runs from the project's folder and shows what it shows now; run as a script, this executes it anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
MOST_BYTES = 300_000


def executed() -> Any:
    """The notebook with fresh outputs. Raises nbclient's error when a cell fails."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
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
def test_the_notebook_runs_and_shows_what_was_committed() -> None:
    committed = list(texts(nbformat.read(NOTEBOOK, as_version=4)))

    assert list(texts(executed())) == committed, "run: python tests/test_notebook.py"
    assert committed


def test_the_notebook_is_small() -> None:
    assert NOTEBOOK.stat().st_size < MOST_BYTES


if __name__ == "__main__":
    nbformat.write(executed(), NOTEBOOK)
