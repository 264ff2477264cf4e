"""SQL over a store, read only and confined to it.

The store's tables are read into Arrow and handed to an in-memory DuckDB that may open no file,
load no extension and see no Python variable. A table is read only if the text names it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

import duckdb
import pyarrow as pa

from raykernel.config import StoreConfig
from raykernel.errors import InputError
from raykernel.location import StorePath
from raykernel.store.blocks import open_store
from raykernel.store.listing import TABLES
from raykernel.store.results import has_results

_CONFINED: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",
    "temp_directory": "",  # where sorting something large would write
}
# PIVOT is parsed into several statements; what it may contain is a SELECT.
_READING = {"SELECT", "EXPLAIN", "MULTI"}


def default_store() -> str:
    """The store of commands and calls that name none: `RAYKERNEL_STORE`, or ./raykernel-store."""
    return os.environ.get("RAYKERNEL_STORE", StoreConfig().path)


def query(
    sql: str,
    store: str | StorePath | None = None,
    *,
    parameters: Sequence[str | int | float] = (),
    tables: Mapping[str, pa.Table] | None = None,
) -> pa.Table:
    """The answer of a store to a question in SQL.

    `.to_pandas()` makes a data frame of it, `polars.from_arrow` one of Polars.

    Args:
        sql: one reading statement in DuckDB's SQL over the tables of `raykernel query --schema`.
        store: folder of the store; None: `RAYKERNEL_STORE`, or ./raykernel-store.
        parameters: what `?` and `$1` stand for in it.
        tables: further tables that it may name.

    Returns:
        The rows.

    Raises:
        InputError: if there is no store or nothing in it, or the statement is refused.
    """
    opened = open_store(default_store() if store is None else store)
    if not has_results(opened.path) and not opened.fingerprints():
        raise InputError(
            f"{opened.path}: found an empty store, expected results. Run `raykernel kernel` or "
            "`raykernel finetune` first."
        )
    with duckdb.connect(":memory:", config=_CONFINED) as connection:
        try:
            _require_reading(connection, sql)
            for name, listing in TABLES.items():
                named = re.search(rf"\b{name}\b", sql, re.IGNORECASE)
                connection.register(name, listing.rows(opened) if named else listing.empty())
            for name, table in (tables or {}).items():
                connection.register(name, table)
            connection.execute("SET lock_configuration = true")
            relation = connection.sql(sql, params=list(parameters) or None)
            return relation.to_arrow_table()
        except duckdb.PermissionException as error:
            raise InputError(
                f"SQL: {str(error).strip()}\nA query reads the tables of its store and nothing "
                f"else: {', '.join(TABLES)}. To read another file or to write one, take DuckDB "
                "itself, or `--output FILE` for the answer."
            ) from error
        except duckdb.Error as error:
            raise InputError(
                f"SQL: {str(error).strip()}\nTables: {', '.join(TABLES)}. "
                "`raykernel query --schema` shows their columns."
            ) from error


def _require_reading(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    try:
        kinds = [statement.type.name for statement in connection.extract_statements(sql)]
    except ValueError:  # a statement that DuckDB's Python does not know: no SELECT
        kinds = ["another statement"]
    if len(kinds) != 1 or kinds[0] not in _READING:
        raise InputError(
            f"SQL: found {', '.join(kinds) or 'nothing'}, expected one SELECT (or DESCRIBE, SHOW, "
            f"SUMMARIZE, EXPLAIN, PIVOT): queries only read the store."
        )
