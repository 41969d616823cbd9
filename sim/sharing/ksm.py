"""KSM as a scenario describes it: the files of /sys/kernel/mm/ksm, and changes to them in mid-run.

Source: Linux Documentation/admin-guide/mm/ksm.rst for names and defaults; `ksm_pass.py` has the behaviour.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from sim.errors import At
from sim.sharing.kernels import Kernel
from sim.sharing.mechanism import Scans
from sim.units import DAY, SECOND, Block, Duration, Rate, Share, Switch, not_boolean

if TYPE_CHECKING:
    from sim.sharing.scanner import Scanner

AdvisorMode = Literal["none", "scan-time"]


class KsmChange(Block):
    """Files of /sys/kernel/mm/ksm written at one moment, in the order they stand here."""

    at: Duration
    """When."""
    sleep_millisecs: int | None = Field(default=None, ge=0, le=1 << 31)
    """Milliseconds between two batches."""
    pages_to_scan: int | None = Field(default=None, ge=0, le=1 << 31)
    """Pages of a batch."""
    smart_scan: Switch | None = None
    """Whether pages that never merged are skipped more and more often."""
    use_zero_pages: Switch | None = None
    """Whether empty pages merge with the kernel's zero page."""
    max_page_sharing: int | None = Field(default=None, ge=2, le=1 << 31)
    """Most pages that share one frame; refused (EBUSY) while any page is shared."""
    advisor_mode: AdvisorMode | None = None
    """Who sets pages_to_scan."""
    run: Annotated[Literal[0, 1, 2], not_boolean] | None = None
    """0 stop, 1 run, 2 stop and unmerge everything."""

    def knobs(self) -> Iterator[tuple[str, int | str]]:
        """Names and values written."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name != "at" and value is not None:
                yield name, value


class Hints(Block):
    """Hints of pages that guests just read from their virtual disks or wrote to them, which ksmd visits out of turn.

    XLH, a patch to Linux 3.4 that never went in: Miller and others, USENIX ATC 2013. A ring of hints of which the last
    is followed first, in turn with the ordinary scan. Not told there, and assumed: the two settings, that a hinted page
    need not be found unchanged by a second scan, and that its checksum is taken all the same.
    """

    entries: int = Field(default=8192, ge=1, le=1 << 24)
    """Hints that are kept; a new one takes the place of the oldest."""
    share: Annotated[Share, Field(gt=0)] = 0.5
    """Most of a batch's pages_to_scan that goes to hinted pages; without hints all of it is the ordinary scan's."""


class MixedPages(Block):
    """Which huge pages are taken apart, and which are made again: by how often they are used and what they hold.

    SmartMD, a patch to Linux: Guo and others, USENIX ATC 2017. Only its abstract and a note of its laboratory were read
    (liujunming.top, 24 Aug 2017), so the figures here are assumed, and what the monitoring itself costs is left out.
    """

    every: Duration = Field(default=10 * SECOND, gt=0)
    """How often huge pages are judged; none is split before the first time."""
    cold_below: Rate = 1.0
    """A huge page with fewer accesses is cold; ksmd splits no other, and khugepaged makes no other small pages huge."""
    repeated: Share = 0.125
    """Least share of a cold huge page's pages that must equal others, before ksmd may split it."""
    free_below: Share = 1.0
    """ksmd splits huge pages only while less of the host's memory is free."""


