"""A study's table: does the condition number of chosen layers foretell how they train?

    rows of `spectra` + rows of `trials` with their curves → points (layers) → ρ by data set

Rahimi Afzal et al. 2025 show that train loss and condition number rise together, and accuracy
falls, over choices of LoRA's layers. A larger condition number means slower training, which has to
be read off a quantity with a direction (`TARGETS`). Points are compared within a data set, that is
one task, sample and choice of modules; correlations are averaged over data sets (Fisher z).
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from raykernel.analysis.correlation import (
    EXACT_SIZE,
    Expected,
    RankCorrelation,
    critical_rho,
    mean_correlation,
    partial_rank_correlation,
    rank_correlation,
)
from raykernel.console import counted, short
from raykernel.study import UNKNOWN, Row, Sheet

LEVEL = 0.05
"""Of significance."""
READINGS = {"centred": "centred_regularised", "median": "top_over_median"}
"""Other readings of the condition number that are correlated beside the regularised one."""

DataSet = tuple[str, int, int, str]
"""Task, k, seed, modules: what one correlation is of."""


@dataclass(frozen=True, slots=True)
class Trained:
    """One choice of layers: its kernel at the start, and how it trained."""

    layers: tuple[int, ...]
    spectrum: Row
    """Of the table `spectra`."""
    losses: tuple[float, ...]
    """Mean train loss of every epoch."""
    dev: float
    """Dev score after the last epoch."""
    test: float
    """Test score of the parameters that are best on dev."""

    @property
    def kappa(self) -> float:
        """The regularised condition number."""
        return float(self.spectrum["regularised"])

    @property
    def trace(self) -> float:
        """Scale of the kernel."""
        return float(self.spectrum["mean"] * self.spectrum["num_rows"])


def epochs_to(losses: Sequence[float], threshold: float) -> float:
    """Epochs until the train loss falls to a threshold, between two epochs by a straight line.

    Args:
        losses: after epoch 1, 2, …
        threshold: to reach.

    Returns:
        Epochs, 1 at least; inf if it is never reached.
    """
    for number, (before, after) in enumerate(itertools.pairwise([losses[0], *losses]), start=1):
        if after <= threshold:
            part = (before - threshold) / (before - after) if before > after else 1.0
            return number - 1 + part if number > 1 else 1.0
    return math.inf


def _threshold(points: Sequence[Trained]) -> float:
    """The loss that all choices reach: the largest of their smallest ones."""
    return max(min(point.losses) for point in points)


Values = Callable[[Sequence[Trained]], list[float]]
"""Of the points of a data set."""
TARGETS: Mapping[str, tuple[Expected, Values]] = {
    "final train loss": (Expected.positive, lambda ps: [p.losses[-1] for p in ps]),
    "mean train loss": (Expected.positive, lambda ps: [statistics.fmean(p.losses) for p in ps]),
    "epochs to a loss": (
        Expected.positive,
        lambda ps: [epochs_to(p.losses, _threshold(ps)) for p in ps],
    ),
    "dev, last epoch": (Expected.negative, lambda ps: [p.dev for p in ps]),
    "test, best on dev": (Expected.negative, lambda ps: [p.test for p in ps]),
}
"""What the condition number is to foretell, with the sign that is expected."""


def layer_choices(layers: Sequence[int]) -> list[tuple[int, ...]]:
    """Every non-empty subset of some layers, small ones first: seven of three."""
    sizes = range(1, len(layers) + 1)
    return [chosen for size in sizes for chosen in itertools.combinations(layers, size)]


def trained_layers(layers: Sequence[int]) -> str:
    """Values of `parameters.layers_to_transform`, one for each subset of some layers."""
    return ",".join(f"[{','.join(map(str, chosen))}]" for chosen in layer_choices(layers))


def summed_layers(layers: Sequence[int], modules: Sequence[Sequence[str]]) -> str:
    """The value of `spectrum.sets` with the same subsets, for each choice of modules.

    Args:
        layers: transformer layers.
        modules: choices of names of modules, such as [[query, value], [key]].

    Returns:
        A list of lists of regular expressions, as on the command line.
    """
    sets = [
        ",".join(rf"'\.{layer}\.(.*\.)?{name}\b'" for layer in chosen for name in names)
        for names in modules
        for chosen in layer_choices(layers)
    ]
    return f"[{','.join(f'[{one}]' for one in sets)}]"


@dataclass(frozen=True, slots=True)
class ConvergenceTable:
    """Condition numbers beside training, then their correlations."""

    kernel: str
    """Arm whose rows are spectra."""
    training: str
    """Arm whose rows are trials."""

    def __call__(self, rows: Sequence[Row], *, compare: bool) -> list[Sheet]:
        """Make the sheets, see `raykernel.study.Table`."""
        del compare  # the paper prints figures and no numbers
        trials = [row for row in rows if row["arm"] == self.training]
        points = matched(trials, [row for row in rows if row["arm"] == self.kernel])
        lost = len(trials) - sum(map(len, points.values()))
        answers = _answers(points)
        tasks = list(dict.fromkeys(task for task, _, _ in answers))
        sheets = [_correlations_sheet(task, answers) for task in tasks]
        if sheets:
            sheets[-1] = replace(sheets[-1], note=_sentence(answers))
        return [_points_sheet(points, lost), *sheets]


def matched(trials: Sequence[Row], spectra: Sequence[Row]) -> dict[DataSet, list[Trained]]:
    """Trials beside the condition numbers of the layers and modules that they train.

    Args:
        trials: of the table `trials`, with their curves.
        spectra: of the table `spectra`.

    Returns:
        By data set; a trial whose layers and modules have no condition number is left out.
    """
    by_place = {
        _place(row, row["layers"], row["modules"]): row
        for row in spectra
        if row["groups"] and row["change"] is None
    }
    points: dict[DataSet, list[Trained]] = {}
    for trial in trials:
        chosen = json.loads(trial["parameters"])
        modules = [name.rsplit(".", 1)[-1] for name in chosen["target_modules"]]
        place = _place(trial, chosen["layers_to_transform"] or [], modules)
        if place in by_place and by_place[place]["regularised"] is not None:
            points.setdefault(place[0], []).append(_trained(trial, place[1], by_place[place]))
    return points


def _place(
    row: Row, layers: Sequence[int], modules: Sequence[str]
) -> tuple[DataSet, tuple[int, ...]]:
    """What a row is of, in both tables alike."""
    names = ",".join(sorted(modules))
    return (row["task"], int(row["k"]), int(row["seed"]), names), tuple(sorted(layers))


def _trained(trial: Row, layers: tuple[int, ...], spectrum: Row) -> Trained:
    losses = [point["train_loss"] for point in trial["curve"] if point["train_loss"] is not None]
    dev = trial["curve"][-1]["dev_score"]
    return Trained(layers, spectrum, tuple(losses), dev, trial["finetuned"])


# ---------------------------------------------------------------- the points


def _points_sheet(points: Mapping[DataSet, Sequence[Trained]], lost: int) -> Sheet:
    """A line per task, modules and layers: means over samples."""
    lines: dict[tuple[str, str, tuple[int, ...]], list[Trained]] = {}
    for (task, _, _, modules), own in points.items():
        for point in own:
            lines.setdefault((task, modules, point.layers), []).append(point)
    rows = [
        [
            task,
            modules,
            " ".join(map(str, layers)),
            f"{statistics.fmean(math.log10(p.kappa) for p in same):.2f}",
            f"{statistics.fmean(math.log10(p.trace) for p in same):.2f}",
            " ".join(short(statistics.fmean(epoch)) for epoch in _by_epoch(same)),
            f"{100 * statistics.fmean(p.dev for p in same):.1f}",
            f"{100 * statistics.fmean(p.test for p in same):.1f}",
        ]
        for (task, modules, layers), same in lines.items()
    ]
    samples = len({(task, k, seed) for task, k, seed, _ in points})
    note = "κ: of the contrast kernel at the start, with the ridge. Losses are means over an epoch."
    if lost:
        note += (
            f"\n{counted(lost, 'trial')} left out: expected its layers and modules among "
            "spectrum.sets, and a condition number. Give both keys the same choices."
        )
    columns = ["task", "modules", "layers", "log₁₀ κ", "log₁₀ trace", "train loss by epoch"]
    return Sheet(
        f"Condition number and training, mean over {counted(samples, 'sample')}",
        [*columns, "dev (%)", "test (%)"],
        rows,
        note,
    )


def _by_epoch(points: Sequence[Trained]) -> list[list[float]]:
    """Losses of all points by epoch, as far as all have come."""
    epochs = min(len(point.losses) for point in points)
    return [[point.losses[epoch] for point in points] for epoch in range(epochs)]


# ---------------------------------------------------------------- the correlations


@dataclass(frozen=True, slots=True)
class _Answer:
    """One target in one data set."""

    plain: RankCorrelation
    partial: RankCorrelation
    single: RankCorrelation
    """Of choices of one layer alone."""
    scale: RankCorrelation
    """Of the kernel's trace in place of κ."""
    readings: Mapping[str, float]


