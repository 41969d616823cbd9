"""The headline metrics, computed from the result tables alone; `sim.columns.METRICS` defines each."""

from collections.abc import Sequence
from statistics import fmean

import numpy as np
import pandas as pd

from sim.columns import COUNTER_METRICS, METRICS, PAGE_BYTES, SAMPLES, Window

Value = int | float | None
Summary = dict[str, Value]

_LATENCIES = ("write_private_ns", "write_merged_ns", "write_latency_worst_ns")
SMART_SCAN_CYCLE = 9
"""Full scans in which smart_scan visits a page that never merges once."""


def summarise(
    samples: pd.DataFrame, scans: pd.DataFrame, guests: pd.DataFrame, window: Window | None = None
) -> Summary:
    """Return the value of every metric, None for one without data; over a part of the run if there is a *window*.

    `samples` and `scans` have the columns `sim.columns.SAMPLES`, `guests` GUESTS; rows are in order of time. A column
    of NaN, a figure that a real kernel does not tell, is no data.
    """
    if window:
        part = summarise(_within(samples, window), _cut(scans, window), guests.iloc[:0])
        return part | _started_within(guests, window) | _worst_within(samples, window)
    values: Summary = {metric.name: None for metric in METRICS}
    if not samples.empty:
        values |= _memory(samples) | _cpu(samples) | _speed(samples) | _end(samples)
    values |= _scan_times(scans)
    if not guests.empty:
        values |= _guests(guests)
    return {name: None if value is None or np.isnan(value) else value for name, value in values.items()}


def mean(summaries: Sequence[Summary]) -> Summary:
    """Return each metric's mean over the runs that have data for it; of one run, the very figures."""
    if len(summaries) == 1:
        return dict(summaries[0])
    told: dict[str, list[float]] = {}
    for summary in summaries:
        for name, value in summary.items():
            told.setdefault(name, []).extend([] if value is None else [value])
    return {name: fmean(values) if values else None for name, values in told.items()}


def _cut(rows: pd.DataFrame, window: Window) -> pd.DataFrame:
    return rows[rows["time_s"].between(window.start / 1e9, window.end / 1e9)]


def _within(samples: pd.DataFrame, window: Window) -> pd.DataFrame:
    """The samples as if the run began with the window: times and counters count from there."""
    rows = _cut(samples, window)
    counted = ["time_s", *(column.name for column in SAMPLES if column.counts)]
    return rows.assign(**(rows[counted] - rows.groupby("host")[counted].transform("first")))


def _started_within(guests: pd.DataFrame, window: Window) -> Summary:
    """The longest fork of the window. How far guests came with their work is known of their whole lives only."""
    started = guests[guests["start_s"].between(window.start / 1e9, window.end / 1e9)]
    return {"fork_s": None if started.empty else float(started["fork_s"].max(skipna=False))}


def _worst_within(samples: pd.DataFrame, window: Window) -> Summary:
    """The longest write, where it is known to have been in the window: the longest so far grew in it, or there was
    nothing before."""
    if window.start == 0 or samples.empty:
        return {}
    name = "write_latency_worst_ns"
    before, after = (
        samples[samples["time_s"] <= time / 1e9].groupby("host")[name].last() for time in (window.start, window.end)
    )
    grown = after[after > before]
    return {name: None if grown.empty else _whole(grown.max())}


def _guests(guests: pd.DataFrame) -> Summary:
    running = guests[guests["end"] == "running"]
    return {
        "progress_percent": float(guests["progress_percent"].mean(skipna=False)),
        "fork_s": float(guests["fork_s"].max(skipna=False)),
        "page_tables_bytes": _whole(running["page_tables_bytes"].sum(skipna=False)),
    }


def over_hosts(samples: pd.DataFrame) -> pd.DataFrame:
    """Return one row per time, the figures summed over hosts, indexed by time in seconds; NaN stays NaN."""
    return samples.drop(columns="host").groupby("time_s").sum(min_count=1)


def _memory(samples: pd.DataFrame) -> Summary:
    tightest: Summary = {"mem_free_min_bytes": _whole(samples["mem_free_bytes"].min())}
    totals = over_hosts(samples)
    busy = totals[totals["guests_running"] > 0]
    if busy.empty:
        return tightest
    last = busy.iloc[-1]
    saved = _whole(last["saved_bytes"])
    return tightest | {
        "consolidation_ratio": _ratio(last["mem_promised_bytes"], last["mem_used_bytes"]),
        "consolidation_ratio_mean": _mean_ratio(totals),
        "saved_bytes": saved,
        "saved_ksm_bytes": PAGE_BYTES * int(last["pages_sharing"] + last["ksm_zero_pages"]),
        "mem_used_bytes": _whole(last["mem_used_bytes"]),
        "mem_huge_bytes": _whole(last["mem_huge_bytes"]),
        "mem_swapped_bytes": _whole(last["mem_swapped_bytes"]),
        "compression_ratio": _ratio(last["mem_compressed_bytes"], last["mem_pool_bytes"]),
        "time_to_90_percent_s": _first_time(busy, 0.9 * saved) if saved and saved > 0 else None,
    }


