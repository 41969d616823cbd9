"""Sweep folders read back: the table of all points, and the tables of their runs with the axes as columns."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import pandas as pd

from sim import document
from sim.errors import UserError
from sim.results.store import Loaded
from sim.results.store import load as load_run
from sim.results.tables import read_parquet

POINTS: Final = "points.parquet"
TIMELINE: Final = "timeline.parquet"
_AFTER_AXES: Final = "digest"


@dataclass(frozen=True)
class LoadedSweep:
    """A sweep folder read back; `scenario` is the resolved scenario as plain data.

    `samples`, `scans`, `guests` and `events` are read when first asked for: the rows of all runs that are there, one
    after the other, with the axes as first columns and `point`, the row of the run in `points`.
    """

    folder: Path
    points: pd.DataFrame
    """One row per point: the axes, `digest`, `error`, `met` and the metrics."""
    scenario: Mapping[str, Any]
    timeline: pd.DataFrame | None = None
    """What became of each point over time, if the scenario has phases."""

    @property
    def axes(self) -> Sequence[str]:
        """Columns of `points` that the sweep varied."""
        names = [str(name) for name in self.points.columns]
        return names[: names.index(_AFTER_AXES)]

    @cached_property
    def samples(self) -> pd.DataFrame:
        """One row per point, host and sampling time."""
        return self._table("samples")

    @cached_property
    def scans(self) -> pd.DataFrame:
        """One row per point, host and full scan."""
        return self._table("scans")

    @cached_property
    def guests(self) -> pd.DataFrame:
        """One row per point and guest."""
        return self._table("guests")

    @cached_property
    def events(self) -> pd.DataFrame:
        """One row per point and event."""
        return self._table("events")

    def run(self, point: int) -> Loaded:
        """The run of a point. Raises UserError when it is not there, as of a point that failed."""
        return load_run(self.folder.parent / str(self.points[_AFTER_AXES].iloc[point]))

    def _table(self, name: str) -> pd.DataFrame:
        parts = []
        for number, (_, point) in enumerate(self.points.iterrows()):
            file = self.folder.parent / str(point[_AFTER_AXES]) / f"{name}.parquet"
            if file.exists():
                axes = {axis: point[axis] for axis in self.axes}
                rows = read_parquet(file)
                told = pd.DataFrame({**axes, "point": number}, index=rows.index)
                parts.append(pd.concat([told, rows], axis="columns"))
        if not parts:
            raise UserError(f"{self.folder}: no run of this sweep is here; run the sweep again")
        return pd.concat(parts, ignore_index=True)


def load(path: str | Path) -> Loaded | LoadedSweep:
    """Return the run or the sweep in *path*; in a scenario's folder the newest of them.

    Raises UserError when nothing complete is there or a file of it cannot be read.
    """
    folder = Path(path)
    if (folder / POINTS).exists():
        return _load_sweep(folder)
    if not folder.is_dir():
        return load_run(folder)
    sweeps = _newest_first(each for each in folder.glob(f"*/{POINTS}"))
    runs = _newest_first(each for each in folder.glob("*/manifest.json") if (each.parent / "_SUCCESS").exists())
    if sweeps and (not runs or sweeps[0].stat().st_mtime_ns >= runs[0].stat().st_mtime_ns):
        return _load_sweep(sweeps[0].parent)
    return load_run(runs[0].parent if runs else folder)


def _newest_first(files: Iterable[Path]) -> list[Path]:
    """Files that are not in hidden folders, which a killed run may have left."""
    shown = (each for each in files if not each.parent.name.startswith("."))
    return sorted(shown, key=lambda each: (each.stat().st_mtime_ns, str(each)), reverse=True)


def _load_sweep(folder: Path) -> LoadedSweep:
    points = read_parquet(folder / POINTS)
    timeline = read_parquet(folder / TIMELINE) if (folder / TIMELINE).exists() else None
    return LoadedSweep(folder, points, document.read(folder / "scenario.yaml").data, timeline)
