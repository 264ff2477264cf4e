"""Does fine-tuning behave like its kernel here? The stage of `raykernel behavior`.

    K at θ_PT, regression → fine-tuning → J(test) (θ_FT − θ_PT) → K at θ_FT → criteria → verdict

Every step keeps what it finds in the store and computes only what is missing there. The kernel at
θ_FT is a kernel of its own: its identity is that of the problem, and the trial whose weights it
has. Only its block of test with train is computed, the one that the paper compares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from raykernel.analysis.behavior import (
    Criterion,
    KernelDistance,
    Verdict,
    fixed_features,
    kernel_distance,
    linearization,
    output_derivatives,
    solves,
    taylor_error,
    verdict,
)
from raykernel.analysis.regression import RegressionResult, score
from raykernel.compute.executor import Executor
from raykernel.compute.spec import LinearizedSpec
from raykernel.config import RunConfig, canonical_json, require
from raykernel.console import Screen
from raykernel.jobs import LateExecutor, run_jobs
from raykernel.pipeline import begin_kernel, complete_cells, open_kernel
from raykernel.prepared import Prepared, example_labels, prepare, worker_spec
from raykernel.provenance import Meter
from raykernel.regress import solve, wanted_rows
from raykernel.store.blocks import Store
from raykernel.store.grid import Cell, Grid
from raykernel.store.kernels import KernelHandle
from raykernel.store.linearized import linearized_changes, missing_linearized
from raykernel.terms import Kind, Metric, Optimizer, PromptStyle, Split
from raykernel.trials import check_pull, check_training, complete_trial

ANALOGS = {
    Optimizer.sgd: [Kind.sgd],
    Optimizer.adam: [Kind.signgd, Kind.asigngd],
    Optimizer.adamw: [Kind.signgd, Kind.asigngd],
    Optimizer.signgd: [Kind.signgd, Kind.asigngd],
}
"""Kernels that describe an update rule, the one whose features are compared first (Malladi et al.
2023, sections 3.2 and 4; Table 6 compares K^SignGD for Adam)."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Logits of all test examples."""

    pretrained: Float[np.ndarray, "m c"]
    """f(x; θ_PT)."""
    linearized: Float[np.ndarray, "m c"]
    """f(x; θ_PT) + J(x) (θ_FT − θ_PT)."""
    finetuned: Float[np.ndarray, "m c"]
    """f(x; θ_FT)."""
    labels: Int[np.ndarray, " m"]

    def scores(self, metric: Metric) -> tuple[float, float, float]:
        """Pre-trained, linearised and fine-tuned score."""
        by = (self.pretrained, self.linearized, self.finetuned)
        one, two, three = (score(metric, self.labels, logits) for logits in by)
        return one, two, three


@dataclass(frozen=True, slots=True)
class Behavior:
    """Everything that `raykernel behavior` reports."""

    prepared: Prepared
    trial: str
    """The fine-tuning run."""
    kernels: dict[Kind, RegressionResult]
    """Kernel regression by kind, of which the best one counts."""
    outputs: Outputs
    distance: KernelDistance
    compared: Kind
    """Kind whose kernels at θ_PT and θ_FT are compared."""
    num_compared: int
    """Test examples that they are compared on."""
    tuned_fingerprint: str
    """Name of the kernel at θ_FT."""

    @property
    def best(self) -> Kind:
        """Kind with the best test score, the first of equal ones: Table 1 takes whichever."""
        return max(self.kernels, key=lambda kind: self.kernels[kind].test_score)

    @property
    def finetuned_score(self) -> float:
        """Test score of the fine-tuned model in the task's metric."""
        return self.outputs.scores(self.prepared.config.task.metric)[2]

    @property
    def taylor_error(self) -> float:
        """See `analysis.behavior.taylor_error`."""
        by = self.outputs
        return taylor_error(by.pretrained, by.linearized, by.finetuned)

    @property
    def chi(self) -> tuple[float, float]:
        """Mean absolute output derivative on test, before and after fine-tuning."""
        by = self.outputs
        loss = self.prepared.config.training.loss
        before, after = (
            float(np.abs(output_derivatives(logits, by.labels, loss)).mean())
            for logits in (by.pretrained, by.finetuned)
        )
        return before, after

    @property
    def verdict(self) -> Verdict:
        """The criteria of this seed."""
        criteria = self.prepared.config.behavior
        scores = self.outputs.scores(criteria.metric)
        return verdict(
            solves(
                self.kernels[self.best].test_score, self.finetuned_score, fraction=criteria.solves
            ),
            linearization(*scores, fraction=criteria.linearization),
            fixed_features(self.distance, threshold=criteria.fixed_features),
        )


