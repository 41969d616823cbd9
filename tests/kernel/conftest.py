"""Tests marked `kernel` run the real KSM of this machine and are skipped, with the reason, where that is impossible."""

import pytest

from sim.errors import MachineError
from sim.lab.machine import check_abilities


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kernel") is None:
        return
    try:
        check_abilities()
    except MachineError as error:
        pytest.skip(str(error))
