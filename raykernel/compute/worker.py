"""What a worker does: it loads the problem once and turns cells of the kernel into stored blocks.

    cell → capture columns (kept) → capture rows → contract → commit → receipt

A worker needs plain data only (`WorkerSpec`), talks to nobody but the store, and returns integers.
The same cell gives the same bits in every worker with the same configuration and thread count,
whatever was computed before: batches, chunks and their order of summation are fixed by the cell.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Float

from raykernel.compute import memory, process, samples, sketches
from raykernel.compute.captures import Captures
from raykernel.compute.examples import split
from raykernel.compute.fitting import Fitting
from raykernel.compute.loading import can_read, settle, stored_head, take_problem
from raykernel.compute.memory import Sizes
from raykernel.compute.naming import named
from raykernel.compute.plan import WorkerPlan, plan_of
from raykernel.compute.second_pass import check_second_pass
from raykernel.compute.spec import Receipt, WorkerSpec
from raykernel.config import Json
from raykernel.errors import RunError
from raykernel.ntk import contract
from raykernel.ntk.capture import Capture
from raykernel.ntk.packed import SignedCapture, signed_capture
from raykernel.ntk.project import join
from raykernel.ntk.rates import PassRate, Rates, rates_of
from raykernel.store.blocks import Store
from raykernel.store.grid import Cell
from raykernel.store.groups import select_groups

Side = Capture | SignedCapture
"""Rows or columns of a product."""


class Worker:
    """A model in a process of its own, at θ_0 or a trial's weights, and the cells it computes.

    Args:
        spec: what to compute.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        start = time.monotonic()
        settle(spec.compute)
        self._spec = spec
        self._handle = Store(spec.store_path).open(spec.fingerprint)
        self._head = stored_head(spec, self._handle)
        self._problem = take_problem(self, spec, self._head)
        itemsize = np.dtype(self._handle.manifest.dtype).itemsize
        self._captures = Captures(spec, self._problem, itemsize)
        self._examples = self._captures.examples
        self._columns: OrderedDict[range, list[Side]] = OrderedDict()
        self._checked = False
        self._turn = 0
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
        values, logits = self._fitting.run(
            lambda sizes: self._values(cell, sizes),
            doing=f"in cell ({cell.i}, {cell.j}) with one example against one",
            lower="task.max_length, kernel.block_size or compute.workers",
            forget=self._columns.clear,
        )
        if not self._checked:
            check_second_pass(self._spec, self._captures, cell.rows, self._sizes, logits)
            self._checked = True
        if not can_read(lambda: self._handle.read_logits(cell.i)):
            self._handle.write_logits(cell.rows, logits)
        provenance: dict[str, Json] = {
            "seconds": time.monotonic() - start,
            "predicted_seconds": self._predicted,
            "peak_memory_bytes": process.peak_bytes(self._spec.compute.device),
            "torch": torch.__version__,
            "device": self._spec.compute.device,
            "threads": torch.get_num_threads(),
            "batch": self._sizes.batch,
            "rows": self._sizes.rows,
            "cols": self._sizes.cols,
            "packed": self._sizes.packed,
            "halved": self._fitting.halved,
        }
        num_bytes = self._handle.write_block(cell, values, provenance)
        del values
        process.trim_heap()
        return self._receipt(cell, start, num_bytes=num_bytes, already_stored=False)

    def features(self, indices: range) -> Float[np.ndarray, "n d"]:
        """What the linear head reads, in batches of `compute.batch_size`.

        Args:
            indices: examples.

        Returns:
            One row per example.
        """
        batches = split(indices, self._spec.compute.batch_size)
        found = [self._problem.features(self._examples.batch(batch)) for batch in batches]
        features: np.ndarray = torch.cat(found).float().cpu().numpy()
        return features

    def prepare(self) -> None:
        """Trace the longest examples, while nothing else is in memory, and measure what is new.

        Raises:
            RunError: if the problem has a linear head that is not stored yet.
            InputError: if a pattern of `group_sets` matches no layer group.
        """
        spec, handle = self._spec, self._handle
        if self._head is None and not spec.encoded.label_ids:
            raise RunError(
                f"kernel {spec.fingerprint} has no linear head: expected one, because the "
                "kernel of prompt=none starts from a linear probe. Fit and store it first."
            )
        self._learn()
        captures = self._captures
        for patterns in spec.group_sets:
            select_groups(captures.groups, groups=patterns)
        handle.pin("features", captures.num_features)
        if spec.kernel.precision.is_reduced and not handle.has_pinned("precision"):
            handle.pin("precision", samples.precision_error(spec, self._head, captures))
        if spec.kernel.projection.is_on and not handle.has_pinned("projection"):
            error = samples.projected_error(spec, captures, self._sizes, self._rates)
            handle.pin("projection", error)
        if captures.adapted and not handle.has_pinned("lora"):
            handle.pin("lora", samples.lora_error(spec, captures, self._sizes, self._rates))
        process.trim_heap()

    def plan(self) -> WorkerPlan:
        """Memory, chunks, operations and methods of a full cell; computes no block.

        Returns:
            The plan.
        """
        start = time.monotonic()
        self._learn()
        captures = self._captures
        return plan_of(
            self._problem.module,
            captures.longest(),
            num_tokens=self._examples.num_tokens(self._examples.longest[0]),
            footprint=captures.footprint,
            sizes=self._sizes,
            kernel=self._spec.kernel,
            rates=self._rates,
            passes=self._passes,
            start_seconds=self._load_seconds + time.monotonic() - start,
            streamed=captures.streamer.blocks,
            fallbacks=captures.tracer.fallbacks,
            num_groups=len(captures.groups),
            work=captures.work if self._spec.kernel.projection.is_on else None,
        )

    def _learn(self) -> None:
        """Trace the longest examples, and time it."""
        self._captures.learn()
        _ = self._passes

    # ------------------------------------------------------------ numbers

    def _values(
        self, cell: Cell, sizes: Sizes
    ) -> tuple[dict[str, dict[str, np.ndarray]], Float[np.ndarray, "n c"]]:
        """A cell's blocks by kind and group, and the rows' logits."""
        handle, c = self._handle, self._spec.num_labels
        shape = (len(cell.rows), c, len(cell.cols), c)
        dtype = np.dtype(handle.manifest.dtype)
        values = {
            kind.value: {group: np.empty(shape, dtype) for group in self._captures.groups}
            for kind in self._spec.kernel.stored_kinds
        }
        logits = np.empty((len(cell.rows), c))
        places = self._examples.places
        # Back and forth: the last column chunk of a cell is the first of the next one.
        chunks = list(split(cell.cols, sizes.cols))
        self._turn += 1
        for cols in reversed(chunks) if self._turn % 2 else chunks:
            to = slice(cols.start - cell.cols.start, cols.stop - cell.cols.start)
            for rows in split(cell.rows, sizes.rows):
                at = slice(rows.start - cell.rows.start, rows.stop - cell.rows.start)
                of_rows, of_cols = places(rows), places(cols)
                taken = [self._examples.by_length(own) for own in (rows, cols)]
                for left, right in self._sides(rows, cols):
                    logits[at] = left.logits[of_rows].double().cpu().numpy()
                    with named(self._spec, *taken):
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
                after_group=process.trim_heap,
            )

    def _segments(self, examples: range) -> Iterator[Capture]:
        """Captures of a chunk; of a projected kernel one, its sketch."""
        projection = self._spec.kernel.projection
        if not projection.is_on:
            yield from self._factors(examples)
            return
        self._predicted += self._captures.work.seconds(len(examples), self._rates)
        make = partial(sketches.sketch, projection=projection, max_bytes=memory.GRAM_BYTES)
        yield join(map(make, self._factors(examples)))

    def _factors(self, examples: range) -> Iterator[Capture]:
        """Factors of a chunk, and the time that they should take."""
        passes = self._examples.passes(examples, self._sizes.batch)
        self._predicted += self._passes.seconds(
            len(own) * self._examples.num_tokens(own[0]) for own in passes
        )
        yield from self._captures.of(examples, self._sizes)

    # ------------------------------------------------------------ facts

    @cached_property
    def _rates(self) -> Rates:
        """Of the kernel's first worker: they choose the way of summation, and so its rounding."""
        measured = rates_of(self._spec.compute.device)
        return Rates(**self._handle.pin("rates", asdict(measured)))

    @cached_property
    def _passes(self) -> PassRate:
        return self._captures.pass_rate(self._sizes)

    @cached_property
    def _fitting(self) -> Fitting[Sizes]:
        sizes = self._captures.sizes()
        for _ in range(self._spec.halvings):
            sizes = memory.halved(sizes)
        return Fitting(sizes, memory.halved, self._spec.compute)

    @property
    def _sizes(self) -> Sizes:
        return self._fitting.size

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
            peak_memory_bytes=process.peak_bytes(self._spec.compute.device),
            process=os.getpid(),
            halved=self._fitting.halved,
        )
