"""Many runs of one scenario."""

from sim.study.checks import check
from sim.study.figures import published
from sim.study.sweeps import Plan, Swept, plan, run_points, sweep

__all__ = ["Plan", "Swept", "check", "plan", "published", "run_points", "sweep"]
