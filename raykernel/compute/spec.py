"""What goes to a worker, and what it answers: plain data, and no PyTorch.

A worker's own module is imported in its process alone: the driver, which may find that nothing is
missing, does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from raykernel.config import ComputeConfig, KernelConfig, ModelConfig, ParametersConfig
from raykernel.problem.prompts import Encoded
from raykernel.store.grid import Cell
from raykernel.store.predictions import Solution


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker of the kernel needs: small enough to ship."""

    model: ModelConfig
    parameters: ParametersConfig
    kernel: KernelConfig
    compute: ComputeConfig
    encoded: Encoded
    num_labels: int
    store_path: str
    fingerprint: str
    trial: str | None = None
    """Fine-tuning run whose weights the model has; None: θ_PT."""
    group_sets: tuple[tuple[str, ...], ...] = ()
    """Patterns of every set of layer groups that will be summed, to refuse wrong ones early."""
    halvings: int = 0
    """How often chunks are halved before the first one: workers of larger ones were killed."""

    def blocks(self) -> Callable[[Cell], Receipt]:
        """In a worker's process: the function that computes cells."""
        from raykernel.compute.worker import Worker

        worker = Worker(self)
        worker.prepare()
        return worker.compute

    def features(self) -> Callable[[range], np.ndarray]:
        """In a worker's process: the function that reads the linear head's input (prompt=none)."""
        from raykernel.compute.worker import Worker

        return Worker(self).features


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is left to say about a stored block."""

    i: int
    j: int
    already_stored: bool
    """Another worker, or an earlier run, had stored it."""
    num_bytes: int
    seconds: float
    predicted_seconds: float
    """What was said before, from the device's rates and the time of the model's passes."""
    peak_memory_bytes: int
    """Largest memory of the worker so far: resident on a CPU, reserved on a GPU."""
    process: int
    halved: int
    """Times that memory ran out and the worker's chunks were halved, so far."""


@dataclass(frozen=True, eq=False)
class PredictionSpec:
    """The same to predict test without its kernel."""

    worker: WorkerSpec
    solution: Solution
    """Which α this is."""
    alpha: Float[np.ndarray, "n c"]
    """Dual coefficients of the train examples."""

    def row_blocks(self) -> Callable[[int], PredictionReceipt]:
        """In a worker's process: the function that predicts row blocks."""
        from raykernel.compute.predictor import Predictor

        return Predictor(self).predict


@dataclass(frozen=True, slots=True)
class PredictionReceipt:
    """What is left to say about a predicted row block."""

    i: int
    already_stored: bool
    """Another worker, or an earlier run, had stored it."""
    num_bytes: int
    seconds: float
    peak_memory_bytes: int
    """Largest memory of the worker so far: resident on a CPU, reserved on a GPU."""
    process: int
    halved: int
    """Times that memory ran out and the worker's batches were halved, so far."""


@dataclass(frozen=True)
class LinearizedSpec:
    """The same to follow fine-tuning's change of the parameters."""

    worker: WorkerSpec
    """Of the kernel at θ_FT: it names the trial."""

    def row_blocks(self) -> Callable[[int], LinearizedReceipt]:
        """In a worker's process: the function that follows row blocks."""
        from raykernel.compute.linearized import Linearizer

        return Linearizer(self.worker).follow


@dataclass(frozen=True, slots=True)
class LinearizedReceipt:
    """What is left to say about a row block of the linearised model."""

    i: int
    already_stored: bool
    """Another worker, or an earlier run, had stored it."""
    seconds: float
    peak_memory_bytes: int
    """Largest memory of the worker so far: resident on a CPU, reserved on a GPU."""
    halved: int
    """Times that memory ran out and the worker's batches were halved, so far."""


@dataclass(frozen=True, eq=False)
class BaselineSpec:
    """The same to measure what people choose layers by today."""

    worker: WorkerSpec
    labels: tuple[int, ...]
    """Of train, whose examples are the first."""

    def modules(self) -> Callable[[tuple[str, ...]], BaselineReceipt]:
        """In a worker's process: the function that measures modules."""
        from raykernel.compute.baselines import Measurer

        return Measurer(self).measure


@dataclass(frozen=True, slots=True)
class BaselineReceipt:
    """What is left to say about measured modules."""

    num_modules: int
    seconds: float
