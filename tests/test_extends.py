"""Scenarios that extend others, and presets."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import document
from sim.errors import UserError
from sim.scenario import load, parse, presets, schema
from sim.scenario.extends import MOST_FILES, extended, over

BASE = """\
name: base
duration: 1min
hosts:
  - {name: small, memory: 1GiB, ksm: {pages_to_scan: 500, run: 1}}
  - {name: large, memory: 4GiB}
vms:
  - {name: web, memory: 256MiB, image: {parts: [{name: a, size: 50%}, {name: b, size: 10%}]}}
expect: [oom_kills == 0]
"""
VALIDATOR = jsonschema.Draft202012Validator(schema())
IMAGES = Path(__file__).parents[1] / "scenarios" / "images"


def write(folder: Path, **files: str) -> Path:
    """Write files by name and return the path of the one called `top`."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "top.yaml"


def problem_of(path: Path) -> str:
    """What is said of a faulty scenario."""
    with pytest.raises(UserError) as raised:
        load(path)
    return str(raised.value)


def test_what_a_file_does_not_say_is_as_in_the_file_it_extends(tmp_path: Path) -> None:
    top = write(
        tmp_path,
        base=BASE,
        top="""\
extends: base.yaml
name: top
hosts: [{name: small, ksm: {run: 0}}, {name: third, memory: 2GiB}]
vms: [{name: web, count: 3, image: {parts: [{name: b, size: 20%}]}}]
expect: [consolidation_ratio >= 1]
""",
    )

    resolved = load(top).resolved()

    assert "extends" not in resolved
    assert [(host["name"], host["memory"]) for host in resolved["hosts"]] == [
        ("small", "1GiB"), ("large", "4GiB"), ("third", "2GiB")]  # fmt: skip
    assert (resolved["hosts"][0]["ksm"]["run"], resolved["hosts"][0]["ksm"]["pages_to_scan"]) == (0, 500)
    assert (resolved["vms"][0]["count"], resolved["vms"][0]["memory"]) == (3, "256MiB")
    assert [part["size"] for part in resolved["vms"][0]["image"]["parts"]] == ["50%", "20%"]
    assert resolved["expect"] == ["consolidation_ratio >= 1"]
    assert resolved["duration"] == "1min"


def test_one_image_takes_the_place_of_another(tmp_path: Path) -> None:
    upper = document.Document("a", {"vms": [{"name": "web", "image": {"captured": "x.npz"}}]})
    lower = document.Document("b", {"vms": [{"name": "web", "image": {"parts": []}}]})

    assert over(upper, lower).data == upper.data


def test_a_mistake_is_told_where_it_was_written(tmp_path: Path) -> None:
    top = write(tmp_path, base=BASE.replace("4GiB", "4GB!"), top="extends: base.yaml\nduration: 1mni\n")

    said = problem_of(top)

    assert f"{tmp_path / 'base.yaml'}:5: hosts.1.memory" in said
    assert f"{top}:2: duration" in said


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"top": "name: t\nextends: bsae.yaml", "base": BASE}, "top.yaml:2: extends: no such file, got bsae.yaml; did"),
        ({"top": "extends: ../base.yaml"}, "leaves the folder"),
        ({"top": "extends: /etc/base.yaml"}, "leaves the folder"),
        ({"top": "extends: 3"}, "must be the path of a scenario file"),
        ({"top": "extends: top.yaml"}, "circle: top.yaml extends top.yaml"),
        ({"top": "extends: b.yaml", "b": "x: 1\nextends: top.yaml"}, "b.yaml:2: extends: goes round in a circle"),
        ({"top": "extends: b.yaml", "b": "[]"}, "b.yaml:1: the file must be a block"),
    ],
)
def test_a_file_that_cannot_be_extended_is_one_clear_mistake(tmp_path: Path, files: dict[str, str], line: str) -> None:
    said = problem_of(write(tmp_path, **files))

    assert line in said
    assert len(said.splitlines()) == 1


def test_a_link_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "in" / "link.yaml").symlink_to(tmp_path / "base.yaml")

    assert "leaves the folder" in problem_of(write(tmp_path / "in", top="extends: link.yaml"))


def test_files_stand_so_many_behind_each_other_and_no_more(tmp_path: Path) -> None:
    names = ["top", *(f"n{number}" for number in range(MOST_FILES)), "last"]
    files = {name: f"extends: {then}.yaml" for name, then in pairwise(names)}
    top = write(tmp_path, **files, last=BASE)
    assert f"more than {MOST_FILES} files deep" in problem_of(top)

    top.write_text("extends: n1.yaml")
    assert load(top).name == "base"


def test_plain_data_extends_too(tmp_path: Path) -> None:
    write(tmp_path, base=BASE)

    assert parse({"extends": "base.yaml", "seed": 7}, tmp_path).seed == 7


PLAIN = st.recursive(
    st.integers() | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=12,
)
BLOCKS = st.dictionaries(st.sampled_from("abcd"), PLAIN, max_size=4)


@given(BLOCKS, BLOCKS)
def test_laws_of_merging(upper: dict[str, Any], lower: dict[str, Any]) -> None:
    above, below = document.Document("a", upper), document.Document("b", lower)

    data = over(above, below).data

    assert over(above, document.Document("b", {})).data == upper
    assert over(document.Document("a", {}), below).data == lower
    assert over(document.Document("b", data), below).data == data, "a second time changes nothing"
    assert {key: data[key] for key in upper if not isinstance(upper[key], dict)} == {
        key: value for key, value in upper.items() if not isinstance(value, dict)
    }
    assert data.keys() == upper.keys() | lower.keys()


