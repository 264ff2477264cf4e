"""Kernel regression with an asymmetric kernel: one SVD for every γ.

Legend: n train examples, c outputs, s scalings of the initial logits, r ridges, g values of γ, o
mixtures of the two discriminants; N = nc scalar samples, example-major as in Malladi et al. 2023,
appendix A.3: every output of every example is a binary problem of its own, y = +1 for the right
class and -1 for the others, and all of them are one system.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float

from raykernel.analysis.fit import Fit, grid_products, required_flipped
from raykernel.analysis.gram import flatten, noise
from raykernel.analysis.targets import scaled_logits
from raykernel.config import GridPoint
from raykernel.errors import InputError
from raykernel.terms import Solver


@dataclass(frozen=True, slots=True)
class AsymmetricSolution:
    """Both sets of coefficients of every grid point, with what is needed to trust them.

    Discriminants at grid point (s, r, g), and the prediction that c mixes of them:

        f_s(x) = K(x, train) β[s, r, g]        f_t(x) = K(train, x)ᵀ α[s, r, g]
        h(x) = c f_s(x) + (1 - c) f_t(x) + f0(x) / s

    α and β contain the coding: they are α* ⊙ Y and β* ⊙ Y of the paper.
    """

    ridge: tuple[float, ...]
    """Relative ridges, the grid's second axis."""
    f0_scaling: tuple[float, ...]
    """Divisors of the initial logits, the grid's first axis; inf leaves them out."""
    gamma: tuple[float, ...]
    """Weights of the squared errors, the grid's third axis."""
    c: tuple[float, ...]
    """Shares of f_s in the prediction, the grid's last axis."""
    alpha: Float[np.ndarray, "s r g n c"]
    """Coefficients of K(train, x); NaN at singular points."""
    beta: Float[np.ndarray, "s r g n c"]
    """Coefficients of K(x, train); NaN at singular points."""
    singular_values: Float[np.ndarray, "r N"]
    """Of K + σI, descending."""
    residual: Float[np.ndarray, "s r g"]
    """||system · (α, β) - right-hand side|| / ||right-hand side||, of rounding alone."""
    condition_number: Float[np.ndarray, "r g"]
    """(1/γ + σ_1) / min_i |1/γ - σ_i|: the system has the eigenvalues 1/γ ± σ_i."""
    singular: Bool[np.ndarray, "r g"]
    """Where 1/γ is a singular value within the kernel's resolution."""
    resolution: float
    """Singular values are known to this part of 1/γ + σ_1."""

    def fits(self) -> Iterator[Fit]:
        """Every grid point, scaling before ridge before γ before c; singular ones excluded."""
        for s, r, g in np.ndindex(self.beta.shape[:3]):
            reason = self._singularity(r, g) if self.singular[r, g] else ""
            for c in self.c:
                yield Fit(
                    GridPoint(
                        Solver.asymmetric, self.ridge[r], self.f0_scaling[s], self.gamma[g], c
                    ),
                    c * self.beta[s, r, g],
                    alpha_flipped=None if c == 1 else (1 - c) * self.alpha[s, r, g],
                    condition_number=float(self.condition_number[r, g]),
                    residual=float(self.residual[s, r, g]),
                    excluded=reason,
                )

    def predict(
        self,
        k_eval_train: Float[np.ndarray, "m c n c"],
        f0: Float[np.ndarray, "m c"] | None = None,
        k_flipped: Float[np.ndarray, "m c n c"] | None = None,
    ) -> Float[np.ndarray, "s r g o m c"]:
        """Predicted outputs at every grid point.

        Args:
            k_eval_train: K(x, train), evaluation examples in rows.
            f0: their initial logits; needed unless every scaling is inf.
            k_flipped: K(train, x), evaluation examples in rows as well; needed unless every c is 1.

        Returns:
            h(x), grid axes first, NaN at singular points.

        Raises:
            InputError: if logits or the flipped kernel are needed and missing.
        """
        share = np.asarray(self.c)[:, None, None]
        outputs = share * grid_products(k_eval_train, self.beta)[:, :, :, None]
        if any(c != 1 for c in self.c):
            flipped = grid_products(required_flipped(k_flipped), self.alpha)
            outputs = outputs + (1 - share) * flipped[:, :, :, None]
        outputs = outputs + scaled_logits(f0, self.f0_scaling)[:, None, None, None]
        found: np.ndarray = outputs
        return found

    def _singularity(self, r: int, g: int) -> str:
        values, wanted = self.singular_values[r], 1 / self.gamma[g]
        nearest = values[np.abs(values - wanted).argmin()]
        return (
            f"1/gamma = {wanted:g} is a singular value of the kernel ({nearest:.6g}) as far as it "
            f"is resolved (to {self.resolution * (wanted + values[0]):.1e})"
        )


