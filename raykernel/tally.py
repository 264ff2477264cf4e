"""How far a study is: a line for every run that ends, failures when they happen."""

from __future__ import annotations

from rich.text import Text

from raykernel.console import Screen, counted, duration
from raykernel.runs import Ended, Run
from raykernel.terms import RunStatus


class Tally:
    """Counts the runs of a study, says how they end, and how far it is.

    Args:
        total: runs that are known of.
        workers: that run at a time.
        screen: where to say it.
    """

    def __init__(self, total: int, workers: int, screen: Screen) -> None:
        self._total = total
        self._workers = workers
        self._screen = screen
        self._begun = self._ended = self._failed = self._stored = 0
        self._seconds = 0.0

    def begin(self, run: Run) -> None:
        """A run begins in this process."""
        self._begun = max(self._begun, self._ended) + 1
        self._screen.say(f"\n[{self._begun}/{self._total}] {run.point.text}")

    def heard(self, ended: Ended) -> None:
        """A run has ended, now or before."""
        self._ended += 1
        self._begun = max(self._begun, self._ended)
        self._total = max(self._total, self._ended)
        if ended.was_stored:
            self._stored += 1
        else:
            self._seconds += ended.seconds
        for note in ended.notes:
            self._screen.note(note)
        if ended.printed:
            self._screen.say(f"\n[{self._ended}/{self._total}] {ended.run.point.text}")
            self._screen.out.print(Text(ended.printed), end="")  # made by a screen already
        if ended.status is RunStatus.failed:
            self._failed += 1
            before = ", before" if ended.was_stored else ""
            cause = "" if ended.cause is None else ended.cause.value
            self._screen.say(f"Failed ({cause}{before}): {ended.run.point.text}: {ended.error}")
            if ended.trace:
                self._screen.say(ended.trace)
        if not ended.was_stored:
            self._screen.say(self.line())

    def line(self) -> str:
        """How far it is."""
        left = self._total - self._ended
        running = min(self._workers, left)
        parts = [f"{self._ended - self._failed} of {counted(self._total, 'run')} done"]
        if self._failed:
            parts.append(f"{self._failed} failed")
        if left:
            each = self._seconds / max(1, self._ended - self._stored) / self._workers
            parts += [f"{running} running"] if self._workers > 1 else []
            parts += [f"{left - running if self._workers > 1 else left} left"]
            parts.append(f"about {duration(each * left)} more")
        return ", ".join(parts)
