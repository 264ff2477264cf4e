"""Result rows: small immutable files, merged into larger ones by `compaction.compact`.

    results/<table>/<key>-<version>-<xxh3>.arrow        one answer: the rows of one key
    results/<table>/compacted/<version>-<xxh3>.parquet  answers of many keys

A key is the hash of the row's key columns, xxh3 that of the file. One answer is an Arrow IPC file,
which opens in a tenth of the time of a Parquet file; many are Parquet, which is far smaller.

Nothing is ever rewritten: a question answered again gets another file, of a later version, and the
latest version of a key is its answer, wherever it lies. So writers need no lock, and neither do
readers: what compaction deletes it has put into another file before, and a reader whose file is
gone looks again. Versions are the writers' clocks; one that is behind what it finds takes the next
number after that.

Rows last as long as the folder that they are of: who removes `trials/<trial>` removes its result.
Files written before a column existed read as null there.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from raykernel.config import fingerprint
from raykernel.errors import BlockCorruptError, nearest
from raykernel.location import RemotePath, StorePath, fetch, names
from raykernel.provenance import origin
from raykernel.store.commit import commit, make_folder, sync_folder
from raykernel.store.tables import TABLES, ResultTable, result_table

FOLDER = "results"
"""Of all result tables, below the store."""
COMPACTED = "compacted"
"""Of compacted files, below a table's folder."""
KEY, VERSION = "raykernel_key", "raykernel_version"
"""Columns that a compacted file has beside those of its table."""

_ROWS_PER_GROUP = 256
"""Rows of a compacted file that are read where one key's are wanted."""
_ANSWER = re.compile(r"([0-9a-f]{16})-([0-9a-f]{24})-([0-9a-f]{16})\.arrow")
_MERGED = re.compile(r"([0-9a-f]{24})-([0-9a-f]{16})\.parquet")


# ---------------------------------------------------------------- writing


def write_result(root: StorePath, table: str, row: dict[str, Any]) -> StorePath:
    """Commit one row; it replaces a row with the same key.

    Args:
        root: folder of the store.
        table: name of the table.
        row: value by column; columns left out are null; `created`, `path`, `versions` and `host`
            are known.

    Returns:
        The file.
    """
    return write_results(root, table, [row])


def write_results(root: StorePath, table: str, rows: Sequence[dict[str, Any]]) -> StorePath:
    """Commit rows of one key as one file; they replace all rows with the same key.

    Args:
        root: folder of the store.
        table: name of the table.
        rows: at least one, as in `write_result`.

    Returns:
        The file.

    Raises:
        ValueError: if a column is unknown, a key column absent, or the keys differ.
    """
    spec = result_table(table)
    for name in {name for row in rows for name in row}:
        if name not in spec.schema.names:
            raise ValueError(
                f"{table}: unknown column {name!r}; {nearest(name, spec.schema.names)}"
            )
    first = rows[0]
    if absent := [name for name in spec.key if first.get(name) is None]:
        raise ValueError(f"{table}: found no {', '.join(absent)}, expected the whole key")
    if any(row[name] != first[name] for row in rows for name in spec.key):
        raise ValueError(f"{table}: found rows of several keys, expected one key in a file")
    owner = spec.folder.format(**first)
    known = {"created": datetime.now(timezone.utc), "path": owner or None} | origin()
    sink = pa.BufferOutputStream()
    # Columns that a table does not have, such as a curve's `path`, are left out by the schema.
    arrow = pa.Table.from_pylist([known | row for row in rows], schema=spec.schema)
    with pa.ipc.new_file(sink, spec.schema) as writer:
        writer.write_table(arrow)
    content, folder = sink.getvalue(), table_folder(root, table)
    key = key_of(table, first)
    path = folder / f"{key}-{new_version(_versions(folder, key))}-{_digest(content)}.arrow"
    make_folder(folder)
    make_folder(root / owner, lasts=bool(owner))
    commit(path, memoryview(content))
    return path


def key_of(table: str, row: dict[str, Any]) -> str:
    """The name of a question.

    Args:
        table: name of the table.
        row: value by column, the key columns among them.

    Returns:
        Sixteen hexadecimal digits.
    """
    return fingerprint([row[name] for name in result_table(table).key])


