"""The scenario's block `datacenter`: who comes when, where guests may go, and what moves them later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from sim.datacenter.migration import Migration
from sim.datacenter.traces import Trace
from sim.document import by_key
from sim.errors import At, Several, suggestion
from sim.memory.guest import Vm
from sim.units import DAY, HOUR, MINUTE, SECOND, Block, Duration, Name, Rate, Share, format_duration

_MOST_AT_ONCE: Final = 10_000_000


class Fixed(Block):
    """All live equally long."""

    fixed: Duration = Field(gt=0)
    """How long each guest lives."""


class Exponential(Block):
    """Lifetimes without memory."""

    exponential: Duration = Field(gt=0)
    """Mean lifetime."""


class Lognormal(Block):
    """Lifetimes of which a few are very long."""

    lognormal: Duration = Field(gt=0)
    """Median lifetime."""
    sigma: float = Field(default=1.0, gt=0, le=10)
    """Standard deviation of the logarithm (natural) of the lifetime; the mean is the median times exp(sigma²/2)."""


Lifetime = Annotated[Fixed | Exponential | Lognormal, by_key(fixed=Fixed, exponential=Exponential, lognormal=Lognormal)]


class _Source(Block):
    """Where guests come from."""

    kind: Name
    """The entry of `vms` that the guests are of."""
    lifetime: Lifetime | None = None
    """How long they live; to the end of the run unless given."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The entries of `vms` that guests come from."""
        return (self.kind,)


class Poisson(_Source):
    """Guests that come one by one at random."""

    rate: Annotated[Rate, Field(gt=0)]
    """How often."""
    day: tuple[Annotated[float, Field(ge=0, le=1e6)], ...] = ()
    """Factors of that rate over the day, each for an equal part of it, the first from midnight, when the run starts;
    the same all day unless given."""
    start: Duration = 0
    """When the first may come."""
    stop: Duration | None = None
    """When no more come; the end of the run unless given."""

    @model_validator(mode="after")
    def _comes(self) -> Poisson:
        if self.day and not any(self.day):
            raise At("day", "has only zeros: nobody ever comes", "write at least one factor above 0")
        if self.stop is not None and self.stop <= self.start:
            raise At("stop", "must come after start", f"write more than {format_duration(self.start)}")
        return self


class Batch(_Source):
    """Many guests at one moment, once or again and again."""

    batch: int = Field(ge=1, le=_MOST_AT_ONCE)
    """How many at a time."""
    at: Duration = 0
    """First time."""
    every: Annotated[Duration, Field(gt=0)] | None = None
    """Time from one batch to the next; once only unless given."""


class BootStorm(_Source):
    """Many guests within a short time, such as desktops in the morning."""

    boot_storm: int = Field(ge=1, le=_MOST_AT_ONCE)
    """How many, at moments chosen at random."""
    within: Duration = Field(gt=0)
    """How long it takes until all have come."""
    at: Duration = 0
    """When it begins."""
    every: Annotated[Duration, Field(gt=0)] | None = None
    """Time from one storm to the next (1d for every morning); once only unless given."""

    @model_validator(mode="after")
    def _one_at_a_time(self) -> BootStorm:
        if self.every is not None and self.every < self.within:
            raise At("every", "begins the next storm before this one is over", "write the time of within or more")
        return self


Source = Annotated[
    Poisson | Batch | BootStorm | Trace, by_key(rate=Poisson, batch=Batch, boot_storm=BootStorm, path=Trace)
]


class Overcommit(Block):
    """How much more than it has a host may promise."""

    memory: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Memory promised to guests for each byte of the host's; 1 where admission is by what is promised, and otherwise no
    such limit, unless given."""
    cpu: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Virtual processors for each core of the host; no such limit unless given."""


