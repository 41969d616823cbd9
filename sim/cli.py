"""The command line: one function per verb, each of which parses, calls and prints."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sim.errors import MachineError, OvercommitError, Problem, UserError, suggestion

if TYPE_CHECKING:
    from sim.columns import Metric
    from sim.datacenter.traces import Reading, Survey
    from sim.lab.calibrate import Calibration
    from sim.lab.capture import Taken
    from sim.lab.pressure import PressureTrial
    from sim.lab.replay import Replay
    from sim.lab.trial import Trial
    from sim.run import Result
    from sim.scenario import Scenario
    from sim.scenario.expect import Verdict
    from sim.study import Plan, Swept
    from sim.study.checks import Checked, Finding
    from sim.study.comparison import Comparison, Difference
    from sim.study.figures import Agenda
    from sim.study.solver import Choice, Limit, Probe

Verb = TypeVar("Verb", bound=Callable[..., Any])
Progress = Callable[[float, str], None]

EXIT_UNMET = 1
EXIT_BUG = 3
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""What a shell reports for any tool that SIGPIPE ends."""

_SCHEMA = Path(__file__).parent / "scenario" / "schema.json"
"""What `overcommit schema` prints, where an editor finds it."""

_TEMPLATE = """\
# yaml-language-server: $schema={schema}
# One question to the simulator. Run it:  overcommit run {file}
# See every default:  overcommit explain {file}
name: {name}
description: How far do four small guests share their memory?
duration: 2min
sample_every: 1s

hosts:
  - memory: 2GiB
    cores: 4
    kernel: "6.18"
    ksm: {{run: 1, pages_to_scan: 1000, sleep_millisecs: 20}}

vms:
  - name: guest
    count: 4
    memory: 256MiB
    image:
      parts:
        - {{name: system, pool: distribution, size: 30%}}   # the same pages in every guest of this pool
        - {{name: empty, zero: true, size: 20%}}
        - {{name: data, size: 50%}}                         # unique to each guest

# Checked after the run; the exit code is 1 when one is not met.
expect:
  - consolidation_ratio >= 1.2
  - oom_kills == 0
"""


@dataclass
class Console:
    """How this call talks: data on stdout, everything else on stderr."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    kept: Path | None = None
    """The result folder that is already whole."""
    kept_so_far: str = "nothing was kept"
    """What an interruption leaves before there is one."""

    def data(self, text: str) -> None:
        """Print what the caller asked for."""
        click.echo(text)

    def say(self, text: str) -> None:
        """Print a remark that is not part of the answer."""
        if not self.quiet:
            click.echo(text, err=True)

    def complain(self, text: str) -> None:
        """Print why the call failed, however quiet."""
        click.echo(text, err=True)

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress | None]:
        """Yield the callback that moves a progress bar, or None where a bar would be in the way."""
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console as Terminal
        from rich.progress import Progress as Bar

        with Bar(console=Terminal(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=1.0)
            yield lambda done, text: bar.update(task, completed=done, description=text or title)


class _Verbs(click.Group):
    """The one place where an exception becomes a message and an exit code."""

    def invoke(self, ctx: click.Context) -> None:
        """Run the verb and leave with its code."""
        console = ctx.ensure_object(Console)
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
        except (click.ClickException, click.exceptions.Exit, SystemExit):
            raise  # click words its own usage errors, which end with 2
        except BaseException as error:
            code = _explain_failure(error, console)
        ctx.exit(code or 0)


def _explain_failure(error: BaseException, console: Console) -> int:
    """Tell the user why the call failed and return the exit code."""
    match error:
        case UserError():
            console.complain(str(error))
            if console.json:
                console.data(_as_json({"problems": [asdict(problem) for problem in error.problems]}))
            return error.exit_code
        case OvercommitError():
            console.complain(str(error))
            return error.exit_code
        case MemoryError():
            console.complain("not enough memory; `overcommit explain` estimates what a scenario needs")
            return MachineError.exit_code
        case KeyboardInterrupt():
            kept = f"the result in {console.kept} is complete" if console.kept else console.kept_so_far
            console.complain(f"interrupted; {kept}")
            return EXIT_INTERRUPTED
        case BrokenPipeError():
            # Python flushes stdout again at exit, and would complain there.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_BROKEN_PIPE
        case _:
            console.complain(_bug_report(error))
            return EXIT_BUG


def _bug_report(error: BaseException) -> str:
    """Write the traceback to a file and return what to tell the user."""
    lines = [f"{type(error).__name__}: {error}", _versions(), f"command: {' '.join(sys.argv)}"]
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="overcommit-bug-", suffix=".txt", delete=False) as file:
            file.write("\n".join([*lines, "", trace]))
    except OSError:
        return "\n".join(["this is a bug in overcommit; please report all of this text:", *lines, trace])
    return "\n".join(
        ["this is a bug in overcommit, not in your scenario", *lines, f"please report it with {file.name}"]
    )


def _versions() -> str:
    packages = ("overcommit", "numpy", "numba", "pandas", "pyarrow", "pydantic", "simpy")
    found = [f"{package} {_version(package)}" for package in packages]
    return ", ".join([*found, f"Python {platform.python_version()}", platform.platform()])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _as_json(data: object) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False)


# --- options -----------------------------------------------------------------------------------------------------


def _note(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    setattr(ctx.ensure_object(Console), str(option.name), value)


def _talks(verb: Verb) -> Verb:
    """Add --json, -q and -v, which reach the verb through its console."""
    for names, text in (
        (("-v", "--verbose"), "Also say what the run costs."),
        (("-q", "--quiet"), "Print only the answer and errors."),
        (("--json",), "Print one JSON object."),
    ):
        verb = click.option(*names, is_flag=True, expose_value=False, callback=_note, help=text)(verb)
    return verb


_set_option = click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Replace one value, as in hosts.0.memory=32GiB."
)
_seed_option = click.option("--seed", type=click.IntRange(min=0), help="Replace the scenario's seed.")
_out_option = click.option(
    "--out", default="results", type=click.Path(path_type=Path), show_default=True, help="Results folder."
)
_report_option = click.option(
    "--report/--no-report", "with_report", default=True, help="Also draw pictures and report.html."
)
_jobs_option = click.option(
    "--jobs", type=click.IntRange(min=1), help="Processes at once; as many as processors unless given."
)
_cluster_option = click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Use the workers of the Dask scheduler at this address, such as tcp://10.0.0.1:8786.",
)
_file_argument = click.argument("file", type=click.Path(path_type=Path))


def _shard(ctx: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int]:
    """Number of a part, and how many parts there are, of an option such as 1/4."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", value or "1/1")
    number, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= parts:
        raise click.BadParameter(f"{value} is no part; write 1/4 for the first of four", ctx, option)
    return number, parts


