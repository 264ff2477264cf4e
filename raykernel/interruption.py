"""Ctrl-C and SIGTERM: the first unwinds what runs, the second ends the process at once.

Whatever the first interrupts is closed on the way out: files are committed by renames, Ray's
processes are told to end. A job that a scheduler ends with SIGTERM unwinds like one that a person
interrupts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BASE = 128
"""Exit code of a process that a signal ended, less its number."""
_SOON_SECONDS = 0.05


@dataclass(slots=True)
class Interruption:
    """Whether a command was interrupted."""

    code: int | None = None
    """Exit code: 130 after Ctrl-C, 143 after SIGTERM; None: it was not."""
    hook: Callable[[Any], Any] = field(default_factory=lambda: sys.unraisablehook)
    """Told of everything else that Python drops."""

    def first(self, signum: int, frame: FrameType | None) -> None:
        """Unwind."""
        del frame
        self.code = _BASE + signum
        end_at_next()
        raise KeyboardInterrupt

    def swallowed(self, unraisable: Any) -> None:
        """Unwind later: Python drops what is raised while it deletes an object (`__del__`)."""
        if self.code is not None and unraisable.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, _SOON_SECONDS)
        else:
            self.hook(unraisable)


@contextlib.contextmanager
def interruptible(*, lasts: bool) -> Iterator[Interruption]:
    """Have signals interrupt what is done in this context.

    Args:
        lasts: the process ends with it, and one that comes later ends it at once; else they do
            afterwards what they did before.

    Yields:
        Whether one came.
    """
    found = Interruption()
    if threading.current_thread() is not threading.main_thread():  # which signals interrupt
        yield found
        return
    before = {signum: signal.signal(signum, found.first) for signum in _SIGNALS}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _again)
    sys.unraisablehook = found.swallowed
    try:
        yield found
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = found.hook
        if lasts:
            end_at_next()
        for signum, handler in before.items() if not lasts else ():
            signal.signal(signum, handler)


def end_at_next() -> None:
    """Have the next signal end this process at once."""
    for signum in _SIGNALS:
        signal.signal(signum, _end)


def _again(signum: int, frame: FrameType | None) -> None:
    """Unwind, where the first try was swallowed."""
    del signum, frame
    raise KeyboardInterrupt


def _end(signum: int, frame: FrameType | None) -> None:
    """End, and all that this process has started."""
    del frame
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    os._exit(_BASE + signum)
