"""Result folders: written whole or not at all, and read back."""

import errno
import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from sim import document, files
from sim.errors import UserError, suggestion
from sim.results.summary import Summary
from sim.results.tables import FLEET_TABLES, TABLES, read_parquet, write_parquet

_COMPLETE = "_SUCCESS"
_NEW = ".new-"
_OLD = ".old-"


class Scenario(Protocol):
    """What the store needs to know of a scenario."""

    @property
    def name(self) -> str:
        """Name of the scenario, which is the name of its folder."""

    def resolved(self) -> Mapping[str, Any]:
        """Return the scenario as plain data with every default written out."""


class Result(Protocol):
    """What the store needs of a finished run; the frames have the columns of `sim.columns`."""

    @property
    def scenario(self) -> Scenario: ...
    @property
    def samples(self) -> pd.DataFrame: ...
    @property
    def scans(self) -> pd.DataFrame: ...
    @property
    def guests(self) -> pd.DataFrame: ...
    @property
    def events(self) -> pd.DataFrame: ...
    @property
    def fleet(self) -> pd.DataFrame | None: ...
    @property
    def hosts(self) -> pd.DataFrame | None: ...
    @property
    def manifest(self) -> Mapping[str, Any]: ...
    @property
    def summary(self) -> Summary: ...


@dataclass(frozen=True)
class Loaded:
    """A result folder read back; `scenario` is the resolved scenario as plain data."""

    folder: Path
    samples: pd.DataFrame
    scans: pd.DataFrame
    guests: pd.DataFrame
    events: pd.DataFrame
    summary: Summary
    manifest: Mapping[str, Any]
    scenario: Mapping[str, Any]
    fleet: pd.DataFrame | None = None
    """Of a datacenter, what its control plane knew, a row for each epoch."""
    hosts: pd.DataFrame | None = None
    """Of a datacenter, a row for each host."""


def write(result: Result, out: Path) -> Path:
    """Write `result` to `out`/scenario name/digest and return that folder.

    The folder appears when it is whole; one that was there is replaced.
    Raises UserError when `out` cannot take it and MachineError when the disk is full.
    """
    folder = Path(out, _file_name(result.scenario.name), result.manifest["digest"])
    with files.explained(folder), locked(folder.parent):
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(errno.EEXIST, "a file of that name is in the way")
        new = Path(tempfile.mkdtemp(prefix=_NEW, dir=folder.parent))
        try:
            new.chmod(folder.parent.stat().st_mode)
            _fill(new, result)
            _exchange(new, folder)
            files.sync(folder.parent)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return folder


def load(path: Path) -> Loaded:
    """Return the run in `path`, or the newest of the runs in it when it is a scenario's folder.

    Raises UserError when there is no complete run or a file of it cannot be read.
    """
    folder = _run_folder(Path(path))
    there = [table for table in FLEET_TABLES if (folder / f"{table}.parquet").exists()]
    frames = {table: read_parquet(folder / f"{table}.parquet") for table in [*TABLES, *there]}
    summary, manifest = (_read_json(folder / f"{part}.json") for part in ("summary", "manifest"))
    scenario = document.read(folder / "scenario.yaml").data
    return Loaded(folder=folder, **frames, summary=summary, manifest=manifest, scenario=scenario)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is missing or damaged: {error}; run the scenario again") from error


def kept_summary(name: str, digest: str, out: Path) -> Summary | None:
    """Return the metrics of a run that `write` put into `out`, or None when it is not there or not whole."""
    try:
        return read_summary(name, digest, out)
    except UserError:
        return None


def read_summary(name: str, digest: str, out: Path) -> Summary:
    """Return the metrics of a run that `write` put into `out`. Raises UserError when it is not there or not whole."""
    folder = Path(out, name, digest)
    summary: Summary = _read_json(folder / "summary.json")
    if not (folder / _COMPLETE).exists():
        raise UserError(f"{folder}: the run is not complete; run the scenario again")
    return summary


def _file_name(name: str) -> str:
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(f"scenario name {name!r} cannot be a folder name; use letters, digits and dashes")
    return name


@contextmanager
def locked(parent: Path) -> Iterator[None]:
    """Hold the only right to write in `parent`, whose temporary folders belong to dead runs then and are removed."""
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _heal(parent)
        yield


def _heal(parent: Path) -> None:
    """Undo what a killed run left half done."""
    for old in parent.glob(f"{_OLD}*"):
        run = parent / old.name.removeprefix(_OLD)
        if run.exists():
            shutil.rmtree(old)
        else:
            old.rename(run)
    for new in parent.glob(f"{_NEW}*"):
        shutil.rmtree(new)


def _fill(folder: Path, result: Result) -> None:
    files.write(folder / "scenario.yaml", document.dump(result.scenario.resolved()).encode())
    _write_json(folder / "manifest.json", result.manifest)
    for table in TABLES:
        write_parquet(table, getattr(result, table), folder / f"{table}.parquet")
    for table in FLEET_TABLES:
        if (data := getattr(result, table)) is not None:
            write_parquet(table, data, folder / f"{table}.parquet")
    _write_json(folder / "summary.json", result.summary)
    files.write(folder / _COMPLETE, b"")
    files.sync(folder)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    files.write(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def _exchange(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; a failure leaves the old one there."""
    old = folder.with_name(_OLD + folder.name)
    replacing = folder.exists()
    if replacing:
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if replacing:
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _run_folder(path: Path) -> Path:
    if (path / _COMPLETE).exists():
        return path
    if not path.is_dir():
        near = suggestion(path.name, _folders(path.parent)) if path.parent.is_dir() else "check the path"
        raise UserError(f"{path}: no such folder; {near}")
    if (path / "manifest.json").exists():
        raise UserError(f"{path}: this run is not complete; run it again")
    runs = [run for run in path.iterdir() if (run / _COMPLETE).exists() and not run.name.startswith(".")]
    if runs:
        return max(runs, key=lambda run: ((run / _COMPLETE).stat().st_mtime_ns, run.name))
    scenarios = ", ".join(_folders(path))
    raise UserError(f"{path}: no complete run here" + (f"; look in {scenarios}" if scenarios else ""))


def _folders(parent: Path) -> list[str]:
    return sorted(each.name for each in parent.iterdir() if each.is_dir() and not each.name.startswith("."))
