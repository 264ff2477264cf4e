"""What a worker does: it loads the problem once and turns cells of the kernel into stored blocks.

    cell → capture columns (kept) → capture rows → contract → commit → receipt

A worker needs plain data only (`WorkerSpec`), talks to nobody but the store, and returns integers.
The same cell gives the same bits in every worker with the same configuration and thread count,
whatever was computed before: batches, chunks and their order of summation are fixed by the cell.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from raykernel.compute import memory, sketches
from raykernel.compute.memory import Footprint, PackedBytes, Sizes
from raykernel.compute.plan import WorkerPlan, plan_of, token_flops
from raykernel.compute.sketches import Work
from raykernel.config import ComputeConfig, Json, KernelConfig, ModelConfig, ParametersConfig
from raykernel.errors import BlockCorruptError, RunError
from raykernel.ntk import contract
from raykernel.ntk.capture import Capture, Tracer
from raykernel.ntk.packed import SignedCapture, packed_bytes, signed_capture
from raykernel.ntk.passes import is_out_of_memory
from raykernel.ntk.product import ProductBytes, product_bytes
from raykernel.ntk.project import join
from raykernel.ntk.rates import Rates, rates_of
from raykernel.ntk.sign_product import sign_product_bytes
from raykernel.ntk.stream import Streamer
from raykernel.problem.models import Problem, load_problem, set_matmul_precision
from raykernel.problem.probe import Head
from raykernel.problem.prompts import Encoded, collate
from raykernel.store.blocks import Store
from raykernel.store.grid import Cell
from raykernel.terms import Kind, Precision


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs: plain data, small enough to ship."""

    model: ModelConfig
    parameters: ParametersConfig
    kernel: KernelConfig
    compute: ComputeConfig
    encoded: Encoded
    num_labels: int
    store_path: str
    fingerprint: str

    def blocks(self) -> Callable[[Cell], Receipt]:
        """In a worker's process: the function that computes cells."""
        worker = Worker(self)
        worker.prepare()
        return worker.compute

    def features(self) -> Callable[[range], np.ndarray]:
        """In a worker's process: the function that reads the linear head's input (prompt=none)."""
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
    """What the device's rates said before."""
    peak_memory_bytes: int
    """Largest memory of the worker so far: resident on a CPU, reserved on a GPU."""
    process: int
    halved: int
    """Times that memory ran out and the worker's chunks were halved, so far."""


Side = Capture | SignedCapture
"""Rows or columns of a product."""


