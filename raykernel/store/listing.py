"""The tables of a store that can be queried.

kernels    a row per result: (kernel, kind, solver settings)
blocks     a row per block file, from its header
examples   a row per example of every kernel
groups     a row per (kernel, kind, layer group), with the trace of K(train, train)
predictions
           a row per (kernel, solution, test example) that was predicted without its kernel
trials     a row per fine-tuning run that ended
curves     a row per (trial, evaluation)
twins      a row per (trial, split): how far fine-tuning is from its linear models
bounds     a row per (trial, bound) on that
behavior   a row per verdict: (kernel, fine-tuning run, solver settings, criteria)
runs       a row per run of a study that ended, well or not
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from raykernel.store import arrowfile, manifest
from raykernel.store.blockfile import BLOCK_GLOB
from raykernel.store.blocks import Store
from raykernel.store.kernels import KernelHandle
from raykernel.store.predictions import PREDICTION_GLOB, solution_of
from raykernel.store.results import TABLES as RESULT_TABLES

_BLOCKS = pa.schema(
    [
        ("fingerprint", pa.string()),
        ("task", pa.string()),
        ("model", pa.string()),
        ("i", pa.int64()),
        ("j", pa.int64()),
        ("row0", pa.int64()),
        ("row1", pa.int64()),
        ("col0", pa.int64()),
        ("col1", pa.int64()),
        ("num_groups", pa.int64()),
        ("kinds", pa.list_(pa.string())),
        ("dtype", pa.string()),
        ("bytes", pa.int64()),
        ("seconds", pa.float64()),
        ("host", pa.string()),
        ("peak_memory_bytes", pa.int64()),
        ("created", pa.timestamp("us", tz="UTC")),
    ]
)
_EXAMPLES = pa.schema(
    [
        ("fingerprint", pa.string()),
        ("example", pa.int64()),
        ("id", pa.string()),
        ("split", pa.string()),
        ("label", pa.string()),  # the label's name
    ]
)
_GROUPS = pa.schema(
    [
        ("fingerprint", pa.string()),
        ("kind", pa.string()),
        ("layer_group", pa.string()),  # GROUP is a keyword of SQL
        ("trace", pa.float64()),
    ]
)

_PREDICTIONS = pa.schema(
    [
        ("fingerprint", pa.string()),
        ("task", pa.string()),
        ("model", pa.string()),
        ("kind", pa.string()),
        ("solved_by", pa.string()),
        ("ridge", pa.float64()),
        ("f0_scaling", pa.float64()),
        ("gamma", pa.float64()),
        ("c", pa.float64()),
        ("num_groups", pa.int64()),
        ("example", pa.int64()),
        ("fitted", pa.list_(pa.float64())),  # K(x, train) α: the outputs without f0(x) / s
    ]
)


@dataclass(frozen=True, slots=True)
class Listing:
    """A table and how a store fills it."""

    schema: pa.Schema
    rows: Callable[[Store], pa.Table]

    def empty(self) -> pa.Table:
        """The table without rows."""
        return self.schema.empty_table()


def _blocks(store: Store) -> pa.Table:
    rows = [row for handle in _handles(store) for row in _block_rows(handle)]
    table = pa.Table.from_pylist(rows, schema=_BLOCKS.set(16, pa.field("created", pa.string())))
    return table.cast(_BLOCKS)


def _names(handle: KernelHandle) -> dict[str, Any]:
    return {key: manifest.at(handle.identity, key, "name") for key in ("task", "model")}


def _block_rows(handle: KernelHandle) -> Iterator[dict[str, Any]]:
    names = _names(handle)
    for path in sorted(handle.path.glob(BLOCK_GLOB)):
        header = arrowfile.read_header(path)
        yield {**header, **header.get("provenance", {}), **names, "bytes": path.stat().st_size}


def _examples(store: Store) -> pa.Table:
    tables = [_EXAMPLES.empty_table()]
    for handle in _handles(store):
        examples = handle.examples()
        count = examples.num_rows
        numbers = pa.array(range(count), pa.int64())
        names = pa.array([handle.fingerprint] * count, pa.string())
        for name in ("fingerprint", "example"):
            if name in examples.column_names:
                examples = examples.drop_columns(name)
        examples = examples.add_column(0, "example", numbers).add_column(0, "fingerprint", names)
        tables.append(examples)
    # Kernels may have further columns: the union of all, null where a kernel lacks one.
    return pa.concat_tables(tables, promote_options="permissive")


def _groups(store: Store) -> pa.Table:
    rows = [row for handle in _handles(store) for row in _group_rows(handle)]
    return pa.Table.from_pylist(rows, schema=_GROUPS)


def _group_rows(handle: KernelHandle) -> Iterator[dict[str, Any]]:
    """Traces from the diagonal cells alone; null while one is missing."""
    cells = [cell for cell in handle.grid.cells() if cell.i == cell.j]
    absent = {(cell.i, cell.j) for cell in handle.missing(range(handle.grid.num_cols))}
    blocks = [handle.read_block(cell) for cell in cells if (cell.i, cell.j) not in absent]
    if not blocks:
        return
    traces = sum(
        np.einsum("giaia->g", block.values, dtype=np.float64, optimize=False) for block in blocks
    )
    complete = len(blocks) == len(cells)
    for (kind, group), trace in zip(blocks[0].names, np.atleast_1d(traces), strict=True):
        row = {"kind": kind, "layer_group": group, "trace": float(trace) if complete else None}
        yield {"fingerprint": handle.fingerprint, **row}


def _predictions(store: Store) -> pa.Table:
    rows = [row for handle in _handles(store) for row in _prediction_rows(handle)]
    return pa.Table.from_pylist(rows, schema=_PREDICTIONS)


def _prediction_rows(handle: KernelHandle) -> Iterator[dict[str, Any]]:
    for path in sorted(handle.path.glob(PREDICTION_GLOB)):
        file = arrowfile.read(path, check=True)
        solution = solution_of(path, file.header)
        of = {
            "fingerprint": handle.fingerprint,
            **_names(handle),
            "kind": solution.kind,
            "solved_by": solution.point.solver.value,
            "ridge": solution.point.ridge,
            "f0_scaling": solution.point.f0_scaling,
            "gamma": solution.point.gamma,
            "c": solution.point.c,
            "num_groups": len(solution.groups),
        }
        for row in file.table.to_pylist():
            yield {**of, **row}


def _handles(store: Store) -> Iterator[KernelHandle]:
    for name in store.fingerprints():
        yield store.open(name)


TABLES = {
    "kernels": Listing(RESULT_TABLES["kernels"].schema, partial(Store.results, table="kernels")),
    "blocks": Listing(_BLOCKS, _blocks),
    "examples": Listing(_EXAMPLES, _examples),
    "groups": Listing(_GROUPS, _groups),
    "predictions": Listing(_PREDICTIONS, _predictions),
    "trials": Listing(RESULT_TABLES["trials"].schema, partial(Store.results, table="trials")),
    "curves": Listing(RESULT_TABLES["curves"].schema, partial(Store.results, table="curves")),
    "twins": Listing(RESULT_TABLES["twins"].schema, partial(Store.results, table="twins")),
    "bounds": Listing(RESULT_TABLES["bounds"].schema, partial(Store.results, table="bounds")),
    "behavior": Listing(RESULT_TABLES["behavior"].schema, partial(Store.results, table="behavior")),
    "runs": Listing(RESULT_TABLES["runs"].schema, partial(Store.results, table="runs")),
    "spectra": Listing(RESULT_TABLES["spectra"].schema, partial(Store.results, table="spectra")),
    "selections": Listing(
        RESULT_TABLES["selections"].schema, partial(Store.results, table="selections")
    ),
}
"""By name, as SQL knows them."""
