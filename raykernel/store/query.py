"""SQL over a store, read only and confined to it.

The store's tables are read into Arrow and handed to an in-memory DuckDB that may open no file,
load no extension and see no Python variable. A table is read only if the text names it.
"""

from __future__ import annotations

import re
from pathlib import Path

import duckdb
import pyarrow as pa

from raykernel.errors import InputError
from raykernel.store.blocks import open_store
from raykernel.store.listing import TABLES

_CONFINED: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",
}
# PIVOT is parsed into several statements; what it may contain is a SELECT.
_READING = {"SELECT", "EXPLAIN", "MULTI"}


def query(path: str | Path, sql: str) -> pa.Table:
    """The answer of a store to a question in SQL.

    Args:
        path: folder of the store.
        sql: one reading statement over the tables of `listing.TABLES`.

    Returns:
        The rows.

    Raises:
        InputError: if there is no store or nothing in it, or DuckDB refuses the statement.
    """
    store = open_store(path)
    if not store.fingerprints() and not store.trials():
        raise InputError(
            f"{store.path}: found an empty store, expected results. Run `raykernel kernel` or "
            "`raykernel finetune` first."
        )
    with duckdb.connect(":memory:", config=_CONFINED) as connection:
        try:
            _require_reading(connection, sql)
            for name, listing in TABLES.items():
                named = re.search(rf"\b{name}\b", sql, re.IGNORECASE)
                connection.register(name, listing.rows(store) if named else listing.empty())
            connection.execute("SET lock_configuration = true")
            relation = connection.sql(sql)
            return relation.to_arrow_table()
        except duckdb.Error as error:
            raise InputError(
                f"SQL: {str(error).strip()}\nTables: {', '.join(TABLES)}. "
                f'`raykernel query "DESCRIBE kernels"` shows the columns of one.'
            ) from error


def _require_reading(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    statements = connection.extract_statements(sql)
    kinds = [statement.type.name for statement in statements]
    if len(kinds) != 1 or kinds[0] not in _READING:
        raise InputError(
            f"SQL: found {', '.join(kinds) or 'nothing'}, expected one SELECT (or DESCRIBE, SHOW, "
            f"SUMMARIZE, EXPLAIN, PIVOT): queries only read the store."
        )
