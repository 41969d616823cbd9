"""`overcommit lab calibrate`: measure what this machine's kernel takes for its work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sim.cli.console import Console, as_json, table
from sim.cli.options import talks

if TYPE_CHECKING:
    from sim.lab.calibrate import Calibration


@click.command()
@click.option("--name", help="Name of the price set; by default that of this machine, which then uses it by itself.")
@click.option("--out", type=click.Path(path_type=Path), help="Write this file instead of installing the set.")
@click.option("--quick", is_flag=True, help="Run everything once and not three times: less certain.")
@talks
@click.pass_obj
def calibrate(console: Console, name: str | None, out: Path | None, quick: bool) -> None:
    """Measure what ksmd, page faults, large pages, zram and swap cost on this machine, and keep it as a price set.

    It takes about five minutes (--quick two), in which the machine should do nothing else.
    """
    from sim.lab.calibrate import calibrate as measure
    from sim.lab.calibrate import destination, install
    from sim.lab.machine import check_abilities

    check_abilities()
    name, file = destination(name, out)
    with console.progress("calibrate") as progress:
        found = measure(name, quick, progress)
    install(found.prices, file)
    console.kept = file
    console.data(_calibration_json(found, file) if console.json else _calibration_text(found, file, console))


def _calibration_json(found: Calibration, file: Path) -> str:
    prices = found.prices.model_dump(mode="json", exclude_defaults=True)
    told = {"errors": dict(found.errors), "together": list(found.together), "missing": dict(found.missing)}
    return as_json({"file": str(file), "prices": prices, **told})


def _calibration_text(found: Calibration, file: Path, console: Console) -> str:
    """Return the prices, how far they can be trusted, what could not be measured, and last the file."""
    if console.quiet:
        return str(file)
    worst = max(found.errors, key=lambda name: abs(found.errors[name]))
    typical = sorted(map(abs, found.errors.values()))[len(found.errors) // 2]
    lines = [
        f"ksmd's CPU time in {len(found.errors)} workloads, each left out of the fit in turn: "
        f"typical error {typical:.1%}, worst {found.errors[worst]:+.1%} ({worst})",
        *(f"not told apart, only their sum is known well: {first} and {second}" for first, second in found.together),
        *(f"not measured: {section}: {reason}" for section, reason in found.missing.items()),
    ]
    return "\n\n".join([table(_price_rows(found)), "\n".join(lines), str(file)])


def _price_rows(found: Calibration) -> Iterator[Sequence[str]]:
    """Yield each price with its 95 % interval."""
    from sim.cost.prices import Price

    def figure(ns: float) -> str:
        return f"{ns:,.0f}" if ns >= 1000 else f"{ns:.3g}"

    def row(name: str, price: Price) -> Sequence[str]:
        interval = "" if price.low is None or price.high is None else f"{figure(price.low)} to {figure(price.high)}"
        return name, f"{figure(price.ns)} ns", interval

    prices = found.prices
    yield from (row(name, price) for name, price in prices if isinstance(price, Price))
    yield "cold_caches", f"{prices.cold_caches.factor:g}", ""
    for block in ("page_faults", "fork", "huge_pages", "paging", "swap"):
        found_prices = getattr(prices, block) or ()
        yield from (row(f"{block}.{name}", price) for name, price in found_prices if isinstance(price, Price))
    for access in prices.random_access:
        size = access.model_dump(mode="json")["working_set"]
        yield from (row(f"random access, {size}, {name}", getattr(access, name)) for name in ("small", "huge"))
    for algorithm, costs in prices.zram.items():
        yield from (row(f"zram {algorithm} {name}", price) for name, price in costs if isinstance(price, Price))
        yield f"zram {algorithm}", f"{costs.bytes_per_page:g} bytes a page", ""
