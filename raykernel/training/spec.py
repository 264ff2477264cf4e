"""What goes to a worker that fine-tunes, and what it answers: plain data, and no PyTorch.

The worker's own module is imported in its process alone, as in `compute.spec`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from raykernel.config import (
    ComputeConfig,
    ModelConfig,
    ParametersConfig,
    RegularizationConfig,
    TrainingConfig,
)
from raykernel.problem.prompts import Encoded
from raykernel.store.trials import TrialFiles
from raykernel.terms import Metric, Split


@dataclass(frozen=True)
class TrialSpec:
    """All that a worker needs: plain data, small enough to ship."""

    model: ModelConfig
    parameters: ParametersConfig
    training: TrainingConfig
    """With `steps` and `eval_every` as numbers."""
    regularization: RegularizationConfig
    compute: ComputeConfig
    metric: Metric
    encoded: Encoded
    labels: tuple[int, ...]
    """Index of the right output, by example."""
    num_labels: int
    splits: Mapping[Split, range]
    files: TrialFiles

    def steps(self) -> Callable[[int], Receipt]:
        """In a worker's process: the function that trains up to a step."""
        from raykernel.training.trial import Trial

        return Trial(self).train


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluation."""

    step: int
    """Steps done; 0 is θ_0."""
    epoch: float
    """Passes over train done."""
    train_loss: float | None
    """Mean over the steps since the last evaluation, dropout on where it is, without a pull's
    penalty; None at θ_0."""
    dev_loss: float
    dev_score: float
    learning_rate: float
    """Of the last step; at θ_0 of the first to come."""
    gradient_norm: float | None
    """Of the last step before clipping, with that of a coupled pull; None at θ_0."""
    distance: float
    """‖θ - θ_0‖ over the trained parameters."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is left to say about some steps."""

    points: tuple[Point, ...]
    """Evaluations on the way."""
    result: Result | None
    """Of the last step."""
    pass_size: int
    """Examples of a forward and backward pass."""


@dataclass(frozen=True, slots=True)
class Result:
    """A trial that has ended, without its parameters."""

    best: Point
    zero_shot: float
    test: float
    curve: tuple[Point, ...]
    seconds: float
    num_parameters: int
    """Numbers that were trained."""
    weights_checksum: str | None
    """Of the stored parameters; None if they were not to be kept."""
    peak_memory_bytes: int
