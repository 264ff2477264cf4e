"""Strong and weak scaling: blocks of a small kernel, inline and on Ray workers."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa

from benchmarks.tables import Table
from benchmarks.timing import Say
from benchmarks.workloads import PAD, WORDS, Workload, roberta
from raykernel.compute.executor import Executor, InlineExecutor
from raykernel.compute.spec import Receipt, WorkerSpec
from raykernel.config import ComputeConfig, KernelConfig, ModelConfig, ParametersConfig
from raykernel.problem.prompts import Encoded
from raykernel.store.blocks import Store
from raykernel.store.grid import Cell, Grid
from raykernel.terms import Architecture, ExecutorName

BLOCK_SIZE = 64
PASS_SIZE = 16
"""Examples of a pass: few enough for its activations to stay in cache."""

FEW_SHOT = Grid(num_cols=BLOCK_SIZE, num_rows=20 * BLOCK_SIZE, block_size=BLOCK_SIZE)
HALF = Grid(num_cols=BLOCK_SIZE, num_rows=10 * BLOCK_SIZE, block_size=BLOCK_SIZE)
SQUARE = Grid(num_cols=5 * BLOCK_SIZE, num_rows=6 * BLOCK_SIZE, block_size=BLOCK_SIZE)
"""Twenty and ten blocks of few train texts and many others, and twenty of many train texts, where
every worker captures most of what the others do."""

JOBS = {
    "20 blocks, 64 train texts, d=256, C=6": ((256, 6), FEW_SHOT),
    "10 blocks, 64 train texts, d=256, C=6": ((256, 6), HALF),
    "20 blocks, 64 train texts, d=128, C=2": ((128, 2), FEW_SHOT),
    "20 blocks, 320 train texts, d=128, C=2": ((128, 2), SQUARE),
}
"""Width and outputs of the model, and grid, by name. Blocks of the first two take seconds; those of
the others half a second, beside which the first ones of a worker, whose memory is fresh, weigh."""

WHOLE, HALVED, *_ = JOBS


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """How long the blocks of a kernel took."""

    start_seconds: float
    """Until the first worker began its first block."""
    block_seconds: float
    """From then until the last block was stored."""
    kernel: np.ndarray
    """The kernel that was stored."""


def worker_table(rounds: int, say: Say) -> Table:
    """Inline, and with one and two Ray workers of one thread each, in turn."""
    compute = {
        "inline": ComputeConfig(batch_size=PASS_SIZE),
        "1 worker": ComputeConfig(ExecutorName.ray, workers=1, batch_size=PASS_SIZE),
        "2 workers": ComputeConfig(ExecutorName.ray, workers=2, batch_size=PASS_SIZE),
    }
    table = Table(
        f"Workers: blocks of {BLOCK_SIZE} x {BLOCK_SIZE} texts, RoBERTa, 4 layers, T=16 to 32, one "
        "thread each",
        ["", "inline (s)", "1 worker (s)", "2 workers (s)", "2 to 1", "start (s)", "same bits"],
    )
    found: dict[str, list[list[Job]]] = {name: [] for name in JOBS}
    for turn in range(rounds):
        for name, (sizes, grid) in JOBS.items():
            say(f"round {turn + 1}, {name}")
            wanted = {"1 worker": compute["1 worker"]} if name == HALVED else compute
            found[name].append(_jobs(*sizes, grid, wanted))
    for name, turns in found.items():
        if name == HALVED:
            continue
        seconds = [[job.block_seconds for job in jobs] for jobs in turns]
        same = all(np.array_equal(job.kernel, turns[0][0].kernel) for jobs in turns for job in jobs)
        table.add(
            name,
            *(f"{median(column):.2f}" for column in zip(*seconds, strict=True)),
            f"{median(one / two for _, one, two in seconds):.2f}",
            f"{median(jobs[-1].start_seconds for jobs in turns):.1f}",
            "yes" if same else "no",
        )
    pairs = zip(found[HALVED], found[WHOLE], strict=True)
    weak = median(half[0].block_seconds / whole[2].block_seconds for half, whole in pairs)
    table.note(f"Weak scaling, 10 blocks on 1 and 20 on 2 workers: {weak:.0%} efficient.")
    table.note("Start: the workers' processes and models, until the first block begins.")
    return table


def _jobs(width: int, outputs: int, grid: Grid, compute: dict[str, ComputeConfig]) -> list[Job]:
    """One job with each executor."""
    workload = roberta("", "", texts=grid.num_rows, width=width, outputs=outputs)
    jobs = []
    with tempfile.TemporaryDirectory() as folder:
        model = _save(workload, Path(folder) / "model")
        for executor, resources in compute.items():
            store = Path(folder) / executor
            jobs.append(_run(_spec(workload, model, grid, resources, store)))
    return jobs


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
