"""Rank correlations against scipy and against the definition, order by order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from raykernel.analysis.correlation import (
    DRAWS,
    EXACT_SIZE,
    Expected,
    critical_rho,
    mean_correlation,
    mean_rank_correlation,
    partial_rank_correlation,
    rank_correlation,
)
from raykernel.errors import InputError

UP, DOWN = Expected.positive, Expected.negative


def drawn(seed: int, size: int, *, ties: bool) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(seed)
    pair = rng.integers(0, 4, (2, size)).astype(float) if ties else rng.normal(size=(2, size))
    return pair[0].tolist(), pair[1].tolist()


def exact(x: list[float], y: list[float]) -> float:
    """p by definition: the share of orders of y with |ρ| at least as large, by scipy's ρ."""

    def rho(values: tuple[float, ...]) -> float:
        return abs(scipy.stats.spearmanr(x, values).statistic)

    orders = list(itertools.permutations(y))
    return sum(rho(order) >= rho(tuple(y)) - 1e-12 for order in orders) / len(orders)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [3, 5, 7, 12, 40])
def test_rho_is_that_of_scipy(size, ties):
    for seed in range(5):
        x, y = drawn(seed, size, ties=ties)
        if len(set(x)) > 1 < len(set(y)):
            found = rank_correlation(x, y, expected=UP)
            assert found.rho == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
            assert found.is_exact == (size <= EXACT_SIZE)


@pytest.mark.parametrize("ties", [False, True])
def test_p_of_few_points_counts_all_orders(ties):
    for seed in range(3):
        x, y = drawn(seed, 5, ties=ties)
        assert rank_correlation(x, y, expected=UP).p_value == pytest.approx(exact(x, y))


def test_p_of_many_points_is_that_of_scipy():
    x, y = drawn(0, 25, ties=False)
    want = scipy.stats.spearmanr(x, y).pvalue
    assert rank_correlation(x, y, expected=UP).p_value == pytest.approx(want)
    line = list(range(12))
    assert rank_correlation(line, line, expected=UP).p_value == 0


@pytest.mark.parametrize(("size", "critical"), [(7, 0.786), (6, 0.886), (5, 1.0)])
def test_few_points_resolve_little(size, critical):
    """Smallest |ρ| with p ≤ 5 %: the tables of Kendall & Gibbons."""
    line = list(range(size))
    found = {
        round(abs(result.rho), 3)
        for order in itertools.permutations(line)
        if (result := rank_correlation(line, order, expected=UP)).p_value <= 0.05
    }
    assert min(found) == pytest.approx(critical, abs=5e-4)
    assert critical_rho(size) == pytest.approx(critical, abs=5e-4)


def test_three_points_are_never_significant():
    assert rank_correlation([1, 2, 3], [1, 2, 3], expected=UP).p_value == pytest.approx(1 / 3)
    assert critical_rho(3) == math.inf
    assert critical_rho(3, level=0.4) == pytest.approx(1)


def test_a_sign_is_right_or_wrong_by_what_is_expected():
    loss, accuracy, kappa = [0.1, 0.2, 0.4], [0.9, 0.8, 0.7], [10.0, 1e3, math.inf]
    assert rank_correlation(kappa, loss, expected=UP).agrees is True
    assert rank_correlation(kappa, accuracy, expected=DOWN).agrees is True
    assert rank_correlation(kappa, accuracy, expected=UP).agrees is False


