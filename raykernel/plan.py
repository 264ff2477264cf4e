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
from raykernel.compute.plan import Cost, WorkerPlan
from raykernel.compute.worker import Worker
from raykernel.config import RunConfig
from raykernel.console import Screen, counted, duration, size
from raykernel.pipeline import begin_kernel, result_key, why_new
from raykernel.prepared import Prepared, prepare, worker_spec
from raykernel.regress import wanted_rows
from raykernel.store.blocks import Store
from raykernel.store.grid import Cell
from raykernel.terms import Split


@dataclass(frozen=True, slots=True)
class Plan:
    """A run before it happens."""

    prepared: Prepared
    cells: list[Cell]
    """Blocks that the run wants."""
    missing: list[Cell]
    """Those that the store lacks."""
    num_predicted: int
    """Test examples to predict without their kernel."""
    why_new: str
    """How the most similar stored kernel differs; empty if this one is stored or none is."""
    worker: WorkerPlan

    @property
    def store_bytes(self) -> int:
        """Bytes that the missing blocks will take."""
        c = len(self.prepared.data.labels)
        itemsize = np.dtype(self.prepared.config.kernel.precision.stored).itemsize
        entries = sum(len(cell.rows) * len(cell.cols) for cell in self.missing) * c * c
        num_kinds = len(self.prepared.config.kernel.stored_kinds)
        return entries * itemsize * num_kinds * self.worker.num_groups

    @property
    def flops(self) -> float:
        """Floating-point operations of the missing blocks and of predicting test."""
        blocks = self._captures * self.worker.capture_flops
        blocks += sum(cost.flops for cost in self._contractions)
        return blocks + self.prediction_flops

    @property
    def prediction_flops(self) -> float:
        """Those of predicting test."""
        return self._products * self.worker.product_flops

    @property
    def seconds(self) -> float:
        """Predicted time of all, all workers busy from when they have started."""
        alone = self._captures * self.worker.capture_seconds
        alone += sum(cost.seconds for cost in self._contractions)
        return alone / self.prepared.config.compute.workers + self.prediction_seconds

    @property
    def prediction_seconds(self) -> float:
        """That of predicting test."""
        return self._products * self.worker.product_seconds / self._num_predicting

    @property
    def _contractions(self) -> list[Cost]:
        """What contracting each missing cell takes, were its examples as long as the longest."""
        cells = ((len(cell.rows), len(cell.cols), cell.rows == cell.cols) for cell in self.missing)
        shapes = Counter(cells)
        return [
            Cost(number * cost.flops, number * cost.seconds)
            for (rows, cols, diagonal), number in shapes.items()
            for cost in [self.worker.contraction(rows, cols, diagonal=diagonal)]
        ]

    @property
    def _captures(self) -> float:
        """Examples as long as the longest to capture, rows anew in every cell."""
        rows = sum(len(cell.rows) for cell in self.missing if cell.rows != cell.cols)
        columns = sum(map(len, {cell.cols for cell in self.missing}))
        workers = self.prepared.config.compute.workers
        if self.worker.sizes.sketched:  # rows are kept, too
            rows = min(rows, self.prepared.grid.num_rows * workers - columns * workers)
        return (rows + columns * workers) * self._mean_length

    @property
    def _products(self) -> float:
        """Examples as long as the longest in J w, and in every worker's Jᵀ α over train."""
        if not self.num_predicted:
            return 0.0
        train = self._num_predicting * self.prepared.grid.num_cols
        # A direction for every kind; that of signs takes up to twice the passes over train.
        num_kinds = len(self.prepared.config.kernel.kinds)
        return num_kinds * (train + self.num_predicted) * self._mean_length

    @property
    def _num_predicting(self) -> int:
        """Workers that predict: no more than there are row blocks."""
        grid = self.prepared.grid
        return max(1, min(self.prepared.config.compute.workers, len(grid.row_indices(grid.test))))

    @property
    def _mean_length(self) -> float:
        """Mean number of tokens, relative to the largest."""
        lengths = [len(ids) for ids in self.prepared.encoded.input_ids]
        return sum(lengths) / len(lengths) / max(lengths)


def make_plan(config: RunConfig, screen: Screen) -> Plan:
    """Look at input, model and store.

    Args:
        config: the run.
        screen: where progress is shown.

    Returns:
        The plan.
    """
    prepared = prepare(config, screen)
    store, grid = Store(config.store.path), prepared.grid
    with screen.stage("Tracing the longest example"), tempfile.TemporaryDirectory() as scratch:
        worker = plan_worker(prepared, scratch)
    rows = wanted_rows(config, grid, worker.groups)
    cells = missing = grid.cells(rows)
    predicted = len(grid.test) if config.kernel.predicts and rows != grid.rows else 0
    if store.has(prepared.identity):
        handle = store.open(prepared.fingerprint)
        missing = handle.missing(rows)
        if _is_solved(prepared, store) or not handle.missing(grid.test):
            predicted = 0
    why = why_new(prepared, store)
    return Plan(prepared, cells, missing, predicted, why, worker)


def _is_solved(prepared: Prepared, store: Store) -> bool:
    """Whether the same question has been answered for every kind, so that nothing is predicted."""
    rows = [result_key(prepared, kind) for kind in prepared.config.kernel.kinds]
    return all(store.has_result("kernels", row) for row in rows)


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
        ["blocks", f"{len(plan.missing)} to compute, {len(plan.cells)} in all"],
        ["test", _prediction(plan)],
        ["parameters", f"{worker.num_parameters:,} in {len(worker.methods)} layer groups"],
        [
            "operations",
            f"{plan.flops / 1e12:.2f} TFLOP, {plan.prediction_flops / 1e12:.2f} of them for test",
        ],
        [
            "predicted time",
            f"{duration(plan.seconds)} with {counted(config.compute.workers, 'busy worker')}, "
            f"{duration(plan.prediction_seconds)} of it for test, and "
            f"{duration(worker.start_seconds)} before to start them",
        ],
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
            f"{counted(sizes.batch, 'example')} a pass, {sizes.rows} rows x {sizes.cols} columns, "
            + (
                f"sketches of {counted(sizes.resident, 'chunk')} kept"
                if sizes.sketched
                else f"{counted(sizes.resident, 'column chunk')} kept"
            )
            + (" as packed signs" if sizes.packed else "")
            + (", one transformer block at a time" if sizes.stream else ""),
        ],
    ]
    screen.facts(rows, title=f"{config.task.name}, {config.model.name}")
    if plan.why_new:
        screen.note(f"{plan.why_new}")
    pattern = Counter((re.sub(r"\d+", "*", group), way) for group, way in worker.methods.items())
    screen.table(
        ["layer groups", "number", "method"],
        [[group, str(number), way] for (group, way), number in pattern.items()],
    )
    for name, why in worker.fallbacks.items():
        screen.note(f"{name} has no rule: {why}")


def _prediction(plan: Plan) -> str:
    """How test will be predicted, in words."""
    grid = plan.prepared.grid
    if plan.num_predicted:
        return f"{plan.num_predicted} examples predicted without their kernel (J w)"
    if len(plan.cells) == len(grid.cells()):
        return "predicted through its kernel with train"
    return "predicted before"