class Ksm(Scans):
    """Kernel Samepage Merging."""

    refused: ClassVar[tuple[str, ...]] = ()

    run: Switch = 1
    """Whether ksmd runs from the start."""
    pages_to_scan: int = Field(default=100, ge=0, le=1 << 31)
    """Pages of a batch (kernel default 100)."""
    sleep_millisecs: int = Field(default=20, ge=0, le=1 << 31)
    """Milliseconds between two batches (kernel default 20)."""
    smart_scan: Switch | None = None
    """Skip pages that never merged more and more often (6.7 and later, default 1)."""
    max_page_sharing: int | None = Field(default=None, ge=2, le=1 << 31)
    """Most pages that share one frame (4.13 and later, default 256)."""
    use_zero_pages: Switch = 0
    """Merge empty pages with the kernel's zero page (4.11 and later)."""
    merge_across_nodes: Switch = 1
    """Merge pages of different NUMA nodes (3.9 and later, default 1)."""
    stable_node_chains_prune_millisecs: int = Field(default=2000, ge=0, le=1 << 31)
    """How often a chain of full KSM pages is walked whole (kernel default 2000)."""
    max_kernel_pages: int | None = Field(default=None, ge=0)
    """Most KSM pages (2.6.32 only; default a quarter of the host's memory, 0 no limit)."""
    advisor_mode: AdvisorMode = "none"
    """scan-time lets the kernel set pages_to_scan (6.8 and later)."""
    advisor_target_scan_time: int = Field(default=200, ge=1, le=1 << 31)
    """Seconds that a full scan shall take."""
    advisor_max_cpu: int = Field(default=70, ge=1, le=100)
    """Most CPU of ksmd, percent of a core."""
    advisor_min_pages_to_scan: int = Field(default=500, ge=1, le=1 << 31)
    """pages_to_scan to start from; the kernel does not use it as a lower bound."""
    advisor_max_pages_to_scan: int = Field(default=30000, ge=1, le=1 << 31)
    """Most pages_to_scan."""
    ksmd_cpu_before: Duration = Field(default=0, le=30 * DAY)
    """CPU time ksmd used before the run: the advisor, once on, takes it for that of its first scan."""
    hints: Hints | None = None
    """Look at pages first that guests read from their disks; no released kernel does."""
    mixed_pages: MixedPages | None = None
    """Split only huge pages that are cold and hold enough that is equal; no released kernel does."""
    changes: tuple[KsmChange, ...] = ()
    """Settings written in mid-run."""

    @property
    def wants_files(self) -> bool:
        """For hints."""
        return self.hints is not None

    def behaviour(self) -> type[Scanner]:
        """ksmd."""
        from sim.sharing.scanner import Scanner

        return Scanner

    def completed(self, kernel: Kernel) -> Ksm:
        """The block with the kernel's own defaults written out."""
        own = {"smart_scan": int(kernel.smart_scan), "max_page_sharing": 256 if kernel.sharing_limit else None}
        return self.model_copy(update={name: value for name, value in own.items() if getattr(self, name) is None})

    def faults(self, kernel: Kernel) -> Iterator[At]:
        """Settings that this kernel does not have."""
        asked = {
            "smart_scan": ("6.7", kernel.smart_scan, bool(self.smart_scan)),
            "max_page_sharing": ("4.13", kernel.sharing_limit, self.max_page_sharing is not None),
            "use_zero_pages": ("4.11", kernel.zero_pages, bool(self.use_zero_pages)),
            "merge_across_nodes": ("3.9", kernel.numa_trees, not self.merge_across_nodes),
            "advisor_mode": ("6.8", kernel.advisor, self.advisor_mode != "none"),
            "ksmd_cpu_before": ("6.8", kernel.advisor, self.ksmd_cpu_before > 0),
        }
        for name, (since, has, used) in asked.items():
            if used and not has:
                yield At(name, f"came with kernel {since}", f"remove it or choose kernel {since} or later")
        if self.max_kernel_pages is not None and kernel.node_holds_page:
            yield At("max_kernel_pages", "went away with kernel 2.6.33", "remove it or choose kernel 2.6.32")
        for i, change in enumerate(self.changes):
            for name, _ in change.knobs():
                since, has, _ = asked.get(name, ("", True, False))
                if not has:
                    yield At(f"changes.{i}.{name}", f"came with kernel {since}", f"choose kernel {since} or later")
        if self.advisor_min_pages_to_scan > self.advisor_max_pages_to_scan:
            remedy = f"write at most {self.advisor_max_pages_to_scan}"
            yield At("advisor_min_pages_to_scan", "is above advisor_max_pages_to_scan", remedy)
        if self.advisor_mode == "scan-time" and self.pages_to_scan != type(self).model_fields["pages_to_scan"].default:
            yield At("pages_to_scan", "cannot be written while the advisor sets it", "set advisor_min_pages_to_scan")
