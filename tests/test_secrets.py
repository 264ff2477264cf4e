"""Secrets of the environment end in no file: configurations, rows, journals, reports, logs."""

from __future__ import annotations

import gzip

import pytest

from raykernel.cli import main
from raykernel.location import has_credentials
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


ADDRESSES = [
    "https://hf_hush0123@huggingface.co/org/name",
    "https://user:hush0123@host/org/name",
    "s3://KEY:hush0123@bucket/name",
    "S3://hush0123@bucket",
]


KEYS = ["store.path", "model.name", "task.train", "task.data_dir", "task.hub", "compute.address",
        "parameters.adapter", "task.text"]  # fmt: skip


@pytest.mark.parametrize(("key", "address"), list(zip(KEYS, ADDRESSES * 2, strict=True)))
def test_addresses_with_credentials_are_refused_unseen_and_unstored(here, capsys, key, address):
    """Before anything is written: not even the failure of a run keeps them."""
    value = f'["{address}"]' if key == "task.text" else f'"{address}"'
    more = ["parameters=peft"] if key == "parameters.adapter" else []
    before = sorted(here.rglob("*"))
    assert main(["kernel", *tiny.overrides("model"), *more, f"{key}={value}"]) == 2
    read = capsys.readouterr()
    assert "hush0123" not in read.out + read.err
    assert "with credentials" in read.err
    assert sorted(here.rglob("*")) == before


def test_a_study_does_not_store_them_either(here, model, capsys):
    (here / "sweeps").mkdir()
    (here / "sweeps" / "kept.py").write_text(STUDY)
    arguments = tiny.overrides(model, task__k="2", model__name=f'"{ADDRESSES[0]}"')
    assert main(["sweep", "kept", *arguments]) == 2
    read = capsys.readouterr()
    assert "hush0123" not in read.out + read.err
    assert not [path for path in here.rglob("*") if b"hush0123" in _content(path)]


def _content(path):
    return path.read_bytes() if path.is_file() else b""


@pytest.mark.parametrize("text", ["s3://hush0123@lab", "zip://a.zip::s3://KEY:hush0123@lab/x",
                                  "simplecache::s3://KEY:hush0123@lab/x"])  # fmt: skip
def test_stores_of_commands_are_refused_so_too(text: str, capsys):
    assert main(["verify", "--store", text]) == 2
    read = capsys.readouterr()
    assert "hush0123" not in read.out + read.err


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/lab", "abfs://container@account.dfs.core.windows.net/lab", "a@b.c", "/me@x/y",
     "See https://example.org/@name for more", "{review} http://x.y It was {label}"],
)  # fmt: skip
def test_what_looks_like_an_address_is_none(text: str):
    assert not has_credentials(text)
