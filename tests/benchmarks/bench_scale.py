"""What `scale: n` loses and gains: five different fleets at scale 1, 8, 64 and 512, all measured in one run.

By hand, where the package is installed: `python tests/benchmarks/bench_scale.py`; writes results/scale.md.
"""

import sys
import time
from typing import Any

from sim.run import run
from sim.scenario import parse

DATA = "scenarios"


def mixed(count: int, memory: str, parts: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"name": "guest", "count": count, "memory": memory, "image": {"parts": parts}, **more}


def written() -> dict[str, Any]:
    """24 guests of 1 GiB like a Debian with a service: common pages, duplicates, zeros, and a hot part that is written."""
    parts = [
        {"name": "os", "size": "18%", "pool": "os", "run": "64KiB"},
        {"name": "app", "size": "12%", "pool": "app", "run": "32KiB"},
        {"name": "copies", "size": "3%", "duplicates": 3, "run": "16KiB"},
        {"name": "zero", "size": "5%", "zero": True, "run": "128KiB"},
        {"name": "hot", "size": "4%", "writes": {"rate": "2/s", "hot": "20%", "hot_writes": "80%"}},
        {"name": "warm", "size": "10%", "writes": {"rate": "1/min"}},
        {"name": "own", "size": "28%", "run": "64KiB"},
    ]
    return {
        "duration": "10min",
        "hosts": [{"memory": "32GiB", "cores": 16, "ksm": {"pages_to_scan": 2000, "sleep_millisecs": 20}}],
        "vms": [mixed(24, "1GiB", parts, every="3s")],
    }


def captured() -> dict[str, Any]:
    """32 captured Debian guests of 512 MiB and four kinds, of which a tenth of the pages differ."""
    kinds = {"nginx-a": 12, "pg-a": 8, "python-a": 8, "idle-a": 4}
    return {
        "duration": "5min",
        "hosts": [{"memory": "16GiB", "cores": 8, "ksm": {"pages_to_scan": 1000, "sleep_millisecs": 20}}],
        "vms": [
            {"name": name, "count": count, "memory": "512MiB", "every": "1s",
             "image": {"captured": f"images/{name}.npz", "diverge": "10%"}}
            for name, count in kinds.items()
        ],
    }  # fmt: skip


def zeros() -> dict[str, Any]:
    """Half of 16 GiB are zeros, a fifth stands 16 times in a guest; slow ksmd, use_zero_pages, guests come and go."""
    parts = [
        {"name": "zero", "size": "50%", "zero": True},
        {"name": "copies", "size": "20%", "duplicates": 16},
        {"name": "os", "size": "10%", "pool": "os"},
        {"name": "own", "size": "15%", "writes": {"rate": "0.5/min", "leaves": "zero"}},
    ]
    return {
        "duration": "15min",
        "hosts": [{
            "memory": "24GiB", "cores": 8, "ksm": {"pages_to_scan": 500, "sleep_millisecs": 10, "use_zero_pages": 1},
        }],
        "vms": [mixed(16, "1GiB", parts, every="10s"), mixed(8, "1GiB", parts, start="2min", lifetime="6min") | {"name": "brief"}],
    }  # fmt: skip


def huge() -> dict[str, Any]:
    """8 guests of 4 GiB in transparent huge pages, which ksmd splits where it finds equal pages; guests run."""
    parts = [
        {"name": "os", "size": "12%", "pool": "os", "run": "64KiB"},
        {"name": "heap", "size": "60%", "reads": {"rate": "1/s", "hot": "20%", "hot_reads": "80%"}},
        {"name": "cache", "size": "20%", "pool": "cache", "reads": {"rate": "0.1/s"}},
    ]
    return {
        "duration": "8min",
        "hosts": [{
            "memory": "40GiB", "cores": 16, "thp": {"enabled": "madvise"},
            "ksm": {"pages_to_scan": 4000, "sleep_millisecs": 20},
        }],
        "vms": [mixed(8, "4GiB", parts, load="50%", vcpus=2)],
    }  # fmt: skip


def squeezed() -> dict[str, Any]:
    """10 guests of 1280 MiB on 10 GiB: KSM shares, and what does not fit goes to a solid-state disk and comes back."""
    parts = [
        {"name": "os", "size": "12%", "pool": "os", "reads": {"rate": "1/min"}},
        {"name": "zero", "size": "4%", "zero": True},
        {
            "name": "heap",
            "size": "70%",
            "reads": {"rate": "0.5/min", "zipf": 0.9},
            "writes": {"rate": "0.1/min", "zipf": 0.9},
        },
        {"name": "old", "size": "10%"},
    ]
    return {
        "duration": "10min",
        "hosts": [{
            "memory": "10GiB", "cores": 8, "swap": {"device": "ssd", "size": "8GiB"},
            "ksm": {"pages_to_scan": 1000, "sleep_millisecs": 20},
        }],
        "vms": [mixed(10, "1280MiB", parts, vcpus=2, load="30%")],
    }  # fmt: skip


FLEETS = [written, captured, zeros, huge, squeezed]
METRICS = (
    "consolidation_ratio",
    "cpu_overhead_percent",
    "saved_bytes",
    "pswpin",
    "scan_time_s",
    "consolidation_ratio_mean",
    "stall_percent",
    "cpu_tlb_percent",
    "ksmd_cpu_percent",
    "mem_huge_bytes",
    "cpu_swap_percent",
    "cpu_cow_percent",
    "full_scans",
)


def main() -> None:
    names = sys.argv[1:] or [fleet.__name__ for fleet in FLEETS]
    for fleet in FLEETS:
        if fleet.__name__ not in names:
            continue
        whole = None
        for scale in (1, 8, 64, 512):
            try:
                scenario = parse({"name": fleet.__name__, "scale": scale, **fleet()}, DATA)
            except Exception as e:
                print(scale, e)
                continue
            began = time.process_time()
            result = run(scenario)
            took = time.process_time() - began
            if scale == 1:
                print(fleet.__name__, {m: result.summary[m] for m in METRICS}, f"{took:.2f} s", flush=True)
                whole = result
                continue
            errors = {
                m: round(100 * (result.summary[m] / whole.summary[m] - 1), 2) if whole.summary[m] else result.summary[m]
                for m in METRICS
            }
            print(scale, errors, f"{took:.2f} s", flush=True)


if __name__ == "__main__":
    main()
