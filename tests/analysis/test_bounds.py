"""Bounds against flows integrated exactly, or by an ODE solver; traps of the printed ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from raykernel.analysis.bounds import (
    Bound,
    SquaredLoss,
    cross_entropy_deviation_bounds,
    curvature,
    deviation_bounds,
    distance_bounds,
    linear_flow,
    lipschitz,
    ridge_of,
    risk_bounds,
    risk_path,
)
from raykernel.errors import InputError

PULLS = [0.0, 0.1, 1.0, 10.0, 50.0]
TRIALS = settings(max_examples=40, deadline=None)
drawn = {
    "seed": st.integers(0, 10**6),
    "pull": st.sampled_from(PULLS),
    "time": st.floats(1e-3, 20),
    "scale": st.floats(0.1, 3),
}


def linear(seed: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """J (n, c, p), r = y - F_0 and K = J Jᵀ."""
    rng = np.random.default_rng(seed)
    j = scale * rng.normal(size=(3, 2, 9))
    return j, rng.normal(size=(3, 2)), np.einsum("iap,jbp->iajb", j, j)


def integrated(j: np.ndarray, r: np.ndarray, pull: float, time: float) -> np.ndarray:
    """θ_t - θ_0 of d' = 2 Jᵀ (r - J d) - λ d, by the matrix exponential of the augmented system."""
    flat, p = j.reshape(-1, j.shape[-1]), j.shape[-1]
    system = np.zeros((p + 1, p + 1))
    system[:p, :p] = -2 * flat.T @ flat - pull * np.eye(p)
    system[:p, p] = 2 * flat.T @ r.ravel()
    return scipy.linalg.expm(system * time)[:p, p]


@TRIALS
@given(**drawn)
def test_flow_of_the_linear_model_is_the_integrated_one(seed, pull, time, scale):
    j, r, k = linear(seed, scale)
    moved = integrated(j, r, pull, time)
    deviation, left = linear_flow(k, r, pull=pull, time=time)
    assert deviation == pytest.approx(np.linalg.norm(moved), rel=1e-7)
    np.testing.assert_allclose(left, r - j @ moved, rtol=1e-6, atol=1e-9)


@TRIALS
@given(**drawn)
def test_every_deviation_bound_holds_of_a_linear_model(seed, pull, time, scale):
    j, r, k = linear(seed, scale)
    found = deviation_bounds(
        residual=float(np.linalg.norm(r)),
        lipschitz=lipschitz(k),
        pull=pull,
        time=time,
        measured=float(np.linalg.norm(integrated(j, r, pull, time))),
    )
    assert [bound.name for bound in found.all] == ["printed", "energy", "path"]
    for bound in found.all:
        assert bound.holds
        assert bound.slack is not None
        assert bound.slack >= 1 - 1e-9
    assert found.tightest.value == min(bound.value for bound in found.all)


def line(stretch: float, pull: float, time: float):
    """f = stretch · θ, one example, y - f_0 = 1."""
    k = np.full((1, 1, 1, 1), stretch**2)
    u, _ = linear_flow(k, np.ones((1, 1)), pull=pull, time=time)
    return deviation_bounds(residual=1.0, lipschitz=stretch, pull=pull, time=time, measured=u).all


def test_where_each_deviation_bound_is_near_tight():
    printed, _, _ = line(1.0, 3.0, 1e-4)
    assert printed.slack == pytest.approx(1, rel=1e-3)  # at the beginning
    slow, _, _ = line(1e-3, 3.0, 100.0)
    assert slow.slack == pytest.approx(1, rel=1e-3)  # at all times, of a small kernel
    _, energy, _ = line(1.0, 2.0, 100.0)
    assert energy.slack == pytest.approx(2, rel=1e-6)  # never better than 2, at λ = 2 l
    _, _, path = line(1.0, 0.0, 0.63)
    assert path.slack == pytest.approx(1 / 0.9, rel=0.01)


def test_energy_bound_is_tighter_than_the_printed_one_of_a_real_kernel():
    """At large t wherever λ < 2 L1²."""
    for pull in (0.1, 1.0, 1.9, 2.1, 10.0):
        printed, energy, _ = line(1.0, pull, 1e3)
        assert (energy.value < printed.value) == (pull < 2)


def test_no_pull_is_the_limit_of_a_small_one():
    at = {"residual": 2.0, "lipschitz": 3.0, "time": 0.5}
    none = deviation_bounds(pull=0.0, **at)
    assert none.printed.value == pytest.approx(2 * 3 * 2 * 0.5)
    assert deviation_bounds(pull=1e-12, **at).printed.value == pytest.approx(none.printed.value)
    assert none.all[1].value == math.inf


