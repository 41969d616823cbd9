"""A program that was changed names its results differently, and knows so quickly."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from sim import engine


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the program's files, which is taken for the program."""
    copy = tmp_path / "sim"
    shutil.copytree(engine._SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(engine, "_SOURCE", copy)
    monkeypatch.setattr(engine, "source_digest", engine.source_digest.__wrapped__)
    return copy


@pytest.mark.parametrize(
    "file", ["host.py", "memory/pages.py", "datacenter/traces/rows.py", "cost/prices/xen-2008.yaml"]
)
def test_what_a_run_works_with_is_part_of_the_name_of_its_result(file: str, source: Path) -> None:
    before = engine.engine()
    with (source / file).open("a") as code:
        code.write("# another line\n")

    assert engine.engine() != before


def test_a_renamed_file_is_noticed_and_a_report_that_changed_is_not(source: Path) -> None:
    before, all_before = engine.engine(), engine.source_digest()
    (source / "report" / "html.py").write_text("")
    (source / "cli" / "run.py").unlink()

    assert engine.engine() == before
    assert engine.source_digest() != all_before
    (source / "streams.py").rename(source / "rivers.py")
    assert engine.engine() != before


def test_the_name_costs_little() -> None:
    began = time.process_time()
    engine.source_digest.__wrapped__()

    assert time.process_time() - began < 0.1  # 8 ms where it was written
