"""overcommit: how many virtual machines fit on a host, what does it cost in CPU, and what breaks first?

The package in reading order; a file imports only from what stands above it.

    errors        what a user or a machine can get wrong, with exit codes
    units         "64GiB" to integers and back, and the strict base of every scenario block
    streams       one random stream per named thing
    engine        the program itself, by version and files, which names results
    document      strict YAML to checked blocks, with the place of every value
    columns       every table column and headline metric
    processes     processes of this machine that end with this one
    cluster       workers on other machines (Dask) that run this very program
    memory/       pages, frames and contents; huge pages; images; what guests write and when
    cost/         counted work to CPU time
    reclaim/      ways for pages to leave when memory is short: watermarks, LRU lists, swap
    sharing/      ways for equal pages to become one frame, a file for each; KSM, and who tunes it
    host          one machine over time
    scale         fewer pages, each for many
    datacenter/   many hosts, and the control plane that decides from their reports who runs where
    scenario/     the typed question
    results/      tables, summary, result folders
    sizing        what a run will take, known before it starts
    run           scenario in, result out
    study/        many runs: sweeps of one scenario, published figures of many
    report/       pictures and one self-contained page
    lab/          the real kernel
    cli/          the command line, a file per verb
    pytest_plugin  scenario files as tests of pytest
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim.lab.capture import capture
    from sim.lab.replay import replay
    from sim.lab.trial import live as compare
    from sim.results.swept import load
    from sim.run import Result, run
    from sim.scenario import Scenario, parse
    from sim.scenario import load as read
    from sim.sizing import estimate
    from sim.study import check, published, sweep

__all__ = [
    "Result",
    "Scenario",
    "capture",
    "check",
    "compare",
    "estimate",
    "load",
    "parse",
    "published",
    "read",
    "replay",
    "run",
    "sweep",
]

_HOMES = {
    "Result": ("sim.run", "Result"),
    "Scenario": ("sim.scenario", "Scenario"),
    "capture": ("sim.lab.capture", "capture"),
    "check": ("sim.study", "check"),
    "compare": ("sim.lab.trial", "live"),
    "estimate": ("sim.sizing", "estimate"),
    "load": ("sim.results.swept", "load"),
    "parse": ("sim.scenario", "parse"),
    "published": ("sim.study", "published"),
    "read": ("sim.scenario", "load"),
    "replay": ("sim.lab.replay", "replay"),
    "run": ("sim.run", "run"),
    "sweep": ("sim.study", "sweep"),
}


def __getattr__(name: str) -> Any:
    """Import a verb when it is first used: `overcommit --help` needs none of them."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'sim' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


class _Package(ModuleType):
    """The package; its verb `run` stays a verb when the module of that name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
