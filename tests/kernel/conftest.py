"""Tests marked `kernel` run the real KSM of this machine and are skipped, with the reason, where that is impossible."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sim.errors import MachineError
from sim.lab.machine import check_abilities
from sim.lab.trial import ATTEMPTS

_FINDING = "simulated against measured"
_LOST_MS = 100
"""A test that fails while the machine's cores were elsewhere for so long says nothing about the kernel."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="replace tests/kernel/recordings by live runs")


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints a line at the end of the test run: how far simulated times are from the kernel's."""
    return lambda line: request.node.user_properties.append((_FINDING, line))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kernel") is None:
        return
    try:
        check_abilities()
    except MachineError as error:
        pytest.skip(str(error))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Repeat a live test whose failure other work on the machine explains, and skip it if that goes on."""
    if pyfuncitem.get_closest_marker("kernel") is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    for _ in range(ATTEMPTS):
        before = _lost_ms()
        try:
            pyfuncitem.obj(**arguments)
            return True
        except Exception:
            lost = _lost_ms() - before
            if lost < _LOST_MS:
                raise
    pytest.skip(f"this machine is too busy: {ATTEMPTS} runs failed, the last with its cores elsewhere for {lost} ms")


def _lost_ms() -> int:
    """Time for which the hypervisor had the cores, and in which this thread had to wait for one, in ms since boot."""
    ticks = int(Path("/proc/stat").read_text().split(maxsplit=9)[8])
    waited_ns = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    return ticks * 1000 // os.sysconf("SC_CLK_TCK") + waited_ns // 10**6


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [each for some in terminalreporter.stats.values() for each in some if isinstance(each, pytest.TestReport)]
    findings = [line for each in reports for name, line in each.user_properties if name == _FINDING]
    if findings:
        terminalreporter.section(_FINDING)
        for line in findings:
            terminalreporter.write_line(line)
