"""Where the memory of a host is at a moment of a finished run, and why no more of it was saved.

All of it is read from the tables: which pages hold the same contents, merged or not, is in none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sim.columns import PAGE_BYTES
from sim.errors import UserError, suggestion
from sim.results import Loaded
from sim.results.summary import SMART_SCAN_CYCLE
from sim.sharing import MECHANISMS
from sim.units import SECOND, about_bytes, about_duration

if TYPE_CHECKING:
    import pandas as pd


class Part(NamedTuple):
    """Some memory, and what it is."""

    name: str
    bytes: int
    meaning: str


class Whereabouts(NamedTuple):
    """One host at one moment."""

    host: str
    time_s: float
    """When the sample was taken that this is read from."""
    memory: list[Part]
    """What the host's memory is used for; together all of it."""
    guests: list[Part]
    """What became of the memory that guests were promised; together all of it."""
    reasons: list[Part]
    """What was not saved, by what kept it from being saved. A page can be in more than one."""


def whereabouts(run: Loaded, time_s: float | None = None, host: str | None = None) -> list[Whereabouts]:
    """Return where the memory of each host is, or of the one named, at the last sample by then; at the end by default.

    Raises UserError for a time at which there is no sample, for an unknown host, and for a datacenter.
    """
    if run.scenario.get("datacenter"):
        raise UserError(
            f"{run.folder}: the samples of a datacenter are sums over hosts, which do not tell what kept pages apart; "
            "its hosts.parquet has the memory of each, and a scenario of one host alone can be explained"
        )
    names = list(dict.fromkeys(run.samples["host"]))
    if host is not None and host not in names:
        raise UserError(f"--host {host}: no such host; {suggestion(host, names)}")
    end = float(run.samples["time_s"].max())
    if time_s is not None and time_s > end:
        raise UserError(f"--at: the run ends at {about_duration(end * SECOND)}; give a time up to then")
    return [_of(run, name, end if time_s is None else time_s) for name in ([host] if host else names)]


def _of(run: Loaded, host: str, time_s: float) -> Whereabouts:
    samples = run.samples[(run.samples["host"] == host) & (run.samples["time_s"] <= time_s)]
    if samples.empty or samples.iloc[-1][["mem_total_bytes", "mem_private_bytes"]].isna().any():
        raise UserError(f"{run.folder}: a real kernel does not tell where its memory is; explain a simulated run")
    row = {str(name): value for name, value in samples.iloc[-1].items()}
    scans = run.scans[(run.scans["host"] == host) & (run.scans["time_s"] <= time_s)]
    kinds = {str(each["name"]): each for each in run.scenario["hosts"]}
    settings: Mapping[str, Any] = kinds[host.rpartition("-")[0]]
    parts = [part for part in _memory(row) if part.bytes]
    promised = [part for part in _promised(row) if part.bytes]
    reasons = [part for part in _reasons(row, scans, settings) if part.bytes]
    return Whereabouts(host, float(row["time_s"]), parts, promised, reasons)


def _memory(row: Mapping[str, Any]) -> Iterator[Part]:
    huge = int(row["mem_huge_bytes"])
    yield Part("private", int(row["mem_private_bytes"]) - huge, "small pages that one guest page uses alone")
    yield Part("huge", huge, "the same in huge pages")
    yield Part(
        "deferred", int(row["mem_deferred_bytes"]), "parts of huge pages that were given back, free after a split"
    )
    yield Part("shared", int(row["mem_shared_bytes"]), "frames that several guest pages share")
    yield Part("metadata", int(row["mem_metadata_bytes"]), "what sharing has to remember of pages")
    yield Part("compressed", int(row["mem_pool_bytes"]), "what compressed pages take")
    yield Part("writeback", int(row["mem_writeback_bytes"]), "on the way to swap")
    yield Part("reserved", int(row["mem_reserved_bytes"]), "huge pages set aside in hugetlbfs that no guest uses")
    yield Part("free", int(row["mem_free_bytes"]), "free")


