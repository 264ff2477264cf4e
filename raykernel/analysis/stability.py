"""Whether a ranking of choices is of the layers or of the sample: ranks on other samples.

A choice is ranked again, among the same few best ones, on random halves of train, whose kernels
are sub-matrices, and with other random kernels. A half has another number of rows and so another
spectrum, but the same for all choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from raykernel.analysis.predictors import Predictor
from raykernel.analysis.sets import Candidates, Chosen, Scores

POOL = 100
"""Best choices that are ranked again."""


@dataclass(frozen=True, slots=True)
class Stability:
    """Ranks of one choice over samples; 1 is the best, equals have the better rank."""

    mean_rank: float
    best_rank: int
    worst_rank: int
    first: float
    """Share of samples in which no choice is better."""


def halves(labels: Int[np.ndarray, " n"], count: int, seed: int) -> list[list[int]]:
    """Random halves of examples, both halves of every split, each label shared out evenly.

    Args:
        labels: of the examples.
        count: halves, an even number.
        seed: of the splits.

    Returns:
        Indices, ascending; none if a half would be empty.
    """
    rng, found = np.random.default_rng(seed), []
    if len(labels) < 2:
        return []
    for _ in range(count // 2):
        # Label after label, each in random order, so that every other one is half of each.
        mixed = rng.permutation(len(labels))
        ordered = mixed[np.argsort(labels[mixed], kind="stable")]
        found += [sorted(ordered[side::2].tolist()) for side in (0, 1)]
    return found


def rank_again(
    samples: Sequence[Candidates], predictor: Predictor, pool: Sequence[Chosen]
) -> list[Stability]:
    """Ranks of choices among each other over samples.

    Args:
        samples: the same candidates, measured anew; at least one.
        predictor: what ranks them.
        pool: the choices.

    Returns:
        Of each choice.
    """
    ranks: Float[np.ndarray, "samples choices"] = np.stack(
        [_ranks(sample, predictor, pool) for sample in samples]
    )
    return [
        Stability(float(own.mean()), int(own.min()), int(own.max()), float((own == 1).mean()))
        for own in ranks.T
    ]


def _ranks(
    sample: Candidates, predictor: Predictor, pool: Sequence[Chosen]
) -> Float[np.ndarray, " choices"]:
    scores = Scores(sample, [predictor])
    scores.score(pool)
    ranks = rankdata([-scores.of(chosen) for chosen in pool], method="min")
    return np.asarray(ranks, dtype=np.float64)