def new_version(earlier: Iterable[str] = ()) -> str:
    """A name that sorts after all earlier ones: nanoseconds, and chance against a tie.

    Clocks are set back, and those of two machines differ: what is there already counts, too.

    Args:
        earlier: versions that it has to sort after.

    Returns:
        The version.
    """
    last = max((int(version[:16], 16) for version in earlier), default=0)
    return f"{max(time.time_ns(), last + 1):016x}{uuid.uuid4().hex[:8]}"


def _versions(folder: StorePath, key: str) -> list[str]:
    """Versions of a key's answers, and of compacted files, which are newer than all in them."""
    answers = filter(None, map(_ANSWER.fullmatch, names(folder, key)))
    merged = filter(None, map(_MERGED.fullmatch, names(folder / COMPACTED)))
    return [*(found[2] for found in answers), *(found[1] for found in merged)]


def table_folder(root: StorePath, table: str) -> StorePath:
    """Where the files of a table lie."""
    return root / FOLDER / table


# ---------------------------------------------------------------- what is there


@dataclass(frozen=True, slots=True)
class TableFiles:
    """Files of a table that together hold every row."""

    answers: tuple[StorePath, ...]
    """Of one key each."""
    compacted: tuple[StorePath, ...]

    def newest(self) -> dict[str, StorePath]:
        """The latest answer by key."""
        return {path.name[:16]: path for path in sorted(self.answers)}


def table_files(root: StorePath, table: str, key: str = "") -> TableFiles:
    """Files of a table.

    Args:
        root: folder of the store.
        table: name of the table.
        key: which answers; empty: all.

    Returns:
        Their paths: of every row that was there at the time of the call.
    """
    result_table(table)
    folder = table_folder(root, table)
    before = _matching(folder / COMPACTED, _MERGED)
    while True:
        answers = _matching(folder, _ANSWER, key)
        compacted = _matching(folder / COMPACTED, _MERGED)
        # A file that appears among the compacted ones may hold answers that were deleted before
        # they could be listed.
        if compacted == before:
            return TableFiles(answers, compacted)
        before = compacted


def has_results(root: StorePath) -> bool:
    """Whether any result was ever written."""
    if isinstance(root, RemotePath):  # where a folder is there because something lies in it
        return bool(names(root / FOLDER))
    return any(
        files.answers or files.compacted for files in (table_files(root, name) for name in TABLES)
    )


def is_result(path: StorePath) -> bool:
    """Whether a file has the name of an answer or a compacted file, and its place."""
    return bool((_MERGED if path.parent.name == COMPACTED else _ANSWER).fullmatch(path.name))


def _matching(
    folder: StorePath, pattern: re.Pattern[str], start: str = ""
) -> tuple[StorePath, ...]:
    found = sorted(names(folder, start))
    return tuple(folder / name for name in found if pattern.fullmatch(name))


# ---------------------------------------------------------------- reading


def read_results(root: StorePath, table: str) -> pa.Table:
    """All rows of a table, oldest first; of a curve by step.

    Args:
        root: folder of the store.
        table: name of the table.

    Returns:
        The rows in the table's schema.
    """
    spec = result_table(table)
    parts: dict[StorePath, pa.Table] = {}  # no file changes: what is read stays read
    while True:
        files = table_files(root, table)
        newest = files.newest()
        try:
            unread = [p for p in (*files.compacted, *newest.values()) if p not in parts]
            fetched = fetch(unread)
            for path in unread:
                parts[path] = read_file(path, spec, fetched.get(path))
        except FileNotFoundError:  # compacted meanwhile
            continue
        rows = newest_rows([parts[path] for path in (*files.compacted, *newest.values())], spec)
        return (
            lasting(rows, root, spec)
            .select(spec.schema.names)
            .sort_by([(name, "ascending") for name in spec.order])
        )


