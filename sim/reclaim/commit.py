"""How much memory a host promises: the sysctls vm.overcommit_*, by the kernel's names and defaults.

Source: Documentation/mm/overcommit-accounting.rst of Linux 6.18. A guest's memory is one private writable mapping, and
a fork asks for all of its parent's again. Kernels before 5.2 also refused, in mode 0, what was more than is free just
then; what the kernel keeps back for root and for a user's last process, 8 MiB and 128 MiB at most, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sim.errors import At, Several
from sim.units import KIB, Block, about_bytes, not_boolean


class Commit(Block):
    """Which memory is promised to guests, and which refused."""

    overcommit_memory: Annotated[Literal[0, 1, 2], not_boolean] = 0
    """0 refuses a guest that alone is more than memory and swap; 1 refuses none, as FreeBSD; 2 refuses what would make
    all guests together more than a limit. Solaris reserves swap, which it calls memory and disk together, for all that
    can be written: that is 2 with an overcommit_ratio of 100."""
    overcommit_ratio: int = Field(default=50, ge=0, le=1_000_000)
    """That limit: this percentage of the memory that is not hugetlbfs, and swap."""
    overcommit_kbytes: int = Field(default=0, ge=0, le=1 << 40)
    """In place of that percentage, so many KiB; 0 leaves it to the ratio."""

    @model_validator(mode="after")
    def _limit_is_used(self) -> Commit:
        if faults := list(self._faults()):
            raise Several(*faults)
        return self

    def _faults(self) -> Iterator[At]:
        for name in ("overcommit_ratio", "overcommit_kbytes"):
            if name in self.model_fields_set and self.overcommit_memory != 2 and getattr(self, name) != _default(name):
                yield At(name, "means nothing unless overcommit_memory is 2", "set that, or remove this")
        if self.overcommit_kbytes and self.overcommit_ratio != _default("overcommit_ratio"):
            yield At("overcommit_ratio", "overcommit_kbytes says the same otherwise", "remove one of them")

    def limit(self, memory: int, swap: int) -> int:
        """CommitLimit of /proc/meminfo, of a host with so many bytes outside hugetlbfs, and so many of swap."""
        return (self.overcommit_kbytes * KIB or memory * self.overcommit_ratio // 100) + swap

    def refusal(self, wanted: int, committed: int, memory: int, swap: int) -> str:
        """Why *wanted* bytes more than those *committed* are refused, or nothing."""
        if self.overcommit_memory == 0 and wanted > memory + swap:
            return f"{about_bytes(wanted)} are more than memory and swap, {about_bytes(memory + swap)}"
        if self.overcommit_memory == 2 and committed + wanted > (limit := self.limit(memory, swap)):
            promised, most = about_bytes(committed + wanted), about_bytes(limit)
            return f"{about_bytes(wanted)} more make {promised} promised, and the limit is {most}"
        return ""


def _default(name: str) -> object:
    return Commit.model_fields[name].default
