"""Datacenters from end to end, hosts with pages among them: same bits however they are run, old reports, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import sim
from sim.cli import main
from sim.document import dump
from sim.errors import UserError
from sim.report.fleet import pictures_of
from sim.report.words import conclusion, headlines

SCENARIOS = Path(__file__).parents[1] / "scenarios"


def described(**changes: Any) -> dict[str, Any]:
    """A small datacenter, as a file would say it."""
    host = {"memory": "1GiB", "cores": 4, "power": {"idle": 100, "full": 200},
            "ksm": {"run": 1, "pages_to_scan": 5000, "sleep_millisecs": 1000},
            "swap": {"device": "nvme", "size": "1GiB"}}  # fmt: skip
    parts = [{"name": "system", "pool": "image", "size": "64MiB"},
             {"name": "heap", "size": "64MiB", "writes": {"rate": "1/min"}}]  # fmt: skip
    return {
        "name": "small", "duration": "1h", "scale": 256,
        "hosts": [{"name": "a", "count": 4, **host}, {"name": "b", "count": 2, **host}],
        "vms": [{"name": "guest", "memory": "256MiB", "vcpus": 1, "load": "50%", "image": {"parts": parts}}],
        "datacenter": {
            "placement": "worst-fit", "overcommit": {"memory": 1.5},
            "arrivals": [{"kind": "guest", "rate": "30/h", "lifetime": {"exponential": "30min"}}],
            "consolidation": {"every": "10min"},
            "failures": {"hosts": [{"host": "a-1", "at": "25min"}], "repair": "15min"},
        },
        **changes,
    }  # fmt: skip


def tables_of(result: sim.Result) -> list[str]:
    assert result.fleet is not None and result.hosts is not None
    frames = (result.fleet, result.hosts, result.samples, result.guests, result.events)
    return [frame.to_json(orient="split", double_precision=15) for frame in frames]


@pytest.fixture(scope="module")
def alone() -> sim.Result:
    """The small datacenter, run in this process."""
    return sim.run(sim.parse(described()))


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [2, 6])
def test_any_number_of_processes_finds_the_same(alone: sim.Result, jobs: int) -> None:
    assert tables_of(sim.run(sim.parse(described()), jobs=jobs)) == tables_of(alone)


def test_the_order_of_hosts_in_the_file_does_not_matter(alone: sim.Result) -> None:
    turned = described(hosts=described()["hosts"][::-1])

    assert tables_of(sim.run(sim.parse(turned))) == tables_of(alone)


def test_the_small_datacenter_does_all_that_it_shall(alone: sim.Result) -> None:
    assert alone.summary["host_failures"] == 1
    assert (alone.summary["guests_restarted"] or 0) > 0
    assert (alone.summary["saved_bytes"] or 0) > 0
    assert 0 < (alone.summary["energy_kwh"] or 0) < 1.1


def test_a_fleet_is_told_in_its_own_words(alone: sim.Result) -> None:
    said = conclusion(alone.samples, alone.guests, alone.summary)

    assert "hosts at most" in said
    assert "kWh" in said
    assert "1 hosts failed" in said
    assert all(alone.summary[each.name] is not None for each in headlines(alone.summary))


def test_a_fleet_has_its_own_pictures(alone: sim.Result) -> None:
    assert alone.fleet is not None and alone.hosts is not None

    names = [name for name, *_ in pictures_of(alone.fleet, alone.hosts, alone.samples)]

    assert names == ["hosts-and-guests", "memory", "energy", "happenings", "guests-per-host"]


def test_old_reports_overfill_a_host_and_books_cure_it() -> None:
    """As in shakenfist#3636: a gate that trusts old figures of free memory lets guests in that all come at once. Sizes
    are a sixty-fourth of those there; eight guests of a quarter of the host come between two reports.
    """
    kills = {}
    for counts_own in (False, True):
        overfilled = described()
        for host in overfilled["hosts"]:
            host |= {"swap": {"device": "nvme", "size": "128MiB"}, "ksm": None}
        overfilled["vms"][0]["image"] = {"parts": [{"name": "all", "size": "100%"}]}
        overfilled["datacenter"] = {
            "arrivals": [{"kind": "guest", "batch": 8, "at": "12min"}], "report_every": "10min",
            "admission": {"by": "reported", "counts_own": counts_own},
        }  # fmt: skip
        kills[counts_own] = sim.run(sim.parse(overfilled)).summary["oom_kills"]

    assert (kills[False] or 0) > 0
    assert kills[True] == 0


def test_a_guest_larger_than_any_host_is_one_clear_error_or_refused() -> None:
    large = described()
    large["vms"][0] |= {"memory": "2GiB"}
    try:
        refused = sim.run(sim.parse(large)).summary["guests_refused"]
    except UserError as error:
        assert "memory" in str(error)
    else:
        assert refused


@pytest.mark.parametrize("trace", ["planetlab", "openb"])
def test_guests_of_a_trace_live_on_hosts_with_pages(trace: str) -> None:
    source = {"path": f"traces/{trace}", "format": trace, "kinds": ["guest"], "limit": 5}
    traced = described(duration="30min", datacenter={"arrivals": [source]})
    traced["hosts"][0]["memory"] = "64GiB"

    result = sim.run(sim.parse(traced, SCENARIOS))

    assert len(result.guests) > 0
    assert (result.summary["consolidation_ratio"] or 0) > 1


def test_a_window_is_what_the_metrics_are_about(alone: sim.Result) -> None:
    part = sim.run(sim.parse(described(warmup="20min", measure="20min")))

    assert part.fleet is not None
    fleet = part.fleet.set_index("time_s")
    begin, end = fleet.loc[1200.0], fleet.loc[2400.0]
    within = fleet[(fleet.index > 1200) & (fleet.index <= 2400)]
    assert tables_of(part) == tables_of(alone), "the run is the same"
    for name in ("migrations", "guests_refused", "host_failures", "guests_restarted", "guests_lost"):
        assert part.summary[name] == end[name] - begin[name], name
    assert part.summary["hosts_needed"] == within["hosts_used"].max()
    assert part.summary["energy_kwh"] == pytest.approx((end["energy_j"] - begin["energy_j"]) / 3.6e6, abs=1e-6)
    assert part.summary["energy_kwh"] < 0.5 * float(alone.summary["energy_kwh"] or 0)


def test_guests_that_move_are_in_every_sample() -> None:
    evacuation = {"overcommit": {"memory": 1.5}, "arrivals": [{"kind": "guest", "batch": 6}],
                  "evacuations": [{"host": "a-0", "at": "20min"}]}  # fmt: skip
    result = sim.run(sim.parse(described(datacenter=evacuation)))

    assert (result.summary["migrations"] or 0) > 0
    running = result.samples.groupby("time_s")["guests_running"].sum()
    assert set(running) == {6}


def test_a_guest_that_its_host_refuses_memory_is_lost_and_not_ended() -> None:
    data = described(datacenter={"overcommit": {"memory": 4}, "arrivals": [{"kind": "guest", "batch": 30}]})
    for host in data["hosts"]:
        host["commit"] = {"overcommit_memory": 2, "overcommit_ratio": 50}
        del host["swap"]
    result = sim.run(sim.parse(data))

    refused = int((result.guests["end"] == "not-started").sum())
    assert refused > 0
    assert result.fleet is not None
    last = result.fleet.iloc[-1]
    assert (last["guests_lost"], last["guests_ended"]) == (refused, 0)


def test_what_overcommit_takes_is_load_and_energy() -> None:
    quiet = described(datacenter={"arrivals": [{"kind": "guest", "batch": 6}]})
    busy = described(datacenter=quiet["datacenter"])
    for data, run in ((quiet, 0), (busy, 1)):
        for host in data["hosts"]:
            host["ksm"] = {"run": run, "pages_to_scan": 100_000, "sleep_millisecs": 20}
    without, scanning = sim.run(sim.parse(quiet)), sim.run(sim.parse(busy))

    spent = [float(each.summary["cpu_overhead_percent"] or 0) / 100 for each in (without, scanning)]
    share = spent[1] - spent[0]
    more = float(scanning.summary["energy_kwh"] or 0) - float(without.summary["energy_kwh"] or 0)
    # From 100 W idle to 200 W at full load, six hosts for an hour; the first epoch has no report yet.
    assert share > 0.01
    assert more == pytest.approx(6 * 0.1 * share, rel=0.15)


def test_samples_of_a_datacenter_are_its_reports_however_long_it_is() -> None:
    rules = {"epoch": "1h", "report_every": "1d", "arrivals": [{"kind": "guest", "rate": "1/d"}]}
    scenario = sim.parse(described(duration="150d", datacenter=rules))

    assert scenario.sampling == 24 * 3600 * 10**9
    with pytest.raises(UserError, match=r"datacenter\.report_every: makes more than 10,000,000 samples"):
        sim.parse(described(duration="36500d", datacenter={"epoch": "1s"}))


def test_guests_of_odd_sizes_read_in_loops(tmp_path: Path) -> None:
    (tmp_path / "pods.csv").write_text(
        "name,cpu_milli,memory_mib,creation_time,deletion_time,scheduled_time\n"
        + "".join(f"p{size},1000,{size},0,3000,0\n" for size in (64, 101, 130, 333))
    )
    data = described(datacenter={"arrivals": [{"path": "pods.csv", "format": "openb", "kinds": ["guest"]}]}, scale=1)
    loop = {"name": "loop", "size": "30%", "reads": {"order": "loop", "rate": "1/min"}}
    data["vms"][0] |= {"image": {"parts": [loop, {"name": "rest", "size": "50%"}]}, "memory": "128MiB"}
    result = sim.run(sim.parse(data, tmp_path))

    assert sorted(size >> 20 for size in result.guests["memory_bytes"]) == [64, 101, 130, 333]
    assert set(result.guests["end"]) == {"stopped"}


def test_the_command_tells_of_a_bad_trace_and_keeps_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(dump(described()))
    bad = described(datacenter={"arrivals": [{"path": "pods.csv", "format": "openb", "kinds": ["guest"]}]})
    (tmp_path / "bad.yaml").write_text(dump(bad | {"name": "bad"}))
    (tmp_path / "pods.csv").write_text("cpu_milli,memory_mib,creation_time,deletion_time,scheduled_time\nx,y,z,,\n")

    done = CliRunner().invoke(main, ["run", "-q", "good.yaml", "--out", "results"])
    failed = CliRunner().invoke(main, ["run", "-q", "bad.yaml", "--out", "results"])

    assert (done.exit_code, failed.exit_code) == (0, 2)
    assert "pods.csv" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert [each.name for each in (tmp_path / "results").iterdir() if each.is_dir()] == ["small"]


def test_the_command_tells_of_a_cluster_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="Dask is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sim.cluster.PATIENCE_S", 0.5)
    (tmp_path / "small.yaml").write_text(dump(described()))

    failed = CliRunner().invoke(main, ["run", "-q", "small.yaml", "--cluster", "127.0.0.1:1", "--out", "results"])

    assert failed.exit_code == 2
    assert "--cluster 127.0.0.1:1: no Dask scheduler can be reached there" in failed.stderr
    assert "Traceback" not in failed.stderr
