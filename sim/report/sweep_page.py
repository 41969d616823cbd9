"""The report of a sweep: what to set in a sentence, the pictures, and the table of all points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes

from sim import document, files
from sim.columns import METRICS
from sim.report import crossover, everything, frontier
from sim.report.html import PICTURES, details, drawing, page, publish, saved, section
from sim.report.markup import Markup, figure, table, tag
from sim.report.style import RC
from sim.report.words import amount, short_names
from sim.study import Swept

_SHOWN = (
    frontier.GAIN,
    frontier.COST,
    "ksmd_cpu_percent_settled",
    "mem_used_bytes",
    "mem_huge_bytes",
    "mem_swapped_bytes",
    "progress_percent",
    "tlb_slowdown_percent",
    "oom_kills",
)
_UNITS = {metric.name: metric.unit for metric in METRICS}
_PANEL = 4.4


class _Picture(NamedTuple):
    name: str
    title: str
    text: str
    """What it shows, for the caption and for those who cannot see it."""
    draw: Callable[[Axes], object] | None
    """Nothing for the comparison, which has a row for each point."""


def rows(swept: Swept) -> Sequence[Sequence[str]]:
    """The axes and the main metrics of each point as text, below their names; a failed point has its error."""
    if swept.timeline is not None:
        return everything.rows(swept)
    found = [
        [
            *short_names(swept.axes),
            *_SHOWN,
            "",
        ]
    ]
    points = frontier.judge(swept.table, swept.scenario.points)
    # Over host memories, which are bought and not set, there is no frontier.
    fit = points.iloc[:0] if crossover.memory_axis(swept.table, swept.axes) else points
    chosen, best = frontier.choice(fit), set(frontier.front(fit).index)
    for number, row in points.iterrows():
        figures = [amount(None if pd.isna(row[name]) else row[name], _UNITS[name]) for name in _SHOWN]
        remark = row["error"] or row["fault"] or ("best for its CPU" if number in best else "")
        remark = "set this" if chosen is not None and number == chosen.name else remark
        found.append(
            [*(str(row[axis]) for axis in swept.axes), *figures, ", ".join(filter(None, (remark, row["mark"])))]
        )
    return found


def conclusion(swept: Swept) -> str:
    """What the sweep shows, in a few sentences."""
    if swept.timeline is not None:
        return everything.conclusion(swept)
    if axis := crossover.memory_axis(swept.table, swept.axes):
        return crossover.conclusion(
            crossover.lines(swept.table, swept.axes, axis), crossover.promised_bytes(swept.scenario)
        )
    return frontier.conclusion(frontier.judge(swept.table, swept.scenario.points), swept.axes)


def write(swept: Swept) -> Path:
    """Write report.html and the picture (PNG and SVG) beside the table of the sweep; return the page's path.

    Raises UserError when the folder cannot take them and MachineError when the disk is full.
    """
    pictures = swept.folder / PICTURES
    with files.explained(swept.folder):
        pictures.mkdir(exist_ok=True)
        return publish(page(swept.scenario.name, _sections(swept, draw(swept, pictures))), swept.folder)


def draw(swept: Swept, folder: Path) -> Markup:
    """Draw the picture that fits the sweep, if there is anything to be seen, as PNG, as SVG, and for a page."""
    picture = _picture(swept)
    if picture is None:
        return Markup()
    png = folder / f"{picture.name}.png"
    with mpl.rc_context(RC):
        svg = saved(everything.draw(swept), png) if picture.draw is None else drawing(picture.draw, 1, png, _PANEL)
    files.publish(folder / f"{picture.name}.svg", svg.encode())
    return figure(svg, picture.name, picture.title, picture.text)


def _picture(swept: Swept) -> _Picture | None:
    if swept.table[[frontier.GAIN, frontier.COST]].isna().any(axis=1).all():
        return None
    if swept.timeline is not None:
        return _Picture(
            "everything",
            "Every alternative held against the others",
            "A line for each, the least memory on top. Dotted: the first alternative.",
            None,
        )
    if axis := crossover.memory_axis(swept.table, swept.axes):
        return _Picture(
            "crossover",
            "Slowdown of guests against the memory of the host",
            "Each line is one way to use memory; lower is better. Guests are slowed by TLB misses and by waiting for "
            "memory. Dotted: where another way becomes the best.",
            partial(
                crossover.draw, crossover.lines(swept.table, swept.axes, axis), crossover.promised_bytes(swept.scenario)
            ),
        )
    return _Picture(
        "frontier",
        "The frontier between memory and CPU",
        "Each point is one setting. Higher carries more guests, further left costs less; nothing lies above the line. "
        "Crosses must not be used.",
        partial(frontier.draw, frontier.judge(swept.table, swept.scenario.points), swept.axes),
    )


def _sections(swept: Swept, drawn: Markup) -> Iterator[Markup]:
    yield tag("h1", swept.scenario.name)
    yield tag("p", swept.scenario.description, class_="about")
    yield tag("p", conclusion(swept), class_="conclusion")
    yield drawn
    header, *body = rows(swept)
    yield section("All points", table(header, body, "All metrics are in points.parquet"))
    yield details("The scenario with every default", tag("pre", document.dump(swept.scenario.resolved())))
