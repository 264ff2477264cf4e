"""What a person sees while raykernel works: progress, tables, errors.

On a terminal a bar with rate and time left; piped, plain lines at growing intervals.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 140
"""Columns of a table where no terminal says how many there are."""

LINE_SECONDS = 10.0
"""Piped output gets a progress line at most this often."""


_ACTING = [
    *(code for code in range(0x20) if chr(code) not in "\n\t"),
    *range(0x7F, 0xA0),
    0x061C, *range(0x200E, 0x2010), *range(0x2028, 0x202F), *range(0x2066, 0x206A),
]  # fmt: skip
_SPELT = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _ACTING}


def visible(text: str) -> str:
    """Text that a terminal only shows.

    A label, a file name or an error may hold what moves the cursor, recolours the screen, sets
    its title or reverses what is read; such characters are spelt out as
    Python spells them.

    Args:
        text: from wherever.

    Returns:
        The same without control characters but line ends and tabs, and without those that turn the
        direction of writing.
    """
    return text.translate(_SPELT)


class _PlainConsole(Console):
    """A console on which text is text: neither rich's markup nor the terminal's own codes."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; styles come from rich's own objects alone."""
        shown = (visible(one) if isinstance(one, str) else one for one in objects)
        super().print(*shown, **{"markup": False, **options})


class Screen:
    """Standard output for results, standard error for progress and messages."""

    def __init__(self) -> None:
        self.out = _PlainConsole(highlight=False, soft_wrap=True)
        if not self.out.is_terminal:
            self.out.width = PIPED_WIDTH
        self.err = _PlainConsole(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one message to standard error."""
        self.err.print(text, markup=False)

    def note(self, text: str) -> None:
        """Say what a person should know, though nothing is wrong."""
        self.say(f"Note: {text}")

    def aside(self, text: str) -> None:
        """The same of what is worth knowing where one run was asked for, but not of every one."""
        self.note(text)

    @contextlib.contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Show that something of unknown length is under way."""
        if not self.err.is_terminal:
            self.say(text + " ...")
            yield
            return
        with self.err.status(escape(visible(text))):
            yield

    @contextlib.contextmanager
    def progress(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show counted work; of work that is interrupted, say how far it got.

        Args:
            text: what is counted.
            total: how many there are.

        Yields:
            A function that takes how many more are done.

        Raises:
            KeyboardInterrupt: as it was.
        """
        done = 0
        with contextlib.ExitStack() as opened:
            if self.err.is_terminal:
                bar = opened.enter_context(self.bar())
                task = bar.add_task(escape(visible(text)), total=total)
                show: Callable[[int], None] = partial(bar.advance, task)
            else:
                show = PlainProgress(text, total, self.say).advance

            def advance(count: int) -> None:
                nonlocal done
                done += count
                show(count)

            try:
                yield advance
            except KeyboardInterrupt:
                opened.close()
                self.say(f"{text}: {done} of {total} done.")
                raise

    def bar(self) -> Progress:
        """A progress bar with count, pace and time left."""
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            PaceColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.err,
        )

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """Print a table to standard output, cells as they are; plain where it is piped."""
        table = Table(title=escape(visible(title)) or None, title_justify="left")
        for number, column in enumerate(columns):
            numeric = rows and all(is_number(row[number]) for row in rows)
            # A long value goes on in the next line: cut short it could not be copied.
            justify: Any = "right" if numeric else "left"
            table.add_column(Text(visible(column)), justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))  # `[sgd]` is no markup
        self.out.print(table)

    def facts(self, rows: Sequence[Sequence[str]], title: str = "") -> None:
        """Print names and values, one pair a line."""
        table = Table(title=escape(visible(title)) or None, title_justify="left", show_header=False)
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))
        self.out.print(table)


class SharedScreen(Screen):
    """The screen of many runs: what one of them has noted is not repeated by the next."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: set[str] = set()

    def note(self, text: str) -> None:
        """Say it if no run has said it before."""
        if text not in self._noted:
            self._noted.add(text)
            super().note(text)

    def aside(self, text: str) -> None:
        """Nothing."""


class PaceColumn(ProgressColumn):
    """How fast work is finished."""

    def render(self, task: Task) -> Text:
        """The pace, once there is one."""
        return Text(pace(task.speed) if task.speed else "")


class PlainProgress:
    """Progress as lines: the first, the last, and one every few seconds between."""

    def __init__(self, text: str, total: int, say: Callable[[str], None]) -> None:
        self.text, self.total, self.say = text, total, say
        self.done = 0
        self.start = self.last = time.monotonic()

    def advance(self, count: int) -> None:
        """Count finished work and print a line when one is due."""
        self.done += count
        now = time.monotonic()
        if self.done < self.total and now - self.last < LINE_SECONDS:
            return
        self.last = now
        rate = self.done / max(now - self.start, 1e-9)
        # A run that was killed when all was done but its result has nothing to count.
        left = (self.total - self.done) / rate if rate else 0.0
        self.say(f"{self.text}: {self.done}/{self.total}, {pace(rate)}, {duration(left)} left")


def is_number(text: str) -> bool:
    """Whether a cell is empty or holds a number."""
    try:
        float(text or 0)
    except ValueError:
        return False
    return True


def counted(number: int, thing: str) -> str:
    """`1 chunk`, `2 chunks`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def short(value: float) -> str:
    """Three digits, without an exponent below a million."""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    rounded = f"{value:.3g}"  # 999.6 has four digits as soon as it is rounded
    return f"{value:.0f}" if abs(float(rounded)) >= 1000 and abs(value) < 1e6 else rounded


def duration(seconds: int | float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d}"
    )


def pace(rate: float) -> str:
    """Finished work per second, or what each piece takes where that is longer."""
    if rate >= 1 or not rate:
        return f"{short(rate)}/s"
    seconds = 1 / rate
    return f"{short(seconds) + ' s' if seconds < 60 else duration(seconds)} each"


def size(count: int | float) -> str:
    """Bytes as a person says them, in powers of 1024."""
    count = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
