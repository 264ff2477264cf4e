"""Choices of layers to fine-tune, out of what `raykernel select` found: for the arms of a study.

    rows of `selections` → those of one size → top, middle, bottom of criteria, random → overrides

All choices have the same number of candidates, which is the budget: more layers train better, so
that a criterion has to say more than that. Candidates of one kind of module have the same number
of parameters, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from raykernel.analysis.predictors import PREDICTORS
from raykernel.study import Row
from raykernel.terms import Criterion

Setting = tuple[str, tuple[int | str, ...]]
"""A key of `parameters` and its value: what makes a LoRA one of a choice."""

CONTROLS = (Criterion.size, Criterion.num_parameters, Criterion.random)
"""What a criterion has to beat."""


def setting_of(row: Row) -> Setting:
    """How a choice is fine-tuned: by its transformer layers, or by the paths of its modules.

    Args:
        row: of the table `selections`.

    Returns:
        `layers_to_transform` of candidates that are layers of a LoRA, which has named its modules
        already; else `target_modules`.
    """
    select, parameters = json.loads(row["settings"]), json.loads(row["parameters"])
    is_lora = parameters["method"] == "lora" and not select["modules"]
    if select["candidates"] == "layer" and is_lora:
        return "layers_to_transform", tuple(row["layers"])
    return "target_modules", tuple(row["target_modules"])


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Choices of a study's selection by one kernel, of the largest size that is among them.

    Args:
        rows: of the tables of all arms.

    Returns:
        Those of the table `selections`, without the comparison with all candidates.
    """
    found = [row for row in rows if "candidates" in row and row["rank"] is not None]
    most = max((row["size"] for row in found), default=0)
    return [row for row in found if row["size"] == most and row["kind"] == found[0]["kind"]]


def score(row: Row, criterion: Criterion) -> float:
    """A criterion turned so that larger is better; -inf where there is none."""
    value = row.get(criterion.value)
    if value is None or math.isnan(value):
        return -math.inf
    return float(value) * PREDICTORS[criterion].expected.value


def pick(
    rows: Sequence[Row], criteria: Sequence[Criterion], *, places: int, number: int
) -> list[Row]:
    """Choices at evenly spaced places of every criterion's ranking, then random ones.

    Args:
        rows: choices.
        criteria: each ranks them.
        places: of a ranking: 3 are top, bottom and middle.
        number: choices to pick, if there are so many.

    Returns:
        Every criterion's first place first, then every one's last, then those between; filled up by
        the control `random`.
    """
    spaced = [round(i * (len(rows) - 1) / max(1, places - 1)) for i in range(places)]
    by_place = [spaced[0], spaced[-1], *spaced[1:-1]]
    orders = [
        sorted(range(len(rows)), key=lambda i, one=one: score(rows[i], one), reverse=True)  # type: ignore[misc]
        for one in criteria
        if len({row.get(one.value) for row in rows}) > 1
    ]
    found = [order[place] for place in by_place for order in orders]
    found += sorted(range(len(rows)), key=lambda i: score(rows[i], Criterion.random))
    return [rows[i] for i in list(dict.fromkeys(found))[:number]]


@dataclass(frozen=True, slots=True)
class Choices:
    """What a study's arm fine-tunes, see `raykernel.study.Arm.choose`."""

    number: int
    """Choices at the most."""
    places: int = 3
    """Of every criterion's ranking."""
    criteria: Sequence[Criterion] = tuple(PREDICTORS)
    equal: str | None = None
    """Column of `selections` that the kernels have alike: trace, or top, the largest eigenvalue."""

    def __call__(self, rows: Sequence[Row]) -> list[tuple[str, ...]]:
        """Overrides of each choice.

        The kernel of a LoRA grows with the square of lora_alpha, so that

            lora_alpha_S = lora_alpha · √(s / s_S),    s the geometric mean of all s_S

        makes s_S, the trace or the largest eigenvalue of choice S, that of all: what a learning
        rate is measured by is then the same, and what remains is the shape of the spectrum.

        Args:
            rows: of all arms before, of one data set.

        Returns:
            One tuple for each.
        """
        chosen = pick(ranked(rows), self.criteria, places=self.places, number=self.number)
        return [(*_layers(row), *self._scale(row, chosen)) for row in chosen]

    def _scale(self, row: Row, chosen: Sequence[Row]) -> list[str]:
        if self.equal is None:
            return []
        logs = [math.log(other[self.equal]) for other in chosen]
        own = float(json.loads(row["parameters"])["lora_alpha"])
        alpha = own * math.exp((sum(logs) / len(logs) - math.log(row[self.equal])) / 2)
        # Four digits: rounding of the kernel is no other trial.
        return [f"parameters.lora_alpha={alpha:.4g}"]


def _layers(row: Row) -> list[str]:
    key, values = setting_of(row)
    return [f"parameters.{key}=[{','.join(map(str, values))}]"]