# --- presets -----------------------------------------------------------------------------------------------------

ALL = [(kind, name) for kind in presets.KINDS for name in presets.names(kind)]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_preset_makes_a_scenario(kind: str, name: str) -> None:
    data: dict[str, Any] = {"name": "t", "hosts": [{"memory": "4GiB"}], "vms": [{"name": "g", "memory": "512MiB"}]}
    data[kind][0] |= {"preset": name}

    scenario = parse(data)

    VALIDATOR.validate(data)
    item = scenario.resolved()[kind][0]
    settings = presets.load(kind, name).settings.data
    assert {key: item[key].keys() & value.keys() for key, value in settings.items() if isinstance(value, dict)} == {
        key: value.keys() for key, value in settings.items() if isinstance(value, dict)
    }
    assert parse(scenario.resolved()).resolved() == scenario.resolved()


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_value_of_a_preset_has_its_source(kind: str, name: str) -> None:
    file = Path(presets.__file__).with_name("presets") / kind / f"{name}.yaml"
    told: dict[int, bool] = {}

    for line in file.read_text().splitlines():
        depth = len(line) - len(line.lstrip())
        told = {each: is_told for each, is_told in told.items() if each < depth}
        told[depth] = "#" in line
        is_value = not line.startswith(("#", "about:")) and not line.endswith(":")
        assert any(told.values()) or not is_value, f"{file.name}: no source: {line}"


def test_an_override_wins_over_a_preset() -> None:
    hosts = [{"preset": "debian-12-ksmtuned", "memory": "8GiB", "ksmtuned": {"npages_max": 2000}}]

    host = parse({"name": "t", "hosts": hosts, "vms": [{"name": "g", "preset": "debian-12-pg"}]}).hosts[0]

    assert host.ksmtuned is not None
    assert (host.ksmtuned.npages_max, host.ksmtuned.npages_boost, host.thp.enabled) == (2000, 300, "always")


def test_presets_can_be_swept() -> None:
    names = ["linux", "proxmox"]
    data = {"name": "t", "hosts": [{"memory": "4GiB"}], "vms": [{"name": "g", "preset": "debian-12-idle"}],
            "sweep": {"hosts.0.preset": names}}  # fmt: skip

    points = parse(data).points

    assert [point.settings["hosts.0.preset"] for point in points] == names
    assert [point.scenario.hosts[0].ksmtuned is not None for point in points] == [False, True]


def test_an_unknown_preset_is_told_with_its_line_and_nothing_that_follows_from_it(tmp_path: Path) -> None:
    top = write(tmp_path, top="name: t\nhosts: [{memory: 1GiB}]\nvms:\n  - {name: g, preset: debian-12-pgs}\nsed: 1\n")

    said = problem_of(top)

    assert "top.yaml:4: vms.0.preset: no such preset, got debian-12-pgs; did you mean debian-12-pg?" in said
    assert "top.yaml:5: sed: unknown key" in said
    assert "missing" not in said


def test_a_preset_that_does_not_fit_is_told_at_its_line(tmp_path: Path) -> None:
    top = write(tmp_path, top="name: t\nhosts:\n  - memory: 1GiB\n    kernel: '2.6.32'\n    preset: debian-12\n"
                "vms: [{name: g, memory: 4KiB}]\n")  # fmt: skip

    assert "top.yaml:5: hosts.0.thp.enabled" in problem_of(top)


@pytest.mark.parametrize("role", ["idle", "nginx", "pg", "python"])
def test_a_guest_preset_is_what_was_captured(role: str) -> None:
    """Each size is the captured guest's to the MiB, each rate to a tenth a minute."""
    images = {each: np.load(IMAGES / f"{each}-a.npz") for each in ("idle", "nginx", "pg", "python")}

    def last(image: Any) -> Any:
        return image["content"][-1][image["touched_from"] != 255]

    image = images[role]
    content, since = image["content"], image["touched_from"].astype(int)
    touched = since != 255
    elsewhere = np.unique(np.concatenate([last(images[each]) for each in images if each != role]))
    changes = (content[1:] != content[:-1]) & (np.arange(1, len(content))[:, None] > since)
    heap = changes.any(0) & touched
    empty = touched & ~heap & (content[-1] == 0)
    minutes = (image["time_s"][-1] - image["time_s"][0]) / 60
    rate = changes[:, heap].sum() / heap.sum() / minutes
    common = touched & ~heap & ~empty & np.isin(content[-1], elsewhere)

    parts = {part["name"]: part for part in presets.load("vms", f"debian-12-{role}").settings.data["image"]["parts"]}
    sizes = {name: document_bytes(part["size"]) for name, part in parts.items()}

    assert abs(sizes["empty"] - empty.sum() / 256) <= 1
    assert abs(sizes["heap"] - heap.sum() / 256) <= 1
    assert abs(sizes["system"] - common.sum() / 256) <= 4
    assert abs(sum(sizes.values()) - touched.sum() / 256) <= 3
    assert parts["heap"]["writes"]["rate"] == f"{float(f'{rate:.1f}'):g}/min"


def document_bytes(size: str) -> int:
    """MiB of a size."""
    return int(size.removesuffix("MiB"))


def test_what_extends_nothing_is_left_alone() -> None:
    given = document.Document("a", {"name": "b"})

    assert extended(given) is given
