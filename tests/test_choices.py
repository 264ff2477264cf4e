"""Choices of layers in studies: what is picked, at which scale, and its table, on made rows."""

from __future__ import annotations

import json
import math

import pytest

from raykernel.choice_table import ChoiceTable
from raykernel.choices import Choices, pick, ranked, setting_of
from raykernel.study import Row, Sheet, Table
from raykernel.terms import Criterion

PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
KAPPAS = [10.0, 40.0, 20.0, 90.0, 30.0, 70.0]
TRACES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
SEEDS = (13, 21)
PROBLEM = {"task": "t", "k": 4}
SELECT = {"candidates": "layer", "modules": []}
LORA = {"method": "lora", "lora_alpha": 16.0, "target_modules": ["query"]}


def chosen(layers: tuple[int, ...], *, kappa: float, trace: float, seed: int = 13) -> Row:
    """A row of the table `selections`."""
    return PROBLEM | {
        "arm": "selection",
        "kind": "sgd",
        "seed": seed,
        "rank": 1,
        "size": len(layers),
        "num_parameters": 100 * len(layers),
        "candidates": [str(layer) for layer in layers],
        "layers": list(layers),
        "target_modules": [f"layer.{layer}.query" for layer in layers],
        "settings": json.dumps(SELECT),
        "parameters": json.dumps(LORA),
        "regularised": kappa,
        "effective_rank": 3.0,
        "trace": trace,
        "top": 2 * trace,
        "loo_error": None,
        "random": math.sin(trace),
    }


def trial(layers: tuple[int, ...], *, accuracy: float, loss: float, seed: int = 13) -> Row:
    """A row of the table `trials` with its curve."""
    start = {"train_loss": None, "dev_loss": 9.0}
    parameters = LORA | {"layers_to_transform": list(layers)}
    return PROBLEM | {
        "arm": "LoRA",
        "seed": seed,
        "parameters": json.dumps(parameters),
        "finetuned": accuracy,
        "curve": [start, {"train_loss": loss, "dev_loss": -loss}],
    }


def selection(seed: int = 13) -> list[Row]:
    given = zip(PAIRS, KAPPAS, TRACES, strict=True)
    rows = [chosen(pair, kappa=kappa, trace=trace, seed=seed) for pair, kappa, trace in given]
    single = chosen((0,), kappa=1.0, trace=0.5, seed=seed)
    every = chosen((0, 1, 2, 3), kappa=1.0, trace=63.0, seed=seed) | {"rank": None}
    return [single, *rows, every]


def made(*, seeds: tuple[int, ...] = SEEDS, criteria: tuple[Criterion, ...]) -> list[Sheet]:
    """Accuracy falls with κ, as theory says; train loss rises with the trace, as it does not."""
    rows: list[Row] = []
    for seed in seeds:
        rows += selection(seed)
        for pair, kappa, trace in zip(PAIRS, KAPPAS, TRACES, strict=True):
            rows.append(trial(pair, accuracy=1 - kappa / 100, loss=trace / 100, seed=seed))
    table = ChoiceTable("selection", ("LoRA",), criteria=criteria, next_step="Next: this.")
    assert isinstance(table, Table)
    return table(rows, compare=False)


# ---------------------------------------------------------------- what is picked


def test_a_choice_is_fine_tuned_by_its_layers_or_by_the_paths_of_its_modules():
    row = chosen((0, 5), kappa=1.0, trace=1.0)
    assert setting_of(row) == ("layers_to_transform", (0, 5))
    paths = ("target_modules", ("layer.0.query", "layer.5.query"))
    for settings in (SELECT | {"candidates": "module"}, SELECT | {"modules": ["query"]}):
        assert setting_of(row | {"settings": json.dumps(settings)}) == paths
    assert setting_of(row | {"parameters": json.dumps(LORA | {"method": "full"})}) == paths


def test_choices_have_one_size_and_one_kernel():
    rows = selection()
    other = [row | {"kind": "signgd"} for row in rows]
    trained = [trial((0, 1), accuracy=1.0, loss=1.0)]
    assert [row["layers"] for row in ranked([*rows, *other, *trained])] == list(map(list, PAIRS))
    assert ranked(trained) == []