def read_key(root: StorePath, table: str, key: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one key.

    Args:
        root: folder of the store.
        table: name of the table.
        key: value by key column.

    Returns:
        Value by column, in the order in which they were written; none if nothing is stored.
    """
    spec, wanted = result_table(table), key_of(table, key)
    if spec.folder and not (root / spec.folder.format(**key)).is_dir():
        return []
    while True:
        files = table_files(root, table, wanted)
        try:
            parts = [part for path in files.compacted for part in _rows_of(path, wanted, spec)]
            parts += [read_file(path, spec) for path in files.answers[-1:]]
        except FileNotFoundError:  # compacted meanwhile
            continue
        rows = newest_rows(parts, spec)
        with _damage_of(table_folder(root, table)):  # a time may be none that Python knows
            found: list[dict[str, Any]] = rows.select(spec.schema.names).to_pylist()
        return found


def read_file(path: StorePath, spec: ResultTable, content: bytes | None = None) -> pa.Table:
    """One file, brought to the table's schema: absent columns null, unknown ones left out.

    Args:
        path: an answer or a compacted file.
        spec: its table.
        content: its content, if that has been fetched.

    Returns:
        Its rows, with `KEY` and `VERSION` beside.

    Raises:
        BlockCorruptError: if it is damaged or foreign.
        FileNotFoundError: if it is absent.
    """
    if content is None:
        content = path.read_bytes()  # apart, so that a failing disk is not taken for a damaged file
    answer = _ANSWER.fullmatch(path.name)
    with _blaming(path, content):
        if answer is None:
            with pq.ParquetFile(pa.BufferReader(content)) as file:
                return _in_schema(file.read(), spec.schema)
        rows = pa.ipc.open_file(content).read_all()
        rows.validate(full=True)
        for name, own in zip((KEY, VERSION), answer.groups(), strict=False):
            rows = rows.append_column(name, pa.repeat(own, rows.num_rows))
        return _in_schema(rows, spec.schema)


def _rows_of(path: StorePath, key: str, spec: ResultTable) -> Iterator[pa.Table]:
    """Rows of a compacted file with one key, in the table's schema."""
    for number, (first, last) in enumerate(_ranges(path)):
        if first <= key <= last:
            rows, places = _group(path, number)
            start, count = places.get(key, (0, 0))
            with _damage_of(path):
                found = _in_schema(rows.slice(start, count), spec.schema)
            yield found


# A study asks for one row after the other; a compacted file never changes.
@lru_cache(maxsize=8)
def _content(path: StorePath) -> bytes:
    content = path.read_bytes()
    with _blaming(path, content):
        return content


@lru_cache(maxsize=8)
def _ranges(path: StorePath) -> list[tuple[str, str]]:
    """First and last key of every group of rows of a compacted file."""
    content = _content(path)
    with _damage_of(path), pq.ParquetFile(pa.BufferReader(content)) as file:
        if file.schema_arrow.field(KEY).type != pa.string():
            raise TypeError(f"keys of type {file.schema_arrow.field(KEY).type}")
        at = file.schema_arrow.get_field_index(KEY)
        groups = [file.metadata.row_group(n).column(at) for n in range(file.num_row_groups)]
        if not all(group.is_stats_set and group.statistics.has_min_max for group in groups):
            raise TypeError("keys without their range")
        return [(group.statistics.min, group.statistics.max) for group in groups]


@lru_cache(maxsize=64)
def _group(path: StorePath, number: int) -> tuple[pa.Table, dict[str, tuple[int, int]]]:
    """One group of rows of a compacted file, and where those of a key begin and how many."""
    content = _content(path)
    with _damage_of(path), pq.ParquetFile(pa.BufferReader(content)) as file:
        rows = file.read_row_group(number).combine_chunks()
    keys = rows[KEY].to_pylist()
    counts = Counter(keys)
    return rows, {key: (keys.index(key), count) for key, count in counts.items()}


def rescue(path: StorePath, spec: ResultTable) -> None:
    """Commit the rows of a damaged compacted file that can still be read, as another such file.

    Args:
        path: the file, which stays; of an answer there is nothing to rescue.
        spec: its table.
    """
    if not _MERGED.fullmatch(path.name):
        return
    whole = []
    unreadable = (pa.ArrowException, OSError)
    with (
        contextlib.suppress(*unreadable),  # the footer is damaged: nothing is left
        pq.ParquetFile(pa.BufferReader(path.read_bytes()), page_checksum_verification=True) as file,
    ):
        for number in range(file.num_row_groups):
            with contextlib.suppress(*unreadable):
                whole.append(file.read_row_group(number))
    if whole:
        write_compacted(pa.concat_tables(whole), path.parent)


def write_compacted(rows: pa.Table, folder: StorePath) -> None:
    """Commit a compacted file.

    Args:
        rows: of a table, with `KEY` and `VERSION`, a key's rows in their order.
        folder: the table's `COMPACTED`.
    """
    sink = pa.BufferOutputStream()
    rows = rows.sort_by(KEY)  # stable
    pq.write_table(rows, sink, row_group_size=_ROWS_PER_GROUP, write_page_checksum=True)
    content = sink.getvalue()
    make_folder(folder)
    version = new_version(rows[VERSION].to_pylist())
    commit(folder / f"{version}-{_digest(content)}.parquet", memoryview(content))
    sync_folder(folder)  # before anything is deleted, also on a disk that loses power


def newest_rows(parts: Sequence[pa.Table], spec: ResultTable) -> pa.Table:
    """Rows of the latest version of every key, each once.

    Args:
        parts: of one table, with `KEY` and `VERSION`.
        spec: that table.

    Returns:
        The rows, with both columns; those of a key in their order.
    """
    if not parts:
        return _with_origin(spec.schema).empty_table()
    if len(parts) == 1:
        return parts[0]
    origins = [
        (key, (version, number))
        for number, part in enumerate(parts)
        for key, version in zip(part[KEY].to_pylist(), part[VERSION].to_pylist(), strict=True)
    ]
    newest: dict[str, tuple[str, int]] = {}
    for key, place in origins:
        newest[key] = max(newest.get(key, place), place)
    mask = [newest[key] == place for key, place in origins]
    return pa.concat_tables(parts).combine_chunks().filter(pa.array(mask))


def lasting(rows: pa.Table, root: StorePath, spec: ResultTable) -> pa.Table:
    """Rows whose folder is there.

    Args:
        rows: of one table.
        root: folder of the store.
        spec: that table.

    Returns:
        Those; the others' folder has been removed.
    """
    above, _, last = spec.folder.rpartition("/")
    if not last.startswith("{"):
        return rows if (root / spec.folder).is_dir() else rows.slice(0, 0)
    there = pa.array(names(root / above), pa.string())
    return rows.filter(pc.is_in(rows[last.strip("{}")], there))


def _with_origin(schema: pa.Schema) -> pa.Schema:
    return pa.schema([*schema, (KEY, pa.string()), (VERSION, pa.string())])


def _in_schema(found: pa.Table, schema: pa.Schema) -> pa.Table:
    wanted = _with_origin(schema)
    if found.schema.equals(wanted):
        return found
    columns = [
        found[column.name].cast(column.type)
        if column.name in found.column_names
        else pa.nulls(found.num_rows, column.type)
        for column in wanted
    ]
    return pa.table(columns, schema=wanted)


def _digest(content: pa.Buffer | bytes) -> str:
    return xxhash.xxh3_64_hexdigest(content)


@contextlib.contextmanager
def _blaming(path: StorePath, content: bytes) -> Iterator[None]:
    """Compare a file's content with its name; whatever goes wrong then is its damage."""
    with _damage_of(path):
        if _digest(content) != path.stem.rpartition("-")[2]:
            raise ValueError("checksum of another content")
        yield


@contextlib.contextmanager
def _damage_of(path: StorePath) -> Iterator[None]:
    """Say of whatever goes wrong that it is a file's damage."""
    try:
        yield
    except (
        pa.ArrowException, OSError, LookupError, OverflowError, TypeError, ValueError
    ) as error:  # fmt: skip
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BlockCorruptError(
            f"{path}: damaged or foreign ({reason}). Expected a result that raykernel wrote. Run "
            f"`raykernel verify --remove`, then its configuration again."
        ) from error


def to_json(value: object) -> str:
    """Text of a value for the JSON columns: keys sorted."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
