"""Alternatives held against each other over the phases of a run: what each needs, how soon, for how much CPU, and what
breaks; in a table, a picture and words.

The first alternative of the sweep is what the others are held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from sim.report.style import COLOURS
from sim.report.words import amount, listed
from sim.scenario import Scenario
from sim.study import Swept
from sim.units import GIB, MINUTE, SECOND, about_bytes, about_duration, format_duration

SETTLED: Final = 0.9
"""Share of what a phase ends with that counts as having got there."""
_LEAST: Final = 0.01
"""What is saved of the reference's memory below this is nothing."""
_WORST: Final = "write_latency_worst_ns"
_SOONEST: Final = 10
"""Times in s below this are drawn as this."""
_LOST: Final = 0.1
"""Percent of their work below which guests are not said to have lost any."""
_CPU: Final[Mapping[str, tuple[str, ...]]] = {
    "scan": ("scan_cpu_ns",),
    "merge": ("merge_cpu_ns", "source_cpu_ns"),
    "copy on write": ("cow_cpu_ns",),
    "reclaim, swap, compress": ("kswapd_cpu_ns", "reclaim_cpu_ns", "swap_cpu_ns"),
    "TLB": ("tlb_cpu_ns",),
}
"""Kinds of work, and the columns of samples that they are made of."""
_WIDTH, _LINE, _ABOVE, _BELOW = 12.5, 0.27, 0.55, 0.65
"""Inches of the picture: its width, a line, and what stands above and below them."""
_COLOURS: Final = ("scan", "merge", "cow", "zero", "volatile")


Row = Any
"""A row of a frame, or a point in a phase."""


class Phase(NamedTuple):
    """A part of the run, from and up to (s)."""

    name: str
    begin: float
    end: float


def phases(scenario: Scenario) -> Sequence[Phase]:
    """The phases of a run, in order."""
    begins = [*scenario.phases.values(), scenario.duration]
    pairs = zip(scenario.phases, begins, begins[1:], strict=False)
    return [Phase(name, begin / SECOND, end / SECOND) for name, begin, end in pairs]


def names(swept: Swept) -> Sequence[str]:
    """What each point is called."""
    return [", ".join(str(row[axis]) for axis in swept.axes) for _, row in swept.table.iterrows()]


def figures(swept: Swept) -> pd.DataFrame:
    """One row per point and phase, memory in bytes and times in s: `used` at its end and `peak`, `saved` against the
    first point and the time until nine tenths of that stay saved (`settled`), guests `killed`, CPU by kind of work in
    percent, `running` at the end; and `lost`, the percentage of their work that guests did not do in the whole run.

    Where the first point lost guests there is nothing to hold others against, and `saved` is not known.
    """
    timeline = swept.timeline
    if timeline is None or timeline.empty:
        return pd.DataFrame()
    capacity = float(sum(host.count * host.cores for host in swept.scenario.hosts))
    runs = {int(str(point)): rows.set_index("time_s") for point, rows in timeline.groupby("point")}
    reference = runs.get(0)
    called = names(swept)
    found = []
    for point, run in runs.items():
        for phase in phases(swept.scenario):
            row = {"point": point, "name": called[point], "phase": phase.name, **_of_phase(run, phase, capacity)}
            row["lost"] = max(100 - float(swept.table["progress_percent"][point]), 0.0)
            found.append(row | (_saving(run, reference, phase) if reference is not None else {}))
    return pd.DataFrame(found)


def _of_phase(run: pd.DataFrame, phase: Phase, capacity: float) -> dict[str, float]:
    part, spent = _within(run, phase), _spent(run, phase)
    length = phase.end - phase.begin
    cpu = {kind: 100 * sum(spent[column] for column in columns) / (capacity * length * SECOND)
           for kind, columns in _CPU.items()}  # fmt: skip
    return {
        "used": part["mem_used_bytes"].iloc[-1],
        "peak": part["mem_used_bytes"].max(),
        "running": part["guests_running"].iloc[-1],
        "killed": spent["oom_kills"],
        **cpu,
        "cpu": sum(cpu.values()),
    }


def _within(run: pd.DataFrame, phase: Phase) -> pd.DataFrame:
    """Samples of a phase; that at its end belongs to the next one, if there is one."""
    is_last = phase.end >= run.index[-1]
    part: pd.DataFrame = run[(run.index >= phase.begin) & ((run.index < phase.end) | is_last)]
    return part


