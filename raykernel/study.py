"""A study: a question, a space of configurations, and the table that its results make.

    question → arms (a command each) × space → rows of the result tables → sheets

A study is data and knows neither Hydra nor a store; sweep.py runs it. Its files lie in sweeps/.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from raykernel.console import counted
from raykernel.published import Number, published
from raykernel.terms import Command

Row = dict[str, Any]
"""A row of the tables `kernels`, `spectra`, `trials`, `twins` or `behavior`, with `arm` beside."""

TASKS_PER_SHEET = 7
"""Columns of a sheet that hold tasks: so many means fit beside each other where piped."""

UNKNOWN = "-"
"""A cell without a number."""

THEIRS = "paper"
"""Who found the numbers of a line."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One method of a study: a command and what it runs with."""

    name: str
    command: Command
    settings: Mapping[str, str] = field(default_factory=dict)
    """What makes it this method, by dotted key; the command line may not change it."""
    space: Mapping[str, str] = field(default_factory=dict)
    """Hyperparameters in Hydra's sweep grammar; dev selects among them."""
    like: str | None = None
    """Another arm, before this one, whose selected hyperparameters this one has."""
    demo: Mapping[str, str] = field(default_factory=dict)
    """Hyperparameters in place of `space` under experiment=demo."""
    choose: Callable[[Sequence[Row]], Sequence[tuple[str, ...]]] | None = None
    """From the rows of all arms before, of the same cell, to the hyperparameters of each run."""
    num_chosen: int = 1
    """Runs of a cell that `choose` or `like` will find, for counting before."""

    @property
    def is_derived(self) -> bool:
        """Whether its runs depend on what those of other arms find."""
        return self.like is not None or self.choose is not None


