"""Tables for the screen and for RESULTS.md."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import rich.table
from rich.console import Console

from benchmarks.contenders import distribution_version

RESULTS = Path(__file__).with_name("RESULTS.md")
PLAIN_RESULTS = Path(__file__).with_name("RESULTS-plain-heap.md")
DISTRIBUTIONS = ("raykernel", "torch", "transformers", "ray", "dattri-llm", "opacus")


@dataclass(slots=True)
class Table:
    """A title, rows of text, and what has to be said below them."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Add a row."""
        self.rows.append(cells)

    def note(self, text: str) -> None:
        """Add a sentence below the table."""
        self.notes.append(text)

    def show(self, console: Console) -> None:
        """Print it."""
        shown = rich.table.Table()
        for number, column in enumerate(self.columns):
            shown.add_column(column, justify="left" if number in self._texts() else "right")
        for row in self.rows:
            shown.add_row(*row)
        console.print(self.title, style="bold", markup=False, highlight=False)
        console.print(shown)
        for note in self.notes:
            console.print(note, markup=False, highlight=False)
        console.print()

    def markdown(self) -> str:
        """The same as Markdown."""
        marks = ["---" if number in self._texts() else "---:" for number in range(self._width)]
        lines = [self.columns, marks, *self.rows]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        notes = "\n".join(f"- {note}" for note in self.notes)
        return f"## {self.title}\n\n{body}\n\n{notes}\n"

    @property
    def _width(self) -> int:
        return len(self.columns)

    def _texts(self) -> set[int]:
        """Columns that are read, not compared: the first, and the last if it says `note`."""
        return {0, self._width - 1} if self.columns[-1] == "note" else {0}


def circumstances(command: str) -> list[str]:
    """Machine, versions, date and command."""
    versions = [f"{name} {distribution_version(name) or '-'}" for name in DISTRIBUTIONS]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return [
        f"Machine: {_processor()}, {os.cpu_count()} cores, {platform.system()}; one thread used.",
        f"Load average at the end (1, 5, 15 minutes): {load}; above 1, others were at work, too.",
        f"Versions: Python {platform.python_version()}, {', '.join(versions)}.",
        f"Date: {datetime.date.today().isoformat()}. Command: `{command}`",
    ]


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_results(tables: Sequence[Table], command: str, path: Path) -> None:
    """Replace a file of results, but for its sections that other commands write."""
    intro = "What the columns mean and how to measure again: README.md in this folder."
    facts = "\n".join(f"- {fact}" for fact in circumstances(command))
    body = "\n".join(table.markdown() for table in tables)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    others = "".join(f"\n{found[0]}\n" for found in _SECTION.finditer(before))
    path.write_text(f"# Results\n\n{intro}\n\n{facts}\n\n{body}{others}", encoding="utf-8")


_SECTION = re.compile(r"<!-- begin (?P<name>\w+) -->.*?<!-- end (?P=name) -->", re.DOTALL)
"""A part of the results that a command of its own writes."""


def write_section(name: str, tables: Sequence[Table], command: str, path: Path) -> None:
    """Replace one section of a file of results, or append it; all else stays."""
    facts = "\n".join(f"- {fact}" for fact in circumstances(command))
    body = "\n".join(table.markdown() for table in tables)
    section = f"<!-- begin {name} -->\n{body}{facts}\n<!-- end {name} -->"
    before = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    parts = {found["name"]: found.span() for found in _SECTION.finditer(before)}
    start, stop = parts.get(name, (len(before), len(before)))
    glue, end = ("", before[stop:]) if name in parts else ("\n", "\n")
    path.write_text(before[:start] + glue + section + end, encoding="utf-8")