def solve_asymmetric(
    k_train_train: Float[np.ndarray, "n1 c1 n2 c2"],
    targets: Float[np.ndarray, "n c"],
    *,
    gamma: Sequence[float] = (1.0,),
    ridge: Sequence[float] = (0.0,),
    f0: Float[np.ndarray, "n c"] | None = None,
    f0_scaling: Sequence[float] = (float("inf"),),
    c: Sequence[float] = (1.0,),
    resolution: float | None = None,
) -> AsymmetricSolution:
    """Least squares with an asymmetric kernel, for a whole grid.

        [ I/γ   H  ] [α*]   [1 - y ⊙ f0/s]
        [ Hᵀ   I/γ ] [β*] = [1 - y ⊙ f0/s],    H_ij = y_i (K + σI)_ij y_j,    σ = ridge · ||K||_op

    K_ij = ⟨φ_s(x_i), φ_t(x_j)⟩ = K(x_i, x_j): rows are φ_s, here gradients, and columns φ_t, their
    signs. This is the stationary point of He et al.'s least squares, whose errors are
    e = 1 - y ⊙ f_s and 1 - y ⊙ f_t at the train examples.

    Several classes: y is +1 for the right class and -1 for the others, over all N = nc samples of
    one system. Codes {0, 1} would strike out every wrong class's row and column of H.

    Initial logits: the discriminant that should be y is f_s + f0/s, so that the errors are
    e = 1 - y ⊙ (f_s + f0/s), which leaves H as it is and changes the right-hand side. The code
    released with the paper puts y - f0/s in place of y instead, on both sides of H as well, where
    no error function leads; both are the same without initial logits. Right and wrong are 2 apart
    here and 1 in `solve_ridge`, so that the same s means half as much.

    Because y_i² = 1, the coding is a change of signs: with α = y ⊙ α*, β = y ⊙ β*, M = K + σI and
    t = y - f0/s the system is α/γ + M β = t, Mᵀ α + β/γ = t. With M = U S Vᵀ it falls into pairs,

        β = V (Vᵀt/γ - S Uᵀt) / (1/γ² - S²),    α = U (Uᵀt/γ - S Vᵀt) / (1/γ² - S²),

    so one SVD per ridge, O(N³), serves every γ, s and c. The system is indefinite, and singular
    where 1/γ is a singular value: such points have no solution (`singular`), and their
    neighbours a large condition number. For γ → ∞, M β = t.
    Reference: He et al. 2022, arXiv:2202.01397; Malladi et al. 2023, appendix A.3 and Table 4.

    Args:
        k_train_train: K(train, train), rows φ_s, columns φ_t.
        targets: ±1, see `plus_minus`.
        gamma: weights γ > 0 of the squared errors.
        ridge: relative ridges, each ≥ 0.
        f0: initial logits of the train examples; needed unless every scaling is inf.
        f0_scaling: divisors s of the initial logits, each > 0.
        c: shares of f_s in the prediction, 0 to 1. Of a kernel of fine-tuning only f_s predicts
            new examples (appendix A.3); a share below 1 needs the kernel of both orientations.
        resolution: relative size of a singular value that is rounding noise; default N times the
            machine epsilon of the kernel's dtype.

    Returns:
        Coefficients and diagnostics of every grid point.

    Raises:
        InputError: if targets are not ±1, a value is out of range or not finite, shapes disagree,
            or initial logits are missing.
    """
    _check(targets, gamma, c)
    kernel, eps = flatten(k_train_train, targets), noise(k_train_train, resolution)
    wanted = (targets - scaled_logits(f0, f0_scaling)).reshape(len(f0_scaling), targets.size)
    top = float(np.linalg.norm(kernel, 2))
    by_ridge = [
        _solve_all(kernel + value * top * np.eye(len(kernel)), wanted, gamma, eps)
        for value in ridge
    ]
    shape = (len(f0_scaling), len(ridge), len(gamma), *targets.shape)
    return AsymmetricSolution(
        ridge=tuple(ridge),
        f0_scaling=tuple(f0_scaling),
        gamma=tuple(gamma),
        c=tuple(c),
        alpha=np.stack([part.alpha for part in by_ridge], axis=1).reshape(shape),
        beta=np.stack([part.beta for part in by_ridge], axis=1).reshape(shape),
        singular_values=np.stack([part.singular_values for part in by_ridge]),
        residual=np.stack([part.residual for part in by_ridge], axis=1),
        condition_number=np.stack([part.condition_number for part in by_ridge]),
        singular=np.stack([part.singular for part in by_ridge]),
        resolution=eps,
    )


