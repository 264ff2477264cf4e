"""Figures of choices of layers, of a sweep's history and of what results cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial

import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from raykernel.console import counted, duration, short, size
from raykernel.report.chart import Chart, Panel, Series, listed, logarithmic
from raykernel.report.evidence import Evidence
from raykernel.report.ink import colour
from raykernel.study import Row

CHOICES, HISTORY = "Choices of layers", "Runs"


def cost_charts(evidence: Evidence) -> list[Chart]:
    """Figures of choices, history and costs.

    Args:
        evidence: of a store or a study.

    Returns:
        Those that there are data for.
    """
    charts = [pareto_chart(evidence), history_chart(evidence), cost_chart(evidence)]
    return [chart for chart in charts if chart is not None]


# ---------------------------------------------------------------- Pareto front

_CHOICES = """select task, model, k, seed, kind, criterion, rank, candidates, size, num_parameters,
  regularised, alignment, loo_accuracy, num_scored, is_exhaustive
from selections
where (fingerprint, kind, settings, ridge) = (
  select (fingerprint, kind, settings, ridge) from selections
  order by created desc, fingerprint, kind, settings, ridge limit 1)
order by rank nulls last"""

_STORED = Series("stored choice", "muted", "o")
_FRONT = Series("not beaten in both", "blue", "s", "-")
_ALL = Series("all candidates", "vermillion", "D")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Choices that no other one beats: as good in both quantities, and better in one.

    Args:
        points: two quantities of each, of which less is better.

    Returns:
        Their places, by the first quantity; of equal ones the first.
    """
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if not front or points[place][1] < points[front[-1]][1]:
            front.append(place)
    return front


def pareto_chart(evidence: Evidence) -> Chart | None:
    """Trained parameters against κ, and against what stands for accuracy before training.

    Args:
        evidence: of a store or a study.

    Returns:
        The figure of the newest selection; None without one.
    """
    if not evidence.has("selections"):
        return None
    rows = [row for row in evidence.rows(_CHOICES) if row["num_parameters"] is not None]
    goals = {"regularised": ("κ with ridge, less is better", 1.0)}
    if any(row["loo_accuracy"] is not None for row in rows):
        goals["loo_accuracy"] = ("leave-one-out accuracy, %", -100.0)
    else:
        goals["alignment"] = ("alignment with the labels", -1.0)
    known = {column: [row for row in rows if row[column] is not None] for column in goals}
    if not any(known.values()):
        return None
    first = rows[0]
    how = "all" if first["is_exhaustive"] else "the best that a greedy search found"
    front = _front(known["regularised"], "regularised", 1.0)
    sentence = "No choice has a κ that rounding does not hide."
    if front:
        cheap, best = front[0], front[-1]
        sentence = (
            f"{len(front)} of {counted(len(known['regularised']), 'stored choice')} are beaten by "
            f"none in both parameters and κ, from {_choice(cheap)} with {_cost(cheap)} to "
            f"{_choice(best)} with {_cost(best)}."
            if len(front) > 1
            else f"{_choice(best)} with {_cost(best)} is beaten by no stored choice in either."
        )
    return Chart(
        "pareto",
        f"Parameters against κ: {first['task']}, {first['model']}, k={first['k']}",
        f"{sentence} Of {counted(first['num_scored'], 'choice')} scored ({how} within the budget), "
        f"the best by {first['criterion']} are stored.",
        "Scatter plots of the parameters that a choice of layers trains against its condition "
        "number and against a quantity that stands for accuracy; those not beaten are joined.",
        _CHOICES,
        pa.Table.from_pylist([dict(row) for row in rows]),
        [
            Panel(title, partial(_choices, known[column], column, sign))
            for column, (title, sign) in goals.items()
            if known[column]
        ],
        [_STORED, _FRONT, _ALL],
        CHOICES,
    )


def _front(rows: Sequence[Row], column: str, sign: float) -> list[Row]:
    points = [(float(row["num_parameters"]), sign * row[column]) for row in rows]
    return [rows[place] for place in pareto_front(points)]


def _choice(row: Row) -> str:
    names = row["candidates"]
    return f"{listed(names[:4])}{' and more' if len(names) > 4 else ''}"


def _cost(row: Row) -> str:
    return f"{row['num_parameters']:,} parameters (κ {short(row['regularised'])})"


def _choices(rows: Sequence[Row], column: str, sign: float, axes: Axes) -> None:
    scale = abs(sign)
    front = _front(rows, column, sign)
    for own, style in (
        ([row for row in rows if row["rank"] is not None], _STORED),
        (front, _FRONT),
        ([row for row in rows if row["rank"] is None], _ALL),
    ):
        x, y = [row["num_parameters"] for row in own], [scale * row[column] for row in own]
        if style.line and len(own) > 1:
            axes.step(x, y, style.line, where="post", color=colour(style.colour), lw=1.1)
        axes.plot(x, y, style.marker, color=colour(style.colour), mec=colour("paper"), mew=0.6)
    if sign > 0 and min(row[column] for row in rows) > 0:
        axes.set_yscale("log")
        logarithmic(axes.yaxis)
    axes.set_xscale("log")
    logarithmic(axes.xaxis)
    axes.set_xlabel("parameters that a LoRA of the choice trains")


# ---------------------------------------------------------------- history

