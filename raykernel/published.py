"""Numbers that the papers print, which studies show beside ours.

Those of Malladi et al. (2023) lie in sweeps/paper.csv, a line per line of a table; those of Rahimi
Afzal et al. (2025) in sweeps/slides.csv, a line per λ.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

_KEYS = ("k", "prompt", "model")


@dataclass(frozen=True, slots=True)
class Number:
    """One cell of a table of the paper."""

    table: int
    method: str
    task: str
    where: Mapping[str, str]
    """k, prompt and model as in the result tables; one that is absent does not matter."""
    text: str
    """As the paper prints it: `89.0 (1.5)`."""

    def is_of(self, row: Mapping[str, Any]) -> bool:
        """Whether a result has the same task, k, prompt and model."""
        same = all(str(row[name]) == value for name, value in self.where.items())
        return same and row["task"] == self.task


def sweeps_dir() -> Path:
    """Folder of the shipped studies: inside the wheel, or at the top of a checkout."""
    packaged = Path(str(files("raykernel"))) / "sweeps"
    inside = (packaged / "paper.csv").is_file()
    return packaged if inside else Path(__file__).resolve().parent.parent / "sweeps"


@cache
def published(table: int) -> list[Number]:
    """The numbers of one table.

    Args:
        table: its number in the paper.

    Returns:
        Its cells, without those that are not legible in our source.
    """
    with (sweeps_dir() / "paper.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return [
        Number(table, line["method"], task, _where(line), line[task])
        for line in lines
        if int(line["table"]) == table
        for task in line
        if task not in {"table", "method", *_KEYS} and line[task]
    ]


@cache
def slides(task: str) -> dict[float, dict[str, str]]:
    """The table of Rahimi Afzal et al. 2025's slides, of another setting than any of ours.

    Args:
        task: its name.

    Returns:
        By λ and column, as printed; empty of a task that they have not.
    """
    with (sweeps_dir() / "slides.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return {float(line["lam"]): line for line in lines if line["task"] == task}


def _where(line: Mapping[str, str]) -> dict[str, str]:
    return {name: line[name] for name in _KEYS if line[name]}
