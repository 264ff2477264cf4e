"""Jobs go out once each, and neighbours to the same worker."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raykernel.compute.backlog import Backlog, Task


@given(num_jobs=st.integers(0, 30), turns=st.lists(st.integers(0, 3), max_size=60))
def test_every_job_is_given_once(num_jobs: int, turns: list[int]) -> None:
    backlog = Backlog(range(num_jobs))
    last: dict[int, int] = {}
    given_out: list[int] = []
    for worker in [*turns, *[0] * num_jobs]:
        others = [index for other, index in last.items() if other != worker]
        task = backlog.take(last.get(worker), others, idle=True)
        if task is not None:
            last[worker] = task.index
            given_out.append(task.job)
    assert sorted(given_out) == list(range(num_jobs))
    assert not backlog


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_workers_as_fast_as_each_other_do_one_run_each(num_workers: int) -> None:
    backlog = Backlog(range(32))
    done: list[list[int]] = [[] for _ in range(num_workers)]
    while backlog:
        for own in done:
            others = [jobs[-1] for jobs in done if jobs and jobs is not own]
            task = backlog.take(own[-1] if own else None, others, idle=True)
            if task is not None:
                own.append(task.job)
    assert sorted(job for jobs in done for job in jobs) == list(range(32))
    breaks = sum(b != a + 1 for jobs in done for a, b in itertools.pairwise(jobs))
    assert breaks <= num_workers // 2


def test_a_slow_workers_run_is_taken_over_from_its_middle() -> None:
    backlog = Backlog(range(10))
    slow = backlog.take(None, [], idle=True)
    assert isinstance(slow, Task)
    fast: list[int] = []
    while (task := backlog.take(fast[-1] if fast else None, [slow.index], idle=True)) is not None:
        fast.append(task.job)
    assert slow.job == 0
    assert fast[0] == 5
    assert sorted(fast) == list(range(1, 10))


def test_a_suspect_comes_last_and_to_an_idle_worker_alone() -> None:
    backlog = Backlog(range(3))
    first, second = (backlog.take(None, [], idle=True) for _ in range(2))
    assert first is not None
    assert second is not None
    backlog.put_back(first, suspect=True)
    backlog.put_back(second, suspect=False)
    assert [backlog.take(None, [], idle=False) for _ in range(3)][2] is None
    again = backlog.take(None, [], idle=True)
    assert again is first
    assert not backlog


@given(
    num_jobs=st.integers(1, 30),
    turns=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=80),
)
def test_runs_are_those_of_the_sorted_list(num_jobs: int, turns: list[tuple[int, bool]]) -> None:
    """Against the definition: all waiting indices sorted, the longest run of them looked for."""
    backlog, waiting = Backlog(range(num_jobs)), set(range(num_jobs))
    held: dict[int, Task[int]] = {}
    for worker, dies in turns:
        if dies and worker in held:
            task = held.pop(worker)
            backlog.put_back(task, suspect=False)
            waiting.add(task.index)
        last = held[worker].index if worker in held else None
        others = {task.index for task in held.values()}
        given = backlog.take(last, others, idle=True)
        if given is None:
            assert not waiting
            continue
        if last is not None and last + 1 in waiting:
            assert given.index == last + 1
        else:
            runs = naive_runs(sorted(waiting))
            longest = max(map(len, runs))
            starts = {
                run[len(run) // 2] if run[0] - 1 in others else run[0]
                for run in runs
                if len(run) == longest
            }
            assert given.index in starts
        waiting.remove(given.index)
        held[worker] = given
        assert len(backlog) == len(waiting)


def naive_runs(indices: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs
