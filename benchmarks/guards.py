"""What the checks of numbers cost: `python -m benchmarks.guards [--rounds 3] [--write]`.

A worker computes the kernel of W4 (SmolLM2-135M, 16 drug reviews) from tracing the model to the
stored block, and ridge regression is solved with it: with all checks and, in the same round,
without. They are taken out here alone; a run cannot go without them. Seconds are the process's own,
of one thread, so that what others do on the machine counts less. Two runs differ by more than the
checks take, so that each check's own seconds are counted, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.console import Console

from benchmarks.tables import RESULTS, Table, write_section
from benchmarks.timing import Say, settle
from raykernel.analysis import gram
from raykernel.analysis.ridge import solve_ridge
from raykernel.analysis.targets import one_hot
from raykernel.compose import compose_runs
from raykernel.compute import captures, worker
from raykernel.console import Screen
from raykernel.ntk import contract
from raykernel.pipeline import begin_kernel
from raykernel.prepared import Prepared, prepare, worker_spec
from raykernel.store.blocks import Store

GUARDS: dict[str, tuple[object, str, object]] = {
    "finite weights": (captures, "check_parameters", lambda module: None),
    "second pass": (worker, "check_second_pass", lambda *arguments: None),
    "finite blocks": (contract, "is_finite", lambda block: True),
    "symmetry": (gram, "check_symmetric", lambda *arguments: None),
    "semidefiniteness": (gram, "check_semidefinite", lambda *arguments: None),
}
"""Where each check is called, and what stands there instead. Whether gradients are finite is read
off the maxima by which padding is dropped, and is no pass of its own."""


@contextmanager
def replaced(by: Callable[[str], object]) -> Iterator[None]:
    """Context in which something stands in each check's place, by its name."""
    with ExitStack() as patches:
        for name, (module, attribute, _) in GUARDS.items():
            patches.enter_context(patch.object(module, attribute, by(name)))
        yield


def without_guards() -> AbstractContextManager[None]:
    """Context in which nothing is checked."""
    return replaced(lambda name: GUARDS[name][2])


def timed_guards(spent: dict[str, float]) -> AbstractContextManager[None]:
    """Context in which each check's own seconds are added up."""

    def timed(name: str) -> Callable[..., Any]:
        module, attribute, _ = GUARDS[name]
        check = getattr(module, attribute)

        def run(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return check(*arguments, **named)
            finally:
                spent[name] = spent.get(name, 0.0) + time.process_time() - start

        return run

    return replaced(timed)


def problem(memory_gb: float) -> Prepared:
    """W4 as a run of raykernel: 16 reviews of at most 64 tokens, all but the tied embedding."""
    task = ["task=drug_reviews", "task.k=8", "task.max_length=64", "task.test_limit=2"]
    own = ["model=smollm2_135m", "parameters=no_embeddings", "kernel.block_size=16"]
    (run,) = compose_runs("kernel", [*task, *own, f"compute.memory_gb={memory_gb:g}"])
    return prepare(run.config, Screen())


def kernel(prepared: Prepared) -> np.ndarray:
    """K(train, train), computed in a store of its own, which is checked once more when solved."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        handle = begin_kernel(prepared, store)
        train = handle.grid.train
        spec = dataclasses.replace(worker_spec(prepared), store_path=folder)
        work = spec.blocks()
        for cell in handle.grid.cells(train):
            work(cell)
        found = handle.kernel(rows=train)
        targets = one_hot(np.arange(len(train)) % 2, 2)
        solve_ridge(found, targets, ridge=[1e-2], resolution=handle.resolution)
    return found


def guard_table(rounds: int, say: Say, run: Callable[[], np.ndarray]) -> Table:
    """Seconds of a run with the checks and without, in turns after one that loads the model."""
    kernels = {"load": run()}
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    spent: dict[str, float] = {}
    for number in range(rounds):
        for name in sorted(seconds, reverse=bool(number % 2)):
            with without_guards() if name == "without" else timed_guards(spent):
                start = time.process_time()
                kernels[name] = run()
                seconds[name].append(time.process_time() - start)
            say(f"round {number + 1}, {name} checks: {seconds[name][-1]:.2f} s")
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    table = Table(
        "Checks of numbers on W4: a worker from its first trace to the solved kernel",
        ["", "seconds", "/ without"],
    )
    bare, guarded = (statistics.median(seconds[name]) for name in ("without", "with"))
    table.add("without checks", f"{bare:.2f}", "1.000")
    table.add("with all checks", f"{guarded:.2f}", f"{statistics.median(ratios):.3f}")
    own = {name: spent.get(name, 0.0) / rounds for name in GUARDS}
    for name, mean in {"the checks themselves": sum(own.values()), **own}.items():
        table.add(name, f"{mean:.4f}", f"{mean / bare:.4f}")
    same = np.array_equal(kernels["with"], kernels["without"])
    table.note(f"Kernels are the same to the bit: {'yes' if same else 'no'}.")
    table.note(f"Ratios by round: {', '.join(f'{ratio:.3f}' for ratio in ratios)}.")
    return table


def main() -> int:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guards", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="calls of each that count")
    parser.add_argument("--memory-gb", type=float, default=4.0, help="of the worker")
    parser.add_argument("--write", action="store_true", help=f"write into {RESULTS.name}")
    options = parser.parse_args()
    settle()
    screen, aside = Console(width=120), Console(stderr=True, highlight=False)
    prepared = problem(options.memory_gb)
    table = guard_table(
        options.rounds, partial(aside.print, markup=False), partial(kernel, prepared)
    )
    table.show(screen)
    if options.write:
        command = " ".join(["python -m benchmarks.guards", *sys.argv[1:]])
        write_section("guards", [table], command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
