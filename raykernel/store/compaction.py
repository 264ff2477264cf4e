"""Many small result files become one per table; at any instant every row is in some file.

    read the files → commit one with their newest rows → delete those that were read

A crash before the commit leaves a temporary, one after it files whose rows the new one has, too:
a key has one answer, its latest, so that none counts twice. Several processes may compact at once,
beside writers and readers, for each deletes only what it has committed elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from raykernel.errors import BlockCorruptError
from raykernel.location import StorePath, fetch
from raykernel.store.blocks import open_store
from raykernel.store.results import (
    COMPACTED,
    TableFiles,
    lasting,
    newest_rows,
    read_file,
    table_files,
    table_folder,
    write_compacted,
)
from raykernel.store.tables import TABLES, ResultTable


@dataclass(frozen=True, slots=True)
class CompactedTable:
    """What compaction did to a table."""

    table: str
    num_rows: int
    """In the file that it wrote."""
    num_files: int
    """That this one replaces."""
    damaged: tuple[StorePath, ...] = ()
    """Files that it left where they are; `verify` tells why."""


def compact(path: str | StorePath) -> list[CompactedTable]:
    """Merge the result rows of every table of a store into one file each.

    To be called at any time and by anybody; a table that is one file already is left alone.

    Args:
        path: folder of the store.

    Returns:
        The tables that changed.
    """
    root = open_store(path).path
    done = [_compact_table(root, name, spec) for name, spec in TABLES.items()]
    return [table for table in done if table is not None]


def _compact_table(root: StorePath, name: str, spec: ResultTable) -> CompactedTable | None:
    while True:
        files = table_files(root, name)
        if not files.answers and len(files.compacted) < 2:
            return None
        try:
            parts = dict(_read_all(files, spec))
        except FileNotFoundError:  # somebody else has compacted
            continue
        break
    damaged = tuple(path for path, part in parts.items() if part is None)
    # Where the latest answer cannot be read, an older one is no substitute: its files stay.
    unread = {path.name[:16] for path in damaged if path in files.answers}
    rows = lasting(newest_rows([p for p in parts.values() if p is not None], spec), root, spec)
    if rows.num_rows:
        write_compacted(rows, table_folder(root, name) / COMPACTED)
    merged = [path for path in files.answers if path.name[:16] not in unread]
    merged += [path for path in files.compacted if path not in damaged]
    for path in merged:
        path.unlink(missing_ok=True)
    return CompactedTable(name, rows.num_rows, len(merged), damaged)


def _read_all(files: TableFiles, spec: ResultTable) -> Iterator[tuple[StorePath, pa.Table | None]]:
    """Every file that counts with its rows, None for a damaged one."""
    wanted = (*files.compacted, *files.newest().values())
    fetched = fetch(wanted)

    def rows(path: StorePath) -> pa.Table | None:
        try:
            return read_file(path, spec, fetched.get(path))
        except BlockCorruptError:
            return None

    for path in wanted:
        yield path, rows(path)