def settled(config: RunConfig) -> RunConfig:
    """The run with the kinds of kernel that describe its optimizer.

    Kinds that the user chose stay if one of them does.

    Args:
        config: as composed.

    Returns:
        The same, or with other `kernel.kinds`, and with weights kept.

    Raises:
        InputError: if the kernel is of some layers only, while all selected ones are trained.
    """
    require(
        not config.solver.groups,
        "solver.groups",
        config.solver.groups,
        "none, since fine-tuning trains all selected parameters. Select layers with "
        "parameters.layers_to_transform or parameters.include",
    )
    require(
        not config.training.twin,
        "training.twin",
        True,
        "false: behavior measures the linear model at the trial's parameters by itself. Compare "
        "with a twin by `raykernel finetune training.twin=true`",
    )
    check_training(config)
    analogs = ANALOGS[config.training.optimizer]
    kernel = config.kernel
    if not any(kind in analogs for kind in kernel.kinds):
        kernel = replace(kernel, kinds=analogs)
    return replace(config, kernel=kernel, training=replace(config.training, keep_weights=True))


def behavior(config: RunConfig, overrides: tuple[str, ...], screen: Screen) -> Behavior:
    """Measure whether fine-tuning behaves like its kernel, and keep the verdict.

    Args:
        config: the run.
        overrides: the command line that made it, kept with the result.
        screen: where progress is shown.

    Returns:
        Measurements and verdict.
    """
    meter = Meter()
    asked, config = config.kernel.kinds, settled(config)
    if config.kernel.kinds != asked:
        kinds = " and ".join(kind.value for kind in config.kernel.kinds)
        screen.note(
            f"the kernel that describes {config.training.optimizer.value} is {kinds}, in place of "
            f"kernel.kinds=[{','.join(kind.value for kind in asked)}] (Malladi et al. 2023, "
            "section 4)."
        )
    prepared = prepare(config, screen)
    check_pull(prepared)
    config = prepared.config
    Store(config.store.path).require_writable()
    handle = open_kernel(prepared)
    cells = compared_cells(handle.grid, config.behavior.test_limit)
    with contextlib.closing(LateExecutor(config.compute, screen)) as executor:
        kernels, peak_before = kernel_before(
            prepared, handle, cells, executor=executor, screen=screen
        )
        screen.say("Fine-tuning")
        training = Meter()
        trial = complete_trial(prepared, overrides, executor, screen)
        trained = training.seconds
        tuned = at_trial(prepared, trial.trial, compared_kind(config))
        after = begin_tuned(tuned, handle)
        peak_after = kernel_after(tuned, after, cells, executor=executor, screen=screen)
    outputs = read_outputs(prepared, handle, after)
    found = Behavior(
        prepared=prepared,
        trial=trial.trial,
        kernels=kernels,
        outputs=outputs,
        distance=distance(handle, after, cells, config=config),
        compared=compared_kind(config),
        num_compared=len({i for cell in cells for i in cell.rows}),
        tuned_fingerprint=after.fingerprint,
    )
    peak = max(peak_before, peak_after, trial.row["peak_memory_bytes"])
    row = result_row(found, overrides) | meter.columns(peak) | {"seconds": meter.seconds - trained}
    Store(config.store.path).write_result("behavior", row)
    return found


# ---------------------------------------------------------------- the steps


