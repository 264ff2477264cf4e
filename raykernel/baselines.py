"""What people choose layers by today, measured once per kernel and module, and kept beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from raykernel.analysis.start import Baseline
from raykernel.compute.executor import Executor
from raykernel.compute.spec import BaselineSpec
from raykernel.console import Screen, counted
from raykernel.prepared import Prepared, example_labels, worker_spec
from raykernel.store.baselines import Measured, read_baselines
from raykernel.store.kernels import KernelHandle


def measure(
    prepared: Prepared,
    handle: KernelHandle,
    paths: Sequence[str],
    *,
    executor: Executor,
    screen: Screen,
) -> dict[str, Measured]:
    """Measurements of modules' weights; what is stored is not measured again.

    Args:
        prepared: the run.
        handle: its kernel.
        paths: linear layers, by their paths in the plain model.
        executor: where.
        screen: where progress is shown.

    Returns:
        By path.
    """
    stored = read_baselines(handle)
    missing = tuple(path for path in paths if path not in stored)
    if missing:
        train = handle.grid.train
        labels = example_labels(prepared.data)[train.start : train.stop].tolist()
        spec = BaselineSpec(worker_spec(prepared), tuple(labels))
        with screen.stage(f"Measuring the weights of {counted(len(missing), 'module')} on train"):
            for outcome in executor.run(spec.modules, [missing], workers=1):
                outcome.value()
        stored = read_baselines(handle)
    return {path: stored[path] for path in paths}


def summed(found: Iterable[Measured], r: int) -> Baseline:
    """The baseline of some modules together.

    Args:
        found: of each.
        r: directions of the inputs that count, the LoRA's rank.

    Returns:
        Sums over them.
    """
    total = Baseline(0.0, 0.0, 0.0, 0.0)
    for one in found:
        explained = float(one.shares[:r].sum())
        total += Baseline(one.gradient, one.weights, explained, one.importance)
    return total
