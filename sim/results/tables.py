"""The result tables as data frames and as Parquet files, typed and annotated by `sim.columns`."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sim import files
from sim.columns import EVENTS, FLEET, GUESTS, HOSTS, SAMPLES, Column
from sim.errors import UserError

TABLES: Mapping[str, tuple[Column, ...]] = {
    "samples": SAMPLES,
    "scans": SAMPLES,
    "guests": GUESTS,
    "events": EVENTS,
}
"""Name of each table, which is its file name without `.parquet`, and its columns."""

FLEET_TABLES: Mapping[str, tuple[Column, ...]] = {"fleet": FLEET, "hosts": HOSTS}
"""The same for the tables that only a datacenter has."""

_ALL = {**TABLES, **FLEET_TABLES}

_ARROW = {"int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}
_PANDAS = {"int64": "int64", "float64": "float64", "string": "str"}


def frame(table: str, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return `rows` as a data frame with the columns of `table`, in their order and types, also when there are none.

    Raises KeyError when a row lacks a column.
    """
    columns = _ALL[table]
    return pd.DataFrame(
        {column.name: pd.Series([row[column.name] for row in rows], dtype=_PANDAS[column.dtype]) for column in columns}
    )


def typed(table: str, data: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of `table` from a frame that has them, in their order and types."""
    return data[[column.name for column in _ALL[table]]].astype(
        {column.name: _PANDAS[column.dtype] for column in _ALL[table]}
    )


def partial(table: str, data: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of `table` in their order from a frame that lacks some, which are NaN, and strings empty."""
    told = {column.name: data.get(column.name, "" if column.dtype == "string" else np.nan) for column in _ALL[table]}
    whole = pd.DataFrame(told, index=data.index)
    types = {column.name: _PANDAS[column.dtype] for column in _ALL[table] if whole[column.name].notna().all()}
    return whole.astype(types)


def write_parquet(table: str, data: pd.DataFrame, path: Path) -> None:
    """Write `data` to `path`; equal frames give equal bytes.

    Raises ValueError when the columns of `data` are not those of `table`.
    """
    schema = _schema(_ALL[table])
    if list(data.columns) != schema.names:
        odd = sorted(set(data.columns) ^ set(schema.names)) or "their order"
        raise ValueError(f"table {table} does not have the columns of sim.columns: {odd}")
    # pandas' own metadata records library versions, so the bytes would change with an upgrade.
    content = pa.Table.from_pandas(data, schema=schema, preserve_index=False).replace_schema_metadata(None)
    files.write(path, parquet_bytes(content))


def parquet_bytes(content: pa.Table) -> bytes:
    """The table as a Parquet file; equal tables give equal bytes."""
    stream = io.BytesIO()
    pq.write_table(content, stream, compression="zstd")
    return stream.getvalue()


def read_parquet(path: Path) -> pd.DataFrame:
    """Return the table in `path`. Raises UserError when it cannot be read."""
    try:
        data: pd.DataFrame = pq.read_table(path).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: is missing or damaged: {error}; run the scenario again") from error
    return data


def _schema(columns: Sequence[Column]) -> pa.Schema:
    return pa.schema(
        pa.field(
            column.name,
            _ARROW[column.dtype],
            metadata={"unit": column.unit, "meaning": column.meaning, "kernel": column.kernel},
        )
        for column in columns
    )
