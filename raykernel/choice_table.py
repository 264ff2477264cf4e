"""A study's tables of layer choices: what the kernel foretold of them beside how they trained.

    rows of `selections` + rows of `trials` → choices by sample → ρ of every criterion, its regret

Every number is turned so that more agrees with theory: ρ > 0 says that choices which a criterion
prefers had a higher accuracy or a lower loss. Choices are compared within a sample of one task;
correlations are averaged over samples and tested together, with one order of the choices in all.
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
from raykernel.analysis.predictors import PREDICTORS
from raykernel.choices import CONTROLS, Setting, ranked, score, setting_of
from raykernel.console import counted, short
from raykernel.convergence import LEVEL
from raykernel.study import UNKNOWN, Row, Sheet
from raykernel.terms import Criterion

_ARROWS = {Expected.positive: "↑", Expected.negative: "↓"}
_LABELS = {Criterion.regularised: "κ", Criterion.condition_number: "κ raw"}

Sample = tuple[str, int, int]
"""Task, k and seed: what choices are compared within."""


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


TARGETS: Mapping[str, Callable[[Tried], float]] = {
    "accuracy": lambda tried: tried.accuracy,
    "dev loss": lambda tried: -tried.dev_loss,
    "train loss": lambda tried: -tried.train_loss,
}
"""How well a choice has trained: more is better."""

Samples = Mapping[Sample, Sequence[Tried]]
"""Of one arm."""


@dataclass(frozen=True, slots=True)
class ChoiceTable:
    """Predicted against measured; see `raykernel.study.Table`."""

    selection: str
    """Arm whose rows are selections."""
    training: Sequence[str]
    """Arms whose rows are trials of its choices."""
    shown: Sequence[Criterion] = (
        Criterion.regularised,
        Criterion.effective_rank,
        Criterion.trace,
    )
    """Beside every choice; choices are in the order of the first."""
    criteria: Sequence[Criterion] = tuple(PREDICTORS)
    """That are correlated."""
    next_step: str = ""
    """Said at the end."""

    def __call__(self, rows: Sequence[Row], *, compare: bool) -> list[Sheet]:
        """Make the sheets."""
        del compare  # nothing is printed of which this could be a repetition
        foretold = {
            (_sample(row), setting_of(row)): row
            for row in ranked([row for row in rows if row["arm"] == self.selection])
        }
        by_arm = {
            arm: _samples([row for row in rows if row["arm"] == arm], foretold)
            for arm in self.training
        }
        sheets = [self._choices(by_arm)]
        sheets += [self._correlations(arm, found) for arm, found in by_arm.items() if found]
        return sheets

    # ------------------------------------------------------------ the choices

    def _choices(self, by_arm: Mapping[str, Samples]) -> Sheet:
        """A line per choice: means over samples."""
        found: dict[tuple[str, Setting], dict[str, list[Tried]]] = {}
        for arm, samples in by_arm.items():
            for (task, _, _), own in samples.items():
                for tried in own:
                    of_arm = found.setdefault((task, tried.setting), {})
                    of_arm.setdefault(arm, []).append(tried)
        lines = [(task, arms) for (task, _), arms in found.items()]

        def goodness(line: tuple[str, Mapping[str, Sequence[Tried]]]) -> tuple[str, float]:
            rows = [tried.foretold for tried in _first(line[1])]
            return line[0], -statistics.fmean(score(row, self.shown[0]) for row in rows)

        lines.sort(key=goodness)
        several = len({task for task, _ in lines}) > 1
        texts = [
            [
                *([task] if several else []),
                _first(arms)[0].name,
                *(_mean_of(_first(arms), criterion) for criterion in self.shown),
                *(text for arm in by_arm for text in _measured(arms.get(arm, []))),
            ]
            for task, arms in lines
        ]
        num = len({sample for samples in by_arm.values() for sample in samples})
        measured = [
            f"{name}{'' if len(by_arm) == 1 else f', {arm}'}"
            for arm in by_arm
            for name in ("accuracy (%)", "train loss")
        ]
        labels = [f"{_label(one)}{_arrow(one)}" for one in self.shown]
        return Sheet(
            f"Foretold and measured, mean over {counted(num, 'sample')}",
            [*(["task"] if several else []), "layers", *labels, *measured],
            texts,
            "Foretold before training: κ with the ridge, effective rank and trace of the kernel; "
            "↑ larger is better in theory, ↓ smaller.",
        )

    # ------------------------------------------------------------ the correlations

    def _correlations(self, arm: str, samples: Samples) -> Sheet:
        """A line per criterion."""
        own = list(samples.values())
        known = [one for one in self.criteria if _varies(own, one)]
        answers = [(one, _answer(own, one)) for one in known]
        texts = [
            [_label(one) + _arrow(one), *(text for cell in cells for text in cell), regret]
            for one, (cells, regret, _) in answers
        ]
        texts.append(["another sample", *_ceiling(own), _transferred(own)])
        texts.append(["chance", *[UNKNOWN] * 3 * len(TARGETS), _points(own, _of_chance)])
        columns = [f"{name}{part}" for name in TARGETS for part in (" ρ", " p", " | trace")]
        size = max(map(len, own))
        return Sheet(
            f"{arm}: Spearman's ρ over {counted(size, 'choice')} of layers, mean over "
            f"{counted(len(own), 'sample')}",
            ["criterion", *columns, "regret (%)"],
            texts,
            _sentence(arm, answers, self._note() if arm == list(self.training)[-1] else ""),
        )

    def _note(self) -> str:
        return (
            "ρ > 0: choices that the criterion prefers had a higher accuracy, a lower loss. p: of "
            "all orders of the choices, or of 100,000, the same in every sample. | trace: ρ with "
            "the trace held fixed.\nregret: accuracy of the best choice less that of the "
            "criterion's; another sample: ρ of two samples' results, which no criterion can be "
            "expected to exceed,\nand the regret of another sample's best choice. Number of layers "
            "and of parameters are the same for all choices."
            + (f"\n{self.next_step}" if self.next_step else "")
        )


def _sample(row: Row) -> Sample:
    return row["task"], int(row["k"]), int(row["seed"])


def _samples(trials: Sequence[Row], foretold: Mapping[tuple[Sample, Setting], Row]) -> Samples:
    """Trials with their selection, those of a sample in one order."""
    found: dict[Sample, list[Tried]] = {}
    for trial in trials:
        chosen, sample = json.loads(trial["parameters"]), _sample(trial)
        for key in ("layers_to_transform", "target_modules"):
            setting = key, tuple(chosen[key] or ())
            if (sample, setting) in foretold:
                last = trial["curve"][-1]
                tried = Tried(
                    setting,
                    foretold[sample, setting],
                    trial["finetuned"],
                    last["dev_loss"],
                    last["train_loss"],
                )
                found.setdefault(sample, []).append(tried)
                break
    return {sample: sorted(own, key=lambda t: str(t.setting)) for sample, own in found.items()}


def _first(arms: Mapping[str, Sequence[Tried]]) -> Sequence[Tried]:
    return next(iter(arms.values()))


def _label(criterion: Criterion) -> str:
    return _LABELS.get(criterion, criterion.value.replace("_", " "))


def _arrow(criterion: Criterion) -> str:
    return "" if criterion in CONTROLS else _ARROWS[PREDICTORS[criterion].expected]


def _mean_of(tried: Sequence[Tried], criterion: Criterion) -> str:
    values = [one.foretold[criterion.value] for one in tried]
    known = [value for value in values if value is not None]
    return short(statistics.fmean(known)) if known else UNKNOWN


def _measured(tried: Sequence[Tried]) -> list[str]:
    if not tried:
        return [UNKNOWN, UNKNOWN]
    accuracy = statistics.fmean(one.accuracy for one in tried)
    return [f"{100 * accuracy:.1f}", f"{statistics.fmean(one.train_loss for one in tried):.3f}"]


# ---------------------------------------------------------------- one criterion


_Cells = list[list[str]]
_Answer = tuple[_Cells, str, list[RankCorrelation]]
"""Texts by target, the regret, and the correlations."""


def _varies(samples: Sequence[Sequence[Tried]], criterion: Criterion) -> bool:
    """Whether a criterion tells choices apart, and every choice has it."""
    values = [[tried.foretold.get(criterion.value) for tried in own] for own in samples]
    return all(None not in own for own in values) and any(len(set(own)) > 1 for own in values)


def _answer(samples: Sequence[Sequence[Tried]], criterion: Criterion) -> _Answer:
    x = [[score(tried.foretold, criterion) for tried in own] for own in samples]
    traces = [[tried.foretold["trace"] for tried in own] for own in samples]
    alike = len({tuple(tried.setting for tried in own) for own in samples}) == 1
    cells, found = [], []
    for value in TARGETS.values():
        y = [[value(tried) for tried in own] for own in samples]
        one = mean_rank_correlation(x, y, expected=Expected.positive, shares_points=alike)
        partial = [
            partial_rank_correlation(*own, expected=Expected.positive).rho
            for own in zip(x, y, [[trace] for trace in traces], strict=True)
        ]
        cells.append([_signed(one.rho), _p_value(one.p_value), _signed(_mean(partial))])
        found.append(one)
    regret = _points(samples, lambda own: _accuracy_of(own, lambda t: score(t.foretold, criterion)))
    return cells, regret, found


def _accuracy_of(own: Sequence[Tried], value: Callable[[Tried], float]) -> float:
    """Accuracy of the best choice by a value; of equals the mean."""
    best = max(value(tried) for tried in own)
    return statistics.fmean(tried.accuracy for tried in own if value(tried) == best)


def _of_chance(own: Sequence[Tried]) -> float:
    return statistics.fmean(tried.accuracy for tried in own)


def _points(
    samples: Sequence[Sequence[Tried]], accuracy: Callable[[Sequence[Tried]], float]
) -> str:
    """Regret in percentage points: the best accuracy less that of a pick, mean over samples."""
    regrets = [max(tried.accuracy for tried in own) - accuracy(own) for own in samples]
    return f"{100 * statistics.fmean(regrets):.1f}"


# ---------------------------------------------------------------- what repetitions say


def _pairs(
    samples: Sequence[Sequence[Tried]],
) -> list[tuple[list[Tried], list[Tried]]]:
    """The choices that two samples share, for every two samples of one task."""
    found = []
    for one, other in itertools.permutations(samples, 2):
        of_other = {tried.setting: tried for tried in other}
        both = [(tried, of_other[tried.setting]) for tried in one if tried.setting in of_other]
        if both and both[0][0].foretold["task"] == both[0][1].foretold["task"]:
            found.append(([a for a, _ in both], [b for _, b in both]))
    return found


def _ceiling(samples: Sequence[Sequence[Tried]]) -> list[str]:
    """The noise ceiling: mean ρ of the same choices' results in two samples."""
    cells = []
    for value in TARGETS.values():
        rhos = [
            rank_correlation(
                [value(tried) for tried in one],
                [value(tried) for tried in other],
                expected=Expected.positive,
            ).rho
            for one, other in _pairs(samples)
        ]
        cells += [_signed(_mean(rhos)), UNKNOWN, UNKNOWN]
    return cells


