"""Kernel ridge regression over a whole grid from one eigendecomposition.

Legend: n train examples, m evaluation examples, c outputs, s scalings of the initial logits,
r ridges. A kernel has shape (n, c, m, c), example-major; flattened it is (nc, mc). Targets are
one-hot and treated as one scalar regression with nc samples, as in Malladi et al. 2023,
appendix A.3 and their released solver; the ridge is relative to the operator norm of K(train,
train) (Table 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from raykernel.analysis.fit import DualSolution, Fit
from raykernel.analysis.gram import decompose
from raykernel.analysis.targets import scaled_logits
from raykernel.config import GridPoint
from raykernel.terms import Solver


@dataclass(frozen=True, slots=True, kw_only=True)
class RidgeSolution(DualSolution):
    """Kernel ridge regression, by the pseudo-inverse at ridge 0, and what is needed to trust it."""

    residual: Float[np.ndarray, "s r"]
    """||(K + σI) α - (y - f0/s)|| / ||y - f0/s||; above 0 only where directions were dropped."""
    condition_number: Float[np.ndarray, " r"]
    """(λ_max + σ) / (λ_min + σ) over the kept directions."""

    def fits(self) -> Iterator[Fit]:
        """Every grid point, scaling before ridge."""
        for s, r in np.ndindex(self.alpha.shape[:2]):
            yield Fit(
                GridPoint(Solver.ridge, self.ridge[r], self.f0_scaling[s]),
                self.alpha[s, r],
                condition_number=float(self.condition_number[r]),
                residual=float(self.residual[s, r]),
                num_dropped=self.num_dropped,
            )


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
    gram = decompose(k_train_train, targets, resolution)
    rhs = (targets - scaled_logits(f0, f0_scaling)).reshape(len(f0_scaling), n * c)
    rotated = rhs @ gram.vectors
    sigma = np.asarray(ridge, dtype=np.float64) * gram.top
    shifted = np.clip(gram.eigenvalues, 0.0, None)[None, :] + sigma[:, None]
    usable = gram.kept[None, :] | (sigma[:, None] > 0)
    inverse = np.divide(1.0, shifted, out=np.zeros_like(shifted), where=usable & (shifted > 0))
    alpha = (rotated[:, None, :] * inverse[None]) @ gram.vectors.T
    missed = np.linalg.norm(rotated[:, None, :] * (inverse == 0)[None], axis=-1)
    size = np.linalg.norm(rotated, axis=-1)[:, None]
    smallest = np.where(usable, shifted, np.inf).min(axis=1)
    return RidgeSolution(
        ridge=tuple(ridge),
        f0_scaling=tuple(f0_scaling),
        alpha=alpha.reshape(len(f0_scaling), len(sigma), n, c),
        eigenvalues=gram.eigenvalues,
        residual=np.divide(missed, size, out=np.zeros_like(missed), where=size > 0),
        condition_number=(gram.top + sigma) / np.where(np.isfinite(smallest), smallest, np.nan),
        num_dropped=gram.num_dropped,
    )
