"""Figures of a run in words: amounts with units and the conclusion in one sentence."""

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from sim.columns import FLEET_METRICS, HEADLINES, Metric
from sim.results.summary import Summary, Value, over_hosts
from sim.units import SECOND, about_bytes, about_duration

_SCANS_TO_MERGE = 2
_STALL = 2.0
"""Percent of the time that guests may wait: as much as a sweep's recommendation lets them lose."""
_DEAR = 5.0
"""Percent of the CPU above which overcommit is called dear, and advised against; a choice, not a measurement."""


def amount(value: Value, unit: str) -> str:
    """Write a metric or column value for reading, to three significant digits; counts are written whole."""
    match value, unit:
        case None, _:
            return "no data"
        case number, "bytes":
            return about_bytes(number)
        case number, "s":
            return about_duration(number * SECOND)
        case number, "ns":
            return about_duration(number)
        case number, "%":
            return f"{number:.3g} %"
        case int(), _:
            return f"{value:,}"
        case _:
            return f"{value:.3g}"


def measured(value: Value, bar: float | None, unit: str) -> str:
    """Write a value with how far it may be off, where that is known."""
    return amount(value, unit) if bar is None else f"{amount(value, unit)} ± {amount(bar, unit)}"


def uncertainty(scale: int, bars: Mapping[str, float], summary: Summary) -> str:
    """Say how far the two figures that matter most may be off because pages stand for others."""
    figures = [("consolidation_ratio", "ratio"), ("cpu_overhead_percent", "%")]
    said = [f"{name} {measured(summary[name], bars[name], unit)}" for name, unit in figures if name in bars]
    return (
        f"Each simulated page stands for {scale:,} pages: {listed(said)}. "
        "How far a figure may be off is told by runs at twice and four times that scale."
    )


def conclusion(samples: pd.DataFrame, guests: pd.DataFrame, summary: Summary) -> str:
    """Return what the run shows, in a sentence or two; `samples` and `guests` are its tables."""
    totals = over_hosts(samples)
    busy = totals[totals["guests_running"] > 0]
    if busy.empty:
        return "No guest was running at any sample, so this run shows nothing about sharing."
    last = busy.iloc[-1]
    ksm = bool(samples["pages_to_scan"].any())
    if summary["mem_used_bytes"] is None:
        return (
            f"{_guests(last, guests)} {amount(summary['saved_ksm_bytes'], 'bytes')} less because of KSM, "
            f"on a real kernel, for {amount(summary['ksmd_cpu_percent'], '%')} of one core in ksmd."
        )
    if summary["hosts_needed"] is not None:
        return " ".join(_of_fleet(last, summary))
    sentence = (
        f"{_guests(last, guests)} {about_bytes(last['mem_touched_bytes'])} of data in "
        f"{about_bytes(last['mem_used_bytes'])} of {_memory(samples, last)}: "
        f"a consolidation ratio of {amount(summary['consolidation_ratio'], 'ratio')}, "
        f"for {amount(summary['ksmd_cpu_percent'], '%')} of one core in {'ksmd' if ksm else 'page sharing'} "
        f"and {amount(summary['cpu_overhead_percent'], '%')} of the CPU in all."
    )
    return " ".join([sentence, *_remarks(summary, ksm)])


def advice(summary: Summary) -> str:
    """Return what to change first, in a sentence, by the metrics alone; the first of these that holds is said."""

    def above(name: str, bound: float) -> bool:
        value = summary[name]
        return value is not None and value > bound

    if above("oom_kills", 0):
        return "guests were killed, so promise less, or give the host swap for what it promises beyond its memory."
    if above("stall_percent", _STALL):
        return "guests wait for memory, so run fewer of them, or give the host faster swap or compressed memory."
    if above("ksmd_cpu_percent", 0) and not above("general_profit", 0):
        return "KSM takes CPU and saves nothing, so switch it off for these guests."
    if above("cpu_tlb_percent", _DEAR) and above("cpu_tlb_percent", summary["cpu_scan_percent"] or 0):
        return "small pages cost guests more than scanning does, so compare with KSM off and large pages on."
    if above("cpu_overhead_percent", _DEAR):
        return "overcommit takes much CPU, so scan more slowly and see what that costs: overcommit sweep."
    if above("ksmd_cpu_percent", 0) and (summary["full_scans"] or 0) < _SCANS_TO_MERGE:
        return "KSM has hardly begun, so run for longer, or raise pages_to_scan."
    return "no figure asks for a change; more guests per host are worth a try."


