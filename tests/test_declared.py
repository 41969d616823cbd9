"""Pages that share a frame because it is told where they come from: containers, pfcache, saved segments; by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_host import at, end, events, guest, part, run, scenario

from sim.columns import PAGE_BYTES
from sim.cost import prices
from sim.errors import UserError
from sim.memory.image import Synthetic
from sim.run import Result
from sim.sharing.pfcache import Pfcache
from sim.sharing.saved_segments import Segment
from sim.units import SECOND

FILE, OWN, KERNEL = 70, 30, 50


def container(name: str = "ct", pool: str = "image", count: int = 1, file: int = FILE, **more: object):
    """A container with files of an image and memory of its own, and what a kernel of its own would have."""
    return guest(
        name,
        part("files", file, pool=pool, file=True),
        part("own", OWN),
        part("kernel", KERNEL, kernel=True),
        pages=file + OWN + KERNEL,
        **{"kernel": "shared", "count": count} | more,
    )


def frames(result: Result, time_s: float | None = None) -> int:
    """Frames that guests take."""
    row = end(result) if time_s is None else at(result, time_s)
    return int(row["mem_private_bytes"] + row["mem_shared_bytes"]) // PAGE_BYTES


# --- containers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 10])
def test_containers_of_one_image_have_its_files_once_from_the_start_and_no_kernel(count):
    result = run(container(count=count), duration="1s", ksm=None)

    assert frames(result, 0.0) == frames(result) == FILE + count * OWN
    assert result.summary["saved_bytes"] == (count - 1) * FILE * PAGE_BYTES
    assert result.summary["cpu_overhead_percent"] == 0


def test_virtual_machines_have_a_kernel_and_files_each():
    result = run(container(count=10, kernel="own"), duration="1s", ksm=None)

    assert frames(result) == 10 * (FILE + OWN + KERNEL)


def test_files_of_different_images_are_not_shared():
    result = run(container("a", "image", 2), container("b", "other", 2), duration="1s", ksm=None)

    assert frames(result) == 2 * FILE + 4 * OWN


def test_memory_of_a_pool_that_is_no_file_is_not_shared():
    one = guest("ct", part("heap", 20, pool="same"), pages=20, kernel="shared", count=3)

    assert frames(run(one, duration="1s", ksm=None)) == 60


def test_a_container_that_changes_a_file_has_it_to_itself():
    writer = container("writer", bursts=[{"part": "files", "at": "500ms", "share": "50%"}])
    result = run(container(count=3), writer, duration="1s", ksm=None)

    assert frames(result, 0.0) == FILE + 4 * OWN
    assert frames(result) == FILE + 4 * OWN + FILE // 2
    assert result.guests.set_index("guest")["cow_breaks"]["writer-0"] == FILE // 2


def test_files_are_in_memory_until_the_last_container_ends():
    result = run(
        container("short", lifetime="1s"), container("long", lifetime="2s"), container("late", start="2500ms"),
        guest("other", part("p", 1), pages=1), duration="3s", sample_every="250ms", ksm=None,
    )  # fmt: skip

    assert [frames(result, time) for time in (0.5, 1.5, 2.25, 3.0)] == [
        1 + FILE + 2 * OWN, 1 + FILE + OWN, 1, 1 + FILE + OWN,
    ]  # fmt: skip


def test_ksm_merges_what_containers_and_machines_have_of_their_own_and_no_files():
    heap = [part("files", FILE, pool="image", file=True), part("heap", 20, pool="heap")]
    vms = [guest("ct", *heap, pages=90, kernel="shared", count=2), guest("vm", *heap, pages=90, count=2)]
    result = run(*vms, duration="2s", ksm={"pages_to_scan": 10_000})

    # The files of the containers are one copy, those of the machines KSM's other; the heap is one for all four.
    assert frames(result) == 2 * FILE + 20
    assert result.summary["pages_shared"] == FILE + 20
    assert result.summary["pages_sharing"] == FILE + 3 * 20


def test_huge_pages_are_split_where_files_are():
    pages = 1024
    one = guest("ct", part("files", pages, pool="image", file=True), pages=pages, kernel="shared", count=3)
    result = run(one, duration="1s", ksm=None, thp={"enabled": "always"})

    assert frames(result) == pages


def test_a_fork_of_a_container_has_its_files_too():
    child = {"name": "child", "fork_of": "ct", "memory": container()["memory"], "kernel": "shared", "start": "500ms"}
    result = run(container(count=2), child, duration="1s", ksm=None)

    assert frames(result) == FILE + 2 * OWN


def test_a_fork_of_a_container_is_one():
    child = {"name": "child", "fork_of": "ct", "memory": container()["memory"], "start": "500ms"}

    with pytest.raises(UserError, match=r"vms\.1\.kernel: must be its parent's.*write shared"):
        scenario(container(), child, duration="1s")


def test_captured_containers_share_what_another_capture_has_too(tmp_path):
    """Two captures of one data set: contents 1 to 4 are in both, of which each of two copies changes one at 1 s."""
    one = np.array([[1, 2, 3, 4, 5, 0], [9, 2, 3, 4, 5, 0]], np.uint32)
    other = np.array([[1, 2, 3, 4, 6, 7], [1, 2, 3, 4, 6, 7]], np.uint32)
    for name, content in (("one", one), ("other", other)):
        np.savez(tmp_path / f"{name}.npz", content=content, time_s=np.array([0.0, 1.0]))
    vms = [
        {"name": name, "count": 2, "memory": "24KiB", "kernel": "shared", "image": {"captured": f"{name}.npz"}}
        for name in ("one", "other")
    ]
    result = run(*vms, duration="2s", folder=str(tmp_path), ksm=None)

    # Files: 1 to 4 once. Of their own: 5 and a page of zeros, twice; 6 and 7, twice; later 9, twice.
    assert frames(result, 0.0) == 4 + 8
    assert frames(result) == 4 + 10


def test_what_a_container_lacks_is_not_offered_either():
    image = Synthetic.model_validate({"parts": (part("k", 5, pool="x", kernel=True), part("p", 5, pool="y"))})

    assert [each for each, _ in image.without_kernel().pool_pages(10 * PAGE_BYTES)] == ["y"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"free_page_reporting": True}, "free_page_reporting: a container has no kernel of its own"),
        ({"balloon": {}}, "balloon: a container has no kernel of its own"),
        ({"huge_pages": "hugetlbfs"}, "huge_pages: a container's files are not in hugetlbfs"),
    ],
)
def test_a_container_is_refused_what_only_a_machine_has(more, message):
    with pytest.raises(UserError) as refused:
        scenario(container(**more), duration="1s", ksm=None)

    assert message in str(refused.value)


# --- pfcache ---------------------------------------------------------------------------------------------------------


def cached(*vms, duration="16s", pfcache=None, **about):
    return run(*vms, duration=duration, **{"ksm": None, "pfcache": pfcache or {}} | about)


def test_equal_files_of_different_disks_are_shared_at_the_first_pass():
    result = cached(container(count=4))

    assert frames(result, 4.0) == 4 * (FILE + OWN)
    assert frames(result, 6.0) == FILE + 4 * OWN


def test_a_file_that_too_few_have_is_not_copied():
    result = cached(container("a", count=2), container("b", "other", count=1), pfcache={"COUNT": 3})
    assert frames(result) == 3 * (FILE + OWN)

    result = cached(container("a", count=3), container("b", "other", count=1), pfcache={"COUNT": 3})
    assert frames(result) == FILE + FILE + 4 * OWN


def test_who_comes_later_finds_the_copy_at_once():
    result = cached(container(count=2), container("late", start="7s"))

    assert frames(result, 6.0) == FILE + 2 * OWN
    assert frames(result, 7.0) == FILE + 3 * OWN


def test_the_sha1_of_each_file_is_computed_once():
    result = cached(container(count=10))

    sha1 = prices.sha1(prices.load(prices.DEFAULT)).ns
    assert end(result)["source_cpu_ns"] == int(FILE * round(sha1 * 1000) // 1000)
    assert at(result, 6.0)["source_cpu_ns"] == end(result)["source_cpu_ns"]


@pytest.mark.parametrize(
    ("setting", "shares"),
    [
        ({"MINSIZE": f"{FILE * 4}KiB"}, True),
        ({"MINSIZE": f"{FILE * 4 + 4}KiB"}, False),
        ({"MAXSIZE": f"{FILE * 4}KiB"}, True),
        ({"MAXSIZE": f"{FILE * 4 - 4}KiB"}, False),
        ({"image": f"{FILE * 4}KiB"}, True),
        ({"image": f"{FILE * 4 - 4}KiB"}, False),
        ({"PAGEMIN": FILE}, True),
        ({"PAGEMIN": FILE + 1}, False),
        ({"TIMEOUT": "20s"}, False),
    ],
    ids=str,
)
def test_only_files_that_fit_the_settings_are_copied(setting, shares):
    result = cached(container(count=2), pfcache=setting)

    assert frames(result) == (FILE + 2 * OWN if shares else 2 * (FILE + OWN))


def test_the_file_that_was_in_use_longest_ago_makes_room():
    """The cache holds two files. The first is out of use when the third comes, so the second stays."""
    room = {"image": f"{2 * FILE * 4}KiB", "purge_ahead_percent": 0}
    vms = [
        container("first", "one", 2, lifetime="6s"),
        container("second", "two", 2),
        container("third", "three", 2, start="11s"),
        container("again", "one", 1, start="16s"),
        container("still", "two", 1, start="16s"),
    ]
    result = cached(*vms, duration="17s", pfcache=room)

    assert frames(result, 12.0) == FILE + 2 * OWN + 2 * (FILE + OWN)
    assert frames(result, 15.0) == 2 * FILE + 4 * OWN
    # The second's newcomer finds its file in the cache, the first's has to read its own.
    assert frames(result, 17.0) == 2 * FILE + 4 * OWN + OWN + FILE + OWN


def test_some_more_room_is_made_ahead():
    """Of 1000 pages 20 % are freed besides what the new file needs: so 400 + 400 leave, not 400 alone."""
    room = {"image": "4000KiB", "purge_ahead_percent": 20}
    old = [container(name, name, 2, file=400, lifetime="6s") for name in ("a", "b")]
    late = [container(f"{name}-late", name, 1, file=400, start="16s") for name in ("a", "b")]
    result = cached(*old, container("c", "c", 2, file=400, start="11s"), *late, duration="17s", pfcache=room)

    assert frames(result, 17.0) == 400 + 2 * OWN + 2 * (400 + OWN)


def test_it_runs_beside_ksm_and_nothing_else():
    about = {"duration": "1s", "pfcache": {}}
    assert scenario(container(), **about, ksm={}).hosts[0].ksm is not None
    assert scenario(container(), **about).hosts[0].ksm is None

    with pytest.raises(UserError, match="no system has it beside tps"):
        scenario(container(), **about, tps={})


def test_sizes_between_which_there_is_nothing_are_refused():
    with pytest.raises(UserError, match=r"pfcache\.MINSIZE: is more than MAXSIZE"):
        scenario(container(), duration="1s", pfcache={"MINSIZE": "2MiB", "MAXSIZE": "1MiB"})


def test_its_defaults_are_those_of_virtuozzo_7():
    """Source: Virtuozzo 7 command line reference."""
    usual = Pfcache()

    assert (usual.COUNT, usual.TIMEOUT, usual.PAGEMIN, usual.MINSIZE) == (2, 5 * SECOND, 1, 0)
    assert (usual.MAXSIZE, usual.image) == (2_147_483_648, 10_485_760 * 1024)


# --- saved segments --------------------------------------------------------------------------------------------------

KERNEL_PAGES = 384
"""1.5 MiB of a Linux kernel (vm.ibm.com/linux/linuxnss.html)."""


def linux(name: str = "linux", count: int = 1, **more: object):
    parts = part("kernel", KERNEL_PAGES, pool="LXSHR"), part("own", OWN)
    return guest(name, *parts, pages=KERNEL_PAGES + OWN, count=count, **more)


def vm(*guests, duration="1s", segment=None, **about):
    segments = {"segments": {"LXSHR": segment or {"type": "SR"}}}
    return run(*guests, duration=duration, saved_segments=segments, **about)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_saved_segment_is_there_once_from_time_0_without_any_work(count):
    result = vm(linux(count=count))

    assert at(result, 0.0)["saved_bytes"] == end(result)["saved_bytes"] == (count - 1) * KERNEL_PAGES * PAGE_BYTES
    assert result.summary["cpu_overhead_percent"] == 0
    assert end(result)["source_cpu_ns"] == 0


def test_of_an_exclusive_segment_each_guest_has_a_copy():
    result = vm(linux(count=5), segment={"type": "EW"})

    assert frames(result) == 5 * (KERNEL_PAGES + OWN)


def test_a_segment_saved_anew_is_a_second_copy_until_the_last_old_user_leaves():
    result = vm(
        linux("old", count=2, stop="3s"), linux("new", count=2, start="2s"),
        duration="4s", segment={"saved": ["1s"]},
    )  # fmt: skip

    assert frames(result, 1.0) == KERNEL_PAGES + 2 * OWN
    assert frames(result, 2.0) == 2 * KERNEL_PAGES + 4 * OWN
    assert frames(result, 3.0) == KERNEL_PAGES + 2 * OWN


def test_versions_are_counted_by_the_time_at_which_a_guest_starts():
    segment = Segment.model_validate({"saved": ("1s", "2s")})

    assert [segment.version(time) for time in (0, SECOND - 1, SECOND, 3 * SECOND)] == [0, 0, 1, 2]


def test_a_write_to_an_exclusive_segment_is_nobody_elses_business():
    burst = [{"part": "kernel", "at": "500ms", "share": "50%"}]
    result = vm(linux(count=2, bursts=burst), segment={"type": "EW"})

    assert (frames(result), events(result)) == (2 * (KERNEL_PAGES + OWN), [])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"bursts": [{"part": "kernel"}]}, "bursts.0.part: it is shared read-only: a write is a protection exception"),
        ({"kernel": "shared"}, "kernel: a guest of z/VM has a kernel of its own"),
        ({"memory_limit": "1MiB"}, "memory_limit: is a cgroup of Linux"),
    ],
)
def test_a_guest_of_zvm_is_refused_what_cannot_be(more, message):
    with pytest.raises(UserError) as refused:
        vm(linux(**more))

    assert message in str(refused.value)


def test_random_writes_to_a_read_only_segment_are_refused():
    one = guest("g", part("kernel", 10, pool="LXSHR", writes={"rate": "1/s"}), pages=10)

    with pytest.raises(UserError, match=r"writes: LXSHR is shared read-only: a write is a protection exception"):
        vm(one)


def test_a_segment_that_no_guest_has_is_a_mistake():
    with pytest.raises(UserError, match=r"saved_segments\.segments\.LXHSR: no part has this pool; did you mean LXSHR"):
        run(linux(), duration="1s", saved_segments={"segments": {"LXHSR": {}}})


@pytest.mark.parametrize(("setting", "value"), [("ksm", {}), ("thp", {"enabled": "always"}), ("kernel", "5.9")])
def test_a_host_with_saved_segments_is_no_linux(setting, value):
    with pytest.raises(UserError, match=r"no system has it beside ksm|means nothing on a host with saved_segments"):
        vm(linux(), **{setting: value})


def test_times_of_saving_come_in_order():
    with pytest.raises(UserError, match="must be in the order of time"):
        vm(linux(), segment={"saved": ["2s", "1s"]})


# --- laws ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 40), st.integers(0, 3000)), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from(["20%", "100%"]),
)
def test_no_guest_reads_what_it_did_not_write_and_frames_add_up(kinds, with_pfcache, share):
    """Each kind of container changes some of its files at some time; each of its pages is then one of its own."""
    vms = [
        container(f"ct{i}", f"image{pool}", count=2, file=files + 1, start=f"{start}ms",
                  bursts=[{"part": "files", "at": "1500ms", "share": share}])
        for i, (pool, files, start) in enumerate(kinds)
    ]  # fmt: skip
    about = {"pfcache": {"TIMEOUT": "1s"}} if with_pfcache else {}
    result = run(*vms, duration="6s", ksm=None, **about)

    last = end(result)
    assert last["saved_bytes"] == last["mem_touched_bytes"] - last["mem_private_bytes"] - last["mem_shared_bytes"]
    # What was changed is private: unique contents. The rest of each image is there once.
    changed = {i: 2 * round((files + 1) * float(share[:-1]) / 100) for i, (_, files, _) in enumerate(kinds)}
    assert last["mem_private_bytes"] // PAGE_BYTES >= sum(changed.values()) + len(kinds) * 2 * OWN
    longest: dict[int, int] = {}
    for pool, files, _ in kinds:
        longest[pool] = max(longest.get(pool, 0), files + 1)
    assert last["mem_shared_bytes"] // PAGE_BYTES <= sum(longest.values())