@dataclass(frozen=True, slots=True)
class _Solved:
    """Every γ and scaling of one ridge."""

    alpha: Float[np.ndarray, "s g N"]
    beta: Float[np.ndarray, "s g N"]
    singular_values: Float[np.ndarray, " N"]
    residual: Float[np.ndarray, "s g"]
    condition_number: Float[np.ndarray, " g"]
    singular: Bool[np.ndarray, " g"]


def _solve_all(
    m: Float[np.ndarray, "N N"],
    t: Float[np.ndarray, "s N"],
    gamma: Sequence[float],
    eps: float,
) -> _Solved:
    """α/γ + M β = t and Mᵀ α + β/γ = t by the SVD of M."""
    u, values, vt = scipy.linalg.svd(m)
    q = 1 / np.asarray(gamma, dtype=np.float64)[:, None]
    distance, scale = np.abs(q - values).min(axis=1), q[:, 0] + values[0]
    singular = distance <= eps * scale
    factor = (q - values) * (q + values)  # without the cancellation of q² - values²
    factor[singular] = np.nan
    left, right = (t @ u)[:, None], (t @ vt.T)[:, None]
    alpha = ((q * left - values * right) / factor) @ u.T
    beta = ((q * right - values * left) / factor) @ vt
    wrong = [q * alpha + beta @ m.T - t[:, None], alpha @ m + q * beta - t[:, None]]
    size = np.sqrt(2) * np.linalg.norm(t, axis=1)[:, None]
    missed = np.linalg.norm(np.concatenate(wrong, axis=-1), axis=-1)
    return _Solved(
        alpha,
        beta,
        singular_values=values,
        residual=np.divide(missed, size, out=np.zeros_like(missed), where=size > 0),
        condition_number=np.divide(
            scale, distance, out=np.full_like(scale, np.inf), where=distance > 0
        ),
        singular=singular,
    )


def _check(targets: Float[np.ndarray, "n c"], gamma: Sequence[float], c: Sequence[float]) -> None:
    if not (np.abs(targets) == 1).all():
        raise InputError(
            f"found targets {sorted(set(targets.ravel()))[:4]}, expected +1 for the right class "
            "and -1 for the others. Of one-hot targets y these are 2 y - 1."
        )
    if not all(0 < value < np.inf for value in gamma):
        raise InputError(f"gamma: found {list(gamma)}, expected values > 0.")
    if not all(0 <= value <= 1 for value in c):
        raise InputError(f"c: found {list(c)}, expected values from 0 to 1.")
