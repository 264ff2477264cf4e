"""Checksums of files whose format has none: a flipped bit is noticed, never computed with.

JSON          the member `xxh3_128`: of all other members; in a journal that of every line
safetensors   `xxh3_128` in the header's metadata: of the rest of the header, and of the data
any file that other programs read
              a file `<name>.xxh3_128` beside it
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from raykernel.config import Json
from raykernel.errors import BlockCorruptError
from raykernel.jsontext import json_object
from raykernel.location import StorePath, local_copy
from raykernel.store.arrowfile import damage
from raykernel.store.commit import commit

SEAL = "xxh3_128"
"""Name of a checksum, wherever it stands."""
_UNSEALED = "0" * 32
_CHUNK_BYTES = 1 << 24
_LENGTH_BYTES = 8
"""Of the number that a safetensors file begins with: the bytes of its header."""


# ---------------------------------------------------------------- JSON


def seal(tree: dict[str, Json], *, indent: int | None = None) -> bytes:
    """A JSON object with its checksum.

    Args:
        tree: the object.
        indent: of its lines, as in `json.dumps`; None: one line.

    Returns:
        The content of a file.
    """
    sealed = {**tree, SEAL: _digest(tree)}
    return json.dumps(sealed, indent=indent, sort_keys=True, ensure_ascii=False).encode()


def unseal(path: StorePath, content: bytes) -> dict[str, Any]:
    """What `seal` was given.

    Args:
        path: the file, for messages.
        content: what it holds.

    Returns:
        The object.
    """
    return _without_seal(path, _tree(path, content))


def unseal_line(path: StorePath, line: bytes) -> dict[str, Any]:
    """A line of a journal; those that Optuna's own programs have added have no checksum.

    Args:
        path: the journal, for messages.
        line: the line.

    Returns:
        What it says.
    """
    tree = _tree(path, line)
    # A flipped bit can also hit the name of the checksum.
    return _without_seal(path, tree) if any(map(_is_nearly_seal, tree)) else tree


def _tree(path: StorePath, content: bytes) -> dict[str, Any]:
    try:
        return json_object(content)
    except ValueError as error:
        raise BlockCorruptError(damage(path, str(error))) from error


def _without_seal(path: StorePath, tree: dict[str, Any]) -> dict[str, Any]:
    found, rest = tree.get(SEAL, "none"), {k: v for k, v in tree.items() if k != SEAL}
    if found != (expected := _digest(rest)):
        raise BlockCorruptError(damage(path, f"checksum {found}, expected {expected}"))
    return rest


def _is_nearly_seal(name: str) -> bool:
    same = sum(a == b for a, b in zip(name, SEAL, strict=False))
    return len(name) == len(SEAL) and same >= len(SEAL) - 1


def _digest(tree: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(tree, sort_keys=True))


# ---------------------------------------------------------------- safetensors


def write_sealed(
    path: Path, header: dict[str, Any], metadata: dict[str, str], chunks: Iterable[Any]
) -> None:
    """Write a safetensors file with its checksum.

    Args:
        path: the file.
        header: type, shape and place of every tensor by name.
        metadata: texts by name, to be kept in the header.
        chunks: the bytes of the tensors, in the order of their places.
    """
    digest = xxhash.xxh3_128(json.dumps({**header, "__metadata__": metadata}, sort_keys=True))
    text = json.dumps({"__metadata__": {**metadata, SEAL: _UNSEALED}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
        mark = f'"{SEAL}": "'.encode()
        file.seek(_LENGTH_BYTES + text.index(mark + _UNSEALED.encode()) + len(mark))
        file.write(digest.hexdigest().encode())


def check_tensors(path: StorePath) -> None:
    """Compare the checksum of a file that `write_sealed` wrote; no tensor is kept.

    Args:
        path: the file.

    Raises:
        BlockCorruptError: if it is damaged, or not ours.
    """
    try:
        with local_copy(path) as copy, copy.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json_object(file.read(min(length, copy.stat().st_size)))
            found = header["__metadata__"].pop(SEAL)
            digest = xxhash.xxh3_128(json.dumps(header, sort_keys=True))
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise BlockCorruptError(damage(path, f"no header of ours: {error}")) from error
    if found != (expected := digest.hexdigest()):
        raise BlockCorruptError(damage(path, f"checksum {found}, expected {expected}"))


# ---------------------------------------------------------------- a file beside


def commit_beside(path: StorePath, payload: bytes) -> None:
    """Commit a file that other programs read, and before it the one with its checksum.

    Args:
        path: the file; its folder exists.
        payload: its content.
    """
    commit(beside(path), xxhash.xxh3_128_hexdigest(payload).encode())
    commit(path, payload)


def beside(path: StorePath) -> StorePath:
    """Where the checksum of such a file lies."""
    return path.parent / f"{path.name}.{SEAL}"


def check_beside(path: StorePath) -> None:
    """Compare the checksum of a file that `commit_beside` wrote.

    Args:
        path: the file.

    Raises:
        BlockCorruptError: if it is damaged, or not ours.
    """
    try:
        expected = beside(path).read_bytes()
    except FileNotFoundError:
        expected = b"none"
    if xxhash.xxh3_128_hexdigest(path.read_bytes()).encode() != expected:
        raise BlockCorruptError(damage(path, f"other content than {beside(path).name} says"))