_Answers = dict[tuple[str, str, str], list[_Answer]]
"""By task, modules and target, one for each sample."""


def _answers(points: Mapping[DataSet, Sequence[Trained]]) -> _Answers:
    """One for each sample, by task, modules and target."""
    answers: _Answers = {}
    for (task, _, _, modules), own in points.items():
        for target in TARGETS:
            answers.setdefault((task, modules, target), []).append(_answer(own, target))
    return answers


def _correlations_sheet(task: str, answers: _Answers) -> Sheet:
    """A line per modules and target."""
    columns = ["modules", "κ against", "sign", "ρ", "p", "ρ | size, scale", "p | size, scale"]
    more = ["single", "trace", *READINGS]
    return Sheet(
        f"{task}: Spearman's ρ over choices of layers, Fisher-z mean over samples",
        [*columns, *more],
        [[*key[1:], *_cells(found)] for key, found in answers.items() if key[0] == task],
    )


def _answer(points: Sequence[Trained], target: str) -> _Answer:
    expected, values = TARGETS[target]
    y, kappa = values(points), [point.kappa for point in points]
    controls = [[float(len(point.layers)) for point in points], [point.trace for point in points]]
    alone = [at for at, point in enumerate(points) if len(point.layers) == 1]
    readings = {}
    for name, column in READINGS.items():
        known = [at for at, point in enumerate(points) if point.spectrum[column] is not None]
        x = [float(points[at].spectrum[column]) for at in known]
        readings[name] = rank_correlation(x, [y[at] for at in known], expected=expected).rho
    return _Answer(
        rank_correlation(kappa, y, expected=expected),
        partial_rank_correlation(kappa, y, controls, expected=expected),
        rank_correlation([kappa[at] for at in alone], [y[at] for at in alone], expected=expected),
        rank_correlation([point.trace for point in points], y, expected=expected),
        readings,
    )