def _show_version(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"overcommit {_version('overcommit')}")
        ctx.exit()


# --- verbs -------------------------------------------------------------------------------------------------------


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show it.")
def main() -> None:
    """How many virtual machines fit on a host, what does it cost in CPU, and what breaks first?

    Exit codes: 0 done and met, 1 an expectation failed, 2 the scenario or the command line is wrong,
    3 a bug, 4 this machine cannot do it, 130 interrupted.
    """


@main.command()
@_file_argument
@_set_option
@_seed_option
@_jobs_option
@_cluster_option
@_out_option
@_report_option
@_talks
@click.pass_obj
def run(
    console: Console,
    file: Path,
    overrides: Sequence[str],
    seed: int | None,
    jobs: int | None,
    cluster: str | None,
    out: Path,
    with_report: bool,
) -> int:
    """Simulate FILE, keep the result, and check its expectations.

    The hosts of a datacenter are spread over processes or over a cluster. The last line printed is the folder of the
    result.
    """
    from sim.processes import processors
    from sim.run import run as simulate
    from sim.scenario import load
    from sim.sizing import estimate

    scenario = load(file, overrides, seed)
    _refuse_both(jobs, cluster)
    if (jobs or cluster is not None) and not scenario.datacenter:
        raise UserError(
            f"{scenario.name}: --jobs and --cluster spread the hosts of a datacenter, and this scenario has none; "
            "leave them out"
        )
    _refuse_unwritable(out)
    if scenario.points:
        console.say(
            f"this runs the scenario as it stands; its sweep of {len(scenario.points):,} points: overcommit sweep"
        )
    elif scenario.replications > 1:
        console.say(f"this runs the scenario once; its {scenario.replications:,} replications: overcommit sweep")
    if console.verbose:
        console.say(_table(estimate(scenario).rows()))
    with console.progress(scenario.name) as progress:
        result = simulate(scenario, progress, jobs or processors(), cluster)
    return _keep(result, out, with_report, console)


def _keep(result: Result | Replay, out: Path, with_report: bool, console: Console) -> int:
    """Keep a result, print it, and return whether its expectations are met as an exit code."""
    from sim.results import write  # pandas comes last: its memory would add to the simulation's

    console.kept = write(result, out)
    if with_report:
        from sim.report import write as write_report

        write_report(result, console.kept)
    met = not any(verdict.failed for verdict in result.verdicts)
    console.data(_run_json(result, console.kept, met) if console.json else _run_text(result, console))
    return 0 if met else EXIT_UNMET


@main.command()
@_file_argument
@_set_option
@_seed_option
@_jobs_option
@_cluster_option
@_out_option
@_report_option
@_talks
@click.pass_obj
def sweep(
    console: Console,
    file: Path,
    overrides: Sequence[str],
    seed: int | None,
    jobs: int | None,
    cluster: str | None,
    out: Path,
    with_report: bool,
) -> int:
    """Run every point of FILE's sweep, keep each result, and show what to set.

    Points that have a result already are not run again. The last line printed is the folder of the table of all points.
    """
    from sim.scenario import load
    from sim.study import plan, run_points

    scenario = load(file, overrides, seed)
    _refuse_unwritable(out)
    _refuse_both(jobs, cluster)
    todo = plan(scenario, out, jobs, cluster)
    console.say(_plan_text(todo))
    console.kept_so_far = "the points that are done are kept; the same command goes on from there"
    with console.progress(scenario.name) as progress:
        swept = run_points(todo, progress)
    console.kept = swept.folder
    if with_report and swept.axes:
        from sim.report.sweep_page import write

        write(swept)
    console.data(_sweep_json(swept) if console.json else _sweep_text(swept, console))
    unmet = 0 if swept.table["met"].all() else EXIT_UNMET
    return max([unmet, *(failure.exit_code for failure in swept.failures.values())])


@main.command()
@_file_argument
@click.option("--vary", metavar="PATH=LOW..HIGH", help="Find the largest value, as in vms.0.count=1..64.")
@click.option("--smallest", is_flag=True, help="Find the smallest value instead.")
@click.option("--minimise", metavar="METRIC", help="Find the point of the sweep with the least of it.")
@click.option("--maximise", metavar="METRIC", help="Find the point of the sweep with the most of it.")
@_set_option
@_seed_option
@_jobs_option
@_out_option
@_talks
@click.pass_obj
def solve(
    console: Console,
    file: Path,
    vary: str | None,
    smallest: bool,
    minimise: str | None,
    maximise: str | None,
    overrides: Sequence[str],
    seed: int | None,
    jobs: int | None,
    out: Path,
) -> int:
    """Find the largest value, or the best point of a sweep, that keeps every expectation of FILE.

    With replications, every one must keep it. Runs that have a result already are not run again. Exit code 1 says that
    there is no such value.
    """
    from sim.scenario import load
    from sim.study import solver

    if (vary is None) == (minimise is None and maximise is None) or (minimise and maximise):
        raise UserError("say either what to vary, --vary PATH=LOW..HIGH, or one metric to --minimise or --maximise")
    if smallest and not vary:
        raise UserError("--smallest belongs to --vary")
    _refuse_unwritable(out)
    console.kept_so_far = "the runs that are done are kept; the same command goes on from there"
    with console.progress("solve") as progress:
        if vary:
            found = solver.limit(
                file, vary, out, jobs, smallest=smallest, overrides=overrides, seed=seed, progress=progress
            )
            console.data(_as_json(_limit_json(found)) if console.json else _limit_text(found, console))
            return 0 if found.best else EXIT_UNMET
        scenario = load(file, overrides, seed)
        metric, largest = (maximise, True) if maximise else (str(minimise), False)
        chosen = solver.choose(scenario, metric, out, jobs, largest=largest, progress=progress)
    console.data(_as_json(_choice_json(chosen)) if console.json else _choice_text(chosen, console))
    return 0 if chosen.best else EXIT_UNMET


