"""Workers that square numbers, and fail in every way a worker can.

A module of its own, because Ray's processes import what they run.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from raykernel.errors import InputError, NonFiniteError, StorageFullError


class OwnError(NonFiniteError):
    """An error class that only this module knows."""


@dataclass(frozen=True)
class Toy:
    folder: str = ""
    """Where the processes leave their marks."""

    def start(self) -> Callable[[int], int]:
        if self.folder:
            Path(self.folder, f"started-{os.getpid()}").touch()
        return self.square

    def square(self, job: int) -> int:
        if self.folder:
            self.mark(f"ran-{job}")
        return job * job

    def mark(self, name: str) -> bool:
        """Leave a mark; whether it is the first of its name."""
        path = Path(self.folder, name)
        first = not path.exists()
        with path.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return first

    def count(self, name: str) -> int:
        path = Path(self.folder, name)
        return len(path.read_text().split()) if path.exists() else 0

    def hold(self) -> Callable[[int], tuple[int, int]]:
        """A job says its process, and how many workers that held when this one was made."""
        return Holder().work

    def hold_in_a_ring(self) -> Callable[[int], tuple[int, int]]:
        """The same, of workers that refer to themselves, as large objects often do."""
        holder = Holder()
        holder.own = holder
        return holder.work

    def meet(self) -> Callable[[int], int]:
        """A job says its process, once two processes do jobs."""

        def work(job: int) -> int:
            Path(self.folder, f"met-{os.getpid()}").touch()
            while len(list(Path(self.folder).glob("met-*"))) < 2:
                time.sleep(0.05)
            return os.getpid()

        return work

    # ---------------------------------------------------- failing in the code

    def fail(self) -> Callable[[int], int]:
        raise InputError("model.name: found 'nothing', expected a model.")

    def refuse_odd(self) -> Callable[[int], int]:
        return _refuse_odd

    # ---------------------------------------------------- failing as a process

    def die_once(self) -> Callable[[int], int]:
        """The process exits in the middle of job 3, the first time."""

        def work(job: int) -> int:
            if self.mark(f"ran-{job}") and job == 3:
                os._exit(1)
            return job * job

        return work

    def die_always(self) -> Callable[[int], int]:
        """Job 3 kills every process that tries it."""

        def work(job: int) -> int:
            self.mark(f"ran-{job}")
            if job == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return job * job

        return work

    def die_at_start(self) -> Callable[[int], int]:
        os._exit(1)

    def slow(self) -> Callable[[int], int]:
        def work(job: int) -> int:
            self.mark(f"ran-{job}")
            time.sleep(0.4)
            return job * job

        return work

    def uneven(self) -> Callable[[int], int]:
        """The first worker starts at once, the others later; a job says who did it."""
        if not self.mark("first"):
            time.sleep(2.0)

        def work(job: int) -> int:
            time.sleep(4.0)
            return os.getpid()

        return work

    def freeze_once(self) -> Callable[[int], int]:
        """The process stands still in the middle of job 3, the first time."""

        def work(job: int) -> int:
            if self.mark(f"ran-{job}") and job == 3:
                os.kill(os.getpid(), signal.SIGSTOP)
            return job * job

        return work

    def sleep_once(self) -> Callable[[int], int]:
        """Job 3 never ends, the first time."""

        def work(job: int) -> int:
            if self.mark(f"ran-{job}") and job == 3:
                time.sleep(3600)
            return job * job

        return work

    def sleep_always(self) -> Callable[[int], int]:
        """Job 3 never ends."""

        def work(job: int) -> int:
            self.mark(f"ran-{job}")
            if job == 3:
                time.sleep(3600)
            return job * job

        return work

    def one_slow(self) -> Callable[[int], int]:
        """The first worker takes longer for a job than another one for six; both begin at once."""
        slow = self.mark("first")
        while not slow and not list(Path(self.folder).glob("ran-*")):
            time.sleep(0.1)

        def work(job: int) -> int:
            self.mark(f"ran-{job}")
            time.sleep(0.3)
            while slow and len(list(Path(self.folder).glob("done-*"))) < 6:
                time.sleep(0.1)
            self.mark(f"done-{job}")
            return job * job

        return work

    def endless(self) -> Callable[[int], int]:
        def work(job: int) -> int:
            self.mark("running")
            time.sleep(600)
            return job

        return work

    def unpicklable(self) -> Callable[[int], object]:
        def work(job: int) -> object:
            return threading.Lock() if job == 3 else job * job

        return work


class Holder:
    """A worker that can be counted."""

    alive: ClassVar[weakref.WeakSet[Holder]] = weakref.WeakSet()
    own: Holder | None = None

    def __init__(self) -> None:
        self.alive.add(self)
        self.at_start = len(self.alive)

    def work(self, job: int) -> tuple[int, int]:
        del job
        time.sleep(0.1)
        return os.getpid(), self.at_start


def _refuse_odd(job: int) -> int:
    if job == 1:
        raise NonFiniteError("layer 'encoder.0': found NaN.")
    if job == 3:
        raise StorageFullError("no space left.")
    if job == 5:
        raise ValueError("five")
    if job == 7:
        raise OwnError("seven")
    return job * job