class Worker:
    """A model at θ_0 in a process of its own, and the cells that it computes.

    Args:
        spec: what to compute.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        settle_torch(spec.compute)
        memory.keep_heap_ready()
        self._spec = spec
        self._handle = Store(spec.store_path).open(spec.fingerprint)
        stored = None if spec.encoded.label_ids else self._handle.read_head()
        self._problem = load(spec, None if stored is None else Head(*stored))
        self._may_compute = bool(spec.encoded.label_ids) or stored is not None
        self._columns: OrderedDict[range, list[Side]] = OrderedDict()
        self._turn = 0
        self._halved = 0
        self._predicted = 0.0

    # ------------------------------------------------------------ jobs

    def compute(self, cell: Cell) -> Receipt:
        """Make sure that a cell's block and its rows' logits are stored.

        Args:
            cell: the cell.

        Returns:
            A receipt; no kernel value leaves the worker but to the store.
        """
        start, self._predicted = time.monotonic(), 0.0
        if self._is_stored(cell):
            return self._receipt(cell, start, num_bytes=0, already_stored=True)
        values, logits = self._values_in_memory(cell)
        if not can_read(lambda: self._handle.read_logits(cell.i)):
            self._handle.write_logits(cell.rows, logits)
        provenance: dict[str, Json] = {
            "seconds": time.monotonic() - start,
            "predicted_seconds": self._predicted,
            "peak_memory_bytes": memory.peak_bytes(self._spec.compute.device),
            "torch": torch.__version__,
            "device": self._spec.compute.device,
            "threads": torch.get_num_threads(),
            "batch": self._sizes.batch,
            "rows": self._sizes.rows,
            "cols": self._sizes.cols,
            "packed": self._sizes.packed,
            "halved": self._halved,
        }
        num_bytes = self._handle.write_block(cell, values, provenance)
        del values
        memory.trim_heap()
        return self._receipt(cell, start, num_bytes=num_bytes, already_stored=False)

    def features(self, indices: range) -> Float[np.ndarray, "n d"]:
        """What the linear head reads, in batches of `compute.batch_size`.

        Args:
            indices: examples.

        Returns:
            One row per example.
        """
        batches = split(indices, self._spec.compute.batch_size)
        found = [self._problem.features(self._batch(batch)) for batch in batches]
        features: np.ndarray = torch.cat(found).float().cpu().numpy()
        return features

    def prepare(self) -> None:
        """Trace the longest examples, while nothing else is in memory.

        The engine checks itself against autograd on first sight, which takes a gradient of all
        parameters; and it learns the model's pattern here rather than from whichever cell comes
        first, so that cells do not depend on their order.

        Raises:
            RunError: if the problem has a linear head that is not stored yet.
        """
        if not self._may_compute:
            raise RunError(
                f"kernel {self._spec.fingerprint} has no linear head: expected one, because the "
                "kernel of prompt=none starts from a linear probe. Fit and store it first."
            )
        longest = self._longest
        for examples in (longest[:1], longest):
            for capture in self._streamer.stream(self._batch(examples)):
                del capture
        if self._spec.kernel.precision.is_reduced and not self._handle.has_pinned("precision"):
            self._handle.pin("precision", self._precision_error())
        if self._spec.kernel.projection.is_on and not self._handle.has_pinned("projection"):
            self._handle.pin("projection", self._projection_error())
        memory.trim_heap()

    def _precision_error(self) -> dict[str, Json]:
        """Relative Frobenius errors of a reduced precision on the longest examples."""
        spec, batch = self._spec, self._batch(self._longest)
        capture = self._tracer.capture(batch)
        found = contract.gram(capture, capture)
        kernel = dataclasses.replace(spec.kernel, precision=Precision.float32)
        stored = None if spec.encoded.label_ids else self._handle.read_head()
        head = None if stored is None else Head(*stored)
        exact = load(dataclasses.replace(spec, kernel=kernel), head)
        capture = Tracer(exact.module, exact.readout).capture(batch)
        expected = contract.gram(capture, capture)
        set_matmul_precision(spec.kernel.precision)
        errors = {g: float((found[g] - expected[g]).norm()) for g in expected}
        whole = float(torch.stack(list(expected.values())).sum(0).norm())
        total = float((torch.stack([found[g] - expected[g] for g in expected])).sum(0).norm())
        worst = max(errors, key=lambda group: errors[group])
        return {
            "relative_error": total / whole if whole else 0.0,
            "worst_group": worst,
            "worst_group_error": errors[worst] / whole if whole else 0.0,
            "examples": len(self._longest),
        }

    def _projection_error(self) -> dict[str, Json]:
        """Errors of a projection on the first examples, beside the bound for all of them."""
        num_examples = len(self._spec.encoded.input_ids)
        return sketches.distortion(
            self._factors(range(min(sketches.SAMPLE, self._sizes.rows, num_examples))),
            self._spec.kernel.projection,
            num_gradients=num_examples * self._spec.num_labels,
            rates=self._rates,
            max_bytes=memory.GRAM_BYTES,
        )

    def plan(self) -> WorkerPlan:
        """Memory, chunks, operations and methods of a full cell; computes no block.

        Returns:
            The plan.
        """
        return plan_of(
            self._problem.module,
            self._tracer.capture(self._batch(self._longest[:1])),
            num_tokens=len(self._spec.encoded.input_ids[self._longest[0]]),
            footprint=self._footprint,
            sizes=self._sizes,
            kernel=self._spec.kernel,
            rates=self._rates,
            streamed=self._streamer.blocks,
            fallbacks=self._tracer.fallbacks,
            num_groups=len(self._groups),
            work=self._work if self._spec.kernel.projection.is_on else None,
        )

    # ------------------------------------------------------------ numbers

    def _values_in_memory(
        self, cell: Cell
    ) -> tuple[dict[str, dict[str, np.ndarray]], Float[np.ndarray, "n c"]]:
        """`_values`, with chunks half as large for this and all later cells if memory runs out."""
        while True:
            try:
                return self._values(cell)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if (smaller := memory.halved(self._sizes)) == self._sizes:
                    raise RunError(
                        f"Memory ran out in cell ({cell.i}, {cell.j}) with one example against "
                        f"one. Expected {self._spec.compute.memory_gb:g} GiB for this worker "
                        "(compute.memory_gb). Free memory, or lower task.max_length, "
                        "kernel.block_size or compute.workers."
                    ) from error
            # Outside the handler: its traceback would keep the tensors of the failed attempt.
            self.__dict__["_sizes"] = smaller
            self._halved += 1
            self._columns.clear()
            memory.release(self._spec.compute.device)

    def _values(
        self, cell: Cell
    ) -> tuple[dict[str, dict[str, np.ndarray]], Float[np.ndarray, "n c"]]:
        """A cell's blocks by kind and group, and the rows' logits."""
        handle, c = self._handle, self._spec.num_labels
        shape = (len(cell.rows), c, len(cell.cols), c)
        dtype = np.dtype(handle.manifest.dtype)
        values = {
            kind.value: {group: np.empty(shape, dtype) for group in self._groups}
            for kind in self._spec.kernel.stored_kinds
        }
        logits = np.empty((len(cell.rows), c))
        # Back and forth: the last column chunk of a cell is the first of the next one.
        chunks = list(split(cell.cols, self._sizes.cols))
        self._turn += 1
        for cols in reversed(chunks) if self._turn % 2 else chunks:
            to = slice(cols.start - cell.cols.start, cols.stop - cell.cols.start)
            for rows in split(cell.rows, self._sizes.rows):
                at = slice(rows.start - cell.rows.start, rows.stop - cell.rows.start)
                for left, right in self._sides(rows, cols):
                    logits[at] = left.logits.double().cpu().numpy()
                    for kind, group, block in self._contract(left, right):
                        values[kind][group][at, :, to] = block
                    del left, right  # else they would live on while the next ones are captured
        return values, logits

    def _sides(self, rows: range, cols: range) -> Iterator[tuple[Side, Side]]:
        """Captures of both sides, segment by segment."""
        if rows == cols:
            yield from ((capture, capture) for capture in self._column(cols))
        else:
            kept_rows = self._column(rows, keep=self._sizes.sketched or self._keeps_all)
            yield from zip(kept_rows, self._column(cols), strict=True)

    def _contract(self, left: Side, right: Side) -> Iterator[tuple[str, str, np.ndarray]]:
        kernel = self._spec.kernel
        self._predicted += contract.predicted_seconds(
            left, right, kinds=kernel.stored_kinds, rates=self._rates
        )
        found = contract.grams(
            left,
            right,
            kinds=kernel.stored_kinds,
            dead_zone=kernel.dead_zone,
            max_bytes=memory.GRAM_BYTES,
            rates=self._rates,
        )
        for kind, blocks in found.items():
            for group, block in blocks.items():
                yield kind.value, group, block.cpu().numpy()

    def _column(self, examples: range, *, keep: bool = True) -> Iterable[Side]:
        """Segments of a chunk; kept for the next cells if wanted and memory allows."""
        if examples in self._columns:
            self._columns.move_to_end(examples)
            return self._columns[examples]
        # Rows are packed, too, though they need not wait: it takes no time worth mentioning, and
        # those that were kept as columns are the same to the bit.
        segments = self._packed(examples) if self._sizes.packed else self._segments(examples)
        if not keep or not self._sizes.resident:
            return segments
        while len(self._columns) >= self._sizes.resident:
            self._columns.popitem(last=False)
        self._columns[examples] = list(segments)
        return self._columns[examples]

    def _packed(self, examples: range) -> Iterator[SignedCapture]:
        """Signs of a chunk's gradients, whose factors go segment by segment."""
        for capture in self._segments(examples):
            self._predicted += contract.packing(capture, rates=self._rates).seconds
            yield signed_capture(
                capture,
                dead_zone=self._spec.kernel.dead_zone,
                max_bytes=memory.GRAM_BYTES,
                after_group=memory.trim_heap,
            )

    def _segments(self, examples: range) -> Iterator[Capture]:
        """Captures of a chunk; of a projected kernel one, its sketch."""
        projection = self._spec.kernel.projection
        if not projection.is_on:
            yield from self._factors(examples)
            return
        self._predicted += self._work.seconds(len(examples), self._rates)
        make = partial(sketches.sketch, projection=projection, max_bytes=memory.GRAM_BYTES)
        yield join(map(make, self._factors(examples)))

    def _factors(self, examples: range) -> Iterator[Capture]:
        """Factors of a chunk: one transformer block's at a time, or all at once."""
        num_tokens = sum(len(self._spec.encoded.input_ids[i]) for i in examples)
        self._predicted += self._rates.seconds(num_tokens * self._token_flops, 0.0)
        batches = [self._batch(b) for b in split(examples, self._sizes.batch)]
        if self._sizes.stream:
            found = zip(*(self._streamer.stream(batch) for batch in batches), strict=True)
        else:
            found = zip(*([self._tracer.capture(batch)] for batch in batches), strict=True)
        for pieces in found:
            memory.trim_heap()
            yield Capture.concatenate(pieces, after_group=memory.trim_heap)

    def _batch(self, examples: Sequence[int]) -> dict[str, torch.Tensor]:
        return collate(self._spec.encoded, examples, self._spec.compute.device)

    # ------------------------------------------------------------ facts

    @cached_property
    def _tracer(self) -> Tracer:
        signs = any(kind.has_signs for kind in self._spec.kernel.kinds)
        return Tracer(self._problem.module, self._problem.readout, signs=signs)

    @property
    def _groups(self) -> tuple[str, ...]:
        """Layer groups of a block."""
        return sketches.stored_groups(self._spec.kernel.projection, self._tracer.groups)

    @cached_property
    def _work(self) -> Work:
        """What projecting examples like the longest takes."""
        capture = self._tracer.capture(self._batch(self._longest[:1]))
        parts = (p for by_name in capture.parts.values() for own in by_name.values() for p in own)
        return sketches.work_of(parts, self._spec.kernel.projection)

    @cached_property
    def _rates(self) -> Rates:
        """Of the kernel's first worker: they choose the way of summation, and so its rounding."""
        measured = rates_of(self._spec.compute.device)
        return Rates(**self._handle.pin("rates", asdict(measured)))

    @cached_property
    def _token_flops(self) -> float:
        return token_flops(
            self._problem.module,
            self._spec.num_labels,
            streamed=self._streamer.blocks,
            again=self._sizes.stream,
        )

    @property
    def _product_flops(self) -> float:
        """Of the longest example's tokens with all weights: a pass has one, and one per output."""
        outputs, blocks = self._spec.num_labels, self._streamer.blocks
        of_token = token_flops(self._problem.module, outputs, streamed=blocks, again=False)
        num_tokens = len(self._spec.encoded.input_ids[self._longest[0]])
        return max(of_token * num_tokens / (1 + outputs), 1.0)

    @cached_property
    def _streamer(self) -> Streamer:
        return Streamer(self._tracer)

    @cached_property
    def _longest(self) -> list[int]:
        """The two examples with the most tokens, longest first."""
        ids = self._spec.encoded.input_ids
        return sorted(range(len(ids)), key=lambda index: (-len(ids[index]), index))[:2]

    @cached_property
    def _footprint(self) -> Footprint:
        """Bytes of the longest example; they depend on the spec alone."""
        batch = self._batch(self._longest[:1])
        edge = self._spec.kernel.block_size * self._spec.num_labels
        itemsize = np.dtype(self._handle.manifest.dtype).itemsize
        module, kinds = self._problem.module, self._spec.kernel.stored_kinds
        capture = self._tracer.capture(batch)
        by_group = capture.bytes_by_group()
        stream = self._streamer.num_bytes(batch)
        return Footprint(
            weights=tensor_bytes([*module.parameters(), *module.buffers()]),
            audit=2 * tensor_bytes(_selected(self._problem)),
            factors=sum(by_group.values()),
            largest=max(by_group.values()),
            forward=self._tracer.bytes_per_example(batch),
            stream=stream,
            packed=self._packed_bytes(capture) if contract.needs_signs_only(kinds) else None,
            output=len(self._groups) * len(kinds) * edge * edge * itemsize,
            product=self._product_bytes(batch) if self._spec.kernel.predicts else None,
            **sketches.num_bytes(capture, self._spec.kernel.projection),
        )

    def _packed_bytes(self, capture: Capture) -> PackedBytes:
        """Of one example; segments are known once a batch was streamed."""
        by_group = packed_bytes(capture)
        segments = [sum(by_group.get(g, 0) for g in own) for own in self._streamer.segments]
        return PackedBytes(whole=sum(by_group.values()), segment=max(segments))

    def _product_bytes(self, batch: dict[str, torch.Tensor]) -> ProductBytes:
        if Kind.asigngd in self._spec.kernel.kinds:
            return sign_product_bytes(self._tracer, batch, max_bytes=memory.GRAM_BYTES)
        return product_bytes(self._problem.module, self._problem.readout, batch)

    @cached_property
    def _sizes(self) -> Sizes:
        block_size = self._spec.kernel.block_size
        if self._spec.kernel.projection.is_on:
            footprint = self._footprint
            return memory.sketch_sizes(
                footprint,
                self._spec.compute,
                block_size=block_size,
                num_outputs=self._spec.num_labels,
                num_examples=len(self._spec.encoded.input_ids),
                matrices=self._work.chunk_flops / self._product_flops,
            )
        return memory.chunk_sizes(
            self._footprint,
            self._spec.compute,
            block_size=block_size,
            num_outputs=self._spec.num_labels,
        )

    @property
    def _keeps_all(self) -> bool:
        """Whether every chunk has room and use for it: then rows are captured once, too."""
        sizes, grid = self._sizes, self._handle.grid
        wanted = grid.train_and_dev if self._spec.kernel.predicts else grid.rows
        blocks = (grid.row_block(i) for i in grid.row_indices(wanted))
        chunks = sum(-(-len(block) // sizes.rows) for block in blocks)
        used_again = grid.num_col_blocks > 1 and sizes.rows == sizes.cols
        return used_again and chunks <= sizes.resident

    def _is_stored(self, cell: Cell) -> bool:
        return can_read(lambda: self._handle.read_block(cell)) and can_read(
            lambda: self._handle.read_logits(cell.i)
        )

    def _receipt(
        self, cell: Cell, start: float, *, num_bytes: int, already_stored: bool
    ) -> Receipt:
        return Receipt(
            i=cell.i,
            j=cell.j,
            already_stored=already_stored,
            num_bytes=num_bytes,
            seconds=time.monotonic() - start,
            predicted_seconds=self._predicted,
            peak_memory_bytes=memory.peak_bytes(self._spec.compute.device),
            process=os.getpid(),
            halved=self._halved,
        )


def settle_torch(compute: ComputeConfig) -> None:
    """Threads and algorithms from the configuration: Ray and the shell would set others."""
    torch.set_num_threads(compute.threads)
    if compute.device.startswith("cuda"):
        # cuBLAS may otherwise split a product differently from call to call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True, warn_only=True)


def load(spec: WorkerSpec, head: Head | None) -> Problem:
    """The problem of a worker; without a head, one that features can be read from."""
    problem = load_problem(
        spec.model,
        spec.parameters,
        label_ids=spec.encoded.label_ids,
        num_labels=spec.num_labels,
        head=head,
        device=spec.compute.device,
        precision=spec.kernel.precision,
    )
    if head is None and not spec.encoded.label_ids:
        # A head of zeros would pass no gradient on, and a plan made with it would be all too
        # small. Features do not depend on it, and no block is computed with it.
        for parameter in problem.module.get_submodule("classifier").parameters():
            parameter.data.fill_(1.0)
    return problem


def split(examples: range, size: int) -> Iterator[range]:
    """Consecutive pieces, the last of which may be smaller."""
    for start in range(examples.start, examples.stop, size):
        yield range(start, min(start + size, examples.stop))


def can_read(read: Callable[[], object]) -> bool:
    """Whether a stored file is there and whole; a damaged one is computed again."""
    try:
        read()
    except (FileNotFoundError, BlockCorruptError):
        return False
    return True


def _selected(problem: Problem) -> list[nn.Parameter]:
    return [p for p in problem.module.parameters() if p.requires_grad]


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Memory of tensors; those that share it count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