def test_an_example_s_own_lipschitz_constant_is_too_small():
    """Trap: L1 is of all outputs stacked; n equal examples have √n times one's."""
    j = np.ones((16, 1, 1))
    k, r = np.ones((16, 1, 16, 1)), np.ones((16, 1))
    u = float(np.linalg.norm(integrated(j, r, 5.0, 1e-3)))
    at = {"residual": 4.0, "pull": 5.0, "time": 1e-3, "measured": u}
    assert deviation_bounds(lipschitz=lipschitz(k), **at).printed.holds
    assert not deviation_bounds(lipschitz=1.0, **at).printed.holds


def test_a_selective_pull_breaks_the_printed_bound():
    """f = θ, y = 1, λ = 10: pulled only when the pull agrees with the gradient, θ goes to 1."""
    theta, pull, step = 0.0, 10.0, 1e-3
    for _ in range(5000):
        gradient = 2 * (theta - 1)
        theta -= step * (gradient + pull * theta * (gradient * theta > 0))
    assert theta == pytest.approx(1, abs=1e-3)
    at = {"residual": 1.0, "lipschitz": 1.0, "pull": pull, "time": 5.0}
    assert not deviation_bounds(measured=theta, **at).printed.holds
    assert deviation_bounds(**at).printed.value == pytest.approx(0.2)
    plain, _ = linear_flow(np.ones((1, 1, 1, 1)), np.ones((1, 1)), pull=pull, time=5.0)
    assert plain == pytest.approx(1 / 6)
    assert deviation_bounds(measured=plain, **at).printed.holds


@dataclass
class Quadratic:
    """F(θ) = A θ + ½ (θᵀ B_i θ)_i, so that L2 ≤ (Σ ||B_i||²)^½ everywhere; θ_0 = 0."""

    a: np.ndarray
    b: np.ndarray
    y: np.ndarray

    @classmethod
    def draw(cls, seed: int, bend: float, scale: float) -> Quadratic:
        rng = np.random.default_rng(seed)
        b = rng.normal(size=(3, 4, 4))
        return cls(
            scale * rng.normal(size=(3, 4)),
            scale * bend * (b + b.transpose(0, 2, 1)) / 2,
            scale * rng.normal(size=3),
        )

    @property
    def l2(self) -> float:
        return math.sqrt(sum(np.linalg.norm(b, 2) ** 2 for b in self.b))

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        return self.a + self.b @ theta

    def outputs(self, theta: np.ndarray) -> np.ndarray:
        return self.a @ theta + 0.5 * self.b @ theta @ theta

    def flows(self, pull: float, time: float) -> tuple[np.ndarray, np.ndarray]:
        """θ_t of the model and of its linearisation."""

        def move(_: float, both: np.ndarray) -> np.ndarray:
            theta, bar = both[:4], both[4:]
            one = -2 * self.jacobian(theta).T @ (self.outputs(theta) - self.y) - pull * theta
            two = -2 * self.a.T @ (self.a @ bar - self.y) - pull * bar
            return np.concatenate([one, two])

        run = scipy.integrate.solve_ivp(
            move, (0, time), np.zeros(8), method="LSODA", rtol=1e-9, atol=1e-12
        )
        return run.y[:4, -1], run.y[4:, -1]

    def ball(self, pull: float, time: float) -> tuple[float, float, float]:
        """e_0, a radius that needs no L1, and L1 in it."""
        e0 = float(np.linalg.norm(self.y))
        _, energy, path = deviation_bounds(residual=e0, lipschitz=0.0, pull=pull, time=time).all
        radius = min(energy.value, path.value)
        return e0, radius, float(np.linalg.norm(self.a, 2)) + self.l2 * radius


@TRIALS
@given(bend=st.floats(0, 1), **drawn)
def test_bounds_hold_of_a_curved_model(seed, bend, pull, time, scale):
    model = Quadratic.draw(seed, bend, scale)
    e0, radius, l1 = model.ball(pull, time)
    theta, bar = model.flows(pull, time)
    moved = float(np.linalg.norm(theta))
    at = {"residual": e0, "lipschitz": l1, "pull": pull, "time": time}
    assert all(bound.holds for bound in deviation_bounds(measured=moved, **at).all)
    distance = float(np.linalg.norm(model.outputs(theta) - model.a @ bar))
    bottom = float(np.linalg.eigvalsh(model.a @ model.a.T)[0])
    found = distance_bounds(
        curvature=model.l2, radius=radius, bottom=bottom, measured=distance, **at
    )
    assert [bound.name for bound in found.all] == ["printed", "sharper", "trivial"]
    assert all(bound.value + 1e-7 >= distance for bound in found.all)
    remainder = float(np.linalg.norm(model.outputs(theta) - model.a @ theta))
    assert curvature(remainder, moved) <= model.l2 * (1 + 1e-6)


