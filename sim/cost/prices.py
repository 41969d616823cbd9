"""What work costs: price sets measured on a machine or taken from a publication, and the time they make of counts."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Final

from pydantic import Field

from sim.document import read
from sim.errors import At, UserError, suggestion
from sim.units import Block

FOLDER: Final = Path(__file__).parent / "prices"
DEFAULT: Final = "emerald-rapids"


class Price(Block):
    """One price and where it comes from."""

    ns: float = Field(ge=0, le=1e9)
    """Nanoseconds."""
    source: str = Field(min_length=10)
    """Measurement, or paper and table."""


class Factor(Block):
    """A factor without a unit, and where it comes from."""

    factor: float = Field(ge=0, le=100)
    """The factor."""
    source: str = Field(min_length=10)
    """Measurement, or paper and table."""


class Prices(Block):
    """CPU time of every kind of work."""

    name: str
    """Name of the set, that of its file."""
    about: str = Field(min_length=10)
    """Machine, kernel and date."""
    batch: Price
    """Waking up for a batch."""
    scan: Price
    """Beginning a full scan: the LRU caches of all CPUs are drained."""
    visit_ksm: Price
    """Visiting a page that is merged already."""
    visit: Price
    """Visiting any other page, without what follows."""
    checksum: Price
    """Checksum of a page."""
    stable_level: Price
    """First level of a descent in the stable tree; level n costs n times as much, being colder."""
    unstable_level: Price
    """First level of a descent in the unstable tree; level n costs n times as much."""
    compare_byte: Price
    """Comparing one more equal byte."""
    item: Price
    """Item of a page seen for the first time."""
    skip: Price
    """Page that smart_scan skips."""
    absent: Price
    """Page table entry without a page."""
    insert: Price
    """Insertion into the unstable tree."""
    merge: Price
    """Replacing a page by a KSM page, without comparing."""
    promote: Price
    """Making a page a KSM page."""
    zero_merge: Price
    """Replacing a page by the zero page."""
    attach: Price
    """Attaching the item of a forked KSM page."""
    dup: Price
    """Looking at one more KSM page of a chain."""
    node_level: Price
    """Looking at the stable node of a merged page, once for each doubling of the number of nodes: they are colder."""
    split: Price
    """Splitting a huge page, paid by ksmd."""
    collapse: Price
    """Copying the pages of a block into a huge page, paid by khugepaged."""
    collapse_scan: Price
    """Looking at the pages of a block, paid by khugepaged."""
    cow_break: Price
    """Copy on write, paid by the guest."""
    cold_caches: Factor
    """Surcharge for caches gone cold while ksmd slept: the factor times ln(1 + v/100) 100/v of the cost of a batch
    with v visits."""

    def picoseconds(self, kind: str) -> int:
        """The price of one kind of work."""
        price: Price = getattr(self, kind)
        return round(price.ns * 1000)


def names() -> list[str]:
    """Price sets that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@lru_cache
def load(name: str, folder: Path = Path()) -> Prices:
    """The price set of that name, or of that .yaml file in *folder*. Raises At for one that is unknown or wrong."""
    own = name.endswith(".yaml")
    path = folder / name if own else FOLDER / f"{name}.yaml"
    if not os.path.isfile(path):
        remedy = "paths are relative to the scenario file" if own else suggestion(name, names())
        raise At("", "no such price set", remedy)
    try:
        prices = read(path).check(Prices)
    except UserError as error:
        first, *others = error.problems
        more = f" and {len(others)} more" if others else ""
        raise At("", f"is a wrong price set ({first}{more})", "correct that file") from None
    if prices.name != path.stem:
        raise At("", f"says that its name is {prices.name}", f"write name: {path.stem} in it")
    return prices
