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
from collections.abc import Collection
from functools import cached_property

import torch
from torch import Tensor, nn

from raykernel.compute import memory, process
from raykernel.compute.examples import Examples
from raykernel.compute.fitting import Fitting, fitting_batch
from raykernel.compute.loading import can_read, model_bytes, settle, stored_head, take_problem
from raykernel.compute.spec import PredictionReceipt, PredictionSpec
from raykernel.config import Json
from raykernel.errors import RunError
from raykernel.ntk import signs
from raykernel.ntk.capture import Tracer
from raykernel.ntk.groups import find_groups
from raykernel.ntk.product import product_bytes, tangents, weighted_gradient
from raykernel.ntk.sign_product import sign_product_bytes, weighted_sign_gradient
from raykernel.store.blocks import Store
from raykernel.store.predictions import is_predicted, write_prediction
from raykernel.terms import Kind


class Predictor:
    """A model at θ_0, the direction w of one solution, and the test examples along it.

    Args:
        spec: what to predict.
    """

    def __init__(self, spec: PredictionSpec) -> None:
        settle(spec.worker.compute)
        self._spec = spec
        self._handle = Store(spec.worker.store_path).open(spec.worker.fingerprint)
        head = stored_head(spec.worker, self._handle)
        self._problem = take_problem(self, spec.worker, head)
        self._examples = Examples(spec.worker.encoded, self._device)
        choose(self._problem.module, spec.solution.groups)

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
        logits, fitted = self._fitting.run(
            lambda batch: self._outputs(rows, batch),
            doing="predicting one example at a time",
            lower="task.max_length or compute.workers",
        )
        if not can_read(lambda: self._handle.read_logits(i)):
            self._handle.write_logits(rows, logits.double().cpu().numpy())
        provenance: dict[str, Json] = {
            "seconds": time.monotonic() - start,
            "peak_memory_bytes": process.peak_bytes(self._device),
            "torch": torch.__version__,
            "device": self._device,
            "threads": torch.get_num_threads(),
            "batch": self._batch,
            "halved": self._fitting.halved,
        }
        values = fitted.double().cpu().numpy()
        written = write_prediction(self._handle, self._spec.solution, i, values, provenance)
        process.trim_heap()
        return self._receipt(i, start, num_bytes=written, already_stored=False)

    # ------------------------------------------------------------ numbers

    def _outputs(self, rows: range, batch: int) -> tuple[Tensor, Tensor]:
        """Logits and J w, in the order of the rows."""
        module, readout = self._problem.module, self._problem.readout
        batches = self._examples.batches(rows, batch)
        logits, fitted = tangents(module, readout, batches, self._direction)
        places = self._examples.places(rows)
        return logits[places], fitted[places]

    @cached_property
    def _direction(self) -> dict[str, Tensor]:
        """The direction w of all train examples, kept for all row blocks."""
        train = range(len(self._spec.alpha))
        batches = self._examples.batches(train, self._batch)
        alpha = torch.from_numpy(self._spec.alpha)[self._examples.by_length(train)]
        module, readout = self._problem.module, self._problem.readout
        if self._has_signs:
            # The kernel's own signs: another dead zone would be another kernel.
            sign_of = signs.beyond(self._spec.worker.kernel.dead_zone)
            found = weighted_sign_gradient(
                module, readout, batches, alpha, sign_of=sign_of, max_bytes=memory.GRAM_BYTES
            )
        else:
            found = weighted_gradient(module, readout, batches, alpha)
        process.trim_heap()
        return found

    @cached_property
    def _fitting(self) -> Fitting[int]:
        module, readout = self._problem.module, self._problem.readout
        one = self._examples.batch(self._examples.longest[:1])
        if self._has_signs:
            tracer = Tracer(module, readout, signs=True)
            needed = sign_product_bytes(tracer, one, max_bytes=memory.GRAM_BYTES)
        else:
            needed = product_bytes(module, readout, one)
        return fitting_batch(model_bytes(module), needed, self._spec.worker.compute)

    @property
    def _batch(self) -> int:
        """Examples of a pass."""
        return self._fitting.size

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
            peak_memory_bytes=process.peak_bytes(self._device),
            process=os.getpid(),
            halved=self._fitting.halved,
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
