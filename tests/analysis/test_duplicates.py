"""Duplicates against distances of the features themselves."""

from __future__ import annotations

import numpy as np
import pytest

from raykernel.analysis.duplicates import duplicates
from raykernel.analysis.outputs import Outputs
from raykernel.analysis.spectrum import spectrum
from raykernel.errors import InputError


def features(seed: int = 0) -> np.ndarray:
    """Jacobians (n, c, p) of six examples and three outputs."""
    return np.random.default_rng(seed).normal(size=(6, 3, 40))


def kernel_of(j: np.ndarray) -> np.ndarray:
    return np.einsum("iap,jbp->iajb", j, j)


def found(j: np.ndarray, **options: object) -> list[tuple[int, int]]:
    return [(pair.first, pair.second) for pair in duplicates(kernel_of(j), **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0.0, 1e-6, -1e-6])
def test_a_repeated_example_is_found_exactly_and_up_to_a_millionth(size):
    j = features()
    assert found(j) == []
    j[4] = (1 + size) * j[1]
    assert found(j) == [(1, 4)]
    assert spectrum(kernel_of(j)).at_least > 1e10
    j[5] = j[1]
    assert found(j) == [(1, 4), (1, 5), (4, 5)]


def test_the_distance_is_that_of_the_features():
    """||φ_i - φ_j||² / max ||φ||² of the contrasts, written out."""
    j = features()
    j[3] = j[0] + 0.1 * features(1)[0]
    seen = j - j.mean(1, keepdims=True)
    want = np.sum((seen[0] - seen[3]) ** 2) / max(np.sum(seen[0] ** 2), np.sum(seen[3] ** 2))
    (pair,) = duplicates(kernel_of(j), tolerance=0.1)
    assert (pair.first, pair.second) == (0, 3)
    assert pair.distance == pytest.approx(want)
    assert duplicates(kernel_of(j), tolerance=0.9 * want) == []


def test_float32_hides_no_duplicate():
    j = features(2)
    j[2] = j[0]
    pairs = duplicates(kernel_of(j.astype(np.float32)), tolerance=0.0)
    assert [(pair.first, pair.second) for pair in pairs] == [(0, 2)]
    rounded = kernel_of(j).astype(np.float32).astype(np.float64)
    eps = float(np.finfo(np.float32).eps)
    assert [(p.first, p.second) for p in duplicates(rounded, tolerance=0.0, rounding=eps)] == [
        (0, 2)
    ]


def test_what_all_outputs_share_tells_examples_apart_for_the_full_kernel_only():
    j = features()
    j[1] = j[0] + features(1)[:1, :1]
    assert found(j) == [(0, 1)]
    assert found(j, outputs=Outputs.full) == []


def test_examples_without_features_are_no_duplicates():
    j = features()
    j[:2] = 0
    assert found(j) == []


def test_wrong_input_is_named():
    with pytest.raises(InputError, match="tolerance"):
        duplicates(kernel_of(features()), tolerance=-1.0)
    with pytest.raises(InputError, match="transpose"):
        duplicates(kernel_of(features()) * np.arange(1, 7)[:, None, None, None])
