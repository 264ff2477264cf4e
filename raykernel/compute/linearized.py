"""The linearised model: a worker that follows fine-tuning's change of the parameters.

    row block of test → w = θ_FT − θ_PT (kept) → J(x) w at θ_PT, f(x) at θ_FT → commit → receipt

The first-order expansion f(x; θ_PT) + J(x) w is exact in w: one forward-mode pass over the
examples, without a kernel (Malladi et al. 2023, section 6.2).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from raykernel.compute import process
from raykernel.compute.examples import Examples
from raykernel.compute.fitting import Fitting, fitting_batch
from raykernel.compute.loading import (
    can_read,
    model_bytes,
    settle,
    stored_head,
    take_problem,
    tensor_bytes,
)
from raykernel.compute.spec import LinearizedReceipt, WorkerSpec
from raykernel.compute.weights import assign, read_parameters
from raykernel.config import Json
from raykernel.ntk.passes import checked_logits
from raykernel.ntk.product import product_bytes, tangents
from raykernel.store.blocks import Store
from raykernel.store.linearized import is_linearized, write_linearized


class Linearizer:
    """A model at θ_PT, and where fine-tuning took it.

    Args:
        spec: of the kernel at θ_FT.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        if spec.trial is None:
            raise ValueError("Found no trial, expected the spec of a kernel at θ_FT.")
        settle(spec.compute)
        self._spec = spec
        store = Store(spec.store_path)
        self._handle = store.open(spec.fingerprint)
        start = dataclasses.replace(spec, trial=None)
        self._problem = take_problem(self, start, stored_head(spec, self._handle))
        self._examples = Examples(spec.encoded, spec.compute.device)
        tuned = read_parameters(store.trial(spec.trial))
        self._tuned = {name: value.to(spec.compute.device) for name, value in tuned.items()}

    def follow(self, i: int) -> LinearizedReceipt:
        """Make sure that a row block's J w and its logits at θ_FT are stored.

        Args:
            i: the row block.

        Returns:
            A receipt.
        """
        start = time.monotonic()
        if is_linearized(self._handle, i):
            return self._receipt(i, start, already_stored=True)
        rows = self._handle.grid.row_block(i)
        change, tuned = self._fitting.run(
            lambda batch: self._outputs(rows, batch),
            doing="linearising the model at one example",
            lower="task.max_length or compute.workers",
        )
        if not can_read(lambda: self._handle.read_logits(i)):
            self._handle.write_logits(rows, tuned.double().cpu().numpy())
        provenance: dict[str, Json] = {
            "seconds": time.monotonic() - start,
            "peak_memory_bytes": process.peak_bytes(self._spec.compute.device),
            "torch": torch.__version__,
            "device": self._spec.compute.device,
            "threads": torch.get_num_threads(),
            "batch": self._fitting.size,
            "halved": self._fitting.halved,
        }
        write_linearized(self._handle, i, change.double().cpu().numpy(), provenance)
        process.trim_heap()
        return self._receipt(i, start, already_stored=False)

    # ------------------------------------------------------------ numbers

    def _outputs(
        self, rows: range, batch: int
    ) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
        """J w and the logits at θ_FT, in the order of the rows."""
        module, readout = self._problem.module, self._problem.readout
        batches = list(self._examples.batches(rows, batch))
        _, change = tangents(module, readout, batches, self._direction)
        start = assign(module, self._tuned)
        try:
            with torch.no_grad():
                logits = torch.cat([checked_logits(module, readout, own) for own in batches])
        finally:
            assign(module, start)
        places = self._examples.places(rows)
        return change[places], logits[places]

    @cached_property
    def _direction(self) -> Mapping[str, Tensor]:
        """The direction w = θ_FT − θ_PT; parameters that were not trained stay fixed."""
        parameters = dict(self._problem.module.named_parameters())
        return {
            name: (value.double() - parameters[name].detach().double()).to(value.dtype)
            for name, value in self._tuned.items()
        }

    @cached_property
    def _fitting(self) -> Fitting[int]:
        """Examples of a pass."""
        module, readout = self._problem.module, self._problem.readout
        one = self._examples.batch(self._examples.longest[:1])
        needed = product_bytes(module, readout, one)
        # Beside the weights their values at θ_FT, and those at θ_PT while the others are in place.
        held = model_bytes(module) + 2 * tensor_bytes(self._tuned.values())
        return fitting_batch(held, needed, self._spec.compute)

    def _receipt(self, i: int, start: float, *, already_stored: bool) -> LinearizedReceipt:
        return LinearizedReceipt(
            i=i,
            already_stored=already_stored,
            seconds=time.monotonic() - start,
            peak_memory_bytes=process.peak_bytes(self._spec.compute.device),
            halved=self._fitting.halved,
        )
