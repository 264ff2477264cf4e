"""Command line: `python -m benchmarks [--only W1,W2] [--rounds 5] [--write]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

from rich.console import Console

from benchmarks.comparison import comparison, regression_table
from benchmarks.scaling import memory_table, time_table
from benchmarks.selection import selection_table
from benchmarks.sharing import kinds_table, lora_table
from benchmarks.tables import PLAIN_RESULTS, RESULTS, Table, circumstances, write_results
from benchmarks.timing import Say, settle
from benchmarks.workers import worker_table
from benchmarks.workloads import WORKLOADS


def _compare(name: str, rounds: int, say: Say) -> Table:
    return comparison(WORKLOADS[name](), rounds, say)


SECTIONS: dict[str, Callable[[int, Say], Table]] = {
    **{name: partial(_compare, name) for name in WORKLOADS},
    "W6": regression_table,
    "kinds": kinds_table,
    "lora": lora_table,
    "scaling": time_table,
    "memory": memory_table,
    "workers": worker_table,
    "select": selection_table,
}
"""What can be measured, by name: from the number of rounds and who is told of progress."""


def _say(console: Console, name: str, text: str) -> None:
    console.print(f"{name}: {text}", markup=False)


def main() -> int:
    """Measure the wanted sections, print their tables, and write them if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=list(SECTIONS),
        help=f"comma-separated, of {', '.join(SECTIONS)} (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="calls of each that count")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument(
        "--plain-heap", action="store_true", help="do not keep freed pages, as plain processes do"
    )
    options = parser.parse_args()
    if unknown := [name for name in options.only if name not in SECTIONS]:
        parser.error(f"--only: found {', '.join(unknown)}, expected {', '.join(SECTIONS)}")
    if options.rounds < 1:
        parser.error(f"--rounds: found {options.rounds}, expected at least 1")
    settle(keep_heap=not options.plain_heap)
    screen, aside = Console(), Console(stderr=True, highlight=False)
    if not screen.is_terminal:
        screen.width = 140
    tables = []
    for name in options.only:
        table = SECTIONS[name](options.rounds, partial(_say, aside, name))
        table.show(screen)
        tables.append(table)
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    for fact in circumstances(command):
        screen.print(fact, markup=False, highlight=False)
    if options.write:
        write_results(tables, command, PLAIN_RESULTS if options.plain_heap else RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
