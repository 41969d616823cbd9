"""A run as pictures, words and one HTML page."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sim.report.html import Judged


def write(result: "Judged", folder: Path) -> Path:
    """Write report.html and pictures/*.png into `folder` and return the page's path; see `sim.report.html.write`."""
    from sim.report import html  # matplotlib takes half a second to import

    return html.write(result, folder)


def save(result: "Judged", out: str | Path = "results") -> Path:
    """Keep a result as `overcommit run` does, tables, pictures and report.html, and return its folder."""
    from sim.results import write as keep

    folder = keep(result, Path(out))
    write(result, folder)
    return folder
