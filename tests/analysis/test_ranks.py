"""Ranks by explained variance."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raykernel.analysis.ranks import redistributed


@given(st.integers(1, 5), st.integers(1, 4), st.floats(1, 4), st.integers(0, 2**32 - 1))
def test_ranks_are_those_of_the_largest_shares(modules, r, rho, seed):
    """By definition: pool the first ρr shares of all modules, and keep the N r largest."""
    draw = np.random.default_rng(seed)
    shares = {str(n): np.sort(draw.dirichlet(np.ones(12)))[::-1] for n in range(modules)}
    ranks = redistributed(shares, r=r, rho=rho)
    pooled = np.concatenate([own[: int(rho * r)] for own in shares.values()])
    threshold = np.sort(pooled)[::-1][modules * r - 1]
    expected = {name: int((own[: int(rho * r)] >= threshold).sum()) for name, own in shares.items()}
    assert ranks == expected
    assert sum(ranks.values()) == modules * r


def test_without_room_all_ranks_are_r():
    shares = {"a": np.array([0.9, 0.1, 0.0]), "b": np.array([0.4, 0.3, 0.3])}
    assert redistributed(shares, r=2, rho=1.0) == {"a": 2, "b": 2}
    assert redistributed(shares, r=2, rho=1.5) == {"a": 1, "b": 3}


def test_fewer_directions_than_ranks_leave_some_out():
    assert redistributed({"a": np.array([1.0]), "b": np.array([0.6, 0.4])}, r=2, rho=2.0) == {
        "a": 1,
        "b": 2,
    }
