"""Kernel logistic regression against its primal problem in explicit features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
from scipy.special import logsumexp, softmax
from sklearn.linear_model import LogisticRegression

from raykernel.analysis.gram import decompose
from raykernel.analysis.logistic import _Problem, solve_logistic
from raykernel.analysis.targets import one_hot
from raykernel.errors import InputError, NotPositiveSemidefiniteError
from tests.analysis.problems import Problem, draw

RIDGE = [1e-3, 1e-2, 0.1, 1.0]
SCALING = [1.0, 10.0, math.inf]


def offset(f0, scaling):
    return np.zeros_like(f0) if math.isinf(scaling) else f0 / scaling


def operator_norm(k_tt, size):
    return np.linalg.norm(k_tt.reshape(size, size), 2)


def primal(problem: Problem, ridge: float, scaling: float) -> np.ndarray:
    """min_w Σ CE(softmax(J w + f0/s), y) + σ/2 |w|² by Newton's method with the dense Hessian."""
    n, c, p = problem.j_train.shape
    y = one_hot(problem.labels, c)
    flat = problem.j_train.reshape(n * c, p)
    sigma = ridge * operator_norm(problem.k_tt, n * c)

    def loss(w):
        h = (flat @ w).reshape(n, c) + offset(problem.f0, scaling)
        return (logsumexp(h, axis=1) - (y * h).sum(1)).sum() + sigma / 2 * w @ w

    w = np.zeros(p)
    for _ in range(60):
        q = softmax((flat @ w).reshape(n, c) + offset(problem.f0, scaling), axis=1)
        gradient = flat.T @ (q - y).ravel() + sigma * w
        blocks = [np.diag(row) - np.outer(row, row) for row in q]
        hessian = sigma * np.eye(p) + sum(
            j.T @ b @ j for j, b in zip(problem.j_train, blocks, strict=True)
        )
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while loss(w - size * step) > loss(w) + 1e-12 and size > 1e-6:
            size /= 2
        w = w - size * step
    assert np.linalg.norm(gradient) < 1e-9
    return w


@pytest.mark.parametrize(("n", "c", "p"), [(8, 2, 40), (6, 3, 10)])
def test_every_grid_point_is_the_primal_minimum(n, c, p):
    """h(x) = J(x) w + f0(x)/s of the minimum over w; by the representer theorem w = Jᵀ α."""
    problem = draw(n=n, c=c, p=p)
    y = one_hot(problem.labels, c)
    solution = solve_logistic(problem.k_tt, y, ridge=RIDGE, f0=problem.f0, f0_scaling=SCALING)
    assert solution.converged.all()
    got = solution.predict(problem.k_et, problem.f0_eval)
    fits = iter(solution.fits())
    for s, scaling in enumerate(SCALING):
        for r, ridge in enumerate(RIDGE):
            want = problem.j_eval @ primal(problem, ridge, scaling)
            want += offset(problem.f0_eval, scaling)
            np.testing.assert_allclose(got[s, r], want, rtol=0, atol=1e-8 * np.abs(want).max())
            fit = next(fits)
            assert (fit.point.ridge, fit.point.f0_scaling, fit.excluded) == (ridge, scaling, "")
            found = fit.predict(problem.k_et, problem.f0_eval)
            np.testing.assert_allclose(found, got[s, r], rtol=1e-12, atol=1e-12)


def test_gradient_vanishes_in_the_dual_coefficients():
    """∂/∂α = K (σ α - (y - softmax h)) = 0, and the loss grows in every direction."""
    problem = draw(n=10, c=3, p=200)
    y = one_hot(problem.labels, 3)
    flat = problem.k_tt.reshape(30, 30)
    solution = solve_logistic(problem.k_tt, y, ridge=[0.05])
    alpha, sigma = solution.alpha[0, 0].ravel(), 0.05 * np.linalg.norm(flat, 2)

    def loss(at):
        h = (flat @ at).reshape(y.shape)
        return (logsumexp(h, axis=1) - (y * h).sum(1)).sum() + sigma / 2 * at @ flat @ at

    def gradient(at):
        return flat @ (sigma * at - (y - softmax((flat @ at).reshape(y.shape), axis=1)).ravel())

    assert np.linalg.norm(gradient(alpha)) < 1e-8 * np.linalg.norm(gradient(0 * alpha))
    assert solution.loss[0, 0] == pytest.approx(loss(alpha), rel=1e-12)
    rng = np.random.default_rng(1)
    for step in (1e-3, 1.0):
        direction = step * rng.normal(size=30) * np.abs(alpha).max()
        assert loss(alpha + direction) > loss(alpha)


def test_the_gradient_that_is_followed_is_that_of_the_loss():
    problem = draw(n=5, c=3, p=60)
    y = one_hot(problem.labels, 3)
    part = _Problem.of(decompose(problem.k_tt, y), y, problem.f0, 2.0)
    at = np.random.default_rng(2).normal(size=15)
    found = part.loss_and_gradient(at)[1]
    wanted = scipy.optimize.approx_fprime(at, lambda w: part.loss_and_gradient(w)[0], 1e-7)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("c", [2, 4])