def compared_kind(config: RunConfig) -> Kind:
    """The kind whose kernels before and after are compared: the first that is an analog."""
    analogs = ANALOGS[config.training.optimizer]
    return next(kind for kind in analogs if kind in config.kernel.kinds)


def compared_cells(grid: Grid, limit: int | None) -> list[Cell]:
    """Cells of test with train whose kernels are compared.

    Args:
        grid: how the kernel is cut.
        limit: test examples at the most, but at least one row block; None: all.

    Returns:
        Whole row blocks, evenly spread, because test may be ordered by label.
    """
    blocks = grid.row_indices(grid.test)
    count = len(blocks) if limit is None else max(1, limit // grid.block_size)
    if count < len(blocks):
        blocks = [blocks[(2 * n + 1) * len(blocks) // (2 * count)] for n in range(count)]
    chosen = set(blocks)
    return [cell for cell in grid.cells(grid.test) if cell.i in chosen]


def kernel_before(
    prepared: Prepared,
    handle: KernelHandle,
    cells: Sequence[Cell],
    *,
    executor: Executor,
    screen: Screen,
) -> tuple[dict[Kind, RegressionResult], int]:
    """Complete the kernel at θ_PT and solve kernel regression with it.

    Args:
        prepared: the problem.
        handle: its kernel.
        cells: blocks of test with train that are to be compared.
        executor: where.
        screen: where progress is shown.

    Returns:
        Scores by kind, of those that describe the optimizer; largest memory of a worker, bytes.
    """
    screen.say("Kernel before fine-tuning")
    config, grid = prepared.config, handle.grid
    wanted = {*grid.cells(wanted_rows(config, grid)), *cells}
    ordered = [cell for cell in grid.cells() if cell in wanted]
    # All before regression, which then predicts test in the same way when it is repeated.
    done = complete_cells(prepared, handle, ordered, executor=executor, screen=screen)
    found = solve(prepared, handle, executor, screen)
    analogs = ANALOGS[config.training.optimizer]
    results = {kind: result for kind, result in found.results.items() if kind in analogs}
    return results, max(done.peak_memory_bytes, found.peak_memory_bytes)


def at_trial(prepared: Prepared, trial: str, kind: Kind) -> Prepared:
    """The same problem with a trial's weights: a kernel with an identity of its own.

    Args:
        prepared: the problem at θ_PT.
        trial: the fine-tuning run.
        kind: the only kind that is computed.

    Returns:
        The problem at θ_FT.
    """
    config = prepared.config
    config = replace(config, kernel=replace(config.kernel, kinds=[kind]))
    identity = {**prepared.identity, "kernel": config.kernel.identity, "trial": trial}
    return replace(prepared, config=config, identity=identity)


def begin_tuned(tuned: Prepared, before: KernelHandle) -> KernelHandle:
    """The place of the kernel at θ_FT, with what it has in common with the one at θ_PT.

    Args:
        tuned: the problem at θ_FT.
        before: the kernel at θ_PT.

    Returns:
        A handle on the kernel's blocks.
    """
    handle = begin_kernel(tuned, Store(tuned.config.store.path))
    if (head := before.read_head()) is not None and handle.read_head() is None:
        handle.write_head(*head)  # where training began: the trial's weights replace it
    if before.has_pinned("rates"):
        # Equal ways of summation: what differs is the weights, not the rounding.
        handle.pin("rates", before.read_pinned("rates"))
    return handle


def kernel_after(
    tuned: Prepared,
    handle: KernelHandle,
    cells: Sequence[Cell],
    *,
    executor: Executor,
    screen: Screen,
) -> int:
    """Complete the linearised and fine-tuned outputs of test, and the blocks at θ_FT.

    Args:
        tuned: the problem at θ_FT.
        handle: its kernel.
        cells: blocks of test with train that are to be compared.
        executor: where.
        screen: where progress is shown.

    Returns:
        Largest memory of a worker, bytes.
    """
    screen.say("Linearised model, and kernel after fine-tuning")
    linearize(tuned, handle, executor, screen)
    done = complete_cells(tuned, handle, cells, executor=executor, screen=screen)
    return done.peak_memory_bytes


def linearize(tuned: Prepared, handle: KernelHandle, executor: Executor, screen: Screen) -> None:
    """Complete the linearised outputs of test and those of the fine-tuned model.

    Args:
        tuned: the problem at θ_FT.
        handle: its kernel.
        executor: where.
        screen: where progress is shown.
    """
    test = handle.grid.test
    missing = missing_linearized(handle, test)
    if not missing:
        screen.say(f"All {len(test)} test examples are linearised: computing 0.")
        return
    make = LinearizedSpec(worker_spec(tuned)).row_blocks
    sizes = [len(handle.grid.row_block(i)) for i in missing]
    name, halved = "linearised test outputs", 0
    for receipt in run_jobs(executor, make, missing, screen=screen, name=name, sizes=sizes):
        halved = max(halved, receipt.halved)
    if halved:
        screen.note(
            f"memory ran out, and a worker halved its batches {halved} times. Lower "
            "compute.memory_gb to what is free."
        )


def read_outputs(prepared: Prepared, before: KernelHandle, after: KernelHandle) -> Outputs:
    """Logits of test at θ_PT, in its linearised model, and at θ_FT.

    Args:
        prepared: the problem.
        before: kernel at θ_PT.
        after: kernel at θ_FT.

    Returns:
        The logits and the labels.
    """
    test = before.grid.test
    pretrained = before.logits(test)
    return Outputs(
        pretrained=pretrained,
        linearized=pretrained + linearized_changes(after, test),
        finetuned=after.logits(test),
        labels=example_labels(prepared.data)[test.start :],
    )


def distance(
    before: KernelHandle, after: KernelHandle, cells: Sequence[Cell], *, config: RunConfig
) -> KernelDistance:
    """Distance of the kernels at θ_PT and θ_FT, all layers summed, over the chosen cells.

    Args:
        before: kernel at θ_PT.
        after: kernel at θ_FT.
        cells: whole row blocks of test.
        config: the run.

    Returns:
        The distances.
    """
    kind = compared_kind(config).value
    rows = sorted({(cell.rows.start, cell.rows.stop) for cell in cells})
    one, two = (
        np.concatenate([handle.kernel(kind=kind, rows=range(*pair)) for pair in rows])
        for handle in (before, after)
    )
    return kernel_distance(one, two, near_zero=config.behavior.near_zero)


# ---------------------------------------------------------------- what is kept


def result_row(found: Behavior, overrides: tuple[str, ...]) -> dict[str, object]:
    """One row of the table `behavior`.

    Args:
        found: of `behavior`.
        overrides: the command line that made it.

    Returns:
        Value by column.
    """
    prepared, config = found.prepared, found.prepared.config
    result, verdict = found.kernels[found.best], found.verdict
    pretrained, linearized, finetuned = found.outputs.scores(config.behavior.metric)
    before, after = found.chi
    moved = found.distance
    criteria = {
        "solves": verdict.solves,
        "linearization": verdict.linearization,
        "fixed_features": verdict.fixed_features,
        "kernel_behavior": verdict.kernel_behavior,
    }
    return {
        "fingerprint": prepared.fingerprint,
        "trial": found.trial,
        "solver": canonical_json(config.solver),
        "criteria": canonical_json(config.behavior),
        "task": config.task.name,
        "model": config.model.name,
        "prompt": config.prompt.style.value,
        "k": config.task.k,
        "seed": config.task.seed,
        "optimizer": config.training.optimizer.value,
        **{name: criterion.holds for name, criterion in criteria.items()},
        "reasons": canonical_json({name: each.reason for name, each in criteria.items()}),
        "kind": found.best.value,
        "metric": config.task.metric.value,
        "kernel_regression": result.test_score,
        "finetuned": found.finetuned_score,
        "linearization_metric": config.behavior.metric.value,
        "pretrained_score": pretrained,
        "linearized_score": linearized,
        "finetuned_score": finetuned,
        "taylor_error": _number(found.taylor_error),
        "compared_kind": found.compared.value,
        "num_compared": found.num_compared,
        "mean_relative_distance": _number(moved.mean_relative),
        "mean_apart": _number(moved.mean_apart),
        "median_relative_distance": _number(moved.median_relative),
        "frobenius_distance": _number(moved.frobenius),
        "cka": _number(moved.cka),
        "near_zero_share": moved.near_zero_share,
        "zero_share": moved.zero_share,
        "chi_pretrained": before,
        "chi_finetuned": after,
        "tuned_fingerprint": found.tuned_fingerprint,
        "overrides": list(overrides),
    }


def _number(value: float) -> float | None:
    """A number, or null where it is undefined: SQL compares NaN as the largest."""
    return None if np.isnan(value) else value


# ---------------------------------------------------------------- what is shown


def show_behavior(found: Behavior, screen: Screen) -> None:
    """Print one table per measurement, and the verdict.

    Args:
        found: of `behavior`.
        screen: where to print.
    """
    config = found.prepared.config
    splits = found.prepared.data.splits
    task = f"{config.task.name}, {config.model.name}, k={config.task.k}, seed {config.task.seed}"
    screen.table(
        ["", f"{config.task.metric.value} (test)"],
        [
            [f"fine-tuned ({config.training.optimizer.value})", f"{found.finetuned_score:.3f}"],
            *(
                [f"kernel regression ({kind.value})", f"{result.test_score:.3f}"]
                for kind, result in found.kernels.items()
            ),
        ],
        title=f"Does the kernel solve it? {task}, {len(splits[Split.test])} test examples",
    )
    start = "linear probe" if config.prompt.style is PromptStyle.none else "pre-trained"
    names = [start, "linearised", "fine-tuned"]
    chi = {0: f"{found.chi[0]:.3f}", 2: f"{found.chi[1]:.3f}"}
    scores = found.outputs.scores(config.behavior.metric)
    screen.table(
        ["model", f"{config.behavior.metric.value} (test)", "mean |output derivative|"],
        [[name, f"{scores[i]:.3f}", chi.get(i, "")] for i, name in enumerate(names)],
        title="Is fine-tuning linear? Linearised: f(θ_PT) + <∇f(θ_PT), θ_FT - θ_PT>. Its error is "
        f"{_shown(found.taylor_error)} of the change of the outputs",
    )
    moved = found.distance
    near = f"entries of at most {config.behavior.near_zero:g} of the root mean square"
    screen.table(
        ["distance", "value"],
        [
            ["mean relative, element-wise", _shown(moved.mean_relative)],
            [f"the same without {near}", _shown(moved.mean_apart)],
            ["median relative, element-wise", _shown(moved.median_relative)],
            ["relative Frobenius", _shown(moved.frobenius)],
            ["centred kernel alignment (1: equal up to scale)", _shown(moved.cka)],
            [f"share of {near}", _shown(moved.near_zero_share)],
            ["share of entries that are zero (in no mean)", _shown(moved.zero_share)],
        ],
        title=f"Are features fixed? Kernels ({found.compared.value}) before and after, "
        f"{found.num_compared} test x {len(splits[Split.train])} train examples, all outputs",
    )
    verdict = found.verdict
    screen.table(
        ["criterion (Malladi et al. 2023, Table 1)", "", "because"],
        [
            ["the kernel solves the task", *_said(verdict.solves)],
            ["linearization", *_said(verdict.linearization)],
            ["fixed features", *_said(verdict.fixed_features)],
            ["kernel behavior", *_said(verdict.kernel_behavior)],
        ],
        title="Verdict",
    )
    screen.out.print(
        f'Next: raykernel query "select task, seed, optimizer, solves, linearization, '
        f'fixed_features, kernel_behavior from behavior" --store {config.store.path}',
        markup=False,
    )


def _said(criterion: Criterion) -> tuple[str, str]:
    return criterion.word, criterion.reason


def _shown(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.3g}"
