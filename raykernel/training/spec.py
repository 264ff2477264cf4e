"""What goes to a worker that fine-tunes, and what it answers: plain data, and no PyTorch.

The worker's own module is imported in its process alone, as in `compute.spec`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from raykernel.analysis.closeness import Closeness
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

ResultT = TypeVar("ResultT")


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

    def steps(self) -> Callable[[int], Receipt[Result]]:
        """In a worker's process: the function that trains up to a step."""
        from raykernel.training.trial import Trial

        return Trial(self).train

    def twin_steps(self) -> Callable[[int], Receipt[TwinResult]]:
        """The same for the linear twin of the trial, which has ended."""
        from raykernel.training.twin import Twin

        return Twin(self).train


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


Watch = Callable[[Point], None]
"""Told of every evaluation but that of θ_0, in order."""


@dataclass(frozen=True, slots=True)
class Receipt(Generic[ResultT]):
    """What is left to say about some steps."""

    points: tuple[Point, ...]
    """Evaluations on the way."""
    result: ResultT | None
    """Of the last step."""
    pass_size: int
    """Examples of a forward and backward pass, as estimated."""
    halved: int
    """Times that memory ran out and passes were halved, so far."""


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


@dataclass(frozen=True, slots=True)
class TwinSplit:
    """A run f and its linear models on one split: f̄_A = f̄(θ̄_T) of the twin, f̄_B = f̄(θ_T)."""

    num_examples: int
    change: float
    """Mean of ||f - f_0||."""
    a: Closeness
    """Of f to f̄_A."""
    b: Closeness
    """Of f to f̄_B."""
    start_score: float
    """Metric of f_0; the next three of f, f̄_A and f̄_B."""
    score: float
    score_a: float
    score_b: float


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """How far a LoRA moved one weight matrix."""

    module: str
    change: float
    """||s B A||_F."""
    relative: float
    """The same over ||W_0||_F."""


@dataclass(frozen=True, slots=True)
class Steepness:
    """What was measured of ||J||_op between θ_0 and θ_T; the largest in the ball is no less."""

    start: float
    """At θ_0."""
    end: float
    """At θ_T."""
    sampled: tuple[float, ...]
    """At random points as far from θ_0 as θ_T."""
    change: float
    """||J(θ_T) - J(θ_0)||_op."""

    @property
    def largest(self) -> float:
        """L1: the largest that was seen."""
        return max(self.start, self.end, *self.sampled)


@dataclass(frozen=True, slots=True)
class TwinResult:
    """What a run and its linear twin found, at the last step T of both."""

    splits: Mapping[Split, TwinSplit]
    start: float
    """||θ_0||."""
    deviation: float
    """||θ_T - θ_0||."""
    twin_deviation: float
    """||θ̄_T - θ_0||."""
    apart: float
    """||θ_T - θ̄_T||."""
    modules: tuple[AdaptedModule, ...]
    """Of a LoRA."""
    start_risk: float
    """Summed loss of train at θ_0: Σ ||f - y||² or the cross-entropy."""
    remainder: float
    """||F(θ_T) - F̄(θ_T)|| over train, stacked."""
    distance: float
    """||F(θ_T) - F̄(θ̄_T)|| over train, stacked."""
    steepness: Steepness | None
    """Of train's stacked outputs; None: no bound asks for it."""
    seconds: float
    last_checksum: str
    """Of the file with θ_T."""
    weights_checksum: str
    """Of the file with θ̄_T."""
    peak_memory_bytes: int
