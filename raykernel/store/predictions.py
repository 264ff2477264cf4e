"""Stored predictions: K(x, train) α of test examples whose kernel with train is not stored.

    kernels/<fingerprint>/prediction-<key>-<iiii>.arrow

One file per row block and per dual solution α. α is the kernel's, the groups' and the solver's grid
point's alone, so that these name it; the outputs are this product plus f0(x) / s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from raykernel.config import GridPoint, Json, fingerprint, plain
from raykernel.errors import BlockCorruptError, KernelIncompleteError
from raykernel.location import StorePath
from raykernel.store import arrowfile, blockfile
from raykernel.store.kernels import KernelHandle
from raykernel.terms import Solver

PREDICTION_GLOB = "prediction-*.arrow"


@dataclass(frozen=True, slots=True)
class Solution:
    """Which α of a kernel."""

    kind: str
    groups: tuple[str, ...]
    """Layer groups that are summed, cross groups included, in stored order."""
    point: GridPoint
    """Solver and settings."""

    @property
    def key(self) -> str:
        """The part of the file names that tells solutions apart."""
        return fingerprint(self)

    def file_name(self, i: int) -> str:
        """File name of a row block's prediction."""
        return f"prediction-{self.key}-{i:04d}.arrow"


def solution_of(path: StorePath, header: Mapping[str, Any]) -> Solution:
    """The solution that a file says it is of.

    Args:
        path: the file.
        header: its own.

    Returns:
        The solution.

    Raises:
        BlockCorruptError: if the header is another kind of file's.
    """
    try:
        of = header["point"]
        gamma, c = (None if of[name] is None else float(of[name]) for name in ("gamma", "c"))
        # Infinities are text in JSON.
        point = GridPoint(
            Solver[of["solver"]], float(of["ridge"]), float(of["f0_scaling"]), gamma, c
        )
        return Solution(_text(header["kind"]), tuple(map(_text, header["groups"])), point)
    except (LookupError, TypeError, ValueError) as error:
        raise BlockCorruptError(arrowfile.damage(path, f"no prediction: {error}")) from error


def _text(value: Any) -> str:
    """A value that must be text, in a file that somebody else may have written."""
    if not isinstance(value, str):
        raise TypeError(f"found {value!r:.40} for a name")
    return value


def write_prediction(
    handle: KernelHandle,
    solution: Solution,
    i: int,
    fitted: Float[np.ndarray, "n c"],
    provenance: Mapping[str, Json] | None = None,
) -> int:
    """Commit the predictions of one row block.

    Args:
        handle: the kernel.
        solution: which α.
        i: the row block.
        fitted: K(x, train) α of its examples; kept in float64.
        provenance: see `KernelHandle.write_block`.

    Returns:
        Bytes written.

    Raises:
        ValueError: if the shape is not the row block's.
    """
    of: Any = plain(solution)
    facts: dict[str, Json] = of | {"provenance": blockfile.provenance(provenance or {})}
    return handle.write_outputs(solution.file_name(i), i, "fitted", fitted, facts)


def read_prediction(handle: KernelHandle, solution: Solution, i: int) -> Float[np.ndarray, "n c"]:
    """Checked predictions of one row block.

    Args:
        handle: the kernel.
        solution: which α.
        i: the row block.

    Returns:
        K(x, train) α in float64, memory-mapped.

    Raises:
        BlockCorruptError: if the file is damaged, or another solution's or row block's.
        FileNotFoundError: if it is missing.
    """
    name = solution.file_name(i)
    header, fitted = handle.read_outputs(name, i, "fitted")
    of = solution_of(handle.path / name, header)
    if of != solution:
        reason = f"{of.key} is another solution's"
        raise BlockCorruptError(arrowfile.damage(handle.path / name, reason))
    return fitted


def read_predictions(
    handle: KernelHandle, solution: Solution, rows: range
) -> Float[np.ndarray, "m c"]:
    """Predictions of some examples, in their order.

    Args:
        handle: the kernel.
        solution: which α.
        rows: whole row blocks, such as the grid's `test`.

    Returns:
        K(x, train) α in float64.

    Raises:
        KernelIncompleteError: if those of some row block are missing.
    """
    if absent := missing_predictions(handle, solution, rows):
        raise KernelIncompleteError(
            f"kernel {handle.fingerprint}: found no predictions of {len(absent)} row blocks, "
            "expected all of them. Run `raykernel kernel` with its configuration."
        )
    blocks = handle.grid.row_indices(rows)
    return np.concatenate([read_prediction(handle, solution, i) for i in blocks])


def missing_predictions(handle: KernelHandle, solution: Solution, rows: range) -> list[int]:
    """Row blocks without prediction or logits, or with damaged ones: they are computed again.

    Unlike a block, a prediction is small: it is read to find out.

    Args:
        handle: the kernel.
        solution: which α.
        rows: examples to predict.

    Returns:
        The row blocks, in order.
    """
    return [i for i in handle.grid.row_indices(rows) if not is_predicted(handle, solution, i)]


def is_predicted(handle: KernelHandle, solution: Solution, i: int) -> bool:
    """Whether a row block's prediction and logits are stored and whole."""
    try:
        read_prediction(handle, solution, i)
        handle.read_logits(i)
    except (FileNotFoundError, BlockCorruptError):
        return False
    return True
