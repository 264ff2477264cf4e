"""The table along λ on hand-made rows, and the slides' own numbers."""

from __future__ import annotations

import pytest
import scipy.stats

from raykernel.lambda_table import QUANTITIES, LambdaTable
from raykernel.published import slides


def row(lam: float, seed: int = 13, *, task: str = "sst2", **values: float) -> dict:
    known = {column.column: 0.5 for column in QUANTITIES}
    return (
        {"arm": "twins", "split": "test", "task": task, "lam": lam, "seed": seed} | known | values
    )


def test_a_line_per_lambda_with_mean_and_deviation_over_seeds():
    rows = [
        row(0.0, deviation=2.0), row(50.0, deviation=1.0), row(50.0, 21, deviation=3.0),
        row(50.0) | {"split": "train", "deviation": 99.0},
    ]  # fmt: skip
    (sheet,) = LambdaTable()(rows, compare=False)
    assert sheet.columns == ["λ", *(column.label for column in QUANTITIES)]
    assert [line[:2] for line in sheet.rows] == [["50", "2.000 (1.000)"], ["0", "2.000"]]
    assert sheet.rows[0][6] == "50.0 (0.0)"  # a percentage


def test_the_sentence_tells_what_falls_with_lambda_and_what_does_not():
    lams, distances = [50, 1, 0.1, 0], [0.1, 0.3, 0.2, 0.4]
    rows = [
        row(lam, deviation=1.0 + i, distance_a=distances[i], kl_a=0.1 * i, kl_b=0.1 * i,
            distance_b=0.1 * i)
        for i, lam in enumerate(lams)
    ]  # fmt: skip
    (sheet,) = LambdaTable()(rows, compare=False)
    assert "the deviation falls at every step to a larger λ" in sheet.note
    assert "Columns that do not: ‖f - f̄_A‖, f (%), f̄_A (%), f̄_B (%)." in sheet.note
    rho = scipy.stats.spearmanr(lams, distances).statistic
    assert f"‖f - f̄_A‖ {rho:.2f}" in sheet.note
    assert "‖θ - θ_0‖ -1.00" in sheet.note
    assert "f (%) -" in sheet.note  # constant
    (sheet,) = LambdaTable()([row(1), row(0, deviation=0.1)], compare=False)
    assert "the deviation does not fall" in sheet.note


def test_the_slides_stand_beside_in_their_own_tasks_only():
    rows = [row(50.0), row(50.0, task="file"), row(3.0), row(3.0, task="file")]
    known, other = LambdaTable()(rows, compare=True)
    assert known.rows[0][-4:] == ["0.292", "1.712", "0.320", "89.3"]
    assert known.rows[1][-4:] == ["-"] * 4
    assert "another setting" in known.note
    assert len(other.columns) == 1 + len(QUANTITIES)
    assert "another setting" not in other.note
    (alone,) = LambdaTable()([row(50.0)], compare=False)
    assert len(alone.columns) == 1 + len(QUANTITIES)


@pytest.mark.parametrize(("task", "rho"), [("cola", [-1.0, -0.74]), ("sst2", [-1.0, -0.76])])
def test_only_the_slides_deviation_falls_at_every_step(task, rho):
    """Their distances have bumps, whatever the captions say."""
    lines = slides(task)
    assert list(lines) == [50, 10, 5, 2, 1, 0.5, 0.1, 0]
    for column, expected in zip(("deviation", "distance"), rho, strict=True):
        values = [float(line[column]) for line in lines.values()]
        assert scipy.stats.spearmanr(list(lines), values).statistic == pytest.approx(
            expected, abs=6e-3
        )
        assert (values == sorted(values)) == (column == "deviation")