@main.command(name="compare")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", required=False, type=click.Path(path_type=Path))
@click.option("--a", "first_set", multiple=True, metavar="PATH=VALUE", help="Replace one value of the first.")
@click.option("--b", "second_set", multiple=True, metavar="PATH=VALUE", help="Replace one value of the second.")
@click.option("--replications", type=click.IntRange(1, 1000), help="Runs of each; what the scenarios say unless given.")
@click.option(
    "--metric", "metrics", multiple=True, metavar="NAME", help="Compare this metric; all headlines otherwise."
)
@_jobs_option
@_out_option
@_talks
@click.pass_obj
def compare_runs(
    console: Console,
    first: Path,
    second: Path | None,
    first_set: Sequence[str],
    second_set: Sequence[str],
    replications: int | None,
    metrics: Sequence[str],
    jobs: int | None,
    out: Path,
) -> int:
    """Compare two scenarios, or results, and say which differences are real.

    FIRST and SECOND are scenario files or folders of results; without SECOND the same scenario with other settings.
    Runs are paired by seed, so that both met the same random numbers. Exit code 1 says that a difference is real.
    """
    from sim.study import comparison
    from sim.study.comparison import Side

    if second is None and not (first_set or second_set):
        raise UserError("there is nothing to compare with; name a second scenario, or settings with --b path=value")
    _refuse_unwritable(out)

    def side(path: Path, sets: Sequence[str]) -> Side:
        from sim.scenario import load

        if path.is_dir():
            if sets or replications:
                raise UserError(f"{path}: is a result, which no setting changes; name its scenario file")
            return comparison.kept(path)
        more = [f"replications={replications}"] if replications else []
        with console.progress(str(path)) as progress:
            name = " ".join([str(path), *sets])
            return comparison.side(load(path, [*sets, *more]), name, out, jobs, progress)

    console.kept_so_far = "the runs that are done are kept; the same command goes on from there"
    found = comparison.compare(side(first, first_set), side(second or first, second_set), metrics)
    if console.json:
        console.data(_as_json(comparison.told(found)))
    else:
        console.data(_comparison_text(found, console))
    return EXIT_UNMET if any(each.real for each in found.differences) else 0


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@_jobs_option
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write JUnit XML for a CI server.")
@click.option("--github", is_flag=True, help="Print workflow commands, which GitHub shows beside the lines.")
@click.option(
    "--baseline", type=click.Path(path_type=Path), metavar="DIR", help="Compare all metrics with those in DIR."
)
@click.option("--update", is_flag=True, help="Write the metrics to the baseline instead.")
@click.option("--shard", callback=_shard, metavar="I/N", help="Check only the I-th of N parts of the files.")
@click.option("--exit-zero", is_flag=True, help="End with 0 also if something is not met.")
@_out_option
@_talks
@click.pass_obj
def check(
    console: Console,
    paths: Sequence[Path],
    jobs: int | None,
    junit: Path | None,
    github: bool,
    baseline: Path | None,
    update: bool,
    shard: tuple[int, int],
    exit_zero: bool,
    out: Path,
) -> int:
    """Check the expectations of scenario PATHS, or of all in a folder, and tell actual values and margins.

    What stands under `expect` must be met, what stands under `warn` should be. A metric without data is not met. With
    replications, each is held to it and the worst is told. Runs that have a result already are not run again.
    """
    from sim.results import junit as xml
    from sim.study import checks

    if update and not baseline:
        raise UserError("--update writes a baseline; say where with --baseline DIR")
    files = checks.shard(dict.fromkeys(_scenario_files(paths)), *shard)
    for folder in (out, *([junit.parent] if junit else []), *([baseline] if baseline else [])):
        _refuse_unwritable(folder)
    console.kept_so_far = "the runs that are done are kept; the same command goes on from there"
    compared = checks.Baseline(baseline, update) if baseline else None
    with console.progress("check") as progress:
        found = checks.check_all(files, out, jobs, compared, progress)
    said = {finding: _finding_text(finding) for each in found for finding in each.findings}
    if junit:
        from sim.results.store import explained

        with explained(junit):
            junit.write_text(xml.document([checks.suite(each, said) for each in found]), encoding="utf-8")
    if github:
        for each in found:
            for finding in each.findings:
                if finding.state != "met":
                    click.echo(checks.command(each.file, finding, said[finding]), err=console.json)
    worst = max((each.exit_code for each in found), default=0)
    code = 0 if exit_zero and worst == EXIT_UNMET else worst
    if console.json:
        rows = [row for each in found for row in checks.rows(each)]
        console.data(_as_json({"met": worst == 0, "exit_code": code, "findings": rows}))
    else:
        console.data(_checks_text(found, said, code, console))
    return code


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@_set_option
@_jobs_option
@click.option("--write", "page", type=click.Path(path_type=Path), help="Write PAGE.md with the table of all figures.")
@_out_option
@_talks
@click.pass_obj
def published(
    console: Console, files: Sequence[Path], overrides: Sequence[str], jobs: int | None, page: Path | None, out: Path
) -> int:
    """Hold the simulator to the published figures of FILES, or of all in a folder.

    Exit code 1 says that a figure is outside its band without a reason, or inside although it is said to fail.
    Runs that have a result already are not run again.
    """
    from sim.study.figures import compute, plan

    todo = plan(list(_scenario_files(files)), out, jobs, overrides)
    _refuse_unwritable(out)
    if page:
        _refuse_unwritable(page.parent)
    console.say(_agenda_text(todo))
    console.kept_so_far = "the runs that are done are kept; the same command goes on from there"
    with console.progress("published figures") as progress:
        rows = compute(todo, progress)
    from sim.report.published_page import conclusion, faults, lines, write

    if page:
        write(rows, page)
        console.say(f"wrote {page}")
    if console.json:
        from sim.study.figures import told

        console.data(_as_json({"conclusion": conclusion(rows), "figures": [told(row) for row in rows]}))
    else:
        console.data(conclusion(rows) if console.quiet else "\n\n".join([_table(lines(rows)), conclusion(rows)]))
    for fault in faults(rows):
        console.complain(fault)
    unheld = 0 if all(row.honest for row in rows) else EXIT_UNMET
    return max([unheld, *(row.failure.exit_code for row in rows if row.failure)])


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@_set_option
@_talks
@click.pass_obj
def validate(console: Console, files: Sequence[Path], overrides: Sequence[str]) -> None:
    """Check scenario FILES and tell every mistake with its line."""
    from sim.scenario import load

    problems: list[Problem] = []
    for file in files:
        try:
            load(file, overrides)
        except UserError as error:
            problems += error.problems
        else:
            console.say(f"{file}: ok")
    if problems:
        raise UserError(*problems)
    if console.json:
        console.data(_as_json({"problems": []}))