def test_top_bottom_and_middle_of_every_criterion_are_picked_then_random_ones():
    rows = ranked(selection())
    kappa = (Criterion.regularised,)
    assert [row["regularised"] for row in pick(rows, kappa, places=3, number=3)] == [10, 90, 30]
    assert [row["regularised"] for row in pick(rows, kappa, places=6, number=6)] == [
        *(10, 90, 20, 30, 40, 70)
    ]
    both = pick(rows, (Criterion.regularised, Criterion.trace), places=2, number=4)
    assert [row["trace"] for row in both] == [
        1,
        32,
        8,
        TRACES[KAPPAS.index(both[3]["regularised"])],
    ]
    filled = pick(rows, kappa, places=2, number=6)
    assert sorted(row["trace"] for row in filled) == TRACES
    draws = [row["random"] for row in filled[2:]]
    assert draws == sorted(draws)
    # A criterion that has one value for all picks nothing; one that some lack ranks these last.
    assert pick(rows, (Criterion.size, Criterion.effective_rank), places=3, number=6) == sorted(
        rows, key=lambda row: row["random"]
    )
    lacking = [row | {"regularised": None if row["trace"] == 1 else 5.0} for row in rows]
    assert pick(lacking, kappa, places=2, number=2)[1]["trace"] == 1
    assert pick(rows[:1], kappa, places=3, number=9) == rows[:1]


@pytest.mark.parametrize("column", ["trace", "top"])
def test_at_equal_scale_every_kernel_has_the_geometric_mean(column):
    """A LoRA's kernel is lora_alpha² times one of lora_alpha = 1."""
    rows = selection()
    choose = Choices(6, criteria=(Criterion.regularised,), equal=column)
    scale_by_layers = {tuple(row["layers"]): row[column] for row in rows}
    mean = math.exp(sum(math.log(scale_by_layers[pair]) for pair in PAIRS) / len(PAIRS))
    found = {}
    for layers, alpha in choose(rows):
        pair = tuple(json.loads(layers.removeprefix("parameters.layers_to_transform=")))
        found[pair] = float(alpha.removeprefix("parameters.lora_alpha="))
    assert set(found) == set(PAIRS)
    for pair, alpha in found.items():
        assert scale_by_layers[pair] * (alpha / 16) ** 2 == pytest.approx(mean, rel=2e-3)
    assert Choices(1)(rows) == [Choices(6)(rows)[0]]


# ---------------------------------------------------------------- the table


def test_choices_stand_in_the_order_of_the_first_criterion_with_their_means():
    sheet = made(criteria=(Criterion.regularised,))[0]
    assert sheet.columns == [
        "layers",
        "κ↓",
        "effective rank↑",
        "trace↑",
        "accuracy (%)",
        "train loss",
    ]
    assert [row[1] for row in sheet.rows] == ["10", "20", "30", "40", "70", "90"]
    assert sheet.rows[0] == ["0 1", "10", "3", "1", "90.0", "0.010"]


def test_correlations_and_regrets_are_those_of_the_rows():
    (_, sheet) = made(criteria=(Criterion.regularised, Criterion.trace))
    lines = {row[0]: row[1:] for row in sheet.rows}
    assert sheet.columns[1:5] == ["accuracy ρ", "p", "|trace", "dev loss ρ"]
    # Both orders of six points that are as extreme, of 720, in both samples alike.
    assert lines["κ↓"][:3] == ["+1.00", "0.003", "+1.00"]
    assert lines["κ↓"][-1] == "0.0"
    assert lines["trace↑"][3:] == ["+1.00", "0.003", "-", "-1.00", "0.003", "-", "60.0"]
    assert lines["another sample"][::3] == ["+1.00", "+1.00", "+1.00", "0.0"]
    assert lines["chance"] == [*["-"] * 9, f"{sum(KAPPAS) / 6 - 10:.1f}"]
    assert set(lines) == {"κ↓", "trace↑", "another sample", "chance"}
    assert "p ≤ 0.05 in 3 of 6 correlations, 2 of them as theory expects" in sheet.note
    assert "κ↓ with accuracy (+1.00)" in sheet.note
    assert sheet.note.endswith("Next: this.")


def test_samples_whose_choices_differ_are_tested_apart_and_one_has_no_ceiling():
    rows = [row for row in selection(13) if row["layers"] != [0, 1]] + selection(21)
    for seed in SEEDS:
        for pair, kappa in zip(PAIRS, KAPPAS, strict=True):
            rows.append(trial(pair, accuracy=1 - kappa / 100, loss=kappa, seed=seed))
    criteria = (Criterion.regularised, Criterion.random)
    (_, sheet) = ChoiceTable("selection", ("LoRA",), criteria=criteria)(rows, compare=False)
    assert sheet.rows[0][1:3] == ["+1.00", "0.000"]
    (_, alone) = made(seeds=(13,), criteria=criteria)
    assert [row[0] for row in alone.rows] == ["κ↓", "random", "chance"]
    assert "1 of 3 correlations" in alone.note  # the control is no question


def test_criteria_that_are_the_same_for_all_or_unknown_are_left_out():
    criteria = (Criterion.size, Criterion.effective_rank, Criterion.loo_error, Criterion.importance)
    (_, sheet) = made(criteria=criteria)
    assert [row[0] for row in sheet.rows] == ["another sample", "chance"]
    (empty,) = ChoiceTable("selection", ("LoRA",))([], compare=False)
    assert empty.rows == []
