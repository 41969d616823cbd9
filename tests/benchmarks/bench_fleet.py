"""What datacenters cost: by size, by number of processes, for recorded traces, and for a stream of arrivals.

By hand, where the package is installed: `python tests/benchmarks/bench_fleet.py [TRACES]`, with the folder of the real
traces if there is one (`planetlab/20110303` and `alibaba` in it); `--large` for ten thousand hosts as well.
"""

import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bench_speed import show

from sim.datacenter.arrivals import newcomers
from sim.run import run
from sim.scenario import parse

SCENARIOS = Path(__file__).parents[2] / "scenarios"
PARTS = [
    {"name": "system", "size": "20%", "pool": "debian"},
    {"name": "heap", "size": "40%", "writes": {"rate": "0.001/s"}},
    {"name": "empty", "size": "10%", "zero": True},
]


def fleet(hosts: int, scale: int = 4096) -> dict[str, Any]:
    """So many hosts of 256 GiB with 20 guests each on average, for a day; a tenth of the guests comes and goes."""
    return {
        "name": f"fleet-{hosts}", "duration": "24h", "scale": scale,
        "hosts": [{
            "name": "large", "memory": "256GiB", "count": hosts, "cores": 64, "ksm": {},
            "power": {"idle": 90, "full": 250},
        }],
        "vms": [
            {"name": "web", "memory": "8GiB", "vcpus": 4, "image": {"parts": PARTS}},
            {"name": "database", "memory": "16GiB", "vcpus": 4, "image": {"parts": PARTS}},
        ],
        "datacenter": {
            "report_every": "1h", "overcommit": {"memory": 1.2}, "placement": "worst-fit",
            "arrivals": [
                {"kind": "web", "batch": 13 * hosts}, {"kind": "database", "batch": 5 * hosts},
                {"kind": "web", "rate": f"{hosts * 84 // 1000}/h", "lifetime": {"exponential": "24h"}},
            ],
        },
    }  # fmt: skip


def day(hosts: int, jobs: int, scale: int) -> tuple[float, float, int, dict[str, Any]]:
    """CPU seconds, wall seconds, peak of memory and summary of a day, with all compiled and no memory left over."""
    run(parse(fleet(20)))
    result = run(parse(fleet(hosts, scale)), jobs=jobs)
    return result.manifest["cpu_s"], result.manifest["wall_s"], result.manifest["peak_bytes"], result.summary


def cost(hosts: int, jobs: int = 1, scale: int = 4096) -> tuple[float, float, int, dict[str, Any]]:
    """A day in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        return alone.submit(day, hosts, jobs, scale).result()


def by_size(sizes: tuple[int, ...]) -> None:
    """Cost of a host-hour, which must not grow with the fleet; what 20 hosts take is what any run takes."""
    base = median(cost(20)[0] for _ in range(3))
    each = {}
    for hosts in sizes:
        runs = [cost(hosts) for _ in range(3)]
        spent, peak, summary = median(run[0] for run in runs), runs[0][2], runs[0][3]
        each[hosts] = (spent - base) / (hosts - 20) / 24
        print(f"{hosts:,} hosts, {summary['guests_running']:,} guests: {spent:.1f} s of CPU, {peak >> 20:,} MiB")
        if hosts >= 10_000:
            show("CPU of 10,000 hosts for 24 h", f"{spent / 60:.1f} min", "< 30 min", spent < 1800)
            show("memory of that", f"{peak / (1 << 30):.1f} GiB", "< 12 GiB", peak < 12 << 30)
    spread = max(each.values()) / min(each.values())
    print(", ".join(f"{hosts:,} hosts: {1e3 * spent:.2f} ms per host-hour" for hosts, spent in each.items()))
    show("dearest host-hour / cheapest", f"{spread:.2f}", "<= 1.10", spread <= 1.10)


def by_processes() -> None:
    """Wall time of 1,000 hosts in two processes against one, and of two such runs at once, which is the best there is.

    A worker takes a second to start, whatever there is to do.
    """
    for scale in (4096, 512):
        runs = [(cost(1000, 1, scale), cost(1000, 2, scale)) for _ in range(3)]
        assert all(one[3] == two[3] for one, two in runs)
        found = median(one[1] / two[1] / 2 for one, two in runs)
        pages = f"guests of {(8 << 18) // scale:,} and {(16 << 18) // scale:,} pages"
        show(f"efficiency of two processes, {pages}", f"{found:.2f}", ">= 0.8", found >= 0.8)
    with ThreadPoolExecutor(2) as both:
        alone = cost(500, 1, 512)[1]
        together = max(each[1] for each in both.map(lambda _: cost(500, 1, 512), range(2)))
    print(f"of two runs that have nothing to do with each other: {alone / together:.2f}")


def of_traces(folder: Path) -> None:
    """The whole program for a recorded day and a recorded cluster."""
    for name, trace, bar, memory in (
        ("fleet-planetlab", "planetlab/20110303", 6, 4 << 10),
        ("fleet-openb", "alibaba/openb_pod_list_default.csv", 120, 4 << 10),
    ):
        path = SCENARIOS / f"{name}.yaml"
        days = ["--set", "duration=150d"] if "openb" in name else []
        with TemporaryDirectory() as results:
            command = [sys.executable, "-m", "sim", "run", "-q", str(path), "--jobs", "1", "--out", results,
                       "--set", f"datacenter.arrivals.0.path={folder / trace}", *days]  # fmt: skip
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            assert done.returncode in (0, 1), done.stderr  # it expects what the recorded sample shows
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        show(f"CPU of {name}, {trace}", f"{spent:.1f} s", f"<= {bar} s", spent <= bar)
        show("memory of that", f"{after.ru_maxrss >> 10} MiB", f"< {memory} MiB", after.ru_maxrss >> 10 < memory)


def stream(number: int = 10_000_000) -> None:
    """Memory that arrivals take which are asked for one by one."""
    data = fleet(10)
    data["datacenter"]["arrivals"] = [{"kind": "web", "rate": f"{number}/d", "lifetime": {"exponential": "10min"}}]
    scenario = parse(data)
    assert scenario.datacenter is not None
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    come = sum(1 for _ in newcomers(scenario.datacenter, scenario.vms, 1, scenario.duration, {}))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    print(f"{come:,} arrivals in {time.process_time() - began:.0f} s of CPU")
    show("memory that they take", f"{grown} MiB", "< 64 MiB", grown < 64)


def main() -> None:
    """Print every figure against its bar."""
    arguments = [each for each in sys.argv[1:] if not each.startswith("--")]
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    stream()
    if arguments:
        of_traces(Path(arguments[0]).resolve())
    by_processes()
    by_size((100, 1000, 10_000) if "--large" in sys.argv else (100, 1000))


if __name__ == "__main__":
    main()
