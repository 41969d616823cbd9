"""What a visit to a page costs the simulator, by mechanism, against KSM: the same guests, all measured in one run.

The guests write to all parts of their memory, so that every mechanism has to look at pages. Memory in which nothing
changes costs KSM next to nothing: it sums up what its visits come to, which the others do not.

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
    "tps": {"version": "esx3", "ShareScanVM": 10000, "ShareScanTotal": 1000000},
    "xen": {"every": "10s"},
    "difference_engine": {"every": "4s"},
    "page_combining": {"every": "10s", "within": "host"},
    "mergemem": {"at": "10s", "every": "10s"},
}
"""A pace at which each visits pages often; one that is not here runs as it comes."""
DURATIONS = {"tps": "40min"}
"""ESX looks at random pages, one at a time, and takes longer to come by them all; 5 min for the others."""


def cost(name: str) -> tuple[float, int]:
    """CPU time (s) that a mechanism adds to a run, and the pages that it visited."""
    with_it, visits = measured(name)
    without, _ = measured(name, there=False)
    return with_it - without, visits


def measured(name: str, there: bool = True) -> tuple[float, int]:
    """CPU time (s) of a run as long as a mechanism needs, with it or without any, and the pages visited."""
    data = mix("visits", 4, DURATIONS.get(name, "5min"), memory=1 << 28)
    for part in data["vms"][0]["image"]["parts"]:
        if part["name"] in ("own", "os", "app"):
            part["writes"] = {"rate": "1/min"}
    data["hosts"][0] |= {"ksm": None} | ({name: SETTINGS.get(name, {})} if there else {})
    scenario = parse(data)
    run(scenario)  # compiled, and the caches are warm
    began = time.process_time()
    result = run(scenario)
    return time.process_time() - began, int(result.samples["pages_scanned"].iloc[-1])


def main() -> None:
    """Measure every mechanism that scans; one that counts no visits is named."""
    found = {name: cost(name) for name in SCANNERS}
    visit = {name: spent / visits for name, (spent, visits) in found.items() if visits}
    for name, (spent, visits) in found.items():
        if not visits:
            print(f"{name}: no visits in {spent:.2f} s")
            continue
        ratio = visit[name] / visit["ksm"]
        print(f"{name}: {visits:,} visits in {spent:.2f} s, {1e9 * visit[name]:.0f} ns each")
        show(f"CPU of a visit: {name} / ksm", f"{ratio:.2f}", f"<= {BAR}", ratio <= BAR)


if __name__ == "__main__":
    main()