def test_nothing_is_said_of_points_that_do_not_vary():
    for x, y in (([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [5, 5, 5]), ([1], [2]), ([], [])):
        found = rank_correlation(x, y, expected=UP)
        assert math.isnan(found.rho)
        assert math.isnan(found.p_value)
        assert found.agrees is None


def test_one_control_is_the_textbook_formula():
    """ρ_xy·z = (ρ_xy - ρ_xz ρ_yz) / √((1 - ρ_xz²)(1 - ρ_yz²))."""
    x, y = drawn(1, 9, ties=False)
    z = drawn(2, 9, ties=True)[0]
    xy, xz, yz = (scipy.stats.spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    want = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    found = partial_rank_correlation(x, y, [z], expected=UP)
    assert found.rho == pytest.approx(want)
    t = want * math.sqrt(6 / (1 - want**2))
    assert found.p_value == pytest.approx(2 * scipy.stats.t.sf(abs(t), 6))


def test_two_controls_are_the_inverse_of_the_matrix_of_correlations():
    """ρ_xy·z = -P_xy / √(P_xx P_yy) with the precision matrix P (second implementation)."""
    four = [drawn(seed, 10, ties=False)[0] for seed in range(4)]
    precision = np.linalg.inv(scipy.stats.spearmanr(np.array(four).T).statistic)
    want = -precision[0, 1] / math.sqrt(precision[0, 0] * precision[1, 1])
    found = partial_rank_correlation(four[0], four[1], four[2:], expected=UP)
    assert found.rho == pytest.approx(want)
    again = partial_rank_correlation(four[0], four[1], [*four[2:], four[2]], expected=UP)
    assert (again.rho, again.p_value) == pytest.approx((found.rho, found.p_value))


def test_what_a_control_explains_has_no_partial_correlation():
    x, y = drawn(0, 7, ties=False)
    assert math.isnan(partial_rank_correlation(x, y, [x], expected=UP).rho)
    assert math.isnan(partial_rank_correlation(x[:3], y[:3], [[1, 3, 2]], expected=UP).p_value)


def test_the_mean_over_data_sets_is_that_of_fishers_z():
    assert mean_correlation([0.5, -0.5]) == pytest.approx(0)
    z = (math.atanh(0.2) + math.atanh(0.9)) / 2
    assert mean_correlation([0.2, 0.9, math.nan]) == pytest.approx(math.tanh(z))
    assert mean_correlation([1.0, 1.0]) == 1
    z = (math.atanh(0.2) + math.atanh(0.995)) / 2
    assert mean_correlation([0.2, 1.0]) == pytest.approx(math.tanh(z))
    assert math.isnan(mean_correlation([]))


def test_wrong_input_is_named():
    with pytest.raises(InputError, match="predictor: found NaN"):
        rank_correlation([1, math.nan], [1, 2], expected=UP)
    with pytest.raises(InputError, match="size: found 40"):
        critical_rho(40)
    with pytest.raises(InputError, match=r"found \[3, 2\] points"):
        rank_correlation([1, 2, 3], [1, 2], expected=UP)
    with pytest.raises(InputError, match=r"found \[2, 2, 1\] points"):
        partial_rank_correlation([1, 2], [1, 2], [[1]], expected=UP)


# ---------------------------------------------------------------- several data sets


def rhos(pairs: list[tuple[list[float], list[float]]], orders: list[tuple[int, ...]]) -> float:
    """Mean of scipy's ρ with the points of y in some order, one order for each data set."""
    found = [
        scipy.stats.spearmanr(x, [y[i] for i in order]).statistic
        for (x, y), order in zip(pairs, orders, strict=True)
    ]
    return float(np.mean(found))


@pytest.mark.parametrize("ties", [False, True])
def test_one_order_of_the_choices_serves_all_data_sets(ties):
    """p by definition: the share of orders, the same in all three, with a mean ρ as large."""
    pairs = [drawn(seed, 5, ties=ties) for seed in (1, 2, 4)]
    every = [rhos(pairs, [order] * 3) for order in itertools.permutations(range(5))]
    found = mean_rank_correlation(
        *map(list, zip(*pairs, strict=True)), expected=UP, shares_points=True
    )
    assert found.rho == pytest.approx(every[0], abs=1e-12)
    assert found.p_value == pytest.approx(np.mean(np.abs(every) >= abs(every[0]) - 1e-12))
    assert found.is_exact


def test_data_sets_that_share_no_points_have_orders_of_their_own():
    pairs = [drawn(seed, 3, ties=False) for seed in (0, 1)]
    orders = list(itertools.permutations(range(3)))
    every = [rhos(pairs, [one, other]) for one in orders for other in orders]
    found = mean_rank_correlation(
        *map(list, zip(*pairs, strict=True)), expected=UP, shares_points=False
    )
    assert found.rho == pytest.approx(every[0], abs=1e-12)
    want = np.mean(np.abs(every) >= abs(every[0]) - 1e-12)
    assert found.p_value == pytest.approx(want, abs=4 / math.sqrt(DRAWS))
    assert not found.is_exact


def test_of_one_data_set_it_is_the_exact_test():
    x, y = drawn(3, 7, ties=True)
    one = rank_correlation(x, y, expected=DOWN)
    found = mean_rank_correlation([x], [y], expected=DOWN, shares_points=False)
    assert (found.rho, found.p_value) == pytest.approx((one.rho, one.p_value))
    assert found.is_exact


def test_drawn_orders_agree_with_all_of_them():
    """Nine points are more than are counted: 362,880 orders, here by numpy."""
    x, y = drawn(5, 9, ties=False)
    found = mean_rank_correlation([x], [y], expected=UP, shares_points=True)
    ranks = [scipy.stats.rankdata(values) - 5 for values in (x, y)]
    orders = np.array(list(itertools.permutations(ranks[1])), dtype=np.int8)
    sums = np.abs(orders @ ranks[0])
    want = np.mean(sums >= abs(ranks[0] @ ranks[1]) - 1e-9)
    assert found.p_value == pytest.approx(want, abs=4 / math.sqrt(DRAWS))
    line = list(range(15))
    assert mean_rank_correlation([line], [line], expected=UP, shares_points=True).p_value == (
        1 / (DRAWS + 1)
    )


def test_what_does_not_vary_is_left_out_of_the_mean():
    x, y = drawn(2, 6, ties=False)
    both = mean_rank_correlation([x, x], [y, [1.0] * 6], expected=UP, shares_points=True)
    assert both.rho == pytest.approx(rank_correlation(x, y, expected=UP).rho)
    none = mean_rank_correlation([x], [[1.0] * 6], expected=UP, shares_points=True)
    assert math.isnan(none.rho)
    assert math.isnan(none.p_value)
    with pytest.raises(InputError, match="the same ones"):
        mean_rank_correlation([x, x[:5]], [y, y[:5]], expected=UP, shares_points=True)
