"""Published figures as text: one line each, and a Markdown page with what was assumed and what fails."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from sim import files
from sim.report.words import listed
from sim.study.figures import Row

_SECTIONS: Final = {
    "outside, without a reason": ("Outside, without a reason", "To be explained or mended."),
    "inside, against what it says": ("Inside, though said to fail", "To be said of them no longer."),
    "inside": (
        "Inside the stated band",
        "Nothing was chosen so that these figures come out; what a source does not tell is under *assumed*.",
    ),
    "fails": ("Failing", "These runs do not come near enough. The reason stands beside each."),
    "fitted": (
        "Fitted",
        "A price or an input was chosen so that these figures come out: they show where the others start from and are "
        "no check.",
    ),
    "not modelled": (
        "Not modelled",
        "These systems, or what they were measured on, are not part of the simulator. Beside each is what a run that "
        "is near to it has.",
    ),
}
_HEADER: Final = ("source", "figure", "published", "simulated", "error", "band", "assumed")
_LAST: Final = {"fails": "why it fails", "fitted": "what was chosen", "not modelled": "why it is not modelled"}


def lines(rows: Sequence[Row]) -> Iterator[Sequence[str]]:
    """One line per figure, under a head."""
    yield "verdict", "scenario", "figure", "published", "simulated", "error", "band"
    for row in rows:
        verdict = row.verdict if row.failure is None else "no run"
        yield verdict, row.file.stem, row.figure.figure, *_figures(row)


def conclusion(rows: Sequence[Row]) -> str:
    """How many figures there are, and how they did."""
    counts = {
        verdict: sum(row.verdict == verdict for row in rows) for verdict in dict.fromkeys(r.verdict for r in rows)
    }
    words = {"inside": "inside the stated band", "fails": "failing with a reason"}
    told = [f"{count} {words.get(verdict, verdict)}" for verdict, count in counts.items()]
    return f"{len(rows)} published figures: {listed(told)}."


def faults(rows: Sequence[Row]) -> Iterator[str]:
    """What must be put right: figures off without a reason, with a reason and not off, or without a run."""
    for row in rows:
        name = f"{row.file}: {row.figure.figure}"
        if row.failure:
            yield f"{name}: {row.failure.text}"
        elif row.verdict == "outside, without a reason":
            found = "the run has no such figure" if row.simulated is None else f"the run has {_simulated(row)}"
            yield f"{name}: published {_published(row)}, {found}; write under fails: why, or mend the run"
        elif not row.honest:
            yield f"{name}: is inside its band; remove fails"


def write(rows: Sequence[Row], page: Path) -> None:
    """Write the page."""
    with files.explained(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        files.publish(page, markdown(rows, page).encode())


def markdown(rows: Sequence[Row], page: Path) -> str:
    """Return the page with every figure, its links starting from *page*."""
    blocks = [
        "# Published figures",
        "What others measured, and what the simulator has for it. Every row is a run of a scenario, which states its "
        "inputs; `overcommit published scenarios/published` computes them all. "
        "A band stands beside its figure in the scenario; an error is the distance to what was published.",
        conclusion(rows),
    ]
    for verdict, (title, text) in _SECTIONS.items():
        some = [row for row in rows if row.verdict == verdict]
        if some:
            header = [*_HEADER, *([_LAST[verdict]] if verdict in _LAST else [])]
            cells = (_cells(row, page, verdict in _LAST) for row in some)
            blocks += [f"## {title}", text, "\n".join(map(_line, [header, ["---"] * len(header), *cells]))]
    return "\n\n".join(blocks) + "\n"


def _cells(row: Row, page: Path, reason: bool) -> Sequence[str]:
    figure = row.figure
    link = Path(os.path.relpath(row.file, page.parent)).as_posix()
    cells = [figure.source, f"{figure.figure} ([{row.file.stem}]({link}))", *_figures(row), figure.assumed]
    return [*cells, figure.fitted or figure.fails or figure.not_modelled] if reason else cells


def _line(cells: Sequence[str]) -> str:
    escaped = (" ".join(cell.split()).replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _figures(row: Row) -> Sequence[str]:
    """Published, simulated, error, band."""
    return _published(row), _simulated(row), _error(row), _band(row)


def _published(row: Row) -> str:
    low, high = row.figure.range
    if low == -math.inf or high == math.inf:
        return _with_unit(f"{row.figure.band.text} {_as_told(high if low == -math.inf else low)}", row)
    return _with_unit(_as_told(low) if low == high else f"{_as_told(low)} to {_as_told(high)}", row)


def _simulated(row: Row) -> str:
    return "none" if row.simulated is None else _with_unit(_number(row.simulated), row)


def _error(row: Row) -> str:
    if row.error is None:
        return ""
    if row.error == 0:
        return "0"
    return f"{100 * row.error:+.2g} %" if row.relative else f"{row.error:+.3g}"


def _band(row: Row) -> str:
    return row.figure.band.text


def _with_unit(text: str, row: Row) -> str:
    return f"{text} {row.figure.unit}".rstrip()


def _as_told(value: float) -> str:
    """A published figure with all its digits."""
    return f"{int(value):,}" if value == int(value) else f"{value:,}"


def _number(value: float) -> str:
    """Whole numbers whole, others to four significant digits."""
    if abs(value - round(value)) <= 1e-9 * abs(value):
        return f"{round(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
