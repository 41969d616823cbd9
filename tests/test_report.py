import dataclasses
import re
from html.parser import HTMLParser

import finished
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from sim import report, results
from sim.columns import FLEET_METRICS, METRICS
from sim.report import pictures, words
from sim.report.markup import join, table, tag
from sim.report.style import COLOURS
from sim.results.summary import over_hosts

EVIL = "<script>alert('$x$ & \"y\"')</script>"
VOID = {"meta"}


@pytest.fixture(scope="module")
def run():
    return finished.result(hosts=("host-0", "host-1"))


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report.write(run, folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text()


class Balance(HTMLParser):
    """Fails on an element that is closed out of order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def axes(count=1):
    return Figure().subplots(count, 1, squeeze=False)[:, 0]


def labels(ax):
    return [text.get_text() for text in ax.texts]


# --- the page ---


def test_the_page_is_small_and_needs_no_network(page):
    assert len(page) < 2_000_000
    assert "http" not in page
    assert "src=" not in page


def test_every_element_of_the_page_is_closed(page):
    balance = Balance()
    balance.feed(page)

    assert balance.open == []


def test_no_two_elements_of_the_page_have_one_identifier(page):
    ids = re.findall(r'\bid="([^"]+)"', page)

    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page)) <= set(ids)


def test_every_picture_has_a_title_and_a_description(page):
    drawings = re.findall(r'<svg viewBox="[^"]+" role="img" aria-labelledby="(\S+)" aria-describedby="(\S+)">', page)

    assert len(drawings) == page.count("<svg") == 4
    for title, description in drawings:
        assert f'<title id="{title}">' in page
        assert f'<desc id="{description}">' in page


def test_pictures_take_their_colours_from_the_page(page):
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))

    assert "var(--private)" in drawings
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) <= {"#000000"}


def test_the_page_shows_every_metric_expectation_and_setting(page, run):
    for text in [metric.name for metric in METRICS if metric not in FLEET_METRICS] + [
        "pages_to_scan",
        "host-0",
        "0.584 %",
        "not met",
        "2 of 3 met",
        "300MiB",
    ]:
        assert text in page
    assert run.manifest["digest"] in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_the_pictures_lie_beside_the_page(folder):
    names = sorted(path.name for path in (folder / "pictures").iterdir())

    assert names == ["counters.png", "cpu.png", "gain-and-cost.png", "memory.png"]


def test_the_same_run_gives_the_same_bytes(run, folder, tmp_path):
    report.write(run, tmp_path)

    for path in ("report.html", "pictures/memory.png", "pictures/counters.png"):
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes()


def test_names_from_users_are_text_and_not_markup(run, tmp_path):
    scenario = finished.Scenario(name=EVIL, description=EVIL)
    guests = run.guests.assign(vm=EVIL)
    events = run.events.assign(kind=EVIL, detail=EVIL, guest=EVIL)
    samples = run.samples.assign(host=EVIL)
    evil = dataclasses.replace(run, scenario=scenario, guests=guests, events=events, samples=samples)
    text = report.write(evil, tmp_path).read_text()

    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 6


def test_matplotlib_settings_are_left_alone(run, tmp_path):
    before = dict(mpl.rcParams)
    report.write(run, tmp_path)

    assert dict(mpl.rcParams) == before


def test_a_run_with_a_single_sample_has_a_page_without_pictures(tmp_path):
    page = report.write(finished.result(seconds=0), tmp_path).read_text()

    assert "<svg" not in page
    assert "no data" in page


def test_a_long_run_of_many_hosts_stays_small(tmp_path):
    run = finished.result(hosts=[f"host-{n}" for n in range(4)], seconds=5000)

    assert report.write(run, tmp_path).stat().st_size < 500_000


def test_a_folder_that_cannot_take_the_report_is_told(run, tmp_path):
    (tmp_path / "pictures").write_text("mine")

    with pytest.raises(results.store.UserError, match="cannot be written"):
        report.write(run, tmp_path)


# --- pictures ---


def test_the_memory_picture_names_each_kind_with_its_last_size(run):
    ax = pictures.memory(run.samples, *axes())

    kinds = [label.rsplit(" ", 1)[0] for label in labels(ax)]
    assert kinds == ["private", "shared", "metadata", "free", "host memory", "saved"]
    assert "host memory 32GiB" in labels(ax)


def test_a_counter_that_stays_zero_is_left_out_only_when_it_is_optional(run):
    ax = pictures.counters(run.samples, run.scans, *axes())

    assert sorted(label.split()[0] for label in labels(ax)) == [
        "pages_shared",
        "pages_sharing",
        "pages_unshared",
        "pages_volatile",
    ]


def test_the_gain_and_cost_picture_ends_at_the_headline_ratio(run):
    gain, cost = pictures.gain_and_cost(run.samples, *axes(2))

    assert labels(gain) == [f"{run.summary['consolidation_ratio']:.3g} at the end"]
    assert labels(cost) == ["4 % at the end"]


def test_cpu_per_interval_adds_up_to_what_was_spent(run):
    for points in (7, 400, 10_000):
        spent = pictures.cpu_percent(run.samples, points)
        widths = np.diff(spent.index, prepend=0.0)

        assert (spent["ksmd"] * widths).sum() / widths.sum() == pytest.approx(run.summary["ksmd_cpu_percent"])


def test_the_cpu_picture_says_that_hosts_are_averaged(run):
    ax = pictures.cpu(run.samples, *axes())

    assert "mean of 2 hosts" in ax.get_title(loc="left") + ax.get_title()
    assert any(label.startswith("scan, mean 4 %") for label in labels(ax))


@given(st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_thinning_keeps_real_rows_both_ends_and_the_extremes(length, seed):
    values = np.random.default_rng(seed).normal(size=(length, 2))
    frame = pd.DataFrame(values, columns=["a", "b"])
    thinned = pictures.thin(frame, ["a", "b"], points=100)

    assert len(thinned) <= max(100, 2) + 2
    assert thinned.index[0] == 0
    assert thinned.index[-1] == length - 1
    assert thinned.index.is_monotonic_increasing
    assert (thinned.agg(["min", "max"]) == frame.agg(["min", "max"])).all(axis=None)


def test_labels_of_bands_without_height_do_not_overlap(run):
    ax = pictures.memory(run.samples, *axes())
    places = sorted(text.xyann[1] for text in ax.texts)

    assert min(np.diff(places)) > 0.07


# --- looks ---


def test_each_light_colour_has_one_role():
    assert len({colour.light for colour in COLOURS.values()}) == len(COLOURS)


def luminance(colour):
    linear = [(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4) for part in to_rgb(colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("role", ["ink", "muted", "saved", "metadata"])
def test_text_can_be_read_on_the_page(theme, role):
    assert contrast(getattr(COLOURS[role], theme), getattr(COLOURS["paper"], theme)) >= 4.5


@pytest.mark.parametrize(
    ("one", "other"), [("private", "shared"), ("scan", "merge"), ("scan", "cow"), ("merge", "cow")]
)
def test_neighbouring_areas_differ_in_grey_print(one, other):
    assert contrast(COLOURS[one].light, COLOURS[other].light) >= 1.8


# --- words ---


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "bytes", "no data"),
        (3 * 1024**3 + 123_456_789, "bytes", "3.11GiB"),
        (90, "s", "1.5min"),
        (4.23456, "%", "4.23 %"),
        (2.50391, "ratio", "2.5"),
        (1_029_833, "pages", "1,029,833"),
    ],
)
def test_amounts_are_written_to_three_digits_and_counts_whole(value, unit, text):
    assert words.amount(value, unit) == text


def test_the_conclusion_says_what_is_gained_and_what_it_costs():
    run = finished.result()

    assert words.conclusion(run.samples, run.guests, run.summary) == (
        "24 guests of 512MiB, promised 12GiB in all, hold 7.2GiB of data in 4.79GiB of the host's 16GiB: "
        "a consolidation ratio of 2.5, for 4.44 % of one core in ksmd and 0.584 % of the CPU in all. "
        "Nine tenths of the saving was there after 2.1min."
    )


def test_the_conclusion_names_what_went_wrong():
    run = finished.result(seconds=finished.SCAN_S)
    summary = run.summary | {"oom_kills": 3}
    text = words.conclusion(run.samples, run.guests, summary)

    assert "Guests killed for lack of memory: 3." in text
    assert "Sharing saved nothing." in text
    assert "takes more memory than KSM saves" in text
    assert "before two full scans" in text


def test_a_run_without_guests_concludes_nothing():
    run = finished.result()
    idle = run.samples.assign(guests_running=0)

    assert "shows nothing" in words.conclusion(idle, run.guests, run.summary)


def test_one_guest_is_spoken_of_in_the_singular():
    samples = results.frame("samples", [finished.sample("h", time, guests=1) for time in range(10)])
    guests = results.frame("guests", [finished.guest("h", 0)])
    text = words.conclusion(samples, guests, results.summarise(samples, samples.head(0), guests))

    assert text.startswith("One guest, promised 512MiB, holds ")


def test_totals_over_hosts_add_up(run):
    totals = over_hosts(run.samples)

    assert totals["mem_total_bytes"].iloc[0] == run.samples.groupby("time_s")["mem_total_bytes"].sum().iloc[0]
    assert len(totals) == run.samples["time_s"].nunique()


# --- markup ---


def test_text_is_escaped_once_however_deep():
    assert tag("p", tag("b", "a<b"), "c&d", class_='"') == '<p class="&quot;"><b>a&lt;b</b>c&amp;d</p>'
    assert join(["<", tag("i", "x")]) == "&lt;<i>x</i>"


def test_a_table_names_its_rows_and_columns():
    text = table(("a", "b"), [("x", "1")], "caption")

    assert '<th scope="col">a</th>' in text
    assert '<th scope="row">x</th><td>1</td>' in text


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"oom_kills": 2}, "guests were killed"),
        ({"stall_percent": 3.0}, "guests wait for memory"),
        ({"general_profit": -1}, "switch it off"),
        ({"cpu_overhead_percent": 6.0}, "scan more slowly"),
        ({"full_scans": 1}, "hardly begun"),
        ({}, "no figure asks for a change"),
    ],
)
def test_the_advice_is_about_the_worst_of_the_figures(figures, said):
    assert said in words.advice(finished.result().summary | figures)
