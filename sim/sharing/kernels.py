"""Which Linux kernel behaves how: every change to KSM that a simulation can see, in one table.

Source: the commits named in each field, read in kernel source or changelogs (reference: mm/ksm.c history).
"""

from typing import NamedTuple


class Kernel(NamedTuple):
    """Behaviour of KSM in one kernel version. Each field is one change; the commit is in its comment."""

    version: str
    node_holds_page: bool = True  # 2.6.33: stable node points to the page; merged pages are not searched for again
    numa_trees: bool = True  # 3.9 (90bd6fd31c80): merge_across_nodes
    late_timers: bool = True  # 4.8 (500462a9de65): the new timer wheel fires a tick late, long timeouts later still
    deferred_split: bool = True  # 4.5: a huge page given back in part is split only when memory is short
    zero_pages: bool = True  # 4.11 (e86c59b1b12d): use_zero_pages
    sharing_limit: bool = True  # 4.13 (2c653d0ee2ae): max_page_sharing, chains and dups
    sleep_wakes: bool = True  # 5.0: a change of sleep_millisecs wakes the sleeper
    reuse_last_mapper: bool = False  # 5.1 to 5.8 (52d1e606ee73, 1a0cf26323c8): last mapper writes in place
    counts_last_batch: bool = True  # 6.6 to 6.9 left the last batch of a scan out of pages_scanned (730cdc2c72c6)
    smart_scan: bool = True  # 6.7: smart_scan, pages_skipped
    advisor: bool = True  # 6.8: advisor_mode
    exact_sleep: bool = True  # 6.8: sleeps of a second and more no longer end at whole seconds
    checksum_first: bool = True  # 6.11 (d58a361b0350): checksum before the stable tree
    huge_pages: bool = True  # 2.6.38: transparent huge pages, split when one of their pages merges
    split_frees_zero: bool = True  # 6.12 (b1f202060afe): splitting a huge page unmaps its pages full of zeros


V6_18 = Kernel("6.18")
V6_12 = V6_18._replace(version="6.12")
V6_11 = V6_12._replace(version="6.11", split_frees_zero=False)
V6_10 = V6_11._replace(version="6.10", checksum_first=False)
V6_8 = V6_10._replace(version="6.8", counts_last_batch=False)
V6_7 = V6_8._replace(version="6.7", advisor=False, exact_sleep=False)
V6_6 = V6_7._replace(version="6.6", smart_scan=False)
V5_9 = V6_6._replace(version="5.9", counts_last_batch=True)
V5_1 = V5_9._replace(version="5.1", reuse_last_mapper=True)
V5_0 = V5_1._replace(version="5.0", reuse_last_mapper=False)
V4_13 = V5_0._replace(version="4.13", sleep_wakes=False)
V4_11 = V4_13._replace(version="4.11", sharing_limit=False)
V4_8 = V4_11._replace(version="4.8", zero_pages=False)
V4_5 = V4_8._replace(version="4.5", late_timers=False)
V3_9 = V4_5._replace(version="3.9", deferred_split=False)
V2_6_38 = V3_9._replace(version="2.6.38", numa_trees=False)
V2_6_33 = V2_6_38._replace(version="2.6.33", huge_pages=False)
V2_6_32 = V2_6_33._replace(version="2.6.32", node_holds_page=False)

KERNELS: dict[str, Kernel] = {
    kernel.version: kernel
    for kernel in (
        V2_6_32, V2_6_33, V2_6_38, V3_9, V4_5, V4_8, V4_11, V4_13, V5_0, V5_1, V5_9, V6_6, V6_7, V6_8, V6_10, V6_11,
        V6_12, V6_18,
    )
}  # fmt: skip
"""Every version at which the behaviour changed, oldest first, and the newest that was checked."""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def kernel(version: str) -> Kernel:
    """The behaviour of *version* ("6.12"; "5.x" is the last of a series): the newest change not after it.

    Raises ValueError for text that is no version, or one older than KSM itself (2.6.32).
    """
    wanted = _numbers(version.replace(".x", ".99"))
    found = [kernel for name, kernel in KERNELS.items() if _numbers(name) <= wanted]
    if not found:
        raise ValueError(f"KSM came with 2.6.32; {version} is older")
    return found[-1]
