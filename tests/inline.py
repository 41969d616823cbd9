"""Studies whose runs are done in this process, where starting others would take most of the time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from sim.study import sweeps


@pytest.fixture(autouse=True, scope="module")
def inline() -> Iterator[None]:
    """Do the runs here, one after the other."""

    def run_all(do: Callable[[Any], Any], tasks: Sequence[Any], jobs: int) -> Iterator[tuple[int, Any]]:
        return enumerate(map(do, tasks))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "run_all", run_all)
        yield
