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
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from raykernel.compute import kept, memory, sketches
from raykernel.compute.lora_error import adapted_layers, compared_parameters, lora_distortion
from raykernel.compute.memory import Footprint, PackedBytes, Sizes
from raykernel.compute.plan import WorkerPlan, plan_of, token_flops
from raykernel.compute.sketches import Work
from raykernel.compute.weights import assign, trial_weights
from raykernel.config import (
    ComputeConfig,
    Json,
    KernelConfig,
    ModelConfig,
    ParametersConfig,
    canonical_json,
    plain,
)
from raykernel.errors import BlockCorruptError, RunError
from raykernel.ntk import contract
from raykernel.ntk.capture import Capture, Tracer
from raykernel.ntk.packed import SignedCapture, packed_bytes, signed_capture
from raykernel.ntk.passes import is_out_of_memory
from raykernel.ntk.product import ProductBytes, product_bytes
from raykernel.ntk.project import join
from raykernel.ntk.rates import PassRate, Rates, pass_rate, rates_of
from raykernel.ntk.selections import varying
from raykernel.ntk.sign_product import sign_product_bytes
from raykernel.ntk.stream import Streamer
from raykernel.problem.models import Problem, load_problem, set_matmul_precision
from raykernel.problem.probe import Head
from raykernel.problem.prompts import Encoded, collate
from raykernel.store.blocks import Store
from raykernel.store.grid import Cell
from raykernel.store.groups import select_groups
from raykernel.terms import Kind, Method, Precision


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
    trial: str | None = None
    """Fine-tuning run whose weights the model has; None: θ_PT."""
    solver_groups: tuple[str, ...] = ()
    """Patterns of layer groups that the regression will take, to refuse wrong ones early."""

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
    """What was said before, from the device's rates and the time of the model's passes."""
    peak_memory_bytes: int
    """Largest memory of the worker so far: resident on a CPU, reserved on a GPU."""
    process: int
    halved: int
    """Times that memory ran out and the worker's chunks were halved, so far."""


_Indices = TypeVar("_Indices", range, list[int])

Side = Capture | SignedCapture
"""Rows or columns of a product."""


