"""How far fine-tuning gets from its start and from its linearisation: bounds, printed and tighter.

Rahimi Afzal et al. 2025 fine-tune with a pull towards the start,

    θ' = -∇R(θ) - λ (θ - θ_0),    R(θ) = ||F(θ) - y||²,    gradient flow,

F (nc) the stacked logits of train, R a sum of squares without ½. Every bound here is of this flow
and says what else it assumes; none is a prediction. Legend: u = ||θ_t - θ_0||, e_0 = ||F(θ_0) - y||
over all nc entries, J the stacked Jacobian, K_0 = J_0 J_0ᵀ with eigenpairs (l_i, v_i), L1 the
largest ||J||_op and L2 the Lipschitz constant of J in the ball that holds the flow, t the sum of
step sizes. In units: t = θ²/F², λ = 1/t; a bound whose sides have other units is wrong for some
scale of the outputs.

The bounds do not hold of other flows: of a pull that is switched on only when it agrees with the
gradient ("selective"), of Adam, or, as to R, of a loss that is a mean (`ridge_of` converts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from jaxtyping import Float

from raykernel.analysis.gram import Gram, decompose
from raykernel.errors import InputError

ROUNDING = 1e-9
"""A measured value beyond its bound by this part of it is rounding error."""

_FLOW = "gradient flow on the summed squared loss with a pull to the start"
_NOWHERE_ELSE = f"{_FLOW}; nothing else"


class SquaredLoss(Enum):
    """What multiplies the squared errors of train."""

    sum = "sum"
    """Σ ||f - y||², the loss of this module."""
    half_sum = "half_sum"
    """½ Σ ||f - y||²."""
    mean_examples = "mean_examples"
    """Mean over examples of ||f - y||²."""
    mean_entries = "mean_entries"
    """Mean over examples and outputs of (f - y)²."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound, what it assumes, and how a measured value compares."""

    name: str
    value: float
    assumes: str
    measured: float | None = None
    is_lower: bool = False
    """Whether it bounds from below."""

    @property
    def holds(self) -> bool | None:
        """Whether the measured value respects it; None if nothing was measured.

        False means that an assumption fails: L1 or L2 underestimated, another loss or optimiser.
        """
        if self.measured is None:
            return None
        low, high = (self.value, self.measured) if self.is_lower else (self.measured, self.value)
        return low <= high * (1 + ROUNDING)

    @property
    def slack(self) -> float | None:
        """Larger over smaller, so ≥ 1 where it holds; inf if it says nothing, None unmeasured."""
        if self.measured is None:
            return None
        over, under = (self.measured, self.value) if self.is_lower else (self.value, self.measured)
        if under == 0:
            return math.inf if over > 0 else 1.0
        return over / under


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds on one quantity."""

    all: tuple[Bound, ...]
    """The printed one first."""

    @property
    def printed(self) -> Bound:
        """As in the paper."""
        return self.all[0]

    @property
    def tightest(self) -> Bound:
        """The smallest upper bound."""
        return min((b for b in self.all if not b.is_lower), key=lambda bound: bound.value)


def lipschitz(
    k_train_train: Float[np.ndarray, "n1 c1 n2 c2"], resolution: float | None = None
) -> float:
    """||J||_op = √l_1 of the stacked Jacobian where the kernel was computed.

    It is L1 at this point: of the largest in a ball it is a lower bound, unless f is linear.

    Args:
        k_train_train: all outputs' kernel; the squared loss sees what logits share.
        resolution: see `analysis.gram.noise`.

    Returns:
        L1 at the point.
    """
    return math.sqrt(_basis(k_train_train, resolution).top)


def curvature(remainder: float, deviation: float) -> float:
    """A lower bound of L2 from a run: ||F(θ) - F̄(θ)|| ≤ (L2 / 2) u², F̄ linear at θ_0.

    Args:
        remainder: ||F(θ_t) - F̄(θ_t)|| over train, both at the same parameters.
        deviation: u, above 0.

    Returns:
        2 remainder / u².

    Raises:
        InputError: if nothing moved.
    """
    if not deviation > 0:
        raise InputError(f"deviation: found {deviation}, expected a distance above 0.")
    return 2 * remainder / deviation**2


def deviation_bounds(
    *,
    residual: float,
    lipschitz: float,
    pull: float,
    time: float,
    measured: float | None = None,
) -> Bounds:
    """Bounds on u = ||θ_t - θ_0||.

        u ≤ e_0 · min{ 2 L1 (1 - e^{-λt}) / λ,  √(2/λ),  √t }

    The first is printed (Rahimi Afzal et al. 2025): u' ≤ 2 L1 ||F - y|| - λ u, and R(θ_t) ≤ R(θ_0)
    because the objective falls. The others need no Lipschitz constant: (λ/2) u² is at most the fall
    of R, and the path is at most √(t · fall of the objective).

    Args:
        residual: e_0, over all examples and outputs.
        lipschitz: L1 of the stacked outputs, not of one example's.
        pull: λ ≥ 0.
        time: t ≥ 0, the sum of step sizes.
        measured: u, to compare.

    Returns:
        printed, energy, path.
    """
    _check(residual=residual, lipschitz=lipschitz, pull=pull, time=time)
    return Bounds(
        (
            Bound(
                "printed",
                2 * lipschitz * residual * _saturated(pull, time),
                f"{_FLOW}; L1 is at least ||J||_op all along the path",
                measured,
            ),
            *_energy(residual, pull, time, _NOWHERE_ELSE, measured),
        )
    )


def cross_entropy_deviation_bounds(
    *,
    risk: float,
    num_examples: int,
    lipschitz: float,
    pull: float,
    time: float,
    measured: float | None = None,
) -> Bounds:
    """Bounds on u for R = the summed cross-entropy, of which the paper says nothing.

        u ≤ min{ √(2n) L1 (1 - e^{-λt}) / λ,  √(2 R(θ_0)/λ),  √(t R(θ_0)) }

    The gradient in the logits is P - Y, of norm at most √(2n).

    Args:
        risk: R(θ_0), summed over train, in nats.
        num_examples: n.
        lipschitz: L1 of the stacked outputs.
        pull: λ ≥ 0.
        time: t ≥ 0, the sum of step sizes.
        measured: u, to compare.

    Returns:
        like the printed one, energy, path.
    """
    _check(risk=risk, lipschitz=lipschitz, pull=pull, time=time)
    flow = "gradient flow on the summed cross-entropy with a pull to the start"
    steepest = math.sqrt(2 * num_examples)
    return Bounds(
        (
            Bound(
                "like the printed one",
                steepest * lipschitz * _saturated(pull, time),
                f"{flow}; L1 is at least ||J||_op all along the path",
                measured,
            ),
            *_energy(math.sqrt(risk), pull, time, f"{flow}; nothing else", measured),
        )
    )


def distance_bounds(
    *,
    residual: float,
    lipschitz: float,
    curvature: float,
    radius: float,
    pull: float,
    time: float,
    bottom: float = 0.0,
    measured: float | None = None,
) -> Bounds:
    """Bounds on ||F(θ_t) - F̄(θ̄_t)|| over train: the linear model F̄ follows its own flow θ̄.

        printed:  2 L1 e_0 (2 r L2 + L1) t
        sharper:  (1 - e^{-μt})/μ · (4 L1 L2 e_0 r + (λ/2) L2 r²),    μ = λ + 2 l_m
        trivial:  2 L1 r

    Printed (Rahimi Afzal et al. 2025) is R(θ_0) where e_0 stands: with the summed squared loss its
    sides have different units, and it fails for small outputs. Read with the norm it holds: where
    2 r L2 ≥ L1 it is above the trivial bound, elsewhere above the sharper one. It knows no λ but
    through r, and is not 0 of a linear model. Sharper: D = F - F̄ obeys

        D' = -2 (K_t - K_0)(F - y) - 2 K_0 D - λ D - λ [J_t (θ - θ_0) - (F - F_0)],

    whose second and third terms contract, with ||K_t - K_0|| ≤ 2 L1 L2 r and a last bracket of at
    most (L2 / 2) r².

    Args:
        residual: e_0.
        lipschitz: L1 of the stacked outputs in the ball of the radius.
        curvature: L2 there.
        radius: r, at least u at all times up to t, such as `deviation_bounds(…).tightest.value`.
        pull: λ ≥ 0.
        time: t ≥ 0, the sum of step sizes.
        bottom: l_m of K_0; 0 is always safe, as where it is rounding noise.
        measured: the distance, to compare.

    Returns:
        printed, sharper, trivial.
    """
    _check(residual=residual, lipschitz=lipschitz, curvature=curvature, radius=radius)
    _check(pull=pull, time=time, bottom=bottom)
    ball = f"{_FLOW}; both flows stay within r, and L1, L2 hold there"
    force = curvature * (4 * lipschitz * residual * radius + pull / 2 * radius**2)
    return Bounds(
        (
            Bound(
                "printed",
                2 * lipschitz * residual * (2 * radius * curvature + lipschitz) * time,
                f"{ball}; R(θ_0) is read as the residual's norm",
                measured,
            ),
            Bound("sharper", _saturated(pull + 2 * bottom, time) * force, ball, measured),
            Bound("trivial", 2 * lipschitz * radius, ball, measured),
        )
    )


@dataclass(frozen=True, slots=True)
class RiskPath:
    """Training risk of kernel regression as its ridge varies."""

    sigma: Float[np.ndarray, " s"]
    """The ridges, absolute."""
    risk: Float[np.ndarray, " s"]
    """R, exactly."""
    lower: Float[np.ndarray, " s"]
    """R if the residual lay along the top eigenvector."""
    upper: Float[np.ndarray, " s"]
    """R if it lay along the bottom one."""


def risk_path(
    k_train_train: Float[np.ndarray, "n1 c1 n2 c2"],
    residual: Float[np.ndarray, "n c"],
    sigma: Sequence[float],
    resolution: float | None = None,
) -> RiskPath:
    """Training risk for many ridges, and its envelope, from one eigendecomposition.

        R(σ) = Σ_i (σ / (σ + l_i))² (v_iᵀ r)²,
        (σ ||r|| / (σ + l_1))² ≤ R(σ) ≤ (σ ||r|| / (σ + l_m))²

    O((nc)³) once, O(nc) for each ridge. R rises with σ, from what lies along eigenvalues that are
    zero or noise up to ||r||².

    Args:
        k_train_train: all outputs' kernel.
        residual: y - F(θ_0).
        sigma: the ridges that pulls λ amount to, see `ridge_of`; each above 0.
        resolution: see `analysis.gram.noise`; eigenvalues that are noise count as 0.

    Returns:
        The risk and its ends, ridge by ridge.

    Raises:
        InputError: if a ridge is not above 0.
    """
    ridges = np.asarray(sigma, dtype=np.float64)
    if not (ridges > 0).all():
        raise InputError(f"sigma: found {list(sigma)}, expected ridges above 0.")
    gram = _basis(k_train_train, resolution)
    values = np.where(gram.kept, gram.eigenvalues, 0.0)
    shrunk = (ridges[:, None] / (ridges[:, None] + values)) ** 2
    size = float(np.sum(residual**2))
    risk = shrunk @ (residual.reshape(-1) @ gram.vectors) ** 2
    return RiskPath(ridges, risk, shrunk[:, -1] * size, shrunk[:, 0] * size)


def risk_bounds(
    k_train_train: Float[np.ndarray, "n1 c1 n2 c2"],
    residual: Float[np.ndarray, "n c"],
    sigma: float,
    resolution: float | None = None,
) -> tuple[Bound, Bound]:
    """Bounds on the training risk of kernel regression with ridge σ, against its exact value.

        (σ ||r|| / (σ + l_1))²  ≤  R = Σ_i (σ / (σ + l_i))² (v_iᵀ r)²  ≤  (σ ||r|| / (σ + l_m))²

    Printed (Rahimi Afzal et al. 2025) with y for r = y - F(θ_0), which is right only of a start at
    0. The ends are attained by residuals along the top and the bottom eigenvector: that their
    ratio is ((σ + l_1) / (σ + l_m))² says how wide the interval is, not where; and it is about
    train, not about test.

    Args:
        k_train_train: all outputs' kernel.
        residual: y - F(θ_0).
        sigma: the ridge that λ amounts to, see `ridge_of`; above 0.
        resolution: see `analysis.gram.noise`; eigenvalues that are noise count as 0.

    Returns:
        Lower and upper bound, with the exact risk as measured.
    """
    path = risk_path(k_train_train, residual, [sigma], resolution)
    exact, lower, upper = (float(each[0]) for each in (path.risk, path.lower, path.upper))
    assumes = "the linear model, trained to the end with squared loss and a pull to the start"
    return (
        Bound("lower", lower, assumes, exact, is_lower=True),
        Bound("upper", upper, assumes, exact),
    )


def linear_flow(
    k_train_train: Float[np.ndarray, "n1 c1 n2 c2"],
    residual: Float[np.ndarray, "n c"],
    *,
    pull: float,
    time: float,
    resolution: float | None = None,
) -> tuple[float, Float[np.ndarray, "n c"]]:
    """The flow of the linear model, exactly, by the eigenbasis of its kernel.

        u² = Σ_i 4 l_i (v_iᵀ r)² g_i²,    y - F̄_t = Σ_i v_i (v_iᵀ r) (1 - 2 l_i g_i),
        g_i = (1 - e^{-(2 l_i + λ) t}) / (2 l_i + λ)

    What `deviation_bounds` bound, of the linear model: no bound, but a prediction of the model as
    far as it is linear.

    Args:
        k_train_train: all outputs' kernel.
        residual: r = y - F(θ_0).
        pull: λ ≥ 0.
        time: t ≥ 0, the sum of step sizes.
        resolution: see `analysis.gram.noise`; eigenvalues that are noise count as 0.

    Returns:
        u, and what is left of the residual.
    """
    _check(pull=pull, time=time)
    gram = _basis(k_train_train, resolution)
    values = np.where(gram.kept, gram.eigenvalues, 0.0)
    along = residual.reshape(-1) @ gram.vectors
    grown = np.array([_saturated(2 * value + pull, time) for value in values.tolist()])
    deviation = float(np.sqrt(np.sum(4 * values * (along * grown) ** 2)))
    left = gram.vectors @ (along * (1 - 2 * values * grown))
    return deviation, left.reshape(residual.shape)


def ridge_of(pull: float, loss: SquaredLoss, *, num_examples: int, num_outputs: int) -> float:
    """The ridge σ of kernel regression that a pull λ amounts to.

    argmin_θ loss + (λ/2) ||θ - θ_0||² of the linear model is F_0 + K (K + σI)⁻¹ (y - F_0).

    Args:
        pull: λ.
        loss: what multiplies the squared errors.
        num_examples: n.
        num_outputs: c.

    Returns:
        λ/2 of a sum, λ of half a sum, n λ/2 and nc λ/2 of means.
    """
    return (
        pull
        * {
            SquaredLoss.sum: 0.5,
            SquaredLoss.half_sum: 1.0,
            SquaredLoss.mean_examples: num_examples / 2,
            SquaredLoss.mean_entries: num_examples * num_outputs / 2,
        }[loss]
    )


def _energy(
    root_risk: float, pull: float, time: float, assumes: str, measured: float | None
) -> tuple[Bound, Bound]:
    """√(2/λ) and √t times √R(θ_0)."""
    return (
        Bound(
            "energy",
            root_risk * math.sqrt(2 / pull) if pull > 0 else math.inf,
            assumes,
            measured,
        ),
        Bound("path", root_risk * math.sqrt(time), assumes, measured),
    )


def _saturated(rate: float, time: float) -> float:
    """(1 - e^{-rate · time}) / rate, which is time at rate 0."""
    return -math.expm1(-rate * time) / rate if rate > 0 else time


def _basis(k_train_train: Float[np.ndarray, "n1 c1 n2 c2"], resolution: float | None) -> Gram:
    """Eigenbasis of a kernel of all outputs."""
    return decompose(k_train_train, np.zeros(k_train_train.shape[:2]), resolution)


def _check(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise InputError(f"{name}: found {value}, expected a number ≥ 0.")
