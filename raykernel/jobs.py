"""The jobs of a run: workers that start when there is something to do, progress, failures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from raykernel.compute.executor import Executor, InlineExecutor, JobT, Outcome, ResultT
from raykernel.compute.logs import bound_logs
from raykernel.config import ComputeConfig
from raykernel.console import Screen
from raykernel.errors import InputError, RaykernelError, StorageFullError
from raykernel.terms import ExecutorName


class LateExecutor:
    """The configured executor, opened by the first job: a run that computes nothing opens none.

    Args:
        compute: where to compute.
        screen: where lost workers are reported.
    """

    def __init__(self, compute: ComputeConfig, screen: Screen) -> None:
        self._compute = compute
        self._screen = screen
        self._opened: Executor | None = None

    def run(
        self,
        make: Callable[[], Callable[[JobT], ResultT]],
        jobs: Iterable[JobT],
        *,
        workers: int | None = None,
    ) -> Iterator[Outcome[JobT, ResultT]]:
        """See `Executor.run`."""
        if self._opened is None:
            self._opened = open_executor(self._compute, self._screen)
        return self._opened.run(make, jobs, workers=workers)

    def close(self) -> None:
        """See `Executor.close`."""
        if self._opened is not None:
            self._opened.close()


def open_executor(compute: ComputeConfig, screen: Screen) -> Executor:
    """The executor that the configuration names.

    Args:
        compute: where to compute.
        screen: where lost workers are reported.

    Returns:
        An executor to be closed.
    """
    if compute.executor is ExecutorName.inline:
        return InlineExecutor()
    # Ray takes seconds to import, and an inline run needs none of it.
    from raykernel.compute.ray_executor import RayExecutor, is_running

    bound_logs()
    if is_running():  # started for a whole study
        return RayExecutor(compute, say=screen.say)
    with screen.stage("Starting Ray" if compute.address is None else "Joining Ray"):
        return RayExecutor(compute, say=screen.say)


def run_jobs(
    executor: Executor,
    make: Callable[[], Callable[[JobT], ResultT]],
    jobs: Sequence[JobT],
    *,
    screen: Screen,
    name: str,
    sizes: Sequence[int] | None = None,
) -> Iterator[ResultT]:
    """Run all jobs with one progress line; a failing one does not stop the others.

    Args:
        executor: where.
        make: makes the worker's function.
        jobs: the jobs.
        screen: where progress and failures are shown.
        name: what is counted.
        sizes: how much of it every job is; None: 1.

    Yields:
        Results of the jobs that succeed.

    Raises:
        RaykernelError: the last failure, when the others are done; at once if it would be every
            job's.
    """
    counts = dict(zip(jobs, sizes or [1] * len(jobs), strict=True))
    failed: RaykernelError | None = None
    with screen.progress(name, sum(counts.values())) as advance:
        for outcome in executor.run(make, jobs):
            if isinstance(outcome.error, InputError | StorageFullError):
                raise outcome.error  # the next job would fail likewise
            if outcome.result is None:
                failed = outcome.error
                screen.say(f"{name}, {outcome.job}: failed: {failed}")
            else:
                yield outcome.result
            advance(counts[outcome.job])
    if failed is not None:
        raise failed
