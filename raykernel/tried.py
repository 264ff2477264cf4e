"""Choices of layers that were fine-tuned: what was foretold of each, and how well that was right.

    rows of `selections` + rows of `trials` → choices by sample → ρ of a criterion, its regret

Choices are compared within a sample of one task. Every number is turned so that more agrees with
theory: ρ > 0 says that choices which a criterion prefers had a higher accuracy or a lower loss.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from raykernel.analysis.correlation import (
    Expected,
    RankCorrelation,
    mean_rank_correlation,
    partial_rank_correlation,
    rank_correlation,
)
from raykernel.choices import Setting, ranked, score, setting_of
from raykernel.study import Row
from raykernel.terms import Criterion

Sample = tuple[str, int, int]
"""Task, k and seed."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One choice of layers: what was foretold, and how it was trained."""

    setting: Setting
    foretold: Row
    """Of the table `selections`."""
    accuracy: float
    """On test, of the parameters that are best on dev."""
    dev_loss: float
    """At the last step."""
    train_loss: float
    """Mean since the evaluation before the last one."""

    @property
    def name(self) -> str:
        """As `raykernel select` prints it."""
        return " ".join(self.foretold["candidates"])


Value = Callable[[Tried], float]

TARGETS: Mapping[str, Value] = {
    "accuracy": lambda tried: tried.accuracy,
    "dev loss": lambda tried: -tried.dev_loss,
    "train loss": lambda tried: -tried.train_loss,
}
"""How well a choice has trained: more is better."""

Samples = Mapping[Sample, Sequence[Tried]]


def tried_choices(
    rows: Sequence[Row], *, selection: str, training: Sequence[str]
) -> dict[str, Samples]:
    """What an arm has tried of the choices of another.

    Args:
        rows: of all arms.
        selection: arm whose rows are of the table `selections`.
        training: arms whose rows are trials.

    Returns:
        By arm and sample, choices in one order; nothing of trials that were not foretold.
    """
    foretold = {
        (_sample(row), setting_of(row)): row
        for row in ranked([row for row in rows if row["arm"] == selection])
    }
    found: dict[str, Samples] = {}
    for arm in training:
        of_arm: dict[Sample, list[Tried]] = {}
        for trial in (row for row in rows if row["arm"] == arm):
            chosen, sample = json.loads(trial["parameters"]), _sample(trial)
            for key in ("layers_to_transform", "target_modules"):
                setting = key, tuple(chosen[key] or ())
                if (sample, setting) in foretold:
                    tried = _tried(trial, setting, foretold[sample, setting])
                    of_arm.setdefault(sample, []).append(tried)
                    break
        found[arm] = {
            sample: sorted(own, key=lambda tried: str(tried.setting))
            for sample, own in of_arm.items()
        }
    return found


def _sample(row: Row) -> Sample:
    return row["task"], int(row["k"]), int(row["seed"])


def _tried(trial: Row, setting: Setting, foretold: Row) -> Tried:
    last = trial["curve"][-1]
    return Tried(setting, foretold, trial["finetuned"], last["dev_loss"], last["train_loss"])


# ---------------------------------------------------------------- one criterion


@dataclass(frozen=True, slots=True)
class Answer:
    """How well a criterion foretold a target."""

    target: str
    plain: RankCorrelation
    """Mean over samples, tested with one order of the choices in all of them."""
    partial: float
    """Mean over samples with the kernel's trace held fixed; NaN where that explains one."""


def tells_apart(samples: Sequence[Sequence[Tried]], criterion: Criterion) -> bool:
    """Whether all choices have a criterion, and not the same of it."""
    values = [[tried.foretold.get(criterion.value) for tried in own] for own in samples]
    return all(None not in own for own in values) and any(len(set(own)) > 1 for own in values)


def answers(samples: Sequence[Sequence[Tried]], criterion: Criterion) -> list[Answer]:
    """How well a criterion foretold every target.

    Args:
        samples: choices of each.
        criterion: that tells them apart.

    Returns:
        In the order of `TARGETS`.
    """
    x = [[score(tried.foretold, criterion) for tried in own] for own in samples]
    traces = [[[float(tried.foretold["trace"]) for tried in own]] for own in samples]
    alike = len({tuple(tried.setting for tried in own) for own in samples}) == 1
    found = []
    for target, value in TARGETS.items():
        y = [[value(tried) for tried in own] for own in samples]
        partial = [
            partial_rank_correlation(*own, expected=Expected.positive).rho
            for own in zip(x, y, traces, strict=True)
        ]
        plain = mean_rank_correlation(x, y, expected=Expected.positive, shares_points=alike)
        found.append(Answer(target, plain, mean_of(partial)))
    return found


def regret(samples: Sequence[Sequence[Tried]], value: Value) -> float:
    """Accuracy of the best choice less that of the one that a value prefers, mean over samples.

    Args:
        samples: choices of each.
        value: larger is preferred; of equals the mean.

    Returns:
        A part of 1.
    """
    lost = []
    for own in samples:
        best = max(value(tried) for tried in own)
        picked = [tried.accuracy for tried in own if value(tried) == best]
        lost.append(max(tried.accuracy for tried in own) - statistics.fmean(picked))
    return statistics.fmean(lost)


def preference(criterion: Criterion) -> Value:
    """How much a criterion likes a choice: larger is more."""
    return lambda tried: score(tried.foretold, criterion)


# ---------------------------------------------------------------- what repetitions say


def noise_ceiling(samples: Sequence[Sequence[Tried]]) -> tuple[list[float], float] | None:
    """How well one sample's results foretell another's, whose choices are the same.

    Args:
        samples: choices of each.

    Returns:
        Mean ρ of each target over every two samples of a task, and the mean regret of what is best
        in the other one; None of a single sample.
    """
    rhos: dict[str, list[float]] = {target: [] for target in TARGETS}
    lost = []
    for one, other in itertools.permutations(samples, 2):
        of_other = {tried.setting: tried for tried in other}
        both = [(tried, of_other[tried.setting]) for tried in one if tried.setting in of_other]
        if not both or one[0].foretold["task"] != other[0].foretold["task"]:
            continue
        for target, value in TARGETS.items():
            x, y = ([value(tried) for tried in side] for side in zip(*both, strict=True))
            rhos[target].append(rank_correlation(x, y, expected=Expected.positive).rho)
        accuracy_of = {mine.setting: theirs.accuracy for mine, theirs in both}
        lost.append(regret([[mine for mine, _ in both]], _looked_up(accuracy_of)))
    return ([mean_of(own) for own in rhos.values()], statistics.fmean(lost)) if lost else None


def _looked_up(value_of: Mapping[Setting, float]) -> Value:
    return lambda tried: value_of[tried.setting]


def mean_of(rhos: Sequence[float]) -> float:
    """Their plain mean; NaN is left out."""
    known = [rho for rho in rhos if not math.isnan(rho)]
    return statistics.fmean(known) if known else math.nan
