"""Daemons that turn KSM's knobs: ksmtuned and oVirt's MOM.

Source: the ksmtuned script of qemu-kvm (2018) and MOM's doc/ksm.rules (2025); both have the same constants.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from pydantic import Field, model_validator

from sim.errors import At
from sim.units import GIB, KIB, SECOND, Block, Duration


@dataclass(frozen=True)
class Usage:
    """What a tuner reads from its host, in bytes."""

    total: int
    free: int
    committed: int
    """Sum of the guests' resident set sizes; a page merged by KSM counts once for every guest."""


@dataclass(frozen=True)
class Choice:
    """What a tuner writes; None leaves a knob alone."""

    run: int
    pages_to_scan: int | None = None
    sleep_millisecs: int | None = None


class _Ramp(Block):
    """The rule that both daemons share."""

    npages_boost: int = Field(default=300, ge=0)
    """Pages added to pages_to_scan while memory is short (KSM_NPAGES_BOOST)."""
    npages_decay: int = Field(default=-50, le=0)
    """Pages added while it is not (KSM_NPAGES_DECAY)."""
    npages_min: int = Field(default=64, ge=1)
    """Least pages_to_scan (KSM_NPAGES_MIN)."""
    npages_max: int = Field(default=1250, ge=1)
    """Most pages_to_scan (KSM_NPAGES_MAX)."""
    sleep_msec: int = Field(default=10, ge=1)
    """sleep_millisecs of a host with 16 GiB; less memory sleeps longer (KSM_SLEEP_MSEC)."""
    thres_coef: int = Field(default=20, ge=0, le=100)
    """Memory is short below this percentage of it (KSM_THRES_COEF)."""
    thres_const: int = Field(default=2048, ge=0)
    """Memory is short below so many KiB at any rate (KSM_THRES_CONST)."""

    @model_validator(mode="after")
    def _ordered(self) -> _Ramp:
        if self.npages_min > self.npages_max:
            raise At("npages_min", "is above npages_max", f"write at most {self.npages_max}")
        return self

    def choose(self, usage: Usage, npages: int) -> tuple[Choice, int]:
        """Return what to write and the npages to remember; npages survives a stop."""
        threshold = max(usage.total * self.thres_coef // 100, self.thres_const * KIB)
        if usage.committed + threshold < usage.total and usage.free > threshold:
            return Choice(run=0), npages
        npages += self.npages_boost if usage.free < threshold else self.npages_decay
        npages = min(max(npages, self.npages_min), self.npages_max)
        sleep = max(self.sleep_msec * 16 * GIB // usage.total, 10)
        return Choice(run=1, pages_to_scan=npages, sleep_millisecs=sleep), npages


class Ksmtuned(_Ramp):
    """ksmtuned: looks at the host once a minute."""

    monitor_interval: Duration = Field(default=60 * SECOND, gt=0)
    """Time between two looks (KSM_MONITOR_INTERVAL)."""

    def start(self) -> Tuning:
        """Return the daemon at its start."""
        return Tuning(self, every=self.monitor_interval, looks=1, looks_at=1)


class Mom(_Ramp):
    """oVirt MOM: rules every 10 s on the average of the last samples of free memory, one each 5 s."""

    main_loop_interval: Duration = Field(default=5 * SECOND, gt=0)
    """Time between two samples."""
    policy_every: int = Field(default=2, ge=1)
    """Samples between two evaluations of the rules."""
    sample_history: int = Field(default=10, ge=1)
    """Samples averaged."""

    def start(self) -> Tuning:
        """Return the daemon at its start."""
        return Tuning(self, every=self.main_loop_interval, looks=self.sample_history, looks_at=self.policy_every)


@dataclass
class Tuning:
    """A running daemon."""

    rule: _Ramp
    every: int
    """Time between two looks, ns."""
    looks: int
    """Looks averaged."""
    looks_at: int
    """Looks from one decision to the next."""
    npages: int = 0
    _looked: int = 0
    _free: deque[int] = field(default_factory=deque)

    def look(self, usage: Usage) -> Choice | None:
        """Take a look at the host; returns what to write when it is time to decide."""
        self._free.append(usage.free)
        if len(self._free) > self.looks:
            self._free.popleft()
        self._looked += 1
        if self._looked % self.looks_at:
            return None
        free = sum(self._free) // len(self._free)
        choice, self.npages = self.rule.choose(Usage(usage.total, free, usage.committed), self.npages)
        return choice


TUNERS: Final = {"ksmtuned": Ksmtuned, "mom": Mom}
"""Every tuner by the key it has in a host."""