def _transferred(samples: Sequence[Sequence[Tried]]) -> str:
    """Regret of the choice that was best in another sample."""
    regrets = []
    for one, other in _pairs(samples):
        best = max(tried.accuracy for tried in other)
        same = [a.accuracy for a, b in zip(one, other, strict=True) if b.accuracy == best]
        regrets.append(max(tried.accuracy for tried in one) - statistics.fmean(same))
    return f"{100 * statistics.fmean(regrets):.1f}" if regrets else UNKNOWN


def _mean(rhos: Sequence[float]) -> float:
    known = [rho for rho in rhos if not math.isnan(rho)]
    return statistics.fmean(known) if known else math.nan


def _signed(rho: float) -> str:
    return UNKNOWN if math.isnan(rho) else f"{rho:+.2f}"


def _p_value(value: float) -> str:
    return UNKNOWN if math.isnan(value) else f"{value:.3f}"


def _sentence(arm: str, answers: Sequence[tuple[Criterion, _Answer]], note: str) -> str:
    """What was found, and how much of it so many questions give by chance."""
    every = [
        (_label(one), target, found)
        for one, (_, _, correlations) in answers
        if one is not Criterion.random
        for target, found in zip(TARGETS, correlations, strict=True)
        if not math.isnan(found.p_value)
    ]
    if not every:
        return note
    sure = [found for _, _, found in every if found.p_value <= LEVEL]
    agreeing = sum(found.agrees is True for found in sure)
    strict = [
        f"{label} with {target} ({found.rho:+.2f})"
        for label, target, found in every
        if found.p_value <= LEVEL / len(every)
    ]
    text = (
        f"{arm}: p ≤ {LEVEL:g} in {len(sure)} of {counted(len(every), 'correlation')}, {agreeing} "
        f"of them as theory expects; chance alone gives {LEVEL * len(every):.1f}. With all of them "
        f"counted (p ≤ {LEVEL / len(every):.1g}): {', '.join(strict) or 'none'}."
    )
    return f"{text}\n{note}" if note else text
