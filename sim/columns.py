"""Every table column and every headline metric, defined once: name, type, unit and meaning.

Source: the KSM columns are the files of /sys/kernel/mm/ksm.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PAGE_BYTES = 4096
"""Size of the page that every column with the unit `pages` counts."""

_KSM = "/sys/kernel/mm/ksm/"
_VMSTAT = "/proc/vmstat "
_PROCESS = "/proc/PID/ksm_stat "
_PRESSURE = "/proc/pressure/memory"


@dataclass(frozen=True)
class Column:
    """One column of a result table."""

    name: str
    dtype: str
    """`int64`, `float64` or `string`; a `float64` may be NaN where a moment has not come."""
    unit: str
    meaning: str
    kernel: str = ""
    """The kernel's file or vmstat line with the same figure, empty where it has none."""

    @property
    def counts(self) -> bool:
        """Whether it counts from the start of the run: over a part of the run it is the difference of the ends."""
        return self.meaning.endswith(_COUNTED)


_COUNTED = ", since the start"


class Window(NamedTuple):
    """The part of a run that the metrics are about, ns from its start."""

    start: int
    end: int


@dataclass(frozen=True)
class Metric:
    """One figure of `summary.json`; its value is None where the run gives no data for it."""

    name: str
    unit: str
    meaning: str
    formula: str


def _ksm(name: str, unit: str, meaning: str) -> Column:
    return Column(name, "int64", unit, meaning, _KSM + name)


def _vmstat(name: str, unit: str, meaning: str) -> Column:
    return Column(name, "int64", unit, meaning, _VMSTAT + name)


def _memory(name: str, meaning: str) -> Column:
    return Column(name, "int64", "bytes", meaning)


def _cpu(name: str, meaning: str) -> Column:
    return Column(name, "int64", "ns", meaning)


HOST = Column("host", "string", "", "name of the host")
TIME = Column("time_s", "float64", "s", "simulated time since the start of the run")

KSM_COUNTERS: tuple[Column, ...] = (
    _ksm("full_scans", "count", "how often ksmd has been through all mergeable memory, since the start"),
    _ksm("pages_shared", "pages", "frames in the stable tree that guests use"),
    _ksm("pages_sharing", "pages", "further pages that use those frames: the pages saved"),
    _ksm("pages_unshared", "pages", "pages found unique in this scan or the last one, candidates for a merge"),
    _ksm("pages_volatile", "pages", "pages in neither tree: new, changing, skipped or not mergeable now"),
    _ksm("pages_scanned", "pages", "page visits that ran the merge decision, since the start"),
    _ksm("pages_skipped", "pages", "page visits that smart_scan skipped, since the start"),
    _ksm("ksm_zero_pages", "pages", "pages that KSM mapped to the kernel's zero page (use_zero_pages)"),
    _ksm("stable_node_chains", "count", "contents whose copies exceed max_page_sharing"),
    _ksm("stable_node_dups", "count", "frames that hold those contents"),
    _ksm("general_profit", "bytes", "memory saved by KSM less its page metadata; negative when KSM costs memory"),
)

KSM_SETTINGS: tuple[Column, ...] = (
    _ksm("run", "", "0 stopped, 1 merging, 2 unmerging"),
    _ksm("pages_to_scan", "pages", "pages ksmd visits before it sleeps"),
    _ksm("sleep_millisecs", "ms", "how long ksmd sleeps between batches"),
)