def _mean_ratio(totals: pd.DataFrame) -> float | None:
    times = totals.index.to_numpy()
    counted = ((totals["guests_running"] > 0) & (totals["mem_used_bytes"] > 0)).to_numpy()
    if not counted.any():
        return None
    ratios = (totals["mem_promised_bytes"] / totals["mem_used_bytes"])[counted]
    weights = np.diff(times, append=times[-1])[counted]
    return float(np.average(ratios, weights=weights if weights.any() else None))


def _first_time(totals: pd.DataFrame, saved: float) -> float:
    return float(totals.index[totals["saved_bytes"] >= saved][0])


def _cpu(samples: pd.DataFrame) -> Summary:
    last = samples.groupby("host").last()
    capacity = 1e9 * float((last["cores"] * last["time_s"]).sum())
    if not capacity:
        return {}
    parts = ("ksmd", "source", "scan", "merge", "cow", "tlb", "kswapd", "reclaim", "swap")
    share = {part: 100.0 * float(last[f"{part}_cpu_ns"].sum(skipna=False)) / capacity for part in parts}
    swapping = share["kswapd"] + share["reclaim"] + share["swap"]
    return {
        "cpu_overhead_percent": share["ksmd"] + share["source"] + share["cow"] + share["tlb"] + swapping,
        "cpu_scan_percent": share["scan"],
        "cpu_merge_percent": share["merge"],
        "cpu_swap_percent": swapping,
        "cpu_cow_percent": share["cow"],
        "stall_percent": _of_each(last, "psi_some_ns"),
        "stall_full_percent": _of_each(last, "psi_full_ns"),
        "cpu_tlb_percent": share["tlb"],
        "ksmd_cpu_percent": _of_each(last, "ksmd_cpu_ns"),
    }


def _of_each(last: pd.DataFrame, name: str) -> float:
    """Percent of the time, on average over hosts, of a counter in ns."""
    return float((last[name] / last["time_s"]).sum(skipna=False)) / float(last["hosts"].sum()) / 1e7


def _speed(samples: pd.DataFrame) -> Summary:
    last = samples.groupby("host").last()
    work, walk, native, tlb, saved = (
        float(last[name].sum(skipna=False))
        for name in ("work_cpu_ns", "walk_cpu_ns", "native_walk_cpu_ns", "tlb_cpu_ns", "llc_saved_ns")
    )
    if not work > 0:
        return {}
    return {
        "tlb_slowdown_percent": 100 * tlb / (work + walk - tlb),
        "native_speed_percent": 100 * (work + native) / (work + walk),
        "llc_gain_percent": 100 * saved / (work + walk - saved),
    }


def _end(samples: pd.DataFrame) -> Summary:
    last = samples.groupby("host").last()

    def total(name: str) -> float:
        return float(last[name].sum(skipna=False))

    faults = total("pgmajfault") - total("swpin_zero") - total("ksm_swpin_copy")
    names = ["full_scans", "general_profit", "oom_kills", "guests_running"]
    names += [metric.name for metric in COUNTER_METRICS]
    swap_in = {"swap_in_s": _ratio(total("swpin_wait_ns") / 1e9, faults)}
    sums: Summary = {name: _whole(last[name].sum(skipna=False)) for name in names}
    slowest: Summary = {name: _whole(last[name].max(skipna=False)) for name in _LATENCIES}
    return swap_in | sums | slowest


def _scan_times(scans: pd.DataFrame) -> Summary:
    """Scan time and ksmd's CPU over the last scans, as many as smart_scan needs to visit every page once."""
    durations: list[float] = []
    busy: list[float] = []
    for _, ends in scans.groupby("host"):
        last = ends[["time_s", "ksmd_cpu_ns"]].tail(SMART_SCAN_CYCLE + 1).to_numpy(dtype=float)
        if len(last) > 1:
            seconds, cpu_ns = last[-1] - last[0]
            durations.append(seconds / (len(last) - 1))
            busy.append(cpu_ns / seconds / 1e7)
    if not durations:
        return {}
    return {"scan_time_s": float(np.mean(durations)), "ksmd_cpu_percent_settled": float(np.mean(busy))}


def _ratio(dividend: float, divisor: float) -> float | None:
    return float(dividend / divisor) if divisor else None


def _whole(value: float) -> int | None:
    return None if np.isnan(value) else int(value)