def _duration(ctx: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """Nanoseconds of an option such as 10s."""
    from sim.errors import At
    from sim.units import parse_duration

    try:
        return None if value is None else parse_duration(value)
    except At as fault:
        raise click.BadParameter(str(fault), ctx, option) from None


@main.command()
@_file_argument
@click.option("--at", callback=_duration, metavar="TIME", help="Of a result: the moment to explain; its end otherwise.")
@click.option("--host", help="Of a result: this host alone.")
@_set_option
@_seed_option
@_talks
@click.pass_obj
def explain(
    console: Console, file: Path, at: int | None, host: str | None, overrides: Sequence[str], seed: int | None
) -> None:
    """Show FILE with every default written out, and what running it takes; or explain a result.

    The text printed is a scenario again; the estimate stands above it in comments. If FILE is the folder of a result,
    tell where each host's memory is at a moment, and why no more of it was saved.
    """
    if file.is_dir():
        if overrides or seed is not None:
            raise UserError(f"{file}: is a result, which --set and --seed do not change; name its scenario file")
        _explain_result(console, file, at, host)
        return
    if at is not None or host is not None:
        raise UserError(f"{file}: is no result; --at and --host explain the folder that a run printed last")
    from sim.document import dump
    from sim.scenario import load
    from sim.sizing import estimate

    scenario = load(file, overrides, seed)
    rows = estimate(scenario).rows()
    if console.json:
        console.data(_as_json({"estimate": dict(rows), "scenario": scenario.resolved()}))
    else:
        notes = [f"# {line}" for line in _table(rows).splitlines()]
        console.data("\n".join([*notes, dump(scenario.resolved()).rstrip()]))


def _explain_result(console: Console, folder: Path, at: int | None, host: str | None) -> None:
    """Tell where memory is at a moment of a finished run."""
    from sim.results import load
    from sim.study import whereabouts
    from sim.units import SECOND, about_bytes

    found = whereabouts.whereabouts(load(folder), None if at is None else at / SECOND, host)
    if console.json:
        console.data(_as_json([whereabouts.told(each) for each in found]))
        return
    titles = {"memory": "host memory", "guests": "promised to guests", "reasons": "not saved because"}
    for each in found:
        blocks = [whereabouts.sentence(each)]
        for name, title in () if console.quiet else titles.items():
            parts = getattr(each, name)
            rows = [(f"  {part.name}", about_bytes(part.bytes), part.meaning) for part in parts]
            blocks += [f"{title}\n{_table(rows)}"] if rows else []
        console.data("\n\n".join(blocks))


@main.command()
def schema() -> None:
    """Print the JSON Schema of a scenario, for editors."""
    from sim.scenario import schema as scenario_schema

    click.echo(_as_json(scenario_schema()))


@main.command(name="list")
@click.argument("kind", required=False)
@_talks
@click.pass_obj
def list_parts(console: Console, kind: str | None) -> None:
    """List what a scenario can be made of, and the scenarios that came along; or only one KIND, such as presets."""
    parts = list(_parts())
    if kind is not None:
        wanted = kind.removesuffix("s")
        kinds = dict.fromkeys(part for part, _, _ in parts)
        parts = [part for part in parts if wanted in part[0]]
        if not parts:
            raise UserError(f"nothing is called {kind}; {suggestion(kind, kinds)}")
    if console.json:
        console.data(_as_json([{"kind": kind, "name": name, "about": about} for kind, name, about in parts]))
    else:
        console.data(_table(parts))


@main.command()
@click.argument("name")
def new(name: str) -> None:
    """Write a small commented scenario to NAME.yaml.

    Its first line tells editors with a YAML language server, such as VS Code, where the schema is.
    """
    file = Path(name if name.endswith(".yaml") else f"{name}.yaml")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", file.stem):
        raise UserError(f"{file.stem!r} cannot be a scenario's name; use letters, digits and dashes")
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(_TEMPLATE.format(name=file.stem, file=file, schema=_SCHEMA.as_uri()))
    except FileExistsError:
        raise UserError(f"{file} exists already; choose another name") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None
    click.echo(file)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--set", "options", multiple=True, metavar="KEY=VALUE", help="An option of the trace, as in every=15min.")
@click.option("--hosts", "as_hosts", is_flag=True, help="Print the trace's nodes as `hosts` of a scenario.")
@_talks
@click.pass_obj
def trace(console: Console, path: Path, options: Sequence[str], as_hosts: bool) -> None:
    """Read the recorded trace PATH as a scenario would: what arrives, how much at once, and which rows are bad.

    The format is told from the files unless --set format=... says it.
    """
    from sim.datacenter.traces import Reading, Rows, nodes, read_alone
    from sim.document import dump

    recorded = read_alone(path, options)
    if as_hosts:
        account = Rows()
        kinds = [kind.host() for kind in nodes(recorded, account)]
        for line in account.lines():
            console.say(line)
        console.data(_as_json({"hosts": kinds}) if console.json else dump({"hosts": kinds}).rstrip())
        return
    reading = Reading(recorded)
    survey = reading.survey()
    console.data(_trace_json(reading, survey) if console.json else _trace_text(reading, survey))


@main.group()
def lab() -> None:
    """Hold the simulation against this machine's own kernel (Linux with KSM; most verbs need root)."""


@lab.command(name="run")
@_file_argument
@_set_option
@_seed_option
@_out_option
@_report_option
@_talks
@click.pass_obj
def lab_run(
    console: Console, file: Path, overrides: Sequence[str], seed: int | None, out: Path, with_report: bool
) -> int:
    """Run FILE on this machine's kernel, in real time, and keep the result as `overcommit run` does.

    Guests are processes with real pages. Figures that a kernel does not tell are left out.
    """
    from sim.lab.machine import check_abilities
    from sim.scenario import load

    scenario = load(file, overrides, seed)
    _refuse_unwritable(out)
    check_abilities()
    from sim.lab.replay import replay

    with console.progress(scenario.name) as progress:
        result = replay(scenario, progress)
    return _keep(result, out, with_report, console)


@lab.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@_set_option
@_seed_option
@click.option("--runs", type=click.IntRange(1, 100), help="Runs of the kernel; 3 for changing memory, 1 for static.")
@click.option("--record", "to", type=click.Path(path_type=Path), help="Keep the kernel's runs in this folder.")
@click.option("--recorded", type=click.Path(path_type=Path), help="Take the kernel's runs from this folder.")
@click.option("--write", "page", type=click.Path(path_type=Path), help="Write PAGE.md about all FILES, no results.")
@_out_option
@_talks
@click.pass_obj
def compare(
    console: Console,
    files: Sequence[Path],
    overrides: Sequence[str],
    seed: int | None,
    runs: int | None,
    to: Path | None,
    recorded: Path | None,
    page: Path | None,
    out: Path,
) -> int:
    """Hold the simulator against this machine's kernel: counters, scan times and CPU of FILES, or of all in a folder.

    Exit code 1 says that they differ by more than is stated: static memory must be exact at every full scan,
    changing memory inside the kernel's spread and 1 % of the pages, scan times within 3 %, ksmd's CPU within 10 %;
    where guests have a memory_limit, pages swapped within 15 % and stalls (PSI) within 25 %.
    """
    from sim.lab.machine import check_abilities
    from sim.scenario import load

    if recorded and (to or runs):
        raise UserError("--recorded takes runs that are there; remove --record and --runs, or --recorded")
    scenarios = [load(file, overrides, seed) for file in _scenario_files(files)]
    _refuse_unwritable(to or (page.parent if page else out))
    if not recorded:
        check_abilities()
    from sim.lab.recordings import about, keep, kept

    trials: list[Trial | PressureTrial] = []
    told: list[Mapping[str, Any]] = []
    busy: list[str] = []
    for scenario in scenarios:
        trial = kept(scenario, recorded) if recorded else _try(scenario, runs, console, busy)
        if trial is None:
            continue
        if to:
            keep(trial, to)
        trials.append(trial)
        folder = None if page else _keep_trial(trial, out)
        told.append(_trial_json(trial, folder))
        if not console.json:
            console.data(_trial_text(trial, folder, console))
    if page and not busy:
        from sim.lab.fidelity import write

        write(trials, about(recorded), page)
        console.say(f"wrote {page}")
    if console.json:
        console.data(_as_json({"comparisons": told, "too_busy": busy}))
    if busy:
        raise MachineError("\n".join([*busy, f"{page} was not written"] if page else busy))
    return EXIT_UNMET if any(trial.comparison.faults() for trial in trials) else 0


def _scenario_files(files: Iterable[Path]) -> Iterator[Path]:
    """Yield the files, and those in folders."""
    for file in files:
        found = sorted(file.rglob("*.yaml")) if file.is_dir() else [file]
        if not found:
            raise UserError(f"{file}: no scenario in this folder")
        yield from found


def _try(scenario: Scenario, runs: int | None, console: Console, busy: list[str]) -> Trial | PressureTrial | None:
    """Run a trial on this machine; None, with the reason among *busy*, if other work disturbs it."""
    from sim.lab.trial import Busy, live

    try:
        with console.progress(scenario.name) as progress:
            return live(scenario, runs, progress=progress)
    except Busy as error:
        busy.append(str(error))
        return None


def _keep_trial(trial: Trial | PressureTrial, out: Path) -> Path:
    """Keep the simulation's result with the comparison's picture and figures; return its folder."""
    from sim.lab.fidelity import draw
    from sim.report.html import PICTURES
    from sim.results import write
    from sim.results.store import explained
    from sim.run import run as simulate

    folder = write(simulate(trial.scenario), out)
    with explained(folder):
        (folder / PICTURES).mkdir(exist_ok=True)
        draw(trial, folder / PICTURES / "kernel.png")
        trial.write_recording(folder / "kernel.csv.gz")
        (folder / "comparison.json").write_text(_as_json(_trial_json(trial, folder)) + "\n")
    return folder


@lab.command()
@_talks
@click.pass_obj
def restore(console: Console) -> None:
    """Put back what an interrupted lab left: settings, ksmd's scheduling, guests, zram devices, swap files."""
    from sim.lab.machine import restore as heal

    healed = heal()
    if console.json:
        console.data(_as_json({"restored": healed}))
    else:
        console.data("restored what an interrupted lab left" if healed else "nothing to restore")


@lab.command()
@click.option("--name", help="Name of the price set; by default that of this machine, which then uses it by itself.")
@click.option("--out", type=click.Path(path_type=Path), help="Write this file instead of installing the set.")
@click.option("--quick", is_flag=True, help="Run everything once and not three times: less certain.")
@_talks
@click.pass_obj
def calibrate(console: Console, name: str | None, out: Path | None, quick: bool) -> None:
    """Measure what ksmd, page faults, large pages, zram and swap cost on this machine, and keep it as a price set.

    It takes about five minutes (--quick two), in which the machine should do nothing else.
    """
    from sim.lab.calibrate import calibrate as measure
    from sim.lab.calibrate import destination, install
    from sim.lab.machine import check_abilities

    check_abilities()
    name, file = destination(name, out)
    with console.progress("calibrate") as progress:
        found = measure(name, quick, progress)
    install(found.prices, file)
    console.kept = file
    console.data(_calibration_json(found, file) if console.json else _calibration_text(found, file, console))


@lab.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The image to write, NAME.npz.")
@click.option("--pid", type=click.IntRange(min=1), help="Capture this process.")
@click.option("--ram", type=click.Path(path_type=Path), help="Capture a QEMU guest: its memory-backend-file, share=on.")
@click.option("--core", type=click.Path(path_type=Path), help="Capture an ELF core, or a file of dump-guest-memory.")
@click.option(
    "--mappings",
    type=click.Choice(["mergeable", "private", "all"]),
    default="private",
    show_default=True,
    help="Of a process: what KSM may scan, what it could, or file pages and shared memory too.",
)
@click.option(
    "--every", "every_ns", default="0", callback=_duration, metavar="TIME", help="Take a snapshot every 10s ..."
)
@click.option("--for", "for_ns", default="0", callback=_duration, metavar="TIME", help="... for 2min.")
@click.option(
    "--comparable",
    type=click.Path(path_type=Path),
    metavar="KEY",
    help="Number contents alike in all captures with this key file, which is made if missing. Keep it to yourself.",
)
@click.option("--compress", is_flag=True, help="Also note each page's size under LZ4.")
@_talks
@click.pass_obj
def capture(console: Console, /, out: Path, **options: Any) -> None:
    """Capture real memory as an image that scenarios replay: which pages are equal, and when they change.

    No contents are written, and without KEY no fingerprints either.
    """
    from sim.lab.capture import capture as take

    try:
        with console.progress(out.name) as progress:
            taken = take(out, progress=progress, **options)
    except KeyboardInterrupt:
        console.kept = out if out.exists() else None
        raise
    if taken.stopped:
        console.say(f"{taken.stopped}; kept what was there before (snapshots: {taken.snapshots})")
    console.data(_as_json({**asdict(taken), "file": str(out)}) if console.json else _capture_text(taken, console))


# --- what the verbs print ----------------------------------------------------------------------------------------


def _run_json(result: Result | Replay, folder: Path, met: bool) -> str:
    verdicts = [asdict(verdict) for verdict in result.verdicts]
    return _as_json({"result": str(folder), "met": met, "summary": dict(result.summary), "expectations": verdicts})


def _run_text(result: Result | Replay, console: Console) -> str:
    """Return the conclusion, the headline metrics, the expectations, and last the folder of the result."""
    from sim.report.words import conclusion, headlines, measured, uncertainty

    if console.quiet:
        return str(console.kept)
    blocks = [conclusion(result.samples, result.guests, result.summary)]
    bars = result.manifest.get("error", {})
    if bars:
        blocks.append(uncertainty(result.manifest["scale"], bars, result.summary))
    real = str(result.manifest.get("engine")).startswith("kernel")
    shown = [each for each in headlines(result.summary) if not real or result.summary[each.name] is not None]
    blocks.append(_table(
        (each.name, measured(result.summary[each.name], bars.get(each.name), each.unit), each.meaning) for each in shown
    ))  # fmt: skip
    if result.verdicts:
        blocks.append(_table(map(_verdict_row, result.verdicts)))
    if console.verbose:
        blocks.append(_table((name, str(value)) for name, value in result.manifest.items()))
    return "\n\n".join([*blocks, str(console.kept)])


def _trace_json(reading: Reading, survey: Survey) -> str:
    rows = reading.rows
    faults = {name: {reason: asdict(noted) for reason, noted in getattr(rows, name).items()}
              for name in ("left_out", "mended")}  # fmt: skip
    return _as_json({"format": reading.trace.format, "rows": rows.read, **faults, **asdict(survey)})


def _trace_text(reading: Reading, survey: Survey) -> str:
    """Return what a trace holds, then what was wrong with it."""
    from sim.units import about_bytes, about_duration

    lifetime = "half of them have no end" if survey.median_lifetime is None else about_duration(survey.median_lifetime)
    rows = [
        ("format", reading.trace.format),
        ("rows", f"{reading.rows.read:,}, {reading.rows.bad:,} of them left out"),
        ("guests", f"{survey.guests:,}, the last after {about_duration(survey.last_arrival)}"),
        ("median lifetime", lifetime),
        ("most at once", f"{survey.most_guests:,} guests"),
    ]
    if survey.most_memory is not None:
        rows.append(("most memory", f"{about_bytes(survey.most_memory)} promised at once"))
    if survey.most_vcpus is not None:
        rows.append(("most CPU", f"{survey.most_vcpus:,} virtual processors at once"))
    if survey.cpu is not None:
        rows.append(("CPU use", f"{survey.cpu:.1%} of a guest's processors on average"))
    return "\n\n".join(filter(None, [_table(rows), "\n".join(reading.rows.lines())]))


def _plan_text(todo: Plan) -> str:
    from sim.units import SECOND, about_duration

    points, runs = len(todo.digests), len({digest for replicas in todo.replicas for digest in replicas})
    text = f"{points:,} points" if todo.scenario.replications == 1 else f"{points:,} points in {runs:,} runs"
    if len(todo.left) < runs:
        text += f", {runs - len(todo.left):,} of them known"
    if todo.left:
        where = f"on the cluster at {todo.cluster}" if todo.cluster else f"in {todo.jobs} processes"
        text += f"; about {about_duration(todo.cpu_seconds * SECOND)} of CPU time {where}"
    return text


def _agenda_text(todo: Agenda) -> str:
    from sim.units import SECOND, about_duration

    text = f"{len(todo.asked):,} published figures"
    if todo.left:
        seconds = about_duration(todo.cpu_seconds * SECOND)
        text += f"; {len(todo.left):,} runs, about {seconds} of CPU time in {todo.jobs} processes"
    return text


def _sweep_json(swept: Swept) -> str:
    from sim.report.sweep_page import conclusion

    points = swept.table.astype(object).where(swept.table.notna(), None).to_dict("records")
    said = conclusion(swept) if swept.axes else _intervals_text(swept)
    told = {"result": str(swept.folder), "conclusion": said, "axes": list(swept.axes), "points": points}
    if swept.intervals is not None:
        told["intervals"] = swept.intervals.replace([float("inf"), float("-inf")], None).to_dict("records")
    return _as_json(told)


def _sweep_text(swept: Swept, console: Console) -> str:
    """Return one line for each point, what failed, and last the folder of the table."""
    from sim.report.sweep_page import conclusion, rows

    if console.quiet:
        return str(swept.folder)
    blocks = [conclusion(swept), _table(rows(swept))] if swept.axes else []
    if swept.intervals is not None:
        blocks += [_table(_interval_rows(swept)), _intervals_text(swept)]
    return "\n\n".join([*blocks, str(swept.folder)])


def _intervals_text(swept: Swept) -> str:
    """Say of how many runs the means are, and what that is worth."""
    from sim.study.intervals import FEW

    runs, intervals = swept.scenario.replications, swept.intervals
    text = f"means of {runs} replications with 95 % t intervals"
    if intervals is not None and not intervals.empty and (intervals["low"] == intervals["high"]).all():
        return f"{text}; all runs are alike, for nothing in this scenario is random"
    return f"{text}; fewer than {FEW} say little" if runs < FEW else text


def _interval_rows(swept: Swept) -> Iterator[Sequence[str]]:
    """Yield the intervals of what is expected, and of gain and cost; of each point."""
    from sim.columns import METRICS
    from sim.report.words import amount

    assert swept.intervals is not None
    units = {metric.name: metric.unit for metric in METRICS}
    expected = [each.metric.name for each in (*swept.scenario.expect, *swept.scenario.warn)]
    shown = {"consolidation_ratio", "cpu_overhead_percent", *expected}
    for row in swept.intervals.to_dict("records"):
        name = row["metric"]
        if name in shown:
            where = [str(swept.table[axis].iloc[row["point"]]) for axis in swept.axes]
            mean, low, high = (amount(row[each], units[name]) for each in ("mean", "low", "high"))
            yield *where, name, mean, f"{low} to {high}"


def _limit_json(found: Limit) -> Mapping[str, Any]:
    told = [
        {"value": probe.value, "kept": probe.outcome.kept, "results": list(probe.outcome.digests),
         "expectations": [asdict(verdict) for verdict in probe.outcome.verdicts]}
        for probe in found.probes
    ]  # fmt: skip
    return {
        "path": found.path,
        "answer": found.best.value if found.best else None,
        "broken": found.broken.value if found.broken else None,
        "binding": [verdict.expectation for verdict in found.binding],
        "kept_again": [probe.value for probe in found.again],
        "runs": found.runs,
        "probes": told,
    }


def _limit_text(found: Limit, console: Console) -> str:
    """Return what was tried, where the limit is and what sets it; only the answer if quiet."""
    from sim.report.words import listed

    if console.quiet:
        return str(found.best.value) if found.best else "none"
    lines = [_probe_row(probe) for probe in found.probes]
    binding = listed([verdict.expectation for verdict in found.binding])
    match found.best, found.broken:
        case None, broken:
            end = f"no value keeps every expectation: {found.path} {broken.value if broken else ''} breaks {binding}"
        case best, None:
            end = f"{found.path} {best.value} keeps every expectation; the limit is beyond it: widen the range"
        case best, broken:
            end = f"{found.path} {best.value}: {broken.value} breaks {binding}"
    blocks = [_table(lines), end]
    if found.again:
        values = listed([str(probe.value) for probe in found.again])
        keep = "keeps" if len(found.again) == 1 else "keep"
        blocks.append(f"there is more than one limit: {values} {keep} every expectation again")
    return "\n\n".join([*blocks, _runs_text(found.runs, len(found.probes))])


def _runs_text(runs: int, probes: int) -> str:
    return f"{probes:,} values in {runs:,} runs" if runs else f"{probes:,} values, all known already"


def _probe_row(probe: Probe) -> Sequence[str]:
    """Return a value that was tried, what became of it, and how near its expectations are to their bounds."""
    shown = ", ".join(f"{name} {each}" for name, each in probe.value.items()) if isinstance(probe.value, dict) else None
    if probe.outcome.failure:
        return shown or str(probe.value), "failed", probe.outcome.failure.text
    told = "; ".join(", ".join(_verdict_row(verdict)[1:]) for verdict in probe.unmet or probe.outcome.verdicts)
    return shown or str(probe.value), "kept" if probe.outcome.kept else "broken", told


def _choice_json(found: Choice) -> Mapping[str, Any]:
    points = [
        {"settings": probe.value, "kept": probe.outcome.kept, "results": list(probe.outcome.digests),
         "value": probe.outcome.mean[found.metric] if probe.outcome.summaries else None}
        for probe in found.probes
    ]  # fmt: skip
    return {
        "metric": found.metric,
        "answer": found.best.value if found.best else None,
        "value": found.best.outcome.mean[found.metric] if found.best else None,
        "runs": found.runs,
        "points": points,
    }


def _choice_text(found: Choice, console: Console) -> str:
    from sim.columns import METRICS
    from sim.report.words import amount

    unit = next(metric.unit for metric in METRICS if metric.name == found.metric)
    if found.best is None:
        end = "no point keeps every expectation"
    else:
        what = f"the {'most' if found.largest else 'least'} {found.metric} that keeps every expectation"
        end = f"{_probe_row(found.best)[0]}: {amount(found.best.outcome.mean[found.metric], unit)}, {what}"
    if console.quiet:
        return end
    return "\n\n".join([_table(map(_probe_row, found.probes)), end, _runs_text(found.runs, len(found.probes))])


def _comparison_text(found: Comparison, console: Console) -> str:
    """Return a line for each metric, which side is which, and what there is to know of the figures."""
    from sim.report.words import amount, listed

    def row(each: Difference) -> Sequence[str]:
        unit, told = each.metric.unit, each.interval
        figures = [amount(value, unit) for value in (each.first, each.second, told.mean if told else None)]
        ends = f"{amount(told.low, unit)} to {amount(told.high, unit)}" if told and len(found.seeds) > 1 else ""
        return each.metric.name, *figures, ends, each.verdict

    real = [each.metric.name for each in found.differences if each.real]
    end = f"real differences: {listed(real)}" if real else "no difference is shown to be real"
    if console.quiet:
        return end
    header = ("", "A", "B", "B - A", "95 % interval", "")
    shown = [each for each in found.differences if each.verdict not in ("same", "no data")]
    same = len(found.differences) - len(shown)
    sides = f"A: {found.first.name}\nB: {found.second.name}"
    remarks = [*found.remarks, *([f"{same} metrics are the same or have no data"] if same else [])]
    blocks = [_table([header, *map(row, shown)])] if shown else []
    return "\n\n".join([sides, *blocks, "; ".join(remarks), end])


def _finding_text(finding: Finding) -> str:
    """What was found, in words: actual value and margin, or why there is none."""
    from sim.report.words import amount

    if finding.state == "failed" or finding.what == "baseline":
        return finding.text
    told = [f"actual {amount(finding.actual, finding.unit)}"]
    if finding.margin is not None:
        how = "moved by" if finding.state == "moved" else "margin"
        told.append(f"{how} {amount(finding.margin, finding.unit)}")
    return ", ".join([*filter(None, [finding.text]), *told])


def _checks_text(found: Sequence[Checked], said: Mapping[Finding, str], code: int, console: Console) -> str:
    """Return each scenario with what was found, and last the sum of it and the exit code."""
    findings = [finding for each in found for finding in each.findings]
    counts = {state: sum(each.state == state and each.fails for each in findings) for state in _UNMET_STATES}
    warnings = sum(each.state != "met" and not each.fails for each in findings)
    met = sum(each.state == "met" for each in findings)
    sums = [f"{met:,} met", *(f"{count:,} {state}" for state, count in counts.items() if count)]
    sums += [f"{warnings:,} only warned of"] if warnings else []
    silent = sum(not each.findings for each in found)
    sums += [f"{silent:,} files expect nothing"] if silent else []
    end = f"{len(found):,} {'file' if len(found) == 1 else 'files'}: {', '.join(sums)}; exit code {code}"
    shown = [each for each in found if each.findings and not (console.quiet and each.exit_code == 0)]
    blocks = [f"{each.file}\n{_table(_finding_row(one, said[one]) for one in each.findings)}" for each in shown]
    return "\n\n".join([*blocks, end])


_UNMET_STATES = ("not met", "no data", "moved", "failed")


def _finding_row(finding: Finding, said: str) -> Sequence[str]:
    state = "met" if finding.state == "met" else finding.state.upper() if finding.fails else "warning"
    return f"  {state}", finding.what, said


def _calibration_json(found: Calibration, file: Path) -> str:
    prices = found.prices.model_dump(mode="json", exclude_defaults=True)
    told = {"errors": dict(found.errors), "together": list(found.together), "missing": dict(found.missing)}
    return _as_json({"file": str(file), "prices": prices, **told})


def _calibration_text(found: Calibration, file: Path, console: Console) -> str:
    """Return the prices, how far they can be trusted, what could not be measured, and last the file."""
    if console.quiet:
        return str(file)
    worst = max(found.errors, key=lambda name: abs(found.errors[name]))
    typical = sorted(map(abs, found.errors.values()))[len(found.errors) // 2]
    lines = [
        f"ksmd's CPU time in {len(found.errors)} workloads, each left out of the fit in turn: "
        f"typical error {typical:.1%}, worst {found.errors[worst]:+.1%} ({worst})",
        *(f"not told apart, only their sum is known well: {first} and {second}" for first, second in found.together),
        *(f"not measured: {section}: {reason}" for section, reason in found.missing.items()),
    ]
    return "\n\n".join([_table(_price_rows(found)), "\n".join(lines), str(file)])


def _price_rows(found: Calibration) -> Iterator[Sequence[str]]:
    """Yield each price with its 95 % interval."""
    from sim.cost.prices import Price

    def figure(ns: float) -> str:
        return f"{ns:,.0f}" if ns >= 1000 else f"{ns:.3g}"

    def row(name: str, price: Price) -> Sequence[str]:
        interval = "" if price.low is None or price.high is None else f"{figure(price.low)} to {figure(price.high)}"
        return name, f"{figure(price.ns)} ns", interval

    prices = found.prices
    yield from (row(name, price) for name, price in prices if isinstance(price, Price))
    yield "cold_caches", f"{prices.cold_caches.factor:g}", ""
    for block in ("page_faults", "fork", "huge_pages", "paging", "swap"):
        found_prices = getattr(prices, block) or ()
        yield from (row(f"{block}.{name}", price) for name, price in found_prices if isinstance(price, Price))
    for access in prices.random_access:
        size = access.model_dump(mode="json")["working_set"]
        yield from (row(f"random access, {size}, {name}", getattr(access, name)) for name in ("small", "huge"))
    for algorithm, costs in prices.zram.items():
        yield from (row(f"zram {algorithm} {name}", price) for name, price in costs if isinstance(price, Price))
        yield f"zram {algorithm}", f"{costs.bytes_per_page:g} bytes a page", ""


def _capture_text(taken: Taken, console: Console) -> str:
    """Return what a capture holds, and last its file."""
    from sim.columns import PAGE_BYTES
    from sim.units import about_bytes

    if console.quiet:
        return str(taken.file)
    rows = [("snapshots", str(taken.snapshots), "")]
    for name, pages in (
        ("pages", taken.pages),
        ("touched", taken.touched_pages),
        ("zeros", taken.zero_pages),
        ("different contents", taken.contents),
    ):
        rows.append((name, str(pages), about_bytes(pages * PAGE_BYTES)))
    return "\n".join([_table(rows), str(taken.file)])


def _trial_json(trial: Trial | PressureTrial, folder: Path | None) -> Mapping[str, Any]:
    return {"scenario": trial.scenario.name, **trial.told(), "result": str(folder) if folder else None}


def _trial_text(trial: Trial | PressureTrial, folder: Path | None, console: Console) -> str:
    """Return what was compared, the figures, the verdict, and last the folder of the result."""
    from sim.lab.fidelity import heading, rows, verdict

    end = f"{trial.scenario.name}: {verdict(trial.comparison)}"
    if console.quiet or not folder:
        return end
    return "\n\n".join([f"{trial.scenario.name}: {heading(trial)}", _table(rows(trial.comparison)), end, str(folder)])


def _verdict_row(verdict: Verdict) -> Sequence[str]:
    from sim.report.words import amount
    from sim.scenario.expect import Expectation

    metric: Metric = Expectation.parse(verdict.expectation).metric
    actual, margin = amount(verdict.actual, metric.unit), amount(verdict.margin, metric.unit)
    unmet = "NOT MET" if verdict.severity == "error" else "warning"
    return "met" if verdict.met else unmet, verdict.expectation, f"actual {actual}", f"margin {margin}"


def _table(rows: Iterable[Sequence[str]]) -> str:
    """Return rows of text as aligned columns."""
    cells = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def _refuse_both(jobs: int | None, cluster: str | None) -> None:
    """Refuse to count processes where a cluster has its own."""
    if jobs and cluster is not None:
        raise UserError("--jobs counts processes of this machine, and --cluster uses others; leave one of them out")


def _refuse_unwritable(out: Path) -> None:
    """Refuse, before the simulation and not after it, a results folder that cannot be made or written."""
    existing = next(each for each in (out, *out.absolute().parents) if os.path.exists(each))
    if not os.path.isdir(existing):
        raise UserError(f"{existing}: not a folder; choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing}: not writable; choose another --out")


def _parts() -> Iterator[tuple[str, str, str]]:
    """Yield kind, name and meaning of everything that can be named in a scenario."""
    from sim.columns import METRICS
    from sim.cost import prices
    from sim.document import read
    from sim.scenario import presets
    from sim.sharing import MECHANISMS, Sharing
    from sim.sharing.tuners import TUNERS

    yield from (("mechanism", name, Sharing.model_fields[name].description or "") for name in MECHANISMS)
    yield from (("tuner", name, _first_line(tuner)) for name, tuner in TUNERS.items())
    yield from _kernels()
    yield from (("prices", name, _about_prices(name)) for name in prices.names())
    for kind, noun in presets.KINDS.items():
        yield from ((noun, name, presets.load(kind, name).about) for name in presets.names(kind))
    yield from (("metric", metric.name, metric.meaning) for metric in METRICS)
    for file in sorted(_bundled_scenarios().glob("*.yaml")):
        yield "scenario", str(file), str(read(file).data.get("description", ""))


def _about_prices(name: str) -> str:
    """Return what a price set says of itself; one of the user's own may be wrong."""
    from sim.cost import prices
    from sim.errors import At

    try:
        return prices.load(name).about
    except At as fault:
        return str(fault)


def _first_line(block: type) -> str:
    return (block.__doc__ or "").partition("\n")[0]


def _kernels() -> Iterator[tuple[str, str, str]]:
    """Yield each kernel version with the names of what it changed."""
    from sim.sharing.kernels import KERNELS

    before = None
    for name, kernel in KERNELS.items():
        changed = [each for each in kernel._fields[1:] if before and getattr(before, each) != getattr(kernel, each)]
        about = f"changed {', '.join(changed)}" if changed else "behaves as the one before"
        yield "kernel", name, about if before else "the first with KSM"
        before = kernel


def _bundled_scenarios() -> Path:
    """Return the folder of the scenarios: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "_scenarios"
    return installed if installed.is_dir() else package.parent / "scenarios"
