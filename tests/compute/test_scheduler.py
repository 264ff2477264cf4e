"""Every job has one outcome, whatever becomes of its workers; the clock is a number."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from raykernel.compute.backlog import Task
from raykernel.compute.scheduler import (
    HUNG_SECONDS,
    SLOW_SECONDS,
    Member,
    Scheduler,
    gathered,
)
from raykernel.config import ComputeConfig
from raykernel.terms import ExecutorName

Pair = tuple[Member[int, int], Task[int]]


def compute(workers: int, **extra: object) -> ComputeConfig:
    given = {"executor": ExecutorName.ray, "heartbeat_seconds": None, **extra}
    return ComputeConfig(workers=workers, **given)  # type: ignore[arg-type]


def begun(scheduler: Scheduler[int, int]) -> list[Member[int, int]]:
    """As many workers as it wants, ready."""
    members = [scheduler.hire(number) for number in range(scheduler.num_wanted)]
    for member in members:
        scheduler.ready(member)
    return members


def worked(
    scheduler: Scheduler[int, int], speeds: dict[int, float], step: float = 1.0
) -> tuple[Counter[int], float]:
    """Outcomes by job, and the time at the last one, of workers that take so long for a job."""
    begun(scheduler)
    ends: dict[Member[int, int], float] = {}
    found: Counter[int] = Counter()
    now = 0.0
    while scheduler.num_open:
        for member, _ in scheduler.give(now):
            ends.setdefault(member, now + speeds[member.handle])
        now += step
        for member in [member for member, end in ends.items() if end <= now]:
            task = member.tasks[0]
            found[task.job] += scheduler.answered(member, task, now)
            del ends[member]
            if member.tasks:
                ends[member] = now + speeds[member.handle]
    return found, now


def test_at_most_in_flight_jobs_wait_at_a_worker() -> None:
    scheduler = Scheduler[int, int](range(12), compute(2, in_flight=3))
    begun(scheduler)
    given = list(scheduler.give(0.0))
    assert [member.handle for member, _ in given] == [0, 1] * 3
    assert {len(member.tasks) for member in scheduler.members} == {3}
    assert not list(scheduler.give(1.0))


def test_the_last_jobs_wait_for_whoever_is_idle_first() -> None:
    """A second job is given only while there is one for every worker, ready or not."""
    scheduler = Scheduler[int, int](range(5), compute(4))
    assert scheduler.num_wanted == 4
    first = scheduler.hire(0)
    others = [scheduler.hire(number) for number in (1, 2, 3)]
    scheduler.ready(first)
    assert len(list(scheduler.give(0.0))) == 1
    for member in others:
        scheduler.ready(member)
    assert [member.handle for member, _ in scheduler.give(0.0)] == [1, 2, 3]


@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_a_worker_ten_times_slower_does_not_hold_up_the_end(in_flight: int) -> None:
    """64 jobs of 10 s on 4 workers take 160 s, or 206 s with 3.1 of them. One job of the slow
    one takes 100 s, so that in order it would be 100 s · in_flight late."""
    scheduler = Scheduler[int, int](range(64), compute(4, in_flight=in_flight))
    found, end = worked(scheduler, {0: 100.0, 1: 10.0, 2: 10.0, 3: 10.0})
    assert found == Counter(range(64))
    assert end <= 64 * 10 / 3.1 + 3 * 10 + 10


def test_a_stopped_worker_keeps_nobody_waiting_either() -> None:
    scheduler = Scheduler[int, int](range(20), compute(2))
    found, end = worked(scheduler, {0: 1e9, 1: 10.0})
    assert found == Counter(range(20))
    assert end <= 20 * 10 + 10


def test_jobs_that_may_not_be_done_twice_are_given_out_once() -> None:
    scheduler = Scheduler[int, int](range(8), compute(2, in_flight=1), alike=False)
    found, end = worked(scheduler, {0: 1000.0, 1: 10.0})
    assert found == Counter(range(8))
    assert end == 1000.0


def test_a_job_done_twice_has_one_outcome_and_a_slow_first_answer_still_counts() -> None:
    scheduler = Scheduler[int, int](range(2), compute(2))
    fast, slow = begun(scheduler)
    (_, one), (_, other) = scheduler.give(0.0)
    assert scheduler.answered(fast, one, 1.0)
    assert not list(scheduler.give(SLOW_SECONDS))
    assert list(scheduler.give(SLOW_SECONDS + 0.1)) == [(fast, other)]
    assert not list(scheduler.give(100.0)), "a third time"
    assert scheduler.answered(slow, other, 101.0)
    assert scheduler.num_open == 0
    assert not scheduler.answered(fast, other, 102.0)
    assert (scheduler.num_open, other.attempts) == (0, 2)


def test_the_loss_of_one_of_two_that_do_a_job_leaves_it_to_the_other() -> None:
    scheduler = Scheduler[int, int](range(2), compute(2, max_attempts=1))
    fast, slow = begun(scheduler)
    (_, one), (_, other) = scheduler.give(0.0)
    scheduler.answered(fast, one, 1.0)
    assert [pair[1] for pair in scheduler.give(50.0)] == [other]
    charge = scheduler.lost(slow)
    assert charge is not None
    assert (charge.task, charge.given_up) == (other, False)
    assert not list(scheduler.give(51.0)), "it is being done"
    charge = scheduler.lost(fast)
    assert charge is not None
    assert charge.given_up
    assert scheduler.num_open == 0


def test_a_lost_worker_is_charged_with_its_first_job_alone() -> None:
    scheduler = Scheduler[int, int](range(10), compute(1, in_flight=3))
    (member,) = begun(scheduler)
    first, second, third = (task for _, task in scheduler.give(0.0))
    scheduler.answered(member, first, 1.0)
    charge = scheduler.lost(member)
    assert charge is not None
    assert (charge.task, second.deaths, second.attempts) == (second, 1, 1)
    assert (third.deaths, third.attempts) == (0, 0)
    (again,) = begun(scheduler)
    order = []
    while scheduler.num_open:
        given = [task for _, task in scheduler.give(2.0)]
        assert second not in given or again.tasks == [second], "a suspect is done alone"
        order.append(again.tasks[0].job)
        scheduler.answered(again, again.tasks[0], 3.0)
    assert sorted(order[:-1]) == [2, *range(3, 10)]
    assert order[-1] == second.job


def test_answers_are_gathered_only_where_many_are_owed() -> None:
    """On a laptop, and at the end of a run, every answer is taken as it comes."""
    assert [gathered(owed) for owed in (1, 2, 16, 63)] == [1, 1, 1, 1]
    assert gathered(2000) == 32


# ------------------------------------------------------------------ hanging


def test_a_job_of_twenty_medians_hangs() -> None:
    scheduler = Scheduler[int, int](range(99), compute(2, in_flight=1))
    fast, slow = begun(scheduler)
    for turn in range(20):
        list(scheduler.give(50.0 * turn))
        scheduler.answered(fast, fast.tasks[0], 50.0 * (turn + 1))
    assert scheduler.overdue(1000.0) == []
    overdue = dict(scheduler.overdue(1000.1))
    assert list(overdue) == [slow]
    assert "compute.job_seconds" in overdue[slow]


def test_short_jobs_may_take_minutes_before_they_hang_and_the_user_may_say_less() -> None:
    for extra, limit in (({}, HUNG_SECONDS), ({"job_seconds": 7.0}, 7.0)):
        scheduler = Scheduler[int, int](range(9), compute(2, in_flight=1, **extra))
        fast, _ = begun(scheduler)
        (_, task), _ = scheduler.give(0.0)
        scheduler.answered(fast, task, 0.1)
        assert scheduler.overdue(limit) == []
        assert len(scheduler.overdue(limit + 0.1)) == 1


def test_no_time_limit_of_its_own_for_jobs_that_are_not_alike() -> None:
    scheduler = Scheduler[int, int](range(9), compute(2, in_flight=1), alike=False)
    fast, _ = begun(scheduler)
    (_, task), _ = scheduler.give(0.0)
    scheduler.answered(fast, task, 0.1)
    assert scheduler.overdue(1e9) == []


def test_a_silent_worker_hangs_whatever_it_does_unless_it_was_never_placed() -> None:
    scheduler = Scheduler[int, int](range(9), compute(3, heartbeat_seconds=30.0))
    loading, waiting, unheard = (scheduler.hire(number) for number in range(3))
    loading.heard = waiting.heard = 100.0
    scheduler.ready(waiting)
    assert scheduler.overdue(130.0) == []
    overdue = dict(scheduler.overdue(130.1))
    assert set(overdue) == {loading, waiting}
    assert unheard not in overdue
    assert "compute.heartbeat_seconds" in overdue[loading]


# ------------------------------------------------------------------ whatever happens


@pytest.mark.parametrize("seed", range(60))
def test_every_job_has_exactly_one_outcome_whatever_happens(seed: int) -> None:
    """Random answers, losses and long waits; a lost worker's open jobs never vanish."""
    draw = random.Random(seed)
    workers, jobs = draw.randint(1, 5), draw.randint(1, 40)
    settings = compute(workers, in_flight=draw.randint(1, 3), max_attempts=draw.randint(1, 3))
    scheduler = Scheduler[int, int](range(jobs), settings)
    outcomes: Counter[int] = Counter()
    now = 0.0
    while scheduler.num_open:
        for number in range(scheduler.num_wanted):
            scheduler.hire(number)
        for member, task in scheduler.give(now):
            assert member.ready
            assert not task.done
        now += draw.choice([0.1, 1.0, 30.0])
        member = draw.choice(list(scheduler.members))
        if not member.ready:
            scheduler.ready(member)
        elif member.tasks and draw.random() < 0.8:
            task = member.tasks[0]
            outcomes[task.job] += scheduler.answered(member, task, now)
        elif draw.random() < 0.5:
            charge = scheduler.lost(member)
            outcomes[charge.task.job if charge else -1] += bool(charge and charge.given_up)
        holders = Counter(task for member in scheduler.members for task in member.tasks)
        assert all(task.holders == count <= 2 for task, count in holders.items())
    assert +outcomes == Counter(range(jobs))
