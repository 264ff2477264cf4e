"""Which job a worker gets next: the one after its last, so that neighbours stay together.

Cells come column by column, and a worker keeps what it captured of a column and its rows. Dealt
out one by one, every worker would capture every column; in runs, it captures those of its run.

    0 1 2 3 4 5 6 7 8 9        the first worker begins at 0, the second in the middle of what
    └─ A ───┘ └─ B ───┘        is left, and one whose run has ended in that of the longest other

Of a million waiting jobs only the runs are kept, a few for each worker: a job costs the logarithm
of their number to take.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

JobT = TypeVar("JobT")


@dataclass(slots=True, eq=False)
class Task(Generic[JobT]):
    """A job that was given out, and how it went so far."""

    index: int
    """In the order of the jobs."""
    job: JobT
    attempts: int = 0
    """Times it was started."""
    deaths: int = 0
    """Workers that were lost while they did it."""
    holders: int = 0
    """Workers that have it."""
    done: bool = False


@dataclass(slots=True, eq=False)
class _Run:
    """Consecutive jobs that wait."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Backlog(Generic[JobT]):
    """Jobs that no worker has.

    Args:
        jobs: in an order in which neighbours share most.
    """

    def __init__(self, jobs: Iterable[JobT]) -> None:
        self._jobs = list(jobs)
        self._suspects: deque[Task[JobT]] = deque()
        self._num_waiting = len(self._jobs)
        self._runs: dict[int, _Run] = {}
        """By start."""
        self._ends: dict[int, _Run] = {}
        """The same by stop."""
        self._longest: list[tuple[int, int, int, _Run]] = []
        """Heap of (-length, start, number, run), one entry a run; a run only gets shorter."""
        self._number = count()
        self._file(_Run(0, len(self._jobs)))

    def __len__(self) -> int:
        return self._num_waiting + len(self._suspects)

    def take(self, last: int | None, others: Container[int], *, idle: bool) -> Task[JobT] | None:
        """The next job for a worker.

        Args:
            last: index of the job that it was given last; None: it had none.
            others: the same of the other workers.
            idle: whether it has nothing to do; only then it is given a job that killed another.

        Returns:
            The job; None if there is none for it.
        """
        if not self._num_waiting:
            return self._suspects.popleft() if idle and self._suspects else None
        following = -1 if last is None else last + 1
        index = following if following in self._runs else self._start(others)
        run = self._runs.pop(index)
        run.start += 1
        if run:
            self._runs[run.start] = run
        else:
            del self._ends[run.stop]
        self._num_waiting -= 1
        return Task(index, self._jobs[index])

    def put_back(self, task: Task[JobT], *, suspect: bool) -> None:
        """Return a job of a worker that died.

        Args:
            task: the job.
            suspect: whether it may have been the cause; then it comes last, should it kill again.
        """
        if suspect:
            self._suspects.append(task)
            return
        self._num_waiting += 1
        run = _Run(task.index, task.index + 1)
        if before := self._ends.pop(run.start, None):
            del self._runs[before.start]
            run.start, before.start = before.start, before.stop
        if after := self._runs.pop(run.stop, None):
            run.stop, after.start = after.stop, after.stop
        self._file(run)

    def _start(self, others: Container[int]) -> int:
        """Where a new run begins: in the middle of the longest, if another worker is in it."""
        run = self._pop_longest()
        taken = run.start - 1 in others
        middle = run.start + len(run) // 2 if taken else run.start
        self._file(_Run(run.start, middle))
        self._file(_Run(middle, run.stop))
        run.start = run.stop
        return middle

    def _file(self, run: _Run) -> None:
        if run:
            self._runs[run.start] = self._ends[run.stop] = run
            heapq.heappush(self._longest, (-len(run), run.start, next(self._number), run))

    def _pop_longest(self) -> _Run:
        while True:
            negative, _, _, run = heapq.heappop(self._longest)
            if len(run) == -negative:
                return run
            self._file(run)  # under its present length, for it was longer then
