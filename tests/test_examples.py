"""Every example runs, on a tiny model in place of a hub's."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest

from tests import tiny

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_there_is_no_other_example():
    assert [path.name for path in EXAMPLES.iterdir()] == ["csv_to_adapter.py"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_from_a_csv_to_a_peft_model(here, model, monkeypatch, capsys):
    table = tiny.write_reviews(here / "reviews.tsv", num=100).read_text("utf-8")
    with (here / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(line.split("\t") for line in table.splitlines())
    arguments = ["csv_to_adapter.py", "reviews.csv", "review", "rating", str(model)]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(EXAMPLES / "csv_to_adapter.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "Layers [" in printed
    # r = 8 on query and value of at most two layers of width 16: (16 + 16) r each.
    (line,) = [line for line in printed.splitlines() if line.startswith("trainable params:")]
    assert int(line.split()[2].replace(",", "").rstrip("|")) in {512, 1024}
