from sim import columns
from sim.columns import (
    COUNTER_METRICS,
    EVENTS,
    FLEET,
    FLEET_METRICS,
    GUESTS,
    HEADLINES,
    HOSTS,
    KSM_COUNTERS,
    METRICS,
    SAMPLES,
)


def names(items):
    return [item.name for item in items]


def test_names_are_unique_within_each_table_and_within_the_summary():
    for items in (SAMPLES, GUESTS, EVENTS, FLEET, HOSTS, METRICS):
        assert len(set(names(items))) == len(items)


def test_every_column_has_a_known_type_and_a_meaning():
    for column in (*SAMPLES, *GUESTS, *EVENTS, *FLEET, *HOSTS):
        assert column.dtype in ("int64", "float64", "string")
        assert column.meaning


def test_a_column_whose_name_says_its_unit_has_that_unit():
    for column in (*SAMPLES, *GUESTS, *EVENTS, *FLEET, *HOSTS):
        for ending, unit in (("_bytes", "bytes"), ("_ns", "ns"), ("_s", "s"), ("_millisecs", "ms")):
            assert not column.name.endswith(ending) or column.unit == unit, column.name


def test_ksm_columns_name_their_file_in_the_kernel():
    assert {column.kernel for column in KSM_COUNTERS} == {
        f"/sys/kernel/mm/ksm/{column.name}" for column in KSM_COUNTERS
    }


def test_every_kernel_counter_is_a_metric_once():
    counters = [*names(KSM_COUNTERS), "cow_ksm", "thp_split_page", "pswpin", "pswpout"]

    assert set(counters) <= set(names(METRICS))
    assert METRICS == HEADLINES + FLEET_METRICS + COUNTER_METRICS


def test_the_reference_has_a_row_for_every_column_and_metric():
    text = columns.markdown()

    for item in (*SAMPLES, *GUESTS, *EVENTS, *FLEET, *HOSTS, *METRICS):
        assert f"| `{item.name}` |" in text


def test_the_reference_has_as_many_cells_in_a_row_as_in_its_header():
    widths = [line.count("|") for line in columns.markdown().splitlines() if line.startswith("|")]

    assert set(widths) == {5, 6}
