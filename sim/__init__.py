"""overcommit: how many virtual machines fit on a host, what does it cost in CPU, and what breaks first?

The package in reading order; a file imports only from what stands above it.

    errors        what a user or a machine can get wrong, with exit codes
    limits        memory and processors that this process may use, whatever the machine has
    files         files that are there whole or not at all
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
    from sim.lab.calibrate import calibrate
    from sim.lab.capture import capture
    from sim.lab.machine import restore
    from sim.lab.replay import replay
    from sim.lab.trial import live as trial
    from sim.report import save
    from sim.results.swept import load
    from sim.run import Result, run
    from sim.scenario import Scenario, parse, schema
    from sim.scenario import load as read
    from sim.scenario.parts import parts
    from sim.sizing import estimate
    from sim.study import check, published, sweep
    from sim.study.frames import compare, explain, solve, trace

__all__ = [
    "Result",
    "Scenario",
    "calibrate",
    "capture",
    "check",
    "compare",
    "estimate",
    "explain",
    "load",
    "parse",
    "parts",
    "published",
    "read",
    "replay",
    "restore",
    "run",
    "save",
    "schema",
    "solve",
    "sweep",
    "trace",
    "trial",
]

_HOMES = {
    "Result": ("sim.run", "Result"),
    "Scenario": ("sim.scenario", "Scenario"),
    "calibrate": ("sim.lab.calibrate", "calibrate"),
    "capture": ("sim.lab.capture", "capture"),
    "check": ("sim.study", "check"),
    "compare": ("sim.study.frames", "compare"),
    "estimate": ("sim.sizing", "estimate"),
    "explain": ("sim.study.frames", "explain"),
    "load": ("sim.results.swept", "load"),
    "parse": ("sim.scenario", "parse"),
    "parts": ("sim.scenario.parts", "parts"),
    "published": ("sim.study", "published"),
    "read": ("sim.scenario", "load"),
    "replay": ("sim.lab.replay", "replay"),
    "restore": ("sim.lab.machine", "restore"),
    "run": ("sim.run", "run"),
    "save": ("sim.report", "save"),
    "schema": ("sim.scenario", "schema"),
    "solve": ("sim.study.frames", "solve"),
    "sweep": ("sim.study", "sweep"),
    "trace": ("sim.study.frames", "trace"),
    "trial": ("sim.lab.trial", "live"),
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
