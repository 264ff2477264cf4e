"""Figures of fine-tuning: beside κ, along λ, beside kernel regression and its own linearisation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes

from raykernel.analysis.behavior import SOLVES
from raykernel.analysis.correlation import (
    Expected,
    RankCorrelation,
    mean_correlation,
    rank_correlation,
)
from raykernel.console import counted, short
from raykernel.convergence import LEVEL, Trained, matched
from raykernel.report.chart import (
    HEIGHT,
    Chart,
    Line,
    Panel,
    Series,
    fitted,
    listed,
    logarithmic,
    percent,
)
from raykernel.report.evidence import Evidence
from raykernel.report.ink import CYCLE, MARKERS, colour
from raykernel.study import Row

MAX_PATHS = 3
"""Paths along λ that are drawn, those with the most runs."""
SECTION = "Fine-tuning"


def training_charts(evidence: Evidence) -> list[Chart]:
    """Figures of fine-tuning.

    Args:
        evidence: of a store or a study.

    Returns:
        Those that there are data for.
    """
    charts = [methods_chart(evidence), linearized_chart(evidence), convergence_chart(evidence)]
    return [chart for chart in charts if chart is not None] + lambda_charts(evidence)


# ---------------------------------------------------------------- κ against training

_TRIALS = """select trials.*, list(curves order by step) as curve
from trials join curves using (trial)
group by all order by created"""
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
    series = _cycle(list(points))
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
        "tables spectra (regularised, of spectrum.sets), curves (last train_loss) and trials "
        "(finetuned), joined by task, k, seed, layers and modules; Spearman's ρ of every data set, "
        "p exact up to eight points, averaged by Fisher's z",
        pa.Table.from_pylist(rows),
        [
            Panel(target.name + target.unit, partial(_scatter, points, series, target))
            for target in _TARGETS
        ],
        series,
        SECTION,
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


def _cycle(labels: Sequence[str], *, line: Line = "") -> list[Series]:
    """A series a label; from the seventh on colours come again with other markers."""
    return [
        Series(label, CYCLE[i % len(CYCLE)], MARKERS[(i + i // len(CYCLE)) % len(MARKERS)], line)
        for i, label in enumerate(labels)
    ]


# ---------------------------------------------------------------- along λ

_PATHS = """select task, model, prompt, k, seed, method, optimizer, regularization, convention,
  learning_rate, batch_size, steps, metric, lam, deviation, distance_a, distance_b, kl_a, kl_b,
  start_score, score, score_a, score_b
