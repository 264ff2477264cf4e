"""Fine-tuning from θ_0: a plain loop, one step after the other, dev now and then.

    batch → mean loss → gradient → (clipped) → optimiser → every so often: dev, the best is kept

A pull to θ_0 is part of the gradient before it is clipped, or a step before the optimiser's
(regularization.py).

The order of examples is a function of (seed, epoch) and dropout of (seed, step): there is no state
of a random generator, so that a run which goes on from a checkpoint is the same run to the bit.
The best parameters are those of the evaluation with the strictly highest dev score, the first of
equal ones; θ_0 is evaluated, too, and counts as the start, not as a result of training.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from raykernel.analysis.regression import score
from raykernel.compute.fitting import Fitting, FoundT, half
from raykernel.config import ComputeConfig, Json, RegularizationConfig, TrainingConfig
from raykernel.errors import DivergedError
from raykernel.ntk.batches import Batch, Readout
from raykernel.ntk.matmul import fast_products
from raykernel.ntk.passes import checked_logits, selected_parameters
from raykernel.ntk.random_matrix import Entries, RandomMatrices
from raykernel.terms import Loss, Metric, Precision, Split
from raykernel.training.optimizers import (
    learning_rate,
    load_state_tensors,
    make_optimizer,
    state_tensors,
)
from raykernel.training.regularization import Pull
from raykernel.training.spec import Point
from raykernel.training.subspace import Subspace

_NO_PULL = RegularizationConfig()


@dataclass(frozen=True, eq=False)
class Examples:
    """The data of a trial: how some of it becomes a batch, what is right, and the splits."""

    collate: Callable[[Sequence[int]], Batch]
    """Indices → batch, on the model's device."""
    labels: Int[np.ndarray, " num_examples"]
    """Index of the right output."""
    splits: Mapping[Split, Sequence[int]]
    """Indices of train, dev and test."""


@dataclass(frozen=True, eq=False)
class FineTuned:
    """What a trial found."""

    parameters: dict[str, Tensor]
    """θ_FT: values of the trained parameters where dev was best, by name in the module."""
    best: Point
    """The evaluation that they are from."""
    zero_shot: float
    """Test score of θ_0; with a linear head: of the linear probe."""
    test: float
    """Test score of θ_FT."""
    curve: tuple[Point, ...]
    """All evaluations, θ_0 first."""
    seconds: float
    """Time that training and evaluation took, interrupted or not."""


def finetune(
    module: nn.Module,
    readout: Readout,
    examples: Examples,
    training: TrainingConfig,
    *,
    regularization: RegularizationConfig = _NO_PULL,
    metric: Metric = Metric.accuracy,
    batch_size: int = 8,
    report: Callable[[Point], None] | None = None,
) -> FineTuned:
    """Fine-tune a module from where it stands.

    Args:
        module: at θ_0; `requires_grad` says what is trained. It ends at the best parameters, in
            eval mode.
        readout: (module, batch) → logits (n, c).
        examples: train, dev and test.
        training: the method, with `steps` and `eval_every` as numbers.
        regularization: the pull to θ_0.
        metric: of dev and test.
        batch_size: examples of one forward pass at the most.
        report: called with every evaluation.

    Returns:
        Best parameters, scores and curve.

    Raises:
        InputError: if nothing is to be trained, or the logits have another shape than (n, c).
        DivergedError: if loss or gradient stop being finite.
    """
    trainer = Trainer(
        module,
        readout,
        examples,
        training,
        regularization=regularization,
        metric=metric,
        batch_size=batch_size,
    )
    assert training.steps is not None, "a resolved configuration"
    while trainer.step < training.steps:
        for point in trainer.advance():
            if report is not None:
                report(point)
    return trainer.finish()


