"""The search for layers against all sets, one by one."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from raykernel.analysis.layer_choice import select_layers
from raykernel.analysis.predictors import PREDICTORS
from raykernel.analysis.selection import Ranking, _greedy, _lazy_greedy, num_sets, search
from raykernel.analysis.sets import BATCH, Budget, Candidates, Scores
from raykernel.analysis.start import Baseline, Start
from raykernel.analysis.targets import one_hot
from raykernel.errors import InputError
from raykernel.terms import Criterion


def candidates_of(count: int = 6, seed: int = 0, n: int = 4, features: int = 4) -> Candidates:
    """Layers of few features and of scales of their own: most are singular alone."""
    rng = np.random.default_rng(seed)
    j = rng.normal(size=(count, n, 2, features)) * rng.uniform(0.3, 3, size=(count, 1, 1, 1))
    return Candidates(
        names=tuple(f"layer {i}" for i in range(count)),
        kernels=np.einsum("liap,ljbp->liajb", j, j),
        num_parameters=tuple(int(size) for size in rng.integers(1, 10, count)),
        targets=one_hot(np.arange(n) % 2, 2),
        f0=rng.normal(size=(n, 2)),
        baselines=tuple(Baseline(*rng.uniform(1, 2, 4)) for _ in range(count)),
    )


NOTHING = Baseline(0.0, 0.0, 0.0, 0.0)


def brute_force(
    candidates: Candidates, criterion: Criterion, budget: Budget
) -> list[tuple[float, tuple[int, ...]]]:
    """Every set, its kernel summed one by one, best first."""
    found = []
    count = len(candidates.names)
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            parameters = sum(candidates.num_parameters[i] for i in chosen)
            if budget.max_size is not None and size > budget.max_size:
                continue
            if budget.max_parameters is not None and parameters > budget.max_parameters:
                continue
            kernel = sum((candidates.kernels[i] for i in chosen), np.zeros(()))
            start = Start(
                (kernel,),
                candidates.targets,
                candidates.f0,
                sigma=candidates.sigma,
                size=size,
                num_parameters=parameters,
                baseline=sum((candidates.baselines[i] for i in chosen), NOTHING),  # type: ignore[index]
            )
            found.append((PREDICTORS[criterion].goodness(start), chosen))
    return sorted(found, key=lambda pair: -pair[0])


def best(ranking: Ranking) -> float:
    return ranking.choices[0].goodness


DETERMINED = [criterion for criterion in Criterion if criterion is not Criterion.random]


@pytest.mark.parametrize(
    "budget", [Budget(), Budget(max_size=3), Budget(max_parameters=12), Budget(2, 9)]
)
@pytest.mark.parametrize("criterion", DETERMINED)
def test_few_sets_are_all_tried(criterion: Criterion, budget: Budget) -> None:
    candidates = candidates_of()
    expected = brute_force(candidates, criterion, budget)
    scored: list[int] = []
    found = search(candidates, PREDICTORS[criterion], budget, top=5, advance=scored.append)
    assert found.is_exhaustive
    assert found.num_scored == sum(scored) == len(expected)
    values = [choice.goodness for choice in found.choices]
    assert values == pytest.approx([value for value, _ in expected[:5]], rel=1e-9)
    known = {chosen: value for value, chosen in expected}
    for choice in found.choices:
        assert choice.goodness == pytest.approx(known[choice.chosen], rel=1e-9)


@pytest.mark.parametrize("resolution", [0.0, 1e-3])
@pytest.mark.parametrize("criterion", Criterion)
def test_many_sets_together_score_as_each_alone(criterion: Criterion, resolution: float) -> None:
    """Also where noise hides eigenvalues, and over several batches and threads."""
    candidates = replace(candidates_of(10, features=12), resolution=resolution)
    sets = [s for size in (1, 3, 10, 5) for s in itertools.combinations(range(10), size)]
    assert len(sets) > BATCH
    assert len(sets) > 0.8 * BATCH
    predictor = PREDICTORS[criterion]
    scores = Scores(candidates, [predictor, PREDICTORS[Criterion.size]])
    scores.score(sets)
    for chosen in sets:
        alone = predictor.goodness(candidates.start(chosen))
        assert scores.known[chosen][0] == pytest.approx(alone, rel=1e-9), chosen
        assert scores.known[chosen][1] == len(chosen)


def test_examples_of_train_have_the_sub_matrices_of_the_kernels() -> None:
    candidates = candidates_of(3)
    part = candidates.of_examples([2, 0])
    kernel = candidates.start((0, 2)).kernel
    assert part.start((0, 2)).kernel == pytest.approx(kernel[[2, 0]][:, :, [2, 0]])
    assert part.targets.tolist() == candidates.targets[[2, 0]].tolist()
    assert part.f0.tolist() == candidates.f0[[2, 0]].tolist()
    whole = Candidates(part.names, part.kernels, part.num_parameters, part.targets, part.f0)
    assert part.sigma == whole.sigma != candidates.sigma


def test_of_equal_sets_the_smaller_comes_first() -> None:
    candidates = candidates_of(3)
    found = search(candidates, PREDICTORS[Criterion.condition_number], Budget(), top=9)
    none = [choice.chosen for choice in found.choices if choice.goodness == -np.inf]
    assert none == sorted(none, key=lambda chosen: (len(chosen), chosen))


@pytest.mark.parametrize("criterion", [Criterion.regularised, Criterion.loo_error])
def test_no_single_change_betters_what_a_search_of_many_sets_finds(criterion: Criterion) -> None:
    predictor = PREDICTORS[criterion]
    hits = 0
    for seed in range(10):
        candidates = candidates_of(7, seed)
        budget = Budget(max_size=4)
        found = search(candidates, predictor, budget, exhaustive=0)
        assert not found.is_exhaustive
        every = {chosen: value for value, chosen in brute_force(candidates, criterion, budget)}
        one = found.choices[0]
        assert one.goodness == pytest.approx(every[one.chosen], rel=1e-9)
        near = [value for chosen, value in every.items() if _is_near(chosen, one.chosen)]
        assert max(near) <= one.goodness + 1e-9
        hits += max(every.values()) <= one.goodness + 1e-9
    assert hits >= 5  # it is no more than a good guess


def _is_near(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(set(one) - set(other)) <= 1 and len(set(other) - set(one)) <= 1


@pytest.mark.parametrize("budget", [Budget(max_size=3), Budget(max_parameters=15)])
def test_lazy_greedy_of_log_det_is_near_the_best_and_scores_fewer(budget: Budget) -> None:
    """1 - 1/e of the best for a budget of size; here it is nearly always the best."""
    predictor = PREDICTORS[Criterion.log_det]
    for seed in range(10):
        candidates = candidates_of(9, seed)
        found = search(candidates, predictor, budget, exhaustive=0)
        highest = brute_force(candidates, Criterion.log_det, budget)[0][0]
        assert best(found) <= highest * (1 + 1e-9)
        if budget.max_size is not None:
            assert found.guarantee == 1 - 1 / np.e
            assert best(found) >= found.guarantee * highest
        else:
            assert found.guarantee == 0
        assert best(found) >= 0.95 * highest
        assert found.num_scored < num_sets(9, budget.max_size)


def test_lazy_greedy_is_greedy() -> None:
    """It adds what greedy choice over all candidates adds."""
    scored = np.zeros(2, dtype=int)
    for seed in range(10):
        candidates = candidates_of(8, seed)
        for budget in (Budget(max_size=4), Budget(max_parameters=20)):
            plain, lazy = (Scores(candidates, [PREDICTORS[Criterion.log_det]]) for _ in range(2))
            assert _lazy_greedy(lazy, budget) == _greedy(plain, budget)
            scored += len(lazy.known), len(plain.known)
    assert scored[0] < 0.9 * scored[1]


def test_two_singular_layers_can_be_the_best_pair() -> None:
    """diag(1, 0, …) and diag(0, 1, …): each infinite alone, 1 together."""
    n = 4
    margin = np.array([[1, -1], [-1, 1]]) / 2
    halves = [np.diag([1.0, 1, 0, 0]), np.diag([0.0, 0, 1, 1]), np.diag([1.0, 2, 3, 9])]
    candidates = Candidates(
        names=("a", "b", "c"),
        kernels=np.stack([np.einsum("ij,ab->iajb", half, margin) for half in halves]),
        num_parameters=(1, 1, 1),
        targets=one_hot(np.arange(n) % 2, 2),
        f0=np.zeros((n, 2)),
    )
    for exhaustive in (0, 100):
        for criterion in (Criterion.regularised, Criterion.condition_number):
            found = search(candidates, PREDICTORS[criterion], Budget(), exhaustive=exhaustive)
            if exhaustive:
                assert found.choices[0].chosen == (0, 1)
                assert best(found) == pytest.approx(-1)


def test_the_random_control_is_of_the_set_and_the_seed() -> None:
    one, again, other = candidates_of(), candidates_of(), candidates_of()
    object.__setattr__(other, "seed", 1)
    draws = [[c.start(s).draw for s in ((0,), (0, 1), (1, 2))] for c in (one, again, other)]
    assert draws[0] == draws[1] != draws[2]
    assert len({draw for row in draws for draw in row}) == 6
    assert all(0 <= draw < 1 for row in draws for draw in row)


@pytest.mark.parametrize(("count", "max_size"), [(5, None), (5, 2), (3, 7), (16, None)])
def test_sets_are_counted(count: int, max_size: int | None) -> None:
    sizes = range(1, min(count, max_size or count) + 1)
    sets = [s for size in sizes for s in itertools.combinations(range(count), size)]
    assert num_sets(count, max_size) == len(sets)


def test_layers_by_name_are_ranked_as_the_search_ranks_them() -> None:
    candidates = candidates_of()
    kernels = dict(zip(candidates.names, candidates.kernels, strict=True))
    budget = Budget(max_size=3)
    for criterion in (Criterion.loo_error, Criterion.log_det):
        found = select_layers(
            kernels,
            candidates.targets,
            f0=candidates.f0,
            criterion=criterion,
            max_size=3,
            top=4,
        )
        expected = brute_force(candidates, criterion, budget)[:4]
        names = [tuple(candidates.names[i] for i in chosen) for _, chosen in expected]
        assert [one.layers for one in found] == names
        values = [PREDICTORS[criterion].expected.value * one.scores[criterion] for one in found]
        assert values == pytest.approx([value for value, _ in expected], rel=1e-6)
    with pytest.raises(InputError, match="of a model's weights"):
        select_layers(kernels, candidates.targets, criterion=Criterion.importance, max_size=1)
    with pytest.raises(InputError, match="which every layer betters"):
        select_layers(kernels, candidates.targets, criterion=Criterion.trace)


def test_a_budget_that_allows_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="allows no set"):
        search(candidates_of(), PREDICTORS[Criterion.trace], Budget(max_parameters=0))


def test_candidates_that_are_none_are_refused() -> None:
    good = candidates_of(2)
    fields = {
        "names": good.names,
        "kernels": good.kernels,
        "num_parameters": good.num_parameters,
        "targets": good.targets,
        "f0": good.f0,
    }
    for changes, said in (
        ({"names": ("a", "a")}, "names that differ"),
        ({"num_parameters": (1,)}, "1 sizes"),
        ({"ridge": 0.0}, "more than 0"),
        ({"kernels": np.zeros_like(good.kernels)}, "no gradient"),
    ):
        with pytest.raises(InputError, match=said):
            Candidates(**{**fields, **changes})
