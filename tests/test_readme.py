"""What the project's pages say is what the program says; run as a script, this writes their generated parts anew."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from html import unescape
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import fill
from typing import NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console
from rich.text import Text

import sim
from sim import columns, document
from sim.cli import main
from sim.cost import prices
from sim.cost.translation import Seen, Walker, entries
from sim.memory.pages import BLOCK
from sim.report.style import COLOURS, RC
from sim.results import Loaded, load
from sim.sharing.kernels import KERNELS, Kernel
from sim.units import GIB, about_bytes, about_duration

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SCENARIOS = ROOT / "scenarios"
PICTURES = {name: ROOT / "results" / f"quickstart-{name}.png" for name in ("memory", "gain-and-cost")}
SLOWDOWN = ROOT / "results" / "large-pages-slowdown.png"
TERMINAL = ROOT / "results" / "quickstart-terminal.svg"
LANGUAGE = SCENARIOS / "language.md"
RESULTS = ROOT / "results" / "README.md"
GUIDES = [
    README,
    LANGUAGE,
    *(SCENARIOS / f"{name}.md" for name in ("systems", "datacenters", "studies")),
    ROOT / "sim" / "README.md",
]
"""Pages whose code blocks are tried."""
FLEETS = {
    "boot-storm": "memory",
    "night-consolidation": "hosts-and-guests",
    "noisy-neighbour": "memory",
    "host-failure": "hosts-and-guests",
    "fleet-planetlab": "hosts-and-guests",
    "fleet-openb": "hosts-and-guests",
}
"""Scenarios with a datacenter, and which of its pictures scenarios/datacenters.md shows."""
PAGES = sorted(page for page in ROOT.rglob("*.md") if not any(part.startswith(".") for part in page.parts))

KERNEL_CHANGES = {
    ("node_holds_page", True): "merged pages are not searched for again at every scan; `max_kernel_pages` is gone",
    ("numa_trees", True): "`merge_across_nodes`",
    ("late_timers", True): "sleeps end a timer tick later: 20 ms are 24 ms at HZ=250",
    ("zero_pages", True): "`use_zero_pages`",
    ("sharing_limit", True): "`max_page_sharing`: a content with more copies gets several frames (chains and dups)",
    ("sleep_wakes", True): "a new `sleep_millisecs` wakes ksmd",
    ("reuse_last_mapper", True): "the last guest that maps a merged page writes to it in place",
    ("reuse_last_mapper", False): "every write to a merged page copies it again",
    ("counts_last_batch", False): "`pages_scanned`, without the last batch of each scan",
    ("counts_last_batch", True): "`pages_scanned` counts every batch",
    ("smart_scan", True): "`smart_scan`, on by default",
    ("advisor", True): "`advisor_mode: scan-time`",
    ("exact_sleep", True): "sleeps of a second and more no longer end at whole seconds",
    ("checksum_first", True): "the checksum comes before the search: nothing merges at its first visit",
    ("deferred_split", True): "a huge page that is given back in part is split only when memory is short",
    ("huge_pages", True): "transparent huge pages, split when one of their pages merges",
    ("split_frees_zero", True): "splitting a huge page unmaps its pages full of zeros",
}


class Quickstart(NamedTuple):
    """What the command of the README prints and keeps."""

    printed: str
    result: Loaded
    pictures: Mapping[str, bytes]


@cache
def quickstart() -> Quickstart:
    """Run the quickstart as the README does."""
    with TemporaryDirectory() as out:
        called = CliRunner().invoke(main, ["run", str(SCENARIOS / "quickstart.yaml"), "--out", out])
        assert called.exit_code == 0, called.output
        result = load(Path(out, "quickstart"))
        pictures = {name: (result.folder / "pictures" / f"{name}.png").read_bytes() for name in PICTURES}
    return Quickstart(called.stdout, result, pictures)


def fleet_picture(name: str) -> bytes:
    """Run a scenario with a datacenter, and return the picture of it that is shown."""
    with TemporaryDirectory() as out:
        command = ["run", "-q", "--jobs", "1", str(SCENARIOS / f"{name}.yaml"), "--out", out]
        called = CliRunner().invoke(main, command)
        assert called.exit_code == 0, called.output
        return (load(Path(out, name)).folder / "pictures" / f"{FLEETS[name]}.png").read_bytes()


def kept_picture(name: str) -> Path:
    """Where it is kept."""
    return ROOT / "results" / f"{name}-{FLEETS[name]}.png"


# --- generated parts ---------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def terminal() -> str:
    """Return the quickstart as a terminal shows it, in SVG; but for the digest, which follows the program's version."""
    *lines, _ = quickstart().printed.rstrip().splitlines()
    console = Console(record=True, width=136, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print("$ overcommit run scenarios/quickstart.yaml", style="bold", highlight=False)
    for line in [*lines, "results/quickstart/<digest>"]:
        console.print(Text(line, "green" if line.startswith("met ") else ""))
    svg = console.export_svg(title="overcommit", unique_id="overcommit")
    return re.sub(r"@font-face \{.*?\}\s*|<!--.*?-->\s*", "", svg, flags=re.DOTALL)  # no fonts that a page would fetch


def shown(svg: str) -> list[str]:
    """Words of an SVG."""
    return " ".join(unescape(text) for text in re.findall(r">([^<]+)</text>", svg)).split()


def reading_block() -> str:
    """Return how to read the quickstart's figures."""
    result = quickstart().result
    last = result.samples.iloc[-1]
    promised, touched = float(last["mem_promised_bytes"]), float(last["mem_touched_bytes"])
    early, late = (result.summary[name] or 0 for name in ("ksmd_cpu_percent", "ksmd_cpu_percent_settled"))
    settled = about_duration(1e9 * (result.summary["time_to_90_percent_s"] or 0))
    return fill(
        f"How to read it: the guests were promised {about_bytes(promised)} and have touched {about_bytes(touched)} of "
        f"it, so the ratio would be {promised / touched:.3g} without any sharing. Memory that is not touched yet is "
        f"lent, not saved. KSM makes {about_bytes(last['mem_used_bytes'])} of the {about_bytes(touched)}, nine tenths "
        f"of that within {settled}, for {early:.3g} % of one core on average and {late:.3g} % in the end.",
        width=118,
    )


def fidelity() -> Mapping[str, str]:
    """What the pages of results/ say of themselves, by heading."""
    text = (ROOT / "results" / "fidelity.md").read_text()
    found = dict(re.findall(r"^- \*\*([^*]+):\*\* (.+)$", text, re.MULTILINE))
    [found["Published figures"]] = re.findall(
        r"^\d+ published figures: .+$", (ROOT / "results" / "published.md").read_text(), re.MULTILINE
    )
    return found


def in_short_block() -> str:
    """Return the three lines that tell most of how near the simulator comes."""
    told = fidelity()
    return "\n".join(
        (
            f"- **against a real kernel, memory at rest:** {told['Static memory']}",
            f"- **against a real kernel, time:** scans {told['Scan times']}",
            f"- **against what others measured:** {told['Published figures']}",
        )
    )


def fidelity_block() -> str:
    """Return how near the simulator comes, a line for each kind of figure."""
    page = {"Published figures": "published.md"}
    rows = ((f"[{name}](results/{page.get(name, 'fidelity.md')})", told) for name, told in fidelity().items())
    return table(("what", "how near"), rows)


def exit_code_block() -> str:
    """Return the exit codes that the command's help lists."""
    told = re.sub(r"\s+", " ", str(main.help)).split("Exit codes: ")[1].rstrip(". ")
    return table(("code", "meaning"), (entry.split(" ", 1) for entry in re.split(r", (?=\d)", told)))


def metrics_block() -> str:
    """Return the definitions of the headline metrics."""
    rows = ((f"`{each.name}`", each.unit, each.meaning, each.formula) for each in columns.HEADLINES)
    return table(("metric", "unit", "meaning", "formula"), rows)


def kernels_block() -> str:
    """Return the kernel versions and what each changed."""
    first, *others = KERNELS.values()
    rows = [(first.version, "KSM as it came")]
    for before, after in zip(KERNELS.values(), others, strict=False):
        new = [KERNEL_CHANGES[each, getattr(after, each)] for each in flags() if differ(before, after, each)]
        rows.append((after.version, "; ".join(new) or "the newest version checked"))
    return table(("kernel", "what it changed"), rows)


def flags() -> Iterable[str]:
    """Names of what can differ between kernels."""
    return [name for name in Kernel._fields if name != "version"]


def differ(before: Kernel, after: Kernel, flag: str) -> bool:
    """Whether a flag changed."""
    return bool(getattr(before, flag) != getattr(after, flag))


def scenarios_block() -> str:
    """Return the bundled scenarios with their questions and what they expect."""
    rows = []
    for file in sorted(SCENARIOS.glob("*.yaml")):
        data = document.read(file).data
        rows.append((f"[{file.stem}]({file.name})", data["description"], "<br>".join(f"`{e}`" for e in data["expect"])))
    return table(("scenario", "question", "expects"), rows)


def draw_slowdown(file: Path) -> None:
    """Draw what a guest loses by the share of its memory in huge pages, for three intensities."""
    blocks = GIB // (BLOCK * columns.PAGE_BYTES)
    walker = Walker(prices.load(prices.DEFAULT))
    waits = []
    for huge in range(blocks + 1):
        counts = np.array([[0, 0, 0], [(blocks - huge) * BLOCK, huge * BLOCK, 0]])
        backed = (np.arange(blocks) < huge).astype(np.int64)
        seen = Seen(counts, np.full(blocks, float(BLOCK)), backed, np.array([0.0, 1.0]))
        waits.append(walker.per_access(entries(seen, 3, 4, 3)))
    with rc_context(RC):
        canvas = Figure(figsize=(7, 3.2), layout="constrained")
        ax = canvas.subplots()
        for millions, role in ((1, "private"), (3.5, "saved"), (10, "metadata")):
            percent = 100 * np.array(waits) * millions / 1e3
            ax.plot(np.linspace(0, 100, blocks + 1), percent, color=COLOURS[role].light)
            ax.annotate(f"{millions:g} million accesses a second", (0, percent[0]), (6, 5), textcoords="offset points")
        ax.set(title="A guest that works on 1 GiB, in pages of 2 MiB of its own", ylim=(0, None))
        ax.set(xlabel="share of its memory in huge pages of the host (%)", ylabel="longer than with all (%)")
        canvas.savefig(file, dpi=144, metadata={"Software": None})


BLOCKS: Mapping[tuple[Path, str], Callable[[], str]] = {
    (README, "reading"): reading_block,
    (README, "exit codes"): exit_code_block,
    (README, "in short"): in_short_block,
    (README, "fidelity"): fidelity_block,
    (RESULTS, "metrics"): metrics_block,
    (LANGUAGE, "kernels"): kernels_block,
    (SCENARIOS / "README.md", "scenarios"): scenarios_block,
    (RESULTS, "columns"): lambda: columns.markdown().rstrip(),
}


def between(name: str) -> re.Pattern[str]:
    """What finds a generated part of a page, markers not included."""
    return re.compile(rf"(?<=<!-- begin {name} -->\n).*?(?=<!-- end {name} -->)", re.DOTALL)


def write_anew() -> None:
    """Write every generated part, and the pictures, as they are now."""
    for (page, name), make in BLOCKS.items():
        text = page.read_text()
        place = between(name).search(text)
        assert place, f"{page.name} has no part {name}"
        page.write_text(f"{text[: place.start()]}{make()}\n{text[place.end() :]}")
    for name, picture in quickstart().pictures.items():
        PICTURES[name].write_bytes(picture)
    for name in FLEETS:
        kept_picture(name).write_bytes(fleet_picture(name))
    draw_slowdown(SLOWDOWN)
    TERMINAL.write_text(terminal())
    schema_file().write_text(CliRunner().invoke(main, ["schema"]).stdout)


def schema_file() -> Path:
    """The schema that editors read."""
    return ROOT / "sim" / "scenario" / "schema.json"


# --- the promises ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "name"), BLOCKS, ids=lambda value: value.name if isinstance(value, Path) else value)
def test_a_generated_part_of_a_page_says_what_the_program_says(page: Path, name: str) -> None:
    found = between(name).search(page.read_text())

    assert found, f"{page.name} has no part {name}"
    assert found[0] == BLOCKS[page, name]() + "\n", "run: python tests/test_readme.py"


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_of_the_readme_is_one_of_the_quickstart(name: str, tmp_path: Path) -> None:
    (tmp_path / "new.png").write_bytes(quickstart().pictures[name])

    assert_same_picture(PICTURES[name], tmp_path / "new.png")


def test_the_terminal_of_the_readme_shows_the_quickstart() -> None:
    assert shown(TERMINAL.read_text()) == shown(terminal()), "run: python tests/test_readme.py"
    assert "http" not in TERMINAL.read_text().replace("http://www.w3.org/2000/svg", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", FLEETS)
def test_a_picture_of_a_fleet_is_that_of_its_scenario(name: str, tmp_path: Path) -> None:
    (tmp_path / "new.png").write_bytes(fleet_picture(name))

    assert_same_picture(kept_picture(name), tmp_path / "new.png")


def test_the_picture_of_what_large_pages_are_worth_is_that_of_the_model(tmp_path: Path) -> None:
    draw_slowdown(tmp_path / "new.png")

    assert_same_picture(SLOWDOWN, tmp_path / "new.png")


def assert_same_picture(old: Path, new: Path) -> None:
    """The committed picture and one drawn now show the same."""
    committed, drawn = imread(old), imread(new)

    assert committed.shape == drawn.shape
    # Another matplotlib may place letters a fraction of a pixel apart.
    assert np.sqrt(np.mean((committed - drawn) ** 2)) < 0.02


def fenced(language: str) -> list[str]:
    """The code blocks of the front page and the guides in one language."""
    texts = (page.read_text() for page in GUIDES)
    return [
        code for text in texts for code in re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


PROGRAMS = [code for code in fenced("python") if not code.startswith("# sim/")]


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_the_readmes_python_runs(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)

    exec(compile(PROGRAMS[number], README.name, "exec"), {})

    assert capsys.readouterr().out


def test_the_readmes_tuner_moves_the_knobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, sim.Result] = {}

    exec(compile(next(code for code in fenced("python") if "Proportional" in code), README.name, "exec"), names)

    samples = names["result"].samples
    assert set(samples["run"]) == {0, 1}
    assert samples["pages_to_scan"].nunique() > 3


def test_the_readmes_mechanism_is_one_file_and_one_name(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "sim", tmp_path / "sim", ignore=shutil.ignore_patterns("__pycache__"))
    own, name = (code for code in fenced("python") if code.startswith("# sim/"))
    scenario = next(text for text in fenced("yaml") if text.startswith("# scenarios/nightly.yaml"))
    assert len((own + name + scenario).splitlines()) < 40
    registry = tmp_path / "sim" / "sharing" / "__init__.py"
    before, after = registry.read_text().split("    @property\n", 1)
    imports = "from sim.sharing.mergemem import Mergemem\n"
    before = before.replace(imports, f"{imports}from sim.sharing.nightly import Nightly\n")
    registry.write_text(f"{before}{name.split(chr(10), 1)[1]}\n    @property\n{after}")
    (tmp_path / "sim" / "sharing" / "nightly.py").write_text(own)
    (tmp_path / "nightly.yaml").write_text(scenario)

    def overcommit(*arguments: str) -> str:
        return run_child([sys.executable, "-m", "sim", *arguments], cwd=tmp_path)

    assert "All memory compared once a night." in overcommit("list")
    assert "Time of day; the run begins at midnight." in overcommit("schema")
    assert "met  saved_bytes == 96MiB" in overcommit("run", "nightly.yaml", "--out", "results")


def run_child(command: list[str], cwd: Path) -> str:
    """Output of a command that ends well."""
    environment = {**os.environ, "PYTHONPATH": str(cwd)}
    return subprocess.run(command, cwd=cwd, env=environment, check=True, capture_output=True, text=True).stdout


def test_the_readmes_commands_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(SCENARIOS, tmp_path / "scenarios")
    monkeypatch.chdir(tmp_path)
    lines = [line for block in fenced("sh") for line in block.splitlines() if line.startswith("overcommit ")]

    ended = {line: CliRunner().invoke(main, line.split()[1:]).exit_code for line in lines}

    assert ended == dict.fromkeys(lines, 0)
    assert {line.split()[1] for line in lines} >= {"run", "explain", "new", "validate", "list"}


def test_the_readmes_scenario_runs_and_meets_its_expectations(tmp_path: Path) -> None:
    file = tmp_path / "language.yaml"
    [text] = [each for each in fenced("yaml") if each.startswith("name:")]
    file.write_text(text)

    result = sim.run(sim.parse(document.read(file).data, SCENARIOS))

    assert [verdict.met for verdict in result.verdicts] == [True, True]
    assert len(result.guests) == sum(vm.count for vm in result.scenario.vms)


def test_the_ci_script_runs_the_readmes_test_command() -> None:
    [pattern] = re.findall(r"grep -E '(.+)' README.md", (ROOT / ".ci" / "run").read_text())

    [command] = re.findall(rf"{pattern}.*$", README.read_text(), re.MULTILINE)

    assert f"{command}\n" in fenced("sh")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())

    assert [link for link in links if not (page.parent / link).exists()] == []


if __name__ == "__main__":
    write_anew()
