"""The report in a real browser: Chromium, headless, from a file; skipped where there is none."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

import sim
from sim.report import write as write_report
from sim.report.style import COLOURS
from sim.results import write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MOST_BYTES = 2 * 1024 * 1024

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


class Seen(NamedTuple):
    """What the browser made of a page."""

    dom: str
    log: str
    requests: list[str]
    picture: np.ndarray


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small run with swap, stalls and huge pages, whose texts need escaping."""
    image = {"parts": [{"name": "system", "pool": "os", "size": "40%"}, {"name": "data", "size": "60%"}]}
    image["parts"][1]["reads"] = {"rate": "2/s"}  # type: ignore[index,assignment]
    asked = sim.parse({
        "name": "small", "description": "Does <script>alert(1)</script> & co. stay text?", "duration": "20s",
        "hosts": [{"memory": "48MiB", "swap": {"device": "nvme", "size": "64MiB"}, "thp": {"enabled": "madvise"},
                   "ksm": {"pages_to_scan": 2000}}],
        "vms": [{"name": "g", "memory": "16MiB", "count": 4, "every": "2s", "image": image}],
        "expect": ["oom_kills == 0"],
    })  # fmt: skip
    result = sim.run(asked)
    return write_report(result, write(result, tmp_path_factory.mktemp("results")))


def look(page: Path, folder: Path, dark: bool) -> Seen:
    """Open the page and return what the browser shows, says and asks of the network."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        net = folder / "net.json"
        colours = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        quiet = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                 "--no-first-run", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
                 "--enable-logging=stderr", "--window-size=1100,1600", f"--user-data-dir={folder / 'profile'}",
                 f"--log-net-log={net}")  # fmt: skip
        asked = [str(CHROMIUM), *quiet, colours, *arguments, page.as_uri()]
        return subprocess.run(asked, capture_output=True, text=True, timeout=120, check=True)

    shot = folder / "shot.png"
    seen = call(f"--screenshot={shot}")
    events = json.loads((folder / "net.json").read_text())["events"]
    asked = [event["params"] for event in events if "initiator" in event.get("params", {})]
    # What the browser asks for itself has no origin.
    urls = [str(each["url"]) for each in asked if each["initiator"] != "not an origin"]
    dom = call("--dump-dom")
    return Seen(dom.stdout, seen.stderr + dom.stderr, [url for url in urls if url.startswith("http")], imread(shot))


@pytest.fixture(scope="module")
def light(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """The page by day."""
    return look(page, tmp_path_factory.mktemp("light"), dark=False)


def test_the_report_opens_from_a_file_without_network_and_without_complaints(page: Path, light: Seen) -> None:
    assert page.stat().st_size < MOST_BYTES
    assert light.requests == []
    assert "CONSOLE" not in light.log
    assert not re.search(r'(?:src|href)="(?!#)|url\((?!#)|@import', light.dom), "nothing is fetched from elsewhere"


def test_a_page_that_asks_the_network_is_found_out(tmp_path: Path) -> None:
    """The check above can fail."""
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><img src='http://elsewhere.invalid/a.png'><script>console.error('x')</script>")

    seen = look(page, tmp_path, dark=False)

    assert "http://elsewhere.invalid/a.png" in seen.requests
    assert "CONSOLE" in seen.log


def test_a_screen_reader_finds_headings_and_what_pictures_show(light: Seen) -> None:
    assert re.findall(r"<h1>(.*?)</h1>", light.dom) == ["small"]
    headings = re.findall(r"<h2>(.*?)</h2>", light.dom)
    assert headings[:2] == ["Expectations", "Headline figures"]
    pictures = re.findall(r"<svg [^>]*>", light.dom)
    assert len(pictures) >= 5
    for picture in pictures:
        named = re.search(r'role="img" aria-labelledby="([^"]+)" aria-describedby="([^"]+)"', picture)
        assert named
        assert all(re.search(rf'id="{name}">[^<]+<', light.dom) for name in named.groups())
    assert '<html lang="en">' in light.dom
    assert light.dom.count("<table>") == light.dom.count("<caption>") > 3
    assert "<script" not in light.dom


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_is_in_the_colours_of_the_system(theme: str, page: Path, light: Seen, tmp_path: Path) -> None:
    """The paper has its colour, and the ink's is there on it."""
    seen = light if theme == "light" else look(page, tmp_path, dark=True)

    paper, ink = (np.array(to_rgb(getattr(COLOURS[role], theme))) for role in ("paper", "ink"))
    near = [np.abs(seen.picture[..., :3] - colour).max(axis=-1) < 0.03 for colour in (paper, ink)]
    assert near[0].mean() > 0.5
    assert near[1].sum() > 500
