"""What a worker does for `raykernel finetune`: it trains up to a step, and writes down how far.

    step → (load, go on from the checkpoint) → train → checkpoint at evaluations → … → θ_FT stored

As with blocks a worker needs plain data only and talks to nobody but the store. "Train up to step
t" can be asked for twice and by any worker: what a lost one had not written down is done again,
to the same bits.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import nn

from raykernel.compute import examples, kept, process
from raykernel.compute.loading import settle
from raykernel.compute.tensorfile import read_tensors, write_tensors
from raykernel.compute.weights import read_head, write_head
from raykernel.location import StorePath
from raykernel.ntk.batches import Readout
from raykernel.problem.batches import collate
from raykernel.problem.models import Problem, load_problem
from raykernel.problem.probe import fit_head
from raykernel.store.trials import checksum
from raykernel.terms import Precision, Split
from raykernel.training.adapter import write_adapter
from raykernel.training.finetune import Examples, FineTuned, Trainer
from raykernel.training.room import pass_size
from raykernel.training.spec import Point, Receipt, Result, TrialSpec


class Trial:
    """A model in a process of its own, and how far it is trained.

    Args:
        spec: what to train, and how.
    """

    def __init__(self, spec: TrialSpec) -> None:
        start = Start(spec)
        self._spec, self._problem, self._pass = spec, start.problem, start.pass_size
        self._trainer = start.trainer(
            start.problem.module, start.problem.readout, spec.files.checkpoint
        )
        self._result: Result | None = None

    def train(self, until: int) -> Receipt[Result]:
        """Train up to a step, with a checkpoint at every evaluation.

        Args:
            until: steps done afterwards; at the last one, the result is stored.

        Returns:
            What was found on the way.
        """
        trainer, spec = self._trainer, self._spec
        points = advance(trainer, until, spec.files.checkpoint)
        if trainer.step == spec.training.steps and self._result is None:
            if spec.training.twin:  # before the best ones take their place
                write_tensors(spec.files.last, trainer.values(), {"step": trainer.step})
            self._result = self._kept(trainer.finish())
        return Receipt(points, self._result, self._pass, trainer.halved)

    def _kept(self, found: FineTuned) -> Result:
        files, spec = self._spec.files, self._spec
        weights = None
        if spec.training.keep_weights:
            write_tensors(files.weights, found.parameters, {"step": found.best.step})
            weights = checksum(files.weights)
            if spec.parameters.method.adds_adapter:
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
            peak_memory_bytes=process.peak_bytes(spec.compute.device),
        )


class Start:
    """A model at θ_0 and the data of a trial, in a process that is about to train.

    Args:
        spec: of the trial.
        twin: its linear twin will be trained, which takes more memory.

    Attributes:
        problem: the model.
        batches: the examples.
        pass_size: of them, how many go through the model at once.
    """

    def __init__(self, spec: TrialSpec, *, twin: bool = False) -> None:
        settle(spec.compute)
        kept.forget()  # the model that a worker before has left: it may not be at θ_0
        self._spec = spec
        self.problem = load_start(spec)
        self.batches = examples.Examples(spec.encoded, spec.compute.device)
        longest = self.batches.batch(self.batches.longest[:1])
        self.pass_size = pass_size(self.problem, longest, spec.training, spec.compute, twin=twin)

    def trainer(self, module: nn.Module, readout: Readout, checkpoint: StorePath) -> Trainer:
        """Training, as far as a checkpoint has it.

        Args:
            module: the model, or what stands for it.
            readout: of its logits.
            checkpoint: the file; there may be none, as another driver may end the run any time.

        Returns:
            What trains on.
        """
        spec = self._spec
        labels = np.array(spec.labels, dtype=np.int64)
        trainer = Trainer(
            module,
            readout,
            Examples(self.batches.batch, labels, spec.splits),
            spec.training,
            regularization=spec.regularization,
            metric=spec.metric,
            batch_size=self.pass_size,
            compute=spec.compute,
        )
        with contextlib.suppress(FileNotFoundError):
            trainer.resume(*read_tensors(checkpoint))
        return trainer


def advance(trainer: Trainer, until: int, checkpoint: StorePath) -> tuple[Point, ...]:
    """Train up to a step, with a checkpoint at every evaluation.

    Args:
        trainer: a trial under way.
        until: steps done afterwards.
        checkpoint: the file.

    Returns:
        The new evaluations.
    """
    points: list[Point] = []
    while trainer.step < until:
        new = trainer.advance()
        points += new
        if any(point.step == trainer.step for point in new):
            write_tensors(checkpoint, *trainer.state())
    return tuple(points)


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
        train = spec.splits[Split.train]
        features = [
            problem.features(collate(spec.encoded, own, spec.compute.device))
            for own in examples.split(train, spec.compute.batch_size)
        ]
        labels = np.array([spec.labels[index] for index in train], dtype=np.int64)
        stacked = torch.cat(features).float().cpu().numpy()
        write_head(spec.files.head, fit_head(stacked, labels, spec.num_labels))
    problem.module.set_head(read_head(spec.files.head))  # type: ignore[operator]
    return problem
