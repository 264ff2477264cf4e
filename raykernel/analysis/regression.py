"""Kernel regression as an experiment: fit on train, select on dev, judge on test once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from raykernel.analysis.ridge import one_hot, solve_ridge
from raykernel.errors import InputError
from raykernel.terms import Metric


@dataclass(frozen=True, slots=True)
class SplitData:
    """What kernel regression knows of one split: kernel rows, initial logits, labels."""

    k: Float[np.ndarray, "m c n c"]
    """Kernel of the split's examples with the train examples."""
    f0: Float[np.ndarray, "m c"]
    """Logits at theta_0."""
    labels: Int[np.ndarray, " m"]
    """Index of the right output."""


@dataclass(frozen=True, slots=True)
class RegressionResult:
    """The grid point that dev selects, and its score on test."""

    ridge: float
    """Selected ridge, relative to ||K(train, train)||_op."""
    f0_scaling: float
    """Selected divisor of the initial logits; inf leaves them out."""
    dev_score: float
    """Dev metric of the selected point."""
    test_score: float
    """Test metric of the selected point."""
    zero_shot: float
    """Test metric of the initial logits (with a linear head: of the linear probe)."""
    condition_number: float
    """Of K + σI at the selected point."""
    residual: float
    """Relative residual of the linear system at the selected point."""
    num_dropped: int
    """Eigenvalues below the kernel's resolution."""


def kernel_regression(
    train: SplitData,
    dev: SplitData,
    test: SplitData,
    *,
    ridge: list[float],
    f0_scaling: list[float],
    metric: Metric,
    resolution: float | None = None,
) -> RegressionResult:
    """Least-squares kernel regression over the solver grid.

    Ties on dev go to the first grid point, scaling before ridge, as files are listed in the
    reference's selection (Malladi et al. 2023, appendix A.3; Table 4 has the grid). Test enters
    only after the selection.

    Args:
        train: the columns' own split.
        dev: selects the grid point.
        test: is predicted once, at that point.
        ridge: relative ridges.
        f0_scaling: divisors of the initial logits.
        metric: of dev and test.
        resolution: see `solve_ridge`.

    Returns:
        The selected point and the scores.
    """
    num_labels = train.f0.shape[1]
    solution = solve_ridge(
        train.k,
        one_hot(train.labels, num_labels),
        ridge=ridge,
        f0=train.f0,
        f0_scaling=f0_scaling,
        resolution=resolution,
    )
    dev_outputs = solution.predict(dev.k, dev.f0)
    scores = np.array([[score(metric, dev.labels, h) for h in row] for row in dev_outputs])
    at = np.unravel_index(int(scores.argmax()), scores.shape)
    s, r = int(at[0]), int(at[1])
    test_outputs = solution.at(s, r).predict(test.k, test.f0)[0, 0]
    return RegressionResult(
        ridge=ridge[r],
        f0_scaling=f0_scaling[s],
        dev_score=float(scores[s, r]),
        test_score=score(metric, test.labels, test_outputs),
        zero_shot=score(metric, test.labels, test.f0),
        condition_number=float(solution.condition_number[r]),
        residual=float(solution.residual[s, r]),
        num_dropped=solution.num_dropped,
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
    if metric is Metric.f1:
        if outputs.shape[1] != 2:
            raise InputError(
                f"task.metric=f1 is the F1 of the second of two labels; this task has "
                f"{outputs.shape[1]}. Choose task.metric=accuracy or matthews."
            )
        return float(f1_score(labels, predicted, pos_label=1, zero_division=0.0))
    if metric is Metric.matthews:
        return float(matthews_corrcoef(labels, predicted))
    return float(accuracy_score(labels, predicted))
