"""Which bounds of `analysis.bounds` are of a run, in the run's own units of loss and time.

The bounds are of θ' = -∇R - λ (θ - θ_0) with a summed R; a run minimises a mean of n examples,

    θ' = -∇R/m - w (θ - θ_0),    m = 2n of R = Σ ||f - y||² (the run has its half),  m = n of cross-
                                 entropy,

which is that flow with λ = m w and time Σ η / m. Clipping the whole gradient makes steps smaller
and no bound of the deviation wrong, because all grow with time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from raykernel.analysis.bounds import (
    Bound,
    cross_entropy_deviation_bounds,
    curvature,
    deviation_bounds,
    distance_bounds,
)
from raykernel.config import RegularizationConfig, TrainingConfig
from raykernel.terms import Loss, Optimizer, Regularization
from raykernel.training.optimizers import learning_rate
from raykernel.training.spec import TwinResult


@dataclass(frozen=True, slots=True)
class RunBound:
    """A bound on a quantity of a run, or why there is none."""

    quantity: str
    """deviation: ||θ_T - θ_0||; distance: ||F(θ_T) - F̄(θ̄_T)|| over train."""
    name: str
    value: float | None
    """None: not of this run, or infinite."""
    measured: float
    holds: bool | None
    slack: float | None
    assumes: str
    """What it assumes, or what of that the run does not meet."""


def why_no_flow(
    training: TrainingConfig, regularization: RegularizationConfig, num_train: int
) -> str | None:
    """Why a run is not gradient flow on loss and pull, as far as its configuration says.

    Args:
        training: update rule.
        regularization: the pull.
        num_train: train examples.

    Returns:
        The reasons; None if small steps would make it one.
    """
    pulled = regularization.applied
    reasons = [
        reason
        for holds, reason in (
            (training.optimizer is Optimizer.sgd, f"of sgd, not of {training.optimizer.value}"),
            (
                training.batch_size >= num_train,
                f"of full batches, not of {training.batch_size} of {num_train} examples",
            ),
            (
                pulled in (Regularization.none, Regularization.coupled),
                f"of a coupled pull, not of a {pulled.value} one",
            ),
            (training.weight_decay == 0, "of no weight decay"),
            (training.intrinsic_dimension is None, "not of random directions"),
        )
        if not holds
    ]
    return "; ".join(reasons) or None


def run_bounds(
    training: TrainingConfig,
    regularization: RegularizationConfig,
    found: TwinResult,
    *,
    num_train: int,
) -> list[RunBound]:
    """All bounds, each with its value or with what keeps it from being of this run.

    Args:
        training: the method, with numbers of steps.
        regularization: the pull.
        found: what was measured.
        num_train: n.

    Returns:
        Those on the deviation, then those on the distance of a run to its twin.
    """
    squared = training.loss is Loss.squared
    pull, time = flow_units(training, regularization, num_train)
    at = {"pull": pull, "time": time}
    reason = why_no_flow(training, regularization, num_train)
    if reason is not None or found.steepness is None:
        why = f"It is {reason}."
        energy = _energy(training, regularization, found, pull)
        return [
            _none("deviation", "printed", found.deviation, why),
            energy or _none("deviation", "energy", found.deviation, why),
            _none("deviation", "path", found.deviation, why),
            *(_none("distance", name, found.distance, why) for name in _DISTANCE),
        ]
    steepest = found.steepness.largest
    if squared:
        deviation = deviation_bounds(
            residual=math.sqrt(found.start_risk),
            lipschitz=steepest,
            measured=found.deviation,
            **at,
        )
    else:
        deviation = cross_entropy_deviation_bounds(
            risk=found.start_risk,
            num_examples=num_train,
            lipschitz=steepest,
            measured=found.deviation,
            **at,
        )
    rows = [_row("deviation", bound) for bound in deviation.all]
    missing = [
        reason
        for holds, reason in (
            (squared, "of the squared loss, not of cross-entropy"),
            (training.max_grad_norm is None, "of gradients that are not clipped"),
            (found.deviation > 0, "of parameters that moved"),
        )
        if not holds
    ]
    if missing:
        why = f"It is {'; '.join(missing)}."
        return rows + [_none("distance", name, found.distance, why) for name in _DISTANCE]
    distance = distance_bounds(
        residual=math.sqrt(found.start_risk),
        lipschitz=steepest,
        curvature=steepest_change(found),
        radius=deviation.tightest.value,
        measured=found.distance,
        **at,
    )
    return rows + [_row("distance", bound) for bound in distance.all]


_DISTANCE = ("printed", "sharper", "trivial")


def steepest_change(found: TwinResult) -> float:
    """L2, as far as it was seen: of J from θ_0 to θ_T, and what the remainder there implies.

        max( ||J_T - J_0||_op / u,  2 ||F(θ_T) - F̄(θ_T)|| / u² ),    u = ||θ_T - θ_0||

    Args:
        found: a run that moved, with `steepness`.

    Returns:
        The larger of the two, which the constant in the ball is at least.
    """
    assert found.steepness is not None
    implied = curvature(found.remainder, found.deviation)
    return max(implied, found.steepness.change / found.deviation)


def flow_units(
    training: TrainingConfig, regularization: RegularizationConfig, num_train: int
) -> tuple[float, float]:
    """λ and t of the flow on the summed R that small steps of a run follow.

        λ = m w,    t = Σ η / m

    Args:
        training: loss and schedule, with numbers of steps.
        regularization: the pull.
        num_train: n.

    Returns:
        λ and t.
    """
    assert training.steps is not None, "a resolved configuration"
    m = num_train * (2 if training.loss is Loss.squared else 1)
    pull = regularization.weight(training, num_train) if regularization.is_on else 0.0
    whole = math.fsum(learning_rate(training, step) for step in range(training.steps))
    return m * pull, whole / m


def _energy(
    training: TrainingConfig,
    regularization: RegularizationConfig,
    found: TwinResult,
    pull: float,
) -> RunBound | None:
    """√(2 R(θ_0)/λ) of any update rule that lowers the sum of loss and penalty."""
    minimised = regularization.applied is Regularization.coupled and training.weight_decay == 0
    if not minimised or training.intrinsic_dimension is not None:
        return None
    value = math.sqrt(2 * found.start_risk / pull)
    assumes = "the sum of loss and penalty is no larger at the end than at θ_0; nothing else"
    return _row("deviation", Bound("energy", value, assumes, found.deviation))


def _row(quantity: str, bound: Bound) -> RunBound:
    assert bound.measured is not None, "what a run has measured"
    if math.isinf(bound.value):
        return _none(quantity, bound.name, bound.measured, "It is of a pull, and there is none.")
    slack = bound.slack
    return RunBound(
        quantity,
        bound.name,
        bound.value,
        bound.measured,
        bound.holds,
        None if slack is None or math.isinf(slack) else slack,
        bound.assumes,
    )


def _none(quantity: str, name: str, measured: float, why: str) -> RunBound:
    return RunBound(quantity, name, None, measured, None, None, why)
