"""What a visit to a page costs the simulator, by mechanism, against KSM: the same guests, all measured in one run.

By hand, where the package is installed: `python tests/benchmarks/bench_mechanisms.py`.
"""

import time
from typing import Any

from bench_speed import mix, show

from sim.run import run
from sim.scenario import parse
from sim.sharing import SCANNERS

BAR = 3
"""No mechanism may cost more than so many times KSM."""
SETTINGS: dict[str, dict[str, Any]] = {
    "ksm": {"pages_to_scan": 5000},
    "tps": {"ShareForceSalting": 0, "AllocGuestLargePage": 0},
    "xen": {"every": "10s"},
    "difference_engine": {"every": "4s"},
    "page_combining": {"every": "10s", "within": "host"},
    "mergemem": {"at": "10s", "every": "10s"},
}
"""A pace at which each visits pages often; one that is not here runs as it comes."""


def cost(name: str | None) -> tuple[float, int]:
    """CPU time (s) of a run with a mechanism, or with none, and the pages that it visited."""
    data = mix("visits", 4, "5min", memory=1 << 28)
    data["hosts"][0] |= {"ksm": None} | ({name: SETTINGS.get(name, {})} if name else {})
    scenario = parse(data)
    run(scenario)  # compiled, and the caches are warm
    began = time.process_time()
    result = run(scenario)
    return time.process_time() - began, int(result.samples["pages_scanned"].iloc[-1])


def main() -> None:
    """Measure every mechanism that scans; one that counts no visits is named."""
    idle, _ = cost(None)
    found = {name: cost(name) for name in SCANNERS}
    visit = {name: (spent - idle) / visits for name, (spent, visits) in found.items() if visits}
    for name, (spent, visits) in found.items():
        if not visits:
            print(f"{name}: no visits in {spent:.2f} s")
            continue
        ratio = visit[name] / visit["ksm"]
        print(f"{name}: {visits:,} visits in {spent - idle:.2f} s, {1e9 * visit[name]:.0f} ns each")
        show(f"CPU of a visit: {name} / ksm", f"{ratio:.2f}", f"<= {BAR}", ratio <= BAR)


if __name__ == "__main__":
    main()
