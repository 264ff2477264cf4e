"""Kernel regression as an experiment: fit on train, select on dev, judge on test once.

select(train, dev) → α of the best grid point → outputs of test, in whichever way → judge
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from raykernel.analysis.ridge import RidgeSolution, one_hot, solve_ridge
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
class Selection:
    """The grid point that dev selects."""

    solution: RidgeSolution
    """A grid of this one point."""
    dev_score: float

    @property
    def ridge(self) -> float:
        """Selected ridge, relative to ||K(train, train)||_op."""
        return self.solution.ridge[0]

    @property
    def f0_scaling(self) -> float:
        """Selected divisor of the initial logits; inf leaves them out."""
        return self.solution.f0_scaling[0]

    @property
    def alpha(self) -> Float[np.ndarray, "n c"]:
        """Dual coefficients."""
        alpha: np.ndarray = self.solution.alpha[0, 0]
        return alpha


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


def select(
    train: SplitData,
    dev: SplitData,
    *,
    ridge: list[float],
    f0_scaling: list[float],
    metric: Metric,
    resolution: float | None = None,
) -> Selection:
    """Least-squares kernel regression over the solver grid, and its best point on dev.

    Ties on dev go to the first grid point, scaling before ridge, as files are listed in the
    reference's selection (Malladi et al. 2023, appendix A.3; Table 4 has the grid).

    Args:
        train: the columns' own split.
        dev: selects the grid point.
        ridge: relative ridges.
        f0_scaling: divisors of the initial logits.
        metric: of dev.
        resolution: see `solve_ridge`.

    Returns:
        The selected point.
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
    return Selection(solution.at(s, r), float(scores[s, r]))


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
    solution = selection.solution
    return RegressionResult(
        ridge=selection.ridge,
        f0_scaling=selection.f0_scaling,
        dev_score=selection.dev_score,
        test_score=score(metric, labels, outputs),
        zero_shot=score(metric, labels, f0),
        condition_number=float(solution.condition_number[0]),
        residual=float(solution.residual[0, 0]),
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
