"""Workers as Ray actors: the only file that imports Ray.

Ray places processes, carries integers and tells us when a process is gone. Everything else is
ours, because Ray's own retries do not survive a lost node: every failed call eats one retry while
an actor restarts, so that 2 or 5 retries are gone before the node is even noticed as dead (about
15 s; ray #44719). So an actor never restarts: when it is lost it is written off, its jobs go back
into the backlog and a new actor takes its place. Jobs are idempotent: what was half done, or done
and not reported, is simply done again.

An actor does its jobs in the order of submission. So of the jobs lost with it, the first is
charged with an attempt; the others were only waiting. (It may have been done, with its answer lost
on the way; therefore a charged job is tried again alone, where the blame is certain.)

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
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Generic, cast

# Ray reads these when it is imported or started; what the user has set stands.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # `uv run` would break every worker
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")

import ray
from ray import exceptions as ray_errors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raykernel.compute import trouble
from raykernel.compute.address import TOKEN_HINT, check_address
from raykernel.compute.backlog import Backlog, Task
from raykernel.compute.executor import Failure, JobT, Outcome, ResultT, Success, versions
from raykernel.compute.shell import Shell
from raykernel.config import ComputeConfig
from raykernel.errors import InputError, RunError, WorkerLostError

OBJECT_STORE_BYTES = 100 * 2**20
"""Shared memory of a local cluster: only tokens of the examples pass through it."""

POLL_SECONDS = 1.0
SAY_SECONDS = 30.0
"""Silence of all workers after which the screen says what is pending."""

PLACE_SECONDS = 300.0
"""How long resources that no node of a joined cluster has may be awaited: an autoscaler's time."""


def _ignore(text: str) -> None:
    """Say nothing."""