VMSTAT_COUNTERS: tuple[Column, ...] = (
    _vmstat("thp_split_page", "count", "huge pages split, since the start"),
    _vmstat("thp_deferred_split_page", "count", "huge pages given back in part, to be split later, since the start"),
    _vmstat("thp_fault_alloc", "count", "huge pages allocated by a page fault, since the start"),
    _vmstat("thp_fault_fallback", "count", "page faults that found no 2 MiB free for a huge page, since the start"),
    _vmstat("thp_collapse_alloc", "count", "huge pages allocated by khugepaged, since the start"),
    _vmstat("cow_ksm", "count", "writes that had to copy a KSM page, since the start"),
    _vmstat("pswpin", "pages", "pages read from swap, since the start"),
    _vmstat("pswpout", "pages", "pages written to swap, since the start"),
    _vmstat("swpin_zero", "pages", "pages of zeros brought back from swap without reading, since the start"),
    _vmstat("swpout_zero", "pages", "pages of zeros swapped out without writing, since the start"),
    _vmstat("zswpin", "pages", "pages brought back from zswap's pool, since the start"),
    _vmstat("zswpout", "pages", "pages swapped out to zswap's pool, since the start"),
    _vmstat("zswpwb", "pages", "pages that zswap wrote on to the swap device, since the start"),
    _vmstat("swap_ra", "pages", "pages read from swap before anyone asked for them, since the start"),
    _vmstat("swap_ra_hit", "pages", "such pages that were then used, since the start"),
    _vmstat("thp_swpout", "count", "huge pages swapped out whole, since the start"),
    _vmstat("ksm_swpin_copy", "pages", "swapped KSM pages that had to be copied when they came back, since the start"),
    Column("swpin_cached", "int64", "pages", "swapped pages that came back while they were written, since the start"),
    _vmstat("pgmajfault", "count", "page faults that had to bring a page back from swap, since the start"),
    _vmstat("pgscan", "pages", "pages that reclaim looked at, by kswapd and by guests, since the start"),
    _vmstat("pgsteal", "pages", "pages that reclaim took, since the start"),
    _vmstat("allocstall", "count", "times that a guest had to reclaim memory of the host itself, since the start"),
    _vmstat("workingset_refault_anon", "pages", "swapped pages that were needed again, since the start"),
    _vmstat(
        "workingset_activate_anon",
        "pages",
        "such pages that came back so soon that they are taken as in use, since the start",
    ),
)

ESX_COUNTERS: tuple[Column, ...] = (
    Column("mem_state", "int64", "", "state of memory on a host with ESX: 0 high, 1 clear, 2 soft, 3 hard, 4 low"),
    Column("zero_pages_shared", "int64", "pages", "pages that share a frame of zeros, on a host with ESX"),
    _memory("mem_ballooned_bytes", "guest memory that its own kernel gave up to the balloon"),
    _memory("mem_compressed_bytes", "guest memory that the host keeps compressed, before compression"),
    Column("guest_swpout", "int64", "pages", "pages with data that guests gave to the balloon, since the start"),
    Column("guest_swpin", "int64", "pages", "pages with data that guests brought back then, since the start"),
)

SMALL_PAGES_COUNTERS: tuple[Column, ...] = (
    Column("pages_patched", "int64", "pages", "pages kept as the difference from a similar page"),
    Column("pages_compressed", "int64", "pages", "pages that Difference Engine keeps compressed"),
    Column("patches", "int64", "pages", "pages that became such a difference, since the start"),
    Column("compressions", "int64", "pages", "pages that Difference Engine compressed, since the start"),
    Column("rebuilds", "int64", "pages", "pages that an access brought back from either, since the start"),
)

