"""The stages of `raykernel finetune training.twin=true`, one short function each.

    config → trial (trials.py) → worker trains its linear twin → both compared → rows → tables

The twin is the first-order expansion of the model at θ_0, trained with the same loss, order of
examples, steps, learning rates, clipping and pull. It changes nothing in the trial and so not its
name; its own files lie beside the trial's, and its row is the commit. Killed at any time, the
same command goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raykernel.compute.executor import Executor
from raykernel.config import RunConfig, canonical_json
from raykernel.console import Screen, duration
from raykernel.jobs import LateExecutor
from raykernel.prepared import prepare
from raykernel.store.blocks import Store
from raykernel.store.commit import discard
from raykernel.terms import Split
from raykernel.training.spec import Steepness, TwinResult, TwinSplit
from raykernel.trials import (
    TrialOutcome,
    check_pull,
    check_training,
    complete_trial,
    has_twin,
    run_steps,
    show_trial,
    trial_spec,
)


@dataclass(frozen=True, slots=True)
class TwinOutcome:
    """A trial and its linear twin that have ended, now or before."""

    trial: TrialOutcome
    rows: list[dict[str, Any]]
    """Of the table `twins`, by split: train, dev, test."""
    bounds: list[dict[str, Any]]
    """Of the table `bounds`."""
    was_stored: bool
    """The twin had ended before."""


def run_twin(config: RunConfig, overrides: tuple[str, ...], screen: Screen) -> TwinOutcome:
    """Fine-tune and train the linear twin, or read what both found that have ended before.

    Args:
        config: the run, with `training.twin`.
        overrides: the command line that made it, kept with the result.
        screen: where progress is shown.

    Returns:
        Rows of both.
    """
    check_training(config)
    prepared = prepare(config, screen)
    check_pull(prepared)
    store = Store(config.store.path)
    compute = dataclasses.replace(config.compute, workers=1)  # no more would have a job
    with contextlib.closing(LateExecutor(compute, screen)) as executor:
        outcome = complete_trial(prepared, overrides, executor, screen)
        was_stored = has_twin(store, outcome.trial)
        if not was_stored:
            complete_twin(outcome, overrides, executor, screen)
    files = outcome.files
    # Also those of a run that was killed after its result was written.
    discard(files.twin_checkpoint)
    if not config.training.keep_weights:
        discard(files.last)
        discard(files.twin)
    by_split = {row["split"]: row for row in store.rows("twins", trial=outcome.trial)}
    rows = [by_split[split.value] for split in Split]
    return TwinOutcome(outcome, rows, store.rows("bounds", trial=outcome.trial), was_stored)


def complete_twin(
    outcome: TrialOutcome, overrides: tuple[str, ...], executor: Executor, screen: Screen
) -> None:
    """Train the twin of a trial that has ended, compare, and keep what was found.

    Args:
        outcome: the trial.
        overrides: the command line that made it.
        executor: where to train.
        screen: where progress is shown.
    """
    # Takes seconds, and a stored twin needs none.
    from raykernel.training.bounds import run_bounds, steepest_change

    prepared = outcome.prepared
    config, store = prepared.config, Store(prepared.config.store.path)
    training = config.training.resolved(k=config.task.k, num_labels=len(prepared.data.labels))
    spec = trial_spec(prepared, training, outcome.files)
    screen.say("Linear twin")
    checkpoint = outcome.files.twin_checkpoint
    found = run_steps(spec.twin_steps, checkpoint, spec=spec, executor=executor, screen=screen)
    num_train = len(prepared.data.splits[Split.train])
    known = found.steepness is not None and found.deviation > 0
    steepness = _steepness_columns(found.steepness) | {
        "curvature": steepest_change(found) if known else None
    }
    bounds: list[dict[str, Any]] = [
        {
            "trial": outcome.trial,
            "quantity": bound.quantity,
            "name": bound.name,
            "bound": bound.value,
            "measured": bound.measured,
            "holds": bound.holds,
            "slack": bound.slack,
            "assumes": bound.assumes,
            **steepness,
        }
        for bound in run_bounds(training, config.regularization, found, num_train=num_train)
    ]
    store.write_results("bounds", bounds)
    shared = _shared_columns(outcome.row, found, overrides)
    rows = [
        shared | {"split": split.value} | _split_columns(own) for split, own in found.splits.items()
    ]
    store.write_results("twins", rows)


def _steepness_columns(seen: Steepness | None) -> dict[str, Any]:
    """What a row of the table `bounds` says of the constants in them; nulls where none ask."""
    if seen is None:
        return {}
    return {
        "lipschitz": seen.largest,
        "lipschitz_start": seen.start,
        "lipschitz_end": seen.end,
        "lipschitz_mean": _mean(list(seen.sampled)),
        "lipschitz_samples": len(seen.sampled),
    }


_OF_TRIAL = (
    "trial", "task", "model", "prompt", "k", "seed", "method", "optimizer", "loss",
    "regularization", "lam", "convention", "learning_rate", "batch_size", "steps", "metric",
)  # fmt: skip
"""Columns that `twins` has from `trials`."""


def _shared_columns(
    trial: Mapping[str, Any], found: TwinResult, overrides: tuple[str, ...]
) -> dict[str, Any]:
    """What a row of the table `twins` says of every split alike."""
    modules = found.modules
    return {name: trial[name] for name in _OF_TRIAL} | {
        "deviation": found.deviation,
        "deviation_relative": found.deviation / found.start if found.start else None,
        "twin_deviation": found.twin_deviation,
        "apart": found.apart,
        "adapter_change": _mean([own.change for own in modules]),
        "adapter_relative": _mean([own.relative for own in modules]),
        "modules": canonical_json({own.module: [own.change, own.relative] for own in modules}),
        "seconds": found.seconds,
        "peak_memory_bytes": found.peak_memory_bytes,
        "last_checksum": found.last_checksum,
        "weights_checksum": found.weights_checksum,
        "overrides": list(overrides),
    }


def _split_columns(own: TwinSplit) -> dict[str, Any]:
    """What it says of one split."""
    columns: dict[str, Any] = {
        "num_examples": own.num_examples,
        "change": own.change,
        "start_score": own.start_score,
        "score": own.score,
        "score_a": own.score_a,
        "score_b": own.score_b,
    }
    for name, near in (("a", own.a), ("b", own.b)):
        columns |= {
            f"distance_{name}": near.distance,
            f"relative_{name}": near.distance / own.change if own.change else None,
            f"kl_{name}": near.kl,
            f"kl_reverse_{name}": near.kl_reverse,
            f"agreement_{name}": near.agreement,
        }
    return columns


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def show_twin(outcome: TwinOutcome, screen: Screen) -> None:
    """Print the trial, then how far it is from its linear models, and the bounds.

    Args:
        outcome: of `run_twin`.
        screen: where to print.
    """
    show_trial(outcome.trial, screen)
    first = outcome.rows[0]
    metric = first["metric"]
    screen.table(
        [
            *("split", "linear model", "‖f - f̄‖", "of ‖f - f_0‖", "KL(f, f̄)", "KL(f̄, f)"),
            *("agree", f"{metric} of f̄", "of f"),
        ],
        [
            [
                row["split"],
                label,
                f"{row[f'distance_{name}']:.3g}",
                _shown(row[f"relative_{name}"]),
                f"{row[f'kl_{name}']:.3g}",
                f"{row[f'kl_reverse_{name}']:.3g}",
                f"{row[f'agreement_{name}']:.3f}",
                f"{row[f'score_{name}']:.3f}",
                f"{row['score']:.3f}",
            ]
            for row in outcome.rows
            for name, label in (("a", "A: trained itself"), ("b", "B: at θ_T"))
        ],
        title=f"Fine-tuning f beside its linear model f̄ at θ_0, both after {first['steps']} steps",
    )
    moved = [
        f"‖θ_T - θ_0‖ = {first['deviation']:.3g} ({_shown(first['deviation_relative'])} of ‖θ_0‖)",
        f"of the twin {first['twin_deviation']:.3g}",
        f"apart {first['apart']:.3g}",
    ]
    if first["adapter_change"] is not None:
        moved.append(
            f"‖s B A‖ {first['adapter_change']:.3g} ({first['adapter_relative']:.3g} of ‖W_0‖) in "
            "the mean of the adapted matrices"
        )
    screen.out.print(", ".join(moved) + ".", markup=False)
    known = [row for row in outcome.bounds if row["bound"] is not None]
    if known:
        screen.table(
            ["bound on", "name", "bound", "measured", "holds", "slack"],
            [
                [
                    row["quantity"],
                    row["name"],
                    f"{row['bound']:.3g}",
                    f"{row['measured']:.3g}",
                    "yes" if row["holds"] else "no",
                    _shown(row["slack"]),
                ]
                for row in known
            ],
            title="Bounds (Rahimi Afzal et al. 2025, and companions)",
        )
    if without := [row for row in outcome.bounds if row["bound"] is None]:
        names = ", ".join(f"{row['quantity']} {row['name']}" for row in without)
        screen.out.print(f"No bound ({names}): {without[0]['assumes']}", markup=False)
    when = "stored before (0 steps done now)" if outcome.was_stored else duration(first["seconds"])
    screen.out.print(
        f"Twin: {when}. Next: raykernel query "
        '"select split, distance_a, distance_b, kl_a, kl_b, deviation from twins" '
        f"--store {outcome.trial.prepared.config.store.path}",
        markup=False,
    )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
