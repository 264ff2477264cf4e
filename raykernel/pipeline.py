"""The stages of a run, one short function each.

    config → examples → prompts → identity → store.missing() → workers → K → solver → result

The driver holds no model and no gradient; it sends block indices to workers and reads finished
blocks from the store.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from raykernel.analysis.regression import RegressionResult, SplitData, kernel_regression
from raykernel.compute.executor import Executor, InlineExecutor, versions
from raykernel.compute.sketches import distortion_text
from raykernel.compute.worker import WorkerSpec
from raykernel.config import ComputeConfig, RunConfig, canonical_json, differences
from raykernel.console import Screen, duration, size
from raykernel.errors import InputError, RaykernelError, StorageFullError, StoreMismatchError
from raykernel.prepared import Prepared, example_labels, example_table, prepare
from raykernel.problem.probe import fit_head
from raykernel.store.blocks import Store
from raykernel.store.kernels import KernelHandle
from raykernel.store.manifest import differences_text
from raykernel.terms import ExecutorName, Kind, PromptStyle, Split


@dataclass(frozen=True, slots=True)
class Completion:
    """What it took to complete a kernel."""

    blocks_total: int
    blocks_computed: int
    seconds: float
    peak_memory_bytes: int
    """Largest resident memory of a worker, 0 if none worked."""
    worker_seconds: float = 0.0
    """Time that workers spent on the blocks, summed."""
    predicted_seconds: float = 0.0
    """The same as the device's rates predict it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything that `raykernel kernel` reports."""

    prepared: Prepared
    completion: Completion
    results: dict[Kind, RegressionResult]
    store_path: str
    store_bytes: int
    precision_error: dict[str, Any] | None
    """What a reduced precision costs, measured on a sample by the kernel's first worker."""
    projection_error: dict[str, Any] | None
    """The same of a projection, with the bound that there is."""


def kernel(config: RunConfig, overrides: tuple[str, ...], screen: Screen) -> Outcome:
    """Complete a kernel's blocks, solve kernel regression, keep the results.

    Args:
        config: the run.
        overrides: the command line that made it, kept with the results.
        screen: where progress is shown.

    Returns:
        Scores and costs.
    """
    prepared = prepare(config, screen)
    if note := why_new(prepared, Store(config.store.path)):
        screen.say(f"Note: {note}")
    handle = open_kernel(prepared)
    completion = complete(prepared, handle, screen)
    results = solve(prepared, handle)
    store = Store(config.store.path)
    for kind, result in results.items():
        row = result_row(prepared, completion, kind, result, overrides)
        # A repetition that computed nothing keeps the row that says what the blocks cost.
        if completion.blocks_computed or not store.has_result("kernels", row):
            store.write_result("kernels", row)
    kept = sum(file.stat().st_size for file in handle.path.iterdir())
    errors = (
        handle.read_pinned(name) if handle.has_pinned(name) else None
        for name in ("precision", "projection")
    )
    return Outcome(prepared, completion, results, config.store.path, kept, *errors)


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
        examples=example_table(prepared.data),
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


def worker_spec(prepared: Prepared) -> WorkerSpec:
    """What a worker needs to compute blocks of this run."""
    config = prepared.config
    return WorkerSpec(
        model=config.model,
        parameters=config.parameters,
        kernel=config.kernel,
        compute=config.compute,
        encoded=prepared.encoded,
        num_labels=len(prepared.data.labels),
        store_path=config.store.path,
        fingerprint=prepared.fingerprint,
    )


