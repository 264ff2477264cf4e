"""Executors, on the one Ray instance of the session."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from raykernel.compute.executor import Executor, InlineExecutor
from raykernel.config import ComputeConfig
from raykernel.terms import ExecutorName


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
