"""What became of scenarios, each in all its replications; what was run once is not run again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sim.engine import engine
from sim.errors import OvercommitError
from sim.results import Summary, kept_summary
from sim.results.summary import mean
from sim.run import check_size
from sim.scenario import Scenario
from sim.scenario.expect import Verdict, worst
from sim.study.sweeps import Failure, Progress, kept, run_left, what_is_left


@dataclass(frozen=True)
class Outcome:
    """What became of a scenario."""

    scenario: Scenario
    digests: Sequence[str]
    """The result of each replication."""
    summaries: Sequence[Summary]
    """Its metrics; of those that have a result."""
    failure: Failure | None
    """Why one has none."""

    @property
    def verdicts(self) -> Sequence[Verdict]:
        """Each expectation where it fared worst among the replications."""
        return worst([self.scenario.judge(summary) for summary in self.summaries])

    @property
    def kept(self) -> bool:
        """Whether all that must hold does, in every replication."""
        return self.failure is None and not any(verdict.failed for verdict in self.verdicts)

    @property
    def mean(self) -> Summary:
        """Each metric's mean over the replications."""
        return mean(self.summaries)


def outcomes(
    scenarios: Iterable[Scenario],
    out: Path,
    jobs: int | None = None,
    progress: Progress | None = None,
    cluster: str | None = None,
) -> tuple[Sequence[Outcome], int]:
    """Return what became of each of the *scenarios*, and how many runs that took.

    A run that fails, or that this machine cannot do, is noted and the others go on. Whether the machines of a cluster
    have room for it is found there.
    """
    asked = [(scenario, {run.digest(engine()): run for run in scenario.runs}) for scenario in scenarios]
    runs = {digest: run for _, each in asked for digest, run in each.items()}
    here = cluster is None
    refused = _refused(runs, out) if here else {}
    asked_for = {digest: run for digest, run in runs.items() if digest not in refused}
    left, jobs, _ = what_is_left(asked_for, out, jobs, here)
    failed = {**refused, **run_left(left, out, jobs, progress, "runs", cluster)}
    summaries, failures = kept({digest: run.name for digest, run in runs.items()}, out, failed)
    return [_outcome(scenario, list(each), summaries, failures) for scenario, each in asked], len(left)


def _refused(runs: Mapping[str, Scenario], out: Path) -> Mapping[str, Failure]:
    """Of runs without a result those that this machine cannot do."""
    found: dict[str, Failure] = {}
    for digest, run in runs.items():
        if kept_summary(run.name, digest, out) is not None:
            continue
        try:
            check_size(run)
        except OvercommitError as error:
            found[digest] = Failure(error.exit_code, str(error))
    return found


def _outcome(
    scenario: Scenario, digests: Sequence[str], summaries: Mapping[str, Summary], failures: Mapping[str, Failure]
) -> Outcome:
    failure = next((failures[digest] for digest in digests if digest in failures), None)
    return Outcome(scenario, digests, [summaries[digest] for digest in digests if digest in summaries], failure)