def _spent(run: pd.DataFrame, phase: Phase) -> Row:
    """What counters rose by in a phase."""
    before = run[run.index < phase.begin]
    return _within(run, phase).iloc[-1] - (before.iloc[-1] if len(before) else 0)


def _saving(run: pd.DataFrame, reference: pd.DataFrame, phase: Phase) -> dict[str, float]:
    """What a run needs less than the first point, and when it came to nine tenths of that and stayed there."""
    theirs, ours = _within(reference, phase)["mem_used_bytes"], _within(run, phase)["mem_used_bytes"]
    if _within(reference, phase)["oom_kills"].iloc[-1] or not theirs.index.equals(ours.index):
        return {"saved": np.nan, "settled": np.nan}
    less = theirs - ours
    saved = float(less.iloc[-1])
    if saved < _LEAST * float(theirs.iloc[-1]):
        return {"saved": saved, "settled": np.nan}
    short = less.index[less < SETTLED * saved]
    after = less.index[less.index > short[-1]] if len(short) else less.index
    return {"saved": saved, "settled": float(after[0]) - phase.begin}


# --- the table ---------------------------------------------------------------------------------------------------


def rows(swept: Swept) -> Sequence[Sequence[str]]:
    """One row of text for each point, the header first."""
    found = figures(swept)
    if found.empty:
        return [
            ["point", "remark"],
            *([name, error] for name, error in zip(names(swept), swept.table["error"], strict=True)),
        ]
    first, *later = phases(swept.scenario)
    columns: list[tuple[str, Callable[[pd.DataFrame], str]]] = [
        (f"memory after {first.name}", lambda each: about_bytes(_in(each, first)["used"])),
        ("less than the first", lambda each: _percent_saved(each, first)),
        ("90 % of it after", lambda each: _seconds(_in(each, first)["settled"])),
        ("CPU", lambda each: f"{_mean(each, swept.scenario, 'cpu'):.2f} %"),
        *((kind, _cpu_column(kind, swept.scenario)) for kind in _CPU if found[kind].any()),
    ]
    for phase in later:
        columns += [
            (f"{phase.name}: memory at most", _column(phase, lambda row: about_bytes(row["peak"]))),
            (f"{phase.name}: back after", _column(phase, lambda row: _seconds(row["settled"]))),
            (f"{phase.name}: guests killed", _column(phase, lambda row: f"{row['killed']:.0f}")),
        ]
    columns.append(("guests' work lost", lambda each: f"{_in(each, first)['lost']:.1f} %"))
    body = []
    for number, name in enumerate(names(swept)):
        each = found[found["point"] == number]
        error = [swept.table["error"][number], *[""] * (len(columns) - 1)]
        cells = [said(each) for _, said in columns] if len(each) else error
        body.append([name, *cells, *(_worst(swept.table, number) for _ in _latency(swept.table))])
    return _without_empty([["system", *(title for title, _ in columns), *_latency(swept.table)], *body])


def _in(each: pd.DataFrame, phase: Phase) -> Row:
    return each[each["phase"] == phase.name].iloc[0]


def _column(phase: Phase, said: Callable[[Row], str]) -> Callable[[pd.DataFrame], str]:
    return lambda each: said(_in(each, phase))


def _cpu_column(kind: str, scenario: Scenario) -> Callable[[pd.DataFrame], str]:
    return lambda each: f"{_mean(each, scenario, kind):.2f} %"


def _mean(each: pd.DataFrame, scenario: Scenario, column: str) -> float:
    """A percentage over the whole run."""
    lengths = [phase.end - phase.begin for phase in phases(scenario)]
    return float(np.average(each[column], weights=lengths))


def _percent_saved(each: pd.DataFrame, phase: Phase) -> str:
    row = _in(each, phase)
    return "" if np.isnan(row["saved"]) else f"{100 * row['saved'] / (row['saved'] + row['used']):.0f} %"


def _seconds(value: float) -> str:
    return "" if np.isnan(value) else about_duration(value * SECOND)


def _latency(table: pd.DataFrame) -> Sequence[str]:
    return ["worst write"] if _WORST in table else []


