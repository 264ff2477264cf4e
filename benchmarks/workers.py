"""Strong and weak scaling: blocks of a small kernel, inline and on Ray workers."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.tables import Table
from benchmarks.timing import Say
from benchmarks.workloads import PAD, WORDS, Workload, roberta
from raykernel.compute.executor import Executor, InlineExecutor
from raykernel.compute.worker import Receipt, WorkerSpec
from raykernel.config import ComputeConfig, KernelConfig, ModelConfig, ParametersConfig
from raykernel.problem.prompts import Encoded
from raykernel.store.blocks import Store
from raykernel.store.grid import Cell, Grid
from raykernel.terms import Architecture, ExecutorName

BLOCK_SIZE = 32
FEW_SHOT = Grid(num_cols=BLOCK_SIZE, num_rows=20 * BLOCK_SIZE, block_size=BLOCK_SIZE)
HALF = Grid(num_cols=BLOCK_SIZE, num_rows=10 * BLOCK_SIZE, block_size=BLOCK_SIZE)
SQUARE = Grid(num_cols=5 * BLOCK_SIZE, num_rows=6 * BLOCK_SIZE, block_size=BLOCK_SIZE)
"""Twenty and ten blocks of few train examples and many others, and twenty of many train examples,
where every worker captures most of what the others do."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """How long the blocks of a kernel took."""

    start_seconds: float
    """Until the first worker began its first block."""
    block_seconds: float
    """From then until the last block was stored."""
    kernel: np.ndarray
    """The kernel that was stored."""


def worker_table(_: int, say: Say) -> Table:
    """Inline, and with one and two Ray workers of one thread each."""
    compute = {
        "inline": ComputeConfig(batch_size=BLOCK_SIZE),
        "Ray, 1 worker": ComputeConfig(ExecutorName.ray, workers=1, batch_size=BLOCK_SIZE),
        "Ray, 2 workers": ComputeConfig(ExecutorName.ray, workers=2, batch_size=BLOCK_SIZE),
    }
    workload = roberta("", "", texts=FEW_SHOT.num_rows)
    jobs: dict[tuple[str, Grid], Job] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = _save(workload, Path(folder) / "model")
        for name, resources in compute.items():
            for grid in (FEW_SHOT, HALF, SQUARE):
                say(f"{name}, {grid.num_cells} blocks, {grid.num_cols} columns")
                store = Path(folder) / f"{name}-{grid.num_rows}"
                jobs[name, grid] = _run(_spec(workload, model, grid, resources, store))
    table = Table(
        "Workers: blocks of 32 x 32 texts, RoBERTa d=128, 4 layers, T=16 to 32, one thread each",
        [
            "",
            "20 blocks, 32 train (s)",
            "speed-up",
            "10 blocks, 32 train (s)",
            "20 blocks, 160 train (s)",
            "speed-up",
            "start (s)",
            "same bits",
        ],
    )
    for name in compute:
        few, square = jobs[name, FEW_SHOT], jobs[name, SQUARE]
        same = all(
            np.array_equal(jobs[name, grid].kernel, jobs["inline", grid].kernel)
            for grid in (FEW_SHOT, HALF, SQUARE)
        )
        table.add(
            name,
            f"{few.block_seconds:.2f}",
            f"{jobs['inline', FEW_SHOT].block_seconds / few.block_seconds:.2f}",
            f"{jobs[name, HALF].block_seconds:.2f}",
            f"{square.block_seconds:.2f}",
            f"{jobs['inline', SQUARE].block_seconds / square.block_seconds:.2f}",
            f"{few.start_seconds:.1f}",
            "yes" if same else "no",
        )
    one, two = "Ray, 1 worker", "Ray, 2 workers"
    for grid, what in ((FEW_SHOT, "32 train texts"), (SQUARE, "160 train texts")):
        gain = jobs[one, grid].block_seconds / jobs[two, grid].block_seconds
        table.note(f"Strong scaling, {what}: 2 workers are {gain:.2f} times as fast as 1.")
    weak = jobs[one, HALF].block_seconds / jobs[two, FEW_SHOT].block_seconds
    table.note(f"Weak scaling, 10 blocks on 1 and 20 on 2 workers: {weak:.0%} efficient.")
    table.note("Start: the workers' processes and models, until the first block begins.")
    return table


def _save(workload: Workload, folder: Path) -> ModelConfig:
    workload.model.model.save_pretrained(folder)  # type: ignore[operator, union-attr]
    return ModelConfig(name=str(folder), architecture=Architecture.masked_lm)


def _spec(
    workload: Workload, model: ModelConfig, grid: Grid, compute: ComputeConfig, store: Path
) -> WorkerSpec:
    rows = [tuple(row[row != PAD].tolist()) for row in workload.batch["input_ids"]]
    rows = rows[: grid.num_rows]
    examples = pa.table(
        {
            "id": [str(i) for i in range(grid.num_rows)],
            "split": ["train" if i < grid.num_cols else "test" for i in range(grid.num_rows)],
            "label": ["x"] * grid.num_rows,
        }
    )
    handle = Store(store).begin(
        {"name": "benchmark"}, grid=grid, num_outputs=workload.num_outputs, examples=examples
    )
    encoded = Encoded(
        input_ids=tuple(rows),
        token_type_ids=None,
        position=tuple(len(row) - 2 for row in rows),
        label_ids=WORDS[: workload.num_outputs],
        pad_id=PAD,
        notes=(),
        truncated=0,
    )
    return WorkerSpec(
        model=model,
        parameters=ParametersConfig(),
        kernel=KernelConfig(block_size=BLOCK_SIZE, test_block=True),
        compute=compute,
        encoded=encoded,
        num_labels=workload.num_outputs,
        store_path=str(store),
        fingerprint=handle.fingerprint,
    )


def _run(spec: WorkerSpec) -> Job:
    handle = Store(spec.store_path).open(spec.fingerprint)
    cells: list[Cell] = handle.missing()
    begun, ended = float("inf"), 0.0
    with closing(_executor(spec.compute)) as executor:
        start = time.perf_counter()
        for outcome in executor.run(spec.blocks, cells):
            receipt: Receipt = outcome.value()
            ended = time.perf_counter()
            begun = min(begun, ended - receipt.seconds)
    return Job(begun - start, ended - begun, handle.kernel())


def _executor(compute: ComputeConfig) -> Executor:
    if compute.executor is ExecutorName.inline:
        return InlineExecutor()
    from raykernel.compute.ray_executor import RayExecutor

    return RayExecutor(compute)
