"""Where jobs run: the protocol, and the executor that is a for-loop.

A job is plain data (a cell of the kernel, a range of examples). `make` is a picklable callable
that turns a process into the function which does jobs; it is called once per process and run,
because loading a model takes longer than most jobs. The driver asks for outcomes and gets them
as they finish; kernels never pass through it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, cast, runtime_checkable

from raykernel import errors
from raykernel.compute import kept
from raykernel.errors import OutOfMemoryError, RaykernelError, RunError, is_out_of_memory

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")

TRACE_LINES = 12
"""Lines of a worker's traceback that an unforeseen error keeps: its last frames, no more."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[JobT, ResultT]):
    """How one job ended."""

    job: JobT
    attempts: int
    """Times it was started, counting those that ended with the death of the worker."""
    result: ResultT | None = None
    error: RaykernelError | None = None
    """Set where the job failed; the other jobs go on."""

    def value(self) -> ResultT:
        """The result.

        Returns:
            What the worker's function returned.

        Raises:
            RaykernelError: if the job failed, with the worker's class and message.
        """
        if self.error is not None:
            raise self.error
        return cast(ResultT, self.result)


@runtime_checkable
class Executor(Protocol):
    """Runs jobs on workers; a resource that is closed after use."""

    def run(
        self,
        make: Callable[[], Callable[[JobT], ResultT]],
        jobs: Iterable[JobT],
        *,
        workers: int | None = None,
    ) -> Iterator[Outcome[JobT, ResultT]]:
        """Run every job once, yielding outcomes as they finish, in any order.

        `workers` is how many share the jobs at the most; None: as many as there are.

        Closing the iterator early stops the workers; so does an interrupt. A failing `make` ends
        the iteration, since no job can be done. Processes may live on until `close`, for the
        workers of the next run.
        """
        ...

    def close(self) -> None:
        """Free workers and, where this executor started one, the cluster. Twice is harmless."""
        ...


class InlineExecutor:
    """One worker in this process, one job after the other."""

    def run(
        self,
        make: Callable[[], Callable[[JobT], ResultT]],
        jobs: Iterable[JobT],
        *,
        workers: int | None = None,
    ) -> Iterator[Outcome[JobT, ResultT]]:
        """See `Executor.run`.

        Args:
            make: makes the worker's function.
            jobs: the jobs.
            workers: there is one, whatever this says.

        Yields:
            One outcome per job, in the order of the jobs.

        Raises:
            RaykernelError: if `make` fails.
        """
        del workers
        work: Callable[[JobT], ResultT] | None = None
        for job in jobs:
            if work is None:
                started = attempt(make)
                if isinstance(started, Failure):
                    raise started.error()
                work = started.value
            done = attempt(work, job)
            if isinstance(done, Failure):
                yield Outcome(job, 1, error=done.error())
            else:
                yield Outcome(job, 1, result=done.value)

    def close(self) -> None:
        """Let go of the model that the last worker has left."""
        kept.forget()


# ------------------------------------------------------------------ errors as plain data


class WorkerTraceback(Exception):
    """The last lines of a worker's traceback, as the cause of an unforeseen error."""


@dataclass(frozen=True, slots=True)
class Success(Generic[ResultT]):
    """What a function returned."""

    value: ResultT


@dataclass(frozen=True, slots=True)
class Failure:
    """What a function raised, as text, so that it crosses process borders without pickled code."""

    kind: str
    """Name of a class in raykernel.errors; of everything unforeseen `RunError`, or
    `OutOfMemoryError`."""
    message: str
    trace: str
    """End of the traceback where the error was unforeseen, else empty."""

    def error(self) -> RaykernelError:
        """The error, with the class and the message that the worker raised.

        Returns:
            An exception to raise; the traceback of an unforeseen error is its `__cause__`.
        """
        error = cast(RaykernelError, getattr(errors, self.kind)(self.message))
        if self.trace:
            error.__cause__ = WorkerTraceback(self.trace)
        return error


def attempt(function: Callable[..., ResultT], *arguments: object) -> Success[ResultT] | Failure:
    """Call a function and turn what it raises into data.

    Args:
        function: what to call.
        arguments: its arguments.

    Returns:
        Its result or its failure. Interrupts and exits are not failures and pass through.
    """
    try:
        return Success(function(*arguments))
    except RaykernelError as error:
        return Failure(_known_class(error), str(error), "")
    except Exception as error:
        if full := errors.storage_full(error):
            return Failure(_known_class(full), str(full), "")
        trace = "".join(traceback.format_exception(error)).rstrip().splitlines()
        name, kind = type(error).__name__, OutOfMemoryError if is_out_of_memory(error) else RunError
        return Failure(
            kind.__name__,
            f"A worker failed with {name}: {error}" if str(error) else f"A worker failed: {name}.",
            "\n".join(trace[-TRACE_LINES:]),
        )


def _known_class(error: RaykernelError) -> str:
    """Name of the nearest class of `raykernel.errors` that the error belongs to."""
    known = (cls.__name__ for cls in type(error).__mro__ if cls.__module__ == errors.__name__)
    return next(known)
