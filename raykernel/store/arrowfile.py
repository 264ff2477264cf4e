"""Arrow IPC files that know whether they are whole.

Uncompressed (floats do not compress; measured: lz4 saves nothing, zstd 10 % at eight times the
cost), one record batch, read through a memory map. The schema metadata holds `raykernel`, a JSON
header, and `xxh3_128`, the checksum of header and values: Arrow itself notices a truncation but
returns a flipped bit silently.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from jaxtyping import Shaped

from raykernel.config import Json
from raykernel.errors import BlockCorruptError, InputError
from raykernel.jsontext import json_object
from raykernel.location import RemotePath, StorePath, local_copy
from raykernel.store.commit import commit

FORMAT = 1
"""Of the store and every file in it; raised when an older raykernel could misread it."""

_HEADER = b"raykernel"
_CHECKSUM = b"xxh3_128"
# A flipped bit in the schema makes pyarrow raise any of these.
_UNREADABLE = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class ArrowFile:
    """Content of a checked file; the table's buffers are the memory map."""

    header: dict[str, Any]
    table: pa.Table


def write(path: StorePath, table: pa.Table, header: dict[str, Json]) -> int:
    """Write a table with its header, at once.

    Args:
        path: the file; its folder exists.
        table: numbers as fixed-size lists or tensors; other columns must have JSON values.
        header: what the file is; `format` is added.

    Returns:
        Bytes written.
    """
    text = json.dumps({"format": FORMAT, **header}, sort_keys=True, ensure_ascii=False).encode()
    table = table.combine_chunks()
    metadata = {_HEADER: text, _CHECKSUM: _checksum(text, table).encode()}
    table = table.replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return commit(path, memoryview(sink.getvalue()))


def read(path: StorePath, *, check: bool) -> ArrowFile:
    """Memory-map a file.

    Args:
        path: the file.
        check: also compare the checksum; needed once per file and process.

    Returns:
        Header and table.

    Raises:
        BlockCorruptError: if the file is truncated, damaged or not ours.
        InputError: if it is whole but of a newer format.
        FileNotFoundError: if it is absent.
    """
    # Closing the source frees its descriptor; the buffers keep the map alive.
    with local_copy(path) as file, pa.memory_map(str(file)) as source, blaming(path):
        table = pa.ipc.open_file(source).read_all()
        header, text = _header(table.schema)
        if check:
            _require_whole(text, table)
    require_format(path, header)
    return ArrowFile(header, table)


def read_header(path: StorePath) -> dict[str, Any]:
    """The header alone, unchecked: for listings.

    Args:
        path: the file.

    Returns:
        The header.

    Raises:
        BlockCorruptError: if the file has none.
        FileNotFoundError: if it is absent.
    """
    # Of a remote file only this part is fetched.
    opened = path.open() if isinstance(path, RemotePath) else pa.memory_map(str(path))
    with opened as source, blaming(path):
        header, _ = _header(pa.ipc.open_file(source).schema)
    require_format(path, header)
    return header


def values(column: pa.ChunkedArray) -> Any:
    """A tensor or fixed-size-list column as one read-only array, rows first, without a copy."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(array, pa.FixedShapeTensorArray):
        return array.to_numpy_ndarray()
    return array.flatten().to_numpy().reshape(len(array), array.type.list_size)


def matrix(column: pa.ChunkedArray, dtype: str) -> Shaped[np.ndarray, "n d"]:
    """A column that `lists` made, or an error where it is another.

    Args:
        column: of a file that somebody else may have written.
        dtype: of its numbers.

    Returns:
        A row per list, read-only.

    Raises:
        TypeError: if it has other values, or lacks some.
    """
    if not pa.types.is_fixed_size_list(column.type) or column.null_count:
        raise TypeError(f"a column of {column.type}")
    found: np.ndarray = values(column)
    if found.dtype != dtype:
        raise TypeError(f"numbers of {found.dtype}")
    return found


def lists(matrix: Shaped[np.ndarray, "n d"], dtype: str) -> pa.FixedSizeListArray:
    """A matrix as a column of fixed-size lists, one per row: the inverse of `values`."""
    flat = np.ascontiguousarray(matrix, dtype).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), matrix.shape[1])


def damage(path: StorePath, reason: str) -> str:
    """What to say of a file that cannot be trusted, with the way out."""
    return (
        f"{path}: damaged or foreign ({reason}). Expected a file that raykernel wrote. Run "
        f"`raykernel verify --remove --store {_root(path)}`; the next run computes it again."
    )


@contextmanager
def blaming(path: StorePath) -> Iterator[None]:
    """Whatever goes wrong between opening a file and using its values is its damage.

    Args:
        path: the file.

    Yields:
        Nothing.

    Raises:
        BlockCorruptError: instead of what was raised.
    """
    try:
        yield
    except _UNREADABLE as error:
        raise BlockCorruptError(damage(path, str(error).partition("\n")[0])) from error


def _header(schema: pa.Schema) -> tuple[dict[str, Any], bytes]:
    text: bytes = (schema.metadata or {}).get(_HEADER, b"null")
    header = json_object(text)
    if not isinstance(header.get("format"), int):
        raise TypeError("no raykernel header")
    return header, text


def _require_whole(text: bytes, table: pa.Table) -> None:
    table.validate(full=True)  # before any text in it is decoded
    found, expected = _checksum(text, table), table.schema.metadata[_CHECKSUM].decode()
    if found != expected:
        raise ValueError(f"checksum {found}, expected {expected}")


def require_format(path: StorePath, header: dict[str, Any]) -> None:
    """Refuse a file of a newer format.

    Args:
        path: the file, for messages.
        header: what it says of itself, its `format` among it.

    Raises:
        InputError: if a newer raykernel wrote it.
    """
    if header["format"] > FORMAT:
        raise InputError(
            f"{path}: found format {header['format']}, expected at most {FORMAT}: a newer "
            f"raykernel wrote it. Update raykernel, or choose another store.path."
        )


def _checksum(header: bytes, table: pa.Table) -> str:
    """xxh3_128 of header, column names and values, whatever the buffers' layout.

    Fixed-size lists and tensors enter as the bytes of their values, other columns as JSON, for
    their buffers may be padded or sliced differently after a round trip.

    Returns:
        The checksum in hexadecimal digits.
    """
    digest = xxhash.xxh3_128(header)
    for name, column in zip(table.column_names, table.columns, strict=True):
        if _is_numeric(column.type):
            array = values(column)
            digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(array)
        else:
            digest.update(f"\n{name}\n".encode())
            digest.update(json.dumps(column.to_pylist(), default=str).encode())
    return digest.hexdigest()


def _is_numeric(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.FixedShapeTensorType) or pa.types.is_fixed_size_list(kind)


def _root(path: StorePath) -> StorePath:
    """The store that a file lies in: the nearest folder above with a marker."""
    for folder in path.parents:
        if (folder / "raykernel.json").exists():
            return folder
    return path.parent
