"""What every executor owes its caller."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
import torch

from raykernel.compute.executor import Executor, Failure, WorkerTraceback, attempt
from raykernel.config import ComputeConfig
from raykernel.errors import (
    InputError,
    NonFiniteError,
    OutOfMemoryError,
    RunError,
    StorageFullError,
)
from tests.compute.toy_workers import Toy


def test_every_job_comes_back_once(executor: Executor, tmp_path: Path) -> None:
    toy = Toy(str(tmp_path))
    outcomes = list(executor.run(toy.start, range(20)))
    assert sorted(outcome.job for outcome in outcomes) == list(range(20))
    assert all(outcome.value() == outcome.job**2 for outcome in outcomes)
    assert all(outcome.attempts == 1 for outcome in outcomes)
    assert all(toy.count(f"ran-{job}") == 1 for job in range(20))


def test_a_worker_starts_once_per_process(executor: Executor, tmp_path: Path) -> None:
    toy = Toy(str(tmp_path))
    list(executor.run(toy.start, range(20)))
    started = {path.name for path in tmp_path.glob("started-*")}
    worked = {pid for path in tmp_path.glob("ran-*") for pid in path.read_text().split()}
    assert {f"started-{pid}" for pid in worked} <= started
    assert len(started) <= 2


def test_no_job_starts_no_worker(executor: Executor, tmp_path: Path) -> None:
    assert list(executor.run(Toy(str(tmp_path)).start, [])) == []
    assert list(tmp_path.iterdir()) == []


def test_a_failing_job_leaves_the_others_alone(executor: Executor) -> None:
    outcomes = {outcome.job: outcome for outcome in executor.run(Toy().refuse_odd, range(8))}
    assert {job for job, outcome in outcomes.items() if outcome.error} == {1, 3, 5, 7}
    assert outcomes[6].value() == 36


def test_errors_keep_class_message_and_exit_code(executor: Executor) -> None:
    errors = {outcome.job: outcome.error for outcome in executor.run(Toy().refuse_odd, range(8))}
    found = {job: (type(e), str(e), e.exit_code) for job, e in errors.items() if e is not None}
    assert found[1] == (NonFiniteError, "layer 'encoder.0': found NaN.", 2)
    assert found[3] == (StorageFullError, "no space left.", 2)
    assert found[5] == (RunError, "A worker failed with ValueError: five", 1)
    assert found[7] == (NonFiniteError, "seven", 2)


def test_an_unforeseen_error_keeps_the_end_of_its_traceback(executor: Executor) -> None:
    (outcome,) = executor.run(Toy().refuse_odd, [5])
    with pytest.raises(RunError) as caught:
        outcome.value()
    assert isinstance(caught.value.__cause__, WorkerTraceback)
    assert "toy_workers.py" in str(caught.value.__cause__)
    assert str(caught.value.__cause__).endswith("ValueError: five")


def test_a_worker_that_cannot_start_ends_the_run(executor: Executor) -> None:
    with pytest.raises(InputError, match="found 'nothing', expected a model"):
        list(executor.run(Toy().fail, range(3)))


def test_closing_early_stops_the_work(
    executor: Executor, ray_compute: ComputeConfig, tmp_path: Path
) -> None:
    toy = Toy(str(tmp_path))
    outcomes = executor.run(toy.slow, range(50))
    next(outcomes)
    outcomes.close()
    ran = len(list(tmp_path.glob("ran-*")))
    assert ran < 10
    time.sleep(3.0)
    # A kill may arrive late: until then a worker goes on with the jobs that it has.
    held = ray_compute.workers * ray_compute.in_flight
    assert len(list(tmp_path.glob("ran-*"))) <= ran + held


def test_an_executor_runs_again(executor: Executor) -> None:
    for _ in range(2):
        assert {outcome.value() for outcome in executor.run(Toy().start, range(3))} == {0, 1, 4}


def test_another_run_has_the_processes_of_the_last_but_not_its_workers(
    executor: Executor, tmp_path: Path
) -> None:
    """A worker and all that it holds is gone before the next one is made."""
    toy = Toy(str(tmp_path))
    first = {outcome.value() for outcome in executor.run(toy.hold, range(8))}
    again = {outcome.value() for outcome in executor.run(toy.hold, range(8))}
    assert {held for _, held in first | again} == {1}
    assert {pid for pid, _ in first} >= {pid for pid, _ in again}


def test_a_run_may_have_fewer_workers_and_the_next_one_all(
    executor: Executor, tmp_path: Path
) -> None:
    toy = Toy(str(tmp_path))
    assert len(list(executor.run(toy.start, range(12), workers=1))) == 12
    assert len(list(tmp_path.glob("started-*"))) == 1
    assert {outcome.value() for outcome in executor.run(toy.start, range(3))} == {0, 1, 4}


def test_an_interrupt_of_the_caller_passes_through(executor: Executor) -> None:
    def interrupted() -> None:
        for _ in executor.run(Toy().start, range(20)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), OutOfMemoryError),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemoryError),
        (RuntimeError("std::bad_alloc"), OutOfMemoryError),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), OutOfMemoryError),
        (RuntimeError("CUDA error: device-side assert"), RunError),
    ],
)
def test_a_worker_without_memory_is_told_from_one_that_fails(error: Exception, kind: type) -> None:
    """So that the run is marked with its cause, wherever memory ran out."""

    def fail() -> None:
        raise error

    failure = attempt(fail)
    assert isinstance(failure, Failure)
    assert type(failure.error()) is kind