class Admission(Block):
    """Which guests get in."""

    by: Literal["promised", "reported", "predicted"] = "promised"
    """What counts for a host's memory: what it promised to its guests; what it last reported as used; or the peak that
    its reports let expect, their mean and `sigmas` standard deviations (the N-sigma predictor of Bashir et al., "Take
    it to the Limit", EuroSys 2021). To a report comes the whole memory of what was placed since."""
    share: Share = 0.9
    """Share of a host's memory that may be used, by report or by prediction."""
    counts_own: bool = True
    """Whether what was placed since the last report counts. Without it many guests may be sent where one has room."""
    sigmas: float = Field(default=5.0, ge=0, le=100)
    """Standard deviations above the mean that a predicted peak is."""
    reports: int = Field(default=12, ge=2, le=10_000)
    """How many reports a prediction looks back on."""
    patience: Duration = 0
    """How long a guest that fits nowhere waits before it is refused; it is tried again at the start of each epoch."""

    @model_validator(mode="after")
    def _meant(self) -> Admission:
        meaning = {"share": ("reported", "predicted"), "counts_own": ("reported", "predicted"),
                   "sigmas": ("predicted",), "reports": ("predicted",)}  # fmt: skip
        faults = [
            At(name, f"means nothing for admission by {self.by}", f"write by: {where[-1]}, or remove it")
            for name, where in meaning.items()
            if self.by not in where and getattr(self, name) != type(self).model_fields[name].default
        ]
        if faults:
            raise Several(*faults)
        return self


class Hot(Block):
    """When a host has too much to do, so that guests leave it until it has not."""

    memory: Share | None = 0.95
    """Share of its memory that it reports as used; null for any."""
    swapped: Share | None = None
    """Guest memory that it reports as swapped out, as a share of its memory."""
    psi: Share | None = None
    """Share of the time between two reports for which some guest waited for memory."""
    cpu: Share | None = 0.8
    """Share of its cores that its guests ask for (0.8: the static threshold of Beloglazov & Buyya 2012); null for
    any."""
    local_regression: Annotated[float, Field(ge=1, le=10)] | None = None
    """In place of what the guests ask for now: what a line through the last ten epochs, the latest weighing most, says
    of the next epoch, times this (1.2 in CloudSim), against all cores."""
    select: Literal["minimum-migration-time", "smallest-sufficient"] = "minimum-migration-time"
    """Who leaves: the guests with the least memory first, until it is enough (Beloglazov & Buyya 2012); or the smallest
    guest that is enough by itself, if there is one."""

    @model_validator(mode="after")
    def _one_rule(self) -> Hot:
        if self.local_regression is not None and self.cpu is not None and self.cpu != 0.8:
            raise At("cpu", "local_regression takes the place of a threshold", "remove one of them")
        return self


class Migrations(Migration):
    """Live migration: how fast, how many at a time, and for which reason."""

    per_host: int = Field(default=2, ge=1, le=1000)
    """Most moves under way that leave or enter one host."""
    in_all: int = Field(default=100, ge=1, le=1_000_000)
    """Most moves under way."""
    hot: Hot | None = None
    """Relieve hosts that have too much to do; never unless given."""


class Consolidation(Block):
    """Empty the least loaded hosts and switch them off; switch hosts on when guests find no room."""

    begin: Duration = Field(default=0, lt=DAY)
    """Time of day from which hosts are emptied."""
    end: Duration = Field(default=DAY, gt=0, le=DAY)
    """Time of day until which; before `begin` for a night. The run starts at midnight."""
    every: Duration = Field(default=HOUR, gt=0)
    """Time from one look at all hosts to the next."""
    boot_time: Duration = 3 * MINUTE
    """How long a host takes to boot."""
    spare_hosts: int = Field(default=0, ge=0, le=100_000)
    """Empty hosts that stay on."""

    def holds_at(self, time: int) -> bool:
        """Whether hosts are emptied at a moment of the run (ns)."""
        clock = time % DAY
        if self.begin < self.end:
            return self.begin <= clock < self.end
        return clock >= self.begin or clock < self.end


class Happening(Block):
    """Something that happens to a host."""

    host: str
    """Name of the host."""
    at: Duration
    """When."""


class Evacuation(Happening):
    """All guests leave a host, for maintenance: from then on it takes none and sends away those that it has."""

    until: Duration | None = None
    """When it takes guests again; never unless given."""

    @model_validator(mode="after")
    def _ordered(self) -> Evacuation:
        if self.until is not None and self.until <= self.at:
            raise At("until", "must come after at", f"write more than {format_duration(self.at)}")
        return self


