"""Tests marked `kernel` run the real KSM of this machine and are skipped, with the reason, where that is impossible."""

from collections.abc import Callable

import pytest

from sim.errors import MachineError
from sim.lab.machine import check_abilities

_FINDINGS = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="replace tests/kernel/recordings by live runs")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FINDINGS] = []


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints a line at the end of the test run: how far simulated times are from the kernel's."""
    return request.config.stash[_FINDINGS].append


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kernel") is None:
        return
    try:
        check_abilities()
    except MachineError as error:
        pytest.skip(str(error))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[_FINDINGS]:
        terminalreporter.section("simulated against measured")
        for line in config.stash[_FINDINGS]:
            terminalreporter.write_line(line)
