"""The tables of the page: a study's own sheets, or what the result tables hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa

from raykernel.console import counted, short
from raykernel.lambda_table import LambdaTable
from raykernel.report.evidence import Evidence
from raykernel.study import Row, Sheet

MAX_ROWS = 100
"""Lines of a table in the page; its CSV has all."""
_NUMBER = re.compile(
    r"(?:[<>≤~] )?[-+−]?[\d,.]*\d(?:e[-+]?\d+)?(?: \(.*\))?(?: \[\d+\])?|[-+−]?∞|-|"
)
_SCORES = {
    "zero_shot", "linear_probe", "kernel_regression", "finetuned", "dev", "start_score", "score",
    "score_a", "score_b", "loo_accuracy", "pretrained_score", "linearized_score",
    "finetuned_score", "agreement_a", "agreement_b",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PageTable:
    """A table as the page shows it."""

    name: str
    """Of its CSV, behind `table-`."""
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    made: str
    """SQL, or what else it is made of."""
    data: pa.Table
    """What its CSV holds."""
    note: str = ""

    @property
    def is_numeric(self) -> list[bool]:
        """Whether a column holds numbers, which are set right-aligned."""
        return [
            bool(self.rows) and all(_NUMBER.fullmatch(row[number]) for row in self.rows)
            for number in range(len(self.columns))
        ]


def sheet_tables(sheets: Sequence[Sheet], made: str) -> list[PageTable]:
    """The tables that `raykernel sweep` prints.

    Args:
        sheets: of a study.
        made: what they are made of.

    Returns:
        A table for each.
    """
    found = []
    for number, sheet in enumerate(sheets, start=1):
        # Columns of a CSV need names of their own.
        names = [f"{c}.{i}" if c in sheet.columns[:i] else c for i, c in enumerate(sheet.columns)]
        data = pa.table(
            {
                name: pa.array([row[i] for row in sheet.rows], pa.string())
                for i, name in enumerate(names)
            }
        )
        found.append(
            PageTable(str(number), sheet.title, sheet.columns, sheet.rows, made, data, sheet.note)
        )
    return found


_TABLES = {
    "kernels": (
        "Kernel regression",
        """select task, model, prompt, k, seed, kind, metric, zero_shot, linear_probe,
  kernel_regression, dev, ridge, f0_scaling, condition_number, seconds, created
from kernels order by created desc""",
    ),
    "trials": (
        "Fine-tuning",
        """select task, model, prompt, k, seed, method, optimizer, learning_rate, lam, steps,
  num_parameters, metric, zero_shot, linear_probe, finetuned, dev, best_step, distance, seconds,
  created
from trials order by created desc""",
    ),
    "behavior": (
        "Does fine-tuning behave like its kernel?",
        """select task, model, prompt, k, seed, optimizer, kind, solves, linearization,
  fixed_features, kernel_behavior, kernel_regression, finetuned, pretrained_score,
  linearized_score, mean_relative_distance, cka, created
from behavior order by created desc""",
    ),
    "spectra": (
        "Spectra of sums of layers",
        """select task, model, k, seed, kind, modules, layers, num_groups, num_rows, ridge,
  regularised, condition_number, top_over_median, effective_rank, loo_accuracy, num_unresolved,
  created
from spectra where layer_group is null and change is null order by created desc, regularised""",
    ),
    "selections": (
        "Choices of layers, ranked before training",
        """select task, model, k, seed, kind, criterion, rank, candidates, num_parameters,
  regularised, alignment, marginal_likelihood, loo_accuracy, trace, effective_rank
from selections order by created desc, rank nulls last""",
    ),
    "bounds": (
        "Bounds on the way of fine-tuning",
        """select task, lam, seed, quantity, name, bound, measured, holds, slack
from bounds join twins using (trial)
where split = 'test' and bound is not null order by task, lam, seed, quantity, name""",
    ),
}


def store_tables(evidence: Evidence) -> list[PageTable]:
    """What the result tables of a store hold.

    Args:
        evidence: of the store.

    Returns:
        A table for each that has rows, and that along λ.
    """
    found = []
    for name, (title, sql) in _TABLES.items():
        if evidence.has(name) and (name != "bounds" or evidence.has("twins")):
            data = evidence.ask(sql)
            if data.num_rows:
                found.append(_table(name, title, sql, data))
    twins = evidence.rows("select * from twins") if evidence.has("twins") else []
    sheets = LambdaTable()(twins, compare=False) if len({row["lam"] for row in twins}) > 1 else []
    made = "table twins, means over seeds"
    return found + [
        PageTable(
            f"twins-{number}", each.title, each.columns, each.rows, made, each.data, each.note
        )
        for number, each in enumerate(sheet_tables(sheets, made), start=1)
    ]


def _table(name: str, title: str, sql: str, data: pa.Table) -> PageTable:
    rows: list[Row] = data.slice(0, MAX_ROWS).to_pylist()
    # What is the same in every row is said once. The CSV has all.
    whole = {c: data[c].to_pylist() for c in data.column_names}
    same = [
        name
        for name, own in whole.items()
        if all(value == own[0] for value in own) and (len(own) > 1 or own[0] is None)
    ]
    shown = [c for c in data.column_names if c not in same]
    cells = [[cell(column, row[column]) for column in shown] for row in rows]
    notes = [f"{c} {cell(c, whole[c][0])}" for c in same if whole[c][0] is not None]
    note = f"In every row: {', '.join(notes)}." if notes else ""
    if data.num_rows > MAX_ROWS:
        note += f" The first {MAX_ROWS} of {counted(data.num_rows, 'row')}."
    return PageTable(name, title, shown, cells, sql, data, note.strip())


def cell(column: str, value: object) -> str:
    """A value of a result table as the page shows it.

    Args:
        column: its column.
        value: of it.

    Returns:
        The text: scores to three decimals, other numbers to three digits; `-` of no value.
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M")
    if isinstance(value, float):
        return f"{value:.3f}" if column in _SCORES else short(value)
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return f"{value:,}" if column == "num_parameters" else str(value)
