"""Scenario files as tests: pytest collects them with `--overcommit`, or `overcommit = true` in its configuration.

Each expectation is a test; the first of a file runs the scenario. What stands under `warn` becomes a warning of pytest.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sim.scenario import Scenario
    from sim.scenario.expect import Verdict


class Warned(UserWarning):
    """Something that should be met is not."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what turns collection on."""
    parser.addoption("--overcommit", action="store_true", help="Collect scenario files and test their expectations.")
    parser.addini("overcommit", "Collect scenario files and test their expectations.", type="bool", default=False)
    parser.addini("overcommit_files", "Names of the files to collect.", type="args", default=["*.yaml"])


def pytest_collect_file(parent: pytest.Collector, file_path: Path) -> ScenarioFile | None:
    """Collect a file if it was asked for."""
    config = parent.config
    asked = config.getoption("overcommit") or config.getini("overcommit")
    if not asked or not any(fnmatch(file_path.name, pattern) for pattern in config.getini("overcommit_files")):
        return None
    return ScenarioFile.from_parent(parent, path=file_path)


class ScenarioFile(pytest.File):
    """A scenario file."""

    @cached_property
    def scenario(self) -> Scenario:
        """What it asks."""
        from sim.scenario import load

        return load(self.path)

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """What becomes of each expectation; the worst of the replications."""
        from sim.run import run
        from sim.scenario.expect import worst

        return worst([self.scenario.judge(run(each).summary) for each in self.scenario.runs])

    def collect(self) -> Iterator[pytest.Item]:
        """Yield a test for each expectation. A file that is wrong fails to be collected, with every mistake."""
        from sim.errors import UserError

        try:
            expected = [*self.scenario.expect, *self.scenario.warn]
        except UserError as error:
            raise self.CollectError(str(error)) from None
        for number, each in enumerate(expected):
            yield ExpectationItem.from_parent(self, name=each.text, number=number)


class ExpectationItem(pytest.Item):
    """One expectation."""

    parent: ScenarioFile

    def __init__(self, *, number: int, **rest: object) -> None:
        super().__init__(**rest)  # type: ignore[arg-type]
        self.number = number

    def runtest(self) -> None:
        """Fail or warn if it is not met."""
        verdict = self.parent.verdicts[self.number]
        if verdict.failed:
            raise Unmet(_told(verdict))
        if not verdict.met:
            self.warn(Warned(_told(verdict)))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: str | None = None) -> str:
        """What was found, without a traceback unless there is a bug."""
        from sim.errors import OvercommitError

        if isinstance(excinfo.value, Unmet | OvercommitError):
            return str(excinfo.value)
        return str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where it stands."""
        from sim.document import read

        key, number = "expect", self.number
        if (musts := len(self.parent.scenario.expect)) <= number:
            key, number = "warn", number - musts
        line = read(self.path).problem((key, number), "").line
        return self.path, None if line is None else line - 1, self.name


class Unmet(Exception):
    """An expectation that is not met."""


def _told(verdict: Verdict) -> str:
    from sim.report.words import amount
    from sim.scenario.expect import Expectation

    unit = Expectation.parse(verdict.expectation).metric.unit
    return f"{verdict.expectation}: actual {amount(verdict.actual, unit)}, margin {amount(verdict.margin, unit)}"
