"""Price sets of one's own: how they are fitted, kept, found and used, and what is undone after measuring."""

import contextlib
import itertools
import json
import os
import platform
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import sim
from sim.cli import main
from sim.cost import prices
from sim.cost.prices import Prices
from sim.document import dump, read
from sim.errors import At, MachineError, UserError
from sim.lab import calibrate, ksmd_costs, memory_costs, swap_costs, undo
from sim.lab.ksmd_costs import ALONE, WITH_NODE, Scans, certainty, fit, left_out
from sim.lab.memory_costs import typical
from sim.sharing.ksm_pass import WORK

KNOWN = np.array([prices.load(prices.DEFAULT).picoseconds(kind) / 1000 for kind in WORK])
SCENARIO = {"name": "one", "hosts": [{"memory": "1GiB"}], "vms": [{"name": "vm", "memory": "16MiB"}]}


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this user's sets lie, which is empty."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return prices.user_folder()


def put(folder: Path, name: str, **changed: object) -> Path:
    """Write the bundled set under another name, with some keys changed."""
    folder.mkdir(parents=True, exist_ok=True)
    data = read(prices.FOLDER / f"{prices.DEFAULT}.yaml").data | {"name": name} | changed
    file = folder / f"{name}.yaml"
    file.write_text(dump({key: value for key, value in data.items() if value is not None}))
    return file


def price(ns: float, **ends: float) -> dict[str, Any]:
    return {"ns": ns, "source": "made up for a test", **ends}


# --- the fit -------------------------------------------------------------------------------------------------------


