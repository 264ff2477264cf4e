"""The best choices of hyperparameters of a study, over seeds.

runs → by method, data set and choice → mean and spread of every metric → the best
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raykernel.config import SweepConfig
from raykernel.console import counted
from raykernel.space import Plan, Point
from raykernel.study import Arm, Row, Sheet, mean_std
from raykernel.terms import Direction

SHOWN = 3
"""Choices of a data set."""

Ran = tuple[Point, Sequence[Row]]
"""What was run, and its rows."""


def best_choices(plan: Plan, arm: Arm, ran: Sequence[Ran]) -> Sheet | None:
    """The best choices of an arm in every cell; of several metrics, those that none beats in all.

    Args:
        plan: what was run.
        arm: one of its arms.
        ran: its runs that went well.

    Returns:
        A sheet; None if there was nothing to choose, or the runs have no such metric.
    """
    settings = plan.settings()
    axes = plan.own[arm.name].values()
    if arm.like or arm.choose or all(len(axis.values) == 1 for axis in axes):
        return None
    texts = []
    for cells in plan.cells_to_average(settings):
        values = _by_choice(cells, ran, settings)
        for own in _best(values, settings):
            found = values[own]
            numbers = [mean_std(column, scale=1, digits=3) for column in zip(*found, strict=True)]
            texts.append([_shared(cells), " ".join(own), *numbers, str(len(found))])
    if not texts:
        return None
    tried = counted(len({point.own for point, _ in ran}), "choice")
    kept = "none of which is better in all" if len(settings.metrics) > 1 else "best first"
    title = f"{arm.name}: {tried}, {kept}; mean (std)"
    return Sheet(title, ["data", "choice", *settings.metrics, "runs"], texts)


def _by_choice(
    cells: Sequence[tuple[str, ...]], ran: Sequence[Ran], settings: SweepConfig
) -> dict[tuple[str, ...], list[list[float]]]:
    """Metrics of every run, by choice; runs that have none are left out."""
    found: dict[tuple[str, ...], list[list[float]]] = {}
    for point, rows in ran:
        if point.cell not in cells:
            continue
        values = [_first(rows, metric) for metric in settings.metrics]
        numbers = [value for value in values if value is not None]
        if len(numbers) == len(values):
            found.setdefault(point.own, []).append(numbers)
    return found


def _first(rows: Sequence[Row], metric: str) -> float | None:
    return next((row[metric] for row in rows if row.get(metric) is not None), None)


def _best(
    values: Mapping[tuple[str, ...], Sequence[Sequence[float]]], settings: SweepConfig
) -> list[tuple[str, ...]]:
    """Choices with the best means, those of the most runs alone."""
    most = max(map(len, values.values()), default=0)
    signs = [1 if direction is Direction.max else -1 for direction in settings.directions]
    scores = {
        own: [
            sign * sum(column) / len(column)
            for sign, column in zip(signs, zip(*found, strict=True), strict=True)
        ]
        for own, found in values.items()
        if len(found) == most
    }
    if len(signs) > 1:
        scores = {
            own: mine
            for own, mine in scores.items()
            if not any(_dominates(other, mine) for other in scores.values())
        }
    order = sorted(scores, key=lambda own: scores[own], reverse=True)
    return order if len(signs) > 1 else order[:SHOWN]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """At least as good in all, better in one."""
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _shared(cells: Sequence[tuple[str, ...]]) -> str:
    """Overrides that all of the cells have."""
    return " ".join(text for text in cells[0] if all(text in cell for cell in cells)) or "all"
