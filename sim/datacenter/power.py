"""Which hosts are on, off, booting or broken, and what they draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from sim.cost.power import STEPS
from sim.datacenter.demand import THOUSANDTHS
from sim.datacenter.messages import NEVER, Int64
from sim.host import Host
from sim.units import MILLISECOND

ON: Final = 0
OFF: Final = 1
BOOTING: Final = 2
FAILED: Final = 3

MICRO: Final = 1_000_000
"""Energy is counted in whole microjoules, power in microwatts."""


class Powered:
    """State and energy of every host; a host that boots draws what an idle one does, one that failed or is off none."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.state = np.full(len(hosts), ON, np.int8)
        self.ready = np.full(len(hosts), NEVER, np.int64)
        """When each host that boots or is repaired is on again (ns)."""
        self.cores = np.array([host.cores for host in hosts], np.int64)
        self.curves = np.array([host.power.curve if host.power else [0.0] * STEPS for host in hosts])
        self.known = all(host.power for host in hosts)
        """Whether every host says what it draws."""
        self.energy = np.zeros(len(hosts), np.int64)
        """Microjoules."""
        self.on_ns = np.zeros(len(hosts), np.int64)

    @property
    def on(self) -> npt.NDArray[np.bool_]:
        """Hosts that can run guests."""
        running: npt.NDArray[np.bool_] = self.state == ON
        return running

    @property
    def draws(self) -> npt.NDArray[np.bool_]:
        """Hosts that are on or boot."""
        powered: npt.NDArray[np.bool_] = (self.state == ON) | (self.state == BOOTING)
        return powered

    def wake(self, now: int) -> list[int]:
        """Hosts that have booted or are repaired come on; return them."""
        awake = np.flatnonzero(self.ready <= now)
        self.state[awake] = ON
        self.ready[awake] = NEVER
        return [int(host) for host in awake]

    def boot(self, host: int, ready: int) -> None:
        """A host is switched on."""
        self.state[host], self.ready[host] = BOOTING, ready

    def switch_off(self, host: int) -> None:
        """A host is switched off."""
        self.state[host], self.ready[host] = OFF, NEVER

    def fail(self, host: int, repaired: int) -> None:
        """A host fails."""
        self.state[host], self.ready[host] = FAILED, repaired

    def watts(self, asked: Int64, powered: npt.NDArray[np.bool_]) -> Int64:
        """What each powered host draws (microwatts) when its guests ask for so many thousandths of a core."""
        load = np.minimum(asked / (self.cores * THOUSANDTHS), 1.0) * (STEPS - 1)
        step = np.minimum(load.astype(np.int64), STEPS - 2)
        rows = np.arange(len(step))
        low, high = self.curves[rows, step], self.curves[rows, step + 1]
        drawn = np.rint((low + (high - low) * (load - step)) * MICRO).astype(np.int64)
        return np.where(powered, drawn, 0)

    def spend(self, watts: Int64, powered: npt.NDArray[np.bool_], span: int) -> None:
        """So much power is drawn for a time (ns)."""
        # Whole milliseconds: microwatts times ns would not fit 64 bits.
        self.energy += watts * (span // MILLISECOND) // 1000
        self.on_ns += np.where(powered, span, 0)
