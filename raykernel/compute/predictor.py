"""Predictions without a kernel: a worker that folds α into the parameters and follows them.

    row block of test → w = J(train)ᵀ α (kept) → J(x) w → commit → receipt

By linearity J(x) w = Σ_j K(x, x_j) α_j, in the sum over the chosen layer groups: one ordinary
backward pass over train for each worker, and one forward-mode product over every batch of test,
whatever the number of outputs. For asigngd, whose columns are signs, w = sign(J(train))ᵀ α, which
takes every train example's gradient, once. As with blocks, the same row block gives the same bits
in every worker of the same configuration.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from raykernel.compute import memory
from raykernel.compute.worker import (
    WorkerSpec,
    can_read,
    settle_torch,
    split,
    take_problem,
    tensor_bytes,
)
from raykernel.config import Json
from raykernel.errors import RunError
from raykernel.ntk import signs
from raykernel.ntk.capture import Tracer
from raykernel.ntk.groups import find_groups
from raykernel.ntk.passes import is_out_of_memory
from raykernel.ntk.product import product_bytes, tangents, weighted_gradient
from raykernel.ntk.sign_product import sign_product_bytes, weighted_sign_gradient
from raykernel.problem.probe import Head
from raykernel.problem.prompts import collate
from raykernel.store.blocks import Store
from raykernel.store.predictions import Solution, is_predicted, write_prediction
from raykernel.terms import Kind


@dataclass(frozen=True, eq=False)
class PredictionSpec:
    """All that a worker needs to predict: plain data, small enough to ship."""

    worker: WorkerSpec
    solution: Solution
    """Which α this is."""
    alpha: Float[np.ndarray, "n c"]
    """Dual coefficients of the train examples."""

    def row_blocks(self) -> Callable[[int], PredictionReceipt]:
        """In a worker's process: the function that predicts row blocks."""
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


class Predictor:
    """A model at θ_0, the direction w of one solution, and the test examples along it.

    Args:
        spec: what to predict.
    """

    def __init__(self, spec: PredictionSpec) -> None:
        settle_torch(spec.worker.compute)
        memory.keep_heap_ready(spec.worker.compute)
        self._spec = spec
        self._handle = Store(spec.worker.store_path).open(spec.worker.fingerprint)
        head = None if spec.worker.encoded.label_ids else self._handle.read_head()
        self._problem = take_problem(self, spec.worker, None if head is None else Head(*head))
        choose(self._problem.module, spec.solution.groups)
        self._halved = 0

    def predict(self, i: int) -> PredictionReceipt:
        """Make sure that a row block's predictions and logits are stored.

        Args:
            i: the row block.

        Returns:
            A receipt; no prediction leaves the worker but to the store.
        """
        start = time.monotonic()
        if is_predicted(self._handle, self._spec.solution, i):
            return self._receipt(i, start, num_bytes=0, already_stored=True)
        rows = self._handle.grid.row_block(i)
        logits, fitted = self._outputs_in_memory(rows)
        if not can_read(lambda: self._handle.read_logits(i)):
            self._handle.write_logits(rows, logits.double().cpu().numpy())
        provenance: dict[str, Json] = {
            "seconds": time.monotonic() - start,
            "peak_memory_bytes": memory.peak_bytes(self._device),
            "torch": torch.__version__,
            "device": self._device,
            "threads": torch.get_num_threads(),
            "batch": self._batch,
            "halved": self._halved,
        }
        values = fitted.double().cpu().numpy()
        written = write_prediction(self._handle, self._spec.solution, i, values, provenance)
        memory.trim_heap()
        return self._receipt(i, start, num_bytes=written, already_stored=False)

    # ------------------------------------------------------------ numbers

    def _outputs_in_memory(self, rows: range) -> tuple[Tensor, Tensor]:
        """Logits and J w, with batches half as large from here on if memory runs out."""
        module, readout = self._problem.module, self._problem.readout
        while True:
            try:
                return tangents(module, readout, self._batches(rows), self._direction)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self._batch == 1:
                    raise RunError(
                        "Memory ran out predicting one example at a time. Expected "
                        f"{self._spec.worker.compute.memory_gb:g} GiB for this worker "
                        "(compute.memory_gb). Free memory, or lower task.max_length or "
                        "compute.workers."
                    ) from error
            # Outside the handler: its traceback would keep the tensors of the failed attempt.
            self.__dict__["_batch"] = self._batch // 2
            self._halved += 1
            memory.release(self._device)

    @cached_property
    def _direction(self) -> dict[str, Tensor]:
        """The direction w of all train examples, kept for all row blocks."""
        alpha = torch.from_numpy(self._spec.alpha)
        batches = self._batches(range(len(alpha)))
        module, readout = self._problem.module, self._problem.readout
        if self._has_signs:
            # The kernel's own signs: another dead zone would be another kernel.
            sign_of = signs.beyond(self._spec.worker.kernel.dead_zone)
            found = weighted_sign_gradient(
                module, readout, batches, alpha, sign_of=sign_of, max_bytes=memory.GRAM_BYTES
            )
        else:
            found = weighted_gradient(module, readout, batches, alpha)
        memory.trim_heap()
        return found

    @cached_property
    def _batch(self) -> int:
        """Examples of a pass; it follows from the spec alone."""
        ids = self._spec.worker.encoded.input_ids
        longest = max(range(len(ids)), key=lambda index: len(ids[index]))
        module, readout = self._problem.module, self._problem.readout
        one = self._collate(range(longest, longest + 1))
        if self._has_signs:
            tracer = Tracer(module, readout, signs=True)
            needed = sign_product_bytes(tracer, one, max_bytes=memory.GRAM_BYTES)
        else:
            needed = product_bytes(module, readout, one)
        weights = tensor_bytes([*module.parameters(), *module.buffers()])
        return memory.product_batch(weights, needed, self._spec.worker.compute)

    def _batches(self, examples: range) -> Iterator[dict[str, Tensor]]:
        return map(self._collate, split(examples, self._batch))

    def _collate(self, examples: range) -> dict[str, Tensor]:
        return collate(self._spec.worker.encoded, examples, self._device)

    # ------------------------------------------------------------ facts

    @property
    def _has_signs(self) -> bool:
        """Whether train enters by the signs of its gradients."""
        return self._spec.solution.kind == Kind.asigngd.value

    @property
    def _device(self) -> str:
        return self._spec.worker.compute.device

    def _receipt(
        self, i: int, start: float, *, num_bytes: int, already_stored: bool
    ) -> PredictionReceipt:
        return PredictionReceipt(
            i=i,
            already_stored=already_stored,
            num_bytes=num_bytes,
            seconds=time.monotonic() - start,
            peak_memory_bytes=memory.peak_bytes(self._device),
            process=os.getpid(),
            halved=self._halved,
        )


def choose(module: nn.Module, groups: Collection[str]) -> None:
    """Let only the parameters of some layer groups vary.

    Args:
        module: the model; `requires_grad` holds for the parameters of all groups.
        groups: those to keep.

    Raises:
        RunError: if a tied parameter is in one of them and in another group, too: the kernel of
            one of its uses is no product of gradients with respect to parameters.
    """
    parameters = dict(module.named_parameters())
    for name, owners in find_groups(module).owners.items():
        chosen = [owner in groups for owner in owners]
        if any(chosen) and not all(chosen):
            raise RunError(
                f"parameter {name!r} belongs to {', '.join(owners)}, expected all or none of them "
                "to be chosen. Predict through the kernel of test with train."
            )
        parameters[name].requires_grad_(all(chosen))
