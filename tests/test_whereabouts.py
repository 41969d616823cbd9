"""`overcommit explain RESULT --at TIME`: where memory is, and why no more was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import sim
from sim.cli import main
from sim.results import write
from sim.study.whereabouts import Part, whereabouts


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def kept(folder: Path, *parts: dict[str, Any], **host: Any) -> Path:
    """The result of two guests with these parts; one is there from the start, the other after 3 s."""
    asked = {
        "name": "web",
        "duration": "12s",
        "hosts": [{"name": "new", "memory": "256MiB", "ksm": {"pages_to_scan": 200, "sleep_millisecs": 20}, **host},
                  {"name": "new-b", "count": 2, "memory": "64MiB"}],
        "vms": [{"name": "a", "count": 2, "every": "3s", "memory": "16MiB", "host": "new",
                 "image": {"parts": list(parts)}}],
    }  # fmt: skip
    return write(sim.run(sim.parse(asked)), folder)


SYSTEM = {"name": "system", "pool": "debian", "size": "50%"}
EMPTY = {"name": "empty", "zero": True, "size": "25%"}


def by_name(parts: list[Part]) -> dict[str, int]:
    return {part.name: part.bytes for part in parts}


@pytest.mark.parametrize("time_s", [0, 1, 4, 8, 12])
def test_all_of_the_hosts_and_of_the_guests_memory_is_told(time_s: int, tmp_path: Path) -> None:
    run = sim.load(kept(tmp_path, SYSTEM, EMPTY, thp={"enabled": "madvise"}, swap={"device": "nvme", "size": "64MiB"}))

    for each in whereabouts(run, time_s):
        row = run.samples[(run.samples["time_s"] == time_s) & (run.samples["host"] == each.host)].iloc[0]
        assert sum(by_name(each.memory).values()) == row["mem_total_bytes"]
        assert sum(by_name(each.guests).values()) == row["mem_promised_bytes"]
        assert min([part.bytes for part in (*each.memory, *each.guests, *each.reasons)]) > 0


DATA = {"name": "data", "size": "100%"}


@pytest.mark.parametrize(
    ("parts", "host", "at", "reason"),
    [
        ([SYSTEM], {}, 0.5, "scan not complete"),
        ([DATA], {"ksm": {"pages_to_scan": 5000, "smart_scan": 0}}, 12, "unique"),
        ([DATA], {"ksm": {"pages_to_scan": 5000, "smart_scan": 1}}, 12, "smart_scan's phase"),
        ([{"name": "heap", "size": "100%", "writes": {"rate": "50/s"}}],
         {"ksm": {"pages_to_scan": 5000, "smart_scan": 0}}, 12, "volatile"),
        ([SYSTEM], {"ksm": {"run": 0}}, 12, "nobody looks"),
        ([DATA], {"ksm": {"run": 1, "pages_to_scan": 1}, "thp": {"enabled": "always"}}, 12, "huge pages"),
        ([SYSTEM], {"ksm": None, "tps": {}}, 12, "not told"),
    ],
)  # fmt: skip
def test_the_reason_is_what_it_is(parts: Any, host: Any, at: float, reason: str, tmp_path: Path) -> None:
    [found] = whereabouts(sim.load(kept(tmp_path, *parts, **host)), at, "new-0")

    reasons = by_name(found.reasons)
    assert reasons[reason] == max(reasons.values()), reasons


def test_frames_beyond_the_sharing_limit_are_counted(tmp_path: Path) -> None:
    same = {"name": "same", "size": "50%", "duplicates": 64}
    folder = kept(tmp_path, same, ksm={"pages_to_scan": 5000, "max_page_sharing": 4, "smart_scan": 0})

    [found] = whereabouts(sim.load(folder), None, "new-0")

    last = sim.load(folder).samples.query("host == 'new-0'").iloc[-1]
    assert by_name(found.reasons)["sharing limit"] == 4096 * (last["stable_node_dups"] - last["stable_node_chains"]) > 0


def test_the_command_prints_all_of_it_or_the_sentence(tmp_path: Path) -> None:
    folder = kept(tmp_path, SYSTEM)

    text = call("explain", folder, "--at", "0.5s", "--host", "new-0").stdout
    told = json.loads(call("explain", folder, "--json").stdout)

    assert text.startswith("At 0ns, most of what new-0 has not saved is ")
    assert "scan not complete" in text and "promised to guests" in text
    assert [each["host"] for each in told] == ["new-0", "new-b-0", "new-b-1"]
    assert len(call("explain", folder, "--host", "new-0", "-q").stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--at", "1h"], "the run ends at 12s"),
        (["--at", "soon"], "must be a duration"),
        (["--host", "nwe-0"], "did you mean new-0"),
        (["--set", "seed=1"], "is a result"),
    ],
)
def test_mistakes(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = call("explain", kept(tmp_path, SYSTEM), *arguments)

    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


def test_a_scenario_has_no_moments() -> None:
    result = call("explain", "web.yaml", "--at", "5s")

    assert (result.exit_code, "is no result" in result.stderr) == (2, True)


def test_a_datacenter_is_refused_in_words(tmp_path: Path) -> None:
    folder = kept(tmp_path, SYSTEM)
    asked = folder / "scenario.yaml"
    asked.write_text(asked.read_text().replace("\ndatacenter: null\n", "\ndatacenter: {epoch: 5min}\n"))

    result = call("explain", folder, "--at", "1s")

    assert (result.exit_code, "hosts.parquet has the memory of each" in result.stderr) == (2, True), result.stderr