@dataclass(frozen=True, slots=True)
class Sheet:
    """One printed table."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """Printed below it."""


@runtime_checkable
class Table(Protocol):
    """From rows to sheets."""

    def __call__(self, rows: Sequence[Row], *, compare: bool) -> list[Sheet]:
        """Make the sheets.

        Args:
            rows: results of all points that did not fail.
            compare: put the paper's numbers beside ours, because the setting is the paper's.

        Returns:
            What is printed.
        """


@dataclass(frozen=True, slots=True)
class Study:
    """A question and how it is answered."""

    question: str
    space: Mapping[str, str]
    """What every arm is repeated over, by dotted key in Hydra's sweep grammar."""
    arms: Sequence[Arm]
    table: Table
    base: Mapping[str, str] = field(default_factory=dict)
    """Overrides of all points."""
    demo: Mapping[str, str | None] = field(default_factory=dict)
    """Overrides under experiment=demo; null drops a key of `space` or `base`."""
    name: str = ""
    """Name of its file."""

    def arm(self, name: str) -> Arm:
        """An arm by name."""
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a table: a number of one method."""

    label: str
    """As printed, and as in paper.csv."""
    arm: str
    column: str
    where: Mapping[str, str] = field(default_factory=dict)
    """Values of other columns, such as the kind of an arm with several."""

    def pick(self, rows: Sequence[Row]) -> list[Row]:
        """Rows that it is about."""
        return [
            row
            for row in rows
            if row["arm"] == self.arm and all(row[name] == v for name, v in self.where.items())
        ]


def best_on_dev(rows: Sequence[Row], by: Sequence[str]) -> list[Row]:
    """Of rows that agree in some columns the one with the best dev metric, the first of equals.

    Reference: Malladi et al. 2023, appendix A.3: the best hyperparameter per few-shot data set.

    Args:
        rows: results.
        by: columns.

    Returns:
        One row per combination of values, in the order in which these appear.
    """
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in by)
        # Rows of the table `behavior` are of a point that dev has selected before.
        if key not in best or (row.get("dev") or 0.0) > (best[key].get("dev") or 0.0):
            best[key] = row
    return list(best.values())


def mean_std(values: Sequence[float | None], *, scale: int | float, digits: int) -> str:
    """Mean and standard deviation over seeds as the paper prints them: `89.0 (1.5)`.

        mean = Σ v / n,  std = sqrt(Σ (v - mean)² / n)

    The divisor is n, as in the paper's code. One value has no deviation.

    Args:
        values: one per seed; None is left out.
        scale: 100 for a percentage.
        digits: after the point.

    Returns:
        The text; `-` of no value.
    """
    known = [scale * value for value in values if value is not None]
    if not known:
        return UNKNOWN
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ({statistics.pstdev(known):.{digits}f})"


def dots(values: Sequence[bool | None]) -> str:
    """A dot per seed: full if a criterion holds, empty if not, `-` where it is undefined."""
    return "".join({True: "●", False: "○", None: UNKNOWN}[value] for value in values) or UNKNOWN


@dataclass(frozen=True, slots=True)
class TaskTable:
    """A table with a line per method and a column per task, as most of the paper's are.

    A mean of fewer seeds than the table has says of how many: `89.0 (1.5) [4]`.
    """

    lines: Sequence[Line]
    title: str
    paper: int | None = None
    """Number of the paper's table; None: there are no numbers to compare with."""
    by: Sequence[str] = ("k",)
    """Columns whose values are told apart: lines are repeated for every combination."""
    scale: int | float = 100
    """Factor of numbers, 100 for percentages."""
    digits: int = 1
    cell: Callable[[Sequence[Any]], str] | None = None
    """Text of one value per seed, in the order of seeds; None: `mean_std`."""
    note: str = ""
    """Printed below the table."""
    paper_note: str = ""
    """Printed below the table if it has numbers of the paper."""

    def __call__(self, rows: Sequence[Row], *, compare: bool) -> list[Sheet]:
        """Make the sheets, see `Table`."""
        numbers = published(self.paper) if compare and self.paper is not None else []
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        sheets = [
            self._sheet(rows, tasks[start : start + TASKS_PER_SHEET], numbers)
            for start in range(0, len(tasks), TASKS_PER_SHEET)
        ]
        theirs = any(THEIRS in line for sheet in sheets for line in sheet.rows)
        notes = [note for note in (self.note, self.paper_note if theirs else "") if note]
        return [*sheets[:-1], *(replace(last, note="\n".join(notes)) for last in sheets[-1:])]

    def _sheet(self, rows: Sequence[Row], tasks: Sequence[str], numbers: Sequence[Number]) -> Sheet:
        own = [row for row in rows if row["task"] in tasks]
        seeds = len({row["seed"] for row in rows})
        texts = []
        for group in dict.fromkeys(self._group(row) for row in own):
            same = [row for row in own if self._group(row) == group]
            for line in self.lines:
                front = [*map(str, group), line.label]
                picked = [_seeds_of(line.pick(same), task) for task in tasks]
                ours = [self._text(line, found, seeds) for found in picked]
                theirs = [_theirs(line, found, numbers) for found in picked]
                texts.append([*front, *["raykernel"] * bool(numbers), *ours])
                if any(theirs):
                    texts.append([*front, THEIRS, *(text or UNKNOWN for text in theirs)])
        title = f"{self.title}; {counted(seeds, 'seed')}"
        if any("[" in text for line in texts for text in line):
            title += ", [n]: n of them"
        return Sheet(title, [*self.by, "method", *["by"] * bool(numbers), *tasks], texts)

    def _group(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.by)

    def _text(self, line: Line, rows: Sequence[Row], seeds: int) -> str:
        values = [row[line.column] for row in rows]
        if self.cell is not None:
            return self.cell(values)
        text = mean_std(values, scale=self.scale, digits=self.digits)
        known = sum(value is not None for value in values)
        return f"{text} [{known}]" if 0 < known < seeds else text


def _seeds_of(rows: Sequence[Row], task: str) -> list[Row]:
    """The selected row of every seed, in the order of seeds."""
    of_task = [row for row in rows if row["task"] == task]
    return sorted(best_on_dev(of_task, ["seed"]), key=lambda row: int(row["seed"]))


def _theirs(line: Line, rows: Sequence[Row], numbers: Sequence[Number]) -> str:
    """The paper's number of the same method, task, k, prompt and model; empty if it has none."""
    same = (n.text for n in numbers if rows and n.method == line.label and n.is_of(rows[0]))
    return next(same, "")