def test_only_the_sharper_distance_bound_knows_the_pull_and_linear_models():
    at = {"residual": 1.0, "lipschitz": 2.0, "time": 20.0}
    straight = distance_bounds(curvature=0.0, radius=0.5, pull=1.0, **at)
    assert straight.all[1].value == 0
    assert straight.printed.value == pytest.approx(2 * 2 * 2 * 20)
    # r = √(2/λ) e_0 as the energy bound says: the sharper one falls as 1/λ^{3/2}, then 1/λ.
    values = {
        pull: distance_bounds(curvature=1.0, radius=math.sqrt(2 / pull), pull=pull, **at)
        for pull in (1.0, 100.0)
    }
    assert values[100.0].all[1].value < values[1.0].all[1].value / 30
    assert values[100.0].printed.value > values[1.0].printed.value / 3


def test_printed_distance_bound_fails_with_the_risk_in_place_of_its_root():
    """Trap of units: outputs in other units (F → s F) break it, and the norm's reading holds."""
    pull, time, broken = 0.5, 1.0, []
    for s in (1.0, 1e-2, 1e-4):
        # s scales A, B and y; λ → s² λ and t → t / s² leave the path of θ as it is.
        model = Quadratic.draw(0, 0.5, 1.0)
        model = Quadratic(s * model.a, s * model.b, s * model.y)
        e0, radius, l1 = model.ball(pull * s**2, time / s**2)
        theta, bar = model.flows(pull * s**2, time / s**2)
        distance = float(np.linalg.norm(model.outputs(theta) - model.a @ bar))
        found = distance_bounds(
            residual=e0,
            lipschitz=l1,
            curvature=model.l2,
            radius=radius,
            pull=pull * s**2,
            time=time / s**2,
            measured=distance,
        )
        assert found.printed.holds
        broken.append(found.printed.value * e0 < distance)  # R = e_0², in place of e_0
    assert broken == [False, False, True]


@TRIALS
@given(seed=st.integers(0, 10**6), sigma=st.floats(1e-3, 100))
def test_risk_lies_between_its_bounds_and_is_that_of_kernel_regression(seed, sigma):
    _, r, k = linear(seed)
    lower, upper = risk_bounds(k, r, sigma)
    flat = k.reshape(6, 6)
    left = sigma * np.linalg.solve(flat + sigma * np.eye(6), r.ravel())
    assert lower.measured == upper.measured == pytest.approx(left @ left, rel=1e-7)
    assert lower.holds
    assert upper.holds
    assert lower.value <= lower.measured <= upper.value
    values = np.linalg.eigvalsh(flat)
    width = ((sigma + values[-1]) / (sigma + values[0])) ** 2
    assert upper.value / lower.value == pytest.approx(width, rel=1e-6)


def test_a_path_of_ridges_is_solved_ridge_by_ridge_with_one_decomposition(monkeypatch):
    _, r, k = linear(3)
    called, eigh = [], scipy.linalg.eigh
    monkeypatch.setattr(scipy.linalg, "eigh", lambda *a, **b: called.append(1) or eigh(*a, **b))
    path = risk_path(k, r, np.geomspace(1e-3, 1e2, 1000).tolist())
    assert len(called) == 1
    flat = k.reshape(6, 6)
    for at in (0, 421, 999):
        sigma = path.sigma[at]
        left = sigma * np.linalg.solve(flat + sigma * np.eye(6), r.ravel())
        assert path.risk[at] == pytest.approx(left @ left, rel=1e-7)
        lower, upper = risk_bounds(k, r, float(sigma))
        assert (path.lower[at], path.upper[at]) == pytest.approx((lower.value, upper.value))
    assert (np.diff(path.risk) > 0).all()
    assert path.risk[-1] < np.sum(r**2)
    with pytest.raises(InputError, match="ridges above 0"):
        risk_path(k, r, [1.0, 0.0])


def test_ends_of_the_risk_are_attained_by_the_extreme_eigenvectors():
    _, _, k = linear(0)
    _, vectors = np.linalg.eigh(k.reshape(6, 6))
    lower, _ = risk_bounds(k, vectors[:, -1].reshape(3, 2), 0.7)
    _, upper = risk_bounds(k, vectors[:, 0].reshape(3, 2), 0.7)
    assert lower.slack == pytest.approx(1)
    assert upper.slack == pytest.approx(1)


