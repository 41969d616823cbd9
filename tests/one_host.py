"""Runs of one host, described in a few words."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from sim.columns import PAGE_BYTES
from sim.run import Result
from sim.run import run as simulate
from sim.scenario import Scenario, parse

Block = Mapping[str, Any]


def size(pages: int) -> str:
    """So many pages, as a scenario writes it."""
    return f"{pages * PAGE_BYTES // 1024}KiB"


def part(name: str, pages: int, **what: object) -> Block:
    """A part of an image; unique pages unless told otherwise."""
    return {"name": name, "size": size(pages), **what}


def equal(name: str, pages: int) -> Block:
    """A part of equal pages."""
    return part(name, pages, duplicates=pages) if pages > 1 else part(name, pages)


def guest(name: str, *parts: Block, pages: int, **more: object) -> Block:
    """A guest made of parts."""
    return {"name": name, "memory": size(pages), "image": {"parts": [*parts]}, **more}


def scenario(*vms: Block, duration: str, folder: str = ".", sample_every: str = "1s", **host: object) -> Scenario:
    """One host with these guests."""
    data = {
        "name": "test",
        "duration": duration,
        "sample_every": sample_every,
        "hosts": [{"memory": "8GiB", **host}],
        "vms": vms,
    }
    return parse(data, folder)


def run(*vms: Block, **about: Any) -> Result:
    """What became of such a scenario."""
    return simulate(scenario(*vms, **about))


def after_scan(result: Result, number: int) -> "pd.Series[Any]":
    """Counters at the end of a full scan, the first being number 1."""
    return result.scans[result.scans["full_scans"] == number].iloc[0]


def at(result: Result, time_s: float) -> "pd.Series[Any]":
    """The sample of that time."""
    return result.samples[result.samples["time_s"] == time_s].iloc[0]


def end(result: Result) -> "pd.Series[Any]":
    """The last sample."""
    return result.samples.iloc[-1]


def events(result: Result) -> list[tuple[float, str]]:
    """Time and kind of everything that happened."""
    return list(zip(result.events["time_s"], result.events["kind"], strict=True))
