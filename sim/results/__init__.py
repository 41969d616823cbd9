"""Result tables, their summary, and the folders they are kept in."""

from sim.results.store import Loaded, Result, kept_summary, load, write
from sim.results.summary import Summary, summarise
from sim.results.tables import frame, partial, typed

__all__ = ["Loaded", "Result", "Summary", "frame", "kept_summary", "load", "partial", "summarise", "typed", "write"]