SAMPLES: tuple[Column, ...] = (
    TIME,
    HOST,
    Column("hosts", "int64", "count", "hosts that the row sums up: of a datacenter all of a kind, whose name it has"),
    *KSM_COUNTERS,
    *KSM_SETTINGS,
    Column(
        "ksmd_cpu_ns",
        "int64",
        "ns",
        "CPU time of ksmd: scan_cpu_ns + merge_cpu_ns, since the start",
        "/proc/PID/schedstat",
    ),
    *VMSTAT_COUNTERS,
    Column("guests_running", "int64", "count", "guests running on the host"),
    Column("mem_total_bytes", "int64", "bytes", "memory of the host", "/proc/meminfo MemTotal"),
    _memory("mem_promised_bytes", "sum of the memory sizes of the running guests"),
    _memory("mem_touched_bytes", "guest memory that has been written at least once and is still held"),
    _memory("mem_private_bytes", "frames that one guest page uses alone"),
    _memory("mem_huge_bytes", "its part in huge pages"),
    _memory("mem_shared_bytes", "frames that guest pages share"),
    _memory("mem_metadata_bytes", "KSM's own records: page items, stable nodes, slots"),
    _memory("mem_pool_bytes", "what compressed pages take: of zram, zswap or ESX"),
    _memory("mem_writeback_bytes", "frames whose pages are on their way to swap"),
    *ESX_COUNTERS,
    *SMALL_PAGES_COUNTERS,
    _memory("mem_deferred_bytes", "parts of huge pages that guests gave back, free once the huge page is split"),
    _memory("mem_reserved_bytes", "huge pages set aside in hugetlbfs that no guest uses"),
    _memory("mem_used_bytes", "private + shared + metadata + reserved + pool + writeback"),
    _memory("mem_free_bytes", "total - used"),
    _memory("mem_swapped_bytes", "guest memory that is swapped out"),
    Column("swap_total_bytes", "int64", "bytes", "what swap holds", "/proc/meminfo SwapTotal"),
    _memory("swap_used_bytes", "slots of swap in use, those of pages that came back and are unchanged included"),
    _memory(
        "saved_bytes",
        "touched guest memory that needs no frame of its own: touched - swapped - private - shared",
    ),
    _vmstat("oom_kills", "count", "guests killed because the host had no frame left, since the start"),
    Column("psi_some_ns", "int64", "ns", "time for which some guest waited for memory, since the start", _PRESSURE),
    Column("psi_full_ns", "int64", "ns", "time for which none could run because of that, since the start", _PRESSURE),
    *(
        Column(f"psi_{kind}_avg{window}", "float64", "%", f"its share of the last {window} s, averaged", _PRESSURE)
        for kind in ("some", "full")
        for window in (10, 60, 300)
    ),
    _cpu("stalled_ns", "time that guests waited for memory, each processor by itself, since the start"),
    _cpu("swpin_wait_ns", "its part for pages to come back from swap, without reclaim, since the start"),
    Column("cores", "int64", "count", "processor cores of the host"),
    _cpu("scan_cpu_ns", "ksmd time spent looking: visits, checksums and tree searches, since the start"),
    _cpu("merge_cpu_ns", "ksmd time spent merging: write protection, comparison, replacement, since the start"),
    Column("khugepaged_cpu_ns", "int64", "ns", "CPU time of khugepaged, since the start", "/proc/PID/schedstat"),
    _cpu("source_cpu_ns", "CPU time of what shares pages where they come from, since the start"),
    Column(
        "kswapd_cpu_ns",
        "int64",
        "ns",
        "CPU time of kswapd, compression included, since the start",
        "/proc/PID/schedstat",
    ),
    _cpu("reclaim_cpu_ns", "guest time spent reclaiming memory, since the start"),
    _cpu("swap_cpu_ns", "guest time spent bringing pages back, waiting for the device left out, since the start"),
    _cpu("cow_cpu_ns", "guest time spent copying shared pages on write, since the start"),
    _cpu("write_private_ns", "how long a write to a page takes that no other page shares a frame with"),
    _cpu("write_merged_ns", "how long a write to a shared page takes, which must be copied first"),
    _cpu("write_latency_worst_ns", "the longest that a write has taken, copying and waiting for memory included"),
    _cpu("work_cpu_ns", "time that the work of guests with a `load` takes without TLB misses, since the start"),
    _cpu("walk_cpu_ns", "guest time spent in walks of page tables after TLB misses, since the start"),
    _cpu(
        "native_walk_cpu_ns",
        "the same without page tables of the host, as if guests had the machine to themselves, since the start",
    ),
    _cpu("tlb_cpu_ns", "walk_cpu_ns less what it were with all memory in huge pages of the host, since the start"),
    _cpu("llc_saved_ns", "guest time saved because shared frames are in the last-level cache once, since the start"),
)
"""Columns of samples.parquet and of scans.parquet: one row per host and sampling time, or per end of a full scan."""

