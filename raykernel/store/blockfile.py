"""The Arrow table of one block: a row per (kind, layer group).

Columns `kind`, `group` and `block`, a `fixed_shape_tensor` (n, c, m, c): n row examples,
m column examples, c outputs. Rows of a kind are consecutive, groups in forward order.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from raykernel.config import Json
from raykernel.store import arrowfile

Kernels = Mapping[str, Mapping[str, np.ndarray]]
"""kind → layer group → block (n, c, m, c)."""

Names = list[tuple[str, str]]
"""(kind, layer group) of every row."""

BLOCK_GLOB = "block-*.arrow"


@dataclass(frozen=True, slots=True)
class Block:
    """A stored block; the values are the memory map."""

    names: Names
    values: Float[np.ndarray, "rows n c m c"]

    def of_kind(self, kind: str) -> Float[np.ndarray, "groups n c m c"]:
        """The blocks of one kind, in stored order."""
        rows = [row for row, (stored, _) in enumerate(self.names) if stored == kind]
        return self.values[rows[0] : rows[-1] + 1]


def block_name(i: int, j: int) -> str:
    """File name of a cell's block."""
    return f"block-{i:04d}-{j:04d}.arrow"


def logits_name(i: int) -> str:
    """File name of a row block's logits."""
    return f"logits-{i:04d}.arrow"


def by_example(rows: range, name: str, values: Float[np.ndarray, "n c"]) -> pa.Table:
    """Numbers of every output by example, in float64: the columns `example` and `name`."""
    return pa.table({"example": pa.array(rows, pa.int64()), name: arrowfile.lists(values, "f8")})


def to_table(kernels: Kernels, shape: tuple[int, ...], dtype: str) -> pa.Table:
    """The table of a block.

    Args:
        kernels: block of every layer group, by kind.
        shape: (n, c, m, c).
        dtype: to store; wider than or equal to the blocks'.

    Returns:
        The table.

    Raises:
        ValueError: if a block has another shape, or more precision than is stored.
    """
    names = [(kind, group) for kind, blocks in kernels.items() for group in blocks]
    if not names:
        raise ValueError("found no layer group, expected at least one")
    stack = np.empty((len(names), *shape), dtype)
    for row, (kind, group) in enumerate(names):
        block = kernels[kind][group]
        if block.shape != shape or not np.can_cast(block.dtype, stack.dtype):
            raise ValueError(
                f"{kind} {group}: found {block.dtype} {block.shape}, expected {dtype} {shape}"
            )
        stack[row] = block
    return pa.table(
        {
            "kind": [kind for kind, _ in names],
            "group": [group for _, group in names],
            "block": pa.FixedShapeTensorArray.from_numpy_ndarray(stack),
        }
    )


def from_table(table: pa.Table) -> Block:
    """The block that a table holds; values are not copied.

    Args:
        table: of a file that somebody else may have written.

    Returns:
        The block.

    Raises:
        TypeError: if the table has other columns.
    """
    of_rows = [table["kind"], table["group"]]
    if any(column.type != pa.string() or column.null_count for column in of_rows):
        raise TypeError("kinds and groups that are no texts")
    if not isinstance(table["block"].type, pa.FixedShapeTensorType) or table["block"].null_count:
        raise TypeError(f"blocks of type {table['block'].type}")
    names = list(zip(*(column.to_pylist() for column in of_rows), strict=True))
    return Block(names, arrowfile.values(table["block"]))


def provenance(known: Mapping[str, Json]) -> dict[str, Json]:
    """Where, when and by what a block was computed.

    Args:
        known: what the worker knows: `seconds`, `peak_memory_bytes`, versions.

    Returns:
        That, with host, process, time (UTC) and the versions of raykernel and pyarrow.
    """
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "created": datetime.now(timezone.utc).isoformat(),
        "raykernel": raykernel_version(),
        "pyarrow": pa.__version__,
        **known,
    }


def raykernel_version() -> str:
    """Version of the installed package; a source tree that is not installed says so."""
    try:
        return metadata.version("raykernel")
    except metadata.PackageNotFoundError:
        return "source tree"