class Failures(Block):
    """Hosts that fail, and what becomes of their guests."""

    hosts: tuple[Happening, ...] = ()
    """Which fail when."""
    mtbf: Annotated[Duration, Field(gt=0)] | None = None
    """Mean time between failures of a host, exponentially distributed; none at random unless given."""
    repair: Duration = Field(default=HOUR, gt=0)
    """How long a host that failed takes to come back."""
    detection: Duration = MINUTE
    """How long it takes until its guests are known to be gone."""
    restart: bool = True
    """Start its guests again on other hosts, for what is left of their lives; otherwise they are lost."""


class Datacenter(Block):
    """A control plane that places guests on hosts, and moves them later."""

    epoch: Duration = Field(default=5 * MINUTE, ge=SECOND)
    """Time from one decision to the next; guests that come in between go where the last one saw room."""
    report_every: Annotated[Duration, Field(gt=0)] | None = None
    """Time from one report of every host to the next; an epoch unless given."""
    arrivals: tuple[Source, ...] = ()
    """Guests that come during the run; those of kinds that are not named here come as their entry of `vms` says."""
    placement: Literal[
        "first-fit", "best-fit", "worst-fit", "dot-product", "sharing-aware", "random"
    ] = "first-fit"  # fmt: skip
    """On which of the hosts with room a guest starts, hosts being in the order of their names: the first; that with the
    least memory left, or the most; that whose free memory and CPU point the same way as what the guest wants (the dot
    product of Panigrahy et al., "Heuristics for Vector Bin Packing", 2011); that which holds most of the guest's
    contents already (Wood et al., "Memory Buddies", VEE 2009), of several that with the most memory left, so that
    guests with nothing in common part (a choice of this project); or any."""
    overcommit: Overcommit = Overcommit()
    """How much more than it has a host may promise."""
    admission: Admission = Admission()
    """Which guests get in."""
    migration: Migrations = Migrations()
    """Live migration."""
    consolidation: Consolidation | None = None
    """Switch off hosts that are not needed; all stay on unless given."""
    evacuations: tuple[Evacuation, ...] = ()
    """Hosts that are emptied for maintenance."""
    failures: Failures | None = None
    """Hosts that fail; none unless given."""

    @property
    def report_period(self) -> int:
        """Time (ns) from one report to the next."""
        return self.report_every or self.epoch

    @property
    def traces(self) -> tuple[Trace, ...]:
        """Sources that are traces."""
        return tuple(source for source in self.arrivals if isinstance(source, Trace))

    def faults(self, hosts: Sequence[str], vms: Sequence[Vm], duration: int) -> Iterator[At]:
        """What it says of hosts, kinds of guest and moments that the scenario does not have."""
        kinds = {vm.name: vm for vm in vms}
        for i, source in enumerate(self.arrivals):
            for j, kind in enumerate(source.kinds):
                if kind not in kinds:
                    path = f"kinds.{j}" if isinstance(source, Trace) else "kind"
                    yield At(f"arrivals.{i}.{path}", "no such kind of guest", suggestion(kind, kinds))
            if isinstance(source, Trace):
                taken = {*kinds, *(each.prefix for each in self.arrivals[:i] if isinstance(each, Trace))}
                if source.prefix in taken:
                    yield At(f"arrivals.{i}.name", f"guests called {source.prefix}-0 come already", "give another name")
        failing = self.failures.hosts if self.failures else ()
        happenings: tuple[tuple[str, Sequence[Happening]], ...]
        happenings = ("evacuations", self.evacuations), ("failures.hosts", failing)
        for path, entries in happenings:
            for i, entry in enumerate(entries):
                if entry.host not in hosts:
                    yield At(f"{path}.{i}.host", "no such host", suggestion(entry.host, hosts))
                if entry.at >= duration:
                    remedy = f"the run ends at {format_duration(duration)}: make duration longer or this earlier"
                    yield At(f"{path}.{i}.at", "is after the end of the run", remedy)

    @model_validator(mode="after")
    def _consistent(self) -> Datacenter:
        if faults := list(self._faults()):
            raise Several(*faults)
        return self

    def _faults(self) -> Iterator[At]:
        if self.report_period % self.epoch:
            whole = -(-self.report_period // self.epoch) * self.epoch
            yield At("report_every", "must be a whole number of epochs", f"write {format_duration(whole)}")
        if self.placement == "dot-product" and self.overcommit.cpu is None:
            yield At("placement", "dot-product weighs memory and CPU, and CPU has no limit", "set overcommit.cpu")
