"""Divergences against their definition, and against the distance of the logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raykernel.analysis.closeness import closeness, divergence, mean_distance

TRIALS = settings(max_examples=60, deadline=None)
drawn = {
    "seed": st.integers(0, 10**6),
    "c": st.integers(2, 5),
    "scale": st.floats(0.01, 20),
    "apart": st.floats(0.0, 20),
}


def pair(seed: int, c: int, scale: float, apart: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    f = scale * rng.normal(size=(7, c))
    return f, f + apart * rng.normal(size=(7, c))


@TRIALS
@given(**drawn)
def test_divergence_is_its_definition(seed, c, scale, apart):
    f, g = pair(seed, c, min(scale, 3), min(apart, 3))
    found = divergence(f, g)
    for i in range(7):
        p = [math.exp(v) / sum(map(math.exp, f[i])) for v in f[i]]
        q = [math.exp(v) / sum(map(math.exp, g[i])) for v in g[i]]
        expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert found[i] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@TRIALS
@given(**drawn)
def test_divergence_is_at_most_a_quarter_of_the_squared_distance(seed, c, scale, apart):
    """And, of two outputs, at most an eighth of the squared difference of margins."""
    f, g = pair(seed, c, scale, apart)
    squared = np.sum((f - g) ** 2, axis=1)
    assert np.all(divergence(f, g) <= squared / 4 * (1 + 1e-9) + 1e-12)
    if c == 2:
        margins = (f - g)[:, 0] - (f - g)[:, 1]
        assert np.all(divergence(f, g) <= margins**2 / 8 * (1 + 1e-9) + 1e-12)


def test_what_all_logits_share_is_in_the_distance_and_in_no_divergence():
    f = np.random.default_rng(0).normal(size=(5, 3))
    found = closeness(f, f + 2.0)
    assert found.distance == pytest.approx(2 * math.sqrt(3))
    assert found.kl == pytest.approx(0, abs=1e-14)
    assert found.agreement == 1


def test_probabilities_that_vanish_do_no_harm():
    f, g = np.array([[0.0, 2000.0]]), np.array([[0.0, -2000.0]])
    assert divergence(f, g) == pytest.approx(2000.0)


def test_means_over_examples_and_both_directions():
    f, g = pair(1, 3, 1.0, 1.0)
    found = closeness(f, g)
    each = [math.dist(a, b) for a, b in zip(f, g, strict=True)]
    assert found.distance == mean_distance(f, g) == pytest.approx(sum(each) / 7)
    assert found.kl == pytest.approx(divergence(f, g).mean())
    assert found.kl_reverse == pytest.approx(divergence(g, f).mean())
    assert found.kl != found.kl_reverse
    same = [a.tolist().index(max(a)) == b.tolist().index(max(b)) for a, b in zip(f, g, strict=True)]
    assert found.agreement == sum(same) / 7
