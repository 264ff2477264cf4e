"""Kernel ridge regression against its definition, point by point."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
from sklearn.kernel_ridge import KernelRidge

from raykernel.analysis.ridge import solve_ridge
from raykernel.analysis.targets import one_hot
from raykernel.errors import InputError, NotPositiveSemidefiniteError

RIDGE = [0.0, 1e-3, 1e-2, 0.1, 1.0]
SCALING = [10.0, 100.0, math.inf]


def problem(n: int, m: int, c: int, p: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    j_train, j_eval = rng.normal(size=(n, c, p)), rng.normal(size=(m, c, p))
    k_tt = np.einsum("iap,jbp->iajb", j_train, j_train)
    k_et = np.einsum("iap,jbp->iajb", j_eval, j_train)
    labels = rng.integers(0, c, n)
    return k_tt, k_et, labels, rng.normal(size=(n, c)), rng.normal(size=(m, c))


def dense_prediction(k_tt, k_et, y, f0, f0_eval, ridge, scaling):
    """α = lstsq(K + σI, y - f0/s), h = K_eval α + f0_eval/s, as a matrix program."""
    nc = y.size
    matrix = k_tt.reshape(nc, nc)
    sigma = ridge * np.linalg.norm(matrix, 2)
    offset, offset_eval = (0.0, 0.0) if math.isinf(scaling) else (f0 / scaling, f0_eval / scaling)
    alpha = np.linalg.lstsq(matrix + sigma * np.eye(nc), (y - offset).ravel(), rcond=1e-12)[0]
    return (k_et.reshape(-1, nc) @ alpha).reshape(f0_eval.shape) + offset_eval


@pytest.mark.parametrize(("n", "c", "p"), [(8, 2, 40), (6, 3, 10), (5, 1, 30)])
def test_every_grid_point_is_the_dense_solution(n, c, p):
    k_tt, k_et, labels, f0, f0_eval = problem(n, 7, c, p)
    y = one_hot(labels, c)
    solution = solve_ridge(k_tt, y, ridge=RIDGE, f0=f0, f0_scaling=SCALING)
    got = solution.predict(k_et, f0_eval)
    for s, scaling in enumerate(SCALING):
        for r, ridge in enumerate(RIDGE):
            want = dense_prediction(k_tt, k_et, y, f0, f0_eval, ridge, scaling)
            np.testing.assert_allclose(got[s, r], want, rtol=1e-8, atol=1e-10)


def test_ridge_is_relative_so_scaling_the_kernel_changes_no_prediction():
    k_tt, k_et, labels, f0, f0_eval = problem(6, 5, 2, 20)
    y = one_hot(labels, 2)
    one = solve_ridge(k_tt, y, ridge=RIDGE, f0=f0, f0_scaling=SCALING).predict(k_et, f0_eval)
    big = solve_ridge(9 * k_tt, y, ridge=RIDGE, f0=f0, f0_scaling=SCALING)
    np.testing.assert_allclose(big.predict(9 * k_et, f0_eval), one, rtol=1e-8)


def test_rank_deficient_kernel_takes_the_minimum_norm_solution_and_says_so():
    k_tt, _, labels, _, _ = problem(6, 5, 2, 4)
    y = one_hot(labels, 2)
    solution = solve_ridge(k_tt, y, ridge=[0.0, 0.1])
    assert solution.num_dropped == 12 - 4
    want = np.linalg.pinv(k_tt.reshape(12, 12), rcond=1e-10) @ y.ravel()
    np.testing.assert_allclose(solution.alpha[0, 0].ravel(), want, rtol=1e-6, atol=1e-9)
    left = k_tt.reshape(12, 12) @ solution.alpha[0, 0].ravel() - y.ravel()
    assert solution.residual[0, 0] == pytest.approx(np.linalg.norm(left) / np.linalg.norm(y))
    assert solution.residual[0, 1] == 0


def test_without_a_ridge_a_singular_kernel_of_several_classes_is_least_squares_in_parameters():
    """h = J w, w the least-squares solution of J w = y of least norm (f0 = ∞); scipy finds it."""
    rng = np.random.default_rng(4)
    j_train, j_eval = rng.normal(size=(9, 4, 11)), rng.normal(size=(6, 4, 11))
    y = one_hot(rng.integers(0, 4, 9), 4)
    k_tt, k_et = (np.einsum("iap,jbp->iajb", j, j_train) for j in (j_train, j_eval))
    solution = solve_ridge(k_tt, y, ridge=[0.0], f0_scaling=[math.inf])
    assert solution.num_dropped == 36 - 11
    weights = scipy.linalg.lstsq(j_train.reshape(36, 11), y.ravel(), lapack_driver="gelsy")[0]
    np.testing.assert_allclose(solution.predict(k_et)[0, 0], j_eval @ weights, atol=1e-9)


@pytest.mark.parametrize("c", [2, 5])
def test_with_one_kernel_for_all_outputs_it_is_scikit_learns(c):
    """K[i, a, j, b] = δ_ab k(x_i, x_j): kernel ridge regression of each class on its own."""
    rng = np.random.default_rng(5)
    features, new = rng.normal(size=(20, 6)), rng.normal(size=(7, 6))
    y = one_hot(rng.integers(0, c, 20), c)
    k_tt, k_et = (
        np.einsum("ij,ab->iajb", rows @ features.T, np.eye(c)) for rows in (features, new)
    )
    found = solve_ridge(k_tt, y, ridge=[1e-3, 0.1]).predict(k_et)[0]
    for got, ridge in zip(found, [1e-3, 0.1], strict=True):
        sigma = ridge * np.linalg.norm(features, 2) ** 2
        theirs = KernelRidge(alpha=sigma, kernel="linear").fit(features, y)
        np.testing.assert_allclose(got, theirs.predict(new), atol=1e-10)


def test_condition_number_is_that_of_the_regularised_matrix():
    k_tt, _, labels, _, _ = problem(6, 5, 2, 40)
    solution = solve_ridge(k_tt, one_hot(labels, 2), ridge=[0.0, 0.5])
    matrix = k_tt.reshape(12, 12)
    top = np.linalg.norm(matrix, 2)
    want = [np.linalg.cond(matrix), np.linalg.cond(matrix + 0.5 * top * np.eye(12))]
    np.testing.assert_allclose(solution.condition_number, want, rtol=1e-8)


def test_float32_noise_is_not_solved_for():
    """A float32 kernel resolves no eigenvalue below nc · 1.2e-7 · λ_max."""
    k_tt, _, labels, _, _ = problem(10, 5, 2, 6)
    solution = solve_ridge(k_tt.astype(np.float32), one_hot(labels, 2))
    assert solution.num_dropped == 14


def test_a_thousand_ridges_take_one_decomposition(monkeypatch):
    """What is cubic in nc is done once; a ridge costs one product with the eigenvectors."""
    k_tt, _, labels, _, _ = problem(6, 5, 2, 40)
    called, eigh = [], scipy.linalg.eigh
    monkeypatch.setattr(scipy.linalg, "eigh", lambda *a, **b: called.append(1) or eigh(*a, **b))
    path = solve_ridge(k_tt, one_hot(labels, 2), ridge=np.geomspace(1e-6, 10, 1000).tolist())
    assert len(called) == 1
    one = solve_ridge(k_tt, one_hot(labels, 2), ridge=[path.ridge[421]])
    np.testing.assert_allclose(path.alpha[0, 421], one.alpha[0, 0], rtol=1e-12)


def test_wrong_shapes_and_values_are_refused():
    k_tt, _, labels, _, _ = problem(4, 3, 2, 9)
    y = one_hot(labels, 2)
    with pytest.raises(InputError, match="expected"):
        solve_ridge(k_tt[:3], y)
    with pytest.raises(InputError, match="NaN"):
        solve_ridge(k_tt * np.nan, y)
    with pytest.raises(InputError, match="f0"):
        solve_ridge(k_tt, y, f0_scaling=[10.0])
    broken = k_tt.copy()
    broken[2, 1, 0, 0] = np.nan
    with pytest.raises(InputError, match="the first of train example 2"):
        solve_ridge(broken, y)
    with pytest.raises(NotPositiveSemidefiniteError, match="same order"):
        solve_ridge(k_tt - 5 * np.eye(8).reshape(4, 2, 4, 2) * np.abs(k_tt).max(), y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_rounding_does_to_a_kernel_is_no_reason_to_refuse_it(dtype):
    """n c ε |K|, one unit of noise, on top of rank 9 of 60: eigenvalues below zero, asymmetric."""
    k_tt, _, labels, _, _ = problem(30, 3, 2, 9)
    unit = 60 * np.finfo(np.float32).eps * np.linalg.norm(k_tt.reshape(60, 60), 2)
    error = np.random.default_rng(1).normal(size=k_tt.shape)
    error *= unit / np.linalg.norm(error)
    kernel = (k_tt + error).astype(dtype)
    assert np.linalg.eigvalsh(kernel.reshape(60, 60))[0] < 0
    solve_ridge(kernel, one_hot(labels, 2), ridge=[1e-2])


@pytest.mark.parametrize(("units", "refused"), [(5.0, False), (20.0, True)])
def test_eigenvalues_below_zero_beyond_rounding_stop_the_solver(units, refused):
    """Ten units of noise are the limit; the example with most of the eigenvector is named."""
    k_tt, _, labels, _, _ = problem(6, 3, 2, 40)
    flat = k_tt.reshape(12, 12)
    values, vectors = np.linalg.eigh(flat)
    values[0] = -units * 12 * np.finfo(np.float32).eps * values[-1]
    kernel = ((vectors * values) @ vectors.T).reshape(k_tt.shape)
    example = (vectors[:, 0] ** 2).reshape(6, 2).sum(1).argmax()
    assert refuses(kernel, labels, f"Train example {example} has most") == refused


@pytest.mark.parametrize(("units", "refused"), [(5.0, False), (20.0, True)])
def test_asymmetry_beyond_rounding_stops_the_solver(units, refused):
    """The pair that differs most is named; only the symmetric part was solved with before."""
    k_tt, _, labels, _, _ = problem(6, 3, 2, 40)
    kernel, top = k_tt.copy(), np.linalg.norm(k_tt.reshape(12, 12), 2)
    step = units * 12 * np.finfo(np.float32).eps * top / np.sqrt(2)
    kernel[4, 1, 2, 0] += step
    kernel[2, 0, 4, 1] -= step
    assert refuses(kernel, labels, "between train examples 2 and 4") == refused


def refuses(kernel, labels, text):
    """Whether a kernel is, and for that reason."""
    try:
        solve_ridge(kernel, one_hot(labels, 2))
    except NotPositiveSemidefiniteError as error:
        return text in str(error)
    return False
