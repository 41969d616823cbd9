"""What `scale: n` loses and gains: five different fleets at scale 1, 8, 64 and 512, all measured in one run.

By hand, where the package is installed: `python tests/benchmarks/bench_scale.py`; writes results/scale.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.errors import UserError
from sim.run import Result, run
from sim.scenario import parse


def mixed(count: int, memory: str, parts: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Guests with an image of these parts."""
    return {"name": "guest", "count": count, "memory": memory, "image": {"parts": parts}, **more}


def written() -> dict[str, Any]:
    """24 guests of 1 GiB, each like a Debian with a service: common pages, duplicates, zeros, hot and warm parts."""
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
        "vms": [
            mixed(16, "1GiB", parts, every="10s"),
            mixed(8, "1GiB", parts, start="2min", lifetime="6min") | {"name": "brief"},
        ],
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


FLEETS = (written, captured, zeros, huge, squeezed)
SCALES = (8, 64, 512)
METRICS = ("consolidation_ratio", "cpu_overhead_percent", "saved_bytes", "pswpin", "scan_time_s")
BARS = {"consolidation_ratio": 1.0, "cpu_overhead_percent": 3.0}
"""Most percent by which a figure at scale 64 may differ from that at scale 1."""
HELD = 64


@dataclass(frozen=True)
class Measured:
    """A fleet at one scale."""

    result: Result
    cpu_s: float

    def errors(self, whole: Measured) -> dict[str, float | None]:
        """Percent by which each metric differs from that of the whole fleet."""
        found = {name: (self.result.summary[name], whole.result.summary[name]) for name in METRICS}
        return {name: 100 * (value / real - 1) if value is not None and real else None
                for name, (value, real) in found.items()}  # fmt: skip

    def bar(self, name: str) -> float:
        """What the run itself says of how far a metric may be off, in percent of it."""
        return 100 * float(self.result.manifest["error"][name] / self.result.summary[name])


def measure(fleet: Callable[[], dict[str, Any]], scale: int) -> Measured:
    """Run a fleet at a scale."""
    scenario = parse({"name": fleet.__name__, "scale": scale, **fleet()}, ROOT / "scenarios")
    began = time.process_time()
    result = run(scenario)
    return Measured(result, time.process_time() - began)


def rows(fleet: Callable[[], dict[str, Any]]) -> Iterator[tuple[bool, str]]:
    """Whether the bars are kept, and a line of the table, for each scale of a fleet."""
    whole = measure(fleet, 1)
    figures = " | ".join(f"{whole.result.summary[name]:,.4g}" for name in METRICS)
    yield True, f"| {fleet.__name__} | 1 | {figures} | | | {whole.cpu_s:.1f} s |"
    for scale in SCALES:
        try:
            small = measure(fleet, scale)
        except UserError as error:
            yield True, f"| {fleet.__name__} | {scale} | refused: {error.problems[0].message} |" + " |" * 7
            continue
        errors = small.errors(whole)
        kept = scale != HELD or all(abs(errors[name] or 0.0) <= most for name, most in BARS.items())
        said = " | ".join("" if error is None else f"{error:+.2f} %" for error in errors.values())
        bars = " | ".join(f"± {small.bar(name):.2f} %" for name in BARS)
        yield kept, f"| {fleet.__name__} | {scale} | {said} | {bars} | {whole.cpu_s / small.cpu_s:.0f} times |"


def main() -> None:
    """Measure all fleets and write the page."""
    run(parse({"name": "warm", "scale": 512, **squeezed()}, ROOT / "scenarios"))  # compiled from now on
    run(parse({"name": "warm", "scale": 64, **huge()}, ROOT / "scenarios"))
    lines, kept = [], True
    for fleet in FLEETS:
        for holds, line in rows(fleet):
            kept = kept and holds
            lines.append(line)
            print(line, flush=True)
    fleets = "\n".join(f"- **{fleet.__name__}**: {' '.join((fleet.__doc__ or '').split())}" for fleet in FLEETS)
    header = ("fleet", "scale", *METRICS, *(f"{name} ±" for name in BARS), "faster")
    table = "\n".join([f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}", *lines])
    PAGE.write_text(ABOUT.format(fleets=fleets, table=table))
    verdict = "kept" if kept else "NOT KEPT"
    print(f"scale {HELD}: at most {BARS} percent off: {verdict}")
    raise SystemExit(not kept)


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "results" / "scale.md"
ABOUT = """# What `scale` loses and gains

Five different fleets, whole and at scale 8, 64 and 512. Made by `python tests/benchmarks/bench_scale.py`. Lines with
scale 1 have the figures, the others by how much they differ; ± is what the run itself says of how far it may be off,
from runs at twice and four times its scale. *faster* counts those runs too. At scale 64 consolidation_ratio must be
within 1 % and cpu_overhead_percent within 3 %.

{fleets}

{table}
"""

if __name__ == "__main__":
    main()
