"""The typed question: hosts, guests and expectations, read from YAML with overrides, and its JSON Schema."""

from sim.scenario.model import Scenario, load, parse, schema

__all__ = ["Scenario", "load", "parse", "schema"]