GUESTS: tuple[Column, ...] = (
    Column("guest", "string", "", "name of the guest, unique in the run"),
    Column("vm", "string", "", "name of the scenario's vms entry it came from"),
    HOST,
    Column("start_s", "float64", "s", "when the guest started"),
    Column("stop_s", "float64", "s", "when the guest ended; NaN while it runs"),
    Column("end", "string", "", "running, stopped or oom-killed"),
    _memory("memory_bytes", "memory promised to the guest"),
    _memory("touched_bytes", "memory the guest has written at least once and still holds"),
    _memory("swapped_bytes", "its part that is swapped out"),
    Column("stall_s", "float64", "s", "time it waited for memory, each of its processors by itself"),
    Column("progress_percent", "float64", "%", "work done, against what it would have done without waiting"),
    Column("fork_s", "float64", "s", "time that the fork took which made the guest; 0 for one that booted"),
    Column(
        "page_tables_bytes",
        "int64",
        "bytes",
        "last-level page tables of the guest's process on the host, 8 bytes a page; not in mem_used_bytes",
        "/proc/PID/status VmPTE",
    ),
    _memory("balloon_bytes", "memory in the guest's balloon"),
    _memory("reported_bytes", "memory that the host took because the guest reported it as free, since its start"),
    Column("ksm_merging_pages", "int64", "pages", "pages in the stable tree", _PROCESS + "ksm_merging_pages"),
    Column("ksm_zero_pages", "int64", "pages", "pages mapped to the kernel's zero page", _PROCESS + "ksm_zero_pages"),
    Column("ksm_rmap_items", "int64", "count", "page items KSM keeps, 64 bytes each", _PROCESS + "ksm_rmap_items"),
    Column(
        "ksm_process_profit",
        "int64",
        "bytes",
        "merging and zero pages less page items; summed over guests it counts shared frames as saved",
        _PROCESS + "ksm_process_profit",
    ),
    _memory("compressed_bytes", "memory that the host keeps compressed, before compression"),
    Column("cow_breaks", "int64", "count", "shared pages the guest had to copy on write"),
    Column("pages_written", "int64", "pages", "pages the guest wrote, repeats counted"),
    Column(
        "tlb_slowdown_percent",
        "float64",
        "%",
        "how much longer the guest's work takes than with all memory in huge pages of the host; 0 without a `load`",
    ),
)
"""Columns of guests.parquet: one row per guest, at the end of the run or of the guest."""

EVENTS: tuple[Column, ...] = (
    TIME,
    HOST,
    Column("guest", "string", "", "name of the guest, empty when the host is meant"),
    Column("kind", "string", "", "what happened"),
    Column("detail", "string", "", "the particulars in words"),
)
"""Columns of events.parquet: one row per event, in order of time."""

FLEET: tuple[Column, ...] = (
    Column("time_s", "float64", "s", "end of the epoch"),
    Column("hosts_on", "int64", "count", "hosts that were on or booting in the epoch"),
    Column("hosts_used", "int64", "count", "hosts with a guest"),
    Column("hosts_failed", "int64", "count", "hosts that failed and are not repaired yet"),
    Column("guests_running", "int64", "count", "guests running, by the books of the control plane"),
    Column("guests_waiting", "int64", "count", "guests that wait for room"),
    _memory("mem_promised_bytes", "promised to guests, where they run and where they move to"),
    _memory("mem_reported_bytes", "used by the last reports of the hosts"),
    Column("cpu_asked_cores", "float64", "cores", "cores that guests asked for at the start of the epoch"),
    Column("cpu_short_cores", "float64", "cores", "their part that was more than the cores of their host"),
    Column("power_w", "float64", "W", "power that hosts drew; 0 for one without `power`"),
    Column("energy_j", "int64", "J", "energy that hosts used, since the start"),
    Column("arrivals", "int64", "count", "guests that came, since the start"),
    Column("guests_started", "int64", "count", "starts of guests, those after a failure included, since the start"),
    Column("guests_refused", "int64", "count", "guests that found no room, since the start"),
    Column("guests_ended", "int64", "count", "guests that ended on a sound host, since the start"),
    Column(
        "guests_lost",
        "int64",
        "count",
        "guests that a failed host took with it for good or that their host refused memory, since the start",
    ),
    Column("guests_restarted", "int64", "count", "guests to be started again after a failure, since the start"),
    Column("host_failures", "int64", "count", "hosts that failed, since the start"),
    Column("migrations", "int64", "count", "moves that are over, since the start"),
    _memory("migration_bytes", "what they sent, pages sent again included, since the start"),
    _cpu("migration_ns", "time that they took, summed over moves, since the start"),
    _cpu("downtime_ns", "time for which their guests stood still, since the start"),
    _cpu("waited_ns", "time that started guests had waited for room, since the start"),
)
"""Columns of fleet.parquet, of a scenario with a datacenter: one row per epoch."""

