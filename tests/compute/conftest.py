"""One Ray instance for all tests of a session, and the executors that they run on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raykernel.compute.executor import Executor, InlineExecutor
from raykernel.config import ComputeConfig
from raykernel.terms import ExecutorName


@pytest.fixture(scope="session")
def ray_instance() -> Iterator[None]:
    """Ray on this machine, with room for the actors of `ray_run` and of another executor."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # before Ray is imported: no token in $HOME
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def ray_compute() -> ComputeConfig:
    return ComputeConfig(executor=ExecutorName.ray, workers=2, max_attempts=3)


@pytest.fixture(scope="session")
def ray_run(ray_instance: None, ray_compute: ComputeConfig) -> Iterator[Callable[..., Any]]:
    """`run` of one executor for all tests that load models: its actors import PyTorch once."""
    from raykernel.compute.ray_executor import RayExecutor

    with contextlib.closing(RayExecutor(ray_compute)) as made:
        yield made.run


@pytest.fixture(scope="module", params=["inline", pytest.param("ray", marks=pytest.mark.ray)])
def executor(request: pytest.FixtureRequest, ray_compute: ComputeConfig) -> Iterator[Executor]:
    """Every executor in turn."""
    if request.param == "inline":
        yield InlineExecutor()
        return
    request.getfixturevalue("ray_instance")
    from raykernel.compute.ray_executor import RayExecutor

    made = RayExecutor(ray_compute)
    yield made
    made.close()
