"""Every bundled scenario meets its own expectations, and what its comments say of other settings is so."""

from __future__ import annotations

from pathlib import Path

import pytest

import sim
from sim.scenario.expect import Expectation

SCENARIOS = Path(__file__).parents[1] / "scenarios"
FILES = sorted(SCENARIOS.glob("*.yaml"))

CLAIMS = {
    ("balloons", "hosts.0.balloon.max_balloon_change_percent=0.5%"): ["oom_kills == 1"],
    ("nightly-jobs", "vms.0.free_page_reporting=false"): ["oom_kills == 2"],
    ("kernel-defaults", "hosts.0.ksm.pages_to_scan=1000"): ["oom_kills == 0", "cpu_overhead_percent < 1"],
    ("ksmtuned-filling-host", "vms.0.every=30s"): ["oom_kills == 2"],
    ("large-pages-worth", "hosts.0.ksm.run=0"): ["cpu_tlb_percent == 0", "consolidation_ratio < 2.5"],
    ("containers-or-guests", "hosts.0.ksm=null"): ["mem_used_bytes == 4800MiB", "saved_bytes == 0"],
    ("containers-or-guests", "vms.0.kernel=shared"): ["mem_used_bytes < 1400MiB", "time_to_90_percent_s == 0"],
    ("redis-snapshot", "vms.0.image.parts.0.writes.rate=2/min"): ["oom_kills >= 1"],
    ("redis-snapshot", "hosts.0.commit={overcommit_memory: 2, overcommit_ratio: 100}"): [
        "guests_running == 1",
        "mem_used_bytes == 1536MiB",
        "oom_kills == 0",
    ],
    ("phase-trap", "hosts.0.ksm.smart_scan=0"): ["pages_sharing == 2304"],
    ("boot-storm", "hosts.0.ksm.pages_to_scan=500000"): ["pswpout < 12000000"],
    ("night-consolidation", "datacenter.consolidation=null"): ["energy_kwh >= 75", "saved_bytes < 22GB"],
    ("noisy-neighbour", "datacenter.migration.hot=null"): ["stall_percent >= 8", "migrations == 0"],
    ("host-failure", "datacenter.overcommit.memory=1"): ["guests_refused >= 20", "guests_running < 70"],
    ("side-channel", "hosts.0.shares_between=tenants"): ["cow_ksm == 0", "write_latency_worst_ns <= 100"],
    ("tps-large-pages", "hosts.0.tps.ShareForceSalting=2"): ["mem_ballooned_bytes >= 500MiB", "pswpout == 0"],
    ("zero-pages", "hosts.0.ksm.use_zero_pages=0"): ["pages_sharing == 587520", "saved_bytes == 2295MiB"],
    ("sharing-limit", "hosts.0.ksm.max_page_sharing=16"): ["stable_node_dups == 24576", "pages_sharing == 368640"],
}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_bundled_scenario_meets_its_expectations(file: Path) -> None:
    verdicts = sim.run(sim.read(file)).verdicts

    assert verdicts, "a scenario without expectations teaches nothing"
    assert [verdict for verdict in verdicts if not verdict.met] == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "override"), CLAIMS, ids=lambda value: value)
def test_what_a_comment_says_of_another_setting_is_so(name: str, override: str) -> None:
    file = SCENARIOS / f"{name}.yaml"

    summary = sim.run(sim.read(file, [override])).summary

    assert f"--set {override}" in file.read_text()
    assert [claim for claim in CLAIMS[name, override] if not Expectation.parse(claim).check(summary).met] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_bundled_scenario_is_named_after_its_file_and_asks_a_question(file: Path) -> None:
    scenario = sim.read(file)

    assert scenario.name == file.stem
    assert scenario.description.endswith("?")
