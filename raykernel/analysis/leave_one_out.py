"""Leave-one-out errors of kernel ridge regression, without a second fit.

    e_i = [(K_σ⁻¹)_ii]⁻¹ (K_σ⁻¹ r)_i,    K_σ = K + σI,  r = y - f_0

is what example i has left of its target once it is predicted from all others. Proof: with
α = K_σ⁻¹ r, example i's rows of K_σ α = r, solved for the others by a block inverse, say that
r_i - K_i,-i (K_σ,-i)⁻¹ r_-i is the Schur complement [(K_σ⁻¹)_ii]⁻¹ times α_i. An example leaves
with all of its outputs, so (·)_ii is a block of c × c; of one output it is a number (Allen 1974;
Rifkin & Lippert 2007).

Condition numbers know no labels; this does. It estimates without bias how kernel regression on
n - 1 examples predicts another one, where neither f_0 nor the kernel has seen the label left out:
not of a linear probe on train. Of fine-tuning it says as much as the kernel does.

Legend: n train examples, c outputs, m = nc rows, or n(c - 1) of contrasts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from raykernel.analysis.gram import Gram
from raykernel.analysis.outputs import Outputs, choose_outputs, contrast_basis, project, total
from raykernel.errors import InputError


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """Every train example predicted by kernel ridge regression on all others."""

    targets: Float[np.ndarray, "n c"]
    predictions: Float[np.ndarray, "n c"]
    """f_0(x_i) + K_i,-i (K_σ,-i)⁻¹ r_-i."""
    residuals: Float[np.ndarray, "n c"]
    """e_i: what the chosen outputs have left of target minus prediction."""

    @property
    def error(self) -> float:
        """Mean over examples of ‖e_i‖²."""
        return float((self.residuals**2).sum(axis=1).mean())

    @property
    def accuracy(self) -> float:
        """Share of examples with the largest prediction at the largest target; NaN of c = 1."""
        if self.targets.shape[1] == 1:
            return math.nan
        return float((self.predictions.argmax(axis=1) == self.targets.argmax(axis=1)).mean())


def leave_one_out(
    kernel: Float[np.ndarray, "n1 c1 n2 c2"] | Sequence[Float[np.ndarray, "n1 c1 n2 c2"]],
    targets: Float[np.ndarray, "n c"],
    *,
    sigma: float,
    f0: Float[np.ndarray, "n0 c0"] | None = None,
    outputs: Outputs | None = None,
    resolution: float | None = None,
    floor: float = 0.0,
) -> LeaveOneOut:
    """Exact leave-one-out residuals of kernel ridge regression, in float64; O((nc)³).

        e_i = [(K_σ⁻¹)_ii]⁻¹ (K_σ⁻¹ r)_i,    K_σ = Qᵀ K Q + σI,  r = Qᵀ (y - f_0)

    Q are the outputs that a spectrum is of (`outputs`): of contrasts, what all logits share is
    neither fitted nor counted as error, and predictions keep that of f_0. Residuals are those in
    coordinates of Q, put back among the c outputs, which changes no norm.

    The ridge is absolute, and the same with an example less. As in `solve_ridge`, eigenvalues that
    are rounding noise count as they were found beside a ridge, those below 0 as 0.
    Reference: Rifkin & Lippert 2007, Notes on Regularized Least Squares; Allen 1974.

    Args:
        kernel: K(train, train), symmetric positive semidefinite, or such kernels to sum.
        targets: what f should be, one-hot for classification.
        sigma: the ridge σ.
        f0: initial logits of the train examples; None: zero.
        outputs: contrast or full; default contrast, and full of a single output.
        resolution: relative size of an eigenvalue that is rounding noise; default nc times the
            machine epsilon of the kernel's dtype.
        floor: an eigenvalue that is known to be noise, where that is more.

    Returns:
        Residuals and predictions.

    Raises:
        InputError: if shapes disagree, a value is not finite, the kernel is not symmetric, the
            ridge is negative, K_σ is singular, or other outputs are asked for.
        NotPositiveSemidefiniteError: if the kernel has eigenvalues far below zero.
    """
    whole, relative = total(kernel, resolution)
    n, c = whole.shape[:2]
    start = np.zeros((n, c)) if f0 is None else _checked("f0", f0, (n, c))
    _checked("targets", targets, (n, c))
    if not 0 <= sigma < math.inf:
        raise InputError(f"sigma: found {sigma}, expected a number ≥ 0.")
    chosen = choose_outputs(outputs, c)
    if chosen not in (Outputs.contrast, Outputs.full):
        raise InputError(
            f"outputs: found {chosen.value}, expected contrast or full: labels have no others."
        )
    basis = contrast_basis(c) if chosen is Outputs.contrast else np.eye(c)
    gram, _ = project(whole, relative, outputs=chosen, centred=False, floor=floor)
    return leave_each_out(gram, targets, f0=start, basis=basis, sigma=sigma)


def leave_each_out(
    gram: Gram,
    targets: Float[np.ndarray, "n c"],
    *,
    f0: Float[np.ndarray, "n c"],
    basis: Float[np.ndarray, "c c2"],
    sigma: float,
) -> LeaveOneOut:
    """The same of a kernel whose eigenbasis is known.

    Args:
        gram: of Qᵀ K Q.
        targets: what f should be.
        f0: initial logits.
        basis: Q, an output a column.
        sigma: the ridge σ.

    Returns:
        Residuals and predictions.

    Raises:
        InputError: if K_σ is singular.
    """
    missing = (targets - f0) @ basis
    left = _residuals(gram, missing, sigma) @ basis.T
    return LeaveOneOut(targets, f0 + missing @ basis.T - left, left)


def _residuals(
    gram: Gram, missing: Float[np.ndarray, "n c"], sigma: float
) -> Float[np.ndarray, "n c"]:
    """Residuals e, from the eigenbasis V of K: K_σ⁻¹ = V (l + σ)⁻¹ Vᵀ."""
    n, c = missing.shape
    known = np.where(gram.kept, gram.eigenvalues, 0.0) + sigma
    smallest, largest = float(known.min()), gram.top + sigma
    if smallest <= known.size * np.finfo(np.float64).eps * largest:
        raise InputError(
            f"K + σI is singular: {gram.num_dropped} of {known.size} eigenvalues of K are rounding "
            f"noise, and σ is {sigma:g} beside the largest, {gram.top:.3g}. Expected a positive "
            "definite matrix: take a larger ridge."
        )
    inverse = 1 / (np.clip(gram.eigenvalues, 0.0, None) + sigma)
    alpha = (gram.vectors * inverse) @ (gram.vectors.T @ missing.ravel())
    rows = gram.vectors.reshape(n, c, n * c)
    diagonal = (rows * inverse) @ rows.transpose(0, 2, 1)  # (K_σ⁻¹)_ii, (n, c, c)
    solved: Float[np.ndarray, "n c"] = np.linalg.solve(diagonal, alpha.reshape(n, c, 1))[..., 0]
    return solved


def _checked(
    name: str, values: Float[np.ndarray, ...], shape: tuple[int, int]
) -> Float[np.ndarray, "n c"]:
    if values.shape != shape:
        raise InputError(
            f"{name}: found shape {values.shape}, expected {shape}: a row for every train example "
            "of the kernel, a column for every output."
        )
    if not np.isfinite(values).all():
        raise InputError(f"{name}: found NaN or infinite values, expected finite ones.")
    return values
