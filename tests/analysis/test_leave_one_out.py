"""Leave-one-out residuals against leaving one out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raykernel.analysis.leave_one_out import leave_one_out
from raykernel.analysis.outputs import Outputs
from raykernel.analysis.spectrum import spectrum
from raykernel.analysis.targets import one_hot
from raykernel.errors import InputError, NotPositiveSemidefiniteError
from tests.analysis.problems import draw


def contrasts(c):
    """An orthonormal basis of what sums to 0, another one than the code's."""
    drawn = np.random.default_rng(9).normal(size=(c, c))
    drawn[:, 0] = 1
    return np.linalg.qr(drawn)[0][:, 1:]


def brute_force(kernel, y, f0, sigma, basis):
    """Example after example with all its outputs: dropped, the others solved for, predicted."""
    n = len(y)
    k = np.einsum("iajb,ap,bq->ipjq", kernel, basis, basis)
    r = (y - f0) @ basis
    predictions = np.empty_like(f0)
    for i in range(n):
        others = np.delete(np.arange(n), i)
        m = r[others].size
        system = k[np.ix_(others, range(k.shape[1]), others)].reshape(m, m) + sigma * np.eye(m)
        alpha = np.linalg.solve(system, r[others].ravel())
        predictions[i] = f0[i] + basis @ (k[i][:, others].reshape(-1, m) @ alpha)
    return predictions


@pytest.mark.parametrize("sigma", [0.0, 0.3, 20.0])
@pytest.mark.parametrize(("c", "outputs"), [(2, None), (4, None), (3, Outputs.full), (1, None)])
def test_every_example_is_predicted_as_if_it_had_been_left_out(c, outputs, sigma):
    drawn = draw(n=7, c=c, p=60)
    y = one_hot(drawn.labels, c)
    basis = np.eye(c) if outputs is Outputs.full or c == 1 else contrasts(c)
    expected = brute_force(drawn.k_tt, y, drawn.f0, sigma, basis)
    found = leave_one_out(drawn.k_tt, y, sigma=sigma, f0=drawn.f0, outputs=outputs)
    np.testing.assert_allclose(found.predictions, expected, rtol=1e-8, atol=1e-8)
    seen = (y - expected) @ basis
    np.testing.assert_allclose(found.residuals, seen @ basis.T, rtol=1e-8, atol=1e-8)
    assert found.error == pytest.approx(np.mean([row @ row for row in seen]), rel=1e-8)
    if c == 1:
        assert math.isnan(found.accuracy)
    else:
        hits = [np.argmax(row) == label for row, label in zip(expected, drawn.labels, strict=True)]
        assert found.accuracy == np.mean(hits)


def test_it_is_ridge_regression_of_the_parameters_on_all_others():
    """w = argmin ‖J w - r‖² + σ‖w‖² without example i, and f_0(x_i) + J_i w; fewer parameters than
    rows, so that K itself is singular."""
    drawn, c, sigma = draw(n=9, c=3, p=5), 3, 0.7
    y = one_hot(drawn.labels, c)
    found = leave_one_out(drawn.k_tt, y, sigma=sigma, f0=drawn.f0, outputs=Outputs.full)
    for i in range(9):
        others = np.delete(np.arange(9), i)
        j, r = drawn.j_train[others].reshape(-1, 5), (y - drawn.f0)[others].ravel()
        w = np.linalg.solve(j.T @ j + sigma * np.eye(5), j.T @ r)
        expected = drawn.f0[i] + drawn.j_train[i] @ w
        np.testing.assert_allclose(found.predictions[i], expected, rtol=1e-8, atol=1e-8)


def test_examples_that_know_nothing_of_each_other_are_predicted_as_at_the_start():
    f0 = np.random.default_rng(0).normal(size=(4, 3))
    y = one_hot(np.array([0, 1, 2, 0]), 3)
    kernel = np.eye(12).reshape(4, 3, 4, 3)
    found = leave_one_out(kernel, y, sigma=0.5, f0=f0)
    np.testing.assert_allclose(found.predictions, f0, atol=1e-12)
    one = leave_one_out(kernel[:1, :, :1], y[:1], sigma=0.0, f0=f0[:1])
    np.testing.assert_allclose(one.predictions, f0[:1], atol=1e-12)


