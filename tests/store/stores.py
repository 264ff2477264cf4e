"""Small kernels for the store's tests: numbers whose every digit says where they belong."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa

from raykernel.config import GridPoint, Json
from raykernel.store.blocks import KernelHandle, Store
from raykernel.store.grid import Cell, Grid
from raykernel.store.predictions import Solution, write_prediction
from raykernel.terms import Solver

GROUPS = ["embeddings", "layer.0.query", "layer.1.query", "head", "cross(embeddings, head)"]
SOLUTION = Solution("sgd", tuple(GROUPS), GridPoint(Solver.ridge, 0.01, math.inf))
IDENTITY: dict[str, Json] = {
    "task": {"name": "sst2", "k": 16, "seed": 13},
    "model": {"name": "tiny"},
    "kernel": {"kinds": ["sgd"], "block_size": 2},
}


def examples(count: int) -> pa.Table:
    return pa.table(
        {
            "id": [f"train:{n}" for n in range(count)],
            "split": ["train"] * count,
            "label": [f"label {n % 2}" for n in range(count)],
        }
    )


def begin(
    path: Path,
    *,
    grid: Grid | None = None,
    identity: dict[str, Json] | None = None,
    num_outputs: int = 2,
    dtype: str = "float32",
) -> KernelHandle:
    grid = grid or Grid(num_cols=5, num_rows=8, block_size=2)
    return Store(path).begin(
        identity or IDENTITY,
        grid=grid,
        num_outputs=num_outputs,
        examples=examples(grid.num_rows),
        dtype=dtype,
    )


def truth(handle: KernelHandle) -> dict[str, np.ndarray]:
    """The whole kernel of each group, symmetric within train, in the stored precision."""
    n, m, c = handle.grid.num_rows, handle.grid.num_cols, handle.num_outputs
    whole = {}
    for seed, group in enumerate(GROUPS):
        k = np.random.default_rng(seed).standard_normal((n, c, m, c))
        square = k[:m]
        k[:m] = (square + square.transpose(2, 3, 0, 1)) / 2
        whole[group] = k.astype(handle.manifest.dtype)
    return whole


def block(handle: KernelHandle, cell: Cell) -> dict[str, dict[str, np.ndarray]]:
    rows, cols = slice(cell.rows.start, cell.rows.stop), slice(cell.cols.start, cell.cols.stop)
    return {"sgd": {group: k[rows, :, cols] for group, k in truth(handle).items()}}


def logits(rows: range, num_outputs: int = 2) -> np.ndarray:
    return np.outer(np.arange(rows.start, rows.stop) + 0.1, np.arange(num_outputs) + 1.0)


def write(handle: KernelHandle, cell: Cell) -> None:
    handle.write_logits(cell.rows, logits(cell.rows, handle.num_outputs))
    handle.write_block(cell, block(handle, cell), {"seconds": 0.5, "peak_memory_bytes": 1000})


def predict(handle: KernelHandle, i: int) -> None:
    """A row block predicted without its kernel."""
    rows = handle.grid.row_block(i)
    handle.write_logits(rows, logits(rows, handle.num_outputs))
    write_prediction(handle, SOLUTION, i, -logits(rows, handle.num_outputs), {"seconds": 0.5})


def complete(
    path: Path, *, grid: Grid | None = None, identity: dict[str, Json] | None = None
) -> KernelHandle:
    handle = begin(path, grid=grid, identity=identity)
    for cell in handle.missing():
        write(handle, cell)
    return handle