def test_with_one_kernel_for_all_outputs_it_is_scikit_learns(c):
    """K[i, a, j, b] = δ_ab ⟨φ_i, φ_j⟩: multinomial regression on φ, C = 1/σ, no intercept."""
    rng = np.random.default_rng(3)
    features, new = rng.normal(size=(20, 6)), rng.normal(size=(5, 6))
    labels = rng.integers(0, c, 20)
    k_tt, k_et = (
        np.einsum("ij,ab->iajb", rows @ features.T, np.eye(c)) for rows in (features, new)
    )
    solution = solve_logistic(k_tt, one_hot(labels, c), ridge=[0.03])
    sigma = 0.03 * operator_norm(k_tt, 20 * c)
    # Two classes: scikit-learn has one vector v with logits (0, v x); ours are (-v/2, v/2) x.
    penalty = 1 / sigma if c > 2 else 2 / sigma
    theirs = LogisticRegression(C=penalty, fit_intercept=False, tol=1e-12, max_iter=10_000)
    theirs.fit(features, labels)
    found = softmax(solution.predict(k_et)[0, 0], axis=1)
    np.testing.assert_allclose(found, theirs.predict_proba(new), atol=1e-7)


def test_a_point_does_not_depend_on_the_grid_around_it():
    problem = draw(n=8, c=2, p=40)
    y = one_hot(problem.labels, 2)
    whole = solve_logistic(problem.k_tt, y, ridge=RIDGE[::-1], f0=problem.f0, f0_scaling=SCALING)
    alone = solve_logistic(problem.k_tt, y, ridge=[1e-3], f0=problem.f0, f0_scaling=[10.0])
    expected = alone.predict(problem.k_et, problem.f0_eval)[0, 0]
    found = whole.predict(problem.k_et, problem.f0_eval)[1, -1]
    np.testing.assert_allclose(found, expected, atol=1e-8 * np.abs(expected).max())
    # Its neighbour's minimum is a better start than zero.
    assert whole.iterations[1, -1] < alone.iterations[0, 0]


def test_singular_kernels_take_the_minimum_norm_solution():
    """Of all α with the same K α the one without a part that K does not see."""
    problem = draw(n=8, c=2, p=4)
    y = one_hot(problem.labels, 2)
    solution = solve_logistic(problem.k_tt, y, ridge=[0.01])
    assert solution.num_dropped == 12
    alpha = solution.alpha[0, 0].ravel()
    flat = problem.k_tt.reshape(16, 16)
    np.testing.assert_allclose(np.linalg.pinv(flat, rcond=1e-10) @ flat @ alpha, alpha, atol=1e-9)
    want = problem.j_eval @ primal(problem, 0.01, math.inf)
    np.testing.assert_allclose(solution.predict(problem.k_et)[0, 0], want, atol=1e-8)


def test_condition_number_bounds_that_of_the_hessian():
    problem = draw(n=8, c=3, p=30)
    y = one_hot(problem.labels, 3)
    solution = solve_logistic(problem.k_tt, y, ridge=[1e-3, 0.1])
    flat = problem.j_train.reshape(24, 30)
    for r, ridge in enumerate([1e-3, 0.1]):
        sigma = ridge * np.linalg.norm(flat, 2) ** 2
        q = softmax((flat @ flat.T @ solution.alpha[0, r].ravel()).reshape(8, 3), axis=1)
        hessian = sigma * np.eye(30) + sum(
            j.T @ (np.diag(row) - np.outer(row, row)) @ j
            for j, row in zip(problem.j_train, q, strict=True)
        )
        exact = np.linalg.cond(hessian)
        assert exact <= solution.condition_number[0, r] <= 3 * exact


def test_a_point_that_does_not_converge_is_excluded_and_says_why():
    problem = draw(n=12, c=2, p=40)
    y = one_hot(problem.labels, 2)
    solution = solve_logistic(problem.k_tt, y, ridge=[1e-3, 1.0], max_iterations=4)
    hard, _ = solution.fits()
    assert not solution.converged[0, 0]
    assert "after 4 iterations" in hard.excluded


def test_wrong_shapes_and_values_are_refused():
    problem = draw(n=4, c=2, p=9)
    y = one_hot(problem.labels, 2)
    with pytest.raises(InputError, match="expected"):
        solve_logistic(problem.k_tt[:3], y)
    with pytest.raises(InputError, match="no minimum"):
        solve_logistic(problem.k_tt, y, ridge=[0.0, 1.0])
    with pytest.raises(InputError, match="probabilities"):
        solve_logistic(problem.k_tt, 2 * y - 1)
    with pytest.raises(InputError, match="zero"):
        solve_logistic(0 * problem.k_tt, y)
    with pytest.raises(InputError, match="f0"):
        solve_logistic(problem.k_tt, y, f0_scaling=[10.0])
    with pytest.raises(NotPositiveSemidefiniteError, match="same order"):
        solve_logistic(problem.k_tt - 90 * np.eye(8).reshape(4, 2, 4, 2), y)
