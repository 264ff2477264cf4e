"""K(train, train) as the matrix that every solver starts from: checked, flat, in its eigenbasis.

A kernel (n, c, n, c) is example-major and becomes a matrix of nc scalar samples (Malladi et al.
2023, appendix A.3).

What rounding can do to it. Products of gradients come with errors |E[p, q]| ≤ γ |g_p| |g_q|, those
of a matrix product (Higham 2002, section 3.5) and of rounding its entries to be stored. Thus

    ‖E‖_F ≤ γ Σ_p |g_p|² = γ tr K ≤ γ nc ‖K‖_op,

and no eigenvalue moves by more (Weyl's inequality; Horn & Johnson 2013, theorem 4.3.1), nor is the
antisymmetric part larger: with γ the machine epsilon of what is stored, `noise`. Where a kernel is
off by `ROUNDINGS` times that, no rounding did it, and nothing that is made of it is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float

from raykernel.errors import InputError, NotPositiveSemidefiniteError

ROUNDINGS = 10.0
"""Units of noise that are still taken for it: sums of float32 products are off by up to eight."""
REMEDY = (
    "Check that rows and columns are the same examples in the same order. If they are, a block was "
    "changed after it was computed: delete the kernel's folder in the store and compute it again."
)
"""What to do about a kernel that is none."""
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
        NotPositiveSemidefiniteError: if the kernel is not symmetric, or has eigenvalues below zero,
            beyond rounding.
    """
    kernel = flatten(k_train_train, targets)
    eigenvalues, vectors = scipy.linalg.eigh((kernel + kernel.T) / 2)
    top, outputs = max(float(eigenvalues[-1]), 0.0), targets.shape[1]
    reached = max(noise(k_train_train, resolution) * top, floor)
    excused = max(excused_noise(k_train_train, resolution) * top, floor)
    check_symmetric(kernel, excused, outputs)
    check_semidefinite(eigenvalues, excused, vectors, outputs)
    return Gram(eigenvalues, vectors, eigenvalues > reached)


def check_symmetric(kernel: Float[np.ndarray, "m m"], floor: float, outputs: int) -> None:
    """Refuse a matrix that is further from its transpose than rounding takes it.

    Args:
        kernel: the matrix, example-major.
        floor: an eigenvalue that is known to be noise.
        outputs: c, which says whose rows are whose.

    Raises:
        NotPositiveSemidefiniteError: if it is.
    """
    size = float(np.linalg.norm(kernel - kernel.T)) / 2
    if size <= max(ROUNDINGS * floor, np.finfo(np.float64).tiny):
        return
    raise NotPositiveSemidefiniteError(
        f"The train kernel differs from its transpose: its antisymmetric part has norm {size:.3g}, "
        f"expected at most {ROUNDINGS * floor:.3g}, what rounding explains. "
        f"{largest_gap(kernel, outputs)} {REMEDY}"
    )


def largest_gap(kernel: Float[np.ndarray, "m m"], outputs: int) -> str:
    """A sentence on where a matrix differs most from its transpose.

    Args:
        kernel: the matrix, example-major.
        outputs: c, which says whose rows are whose.

    Returns:
        The sentence.
    """
    gap = np.abs(kernel - kernel.T)
    one, other = (int(place) for place in np.unravel_index(gap.argmax(), gap.shape))
    return (
        f"It differs most between train examples {one // outputs} and {other // outputs}: "
        f"{kernel[one, other]:.6g} against {kernel[other, one]:.6g}."
    )


def check_semidefinite(
    eigenvalues: Float[np.ndarray, " m"],
    floor: float,
    vectors: Float[np.ndarray, "m m"] | None = None,
    outputs: int = 1,
) -> None:
    """Refuse eigenvalues that no Gram matrix has.

    Args:
        eigenvalues: ascending.
        floor: an eigenvalue that is known to be noise.
        vectors: eigenvectors, one a column, to name the example that has most of the lowest.
        outputs: c, which says whose rows are whose.

    Raises:
        NotPositiveSemidefiniteError: if one is further below zero than rounding takes it.
    """
    allowed = max(ROUNDINGS * floor, np.finfo(np.float64).tiny)
    if eigenvalues[0] >= -allowed:
        return
    most = ""
    if vectors is not None:
        weights = (vectors[:, 0] ** 2).reshape(-1, outputs).sum(1)
        most = f" Train example {int(weights.argmax())} has most of it."
    raise NotPositiveSemidefiniteError(
        f"The train kernel has eigenvalue {eigenvalues[0]:.3g} beside the largest "
        f"{float(eigenvalues[-1]):.3g}; a kernel of gradients has none below zero, and rounding "
        f"explains {-allowed:.3g}.{most} {REMEDY}"
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
        broken = ~np.isfinite(k_train_train).all(axis=(1, 2, 3)) | ~np.isfinite(targets).all(axis=1)
        raise InputError(
            "The train kernel or the targets hold NaN or infinite values, expected finite ones: "
            f"the first of train example {int(broken.argmax())}. Compute the kernel again, with "
            "kernel.precision=float64 if sums overflow."
        )
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


def excused_noise(k_train_train: Float[np.ndarray, "n c n c"], resolution: float | None) -> float:
    """The same for a check: float64 may hold sums of float32, as those of a store do.

    Args:
        k_train_train: the kernel.
        resolution: a known one.

    Returns:
        Size, relative to the largest, of an eigenvalue that may be noise.
    """
    single = int(k_train_train[0, 0].size) * float(np.finfo(np.float32).eps)
    return max(noise(k_train_train, resolution), single)
