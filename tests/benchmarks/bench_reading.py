"""How long a scenario of 5,000 lines takes to read and check: `python tests/benchmarks/bench_reading.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from sim.document import read
from sim.scenario import load

LINES = 5000
HOST = "  - {{name: host-{0}, memory: 64GiB, cores: 16,\n     ksm: {{pages_to_scan: 1000, sleep_millisecs: 20}}}}"
GUEST = """  - name: guest-{0}
    count: 2
    memory: 1GiB
    start: {1}s
    image:
      parts:
        - {{name: system, pool: os-{2}, size: 30%}}
        - name: heap
          size: 50%
          writes: {{rate: 1/min}}"""


def written() -> str:
    """A scenario of a hundred kinds of host and as many kinds of guest as there are lines left for."""
    hosts = [HOST.format(number) for number in range(100)]
    left = LINES - 4 - sum(each.count("\n") + 1 for each in hosts)
    guests = [GUEST.format(number, number % 300, number % 7) for number in range(left // (GUEST.count("\n") + 1))]
    return "\n".join(["name: long", "duration: 10min", "hosts:", *hosts, "vms:", *guests, ""])


def cpu_s(do: Callable[[], object]) -> float:
    """Median CPU time of five times."""
    took = []
    for _ in range(5):
        began = time.process_time()
        do()
        took.append(time.process_time() - began)
    return statistics.median(took)


def main() -> None:
    """Print what reading takes, and reading and checking."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "long.yaml")
        file.write_text(written())
        print(f"{len(file.read_text().splitlines()):,} lines: read in {cpu_s(lambda: read(file)):.2f} s CPU,", end=" ")
        print(f"read and checked in {cpu_s(lambda: load(file)):.2f} s CPU")


if __name__ == "__main__":
    main()