def _cells(found: Sequence[_Answer]) -> list[str]:
    sign = found[0].plain.expected
    return [
        ">" if sign is Expected.positive else "<",
        _mean([each.plain.rho for each in found]),
        " ".join(_p_value(each.plain) for each in found),
        _mean([each.partial.rho for each in found]),
        " ".join(_p_value(each.partial) for each in found),
        _mean([each.single.rho for each in found]),
        _mean([each.scale.rho for each in found]),
        *(_mean([each.readings[name] for each in found]) for name in READINGS),
    ]


def _mean(rhos: Sequence[float]) -> str:
    mean = mean_correlation(rhos)
    return UNKNOWN if math.isnan(mean) else f"{mean:+.2f}"


def _p_value(found: RankCorrelation) -> str:
    return UNKNOWN if math.isnan(found.p_value) else f"{found.p_value:.2f}"


def _sentence(answers: _Answers) -> str:
    """What was found, and what so few points can say."""
    means = [
        mean_correlation([each.plain.rho for each in found]) * found[0].plain.expected.value
        for found in answers.values()
    ]
    known = [mean for mean in means if not math.isnan(mean)]
    every = [each.plain for found in answers.values() for each in found]
    sure = [each for each in every if each.p_value <= LEVEL]
    agreeing = sum(each.agrees is True for each in sure)
    size = max((each.size for each in every), default=0)
    text = (
        f"{sum(mean > 0 for mean in known)} of {len(known)} mean correlations have the expected "
        f"sign (> rises with κ, < falls with κ). Within a sample p ≤ {LEVEL:g} in {len(sure)} of "
        f"{counted(len(every), 'correlation')}, {agreeing} of them with the expected sign; chance "
        f"alone gives one in {1 / LEVEL:.0f}."
    )
    if 2 <= size <= EXACT_SIZE:
        critical = critical_rho(size, LEVEL)
        limit = "nothing" if math.isinf(critical) else f"nothing below |ρ| = {critical:.3f}"
        text += f"\n{counted(size, 'point')} resolve little: {limit} is significant."
    return (
        f"{text} p by sample: exact, all orders counted; given size (number of layers) and scale "
        "(trace): from Student's t.\nsingle: ρ of choices of one "
        "layer; trace, centred, median: ρ of the trace, of the centred κ, of top over median "
        "instead.\n-: a score that does not vary, or one that size and scale explain wholly. "
        "Samples share model and layers, and are no independent repetitions."
    )
