"""Expectations of many scenarios, and what their metrics were the last time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sim import files
from sim.columns import METRICS
from sim.document import Document, read
from sim.errors import UserError
from sim.files import publish
from sim.results import Summary
from sim.results.junit import Case, Suite
from sim.scenario import Scenario, load
from sim.scenario.expect import Severity, Verdict
from sim.study.outcomes import Outcome, outcomes
from sim.study.sweeps import Failure, Progress

if TYPE_CHECKING:
    import pandas as pd

State = Literal["met", "not met", "no data", "moved", "failed"]

_UNMET = 1
_UNITS = {metric.name: metric.unit for metric in METRICS}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    """The expectation as written, or the metric that was compared."""
    state: State
    severity: Severity = "error"
    actual: float | None = None
    margin: float | None = None
    unit: str = ""
    text: str = ""
    """What there is to say beside actual value and margin."""
    line: int | None = None
    exit_code: int = _UNMET
    """What the command ends with if this is not as it should be."""

    @property
    def fails(self) -> bool:
        """Whether it fails the check."""
        return self.state != "met" and self.severity == "error"


@dataclass(frozen=True)
class Checked:
    """One scenario file with what was found."""

    file: Path
    name: str
    digests: Sequence[str]
    findings: Sequence[Finding]

    @property
    def exit_code(self) -> int:
        """What the command ends with because of it."""
        return max((finding.exit_code for finding in self.findings if finding.fails), default=0)


@dataclass(frozen=True)
class Baseline:
    """A folder with the metrics of each scenario, as NAME.json."""

    folder: Path
    update: bool = False
    """Write what is found, instead of comparing with what is there."""

    def file(self, scenario: Scenario) -> Path:
        """Where the metrics of a scenario are."""
        return self.folder / f"{scenario.name}.json"

    def findings(self, scenario: Scenario, summary: Summary) -> Iterator[Finding]:
        """Yield every metric that moved by more than the scenario tolerates."""
        file = self.file(scenario)
        try:
            compared = _metrics(json.loads(file.read_text()))
        except FileNotFoundError:
            yield Finding("baseline", "failed", text=f"{file} is missing; write it with --update")
            return
        except (OSError, ValueError) as error:
            yield Finding("baseline", "failed", text=f"{file} cannot be read: {error}; write it anew with --update")
            return
        moved = [each for name, value in compared.items() if (each := _moved(scenario, name, value, summary))]
        yield from moved or [Finding("baseline", "met", text=f"{len(compared)} metrics as in {file}")]

    def write(self, scenario: Scenario, summary: Summary) -> None:
        """Keep the metrics for the next time."""
        with files.explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            publish(self.file(scenario), (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())


def _metrics(data: object) -> Summary:
    """The metrics of a baseline. Raises ValueError if it holds something else."""
    if not isinstance(data, dict) or not all(isinstance(value, int | float | None) for value in data.values()):
        raise ValueError("it is no block of metrics")
    return data


def _moved(scenario: Scenario, name: str, before: float | None, summary: Summary) -> Finding | None:
    now, unit = summary.get(name), _UNITS.get(name, "")
    if name not in _UNITS:
        return Finding(name, "moved", text="is no metric any more; write the baseline anew with --update")
    if before is None or now is None:
        if before is None and now is None:
            return None
        return Finding(
            name, "moved", actual=now, unit=unit, text="had no data" if before is None else "has no data now"
        )
    if scenario.tolerance(name).holds(before, now):
        return None
    return Finding(name, "moved", actual=now, margin=now - before, unit=unit)


def check(
    files: Sequence[str | Path], out: str | Path = "results", jobs: int | None = None, cluster: str | None = None
) -> pd.DataFrame:
    """Check every expectation of scenario *files*; return one row per expectation.

    Runs that have a result in *out* are not run again; the others run in *jobs* processes, or on the workers of the
    Dask scheduler at the address *cluster*.
    """
    import pandas as pd

    return pd.DataFrame(
        [
            row
            for each in check_all([Path(file) for file in files], Path(out), jobs, cluster=cluster)
            for row in rows(each)
        ]
    )


def check_all(
    files: Sequence[Path],
    out: Path,
    jobs: int | None = None,
    baseline: Baseline | None = None,
    progress: Progress | None = None,
    cluster: str | None = None,
) -> Sequence[Checked]:
    """Run what has no result yet and return what was found, file by file. A file that is wrong is a finding too."""
    scenarios: dict[Path, Scenario] = {}
    wrong: dict[Path, UserError] = {}
    for file in files:
        try:
            scenarios[file] = load(file)
        except UserError as error:
            wrong[file] = error
    if baseline:
        _refuse_equal_names(scenarios)
    asked = {file: each for file, each in scenarios.items() if baseline or each.expect or each.warn}
    found, _ = outcomes(asked.values(), out, jobs, progress, cluster)
    known = dict(zip(asked, found, strict=True))
    return [
        _wrong(file, wrong[file]) if file in wrong else _checked(file, scenarios[file], known.get(file), baseline)
        for file in files
    ]


def _refuse_equal_names(scenarios: Mapping[Path, Scenario]) -> None:
    """Refuse files whose baseline would be the same."""
    counted = Counter(each.name for each in scenarios.values())
    for name in (name for name, count in counted.items() if count > 1):
        both = " and ".join(str(file) for file, each in scenarios.items() if each.name == name)
        raise UserError(f"{both}: are all named {name}, as one baseline would be; give them names of their own")


def _wrong(file: Path, error: UserError) -> Checked:
    findings = [
        Finding("scenario", "failed", text=str(problem), line=problem.line, exit_code=error.exit_code)
        for problem in error.problems
    ]
    return Checked(file, file.stem, (), findings)


def _checked(file: Path, scenario: Scenario, outcome: Outcome | None, baseline: Baseline | None) -> Checked:
    if outcome is None:
        return Checked(file, scenario.name, (), ())
    if outcome.failure:
        return Checked(file, scenario.name, outcome.digests, [_failed(outcome.failure)])
    document = read(file)
    findings = [*_judged(document, "expect", outcome.verdicts), *_judged(document, "warn", outcome.verdicts)]
    if baseline and baseline.update:
        baseline.write(scenario, outcome.mean)
    elif baseline:
        findings += baseline.findings(scenario, outcome.mean)
    return Checked(file, scenario.name, outcome.digests, findings)


def _failed(failure: Failure) -> Finding:
    return Finding("run", "failed", text=failure.text, exit_code=failure.exit_code)


def _judged(document: Document, key: str, verdicts: Sequence[Verdict]) -> Iterator[Finding]:
    """The verdicts on what stands under one key, each with its line."""
    severity: Severity = "error" if key == "expect" else "warning"
    for number, verdict in enumerate(each for each in verdicts if each.severity == severity):
        state: State = "met" if verdict.met else "no data" if verdict.actual is None else "not met"
        unit = _UNITS[verdict.expectation.split()[0]]
        line = document.problem((key, number), "").line
        yield Finding(verdict.expectation, state, severity, verdict.actual, verdict.margin, unit, line=line)


def shard(files: Iterable[Path], number: int, shards: int) -> Sequence[Path]:
    """The part of the files that machine *number* of so many checks; together the parts are all files, each once."""
    return sorted(files)[number - 1 :: shards]


def rows(checked: Checked) -> Iterator[Mapping[str, object]]:
    """What was found in a file, as plain data."""
    for each in checked.findings:
        yield {
            "file": str(checked.file),
            "line": each.line,
            "scenario": checked.name,
            "what": each.what,
            "severity": each.severity,
            "state": each.state,
            "actual": each.actual,
            "margin": each.margin,
            "text": each.text,
        }


def suite(checked: Checked, said: Mapping[Finding, str]) -> Suite:
    """What was found as tests; *said* is each finding in words. What is only a warning passes."""

    def state(finding: Finding) -> Literal["passed", "failure", "error"]:
        if not finding.fails:
            return "passed"
        return "failure" if finding.state in ("not met", "moved") else "error"

    def text(finding: Finding) -> str:
        return said[finding] if finding.fails or finding.state == "met" else f"warning: {said[finding]}"

    cases = [Case(each.what, state(each), text(each)) for each in checked.findings]
    if not cases:
        cases = [Case("expect", "skipped", "expects nothing")]
    return Suite(checked.name, str(checked.file), cases)


def command(file: Path, finding: Finding, said: str) -> str:
    """A workflow command, by which GitHub shows a finding beside its line.

    Source: GitHub documentation, "Workflow commands", and how its toolkit escapes them (packages/core, command.ts).
    """
    level = "error" if finding.severity == "error" else "warning"
    places = {"file": str(file), "line": str(finding.line or 1), "title": finding.what}
    told = ",".join(f"{name}={_escaped(value, ':,')}" for name, value in places.items())
    return f"::{level} {told}::{_escaped(said)}"


def _escaped(text: str, also: str = "") -> str:
    return "".join(f"%{ord(letter):02X}" if letter in f"%\r\n{also}" else letter for letter in text)
