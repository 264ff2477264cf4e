"""The table of the condition number's study, on hand-made rows with known correlations."""

from __future__ import annotations

import json
import math

import pytest
import scipy.stats

from raykernel.compose import compose_runs
from raykernel.convergence import (
    TARGETS,
    ConvergenceTable,
    epochs_to,
    layer_choices,
    summed_layers,
    trained_layers,
)
from raykernel.store.groups import select_groups
from raykernel.study import Row, Sheet, Table

LAYERS = (0, 2, 5)
KAPPAS = [10.0, 40.0, 20.0, 90.0, 30.0, 70.0, 60.0]
SEEDS = (13, 21)
PROBLEM = {"task": "t", "k": 4}


def spectrum_row(layers: tuple[int, ...], kappa: float | None, seed: int = 13) -> Row:
    return PROBLEM | {
        "arm": "kernel",
        "seed": seed,
        "groups": [f"layer.{layer}" for layer in layers],
        "change": None,
        "layers": list(layers),
        "modules": ["query", "value"],
        "regularised": kappa,
        "centred_regularised": kappa and -kappa,
        "top_over_median": None if layers == (0,) else 1.0,
        "mean": 0.5 * len(layers),
        "num_rows": 20,
    }


def trial_row(layers: tuple[int, ...], losses: list[float], seed: int = 13) -> Row:
    start = {"train_loss": None, "dev_score": 0.0}
    chosen = {"layers_to_transform": list(layers), "target_modules": ["self.value", "query"]}
    return PROBLEM | {
        "arm": "training",
        "seed": seed,
        "parameters": json.dumps(chosen),
        "finetuned": losses[-1] / 10,
        "curve": [start, *({"train_loss": loss, "dev_score": 1 - loss} for loss in losses)],
    }


def made(kappas: list[float] = KAPPAS) -> list[Sheet]:
    """Losses that fall the slower, the larger κ is, and a test score with the wrong sign."""
    rows = []
    for seed in SEEDS:
        for layers, kappa in zip(layer_choices(LAYERS), kappas, strict=True):
            rows.append(spectrum_row(layers, kappa, seed))
            slow = kappa / 100
            rows.append(trial_row(layers, [1.0, 0.5 + slow / 2, slow], seed))
    return ConvergenceTable("kernel", "training")(rows, compare=False)


def test_the_subsets_are_all_seven_in_both_spellings():
    assert layer_choices(LAYERS) == [(0,), (2,), (5,), (0, 2), (0, 5), (2, 5), (0, 2, 5)]
    assert trained_layers((0, 5)) == "[0],[5],[0,5]"
    text = summed_layers((1, 11), [["query", "value"], ["key"]])
    (run,) = compose_runs("spectrum", [f"spectrum.sets={text}", "model.name=x"])
    names = [
        f"model.encoder.layer.{layer}.attention.self.{module}.lora_{x}.default"
        for layer in (1, 10, 11)
        for module in ("query", "key", "value", "not_query")
        for x in "AB"
    ]
    chosen = [select_groups(names, groups=one) for one in run.config.spectrum.sets]
    assert [len(one) for one in chosen] == [4, 4, 8, 2, 2, 4]
    assert {name.split(".")[6] for name in chosen[2]} == {"query", "value"}
    assert {name.split(".")[3] for name in chosen[2]} == {"1", "11"}


def test_epochs_to_a_loss_are_read_between_two_epochs():
    assert epochs_to([4.0, 2.0, 1.0], 1.0) == 3
    assert epochs_to([4.0, 2.0, 1.0], 3.0) == pytest.approx(1.5)
    assert epochs_to([4.0, 2.0], 5.0) == 1
    assert epochs_to([4.0, 4.5], 1.0) == math.inf


def test_correlations_are_those_of_the_points_in_every_sample():
    points, found = made()
    assert [row[2] for row in points.rows] == ["0", "2", "5", "0 2", "0 5", "2 5", "0 2 5"]
    assert points.rows[1][3] == f"{math.log10(40):.2f}"
    assert points.rows[3][4] == f"{math.log10(20):.2f}"  # the trace of two layers
    lines = {row[1]: dict(zip(found.columns, row, strict=True)) for row in found.rows}
    assert set(lines) == set(TARGETS)
    for name in ("final train loss", "mean train loss", "epochs to a loss"):
        assert lines[name]["sign"] == ">"
        assert lines[name]["ρ"] == "+1.00"
        assert lines[name]["p"] == "0.00 0.00"
    assert (lines["dev, last epoch"]["sign"], lines["dev, last epoch"]["ρ"]) == (
        "<",
        "-1.00",
    )
    assert lines["test, best on dev"]["ρ"] == "+1.00"
    assert lines["mean train loss"]["centred"] == "-1.00"
    assert lines["mean train loss"]["median"] == "-"  # the same of all that have one
    assert "4 of 5 mean correlations have the expected sign" in found.note
    assert "p ≤ 0.05 in 10 of 10 correlations, 8 of them" in found.note
    assert "7 points resolve little: nothing below |ρ| = 0.786" in found.note


def test_size_and_scale_are_held_fixed_and_single_layers_stand_alone():
    """κ that follows the number of layers says nothing more; by scipy's matrix of ρ."""
    kappas = [3.0, 1.0, 2.0, 6.0, 4.0, 5.0, 7.0]
    rows, losses = [], [0.3, 0.2, 0.1, 0.5, 0.6, 0.4, 0.7]
    for layers, kappa, loss in zip(layer_choices(LAYERS), kappas, losses, strict=True):
        rows += [spectrum_row(layers, kappa), trial_row(layers, [1.0, loss])]
    found = ConvergenceTable("kernel", "training")(rows, compare=False)[1]
    line = dict(zip(found.columns, found.rows[0], strict=True))
    sizes = [len(layers) for layers in layer_choices(LAYERS)]
    xy, xz, yz = (
        scipy.stats.spearmanr(a, b).statistic
        for a, b in ((kappas, losses), (kappas, sizes), (losses, sizes))
    )
    partial = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))  # trace is size here
    assert line["ρ"] == f"{xy:+.2f}"
    assert line["ρ | size, scale"] == f"{partial:+.2f}"
    assert line["single"] == "+0.50"
    assert line["trace"] == f"{yz:+.2f}"


def test_what_has_no_spectrum_is_counted_and_not_guessed():
    rows = [spectrum_row((0,), 3.0), spectrum_row((2,), None)]
    rows += [trial_row(layers, [1.0, 0.5]) for layers in ((0,), (2,), (5,))]
    points, found = ConvergenceTable("kernel", "training")(rows, compare=False)
    assert len(points.rows) == 1
    assert "2 trials left out" in points.note
    assert all(row[3] == "-" for row in found.rows)
    assert isinstance(ConvergenceTable("kernel", "training"), Table)
    assert "0 of 0 mean correlations" in found.note
    (empty,) = ConvergenceTable("kernel", "training")([], compare=False)
    assert empty.rows == []
