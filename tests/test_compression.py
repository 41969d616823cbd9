"""Compressed sizes and zsmalloc's size classes, against the kernel's documentation and by laws of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.columns import PAGE_BYTES
from sim.cost import prices
from sim.errors import UserError
from sim.memory.image import Synthetic, load_capture
from sim.memory.pages import POOL, STANDS_FOR, WEIGHT, pool_add, pool_remove
from sim.reclaim.compression import (
    AS_IS,
    Sizes,
    cpu_ns,
    lz4_sizes,
    packed_sizes,
    pool_bytes,
    usual_packed,
    zsmalloc_classes,
)
from tests.machine import empty_memory

ALGORITHMS: Any = ("lz4", "lzo", "lzo-rle", "zstd")
IMAGES = Path(__file__).parents[1] / "scenarios" / "images"

# Documentation/mm/zsmalloc.rst: the longest chain of pages, and the largest objects that share pages.
WATERMARKS = {4: 3264, 5: 3408, 6: 3504, 7: 3584, 8: 3632, 9: 3680, 10: 3712, 11: 3744, 12: 3776, 13: 3792, 14: 3808,
              15: 3840, 16: 3840}  # fmt: skip


@pytest.mark.parametrize(("chain", "largest"), WATERMARKS.items())
def test_the_huge_class_begins_where_the_documentation_says(chain: int, largest: int) -> None:
    objects = zsmalloc_classes(chain)[:, 1]

    assert np.flatnonzero(objects > 1)[-1] * 16 == largest


def test_the_documentations_example_of_1568_bytes() -> None:
    assert zsmalloc_classes(5)[1568 // 16].tolist()[1:] == [13, 5]
    assert zsmalloc_classes(4)[1568 // 16].tolist() == zsmalloc_classes(4)[1632 // 16].tolist()
    assert zsmalloc_classes(4)[1568 // 16].tolist()[1:] == [5, 2]


def test_a_zspage_holds_its_objects_and_no_more() -> None:
    packed = np.arange(2, AS_IS)
    _, objects, pages = zsmalloc_classes()[2:AS_IS].T

    assert np.all(objects * packed * 16 <= pages * PAGE_BYTES)
    assert np.all(np.diff(pages / objects) >= 0)
    assert np.all(pages / objects <= 1)


@given(st.lists(st.integers(0, 255), max_size=300), st.integers(0, 255))
def test_a_pool_holds_what_is_in_it(pages: list[int], another: int) -> None:
    packed = np.array(pages, np.uint8)
    least = sum(size * 16 if size < AS_IS else PAGE_BYTES for size in pages)

    assert least <= pool_bytes(packed) <= pool_bytes(np.append(packed, np.uint8(another)))
    # Each class has one zspage that is not full, and a full one wastes less than an object.
    assert pool_bytes(packed) <= PAGE_BYTES * len(pages) + 8 * PAGE_BYTES * len(set(pages))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sizes_keep_their_order(algorithm: Any) -> None:
    packed = packed_sizes(np.arange(4097), algorithm)

    assert packed[0] == packed[26] == 0
    assert packed[27] == 3 if algorithm != "zstd" else packed[27] == 2
    assert packed[4096] == AS_IS
    assert np.all(np.diff(packed.astype(int)) >= 0)
    assert not np.any((packed > 3632 // 16) & (packed < AS_IS))


def test_zstd_packs_closest_and_lz4_loosest() -> None:
    sizes = load_capture(IMAGES / "nginx-a.npz").lz4_bytes

    taken = {algorithm: pool_bytes(packed_sizes(sizes[sizes > 0], algorithm)) for algorithm in ALGORITHMS}

    assert taken["zstd"] < taken["lzo"] < taken["lzo-rle"] < taken["lz4"]


def part(name: str, pages: int, **what: object) -> Mapping[str, object]:
    return {"name": name, "size": f"{pages * 4}KiB", **what}


def sizes_of(*parts: Mapping[str, object], guest: str = "one", seed: int = 1) -> Sizes:
    image = Synthetic.model_validate({"parts": parts})
    memory = sum(int(str(each["size"])[:-3]) for each in parts) * 1024
    return lz4_sizes(image, seed, guest, memory // PAGE_BYTES, image.layout(memory, seed, guest))


def test_pages_compress_as_the_part_says() -> None:
    sizes = sizes_of(part("a", 10, compresses_to="25%"), part("b", 10, compresses_to="0%"))

    assert sizes.tolist() == [1024] * 10 + [0] * 10


def test_pages_of_which_nothing_is_said_compress_like_those_of_captured_guests() -> None:
    sizes = sizes_of(part("a", 20_000))

    assert sizes.mean() / PAGE_BYTES == pytest.approx(0.437, abs=0.01)
    assert np.mean(sizes >= 4090) == pytest.approx(0.07, abs=0.03)


def test_equal_pages_compress_equally() -> None:
    one, other = (sizes_of(part("a", 60, pool="os"), part("b", 60), guest=name) for name in ("one", "other"))
    longer = sizes_of(part("a", 90, pool="os"))
    doubles = sizes_of(part("a", 60, duplicates=2))

    assert one[:60].tolist() == other[:60].tolist() == longer[:60].tolist()
    assert one[60:].tolist() != other[60:].tolist()
    assert doubles[:30].tolist() == doubles[30:].tolist()


def test_a_captured_guest_has_its_own_sizes_and_zeros_may_become_anything() -> None:
    capture = load_capture(IMAGES / "nginx-a.npz")
    noted = capture.lz4_bytes > 0

    sizes = lz4_sizes(capture, 1, "nginx-0", len(noted) + 512, {})

    assert sizes[: len(noted)][noted].tolist() == capture.lz4_bytes[noted].tolist()
    assert sizes[: len(noted)][~noted].mean() == pytest.approx(capture.lz4_bytes[noted].mean(), rel=0.02)
    assert len(sizes) == len(noted) + 512


def test_sizes_of_another_shape_are_no_image(tmp_path: Path) -> None:
    content = np.arange(64, dtype=np.uint32).reshape(1, 64)
    np.savez(tmp_path / "a.npz", content=content, time_s=np.zeros(1), lz4_bytes=np.zeros(3, np.uint16))
    np.savez(tmp_path / "b.npz", content=content, time_s=np.zeros(1))

    with pytest.raises(UserError, match="lz4_bytes must hold one uint16 for each of the 64 pages"):
        load_capture(tmp_path / "a.npz")
    assert lz4_sizes(load_capture(tmp_path / "b.npz"), 1, "x", 64, {}).min() > 0


@given(st.lists(st.integers(0, 255), max_size=200), st.randoms(use_true_random=False))
def test_a_pool_that_pages_come_to_and_leave_is_as_large_as_what_it_holds_needs(sizes: list[int], random: Any) -> None:
    steps, held = list(sizes), list(sizes)
    random.shuffle(held)
    for _ in range(len(held) // 2):
        steps.append(-1 - held.pop())
    m = empty_memory(pages=1, guests=1, frames=1)
    m.zspage[:, :3] = zsmalloc_classes()
    m.zspage[:, WEIGHT] = m.counts[STANDS_FOR] = 1

    for step in steps:
        if step < 0:
            pool_remove(m, -1 - step)
        else:
            pool_add(m, step)

    assert m.counts[POOL] * PAGE_BYTES == pool_bytes(np.array(held, np.uint8))
    for size in held:
        pool_remove(m, size)
    assert m.counts[POOL] == 0


def test_compressing_costs_by_what_a_page_becomes() -> None:
    priced = prices.load(prices.DEFAULT)

    for algorithm in ALGORITHMS:
        times = cpu_ns(priced, algorithm)
        assert np.all(np.diff(times[2:AS_IS], axis=0) >= 0)
        assert times[0].tolist() == [0, 0]
        work = priced.zram[algorithm]
        assert times[AS_IS].tolist() == [round(work.compress.ns), round(work.decompress.ns)]
        mean = times[usual_packed(algorithm)]
        assert mean == pytest.approx(work.ns(16 * usual_packed(algorithm) - 15.5), abs=1)


def test_a_set_without_prices_of_bytes_prices_all_pages_alike() -> None:
    priced = prices.load(prices.DEFAULT)
    flat = priced.zram["lz4"].model_copy(update={"compress_byte": None, "decompress_byte": None})

    times = cpu_ns(priced.model_copy(update={"zram": {"lz4": flat}}), "lz4")

    assert len(np.unique(times[1:], axis=0)) == 1


def test_the_faster_algorithm_packs_looser_on_captured_guests_as_published() -> None:
    # Zram Performance Analysis, Linux Reviews: see scenarios/published/zram-algorithms.yaml.
    sizes = load_capture(IMAGES / "pg-a.npz").lz4_bytes
    sizes = sizes[sizes > 0]
    priced = prices.load(prices.DEFAULT)
    packed = {algorithm: packed_sizes(sizes, algorithm) for algorithm in (*ALGORITHMS, "lz4hc", "842")}

    ratio = {algorithm: len(sizes) * PAGE_BYTES / pool_bytes(each) for algorithm, each in packed.items()}
    back = {algorithm: cpu_ns(priced, algorithm)[each, 1].mean() for algorithm, each in packed.items()}

    assert sorted(ratio, key=ratio.__getitem__) == ["842", "lz4", "lzo-rle", "lzo", "lz4hc", "zstd"]
    assert back["lz4"] < min(back["lzo"], back["lzo-rle"]) < back["zstd"]


def test_what_only_copies_saves_nothing() -> None:
    sizes = np.arange(0, 4097, 16)

    packed = packed_sizes(sizes, "copy")

    assert pool_bytes(packed) == len(sizes) * PAGE_BYTES
