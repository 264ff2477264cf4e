"""How long a search for layers takes once their kernels are stored."""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.tables import Table
from benchmarks.timing import Say, measure
from raykernel.analysis.predictors import PREDICTORS
from raykernel.analysis.selection import Ranking, search
from raykernel.analysis.sets import Budget, Candidates, num_threads
from raykernel.analysis.targets import one_hot
from raykernel.terms import Criterion

ROWS = 64
"""Of the kernel that softmax sees, of examples with two outputs."""
FEATURES = 160
"""Of a group, so that its kernel has full rank."""

CASES = {
    "16 groups, all 65,535 sets, κ": (16, Criterion.regularised, Budget()),
    "16 groups, all 65,535 sets, leave-one-out": (16, Criterion.loo_error, Budget()),
    "200 groups, at most 10, κ": (200, Criterion.regularised, Budget(max_size=10)),
    "200 groups, at most 10, log det": (200, Criterion.log_det, Budget(max_size=10)),
    "200 groups, any number, κ": (200, Criterion.regularised, Budget()),
}
"""Groups, criterion and budget by name."""


def selection_table(rounds: int, say: Say) -> Table:
    """Seconds of exhaustive and greedy searches over kernels of 64 rows."""
    drawn = {count: groups(count) for count in {case[0] for case in CASES.values()}}

    def run(name: str) -> Ranking:
        count, criterion, budget = CASES[name]
        return search(drawn[count], PREDICTORS[criterion], budget)

    prepare = {name: partial(partial, run, name) for name in CASES}
    timings = measure(prepare, rounds, say=say)
    table = Table(f"Search over kernels of {ROWS} rows", ["", "seconds", "sets scored", "ms a set"])
    for name, timing in timings.items():
        scored = timing.result.num_scored
        each = 1000 * timing.seconds / scored
        table.add(name, f"{timing.seconds:.2f}", f"{scored:,}", f"{each:.2f}")
    table.note(f"On {num_threads()} threads; without the time of the blocks, which are stored.")
    return table


def groups(count: int, rows: int = ROWS) -> Candidates:
    """Random kernels of full rank and of scales of their own."""
    rng = np.random.default_rng(0)
    kernels = np.empty((count, rows, 2, rows, 2))
    for kernel in kernels:
        j = rng.normal(size=(rows, 2, FEATURES)) * rng.uniform(0.3, 3)
        kernel[:] = np.tensordot(j, j, axes=(2, 2))
    return Candidates(
        names=tuple(map(str, range(count))),
        kernels=kernels,
        num_parameters=(1,) * count,
        targets=one_hot(np.arange(rows) % 2, 2),
        f0=np.zeros((rows, 2)),
    )
