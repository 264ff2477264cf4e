"""A model is loaded once per process, and its next worker finds it as it was loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import weakref
from pathlib import Path

import numpy as np
import pytest

from raykernel.compute import kept
from raykernel.compute.executor import Executor, InlineExecutor
from raykernel.compute.predictor import PredictionSpec
from raykernel.compute.worker import Worker, WorkerSpec
from raykernel.config import ComputeConfig, GridPoint, ModelConfig
from raykernel.errors import InputError
from raykernel.store.predictions import Solution, read_predictions
from raykernel.terms import Precision, Solver
from tests.compute.test_worker import files
from tests.compute.tiny_problem import handle_of, make_spec, save_model

GROUPS = ("roberta.encoder.layer.0.output.dense", "roberta.encoder.layer.1.output.dense")


class Thing:
    """Something that can be seen to be gone."""


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    kept.forget()


def test_the_next_owner_has_what_the_last_one_left() -> None:
    first, second = Thing(), Thing()
    thing = kept.take_over(first, "a", Thing)
    assert kept.take_over(second, "a", Thing) is not thing, "two living owners share nothing"
    del second, first
    third = Thing()
    assert kept.take_over(third, "a", Thing) is thing


def test_what_nobody_takes_over_is_gone_before_anything_is_made() -> None:
    first, second = Thing(), Thing()
    thing = weakref.ref(kept.take_over(first, "a", Thing))
    del first
    assert thing() is not None

    def make() -> Thing:
        assert thing() is None
        return Thing()

    other = weakref.ref(kept.take_over(second, "b", make))
    del second
    assert other() is not None
    kept.forget()
    assert other() is None


# ------------------------------------------------------------------ models


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    return save_model(tmp_path / "model")


def without_the_model(model: ModelConfig) -> contextlib.AbstractContextManager[None]:
    """Its files are away, so that nobody can load it."""

    @contextlib.contextmanager
    def away():
        path = Path(model.name)
        path.rename(path.with_name("away"))
        yield
        path.with_name("away").rename(path)

    return away()


def complete(executor: Executor, spec: WorkerSpec) -> set[int]:
    """Compute all blocks; the processes that did."""
    return {o.value().process for o in executor.run(spec.blocks, handle_of(spec).missing())}


def predict(executor: Executor, spec: WorkerSpec) -> tuple[set[int], bytes]:
    """Predict test along some layers only; the processes that did, and the numbers."""
    alpha = np.random.default_rng(0).standard_normal((6, 2))
    solution = Solution("sgd", GROUPS, GridPoint(Solver.ridge, 0.1, math.inf))
    handle = handle_of(spec)
    jobs = handle.grid.row_indices(handle.grid.test)
    make = PredictionSpec(spec, solution, alpha).row_blocks
    pids = {outcome.value().process for outcome in executor.run(make, jobs)}
    return pids, read_predictions(handle, solution, handle.grid.test).tobytes()


def assert_one_model_serves_all(executor: Executor, folder: Path, model: ModelConfig) -> bytes:
    """Blocks, predictions, which choose parameters, and blocks again; the predictions."""
    one, two = (make_spec(folder / name, model) for name in ("one", "two"))
    pids = complete(executor, one)
    assert len(pids) == 1
    with without_the_model(model):
        predicted_by, found = predict(executor, one)
        assert predicted_by == complete(executor, two) == pids
    assert files(two) == files(one)
    return found


def test_inline_loads_a_model_once(tmp_path: Path, model: ModelConfig) -> None:
    executor = InlineExecutor()
    found = assert_one_model_serves_all(executor, tmp_path, model)
    executor.close()
    with without_the_model(model), pytest.raises(InputError, match=r"model\.name"):
        predict(executor, make_spec(tmp_path / "three", model))
    assert predict(executor, make_spec(tmp_path / "three", model))[1] == found


@pytest.mark.ray
def test_an_actor_loads_a_model_once_and_predicts_what_a_new_process_does(
    ray_instance: None, ray_compute: ComputeConfig, tmp_path: Path, model: ModelConfig
) -> None:
    from raykernel.compute.ray_executor import RayExecutor

    compute = dataclasses.replace(ray_compute, workers=1)
    with contextlib.closing(RayExecutor(compute)) as executor:
        found = assert_one_model_serves_all(executor, tmp_path, model)
    with contextlib.closing(RayExecutor(compute)) as executor:
        spec = make_spec(tmp_path / "three", model)
        pids, fresh = predict(executor, spec)
        assert pids.isdisjoint({os.getpid()})
        assert fresh == found


def test_another_problem_is_loaded(tmp_path: Path, model: ModelConfig) -> None:
    executor = InlineExecutor()
    complete(executor, make_spec(tmp_path / "one", model))
    other = make_spec(tmp_path / "two", model, precision=Precision.float64)
    with without_the_model(model), pytest.raises(InputError, match=r"model\.name"):
        complete(executor, other)


def test_two_living_workers_share_no_module(tmp_path: Path, model: ModelConfig) -> None:
    spec = make_spec(tmp_path / "store", model)
    one, two = Worker(spec), Worker(spec)
    assert one._problem.module is not two._problem.module
    module = two._problem.module
    del two
    with without_the_model(model):
        assert Worker(spec)._problem.module is module
