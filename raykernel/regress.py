"""Kernel regression of a run: select on dev, predict test, judge.

    K(train, train), K(dev, train) → α → test by J(x) w, or by K(test, train) α → scores

h(x) = K(x, train) α + f0(x) / s is linear in the parameters, h(x) = J(x) w + f0(x) / s with
w = J(train)ᵀ α, or w = sign(J(train))ᵀ α of asigngd. So test needs no kernel, unless signs of its
own gradients are taken, or the chosen layer groups split the uses of a tied parameter, or it is
stored all the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from raykernel.analysis.fit import Fit
from raykernel.analysis.regression import RegressionResult, Selection, SplitData, judge, select
from raykernel.analysis.targets import scaled_logits
from raykernel.compute.executor import Executor
from raykernel.compute.spec import PredictionSpec
from raykernel.config import RunConfig
from raykernel.console import Screen
from raykernel.jobs import run_jobs
from raykernel.prepared import Prepared, example_labels, worker_spec
from raykernel.store.commit import require_writable
from raykernel.store.grid import Grid
from raykernel.store.groups import halved_ties, select_groups
from raykernel.store.kernels import KernelHandle
from raykernel.store.predictions import Solution, missing_predictions, read_predictions
from raykernel.terms import Kind, PredictedBy, Split


@dataclass(frozen=True, slots=True)
class Regression:
    """Scores by kind, and what predicting test took."""

    results: dict[Kind, RegressionResult]
    by: PredictedBy
    num_computed: int
    """Test examples predicted now; the others' outputs were stored."""
    seconds: float
    peak_memory_bytes: int
    """Largest memory of a predicting worker, 0 if none worked."""


def wanted_rows(config: RunConfig, grid: Grid, names: Sequence[str] = ()) -> range:
    """Examples whose kernel with train a run wants.

    Args:
        config: the run.
        grid: how its kernel is cut.
        names: layer groups, cross groups included, as far as they are known.

    Returns:
        Train and dev, or all where test is to be stored or has no shorter way.
    """
    kernel = config.kernel
    if not kernel.predicts or split_ties(config, names):
        return grid.rows
    return grid.train_and_dev


def split_ties(config: RunConfig, names: Sequence[str]) -> list[str]:
    """Cross groups of tied parameters of which `solver.groups` chooses some uses but not all."""
    if not config.solver.groups or not names:
        return []
    return halved_ties(names, select_groups(names, groups=config.solver.groups))


def solve(
    prepared: Prepared, handle: KernelHandle, executor: Executor, screen: Screen
) -> Regression:
    """Kernel regression for each kind of kernel, by its solver.

    Args:
        prepared: the run.
        handle: its kernel, complete as far as it is wanted.
        executor: predicts test where its kernel is not stored.
        screen: where progress is shown.

    Returns:
        Selected grid points and scores.
    """
    config, test = prepared.config, handle.grid.test
    by = PredictedBy.tangent if handle.missing(test) else PredictedBy.block
    labels = example_labels(prepared.data)[test.start :]
    results, start, computed, peak = {}, time.monotonic(), 0, 0
    for kind in config.kernel.kinds:
        selection = _select(prepared, handle, kind)
        fit = selection.fit
        if by is PredictedBy.block:
            data = _read(prepared, handle, kind, test)
            outputs = fit.predict(data.k, data.f0, data.k_flipped)
        else:
            solution = _solution(config, handle, kind, fit)
            number, memory = predict(
                prepared, handle, solution, fit.alpha, executor=executor, screen=screen
            )
            computed, peak = computed + number, max(peak, memory)
            offset = scaled_logits(handle.logits(test), [fit.point.f0_scaling])[0]
            outputs = read_predictions(handle, solution, test) + offset
        f0 = handle.logits(test)
        metric = config.task.metric
        results[kind] = judge(selection, outputs, f0=f0, labels=labels, metric=metric)
    seconds = time.monotonic() - start if computed else 0.0
    return Regression(results, by, computed, seconds, peak)


def predict(
    prepared: Prepared,
    handle: KernelHandle,
    solution: Solution,
    alpha: Float[np.ndarray, "n c"],
    *,
    executor: Executor,
    screen: Screen,
) -> tuple[int, int]:
    """Complete the predictions of test without its kernel.

    Args:
        prepared: the run.
        handle: its kernel.
        solution: which α.
        alpha: its values.
        executor: where.
        screen: where progress is shown.

    Returns:
        Examples predicted now, and the largest memory of a worker.
    """
    grid = handle.grid
    missing = missing_predictions(handle, solution, grid.test)
    if not missing:
        screen.say(f"All {len(grid.test)} test examples are predicted: computing 0 predictions.")
        return 0, 0
    require_writable(handle.path)
    spec = PredictionSpec(worker_spec(prepared), solution, np.ascontiguousarray(alpha))
    sizes = [len(grid.row_block(i)) for i in missing]
    name = "test predictions"
    peak = halved = 0
    for receipt in run_jobs(
        executor, spec.row_blocks, missing, screen=screen, name=name, sizes=sizes
    ):
        peak = max(peak, receipt.peak_memory_bytes)
        halved = max(halved, receipt.halved)
    if halved:
        screen.note(
            f"memory ran out, and a predicting worker halved its batches {halved} times. "
            "Lower compute.memory_gb to what is free."
        )
    return sum(sizes), peak


def _select(prepared: Prepared, handle: KernelHandle, kind: Kind) -> Selection:
    """Fit on train, select on dev."""
    config, grid = prepared.config, handle.grid
    both = _read(prepared, handle, kind, grid.train_and_dev)
    train, dev = (both.part(prepared.data.splits[split]) for split in (Split.train, Split.dev))
    return select(
        train,
        dev,
        config.solver,
        solver=config.solver.solver_of(kind),
        metric=config.task.metric,
        resolution=handle.resolution,
    )


def _read(prepared: Prepared, handle: KernelHandle, kind: Kind, rows: range) -> SplitData:
    """What kernel regression needs of whole row blocks, through their kernel with train."""
    config = prepared.config
    groups = config.solver.groups or None
    flipped = config.needs_both_sides and config.solver.is_asymmetric(kind)
    return SplitData(
        handle.kernel(groups, kind=kind.value, rows=rows),
        handle.logits(rows),
        example_labels(prepared.data)[rows.start : rows.stop],
        handle.kernel(groups, kind=kind.flipped.value, rows=rows) if flipped else None,
    )


def _solution(config: RunConfig, handle: KernelHandle, kind: Kind, fit: Fit) -> Solution:
    """What names the selected α."""
    groups = select_groups(handle.groups(kind.value), groups=config.solver.groups or None)
    return Solution(kind.value, tuple(groups), fit.point)