def complete(prepared: Prepared, handle: KernelHandle, screen: Screen) -> Completion:
    """Compute the blocks that the store lacks.

    Args:
        prepared: the run.
        handle: its kernel.
        screen: where progress is shown.

    Returns:
        How many blocks there are and what the new ones cost.
    """
    missing = handle.missing()
    total = len(prepared.grid.cells())
    if not missing:
        screen.say(f"All {total} blocks are stored: computing 0 blocks.")
        return Completion(total, 0, 0.0, 0)
    screen.say(f"{total - len(missing)} of {total} blocks are stored: computing {len(missing)}.")
    start, peak, halved, worked, predicted = time.monotonic(), 0, 0, 0.0, 0.0
    spec = worker_spec(prepared)
    with contextlib.closing(open_executor(prepared.config.compute, screen)) as executor:
        if not prepared.encoded.label_ids and handle.read_head() is None:
            with screen.stage("Fitting the linear probe"):
                write_probe(prepared, handle, executor)
        failed: RaykernelError | None = None
        with screen.progress("blocks", len(missing)) as advance:
            for outcome in executor.run(spec.blocks, missing):
                if isinstance(outcome.error, InputError | StorageFullError):
                    raise outcome.error  # the next block would fail likewise
                if outcome.result is None:
                    failed = outcome.error
                    screen.say(f"Block {outcome.job.i}, {outcome.job.j} failed: {failed}")
                else:
                    peak = max(peak, outcome.result.peak_memory_bytes)
                    worked += outcome.result.seconds
                    predicted += outcome.result.predicted_seconds
                    halved = max(halved, outcome.result.halved)
                advance(1)
    if failed is not None:
        raise failed
    if halved:
        screen.say(
            f"Note: memory ran out, and a worker halved its chunks {halved} times. Lower "
            "compute.memory_gb to what is free; chunks that fit are faster."
        )
    seconds = time.monotonic() - start
    return Completion(total, len(missing), seconds, peak, worked, predicted)


def open_executor(compute: ComputeConfig, screen: Screen) -> Executor:
    """The executor that the configuration names.

    Args:
        compute: where to compute.
        screen: where lost workers are reported.

    Returns:
        An executor to be closed.
    """
    if compute.executor is ExecutorName.inline:
        return InlineExecutor()
    # Ray takes seconds to import, and an inline run needs none of it.
    from raykernel.compute.ray_executor import RayExecutor

    with screen.stage("Starting Ray" if compute.address is None else "Joining Ray"):
        return RayExecutor(compute, say=screen.say)


def write_probe(prepared: Prepared, handle: KernelHandle, executor: Executor) -> None:
    """Fit the linear probe on train and store it: it is part of theta_0.

    Malladi et al. 2023, section 5: standard fine-tuning and its kernel start from a linear probe.
    """
    train = prepared.data.splits[Split.train]
    (outcome,) = executor.run(worker_spec(prepared).features, [train])
    labels = example_labels(prepared.data)[train.start : train.stop]
    head = fit_head(outcome.value(), labels, len(prepared.data.labels))
    handle.write_head(head.weight, head.bias)


def solve(prepared: Prepared, handle: KernelHandle) -> dict[Kind, RegressionResult]:
    """Kernel regression for each kind of kernel that is a symmetric matrix on train.

    Args:
        prepared: the run.
        handle: its complete kernel.

    Returns:
        Selected grid point and scores by kind; ridge regression has no meaning for the others.
    """
    config, logits, labels = prepared.config, handle.logits(), example_labels(prepared.data)
    eps = float(np.finfo(np.dtype(handle.manifest.dtype)).eps)
    resolution = eps * prepared.grid.num_cols * logits.shape[1]
    results = {}
    for kind in config.kernel.kinds:
        if not kind.is_symmetric:
            continue
        k = handle.kernel(config.solver.groups or None, kind=kind.value)
        train, dev, test = (
            SplitData(k[at.start : at.stop], logits[at.start : at.stop], labels[at.start : at.stop])
            for at in (prepared.data.splits[split] for split in Split)
        )
        results[kind] = kernel_regression(
            train,
            dev,
            test,
            ridge=config.solver.ridge,
            f0_scaling=config.solver.f0_scaling,
            metric=config.task.metric,
            resolution=resolution,
        )
    return results