_RUNS = """select study, arm, command, status, cause, seconds, created
from runs order by created"""
_STATUS = {
    "ok": Series("done", "blue", "", "-"),
    "failed": Series("failed", "vermillion", "", "--"),
    "stopped": Series("stopped", "orange", "", ":"),
}


def history_chart(evidence: Evidence) -> Chart | None:
    """Runs that ended, over time.

    Args:
        evidence: of a store or a study.

    Returns:
        The figure; None if no sweep has kept its runs.
    """
    if not evidence.has("runs"):
        return None
    rows = evidence.rows(_RUNS)
    counts = {status: sum(row["status"] == status for row in rows) for status in _STATUS}
    causes = sorted({row["cause"] for row in rows if row["status"] == "failed" and row["cause"]})
    span = (rows[-1]["created"] - rows[0]["created"]).total_seconds()
    return Chart(
        "history",
        "Runs over time",
        f"{counts['ok']} of {counted(len(rows), 'run')} done, {counts['failed']} failed"
        + (f" ({listed(causes)})" if causes else "")
        + f", {counts['stopped']} stopped, within {duration(span)}.",
        "Step lines of how many runs had ended, by how they ended, over time.",
        _RUNS,
        pa.Table.from_pylist([dict(row) for row in rows]),
        [Panel("runs that ended", partial(_history, rows))],
        [series for status, series in _STATUS.items() if counts[status]],
        HISTORY,
    )


def _history(rows: Sequence[Row], axes: Axes) -> None:
    start: datetime = rows[0]["created"]
    elapsed = [(row["created"] - start).total_seconds() for row in rows]
    unit, name = _time_unit(elapsed[-1])
    for status, series in _STATUS.items():
        own = [at / unit for at, row in zip(elapsed, rows, strict=True) if row["status"] == status]
        if own:
            # Each count holds until the end.
            x, y = [*own, elapsed[-1] / unit], [*range(1, len(own) + 1), len(own)]
            axes.step(x, y, series.line, where="post", color=colour(series.colour))
            axes.plot(x[-1:], y[-1:], "o", color=colour(series.colour), ms=4)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel(f"{name} since the first")


def _time_unit(seconds: float) -> tuple[float, str]:
    return (
        (1.0, "seconds")
        if seconds < 180
        else (60.0, "minutes")
        if seconds < 7200
        else (3600.0, "hours")
    )


# ---------------------------------------------------------------- cost

_COLUMNS = "task, model, k, seed, seconds, peak_memory_bytes, created"
_COSTS = {
    # Kinds that one run computed together share its seconds.
    "kernels": f"""select 'kernels' as result, {_COLUMNS} from kernels where seconds is not null
qualify row_number() over (partition by fingerprint, seconds order by kind) = 1""",
    "trials": f"select 'trials' as result, {_COLUMNS} from trials",
    "twins": f"select 'twins' as result, {_COLUMNS} from twins where split = 'test'",
}
_NAMES = {"kernels": "kernels", "trials": "fine-tuning", "twins": "linear twins"}


def cost_chart(evidence: Evidence) -> Chart | None:
    """Seconds and peak memory of every result.

    Args:
        evidence: of a store or a study.

    Returns:
        The figure; None without results that were timed.
    """
    parts = [sql for name, sql in _COSTS.items() if evidence.has(name)]
    if not parts:
        return None
    sql = "\nunion all ".join(parts) + "\norder by result, created, seconds desc"
    rows = evidence.rows(sql)
    if not rows:
        return None
    by_result: dict[str, list[Row]] = {}
    for row in rows:
        by_result.setdefault(row["result"], []).append(row)
    total, height = sum(row["seconds"] for row in rows), 0.9 + 0.42 * len(by_result)
    most = max(rows, key=lambda row: row["peak_memory_bytes"] or 0)
    return Chart(
        "cost",
        "Time and memory",
        f"{counted(len(rows), 'result')} took {duration(total)} in all; the most memory "
        f"was {size(most['peak_memory_bytes'] or 0)} ({_NAMES[most['result']]}, {most['task']}).",
        "Strip charts of seconds, on a logarithmic axis, and of memory, a dot for each result.",
        sql,
        pa.Table.from_pylist([dict(row) for row in rows]),
        [
            Panel("seconds of a result", partial(_strip, by_result, "seconds", 1.0), height),
            Panel(
                "peak memory of a worker, GiB",
                partial(_strip, by_result, "peak_memory_bytes", 2.0**30),
                height,
            ),
        ],
        section=HISTORY,
    )


def _strip(by_result: Mapping[str, Sequence[Row]], column: str, unit: float, axes: Axes) -> None:
    for line, own in enumerate(by_result.values()):
        values = sorted(row[column] / unit for row in own if row[column])
        if values:
            axes.plot(values, [line] * len(values), "o", color=colour("blue"), alpha=0.45, mew=0)
            middle = values[len(values) // 2]
            axes.plot([middle], [line], "|", color=colour("ink"), ms=16, mew=1.4)
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
    if column == "seconds":  # from milliseconds to hours
        axes.set_xscale("log")
        logarithmic(axes.xaxis)
    else:
        axes.set_xlim(left=0)
    axes.set_yticks(range(len(by_result)), [_NAMES[name] for name in by_result])
    axes.set_ylim(len(by_result) - 0.5, -0.5)
    axes.set_xlabel(f"{'GiB' if unit > 1 else 'seconds'}, each result a dot, the median a bar")
