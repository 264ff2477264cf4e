"""What a worker does for `raykernel finetune`: it trains up to a step, and writes down how far.

    step → (load, go on from the checkpoint) → train → checkpoint at evaluations → … → θ_FT stored

As with blocks a worker needs plain data only and talks to nobody but the store. "Train up to step
t" can be asked for twice and by any worker: what a lost one had not written down is done again,
to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raykernel.compute import memory
from raykernel.compute.worker import settle_torch
from raykernel.config import ComputeConfig, ModelConfig, ParametersConfig, TrainingConfig
from raykernel.problem.models import Problem, load_problem
from raykernel.problem.probe import fit_head
from raykernel.problem.prompts import Encoded, collate
from raykernel.store.trials import TrialFiles, checksum
from raykernel.terms import Method, Metric, Precision, Split
from raykernel.training.adapter import write_adapter
from raykernel.training.checkpoint import read_head, read_tensors, write_head, write_tensors
from raykernel.training.finetune import Examples, FineTuned, Point, Trainer


@dataclass(frozen=True)
class TrialSpec:
    """All that a worker needs: plain data, small enough to ship."""

    model: ModelConfig
    parameters: ParametersConfig
    training: TrainingConfig
    """With `steps` and `eval_every` as numbers."""
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
        return Trial(self).train


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is left to say about some steps."""

    points: tuple[Point, ...]
    """Evaluations on the way."""
    result: Result | None
    """Of the last step."""


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


class Trial:
    """A model in a process of its own, and how far it is trained.

    Args:
        spec: what to train, and how.
    """

    def __init__(self, spec: TrialSpec) -> None:
        settle_torch(spec.compute)
        memory.keep_heap_ready(spec.compute)
        self._spec = spec
        self._problem = load_start(spec)
        self._trainer = Trainer(
            self._problem.module,
            self._problem.readout,
            self._examples(),
            spec.training,
            metric=spec.metric,
            batch_size=spec.compute.batch_size,
        )
        if spec.files.checkpoint.exists():
            self._trainer.resume(*read_tensors(spec.files.checkpoint))
        self._result: Result | None = None

    def train(self, until: int) -> Receipt:
        """Train up to a step, with a checkpoint at every evaluation.

        Args:
            until: steps done afterwards; at the last one, the result is stored.

        Returns:
            What was found on the way.
        """
        points: list[Point] = []
        trainer, files = self._trainer, self._spec.files
        while trainer.step < until:
            new = trainer.advance()
            points += new
            if any(point.step == trainer.step for point in new):
                write_tensors(files.checkpoint, *trainer.state())
        if trainer.step == self._spec.training.steps and self._result is None:
            self._result = self._kept(trainer.finish())
        return Receipt(tuple(points), self._result)

    def _kept(self, found: FineTuned) -> Result:
        files, spec = self._spec.files, self._spec
        weights = None
        if spec.training.keep_weights:
            write_tensors(files.weights, found.parameters, {"step": found.best.step})
            weights = checksum(files.weights)
            if spec.parameters.method is Method.lora:
                write_adapter(
                    files.adapter,
                    self._problem.module,
                    found.parameters,
                    model=spec.model,
                    parameters=spec.parameters,
                )
        return Result(
            best=found.best,
            zero_shot=found.zero_shot,
            test=found.test,
            curve=found.curve,
            seconds=found.seconds,
            num_parameters=spec.training.intrinsic_dimension
            or sum(value.numel() for value in found.parameters.values()),
            weights_checksum=weights,
            peak_memory_bytes=memory.peak_bytes(spec.compute.device),
        )

    def _examples(self) -> Examples:
        spec = self._spec

        def batch(indices: Sequence[int]) -> dict[str, torch.Tensor]:
            return collate(spec.encoded, indices, spec.compute.device)

        return Examples(batch, np.array(spec.labels, dtype=np.int64), spec.splits)


def load_start(spec: TrialSpec) -> Problem:
    """The problem at θ_0, that of the kernel: with a linear head, at the linear probe.

    Malladi et al. 2023, section 5. The probe is fitted on train once and kept with the trial.

    Args:
        spec: which problem.

    Returns:
        The problem, in eval mode.
    """
    precision = spec.training.precision
    problem = load_problem(
        spec.model,
        spec.parameters,
        label_ids=spec.encoded.label_ids,
        num_labels=spec.num_labels,
        device=spec.compute.device,
        # Under autocast parameters stay in float32.
        precision=Precision.float32 if precision is Precision.bfloat16 else precision,
    )
    if spec.encoded.label_ids:
        return problem
    if not spec.files.head.exists():
        train, size = spec.splits[Split.train], spec.compute.batch_size
        batches = [train[at : at + size] for at in range(0, len(train), size)]
        features = [
            problem.features(collate(spec.encoded, own, spec.compute.device)) for own in batches
        ]
        labels = np.array([spec.labels[index] for index in train], dtype=np.int64)
        stacked = torch.cat(features).float().cpu().numpy()
        write_head(spec.files.head, fit_head(stacked, labels, spec.num_labels))
    problem.module.set_head(read_head(spec.files.head))  # type: ignore[operator]
    return problem
