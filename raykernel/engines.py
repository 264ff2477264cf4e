"""What runs the runs of a study: one protocol, and the pool.

    jobs or a search → workers, each a Runner → Ended, heard as it happens

A job is a tuple of runs that share a kernel: one worker does them in a row, so that blocks are
computed once. Ray starts when a worker is wanted, and ends with the engine.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import psutil

from raykernel.cache import cache_folder
from raykernel.compute.executor import Executor, InlineExecutor
from raykernel.compute.logs import bound_logs
from raykernel.config import ComputeConfig, SweepConfig, fingerprint
from raykernel.console import Screen
from raykernel.errors import RaykernelError, StorageFullError
from raykernel.jobs import LateExecutor
from raykernel.location import StorePath
from raykernel.runs import Ended, Run, Runner, failure, make_run, rows_of, stored, write_down
from raykernel.search import Search
from raykernel.space import Point
from raykernel.terms import Command, ExecutorName, RunStatus

if TYPE_CHECKING:  # it takes PyTorch, which a study that is stored does without
    from raykernel.union import Union

Heard = Callable[[Ended], None]
"""Told of every run that has ended."""
Begin = Callable[[Run], None]
"""Told of a run that begins in this process."""
Job = tuple[Run, ...]
JobT = TypeVar("JobT")


@dataclass(frozen=True, slots=True)
class Searcher:
    """The worker of a search: asks for a choice, runs it over seeds, tells what it gave."""

    search: Search
    runner: Runner
    study: str
    arm: str
    command: Command
    before: tuple[str, ...]
    """Overrides of all its runs."""
    cells: tuple[tuple[str, ...], ...]
    """Overrides that a choice is repeated over."""

    def __call__(self, slot: int) -> list[Ended]:
        """Try one choice.

        Args:
            slot: number of the job.

        Returns:
            How its runs ended; none after the deadline.
        """
        if self.runner.is_late:
            return []
        study = self.search.open(slot=slot)
        trial = self.search.ask(study, slot)
        ended, values = self.evaluate(trial.params)
        self.search.tell(study, trial, [one.run.id for one in ended], values)
        return ended

    def runs(self, choice: Mapping[str, Any]) -> Job:
        """The runs of a choice.

        Args:
            choice: value by key.

        Returns:
            One for each cell.
        """
        own = self.search.overrides(choice)
        points = [
            Point(self.arm, self.command, (*self.before, *cell, *own), cell, own)
            for cell in self.cells
        ]
        return tuple(make_run(self.study, point) for point in points)

    def evaluate(self, choice: Mapping[str, Any]) -> tuple[list[Ended], list[float]]:
        """Run a choice over its cells.

        Args:
            choice: value by key.

        Returns:
            How the runs ended, and every metric; no metric if a run failed.
        """
        ended = [self.runner.do(run) for run in self.runs(choice)]
        if any(one.status is not RunStatus.ok for one in ended):
            return ended, []
        try:
            return ended, self.search.values([rows_of(one) for one in ended])
        except RaykernelError as error:
            failed = failure(ended[0].run, error)
            write_down(failed)
            return [failed, *ended[1:]], []


@runtime_checkable
class Engine(Protocol):
    """Runs what a study asks for; a context, whose end frees the workers."""

    def __enter__(self) -> Engine:
        """Nothing starts yet."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the workers."""

    def complete(self, union: Union) -> None:
        """Compute a kernel that several runs share.

        Args:
            union: which.
        """

    def run(self, jobs: Sequence[Job], runner: Runner, heard: Heard) -> None:
        """Do jobs; a failing run stops no other.

        Args:
            jobs: which.
            runner: what every worker is.
            heard: told of every run that has ended; not of those after the deadline.
        """

    def search(self, searcher: Searcher, slots: range, heard: Heard) -> None:
        """Try choices.

        Args:
            searcher: what every worker is.
            slots: numbers of the jobs, a choice each.
            heard: as in `run`.
        """


