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
    from sim.study.figures import Agenda

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
@_out_option
@_report_option
@_talks
@click.pass_obj
def run(console: Console, file: Path, overrides: Sequence[str], seed: int | None, out: Path, with_report: bool) -> int:
    """Simulate FILE, keep the result, and check its expectations.

    The last line printed is the folder of the result.
    """
    from sim.run import run as simulate
    from sim.scenario import load
    from sim.sizing import estimate

    scenario = load(file, overrides, seed)
    _refuse_unwritable(out)
    if scenario.points:
        console.say(
            f"this runs the scenario as it stands; its sweep of {len(scenario.points):,} points: overcommit sweep"
        )
    if console.verbose:
        console.say(_table(estimate(scenario).rows()))
    with console.progress(scenario.name) as progress:
        result = simulate(scenario, progress)
    return _keep(result, out, with_report, console)


def _keep(result: Result | Replay, out: Path, with_report: bool, console: Console) -> int:
    """Keep a result, print it, and return whether its expectations are met as an exit code."""
    from sim.results import write  # pandas comes last: its memory would add to the simulation's

    console.kept = write(result, out)
    if with_report:
        from sim.report import write as write_report

        write_report(result, console.kept)
    met = all(verdict.met for verdict in result.verdicts)
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
    if with_report:
        from sim.report.sweep_page import write

        write(swept)
    console.data(_sweep_json(swept) if console.json else _sweep_text(swept, console))
    unmet = 0 if swept.table["met"].all() else EXIT_UNMET
    return max([unmet, *(failure.exit_code for failure in swept.failures.values())])


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


@main.command()
@_file_argument
@_set_option
@_seed_option
@_talks
@click.pass_obj
def explain(console: Console, file: Path, overrides: Sequence[str], seed: int | None) -> None:
    """Show FILE with every default written out, and what running it takes.

    The text printed is a scenario again; the estimate stands above it in comments.
    """
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


def _duration(ctx: click.Context, option: click.Parameter, value: str | None) -> int:
    """Nanoseconds of an option such as 10s."""
    from sim.errors import At
    from sim.units import parse_duration

    try:
        return parse_duration(value) if value is not None else 0
    except At as fault:
        raise click.BadParameter(str(fault), ctx, option) from None


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
@click.option("--every", "every_ns", callback=_duration, metavar="TIME", help="Take a snapshot every 10s ...")
@click.option("--for", "for_ns", callback=_duration, metavar="TIME", help="... for 2min.")
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
    from sim.columns import HEADLINES
    from sim.report.words import conclusion, measured, uncertainty

    if console.quiet:
        return str(console.kept)
    blocks = [conclusion(result.samples, result.guests, result.summary)]
    bars = result.manifest.get("error", {})
    if bars:
        blocks.append(uncertainty(result.manifest["scale"], bars, result.summary))
    real = str(result.manifest.get("engine")).startswith("kernel")
    shown = [each for each in HEADLINES if not real or result.summary[each.name] is not None]
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

    points = len(todo.digests)
    text = f"{points:,} points"
    if len(todo.left) < points:
        text += f", {points - len(todo.left):,} of them known"
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
    told = {"result": str(swept.folder), "conclusion": conclusion(swept), "axes": list(swept.axes), "points": points}
    return _as_json(told)


def _sweep_text(swept: Swept, console: Console) -> str:
    """Return one line for each point, what failed, and last the folder of the table."""
    from sim.report.sweep_page import conclusion, rows

    if console.quiet:
        return str(swept.folder)
    return "\n\n".join([conclusion(swept), _table(rows(swept)), str(swept.folder)])


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
    return "met" if verdict.met else "NOT MET", verdict.expectation, f"actual {actual}", f"margin {margin}"


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
