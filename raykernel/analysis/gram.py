"""K(train, train) as the matrix that every solver starts from: checked, flat, in its eigenbasis.

A kernel (n, c, n, c) is example-major and becomes a matrix of nc scalar samples (Malladi et al.
2023, appendix A.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float

from raykernel.errors import InputError, NotPositiveSemidefiniteError

NOT_PSD_TOLERANCE = 1e-3
"""λ_min below minus this part of λ_max is no rounding error: the matrix is not a Gram matrix."""
NOT_PSD_FLOORS = 10.0
"""Nor is it below minus this many times what is known to be noise."""
DEAD = 1e-10
"""A layer group below this part of the kernel has no gradient but rounding noise."""


@dataclass(frozen=True, slots=True)
class Gram:
    """A symmetric positive semidefinite K(train, train) in its eigenbasis."""

    eigenvalues: Float[np.ndarray, " nc"]
    """Ascending; rounding may leave some slightly below zero."""
    vectors: Float[np.ndarray, "nc nc"]
    """Eigenvectors, one a column."""
    kept: Bool[np.ndarray, " nc"]
    """Eigenvalues above the kernel's resolution; the others are rounding noise."""

    @property
    def top(self) -> float:
        """||K||_op, which ridges are relative to."""
        return max(float(self.eigenvalues[-1]), 0.0)

    @property
    def num_dropped(self) -> int:
        """Eigenvalues at or below the kernel's resolution."""
        return int((~self.kept).sum())


def decompose(
    k_train_train: Float[np.ndarray, "n1 c1 n2 c2"],
    targets: Float[np.ndarray, "n c"],
    resolution: float | None = None,
    floor: float = 0.0,
) -> Gram:
    """Eigendecomposition of a symmetric train kernel, in float64; O((nc)³).

    Args:
        k_train_train: the kernel.
        targets: what it is to fit; their shape says what the kernel's must be.
        resolution: see `noise`.
        floor: an eigenvalue that is known to be noise, where that is more: the projection of a
            kernel carries the rounding noise of the whole, which may be far above its own.

    Returns:
        Its eigenbasis.

    Raises:
        NotPositiveSemidefiniteError: if the kernel has eigenvalues far below zero.
    """
    kernel = flatten(k_train_train, targets)
    eigenvalues, vectors = scipy.linalg.eigh((kernel + kernel.T) / 2)
    check_semidefinite(eigenvalues, floor)
    top = max(float(eigenvalues[-1]), 0.0)
    reached = max(noise(k_train_train, resolution) * top, floor)
    return Gram(eigenvalues, vectors, eigenvalues > reached)


def check_semidefinite(eigenvalues: Float[np.ndarray, " m"], floor: float) -> None:
    """Refuse eigenvalues that no Gram matrix has.

    Args:
        eigenvalues: ascending.
        floor: an eigenvalue that is known to be noise.

    Raises:
        NotPositiveSemidefiniteError: if one is far below zero.
    """
    top = max(float(eigenvalues[-1]), 0.0)
    allowed = max(NOT_PSD_TOLERANCE * top, NOT_PSD_FLOORS * floor, np.finfo(np.float64).tiny)
    if eigenvalues[0] < -allowed:
        raise NotPositiveSemidefiniteError(
            f"The train kernel has eigenvalue {eigenvalues[0]:.3g} beside the largest "
            f"{top:.3g}; a kernel of gradients has none below zero. Check that rows and columns "
            "are the same examples in the same order."
        )


def flatten(
    k_train_train: Float[np.ndarray, "n1 c1 n2 c2"], targets: Float[np.ndarray, "n c"]
) -> Float[np.ndarray, "nc nc"]:
    """A train kernel as a matrix in float64.

    Args:
        k_train_train: the kernel.
        targets: what it is to fit.

    Returns:
        The matrix, example-major.

    Raises:
        InputError: if the shapes disagree or a value is not finite.
    """
    n, c = targets.shape
    if k_train_train.shape != (n, c, n, c):
        raise InputError(
            f"The train kernel has shape {k_train_train.shape}, expected {(n, c, n, c)} for "
            f"targets of shape {targets.shape}: rows and columns must be the train examples."
        )
    if not (np.isfinite(k_train_train).all() and np.isfinite(targets).all()):
        raise InputError("The train kernel or the targets hold NaN or infinite values.")
    return k_train_train.reshape(n * c, n * c).astype(np.float64)


def noise(k_train_train: Float[np.ndarray, "n c n c"], resolution: float | None) -> float:
    """Size, relative to the largest, of an eigenvalue or singular value that is rounding noise.

    Args:
        k_train_train: the kernel.
        resolution: a known one.

    Returns:
        It, or nc times the machine epsilon of the kernel's dtype.
    """
    if resolution is not None:
        return resolution
    dtype: np.dtype = k_train_train.dtype
    if dtype.kind != "f":
        dtype = np.dtype(np.float64)
    return int(k_train_train[0, 0].size) * float(np.finfo(dtype).eps)