def _guests(last: "pd.Series[float]", guests: pd.DataFrame) -> str:
    count = int(last["guests_running"])
    sizes = guests["memory_bytes"].unique()
    each = f" of {about_bytes(sizes[0])}" if len(sizes) == 1 else ""
    promised = f"promised {about_bytes(last['mem_promised_bytes'])}"
    return f"{count:,} guests{each}, {promised} in all, hold" if count > 1 else f"One guest, {promised}, holds"


def _of_fleet(last: "pd.Series[float]", summary: Summary) -> Iterator[str]:
    """What a datacenter's run shows."""
    energy = f" used {amount(summary['energy_kwh'], 'kWh')} kWh" if summary["energy_kwh"] is not None else " were on"
    yield (
        f"{int(last['guests_running']):,} guests, promised {about_bytes(last['mem_promised_bytes'])}, hold "
        f"{about_bytes(last['mem_touched_bytes'])} of data in {about_bytes(last['mem_used_bytes'])}: "
        f"a consolidation ratio of {amount(summary['consolidation_ratio'], 'ratio')}. "
        f"It took {amount(summary['hosts_needed'], 'count')} hosts at most, with "
        f"{amount(summary['guests_per_host'], 'ratio')} guests each on average; "
        f"{amount(summary['hosts_on_mean'], 'ratio')} hosts{energy}."
    )
    said = {"migrations": "migrations", "guests_refused": "guests refused", "host_failures": "hosts failed",
            "guests_lost": "guests lost", "oom_kills": "guests killed for lack of memory"}  # fmt: skip
    happened = [f"{amount(summary[name], 'count')} {what}" for name, what in said.items() if summary[name]]
    if happened:
        yield f"On the way: {listed(happened)}."


def headlines(summary: Summary) -> Sequence[Metric]:
    """The metrics to show first; of a datacenter its own come before, and none that it has no figure for."""
    if summary["hosts_needed"] is None:
        return HEADLINES
    return [metric for metric in (*FLEET_METRICS, *HEADLINES) if summary[metric.name] is not None]


def telling(metrics: Sequence[Metric], summary: Summary) -> tuple[Sequence[Metric], Sequence[str]]:
    """The metrics that have more to tell than 0, and lines that name those that are 0 and those without data."""
    lines = [
        f"{what}: {', '.join(names)}"
        for what, value in (("0", 0), ("no data", None))
        if (names := [each.name for each in metrics if summary[each.name] == value])
    ]
    return [each for each in metrics if summary[each.name]], lines


def _memory(samples: pd.DataFrame, last: "pd.Series[float]") -> str:
    hosts = samples["host"].nunique()
    total = about_bytes(last["mem_total_bytes"])
    return f"the {total} of {hosts:,} hosts" if hosts > 1 else f"the host's {total}"


def _remarks(summary: Summary, ksm: bool) -> Iterator[str]:
    if summary["oom_kills"]:
        yield f"Guests killed for lack of memory: {summary['oom_kills']:,}."
    if summary["time_to_90_percent_s"] is not None:
        yield f"Nine tenths of the saving was there after {amount(summary['time_to_90_percent_s'], 's')}."
    else:
        yield "Sharing saved nothing."
    if (summary["general_profit"] or 0) < 0:
        yield "KSM's metadata takes more memory than KSM saves."
    if ksm and (summary["full_scans"] or 0) < _SCANS_TO_MERGE:
        yield "KSM merges a page on its second visit at the earliest, and the run ended before two full scans."


def listed(parts: Sequence[str]) -> str:
    """Join parts of a sentence: "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def short_names(paths: Sequence[str]) -> Sequence[str]:
    """Return the paths without the number or name of what they belong to, where that leaves them different."""
    short = [".".join(path.split(".")[2:]) or path for path in paths]
    return short if len(set(short)) == len(short) else paths
