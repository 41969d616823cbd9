"""The report of a run: one HTML page that opens offline, and its pictures as PNG files beside it."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sim import document, files
from sim.columns import COUNTER_METRICS, Metric
from sim.report import fleet, pictures
from sim.report.markup import Markup, figure, table, tag
from sim.report.style import COLOURS, RC, Colour
from sim.report.words import advice, amount, conclusion, headlines, measured, telling, uncertainty
from sim.results import Result
from sim.results.summary import Summary
from sim.scenario.expect import Expectation, Verdict

PAGE = "report.html"
PICTURES = "pictures"

_WIDTH = 9.0
_PANEL = 2.6
_MARGINS = {"left": 0.07, "right": 0.74}
_ABOVE, _BELOW, _BETWEEN = 0.45, 0.55, 0.35
_DPI = 150
_ENDINGS = {"_s": "s", "_bytes": "bytes"}
_GUEST_SUMS = {
    "memory_bytes": "bytes",
    "touched_bytes": "bytes",
    "ksm_merging_pages": "pages",
    "ksm_zero_pages": "pages",
    "cow_breaks": "count",
    "pages_written": "pages",
}


class Judged(Result, Protocol):
    """A finished run with the verdicts on its expectations."""

    @property
    def verdicts(self) -> Sequence[Verdict]: ...


class _Picture(NamedTuple):
    """One figure of the report; `text` says what it shows, for the caption and for those who cannot see it."""

    name: str
    title: str
    text: str
    panels: int
    draw: Callable[..., object]


def write(result: Judged, folder: Path) -> Path:
    """Write report.html and pictures/*.png into the result folder and return the page's path.

    Raises UserError when the folder cannot take them and MachineError when the disk is full.
    """
    with files.explained(folder), mpl.rc_context(RC):
        (folder / PICTURES).mkdir(exist_ok=True)
        drawn = [_draw(picture, folder / PICTURES / f"{picture.name}.png") for picture in _pictures(result)]
        return publish(page(result.scenario.name, _sections(result, result.scenario.resolved(), drawn)), folder)


def publish(text: str, folder: Path) -> Path:
    """Put the page into the folder, whole or not at all."""
    files.publish(folder / PAGE, text.encode())
    return folder / PAGE


def _pictures(result: Judged) -> Iterator[_Picture]:
    samples = result.samples
    if samples["time_s"].nunique() < 2:
        return
    if result.fleet is not None and result.hosts is not None:
        for name, title, text, panels, draw in fleet.pictures_of(result.fleet, result.hosts, samples):
            yield _Picture(name, title, text, panels, draw)
        return
    real = bool(samples["mem_used_bytes"].isna().all())  # a kernel does not tell
    if real:
        yield _Picture(
            "cost",
            "Cost over time",
            "How busy ksmd is. What its time is for, and how much memory guests use, a kernel does not tell.",
            1,
            lambda axes: _on_clock(pictures.ksmd_cost(samples, axes), real),
        )
    else:
        yield from _whole_pictures(samples)
    yield _Picture(
        "counters",
        "KSM counters over time",
        "The kernel's own counters: pages_sharing is what is saved, pages_shared what is kept for it.",
        1,
        lambda axes: _on_clock(pictures.counters(samples, result.scans, axes), real),
    )


def _whole_pictures(samples: pd.DataFrame) -> Iterator[_Picture]:
    """Pictures of what only a simulation knows."""
    yield _Picture(
        "memory",
        "Memory over time",
        "Filled: the frames of the host by what they are used for. The line: the memory it has. Hatched above it: "
        "guest memory that needs no frame because it is shared.",
        1,
        lambda axes: pictures.memory(samples, axes),
    )
    yield _Picture(
        "gain-and-cost",
        "Gain and cost over time",
        "How much promised memory each byte in use carries, and how busy that keeps ksmd.",
        2,
        lambda gain, cost: pictures.gain_and_cost(samples, gain, cost),
    )
    yield _Picture(
        "cpu",
        "CPU by component over time",
        "Scanning and merging run in ksmd; copies on write (COW), reclaim, swap and TLB misses slow the guests.",
        1,
        lambda axes: pictures.cpu(samples, axes),
    )
    if samples[["mem_swapped_bytes", "psi_some_ns"]].any(axis=None):
        yield _Picture(
            "swap",
            "Swap and stalls over time",
            "Guest memory that is swapped out, and for how much of the time some guest, or all that could run, waited "
            "for memory.",
            2,
            lambda swapped, stalled: (pictures.swap(samples, swapped), pictures.stalls(samples, stalled)),
        )
    if samples[["thp_fault_alloc", "thp_collapse_alloc"]].any(axis=None):
        yield _Picture(
            "huge-pages",
            "Huge pages over time",
            "Huge pages that guests were given when they touched memory, that khugepaged made, and that were taken "
            "apart, by KSM above all; each counted since the start.",
            1,
            lambda axes: pictures.huge_pages(samples, axes),
        )


def _on_clock(axes: Axes, real: bool) -> Axes:
    """Say on the time axis that a kernel's time is not simulated."""
    if real:
        axes.set_xlabel(axes.get_xlabel().removeprefix("simulated "))
    return axes


def _draw(picture: _Picture, png: Path) -> Markup:
    return figure(drawing(picture.draw, picture.panels, png), picture.name, picture.title, picture.text)


def drawing(draw: Callable[..., object], panels: int, png: Path, panel: float = _PANEL) -> str:
    """Have *draw* fill panels of so many inches, one below the other; save them as PNG and return them as SVG."""
    height = _ABOVE + panels * panel + _BELOW
    canvas = Figure(figsize=(_WIDTH, height))
    draw(*canvas.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    # The same margins in every picture put equal times below each other.
    canvas.subplots_adjust(**_MARGINS, top=1 - _ABOVE / height, bottom=_BELOW / height, hspace=_BETWEEN)
    return saved(canvas, png)


def saved(canvas: Figure, png: Path) -> str:
    """Save a picture as PNG and return it as SVG."""
    drawn, svg = io.BytesIO(), io.StringIO()
    canvas.savefig(drawn, format="png", dpi=_DPI, metadata={"Software": None})
    files.publish(png, drawn.getvalue())
    canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()


def page(title: str, sections: Iterable[Markup]) -> str:
    """Return a page that opens offline."""
    head = tag(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        tag("title", f"{title}: overcommit report"),
        tag("style", Markup(_css())),
    )
    body = tag("body", tag("main", *sections))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _css() -> str:
    light, dark = (
        "".join(f"--{role}: {getattr(colour, theme)}; " for role, colour in COLOURS.items()) for theme in Colour._fields
    )
    return f":root {{ {light}}}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n" + Path(
        __file__
    ).with_name("page.css").read_text(encoding="utf-8")


def _sections(result: Judged, resolved: Mapping[str, Any], drawn: Sequence[Markup]) -> Iterator[Markup]:
    yield tag("h1", result.scenario.name)
    yield tag("p", resolved.get("description") or "", class_="about")
    yield tag("p", conclusion(result.samples, result.guests, result.summary), class_="conclusion")
    yield tag("p", tag("strong", "Advice: "), advice(result.summary))
    bars = result.manifest.get("error", {})
    if bars:
        yield tag("p", uncertainty(result.manifest["scale"], bars, result.summary))
    if result.verdicts:
        yield section("Expectations", _expectations(result.verdicts))
    told, rest = telling(headlines(result.summary), result.summary)
    quiet = [tag("p", line, class_="about") for line in rest]
    yield section("Headline figures", _metrics(told, result.summary, "What the run comes to", bars), *quiet)
    yield from drawn
    if not result.guests.empty:
        yield section("Guests", _guests(result.guests))
    if not result.events.empty:
        yield section("Events", _events(result.events))
    yield section("Hosts", *(_settings(host, f"hosts.{at}") for at, host in enumerate(resolved["hosts"])))
    yield section("How this was made", _settings(result.manifest, "The run and the programs behind it"))
    yield details("Kernel counters at the end", _metrics(COUNTER_METRICS, result.summary, "Summed over hosts"))
    yield details("The scenario with every default", tag("pre", document.dump(resolved)))


def section(title: str, *content: Markup) -> Markup:
    """Return a part of the page under a heading."""
    return tag("section", tag("h2", title), *(tag("div", part, class_="wide") for part in content))


def details(title: str, content: Markup) -> Markup:
    """Return a part of the page that opens on demand."""
    return tag("details", tag("summary", title), tag("div", content, class_="wide"))


def _metrics(metrics: Sequence[Metric], summary: Summary, caption: str, bars: Mapping[str, float] = {}) -> Markup:
    rows = [
        (metric.name, measured(summary[metric.name], bars.get(metric.name), metric.unit), metric.meaning)
        for metric in metrics
    ]
    return table(("metric", "value", "meaning"), rows, caption)


def _expectations(verdicts: Sequence[Verdict]) -> Markup:
    met = sum(verdict.met for verdict in verdicts)
    rows = [_expectation(verdict) for verdict in verdicts]
    return table(("expectation", "verdict", "actual", "margin"), rows, f"{met} of {len(verdicts)} met")


def _expectation(verdict: Verdict) -> Sequence[str]:
    unit = Expectation.parse(verdict.expectation).metric.unit
    missed = "not met" if verdict.severity == "error" else "warning"
    mark = tag("span", "met", class_="met") if verdict.met else tag("span", missed, class_="missed")
    return verdict.expectation, mark, amount(verdict.actual, unit), amount(verdict.margin, unit)


def _guests(guests: pd.DataFrame) -> Markup:
    rows = []
    for vm, group in guests.groupby("vm", sort=False):
        ends = ", ".join(f"{count:,} {end}" for end, count in group["end"].value_counts(sort=False).items())
        rows.append([str(vm), ends, *(amount(_sum(group[name]), unit) for name, unit in _GUEST_SUMS.items())])
    return table(("vm", "guests", *_GUEST_SUMS), rows, "Sums over the guests of each entry under vms")


def _sum(figures: "pd.Series[float]") -> int | None:
    return None if figures.isna().any() else int(figures.sum())


def _events(events: pd.DataFrame) -> Markup:
    rows = [
        (str(kind), f"{len(group):,}", amount(float(group["time_s"].iloc[0]), "s"), _first(group))
        for kind, group in events.groupby("kind", sort=False)
    ]
    return table(("event", "count", "first at", "the first"), rows, "All of them are in events.parquet")


def _first(events: pd.DataFrame) -> str:
    first = events.iloc[0]
    return " ".join(part for part in (first["host"], first["guest"], first["detail"]) if part)


def _settings(block: Mapping[str, Any], caption: str) -> Markup:
    return table(("setting", "value"), _flat(block), caption)


def _flat(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in block.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _setting(key, value)


def _setting(key: str, value: object) -> str:
    unit = next((unit for ending, unit in _ENDINGS.items() if key.endswith(ending)), None)
    return amount(value, unit) if unit and isinstance(value, int | float) else str(value)
