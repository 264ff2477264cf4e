"""The figure of κ at the start against how fine-tuning went, with rank correlations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
from matplotlib.axes import Axes

from raykernel.analysis.correlation import (
    Expected,
    RankCorrelation,
    mean_correlation,
    rank_correlation,
)
from raykernel.choice_table import ChoiceTable
from raykernel.console import counted
from raykernel.convergence import LEVEL, Trained, matched
from raykernel.report.chart import (
    FINETUNING,
    Chart,
    Panel,
    Series,
    listed,
    logarithmic,
)
from raykernel.report.evidence import Evidence
from raykernel.report.ink import colour, cycle
from raykernel.study import Row
from raykernel.tried import Tried, tried_choices

_TRIALS = """select trials.*, list(curves order by step) as curve
from trials join curves using (trial)
group by all order by created, trial"""
_SPECTRA = "select * from spectra where layer_group is null and len(groups) > 0 and change is null"


def convergence_chart(evidence: Evidence) -> Chart | None:
    """κ at the start against final train loss and accuracy, with rank correlations.

    Args:
        evidence: of a store or a study.

    Returns:
        The figure; None without trials whose layers have a κ.
    """
    if not all(map(evidence.has, ("spectra", "trials", "curves"))):
        return None
    spectra, best = evidence.rows(_SPECTRA), dict[str, list[tuple[str, Trained]]]()
    # Runs of one figure differ in their layers alone.
    for trials in _alike(evidence.rows(_TRIALS)).values():
        points = matched(trials, spectra)
        names = {key: f"{key[0]}, k={key[1]}, seed {key[2]}" for key in points}
        found: dict[str, list[tuple[str, Trained]]] = {}
        for key, own in points.items():
            if len(own) > 2:
                found.setdefault(key[3], []).extend((names[key], point) for point in own)
        if sum(map(len, found.values())) > sum(map(len, best.values())):
            best = found
    return _convergence(best) if best else None


def choices_chart(table: ChoiceTable, rows: Sequence[Row]) -> Chart | None:
    """The same of a study that trains some of the choices that a selection ranks.

    Args:
        table: of the study.
        rows: of all its arms.

    Returns:
        The figure, with a marker for each arm that trains; None if each has tried too few.
    """
    tried = tried_choices(rows, selection=table.selection, training=table.training)
    points = {
        arm: [
            (f"{task}, k={k}, seed {seed}", _trained(one))
            for (task, k, seed), own in samples.items()
            for one in own
        ]
        for arm, samples in tried.items()
        if any(len(own) > 2 for own in samples.values())
    }
    return _convergence(points) if points else None


def _trained(tried: Tried) -> Trained:
    row = tried.foretold
    return Trained(tuple(row["layers"]), row, (tried.train_loss,), math.nan, tried.accuracy)


def _alike(trials: Sequence[Row]) -> dict[str, list[Row]]:
    """Trials by all that makes them but data set and layers."""
    found: dict[str, list[Row]] = {}
    for trial in trials:
        found.setdefault(f"{trial['model']} {trial['training']} {trial['lam']}", []).append(trial)
    return found


@dataclass(frozen=True, slots=True)
class _Target:
    name: str
    unit: str
    of: Callable[[Trained], float]
    expected: Expected


_TARGETS = (
    _Target("final train loss", "", lambda point: point.losses[-1], Expected.positive),
    _Target("score on test", ", %", lambda point: 100 * point.test, Expected.negative),
)


def _convergence(points: Mapping[str, Sequence[tuple[str, Trained]]]) -> Chart:
    found = {
        (target.name, modules): _correlations(own, target)
        for target in _TARGETS
        for modules, own in points.items()
    }
    series = cycle(list(points))
    rows = [
        {
            "data_set": data_set, "modules": modules,
            "layers": " ".join(map(str, point.layers)), "kappa": point.kappa,
            "final_train_loss": point.losses[-1], "test": point.test,
        }
        for modules, own in points.items()
        for data_set, point in own
    ]  # fmt: skip
    return Chart(
        "kappa-and-training",
        "κ against training",
        _correlation_sentence(found),
        "Scatter plots of the condition number of chosen layers at the start against the final "
        "train loss and the accuracy on test; a marker for each choice of modules.",
        "tables spectra (regularised, of spectrum.sets) or selections (regularised), curves (last "
        "train_loss) and trials (finetuned), joined by task, k, seed, layers and modules; "
        "Spearman's ρ of every data set, "
        "p exact up to eight points, averaged by Fisher's z",
        pa.Table.from_pylist(rows),
        [
            Panel(target.name + target.unit, partial(_scatter, points, series, target))
            for target in _TARGETS
        ],
        series,
        FINETUNING,
    )


def _correlations(own: Sequence[tuple[str, Trained]], target: _Target) -> list[RankCorrelation]:
    """One for every data set."""
    by_set: dict[str, list[Trained]] = {}
    for data_set, point in own:
        by_set.setdefault(data_set, []).append(point)
    return [
        rank_correlation(
            [point.kappa for point in same],
            [target.of(point) for point in same],
            expected=target.expected,
        )
        for same in by_set.values()
    ]


def _correlation_sentence(found: Mapping[tuple[str, str], Sequence[RankCorrelation]]) -> str:
    parts = []
    for target in _TARGETS:
        own = {modules: each for (name, modules), each in found.items() if name == target.name}
        sign = "above" if target.expected is Expected.positive else "below"
        means = [f"{_rho([one.rho for one in each])} ({modules})" for modules, each in own.items()]
        parts.append(f"with the {target.name} {listed(means)}, expected {sign} 0")
    every = [one for each in found.values() for one in each if not math.isnan(one.rho)]
    sure = sum(one.p_value <= LEVEL for one in every)
    return (
        f"Spearman's ρ of κ {'; '.join(parts)}. p\u00a0≤\u00a0{LEVEL:g} in {sure} of "
        f"{counted(len(every), 'correlation')} within a data set."
    )


def _rho(rhos: Sequence[float]) -> str:
    mean = mean_correlation(rhos)
    return "undefined" if math.isnan(mean) else f"{mean:+.2f}".replace("-", "−")


def _scatter(
    points: Mapping[str, Sequence[tuple[str, Trained]]],
    series: Sequence[Series],
    target: _Target,
    axes: Axes,
) -> None:
    for own, style in zip(points.values(), series, strict=True):
        axes.plot(
            [point.kappa for _, point in own],
            [target.of(point) for _, point in own],
            style.marker, color=colour(style.colour), mec=colour("paper"), mew=0.6, ms=5.5,
        )  # fmt: skip
    axes.set_xscale("log")
    logarithmic(axes.xaxis)
    axes.set_xlabel("κ of the trained layers' kernel at the start, with ridge")
