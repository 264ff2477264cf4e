"""Stored changes of the linearised model: J(x) (θ_FT − θ_PT) of test examples.

    kernels/<fingerprint of the kernel at θ_FT>/linearized-<iiii>.arrow

One file per row block, beside the logits at θ_FT in the same folder.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from raykernel.config import Json
from raykernel.errors import BlockCorruptError, KernelIncompleteError
from raykernel.store import blockfile
from raykernel.store.kernels import KernelHandle


def linearized_name(i: int) -> str:
    """File name of a row block's changes."""
    return f"linearized-{i:04d}.arrow"


def write_linearized(
    handle: KernelHandle,
    i: int,
    change: Float[np.ndarray, "n c"],
    provenance: Mapping[str, Json] | None = None,
) -> int:
    """Commit the changes of one row block.

    Args:
        handle: the kernel at θ_FT.
        i: the row block.
        change: J(x) (θ_FT − θ_PT) of its examples; kept in float64.
        provenance: see `KernelHandle.write_block`.

    Returns:
        Bytes written.

    Raises:
        ValueError: if the shape is not the row block's.
    """
    facts: dict[str, Json] = {"provenance": blockfile.provenance(provenance or {})}
    return handle.write_outputs(linearized_name(i), i, "change", change, facts)


def read_linearized(handle: KernelHandle, i: int) -> Float[np.ndarray, "n c"]:
    """Checked changes of one row block.

    Args:
        handle: the kernel at θ_FT.
        i: the row block.

    Returns:
        J(x) (θ_FT − θ_PT) in float64, memory-mapped.

    Raises:
        BlockCorruptError: if the file is damaged, or another row block's.
        FileNotFoundError: if it is missing.
    """
    return handle.read_outputs(linearized_name(i), i, "change")[1]


def missing_linearized(handle: KernelHandle, rows: range) -> list[int]:
    """Row blocks without changes or logits, or with damaged ones: they are computed again.

    Args:
        handle: the kernel at θ_FT.
        rows: examples to follow.

    Returns:
        The row blocks, in order.
    """
    return [i for i in handle.grid.row_indices(rows) if not is_linearized(handle, i)]


def is_linearized(handle: KernelHandle, i: int) -> bool:
    """Whether a row block's changes and its logits at θ_FT are stored and whole."""
    try:
        read_linearized(handle, i)
        handle.read_logits(i)
    except (FileNotFoundError, BlockCorruptError):
        return False
    return True


def linearized_changes(handle: KernelHandle, rows: range) -> Float[np.ndarray, "m c"]:
    """Changes of some examples, in their order.

    Args:
        handle: the kernel at θ_FT.
        rows: whole row blocks, such as the grid's `test`.

    Returns:
        J(x) (θ_FT − θ_PT) in float64.

    Raises:
        KernelIncompleteError: if those of some row block are missing.
    """
    if absent := missing_linearized(handle, rows):
        raise KernelIncompleteError(
            f"kernel {handle.fingerprint}: found no linearised outputs of {len(absent)} row "
            "blocks, expected all of them. Run `raykernel behavior` with its configuration."
        )
    return np.concatenate([read_linearized(handle, i) for i in handle.grid.row_indices(rows)])