def _worst(table: pd.DataFrame, number: int) -> str:
    value = table[_WORST][number]
    return "" if pd.isna(value) else amount(int(value), "ns")


def _without_empty(lines: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
    """Leave out columns in which no point has anything."""
    nothing = {"", "0", "0.0 %"}
    kept = [
        column
        for column in range(len(lines[0]))
        if any(line[column] not in nothing for line in lines[1:] if len(line) > column)
    ]
    return [[line[column] for column in kept if column < len(line)] for line in lines]


# --- in words ----------------------------------------------------------------------------------------------------


def conclusion(swept: Swept) -> str:
    """What the comparison shows, in a few sentences."""
    found = figures(swept)
    return " ".join(_sentences(swept, found)) if len(found) else "No point of this sweep has a result."


def _sentences(swept: Swept, found: pd.DataFrame) -> Iterator[str]:
    first, *later = phases(swept.scenario)
    at_first = found[found["phase"] == first.name].sort_values("used", kind="stable")
    best = at_first.iloc[0]
    yield (
        f"After {first.name}, {best['name']} needs least memory: {about_bytes(best['used'])}, where {names(swept)[0]} "
        f"needs {about_bytes(float(_in(found[found['point'] == 0], first)['used']))}."
    )
    for phase in later:
        part = found[found["phase"] == phase.name]
        if part["killed"].any():
            kept = part[part["killed"] == 0].sort_values(["lost", "used"], kind="stable")
            said = f"{len(kept)} of {len(part)} lose no guest in {phase.name}"
            if len(kept):
                row = kept.iloc[0]
                said += f"; of these {row['name']} costs them least of their work, {row['lost']:.2g} %"
            yield f"{said}."
    told = Told(found, phases(swept.scenario))
    for answer in ANSWERS:
        try:
            yield answer(told)
        except KeyError:
            continue


class Told:
    """Figures of a comparison by the names of its points. Raises KeyError where there is no such point or phase."""

    def __init__(self, found: pd.DataFrame, all_phases: Sequence[Phase]) -> None:
        self.by = found.set_index(["name", "phase"])
        self.first = all_phases[0].name
        self.lengths = {phase.name: phase.end - phase.begin for phase in all_phases}

    def row(self, name: str, phase: str = "") -> Row:
        return self.by.loc[(name, phase or self.first)]

    def saved(self, name: str, phase: str = "") -> str:
        """Memory saved, in percent of what the first point uses."""
        row = self.row(name, phase)
        return f"{100 * row['saved'] / (row['saved'] + row['used']):.0f} %"

    def after(self, name: str, phase: str = "") -> str:
        """When nine tenths of that were there."""
        settled = self.row(name, phase)["settled"]
        return "never" if np.isnan(settled) else f"after {about_duration(settled * SECOND)}" if settled else "at once"

    def cpu(self, name: str) -> str:
        """CPU over the whole run."""
        rows = [self.row(name, phase)["cpu"] for phase in self.lengths]
        return f"{np.average(rows, weights=list(self.lengths.values())):.2g} %"

    def killed(self, name: str) -> str:
        """Guests lost in the shortage."""
        killed = int(self.row(name, "shortage")["killed"])
        return "no guest" if killed == 0 else "one guest" if killed == 1 else f"{killed} guests"

    def lost(self, name: str) -> str:
        """How much of their work guests lost in the whole run."""
        return f"{self.row(name)['lost']:.2g} %"


def _vmware_and_xen(told: Told) -> str:
    esx, xen, ksm = "ESX 3", "Xen, a round a minute", "KSM, 1000 pages"
    return (
        f"VMware had it, and so had Xen: ESX 3 saves {told.saved(esx)} of the memory and a scanner under Xen "
        f"{told.saved(xen)}, where KSM with 1000 pages a batch saves {told.saved(ksm)}; nine tenths of that are there "
        f"{told.after(esx)}, {told.after(xen)} and {told.after(ksm)}."
    )


def _others_in_xen(told: Told) -> str:
    engine, satori = "Difference Engine", "Satori"
    return (
        f"Difference Engine, which also keeps differences and compresses, saves {told.saved(engine)} for "
        f"{told.cpu(engine)} of the CPU; Satori, which shares what comes from disks, {told.saved(satori)} "
        f"{told.after(satori)} for {told.cpu(satori)}."
    )


def _declared(told: Told) -> str:
    one, own = "containers, one image", "containers, pfcache"
    return (
        "Decades old it is on mainframes, but declared there, not looked for. So it is for containers of one image, "
        f"which save {told.saved(one)} {told.after(one)} for {told.cpu(one)} of the CPU; from images of their own, "
        f"through pfcache, {told.saved(own)} {told.after(own)}."
    )


def _windows_and_freebsd(told: Told) -> str:
    return (
        "That Windows and FreeBSD did it already was wrong in 2010: FreeBSD combines nothing, and Windows' page "
        f"combining came in 2012, stays within each guest and saves {told.saved('Windows page combining')}."
    )


def _large_pages(told: Told) -> str:
    return (
        "True: VMware combines no large pages. With them ESXi 6 saves "
        f"{told.saved('ESXi 6, shared among VMs')} before memory is short, with small pages "
        f"{told.saved('ESXi 6, small pages')}; then it breaks them, and the shortage costs it "
        f"{told.killed('ESXi 6, shared among VMs')}. KSM takes them apart at once: {told.saved('KSM, huge pages')}."
    )


def _ksm_costs_cpu(told: Told) -> str:
    slow, quick = "KSM, kernel's default", "KSM, 1000 pages"
    return (
        f"KSM costs CPU: {told.cpu(quick)} of the host with 1000 pages a batch, {told.cpu(slow)} with 100. "
        f"Nine tenths of the saving are there {told.after(quick)} and {told.after(slow)}."
    )


def _mergemem(told: Told) -> str:
    name = "mergemem, run once"
    return (
        f"mergemem did it on Linux 2.0, by hand and among programs of one name: {told.saved(name)}, and "
        f"{told.saved(name, 'reboot storm')} after the reboot storm, as nobody ran it again."
    )


def _running_out(told: Told) -> str:
    slow, quick = "KSM, kernel's default", "KSM, 1000 pages"
    return (
        f"What is shared is lent: twelve more guests cost a host with the kernel's KSM {told.killed(slow)}, with 1000 "
        f"pages a batch {told.killed(quick)}, and one that shares nothing {told.killed('nothing')}."
    )


def _compression(told: Told) -> str:
    zram, nvme, disk, both = "zram", "swap on NVMe", "swap on a disk", "KSM + zram"
    return (
        f"Compression saves {told.saved(zram)} before memory is short. Then zram loses {told.killed(zram)} and "
        f"{told.lost(zram)} of the guests' work, swap on NVMe {told.killed(nvme)} and {told.lost(nvme)}, a disk "
        f"{told.killed(disk)} and {told.lost(disk)}; KSM with zram behind it {told.killed(both)} and {told.lost(both)}."
    )


ANSWERS: Final[Sequence[Callable[[Told], str]]] = (
    _vmware_and_xen, _others_in_xen, _declared, _windows_and_freebsd, _large_pages, _ksm_costs_cpu, _mergemem,
    _running_out, _compression,
)  # fmt: skip
"""What the discussion of 2010 said, in its order; an answer whose systems are not in the sweep is left out."""


# --- the picture -------------------------------------------------------------------------------------------------


def draw(swept: Swept) -> Figure:
    """Draw a line for each point, the least memory on top: memory, time to it, CPU by kind of work, and what broke."""
    found = figures(swept)
    first, *later = phases(swept.scenario)
    order = found[found["phase"] == first.name].sort_values(["used", "point"])["point"].tolist()
    cells = {(row["point"], row["phase"]): row for _, row in found.iterrows()}
    height = _LINE * len(order) + _ABOVE + _BELOW
    canvas = Figure(figsize=(_WIDTH, height))
    memory, times, cpu, broken = canvas.subplots(1, 4, sharey=True, width_ratios=(3, 2, 2.4, 2.4))
    _draw_memory(
        memory, [(cells[point, first.name], cells[point, later[0].name] if later else None) for point in order]
    )
    if later:
        memory.set_xlabel(f"filled: after {first.name}; ring: at most in {later[0].name}")
        _draw_broken(broken, [cells[point, later[-1].name] for point in order])
        broken.set_title(f"Guests killed in {later[-1].name}")
    _draw_times(times, [cells[point, first.name] for point in order])
    _draw_cpu(cpu, {kind: [_mean(found[found["point"] == point], swept.scenario, kind) for point in order]
                    for kind in _CPU if found[kind].any()})  # fmt: skip
    if 0 in order:
        memory.axvline(cells[0, first.name]["used"] / GIB, color=_light("muted"), linestyle=":", linewidth=1)
    called = names(swept)
    memory.set_yticks(range(len(order)), [called[point] for point in order])
    memory.set_ylim(len(order) - 0.5, -0.5)
    for panel in (memory, times, cpu, broken):
        panel.grid(visible=True, axis="x")
        panel.grid(visible=True, axis="y", linewidth=0.4)
    canvas.subplots_adjust(left=0.19, right=0.985, top=1 - _ABOVE / height, bottom=_BELOW / height, wspace=0.08)
    return canvas


def _draw_memory(ax: Axes, lines: Sequence[tuple[Row, Row | None]]) -> None:
    for at, (settled, storm) in enumerate(lines):
        used, peak = settled["used"] / GIB, (settled if storm is None else storm)["peak"] / GIB
        ax.plot([used, peak], [at, at], color=_light("shared"), linewidth=1.2, zorder=1)
        ax.plot(peak, at, "o", markersize=5, markerfacecolor=_light("paper"), color=_light("volatile"))
        ax.plot(used, at, "o", markersize=6.5, color=_light("private"))
    ax.set_xlim(0, max(max(row["peak"] for row in line if row is not None) for line in lines) / GIB * 1.04)
    ax.set_title("Memory used (GiB)")


def _draw_times(ax: Axes, lines: Sequence[Row]) -> None:
    soonest, latest = _SOONEST * SECOND / MINUTE, max([row["settled"] for row in lines if row["settled"] > 0] or [60.0])
    ax.set_xscale("log")
    ax.set_xlim(soonest * 0.8, max(latest * SECOND / MINUTE * 1.3, 1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    for at, row in enumerate(lines):
        if np.isnan(row["settled"]):
            _write(ax, at, "saves nothing" if row["point"] else "held against this")
        else:
            ax.plot(max(row["settled"] * SECOND / MINUTE, soonest), at, "o", markersize=6.5, color=_light("saved"))
    ax.set_title("90 % saved after (min)")


def _draw_cpu(ax: Axes, shares: Mapping[str, Sequence[float]]) -> None:
    done = np.zeros(len(next(iter(shares.values()), ())))
    for colour, (kind, percent) in zip(_COLOURS, shares.items(), strict=False):
        ax.barh(range(len(percent)), percent, left=done, height=0.6, color=_light(colour), label=kind)
        done = done + np.array(percent)
    ax.margins(x=0.04)
    ax.set_title("CPU (% of the host)")
    if shares:
        ax.legend(loc="lower right", fontsize=8, frameon=True, framealpha=1, edgecolor="none")


def _draw_broken(ax: Axes, lines: Sequence[Row]) -> None:
    killed = [row["killed"] for row in lines]
    ax.barh(range(len(lines)), killed, height=0.6, color=_light("metadata"))
    for at, row in enumerate(lines):
        if not row["killed"]:
            lost = f"; guests lost {row['lost']:.2g} % of their work" if row["lost"] >= _LOST else ""
            _write(ax, at, f"none{lost}")
    ax.set_xlim(0, max([*killed, 1]) * 1.05)


def _write(ax: Axes, at: int, text: str) -> None:
    ax.annotate(
        text,
        (0, at),
        (2, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=_light("muted"),
    )


def _light(role: str) -> str:
    return COLOURS[role].light


def markdown(swept: Swept) -> str:
    """The comparison as a page of its own: words, picture, table."""
    header, *body = rows(swept)
    lines = [header, ["---"] * len(header), *body]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    said = "\n".join(f"- {sentence}" for sentence in _sentences(swept, figures(swept)))
    name = swept.scenario.name
    about = f"{swept.scenario.description}\n\nMade from [scenarios/{name}.yaml](../scenarios/{name}.yaml); "
    steps = listed(
        [
            f"{name} from {format_duration(begin) if begin else 'the start'}"
            for name, begin in swept.scenario.phases.items()
        ]
    )
    return f"# {name}\n\n{about}the phases are {steps}.\n\n{said}\n\n![{name}]({name}.png)\n\n{table}\n"
