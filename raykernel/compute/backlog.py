"""Which job a worker gets next: the one after its last, so that neighbours stay together.

Cells come column by column, and a worker keeps what it captured of a column and its rows. Dealt
out one by one, every worker would capture every column; in runs, it captures those of its run.

    0 1 2 3 4 5 6 7 8 9        the first worker begins at 0, the second in the middle of what
    └─ A ───┘ └─ B ───┘        is left, and one whose run has ended in that of the longest other
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

JobT = TypeVar("JobT")


@dataclass(slots=True, eq=False)
class Task(Generic[JobT]):
    """A job and how often it was started."""

    index: int
    """In the order of the jobs."""
    job: JobT
    attempts: int = 0


class Backlog(Generic[JobT]):
    """Jobs that no worker has.

    Args:
        jobs: in an order in which neighbours share most.
    """

    def __init__(self, jobs: Iterable[JobT]) -> None:
        self._waiting = {index: Task(index, job) for index, job in enumerate(jobs)}
        self._suspects: deque[Task[JobT]] = deque()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._suspects)

    def take(self, last: int | None, others: Iterable[int], *, idle: bool) -> Task[JobT] | None:
        """The next job for a worker.

        Args:
            last: index of the job that it was given last; None: it had none.
            others: the same of the other workers.
            idle: whether it has nothing to do; only then it is given a job that killed another.

        Returns:
            The job; None if there is none for it.
        """
        if self._waiting:
            following = -1 if last is None else last + 1
            index = following if following in self._waiting else self._start(set(others))
            return self._waiting.pop(index)
        return self._suspects.popleft() if idle and self._suspects else None

    def put_back(self, task: Task[JobT], *, suspect: bool) -> None:
        """Return a job of a worker that died.

        Args:
            task: the job.
            suspect: whether it may have been the cause; then it comes last, should it kill again.
        """
        if suspect:
            self._suspects.append(task)
        else:
            self._waiting[task.index] = task

    def _start(self, others: set[int]) -> int:
        """Where a new run begins: in the middle of the longest, if another worker is in it."""
        run = max(_runs(sorted(self._waiting)), key=len)
        taken = run.start - 1 in others
        return run.start + len(run) // 2 if taken else run.start


def _runs(indices: list[int]) -> Iterator[range]:
    """Consecutive numbers among ascending ones."""
    start = 0
    for end in range(1, len(indices) + 1):
        if end == len(indices) or indices[end] != indices[end - 1] + 1:
            yield range(indices[start], indices[end - 1] + 1)
            start = end
