"""The result tables of a store: what a row is, its columns, key and order.

A new table is an entry here and its columns in a module beside; `raykernel query` has it then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa

from raykernel.errors import InputError, nearest
from raykernel.store import kernelcolumns, trialcolumns
from raykernel.store.columns import Column, schema_of


@dataclass(frozen=True, slots=True)
class ResultTable:
    """A table of results."""

    about: str
    """What a row is."""
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    """Columns that name a question. Its newest answer, one or more rows, is the one that counts."""
    folder: str = ""
    """What the rows are of, below the store; `{column}` inserts a value. They last as long as it;
    empty: as long as the store."""
    order: tuple[str, ...] = ("created",)
    """Columns that rows are sorted by."""
    schema: pa.Schema = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "schema", schema_of(self.columns))


TABLES = {
    "kernels": ResultTable(
        "Kernel regression: one row per kernel, kind and solver settings.",
        kernelcolumns.KERNELS,
        key=("fingerprint", "kind", "solver"),
        folder="kernels/{fingerprint}",
    ),
    "spectra": ResultTable(
        "Spectra of a kernel: one row per set of layers, per layer group, and per change of a set.",
        kernelcolumns.SPECTRA,
        key=("fingerprint", "kind", "groups", "ridge"),
        folder="kernels/{fingerprint}",
    ),
    "selections": ResultTable(
        "Choices of layers that were ranked: one row per choice kept.",
        kernelcolumns.SELECTIONS,
        key=("fingerprint", "kind", "settings", "ridge"),
        folder="selections",
        order=("created", "rank"),
    ),
    "trials": ResultTable(
        "Fine-tuning: one row per run that ended.",
        trialcolumns.TRIALS,
        key=("trial",),
        folder="trials/{trial}",
    ),
    "curves": ResultTable(
        "Curves of fine-tuning: one row per run and evaluation.",
        trialcolumns.CURVES,
        key=("trial",),
        folder="trials/{trial}",
        order=("trial", "step"),
    ),
    "twins": ResultTable(
        "How far fine-tuning is from its linear models: one row per run and split.",
        trialcolumns.TWINS,
        key=("trial",),
        folder="trials/{trial}",
        order=("created", "split"),
    ),
    "bounds": ResultTable(
        "Bounds on how far fine-tuning gets: one row per run and bound.",
        trialcolumns.BOUNDS,
        key=("trial",),
        folder="trials/{trial}",
        order=("trial",),
    ),
    "behavior": ResultTable(
        "Verdicts whether fine-tuning behaves like its kernel: one row per kernel and run.",
        trialcolumns.BEHAVIOR,
        key=("fingerprint", "trial", "solver", "criteria"),
        folder="kernels/{fingerprint}",
    ),
    "plans": ResultTable(
        "What studies were begun with: one row per run to be done, ended or not.",
        trialcolumns.PLANS,
        key=("study", "asked", "arm"),
        order=("created", "number"),
    ),
    "runs": ResultTable(
        "Runs of studies: one row per run that ended, well or not.",
        trialcolumns.RUNS,
        key=("study", "run"),
    ),
}


def result_table(name: str) -> ResultTable:
    """A result table by name.

    Args:
        name: a key of `TABLES`.

    Returns:
        The table.

    Raises:
        InputError: if there is none of this name.
    """
    if name not in TABLES:
        raise InputError(f"found table {name!r}, expected a result table; {nearest(name, TABLES)}")
    return TABLES[name]
