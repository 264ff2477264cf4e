"""Does fine-tuning behave like its kernel here? The stage of `raykernel behavior`.

    K at θ_PT, regression → fine-tuning → J(test) (θ_FT − θ_PT) → K at θ_FT → criteria → verdict

Every step keeps what it finds in the store and computes only what is missing there. The kernel at
θ_FT is a kernel of its own: its identity is that of the problem, and the trial whose weights it
has. Only its block of test with train is computed, the one that the paper compares.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from raykernel.analysis.behavior import (
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
from raykernel.compute.linearized import LinearizedSpec
from raykernel.config import BehaviorConfig, RunConfig, canonical_json, require
from raykernel.console import Screen
from raykernel.errors import InputError
from raykernel.jobs import LateExecutor, run_jobs
from raykernel.pipeline import Completion, begin_kernel, complete, complete_cells, open_kernel
from raykernel.prepared import Prepared, example_labels, prepare, worker_spec
from raykernel.regress import solve
from raykernel.store.blocks import Store
from raykernel.store.grid import Grid
from raykernel.store.kernels import KernelHandle
from raykernel.store.linearized import linearized_changes, missing_linearized
from raykernel.terms import Kind, Metric, Optimizer, PromptStyle, Split

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
    """Kernel regression by kind, of which the better one counts."""
    outputs: Outputs
    distances: KernelDistance
    compared: Kind
    """Kind whose kernels at θ_PT and θ_FT are compared."""
    num_compared: int
    """Test examples that they are compared on."""
    verdict: Verdict
    tuned_fingerprint: str
    """Name of the kernel at θ_FT."""

    @property
    def best(self) -> Kind:
        """Kind with the best test score; the first of equal ones."""
        return max(self.kernels, key=lambda kind: self.kernels[kind].test_score)

    @property
    def chi(self) -> tuple[float, float]:
        """Mean absolute output derivative on test, before and after fine-tuning."""
        labels = self.outputs.labels
        before, after = (
            float(np.abs(output_derivatives(logits, labels)).mean())
            for logits in (self.outputs.pretrained, self.outputs.finetuned)
        )
        return before, after


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
    analogs = ANALOGS[config.training.optimizer]
    kernel = config.kernel
    if not any(kind in analogs for kind in kernel.solved_kinds):
        both = replace(kernel, kinds=analogs)
        kernel = replace(kernel, kinds=both.solved_kinds)
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
    prepared = prepare(settled(config), screen)
    config = prepared.config
    handle = open_kernel(prepared)
    with contextlib.closing(LateExecutor(config.compute, screen)) as executor:
        done = complete(prepared, handle, executor, screen)
        rows = compared_rows(handle.grid, config.behavior.test_limit)
        done = done.then(_complete_rows(prepared, handle, rows, executor, screen))
        kernels = solve(prepared, handle, executor, screen).results
        trial = fine_tune(prepared, handle, executor, screen)
        tuned = at_trial(prepared, trial, _compared(config))
        tuned_handle = begin_tuned(tuned, handle)
        follow(tuned, tuned_handle, executor, screen)
        done = done.then(_complete_rows(tuned, tuned_handle, rows, executor, screen))
