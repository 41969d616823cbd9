"""The look of every picture: colours that survive colour blindness and grey print, and matplotlib's settings.

Source: hues after M. Okabe and K. Ito, "Color Universal Design", 2008.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Colour(NamedTuple):
    """One role's colour on a light and on a dark page."""

    light: str
    dark: str


COLOURS: Mapping[str, Colour] = {
    "paper": Colour("#ffffff", "#16191d"),
    "ink": Colour("#1b1f24", "#e8eaed"),
    "muted": Colour("#5f6872", "#9aa4af"),
    "line": Colour("#d5dade", "#363c43"),
    "private": Colour("#1f5a8c", "#5b9bd1"),
    "shared": Colour("#7cc4ec", "#a9dcf7"),
    "metadata": Colour("#c2410c", "#f0824d"),
    "free": Colour("#eef0f2", "#22272d"),
    "saved": Colour("#00805e", "#3fc79f"),
    "volatile": Colour("#d98a00", "#f2b84b"),
    "zero": Colour("#a8577f", "#dd9abb"),
    "scan": Colour("#4a90c4", "#7ab6e6"),
    "merge": Colour("#f2b632", "#f5c869"),
    "cow": Colour("#9c2f06", "#e8693a"),
    "huge": Colour("#123a5c", "#3f77a8"),
    "pool": Colour("#7a5cad", "#b49be0"),
    "writeback": Colour("#b7a3d6", "#d8cbf0"),
    "deferred": Colour("#5f86a8", "#3c5f80"),
    "reserved": Colour("#8b95a0", "#6d7781"),
    "swap": Colour("#6b4fa0", "#a88bd8"),
    "tlb": Colour("#8a6d00", "#d3b95c"),
    "source": Colour("#4f8a6d", "#86c4a5"),
}
"""Each light colour belongs to one role only: in the HTML page it is replaced by a variable named after the role."""

RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": COLOURS["ink"].light,
    "axes.edgecolor": COLOURS["muted"].light,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": COLOURS["muted"].light,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "axes.xmargin": 0,
    "figure.facecolor": COLOURS["paper"].light,
    "grid.color": COLOURS["line"].light,
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "xtick.color": COLOURS["muted"].light,
    "ytick.color": COLOURS["muted"].light,
    "ytick.left": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "overcommit",
}
"""Settings for `matplotlib.rc_context`; nothing is changed outside it."""
