"""Everything that can be named in a scenario: what `overcommit list` shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def parts() -> Iterator[tuple[str, str, str]]:
    """Yield kind, name and meaning of everything that can be named in a scenario."""
    from sim.columns import METRICS
    from sim.cost import prices
    from sim.document import read
    from sim.scenario import presets
    from sim.sharing import MECHANISMS, Sharing
    from sim.sharing.tuners import TUNERS

    yield from (("mechanism", name, Sharing.model_fields[name].description or "") for name in MECHANISMS)
    yield from (("tuner", name, _first_line(tuner)) for name, tuner in TUNERS.items())
    yield from _kernels()
    yield from (("prices", name, _about_prices(name)) for name in prices.names())
    for kind, noun in presets.KINDS.items():
        yield from ((noun, name, presets.load(kind, name).about) for name in presets.names(kind))
    yield from (("metric", metric.name, metric.meaning) for metric in METRICS)
    for file in sorted(bundled_scenarios().glob("*.yaml")):
        yield "scenario", str(file), str(read(file).data.get("description", ""))


def _about_prices(name: str) -> str:
    """Return what a price set says of itself; one of the user's own may be wrong."""
    from sim.cost import prices
    from sim.errors import At

    try:
        return prices.load(name).about
    except At as fault:
        return str(fault)


def _first_line(block: type) -> str:
    return (block.__doc__ or "").partition("\n")[0]


def _kernels() -> Iterator[tuple[str, str, str]]:
    """Yield each kernel version with the names of what it changed."""
    from sim.sharing.kernels import KERNELS

    before = None
    for name, kernel in KERNELS.items():
        changed = [each for each in kernel._fields[1:] if before and getattr(before, each) != getattr(kernel, each)]
        about = f"changed {', '.join(changed)}" if changed else "behaves as the one before"
        yield "kernel", name, about if before else "the first with KSM"
        before = kernel


def bundled_scenarios() -> Path:
    """Return the folder of the scenarios: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "_scenarios"
    return installed if installed.is_dir() else package.parent / "scenarios"