class Worker:
    """A model in a process of its own, at θ_0 or a trial's weights, and the cells it computes.

    Args:
        spec: what to compute.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        start = time.monotonic()
        settle_torch(spec.compute)
        memory.keep_heap_ready(spec.compute)
        self._spec = spec
        self._handle = Store(spec.store_path).open(spec.fingerprint)
        stored = None if spec.encoded.label_ids else self._handle.read_head()
        self._problem = take_problem(self, spec, None if stored is None else Head(*stored))
        self._may_compute = bool(spec.encoded.label_ids) or stored is not None
        self._columns: OrderedDict[range, list[Side]] = OrderedDict()
        self._turn = 0
        self._halved = 0
        self._predicted = 0.0
        self._load_seconds = time.monotonic() - start

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
        """Trace the longest examples, while nothing else is in memory, and measure what is new.

        Raises:
            RunError: if the problem has a linear head that is not stored yet.
            InputError: if a pattern of `solver_groups` matches no layer group.
        """
        if not self._may_compute:
            raise RunError(
                f"kernel {self._spec.fingerprint} has no linear head: expected one, because the "
                "kernel of prompt=none starts from a linear probe. Fit and store it first."
            )
        self._learn()
        select_groups(self._groups, groups=self._spec.solver_groups)
        if self._spec.kernel.precision.is_reduced and not self._handle.has_pinned("precision"):
            self._handle.pin("precision", self._precision_error())
        if self._spec.kernel.projection.is_on and not self._handle.has_pinned("projection"):
            self._handle.pin("projection", self._projection_error())
        if self._adapted and not self._handle.has_pinned("lora"):
            self._handle.pin("lora", self._lora_error())
        memory.trim_heap()

    def _learn(self) -> None:
        """Trace the longest examples, and time it.

        The engine checks itself against autograd on first sight, which takes a gradient of all
        parameters; and it learns the model's pattern here rather than from whichever cell comes
        first, so that cells do not depend on their order.
        """
        for examples in (self._longest[:1], self._longest):
            for capture in self._streamer.stream(self._batch(examples)):
                del capture
        _ = self._passes

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

    def _lora_error(self) -> dict[str, Json]:
        """Errors of a LoRA kernel on the first examples, beside the bound for all of them."""
        spec, problem = self._spec, self._problem
        num_examples = len(spec.encoded.input_ids)
        with varying(problem.module, compared_parameters(self._adapted)):
            tracer = Tracer(problem.module, problem.readout)
            streamer = Streamer(tracer)
            factors = tracer.capture(self._batch(self._longest[:1])).num_bytes
            sample = memory.sample_size(
                factors, self._footprint, spec.compute, most=min(sketches.SAMPLE, num_examples)
            )
            return lora_distortion(
                self._captured(range(sample), tracer, streamer),
                self._adapted,
                rank=spec.parameters.r,
                num_gradients=num_examples * spec.num_labels,
                rates=self._rates,
                max_bytes=memory.GRAM_BYTES,
            )

    def plan(self) -> WorkerPlan:
        """Memory, chunks, operations and methods of a full cell; computes no block.

        Returns:
            The plan.
        """
        start = time.monotonic()
        self._learn()
        return plan_of(
            self._problem.module,
            self._tracer.capture(self._batch(self._longest[:1])),
            num_tokens=len(self._spec.encoded.input_ids[self._longest[0]]),
            footprint=self._footprint,
            sizes=self._sizes,
            kernel=self._spec.kernel,
            rates=self._rates,
            passes=self._passes,
            start_seconds=self._load_seconds + time.monotonic() - start,
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
                of_rows, of_cols = self._places(rows), self._places(cols)
                for left, right in self._sides(rows, cols):
                    logits[at] = left.logits[of_rows].double().cpu().numpy()
                    for kind, group, block in self._contract(left, right):
                        ordered = block.index_select(0, of_rows).index_select(2, of_cols)
                        values[kind][group][at, :, to] = ordered.cpu().numpy()
                    del left, right  # else they would live on while the next ones are captured
        return values, logits

    def _sides(self, rows: range, cols: range) -> Iterator[tuple[Side, Side]]:
        """Captures of both sides, segment by segment."""
        if rows == cols:
            yield from ((capture, capture) for capture in self._column(cols))
        else:
            kept_rows = self._column(rows, keep=self._sizes.sketched or self._keeps_all)
            yield from zip(kept_rows, self._column(cols), strict=True)

    def _contract(self, left: Side, right: Side) -> Iterator[tuple[str, str, torch.Tensor]]:
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
                yield kind.value, group, block

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
        ids = self._spec.encoded.input_ids
        passes = split(self._by_length(examples), self._sizes.batch)
        self._predicted += self._passes.seconds(len(own) * len(ids[own[0]]) for own in passes)
        yield from self._captured(examples, self._tracer, self._streamer)

    def _captured(self, examples: range, tracer: Tracer, streamer: Streamer) -> Iterator[Capture]:
        batches = [self._batch(b) for b in split(self._by_length(examples), self._sizes.batch)]
        if self._sizes.stream:
            found = zip(*(streamer.stream(batch) for batch in batches), strict=True)
        else:
            found = zip(*([tracer.capture(batch)] for batch in batches), strict=True)
        for pieces in found:
            memory.trim_heap()
            yield Capture.concatenate(pieces, after_group=memory.trim_heap)

    def _by_length(self, examples: range) -> list[int]:
        """A chunk as it is captured: the longest first, so that little of a pass is padding."""
        ids = self._spec.encoded.input_ids
        return sorted(examples, key=lambda index: -len(ids[index]))

    def _places(self, examples: range) -> torch.Tensor:
        """Where each example of a chunk stands in its capture."""
        order = torch.tensor(self._by_length(examples), device=self._spec.compute.device)
        return order.argsort()

    def _batch(self, examples: Sequence[int]) -> dict[str, torch.Tensor]:
        return collate(self._spec.encoded, examples, self._spec.compute.device)

    # ------------------------------------------------------------ facts

    @cached_property
    def _tracer(self) -> Tracer:
        signs = any(kind.has_signs for kind in self._spec.kernel.kinds)
        return Tracer(self._problem.module, self._problem.readout, signs=signs)

    @cached_property
    def _adapted(self) -> dict[str, float]:
        """Layers whose LoRA's kernel is compared with their weight's: theory knows sgd alone."""
        kinds, method = self._spec.kernel.stored_kinds, self._spec.parameters.method
        compared = method is Method.lora and Kind.sgd in kinds
        return adapted_layers(self._problem.module) if compared else {}

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
    def _passes(self) -> PassRate:
        """Of this process now; no number of the kernel depends on it."""
        first = self._longest[:1]

        def run(count: int) -> None:
            batch = self._batch(first * count)
            if self._sizes.stream:
                for capture in self._streamer.stream(batch):
                    del capture
            else:
                self._tracer.capture(batch)

        num_tokens = len(self._spec.encoded.input_ids[first[0]])
        return pass_rate(run, num_tokens, self._spec.compute.device, most=self._sizes.batch)

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


@dataclass(frozen=True, slots=True, eq=False)
class _Loaded:
    """A problem, and which parameters varied when it was loaded."""

    problem: Problem
    varying: dict[nn.Parameter, bool]


def take_problem(worker: object, spec: WorkerSpec, head: Head | None) -> Problem:
    """The problem of a worker: that of the worker before in this process, if it is the same.

    Args:
        worker: whose it is while it lives.
        spec: what to compute.
        head: linear head, if there is one.

    Returns:
        The problem as it was loaded.
    """

    def make() -> _Loaded:
        problem = load(spec, head)
        return _Loaded(problem, {p: p.requires_grad for p in problem.module.parameters()})

    loaded = kept.take_over(worker, _problem_key(spec, head), make)
    for parameter, varies in loaded.varying.items():
        parameter.requires_grad_(varies)
    memory.trim_heap()  # of what the worker before had in memory beside it
    return loaded.problem


def _problem_key(spec: WorkerSpec, head: Head | None) -> str:
    """All that decides a module; the kernel's fingerprint knows what the model's files hold."""
    facts = [
        spec.fingerprint,
        plain(spec.model),
        plain(spec.parameters),
        spec.kernel.precision.value,
        spec.encoded.label_ids,
        spec.num_labels,
        spec.compute.device,
        None if head is None else [head.weight.tolist(), head.bias.tolist()],
    ]
    return canonical_json(facts)


def load(spec: WorkerSpec, head: Head | None) -> Problem:
    """The problem of a worker, with its trial's weights; without a head, to read features from."""
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
    if spec.trial is not None:
        assign(problem.module, trial_weights(spec.store_path, spec.trial))
    return problem


def split(examples: _Indices, size: int) -> Iterator[_Indices]:
    """Consecutive pieces, the last of which may be smaller."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


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
