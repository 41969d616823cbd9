"""A scenario: one question, assembled from the blocks of the parts it asks about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from sim.document import Document, dump, read
from sim.errors import At, Several, suggestion
from sim.host import Assignment, Host
from sim.memory.guest import NAME, Vm
from sim.memory.image import Captured
from sim.scenario.expect import ExpectationText
from sim.units import MINUTE, SECOND, Block, Duration, format_duration

_MOST_SAMPLES = 10_000_000


class Scenario(Block):
    """One question to the simulator."""

    name: str = Field(pattern=NAME, max_length=100)
    """Name, and folder of the results."""
    description: str = ""
    """The question in words."""
    duration: Duration = Field(default=10 * MINUTE, gt=0)
    """Simulated time."""
    seed: int = Field(default=1, ge=0, lt=1 << 63)
    """Seed of every random stream."""
    sample_every: Duration = Field(default=SECOND, gt=0)
    """Simulated time between two samples."""
    hosts: tuple[Host, ...] = Field(min_length=1)
    """Kinds of host."""
    vms: tuple[Vm, ...] = Field(min_length=1)
    """Kinds of guest."""
    expect: tuple[ExpectationText, ...] = ()
    """What must hold at the end: metric, comparison, value."""

    def resolved(self) -> dict[str, Any]:
        """The scenario as plain data, every default written out."""
        data: dict[str, Any] = self.model_dump(mode="json")
        return data

    def digest(self, version: str) -> str:
        """Name of a result: 12 hexadecimal digits of the resolved scenario, its files and the program's version."""
        told = blake2b(f"{version}\n{dump(self.resolved())}".encode(), digest_size=6)
        for image in self.captured():
            told.update(image.path.read_bytes())
        return told.hexdigest()

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
        faults = [*self._names(), *self._references(), *self._times()]
        if faults:
            raise Several(*faults)
        return self

    def _names(self) -> Iterator[At]:
        for field, items in (("hosts", self.hosts), ("vms", self.vms)):
            names = [item.name for item in items]
            for i, name in enumerate(names):
                if name in names[:i]:
                    yield At(f"{field}.{i}.name", "is taken by another entry", "choose another name")

    def _references(self) -> Iterator[At]:
        kinds = {vm.name: vm for vm in self.vms}
        hosts = [host.name for host in self.hosts] + [name for _, name in self.host_names()]
        nodes = max(host.numa_nodes for host in self.hosts)
        for i, vm in enumerate(self.vms):
            if vm.host is not None and vm.host not in hosts:
                yield At(f"vms.{i}.host", "no such host", suggestion(vm.host, hosts))
            if vm.numa_node is not None and vm.numa_node >= nodes:
                yield At(f"vms.{i}.numa_node", f"no host has more than {nodes} NUMA nodes", f"write 0 to {nodes - 1}")
            if vm.fork_of is None:
                continue
            parent = kinds.get(vm.fork_of)
            if parent is None or parent is vm:
                names = [name for name in kinds if name != vm.name]
                yield At(f"vms.{i}.fork_of", "no such other kind of guest", suggestion(vm.fork_of, names))
            elif parent.memory != vm.memory:
                yield At(f"vms.{i}.memory", "a fork has as much memory as its parent", "write the parent's memory")
            elif parent.start > vm.start:
                yield At(f"vms.{i}.start", "comes before the parent starts", f"{format_duration(parent.start)} or later")

    def _times(self) -> Iterator[At]:
        if self.duration // self.sample_every > _MOST_SAMPLES:
            remedy = f"write {format_duration(self.duration // _MOST_SAMPLES + 1)} or more"
            yield At("sample_every", f"makes more than {_MOST_SAMPLES:,} samples", remedy)
        for i, vm in enumerate(self.vms):
            if vm.start > self.duration:
                yield At(f"vms.{i}.start", "is after the end of the run", f"make duration longer than {format_duration(vm.start)}")
        for i, host in enumerate(self.hosts):
            for j, change in enumerate(host.ksm.changes):
                if change.at > self.duration:
                    yield At(f"hosts.{i}.ksm.changes.{j}.at", "is after the end of the run", "make duration longer")


def load(path: str | Path, overrides: Sequence[str] = (), seed: int | None = None) -> Scenario:
    """Read a scenario file; overrides are "path=value". Raises UserError with every mistake found."""
    document = read(path)
    for override in overrides:
        document = document.override(override)
    return _checked(document if seed is None else document.override(f"seed={seed}"))


def parse(data: Mapping[str, Any], folder: str | Path = ".") -> Scenario:
    """Read a scenario from plain data; paths in it are relative to *folder*. Raises UserError."""
    return _checked(Document(str(Path(folder, "")), dict(data)), folder)


def _checked(document: Document, folder: str | Path | None = None) -> Scenario:
    return document.check(Scenario, folder=str(folder if folder is not None else document.folder))


def schema() -> dict[str, Any]:
    """The JSON Schema of a scenario file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Scenario.model_json_schema(mode="validation")}
