"""Recorded traces of guests, read as arrivals: Alibaba's openb, PlanetLab, Google, Bitbrains, Azure."""

from sim.datacenter.traces.openb import NodeKind, nodes
from sim.datacenter.traces.reading import Reading, Survey, format_of, newcomers, read_alone
from sim.datacenter.traces.rows import Rows
from sim.datacenter.traces.trace import Machine, Trace

__all__ = ["Machine", "NodeKind", "Reading", "Rows", "Survey", "Trace", "format_of", "newcomers", "nodes", "read_alone"]
