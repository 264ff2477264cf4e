"""The linearised model: a worker that follows fine-tuning's change of the parameters.

    row block of test → w = θ_FT − θ_PT (kept) → J(x) w at θ_PT, f(x) at θ_FT → commit → receipt

The first-order expansion f(x; θ_PT) + J(x) w is exact in w: one forward-mode pass over the
examples, without a kernel (Malladi et al. 2023, section 6.2).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from raykernel.compute import memory
from raykernel.compute.weights import assign, trial_weights
from raykernel.compute.worker import WorkerSpec, can_read, load, settle_torch, split, tensor_bytes
from raykernel.config import Json
from raykernel.errors import RunError
from raykernel.ntk.passes import checked_logits, is_out_of_memory
from raykernel.ntk.product import product_bytes, tangents
from raykernel.problem.probe import Head
from raykernel.problem.prompts import collate
from raykernel.store.blocks import Store
from raykernel.store.linearized import is_linearized, write_linearized


@dataclass(frozen=True)
class LinearizedSpec:
    """All that a worker needs: plain data, small enough to ship."""

    worker: WorkerSpec
    """Of the kernel at θ_FT: it names the trial."""

    def row_blocks(self) -> Callable[[int], LinearizedReceipt]:
        """In a worker's process: the function that follows row blocks."""
        return Linearizer(self.worker).follow


@dataclass(frozen=True, slots=True)
class LinearizedReceipt:
    """What is left to say about a row block."""

    i: int
    already_stored: bool
    """Another worker, or an earlier run, had stored it."""
    seconds: float
    peak_memory_bytes: int
    """Largest memory of the worker so far: resident on a CPU, reserved on a GPU."""
    halved: int
    """Times that memory ran out and the worker's batches were halved, so far."""


class Linearizer:
    """A model at θ_PT, and where fine-tuning took it.

    Args:
        spec: of the kernel at θ_FT.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        if spec.trial is None:
            raise ValueError("Found no trial, expected the spec of a kernel at θ_FT.")
        settle_torch(spec.compute)
        memory.keep_heap_ready(spec.compute)
        self._spec = spec
        self._handle = Store(spec.store_path).open(spec.fingerprint)
        head = None if spec.encoded.label_ids else self._handle.read_head()
        start = dataclasses.replace(spec, trial=None)
        self._problem = load(start, None if head is None else Head(*head))
        device = self._spec.compute.device
        tuned = trial_weights(spec.store_path, spec.trial)
        self._tuned = {name: value.to(device) for name, value in tuned.items()}
        self._halved = 0

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
        change, tuned = self._outputs_in_memory(rows)
        if not can_read(lambda: self._handle.read_logits(i)):
            self._handle.write_logits(rows, tuned.double().cpu().numpy())
        provenance: dict[str, Json] = {
            "seconds": time.monotonic() - start,
            "peak_memory_bytes": memory.peak_bytes(self._spec.compute.device),
            "torch": torch.__version__,
            "device": self._spec.compute.device,
            "threads": torch.get_num_threads(),
            "batch": self._batch,
            "halved": self._halved,
        }
        write_linearized(self._handle, i, change.double().cpu().numpy(), provenance)
        memory.trim_heap()
        return self._receipt(i, start, already_stored=False)

    # ------------------------------------------------------------ numbers

    def _outputs_in_memory(self, rows: range) -> tuple[Tensor, Tensor]:
        """J w and the logits at θ_FT, with batches half as large if memory runs out."""
        while True:
            try:
                return self._outputs(rows)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self._batch == 1:
                    raise RunError(
                        "Memory ran out linearising the model at one example. Expected "
                        f"{self._spec.compute.memory_gb:g} GiB for this worker "
                        "(compute.memory_gb). Free memory, or lower task.max_length or "
                        "compute.workers."
                    ) from error
            # Outside the handler: its traceback would keep the tensors of the failed attempt.
            self.__dict__["_batch"] = self._batch // 2
            self._halved += 1
            memory.release(self._spec.compute.device)

    def _outputs(self, rows: range) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
        module, readout = self._problem.module, self._problem.readout
        _, change = tangents(module, readout, self._batches(rows), self._direction)
        start = assign(module, self._tuned)
        try:
            with torch.no_grad():
                logits = [checked_logits(module, readout, batch) for batch in self._batches(rows)]
        finally:
            assign(module, start)
        return change, torch.cat(logits)

    @cached_property
    def _direction(self) -> Mapping[str, Tensor]:
        """The direction w = θ_FT − θ_PT; parameters that were not trained stay fixed."""
        parameters = dict(self._problem.module.named_parameters())
        return {
            name: (value.double() - parameters[name].detach().double()).to(value.dtype)
            for name, value in self._tuned.items()
        }

    @cached_property
    def _batch(self) -> int:
        """Examples of a pass; it follows from the spec alone."""
        ids = self._spec.encoded.input_ids
        longest = max(range(len(ids)), key=lambda index: len(ids[index]))
        module, readout = self._problem.module, self._problem.readout
        needed = product_bytes(module, readout, self._collate(range(longest, longest + 1)))
        # Beside the weights their values at θ_FT, and those at θ_PT while the others are in place.
        held = tensor_bytes([*module.parameters(), *module.buffers()])
        held += 2 * tensor_bytes(self._tuned.values())
        return memory.product_batch(held, needed, self._spec.compute)

    def _batches(self, examples: range) -> Iterator[dict[str, Tensor]]:
        return map(self._collate, split(examples, self._batch))

    def _collate(self, examples: range) -> dict[str, Tensor]:
        return collate(self._spec.encoded, examples, self._spec.compute.device)

    def _receipt(self, i: int, start: float, *, already_stored: bool) -> LinearizedReceipt:
        return LinearizedReceipt(
            i=i,
            already_stored=already_stored,
            seconds=time.monotonic() - start,
            peak_memory_bytes=memory.peak_bytes(self._spec.compute.device),
            halved=self._halved,
        )
