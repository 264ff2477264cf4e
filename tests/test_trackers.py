"""TensorBoard, MLflow and Weights & Biases have the store's numbers, each run once."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from raykernel.cli import main
from raykernel.store.blocks import Store
from raykernel.study import Row
from tests import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder in which a study of three runs, one of which fails, has told all trackers."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        (folder / "tiny").symlink_to(model)
        (folder / "sweeps").mkdir()
        (folder / "sweeps" / "rates.py").write_text(tiny.study("1,2", steps=2), encoding="utf-8")
        tiny.write_reviews(folder / "reviews.tsv")
        tell = "sweep.trackers=[tensorboard,mlflow,wandb]"
        rates = "training.learning_rate=1,2,1e30"
        assert main(["sweep", "rates", "task.seed=13", tell, rates]) == 1
        assert main(["sweep", "rates", "task.seed=13", tell, rates]) == 1  # tells nothing again
    return folder


def trials(place: Path) -> dict[str, Row]:
    """Rows of trials by the name of their run."""
    store = Store(place / "store")
    runs = [row for row in store.results("runs").to_pylist() if row["status"] == "ok"]
    found = {row["trial"]: row for row in store.results("trials").to_pylist()}
    return {
        row["run"]: next(one for t, one in found.items() if t in row["results"]) for row in runs
    }


def test_mlflow_has_curves_and_results(place):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(place / "store/trackers/mlflow").resolve().as_uri())
    experiment = client.get_experiment_by_name("rates")
    kept = {
        run.data.tags["raykernel.run"]: run
        for run in client.search_runs([experiment.experiment_id])
    }
    assert len(kept) == 3
    assert sorted(run.info.status for run in kept.values()) == ["FAILED", "FINISHED", "FINISHED"]
    for name, row in trials(place).items():
        assert kept[name].data.metrics["finetuned"] == row["finetuned"]
        assert float(kept[name].data.params["training.learning_rate"]) == row["learning_rate"]
        history = client.get_metric_history(kept[name].info.run_id, "dev_loss")
        curve = Store(place / "store").rows("curves", trial=row["trial"])
        assert [(one.step, one.value) for one in history] == [
            (p["step"], p["dev_loss"]) for p in curve
        ]


def test_tensorboard_has_curves(place):
    from tensorboardX.proto.event_pb2 import Event

    root = place / "store/trackers/tensorboard/rates"
    assert len(list(root.iterdir())) == 3
    for name, row in trials(place).items():
        (file,) = (root / f"SGD-{name}").iterdir()
        content, at, found = file.read_bytes(), 0, {}
        while at < len(content):  # length, its checksum, event, its checksum
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += length + 16
            found |= {(one.tag, event.step): one.simple_value for one in event.summary.value}
        for point in Store(place / "store").rows("curves", trial=row["trial"]):
            assert found["dev_loss", point["step"]] == pytest.approx(point["dev_loss"], rel=1e-6)


def test_wandb_has_a_run_each(place):
    kept = {
        path.name[-16:] for path in (place / "store/trackers/wandb/wandb").glob("offline-run-*")
    }
    assert len(kept) == 3
    assert kept > set(trials(place))


def test_a_tracker_that_fails_stops_no_run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    rate = "training.learning_rate=3"
    assert main(["sweep", "rates", "task.seed=13", "sweep.trackers=[mlflow]", rate]) == 0
    printed = capsys.readouterr()
    assert "Note: MLflowTracker: " in printed.err
    assert "1 of 1 runs are complete" in printed.out


def test_an_unknown_tracker_is_refused(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["sweep", "rates", "sweep.trackers=[mlfow]"]) == 2
    assert "mlfow" in capsys.readouterr().err
