"""Examples that a kernel cannot tell apart: each such pair makes its smallest eigenvalue zero.

With features φ_i = J(x_i), of chosen outputs (outputs.py),

    ||φ_i - φ_j||² = tr K_ii + tr K_jj - 2 tr K_ij,    K_ij (c, c) the block of two examples.

A condition number knows nothing else of such a kernel, however well the others are conditioned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from raykernel.analysis.outputs import Outputs, choose_outputs, combined, total
from raykernel.errors import InputError

ROUNDING = 16
"""||φ_i - φ_j||² of equal features is at most so many units of rounding of ||φ_i||²."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Two examples with the same features."""

    first: int
    """Index of the one."""
    second: int
    """Index of the other, which is larger."""
    distance: float
    """||φ_i - φ_j||² over the larger of their squared norms; ≤ 0 by rounding only."""


def duplicates(
    kernel: Float[np.ndarray, "n c n c"],
    *,
    outputs: Outputs | None = None,
    tolerance: float = 1e-6,
    rounding: float | None = None,
) -> list[Duplicates]:
    """Pairs of examples whose features are equal, up to a tolerance and to rounding.

    Args:
        kernel: K(train, train), symmetric.
        outputs: which combinations; default contrast, and full of a single output.
        tolerance: squared distance, relative to the larger squared norm, that is none.
        rounding: relative rounding error of an entry; default the machine epsilon of the
            kernel's dtype. Give it for a float64 array that was summed from float32 blocks.

    Returns:
        The pairs, by index. Two examples without any feature are no pair.

    Raises:
        InputError: if the tolerance is negative, or the kernel as in `spectrum`.
    """
    if not tolerance >= 0:
        raise InputError(f"tolerance: found {tolerance}, expected a number ≥ 0.")
    whole, _ = total(kernel, 0.0)
    seen = combined(whole, choose_outputs(outputs, whole.shape[1]))
    inner = np.einsum("iaja->ij", seen)
    norms = np.diagonal(inner)
    largest = np.maximum(norms[:, None], norms)
    apart = norms[:, None] + norms - 2 * inner
    distance = np.divide(apart, largest, out=np.full_like(apart, np.inf), where=largest > 0)
    epsilon = float(np.finfo(kernel.dtype).eps) if rounding is None else rounding
    found = np.argwhere(np.triu(distance <= max(tolerance, ROUNDING * epsilon), k=1))
    return [Duplicates(i, j, float(distance[i, j])) for i, j in found.tolist()]
