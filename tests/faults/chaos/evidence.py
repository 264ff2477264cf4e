"""What a store holds: its numbers, what must not change, and what must not be left."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from raykernel.store.blocks import Store
from raykernel.store.commit import STALE_SECONDS
from raykernel.store.tables import TABLES
from raykernel.store.verify import verify
from tests.faults.problem import NUM_BLOCKS, NUM_PREDICTIONS, NUM_TRIALS

HOW = {
    *("created", "path", "seconds", "host", "versions", "peak_memory_bytes"),
    *("overrides", "blocks_computed"),
}
"""Columns that say when, where, how fast and by which command a row was made."""


def steps(store: Path) -> int:
    """Commits of blocks, predictions and runs; runs that are compacted do not count."""
    return sum(
        1
        for pattern in ("kernels/*/block-*", "kernels/*/prediction-*", "results/runs/*.arrow")
        for _ in store.glob(pattern)
    )


def numbers(store: Path) -> dict[str, Any]:
    """Everything that a store says, to the bit: arrays by file, rows by table."""
    found: dict[str, Any] = {}
    for path in sorted([*store.glob("kernels/*/*"), *store.glob("trials/*/**/*")]):
        if path.is_file() and not path.name.startswith("."):
            found[str(path.relative_to(store))] = _values(path)
    for table in TABLES:
        rows = Store(store).results(table).to_pylist()
        found[table] = sorted(
            _text({name: value for name, value in row.items() if name not in HOW}) for row in rows
        )
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of files and tables that two stores do not have in common."""
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def _values(path: Path) -> str:
    """A name for the content of a file; of an Arrow file for its columns, without provenance."""
    if path.suffix != ".arrow":
        return xxhash.xxh3_64_hexdigest(path.read_bytes())
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    table = table.replace_schema_metadata(None).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return xxhash.xxh3_64_hexdigest(sink.getvalue())


def _text(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, default=str)


# ------------------------------------------------------------------ what was committed


@dataclass(frozen=True)
class Snapshot:
    """Everything committed at one moment."""

    files: dict[str, tuple[int, str]]
    """Inode and checksum of blocks and predictions: a file written again has another inode."""
    rows: frozenset[str]
    """Of runs that ended and their results, with the time at which they were written."""

    @classmethod
    def of(cls, store: Path) -> Snapshot:
        """The present."""
        files = [*store.glob("kernels/*/block-*"), *store.glob("kernels/*/prediction-*")]
        known = {
            file.name: (file.stat().st_ino, xxhash.xxh3_64_hexdigest(file.read_bytes()))
            for file in files
        }
        rows = {
            table + _text(row)
            for table in ("runs", "trials")
            for row in (Store(store).results(table).to_pylist() if store.exists() else [])
        }
        return cls(known, frozenset(rows))

    def lost(self, later: Snapshot) -> list[str]:
        """What is not there later exactly as it is now."""
        files = [name for name, is_now in self.files.items() if later.files.get(name) != is_now]
        return [*files, *(row[:300] for row in self.rows - later.rows)]


# ------------------------------------------------------------------ what is left


def check_counts(store: Path) -> list[str]:
    """What is there too often or too rarely."""
    runs = Store(store).results("runs").to_pylist()
    trials = Store(store).results("trials").to_pylist()
    of_trials = {(row["learning_rate"], row["seed"]) for row in trials}
    kernels = list(store.glob("kernels/*"))
    found = {
        "kernels": (len(kernels), 1),
        "blocks": (len(list(store.glob("kernels/*/block-*"))), NUM_BLOCKS),
        "predictions": (len(list(store.glob("kernels/*/prediction-*"))), NUM_PREDICTIONS),
        "rows of runs": (len(runs), NUM_TRIALS),
        "runs": (len({row["run"] for row in runs}), NUM_TRIALS),
        "runs that went well": (sum(row["status"] == "ok" for row in runs), NUM_TRIALS),
        "rows of trials": (len(trials), NUM_TRIALS),
        "trials": (len(of_trials), NUM_TRIALS),
        "rows of kernels": (Store(store).results("kernels").num_rows, 1),
    }
    return [
        f"{count} {name}, expected {wanted}"
        for name, (count, wanted) in found.items()
        if count != wanted
    ]


def sweep_up(store: Path) -> tuple[int, list[str]]:
    """Let an hour pass and `verify --remove`; temporaries of the dead, and what else is wrong.

    Returns:
        Temporaries that were removed, and what the command finds or leaves.
    """
    left = [path for path in store.rglob(".*.tmp") if path.is_file()]
    past = time.time() - 2 * STALE_SECONDS
    for path in left:
        os.utime(path, (past, past))
    report = verify(store, remove=True)
    wrong = [f"{bad.path}: {bad.reason}" for bad in report.bad]
    if report.num_missing:
        wrong.append(f"{report.num_missing} blocks missing")
    hidden = [path for path in store.rglob(".*") if not path.name.startswith(".raykernel")]
    checkpoints = list(store.rglob("checkpoint*"))
    return len(left), [*wrong, *(f"{path} is left" for path in [*hidden, *checkpoints])]