def test_it_knows_the_labels_which_the_condition_number_does_not():
    """The same kernel; targets along its top eigenvector are learnt, along the bottom one not."""
    rng = np.random.default_rng(1)
    vectors = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    values = np.geomspace(1, 512, 32)
    kernel = ((vectors * values) @ vectors.T).reshape(32, 1, 32, 1)
    assert spectrum(kernel).raw == pytest.approx(512)
    bottom, top = (
        leave_one_out(kernel, vectors[:, [k]] * math.sqrt(32), sigma=25.0).error for k in (0, -1)
    )
    assert top < 0.1
    assert bottom > 1


def test_what_all_logits_share_is_no_error_of_contrasts():
    drawn = draw(n=6, c=3, p=40)
    y = one_hot(drawn.labels, 3)
    shared = np.random.default_rng(3).normal(size=(6, 1))
    plain, moved = (leave_one_out(drawn.k_tt, y, sigma=1.0, f0=drawn.f0 + d) for d in (0, shared))
    np.testing.assert_allclose(moved.residuals, plain.residuals, atol=1e-10)
    np.testing.assert_allclose(moved.predictions, plain.predictions + shared, atol=1e-10)


def test_layers_are_summed():
    one, two = draw(c=2, p=40, seed=1), draw(c=2, p=30, seed=2)
    y = one_hot(one.labels, 2)
    both = leave_one_out([one.k_tt, two.k_tt], y, sigma=1.0)
    whole = leave_one_out(one.k_tt + two.k_tt, y, sigma=1.0)
    np.testing.assert_allclose(both.residuals, whole.residuals, atol=1e-12)


def test_wrong_input_is_named():
    drawn = draw(n=6, c=2, p=40)
    k, y = drawn.k_tt, one_hot(drawn.labels, 2)
    with pytest.raises(InputError, match=r"targets: found shape \(5, 2\), expected \(6, 2\)"):
        leave_one_out(k, y[:5], sigma=1.0)
    with pytest.raises(InputError, match=r"f0: found shape \(6, 1\)"):
        leave_one_out(k, y, sigma=1.0, f0=drawn.f0[:, :1])
    with pytest.raises(InputError, match="f0: found NaN"):
        leave_one_out(k, y, sigma=1.0, f0=drawn.f0 * math.nan)
    with pytest.raises(InputError, match=r"expected one shape \(n, c, n, c\)"):
        leave_one_out([k, k[:4]], y, sigma=1.0)
    with pytest.raises(InputError, match="rows and columns"):
        leave_one_out(k[:4], y, sigma=1.0)
    with pytest.raises(InputError, match="symmetric"):
        leave_one_out(drawn.asymmetric[0], y, sigma=1.0)
    for sigma in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="sigma: found"):
            leave_one_out(k, y, sigma=sigma)
    for outputs in (Outputs.trace, Outputs.pseudo):
        with pytest.raises(InputError, match="expected contrast or full"):
            leave_one_out(k, y, sigma=1.0, outputs=outputs)
    with pytest.raises(NotPositiveSemidefiniteError):
        leave_one_out(-k, y, sigma=1.0)


def test_a_singular_system_is_said():
    """Without a ridge, where features are fewer than rows; and with one that rounds away."""
    few = draw(n=8, c=2, p=4)
    y = one_hot(few.labels, 2)
    for sigma in (0.0, 1e-18):
        with pytest.raises(InputError, match=r"singular: 4 of 8 eigenvalues .* larger ridge"):
            leave_one_out(few.k_tt, y, sigma=sigma)
    with pytest.raises(InputError, match="singular"):
        leave_one_out(few.k_tt * 0, y, sigma=0.0)