def result_row(
    prepared: Prepared,
    completion: Completion,
    kind: Kind,
    result: RegressionResult,
    overrides: tuple[str, ...],
) -> dict[str, object]:
    """One row of the table `kernels`."""
    config, data = prepared.config, prepared.data
    probe = config.prompt.style is PromptStyle.none
    return {
        "fingerprint": prepared.fingerprint,
        "task": config.task.name,
        "model": config.model.name,
        "prompt": config.prompt.style.value,
        "kind": kind.value,
        "precision": config.kernel.precision.value,
        "k": config.task.k,
        "seed": config.task.seed,
        "num_outputs": len(data.labels),
        "num_train": len(data.splits[Split.train]),
        "num_dev": len(data.splits[Split.dev]),
        "num_test": len(data.splits[Split.test]),
        "metric": config.task.metric.value,
        "zero_shot": None if probe else result.zero_shot,
        "linear_probe": result.zero_shot if probe else None,
        "kernel_regression": result.test_score,
        "dev": result.dev_score,
        "ridge": result.ridge,
        "f0_scaling": result.f0_scaling,
        "groups": config.solver.groups,
        "blocks_total": completion.blocks_total,
        "blocks_computed": completion.blocks_computed,
        "seconds": completion.seconds,
        "peak_memory_bytes": completion.peak_memory_bytes,
        "overrides": list(overrides),
        "versions": canonical_json(versions()),
        "solver": canonical_json(config.solver),
        "identity": canonical_json(prepared.identity),
    }


def _compared(done: Completion) -> str:
    if not done.predicted_seconds:
        return ""
    return (
        f" ({duration(done.worker_seconds)} of workers' time, "
        f"{duration(done.predicted_seconds)} predicted)"
    )


def show_outcome(outcome: Outcome, screen: Screen) -> None:
    """Print scores, costs, where the blocks are, and what to try next.

    Args:
        outcome: of `kernel`.
        screen: where to print.
    """
    prepared, config = outcome.prepared, outcome.prepared.config
    probe = config.prompt.style is PromptStyle.none
    metric = config.task.metric.value
    rows: list[list[str]] = []
    for kind, result in outcome.results.items():
        if not rows:
            before = "linear probe" if probe else "zero-shot"
            rows.append([before, f"{result.zero_shot:.3f}", "", "", "", ""])
        rows.append(
            [
                f"kernel regression ({kind.value})",
                f"{result.test_score:.3f}",
                f"{result.dev_score:.3f}",
                f"{result.ridge:g}",
                f"{result.f0_scaling:g}",
                f"{result.condition_number:.3g}",
            ]
        )
    splits = prepared.data.splits
    for kind in config.kernel.kinds:
        if not kind.is_symmetric:
            screen.say(
                f"Note: {kind.value} is not symmetric, so that ridge regression does not apply; "
                f"its blocks are stored: open_store(…).kernel(kind={kind.value!r})"
            )
    screen.table(
        ["", f"{metric} (test)", "dev", "ridge", "f0 scaling", "condition number"],
        rows,
        title=(
            f"{config.task.name}, {config.model.name}, k={config.task.k}, seed {config.task.seed}: "
            f"{len(splits[Split.train])} train, {len(splits[Split.dev])} dev, "
            f"{len(splits[Split.test])} test"
        ),
    )
    done = outcome.completion
    screen.out.print(
        f"{done.blocks_computed} of {done.blocks_total} blocks computed now"
        + (f" in {duration(done.seconds)}" if done.blocks_computed else "")
        + _compared(done)
        + (f", worker peak {size(done.peak_memory_bytes)}" if done.peak_memory_bytes else "")
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
    screen.out.print(
        'Next: raykernel query "select task, model, k, seed, zero_shot, linear_probe, '
        f'kernel_regression from kernels" --store {outcome.store_path}',
        markup=False,
    )
