"""A scenario: one question, assembled from the blocks of the parts it asks about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from sim import streams
from sim.columns import METRICS, Window
from sim.datacenter.blocks import Datacenter
from sim.document import Document, dump, in_order, read
from sim.errors import At, Problem, Several, UserError, suggestion
from sim.host import Assignment, Host
from sim.memory.guest import Vm
from sim.memory.image import Captured, Synthetic, Writes, pages_of
from sim.scale import MOST, has_huge_pages, samples_of, shrunk_host, shrunk_vm, too_few_pages
from sim.scenario import presets
from sim.scenario.expect import ExpectationText, Tolerance, Verdict
from sim.scenario.extends import EXTENDS, extended
from sim.scenario.points import DERIVED, Axes, Point, expand
from sim.scenario.published import Claim, Figure, claims
from sim.units import GIB, MINUTE, SECOND, Block, Bytes, Duration, Name, format_bytes, format_duration

_SCALES = [1 << power for power in range(MOST.bit_length())]
_MOST_SAMPLES = 10_000_000
_MOST_REPEATS = 10_000_000
_MOST_CLASSES = 65_535
_MOST_REPLICATIONS = 1_000
_JUDGING = ("expect", "warn", "tolerances")
"""What a run is judged by and does not depend on."""
_METRICS = {metric.name: metric for metric in METRICS}


def _parse_scale(value: object) -> object:
    if value == "auto" or (type(value) is int and value in _SCALES):
        return value
    raise At("", f"must be a power of two from 1 to {MOST:,}, or auto", "write 64, or auto")


Scale = Annotated[
    int | Literal["auto"],
    BeforeValidator(_parse_scale, json_schema_input_type=Annotated[int, Field(ge=1, le=MOST)] | Literal["auto"]),
]
"""How many pages a simulated page stands for."""


class Budget(Block):
    """What a run may take, for `scale: auto`, by the estimate of `overcommit explain`."""

    memory: Bytes = Field(default=4 * GIB, gt=0)
    """Memory of this machine."""
    cpu: Duration = Field(default=10 * MINUTE, gt=0)
    """CPU time of this machine."""


class Scenario(Block):
    """One question to the simulator."""

    name: Name
    """Name, and folder of the results."""
    extends: str | None = Field(default=None, exclude=True)
    """Another scenario file, in the folder of this one or below: what it says holds where this one says nothing. Blocks
    are merged key by key and lists of blocks by `name`. Images, traces and prices are looked for from this file."""
    description: str = ""
    """The question in words."""
    duration: Duration = Field(default=10 * MINUTE, gt=0)
    """Simulated time."""
    seed: int = Field(default=1, ge=0, lt=1 << 63)
    """Seed of every random stream."""
    sample_every: Duration = Field(default=SECOND, gt=0)
    """Simulated time between two samples. The samples of a datacenter are its hosts' reports (datacenter.report_every),
    whatever this says."""
    scale: Scale = 1
    """How many pages each simulated page stands for: a power of two, or auto for the least that keeps the budget. A run
    at scale 64 takes about 1/64 of the time and memory; the report says how far its figures may be off."""
    phases: dict[str, Duration] = Field(default_factory=dict)
    """When each phase of the run begins, by name and in order of time: the report of a sweep over alternatives tells
    them apart."""
    hosts: tuple[Host, ...] = Field(min_length=1)
    """Kinds of host."""
    vms: tuple[Vm, ...] = Field(min_length=1)
    """Kinds of guest."""
    datacenter: Datacenter | None = None
    """A control plane that places guests on hosts as they come; unless given, guests are spread in turn beforehand."""
    budget: Budget = Budget()
    """What the run may take if scale is auto."""
    warmup: Duration = 0
    """What the metrics leave out at the beginning: counters count from here on."""
    measure: Duration | None = Field(default=None, gt=0)
    """How long the metrics look after that; to the end of the run unless given."""
    replications: int = Field(default=1, ge=1, le=_MOST_REPLICATIONS)
    """How often `overcommit sweep`, `check`, `solve` and `compare` run it, each time with another seed that follows
    from `seed`: metrics are means then, with intervals."""
    expect: tuple[ExpectationText, ...] = ()
    """What must hold at the end: metric, comparison, value."""
    warn: tuple[ExpectationText, ...] = ()
    """What should hold and is only told if it does not."""
    tolerances: dict[str, str | float] = Field(default_factory=dict)
    """By how much a metric may differ before `overcommit check --baseline` and `compare` mind: a share ("1%") or an
    amount in its unit; 0 unless given, for the same scenario gives the same bits."""
    sweep: Axes | tuple[Axes, ...] = Field(default_factory=dict)
    """For `overcommit sweep`: paths, as in `--set`, and the values each takes, in every combination; an axis of
    alternatives has a name of its own, and under each alternative's name the paths that it sets. Or a list of such
    blocks, one after the other."""
    published: tuple[Figure, ...] = ()
    """For `overcommit published`: what others measured, to which the runs are held."""

    _points: tuple[Point[Scenario], ...] = PrivateAttr(default=())
    _claims: tuple[Claim[Scenario], ...] = PrivateAttr(default=())

    @classmethod
    def completed(cls, document: Document) -> tuple[Document, list[Problem]]:
        """The document with what its presets say, and the presets that do not exist."""
        return presets.filled(document)

    @property
    def points(self) -> Sequence[Point[Scenario]]:
        """What `sweep` makes of this scenario, in order, the last path changing fastest."""
        return self._points

    @property
    def claims(self) -> Sequence[Claim[Scenario]]:
        """The published figures, each with the scenarios to run for it."""
        return self._claims

    def resolved(self) -> dict[str, Any]:
        """The scenario as plain data, every default written out."""
        data: dict[str, Any] = self.model_dump(mode="json")
        return data

    def digest(self, version: str) -> str:
        """Name of a result: 12 hexadecimal digits of all that a run depends on, files and the program's version too."""
        asked = {key: value for key, value in self.resolved().items() if key not in (*DERIVED, *_JUDGING)}
        told = blake2b(f"{version}\n{dump(asked)}".encode(), digest_size=6)
        for image in self.captured():
            told.update(image.path.read_bytes())
        for trace in self.datacenter.traces if self.datacenter else ():
            told.update(trace.digest())
        for host in self.hosts:
            told.update(host.price_set.model_dump_json().encode())
        return told.hexdigest()

    def shrunk(self, scale: int, sampled: bool = True) -> Scenario:
        """The scenario with hosts and guests each of whose pages stands for so many; *sampled* reads captured images
        to take samples of them.
        """
        if scale == 1:
            return self
        samples = samples_of(self.vms, scale) if sampled else {}
        hosts = tuple(shrunk_host(host, scale) for host in self.hosts)
        vms = tuple(
            shrunk_vm(vm, scale, samples, any(has_huge_pages(host, vm) for host in self._hosts_of(vm)))
            for vm in self.vms
        )
        return self.model_copy(update={"scale": 1, "hosts": hosts, "vms": vms})

    def largest_scale(self) -> int:
        """The largest scale that leaves every guest enough pages."""
        scale = MOST
        while scale > 1 and self._too_few_pages(scale):
            scale //= 2
        return scale

    def _too_few_pages(self, scale: int) -> str:
        """What a scale leaves the first guest that has too little left, or nothing."""
        for i, vm in enumerate(self.vms):
            for host in self._hosts_of(vm):
                if said := too_few_pages(host, vm, scale):
                    return f"leaves the guests of vms.{i} {said}"
        return ""

    def _scale(self) -> Iterator[At]:
        if self.scale == "auto":
            return
        if self.budget != Budget():
            yield At("budget", "means nothing unless scale is auto", "write scale: auto, or remove it")
        if said := self._too_few_pages(self.scale):
            yield At("scale", said, f"write {self.largest_scale()} or less")

    @property
    def sampling(self) -> int:
        """Time (ns) from one sample to the next."""
        return self.datacenter.report_period if self.datacenter else self.sample_every

    @property
    def window(self) -> Window | None:
        """What the metrics are about, if that is not the whole run."""
        end = self.duration if self.measure is None else self.warmup + self.measure
        return Window(self.warmup, end) if (self.warmup, end) != (0, self.duration) else None

    @property
    def runs(self) -> Sequence[Scenario]:
        """The replications: the scenario itself, and then with seeds of their own. The seeds follow from `seed` alone,
        so that alternatives meet the same random numbers."""
        seeds = (streams.key(self.seed, "replication", number) >> 1 for number in range(1, self.replications))
        once = self.model_copy(update={"replications": 1})
        return [once, *(once.model_copy(update={"seed": seed}) for seed in seeds)]

    def judge(self, summary: Mapping[str, int | float | None]) -> list[Verdict]:
        """What becomes of every expectation: those that must hold, then those that should."""
        must = [each.check(summary) for each in self.expect]
        return must + [each.check(summary, "warning") for each in self.warn]

    def tolerance(self, metric: str) -> Tolerance:
        """How far a metric may move."""
        return Tolerance.parse(self.tolerances[metric], _METRICS[metric]) if metric in self.tolerances else Tolerance()

    def captured(self) -> Iterator[Captured]:
        """Captured images, each file once."""
        images = {vm.content.path: vm.content for vm in self.vms if not vm.fork_of and isinstance(vm.content, Captured)}
        yield from images.values()

    def host_names(self) -> list[tuple[Host, str]]:
        """Every host of the run with its kind."""
        return [(host, name) for host in self.hosts for name in host.names()]

    def assignments(self) -> Mapping[str, Sequence[Assignment]]:
        """Guests of each host by its name: a kind with a `host` goes there, the others in turn."""
        names = [name for _, name in self.host_names()]
        kinds = {host.name: host.names() for host in self.hosts}
        found: dict[str, list[Assignment]] = {name: [] for name in names}
        turn = 0
        for vm in self.vms:
            for number, (start, stop) in enumerate(vm.lives(self.duration)):
                if start > self.duration:
                    break
                if vm.host is None:
                    name = names[turn % len(names)]
                    turn += 1
                else:
                    targets = kinds.get(vm.host, [vm.host])
                    name = targets[number % len(targets)]
                found[name].append(Assignment(vm, f"{vm.name}-{number}", number, start, stop))
        return found

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        faults = [*self._names(), *self._references(), *self._forks(), *self._writes(), *self._times()]
        faults += [*self._fleet(), *self._scale(), *self._window_faults(), *self._tolerance_faults()]
        if faults:
            raise Several(*faults)
        return self

    def _names(self) -> Iterator[At]:
        for field, items in (("hosts", self.hosts), ("vms", self.vms)):
            names = [item.name for item in items]
            for i, name in enumerate(names):
                if name in names[:i]:
                    yield At(f"{field}.{i}.name", f"another entry is named {name} already", "choose another name")

    def _references(self) -> Iterator[At]:
        hosts = [host.name for host in self.hosts] + [name for _, name in self.host_names()]
        nodes = max(host.numa_nodes for host in self.hosts)
        mechanisms = {id(host): tuple(host.mechanisms.values()) for host in self.hosts}
        for i, vm in enumerate(self.vms):
            if vm.host is not None and vm.host not in hosts:
                yield At(f"vms.{i}.host", "no such host", suggestion(vm.host, hosts))
            if vm.numa_node is not None and vm.numa_node >= nodes:
                most = f"write 0 to {nodes - 1}" if nodes > 1 else "set numa_nodes of the host"
                yield At(f"vms.{i}.numa_node", "no host has a node of that number", most)

            if vm.huge_pages == "hugetlbfs":
                yield from (_below(f"vms.{i}", fault) for fault in self._pool_faults(vm))
            for host in self._hosts_of(vm):
                for settings in mechanisms[id(host)]:
                    yield from (_below(f"vms.{i}", fault) for fault in settings.guest_faults(vm))
            if vm.balloon and not any(host.balloon for host in self._hosts_of(vm)):
                yield At(f"vms.{i}.balloon", "no host has rules that fill balloons", "give the host balloon: {}")
        pools = {
            part.pool for vm in self.vms if isinstance(vm.image, Synthetic) for part in vm.image.parts if part.pool
        }
        for i, host in enumerate(self.hosts):
            for name in host.saved_segments.segments if host.saved_segments else ():
                if name not in pools:
                    path = f"hosts.{i}.saved_segments.segments.{name}"
                    yield At(path, "no part has this pool", suggestion(name, sorted(pools)))
            if host.balloon and not any(vm.balloon and host in self._hosts_of(vm) for vm in self.vms):
                yield At(f"hosts.{i}.balloon", "no guest here has a balloon", "give guests balloon: {}")

    def _hosts_of(self, vm: Vm) -> Iterator[Host]:
        """Kinds of host that the guest may run on."""
        if vm.host is None:
            yield from self.hosts
        else:
            yield from (host for host in self.hosts if vm.host == host.name or vm.host in host.names())

    def _pool_faults(self, vm: Vm) -> Iterator[At]:
        """What keeps the guest from having its memory in hugetlbfs, on any host it may run on."""
        for host in self._hosts_of(vm):
            if host.hugetlbfs is None:
                yield At("huge_pages", f"host {host.name} has no hugetlbfs", "give the host hugetlbfs.nr_hugepages")
            elif vm.memory % (page := host.hugetlbfs.page_bytes):
                whole = format_bytes(-(-vm.memory // page) * page)
                yield At("memory", f"must be whole pages of {host.hugetlbfs.size}", f"write {whole}")
            elif vm.memory > host.hugetlbfs.bytes:
                remedy = f"set hugetlbfs.nr_hugepages to {vm.memory // page} or more"
                yield At("memory", f"is more than the hugetlbfs of host {host.name}", remedy)

    def _forks(self) -> Iterator[At]:
        kinds = {vm.name: vm for vm in self.vms}
        for i, vm in enumerate(self.vms):
            if vm.fork_of is None:
                continue
            lineage = self._lineage(vm, kinds)
            parent = kinds.get(vm.fork_of)
            if parent is None or parent is vm:
                others = [name for name in kinds if name != vm.name]
                remedy = suggestion(vm.fork_of, others) if others else "describe the parent as another entry of vms"
                yield At(f"vms.{i}.fork_of", "no such other kind of guest", remedy)
            elif lineage[-1].fork_of in {each.name for each in lineage}:
                yield At(f"vms.{i}.fork_of", "forks that go round in a circle", "give one of them an image instead")
            elif parent.huge_pages == "hugetlbfs":
                yield At(f"vms.{i}.fork_of", "memory of hugetlbfs is not forked", "let the parent have small pages")
            elif parent.memory != vm.memory:
                yield At(f"vms.{i}.memory", "must be its parent's memory", f"write {format_bytes(parent.memory)}")
            elif parent.kernel != vm.kernel:
                yield At(f"vms.{i}.kernel", "must be its parent's", f"write {parent.kernel}")
            elif parent.start > vm.start:
                remedy = f"write {format_duration(parent.start)} or more"
                yield At(f"vms.{i}.start", "comes before the parent starts", remedy)
            elif lineage[-1].fork_of is None:
                yield from (_below(f"vms.{i}", fault) for fault in vm.part_faults(lineage[-1].content))

    def _fleet(self) -> Iterator[At]:
        """What a control plane cannot do with these guests and hosts."""
        if self.datacenter is None:
            return
        for i, vm in enumerate(self.vms):
            if vm.fork_of:
                remedy = "describe it as a guest of its own, or remove datacenter"
                yield At(f"vms.{i}.fork_of", "a control plane places guests, not forks", remedy)
            domains = [host.domain_of(vm, vm.name) for host in self.hosts]
            if len(set(domains)) > 1:
                yield At("hosts", f"keep the guests of vms.{i} apart in different ways", "give all one shares_between")
            elif self.hosts[0].domain_of(vm, "another") != domains[0]:
                said = "share with no guest but themselves on these hosts, and may move"
                yield At(f"vms.{i}", said, "give them a tenant, or the hosts shares_between: all")
            if vm.huge_pages == "hugetlbfs":
                yield At(f"vms.{i}.huge_pages", "a control plane does not count hugetlbfs", "write madvise or none")
            largest = max((host.memory for host in self._hosts_of(vm)), default=vm.memory)
            if vm.memory > largest:
                remedy = f"write {format_bytes(largest)} or less, or give a host more"
                yield At(f"vms.{i}.memory", "is more than any host has that it may run on", remedy)
        named = {kind for source in self.datacenter.arrivals for kind in source.kinds}
        for i, vm in enumerate(self.vms):
            for field in ("count", "start", "every"):
                if vm.name in named and getattr(vm, field) != Vm.model_fields[field].default:
                    yield At(f"vms.{i}.{field}", "these guests come as datacenter.arrivals says", "remove it")
        hosts = [name for _, name in self.host_names()]
        for fault in self.datacenter.faults(hosts, self.vms, self.duration):
            yield _below("datacenter", fault)

    def _lineage(self, vm: Vm, kinds: Mapping[str, Vm]) -> list[Vm]:
        """The kind of guest, its parent, the parent's parent and so on, each once."""
        lineage = [vm]
        while (parent := kinds.get(lineage[-1].fork_of or "")) is not None and parent not in lineage:
            lineage.append(parent)
        return lineage

    def _writes(self) -> Iterator[At]:
        """Writes that leave the contents of a pool that no image has, and too many different rates."""
        images = {i: vm.image for i, vm in enumerate(self.vms) if isinstance(vm.image, Synthetic)}
        pools = {part.pool for image in images.values() for part in image.parts if part.pool}
        for i, image in images.items():
            for j, part in enumerate(image.parts):
                if part.writes and part.writes.leaves not in {"unique", "zero", *pools}:
                    remedy = suggestion(part.writes.leaves, ["unique", "zero", *sorted(pools)])
                    yield At(f"vms.{i}.image.parts.{j}.writes.leaves", "no part has this pool", remedy)
        accesses = (
            (kind, pages_of(part.size, self.vms[i].pages))
            for i, image in images.items()
            for part in image.parts
            for kind in (part.writes, part.reads)
            if kind
        )
        rates = {(kind, rate) for kind, pages in accesses for _, rate in kind.pieces(pages)}
        to_pools = sum(isinstance(kind, Writes) and kind.leaves in pools for kind, _ in rates)
        domains = self._most_domains() if to_pools and not any(self._references()) else 1
        if len(rates) + to_pools * (domains - 1) > _MOST_CLASSES:
            apart = f", {domains:,} domains counted each by itself" if domains > 1 else ""
            yield At("vms", f"more than {_MOST_CLASSES:,} different rates{apart}", "give parts the same rate")

    def _most_domains(self) -> int:
        """Most domains (`Host.domain_of`) among the guests of one host."""
        assignments = self.assignments()
        return max(len({host.domain_of(each.vm, each.name) for each in assignments[name]})
                   for host, name in self.host_names())  # fmt: skip

    def _times(self) -> Iterator[At]:
        if self.duration // self.sampling > _MOST_SAMPLES:
            remedy = f"write {format_duration(-(-self.duration // _MOST_SAMPLES))} or more"
            path = "datacenter.report_every" if self.datacenter else "sample_every"
            yield At(path, f"makes more than {_MOST_SAMPLES:,} samples", remedy)
        before = -1
        for name, begin in self.phases.items():
            if begin <= before:
                remedy = f"write more than {format_duration(before)}, or put it before"
                yield At(f"phases.{name}", "does not begin after the phase above it", remedy)
            yield from self._too_late(f"phases.{name}", begin)
            before = begin
        for i, host in enumerate(self.hosts):
            for j, change in enumerate(host.ksm.changes if host.ksm else ()):
                yield from self._too_late(f"hosts.{i}.ksm.changes.{j}.at", change.at)
            if host.ksmtuned:
                yield from self._too_often(f"hosts.{i}.ksmtuned.monitor_interval", host.ksmtuned.monitor_interval)
            if host.balloon:
                path = f"hosts.{i}.balloon.main_loop_interval"
                yield from self._too_often(path, host.balloon.main_loop_interval)
            if host.mom:
                yield from self._too_often(f"hosts.{i}.mom.main_loop_interval", host.mom.main_loop_interval)
        for i, vm in enumerate(self.vms):
            yield from (_below(f"vms.{i}", fault) for fault in self._times_of(vm))

    def _window_faults(self) -> Iterator[At]:
        """Ends of the window at which there is no sample, so that nobody knows what the counters were."""
        end = self.warmup + (self.measure or 0)
        if self.warmup >= self.duration:
            yield At("warmup", "leaves nothing of the run", f"write less than {format_duration(self.duration)}")
        elif end > self.duration:
            most = format_duration(self.duration - self.warmup)
            yield At("measure", "goes on after the end of the run", f"write {most} or less, or make duration longer")
        for name, time in (("warmup", self.warmup), ("measure", end)):
            if time % self.sampling and time < self.duration and getattr(self, name):
                yield At(name, "does not end at a sample", f"write a multiple of {format_duration(self.sampling)}")

    def _tolerance_faults(self) -> Iterator[At]:
        for name, given in self.tolerances.items():
            if name not in _METRICS:
                yield At(f"tolerances.{name}", "unknown metric", suggestion(name, _METRICS))
                continue
            try:
                Tolerance.parse(given, _METRICS[name])
            except At as fault:
                yield At(f"tolerances.{name}", fault.message, fault.remedy)

    def _times_of(self, vm: Vm) -> Iterator[At]:
        if vm.start > self.duration:
            yield from self._too_late("start", vm.start)
            return
        if vm.start + (vm.count - 1) * vm.every > self.duration:
            fitting = (self.duration - vm.start) // vm.every + 1
            yield At("count", f"only {fitting} of these guests start before the end of the run",
                     f"write {fitting}, a shorter every or a longer duration")  # fmt: skip
        for i, burst in enumerate(vm.bursts):
            yield from self._too_late(f"bursts.{i}.at", vm.start + burst.at)
            yield from self._too_often(f"bursts.{i}.every", burst.every or self.duration)
        for i, advice in enumerate(vm.madvise):
            yield from self._too_late(f"madvise.{i}.at", vm.start + advice.at)
        if vm.activity:
            yield from self._too_often("activity.every", vm.activity.every)

    def _too_late(self, path: str, moment: int) -> Iterator[At]:
        if moment > self.duration:
            remedy = f"the run ends at {format_duration(self.duration)}: make duration longer or this earlier"
            yield At(path, "is after the end of the run", remedy)

    def _too_often(self, path: str, every: int) -> Iterator[At]:
        if self.duration // every > _MOST_REPEATS:
            remedy = f"write {format_duration(-(-self.duration // _MOST_REPEATS))} or more"
            yield At(path, f"happens more than {_MOST_REPEATS:,} times in the run", remedy)


def _below(path: str, fault: At) -> At:
    """The same fault, of a block at *path*."""
    return At(f"{path}.{fault.path}", fault.message, fault.remedy)


def load(path: str | Path, overrides: Sequence[str] = (), seed: int | None = None) -> Scenario:
    """Read a scenario file; overrides are "path=value". Raises UserError with every mistake found."""
    document = extended(read(path))
    for override in overrides:
        document = document.override(override)
    return _checked(document if seed is None else document.override(f"seed={seed}"))


def parse(data: Mapping[str, Any], folder: str | Path = ".") -> Scenario:
    """Read a scenario from plain data; paths in it are relative to *folder*. Raises UserError."""
    document = Document(str(Path(folder, "")), dict(data))
    return _checked(extended(document, folder), folder)


def _checked(document: Document, folder: str | Path | None = None) -> Scenario:
    context = {"folder": str(folder if folder is not None else document.folder)}
    try:
        scenario = document.check(Scenario, **context)
    except UserError as error:
        raise UserError(*in_order([*error.problems, *_faulty_points(document, error, context)])) from None
    # The only moment at which the frozen block may still change.
    scenario._points = tuple(expand(document, scenario.sweep, Scenario, **context))
    scenario._claims = tuple(claims(document, scenario.published, Scenario, **context))
    return scenario


def _faulty_points(document: Document, error: UserError, context: Mapping[str, str]) -> Sequence[Problem]:
    """What is wrong with the points of a scenario that is wrong by itself, if its sweep can be read."""
    if any(problem.path.startswith("sweep") for problem in error.problems):
        return ()
    try:
        expand(document, document.data.get("sweep", {}), Scenario, **context)
    except UserError as more:
        return more.problems
    return ()


def schema() -> dict[str, Any]:
    """The JSON Schema of a scenario file."""
    written = Scenario.model_json_schema(mode="validation")
    blocks = {"hosts": written["$defs"]["Host"], "vms": written["$defs"]["Vm"]}
    items = {}
    for kind, block in blocks.items():
        known = {"enum": list(presets.names(kind))}
        block["properties"][presets.PRESET] = {**block["properties"][presets.PRESET], **known}
        block["properties"][presets.PRESET].pop("anyOf")
        # What a preset or another file may say is asked for only where there is none.
        needs = {"required": block.pop("required")}
        items[kind] = {"items": {"anyOf": [needs, {"required": [presets.PRESET]}]}}
    alone = {"required": written.pop("required"), "properties": items}
    rule = {"if": {"not": {"required": [EXTENDS]}}, "then": alone}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **written, **rule}
