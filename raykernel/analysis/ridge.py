"""Kernel ridge regression over a whole grid from one eigendecomposition.

Legend: n train examples, m evaluation examples, c outputs, s scalings of the initial logits,
r ridges. A kernel has shape (n, c, m, c), example-major; flattened it is (nc, mc). Targets are
one-hot and treated as one scalar regression with nc samples, as in Malladi et al. 2023,
appendix A.3 and their released solver; the ridge is relative to the operator norm of K(train,
train) (Table 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int

from raykernel.errors import InputError, NotPositiveSemidefiniteError

NOT_PSD_TOLERANCE = 1e-3
"""λ_min below minus this part of λ_max is no rounding error: the matrix is not a Gram matrix."""


@dataclass(frozen=True, slots=True)
class RidgeSolution:
    """Dual coefficients of every grid point, with what is needed to trust them.

    Prediction at grid point (s, r):  h(x) = K(x, train) α[s, r] + f0(x) / s
    """

    ridge: tuple[float, ...]
    """Relative ridges, the grid's second axis."""
    f0_scaling: tuple[float, ...]
    """Divisors of the initial logits, the grid's first axis; inf leaves them out."""
    alpha: Float[np.ndarray, "s r n c"]
    """Dual coefficients."""
    eigenvalues: Float[np.ndarray, " nc"]
    """Eigenvalues of K(train, train), ascending."""
    residual: Float[np.ndarray, "s r"]
    """||(K + σI) α - (y - f0/s)|| / ||y - f0/s||; above 0 only where directions were dropped."""
    condition_number: Float[np.ndarray, " r"]
    """(λ_max + σ) / (λ_min + σ) over the kept directions."""
    num_dropped: int
    """Eigenvalues at or below the kernel's resolution: solved by the pseudo-inverse at ridge 0."""

    def at(self, s: int, r: int) -> RidgeSolution:
        """The solution of one grid point, as a grid of one."""
        return RidgeSolution(
            ridge=self.ridge[r : r + 1],
            f0_scaling=self.f0_scaling[s : s + 1],
            alpha=self.alpha[s : s + 1, r : r + 1],
            eigenvalues=self.eigenvalues,
            residual=self.residual[s : s + 1, r : r + 1],
            condition_number=self.condition_number[r : r + 1],
            num_dropped=self.num_dropped,
        )

    def predict(
        self, k_eval_train: Float[np.ndarray, "m c n c"], f0: Float[np.ndarray, "m c"] | None = None
    ) -> Float[np.ndarray, "s r m c"]:
        """Predicted outputs at every grid point.

        Args:
            k_eval_train: kernel of the evaluation examples (rows) with the train examples.
            f0: initial logits of the evaluation examples; needed unless every scaling is inf.

        Returns:
            h(x), grid axes first.

        Raises:
            InputError: if initial logits are needed and missing.
        """
        m, c = k_eval_train.shape[:2]
        flat = k_eval_train.reshape(m * c, -1) @ self.alpha.reshape(-1, k_eval_train[0, 0].size).T
        fitted = flat.T.reshape(*self.alpha.shape[:2], m, c)
        outputs: Float[np.ndarray, "s r m c"] = fitted + scaled_logits(f0, self.f0_scaling)[:, None]
        return outputs


