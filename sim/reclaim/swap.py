"""Swap: where pages go, and how long the way is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from pydantic import Field, model_validator

from sim.columns import PAGE_BYTES
from sim.cost.prices import Prices, drop, paging, submission, swap_device
from sim.errors import At, Several
from sim.reclaim.compression import Algorithm
from sim.units import MICROSECOND, SECOND, Block, Bytes, Duration

DEFAULT_ALGORITHM: Final = "lzo-rle"
"""What zram takes unless told otherwise (CONFIG_ZRAM_DEF_COMP)."""


@dataclass(frozen=True)
class DeviceTimes:
    """What one way to swap takes.

    A request of n neighbouring pages holds one channel for the latency, then the one path to the device for
    (n - 1) ns_per_page; whoever faults waits for it and for the CPU time.
    """

    read_ns: int
    """Time from asking for one page to having it, when nobody else asks."""
    write_ns: int
    """The same for writing one page."""
    ns_per_page: int
    """Time on the path to the device of each further page."""
    channels: int
    """Requests that the device works on at once."""
    cpu_in_ns: int
    """CPU time of bringing one page back: the fault, without decompression."""
    cpu_out_ns: int
    """CPU time of one page out: taking it from the guest, without compression."""
    drop_ns: int = 0
    """CPU time of one page out that is still there unchanged."""
    submit_ns: int = 0
    """Time of handing one page to the device: of CPU, and of waiting for those before it."""


@dataclass(frozen=True)
class _Device:
    """Data sheet figures of a device."""

    read_ns: int
    write_ns: int
    bandwidth: int
    """Bytes per second."""
    channels: int
    """By Little's law: the random reads per second that the data sheet promises, times the time of one."""


_DEVICES: Final[Mapping[str, _Device]] = {
    # 7200 rpm: average seek 7.4 ms to read and 8.2 ms to write, and 4.16 ms for half a turn (Western Digital, Ultrastar
    # DC HC310 specification 1.4, tables 5 and 7); 255 MB/s (WD Gold 12 TB). The Difference Engine measured 7,151.6 us,
    # with a swap file that needs short seeks only (OSDI 2008, table 2).
    "hdd": _Device(11_560 * MICROSECOND, 12_360 * MICROSECOND, 255_000_000, 1),
    # Random reads 110 us and writes 52 us, 490 MB/s and more, 72,000 random reads per second (Intel SSD DC S4500/S4600
    # product specification).
    "ssd": _Device(110 * MICROSECOND, 52 * MICROSECOND, 490_000_000, 8),
    # Random reads 85 us and writes 20 us, 490,000 random reads per second (Intel P4500 2 TB in Lenovo's product guide);
    # 1.58 GB/s are its 3.2 GB/s to read and 1.05 GB/s to write for equally many reads and writes, as swapping makes.
    "nvme": _Device(85 * MICROSECOND, 20 * MICROSECOND, 1_580_000_000, 42),
}


class Swap(Block):
    """The host's swap."""

    device: Literal["hdd", "ssd", "nvme", "file", "zram"]
    """A disk, a solid-state disk (SATA or NVMe), a file on the machine that the price set was measured on, or zram:
    compressed pages in memory."""
    size: Bytes = Field(gt=0)
    """How much it holds; of zram, before compression."""
    algorithm: Algorithm | None = None
    """How zram compresses: lzo-rle unless given."""
    read_latency: Duration | None = None
    """Time to read a page when nobody else reads or writes; of the device unless given."""
    write_latency: Duration | None = None
    """Time to write a page then."""
    bandwidth: Bytes | None = Field(default=None, gt=0)
    """Bytes per second, at most; of the device unless given."""
    channels: int | None = Field(default=None, ge=1, le=1024)
    """Reads and writes that it works on at once."""

    @model_validator(mode="after")
    def _figures_fit_the_device(self) -> Swap:
        if faults := list(self._faults()):
            raise Several(*faults)
        return self

    def _faults(self) -> Iterator[At]:
        if self.size < PAGE_BYTES:
            yield At("size", "must hold at least one page", 'write "4KiB" or more')
        if self.device != "zram":
            if self.algorithm is not None:
                yield At("algorithm", f"{self.device} does not compress", "remove it, or write device: zram")
            return
        for name in ("read_latency", "write_latency", "bandwidth", "channels"):
            if getattr(self, name) is not None:
                remedy = "remove it; algorithm and the host's prices say how fast zram is"
                yield At(name, "zram is as fast as the processor", remedy)

    @property
    def compresses_with(self) -> Algorithm | None:
        """The algorithm of zram; None for a device that does not compress."""
        return (self.algorithm or DEFAULT_ALGORITHM) if self.device == "zram" else None

    def device_times(self, prices: Prices) -> DeviceTimes:
        """What this swap takes on a host with these prices."""
        cpu_in, cpu_out = round(paging(prices).page_in.ns), round(paging(prices).page_out.ns)
        if self.compresses_with:
            return DeviceTimes(0, 0, 0, 1, cpu_in, cpu_out)
        device = self._device(prices)
        bandwidth = self.bandwidth or device.bandwidth
        return DeviceTimes(
            read_ns=device.read_ns if self.read_latency is None else self.read_latency,
            write_ns=device.write_ns if self.write_latency is None else self.write_latency,
            ns_per_page=round(PAGE_BYTES * SECOND / bandwidth),
            channels=self.channels or device.channels,
            cpu_in_ns=cpu_in,
            cpu_out_ns=cpu_out,
            drop_ns=round(drop(prices).ns),
            submit_ns=round(submission(prices)),
        )

    def _device(self, prices: Prices) -> _Device:
        if self.device != "file":
            return _DEVICES[self.device]
        measured = swap_device(prices)
        # Of one page, a write took as long as a read on emerald-rapids (56 us of 1000 each), and requests of 1 to 32
        # threads were served at the rate of one after the other.
        latency = round(measured.read.ns)
        return _Device(latency, latency, round(PAGE_BYTES * SECOND / measured.write.ns), 1)
