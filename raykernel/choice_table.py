"""A study's tables of layer choices: what the kernel foretold of them beside how they trained."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from raykernel.analysis.correlation import DRAWS, EXACT_SIZE, Expected
from raykernel.analysis.predictors import PREDICTORS
from raykernel.choices import CONTROLS, Setting, score
from raykernel.console import counted, short
from raykernel.convergence import LEVEL
from raykernel.study import UNKNOWN, Row, Sheet
from raykernel.terms import Criterion
from raykernel.tried import (
    TARGETS,
    Answer,
    Sample,
    Samples,
    Tried,
    answers,
    noise_ceiling,
    preference,
    regret,
    tells_apart,
    tried_choices,
)

_ARROWS = {Expected.positive: "↑", Expected.negative: "↓"}
_LABELS = {Criterion.regularised: "κ", Criterion.condition_number: "κ raw"}
_NOTE = (
    "ρ > 0: choices that the criterion prefers had a higher accuracy, a lower loss; criteria are "
    "of the kernel with one lora_alpha. p: share of all orders of the choices (of more than "
    f"{EXACT_SIZE}: of {DRAWS + 1:,}), the same in every sample. |trace: ρ with the trace held "
    "fixed. regret: accuracy of the best choice less that of the criterion's first. All choices "
    "have as many layers."
)
_NOTE_ON_SAMPLES = "another sample: ρ and regret of another sample's results, the noise ceiling."


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
        by_arm = tried_choices(rows, selection=self.selection, training=self.training)
        known = [arm for arm, samples in by_arm.items() if samples]
        sheets = [self._choices(by_arm)]
        for arm in known:
            repeated = _NOTE_ON_SAMPLES if len(by_arm[arm]) > 1 else ""
            notes = [_NOTE, repeated, self.next_step] if arm == known[-1] else []
            sheets.append(self._correlations(arm, by_arm[arm], notes))
        return sheets

    def _choices(self, by_arm: Mapping[str, Samples]) -> Sheet:
        """A line per choice: means over samples."""
        found: dict[tuple[str, Setting], dict[str, list[Tried]]] = {}
        for arm, samples in by_arm.items():
            for (task, _, _), own in samples.items():
                for tried in own:
                    of_arm = found.setdefault((task, tried.setting), {})
                    of_arm.setdefault(arm, []).append(tried)
        lines = [(task, arms, _foretold(arms)) for (task, _), arms in found.items()]
        lines.sort(
            key=lambda line: (line[0], -statistics.fmean(score(r, self.shown[0]) for r in line[2]))
        )
        several = len({task for task, _, _ in lines}) > 1
        texts = [
            [
                *[task] * several,
                " ".join(rows[0]["candidates"]),
                *(_mean(rows, criterion) for criterion in self.shown),
                *(text for arm in by_arm for text in _measured(arms.get(arm, []))),
            ]
            for task, arms, rows in lines
        ]
        measured = [
            name if len(by_arm) == 1 else f"{name}, {arm}"
            for arm in by_arm
            for name in ("accuracy (%)", "train loss")
        ]
        over = _over({sample for samples in by_arm.values() for sample in samples})
        return Sheet(
            f"Foretold and measured{over}",
            [*["task"] * several, "layers", *map(_label, self.shown), *measured],
            texts,
            "Foretold before training: κ with the ridge, effective rank and trace of the kernel; "
            "↑ larger is better in theory, ↓ smaller.",
        )

    def _correlations(self, arm: str, samples: Samples, notes: Sequence[str]) -> Sheet:
        """A line per criterion, then what they have to beat."""
        own = list(samples.values())
        known = [one for one in self.criteria if tells_apart(own, one)]
        found = {one: answers(own, one) for one in known}
        texts = [
            [
                _label(one),
                *(text for answer in of_one for text in _cells(answer)),
                _percent(regret(own, preference(one))),
            ]
            for one, of_one in found.items()
        ]
        if (ceiling := noise_ceiling(own)) is not None:
            rhos, lost = ceiling
            cells = [text for rho in rhos for text in (_signed(rho), UNKNOWN, UNKNOWN)]
            texts.append(["another sample", *cells, _percent(lost)])
        # That of a choice at random: all are equal.
        chance = _percent(regret(own, lambda tried: 0.0))
        texts.append(["chance", *[UNKNOWN] * 3 * len(TARGETS), chance])
        columns = [text for name in TARGETS for text in (f"{name} ρ", "p", "|trace")]
        size = max(map(len, own))
        return Sheet(
            f"{arm}: Spearman's ρ over {counted(size, 'choice')} of layers{_over(samples)}",
            ["criterion", *columns, "regret (%)"],
            texts,
            "\n".join(text for text in (_sentence(arm, found), *notes) if text),
        )


def _foretold(arms: Mapping[str, Sequence[Tried]]) -> list[Row]:
    """Rows of a choice in every sample, of the first arm that has tried it."""
    return [tried.foretold for tried in next(iter(arms.values()))]


def _over(samples: Collection[Sample]) -> str:
    return f", mean over {counted(len(samples), 'sample')}" if len(samples) > 1 else ""


def _label(criterion: Criterion) -> str:
    name = _LABELS.get(criterion, criterion.value.replace("_", " "))
    return name if criterion in CONTROLS else name + _ARROWS[PREDICTORS[criterion].expected]


def _mean(rows: Sequence[Row], criterion: Criterion) -> str:
    known = [row[criterion.value] for row in rows if row[criterion.value] is not None]
    return short(statistics.fmean(known)) if known else UNKNOWN


def _measured(tried: Sequence[Tried]) -> list[str]:
    if not tried:
        return [UNKNOWN, UNKNOWN]
    accuracy = statistics.fmean(one.accuracy for one in tried)
    return [f"{100 * accuracy:.1f}", f"{statistics.fmean(one.train_loss for one in tried):.3f}"]


def _cells(answer: Answer) -> list[str]:
    p_value = answer.plain.p_value
    p_text = UNKNOWN if math.isnan(p_value) else f"{p_value:.3f}"
    return [_signed(answer.plain.rho), p_text, _signed(answer.partial)]


def _signed(rho: float) -> str:
    return UNKNOWN if math.isnan(rho) else f"{rho:+.2f}"


def _percent(part: float) -> str:
    return f"{100 * part:.1f}"


def _sentence(arm: str, found: Mapping[Criterion, Sequence[Answer]]) -> str:
    """What was found, and how much of it so many questions give by chance."""
    every = [
        (f"{_label(criterion)} with {answer.target}", answer.plain)
        for criterion, of_one in found.items()
        if criterion is not Criterion.random
        for answer in of_one
        if not math.isnan(answer.plain.p_value)
    ]
    if not every:
        return ""
    sure = [plain for _, plain in every if plain.p_value <= LEVEL]
    agreeing = sum(plain.agrees is True for plain in sure)
    strict = LEVEL / len(every)
    named = [f"{name} ({plain.rho:+.2f})" for name, plain in every if plain.p_value <= strict]
    return (
        f"{arm}: p ≤ {LEVEL:g} in {len(sure)} of {counted(len(every), 'correlation')}, {agreeing} "
        f"of them as theory expects; chance alone gives {LEVEL * len(every):.1f}. p ≤ "
        f"{strict:.1g}, which allows for so many: {', '.join(named) or 'none'}."
    )