from twins where split = 'test' order by task, model, k, lam, seed"""
_BOUNDS = """select task, twins.lam, seed, quantity, name, bound, measured, holds, slack
from bounds join twins using (trial)
where split = 'test' and bound is not null order by task, lam, seed, quantity, name"""
_SAME = (
    "task", "model", "prompt", "k", "method", "optimizer", "learning_rate", "batch_size", "steps",
    "metric",
)  # fmt: skip
"""What the runs of a path share; beside these its pull, of which a run with λ = 0 has none."""
_PULL = ("regularization", "convention")

_F = Series("fine-tuning f", "ink", "o", "-")
_A = Series("linear model f̄ A: trained itself", "blue", "s", "-")
_B = Series("linear model f̄ B: at the parameters of f", "vermillion", "^", "--")


def lambda_charts(evidence: Evidence) -> list[Chart]:
    """Fine-tuning and its linear model along λ, and the bounds on their distances.

    Args:
        evidence: of a store or a study.

    Returns:
        A figure for each path of two λ at the least, and one of the bounds.
    """
    if not evidence.has("twins"):
        return []
    paths = _paths(evidence.rows(_PATHS))[:MAX_PATHS]
    charts = [_path(own, number) for number, own in enumerate(paths, start=1)]
    bounds = evidence.rows(_BOUNDS) if evidence.has("bounds") else []
    return charts + ([_bounds(bounds)] if bounds else [])


def _paths(rows: Sequence[Row]) -> list[list[Row]]:
    """Runs that differ in λ and seed alone, of two λ at the least; the longest path first."""
    paths: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row["lam"] > 0:
            paths.setdefault(tuple(row[name] for name in (*_SAME, *_PULL)), []).append(row)
    for key, own in paths.items():
        same = key[: len(_SAME)]
        own += [r for r in rows if r["lam"] == 0 and tuple(r[name] for name in _SAME) == same]
    several = [own for own in paths.values() if len({row["lam"] for row in own}) > 1]
    return sorted(several, key=len, reverse=True)


_Quantity = tuple[str, Mapping[str, Series], float]
"""Title, series by column, factor."""


def _path(rows: Sequence[Row], number: int) -> Chart:
    first, last = min(rows, key=lambda row: row["lam"]), max(rows, key=lambda row: row["lam"])
    quantities: list[_Quantity] = [
        ("distance from the start, ‖θ − θ₀‖", {"deviation": _F}, 1.0),
        ("distance to the linear model, mean ‖f − f̄‖", {"distance_a": _A, "distance_b": _B}, 1.0),
        ("KL(f ‖ f̄), nats", {"kl_a": _A, "kl_b": _B}, 1.0),
        (f"{first['metric']} on test, %", {"score": _F, "score_a": _A, "score_b": _B}, 100.0),
    ]
    return Chart(
        "lambda-path" if number == 1 else f"lambda-path-{number}",
        f"Along λ: {first['task']}, {first['model']}, k={first['k']}",
        _path_sentence(rows, first["lam"], last["lam"]),
        "Four line charts over λ: distance of the parameters from the start, distance and "
        "divergence of fine-tuning from two linear models, and the scores of all three.",
        _PATHS,
        pa.Table.from_pylist([dict(row) for row in rows]),
        [Panel(title, partial(_along, rows, own, scale)) for title, own, scale in quantities],
        [_F, _A, _B],
        SECTION,
    )


def _by_lam(rows: Sequence[Row], column: str) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for row in rows:
        if row[column] is not None:
            found.setdefault(float(row["lam"]), []).append(float(row[column]))
    return dict(sorted(found.items()))


def _along(rows: Sequence[Row], columns: Mapping[str, Series], scale: float, axes: Axes) -> None:
    """Means over seeds, and their range."""
    for column, series in columns.items():
        values = {lam: [scale * v for v in own] for lam, own in _by_lam(rows, column).items()}
        paint = colour(series.colour)
        means = [statistics.fmean(own) for own in values.values()]
        if any(len(own) > 1 for own in values.values()):
            low, high = (list(map(end, values.values())) for end in (min, max))
            axes.fill_between(list(values), low, high, color=paint, alpha=0.15, linewidth=0)
        axes.plot(
            list(values), means, series.line, marker=series.marker, color=paint,
            mec=colour("paper"), mew=0.5,
        )  # fmt: skip
    _lambda_axis(axes, [float(row["lam"]) for row in rows])


def _lambda_axis(axes: Axes, lams: Sequence[float]) -> None:
    """λ on a logarithmic axis, with a place for 0."""
    values = sorted(set(lams))
    positive = [value for value in values if value > 0]
    if positive and len(positive) < len(values):
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
    elif len(positive) > 1:
        axes.set_xscale("log")
    step = -(-len(values) // 9)
    axes.set_xticks(values[::step], [f"{value:g}" for value in values[::step]])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("λ, strength of the pull to the start")


def _path_sentence(rows: Sequence[Row], low: float, high: float) -> str:
    """From the weakest to the strongest pull."""

    def ends(column: str) -> tuple[float, float]:
        means = _by_lam(rows, column)
        return statistics.fmean(means[low]), statistics.fmean(means[high])

    moved, apart = ends("deviation"), ends("distance_a")
    score, linear = ends("score"), ends("score_a")
    return (
        f"{rows[0]['task']}: from λ = {low:g} to λ = {high:g} ‖θ − θ₀‖ {_goes(*moved, 3)}, the "
        f"distance to the linear twin {_goes(*apart, 3)}, and {rows[0]['metric']} on test "
        f"{_goes(100 * score[0], 100 * score[1], 1)} % (twin: {100 * linear[0]:.1f} to "
        f"{100 * linear[1]:.1f} %)."
    )


def _goes(first: float, last: float, digits: int) -> str:
    start, end = f"{first:.{digits}f}", f"{last:.{digits}f}"
    if start == end:
        return f"stays {start}"
    return f"{'falls' if last < first else 'rises'} from {start} to {end}"


def _bounds(rows: Sequence[Row]) -> Chart:
    quantities = list(dict.fromkeys(row["quantity"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    series = dict(zip(names, _cycle(names, line="--"), strict=True))
    held = sum(bool(row["holds"]) for row in rows)
    slacks = [row["slack"] for row in rows if row["slack"] is not None]
    slack = f"; larger over smaller is {short(statistics.median(slacks))} in the median" * bool(
        slacks
    )
    measured = Series("measured", "ink", "o", "-")
    titles = {
        "deviation": "distance from the start, ‖θ − θ₀‖",
        "distance": "distance to the twin on train, ‖F − F̄‖",
    }

    def draw(quantity: str, axes: Axes) -> None:
        own = [row for row in rows if row["quantity"] == quantity]
        for name in names:
            same = [row for row in own if row["name"] == name]
            if same:
                _along(same, {"bound": series[name]}, 1.0, axes)
        _along(own, {"measured": measured}, 1.0, axes)
        known = [row[key] for row in own for key in ("bound", "measured")]
        if min(known) > 0:
            axes.set_yscale("log")
            logarithmic(axes.yaxis)

    return Chart(
        "bounds",
        "Bounds of Rahimi Afzal et al. 2025, and companions",
        f"{held} of {counted(len(rows), 'bound')} hold{slack}.",
        "Line charts over λ of measured distances and of bounds on them, on a logarithmic axis.",
        _BOUNDS,
        pa.Table.from_pylist([dict(row) for row in rows]),
        [Panel(titles.get(each, each), partial(draw, each)) for each in quantities],
        [measured, *series.values()],
        SECTION,
    )


# ---------------------------------------------------------------- beside kernel and linearisation

_METHODS = """with scores as (
  select 'kernel regression (' || kind || ')' as method, 2 as place, task, model, prompt, k, seed,
    metric, dev, kernel_regression as score, created from kernels
  union all
  select 'fine-tuning (' || optimizer || ', ' || method || ')', 3, task, model, prompt, k, seed,
    metric, dev, finetuned, created from trials
  union all
  select case when zero_shot is null then 'linear probe' else 'zero-shot' end, 1, task, model,
    prompt, k, seed, metric, null, coalesce(zero_shot, linear_probe), created
  from (select * from kernels union all by name select * from trials)
)
select method, task, model, prompt, k, seed, metric, dev, score from scores
where score is not null
qualify row_number() over (
  partition by method, task, model, prompt, k, seed, metric
  order by dev desc nulls last, created) = 1
