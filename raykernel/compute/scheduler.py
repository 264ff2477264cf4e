"""Who gets which job, and what is to be done about workers that die, hang or are slow.

    hire → ready → give ⇄ answered            the way of a worker
                     └→ lost, overdue → another one takes its place

Nothing here knows processes, nor looks at a clock: whoever moves the jobs says what happened, and
when. So one code schedules Ray's actors and those of a simulation.

A worker does its jobs in the order in which it was given them. So of the jobs lost with it, the
first is charged with its death; the others were only waiting. (It may have been done, with its
answer lost on the way; therefore a charged job is tried again alone, where the blame is certain.)

The end of a run waits for nobody. When no job is left to give out, what a slow worker has, running
or waiting, is given to idle ones as well, and the first answer counts. That asks that a job may be
done twice at once: blocks have the same bits whoever computes them, and a commit replaces a file at
once. Jobs that may not, or that are not alike, so that the time of one says nothing about the next,
are given out once (`alike=False`).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from raykernel.compute.backlog import Backlog, Task
from raykernel.config import ComputeConfig

HandleT = TypeVar("HandleT")
JobT = TypeVar("JobT")

SLOW_FACTOR, SLOW_SECONDS = 3.0, 5.0
"""Times the median job, and at least so long: then an idle worker is given the job, too."""

HUNG_FACTOR, HUNG_SECONDS = 20.0, 600.0
"""Likewise: then it counts as hung, unless `compute.job_seconds` says when."""

_SILENT = "raise compute.heartbeat_seconds if its machine may stand still as long"
_LONG = "raise compute.job_seconds if one job may take as long"

_GATHERED = 64
"""Part of what is owed that is waited for at a time, see `gathered`."""

_REMEMBERED = 99
"""Jobs whose times make the median."""


@dataclass(slots=True, eq=False)
class Member(Generic[HandleT, JobT]):
    """A worker as the scheduler sees it."""

    handle: HandleT
    """What whoever moves the jobs knows it by."""
    ready: bool = False
    tasks: list[Task[JobT]] = field(default_factory=list)
    """In the order in which it does them."""
    last: int | None = None
    """Index of the job that the backlog gave it last."""
    since: float = 0.0
    """When it began with the first of its jobs."""
    heard: float = math.inf
    """When it last gave a sign of life; ∞ before the first."""


@dataclass(frozen=True, slots=True)
class Charge(Generic[JobT]):
    """The job that the loss of a worker is laid to."""

    task: Task[JobT]
    given_up: bool
    """It has no further attempt, and no other worker has it."""


def gathered(num_owed: int) -> int:
    """Answers worth waiting for, since a look for answers costs something for each that is owed.

    Of a thousand workers 31 at a time: meanwhile they have the next of their jobs in flight.

    Args:
        num_owed: answers that will come.

    Returns:
        How many; 1 of few.
    """
    return 1 + num_owed // _GATHERED


class Scheduler(Generic[HandleT, JobT]):
    """The jobs of a run and the workers that it has.

    Args:
        jobs: in an order in which neighbours share most.
        compute: how many workers, how many jobs at each, attempts, and limits of time.
        alike: whether jobs take about as long as each other, and may be done twice at once.
    """

    def __init__(self, jobs: Iterable[JobT], compute: ComputeConfig, *, alike: bool = True) -> None:
        self._compute = compute
        self._alike = alike
        self._backlog = Backlog(jobs)
        self._lasts: set[int] = set()
        # Members with room for a job, by how many they have: an event costs no look at all others.
        self._room: list[dict[Member[HandleT, JobT], None]] = [{} for _ in range(compute.in_flight)]
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self.num_open = len(self._backlog)
        """Jobs without outcome."""
        self.members: dict[Member[HandleT, JobT], None] = {}
        """In the order of their coming."""

    # ------------------------------------------------------------ workers

    @property
    def num_wanted(self) -> int:
        """Workers to hire: up to `compute.workers`, but none that would have nothing to do."""
        return min(self._compute.workers, self.num_open) - len(self.members)

    def hire(self, handle: HandleT) -> Member[HandleT, JobT]:
        """Have one more worker, which is not ready yet."""
        member: Member[HandleT, JobT] = Member(handle)
        self.members[member] = None
        return member

    def ready(self, member: Member[HandleT, JobT]) -> None:
        """Note that a worker has loaded the model."""
        member.ready = True
        self._file(member)

    def lost(self, member: Member[HandleT, JobT]) -> Charge[JobT] | None:
        """Write a worker off; its jobs go back to the backlog unless others have them, too.

        Args:
            member: one that is dead, or to be ended.

        Returns:
            The job that it was doing; None if it had none that is still open.
        """
        del self.members[member]
        member.ready = False
        self._file(member)
        self._follow(member, None)
        charge = None
        for place, task in reversed(list(enumerate(member.tasks))):
            task.holders -= 1
            if task.done:
                continue
            if place:
                task.attempts -= 1
            else:
                task.deaths += 1
            if not place:
                given_up = task.deaths >= self._compute.max_attempts and not task.holders
                charge = Charge(task, given_up)
                if given_up and self._end(task):
                    continue
            if not task.holders:
                self._backlog.put_back(task, suspect=task.deaths > 0)
        member.tasks.clear()
        return charge

    # ------------------------------------------------------------ jobs

    def give(self, now: float) -> Iterator[tuple[Member[HandleT, JobT], Task[JobT]]]:
        """Give out jobs: every worker its first before any gets its second.

        The last jobs, fewer than workers, wait for whoever is idle first.

        Args:
            now: seconds on any clock.

        Yields:
            A worker and its next job.
        """
        for depth, room in enumerate(self._room):
            kept = len(self.members) if depth else 0
            for member in list(room) if len(self._backlog) > kept else ():
                task = self._backlog.take(member.last, self._lasts, idle=not depth)
                if task is not None:
                    self._follow(member, task.index)
                    self._hand(member, task, now)
                    yield member, task
                if len(self._backlog) <= kept:
                    break
        if self._alike and not self._backlog and self._room[0]:
            yield from self._give_twice(now)

    def answered(self, member: Member[HandleT, JobT], task: Task[JobT], now: float) -> bool:
        """Note that a worker has done a job, or failed at it.

        Args:
            member: the worker.
            task: the job.
            now: seconds on the same clock.

        Returns:
            Whether this is the job's outcome; not if another worker was first.
        """
        # Of answers that are noticed together, only the first says how long it took.
        if member.tasks[0] is task and now > member.since:
            self._seconds.append(now - member.since)
        member.tasks.remove(task)
        task.holders -= 1
        member.since = member.heard = now
        self._file(member)
        return self._end(task)

    # ------------------------------------------------------------ time

    def overdue(self, now: float) -> list[tuple[Member[HandleT, JobT], str]]:
        """Workers to be ended: those that are silent, and those whose job takes too long.

        Args:
            now: seconds on the same clock.

        Returns:
            Each with the reason, a clause.
        """
        beat = self._compute.heartbeat_seconds
        limit = self._limit()
        found = []
        for member in self.members:
            if beat is not None and now - member.heard > beat:
                found.append((member, f"no sign of life for {now - member.heard:.0f} s; {_SILENT}"))
            elif member.tasks and now - member.since > limit:
                found.append((member, f"no answer for {now - member.since:.0f} s; {_LONG}"))
        return found

    def _limit(self) -> float:
        """Seconds after which a job counts as hung."""
        if self._compute.job_seconds is not None:
            return self._compute.job_seconds
        return self._times(HUNG_FACTOR, HUNG_SECONDS) if self._alike else math.inf

    def _times(self, factor: float, least: float) -> float:
        """A multiple of the median job; ∞ before any was done."""
        if not self._seconds:
            return math.inf
        return max(least, factor * statistics.median(self._seconds))

    # ------------------------------------------------------------ inside

    def _give_twice(self, now: float) -> Iterator[tuple[Member[HandleT, JobT], Task[JobT]]]:
        """Give what slow workers have to idle ones, too; a job that killed a worker stays alone."""
        slow = now - self._times(SLOW_FACTOR, SLOW_SECONDS)
        held = (task for member in self.members if member.since < slow for task in member.tasks)
        once = [task for task in held if not (task.done or task.deaths or task.holders > 1)]
        for member, task in zip(list(self._room[0]), once, strict=False):
            self._hand(member, task, now)
            yield member, task

    def _hand(self, member: Member[HandleT, JobT], task: Task[JobT], now: float) -> None:
        task.attempts += 1
        task.holders += 1
        if not member.tasks:
            member.since = now
        member.tasks.append(task)
        self._file(member)

    def _follow(self, member: Member[HandleT, JobT], index: int | None) -> None:
        """Note which job of the backlog a member goes on from."""
        if member.last is not None:
            self._lasts.discard(member.last)
        if index is not None:
            self._lasts.add(index)
        member.last = index

    def _end(self, task: Task[JobT]) -> bool:
        """Whether a job had no outcome before."""
        first, task.done = not task.done, True
        self.num_open -= first
        return first

    def _file(self, member: Member[HandleT, JobT]) -> None:
        """Put a member where its room is; one with a job that killed another gets no second."""
        for room in self._room:
            room.pop(member, None)
        alone = any(task.deaths for task in member.tasks)
        if member.ready and not alone and len(member.tasks) < len(self._room):
            self._room[len(member.tasks)][member] = None
