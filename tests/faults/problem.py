"""A kernel of 26 small blocks and a study of 24 short runs, for tests that kill them."""

from __future__ import annotations

from pathlib import Path

from tests import tiny

NUM_BLOCKS, NUM_PREDICTIONS = 26, 15
"""Files of the kernel."""
NUM_TRIALS = 24
"""Runs of the study."""

KERNEL = [
    *("kernel", "task=file", "task.train=reviews.tsv", "task.text=[review]", "task.label=rating"),
    *("task.k=8", "task.test_limit=60", "model=hf", "model.name=tiny"),
    'prompt.template="{review} It was {label}."',
    *("prompt.words={negative: terrible, positive: great}", "kernel.block_size=4"),
]
RATES = ",".join(f"{n}e-3" for n in range(1, 13))


def prepare(folder: Path, *, hidden_size: int = 64, num_hidden_layers: int = 4) -> None:
    """Write model, data and study into a folder for commands to run in."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.save_masked_lm(
        folder / "tiny", hidden_size=hidden_size, num_hidden_layers=num_hidden_layers
    )
    tiny.write_reviews(folder / "reviews.tsv", num=200)
    (folder / "sweeps").mkdir()
    (folder / "sweeps" / "rates.py").write_text(tiny.study(RATES, steps=3), encoding="utf-8")
