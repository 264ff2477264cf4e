"""Seconds of contenders, interleaved round by round in one process.

Round 1: A B C …, round 2: A B C …: a machine that others load slows all of them alike, so that
figures are read as ratios within a round. The first call of each is not counted.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from raykernel.compute import process
from raykernel.config import ComputeConfig

PATIENCE_SECONDS = 30.0
"""A first call that took longer stays the only one, and counts."""
QUICK_SECONDS, MOST_CALLS = 4.0, 9
"""In its turn a contender is called as often as fits in these seconds, once at least and at most
so many times."""


Say = Callable[[str], None]
"""Takes a line of progress."""


class NotRun(Exception):
    """A contender cannot be measured here; the message says why."""


@dataclass(slots=True)
class Timing:
    """What was measured of one contender."""

    first: float = float("nan")
    """Seconds of the first call."""
    rounds: list[float] = field(default_factory=list)
    """Seconds by round, of several calls the median; one entry where the first call took too long
    for another one."""
    result: Any = None
    """Of the first call."""
    failure: str = ""
    """Why there is no figure."""

    @property
    def single(self) -> bool:
        """Whether the first call is the only one."""
        return self.rounds == [self.first]

    @property
    def seconds(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.rounds) if self.rounds else float("nan")

    def scaled(self, factor: float) -> Timing:
        """The same with all seconds multiplied."""
        rounds = [factor * seconds for seconds in self.rounds]
        return replace(self, first=factor * self.first, rounds=rounds)

    def over(self, other: Timing) -> float:
        """Median over the rounds of the ratio to another one."""
        if len(self.rounds) != len(other.rounds):
            return self.seconds / other.seconds
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(own / theirs for own, theirs in pairs)


def settle(*, keep_heap: bool = True) -> None:
    """One thread for all, and a heap that keeps freed pages, as raykernel's workers have it.

    In a plain process each call waits for the system to clear the pages that the last one gave
    back, which is most of the time of contenders that make large tensors.

    Args:
        keep_heap: false: a plain process.
    """
    if keep_heap:
        process.keep_heap_ready(ComputeConfig())
    torch.set_num_threads(1)
    with suppress(RuntimeError):  # fixed at the first parallel work; it is one then, too
        torch.set_num_interop_threads(1)


def measure(
    prepare: Mapping[str, Callable[[], Callable[[], Any]]],
    rounds: int,
    *,
    say: Say,
) -> dict[str, Timing]:
    """Set up every contender, call it once, then time all of them in rounds.

    Args:
        prepare: by name, what sets it up and returns what is timed.
        rounds: how often each is timed.
        say: told which contender is at its first call.

    Returns:
        Timings by name; a contender that raises keeps its error.
    """
    timings = {name: Timing() for name in prepare}
    runs: dict[str, Callable[[], Any]] = {}
    for name, make in prepare.items():
        say(name)
        timing = timings[name]
        try:
            run = make()
            timing.first, timing.result = _timed(run)
        except NotRun as reason:
            timing.failure = str(reason)
            continue
        except Exception as error:  # a peer's failure is a result
            timing.failure = f"failed: {type(error).__name__}: {error}".split("\n")[0][:120]
            continue
        if timing.first > PATIENCE_SECONDS:
            timing.rounds = [timing.first]
        else:
            runs[name] = run
    gc.collect()
    # What there is by now stays: to walk it before every call would empty the caches.
    gc.freeze()
    try:
        for _ in range(rounds):
            for name, run in runs.items():
                timings[name].rounds.append(_turn(run))
    finally:
        gc.unfreeze()
    return timings


def _turn(run: Callable[[], Any]) -> float:
    """Median of a contender's calls without the one after another's.

    That one finds the caches and the heap as the other has left them, which for the same
    neighbours in every round would be a bias: of some per cent where a call takes a tenth of a
    second, of a quarter where it takes ten and fills gigabytes of fresh pages.
    """
    first = _timed(run)[0]
    calls = max(1, min(int(QUICK_SECONDS / first), MOST_CALLS))
    return statistics.median(_timed(run)[0] for _ in range(calls))


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result
    finally:
        gc.enable()
