"""Kernel regression as an experiment: fit on train, select on dev, judge on test once.

select(train, dev) → the fit of the best grid point → outputs of test, in whichever way → judge
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from raykernel.analysis.asymmetric import solve_asymmetric
from raykernel.analysis.fit import Fit
from raykernel.analysis.logistic import solve_logistic
from raykernel.analysis.ridge import solve_ridge
from raykernel.analysis.targets import one_hot, plus_minus
from raykernel.config import GridPoint, SolverConfig
from raykernel.errors import InputError, RunError
from raykernel.terms import Metric, Solver


@dataclass(frozen=True, slots=True)
class SplitData:
    """What kernel regression knows of one split: kernel rows, initial logits, labels."""

    k: Float[np.ndarray, "m c n c"]
    """Kernel of the split's examples with the train examples, K(x, train)."""
    f0: Float[np.ndarray, "m c"]
    """Logits at theta_0."""
    labels: Int[np.ndarray, " m"]
    """Index of the right output."""
    k_flipped: Float[np.ndarray, "m c n c"] | None = None
    """K(train, x), x in rows: of an asymmetric kernel, where c < 1 needs it."""

    def part(self, at: range) -> SplitData:
        """Some of the examples."""
        here = slice(at.start, at.stop)
        flipped = None if self.k_flipped is None else self.k_flipped[here]
        return SplitData(self.k[here], self.f0[here], self.labels[here], flipped)


@dataclass(frozen=True, slots=True)
class Selection:
    """The grid point that dev selects."""

    fit: Fit
    dev_score: float
    num_points: int
    """Of the grid."""
    excluded: tuple[str, ...]
    """Why points were left out, one reason each."""


@dataclass(frozen=True, slots=True)
class RegressionResult:
    """The grid point that dev selects, and its score on test."""

    point: GridPoint
    """Solver and selected settings."""
    dev_score: float
    """Dev metric of the selected point."""
    test_score: float
    """Test metric of the selected point."""
    zero_shot: float
    """Test metric of the initial logits (with a linear head: of the linear probe)."""
    condition_number: float
    """Of the system at the selected point: K + σI, the Hessian, or the augmented system."""
    residual: float
    """How far the selected solution is from solving it, relative to its right-hand side."""
    iterations: int
    """0 of a solver that needs none."""
    num_dropped: int
    """Eigenvalues below the kernel's resolution."""
    num_points: int
    """Of the grid."""
    excluded: tuple[str, ...]
    """Why points were left out, one reason each."""


def fits_of(
    train: SplitData, settings: SolverConfig, solver: Solver, resolution: float | None = None
) -> Iterator[Fit]:
    """Every grid point of a solver, in the order in which dev breaks ties.

    Args:
        train: the columns' own split.
        settings: the grid.
        solver: which.
        resolution: see `solve_ridge`.

    Returns:
        The fits.
    """
    num_labels = train.f0.shape[1]
    y = one_hot(train.labels, num_labels)
    ridge, scaling = settings.ridge, settings.f0_scaling
    if solver is Solver.ridge:
        return solve_ridge(
            train.k, y, ridge=ridge, f0=train.f0, f0_scaling=scaling, resolution=resolution
        ).fits()
    if solver is Solver.logistic:
        return solve_logistic(
            train.k, y, ridge=ridge, f0=train.f0, f0_scaling=scaling, resolution=resolution
        ).fits()
    return solve_asymmetric(
        train.k,
        plus_minus(train.labels, num_labels),
        gamma=settings.gamma,
        ridge=ridge,
        f0=train.f0,
        f0_scaling=scaling,
        c=settings.c,
        resolution=resolution,
    ).fits()


def select(
    train: SplitData,
    dev: SplitData,
    settings: SolverConfig,
    *,
    solver: Solver,
    metric: Metric,
    resolution: float | None = None,
) -> Selection:
    """Kernel regression over the solver's grid, and its best point on dev.

    Ties on dev go to the first grid point, scaling before ridge before γ before c, as files are
    listed in the reference's selection (Malladi et al. 2023, appendix A.3; Table 4 has the grid).
    Points that have no solution, or whose solution was not found, are left out.

    Args:
        train: the columns' own split.
        dev: selects the grid point.
        settings: the grid.
        solver: which.
        metric: of dev.
        resolution: see `solve_ridge`.

    Returns:
        The selected point.

    Raises:
        RunError: if every point is left out.
    """
    best: Fit | None = None
    best_score, num_points, excluded = -np.inf, 0, []
    for fit in fits_of(train, settings, solver, resolution):
        num_points += 1
        if fit.excluded:
            excluded.append(fit.excluded)
            continue
        found = score(metric, dev.labels, fit.predict(dev.k, dev.f0, dev.k_flipped))
        if best is None or found > best_score:
            best, best_score = fit, found
    if best is None:
        raise RunError(
            f"solver: all {num_points} grid points of the {solver.value} solver were left out, "
            f"expected one at least: {excluded[0]}. Choose other values of solver.ridge"
            + (" or solver.gamma." if solver is Solver.asymmetric else ".")
        )
    return Selection(best, float(best_score), num_points, tuple(excluded))


def judge(
    selection: Selection,
    outputs: Float[np.ndarray, "m c"],
    *,
    f0: Float[np.ndarray, "m c"],
    labels: Int[np.ndarray, " m"],
    metric: Metric,
) -> RegressionResult:
    """What the selected point is worth on test, which enters here for the first time.

    Args:
        selection: of `select`.
        outputs: its predictions h(x).
        f0: initial logits.
        labels: right outputs.
        metric: of test.

    Returns:
        The selected point and the scores.
    """
    fit = selection.fit
    return RegressionResult(
        point=fit.point,
        dev_score=selection.dev_score,
        test_score=score(metric, labels, outputs),
        zero_shot=score(metric, labels, f0),
        condition_number=fit.condition_number,
        residual=fit.residual,
        iterations=fit.iterations,
        num_dropped=fit.num_dropped,
        num_points=selection.num_points,
        excluded=selection.excluded,
    )


def score(
    metric: Metric, labels: Int[np.ndarray, " m"], outputs: Float[np.ndarray, "m c"]
) -> float:
    """Metric of the largest output.

    Args:
        metric: accuracy, F1 of the second label, or Matthews correlation.
        labels: right outputs.
        outputs: predicted outputs.

    Returns:
        The score, larger is better.

    Raises:
        InputError: if F1 is asked of a task that has not two labels.
    """
    predicted = outputs.argmax(axis=1)
    if metric is Metric.accuracy:
        return float((labels == predicted).mean())
    from sklearn.metrics import f1_score, matthews_corrcoef  # takes a second

    if metric is Metric.f1:
        if outputs.shape[1] != 2:
            raise InputError(
                f"task.metric=f1 is the F1 of the second of two labels; this task has "
                f"{outputs.shape[1]}. Choose task.metric=accuracy or matthews."
            )
        return float(f1_score(labels, predicted, pos_label=1, zero_division=0.0))
    return float(matthews_corrcoef(labels, predicted))