order by task, model, prompt, k, place, method, seed"""
_LINEARIZED = """select task, model, prompt, k, seed, optimizer, linearization_metric as metric,
  pretrained_score, linearized_score, finetuned_score, solves, linearization, fixed_features,
  kernel_behavior
from behavior order by task, model, prompt, k, optimizer, seed"""


_CRITERIA = ("solves", "linearization", "fixed_features", "kernel_behavior")


def methods_chart(evidence: Evidence) -> Chart | None:
    """Kernel regression beside fine-tuning, task by task: Figure 1 of Malladi et al. 2023.

    Args:
        evidence: of a store or a study.

    Returns:
        The figure; None without both.
    """
    if not (evidence.has("kernels") and evidence.has("trials")):
        return None
    rows = evidence.rows(_METHODS)
    settings = _settings(rows)
    both = {
        name: own
        for name, own in settings.items()
        if {row["method"].split(" (")[0] for row in own} >= {"kernel regression", "fine-tuning"}
    }
    if not both:
        return None
    methods = sorted({row["method"] for own in both.values() for row in own}, key=_rank)
    series = [
        Series(s.label, "muted", "o") if _rank(s.label)[0] == 0 else s for s in _cycle(methods)
    ]
    dots = {
        name: {m: [r["score"] for r in own if r["method"] == m] for m in methods}
        for name, own in both.items()
    }
    return Chart(
        "kernel-and-finetuning",
        "Kernel regression beside fine-tuning",
        _solves_sentence(dots),
        "Dot plot with a line for each task and k: test scores of the start, of kernel regression "
        "and of fine-tuning, the median over seeds with the range as a bar.",
        _METHODS,
        pa.Table.from_pylist([dict(row) for row in rows]),
        [_dot_panel("score on test, %", dots, series)],
        series,
        SECTION,
    )


def linearized_chart(evidence: Evidence) -> Chart | None:
    """The linearised model beside fine-tuning, task by task: Figure 2 of Malladi et al. 2023.

    Args:
        evidence: of a store or a study.

    Returns:
        The figure; None without verdicts.
    """
    if not evidence.has("behavior"):
        return None
    rows = evidence.rows(_LINEARIZED)
    columns = {
        "pre-trained": "pretrained_score",
        "linearised": "linearized_score",
        "fine-tuned": "finetuned_score",
    }
    dots = {
        name: {
            label: [row[column] for row in own if row[column] is not None]
            for label, column in columns.items()
        }
        for name, own in _settings(rows, "optimizer").items()
    }
    series = [
        Series("pre-trained", "muted", "o"),
        Series("linearised", "blue", "s"),
        Series("fine-tuned", "vermillion", "^"),
    ]
    return Chart(
        "linearized",
        "Does the linearised model keep fine-tuning's gain?",
        _verdict_sentence(rows),
        "Dot plot with a line for each task, k and optimizer: test scores of the pre-trained, the "
        "linearised and the fine-tuned model, the median over seeds with the range as a bar.",
        _LINEARIZED,
        pa.Table.from_pylist([dict(row) for row in rows]),
        [_dot_panel("score on test, %", dots, series)],
        series,
        SECTION,
    )


def _verdict_sentence(rows: Sequence[Row]) -> str:
    """How often each criterion of Malladi et al. 2023, Table 1, holds."""
    held = {name: [row[name] for row in rows].count(True) for name in _CRITERIA}
    undefined = [row["linearization"] for row in rows].count(None)
    gained = f" ({undefined} gained nothing to keep)" if undefined else ""
    return (
        f"Of {counted(len(rows), 'verdict')} fine-tuning behaves like its kernel in "
        f"{held['kernel_behavior']}: the kernel solves the task in {held['solves']}, the "
        f"linearised model keeps the gain in {held['linearization']}{gained}, features stay fixed "
        f"in {held['fixed_features']}."
    )


def _settings(rows: Sequence[Row], *further: str) -> dict[str, list[Row]]:
    """Rows by task and k, and by model, prompt and metric where there are several."""
    several = [
        name for name in ("model", "prompt", *further) if len({row[name] for row in rows}) > 1
    ]
    found: dict[str, list[Row]] = {}
    for row in rows:
        more = [str(row[name]) for name in several]
        found.setdefault(" ".join([row["task"], f"k={row['k']}", *more]), []).append(row)
    return found


def _rank(method: str) -> tuple[int, str]:
    order = ("zero-shot", "linear probe", "kernel regression", "fine-tuning")
    return (max(order.index(method.split(" (")[0]) - 1, 0), method)


def _solves_sentence(dots: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """How often the best kernel is as good as the best fine-tuning, by their medians."""
    reached, texts = 0, []
    for name, own in dots.items():
        kernel, tuned = (
            max(statistics.median(v) for m, v in own.items() if v and m.startswith(start))
            for start in ("kernel", "fine")
        )
        reached += kernel >= SOLVES * tuned
        texts.append(f"{name}: {percent(kernel)} beside {percent(tuned)}")
    shown = "; ".join(texts[:3]) + ("; …" if len(texts) > 3 else "")
    return (
        f"The best kernel has {SOLVES:.0%} of the best fine-tuning's score or more in "
        f"{reached} of {counted(len(dots), 'setting')} ({shown})."
    )


def _tick_labels(names: Iterable[str]) -> list[str]:
    """Task and what tells it apart, one above the other."""
    pairs = (name.rsplit(" k=", 1) for name in names)
    return [f"{fitted(task, 20)}\n{fitted(f'k={rest}', 24)}" for task, rest in pairs]


def _dot_panel(
    title: str, dots: Mapping[str, Mapping[str, Sequence[float]]], series: Sequence[Series]
) -> Panel:
    return Panel(title, partial(_dots, dots, series), max(HEIGHT, 0.9 + 0.42 * len(dots)))


def _dots(
    dots: Mapping[str, Mapping[str, Sequence[float]]], series: Sequence[Series], axes: Axes
) -> None:
    offsets = np.linspace(-0.28, 0.28, len(series)) if len(series) > 1 else [0.0]
    for line, own in enumerate(dots.values()):
        for offset, style in zip(offsets, series, strict=True):
            values = [100 * value for value in own.get(style.label, [])]
            if values:
                paint, y = colour(style.colour), line + offset
                axes.plot([min(values), max(values)], [y, y], color=paint, lw=1.2, alpha=0.6)
                axes.plot(
                    statistics.median(values), y, style.marker, color=paint, mec=colour("paper"),
                    mew=0.5, ms=6,
                )  # fmt: skip
    for line in range(1, len(dots)):
        axes.axhline(line - 0.5, color=colour("rule"), lw=0.6)
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
    axes.set_yticks(range(len(dots)), _tick_labels(dots))
    axes.set_ylim(len(dots) - 0.5, -0.5)
    axes.set_xlabel("%, median and range over seeds")