def made_up(seed: int, truth: np.ndarray, factor: float, noise: float) -> list[Scans]:
    """Workloads of a machine with these prices, each scan with its own mixture of work."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(30):
        work = rng.integers(0, 20_000, (8, len(WORK))) * (rng.random((1, len(WORK))) < 0.3)
        work[:, :2] = rng.integers(1, 50, (8, 2))
        cold = rng.random(8)
        cpu = (work @ truth) * (1 + factor * cold) * np.exp(noise * rng.standard_normal(8))
        parts.append(Scans(work.astype(float), cold, cpu, np.full(8, 1 / 8)))
    return parts


def truth(seed: int) -> np.ndarray:
    """Prices between 10 and 1000 ns, the two kinds with one price alike."""
    drawn = np.random.default_rng(seed).uniform(10, 1000, len(WORK))
    drawn[WITH_NODE] = drawn[ALONE]
    return drawn


@given(st.integers(0, 1 << 32), st.floats(0, 1))
def test_the_fit_finds_the_prices_that_made_the_times(seed: int, factor: float) -> None:
    found = fit(Scans.joined(made_up(seed, truth(seed), factor, 0)), KNOWN)

    heavy = ~np.isin(WORK, ("batch", "scan"))  # some batches are nothing beside thousands of pages
    # A random plan may leave two kinds of work that nearly always come together: one price may be less sure.
    off = abs(found.prices[heavy] - truth(seed)[heavy])
    assert np.count_nonzero(off > 10 + 0.05 * truth(seed)[heavy]) <= 1
    assert (off <= 10 + 0.25 * truth(seed)[heavy]).all()
    assert found.factor == pytest.approx(factor, abs=0.03)


@given(st.integers(0, 1 << 32))
def test_no_price_is_negative_however_odd_the_times(seed: int) -> None:
    parts = made_up(seed, truth(seed), 0.3, 2.0)

    assert (fit(Scans.joined(parts), KNOWN).prices >= 0).all()


def test_a_scan_that_was_disturbed_hardly_moves_the_prices() -> None:
    parts = made_up(1, truth(1), 0.3, 0.01)
    for part in parts[:10]:
        part.cpu_ns[0] *= 5

    found = fit(Scans.joined(parts), KNOWN)

    assert found.prices[WORK.index("checksum")] == pytest.approx(truth(1)[WORK.index("checksum")], rel=0.05)


def test_a_workload_left_out_is_predicted_by_the_others() -> None:
    errors = left_out(made_up(2, truth(2), 0.3, 0.03), KNOWN)

    assert len(errors) == 30
    assert max(map(abs, errors)) < 0.1


def test_what_always_comes_together_is_said_not_to_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ksmd_costs, "_RESAMPLES", 40)
    parts = made_up(3, truth(3), 0.3, 0.05)
    item, merge = WORK.index("item"), WORK.index("merge")
    for part in parts:
        part.work[:, item] = part.work[:, merge] + np.arange(8)

    sure = certainty(parts, KNOWN)

    assert ("item", "merge") in sure.together
    assert not any("checksum" in pair for pair in sure.together)
    assert (sure.low <= sure.high).all()


def test_every_kind_of_work_is_done_in_two_workloads_or_more() -> None:
    done = np.array([ksmd_costs._counted(trial)[-1, : len(WORK)] for trial in ksmd_costs.trials()])

    assert [kind for kind, times in zip(WORK, (done > 0).sum(axis=0), strict=True) if times < 2] == []


def test_every_workload_has_as_many_scans_as_it_is_to_have() -> None:
    trials = [*ksmd_costs.trials()]

    assert [len(ksmd_costs._counted(trial)) - 1 for trial in trials] == [trial.scans for trial in trials]
    assert len({trial.scenario.name for trial in trials}) == len(trials)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_a_median_lies_in_its_interval(times: list[float]) -> None:
    found = typical(times, "made up for a test")

    assert found.low is not None and found.high is not None
    assert min(times) - 0.01 <= found.low <= found.ns <= found.high <= max(times) + 0.01


def test_the_interval_of_a_median_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    found = [typical(rng.exponential(1e6, 25), "made up for a test") for _ in range(1000)]

    assert sum(each.low <= 1e6 * np.log(2) <= each.high for each in found) >= 930  # type: ignore[operator]


# --- sets of one's own ---------------------------------------------------------------------------------------------


def test_a_host_that_names_no_prices_has_the_bundled_ones(own_folder: Path) -> None:
    assert sim.parse(SCENARIO).hosts[0].prices == prices.DEFAULT


def test_a_host_that_names_no_prices_has_this_machines_own_where_there_are_any(own_folder: Path) -> None:
    put(own_folder, prices.own_name(), cow_break=price(1234))

    host = sim.parse(SCENARIO).hosts[0]

    assert host.prices == prices.own_name()
    assert host.price_set.cow_break.ns == 1234
    assert sim.parse(SCENARIO).resolved()["hosts"][0]["prices"] == prices.own_name()


def test_a_scenario_that_names_its_prices_has_those(own_folder: Path) -> None:
    put(own_folder, prices.own_name(), cow_break=price(1234))
    put(own_folder, "other-machine", cow_break=price(4321))

    for name in (prices.DEFAULT, "other-machine"):
        scenario = sim.parse(SCENARIO | {"hosts": [{"memory": "1GiB", "prices": name}]})
        assert scenario.hosts[0].price_set == prices.load(name)
    assert prices.load("other-machine").cow_break.ns == 4321


def test_a_result_tells_which_prices_it_used(own_folder: Path) -> None:
    file = put(own_folder, prices.own_name())
    before = sim.run(sim.parse(SCENARIO | {"duration": "1s"})).manifest
    put(own_folder, prices.own_name(), visit=price(99))
    os.utime(file, ns=(1, 1))
    after = sim.run(sim.parse(SCENARIO | {"duration": "1s"})).manifest

    assert list(before["prices"]) == list(after["prices"]) == [prices.own_name()]
    assert before["prices"] != after["prices"]
    assert before["digest"] != after["digest"]


def test_a_set_of_ones_own_is_listed_and_suggested(own_folder: Path) -> None:
    put(own_folder, "my-machine")

    assert "my-machine" in prices.names()
    assert "my-machine" in CliRunner().invoke(main, ["list"]).output
    with pytest.raises(At, match="did you mean my-machine"):
        prices.load("my-machin")


def test_a_broken_set_of_ones_own_is_one_clear_message(own_folder: Path, tmp_path: Path) -> None:
    put(own_folder, prices.own_name(), batch=None)
    file = tmp_path / "one.yaml"
    file.write_text(dump(SCENARIO))

    listed = CliRunner().invoke(main, ["list"])
    outcome = CliRunner().invoke(main, ["validate", str(file)])

    assert (listed.exit_code, outcome.exit_code) == (0, 2)
    assert "batch: the key is missing" in listed.output
    assert "batch: the key is missing" in outcome.output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": price(5, low=6, high=7)}, "must lie between its low and its high"),
        ({"batch": price(5, high=4)}, "must lie between its low and its high"),
        ({"swap": {"read": price(5)}}, "swap.write: the key is missing"),
        ({"page_faults": {"small": price(5), "huge": {"ns": 6}}}, "page_faults.huge.source"),
        ({"zram": {"lz4": {"compress": price(5), "decompress": price(5), "bytes_per_page": -1}}}, "bytes_per_page"),
        ({"random_access": [{"working_set": 4096, "small": price(5), "huge": price(5)}]}, "write a unit"),
        (
            {"random_access": [{"working_set": f"{size}MiB", "small": price(5), "huge": price(5)} for size in (4, 1)]},
            "smallest working set",
        ),
        ({"machine": {"cpu": "x", "cores": 0, "kernel": "6.18", "hz": 250, "virtualised": True}}, "machine.cores"),
        ({"tlb": {}}, "tlb"),
    ],
)
def test_a_wrong_set_says_what_is_wrong(own_folder: Path, changed: dict[str, object], message: str) -> None:
    put(own_folder, "wrong", **changed)

    with pytest.raises(At, match="wrong price set") as refusal:
        prices.load("wrong")
    assert message in str(refusal.value)


def test_what_is_written_is_what_is_read(own_folder: Path) -> None:
    extra = {
        "machine": calibrate.provenance(),
        "page_faults": {"small": price(500, low=400, high=600), "huge": price(1e5)},
        "random_access": ({"working_set": "1MiB", "small": price(5), "huge": price(4)},),
        "zram": {"lz4": {"compress": price(5), "decompress": price(5), "bytes_per_page": 1700.5}},
        "paging": {name: price(3) for name in ("page_in", "page_out")},
        "swap": {name: price(7) for name in ("read", "write", "swap_in", "swap_out")},
    }
    whole = Prices.model_validate(prices.load(prices.DEFAULT).model_dump() | {"name": "whole"} | extra)

    calibrate.install(whole, own_folder / "whole.yaml")

    assert prices.load("whole") == whole
    assert [file.name for file in own_folder.iterdir()] == ["whole.yaml"]


# --- the verb ------------------------------------------------------------------------------------------------------


def test_a_set_goes_to_the_users_folder_under_this_machines_name(own_folder: Path) -> None:
    name, file = calibrate.destination(None, None)

    assert file == own_folder / f"{name}.yaml"
    assert name == prices.own_name()


@pytest.mark.parametrize(
    ("name", "out", "message"),
    [
        (prices.DEFAULT, None, "comes with the package"),
        ("a/b", None, "must be made of letters"),
        ("one", "two.yaml", "must be called one.yaml"),
        (None, "one.json", "must be called one.yaml"),
        (None, "/dev/null/one.yaml", "cannot be written"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_anything_is_measured(
    own_folder: Path, name: str | None, out: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        calibrate.destination(name, Path(out) if out else None)


@pytest.mark.parametrize("node", ["vm", "Vm 1.example.org", "--", ""])
def test_any_host_name_makes_a_name(monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    monkeypatch.setattr(platform, "node", lambda: node)

    assert sim.units.parse_name(prices.own_name())


def test_calibrate_needs_root(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    outcome = CliRunner().invoke(main, ["lab", "calibrate"])

    assert outcome.exit_code == MachineError.exit_code
    assert "root" in outcome.output


@pytest.fixture
def measuring(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Puts something in the place of the measurement, on a machine that could do it."""

    def put_in(outcome: Callable[[], Any]) -> None:
        monkeypatch.setattr("sim.lab.machine.check_abilities", lambda: None)
        monkeypatch.setattr(calibrate, "calibrate", lambda *_: outcome())

    return put_in


