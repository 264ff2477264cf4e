"""Secrets of the environment end in no file: configurations, rows, journals, reports, logs."""

from __future__ import annotations

import gzip

import pytest

from raykernel.cli import main
from raykernel.store.blocks import Store
from raykernel.store.tables import TABLES
from tests import tiny

NAMES = [
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD",
    "RAY_AUTH_TOKEN", "WANDB_API_KEY",
]  # fmt: skip
STUDY = """
from raykernel.paper import KERNEL
from raykernel.study import Arm, Line, Study, TaskTable
from raykernel.terms import Command

study = Study(
    question="Is a secret kept?",
    base={},
    space={"task.seed": "7"},
    arms=[KERNEL, Arm("SGD-FT", Command.finetune, {"training": "sgd"})],
    table=TaskTable([Line("kernel", KERNEL.name, "kernel_regression"),
                     Line("SGD-FT", "SGD-FT", "finetuned")], title="Accuracy (%)", by=[]),
)
"""


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A value that occurs nowhere else for every name."""
    values = {name: f"leaked-{number}-8c1f2a" for number, name in enumerate(NAMES)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return list(values.values())


def test_no_file_of_a_run_a_study_a_failure_or_a_report_has_a_secret(secrets, model, here, capsys):
    (here / "sweeps").mkdir()
    (here / "sweeps" / "kept.py").write_text(STUDY)
    arguments = tiny.overrides(model, task__k="2")
    training = {"training.steps": "2", "training.eval_every": "1", "training.batch_size": "2"}
    study = [*arguments, *(f"{key}={value}" for key, value in training.items())]
    assert main(["kernel", *arguments]) == 0
    assert main(["sweep", "kept", *study, "sweep.trackers=[tensorboard]"]) == 0
    assert main(["sweep", "kept", *study, "task.k=50"]) == 1  # the table of runs keeps its error
    assert main(["report", "--store", "store", "--out", "report"]) == 0
    rows = {name: Store("store").results(name).to_pylist() for name in TABLES}
    assert {row["status"] for row in rows["runs"]} == {"ok", "failed"}
    files = [path for path in here.rglob("*") if path.is_file()]
    assert len(files) > 20
    # Compressed columns show nothing as bytes, so rows are read, too.
    read = capsys.readouterr()
    texts = [path.read_bytes() for path in files] + [repr(rows).encode(), repr(read).encode()]
    texts += [gzip.decompress(text) for text in texts if text[:2] == b"\x1f\x8b"]
    for secret in secrets:
        assert not [text for text in texts if secret.encode() in text]
