"""HTML built from elements, so that every text from a user is escaped."""

import html
import re
from collections.abc import Iterable, Sequence

from sim.report.style import COLOURS


class Markup(str):
    """Text that is HTML already and is not escaped again."""


def tag(name: str, *content: str, **attributes: str) -> Markup:
    """Return one element; content that is not Markup is escaped, `class_` stands for `class`."""
    written = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{written}>{join(content)}</{name}>")


def join(parts: Iterable[str]) -> Markup:
    """Return `parts` one after the other; those that are not Markup are escaped."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> Markup:
    """Return a table whose first column names the rows."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    body = (tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows)
    return tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))


def figure(svg: str, name: str, title: str, text: str) -> Markup:
    """Return an SVG picture by matplotlib, in the colours of the page, with `text` for those who cannot see it.

    `name` tells the identifiers of this picture from those of others on the page.
    """
    drawing = _named(_coloured(svg[svg.index("<svg") :]), name)
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    labels = tag("title", title, id=f"{name}-title") + tag("desc", text, id=f"{name}-desc")
    view_box = re.search(r'viewBox="[^"]*"', drawing)
    if view_box is None:
        raise ValueError("not an SVG written by matplotlib: no viewBox")
    opening = f'<svg {view_box[0]} role="img" aria-labelledby="{name}-title" aria-describedby="{name}-desc">'
    return tag("figure", Markup(opening + labels + drawing[drawing.index(">") + 1 :]), tag("figcaption", text))


def _coloured(svg: str) -> str:
    for role, colour in COLOURS.items():
        svg = svg.replace(colour.light, f"var(--{role})")
    return svg


def _named(svg: str, name: str) -> str:
    """Drop the identifiers nothing refers to and make the others unique to this picture."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
