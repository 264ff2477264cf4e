"""The table of a study along λ: a line per λ, a column per quantity, and what falls with λ."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from raykernel.published import slides
from raykernel.study import UNKNOWN, Row, Sheet, mean_std

SPLIT = "test"
"""Where functions are compared."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A column."""

    label: str
    column: str
    """Of the table `twins`."""
    printed: str | None = None
    """The slides' column of the same name, whatever exactly that is."""
    scale: int = 1
    digits: int = 3


QUANTITIES = (
    Quantity("‖θ - θ_0‖", "deviation", "deviation"),
    Quantity("‖f - f̄_A‖", "distance_a", "distance"),
    Quantity("‖f - f̄_B‖", "distance_b"),
    Quantity("KL(f, f̄_A)", "kl_a", "kl", digits=4),
    Quantity("KL(f, f̄_B)", "kl_b", digits=4),
    Quantity("f (%)", "score", "accuracy", 100, 1),
    Quantity("f̄_A (%)", "score_a", None, 100, 1),
    Quantity("f̄_B (%)", "score_b", None, 100, 1),
)
"""A: the linear model has its own training; B: it is at the parameters of f."""


@dataclass(frozen=True, slots=True)
class LambdaTable:
    """A sheet per task, of rows of the table `twins`; see `study.Table`."""

    lines: Sequence[Quantity] = QUANTITIES

    def __call__(self, rows: Sequence[Row], *, compare: bool) -> list[Sheet]:
        """Make the sheets."""
        own = [row for row in rows if row["split"] == SPLIT]
        tasks = dict.fromkeys(row["task"] for row in own)
        return [
            self._sheet(task, [row for row in own if row["task"] == task], compare)
            for task in tasks
        ]

    def _sheet(self, task: str, rows: Sequence[Row], compare: bool) -> Sheet:
        by_lam = {lam: [row for row in rows if row["lam"] == lam] for lam in _lams(rows)}
        texts = [
            [f"{lam:g}", *(_text(own, column) for column in self.lines)]
            for lam, own in by_lam.items()
        ]
        columns = ["λ", *(column.label for column in self.lines)]
        printed = slides(task) if compare else {}
        if printed:
            theirs = [column for column in self.lines if column.printed is not None]
            columns += [f"slides: {column.label}" for column in theirs]
            for text, lam in zip(texts, by_lam, strict=True):
                known = printed.get(lam, {})
                text += [known.get(str(column.printed), UNKNOWN) for column in theirs]
        note = _trends(task, by_lam, self.lines)
        if printed:
            note += (
                " The slides' numbers are for orientation only: they are of another setting, which "
                "is not printed in full."
            )
        title = (
            f"{task}, {SPLIT}: fine-tuning f and its linear model f̄ at the last step; A: trained "
            "itself, B: at the parameters of f"
        )
        return Sheet(title, columns, texts, note)


def _lams(rows: Sequence[Row]) -> list[float]:
    return sorted({float(row["lam"]) for row in rows}, reverse=True)


def _text(rows: Sequence[Row], column: Quantity) -> str:
    values = [row[column.column] for row in rows]
    return mean_std(values, scale=column.scale, digits=column.digits)


def _trends(task: str, by_lam: dict[float, list[Row]], columns: Sequence[Quantity]) -> str:
    """A sentence on what falls as λ grows, by means over seeds."""
    if len(by_lam) < 2:
        return ""
    means = {
        column.label: [
            statistics.fmean([row[column.column] for row in rows]) for rows in by_lam.values()
        ]
        for column in columns
    }
    listed = ", ".join(f"{label} {_spearman(list(by_lam), own)}" for label, own in means.items())
    # Lines are by falling λ: what falls as λ grows never falls from one to the next.
    falling = [label for label, own in means.items() if all(a < b for a, b in pairwise(own))]
    others = [label for label in means if label not in falling]
    deviation = "falls" if columns[0].label in falling else "does not fall"
    return (
        f"{task}: the deviation {deviation} at every step to a larger λ. Columns that do not: "
        f"{', '.join(others) or 'none'}. Spearman with λ: {listed}."
    )


def _spearman(lams: Sequence[float], values: Sequence[float]) -> str:
    """Rank correlation; `-` of a constant."""
    from scipy.stats import spearmanr  # takes a second

    if len(set(values)) < 2:
        return UNKNOWN
    return f"{spearmanr(lams, values).statistic:.2f}"