class PoolEngine:
    """Workers of our own: this process if there is one, else Ray actors.

    Args:
        settings: how many.
        screen: where they are reported.
        begin: told of runs in this process.
    """

    def __init__(self, settings: SweepConfig, screen: Screen, begin: Begin) -> None:
        self._settings = settings
        self._screen = screen
        self._begin = begin
        self._open = contextlib.ExitStack()
        self._has_cluster = False

    def __enter__(self) -> PoolEngine:
        """Nothing starts yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End Ray, if it was started."""
        self._open.close()

    @property
    def settings(self) -> SweepConfig:
        """How many workers."""
        return self._settings

    @property
    def is_here(self) -> bool:
        """Whether runs are done in this process."""
        return self._settings.workers == 1

    @property
    def screen(self) -> Screen:
        """Where they are reported."""
        return self._screen

    def complete(self, union: Union) -> None:
        """See `Engine.complete`.

        Args:
            union: which.
        """
        config = union.prepared.config
        name = f"{config.task.name}, {config.model.name}"
        self._screen.say(f"{name}: one kernel for {union.num_samples} samples")
        if self.is_here or config.compute.executor is ExecutorName.ray:
            executor: Executor = LateExecutor(config.compute, self._screen)
        else:
            executor = self.executor(config.compute)
        with contextlib.closing(executor):
            union.complete(executor, self._screen)

    def run(self, jobs: Sequence[Job], runner: Runner, heard: Heard) -> None:
        """See `Engine.run`.

        Args:
            jobs: which.
            runner: what every worker is.
            heard: told of every run that has ended.
        """
        spread = [job for job in jobs if spreads(job[0])]
        if spread:
            self.start(spread[0][0].composed.config.compute)
        here = replace(runner, screen=self._screen, begin=self._begin)
        for job in jobs if self.is_here else spread:
            for ended in here.each(job):
                heard(ended)
        others = [job for job in jobs if not spreads(job[0])]
        if others and not self.is_here:
            self.share(others, runner, heard)

    def share(self, jobs: Sequence[Job], runner: Runner, heard: Heard) -> None:
        """Do jobs on Ray actors, those of like needs together.

        Args:
            jobs: which.
            runner: what every actor is.
            heard: told of every run that has ended.
        """
        for compute, same in by_resources(jobs):
            with contextlib.closing(self.executor(compute)) as executor:
                self._give(executor, partial(_same, runner), same, heard)

    def search(self, searcher: Searcher, slots: range, heard: Heard) -> None:
        """See `Engine.search`.

        Args:
            searcher: what every worker is.
            slots: numbers of the jobs, a choice each.
            heard: told of every run that has ended.
        """
        if self.is_here:
            runner = replace(searcher.runner, screen=self._screen, begin=self._begin)
            here = replace(searcher, runner=runner)
            self._give(InlineExecutor(), lambda: here, slots, heard)
            return
        run = first_run(searcher)
        compute = run.composed.config.compute
        with contextlib.closing(self.executor(compute)) as executor:
            # Of one kernel the first choice computes the blocks for all others.
            head = 1 if run.point.command.needs_kernel else 0
            for part in (slots[:head], slots[head:]):
                self._give(executor, partial(_same, searcher), part, heard)

    def executor(self, compute: ComputeConfig) -> Executor:
        """An executor of Ray actors.

        Runs take minutes or hours each, unlike one another, and write rows: none is begun twice
        at once, and that one takes longer than the others is no sign that it hangs.

        Args:
            compute: resources of a worker.

        Returns:
            The executor, to be closed.
        """
        self.start(compute)
        from raykernel.compute.ray_executor import RayExecutor

        return RayExecutor(self.workers(compute), say=self._screen.say, alike=False)

    def workers(self, compute: ComputeConfig) -> ComputeConfig:
        """The resources of a run, for as many workers as the study has."""
        number = self._settings.workers
        ray = replace(compute, executor=ExecutorName.ray, workers=number, in_flight=1)
        return replace(ray, job_seconds=None)  # which is of a run's own jobs

    def start(self, compute: ComputeConfig) -> None:
        """Start or join Ray, once.

        Args:
            compute: resources of a worker, and the address.
        """
        if self._has_cluster:
            return
        from raykernel.compute.ray_executor import cluster

        bound_logs()
        number = max(compute.workers, self._settings.workers)
        with self._screen.stage("Starting Ray" if compute.address is None else "Joining Ray"):
            self._open.enter_context(cluster(replace(compute, workers=number)))
        self._has_cluster = True

    def _give(
        self,
        executor: Executor,
        make: Callable[[], Callable[[JobT], list[Ended]]],
        jobs: Iterable[JobT],
        heard: Heard,
    ) -> None:
        for outcome in executor.run(make, jobs):
            if isinstance(outcome.error, StorageFullError):
                raise outcome.error  # the next run could not be kept either
            if outcome.error is None:
                for ended in outcome.value():
                    heard(ended)
            elif isinstance(outcome.job, tuple):
                for ended in lost(outcome.job, outcome.error):
                    heard(ended)
            else:
                self._screen.say(
                    f"Error: {outcome.error}\n{outcome.error.__cause__ or ''}".rstrip()
                )


