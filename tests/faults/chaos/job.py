"""What chaos disturbs: a kernel and a study of 24 runs, by the commands that a person would give.

The driver is a process of its own that runs both commands. It is forked from a server that has
imported everything, which saves seconds; workers are Ray's, and import by themselves.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

from raykernel.cli import main
from raykernel.compute import ray_executor
from raykernel.compute.executor import Outcome
from raykernel.store.grid import Cell
from tests.faults.problem import KERNEL, NUM_BLOCKS, NUM_PREDICTIONS, NUM_TRIALS

NUM_STEPS = NUM_BLOCKS + NUM_PREDICTIONS + NUM_TRIALS
"""Commits of a whole run, by which kills are timed."""
WORKERS = 2

_IMPORTED = [
    *("raykernel.conduct", "raykernel.pipeline", "raykernel.sweep", "raykernel.trials"),
    *("raykernel.training.finetune", "transformers.models.roberta.modeling_roberta"),
]
"""By the server, before it forks drivers: what these import when they come to need it."""


def commands(store: str, engine: str, address: str | None) -> list[list[str]]:
    """Both command lines: on a cluster, or without an address in one process and without Ray."""
    place = [f"store.path={store}"]
    if address is None:
        return [[*KERNEL, *place], ["sweep", "rates", *place]]
    place += ["compute=ray", f"compute.workers={WORKERS}", f"compute.address={address}"]
    study = [f"sweep.workers={WORKERS}", f"sweep.engine={engine}"]
    return [[*KERNEL, *place], ["sweep", "rates", *place, *study]]


def start(folder: Path, lines: Sequence[Sequence[str]], screen: Path, begun: Path) -> BaseProcess:
    """Start a driver.

    Args:
        folder: where it runs.
        lines: its commands, one after the other.
        screen: takes what it prints.
        begun: takes a line for every job that a worker begins.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, *_IMPORTED])
    process = context.Process(target=_drive, args=(folder, lines, screen, begun))
    process.start()
    return process


def _drive(folder: Path, lines: Sequence[Sequence[str]], screen: Path, begun: Path) -> None:
    os.chdir(folder)
    with screen.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=2)  # tells where a driver hangs
    _Recording.path = str(begun)
    ray_executor.RayExecutor = _Recording  # type: ignore[misc]
    for line in lines:
        if code := main(line):
            sys.exit(code)


# ------------------------------------------------------------------ what was begun


@dataclass(frozen=True)
class _Recorded:
    """Makes a worker that writes down what it begins."""

    make: Callable[[], Callable[[Any], Any]]
    path: str

    def __call__(self) -> Callable[[Any], Any]:
        work = self.make()

        def begin(job: Any) -> Any:
            with contextlib.suppress(FileNotFoundError), Path(self.path).open("a") as file:
                file.write(f"{_name(job)}\n")
            return work(job)

        return begin


class _Recording(ray_executor.RayExecutor):
    """RayExecutor, whose workers do so."""

    path: ClassVar[str]

    def run(
        self,
        make: Callable[[], Callable[[Any], Any]],
        jobs: Iterable[Any],
        *,
        workers: int | None = None,
    ) -> Iterator[Outcome[Any, Any]]:
        return super().run(_Recorded(make, self.path), jobs, workers=workers)


def _name(job: Any) -> str:
    if isinstance(job, Cell):
        return f"block {job.i} {job.j}"
    return f"run {job[0].id}" if isinstance(job, tuple) else f"prediction {job}"
