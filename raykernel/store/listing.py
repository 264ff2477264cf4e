"""The tables of a store that can be queried: those of results, and what the kernels' files hold."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from raykernel.location import names, sizes
from raykernel.store import arrowfile, kernelcolumns, manifest, tables
from raykernel.store.blockfile import BLOCK_GLOB
from raykernel.store.blocks import Store
from raykernel.store.columns import Column, schema_of
from raykernel.store.kernels import KernelHandle
from raykernel.store.predictions import PREDICTION_GLOB, solution_of

_BLOCKS, _EXAMPLES, _GROUPS, _PREDICTIONS = map(
    schema_of,
    (
        kernelcolumns.BLOCKS,
        kernelcolumns.EXAMPLES,
        kernelcolumns.GROUPS,
        kernelcolumns.PREDICTIONS,
    ),
)


@dataclass(frozen=True, slots=True)
class Columns:
    """What a table has."""

    about: str
    """What a row is."""
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Listing(Columns):
    """A table and how a store fills it."""

    rows: Callable[[Store], pa.Table]

    def empty(self) -> pa.Table:
        """The table without rows."""
        return schema_of(self.columns).empty_table()


def _blocks(store: Store) -> pa.Table:
    rows = [row for handle in _handles(store) for row in _block_rows(handle)]
    table = pa.Table.from_pylist(
        rows,
        schema=_BLOCKS.set(_BLOCKS.get_field_index("created"), pa.field("created", pa.string())),
    )
    return table.cast(_BLOCKS)


def _task_and_model(handle: KernelHandle) -> dict[str, Any]:
    return {key: manifest.at(handle.identity, key, "name") for key in ("task", "model")}


def _block_rows(handle: KernelHandle) -> Iterator[dict[str, Any]]:
    bytes_by_name = sizes(handle.path)
    for name in sorted(fnmatch.filter(bytes_by_name, BLOCK_GLOB)):
        header = arrowfile.read_header(handle.path / name)
        found = {**header, **header.get("provenance", {}), "bytes": bytes_by_name[name]}
        yield found | _task_and_model(handle)


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
    for name in sorted(fnmatch.filter(names(handle.path), PREDICTION_GLOB)):
        path = handle.path / name
        file = arrowfile.read(path, check=True)
        solution = solution_of(path, file.header)
        of = {
            "fingerprint": handle.fingerprint,
            **_task_and_model(handle),
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


def _results(name: str) -> Listing:
    table = tables.TABLES[name]
    return Listing(table.about, table.columns, partial(Store.results, table=name))


TABLES = {
    "kernels": _results("kernels"),
    "blocks": Listing("Blocks: one row per file.", kernelcolumns.BLOCKS, _blocks),
    "examples": Listing(
        "Examples: one row per kernel and example; a kernel may have further columns.",
        kernelcolumns.EXAMPLES,
        _examples,
    ),
    "groups": Listing(
        "Layer groups: one row per kernel, kind and group.", kernelcolumns.GROUPS, _groups
    ),
    "predictions": Listing(
        "Predictions without a kernel: one row per solution and test example.",
        kernelcolumns.PREDICTIONS,
        _predictions,
    ),
    **{name: _results(name) for name in tables.TABLES if name != "kernels"},
}
"""By name, as SQL knows them."""

ENTRIES = Columns(
    "Entries of the kernel of `--kernel`: one row per pair of examples and outputs.",
    kernelcolumns.ENTRIES,
)
"""A table that is there only where a kernel is named, see `KernelHandle.table`."""
