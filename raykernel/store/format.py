"""A table for eyes (table), spreadsheets (csv) and programs (json, parquet)."""

from __future__ import annotations

import io
import json
import math
from datetime import date, datetime
from enum import Enum
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv
from rich.console import Console
from rich.table import Table

from raykernel.console import visible


class Format(Enum):
    """What `--format` takes."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"

    @property
    def is_text(self) -> bool:
        """Whether a terminal can show it."""
        return self is not Format.parquet


def format_bytes(table: pa.Table, fmt: Format) -> bytes:
    """Rows as the content of a file.

    Args:
        table: the rows.
        fmt: as in `format_table`; parquet: with all types, nested ones too.

    Returns:
        The content.
    """
    if fmt.is_text:
        return format_table(table, fmt).encode()
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def format_table(table: pa.Table, fmt: Format = Format.table, *, width: int | None = None) -> str:
    """Rows as text.

    Args:
        table: the rows.
        fmt: of text. table: aligned columns, numbers to four digits; csv: RFC 4180 quoting, all
            digits; json: a list of objects, NaN as null, infinities as text.
        width: columns of the terminal (table only); None: as wide as the rows need.

    Returns:
        The text, with a line end at its end.
    """
    if fmt is Format.csv:
        return _csv(table)
    if fmt is Format.json:
        columns = [_values(column) for column in table.columns]
        rows = [
            dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)
        ]
        return json.dumps(_plain(rows), indent=1, ensure_ascii=False) + "\n"
    return _aligned(table, width)


def _csv(table: pa.Table) -> str:
    sink = io.BytesIO()
    columns = [
        pa.array([None if value is None else _text(value) for value in column.to_pylist()])
        if pa.types.is_nested(column.type)
        else column
        for column in table.columns
    ]
    csv.write_csv(pa.table(columns, names=table.column_names), sink)
    return sink.getvalue().decode()


def _aligned(table: pa.Table, width: int | None) -> str:
    grid = Table(box=None, header_style="bold", pad_edge=False)
    for name, column in zip(table.column_names, table.columns, strict=True):
        numeric = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        grid.add_column(visible(name), justify="right" if numeric else "left", overflow="fold")
    for row in zip(*map(_values, table.columns), strict=True):
        grid.add_row(*(visible(_cell(value)) for value in row))
    sink = io.StringIO()
    console = Console(file=sink, width=width or 10_000, markup=False, highlight=False, emoji=False)
    console.print(grid)
    return "".join(f"{line.rstrip()}\n" for line in sink.getvalue().splitlines())


def _values(column: pa.ChunkedArray) -> list[Any]:
    """A column's values; times after the year 9999, which Python does not have, as text."""
    try:
        return list(column.to_pylist())
    except (OverflowError, ValueError):
        return list(column.cast(pa.string()).to_pylist())


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return _text(value)


def _text(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds")
    if isinstance(value, list | dict | tuple):
        return json.dumps(_plain(value), ensure_ascii=False)
    return str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else repr(value)
    if isinstance(value, datetime | date):
        return value.isoformat()
    return value if isinstance(value, bool | int | float | str | None) else str(value)