def solve_ridge(
    k_train_train: Float[np.ndarray, "n1 c1 n2 c2"],
    targets: Float[np.ndarray, "n c"],
    *,
    ridge: Sequence[float] = (0.0,),
    f0: Float[np.ndarray, "n c"] | None = None,
    f0_scaling: Sequence[float] = (float("inf"),),
    resolution: float | None = None,
) -> RidgeSolution:
    """Kernel ridge regression for all ridges and scalings at once.

        α[s, r] = (K + σ_r I)⁺ (y - f0 / s),    σ_r = ridge_r · ||K||_op

    One symmetric eigendecomposition, O((nc)³), serves the whole grid; a grid point costs
    O((nc)²). Directions whose eigenvalue is at or below resolution · λ_max carry rounding noise
    only; at σ = 0 they are left out (minimum-norm solution).
    Reference: Malladi et al. 2023, appendix A.3 and Table 4.

    Args:
        k_train_train: symmetric positive semidefinite kernel.
        targets: what f should be, one-hot for classification.
        ridge: relative ridges, each ≥ 0.
        f0: initial logits of the train examples; needed unless every scaling is inf.
        f0_scaling: divisors s of the initial logits, each > 0.
        resolution: relative size of an eigenvalue that is rounding noise; default nc times the
            machine epsilon of the kernel's dtype.

    Returns:
        Coefficients and diagnostics of every grid point.

    Raises:
        InputError: if shapes disagree, a value is not finite, or initial logits are missing.
        NotPositiveSemidefiniteError: if the kernel has eigenvalues far below zero.
    """
    n, c = targets.shape
    if k_train_train.shape != (n, c, n, c):
        raise InputError(
            f"The train kernel has shape {k_train_train.shape}, expected {(n, c, n, c)} for "
            f"targets of shape {targets.shape}: rows and columns must be the train examples."
        )
    if not (np.isfinite(k_train_train).all() and np.isfinite(targets).all()):
        raise InputError("The train kernel or the targets hold NaN or infinite values.")
    kernel = k_train_train.reshape(n * c, n * c).astype(np.float64)
    eigenvalues, vectors = scipy.linalg.eigh((kernel + kernel.T) / 2)
    top = max(float(eigenvalues[-1]), 0.0)
    if eigenvalues[0] < -NOT_PSD_TOLERANCE * max(top, np.finfo(np.float64).tiny):
        raise NotPositiveSemidefiniteError(
            f"The train kernel has eigenvalue {eigenvalues[0]:.3g} beside the largest "
            f"{top:.3g}; a kernel of gradients has none below zero. Check that rows and columns "
            "are the same examples in the same order."
        )
    if resolution is None:
        dtype = k_train_train.dtype if k_train_train.dtype.kind == "f" else np.float64
        resolution = n * c * float(np.finfo(dtype).eps)
    kept = eigenvalues > resolution * top
    rhs = (targets - scaled_logits(f0, f0_scaling)).reshape(len(f0_scaling), n * c)
    rotated = rhs @ vectors
    sigma = np.asarray(ridge, dtype=np.float64) * top
    shifted = np.clip(eigenvalues, 0.0, None)[None, :] + sigma[:, None]
    usable = kept[None, :] | (sigma[:, None] > 0)
    inverse = np.divide(1.0, shifted, out=np.zeros_like(shifted), where=usable & (shifted > 0))
    alpha = (rotated[:, None, :] * inverse[None]) @ vectors.T
    missed = np.linalg.norm(rotated[:, None, :] * (inverse == 0)[None], axis=-1)
    size = np.linalg.norm(rotated, axis=-1)[:, None]
    smallest = np.where(usable, shifted, np.inf).min(axis=1)
    return RidgeSolution(
        ridge=tuple(ridge),
        f0_scaling=tuple(f0_scaling),
        alpha=alpha.reshape(len(f0_scaling), len(sigma), n, c),
        eigenvalues=eigenvalues,
        residual=np.divide(missed, size, out=np.zeros_like(missed), where=size > 0),
        condition_number=(top + sigma) / np.where(np.isfinite(smallest), smallest, np.nan),
        num_dropped=int((~kept).sum()),
    )


def scaled_logits(
    f0: Float[np.ndarray, "n c"] | None, f0_scaling: Sequence[float]
) -> Float[np.ndarray, "s n c"]:
    """The offset f0 / s of each scaling; zero for s = inf.

    Args:
        f0: initial logits.
        f0_scaling: divisors.

    Returns:
        One offset per scaling, broadcastable (s, 1, 1) where no logits enter.

    Raises:
        InputError: if a finite scaling has no logits to scale.
    """
    scalings = np.asarray(f0_scaling, dtype=np.float64)
    if f0 is None:
        if np.isfinite(scalings).any():
            raise InputError("A finite f0_scaling needs the initial logits f0; none were given.")
        return np.zeros((len(scalings), 1, 1))
    return np.stack([np.zeros_like(f0) if np.isinf(s) else f0 / s for s in scalings])


def one_hot(labels: Int[np.ndarray, " n"], num_labels: int) -> Float[np.ndarray, "n c"]:
    """Targets 1 at the label and 0 elsewhere, not centred (Malladi et al. 2023, appendix A.3)."""
    targets: Float[np.ndarray, "n c"] = np.eye(num_labels)[labels]
    return targets
