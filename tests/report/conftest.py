"""One store for all tests of the report: a study along λ, spectra, a ranking, a verdict, and rows
with names that a page must not take for its own language."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from raykernel.cli import main
from raykernel.report.write import report
from raykernel.store.blocks import Store
from tests import tiny

NASTY = '<script>document.title = "taken"</script> & "$x^$" </svg><img src=x onerror=alert(1)>'
SETS = r"spectrum.sets=[['layer.0.'],['layer.1.'],['layer.0.','layer.1.']]"
STUDY = """
from raykernel.lambda_table import LambdaTable
from raykernel.study import Arm, Study
from raykernel.terms import Command

study = Study(
    question="Is <b>f</b> nearer to its linear model, the stronger it is pulled?",
    base={base!r},
    space={{"task.seed": "13,21", "regularization.lam": "10,0"}},
    arms=[Arm("twins", Command.finetune, {{"training": "sgd"}})],
    table=LambdaTable(),
)
"""


@dataclass(frozen=True)
class Made:
    """A working folder with a store, and the reports of it."""

    folder: Path
    whole: Path
    """Page of the whole store."""
    study: Path
    """Page of the study `pull`."""

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")


def settings(model: Path, **changes: str) -> dict[str, str]:
    """The smallest run that has all: 6 train, 6 dev and 6 test examples."""
    own = {"task.test_limit": "6", "training.steps": "4", "training.eval_every": "2"} | changes
    return dict(line.split("=", 1) for line in tiny.overrides(model, **own))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The reports of one store with rows in every table; one for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "report"
    with FileLock(f"{folder}.lock"):
        if not (folder / "filled").exists():
            folder.mkdir()
            fill(folder)
            (folder / "filled").touch()
    pages = (folder / name / "index.html" for name in ("whole", "pull"))
    return Made(folder, *pages)


def fill(folder: Path) -> None:
    """Run the commands, and write both reports."""
    before = Path.cwd()
    model = tiny.save_masked_lm(folder / "model", num_hidden_layers=2)
    tiny.write_reviews(folder / "reviews.tsv")
    (folder / "sweeps").mkdir()
    base = settings(model) | {
        "training.learning_rate": "0.01", "training.batch_size": "6", "training.loss": "squared",
        "training.max_grad_norm": "null", "training.schedule": "constant",
        "training.dropout": "false", "training.twin": "true", "training.keep_weights": "false",
        "regularization": "coupled",
    }  # fmt: skip
    (folder / "sweeps" / "pull.py").write_text(STUDY.format(base=base), encoding="utf-8")
    os.chdir(folder)
    try:
        own = [f"{key}={value}" for key, value in settings(model).items()]
        assert main(["sweep", "pull"]) == 0
        assert main(["spectrum", *own, SETS]) == 0
        assert main(["kernel", *own]) == 0
        assert main(["select", *own, "select.candidates=module", "select.max_size=2"]) == 0
        assert main(["behavior", *own, "training.learning_rate=0.05"]) == 0
        write_nasty(Store("store"))
        report("store", Path("whole"), made_by="raykernel 0")
        report("store", Path("pull"), study="pull", made_by="raykernel 0")
    finally:
        os.chdir(before)


def write_nasty(store: Store) -> None:
    """A kernel regression and a fine-tuning run of a task with such a name."""
    shared = {
        "task": NASTY, "model": "<i>m</i>", "prompt": "manual", "k": 3, "seed": 13,
        "metric": "accuracy", "zero_shot": 0.5, "dev": 0.75, "seconds": 2.0,
        "peak_memory_bytes": 2**30, "overrides": ["training.token=hf_secret"],
    }  # fmt: skip
    store.write_result(
        "kernels",
        shared | {"fingerprint": "f" * 16, "kind": "sgd", "solver": "{}", "kernel_regression": 0.8},
    )
    store.write_result(
        "trials",
        shared | {"trial": "t" * 16, "method": "full", "optimizer": "sgd", "finetuned": 0.7,
                  "lam": 0.0, "training": "{}", "parameters": "{}"},
    )  # fmt: skip