HOSTS: tuple[Column, ...] = (
    HOST,
    Column("kind", "string", "", "name of the scenario's hosts entry"),
    Column("on_s", "float64", "s", "time for which it was on or booting"),
    Column("energy_j", "int64", "J", "energy that it used; 0 without `power`"),
    Column("guests_started", "int64", "count", "guests that started on it"),
    Column("guests_mean", "float64", "count", "guests on it at the end of an epoch, mean over the run"),
    Column("guests_max", "int64", "count", "most guests on it at the end of an epoch"),
    _memory("mem_promised_max_bytes", "most that it promised"),
    Column("cpu_asked_s", "float64", "s", "CPU time that its guests asked for"),
    Column("cpu_short_s", "float64", "s", "its part that was more than its cores"),
    Column("migrations_out", "int64", "count", "guests that left it to move"),
    Column("migrations_in", "int64", "count", "guests that moved to it"),
    Column("failures", "int64", "count", "times it failed"),
    Column("oom_kills", "int64", "count", "guests killed because it had no frame left, by its last report"),
)
"""Columns of hosts.parquet, of a scenario with a datacenter: one row per host."""

FLEET_METRICS: tuple[Metric, ...] = (
    Metric(
        "guests_per_host",
        "count",
        "how many guests a host in use has",
        "guests_running / hosts_used, each summed over the rows of fleet",
    ),
    Metric("hosts_needed", "count", "most hosts in use", "largest hosts_used of fleet"),
    Metric("hosts_on_mean", "count", "hosts that are on", "hosts_on, mean over the rows of fleet"),
    Metric(
        "energy_kwh", "kWh", "energy that the hosts used", "energy_j of hosts, summed, / 3.6e6; none without `power`"
    ),
    Metric("migrations", "count", "moves that are over", "migrations of fleet at the end"),
    Metric("migration_bytes", "bytes", "what they sent", "migration_bytes of fleet at the end"),
    Metric("migration_s", "s", "how long a move takes", "migration_ns / migrations of fleet at the end"),
    Metric(
        "migration_downtime_s",
        "s",
        "how long a guest stands still when it moves",
        "downtime_ns / migrations of fleet at the end",
    ),
    Metric("guests_refused", "count", "guests that found no room", "guests_refused of fleet at the end"),
    Metric("waiting_s", "s", "how long a guest waits for room", "waited_ns / guests_started of fleet at the end"),
    Metric(
        "oom_kills_per_day",
        "count",
        "guests killed for lack of memory, per day",
        "oom_kills summed over hosts / duration in days",
    ),
    Metric(
        "stalls_per_day",
        "count",
        "how often a host has a guest wait for memory for a tenth of the time from one report to the next, per day",
        "reports after which psi_some_ns has grown by more than 10 % of that time, of all hosts / duration in days",
    ),
    Metric(
        "cpu_short_percent",
        "%",
        "CPU time that guests asked for and their host did not have",
        "100 * cpu_short_s / cpu_asked_s, each summed over hosts",
    ),
    Metric("host_failures", "count", "hosts that failed", "host_failures of fleet at the end"),
    Metric("guests_restarted", "count", "guests to be started again", "guests_restarted of fleet at the end"),
    Metric("guests_lost", "count", "guests lost for good", "guests_lost of fleet at the end"),
)
"""The metrics of a scenario with a datacenter, from the tables fleet and hosts; others have none of them."""