def found(name: str) -> calibrate.Calibration:
    """What a measurement could be."""
    changed = {"name": name, "batch": price(30_000, low=25_000, high=35_000)}
    data = prices.load(prices.DEFAULT).model_dump() | changed
    errors = {"pairs": -0.02, "holes": 0.11, "zero": 0.04}
    return calibrate.Calibration(Prices.model_validate(data), errors, [("visit", "checksum")], {"zram": "no zram"})


def test_calibrate_prints_the_prices_and_what_is_uncertain_and_installs_the_set(
    measuring: Callable[[Callable[[], Any]], None], own_folder: Path
) -> None:
    measuring(lambda: found("mine"))

    outcome = CliRunner().invoke(main, ["lab", "calibrate", "--name", "mine"])

    assert outcome.exit_code == 0, outcome.output
    assert "25,000 to 35,000" in outcome.output
    assert "typical error 4.0%, worst +11.0% (holes)" in outcome.output
    assert "visit and checksum" in outcome.output
    assert "not measured: zram: no zram" in outcome.output
    assert outcome.output.splitlines()[-1] == str(own_folder / "mine.yaml")
    assert prices.load("mine").batch.ns == 30_000


def test_calibrate_speaks_json(measuring: Callable[[Callable[[], Any]], None], tmp_path: Path) -> None:
    measuring(lambda: found("mine"))

    outcome = CliRunner().invoke(main, ["lab", "calibrate", "--json", "--out", str(tmp_path / "mine.yaml")])

    told = json.loads(outcome.output)
    assert told["file"] == str(tmp_path / "mine.yaml")
    assert told["prices"]["batch"]["low"] == 25_000
    assert told["missing"] == {"zram": "no zram"}


