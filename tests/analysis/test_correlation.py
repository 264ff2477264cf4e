"""Rank correlations against scipy and against the definition, order by order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from raykernel.analysis.correlation import (
    EXACT_SIZE,
    Expected,
    critical_rho,
    mean_correlation,
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
