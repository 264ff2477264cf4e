"""Adding and removing layers: every statement against brute force on small matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raykernel.analysis.outputs import Outputs
from raykernel.analysis.perturbation import adding, removing
from raykernel.analysis.spectrum import spectrum
from raykernel.errors import InputError, NotPositiveSemidefiniteError

EPS = 1e-9
TRIALS = settings(max_examples=60, deadline=None)


def diagonal(*values: float) -> np.ndarray:
    return np.diag(np.asarray(values, dtype=np.float64))[:, None, :, None]


def drawn(seed: int, m: int, spread: float) -> np.ndarray:
    """A random kernel whose eigenvalues span `spread` powers of ten."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(m, m)))[0]
    values = 10.0 ** (spread * rng.uniform(size=m) + rng.normal())
    return ((basis * values) @ basis.T)[:, None, :, None]


def regularised(kernel: np.ndarray, ridge: float) -> np.ndarray:
    """K + ε (tr K / m) I, written out."""
    flat = kernel.reshape(len(kernel), -1)
    return flat + ridge * np.trace(flat) / len(flat) * np.eye(len(flat))


def inside(value: float, bounds: tuple[float, float], size: float) -> bool:
    return bounds[0] - EPS * size <= value <= bounds[1] + EPS * size


pairs = {
    "seed": st.integers(0, 10**6),
    "m": st.integers(1, 6),
    "spread": st.floats(0, 4),
    "ridge": st.sampled_from([0.0, 1e-4, 0.1]),
}


@TRIALS
@given(**pairs)
def test_weyl_mediant_and_rayleigh_bound_the_sum(seed, m, spread, ridge):
    one, two = drawn(seed, m, spread), drawn(seed + 1, m, 4 - spread)
    found = adding(one, two, ridge=ridge)
    a, b = (regularised(k, ridge) for k in (one, two))
    values = np.linalg.eigvalsh(a + b)
    kappa = values[-1] / values[0]
    assert inside(values[-1], found.top, values[-1])
    assert inside(values[0], found.bottom, values[-1])
    assert found.kappa[0] * (1 - 1e-6) <= kappa <= found.kappa[1] * (1 + 1e-6)
    assert found.kappa[1] <= found.worst * (1 + 1e-9)
    assert found.worst == pytest.approx(max(np.linalg.cond(a), np.linalg.cond(b)), rel=1e-6)
    assert found.after.regularised == pytest.approx(kappa, rel=1e-6)
    assert found.is_resolved


@TRIALS
@given(**pairs)
def test_sufficient_and_necessary_condition(seed, m, spread, ridge):
    one, two = drawn(seed, m, spread), drawn(seed + 1, m, 2.0)
    found = adding(one, two, ridge=ridge)
    before, after = found.before.regularised, found.after.regularised
    assume(abs(after / before - 1) > 1e-6)
    assert found.is_improving == (after < before)
    if found.is_sufficient:
        assert after < before
    if after < before:
        assert found.is_necessary
    if found.is_sufficient:
        assert found.is_necessary


def test_neither_condition_is_both():
    """Improved although not sufficient; not improved although necessary."""
    improved = adding(diagonal(4, 1), diagonal(0, 3), ridge=0.0)
    assert improved.is_improving
    assert not improved.is_sufficient
    assert improved.after.raw == pytest.approx(1)
    overshot = adding(diagonal(4, 3.9), diagonal(0, 40), ridge=0.0)
    assert overshot.is_necessary
    assert not overshot.is_improving


def test_first_order_change_is_the_derivative():
    one, two, step = drawn(0, 4, 2.0), drawn(1, 4, 1.0), 1e-6
    slope = adding(one, two, ridge=0.01).slope
    up, down = (spectrum(one + sign * step * two, ridge=0.01).regularised for sign in (1, -1))
    assert slope == pytest.approx((math.log(up) - math.log(down)) / (2 * step), rel=1e-4)


@TRIALS
@given(**pairs)
def test_removal_is_bounded_by_what_remains_and_what_goes(seed, m, spread, ridge):
    one, two = drawn(seed, m, spread), drawn(seed + 1, m, 1.0)
    found = removing(one + two, two, ridge=ridge)
    values = np.linalg.eigvalsh(regularised(one, ridge))
    size = found.before.top
    assert inside(values[-1], found.top, size)
    assert inside(values[0], found.bottom, size)
    kappa = values[-1] / values[0]
    assert found.after.regularised == pytest.approx(kappa, rel=1e-4)
    assert found.kappa[0] * (1 - 1e-4) <= kappa <= found.kappa[1] * (1 + 1e-4)


def test_condition_number_is_not_monotone_in_the_layers():
    worse = adding(diagonal(4, 1), diagonal(8, 0.5), ridge=0.0)
    assert worse.before.raw == pytest.approx(4)
    assert worse.after.raw == pytest.approx(8)
    assert not worse.is_necessary
    singular = adding(diagonal(1, 0), diagonal(0, 1), ridge=0.0)
    assert singular.worst == math.inf
    assert singular.after.raw == pytest.approx(1)


def test_a_fixed_ridge_breaks_the_mediant_bound_and_a_relative_one_does_not():
    """diag(1, 0), σ = 1: κ_σ = 2, but of the kernel added to itself 3."""
    kernel = diagonal(1, 0)
    fixed = [spectrum(k, sigma=1.0).regularised for k in (kernel, 2 * kernel)]
    assert fixed == pytest.approx([2, 3])
    found = adding(kernel, kernel, ridge=2.0)
    assert found.before.regularised == pytest.approx(2)
    assert found.after.regularised == found.kappa[1] == found.worst == pytest.approx(2)


def test_bounds_are_of_the_projected_kernels():
    """Contrasts, centred: the same statements of Qᵀ A Q and Qᵀ B Q."""
    j = np.random.default_rng(0).normal(size=(2, 5, 3, 40))
    one, two = (np.einsum("iap,jbp->iajb", x, x) for x in j)
    for outputs in Outputs:
        for centred in (False, True):
            found = adding([one, one], two, outputs=outputs, centred=centred)
            want = spectrum(2 * one + two, outputs=outputs, centred=centred).regularised
            assert found.after.regularised == pytest.approx(want)
            assert found.kappa[0] <= want <= found.kappa[1] <= found.worst


def test_wrong_input_is_named():
    with pytest.raises(InputError, match="same examples"):
        adding(diagonal(1, 2), diagonal(1, 2, 3))
    with pytest.raises(NotPositiveSemidefiniteError):
        removing(diagonal(1, 2), diagonal(2, 1))


def test_a_difference_has_the_noise_of_what_it_is_taken_from():
    """Float32 entries of A + B hold nothing of an A that is 10⁻⁹ of it."""
    one, two = drawn(0, 4, 0.5), 1e9 * drawn(1, 4, 0.5)
    found = removing((one + two).astype(np.float32), two.astype(np.float32))
    assert found.after.num_unresolved == 4
    assert math.isnan(found.after.regularised)
    assert removing(one + two, two).after.num_unresolved == 0
    grain = diagonal(1e9 + 64, 1e9 + 128).astype(np.float32)  # one and two units in the last place
    assert removing(grain, diagonal(1e9, 1e9).astype(np.float32)).after.num_unresolved == 2


def test_a_multiple_of_the_identity_up_to_rounding():
    """LAPACK's solver for a part of the spectrum fails on this one."""
    found = adding(drawn(12824, 5, 0.0), drawn(12825, 5, 2.0))
    assert found.before.raw == pytest.approx(1)
    assert found.is_sufficient is found.is_necessary is False
