"""Figures of fine-tuning and its linear model along λ, and of bounds on their distances."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial

import pyarrow as pa
from matplotlib.axes import Axes

from raykernel.console import counted, short
from raykernel.report.chart import (
    FINETUNING,
    Chart,
    Panel,
    Series,
    logarithmic,
)
from raykernel.report.evidence import Evidence
from raykernel.report.ink import colour, cycle
from raykernel.study import Row

MAX_PATHS = 3
"""Paths along λ that are drawn, those with the most runs."""

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
        FINETUNING,
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
    series = dict(zip(names, cycle(names, line="--"), strict=True))
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
        FINETUNING,
    )
