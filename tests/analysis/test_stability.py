"""Ranks on other samples against ranks by hand."""

from __future__ import annotations

import numpy as np
import pytest

from raykernel.analysis.predictors import PREDICTORS
from raykernel.analysis.stability import halves, rank_again
from raykernel.terms import Criterion
from tests.analysis.test_selection import candidates_of


def test_halves_are_disjoint_and_share_out_every_label() -> None:
    labels = np.array([0] * 6 + [1] * 5 + [2] * 4)
    found = halves(labels, 6, seed=3)
    assert len(found) == 6
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert sorted([*one, *other]) == list(range(15))
        for half in (one, other):
            counts = np.bincount(labels[half])
            assert abs(counts - np.bincount(labels) / 2).max() <= 1
    assert len({tuple(half) for half in found}) == 6
    assert found == halves(labels, 6, seed=3) != halves(labels, 6, seed=4)
    assert halves(labels[:1], 6, seed=3) == []
    assert halves(labels, 0, seed=3) == []


@pytest.mark.parametrize("criterion", [Criterion.regularised, Criterion.loo_accuracy])
def test_ranks_are_counts_of_better_choices(criterion: Criterion) -> None:
    """rank = 1 + the choices that are better, of each sample anew."""
    candidates = candidates_of(4, n=6, features=20)
    pool = [(0,), (1, 3), (0, 1, 2), (2,)]
    samples = [candidates.of_examples(half) for half in ([0, 1, 2], [3, 4, 5], [1, 2, 4])]
    found = rank_again(samples, PREDICTORS[criterion], pool)
    ranks = []
    for sample in samples:
        values = [PREDICTORS[criterion].goodness(sample.start(chosen)) for chosen in pool]
        ranks.append([1 + sum(other > value for other in values) for value in values])
    for own, one in zip(np.array(ranks).T, found, strict=True):
        assert one.mean_rank == pytest.approx(own.mean())
        assert (one.best_rank, one.worst_rank) == (own.min(), own.max())
        assert one.first == pytest.approx(np.mean(own == 1))
    assert len({tuple(row) for row in ranks}) > 1  # the samples do not agree
