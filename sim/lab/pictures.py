"""What the pictures of the lab have in common: the kernel's runs are wide and grey, the simulator is thin on top."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from sim import files
from sim.report.style import COLOURS

DPI: Final = 100
WIDTH: Final = 10.0
KERNEL_LINE: Final[dict[str, Any]] = {
    "color": COLOURS["muted"].light,
    "alpha": 0.3,
    "linewidth": 4.5,
    "solid_capstyle": "butt",
}


def save(canvas: Figure, file: Path) -> None:
    """Write a picture; equal pictures give equal bytes."""
    drawn = io.BytesIO()
    canvas.savefig(drawn, format="png", dpi=DPI, metadata={"Software": None})
    files.publish(file, drawn.getvalue())


def light(role: str) -> str:
    """The colour of a role on a light page."""
    return COLOURS[role].light
