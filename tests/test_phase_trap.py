"""What smart_scan makes of equal pages that are born in different scans; run as a script, this draws the picture.

smart_scan comes to look at a page that never merged in every ninth scan only, so what counts is how many scans lie
between the births of two copies, modulo nine. Every such difference, and for more copies every combination, is one
service here; the last copies of all of them start together.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pandas as pd
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure

import sim
from sim.report.style import COLOURS, RC

PICTURE = Path(__file__).parents[1] / "results" / "phase-trap.png"
CYCLE = 9
APART = 10 * CYCLE
"""Scans between two copies, and up to eight more: after so many both are looked at in every ninth scan."""
AFTER = 60
"""Scans after the last copy's start."""


def merged(copies: int, smart_scan: int, pages: int = 2) -> pd.Series[float]:
    """Share of what could be saved that is saved, by scans since the last copies started."""
    vms = []
    last = 5 + (copies - 1) * (APART + CYCLE)
    for service, offsets in enumerate(product(range(CYCLE), repeat=copies - 1)):
        scans = [last - sum(offsets[copy:]) - APART * (copies - 1 - copy) for copy in range(copies)]
        image = {"parts": [{"name": "code", "pool": f"code-{service}", "size": "100%"}]}
        vms += [
            # A batch a scan, a scan a second and a few milliseconds: the middle of a second is the middle of a scan.
            {"name": f"s{service}-{copy}", "memory": f"{4 * pages}KiB", "start": f"{scan}.5s", "image": image}
            for copy, scan in enumerate(scans)
        ]
    host = {"memory": "1GiB", "hz": 1000, "kernel": "6.18",
            "ksm": {"pages_to_scan": 1_000_000, "sleep_millisecs": 995, "smart_scan": smart_scan}}  # fmt: skip
    asked = sim.parse({"name": "t", "duration": f"{last + AFTER + 10}s", "hosts": [host], "vms": vms})
    scans = sim.run(asked).scans
    found = scans[scans["time_s"] > last + 0.5]
    possible = CYCLE ** (copies - 1) * (copies - 1) * pages
    return pd.Series(found["pages_sharing"].to_numpy()[:AFTER] / possible, index=range(1, AFTER + 1))


@pytest.mark.parametrize(("copies", "lost"), [(2, 1 / 3), (3, 2 / 81)])
def test_smart_scan_keeps_so_many_copies_apart_for_ever(copies: int, lost: float) -> None:
    """Two copies 4, 6 or 7 scans apart; three if 6 and 7 follow each other. By hand from the scans of each page."""
    assert 1 - merged(copies, smart_scan=1).iloc[-1] == pytest.approx(lost, abs=1e-12)


@pytest.mark.parametrize("copies", [2, 3])
def test_without_smart_scan_all_copies_meet_at_once(copies: int) -> None:
    assert merged(copies, smart_scan=0).iloc[3] == 1


def draw(file: Path) -> None:
    """Draw what is merged by scans since the last copies started, for two, three and four copies."""
    with rc_context(RC):
        canvas = Figure(figsize=(8, 3.4), layout="constrained")
        ax = canvas.subplots()
        for copies, role in ((2, "metadata"), (3, "volatile"), (4, "saved")):
            share = 100 * merged(copies, smart_scan=1)
            ax.step(share.index, share, where="post", color=COLOURS[role].light)
            ax.annotate(f"{copies} copies: {share.iloc[-1]:.3g} %", (share.index[-1], share.iloc[-1]),
                        (6, {2: 0, 3: -7, 4: 5}[copies]), textcoords="offset points", va="center")  # fmt: skip
        share = 100 * merged(2, smart_scan=0)
        ax.step(share.index, share, where="post", color=COLOURS["muted"].light, linestyle="--")
        ax.annotate("2 copies, smart_scan 0", (2, 8), (8, 0), textcoords="offset points", va="center")
        ax.set(title="What of the equal pages is merged (%), all differences of start alike", ylim=(0, 105))
        ax.set(xlabel="full scans since the last copy started", xlim=(0, AFTER))
        canvas.savefig(file, dpi=144, metadata={"Software": None})


if __name__ == "__main__":
    draw(PICTURE)
