"""The files of one stored kernel, one at a time: what is there, written, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from raykernel.config import Json
from raykernel.errors import BlockCorruptError
from raykernel.location import RemotePath, StorePath, names
from raykernel.store import arrowfile, blockfile
from raykernel.store.arrowfile import ArrowFile
from raykernel.store.blockfile import Block, Kernels, block_name, logits_name
from raykernel.store.commit import commit_first
from raykernel.store.grid import Cell, Grid
from raykernel.store.manifest import Manifest
from raykernel.store.sealed import seal, unseal

PINNED = ("rates", "features", "precision", "projection", "lora")
"""What a kernel's first worker measures or counts, see `KernelFiles.pin`."""

_FETCHED_BYTES = 1 << 30
"""Of a remote kernel that a handle keeps on this machine, about."""


@dataclass(frozen=True)
class KernelFiles:
    """The folder of a kernel."""

    path: StorePath
    manifest: Manifest
    _checked: set[tuple[StorePath, int, int]] = field(
        default_factory=set, repr=False, compare=False
    )
    # Files (with inode and time) whose checksum this process has compared: once is enough.
    _fetched: dict[StorePath, ArrowFile] = field(default_factory=dict, repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """Name of the kernel in its store."""
        return self.path.name

    @property
    def identity(self) -> dict[str, Json]:
        """What decides the kernel's numbers."""
        return self.manifest.identity

    @property
    def grid(self) -> Grid:
        """How the kernel is cut."""
        return self.manifest.grid

    @property
    def num_outputs(self) -> int:
        """Outputs c of the model."""
        return self.manifest.num_outputs

    # ------------------------------------------------------------ what is there

    def missing(self, rows: range | None = None) -> list[Cell]:
        """Cells without block file, or whose row block has no logits, in the grid's order.

        Args:
            rows: examples whose kernel with train is wanted; None: all.

        Returns:
            The cells to compute.
        """
        present = self.present()
        return [
            cell
            for cell in self.grid.cells(rows)
            if block_name(cell.i, cell.j) not in present or logits_name(cell.i) not in present
        ]

    def missing_begun(self) -> list[Cell]:
        """Missing cells of what somebody wants: of train and dev, and of row blocks of test begun.

        Of fine-tuned weights (`trial` in the identity) only test is wanted: `raykernel behavior`
        compares no other block.

        Returns:
            The cells, in the grid's order.
        """
        present, test = self.present(), self.grid.test
        cells = self.grid.cells(test)
        begun = {cell.i for cell in cells if block_name(cell.i, cell.j) in present}
        known = not self.identity.get("trial")
        return [
            cell
            for cell in self.missing()
            if (cell.i in begun if cell.rows.start in test else known)
        ]

    def present(self) -> set[str]:
        """Names of the kernel's files."""
        return set(names(self.path))

    def examples(self) -> pa.Table:
        """The examples, train first, as the table that was handed in."""
        return self._read("examples.arrow").table.replace_schema_metadata(None)

    # ------------------------------------------------------------ writing

    def write_block(
        self, cell: Cell, kernels: Kernels, provenance: Mapping[str, Json] | None = None
    ) -> int:
        """Commit the block of one cell.

        Args:
            cell: the cell.
            kernels: block of every layer group, by kind.
            provenance: `seconds`, `peak_memory_bytes` and versions, as the worker knows them;
                host, process, time and the versions of raykernel and pyarrow are added.

        Returns:
            Bytes written.

        Raises:
            ValueError: if a block has another shape than the cell, or more precision than the
                kernel stores.
        """
        try:
            table = blockfile.to_table(kernels, self._shape(cell), self.manifest.dtype)
        except ValueError as error:
            raise ValueError(f"block ({cell.i}, {cell.j}): {error}") from error
        header: dict[str, Json] = self.header(cell.i, cell.rows) | {
            "j": cell.j,
            "col0": cell.cols.start,
            "col1": cell.cols.stop,
            "kinds": list(kernels),
            "num_groups": max(len(blocks) for blocks in kernels.values()),
            "dtype": self.manifest.dtype,
            "provenance": blockfile.provenance(provenance or {}),
        }
        return arrowfile.write(self.path / block_name(cell.i, cell.j), table, header)

    def write_logits(self, rows: range, logits: Float[np.ndarray, "n c"]) -> int:
        """Commit the initial logits of one row block.

        Args:
            rows: examples of the row block.
            logits: their logits; kept in float64, so that float32 logits come back exactly.

        Returns:
            Bytes written.

        Raises:
            ValueError: if `rows` is no row block or the shape is another.
        """
        blocks = self.grid.row_blocks()
        if rows not in blocks:
            raise ValueError(f"logits of {rows}: found no row block's")
        i = blocks.index(rows)
        return self.write_outputs(logits_name(i), i, "logits", logits)

    def write_outputs(
        self,
        name: str,
        i: int,
        column: str,
        values: Float[np.ndarray, "n c"],
        facts: Mapping[str, Json] | None = None,
    ) -> int:
        """Commit a number of every output by example of one row block; kept in float64.

        Args:
            name: the file's.
            i: the row block.
            column: what the numbers are.
            values: the numbers.
            facts: what the file says of itself beside kernel and row block.

        Returns:
            Bytes written.

        Raises:
            ValueError: if the shape is not the row block's.
        """
        rows = self.grid.row_block(i)
        if values.shape != (len(rows), self.num_outputs):
            raise ValueError(f"{column} of {rows}: found shape {values.shape}, no row block's")
        header = self.header(i, rows) | dict(facts or {})
        return arrowfile.write(self.path / name, blockfile.by_example(rows, column, values), header)

    def write_head(self, weight: Float[np.ndarray, "c d"], bias: Float[np.ndarray, " c"]) -> int:
        """Commit the linear head that theta_0 was given; kept in float32.

        Args:
            weight: its weight.
            bias: its bias.

        Returns:
            Bytes written.
        """
        table = pa.table(
            {"weight": arrowfile.lists(weight, "f4"), "bias": arrowfile.lists(bias[:, None], "f4")}
        )
        return arrowfile.write(self.path / "head.arrow", table, {"fingerprint": self.fingerprint})

    def pin(self, name: str, value: dict[str, Any]) -> dict[str, Any]:
        """Keep what holds for this kernel from its first worker on, such as a measurement.

        Args:
            name: what it is, one of `PINNED`.
            value: what holds if nothing is kept yet.

        Returns:
            What is kept: of several processes' values, the same one for all.
        """
        assert name in PINNED, name
        path = self.path / f"{name}.json"
        if not path.exists():
            commit_first(path, seal(value))
        return self.read_pinned(name)

    # ------------------------------------------------------------ reading

    def has_pinned(self, name: str) -> bool:
        """Whether `pin` kept something under this name."""
        return (self.path / f"{name}.json").exists()

    def read_pinned(self, name: str) -> dict[str, Any]:
        """What `pin` kept.

        Args:
            name: what it is.

        Returns:
            The value.
        """
        path = self.path / f"{name}.json"
        return unseal(path, path.read_bytes())

    def read_head(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Weight (c, d) and bias (c,) in float32, or None if no head is stored."""
        try:
            table = self._read("head.arrow").table
        except FileNotFoundError:
            return None
        with arrowfile.blaming(self.path / "head.arrow"):
            weight, bias = (arrowfile.matrix(table[name], "f4") for name in ("weight", "bias"))
            if bias.shape != (len(weight), 1):
                raise ValueError(f"bias of shape {bias.shape}")
        return weight.copy(), bias[:, 0].copy()

    def read_block(self, cell: Cell) -> Block:
        """One checked block.

        Args:
            cell: the cell.

        Returns:
            The block, memory-mapped.

        Raises:
            BlockCorruptError: if the file is not this cell's block.
            FileNotFoundError: if the block is missing.
        """
        name = block_name(cell.i, cell.j)
        header, table = self.read_own(name, cell.i, cell.rows)
        columns = (header.get("j"), header.get("col0"), header.get("col1"))
        if columns != (cell.j, cell.cols.start, cell.cols.stop):
            raise BlockCorruptError(
                arrowfile.damage(self.path / name, f"columns {columns} of another cell")
            )
        with arrowfile.blaming(self.path / name):
            block = blockfile.from_table(table)
        if block.values.shape[1:] != self._shape(cell) or block.values.dtype != self.manifest.dtype:
            found = f"{block.values.dtype} {block.values.shape[1:]}"
            raise BlockCorruptError(
                arrowfile.damage(
                    self.path / name,
                    f"{found} instead of {self.manifest.dtype} {self._shape(cell)}",
                )
            )
        return block

    def read_logits(self, i: int) -> Float[np.ndarray, "n c"]:
        """Checked logits of one row block.

        Args:
            i: the row block.

        Returns:
            The logits in float64, memory-mapped.

        Raises:
            BlockCorruptError: if the file is not this row block's.
            FileNotFoundError: if it is missing.
        """
        return self.read_outputs(logits_name(i), i, "logits")[1]

    def read_outputs(
        self, name: str, i: int, column: str
    ) -> tuple[dict[str, Any], Float[np.ndarray, "n c"]]:
        """Checked numbers that `write_outputs` wrote.

        Args:
            name: the file's.
            i: the row block.
            column: what the numbers are.

        Returns:
            The header, and the numbers in float64, memory-mapped.

        Raises:
            BlockCorruptError: if the file is damaged, or another row block's.
            FileNotFoundError: if it is missing.
        """
        rows = self.grid.row_block(i)
        header, table = self.read_own(name, i, rows)
        with arrowfile.blaming(self.path / name):
            values = arrowfile.matrix(table[column], "f8")
        if values.shape != (len(rows), self.num_outputs):
            raise BlockCorruptError(arrowfile.damage(self.path / name, f"shape {values.shape}"))
        return header, values

    # ------------------------------------------------------------ inside

    def _read(self, name: str) -> ArrowFile:
        path = self.path / name
        if isinstance(path, RemotePath):
            return self._fetch(path)
        status = path.stat()
        key = (path, status.st_ino, status.st_mtime_ns)
        file = arrowfile.read(path, check=key not in self._checked)
        self._checked.add(key)
        return file

    def _fetch(self, path: RemotePath) -> ArrowFile:
        """A remote file: its map is kept, so that a kernel of other layers is not fetched again."""
        file = self._fetched.get(path) or arrowfile.read(path, check=True)
        if sum(one.table.nbytes for one in self._fetched.values()) < _FETCHED_BYTES:
            self._fetched[path] = file
        return file

    def read_own(self, name: str, i: int, rows: range) -> tuple[dict[str, Any], pa.Table]:
        """A file of this kernel and row block, or an error: files may have been copied around.

        Args:
            name: the file's.
            i: the row block that it must be of.
            rows: its examples.

        Returns:
            Header and table.

        Raises:
            BlockCorruptError: if it is damaged, or of another kernel or row block.
        """
        file = self._read(name)
        found = {key: file.header.get(key) for key in ("fingerprint", "i", "row0", "row1")}
        expected = self.header(i, rows)
        if found != expected:
            raise BlockCorruptError(
                arrowfile.damage(self.path / name, f"it is of {found}, not of {expected}")
            )
        return file.header, file.table

    def header(self, i: int, rows: range) -> dict[str, Json]:
        """What a file of this kernel and row block says of itself."""
        return {"fingerprint": self.fingerprint, "i": i, "row0": rows.start, "row1": rows.stop}

    def _shape(self, cell: Cell) -> tuple[int, int, int, int]:
        return (len(cell.rows), self.num_outputs, len(cell.cols), self.num_outputs)
