"""What a spectrum is of: a sum of train kernels, seen through some combinations of its outputs.

Softmax does not see what all logits share. With the contrast basis Q (c, c - 1), an orthonormal
basis of the logits that sum to 0,

    K_contrast[i, a, j, b] = Σ_{a', b'} Q[a', a] K[i, a', j, b'] Q[b', b]

is the kernel of what a softmax classifier can change; of c = 2 it is the kernel of the margin
(f_1 - f_0) / √2. The gradient of cross-entropy in the logits has no part along the direction left
out, so the condition number of all nc outputs counts n directions that do not matter. By the
Rayleigh quotient the condition number of Qᵀ K Q is at most that of K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

import numpy as np
import scipy.linalg
from jaxtyping import Float

from raykernel.analysis.gram import (
    REMEDY,
    ROUNDINGS,
    Gram,
    decompose,
    excused_noise,
    flatten,
    largest_gap,
    noise,
)
from raykernel.errors import InputError


class Outputs(Enum):
    """Which combinations of a model's outputs a spectrum is of."""

    full = "full"
    """Every output: nc rows."""
    contrast = "contrast"
    """All that softmax sees, the logits without what they share: n(c - 1) rows."""
    trace = "trace"
    """(1/c) Σ_a K[i, a, j, a]: n rows."""
    pseudo = "pseudo"
    """The sum of all logits over √c, Mohamadi et al. 2023's pseudo-NTK: n rows. Of a trained
    softmax head it can vanish."""


def total(
    kernel: Float[np.ndarray, "n1 c1 n2 c2"] | Sequence[Float[np.ndarray, "n1 c1 n2 c2"]],
    resolution: float | None,
) -> tuple[Float[np.ndarray, "n c n c"], float]:
    """Sum of kernels in float64, and its resolution.

    Rounding entries of positive semidefinite blocks to a relative ε/2 moves their sum K by at most
    ε/2 · tr K ≤ ε/2 · nc ||K||_op, since Σ_l |K_l[p, q]| ≤ (K[p, p] K[q, q])^½ by Cauchy-Schwarz:
    the resolution of one block, nc · ε, is that of any sum of them.

    Args:
        kernel: one, or several.
        resolution: a known one.

    Returns:
        The sum and the resolution.

    Raises:
        InputError: if they are not alike, square, symmetric and finite.
    """
    blocks = [kernel] if isinstance(kernel, np.ndarray) else list(kernel)
    shapes = {block.shape for block in blocks}
    if len(shapes) != 1 or blocks[0].ndim != 4 or 0 in blocks[0].shape:
        raise InputError(
            f"Found kernels of shapes {sorted(shapes)}, expected one shape (n, c, n, c) and at "
            "least one kernel."
        )
    n, c = blocks[0].shape[:2]
    matrix = sum((flatten(block, np.zeros((n, c))) for block in blocks), np.zeros(()))
    relative = max(noise(block, resolution) for block in blocks)
    gap, norm = float(np.linalg.norm(matrix - matrix.T)), float(np.linalg.norm(matrix))
    excused = max(excused_noise(block, resolution) for block in blocks)
    if gap > 2 * ROUNDINGS * excused * norm:
        raise InputError(
            f"The train kernel differs from its transpose by {gap:.3g} of norm {norm:.3g}, and "
            f"rounding explains {2 * ROUNDINGS * excused * norm:.3g}: expected a symmetric kernel. "
            "asigngd has singular values but no spectrum; take sgd or signgd. "
            f"{largest_gap(matrix, c)} {REMEDY}"
        )
    return ((matrix + matrix.T) / 2).reshape(n, c, n, c), relative


