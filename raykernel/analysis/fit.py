"""One grid point of any solver, solved: what predicts, and what is needed to trust it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from raykernel.analysis.targets import scaled_logits
from raykernel.config import GridPoint
from raykernel.errors import InputError


@dataclass(frozen=True, slots=True)
class Fit:
    """Kernel regression at one point of its solver's grid.

    h(x) = K(x, train) alpha + K(train, x)ᵀ alpha_flipped + f0(x) / s
    """

    point: GridPoint
    alpha: Float[np.ndarray, "n c"]
    """Coefficients of K(x, train)."""
    condition_number: float
    """Of the system that was solved."""
    residual: float
    """How far the solution is from satisfying it, relative to its right-hand side."""
    alpha_flipped: Float[np.ndarray, "n c"] | None = None
    """Coefficients of the kernel seen from train, K(train, x); None if it does not enter."""
    iterations: int = 0
    """0 of a solver that needs none."""
    num_dropped: int = 0
    """Directions below the kernel's resolution."""
    excluded: str = ""
    """Why this point must not be used; empty if it may."""

    def predict(
        self,
        k: Float[np.ndarray, "m c n c"],
        f0: Float[np.ndarray, "m c"] | None = None,
        k_flipped: Float[np.ndarray, "m c n c"] | None = None,
    ) -> Float[np.ndarray, "m c"]:
        """Predicted outputs.

        Args:
            k: K(x, train).
            f0: initial logits; needed unless the point leaves them out.
            k_flipped: K(train, x), x first; needed where it enters.

        Returns:
            h(x).

        Raises:
            InputError: if logits or the flipped kernel are needed and missing.
        """
        fitted = np.tensordot(k, self.alpha, axes=2)
        if self.alpha_flipped is not None:
            fitted = fitted + np.tensordot(required_flipped(k_flipped), self.alpha_flipped, axes=2)
        outputs: np.ndarray = fitted + scaled_logits(f0, [self.point.f0_scaling])[0]
        return outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class DualSolution:
    """Dual coefficients of every point of a grid of scalings and ridges.

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
    num_dropped: int
    """Eigenvalues at or below the kernel's resolution: directions that are left out."""

    def predict(
        self, k_eval_train: Float[np.ndarray, "m c n c"], f0: Float[np.ndarray, "m c"] | None = None
    ) -> Float[np.ndarray, "s r m c"]:
        """Predicted outputs at every grid point.

        Args:
            k_eval_train: kernel of the evaluation examples (rows) with the train examples.
            f0: initial logits of the evaluation examples; needed unless every scaling is inf.

        Returns:
            h(x), grid axes first; of logistic regression logits, whose softmax are probabilities.

        Raises:
            InputError: if initial logits are needed and missing.
        """
        offset = scaled_logits(f0, self.f0_scaling)[:, None]
        outputs: np.ndarray = grid_products(k_eval_train, self.alpha) + offset
        return outputs


def grid_products(
    k: Float[np.ndarray, "m c n c"], alpha: Float[np.ndarray, "*grid n c"]
) -> Float[np.ndarray, "*grid m c"]:
    """K(x, train) α of every grid point, in one product."""
    m, c = k.shape[:2]
    flat = alpha.reshape(-1, k[0, 0].size) @ k.reshape(m * c, -1).T
    products: Float[np.ndarray, "*grid m c"] = flat.reshape(*alpha.shape[:-2], m, c)
    return products


def required_flipped(
    k_flipped: Float[np.ndarray, "m c n c"] | None,
) -> Float[np.ndarray, "m c n c"]:
    """K(train, x) where it enters a prediction.

    Args:
        k_flipped: as it was given.

    Returns:
        The same.

    Raises:
        InputError: if it was not given.
    """
    if k_flipped is None:
        raise InputError(
            "c < 1 needs the kernel K(train, x) beside K(x, train); it was not given. "
            "Give it (kind asigngd_flipped of a store), or solve with c = 1."
        )
    return k_flipped
