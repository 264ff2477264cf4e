"""Which layers to train: the sets of candidates that a predictor ranks best.

    kernels of the candidates → search under a budget → K_S = Σ_{l ∈ S} K_l → score of S

Few sets are tried one by one. Of many, a greedy choice is improved by single additions, removals
and exchanges; only of a submodular score (log det) under a budget of size is that known to come
near the best. No set is ruled out by its parts: two singular kernels can sum to a multiple of the
identity.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from raykernel.analysis.predictors import Predictor
from raykernel.analysis.sets import Budget, Candidates, Chosen, Progress, Scores
from raykernel.errors import InputError

EXHAUSTIVE = 2**16
"""Sets that are tried one by one at the most."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A set and how good the criterion finds it."""

    chosen: Chosen
    goodness: float
    """Larger is better; -inf: the criterion has no number of it."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """What a search found."""

    choices: tuple[Choice, ...]
    """Best first; of equal ones the smaller set, then the earlier candidates."""
    num_scored: int
    """Sets that were scored."""
    is_exhaustive: bool
    """Whether these are all that the budget allows, so that the first is the best."""
    guarantee: float = 0.0
    """Goodness of the first is at least this part of the best's."""


def search(
    candidates: Candidates,
    predictor: Predictor,
    budget: Budget,
    *,
    top: int = 10,
    exhaustive: int = EXHAUSTIVE,
    advance: Progress | None = None,
) -> Ranking:
    """The best sets by a predictor, within a budget.

    Args:
        candidates: to choose among.
        predictor: what ranks them.
        budget: how large a set may be.
        top: sets to return at the most.
        exhaustive: sets tried one by one at the most; of more, greedy choice and exchanges.
        advance: told of every set that is scored.

    Returns:
        The best sets that were scored.

    Raises:
        InputError: if the budget allows no set.
    """
    scores = Scores(candidates, [predictor], advance or (lambda count: None))
    alone = single_sets(candidates, budget)
    is_exhaustive = num_sets(len(alone), budget.max_size) <= exhaustive
    guarantee = 1.0
    if is_exhaustive:
        scores.score(list(all_sets(candidates, budget)))
    else:
        first = _lazy_greedy if predictor.is_submodular else _greedy
        _improve(first(scores, budget), scores, budget)
        # Nemhauser et al. 1978; of a budget of parameters nothing is known.
        is_known = predictor.is_submodular and budget.max_parameters is None
        guarantee = 1 - 1 / math.e if is_known else 0.0
    found = [Choice(chosen, goodness) for chosen, (goodness,) in scores.known.items()]
    found.sort(key=lambda choice: (-choice.goodness, len(choice.chosen), choice.chosen))
    return Ranking(tuple(found[:top]), len(found), is_exhaustive, guarantee)


def single_sets(candidates: Candidates, budget: Budget) -> list[Chosen]:
    """The candidates that a budget allows by themselves.

    Args:
        candidates: to choose among.
        budget: how large a set may be.

    Returns:
        Sets of one.

    Raises:
        InputError: if there are none.
    """
    alone: list[Chosen] = [
        (i,) for i in range(len(candidates.names)) if budget.allows(candidates, (i,))
    ]
    if not alone:
        raise InputError(
            f"The budget allows no set: found max_size={budget.max_size} and "
            f"max_parameters={budget.max_parameters}, the smallest of {len(candidates.names)} "
            f"candidates trains {min(candidates.num_parameters)} parameters. Raise it."
        )
    return alone


def all_sets(candidates: Candidates, budget: Budget) -> Iterator[Chosen]:
    """Every set that a budget allows, small ones first."""
    indices = [one[0] for one in single_sets(candidates, budget)]
    largest = len(indices) if budget.max_size is None else min(len(indices), budget.max_size)
    for size in range(1, largest + 1):
        for chosen in itertools.combinations(indices, size):
            if budget.allows(candidates, chosen):
                yield chosen


def num_sets(count: int, max_size: int | None) -> int:
    """Sets of so many candidates that are not empty and no larger than allowed.

    Args:
        count: candidates.
        max_size: of a set; None: any.

    Returns:
        Their number.
    """
    largest = count if max_size is None else min(count, max_size)
    return sum(math.comb(count, size) for size in range(1, largest + 1))


def _greedy(scores: Scores, budget: Budget) -> Chosen:
    """Add the best candidate while the budget lasts; the best set on the way."""
    chosen: Chosen = ()
    passed: list[Chosen] = []
    while options := _additions(chosen, scores.candidates, budget):
        scores.score(options)
        chosen = max(options, key=scores.of)
        passed.append(chosen)
    return max(passed, key=scores.of)


def _lazy_greedy(scores: Scores, budget: Budget) -> Chosen:
    """The same of a submodular score, without scoring what cannot be the best (Minoux 1978)."""
    # A candidate's gain only falls as the set grows, so that its last known gain bounds it: once
    # the best known gain is up to date, no other can be larger.
    chosen: Chosen = ()
    base = 0.0  # of the empty set
    alone = _additions((), scores.candidates, budget)
    scores.score(alone)
    queue = [(-scores.of(one), one[0], 0) for one in alone]
    heapq.heapify(queue)
    while queue:
        gain, i, size = heapq.heappop(queue)
        larger = _with(chosen, i)
        if not budget.allows(scores.candidates, larger):
            continue  # nor will it be within the budget of a larger set
        if size == len(chosen):
            chosen, base = larger, base - gain
        else:
            heapq.heappush(queue, (base - scores.of(larger), i, len(chosen)))
    return chosen


def _improve(chosen: Chosen, scores: Scores, budget: Budget) -> Chosen:
    """Add, remove or exchange one candidate as long as that is better."""
    while True:
        options = _neighbours(chosen, scores.candidates, budget)
        scores.score(options)
        best = max(options, key=scores.of, default=chosen)
        if not scores.of(best) > scores.of(chosen):
            return chosen
        chosen = best


def _neighbours(chosen: Chosen, candidates: Candidates, budget: Budget) -> list[Chosen]:
    removals = [tuple(i for i in chosen if i != out) for out in chosen]
    exchanges = [more for fewer in removals for more in _additions(fewer, candidates, budget)]
    options = [*_additions(chosen, candidates, budget), *removals, *exchanges]
    return [option for option in options if option and option != chosen]


def _additions(chosen: Chosen, candidates: Candidates, budget: Budget) -> list[Chosen]:
    larger = (_with(chosen, i) for i in range(len(candidates.names)) if i not in chosen)
    return [option for option in larger if budget.allows(candidates, option)]


def _with(chosen: Chosen, one: int) -> Chosen:
    return tuple(sorted((*chosen, one)))