def choose_outputs(outputs: Outputs | None, c: int) -> Outputs:
    """The outputs asked for, or the default.

    Args:
        outputs: None: contrast, and full of a single output.
        c: number of outputs.

    Returns:
        Which outputs.

    Raises:
        InputError: if contrasts of a single output are asked for.
    """
    if outputs is Outputs.contrast and c == 1:
        raise InputError("outputs: found contrast of a single output, expected full.")
    return outputs or (Outputs.full if c == 1 else Outputs.contrast)


def project(
    kernel: Float[np.ndarray, "n c n c"],
    resolution: float,
    *,
    outputs: Outputs,
    centred: bool,
    floor: float = 0.0,
) -> tuple[Gram, float]:
    """Eigenbasis of Qᵀ K Q, whose noise is that of K.

    Args:
        kernel: the kernel K, symmetric.
        resolution: of K.
        outputs: which outputs.
        centred: whether to take the mean over examples off.
        floor: an eigenvalue that is known to be noise, where that is more.

    Returns:
        The eigenbasis, and how far noise reaches.

    Raises:
        InputError: if a single example is to be centred.
    """
    n, c = kernel.shape[:2]
    if centred and n == 1:
        raise InputError("centred: found one example, expected at least two.")
    flat = kernel.reshape(n * c, n * c)
    # Not scipy.linalg with subset_by_index: it fails on some multiples of the identity.
    scale = float(np.linalg.eigvalsh(flat)[-1])
    kernel = combined(kernel, outputs)
    if centred:
        kernel = _both_sides(kernel, scipy.linalg.helmert(n).T, axis=0)
    reached = max(resolution * scale, floor)
    gram = decompose(kernel, np.zeros(kernel.shape[:2]), resolution, reached)
    reached = noise_end(gram.eigenvalues, resolution, reached)
    return replace(gram, kept=gram.eigenvalues > reached), reached


def noise_end(eigenvalues: Float[np.ndarray, " m"], resolution: float, floor: float) -> float:
    """How far noise reaches among the eigenvalues of Qᵀ K Q.

    Args:
        eigenvalues: ascending.
        resolution: of K.
        floor: an eigenvalue that is known to be noise, such as resolution · ||K||_op.

    Returns:
        The largest eigenvalue that may be noise.
    """
    # A Gram matrix has no eigenvalue below zero: one that has is off by at least as much.
    return max(floor, resolution * float(eigenvalues[-1]), -float(eigenvalues[0]))


def combined(
    kernel: Float[np.ndarray, "n c n c"], outputs: Outputs
) -> Float[np.ndarray, "n c2 n c2"]:
    """Qᵀ K Q of chosen outputs.

    Args:
        kernel: the kernel K.
        outputs: which outputs.

    Returns:
        Its kernel of these combinations.
    """
    c = kernel.shape[1]
    if outputs is Outputs.contrast:
        return _both_sides(kernel, contrast_basis(c), axis=1)
    if outputs is Outputs.pseudo:
        return _both_sides(kernel, np.full((c, 1), 1 / math.sqrt(c)), axis=1)
    if outputs is Outputs.trace:
        traced: np.ndarray = np.einsum("iaja->ij", kernel)[:, None, :, None] / c
        return traced
    return kernel


def contrast_basis(c: int) -> Float[np.ndarray, "c c-1"]:
    """Q of contrasts: an orthonormal basis of the logits that sum to 0.

    Args:
        c: number of outputs, at least 2.

    Returns:
        A contrast a column.
    """
    basis: Float[np.ndarray, "c c-1"] = scipy.linalg.helmert(c).T
    return basis


def _both_sides(
    kernel: Float[np.ndarray, "n c n c"], basis: Float[np.ndarray, "all some"], axis: int
) -> Float[np.ndarray, "n2 c2 n2 c2"]:
    """Qᵀ K Q along the examples (axis 0) or the outputs (axis 1)."""
    one = np.moveaxis(np.tensordot(kernel, basis, axes=(axis, 0)), -1, axis)
    return np.moveaxis(np.tensordot(one, basis, axes=(axis + 2, 0)), -1, axis + 2)
