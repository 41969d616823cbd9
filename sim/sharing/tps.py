"""VMware ESX as a scenario describes it: transparent page sharing and the states of memory, by VMware's own names.

Sources: the advanced options under Mem. of ESX 4 to 8 (defaults and ranges as a host prints them); ESX Server 2 manual
(ShareScanVM, ShareScanTotal); Waldspurger, OSDI 2002 (mechanism, states, idle memory tax); VMware, Understanding Memory
Resource Management in ESX Server, 2009; Epping, vSphere 6 memory states, 2015; KB 1021095 (large pages), 2080735 and
2097593 (salting). `tps_pass.py` has the loops, `esx.py` the behaviour.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal, NamedTuple

from pydantic import Field

from sim.columns import PAGE_BYTES
from sim.errors import At
from sim.sharing.kernels import Kernel
from sim.sharing.mechanism import Scans, SharesBetween, domain_name
from sim.units import GIB, MIB, SECOND, Block, Bytes, Name, Rate, Share, Switch, not_boolean

if TYPE_CHECKING:
    from sim.memory.guest import Vm
    from sim.reclaim.compression import Algorithm
    from sim.reclaim.swap import Swap
    from sim.sharing.esx import Esx

HIDDEN_LIMIT: Final = 450
"""Pages a second and VM that ESX 3.0.1 never exceeds, whatever is set (Gupta and others, CACM Oct 2010, footnote a)."""


class Rung(NamedTuple):
    """What ESX does while free memory is below a threshold."""

    state: str
    below: float
    """Share of the host's memory, or of minFree (see `Version.relative`)."""
    breaks: bool = False
    """Large pages are broken where the scan meets them."""
    calls: bool = False
    """Large pages are broken and their pages shared at once."""
    balloons: bool = False
    swaps: bool = False
    """Pages are shared or, if that fails, compressed or swapped."""


class Version(NamedTuple):
    """How one generation of ESX behaves."""

    ladder: tuple[Rung, ...]
    """From the most free memory to the least; below the last threshold a guest waits for what is reclaimed."""
    relative: bool
    """Whether thresholds are shares of minFree rather than of the host's memory."""
    goal: float
    """Free memory that reclaim strives for, as a threshold."""
    large_pages: bool = True
    compresses: bool = True
    salts: bool = True
    sample_every: int = 60 * SECOND
    """How often it is estimated how much of its memory a VM uses."""


_FLAT = (
    Rung("soft", 0.04, balloons=True),
    Rung("hard", 0.02, balloons=True, swaps=True),
    Rung("low", 0.01, balloons=True, swaps=True),
)
_ESXI5 = (
    Rung("soft", 0.64, balloons=True),
    Rung("hard", 0.32, balloons=True, swaps=True),
    Rung("low", 0.16, balloons=True, swaps=True),
)
_ESXI6 = (
    Rung("high", 4.0, breaks=True),
    Rung("clear", 1.0, breaks=True, calls=True),
    Rung("soft", 0.64, breaks=True, calls=True, balloons=True),
    Rung("hard", 0.32, breaks=True, calls=True, swaps=True),
    Rung("low", 0.16, breaks=True, swaps=True),
)
VERSIONS: Final[Mapping[str, Version]] = {
    "esx3": Version(
        _FLAT, relative=False, goal=0.06, large_pages=False, compresses=False, salts=False, sample_every=30 * SECOND
    ),
    "esx4": Version(_FLAT, relative=False, goal=0.06, salts=False),
    "esxi5": Version(_ESXI5, relative=True, goal=1.0),
    "esxi6": Version(_ESXI6, relative=True, goal=1.0),
}
STATES: Final = ("high", "clear", "soft", "hard", "low")
"""The states of memory; the column `mem_state` has their index."""


class TpsGuest(Block):
    """What the configuration of one kind of VM says."""

    salt: Name | None = None
    """sched.mem.pshare.salt: VMs of equal salt share with each other; the VM's `tenant` unless given."""
    shares: int | None = Field(default=None, ge=1, le=1 << 31)
    """sched.mem.shares: 10 for each MB unless given, which is what ESX calls normal."""
    min: Bytes = 0
    """sched.mem.min: memory that is never reclaimed."""


