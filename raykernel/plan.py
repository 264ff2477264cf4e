"""What a run would do: examples, blocks, operations, memory, methods. No block is computed.

The model is loaded and its longest example traced once, since memory and methods follow from
what the engine captures; the store is only looked at.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from raykernel.compute.memory import GIB
from raykernel.compute.plan import WorkerPlan
from raykernel.compute.worker import Worker
from raykernel.config import RunConfig
from raykernel.console import Screen, duration, size
from raykernel.pipeline import begin_kernel, why_new, worker_spec
from raykernel.prepared import Prepared, prepare
from raykernel.store.blocks import Store
from raykernel.terms import Split


@dataclass(frozen=True, slots=True)
class Plan:
    """A run before it happens."""

    prepared: Prepared
    blocks_total: int
    blocks_missing: int
    why_new: str
    """How the most similar stored kernel differs; empty if this one is stored or none is."""
    worker: WorkerPlan

    @property
    def store_bytes(self) -> int:
        """Bytes that the missing blocks will take."""
        grid, c = self.prepared.grid, len(self.prepared.data.labels)
        itemsize = np.dtype(self.prepared.config.kernel.precision.stored).itemsize
        entries = sum(len(cell.rows) * len(cell.cols) for cell in grid.cells()) * c * c
        share = self.blocks_missing / self.blocks_total
        num_kinds = len(self.prepared.config.kernel.stored_kinds)
        return int(share * entries * itemsize * num_kinds * self.worker.num_groups)

    @property
    def flops(self) -> float:
        """Floating-point operations of the missing blocks."""
        captures, cells = self._work
        return captures * self.worker.capture_flops + cells * self.worker.block_flops

    @property
    def seconds(self) -> float:
        """Predicted time of the missing blocks, all workers busy."""
        captures, cells = self._work
        alone = captures * self.worker.capture_seconds + cells * self.worker.block_seconds
        return alone / self.prepared.config.compute.workers

    @property
    def _work(self) -> tuple[float, float]:
        """Examples as long as the longest to capture, rows anew in every cell, and full cells."""
        grid, encoded = self.prepared.grid, self.prepared.encoded
        share = self.blocks_missing / self.blocks_total
        rows = sum(len(cell.rows) for cell in grid.cells() if cell.rows != cell.cols)
        columns = grid.num_cols * self.prepared.config.compute.workers
        if self.worker.sizes.sketched:  # rows are kept, too
            rows = min(rows, grid.num_rows * self.prepared.config.compute.workers - columns)
        lengths = [len(ids) for ids in encoded.input_ids]
        captures = (rows + columns) * sum(lengths) / len(lengths) / max(lengths)
        full = grid.block_size**2
        cells = sum(len(cell.rows) * len(cell.cols) / full for cell in grid.cells())
        return share * captures, share * cells


def make_plan(config: RunConfig, screen: Screen) -> Plan:
    """Look at input, model and store.

    Args:
        config: the run.
        screen: where progress is shown.

    Returns:
        The plan.
    """
    prepared = prepare(config, screen)
    store = Store(config.store.path)
    total = missing = prepared.grid.num_cells
    if store.has(prepared.identity):
        missing = len(store.open(prepared.fingerprint).missing())
    with screen.stage("Tracing the longest example"), tempfile.TemporaryDirectory() as scratch:
        worker = plan_worker(prepared, scratch)
    return Plan(prepared, total, missing, why_new(prepared, store), worker)


def plan_worker(prepared: Prepared, scratch: str) -> WorkerPlan:
    """What one worker would do, found out beside the real store.

    Args:
        prepared: the run.
        scratch: an empty folder.

    Returns:
        The worker's plan.
    """
    spec = replace(worker_spec(prepared), store_path=scratch)
    handle = begin_kernel(prepared, Store(scratch))
    if not prepared.encoded.label_ids:
        # A linear probe would need all of train; any head that is not zero has its cost.
        width = Worker(spec).features(range(1)).shape[1]
        handle.write_head(np.ones((spec.num_labels, width)), np.zeros(spec.num_labels))
    return Worker(spec).plan()


def show_plan(plan: Plan, screen: Screen) -> None:
    """Print a plan.

    Args:
        plan: of `make_plan`.
        screen: where to print.
    """
    prepared, worker = plan.prepared, plan.worker
    config, splits = prepared.config, prepared.data.splits
    lengths = [len(ids) for ids in prepared.encoded.input_ids]
    counts = ", ".join(f"{len(splits[split])} {split.value}" for split in Split)
    sizes, packed = worker.sizes, worker.footprint.packed
    signs = f", packed signs {size(packed.whole)}" if packed is not None else ""
    rows = [
        ["examples", f"{counts}; {len(prepared.data.labels)} outputs"],
        ["tokens", f"{min(lengths)} to {max(lengths)}, {np.mean(lengths):.0f} on average"],
        ["kernel", prepared.fingerprint],
        ["blocks", f"{plan.blocks_missing} to compute, {plan.blocks_total} in all"],
        ["parameters", f"{worker.num_parameters:,} in {len(worker.methods)} layer groups"],
        ["operations", f"{plan.flops / 1e12:.2f} TFLOP"],
        ["predicted time", f"{duration(plan.seconds)} of {config.compute.workers} busy workers"],
        ["new in the store", size(plan.store_bytes)],
        ["workers", f"{config.compute.workers} ({config.compute.executor.value})"],
        [
            "memory of a worker",
            f"{size(sizes.peak_bytes)} of {size(config.compute.memory_gb * GIB)} allowed "
            f"(weights {size(worker.footprint.weights)}, factors of an example "
            f"{size(worker.footprint.factors)}{signs})",
        ],
        [
            "chunks",
            f"{sizes.batch} examples a pass, {sizes.rows} rows x {sizes.cols} columns, "
            + (
                f"sketches of {sizes.resident} chunks kept"
                if sizes.sketched
                else f"{sizes.resident} column chunks kept"
            )
            + (" as packed signs" if sizes.packed else "")
            + (", one transformer block at a time" if sizes.stream else ""),
        ],
    ]
    screen.facts(rows, title=f"{config.task.name}, {config.model.name}")
    if plan.why_new:
        screen.say(f"Note: {plan.why_new}")
    pattern = Counter((re.sub(r"\d+", "*", group), way) for group, way in worker.methods.items())
    screen.table(
        ["layer groups", "number", "method"],
        [[group, str(number), way] for (group, way), number in pattern.items()],
    )
    for name, why in worker.fallbacks.items():
        screen.say(f"Note: {name} has no rule: {why}")
