"""The scenario's block of a trace: which file, in what format, and what its figures mean here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, PrivateAttr, model_validator

from sim.datacenter.traces.rows import listed, readable, shown
from sim.errors import At, Several, suggestion
from sim.units import KIB, MINUTE, SECOND, Block, Bytes, Duration, Name, format_bytes, format_duration

Format = Literal["openb", "planetlab", "google", "bitbrains", "azure"]

STEP: Final = 5 * MINUTE
"""Time from one CPU sample to the next in the PlanetLab, Google and Bitbrains traces."""

_PIECE = 1 << 20
_OPTIONS: Final = {
    "every": ("planetlab", "google", "bitbrains"),
    "machine": ("google", "azure"),
    "machine_id": ("azure",),
    "vcpus_per_core": ("openb", "azure"),
    "memory_unit": ("bitbrains",),
}
"""Which formats an option is for."""


class Machine(Block):
    """What a trace means by one whole machine."""

    memory: Bytes = Field(gt=0)
    """Its memory."""
    cores: int = Field(ge=1, le=4096)
    """Its cores."""


class Trace(Block):
    """Guests that arrive as a recorded trace says."""

    path: str
    """File or folder of the trace, relative to the scenario file."""
    format: Format
    """openb: Alibaba's pods of 2023, a CSV file or its folder; planetlab: a folder with a file of CPU percentages for
    each guest; google: the same with a second column for memory, or a tar.gz of such files; bitbrains: a folder with
    OpenDC's meta and trace, or tasks and fragments, in Parquet; azure: the SQLite file of the packing trace of 2020."""
    kinds: tuple[Name, ...] = Field(min_length=1)
    """Entries of `vms` that the guests are, in turn; they say what the trace does not."""
    name: Name | None = None
    """The guests are called NAME-0, NAME-1, ... as they arrive; the format unless given."""
    begin: Duration = 0
    """The moment of the trace at which the run begins; guests that are there already arrive at once, for the rest of
    their lives."""
    end: Duration | None = None
    """The moment of the trace from which on nobody arrives."""
    limit: int | None = Field(default=None, ge=1)
    """Most guests to take, the first ones."""
    every: Duration | None = Field(default=None, ge=SECOND)
    """Average the CPU use over so long; its five minutes unless given. (planetlab, google, bitbrains)"""
    machine: Machine | None = None
    """azure: the machine that sizes are fractions of; the trace hides what it was. google: the machine that percentages
    are of: a guest has the most memory and processors that it ever used; unless given they are percentages of its
    kind's processors, and its memory is its kind's."""
    machine_id: int | None = None
    """azure: take sizes as on this machine; unless given on the lowest numbered one that the guest's type runs on."""
    vcpus_per_core: float = Field(default=1.0, gt=0, le=64)
    """Virtual processors for a core, rounded up for each guest. (openb, azure)"""
    memory_unit: Bytes = Field(default=KIB, gt=0)
    """bitbrains: unit of mem_capacity. OpenDC's documentation says MB, but its Bitbrains files, with 8388608 for a
    guest of 8 GiB, and the KB of their source, GWA-T-12, are in KiB."""

    _folder: Path = PrivateAttr(default=Path())

    def model_post_init(self, context: Any) -> None:
        """Remember what the path is relative to."""
        self._folder = Path((context or {}).get("folder", "."))

    @property
    def source(self) -> Path:
        """Where the trace is."""
        return self._folder / self.path

    @property
    def prefix(self) -> str:
        """How the names of its guests begin."""
        return self.name or self.format

    @property
    def step(self) -> int:
        """How long each level of CPU use lasts (ns)."""
        return self.every or STEP

    def files(self) -> Iterator[Path]:
        """The files of the trace, in order of name."""
        if self.source.is_dir():
            yield from (each for each in listed(self.source) if each.is_file())
        elif self.source.is_file():
            yield self.source

    def digest(self) -> bytes:
        """Digest of the files, for the name of a result."""
        told = blake2b(digest_size=16)
        for file in self.files():
            name = os.fsencode(file.name)
            with readable(file) as stream:
                told.update(f"{len(name)}:{os.fstat(stream.fileno()).st_size}:".encode() + name)
                while piece := stream.read(_PIECE):
                    told.update(piece)
        return told.digest()

    @model_validator(mode="after")
    def _meaningful(self) -> Trace:
        if faults := [*self._missing(), *self._misplaced(), *self._times()]:
            raise Several(*faults)
        return self

    def _missing(self) -> Iterator[At]:
        if not os.path.exists(self.source):
            others = sorted(shown(each.name) for each in self.source.parent.glob("*"))
            remedy = suggestion(self.source.name, others) if others else "paths are relative to the scenario file"
            yield At("path", "no such file or folder", remedy)
        if self.format == "azure" and self.machine is None:
            example = "for example machine: {memory: 512GiB, cores: 64}"
            yield At("machine", "sizes in this trace are fractions of a machine: say how large it is", example)

    def _misplaced(self) -> Iterator[At]:
        for option, formats in _OPTIONS.items():
            if self.format not in formats and getattr(self, option) != type(self).model_fields[option].default:
                yield At(option, f"means nothing for {self.format}, only for {', '.join(formats)}", "remove it")

    def _times(self) -> Iterator[At]:
        if self.end is not None and self.end <= self.begin:
            remedy = f"write more than {format_duration(self.begin)}"
            yield At("end", "leaves no time between begin and end", remedy)
        if self.format in ("planetlab", "google") and self.step % STEP:
            remedy = f"write {format_duration(-(-self.step // STEP) * STEP)}"
            yield At("every", f"must be a multiple of the {format_duration(STEP)} between two samples", remedy)
        if self.memory_unit > 1 << 30:
            yield At("memory_unit", "is no unit of memory", f"write {format_bytes(KIB)}")
