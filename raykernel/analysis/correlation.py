"""Rank correlation of a predictor with what it is to predict, where there are few points.

A claim such as "the condition number predicts fine-tuning" is a sign before it is a number, so
every target comes with the sign that theory expects (`Expected`). Of n points

    ρ = corr(rank x, rank y)    (Spearman, ties have their mean rank)

and p is the share of all n! orders of y whose |ρ| is as large: with n = 7 nothing below |ρ| = 0.786
is significant at 5 %, with n = 3 nothing ever is. Correlations of several data sets are averaged,
never their points pooled: atanh ρ is what is about normal (Fisher z). Where the mean is tested, it
is the plain one, whose orders can be counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache

import numpy as np
from jaxtyping import Float, Integer

from raykernel.errors import InputError

EXACT_SIZE = 8
"""Points up to which all orders are counted: 40,320 of eight."""
DRAWS = 99_999
"""Random orders in place of all of them, of more points."""
_NEAR_ONE = 0.995
_SAME = 1e-9
"""Correlations that differ by no more are equal but for rounding."""


class Expected(Enum):
    """The sign that theory expects of a correlation."""

    positive = 1
    """Rises with the predictor: the training loss with the condition number."""
    negative = -1
    """Falls with the predictor: accuracy with the condition number."""


@dataclass(frozen=True, slots=True)
class RankCorrelation:
    """Spearman's ρ of a predictor and an oriented target."""

    rho: float
    """NaN if all values of one are equal, or there are fewer than two points."""
    p_value: float
    """Two-sided, of no relation; NaN as ρ."""
    size: int
    """Points n."""
    expected: Expected
    is_exact: bool
    """Whether p counts all orders; else it is from Student's t."""

    @property
    def agrees(self) -> bool | None:
        """Whether the sign is the expected one; None if there is none."""
        return None if math.isnan(self.rho) or self.rho == 0 else self.rho * self.expected.value > 0


def rank_correlation(
    predictor: Sequence[int | float], target: Sequence[int | float], *, expected: Expected
) -> RankCorrelation:
    """Spearman's rank correlation with an exact p-value for few points.

    Reference: Kendall & Gibbons 1990, Rank Correlation Methods.

    Args:
        predictor: x, such as condition numbers; infinities are ranks like others.
        target: y, point by point.
        expected: the sign that theory expects.

    Returns:
        ρ and p: over all n! orders of y for up to `EXACT_SIZE` points, from Student's t with n - 2
        degrees of freedom beyond.
    """
    x, y = _ranks("predictor", predictor), _ranks("target", target)
    _check_sizes(predictor, target)
    rho, size = _pearson(x, y), len(x)
    exact = size <= EXACT_SIZE
    if math.isnan(rho):
        p_value = math.nan
    else:
        p_value = _permuted(x, y, rho) if exact else _student(rho, size - 2)
    return RankCorrelation(rho, p_value, size, expected, exact)


def partial_rank_correlation(
    predictor: Sequence[int | float],
    target: Sequence[int | float],
    controls: Sequence[Sequence[int | float]],
    *,
    expected: Expected,
) -> RankCorrelation:
    """Spearman's rank correlation with what other quantities explain taken off.

        ρ_xy·z = corr(x̃, ỹ),    x̃, ỹ what least squares on the ranks of z leaves of those of x, y

    A larger set of layers has another condition number and trains better: a predictor has to say
    more than the size does. p is from Student's t with n - 2 - |z| degrees of freedom, an
    approximation: controls that depend on each other count once.

    Args:
        predictor: x.
        target: y, point by point.
        controls: quantities to hold fixed, each point by point.
        expected: the sign that theory expects.

    Returns:
        ρ and p; NaN where controls explain one of the two, or no degree of freedom is left.
    """
    x, y = _ranks("predictor", predictor), _ranks("target", target)
    _check_sizes(predictor, target, *controls)
    columns = [np.ones(len(x)), *(_ranks("controls", control) for control in controls)]
    design = np.stack(columns, axis=1)
    basis, sizes, _ = np.linalg.svd(design, full_matrices=False)
    basis = basis[:, sizes > _SAME * sizes.max(initial=0.0)]
    rest_x, rest_y = (ranks - basis @ (basis.T @ ranks) for ranks in (x, y))
    freedom = len(x) - basis.shape[1] - 1
    rho = _pearson(rest_x, rest_y) if freedom > 0 else math.nan
    return RankCorrelation(rho, _student(rho, freedom), len(x), expected, is_exact=False)


def critical_rho(size: int, level: float = 0.05) -> float:
    """Smallest |ρ| of so many points without ties whose exact p is at most a level.

    Args:
        size: n, from 2 to `EXACT_SIZE`.
        level: of significance.

    Returns:
        It; inf if even |ρ| = 1 is not significant.

    Raises:
        InputError: if there are too few points or too many to count all orders.
    """
    if not 2 <= size <= EXACT_SIZE:
        raise InputError(f"size: found {size}, expected 2 to {EXACT_SIZE} points.")
    line = np.arange(size) - (size - 1) / 2
    sizes = np.sort(np.abs(line[_orders(size)] @ line) / (line @ line))
    # Of equal values all count, so that the first of them decides.
    shares = 1 - np.searchsorted(sizes, sizes - _SAME) / sizes.size
    significant = sizes[shares <= level]
    return float(significant[0]) if significant.size else math.inf


