"""Figures of fine-tuning beside kernel regression and beside its linearisation, task by task."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes

from raykernel.analysis.behavior import SOLVES
from raykernel.console import counted
from raykernel.report.chart import (
    FINETUNING,
    HEIGHT,
    Chart,
    Panel,
    Series,
    fitted,
    percent,
)
from raykernel.report.evidence import Evidence
from raykernel.report.ink import colour, cycle
from raykernel.study import Row

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
        Series(s.label, "muted", "o") if _rank(s.label)[0] == 0 else s for s in cycle(methods)
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
        FINETUNING,
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
        FINETUNING,
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