class Trainer:
    """A trial that is under way: it can stop after any step, be written down, and go on.

    Args:
        module: at θ_0; `requires_grad` says what is trained.
        readout: (module, batch) → logits (n, c).
        examples: train, dev and test.
        training: the method, with `steps` and `eval_every` as numbers.
        metric: of dev and test.
        batch_size: examples of one forward pass at the most.
        regularization: the pull to θ_0.
        compute: memory and device, for what happens where memory runs out.

    Attributes:
        step: steps done.
        curve: evaluations so far.
        seconds: time that training and evaluation took so far.
    """

    def __init__(
        self,
        module: nn.Module,
        readout: Readout,
        examples: Examples,
        training: TrainingConfig,
        *,
        metric: Metric,
        batch_size: int,
        regularization: RegularizationConfig = _NO_PULL,
        compute: ComputeConfig | None = None,
    ) -> None:
        self.step = 0
        self.curve: list[Point] = []
        self._module, self._readout, self._examples = module, readout, examples
        self._training, self._metric = training, metric
        self._fitting = Fitting(batch_size, half, compute or ComputeConfig(batch_size=batch_size))
        self._parameters = selected_parameters(module)
        self._device = next(iter(self._parameters.values())).device
        self._start = _values(self._parameters)
        self._subspace = _subspace(self._parameters, training)
        # What the optimiser moves: the parameters, or coordinates of which they are a function.
        self._variables = self._parameters if self._subspace is None else {"z": self._subspace.z}
        self._optimizer = make_optimizer(self._variables.values(), training)
        self._pull = Pull(
            self._variables,
            self._start if self._subspace is None else _values(self._variables),
            weight=regularization.weight(training, len(examples.splits[Split.train])),
            method=regularization.applied,
        )
        self._best: Point | None = None
        self._best_values: dict[str, Tensor] = {}
        self._zero_shot = math.nan
        self._losses: list[float] = []
        self.seconds = 0.0

    # ------------------------------------------------------------ the loop

    @fast_products()
    def advance(self, steps: int = 1) -> list[Point]:
        """Do some steps, as many as are left at the most, and the evaluations that are due.

        Args:
            steps: how many.

        Returns:
            The new evaluations, that of θ_0 before the first step.

        Raises:
            InputError: if the logits have another shape than (n, c).
            DivergedError: if loss or gradient stop being finite.
        """
        training, before, start = self._training, len(self.curve), time.monotonic()
        assert training.steps is not None, "a resolved configuration"
        assert training.eval_every is not None, "a resolved configuration"
        if not self.curve:
            self._evaluate_start()
        for _ in range(min(steps, training.steps - self.step)):
            rate, norm = self._one_step()
            if self.step % training.eval_every == 0 or self.step == training.steps:
                self._evaluate(rate, norm)
        self.seconds += time.monotonic() - start
        return self.curve[before:]

    @fast_products()
    def finish(self) -> FineTuned:
        """Go to the best parameters and judge test with them.

        Returns:
            The result; the module is at θ_FT, in eval mode.

        Raises:
            RuntimeError: if no step was done and evaluated.
        """
        if self._best is None:
            raise RuntimeError("Found no evaluated step, expected at least one.")
        start = time.monotonic()
        self._module.zero_grad(set_to_none=True)  # room for the copy that is given back
        self._set(self._best_values)
        test = self._scored(Split.test)[1]
        self.seconds += time.monotonic() - start
        return FineTuned(
            parameters={name: v.cpu() for name, v in _values(self._parameters).items()},
            best=self._best,
            zero_shot=self._zero_shot,
            test=test,
            curve=tuple(self.curve),
            seconds=self.seconds,
        )

    def values(self) -> dict[str, Tensor]:
        """The trained parameters as they stand, by name.

        Returns:
            Their values, not copied.
        """
        return {name: p.detach() for name, p in self._parameters.items()}

    def _one_step(self) -> tuple[float, float]:
        """Learning rate and gradient norm of the step that was done."""
        rate = learning_rate(self._training, self.step)
        loss = self._gradient(self._batch_of(self.step))
        limit = self._training.max_grad_norm
        norm = float(
            nn.utils.clip_grad_norm_(self._variables.values(), math.inf if limit is None else limit)
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._diverged("loss", loss, norm, rate)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._pull.step(rate)
        self._optimizer.step()
        if self._subspace is not None:
            self._subspace.move()
        self._losses.append(loss)
        self.step += 1
        return rate, norm

    @property
    def halved(self) -> int:
        """Times that memory ran out and passes were halved, which changes rounding alone.

        And dropout, whose masks are drawn by pass.
        """
        return self._fitting.halved

    def _gradient(self, indices: Sequence[int]) -> float:
        """Leave the gradient of everything that is minimised in `.grad`; the mean loss."""
        total = self._in_passes(lambda size: self._sum_gradients(indices, size))
        if self._subspace is not None:
            self._subspace.pull_back()
        self._pull.add_gradient()
        return total

    def _in_passes(self, work: Callable[[int], FoundT]) -> FoundT:
        """Work of passes over some examples each, again in smaller ones if memory runs out."""
        return self._fitting.run(
            work,
            doing=f"in training at step {self.step} with one example in a pass",
            lower="task.max_length, or train fewer parameters (parameters=lora)",
            forget=lambda: self._module.zero_grad(set_to_none=True),
        )

    def _sum_gradients(self, indices: Sequence[int], size: int) -> float:
        """The loss alone, a sum over passes whose gradients add up."""
        self._module.zero_grad(set_to_none=True)
        total = 0.0
        self._module.train(self._training.dropout)
        with self._dropout():
            for own in _split(indices, size):
                loss = self._loss(self._logits(own), own, reduction="sum") / len(indices)
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.item()
        return total

    def _batch_of(self, step: int) -> Sequence[int]:
        """Train examples of a step: every epoch another order, its last batch may be smaller."""
        train, size = self._examples.splits[Split.train], self._training.batch_size
        epoch, number = divmod(step, -(-len(train) // size))
        generator = torch.Generator().manual_seed(_seed(self._training.seed, "order", epoch))
        order = torch.randperm(len(train), generator=generator).tolist()
        return [train[place] for place in order[number * size : (number + 1) * size]]

    # ------------------------------------------------------------ numbers

    def _logits(self, indices: Sequence[int]) -> Float[Tensor, "n c"]:
        with self._autocast():
            logits = self._readout(self._module, self._examples.collate(indices))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _loss(self, logits: Float[Tensor, "n c"], indices: Sequence[int], reduction: str) -> Tensor:
        labels = torch.from_numpy(self._examples.labels[list(indices)]).to(logits.device)
        return objective(logits, labels, self._training.loss, reduction=reduction)

    @torch.no_grad()
    def _scored(self, split: Split) -> tuple[float, float]:
        """Mean loss and score of a split, without dropout."""
        self._module.eval()
        indices = self._examples.splits[split]
        logits = self._in_passes(
            lambda size: torch.cat([self._logits(own) for own in _split(indices, size)])
        )
        loss = float(self._loss(logits, indices, reduction="mean"))
        labels = self._examples.labels[list(indices)]
        return loss, score(self._metric, labels, logits.double().cpu().numpy())

    def _evaluate_start(self) -> None:
        first = self._examples.collate(self._examples.splits[Split.train][:1])
        self._module.eval()
        with torch.no_grad():
            self._in_passes(lambda _: checked_logits(self._module, self._readout, first))
        self._zero_shot = self._scored(Split.test)[1]
        self._point(learning_rate(self._training, 0), None)

    def _evaluate(self, rate: float, norm: float) -> None:
        point = self._point(rate, norm)
        if self._best is None or point.dev_score > self._best.dev_score:
            self._best, self._best_values = point, _values(self._variables)

    def _point(self, rate: float, norm: float | None) -> Point:
        loss, dev = self._scored(Split.dev)
        if not math.isfinite(loss):
            raise self._diverged("dev loss", loss, norm, rate)
        point = Point(
            step=self.step,
            epoch=self._epochs(),
            train_loss=float(np.mean(self._losses)) if self._losses else None,
            dev_loss=loss,
            dev_score=dev,
            learning_rate=rate,
            gradient_norm=norm,
            distance=distance(self._parameters, self._start),
        )
        self._losses.clear()
        self.curve.append(point)
        return point

    def _epochs(self) -> float:
        num_train = len(self._examples.splits[Split.train])
        per_epoch = -(-num_train // self._training.batch_size)
        epochs, rest = divmod(self.step, per_epoch)
        return epochs + min(1.0, rest * self._training.batch_size / num_train)

    def _diverged(self, what: str, loss: float, norm: float | None, rate: float) -> DivergedError:
        unclipped = self._training.max_grad_norm is None
        return DivergedError(
            f"training: at step {self.step} of {self._training.steps}, learning rate {rate:.3g}, "
            f"the {what} was {loss:g} and the gradient's norm {norm}; expected finite numbers. "
            "Lower training.learning_rate"
            + (", or set training.max_grad_norm" if unclipped else "")
            + ". Nothing is stored as a result of this trial."
        )

    # ------------------------------------------------------------ randomness and arithmetic

    def _dropout(self) -> AbstractContextManager[None]:
        if not self._training.dropout:
            return nullcontext()
        return _seeded(self._device, _seed(self._training.seed, "dropout", self.step))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._training.precision is not Precision.bfloat16:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    # ------------------------------------------------------------ checkpoints

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, variable in self._variables.items():
            variable.copy_(values[name])
        if self._subspace is not None:
            self._subspace.move()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Json]]:
        """What a trainer of the same trial needs to go on after this step, an evaluated one.

        Returns:
            Tensors, not copied, and facts that are JSON.
        """
        parts = {
            "variable": {name: p.detach() for name, p in self._variables.items()},
            "optimizer": state_tensors(self._optimizer, self._variables),
        }
        best = None if self._best is None else self._best.step
        if best not in (None, self.step):
            parts["best"] = self._best_values
        facts: dict[str, Json] = {
            "step": self.step,
            "best": best,
            "zero_shot": self._zero_shot,
            "seconds": self.seconds,
            "curve": [asdict(point) for point in self.curve],
        }
        named = {f"{part}/{key}": v for part, own in parts.items() for key, v in own.items()}
        return named, facts

    def resume(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from what `state` gave, in a trainer that has done nothing yet.

        Args:
            tensors: of `state`.
            facts: of `state`.
        """
        parts: dict[str, dict[str, Tensor]] = {"variable": {}, "optimizer": {}, "best": {}}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        self._set(parts["variable"])
        load_state_tensors(self._optimizer, self._variables, parts["optimizer"])
        self.step, self._zero_shot = facts["step"], facts["zero_shot"]
        self.seconds = facts["seconds"]
        self.curve = [Point(**point) for point in facts["curve"]]
        if facts["best"] is not None:
            (self._best,) = (point for point in self.curve if point.step == facts["best"])
            values = parts["best"] or parts["variable"]
            self._best_values = {n: v.to(self._device, copy=True) for n, v in values.items()}


def objective(
    logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], loss: Loss, *, reduction: str
) -> Float[Tensor, ""]:
    """Loss of some examples.

        cross_entropy: -log softmax(f)_y        squared: ½ Σ_a (f_a - [a = y])²

    The gradient of the squared loss in f is the residual f - y, without a factor; PyTorch's own
    mean squared error, which the paper's code takes, is 2/c of it.

    Args:
        logits: f.
        labels: y.
        loss: which.
        reduction: sum or mean over the examples.

    Returns:
        One number.
    """
    if loss is Loss.cross_entropy:
        return F.cross_entropy(logits, labels, reduction=reduction)
    residual = logits - F.one_hot(labels, logits.shape[1])
    total = residual.square().sum() / 2
    return total / len(logits) if reduction == "mean" else total


def _split(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _values(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


def _subspace(parameters: Mapping[str, nn.Parameter], training: TrainingConfig) -> Subspace | None:
    """The random directions that the training is confined to, if it is."""
    if training.intrinsic_dimension is None:
        return None
    entries = Entries.gaussian  # as the paper's, and as the kernel's
    seed = training.intrinsic_seed
    return Subspace(parameters, RandomMatrices(training.intrinsic_dimension, seed, entries))


def distance(parameters: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """‖θ - θ_0‖ over all parameters together.

    Args:
        parameters: θ, by name.
        start: θ_0, by the same names.

    Returns:
        The Euclidean norm.
    """
    squares = (
        float(torch.linalg.vector_norm(p.detach() - start[name], dtype=torch.float64)) ** 2
        for name, p in parameters.items()
    )
    return math.sqrt(sum(squares))


def _seed(seed: int, purpose: str, number: int) -> int:
    """A seed of its own for every use: neighbouring seeds of a generator may give like numbers."""
    text = f"{seed}/{purpose}/{number}".encode()
    # 32 bits are all that PyTorch's generator on the CPU takes.
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Context in which PyTorch's generators start from a seed; they are as before afterwards."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
