"""Random kernel regression problems with explicit features: K = J Jᵀ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Problem:
    j_train: np.ndarray
    j_eval: np.ndarray
    labels: np.ndarray
    f0: np.ndarray
    f0_eval: np.ndarray

    @property
    def k_tt(self) -> np.ndarray:
        return np.einsum("iap,jbp->iajb", self.j_train, self.j_train)

    @property
    def k_et(self) -> np.ndarray:
        return np.einsum("iap,jbp->iajb", self.j_eval, self.j_train)

    @property
    def asymmetric(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """K(train, train), K(x, train), and K(train, x) with x in rows: signs of the second."""
        signs = np.sign(self.j_train)
        return (
            np.einsum("iap,jbp->iajb", self.j_train, signs),
            np.einsum("iap,jbp->iajb", self.j_eval, signs),
            np.einsum("iap,jbp->iajb", np.sign(self.j_eval), self.j_train),
        )


def draw(n: int = 8, m: int = 7, c: int = 2, p: int = 40, seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    j_train, j_eval = rng.normal(size=(n, c, p)), rng.normal(size=(m, c, p))
    labels = rng.integers(0, c, n)
    return Problem(j_train, j_eval, labels, rng.normal(size=(n, c)), rng.normal(size=(m, c)))
