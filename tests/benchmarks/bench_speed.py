"""How fast the simulator is: ratios, all measured in one run.

By hand, where the package is installed: `python tests/benchmarks/bench_speed.py`. Compares with ksmd itself where this
machine can run it (root, KSM); otherwise with ksmd's CPU time by the price set.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import simpy

from sim.document import dump
from sim.errors import MachineError
from sim.lab.replay import observe, replay
from sim.memory.pages import Int64
from sim.run import run
from sim.scenario import Scenario, parse
from sim.sharing.ksm_pass import PAGES_SCANNED
from sim.sharing.scanner import ROW_COUNTERS, Scanner

PAGE_BYTES = 4096
GIB = 1 << 30


def mix(
    name: str, guests: int, duration: str, memory: int = 2 * GIB, writes: bool = True, **more: Any
) -> dict[str, Any]:
    """A host full of guests: a common operating system, an application, duplicates, zero, unique, a hot part."""
    hot = {"writes": {"rate": "1/s"}} if writes else {}
    parts = [
        {"name": "os", "size": "20%", "pool": "os", "run": "64KiB"},
        {"name": "app", "size": "15%", "pool": "app", "run": "32KiB"},
        {"name": "copies", "size": "5%", "duplicates": 4, "run": "16KiB"},
        {"name": "zero", "size": "15%", "zero": True, "run": "256KiB"},
        {"name": "hot", "size": "1%", **hot},
        {"name": "own", "size": "44%", "run": "64KiB"},
    ]
    return {
        "name": name,
        "duration": duration,
        "hosts": [{"memory": f"{(guests + 1) * memory}B", "ksm": {"pages_to_scan": 5000, "sleep_millisecs": 20}}],
        "vms": [{"name": "guest", "count": guests, "memory": f"{memory}B", "image": {"parts": parts}}],
        **more,
    }


def fleet(name: str, guests: int, duration: str, **host: Any) -> dict[str, Any]:
    """Guests of 1280 MiB that read and write most of it at random; a fifth is common, a twentieth zeros."""
    heap = {"reads": {"rate": "0.5/min", "zipf": 0.9}, "writes": {"rate": "0.1/min", "zipf": 0.9}}
    parts = [
        {"name": "os", "size": "10%", "pool": "os", "reads": {"rate": "1/min"}},
        {"name": "app", "size": "10%", "pool": "app"},
        {"name": "heap", "size": "75%", **heap},
        {"name": "zero", "size": "5%", "zero": True},
    ]
    return {
        "name": name,
        "duration": duration,
        "sample_every": "10s",
        "hosts": [{"cores": 32, "ksm": {"pages_to_scan": 4000}, **host}],
        "vms": [
            {"name": "vm", "count": guests, "memory": "1280MiB", "vcpus": 2, "every": "1s", "image": {"parts": parts}}
        ],
    }


class Stopwatch(Scanner):
    """A scanner that times its own work."""

    cpu_s = 0.0

    def advance(self, horizon: int) -> Iterator[Int64]:
        """Let ksmd run, with the clock on."""
        began = time.process_time()
        logs = [log.copy() for log in super().advance(horizon)]
        self.cpu_s += time.process_time() - began
        yield from logs


@dataclass
class Cost:
    """What a process took."""

    cpu_s: float
    peak_bytes: int


def whole_process(data: dict[str, Any], cache: str | None = None) -> Cost:
    """CPU time and peak memory of `overcommit run` in a process of its own, with the compile cache in *cache*."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "scenario.yaml")
        file.write_text(dump(data))
        environment = os.environ | ({"XDG_CACHE_HOME": cache} if cache else {})
        command = [sys.executable, "-m", "sim", "run", "-q", str(file), "--out", folder]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        peak_bytes = 0
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            peak_bytes = max(peak_bytes, peak_of(process.pid))
            time.sleep(0.02)
        _, status, usage = ended
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return Cost(usage.ru_utime + usage.ru_stime, peak_bytes)


