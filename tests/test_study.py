"""Tables of studies on hand-made rows, and the paper's numbers against each other."""

from __future__ import annotations

import math

from raykernel.published import published
from raykernel.study import Line, TaskTable, best_on_dev, dots, mean_std
from raykernel.sweep import load_study

BASE = "FacebookAI/roberta-base"


def row(
    task: str, seed: int, finetuned: float | bool | None, dev: float = 0.5, **more: object
) -> dict:
    known = {"arm": "SGD-FT", "task": task, "k": 16, "seed": seed, "prompt": "manual"}
    return known | {"model": BASE, "finetuned": finetuned, "dev": dev} | more


LINE = Line("SGD-FT", "SGD-FT", "finetuned")
CRITERIA = ("solves", "linearization", "fixed_features", "kernel_behavior")
EVERY_DOT = [row("sst2", 13, None, arm="SGD", **dict.fromkeys(CRITERIA, True))]


def test_mean_and_population_deviation_over_seeds():
    values = [0.8, 0.9, 1.0]
    deviation = math.sqrt((0.1**2 + 0.1**2) / 3)
    assert mean_std(values, scale=100, digits=1) == f"90.0 ({100 * deviation:.1f})" == "90.0 (8.2)"
    assert mean_std([0.25, None], scale=1, digits=2) == "0.25"
    assert mean_std([None], scale=1, digits=2) == "-"


def test_dots_tell_undefined_from_false():
    assert dots([True, False, None]) == "●○-"
    assert dots([]) == "-"


def test_dev_selects_the_first_of_the_best_and_never_looks_at_test():
    rows = [row("sst2", 13, 0.9, 0.6), row("sst2", 13, 0.1, 0.8), row("sst2", 13, 0.7, 0.8)]
    (best,) = best_on_dev(rows, ["task", "seed"])
    assert best["finetuned"] == 0.1


def test_a_table_has_a_line_per_method_and_a_column_per_task():
    rows = [row("sst2", 13, 0.8), row("sst2", 21, 0.9), row("mr", 13, 0.6, k=64)]
    (sheet,) = TaskTable([LINE], title="T", paper=2)(rows, compare=False)
    assert sheet.title == "T; 2 seeds, [n]: n of them"
    assert sheet.columns == ["k", "method", "sst2", "mr"]
    assert sheet.rows == [
        ["16", "SGD-FT", "85.0 (5.0)", "-"],
        ["64", "SGD-FT", "-", "60.0 [1]"],
    ]


def test_the_papers_number_stands_below_ours_in_the_same_setting_only():
    make = TaskTable([LINE], title="T", paper=2)
    ours = ["16", "SGD-FT", "raykernel", "80.0"]
    (sheet,) = make([row("sst2", 13, 0.8)], compare=True)
    assert sheet.rows == [ours, ["16", "SGD-FT", "paper", "89.0 (1.5)"]]
    for other in ({"model": "gpt2"}, {"prompt": "null"}, {"task": "file"}):
        (sheet,) = make([row("sst2", 13, 0.8) | other], compare=True)
        assert sheet.rows == [ours]


def test_a_note_on_the_papers_numbers_stands_where_they_do_and_once():
    make = TaskTable([LINE], title="T", paper=2, note="always", paper_note="if compared")
    rows = [row("sst2", 13, 0.8)]
    assert [s.note for s in make(rows, compare=True)] == ["always\nif compared"]
    assert [s.note for s in make(rows, compare=False)] == ["always"]
    assert [s.note for s in make([row("file", 13, 0.8)], compare=True)] == ["always"]
    many = make([row(f"t{n}", 13, 0.5) for n in range(9)], compare=True)
    assert [s.note for s in many] == ["", "always"]
    assert make([], compare=True) == []


def test_seeds_are_in_order_whatever_the_order_of_the_runs():
    rows = [row("sst2", seed, value) for seed, value in ((21, False), (13, True))]
    (sheet,) = TaskTable([LINE], title="T", cell=dots)(rows, compare=False)
    assert sheet.rows[0][-1] == "●○"


def test_many_tasks_are_cut_into_sheets():
    sheets = TaskTable([LINE], title="T")([row(f"t{n}", 13, 0.5) for n in range(9)], compare=False)
    assert [len(sheet.columns) - 2 for sheet in sheets] == [7, 2]


def test_the_papers_tables_agree_where_they_print_the_same_numbers():
    """Tables 7, 9 and 11 repeat numbers of Table 2, Table 5 those that are accuracies."""
    same = {"Kernel SGD": "K(SGD)"}
    two = {(n.where["k"], n.method, n.task): n.text for n in published(2)}
    compared = 0
    for number in [n for table in (7, 9, 11) for n in published(table)]:
        key = (number.where["k"], same.get(number.method, number.method), number.task)
        if number.where["prompt"] == "manual" and key in two:
            compared += 1
            assert number.text == two[key], number
    assert compared == 36 + 18 + 24
    fives = [n for n in published(5) if n.method == "FT" and n.task not in {"mrpc", "qqp"}]
    differ = [n for n in fives if n.text != two[n.where["k"], "Adam-FT", n.task]]
    assert [(n.where["k"], n.task) for n in differ] == [("64", "mpqa")]  # as printed


def test_every_table_is_complete_but_for_the_cell_that_is_not_legible():
    counts = {table: len(published(table)) for table in (1, 2, 5, 6, 7, 8, 9, 11)}
    assert counts == {1: 224, 2: 139, 5: 70, 6: 56, 7: 108, 8: 18, 9: 54, 11: 48}


def test_dots_of_table_1_are_four_and_contradict_each_other_nine_times():
    """A verdict is the conjunction of its criteria, but for nine in our source, as table1 says."""
    by = {(n.where["k"], *n.method.split(": "), n.task): n.text for n in published(1)}
    assert all(len(text) == 4 and set(text) <= {"●", "○"} for text in by.values())
    wrong = []
    for k, optimizer, criterion, task in by:
        if criterion == "Kernel behavior":
            names = ("eNTK solves task", "Linearization", "Fixed Features")
            given = zip(*(by[k, optimizer, name, task] for name in names), strict=True)
            verdict = "".join("●" if set(dots) == {"●"} else "○" for dots in given)
            if verdict != by[k, optimizer, criterion, task]:
                wrong.append((k, optimizer, task))
    assert len(wrong) == 9
    assert len([key for key in by if key[2] == "Kernel behavior"]) == 56
    (note,) = [s.note for s in load_study("table1").table(EVERY_DOT, compare=True)]
    assert "four of five seeds" in note
    assert "9 of the 56 verdicts" in note