class RayExecutor:
    """Actors on a local cluster, a joined one, or one that the caller has already initialised."""

    def __init__(self, compute: ComputeConfig, *, say: Callable[[str], None] = _ignore) -> None:
        """Start or join the cluster.

        Args:
            compute: workers, their resources, and the address.
            say: takes messages about lost and pending workers.

        Raises:
            InputError: if no cluster answers at the address, or the device does not fit Ray.
        """
        trouble.check_device(compute)
        self._compute = compute
        self._say = say
        self._ours = not ray.is_initialized()
        self._local = self._ours and compute.address is None
        self._idle: list[_Actor[Any]] = []
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
            workers: actors that share them at the most; None: `compute.workers`.

        Yields:
            One outcome per job. A job whose worker died `compute.max_attempts` times has a
            `WorkerLostError`.

        Raises:
            RaykernelError: if `make` fails, or if workers die before they are ready.
        """
        backlog = Backlog(jobs)
        if not backlog:
            return
        most = self._compute.workers
        compute = dataclasses.replace(self._compute, workers=min(most, workers or most))
        pool: _Pool[JobT, ResultT] = _Pool(
            compute, self._say, ray.put(make), backlog, self._idle, local=self._local
        )
        try:
            yield from pool.outcomes()
        finally:
            pool.dismiss()

    def close(self) -> None:
        """End the actors and leave the cluster; one that we started ends with its processes."""
        for actor in self._idle:
            _kill(actor)
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

    Ray listens on every network interface whatever address it is given (measured: 2.60, also with
    127.0.0.1), so authentication stays on, which is Ray's default for a local start. The token is
    ours and lives as long as this process: else Ray would leave one in the home directory.
    """
    if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with _keeping_signals():
        ray.init(
            address="local",
            num_cpus=max(1, math.ceil(compute.workers * compute.num_cpus)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )


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


# ------------------------------------------------------------------ one run


@dataclass(slots=True, eq=False)
class _Actor(Generic[JobT]):
    """An actor as the driver sees it."""

    handle: Any
    greeting: Any
    """Reference of `hello`, then of `load`; None once the worker is ready."""
    placed: bool = False
    kept: bool = False
    """Whether it comes from a run before; then its death may be as old."""
    jobs: dict[Any, Task[JobT]] = field(default_factory=dict)
    """Reference → job, in the order of submission."""
    last: int | None = None
    """Index of the job submitted last."""

    @property
    def ready(self) -> bool:
        return self.greeting is None


@dataclass(slots=True)
class _Pool(Generic[JobT, ResultT]):
    """The actors and the backlog of one run."""

    compute: ComputeConfig
    say: Callable[[str], None]
    make: Any
    backlog: Backlog[JobT]
    idle: list[_Actor[Any]]
    """Actors of the runs before; those of this run join them."""
    local: bool
    actors: list[_Actor[JobT]] = field(default_factory=list)
    lost_starts: int = 0
    """Actors lost in a row before any was ready."""
    heard: float = field(default_factory=time.monotonic)
    """When an actor was last heard of."""
    said: float = field(default_factory=time.monotonic)
    told_versions: set[str] = field(default_factory=set)

    def outcomes(self) -> Iterator[Outcome[JobT, ResultT]]:
        """Outcomes until no job is left."""
        self._check_resources()
        while self.backlog or any(actor.jobs for actor in self.actors):
            self._hire()
            self._feed()
            by_reference = {ref: actor for actor in self.actors for ref in _references(actor)}
            done, _ = ray.wait(list(by_reference), num_returns=1, timeout=POLL_SECONDS)
            if not done:
                self._check_silence()
            for reference in done:
                self.heard = self.said = time.monotonic()
                yield from self._settle(by_reference[reference], reference)

    def dismiss(self) -> None:
        """End the actors that still work; the others wait for the next run, ready ones on top."""
        for actor in sorted(self.actors, key=lambda actor: actor.ready):
            if actor.jobs:
                _kill(actor)
            else:
                self.idle.append(actor)
        self.actors.clear()

    # -------------------------------------------------------- giving

    def _hire(self) -> None:
        """Have up to `compute.workers` actors, but none that would have nothing to do."""
        open_jobs = len(self.backlog) + sum(len(actor.jobs) for actor in self.actors)
        while len(self.actors) < min(self.compute.workers, open_jobs):
            self.actors.append(self._recalled() if self.idle else self._started())

    def _started(self) -> _Actor[JobT]:
        """A new actor."""
        actor: Any = ray.remote(Shell)
        handle = actor.options(
            num_cpus=self.compute.num_cpus,
            num_gpus=self.compute.num_gpus,
            max_restarts=0,
            max_task_retries=0,
        ).remote()
        return _Actor(handle, handle.hello.remote())

    def _recalled(self) -> _Actor[JobT]:
        """An actor of a run before, wherever that left it: placed, loading, or ready."""
        handle, placed = (actor := self.idle.pop()).handle, actor.placed
        greeting = handle.load.remote(self.make) if placed else actor.greeting
        return _Actor(handle, greeting, placed=placed, kept=placed)

    def _feed(self) -> None:
        """Give every actor its first job before any gets its second."""
        starting = sum(not actor.ready for actor in self.actors)
        for depth in range(self.compute.in_flight):
            for actor in self.actors:
                if depth and len(self.backlog) <= starting:
                    return  # the rest is for those that still load the model
                suspected = any(job.attempts > 1 for job in actor.jobs.values())
                if not actor.ready or len(actor.jobs) != depth or suspected:
                    continue
                others = [a.last for a in self.actors if a is not actor and a.last is not None]
                task = self.backlog.take(actor.last, others, idle=depth == 0)
                if task is not None:
                    task.attempts += 1
                    actor.last = task.index
                    actor.jobs[actor.handle.do.remote(task.job)] = task

    # -------------------------------------------------------- taking

    def _settle(self, actor: _Actor[JobT], reference: Any) -> Iterator[Outcome[JobT, ResultT]]:
        """Take what a reference holds: a greeting, a result, or news of a loss."""
        try:
            value = ray.get(reference)
        except ray_errors.RayTaskError as error:
            # Not our code, which turns exceptions into data: arguments or results that do not
            # unpickle, because the package is missing or another one on the node.
            failed = trouble.transport_error(error)
            if reference is actor.greeting:
                raise failed from error
            yield _outcome(actor.jobs.pop(reference), failed)
        except ray_errors.LocalRayletDiedError as error:
            raise RunError(
                "Ray's process on this machine died, and with it the way to the workers. "
                "Finished blocks are stored: run the command again."
            ) from error
        except ray_errors.ActorUnschedulableError as error:
            raise InputError(f"Ray cannot place a worker: {error}") from error
        except ray_errors.RayError as error:
            yield from self._lose(actor, error)
        else:
            if reference is actor.greeting:
                self._greet(actor, value)
            else:
                yield _outcome(actor.jobs.pop(reference), value)

    def _greet(self, actor: _Actor[JobT], value: Any) -> None:
        """Move an actor on: placed → loading → ready."""
        if not actor.placed:
            actor.placed = True
            self._compare_versions(value)
            actor.greeting = actor.handle.load.remote(self.make)
        elif isinstance(value, Failure):
            raise value.error()
        else:
            actor.greeting = None
            self.lost_starts = 0

    def _lose(self, actor: _Actor[JobT], error: Exception) -> Iterator[Outcome[JobT, ResultT]]:
        """Write an actor off and requeue its jobs."""
        self.actors.remove(actor)
        _kill(actor)
        cause = trouble.cause_of(error)
        if not actor.ready and not actor.kept:
            self.lost_starts += 1
            if unpacked := trouble.missing_module(error):
                raise unpacked from error
            if self.lost_starts >= self.compute.max_attempts:
                raise WorkerLostError(
                    f"{self.lost_starts} workers in a row died before they had loaded the model "
                    f"({cause}). {trouble.advice(self.compute)}"
                ) from error
        charged = False
        for reference, job in actor.jobs.items():
            value = _value_if_finished(reference)
            if value is not None:
                yield _outcome(job, value)
            elif charged:
                job.attempts -= 1
                self.backlog.put_back(job, suspect=False)
            else:
                charged = True
                if job.attempts < self.compute.max_attempts:
                    self.say(f"A worker died ({cause}); its job is given to another one.")
                    self.backlog.put_back(job, suspect=True)
                else:
                    text = f"{job.job} was tried {job.attempts} times, each time its worker died"
                    lost = WorkerLostError(f"{text} ({cause}). {trouble.advice(self.compute)}")
                    yield _outcome(job, lost)

    # -------------------------------------------------------- watching

    def _compare_versions(self, there: dict[str, str]) -> None:
        """Say once where a node runs other versions than the driver; refuse another raykernel."""
        text = trouble.version_note(versions(), there)
        if text and text not in self.told_versions:
            self.told_versions.add(text)
            self.say(text)

    def _check_silence(self) -> None:
        """After a while without news, say what is pending."""
        now = time.monotonic()
        if any(actor.jobs for actor in self.actors) or now - self.said < SAY_SECONDS:
            return
        self.said = now
        self._check_resources(waited=now - self.heard)
        loading = sum(actor.placed for actor in self.actors)
        waiting = len(self.actors) - loading
        if waiting:
            free = cast(Any, ray).available_resources()
            self.say(
                f"{waiting} workers wait for {trouble.asked(self.compute)} each; free in the "
                f"cluster: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU."
            )
        if loading:
            self.say(f"{loading} workers are loading the model.")

    def _check_resources(self, *, waited: float = 0.0) -> None:
        """Refuse resources that no node has, at once locally, else after an autoscaler's time."""
        if any(actor.placed for actor in self.actors):
            return
        nodes = [node["Resources"] for node in cast(Any, ray).nodes() if node["Alive"]]
        problem = trouble.unplaceable(self.compute, nodes)
        if problem is None:
            return
        if self.local or waited >= PLACE_SECONDS:
            raise InputError(f"{problem}, or use a larger machine.")
        self.say(f"{problem}, or wait for an autoscaler ({PLACE_SECONDS - waited:.0f} s more).")


def _references(actor: _Actor[JobT]) -> list[Any]:
    """What an actor owes us."""
    return list(actor.jobs) if actor.ready else [actor.greeting]


def _outcome(job: Task[JobT], value: Any) -> Outcome[JobT, Any]:
    """The outcome that a job's answer, or its error, amounts to."""
    if isinstance(value, Success):
        return Outcome(job.job, job.attempts, result=value.value)
    error = value.error() if isinstance(value, Failure) else value
    return Outcome(job.job, job.attempts, error=error)


def _value_if_finished(reference: Any) -> Any:
    """The answer of a lost actor that had arrived before the loss, else None."""
    done, _ = ray.wait([reference], timeout=0)
    with contextlib.suppress(ray_errors.RayError):
        return ray.get(done[0]) if done else None
    return None


def _kill(actor: _Actor[JobT]) -> None:
    """End an actor that may be dead already."""
    with contextlib.suppress(ray_errors.RayError, RuntimeError, ValueError):
        ray.kill(actor.handle, no_restart=True)
