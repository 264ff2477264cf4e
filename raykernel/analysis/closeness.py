"""How near the logits of two functions are to each other, example by example.

Legend: f, g logits (n, c) of n examples; softmax in nats. Per example

    KL(softmax f ‖ softmax g)  ≤  ||f - g||² / 4,

because the Hessian of log-sum-exp is at most I/2 and KL is its Bregman distance, and ||f - g||
counts what all logits share, which KL does not see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.special
from jaxtyping import Float


@dataclass(frozen=True, slots=True)
class Closeness:
    """Means over examples."""

    distance: float
    """||f - g||."""
    kl: float
    """KL(softmax f ‖ softmax g), nats."""
    kl_reverse: float
    """KL(softmax g ‖ softmax f), nats."""
    agreement: float
    """Share of examples whose largest logit is the same one's."""


def closeness(f: Float[np.ndarray, "n c"], g: Float[np.ndarray, "n c"]) -> Closeness:
    """Compare two functions.

    Args:
        f: logits of one, the one that is approximated.
        g: logits of the other.

    Returns:
        Distance, divergences both ways and agreement.
    """
    return Closeness(
        distance=mean_distance(f, g),
        kl=float(divergence(f, g).mean()),
        kl_reverse=float(divergence(g, f).mean()),
        agreement=float((f.argmax(axis=1) == g.argmax(axis=1)).mean()),
    )


def mean_distance(f: Float[np.ndarray, "n c"], g: Float[np.ndarray, "n c"]) -> float:
    """Mean over examples of ||f - g||."""
    return float(np.linalg.norm(f - g, axis=1).mean())


def divergence(f: Float[np.ndarray, "n c"], g: Float[np.ndarray, "n c"]) -> Float[np.ndarray, " n"]:
    """KL(softmax f ‖ softmax g) of every example, in nats.

        Σ_a softmax(f)_a (log softmax(f)_a - log softmax(g)_a)

    From logarithms throughout: a probability that is 0 in floating point does no harm.

    Args:
        f: logits of one.
        g: logits of the other.

    Returns:
        Numbers ≥ 0.
    """
    log_f, log_g = (scipy.special.log_softmax(own.astype(np.float64), axis=1) for own in (f, g))
    # Rounding may leave a little less than 0 of equal functions.
    found: np.ndarray = np.maximum(np.sum(np.exp(log_f) * (log_f - log_g), axis=1), 0.0)
    return found