def mean_correlation(rhos: Sequence[int | float]) -> float:
    """Mean of correlations of several data sets or seeds: tanh of the mean of atanh ρ.

    Reference: Fisher 1921. |ρ| = 1, which few points often have, has an infinite z: it counts as
    `_NEAR_ONE` beside others, so that one seed does not decide alone.

    Args:
        rhos: of data sets of about one size; NaN is left out.

    Returns:
        Their mean; NaN of none.
    """
    known = np.array([rho for rho in rhos if not math.isnan(rho)], dtype=np.float64)
    if len(set(known.tolist())) <= 1:
        return float(known[0]) if known.size else math.nan
    return float(np.tanh(np.arctanh(np.clip(known, -_NEAR_ONE, _NEAR_ONE)).mean()))


def mean_rank_correlation(
    predictors: Sequence[Sequence[int | float]],
    targets: Sequence[Sequence[int | float]],
    *,
    expected: Expected,
    shares_points: bool,
) -> RankCorrelation:
    """Mean of Spearman's ρ over data sets, and p of no relation in any of them.

        ρ = Σ_d ρ_d / D,    p = share of orders π with |Σ_d corr(rank x_d, rank y_d ∘ π)| as large

    Data sets may be samples of one task and model on which the same choices are compared. Then y
    of a choice is alike in all, they are no independent repetitions, and one order of the choices
    has to serve all of them: p says whether choices of a larger x have a larger y. Else every data
    set has an order of its own. Of more than `EXACT_SIZE` points, or of several data sets that
    share none, `DRAWS` orders are drawn beside the one that was found, which counts too: the test
    keeps its level.
    Reference: Pesarin & Salmaso 2010, Permutation Tests for Complex Data, chapter 4.

    Args:
        predictors: x of every data set.
        targets: y of every data set, point by point; one in which x or y does not vary is left out.
        expected: the sign that theory expects.
        shares_points: point i of all data sets is the same choice.

    Returns:
        ρ and p; NaN if there is no data set left.

    Raises:
        InputError: if there are not as many targets, or not the same points, as there should be.
    """
    pairs = []
    for predictor, target in zip(predictors, targets, strict=True):
        _check_sizes(predictor, target)
        x, y = _ranks("predictor", predictor), _ranks("target", target)
        if not math.isnan(_pearson(x, y)):
            pairs.append((_unit(x), _unit(y)))
    if not pairs:
        return RankCorrelation(math.nan, math.nan, 0, expected, is_exact=False)
    sizes = [len(x) for x, _ in pairs]
    if shares_points and len(set(sizes)) != 1:
        raise InputError(f"targets: found {sizes} points, expected the same ones in all data sets.")
    one_order = shares_points or len(pairs) == 1
    exact = one_order and sizes[0] <= EXACT_SIZE
    total = np.zeros(1)
    for number, (x, y) in enumerate(pairs):
        own = 0 if one_order else number
        orders = _orders(len(y)) if exact else _drawn(len(y), own)
        total = total + y[orders] @ x
    # The first order is the one that was found.
    p_value = float(np.mean(np.abs(total) >= abs(total[0]) - _SAME))
    return RankCorrelation(float(total[0]) / len(pairs), p_value, max(sizes), expected, exact)


def _ranks(name: str, values: Sequence[int | float]) -> Float[np.ndarray, " n"]:
    """Ranks from 1; equal values have their mean rank."""
    from scipy.stats import rankdata  # takes a second to import

    array = np.asarray(values, dtype=np.float64)
    if np.isnan(array).any():
        raise InputError(f"{name}: found NaN, expected numbers: leave out points without one.")
    ranks: np.ndarray = np.asarray(rankdata(array), dtype=np.float64)
    return ranks


def _check_sizes(first: Sequence[int | float], *others: Sequence[int | float]) -> None:
    sizes = [len(first), *map(len, others)]
    if len(set(sizes)) != 1:
        raise InputError(f"found {sizes} points, expected as many of each.")


def _pearson(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Correlation; NaN if one of the two does not vary beyond rounding."""
    if len(x) < 2:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    norms = np.linalg.norm(x), np.linalg.norm(y)
    if min(norms) <= _SAME * len(x):
        return math.nan
    return float(np.clip(x @ y / (norms[0] * norms[1]), -1.0, 1.0))


def _unit(ranks: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Ranks with mean 0 and norm 1."""
    centred = ranks - ranks.mean()
    scaled: Float[np.ndarray, " n"] = centred / np.linalg.norm(centred)
    return scaled


def _permuted(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], rho: float) -> float:
    """Share of the orders of y whose |ρ| is at least that found."""
    x, y = x - x.mean(), y - y.mean()
    products = y[_orders(len(y))] @ x / (np.linalg.norm(x) * np.linalg.norm(y))
    return float(np.mean(np.abs(products) >= abs(rho) - _SAME))


@cache
def _orders(size: int) -> Integer[np.ndarray, "orders n"]:
    """All orders of so many points."""
    return np.array(list(itertools.permutations(range(size))), dtype=np.int8)


@cache
def _drawn(size: int, number: int) -> Integer[np.ndarray, "orders n"]:
    """The order that was found, then random ones: those of a number are always the same."""
    line = np.arange(size, dtype=np.int16)
    drawn = np.random.default_rng((number, size)).permuted(np.tile(line, (DRAWS, 1)), axis=1)
    return np.concatenate([line[None], drawn])


def _student(rho: float, freedom: int) -> float:
    """Two-sided p of a correlation with so many degrees of freedom."""
    from scipy.stats import t as student  # takes a second to import

    if math.isnan(rho) or freedom < 1:
        return math.nan
    if abs(rho) >= 1 - _SAME:
        return 0.0
    return float(2 * student.sf(abs(rho) * math.sqrt(freedom / (1 - rho**2)), freedom))