def lost(job: Job, error: RaykernelError) -> Iterator[Ended]:
    """How the runs of a job ended whose workers died, or could not take it.

    Args:
        job: the job.
        error: what became of it.

    Yields:
        Ends; of a run that was done before its worker died, that.
    """
    for run in job:
        ended = stored(run, retry_failed=False)
        if ended is None:
            ended = failure(run, error)
            write_down(ended)
        yield ended


def scratch_folder(store: StorePath) -> Path:
    """Where drivers of Ray Tune keep snapshots while they run, one folder each.

    Args:
        store: root of the study's store.

    Returns:
        A folder of the store; for an object store, which keeps none, one on this machine.
    """
    if isinstance(store, Path):
        return store / ".tune"
    return cache_folder() / "tune" / fingerprint(str(store))


def clear_scratch(store: StorePath) -> None:
    """Remove the snapshots of drivers of Ray Tune on this machine that have died.

    Args:
        store: root of the study's store.
    """
    folder, host = scratch_folder(store), platform.node()
    for old in folder.glob(f"{host}-*"):
        pid = old.name.removeprefix(f"{host}-")
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):  # not there, or another driver's are
        folder.rmdir()


def spreads(run: Run) -> bool:
    """Whether a run's own workers are Ray's: it keeps the driver, and they share its blocks."""
    compute = run.composed.config.compute
    return run.point.command.is_of_kernel and compute.executor is ExecutorName.ray


def by_resources(jobs: Sequence[Job]) -> list[tuple[ComputeConfig, list[Job]]]:
    """Jobs whose runs ask for the same CPUs and GPUs, together.

    Args:
        jobs: of runs.

    Returns:
        Resources and their jobs.
    """
    found: dict[tuple[float, float], tuple[ComputeConfig, list[Job]]] = {}
    for job in jobs:
        compute = job[0].composed.config.compute
        needs = (compute.num_cpus, compute.num_gpus)
        found.setdefault(needs, (compute, []))[1].append(job)
    return list(found.values())


def by_kernel(runs: Sequence[Run]) -> list[Job]:
    """Runs as jobs: those that share a kernel in one, all others alone.

    Args:
        runs: which.

    Returns:
        The jobs, in the order of their first runs.
    """
    found: dict[object, list[Run]] = {}
    for number, run in enumerate(runs):
        key = run.kernel if run.point.command.is_of_kernel else number
        found.setdefault(key, []).append(run)
    return [tuple(job) for job in found.values()]


def waves(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs in the order in which none computes what another one is computing.

    Args:
        runs: which.

    Returns:
        One wave or two. In the second are smaller samples of what the first has larger ones of,
        whose kernels hold theirs; and of runs that train besides all but the first of a kernel.
    """
    largest: dict[str, int] = {}
    for run in runs:
        k = run.composed.config.task.k
        largest[run.nest] = max(largest.get(run.nest, k), k)
    ahead: list[Run] = []
    behind: list[Run] = []
    begun: set[str] = set()
    for run in runs:
        command, k = run.point.command, run.composed.config.task.k
        is_second = run.kernel in begun and not command.is_of_kernel
        waits = command.needs_kernel and (is_second or k < largest[run.nest])
        (behind if waits else ahead).append(run)
        begun.add(run.kernel)
    return [wave for wave in (ahead, behind) if wave]


def first_run(searcher: Searcher) -> Run:
    """Any run of a search, for the resources that all of them ask for."""
    axes = searcher.search.axes.values()
    choice = {axis.key: axis.low if axis.is_interval else axis.values[0] for axis in axes}
    return searcher.runs(choice)[0]


def _same(worker: JobT) -> JobT:
    return worker
