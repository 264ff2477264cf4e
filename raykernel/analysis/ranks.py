"""Ranks of a LoRA's modules: one for all, or more where the inputs vary in more directions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float


def redistributed(
    shares: Mapping[str, Float[np.ndarray, " d_in"]], *, r: int, rho: float
) -> dict[str, int]:
    """EVA's ranks: of all modules' directions those that explain most.

        r_l = |{i ≤ ρ r : λ_l,i among the N r largest of all}|,  Σ_l r_l = N r

    with N modules and λ_l,i the share of the variance of module l's inputs along its i-th
    principal direction (Paischer et al. 2024, arXiv:2410.07170, section 3).

    Args:
        shares: by module, the largest first.
        r: mean rank.
        rho: largest rank over r, at least 1, which leaves every rank r.

    Returns:
        Rank by module, 0 where none of its directions is among them. Of equal shares those of an
        earlier direction count first, then those of an earlier module.
    """
    most = int(rho * r)
    found = [
        (-share, i, module)
        for module, own in shares.items()
        for i, share in enumerate(own[:most].tolist())
    ]
    order = {module: place for place, module in enumerate(shares)}
    found.sort(key=lambda one: (one[0], one[1], order[one[2]]))
    ranks = dict.fromkeys(shares, 0)
    for _, _, module in found[: len(shares) * r]:
        ranks[module] += 1
    return ranks
