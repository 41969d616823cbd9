"""Large pages that ESX breaks before memory is short."""

from __future__ import annotations

from typing import Any

import pytest
from one_host import at, end, guest, part, run

from sim.errors import UserError
from sim.memory.pages import BLOCK
from sim.run import Result

HUGE = 1 << 21
EAGER = {"cold_below": "1/s", "free_below": "1%"}


def two_vms(*, memory: str = "1GiB", duration: str = "30min", **tps: Any) -> Result:
    """Two VMs, of whose six large pages two are busy, two equal in both and two of their own."""
    parts = (
        part("busy", 2 * BLOCK, reads={"rate": "1/s"}),
        part("system", 2 * BLOCK, pool="system"),
        part("own", 2 * BLOCK),
    )
    vms = guest("vm", *parts, pages=6 * BLOCK, count=2)
    settings = {"version": "esxi5", "ShareForceSalting": 0, "ShareScanTime": 10} | tps
    return run(vms, memory=memory, duration=duration, sample_every="10s", tps=settings)


def test_cold_large_pages_are_broken_and_shared_while_memory_is_plenty_and_busy_ones_stay():
    last = end(two_vms(proactive=EAGER))

    assert last["mem_huge_bytes"] == 2 * 2 * HUGE
    assert last["pages_sharing"] > 0.85 * 2 * BLOCK
    assert end(two_vms())["mem_huge_bytes"] == 2 * 6 * HUGE


def test_what_is_cold_is_a_matter_of_the_setting():
    assert end(two_vms(proactive=EAGER | {"cold_below": "1000/s"}))["mem_huge_bytes"] == 0


def test_all_large_pages_are_broken_when_little_memory_is_free_before_anything_is_ballooned():
    """24 MiB of 40 MiB are the VMs', so that 40 % is free."""
    scarce = two_vms(memory="40MiB", duration="10s", proactive=EAGER | {"cold_below": "0/s", "free_below": "50%"})
    plenty = two_vms(memory="40MiB", duration="10s", proactive=EAGER | {"cold_below": "0/s", "free_below": "30%"})

    assert (end(scarce)["mem_huge_bytes"], end(scarce)["thp_split_page"]) == (0, 12)
    assert end(plenty)["thp_split_page"] == 0
    assert end(scarce)["mem_ballooned_bytes"] == 0


def test_a_vm_is_scanned_faster_the_more_of_it_is_estimated_to_be_shareable():
    """Two VMs of equal pages alone, in large pages that never break, and two VMs of pages of their own."""

    def picked(*parts: Any, rate: float) -> int:
        vms = guest("vm", *parts, pages=6 * BLOCK, count=2)
        proactive = {"cold_below": "0/s", "free_below": "0%", "share_rate": rate}
        settings = {"version": "esxi5", "ShareForceSalting": 0, "ShareScanTime": 10, "proactive": proactive}
        result = run(vms, memory="1GiB", duration="60min", sample_every="1min", tps=settings)
        return int(end(result)["pages_scanned"] - at(result, 1800.0)["pages_scanned"])

    common, own = part("common", 6 * BLOCK, duplicates=2), part("own", 6 * BLOCK)
    assert picked(own, rate=4) == picked(own, rate=1)
    assert 3 < picked(common, rate=4) / picked(common, rate=1) <= 4


def test_a_version_without_large_pages_has_none_to_break():
    with pytest.raises(UserError, match="proactive: came with esx4"):
        run(guest("vm", part("own", 10), pages=10), duration="1s", tps={"version": "esx3", "proactive": {}})