def test_what_a_machine_lacks_is_left_out_and_said(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object) -> None:
        raise MachineError("this machine has none")

    trials = [*ksmd_costs.trials()]
    parts = list(itertools.islice(itertools.cycle(made_up(4, truth(4), 0.3, 0.05)), len(trials)))
    monkeypatch.setattr(ksmd_costs, "_RESAMPLES", 20)
    monkeypatch.setattr(calibrate, "exclusive", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(calibrate, "measured", lambda *_: parts)
    monkeypatch.setattr(memory_costs, "writes", lambda _: {"cow_break": prices.Price(**price(4000))})
    monkeypatch.setattr(memory_costs, "has_huge_pages", lambda: False)
    monkeypatch.setattr(swap_costs, "algorithms", list)
    monkeypatch.setattr(swap_costs, "paging", lacking)
    monkeypatch.setattr(swap_costs, "swap", lacking)
    told: list[float] = []

    made = calibrate.calibrate("mine", tell=lambda done, _: told.append(done))

    assert list(made.missing) == ["huge_pages", "page_faults, fork and random_access", "zram", "paging", "swap"]
    assert made.prices.swap is None
    assert made.prices.checksum.ns == pytest.approx(truth(4)[WORK.index("checksum")], rel=0.1)
    assert list(made.errors) == [trial.scenario.name for trial in trials]
    assert told == sorted(told)
    calibrate.install(made.prices, own_folder / "mine.yaml")
    assert prices.load("mine") == made.prices


def test_under_sudo_the_set_goes_to_the_user_who_called_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("SUDO_UID", str(os.getuid()))
    home = pwd.getpwuid(os.getuid()).pw_dir

    _, file = calibrate.destination("mine", None)

    assert file == Path(home, ".config/overcommit/prices/mine.yaml")


def test_an_interrupted_calibration_writes_nothing(
    measuring: Callable[[Callable[[], Any]], None], own_folder: Path
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    measuring(interrupted)

    outcome = CliRunner().invoke(main, ["lab", "calibrate"])

    assert outcome.exit_code == 130
    assert "nothing was kept" in outcome.output
    assert not own_folder.exists()


# --- what is set up and undone ------------------------------------------------------------------------------------


def test_undoing_what_never_came_to_be_does_nothing(tmp_path: Path) -> None:
    for kind, what in {"zram": "99", "swap": "/nowhere", "file": "/nowhere", "cgroup": str(tmp_path / "no")}.items():
        undo.undo(kind, what)  # type: ignore[arg-type]


def test_files_and_groups_are_removed(tmp_path: Path) -> None:
    file, group = tmp_path / "file", tmp_path / "group"
    file.touch()
    group.mkdir()

    undo.undo("file", str(file))
    undo.undo("cgroup", str(group))

    assert list(tmp_path.iterdir()) == []


def test_a_line_through_times_gives_the_price_of_a_page_and_of_a_byte() -> None:
    sizes = np.linspace(300, 3500, 80)
    times = 2000 + 4 * sizes + np.random.default_rng(1).normal(0, 100, 80)

    page, byte = swap_costs._line(sizes, times, "a source of figures")

    assert page.low is not None and page.high is not None and page.low < 2000 < page.high
    assert byte.ns == pytest.approx(4, rel=0.02)
    assert swap_costs._line(sizes, np.full(80, 500.0), "a source of figures")[1].ns == 0
