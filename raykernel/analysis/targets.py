"""What outputs are fitted to: labels as numbers, and the part that the initial logits have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from raykernel.errors import InputError


def one_hot(labels: Int[np.ndarray, " n"], num_labels: int) -> Float[np.ndarray, "n c"]:
    """Targets 1 at the label and 0 elsewhere, not centred (Malladi et al. 2023, appendix A.3)."""
    targets: Float[np.ndarray, "n c"] = np.eye(num_labels)[labels]
    return targets


def plus_minus(labels: Int[np.ndarray, " n"], num_labels: int) -> Float[np.ndarray, "n c"]:
    """Targets +1 at the label and -1 elsewhere: one binary problem per output."""
    return 2 * one_hot(labels, num_labels) - 1


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
