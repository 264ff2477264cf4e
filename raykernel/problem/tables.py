"""Columns of a table file, by its suffix.

Apache Arrow reads all formats but JSON and neither of them guesses: a cell is the text that is
written there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from raykernel.errors import InputError, nearest
from raykernel.jsontext import json_value

Columns = dict[str, list[object]]


def read_table(path: Path, wanted: Sequence[str]) -> Columns:
    """Some columns of a table file.

    Args:
        path: the file; its suffix says the format.
        wanted: names of the text columns, then of the label column.

    Returns:
        The values of each wanted column.

    Raises:
        InputError: if it is missing, empty, of another format or encoding, or lacks a column.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path}: found a file with suffix {path.suffix!r}, expected one of "
            f"{', '.join(READERS)}. Convert it, or rename it to what it is."
        )
    if not path.is_file():
        beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"{path}: found no such file; {nearest(path.name, beside)}")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: found an empty file, expected labelled rows.")
        columns = reader(path, wanted)
    except InputError:
        raise
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise InputError(unreadable(path, error)) from error
    if not columns[wanted[-1]]:
        raise InputError(f"{path}: found no row, expected labelled rows.")
    return columns


def unreadable(path: Path, error: Exception) -> str:
    """Why a file cannot be read: its encoding, or what its parser says."""
    if path.suffix.lower() in TEXT_FORMATS:
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as bad:
            line = bad.object[: bad.start].count(b"\n") + 1
            return (
                f"{path}: found byte 0x{bad.object[bad.start]:02x} in line {line}, which is not "
                "UTF-8. Save the file as UTF-8 (`iconv -f latin1 -t utf-8` does it for Latin-1)."
            )
        except OSError:
            pass  # the first error says it
    return f"{path}: cannot be read as {path.suffix[1:].upper()}: {error}"


def read_delimited(path: Path, wanted: Sequence[str]) -> Columns:
    """CSV or TSV with a header; cells are text as written, quoted cells may span lines."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with pyarrow.csv.open_csv(path, parse_options=parse) as stream:
        check_columns(str(path), stream.schema.names, wanted)
    convert = pyarrow.csv.ConvertOptions(
        include_columns=list(dict.fromkeys(wanted)), column_types=dict.fromkeys(wanted, pa.string())
    )
    table = pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
    return table.to_pydict()  # type: ignore[no-any-return]


def read_json(path: Path, wanted: Sequence[str]) -> Columns:
    """JSON objects, one a line or in one array.

    Args:
        path: the file.
        wanted: columns.

    Returns:
        The values of each column; None where an object lacks it.

    Raises:
        InputError: if there is something else than objects.
    """
    # Python's reader, because Arrow's turns text that looks like a date into a timestamp.
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        objects = json_value(text)
    else:
        objects = [json_value(line) for line in text.split("\n") if line.strip()]
    for index, item in enumerate(objects):
        if not isinstance(item, dict):
            raise InputError(f"{path}: found {item!r:.60} as row {index}, expected a JSON object.")
    names = dict.fromkeys(name for item in objects for name in item)
    check_columns(str(path), list(names), wanted)
    return {name: [item.get(name) for item in objects] for name in wanted}


def read_parquet(path: Path, wanted: Sequence[str]) -> Columns:
    """Columns of a Parquet file."""
    check_columns(str(path), pyarrow.parquet.read_schema(path).names, wanted)
    table = pyarrow.parquet.read_table(path, columns=list(dict.fromkeys(wanted)))
    return table.to_pydict()  # type: ignore[no-any-return]


def read_arrow(path: Path, wanted: Sequence[str]) -> Columns:
    """Columns of an Arrow IPC file or stream (`datasets` writes streams)."""
    with pa.memory_map(str(path)) as source:
        try:
            table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
        check_columns(str(path), table.schema.names, wanted)
        table = table.select(list(dict.fromkeys(wanted)))
        table.validate(full=True)  # offsets of texts may lead out of the file
        return table.to_pydict()  # type: ignore[no-any-return]


TEXT_FORMATS = (".csv", ".tsv", ".jsonl", ".json")
READERS: dict[str, Callable[[Path, Sequence[str]], Columns]] = {
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


def check_columns(name: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Check that a table has its text and label columns.

    Args:
        name: what holds the columns.
        found: their names.
        wanted: text columns, then the label column.

    Raises:
        InputError: for a column that is missing or there twice, or where no text column is asked
            for.
    """
    if len(wanted) == 1:
        raise InputError(
            f"task.text: found no text column, expected one or more of {', '.join(found)} "
            f"({name}). Add task.text=[COLUMN]."
        )
    for column in wanted:
        if column not in found:
            key = "task.label" if column == wanted[-1] else "task.text"
            raise InputError(f"{key}: {name} has no column {column!r}; {nearest(column, found)}")
        if list(found).count(column) > 1:
            raise InputError(
                f"{name}: found several columns {column!r}, expected one. Rename the others."
            )
