"""Asymmetric kernel regression against the dense system of He et al. (2022), point by point."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raykernel.analysis.asymmetric import solve_asymmetric
from raykernel.analysis.ridge import solve_ridge
from raykernel.analysis.targets import plus_minus
from raykernel.errors import InputError
from tests.analysis.problems import draw

GAMMA = [0.01, 0.1, 1.0, 10.0]
SCALING = [10.0, math.inf]
RIDGE = [0.0, 0.1]
SHARES = [1.0, 0.3, 0.0]


def dense(k, y, gamma, ridge, offset):
    """(α*, β*) of [[I/γ, H], [Hᵀ, I/γ]] = 1 - y ⊙ f0/s, H_ij = y_i K_ij y_j, by loops."""
    size = y.size
    flat, code = k.reshape(size, size), y.ravel()
    flat = flat + ridge * np.linalg.norm(flat, 2) * np.eye(size)
    h = np.array([[code[i] * flat[i, j] * code[j] for j in range(size)] for i in range(size)])
    system = np.block([[np.eye(size) / gamma, h], [h.T, np.eye(size) / gamma]])
    rhs = np.tile(1 - code * offset.ravel(), 2)
    found = np.linalg.solve(system, rhs)
    return found[:size] * code, found[size:] * code, np.linalg.cond(system)


@pytest.mark.parametrize(("n", "c", "p"), [(8, 2, 40), (6, 3, 10), (7, 1, 30)])
def test_every_grid_point_solves_the_dense_system(n, c, p):
    """f_s(x) = K(x, X)(β* ⊙ Y), f_t(x) = K(X, x)(α* ⊙ Y), K(x, x') = ⟨g(x), sign g(x')⟩."""
    problem = draw(n=n, c=c, p=p, seed=1)
    y = plus_minus(problem.labels, c) if c > 1 else np.where(problem.f0 > 0, 1.0, -1.0)
    k, k_eval, k_flipped = problem.asymmetric
    solution = solve_asymmetric(
        k, y, gamma=GAMMA, ridge=RIDGE, f0=problem.f0, f0_scaling=SCALING, c=SHARES
    )
    got = solution.predict(k_eval, problem.f0_eval, k_flipped)
    fits = iter(solution.fits())
    for s, scaling in enumerate(SCALING):
        by = 0.0 if math.isinf(scaling) else 1 / scaling
        for r, ridge in enumerate(RIDGE):
            for g, gamma in enumerate(GAMMA):
                alpha, beta, condition = dense(k, y, gamma, ridge, problem.f0 * by)
                scale = np.abs(beta).max() * condition
                np.testing.assert_allclose(
                    solution.beta[s, r, g].ravel(), beta, rtol=0, atol=1e-13 * scale
                )
                assert solution.condition_number[r, g] == pytest.approx(condition, rel=1e-6)
                assert solution.residual[s, r, g] < 1e-14 * condition
                f_s = np.einsum("iajb,jb->ia", k_eval, beta.reshape(y.shape))
                f_t = np.einsum("iajb,jb->ia", k_flipped, alpha.reshape(y.shape))
                for o, share in enumerate(SHARES):
                    want = share * f_s + (1 - share) * f_t + problem.f0_eval * by
                    tolerance = 1e-13 * condition * max(np.abs(f_s).max(), np.abs(f_t).max())
                    np.testing.assert_allclose(got[s, r, g, o], want, rtol=0, atol=tolerance)
                    fit = next(fits)
                    point = (fit.point.f0_scaling, fit.point.ridge, fit.point.gamma, fit.point.c)
                    assert point == (scaling, ridge, gamma, share)
                    assert (fit.alpha_flipped is None) == (share == 1)
                    found = fit.predict(k_eval, problem.f0_eval, k_flipped)
                    np.testing.assert_allclose(found, got[s, r, g, o], rtol=1e-12, atol=1e-12)


def test_it_is_the_stationary_point_of_the_least_squares_of_he_et_al():
    """L(ω, ν) = ⟨ω, ν⟩ + γ/2 Σ (1 - y f_s)² + γ/2 Σ (1 - y f_t)², f_s = ⟨g, ω⟩, f_t = ⟨sign g, ν⟩.

    With initial logits f_s + f0/s and f_t + f0/s take the discriminants' places. The multipliers
    of their saddle are γ times the errors, with the sign that He et al. give them.
    """
    problem = draw(n=5, c=2, p=30)
    y, gamma, by = plus_minus(problem.labels, 2), 0.7, 0.1
    solution = solve_asymmetric(
        problem.asymmetric[0], y, gamma=[gamma], f0=problem.f0, f0_scaling=[1 / by]
    )
    alpha, beta = solution.alpha[0, 0, 0], solution.beta[0, 0, 0]
    nu = np.einsum("iap,ia->p", problem.j_train, alpha)
    omega = np.einsum("iap,ia->p", np.sign(problem.j_train), beta)
    error_s = y - problem.j_train @ omega - by * problem.f0
    error_t = y - np.sign(problem.j_train) @ nu - by * problem.f0
    np.testing.assert_allclose(gamma * error_s, alpha, atol=1e-10)
    np.testing.assert_allclose(gamma * error_t, beta, atol=1e-10)

    def lagrangian(w, v):
        e_s = y - problem.j_train @ w - by * problem.f0
        e_t = y - np.sign(problem.j_train) @ v - by * problem.f0
        return w @ v + gamma / 2 * (e_s**2).sum() + gamma / 2 * (e_t**2).sum()

    rng, step = np.random.default_rng(0), 1e-5
    for _ in range(5):
        w, v = rng.normal(size=(2, 30))
        slope = lagrangian(omega + step * w, nu + step * v) - lagrangian(
            omega - step * w, nu - step * v
        )
        assert abs(slope / (2 * step)) < 1e-4


def test_a_symmetric_kernel_is_least_squares_with_ridge_one_over_gamma():
    """φ_s = φ_t: α = β and (K + I/γ) β = y, "the standard kernel problem" (appendix A.3)."""
    problem = draw(n=8, c=2, p=40)
    y, k = plus_minus(problem.labels, 2), problem.k_tt
    top = np.linalg.norm(k.reshape(16, 16), 2)
    found = solve_asymmetric(k, y, gamma=[0.2])
    np.testing.assert_allclose(found.alpha, found.beta, rtol=1e-7)
    wanted = solve_ridge(k, y, ridge=[5 / top]).alpha[0, 0]
    np.testing.assert_allclose(found.beta[0, 0, 0], wanted, rtol=1e-7)


def test_scaling_the_kernel_is_scaling_gamma():
    problem = draw(n=6, c=3, p=50)
    y = plus_minus(problem.labels, 3)
    k, k_eval, _ = problem.asymmetric
    one = solve_asymmetric(k, y, gamma=[0.1, 1.0], ridge=RIDGE).predict(k_eval)
    big = solve_asymmetric(9 * k, y, gamma=[0.1 / 9, 1 / 9], ridge=RIDGE).predict(9 * k_eval)
    np.testing.assert_allclose(big, one, rtol=1e-8)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_singular_point_is_excluded_with_its_reason(dtype):
    problem = draw(n=6, c=2, p=40)
    y = plus_minus(problem.labels, 2)
    k, k_eval, _ = problem.asymmetric
    k = k.astype(dtype)
    values = np.linalg.svd(k.reshape(12, 12).astype(np.float64), compute_uv=False)
    gamma = [1 / values[3], 1.0, float(1 / (values[3] * (1 + 1e-6)))]
    solution = solve_asymmetric(k, y, gamma=gamma)
    # What float64 resolves is noise in a kernel of float32.
    assert solution.singular.tolist() == [[True, False, dtype is np.float32]]
    outputs = solution.predict(k_eval)[0, 0, :, 0]
    assert np.isnan(outputs[0]).all()
    assert np.isfinite(outputs[1]).all()
    fits = list(solution.fits())
    assert fits[0].excluded.startswith("1/gamma = ")
    assert f"{values[3]:.6g}"[:6] in fits[0].excluded
    assert fits[1].excluded == ""
    if dtype is np.float64:
        assert solution.condition_number[0, 2] > 1e6


def test_wrong_shapes_and_values_are_refused():
    problem = draw(n=4, c=2, p=9)
    k, k_eval, _ = problem.asymmetric
    y = plus_minus(problem.labels, 2)
    with pytest.raises(InputError, match="2 y - 1"):
        solve_asymmetric(k, (y + 1) / 2)
    with pytest.raises(InputError, match="expected"):
        solve_asymmetric(k[:3], y)
    with pytest.raises(InputError, match="gamma"):
        solve_asymmetric(k, y, gamma=[0.0])
    with pytest.raises(InputError, match="0 to 1"):
        solve_asymmetric(k, y, c=[1.5])
    with pytest.raises(InputError, match="f0"):
        solve_asymmetric(k, y, f0_scaling=[10.0])
    mixed = solve_asymmetric(k, y, c=[0.5])
    for predict in (mixed.predict, next(mixed.fits()).predict):
        with pytest.raises(InputError, match="asigngd_flipped"):
            predict(k_eval)