def peak_of(pid: int) -> int:
    """Peak memory of a process in bytes; ru_maxrss would include this one's, from before the exec."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def ksmd_ns_per_visit(scenario: Scenario) -> tuple[float, str]:
    """CPU time of ksmd for a page visit, and where the figure is from."""
    try:
        last, source = replay(scenario).samples.iloc[-1], "measured"
    except MachineError as error:
        last, source = run(scenario).samples.iloc[-1], f"by its prices ({error})"
    return last["ksmd_cpu_ns"] / last["pages_scanned"], source


@dataclass
class PlainPage:
    """A page of the plain model."""

    content: object
    old: object = None
    item: str = "none"
    scan: int = -1


@dataclass
class PlainKsm:
    """ksmd as one would first write it with SimPy: one step for each page, trees as dictionaries, smart_scan off."""

    env: simpy.Environment
    pages: list[PlainPage]
    visits: int = 0
    stable: dict[object, int] = field(default_factory=dict)

    def ksmd(self, batch: int, sleep_s: float) -> Iterator[simpy.Event]:
        """The thread: scan a batch, sleep."""
        quota, scan = batch, 0
        while True:
            unstable: dict[object, PlainPage] = {}
            for page in self.pages:
                yield self.env.timeout(self.visit(page, unstable, scan))
                quota -= 1
                if quota == 0:
                    yield self.env.timeout(sleep_s)
                    quota = batch
            yield self.env.timeout(sleep_s)
            quota, scan = batch, scan + 1

    def visit(self, page: PlainPage, unstable: dict[object, PlainPage], scan: int) -> float:
        """Decide about one page; return the time taken in s."""
        self.visits += 1
        if page.item == "stable":
            return 250e-9
        if page.old != page.content:
            page.old = page.content
            return 1e-6
        if page.content in self.stable:
            self.stable[page.content] += 1
            page.item = "stable"
            return 5e-6
        twin = unstable.get(page.content)
        if twin is not None and twin is not page:
            page.item = twin.item = "stable"
            self.stable[page.content] = 2
            return 9e-6
        unstable[page.content] = page
        page.item, page.scan = "unstable", scan
        return 4e-6


def plain_visits_per_cpu_s(pages: int, seconds: float) -> float:
    """Page visits per CPU second of the plain model on a mix like ours."""
    env = simpy.Environment()
    contents = [number % (pages // 4) if number % 2 else ("own", number) for number in range(pages)]
    model = PlainKsm(env, [PlainPage(content) for content in contents])
    env.process(model.ksmd(5000, 0.024))
    began = time.process_time()
    env.run(until=seconds)
    return model.visits / (time.process_time() - began)


def show(what: str, value: str, bar: str, good: bool) -> None:
    """Print one line of the report."""
    print(f"{what:72} {value:>16}   {bar:14} {'ok' if good else 'MISSED'}", flush=True)


def bench_scanner() -> None:
    """(a) and (c): the scanner against ksmd and against a plain model on memory that does not change."""
    small = mix("static", 2, "20s", memory=GIB // 4, writes=False)
    small["hosts"][0]["ksm"]["smart_scan"] = 0
    scenario = parse(small)
    observe(scenario, Stopwatch)  # compiled, and the caches are warm
    scanner = observe(scenario, Stopwatch)
    visits = int(scanner.snapshot(scenario.duration)[ROW_COUNTERS + PAGES_SCANNED])
    ours = visits / scanner.cpu_s
    ksmd_ns, source = ksmd_ns_per_visit(scenario)
    plain = plain_visits_per_cpu_s(100_000, 20)
    ratio = ours * ksmd_ns / 1e9
    print(f"static: {visits:,} visits in {scanner.cpu_s:.3f} s CPU; ksmd {ksmd_ns:.0f} ns a visit, {source}")
    show("a  visits per CPU second: scanner / ksmd", f"{ratio:,.0f}", ">= 200", ratio >= 200)
    show("c  visits per CPU second: scanner / plain SimPy model", f"{ours / plain:,.0f}", "", True)


def bench_process() -> None:
    """(b), (d), (e), (f): the whole command on a 64 GiB host over an hour."""
    data = mix("hour", 32, "1h")
    # First of all, while this process is small: a child's peak memory starts from its parent's.
    warm = whole_process(data)
    with tempfile.TemporaryDirectory() as cache:
        cold = whole_process(data, cache)
    ksmd_ns, source = ksmd_ns_per_visit(parse(mix("price", 1, "20s")))
    visits = int(run(parse(data)).samples["pages_scanned"].iloc[-1])
    ksmd_s = visits * ksmd_ns / 1e9
    print(
        f"hour: {visits:,} visits, ksmd {ksmd_ns:.0f} ns a visit, {source}; ours {warm.cpu_s:.1f} s, {cold.cpu_s:.1f} s"
    )
    show("b  CPU time: ksmd / whole process", f"{ksmd_s / warm.cpu_s:,.0f}", ">= 100", ksmd_s / warm.cpu_s >= 100)
    show("b  the same, nothing compiled yet", f"{ksmd_s / cold.cpu_s:,.0f}", ">= 100", ksmd_s / cold.cpu_s >= 100)
    each = warm.peak_bytes / (64 * GIB // PAGE_BYTES)
    show("d  peak memory of the process per simulated page", f"{each:.1f} bytes", "<= 32 bytes", each <= 32)
    half, short = whole_process(mix("hour", 16, "1h")), whole_process(mix("hour", 32, "30min"))
    pages, hours = warm.cpu_s / half.cpu_s, warm.cpu_s / short.cpu_s
    show("e  CPU time: twice the pages", f"{pages:.2f}", "<= 2.2", pages <= 2.2)
    show("e  CPU time: twice the simulated time", f"{hours:.2f}", "<= 2.2", hours <= 2.2)
    fine = whole_process(mix("hour", 32, "1h", sample_every="100ms")).cpu_s / warm.cpu_s
    show("f  CPU time: sample_every 100ms / 1s", f"{fine:.2f}", "<= 1.2", fine <= 1.2)


def bench_pressure() -> None:
    """(g), (h): a host that is short of memory."""
    disk = {"device": "nvme", "size": "32GiB"}
    short = {"memory": "8GiB", "swap": disk, "thp": {"enabled": "always"}}
    whole_process(fleet("short", 8, "10s", **short))  # compiled
    calm = whole_process(fleet("calm", 8, "30min", memory="16GiB"))
    both = whole_process(fleet("short", 8, "30min", **short)).cpu_s / calm.cpu_s
    show("g  CPU time: THP, swap and too little memory / KSM alone, same guests", f"{both:.2f}", "<= 2", both <= 2)
    hour = whole_process(fleet("pressed", 60, "1h", memory="64GiB", swap=disk))
    show("h  CPU time: 60 guests on 64 GiB that swaps, 1 h", f"{hour.cpu_s:.0f} s", "<= 120 s", hour.cpu_s <= 120)
    peak = hour.peak_bytes / GIB
    show("h  peak memory of the process", f"{peak:.2f} GiB", "<= 1 GiB", peak <= 1)


def main() -> None:
    """Run every benchmark."""
    bench_pressure()
    bench_process()
    bench_scanner()


if __name__ == "__main__":
    main()