def _promised(row: Mapping[str, Any]) -> Iterator[Part]:
    touched, saved = int(row["mem_touched_bytes"]), int(row["saved_bytes"])
    sharing = PAGE_BYTES * int(row["pages_sharing"])
    zero = PAGE_BYTES * int(row["ksm_zero_pages"] + row["zero_pages_shared"])
    yield Part("not touched", int(row["mem_promised_bytes"]) - touched, "never written, or given back")
    yield Part("in frames", int(row["mem_private_bytes"] + row["mem_shared_bytes"]), "each frame counted once")
    yield Part("zero", min(zero, saved), "pages of zeros that share one frame")
    merged = min(sharing, saved - min(zero, saved))
    yield Part("merged", merged, "further pages that use a shared frame (pages_sharing)")
    yield Part(
        "saved otherwise", saved - merged - min(zero, saved), "shared, compressed or never there for other reasons"
    )
    yield Part("swapped", int(row["mem_swapped_bytes"]), "swapped out")


def _reasons(row: Mapping[str, Any], scans: pd.DataFrame, settings: Mapping[str, Any]) -> Iterator[Part]:
    """What is private still, by KSM's own counters."""
    pages = int(row["mem_private_bytes"]) // PAGE_BYTES
    unshared, volatile = int(row["pages_unshared"]), int(row["pages_volatile"])
    ksm = settings.get("ksm")
    if others := [name for name in MECHANISMS if name != "ksm" and settings.get(name)]:
        yield Part("not told", pages * PAGE_BYTES, f"the tables do not have what {' and '.join(others)} did not share")
        return
    if ksm is None or row["run"] != 1:
        yield Part("nobody looks", pages * PAGE_BYTES, "KSM does not run")
        return
    unseen = max(pages - unshared - volatile, 0)
    if row["full_scans"] < 2:
        done = f"{int(row['full_scans'])} full scans are done; a page merges at its second visit at the earliest"
        yield Part("scan not complete", unseen * PAGE_BYTES, done)
    else:
        yield Part("never looked at", unseen * PAGE_BYTES, "not mergeable, or newer than the last full scan")
    yield Part(
        "unique",
        unshared * PAGE_BYTES,
        "unchanged for a scan, and equal to no page that was looked at (pages_unshared)",
    )
    skipped = _skipped(row, scans) if ksm.get("smart_scan") else 0
    volatile_bytes = max(volatile - skipped, 0) * PAGE_BYTES
    yield Part("volatile", volatile_bytes, "changed between two visits, or not visited twice yet (pages_volatile)")
    text = (
        f"passed over in the last full scan: what never merged is visited once in up to {SMART_SCAN_CYCLE} scans, and "
        "two equal pages merge only if one scan visits both; how many have an equal is not told"
    )
    yield Part("smart_scan's phase", min(skipped, volatile) * PAGE_BYTES, text)
    yield Part(
        "huge pages", int(row["mem_huge_bytes"]), "counted above too; a huge page is split when one of its pages merges"
    )
    limit = int(row["stable_node_dups"] - row["stable_node_chains"])
    text = f"second and further frames of one content, since max_page_sharing is {ksm.get('max_page_sharing')}"
    yield Part("sharing limit", max(limit, 0) * PAGE_BYTES, text)


def _skipped(row: Mapping[str, Any], scans: pd.DataFrame) -> int:
    """Pages that smart_scan passed over in the last full scan."""
    ends = scans["pages_skipped"].tail(2).tolist()
    return int(ends[-1] - (ends[0] if len(ends) > 1 else 0)) if ends else int(row["pages_skipped"])


def sentence(found: Whereabouts) -> str:
    """The largest reason in a sentence."""
    when = about_duration(found.time_s * SECOND)
    if not found.reasons:
        return f"At {when}, nothing on {found.host} is private that could be saved."
    most = max(found.reasons, key=lambda part: part.bytes)
    what = f"{about_bytes(most.bytes)} ({most.name}: {most.meaning})"
    return f"At {when}, most of what {found.host} has not saved is {what}."


def told(found: Whereabouts) -> Mapping[str, Any]:
    """The whereabouts as plain data."""
    parts = {name: [part._asdict() for part in getattr(found, name)] for name in ("memory", "guests", "reasons")}
    return {"host": found.host, "time_s": found.time_s, **parts}
