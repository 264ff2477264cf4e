"""The process around a worker: it makes one, has it do jobs, and drops it for the next one.

Exceptions become data here, so that an error of Ray means a lost process and nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import platform
import threading
import time
from collections.abc import Callable
from typing import Any

from raykernel.compute.executor import Failure, Success, attempt
from raykernel.provenance import versions


class Shell:
    """What an actor is; it imports no PyTorch before it has a worker to make."""

    def __init__(self) -> None:
        self._work: Callable[[Any], Any] | None = None

    def hello(self, beat: Callable[[], object], every: float | None) -> dict[str, str]:
        """Answer that the process is placed and running, and go on giving signs of life.

        A thread of its own gives them, whatever job the process does; not while the process is
        stopped, its machine stands still, or native code holds the interpreter.

        Args:
            beat: gives one.
            every: seconds between two; None: none are given.

        Returns:
            Versions by package, and the name of the node.
        """
        if every is not None:
            threading.Thread(target=_beat, args=(beat, every), daemon=True).start()
        return versions() | {"node": platform.node()}

    def load(self, make: Callable[[], Callable[[Any], Any]]) -> Success[None] | Failure:
        """Make a worker: load the model, or take it over from the worker before.

        Args:
            make: makes the worker's function.

        Returns:
            Whether it could.
        """
        # First of all what the worker before has kept goes, which may be most of the memory.
        self._work = None
        gc.collect()
        made = attempt(make)
        if isinstance(made, Failure):
            return made
        self._work = made.value
        return Success(None)

    def do(self, job: Any) -> Success[Any] | Failure:
        """Do one job.

        Args:
            job: of the kind that the worker was made for.

        Returns:
            Its result or its failure.
        """
        assert self._work is not None
        return attempt(self._work, job)


def _beat(beat: Callable[[], object], every: float) -> None:
    while True:
        with contextlib.suppress(Exception):  # a sign that cannot be given is one that is missed
            beat()
        time.sleep(every)
