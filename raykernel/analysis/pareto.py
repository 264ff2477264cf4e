"""Choices of layers that no other one beats in all of several criteria: the Pareto front.

Where all choices can be scored the front is exact. Of more, NSGA-II (Deb et al. 2002; Optuna's)
looks for it, and what it finds is the front of the choices that it has tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float

from raykernel.analysis.correlation import Expected
from raykernel.analysis.predictors import PREDICTORS, Predictor
from raykernel.analysis.selection import all_sets, num_sets, single_sets
from raykernel.analysis.sets import Budget, Candidates, Chosen, Progress, Scores
from raykernel.terms import Criterion

POPULATION = 50
"""Choices of a generation of NSGA-II, Optuna's default."""
_COSTS = (Criterion.size, Criterion.num_parameters)


@dataclass(frozen=True, slots=True)
class Front:
    """Choices of which none is as good as another in all objectives and worse in one."""

    choices: tuple[Chosen, ...]
    """The best in the first objective first, of equals in the second, and so on."""
    num_scored: int
    is_exact: bool
    """Whether these are of all choices that the budget allows."""


def objective(criterion: Criterion) -> Predictor:
    """How a criterion is read as an objective: size and parameters are costs there.

    Args:
        criterion: which.

    Returns:
        Its predictor; of a cost one whose small values are good.
    """
    predictor = PREDICTORS[criterion]
    return replace(predictor, expected=Expected.negative) if criterion in _COSTS else predictor


def pareto(
    candidates: Candidates,
    objectives: Sequence[Criterion],
    budget: Budget,
    *,
    exhaustive: int,
    trials: int,
    seed: int,
    known: Sequence[Chosen] = (),
    advance: Progress = lambda count: None,
) -> Front:
    """The Pareto front of the choices that a budget allows.

    A choice that one of the objectives has no number of is on no front.

    Args:
        candidates: to choose among.
        objectives: at least two criteria.
        budget: how large a choice may be.
        exhaustive: choices up to which all are scored.
        trials: of NSGA-II, otherwise.
        seed: of NSGA-II.
        known: choices within the budget for it to begin with, such as a search's best.
        advance: told of every choice that is scored.

    Returns:
        The front.

    Raises:
        InputError: if the budget allows no choice.
    """
    scores = Scores(candidates, list(map(objective, objectives)), advance)
    alone = single_sets(candidates, budget)
    is_exact = num_sets(len(alone), budget.max_size) <= exhaustive
    if is_exact:
        scores.score(list(all_sets(candidates, budget)))
    else:
        _evolve(scores, budget, trials=trials, seed=seed, known=known, size=len(objectives))
    sets, values = list(scores.known), np.array(list(scores.known.values()))
    on_front = np.flatnonzero(non_dominated(values))
    ordered = sorted(on_front, key=lambda at: (*(-values[at]), len(sets[at]), sets[at]))
    return Front(tuple(sets[at] for at in ordered), len(sets), is_exact)


def non_dominated(values: Float[np.ndarray, "n k"]) -> Bool[np.ndarray, " n"]:
    """Which points no other one equals or betters in all columns and betters in one.

    Args:
        values: larger is better; a point with -inf is on no front.

    Returns:
        A flag of each.
    """
    found = np.zeros(len(values), dtype=bool)
    # In descending order a point is dominated by earlier ones only, or by none; and by one of
    # those that are dominated by none.
    front = np.empty((0, values.shape[1]))
    for at in np.lexsort(values.T[::-1])[::-1]:
        point = values[at]
        no_worse = (front >= point).all(axis=1)
        if np.isfinite(point).all() and not (no_worse & (front > point).any(axis=1)).any():
            found[at] = True
            front = np.vstack([front, point])
    return found


# ---------------------------------------------------------------- NSGA-II


def _evolve(
    scores: Scores, budget: Budget, *, trials: int, seed: int, known: Sequence[Chosen], size: int
) -> None:
    """Score the choices that NSGA-II asks for, a generation at a time."""
    import optuna  # takes half a second

    code = _Code(scores.candidates, budget, seed)
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
        study = optuna.create_study(directions=["maximize"] * size, sampler=sampler)
        for chosen in dict.fromkeys((*known, *single_sets(scores.candidates, budget))):
            study.enqueue_trial(code.genes(chosen))
        for done in range(0, trials, POPULATION):
            asked = [study.ask() for _ in range(min(POPULATION, trials - done))]
            sets = [
                code.chosen([trial.suggest_int(name, low, high) for name, low, high in code.places])
                for trial in asked
            ]
            scores.score(sets)
            for trial, chosen in zip(asked, sets, strict=True):
                values = scores.known[chosen]
                if all(map(math.isfinite, values)):
                    study.tell(trial, values)
                else:  # a criterion has no number of it
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
    finally:
        optuna.logging.set_verbosity(level)


class _Code:
    """Choices as integers: a bit for each candidate, or, of small choices, what is in each place.

    What goes beyond the budget is left out, in a fixed random order of candidates or places, so
    that parts of a choice are inherited.

    Args:
        candidates: to choose among.
        budget: that every choice is within.
        seed: of the order.

    Attributes:
        places: name and range of every integer.
    """

    def __init__(self, candidates: Candidates, budget: Budget, seed: int) -> None:
        self._candidates, self._budget = candidates, budget
        count, room = len(candidates.names), _most(candidates, budget)
        self._has_bits = 2 * room > count
        self._order = np.random.default_rng(seed).permutation(count).tolist()
        slots = count if self._has_bits else room
        low, high = (0, 1) if self._has_bits else (-1, count - 1)
        self.places = [(f"{place:04d}", low, high) for place in range(slots)]

    def chosen(self, genes: Sequence[int]) -> Chosen:
        """The choice of some integers, never empty."""
        wanted = [i for i in self._order if genes[i]] if self._has_bits else list(genes)
        chosen: Chosen = ()
        for i in wanted:
            larger = tuple(sorted({*chosen, i}))
            if i >= 0 and self._allows(larger):
                chosen = larger
        return chosen or next((i,) for i in self._order if self._allows((i,)))

    def _allows(self, chosen: Chosen) -> bool:
        return self._budget.allows(self._candidates, chosen)

    def genes(self, chosen: Chosen) -> dict[str, int]:
        """Integers of a choice."""
        if self._has_bits:
            return {name: int(place in chosen) for place, (name, _, _) in enumerate(self.places)}
        filled = [*chosen, *[-1] * (len(self.places) - len(chosen))]
        return {name: i for (name, _, _), i in zip(self.places, filled, strict=True)}


def _most(candidates: Candidates, budget: Budget) -> int:
    """Candidates in the largest choice within a budget."""
    room = len(candidates.names) if budget.max_size is None else budget.max_size
    if budget.max_parameters is not None:
        costs = np.cumsum(sorted(candidates.num_parameters))
        room = min(room, int((costs <= budget.max_parameters).sum()))
    return min(room, len(candidates.names))