def test_a_larger_condition_number_may_bound_the_risk_better():
    """Trap: σ = ½, diag(4, 1) has κ = 4, diag(12, 1.5) has 8, and both its bounds are lower."""
    r = np.ones((2, 1)) / math.sqrt(2)
    one, two = (
        risk_bounds(np.diag(values)[:, None, :, None], r, 0.5)
        for values in (np.array([4.0, 1.0]), np.array([12.0, 1.5]))
    )
    assert one[1].value == pytest.approx(1 / 9)
    assert two[1].value == pytest.approx(1 / 16)
    assert two[0].value == pytest.approx(0.0016)
    assert two[0].value < one[0].value


def test_risk_of_a_start_away_from_zero_is_not_bounded_by_the_labels():
    """Trap: printed with y; a start with F_0 = -3 y has four times the residual."""
    _, y, k = linear(0)
    _, printed = risk_bounds(k, y, 100.0)
    _, right = risk_bounds(k, y - (-3 * y), 100.0)
    assert right.measured is not None
    assert right.holds
    assert right.measured > printed.value


def test_eigenvalues_that_float32_does_not_resolve_bound_no_risk():
    """Two equal examples: l_m = 0, and the upper end is ||r||²."""
    j, r, _ = linear(0)
    j[1] = j[0]
    k = np.einsum("iap,jbp->iajb", j, j).astype(np.float32)
    _, upper = risk_bounds(k, r, 1e-9)
    assert upper.value == pytest.approx(np.sum(r**2))


@pytest.mark.parametrize("loss", list(SquaredLoss))
def test_ridge_that_a_pull_amounts_to_is_that_of_the_stationary_point(loss):
    """Minimise loss + (λ/2) ||d||² over d by its normal equations."""
    j, r, k = linear(0)
    n, c, p = j.shape
    pull, flat = 0.6, j.reshape(n * c, p)
    weight = {"sum": 1, "half_sum": 0.5, "mean_examples": 1 / n, "mean_entries": 1 / (n * c)}
    w = weight[loss.value]
    moved = np.linalg.solve(2 * w * flat.T @ flat + pull * np.eye(p), 2 * w * flat.T @ r.ravel())
    sigma = ridge_of(pull, loss, num_examples=n, num_outputs=c)
    dual = np.linalg.solve(k.reshape(n * c, n * c) + sigma * np.eye(n * c), r.ravel())
    np.testing.assert_allclose(flat @ moved, k.reshape(n * c, n * c) @ dual, rtol=1e-9)


@TRIALS
@given(**drawn)
def test_cross_entropy_bounds_hold(seed, pull, time, scale):
    j, f0, _ = linear(seed, scale)
    labels = np.random.default_rng(seed).integers(0, 2, 3)

    def logits(d: np.ndarray) -> np.ndarray:
        return f0 + j @ d

    def move(_: float, d: np.ndarray) -> np.ndarray:
        f = logits(d)
        p = np.exp(f - scipy.special.logsumexp(f, axis=1, keepdims=True))
        return -np.einsum("ia,iap->p", p - np.eye(2)[labels], j) - pull * d

    run = scipy.integrate.solve_ivp(move, (0, time), np.zeros(9), method="LSODA", rtol=1e-8)
    f = logits(np.zeros(9))
    risk = float((scipy.special.logsumexp(f, axis=1) - f[np.arange(3), labels]).sum())
    found = cross_entropy_deviation_bounds(
        risk=risk,
        num_examples=3,
        lipschitz=float(np.linalg.norm(j.reshape(6, 9), 2)),
        pull=pull,
        time=time,
        measured=float(np.linalg.norm(run.y[:, -1])),
    )
    assert all(bound.holds for bound in found.all)


def test_a_bound_says_whether_it_holds_and_by_how_much():
    assert Bound("a", 2.0, "").holds is None
    assert Bound("a", 2.0, "").slack is None
    assert Bound("a", 2.0, "", 1.0).slack == 2
    assert Bound("a", 1.0, "", 2.0).holds is False
    assert Bound("a", 1.0, "", 2.0, is_lower=True).slack == 2
    assert Bound("a", 2.0, "", 0.0).slack == math.inf
    assert Bound("a", 0.0, "", 0.0).slack == 1


def test_wrong_input_is_named():
    with pytest.raises(InputError, match="pull"):
        deviation_bounds(residual=1.0, lipschitz=1.0, pull=-1.0, time=1.0)
    with pytest.raises(InputError, match="time"):
        deviation_bounds(residual=1.0, lipschitz=1.0, pull=1.0, time=math.nan)
    with pytest.raises(InputError, match="ridge"):
        risk_bounds(np.ones((1, 1, 1, 1)), np.ones((1, 1)), 0.0)
    with pytest.raises(InputError, match="distance above 0"):
        curvature(1.0, 0.0)
