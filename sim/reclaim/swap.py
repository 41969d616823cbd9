"""Swap: where pages go, and how long the way is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sim.units import Block, Bytes, Duration

Algorithm = Literal["lzo-rle", "lzo", "lz4", "zstd"]


class Swap(Block):
    """The host's swap."""

    device: Literal["hdd", "ssd", "nvme", "file", "zram"]
    """A disk, a solid-state disk (SATA or NVMe), a file on the machine that the price set was measured on, or zram:
    compressed pages in memory."""
    size: Bytes = Field(gt=0)
    """How much it holds; of zram, before compression."""
    algorithm: Algorithm = "lzo-rle"
    """How zram compresses."""
    read_latency: Duration | None = None
    """Time to read a page when nobody else reads or writes; of the device unless given."""
    write_latency: Duration | None = None
    """Time to write a page then."""
    bandwidth: Bytes | None = Field(default=None, gt=0)
    """Bytes per second, at most; of the device unless given."""
    channels: int | None = Field(default=None, ge=1, le=1024)
    """Reads and writes that it works on at once."""