class Proactive(Block):
    """Large pages are broken before memory is short.

    Guo and others, VEE 2015; only the abstract was read, so what is cold, when memory is scarce and how much faster the
    scan gets are assumed. It names the three rules, and up to 2.1 times the performance under pressure.
    """

    cold_below: Rate = 1.0
    """A large page with fewer accesses is cold, and broken where the scan meets it, however much memory is free."""
    free_below: Share = 0.06
    """All large pages are broken when less of the host's memory is free; choose it above what balloons start at."""
    share_rate: float = Field(default=4.0, ge=1, le=1000)
    """How many times as fast a VM is scanned all of whose pages are estimated to be shareable; others in proportion."""


_Percent = Annotated[int, Field(ge=0, le=99)]


class Tps(Scans):
    """VMware's transparent page sharing, and how ESX reclaims memory."""

    system: ClassVar[str] = "ESX"
    refused: ClassVar[tuple[str, ...]] = (
        "kernel", "hz", "thp", "hugetlbfs", "zswap", "watermarks", "balloon", "commit", "ksmtuned", "mom",
        "shares_between",
    )  # fmt: skip

    version: Literal["esx3", "esx4", "esxi5", "esxi6"] = "esxi6"
    """Whose memory states and defaults apply: ESX 2 and 3, ESX 4, ESXi 5, ESXi 6 to 8."""
    ShareScanTime: int | None = Field(default=None, ge=10, le=600)
    """Minutes in which a VM's memory shall be scanned once (since ESX 4, default 60)."""
    ShareScanGHz: int | None = Field(default=None, ge=0, le=32)
    """MiB a second, for each GHz of the host's processors, that are scanned at most; 0 scans nothing (since ESX 4,
    default 4)."""
    ShareRateMax: int | None = Field(default=None, ge=0, le=32768)
    """Pages of a VM scanned a second, at most (since ESX 4, default 1024)."""
    ShareScanVM: int | None = Field(default=None, ge=0, le=10_000)
    """Pages of a VM scanned a second (up to ESX 3, default 50; ESX 3 never exceeds 450)."""
    ShareScanTotal: int | None = Field(default=None, ge=0, le=1_000_000)
    """Pages of all VMs scanned a second, at most (up to ESX 3, default 200)."""
    cpu_ghz: float = Field(default=20.0, gt=0, le=1e5)
    """Clock of all cores together, for ShareScanGHz; 8 cores of 2.5 GHz unless given."""
    ShareForceSalting: Annotated[Literal[0, 1, 2], not_boolean] | None = None
    """0 all VMs share; 1 those of equal salt, or without any; 2 a VM without salt shares with none (since ESXi 5,
    default 2)."""
    AllocGuestLargePage: Switch | None = None
    """Back guests with 2 MiB pages (since ESX 4, default 1)."""
    MemMinFreePct: int = Field(default=0, ge=0, le=50)
    """minFree in percent of the host's memory; 0 computes it (since ESXi 5)."""
    IdleTax: _Percent = 75
    """Percent of a VM's idle memory that may be taken from it."""
    CtlMaxPercent: _Percent = 65
    """Most of a VM's memory that its balloon takes, in percent; 0 is a VM without a balloon driver."""
    MemZipEnable: Switch | None = None
    """Keep what would be swapped in memory if it can be compressed to 2 KiB (since ESX 4, default 1); how is not told,
    and the images' sizes under LZ4 are taken."""
    MemZipMaxPct: int = Field(default=10, ge=0, le=100)
    """Most of a VM's memory that its compressed pages take, in percent."""
    proactive: Proactive | None = None
    """Break large pages before memory is short (of ESX 4 and later, which have large pages); no released version
    breaks cold ones while memory is plenty."""
    guests: Mapping[Name, TpsGuest] = Field(default_factory=dict)
    """What the configuration of VMs says, by the name of their kind."""

    @property
    def ways(self) -> Version:
        """How this version behaves."""
        return VERSIONS[self.version]

    @property
    def compressor(self) -> Algorithm | None:
        """LZ4, in place of what ESX compresses with."""
        return "lz4" if self.MemZipEnable else None

    def behaviour(self) -> type[Esx]:
        """ESX."""
        from sim.sharing.esx import Esx

        return Esx

    def completed(self, kernel: Kernel) -> Tps:
        """The block with the version's own defaults written out."""
        ways, rates = self.ways, self._rate_defaults()
        own = {**rates, "AllocGuestLargePage": int(ways.large_pages), "MemZipEnable": int(ways.compresses)}
        own["ShareForceSalting"] = 2 if ways.salts else 0
        return self.model_copy(update={name: value for name, value in own.items() if getattr(self, name) is None})

    def _rate_defaults(self) -> dict[str, int]:
        if self.version == "esx3":
            return {"ShareScanVM": 50, "ShareScanTotal": 200}
        return {"ShareScanTime": 60, "ShareScanGHz": 4, "ShareRateMax": 1024}

    def faults(self, kernel: Kernel) -> Iterator[At]:
        """Settings that this version does not have."""
        ways, has = self.ways, self._rate_defaults()
        for name in ("ShareScanTime", "ShareScanGHz", "ShareRateMax", "ShareScanVM", "ShareScanTotal"):
            if getattr(self, name) is not None and name not in has:
                yield At(name, f"is no setting of {self.version}", f"it has {' and '.join(has)}")
        for name, there, since in (
            ("AllocGuestLargePage", ways.large_pages, "esx4"),
            ("MemZipEnable", ways.compresses, "esx4"),
            ("ShareForceSalting", ways.salts, "esxi5"),
            ("MemMinFreePct", ways.relative, "esxi5"),
            ("proactive", ways.large_pages, "esx4"),
        ):
            if getattr(self, name) and not there:
                yield At(name, f"came with {since}", f"remove it or choose version {since} or later")

    def swap_faults(self, swap: Swap) -> Iterator[At]:
        """Swap is a device for ESX; what it compresses is settled by MemZipEnable and MemZipMaxPct."""
        if swap.device == "zram":
            yield At("device", "ESX has no zram", "write a disk, and MemZipEnable: 1 under tps")

    def guest_faults(self, vm: Vm) -> Iterator[At]:
        """See `Mechanism`; and a VM that is configured to be smaller than its least."""
        yield from super().guest_faults(vm)
        if vm.name in self.guests and self.guests[vm.name].min > vm.memory:
            yield At("memory", f"is less than the min of {vm.name} in tps.guests", "make one of them fit the other")

    def domain_of(self, vm: Vm, guest: str, shares_between: SharesBetween) -> str:
        """See `Mechanism`; the salt is what tells tenants apart, and ShareForceSalting whether it does."""
        own = self.guests.get(vm.name)
        salt = (own and own.salt) or vm.tenant
        forced = self.ShareForceSalting == 2 or (self.ShareForceSalting == 1 and salt is not None)
        return domain_name("tenants" if forced else "all", salt, guest)

    def rates(self, pages: Sequence[int]) -> list[float]:
        """Pages a second that are picked of VMs with so many pages each, all limits kept."""
        if self.version == "esx3":
            each = [float(min(self.ShareScanVM or 0, HIDDEN_LIMIT)) for _ in pages]
            most = float(self.ShareScanTotal or 0)
        else:
            each = [min(n / (60 * (self.ShareScanTime or 60)), self.ShareRateMax or 0) for n in pages]
            most = (self.ShareScanGHz or 0) * self.cpu_ghz * (MIB // PAGE_BYTES)
        total = sum(each)
        return [rate * min(1.0, most / total) if total else 0.0 for rate in each]

    def visits(self, guests: Sequence[tuple[int, int]]) -> float:
        """Pages picked, at most, for guests of so many pages that live so long (ns)."""
        rates = self.rates([pages for pages, _ in guests])
        return sum(rate * life / SECOND for rate, (_, life) in zip(rates, guests, strict=True))

    def min_free(self, memory: int) -> int:
        """MinFree in bytes of a host with so much memory: 6 % of its first 4 GiB, 4 % of the next 8, 2 % of the next 16
        and 1 % of the rest. VMware gives the first three as 899 MiB, 2 MiB less than their sum.
        """
        if self.MemMinFreePct:
            return memory * self.MemMinFreePct // 100
        total, left = 0, memory
        for size, percent in ((4 * GIB, 6), (8 * GIB, 4), (16 * GIB, 2)):
            total += min(left, size) * percent // 100
            left -= min(left, size)
        return min(total, 899 * MIB) + left // 100

    def thresholds(self, memory: int) -> tuple[list[int], int]:
        """Free bytes below which each rung of the ladder begins, and the goal of reclaim."""
        whole = self.min_free(memory) if self.ways.relative else memory
        return [round(rung.below * whole) for rung in self.ways.ladder], round(self.ways.goal * whole)
