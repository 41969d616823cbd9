"""A finished run, made up: KSM merges the guests of one or more hosts, and nothing else happens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from sim.columns import EVENTS, GUESTS, PAGE_BYTES, SAMPLES
from sim.results import Summary, frame, summarise
from sim.scenario.expect import Expectation, Verdict
from sim.units import GIB, MIB, SECOND

SIZE = 512 * MIB
SCAN_S = 45
MERGED_AFTER_S = 90


@dataclass(frozen=True)
class Scenario:
    """Stands for sim.scenario.Scenario."""

    name: str = "web-tier"
    description: str = "How far does KSM stretch a 16 GiB host of nginx servers?"

    def resolved(self) -> dict[str, Any]:
        ksm = {"run": 1, "pages_to_scan": 1000, "sleep_millisecs": 20, "smart_scan": 1}
        host = {"count": 1, "memory": "16GiB", "cores": 8, "kernel": "6.18", "ksm": ksm}
        return {"name": self.name, "description": self.description, "duration": "10min", "seed": 1, "hosts": [host]}


@dataclass(frozen=True)
class Result:
    """Stands for sim.run.Result."""

    scenario: Scenario
    samples: pd.DataFrame
    scans: pd.DataFrame
    guests: pd.DataFrame
    events: pd.DataFrame
    summary: Summary
    manifest: Mapping[str, Any]
    verdicts: Sequence[Verdict] = field(default_factory=tuple)
    fleet: pd.DataFrame | None = None
    hosts: pd.DataFrame | None = None


def result(
    name: str = "web-tier",
    digest: str = "0123456789abcdef",
    expect: Sequence[str] = ("consolidation_ratio >= 1.6", "cpu_overhead_percent < 0.1%", "pswpin == 0"),
    hosts: Sequence[str] = ("host-0",),
    seconds: int = 600,
) -> Result:
    """Return a plausible run of 24 guests on each host, sampled once a second."""
    samples = frame("samples", [sample(host, time) for time in range(seconds + 1) for host in hosts])
    scans = frame("scans", [sample(host, time) for time in range(SCAN_S, seconds + 1, SCAN_S) for host in hosts])
    guests = frame("guests", [guest(host, number) for host in hosts for number in range(24)])
    summary = summarise(samples, scans, guests)
    return Result(
        scenario=Scenario(name),
        samples=samples,
        scans=scans,
        guests=guests,
        events=frame("events", [event("host-0", "web-3", "started", "512MiB")]),
        summary=summary,
        manifest={
            "digest": digest,
            "seed": 1,
            "engine": "compiled",
            "versions": {"overcommit": "0.1.0"},
            "wall_s": 1.5,
            "peak_bytes": 300 * MIB,
        },
        verdicts=[Expectation.parse(text).check(summary) for text in expect],
    )


def sample(host: str, time: int, guests: int = 24) -> dict[str, Any]:
    """Return one row of samples: a third of the guests' memory is equal and merges over two scans."""
    touched = guests * SIZE * 6 // 10
    merged = int(touched * 0.35 * min(1, max(0, time - SCAN_S) / MERGED_AFTER_S)) // PAGE_BYTES
    shared = merged // 8
    metadata = touched // PAGE_BYTES * 64
    private = touched - (merged + shared) * PAGE_BYTES
    scan, merge, cow = time * SECOND // 25, merged * 4000, max(0, time - SCAN_S) * SECOND // 400
    row = {column.name: 0 for column in SAMPLES} | {
        "time_s": float(time),
        "host": host,
        "hosts": 1,
        "full_scans": time // SCAN_S,
        "pages_shared": shared,
        "pages_sharing": merged,
        "pages_unshared": private // PAGE_BYTES * 9 // 10 if time > SCAN_S else 0,
        "pages_volatile": private // PAGE_BYTES // 10 + 900 * (time % 7),
        "general_profit": merged * PAGE_BYTES - metadata,
        "run": 1,
        "pages_to_scan": 1000,
        "sleep_millisecs": 20,
        "guests_running": guests,
        "mem_total_bytes": 16 * GIB,
        "mem_promised_bytes": guests * SIZE,
        "mem_touched_bytes": touched,
        "mem_private_bytes": private,
        "mem_shared_bytes": shared * PAGE_BYTES,
        "mem_metadata_bytes": metadata,
        "saved_bytes": merged * PAGE_BYTES,
        "cores": 8,
        "scan_cpu_ns": scan,
        "merge_cpu_ns": merge,
        "cow_cpu_ns": cow,
        "ksmd_cpu_ns": scan + merge,
        "work_cpu_ns": time * SECOND,
    }
    used = row["mem_private_bytes"] + row["mem_shared_bytes"] + row["mem_metadata_bytes"]
    return row | {"mem_used_bytes": used, "mem_free_bytes": row["mem_total_bytes"] - used}


def guest(host: str, number: int) -> dict[str, Any]:
    """Return one row of guests."""
    return {column.name: 0 for column in GUESTS} | {
        "guest": f"web-{number}",
        "vm": "web",
        "host": host,
        "start_s": 5.0,
        "stop_s": float("nan"),
        "end": "running",
        "memory_bytes": SIZE,
        "touched_bytes": SIZE * 6 // 10,
        "ksm_merging_pages": 30_000,
    }


def event(host: str, guest: str, kind: str, detail: str) -> dict[str, Any]:
    """Return one row of events."""
    values = (5.0, host, guest, kind, detail)
    return {column.name: value for column, value in zip(EVENTS, values, strict=True)}
