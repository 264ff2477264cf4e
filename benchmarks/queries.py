"""Result tables of many fine-tuning runs: `python -m benchmarks.queries [--trials 3000]`.

Writes them into a store of its own as a study does, one file per answer, and measures compaction
and every named query before and after it, in this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from raykernel.store.blocks import Store
from raykernel.store.compaction import compact
from raykernel.store.named import QUERIES
from raykernel.store.query import query

POINTS = 9
"""Evaluations of a run."""
OTHER = {
    "max of curves": "SELECT trial, max(dev_score) AS best FROM curves GROUP BY ALL",
    "trials with curves": "SELECT task, max(dev_score) FROM trials JOIN curves USING (trial) "
    "GROUP BY ALL",
}


def write(store: Store, number: int) -> None:
    """One run as it ends: its curve, its result, and its row in the table of runs."""
    trial = f"{number:016x}"
    points = [
        {"trial": trial, "step": step, "dev_loss": 1 / (step + 1), "dev_score": number % 97 / 97}
        for step in range(POINTS)
    ]
    store.write_results("curves", points)
    problem = {"task": f"task-{number % 5}", "model": "roberta", "prompt": "manual", "k": 16}
    method = {"method": "full", "optimizer": "sgd" if number % 2 else "adam", "metric": "accuracy"}
    found = {"seed": number % 7, "dev": number % 89 / 89, "finetuned": number % 83 / 83}
    cost = {"seconds": 10.0, "peak_memory_bytes": 2**30, "overrides": ["task.k=16"] * 8}
    # As long as real ones; their content differs by run.
    identity = {"identity": json.dumps({"task": "x" * 1200, "run": number}), "training": "y" * 400}
    store.write_result("trials", {"trial": trial} | problem | method | found | cost | identity)
    end = {"study": _study(number), "run": trial, "arm": "SGD", "command": "finetune"}
    results = {"status": "ok", "results": json.dumps([["trials", {"trial": trial}]])}
    store.write_result("runs", end | results)


def write_plan(store: Store, study: str, trials: int) -> None:
    """What a study is begun with, of which one run in a hundred is left to do."""
    key = {"study": study, "asked": "", "arm": "SGD"}
    rows = [
        {"number": number, "command": "finetune", "overrides": ["task.k=16"] * 8}
        | {"run": f"{number + trials // 100:016x}"}
        for number in range(trials)
        if _study(number) == study
    ]
    store.write_results("plans", [key | row for row in rows])


def _study(number: int) -> str:
    return f"study-{number % 2}"


def seconds(call: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Medians of the time that a call takes, and of that which this process works meanwhile."""
    taken = []
    for _ in range(rounds):
        start, worked = time.perf_counter(), time.process_time()
        call()
        taken.append((time.perf_counter() - start, time.process_time() - worked))
    wall, own = zip(*taken, strict=True)
    return statistics.median(wall), statistics.median(own)


def main() -> int:
    """Write, compact, ask, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.queries", description=__doc__)
    parser.add_argument("--trials", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5, help="calls of each query that count")
    options = parser.parse_args()
    named = {
        name: (
            entry.sql,
            [*map(_study, range(len(entry.arguments))), *[""] * entry.takes_overrides],
        )
        for name, entry in QUERIES.items()
    }
    asked = named | {name: (sql, []) for name, sql in OTHER.items()}
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")

        def write_all() -> None:
            for study in {_study(number) for number in range(options.trials)}:
                write_plan(store, study, options.trials)
            for number in range(options.trials):
                write(store, number)

        rows = [(f"write {options.trials} runs", "", seconds(write_all, 1))]
        for state, rounds in (("before", 1), ("after", options.rounds)):
            for name, (sql, given) in asked.items():
                ask = lambda: query(sql, store.path, parameters=given)  # noqa: B023, E731
                ask()
                rows.append((name, state, seconds(ask, rounds)))
            one = {"trial": f"{options.trials // 2:016x}"}
            rows.append(("row of a run", state, seconds(lambda: store.rows("trials", **one), 20)))  # noqa: B023
            if state == "before":
                rows.append(("compaction", "", seconds(lambda: compact(store.path), 1)))
    table = Table("what", "compaction", "seconds", "of them at work")
    for name, state, (wall, own) in rows:
        table.add_row(name, state, f"{wall:.4f}", f"{own:.4f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
