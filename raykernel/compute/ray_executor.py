"""Workers as Ray actors, and the cluster that they are on.

Between two runs of an executor its actors stay, idle: a process that has imported PyTorch and
loaded the model starts on other jobs at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import platform
import secrets
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any, cast

# Ray reads these when it is imported or started; what the user has set stands.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # `uv run` would break every worker
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")

import ray
from ray import exceptions as ray_errors
from ray._private import ray_constants
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raykernel.compute import trouble
from raykernel.compute.address import TOKEN_HINT, check_address
from raykernel.compute.executor import JobT, Outcome, ResultT
from raykernel.compute.ray_actors import Actor, Pool, kill
from raykernel.compute.scheduler import Scheduler
from raykernel.config import ComputeConfig
from raykernel.errors import InputError
from raykernel.provenance import versions

OBJECT_STORE_BYTES = 100 * 2**20
"""Shared memory of a local cluster: only tokens of the examples pass through it."""


def _ignore(text: str) -> None:
    """Say nothing."""


class RayExecutor:
    """Actors on a local cluster, a joined one, or one that the caller has already initialised."""

    def __init__(
        self,
        compute: ComputeConfig,
        *,
        say: Callable[[str], None] = _ignore,
        alike: bool = True,
    ) -> None:
        """Start or join the cluster.

        Args:
            compute: workers, their resources, and the address.
            say: takes messages about lost and pending workers.
            alike: whether jobs are alike and may be done twice at once, see `Scheduler`.

        Raises:
            InputError: if no cluster answers at the address, or the device does not fit Ray.
        """
        trouble.check_device(compute)
        self._compute = compute
        self._say = say
        self._alike = alike
        self._ours = not ray.is_initialized()
        self._local = self._ours and compute.address is None
        self._idle: list[Actor] = []
        if self._local:
            _start_cluster(compute)
        elif self._ours:
            _join_cluster(cast(str, compute.address))

    def run(
        self,
        make: Callable[[], Callable[[JobT], ResultT]],
        jobs: Iterable[JobT],
        *,
        workers: int | None = None,
    ) -> Iterator[Outcome[JobT, ResultT]]:
        """See `Executor.run`.

        Args:
            make: makes the worker's function; sent once, through the object store. Actors of the
                run before drop their old worker for it.
            jobs: the jobs.
            workers: actors that share them at the most; None: `compute.workers`. Jobs for fewer
                than all are not taken for alike: they are steps of one, or a single one.

        Yields:
            One outcome per job. A job whose worker died or hung `compute.max_attempts` times has
            a `WorkerLostError`.

        Raises:
            RaykernelError: if `make` fails, or if workers die before they are ready.
        """
        most = self._compute.workers
        compute = dataclasses.replace(self._compute, workers=min(most, workers or most))
        alike = self._alike and workers is None
        scheduler: Scheduler[Actor, JobT] = Scheduler(jobs, compute, alike=alike)
        if not scheduler.num_open:
            return
        pool: Pool[JobT, ResultT] = Pool(
            compute, self._say, ray.put(make), scheduler, self._idle, local=self._local
        )
        try:
            yield from pool.outcomes()
        finally:
            pool.dismiss()

    def close(self) -> None:
        """End the actors and leave the cluster; one that we started ends with its processes."""
        for actor in self._idle:
            kill(actor)
        self._idle.clear()
        if self._ours and ray.is_initialized():
            ray.shutdown()
        self._ours = False


# ------------------------------------------------------------------ the cluster


def is_running() -> bool:
    """Whether this process has started or joined a cluster."""
    return bool(ray.is_initialized())


@contextlib.contextmanager
def cluster(compute: ComputeConfig) -> Iterator[None]:
    """Start or join a cluster that several executors in a row use.

    Args:
        compute: the address, and the resources of all workers at a time.

    Yields:
        Nothing.

    Raises:
        InputError: if no cluster answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    if compute.address is None:
        _start_cluster(compute)
    else:
        _join_cluster(compute.address)
    try:
        yield
    finally:
        ray.shutdown()


def _start_cluster(compute: ComputeConfig) -> None:
    """Start Ray on this machine, for this process.

    It listens on loopback alone. Other users of this machine reach that, too, so authentication
    stays on, which is Ray's default for a local start. The token is ours and lives as long as this
    process: else Ray would leave one in the home directory.
    """
    if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with _keeping_signals(), _on_loopback():
        ray.init(
            address="local",
            num_cpus=max(1, math.ceil(compute.workers * compute.num_cpus)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let Ray start on 127.0.0.1, as it does on macOS and Windows; what the user has set stands.

    On Linux it replaces that address by the machine's own, also where it is given
    (`_node_ip_address`, 2.60), and listens on every interface. What it starts reads the variable;
    this process has read it, when it imported Ray, and may join a cluster later.
    """
    if ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR in os.environ:
        yield
        return
    before = ray_constants.ENABLE_RAY_CLUSTER
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _keeping_signals() -> Iterator[None]:
    """Leave SIGTERM to whoever had it: Ray takes it, and would exit without a word."""
    here = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    ours = here and callable(before)
    try:
        yield
    except SystemExit:
        if ours and callable(before):
            before(signal.SIGTERM, None)
        raise
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


def _join_cluster(address: str) -> None:
    """Join a running cluster; its authentication mode is the user's to set."""
    check_address(address)
    try:
        with _keeping_signals():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ray_errors.AuthenticationError as error:
        raise InputError(f"compute.address={address}: {error.__doc__} {TOKEN_HINT}") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        # RuntimeError: Ray compares its own version and Python's with the cluster's.
        raise InputError(f"compute.address={address}: {error}") from error


def versions_here() -> dict[str, str]:
    """Versions by package, Ray's among them, and the name of this node."""
    return versions() | {"ray": metadata.version("ray"), "node": platform.node()}


def node_versions() -> list[dict[str, str]]:
    """Ask every living node of the cluster that this process has joined.

    Returns:
        What `versions_here` says there.

    Raises:
        RaykernelError: if a node lacks a package, or cannot answer.
    """
    ask: Any = ray.remote(versions_here)
    nodes = [node["NodeID"] for node in cast(Any, ray).nodes() if node["Alive"]]
    asked = [
        ask.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, False),
        ).remote()
        for node in nodes
    ]
    try:
        return ray.get(asked)
    except ray_errors.RayError as error:
        failed = trouble.transport_error(error)
        raise failed from error
