"""Result rows: one small immutable Parquet file per row, never half-written.

A writer has a file name of its own, made of the row's key columns, so that writers need no lock
and the same question answered again replaces its own answer. Files written before a column
existed read as null there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raykernel.config import fingerprint
from raykernel.errors import BlockCorruptError, InputError, nearest
from raykernel.store.commit import commit, make_folder

_TEXTS = pa.list_(pa.string())
_TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True, slots=True)
class ResultTable:
    """The schema of a table, its key, and where its files lie."""

    schema: pa.Schema
    key: tuple[str, ...]
    """Columns that no two rows share all of."""
    folder: str
    """Below the store; `{column}` inserts a value."""


TABLES = {
    "kernels": ResultTable(
        pa.schema(
            [
                ("fingerprint", pa.string()),  # of the kernel
                ("kind", pa.string()),
                ("solver", pa.string()),  # canonical JSON of the solver settings
                ("task", pa.string()),
                ("model", pa.string()),
                ("prompt", pa.string()),
                ("k", pa.int64()),
                ("seed", pa.int64()),
                ("precision", pa.string()),
                ("num_outputs", pa.int64()),
                ("num_train", pa.int64()),
                ("num_dev", pa.int64()),
                ("num_test", pa.int64()),
                ("metric", pa.string()),
                ("zero_shot", pa.float64()),  # on test, as the next two
                ("linear_probe", pa.float64()),
                ("kernel_regression", pa.float64()),
                ("test_by", pa.string()),  # how test was predicted: tangent (J w) or block
                ("dev", pa.float64()),  # of the ridge and scaling selected
                ("ridge", pa.float64()),
                ("f0_scaling", pa.float64()),
                ("lora_error", pa.float64()),  # largest of an entry, of a LoRA, over |g| |g'|
                ("lora_bound", pa.float64()),  # of Theorem D.5 on that; null: it says nothing
                ("groups", _TEXTS),  # patterns; empty: all
                ("blocks_total", pa.int64()),
                ("blocks_computed", pa.int64()),  # by this run; the others were stored
                ("seconds", pa.float64()),
                ("peak_memory_bytes", pa.int64()),
                ("path", pa.string()),  # of the kernel, below the store
                ("created", _TIME),
                ("versions", pa.string()),  # JSON: package → version
                ("overrides", _TEXTS),
                ("identity", pa.string()),  # JSON
            ]
        ),
        key=("fingerprint", "kind", "solver"),
        folder="kernels/{fingerprint}",
    ),
}


def write_result(root: Path, table: str, row: dict[str, Any]) -> Path:
    """Commit one row; a row with the same key is replaced.

    Args:
        root: folder of the store.
        table: name of the table.
        row: value by column; columns left out are null, `created` is now, `path` is known.

    Returns:
        The file.

    Raises:
        ValueError: if a column is unknown or a key column absent.
    """
    spec = _spec(table)
    for name in row:
        if name not in spec.schema.names:
            raise ValueError(
                f"{table}: unknown column {name!r}; {nearest(name, spec.schema.names)}"
            )
    if absent := [name for name in spec.key if row.get(name) is None]:
        raise ValueError(f"{table}: found no {', '.join(absent)}, expected the whole key")
    relative = spec.folder.format(**row)
    full = dict.fromkeys(spec.schema.names) | {
        "created": datetime.now(timezone.utc),
        "path": relative,
        **row,
    }
    sink = pa.BufferOutputStream()
    arrow = pa.Table.from_pylist([full], schema=spec.schema)
    pq.write_table(arrow, sink, write_page_checksum=True)
    path = result_path(root, table, row)
    make_folder(path.parent)
    commit(path, memoryview(sink.getvalue()))
    return path


def result_path(root: Path, table: str, row: dict[str, Any]) -> Path:
    """The file of a row: its name is made of the key columns.

    Args:
        root: folder of the store.
        table: name of the table.
        row: value by column, the key columns among them.

    Returns:
        The path, whether or not it exists.
    """
    spec = _spec(table)
    name = f"result-{fingerprint([row[name] for name in spec.key])}.parquet"
    return root / spec.folder.format(**row) / name


def read_results(root: Path, table: str) -> pa.Table:
    """All rows of a table, oldest first.

    Args:
        root: folder of the store.
        table: name of the table.

    Returns:
        The rows in the table's schema.
    """
    spec = _spec(table)
    rows = [read_row_file(path, spec.schema) for path in result_files(root, table)]
    if not rows:
        return spec.schema.empty_table()
    return pa.concat_tables(rows).sort_by([("created", "ascending")])


def result_files(root: Path, table: str) -> list[Path]:
    """Files of a table.

    Args:
        root: folder of the store.
        table: name of the table.

    Returns:
        Their paths, sorted.
    """
    pattern = _spec(table).folder.replace("{fingerprint}", "*")
    return sorted(root.glob(f"{pattern}/result-*.parquet"))


def read_row_file(path: Path, schema: pa.Schema) -> pa.Table:
    """One result file, brought to a schema: absent columns null, unknown ones left out.

    Args:
        path: the file.
        schema: of the table.

    Returns:
        Its rows.

    Raises:
        BlockCorruptError: if it is damaged or foreign.
    """
    content = path.read_bytes()  # apart, so that a failing disk is not taken for a damaged file
    try:
        # ParquetFile, not read_table, which builds a data set per file.
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as file:
            found = file.read()
        columns = [
            found[column.name].cast(column.type)
            if column.name in found.column_names
            else pa.nulls(found.num_rows, column.type)
            for column in schema
        ]
        return pa.table(columns, schema=schema)
    except (pa.ArrowException, OSError) as error:
        raise BlockCorruptError(
            f"{path}: damaged or foreign ({str(error).splitlines()[0]}). Expected a result that "
            f"raykernel wrote. Run `raykernel verify --remove`, then its configuration again."
        ) from error


def to_json(value: object) -> str:
    """Text of a value for the JSON columns: keys sorted."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _spec(table: str) -> ResultTable:
    if table not in TABLES:
        raise InputError(
            f"found table {table!r}, expected a result table; {nearest(table, TABLES)}"
        )
    return TABLES[table]
