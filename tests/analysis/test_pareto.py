"""The Pareto front against all pairs of choices, and NSGA-II against the exact front."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from raykernel.analysis.pareto import Front, non_dominated, objective, pareto
from raykernel.analysis.sets import Budget, Candidates
from raykernel.errors import InputError
from raykernel.terms import Criterion
from tests.analysis.test_selection import candidates_of

OBJECTIVES = [Criterion.alignment, Criterion.regularised, Criterion.num_parameters]


def dominates(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((one >= other).all() and (one > other).any())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_on_the_front_is_what_no_other_point_dominates(k: int) -> None:
    rng = np.random.default_rng(k)
    # Few values, so that there are ties and equal points.
    points = rng.integers(0, 6, size=(200, k)).astype(float)
    points[::17, 0] = -np.inf
    finite = np.isfinite(points).all(axis=1)
    expected = [
        bool(finite[i]) and not any(dominates(q, p) for q in points[finite])
        for i, p in enumerate(points)
    ]
    assert non_dominated(points).tolist() == expected


def goodness(candidates: Candidates, chosen: tuple[int, ...]) -> np.ndarray:
    start = candidates.start(chosen)
    return np.array([objective(criterion).goodness(start) for criterion in OBJECTIVES])


def front_of(candidates: Candidates, budget: Budget, **changes: object) -> Front:
    settings = {"exhaustive": 10_000, "trials": 400, "seed": 0} | changes
    return pareto(candidates, OBJECTIVES, budget, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [Budget(), Budget(max_size=2), Budget(max_parameters=12)])
def test_the_exact_front_is_of_all_choices_within_the_budget(budget: Budget) -> None:
    candidates = candidates_of(6, features=8)
    sets = [s for size in range(1, 7) for s in itertools.combinations(range(6), size)]
    values = {s: goodness(candidates, s) for s in sets if budget.allows(candidates, s)}
    expected = {
        s for s, own in values.items() if not any(dominates(v, own) for v in values.values())
    }
    found = front_of(candidates, budget)
    assert found.is_exact
    assert found.num_scored == len(values)
    assert set(found.choices) == expected
    firsts = [values[chosen][0] for chosen in found.choices]
    assert firsts == sorted(firsts, reverse=True)


def test_sizes_are_costs_there() -> None:
    start = candidates_of().start((0, 1))
    assert objective(Criterion.num_parameters).goodness(start) == -start.num_parameters
    assert objective(Criterion.size).goodness(start) == -2


@pytest.mark.parametrize(
    "budget", [Budget(), Budget(max_size=3), Budget(max_parameters=20), Budget(2, 9)]
)
def test_nsga_comes_near_the_exact_front_and_stays_within_the_budget(budget: Budget) -> None:
    candidates = candidates_of(9, features=8)
    exact = front_of(candidates, budget)
    found = front_of(candidates, budget, exhaustive=0, known=[(1,)])
    assert not found.is_exact
    assert found.num_scored <= 400
    assert all(budget.allows(candidates, chosen) for chosen in found.choices)
    best = np.array([goodness(candidates, chosen) for chosen in exact.choices])
    own = [goodness(candidates, chosen) for chosen in found.choices]
    assert not any(dominates(one, other) for one, other in itertools.permutations(own, 2))
    hits = len(set(found.choices) & set(exact.choices))
    assert hits >= 0.5 * len(best)
    again = front_of(candidates, budget, exhaustive=0, known=[(1,)])
    assert again.choices == found.choices  # of its seed


def test_a_front_of_no_choice_is_refused() -> None:
    with pytest.raises(InputError, match="allows no set"):
        front_of(candidates_of(), Budget(max_parameters=0))
