"""The stages of a run, one short function each.

    config → examples → prompts → identity → store.missing() → workers → K → regression → result

The driver holds no model and no gradient; it sends block indices to workers and reads finished
blocks from the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raykernel.analysis.behavior import output_derivatives
from raykernel.compute.error_text import distortion_text, lora_text
from raykernel.compute.executor import Executor
from raykernel.compute.spec import Receipt, WorkerSpec
from raykernel.compute.trouble import of_memory, while_loading
from raykernel.config import RunConfig, canonical_json, differences
from raykernel.console import Screen, counted, duration, size
from raykernel.errors import InputError, StoreMismatchError, WorkerLostError
from raykernel.jobs import LateExecutor, run_jobs
from raykernel.location import sizes
from raykernel.prepared import (
    Prepared,
    example_labels,
    example_table,
    prepare,
    problem_columns,
    worker_spec,
)
from raykernel.problem.probe import fit_head
from raykernel.regress import Regression, solve, split_ties, wanted_rows
from raykernel.store.blocks import Store
from raykernel.store.commit import require_writable
from raykernel.store.grid import Cell
from raykernel.store.kernels import KernelHandle
from raykernel.store.manifest import differences_text
from raykernel.store.nested import copy_nested
from raykernel.terms import Kind, PredictedBy, PromptStyle, Solver, Split

_MAX_HALVINGS = 4
"""Of chunks whose workers were killed for want of memory, before the run gives up."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What it took to complete a kernel."""

    blocks_total: int
    """Blocks that the run wants: without those of test where it is predicted by J w."""
    blocks_computed: int
    seconds: float
    peak_memory_bytes: int
    """Largest resident memory of a worker, 0 if none worked."""
    worker_seconds: float = 0.0
    """Time that workers spent on the blocks, summed."""
    predicted_seconds: float = 0.0
    """The same as the device's rates predict it."""

    def then(self, more: Completion) -> Completion:
        """This and what completed it further."""
        return Completion(
            more.blocks_total,
            self.blocks_computed + more.blocks_computed,
            self.seconds + more.seconds,
            max(self.peak_memory_bytes, more.peak_memory_bytes),
            self.worker_seconds + more.worker_seconds,
            self.predicted_seconds + more.predicted_seconds,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything that `raykernel kernel` reports."""

    prepared: Prepared
    completion: Completion
    regression: Regression
    store_path: str
    store_bytes: int
    precision_error: dict[str, Any] | None
    """What a reduced precision costs, measured on a sample by the kernel's first worker."""
    projection_error: dict[str, Any] | None
    """The same of a projection, with the bound that there is."""
    lora_error: dict[str, Any] | None
    """How far a LoRA's kernel is from that of the full weights, with the bound."""


def kernel(config: RunConfig, overrides: tuple[str, ...], screen: Screen) -> Outcome:
    """Complete a kernel's blocks, solve kernel regression, predict test, keep the results.

    Args:
        config: the run.
        overrides: the command line that made it, kept with the results.
        screen: where progress is shown.

    Returns:
        Scores and costs.
    """
    prepared = prepare(config, screen)
    if note := why_new(prepared, Store(config.store.path)):
        screen.aside(note)
    handle = open_kernel(prepared)
    with contextlib.closing(LateExecutor(config.compute, screen)) as executor:
        completion = complete(prepared, handle, executor, screen)
        regression = solve(prepared, handle, executor, screen)
    store = Store(config.store.path)
    precision, projection, lora = (
        handle.read_pinned(name) if handle.has_pinned(name) else None
        for name in ("precision", "projection", "lora")
    )
    for kind in regression.results:
        row = result_row(prepared, completion, regression, kind, overrides)
        row["output_derivative"] = mean_output_derivative(prepared, handle)
        if lora is not None and kind is Kind.sgd:
            row |= {"lora_error": lora["largest_error"], "lora_bound": lora["bound"]}
        # A repetition that computed nothing keeps the row that says what the blocks cost.
        if completion.blocks_computed or not store.has_result("kernels", row):
            store.write_result("kernels", row)
    kept = sum(sizes(handle.path).values())
    return Outcome(
        prepared,
        completion,
        regression,
        store_path=config.store.path,
        store_bytes=kept,
        precision_error=precision,
        projection_error=projection,
        lora_error=lora,
    )


def open_kernel(prepared: Prepared) -> KernelHandle:
    """The kernel's place in the store, made if it is new.

    Args:
        prepared: the run.

    Returns:
        A handle on the kernel's blocks.

    Raises:
        InputError: if `store.kernel` asks for a kernel that is not there.
        StoreMismatchError: if it asks for another kernel than this run's.
    """
    config = prepared.config
    store = Store(config.store.path)
    pinned = config.store.kernel
    if pinned is not None and not prepared.fingerprint.startswith(pinned):
        if not any(name.startswith(pinned) for name in store.fingerprints()):
            raise InputError(
                f"store.kernel={pinned}: this run would be kernel {prepared.fingerprint}, and "
                f"{store.path} holds no kernel of the name asked for. Drop store.kernel."
            )
        stored = store.open(pinned)
        raise StoreMismatchError(
            f"store.kernel={pinned}: this run would be kernel {prepared.fingerprint}. Fields that "
            f"differ:\n{differences_text(differences(stored.identity, prepared.identity))}\n"
            "Change the configuration back, or drop store.kernel to compute a kernel of its own."
        )
    return begin_kernel(prepared, store)


def begin_kernel(prepared: Prepared, store: Store) -> KernelHandle:
    """Make the kernel's folder in a store, or open it."""
    return store.begin(
        prepared.identity,
        grid=prepared.grid,
        num_outputs=len(prepared.data.labels),
        examples=example_table(prepared),
        dtype=prepared.config.kernel.precision.stored,
    )


def why_new(prepared: Prepared, store: Store) -> str:
    """Why stored blocks are not reused: how the most similar kernel differs.

    Args:
        prepared: the run.
        store: where kernels are kept.

    Returns:
        A sentence; empty if this kernel is stored, or none is.
    """
    if store.has(prepared.identity):
        return ""
    found = store.nearest_kernel(prepared.identity)
    if found is None:
        return ""
    name, fields = found
    shown = ", ".join(f"{path} {there!r} → {here!r}" for path, there, here in fields[:4])
    more = f" and {len(fields) - 4} more fields" if len(fields) > 4 else ""
    return f"a new kernel; the most similar stored one, {name}, differs in {shown}{more}."


def complete(
    prepared: Prepared, handle: KernelHandle, executor: Executor, screen: Screen
) -> Completion:
    """Compute the blocks that the run wants and the store lacks.

    Args:
        prepared: the run.
        handle: its kernel.
        executor: where.
        screen: where progress is shown.

    Returns:
        How many blocks are wanted and what the new ones cost.
    """
    config, grid = prepared.config, prepared.grid
    rows = wanted_rows(config, grid)
    done = complete_rows(prepared, handle, rows, executor=executor, screen=screen)
    # Layer groups have names from the first block on.
    names = handle.groups(config.kernel.kinds[0].value)
    if wanted_rows(config, grid, names) == rows:
        return done
    screen.note(
        "solver.groups chooses some but not all uses of a tied parameter "
        f"({', '.join(split_ties(config, names))}), whose kernel is no product of gradients: "
        "test is predicted through its kernel with train."
    )
    more = complete_rows(prepared, handle, grid.rows, executor=executor, screen=screen)
    return done.then(more)


def complete_train(
    prepared: Prepared, screen: Screen, executor: Executor | None = None
) -> tuple[KernelHandle, Completion]:
    """Compute what is missing of the kernel of train with itself, all that a spectrum needs.

    Args:
        prepared: the run.
        screen: where progress is shown.
        executor: where; None: one of its own, which is closed.

    Returns:
        The kernel, and how many blocks its train rows have and what the new ones cost.
    """
    if note := why_new(prepared, Store(prepared.config.store.path)):
        screen.aside(note)
    handle = open_kernel(prepared)
    with contextlib.ExitStack() as opened:
        if executor is None:
            own = LateExecutor(prepared.config.compute, screen)
            executor = opened.enter_context(contextlib.closing(own))
        completion = complete_rows(
            prepared, handle, handle.grid.train, executor=executor, screen=screen
        )
    return handle, completion


def complete_rows(
    prepared: Prepared, handle: KernelHandle, rows: range, *, executor: Executor, screen: Screen
) -> Completion:
    """Compute the missing blocks of some rows.

    Args:
        prepared: the run.
        handle: its kernel.
        rows: examples whose kernel with train is wanted.
        executor: where.
        screen: where progress is shown.

    Returns:
        How many blocks these rows have and what the new ones cost.
    """
    cells = prepared.grid.cells(rows)
    return complete_cells(prepared, handle, cells, executor=executor, screen=screen)


def complete_cells(
    prepared: Prepared,
    handle: KernelHandle,
    cells: Sequence[Cell],
    *,
    executor: Executor,
    screen: Screen,
) -> Completion:
    """Compute the blocks of some cells that are missing.

    Args:
        prepared: the run.
        handle: its kernel.
        cells: those wanted.
        executor: where.
        screen: where progress is shown.

    Returns:
        How many these are and what the new ones cost.
    """
    absent, total = set(handle.missing()), len(cells)
    missing = [cell for cell in cells if cell in absent]
    copied = copy_nested(Store(prepared.config.store.path), handle, missing)
    for name, number in copied.items():
        screen.say(f"{number} of {total} blocks are copied from kernel {name}, which holds them.")
    if copied:
        absent = set(handle.missing())
        missing = [cell for cell in cells if cell in absent]
    if not missing:
        screen.say(f"All {total} blocks are stored: computing 0 blocks.")
        return Completion(total, 0, 0.0, 0)
    require_writable(handle.path)
    screen.say(f"{total - len(missing)} of {total} blocks are stored: computing {len(missing)}.")
    start, peak, halved, worked, predicted = time.monotonic(), 0, 0, 0.0, 0.0
    spec = worker_spec(prepared)
    if not prepared.encoded.label_ids and handle.read_head() is None:
        with screen.stage("Fitting the linear probe"):
            write_probe(prepared, handle, executor)
    for receipt in _receipts(spec, handle, missing, executor, screen):
        peak = max(peak, receipt.peak_memory_bytes)
        worked += receipt.seconds
        predicted += receipt.predicted_seconds
        halved = max(halved, receipt.halved)
    if halved:
        screen.note(
            f"memory ran out, and a worker halved its chunks {halved} times. Lower "
            "compute.memory_gb to what is free; chunks that fit are faster."
        )
    seconds = time.monotonic() - start
    return Completion(total, len(missing), seconds, peak, worked, predicted)


def _receipts(
    spec: WorkerSpec,
    handle: KernelHandle,
    cells: Sequence[Cell],
    executor: Executor,
    screen: Screen,
) -> Iterator[Receipt]:
    """Receipts of cells; those whose workers Ray ended for want of memory, in halved chunks.

    A process that is killed cannot halve its own. So the cells that are missing when all others are
    done are given to workers that begin with half; what they compute differs by rounding alone.

    Args:
        spec: what to compute.
        handle: the kernel.
        cells: which of it.
        executor: where.
        screen: where progress is shown.

    Yields:
        One receipt per cell.

    Raises:
        WorkerLostError: if workers die for another reason, or still.
    """
    while True:
        try:
            yield from run_jobs(executor, spec.blocks, cells, screen=screen, name="blocks")
        except WorkerLostError as error:
            if not of_memory(error) or while_loading(error) or spec.halvings == _MAX_HALVINGS:
                raise
            absent = set(handle.missing())
            cells = [cell for cell in cells if cell in absent]
            spec = dataclasses.replace(spec, halvings=spec.halvings + 1)
            screen.note(
                f"memory of a machine ran out: {counted(len(cells), 'block')} again in chunks half "
                "as large. Lower compute.memory_gb to what is free, or compute.workers."
            )
        else:
            return


def write_probe(prepared: Prepared, handle: KernelHandle, executor: Executor) -> None:
    """Fit the linear probe on train and store it: it is part of theta_0.

    Malladi et al. 2023, section 5: standard fine-tuning and its kernel start from a linear probe.
    """
    train = prepared.data.splits[Split.train]
    (outcome,) = executor.run(worker_spec(prepared).features, [train])
    labels = example_labels(prepared.data)[train.start : train.stop]
    head = fit_head(outcome.value(), labels, len(prepared.data.labels))
    handle.write_head(head.weight, head.bias)


def result_key(prepared: Prepared, kind: Kind) -> dict[str, object]:
    """The columns that tell rows of the table `kernels` apart."""
    return {
        "fingerprint": prepared.fingerprint,
        "kind": kind.value,
        "solver": canonical_json(prepared.config.solver),
    }


def result_row(
    prepared: Prepared,
    completion: Completion,
    regression: Regression,
    kind: Kind,
    overrides: tuple[str, ...],
) -> dict[str, object]:
    """One row of the table `kernels`."""
    config, result = prepared.config, regression.results[kind]
    return (
        result_key(prepared, kind)
        | problem_columns(prepared, result.zero_shot)
        | {
            "precision": config.kernel.precision.value,
            "kernel_regression": result.test_score,
            "test_by": regression.by.value,
            "dev": result.dev_score,
            "solved_by": result.point.solver.value,
            "ridge": result.point.ridge,
            "f0_scaling": result.point.f0_scaling,
            "gamma": result.point.gamma,
            "c": result.point.c,
            "iterations": result.iterations,
            "residual": result.residual,
            "condition_number": result.condition_number,
            "groups": config.solver.groups,
            "blocks_total": completion.blocks_total,
            "blocks_computed": completion.blocks_computed,
            "seconds": completion.seconds + regression.seconds,
            "peak_memory_bytes": max(completion.peak_memory_bytes, regression.peak_memory_bytes),
            "overrides": list(overrides),
            "identity": canonical_json(prepared.identity),
        }
    )


def mean_output_derivative(prepared: Prepared, handle: KernelHandle) -> float:
    """Mean absolute output derivative of the cross-entropy on test, before any training.

    Reference: Malladi et al. 2023, Definition 3.1 and Table 8.

    Args:
        prepared: the run.
        handle: its kernel, with the initial logits of test.

    Returns:
        The mean over examples and outputs.
    """
    test = handle.grid.test
    labels = example_labels(prepared.data)[test.start :]
    return float(np.abs(output_derivatives(handle.logits(test), labels)).mean())


def _predicted(outcome: Outcome) -> str:
    """How test was predicted, as the end of a sentence."""
    found, grid = outcome.regression, outcome.prepared.grid
    if found.by is PredictedBy.block:
        return "; test predicted through its kernel with train"
    text = "; test predicted without its kernel (J w)"
    stored = len(grid.test) * len(found.results) - found.num_computed
    if not found.num_computed:
        return f"{text}, stored before"
    more = f", {stored} stored before" if stored else ""
    return f"{text}, {found.num_computed} examples in {duration(found.seconds)}{more}"


def _compared(done: Completion) -> str:
    if not done.predicted_seconds:
        return ""
    return (
        f" ({duration(done.worker_seconds)} of workers' time, "
        f"{duration(done.predicted_seconds)} predicted)"
    )


def score_table(regression: Regression, before: str) -> tuple[list[str], list[list[str]]]:
    """Scores of all kinds as a table; γ and c are columns where the asymmetric solver has some.

    Args:
        regression: the scores.
        before: what the initial logits are.

    Returns:
        Headings from the third column on, and rows of text.
    """
    results = regression.results
    asymmetric = any(result.point.gamma is not None for result in results.values())
    headings = ["dev", "ridge", "f0 scaling", *["gamma", "c"] * asymmetric, "condition number"]
    zero_shot = next(iter(results.values())).zero_shot
    rows = [[before, f"{zero_shot:.3f}", *[""] * len(headings)]]
    for kind, result in results.items():
        point = result.point
        by = "" if point.solver is Solver.ridge else f", {point.solver.value}"
        settings = [point.ridge, point.f0_scaling, *[point.gamma, point.c] * asymmetric]
        row = [f"kernel regression ({kind.value}{by})", f"{result.test_score:.3f}"]
        row += [f"{result.dev_score:.3f}", *("" if v is None else f"{v:g}" for v in settings)]
        rows.append([*row, f"{result.condition_number:.3g}"])
    return headings, rows


def show_outcome(outcome: Outcome, screen: Screen) -> None:
    """Print scores, costs, where the blocks are, and what to try next.

    Args:
        outcome: of `kernel`.
        screen: where to print.
    """
    prepared, config = outcome.prepared, outcome.prepared.config
    probe = config.prompt.style is PromptStyle.none
    metric = config.task.metric.value
    splits = prepared.data.splits
    headings, rows = score_table(outcome.regression, "linear probe" if probe else "zero-shot")
    for kind, result in outcome.regression.results.items():
        if result.excluded:
            screen.note(
                f"{kind.value}: {len(result.excluded)} of {result.num_points} grid points "
                f"left out, the first because {result.excluded[0]}."
            )
    screen.table(
        ["", f"{metric} (test)", *headings],
        rows,
        title=(
            f"{config.task.name}, {config.model.name}, k={config.task.k}, seed {config.task.seed}: "
            f"{len(splits[Split.train])} train, {len(splits[Split.dev])} dev, "
            f"{len(splits[Split.test])} test"
        ),
    )
    done = outcome.completion
    peak = max(done.peak_memory_bytes, outcome.regression.peak_memory_bytes)
    screen.out.print(
        f"{done.blocks_computed} of {done.blocks_total} blocks computed now"
        + (f" in {duration(done.seconds)}" if done.blocks_computed else "")
        + _compared(done)
        + _predicted(outcome)
        + (f"; worker peak {size(peak)}" if peak else "")
        + f". Kernel {prepared.fingerprint}, {size(outcome.store_bytes)}, in {outcome.store_path}"
    )
    if outcome.precision_error is not None:
        found = outcome.precision_error
        screen.out.print(
            f"{config.kernel.precision.value}: relative error {found['relative_error']:.1e} on "
            f"{found['examples']} examples, against float32 (most in {found['worst_group']})"
        )
    if outcome.projection_error is not None:
        for line in distortion_text(outcome.projection_error):
            screen.out.print(line, markup=False)
    if outcome.lora_error is not None:
        for line in lora_text(outcome.lora_error):
            screen.out.print(line, markup=False)
    screen.out.print(
        'Next: raykernel query "select task, model, k, seed, zero_shot, linear_probe, '
        f'kernel_regression from kernels" --store {outcome.store_path}',
        markup=False,
    )