HEADLINES: tuple[Metric, ...] = (
    Metric(
        "consolidation_ratio",
        "ratio",
        "memory promised to guests for each byte of host memory they use",
        "mem_promised_bytes / mem_used_bytes, each summed over hosts, at the last sample with a running guest",
    ),
    Metric(
        "consolidation_ratio_mean",
        "ratio",
        "the same over the whole run",
        "mean of that ratio over the samples with a running guest, each weighted by the time to the next sample",
    ),
    Metric(
        "saved_bytes",
        "bytes",
        "guest memory that needs no frame of its own",
        "saved_bytes summed over hosts at the last sample with a running guest",
    ),
    Metric(
        "saved_ksm_bytes",
        "bytes",
        "the same by KSM's own counters",
        f"{PAGE_BYTES} * (pages_sharing + ksm_zero_pages) summed over hosts at the last sample with a running guest",
    ),
    Metric(
        "general_profit",
        "bytes",
        "memory saved by KSM less its page metadata, as the kernel reports it",
        "general_profit summed over hosts at the last sample",
    ),
    Metric(
        "cpu_overhead_percent",
        "%",
        "host CPU spent because of overcommit",
        "100 * (ksmd + source + cow + tlb + kswapd + reclaim + swap)_cpu_ns / (cores * time), each summed over hosts",
    ),
    Metric("cpu_scan_percent", "%", "its part for scanning", "100 * scan_cpu_ns / (cores * time)"),
    Metric("cpu_merge_percent", "%", "its part for merging", "100 * merge_cpu_ns / (cores * time)"),
    Metric(
        "cpu_swap_percent",
        "%",
        "its part for reclaiming, swapping and compressing",
        "100 * (kswapd + reclaim + swap)_cpu_ns / (cores * time)",
    ),
    Metric("cpu_cow_percent", "%", "its part for copying shared pages on write", "100 * cow_cpu_ns / (cores * time)"),
    Metric(
        "cpu_tlb_percent",
        "%",
        "its part for TLB misses that huge pages would save",
        "100 * tlb_cpu_ns / (cores * time)",
    ),
    Metric(
        "tlb_slowdown_percent",
        "%",
        "how much longer the guests' work takes than with all memory in huge pages of the host",
        "100 * tlb_cpu_ns / (work_cpu_ns + walk_cpu_ns - tlb_cpu_ns), each summed over hosts; none without a `load`",
    ),
    Metric(
        "native_speed_percent",
        "%",
        "speed of the guests' work against the same without page tables of the host",
        "100 * (work_cpu_ns + native_walk_cpu_ns) / (work_cpu_ns + walk_cpu_ns), each summed over hosts",
    ),
    Metric(
        "llc_gain_percent",
        "%",
        "how much faster the guests' work is because shared frames are in the last-level cache once",
        "100 * llc_saved_ns / (work_cpu_ns + walk_cpu_ns - llc_saved_ns), each summed over hosts; in no other metric",
    ),
    Metric(
        "ksmd_cpu_percent",
        "%",
        "how busy ksmd keeps one core over the whole run",
        "100 * ksmd_cpu_ns / time, mean over hosts",
    ),
    Metric(
        "ksmd_cpu_percent_settled",
        "%",
        "how busy ksmd keeps one core once merging has settled",
        "100 * ksmd_cpu_ns / time over the last nine full scans (the cycle of smart_scan), mean over hosts",
    ),
    Metric(
        "mem_huge_bytes",
        "bytes",
        "guest memory in huge pages",
        "mem_huge_bytes summed over hosts at the last sample with a running guest",
    ),
    Metric("full_scans", "count", "full scans done", "full_scans summed over hosts at the last sample"),
    Metric(
        "scan_time_s",
        "s",
        "how long a full scan takes",
        "mean time of the last nine full scans (the cycle of smart_scan), mean over hosts",
    ),
    Metric(
        "time_to_90_percent_s",
        "s",
        "how long sharing takes to pay",
        "first time at which saved_bytes, summed over hosts, reaches 90 % of the metric saved_bytes",
    ),
    Metric(
        "mem_used_bytes",
        "bytes",
        "host memory in use for guests",
        "mem_used_bytes summed over hosts at the last sample with a running guest",
    ),
    Metric(
        "mem_free_min_bytes",
        "bytes",
        "free memory at the tightest moment of the tightest host",
        "smallest mem_free_bytes of any host and sample",
    ),
    Metric(
        "mem_swapped_bytes",
        "bytes",
        "guest memory that is swapped out",
        "mem_swapped_bytes summed over hosts at the last sample with a running guest",
    ),
    Metric(
        "compression_ratio",
        "ratio",
        "how many bytes of guests' pages a byte of compressed memory keeps",
        "mem_compressed_bytes / mem_pool_bytes, each summed over hosts at the last sample with a running guest",
    ),
    Metric(
        "swap_in_s",
        "s",
        "how long a guest waits for a page to come back from swap",
        "swpin_wait_ns / (pgmajfault - swpin_zero - ksm_swpin_copy), each summed over hosts at the last sample",
    ),
    Metric(
        "stall_percent",
        "%",
        "how much of the time some guest waited for memory",
        "100 * psi_some_ns / time, mean over hosts",
    ),
    Metric(
        "stall_full_percent",
        "%",
        "how much of the time none could run because of that",
        "100 * psi_full_ns / time, mean over hosts",
    ),
    Metric(
        "progress_percent",
        "%",
        "work that guests did, against what they would have done without waiting for memory",
        "progress_percent, mean over guests",
    ),
    Metric(
        "fork_s",
        "s",
        "the longest fork: its parent waits for the page tables",
        "largest fork_s of any guest; 0 without forks",
    ),
    Metric(
        "page_tables_bytes",
        "bytes",
        "last-level page tables of the guests on their hosts",
        "page_tables_bytes summed over the guests that run at the end",
    ),
    Metric(
        "write_private_ns",
        "ns",
        "how long a write to a page takes that no other page shares a frame with",
        "write_private_ns at the last sample, largest of any host",
    ),
    Metric(
        "write_merged_ns",
        "ns",
        "how long a write to a shared page takes: the difference tells a guest that another has such a page",
        "write_merged_ns at the last sample, largest of any host",
    ),
    Metric(
        "write_latency_worst_ns",
        "ns",
        "the longest that a write took: to copy a page, to bring it back from swap, to reclaim memory",
        "write_latency_worst_ns at the last sample, largest of any host",
    ),
    Metric("oom_kills", "count", "guests killed for lack of memory", "oom_kills summed over hosts at the last sample"),
    Metric("guests_running", "count", "guests running at the end", "guests_running summed over hosts, last sample"),
)
"""The metrics a reader looks at first, in reading order."""

