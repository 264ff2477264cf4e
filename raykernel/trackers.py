"""What runs of a study found, in trackers that people already look at.

    Ended → its rows and its curve → TensorBoard | MLflow | Weights & Biases

The store has all of it; a tracker is a view. Each run is told of once, by the driver, when it has
ended: a study that goes on repeats none.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from raykernel.errors import InputError
from raykernel.location import StorePath
from raykernel.runs import Ended
from raykernel.study import Row
from raykernel.terms import RunStatus, TrackerName

_CURVE = ("train_loss", "dev_loss", "dev_score", "learning_rate", "gradient_norm", "distance")
"""Columns of a curve."""


@runtime_checkable
class Tracker(Protocol):
    """Keeps runs somewhere else than in the store."""

    def heard(self, ended: Ended, rows: Sequence[Row]) -> None:
        """Keep a run.

        Args:
            ended: how it ended.
            rows: its rows in the result tables; none of a failure.
        """


class TensorBoardTracker:
    """Event files: `tensorboard --logdir STORE/trackers/tensorboard` shows them.

    Args:
        folder: of all studies.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"

    def heard(self, ended: Ended, rows: Sequence[Row]) -> None:
        """See `Tracker.heard`."""
        from tensorboardX import SummaryWriter  # comes with Ray Tune

        run = ended.run
        folder = self._folder / run.study / f"{run.point.arm}-{run.id}".replace("/", "-")
        with SummaryWriter(str(folder)) as writer:
            writer.add_text("run", run.point.text)
            for step, values in curve_of(rows):
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
            for name, value in numbers_of(rows).items():
                writer.add_scalar(f"result/{name}", value, 0)


class MLflowTracker:
    """An experiment of MLflow per study, at MLFLOW_TRACKING_URI or else in the store.

    Args:
        folder: where, if the variable is not set.

    Raises:
        InputError: if MLflow is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise _missing(TrackerName.mlflow) from error
        # Its own choice without a server is files, too, of which it warns that they are slow.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").resolve().as_uri()
        with _quiet():
            self._client: Any = MlflowClient(tracking_uri=uri)

    def heard(self, ended: Ended, rows: Sequence[Row]) -> None:
        """See `Tracker.heard`."""
        from mlflow.entities import Metric, Param

        run, client = ended.run, self._client
        with _quiet():
            found = client.get_experiment_by_name(run.study)
            experiment = found.experiment_id if found else client.create_experiment(run.study)
            tags = {"raykernel.run": run.id, "raykernel.arm": run.point.arm}
            kept = client.create_run(experiment, tags=tags, run_name=run.point.text).info.run_id
            metrics = [
                Metric(name, value, 0, step)
                for step, values in [*curve_of(rows), (0, numbers_of(rows))]
                for name, value in values.items()
            ]
            chosen = (text.split("=", 1) for text in (*run.point.cell, *run.point.own))
            params = [Param(key, value) for key, value in chosen]
            client.log_batch(kept, metrics=metrics, params=params)
            client.set_terminated(kept, "FINISHED" if rows else "FAILED")


class WandbTracker:
    """A project of Weights & Biases per study; its own variables say where and whether online.

    Args:
        folder: for its files.

    Raises:
        InputError: if it is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing(TrackerName.wandb) from error
        self._wandb: Any = wandb
        self._folder = folder / "wandb"

    def heard(self, ended: Ended, rows: Sequence[Row]) -> None:
        """See `Tracker.heard`."""
        run = ended.run
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = self._wandb.init(
            project=run.study,
            name=run.point.text,
            id=run.id,
            group=run.point.arm,
            config=dict(text.split("=", 1) for text in (*run.point.cell, *run.point.own)),
            dir=str(self._folder),
            resume="allow",  # of a failure that is tried again
            reinit="finish_previous",
            settings=self._wandb.Settings(silent=True, console="off"),
        )
        for step, values in curve_of(rows):
            kept.log(values, step=step)
        kept.summary.update(numbers_of(rows))
        kept.finish(exit_code=0 if rows else 1)


_TRACKERS: dict[TrackerName, Callable[[Path], Tracker]] = {
    TrackerName.tensorboard: TensorBoardTracker,
    TrackerName.mlflow: MLflowTracker,
    TrackerName.wandb: WandbTracker,
}


def open_trackers(names: Sequence[TrackerName], store: StorePath) -> list[Tracker]:
    """The trackers that a configuration names.

    Args:
        names: which.
        store: folder of the store, where they keep what they keep in files; beside an object
            store, that is `./raykernel-trackers`, for their programs read folders.

    Returns:
        The trackers.
    """
    here = store / "trackers" if isinstance(store, Path) else Path("raykernel-trackers").absolute()
    return [_TRACKERS[name](here) for name in names]


def curve_of(rows: Sequence[Row]) -> Iterator[tuple[int, dict[str, float]]]:
    """Evaluations of a run that trained.

    Args:
        rows: its rows; that of a trial has its curve beside.

    Yields:
        Step, and value by name.
    """
    for point in (point for row in rows for point in row.get("curve", [])):
        yield point["step"], _finite({name: point[name] for name in _CURVE})


def numbers_of(rows: Sequence[Row]) -> dict[str, float]:
    """Numbers of a run's first row, by column."""
    first = rows[0] if rows else {}
    return _finite({name: value for name, value in first.items() if not isinstance(value, bool)})


def tells(ended: Ended) -> bool:
    """Whether trackers are told of a run: it ended now, and not for want of input."""
    return not ended.was_stored and ended.status is not RunStatus.stopped


def _finite(values: Mapping[str, object]) -> dict[str, float]:
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def _missing(name: TrackerName) -> InputError:
    return InputError(
        f"sweep.trackers: found {name.value}, which is not installed. Expected its package: pip "
        f"install 'raykernel[{name.value}]'."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracker's own warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