_HEADLINE_NAMES = frozenset(metric.name for metric in HEADLINES)

COUNTER_METRICS: tuple[Metric, ...] = tuple(
    Metric(column.name, column.unit, column.meaning, f"{column.name} summed over hosts at the last sample")
    for column in (*KSM_COUNTERS, *VMSTAT_COUNTERS, *ESX_COUNTERS)
    if column.name not in _HEADLINE_NAMES
)
"""The kernel's counters at the end of the run."""

METRICS: tuple[Metric, ...] = HEADLINES + FLEET_METRICS + COUNTER_METRICS
"""Every key of summary.json, in its order."""


def markdown() -> str:
    """Return the reference of all tables and metrics as Markdown."""
    tables = (
        ("samples.parquet and scans.parquet", SAMPLES),
        ("guests.parquet", GUESTS),
        ("events.parquet", EVENTS),
        ("fleet.parquet", FLEET),
        ("hosts.parquet", HOSTS),
    )
    sections = [
        _section(title, ("column", "type", "unit", "meaning", "kernel"), map(_cells, columns))
        for title, columns in tables
    ]
    metrics = ((f"`{m.name}`", m.unit, m.meaning, m.formula) for m in METRICS)
    return "\n".join([*sections, _section("summary.json", ("metric", "unit", "meaning", "formula"), metrics)])


def _cells(column: Column) -> Sequence[str]:
    kernel = f"`{column.kernel}`" if column.kernel else ""
    return f"`{column.name}`", column.dtype, column.unit, column.meaning, kernel


def _section(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {title}\n\n{table}\n"
