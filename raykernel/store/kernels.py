"""One stored kernel: its identity, examples, logits, and a file per block.

    kernels/<fingerprint>/
      identity.json              what decides the numbers; written first
      examples.arrow             one row per example: train, dev, test
      logits-<iiii>.arrow        one per row block: the initial logits, float64
      block-<iiii>-<jjjj>.arrow  one per cell: one row per (kind, layer group)
      prediction-<key>-<iiii>.arrow
                                 K(x, train) α of a row block of test (predictions.py)
      linearized-<iiii>.arrow    J(x) (θ_FT − θ_PT) of a row block of test (linearized.py), in the
                                 kernel of fine-tuned weights, whose logits are at these
      head.arrow                 linear head, where there is one
      baselines.arrow            what was measured of its modules' weights (baselines.py)
      rates.json, features.json, precision.json, projection.json, lora.json
                                 what the first worker measured or counted, see `pin`

Shapes: `n` row examples, `m` column examples, `c` outputs, `d` hidden units.
A block written twice holds the same numbers, so nobody locks and nobody waits.
Cells of test are there only where somebody wanted them: prediction can do without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from raykernel.errors import BlockCorruptError, InputError, KernelIncompleteError, nearest
from raykernel.store import arrowfile
from raykernel.store.blockfile import Names, block_name, logits_name
from raykernel.store.columns import schema_of
from raykernel.store.groups import select_groups
from raykernel.store.kernelcolumns import ENTRIES
from raykernel.store.kernelfiles import KernelFiles
from raykernel.store.pieces import Place, entries, place
from raykernel.terms import Kind


@dataclass(frozen=True)
class KernelHandle(KernelFiles):
    """A kernel of a store, to be completed and read. Reopen it with `Store(path).open(…)`."""

    @property
    def resolution(self) -> float:
        """Size, relative to the largest, of an eigenvalue of train's kernel that is rounding noise.

        nc times the machine epsilon of what is stored, or the error of a reduced precision as the
        kernel's first worker measured it.
        """
        eps = float(np.finfo(np.dtype(self.manifest.dtype)).eps)
        stored = eps * self.grid.num_cols * self.num_outputs
        if not self.has_pinned("precision"):
            return stored
        return max(stored, float(self.read_pinned("precision")["relative_error"]))

    def kinds(self) -> list[str]:
        """Kinds of kernel stored."""
        return list(dict.fromkeys(kind for kind, _ in self._names()))

    def groups(self, kind: str = "sgd") -> list[str]:
        """Layer groups stored for a kind, cross groups included, in forward order.

        Args:
            kind: kind of kernel.

        Returns:
            Their names.
        """
        return _groups_of(self._names(), kind)

    def logits(self, rows: range | None = None) -> Float[np.ndarray, "num_rows c"]:
        """Initial logits of some examples, in their order.

        Args:
            rows: whole row blocks, such as the grid's `test`; None: all.

        Returns:
            The logits in float64.

        Raises:
            KernelIncompleteError: if those of some row block are missing.
        """
        wanted = self.grid.rows if rows is None else rows
        blocks, present = self.grid.row_indices(wanted), self.present()
        absent = [i for i in blocks if logits_name(i) not in present]
        if absent:
            what = f"the logits of {len(absent)} of {len(blocks)} row blocks"
            raise self._incomplete(what, absent)
        return np.concatenate([self.read_logits(i) for i in blocks])

    def kernel(
        self,
        groups: Sequence[str] | None = None,
        *,
        kind: str = "sgd",
        rows: range | None = None,
        cols: range | None = None,
        layers_to_transform: Sequence[int] | None = None,
        target_modules: Sequence[str] | None = None,
    ) -> Float[np.ndarray, "n c m c"]:
        """The kernel of chosen layer groups: the sum of their stored blocks.

            K_S[i, a, j, b] = Σ_{l ∈ S} K_l[i, a, j, b]

        Summed in float64, group after group in stored order, so that the result is the same to
        the bit whatever the block size, the order of `groups` or the rectangle asked for.

        Args:
            groups: names or regular expressions, see `select_groups`; None: all.
            kind: kind of kernel.
            rows: consecutive row examples; None: all.
            cols: consecutive column (train) examples; None: all.
            layers_to_transform: transformer layers, as in PEFT.
            target_modules: ends of module paths, as in PEFT.

        Returns:
            The kernel, in memory of its own.
        """
        stored = self.groups(kind)
        chosen = select_groups(
            stored,
            groups=groups,
            layers_to_transform=layers_to_transform,
            target_modules=target_modules,
        )
        row_by_group = {name: row for row, name in enumerate(stored)}
        rows, cols = self._rectangle(rows, cols)
        result = self._zeros(rows, cols)
        for at, blocks in self._pieces(kind, rows, cols):
            total = result[at]
            for name in chosen:
                total += blocks[row_by_group[name]]
        return result

    def group_kernels(
        self,
        groups: Sequence[str] | None = None,
        *,
        kind: str = "sgd",
        rows: range | None = None,
        cols: range | None = None,
    ) -> Iterator[tuple[str, Float[np.ndarray, "n c m c"]]]:
        """The kernel of each layer group by itself; every file is opened and checked once.

        Args:
            groups: names or regular expressions, see `select_groups`; None: all.
            kind: kind of kernel.
            rows: consecutive row examples; None: all.
            cols: consecutive column (train) examples; None: all.

        Yields:
            (group, its kernel in float64), cross groups of the selection included.
        """
        stored = self.groups(kind)
        rows, cols = self._rectangle(rows, cols)
        pieces = list(self._pieces(kind, rows, cols))
        for name in select_groups(stored, groups=groups):
            result = self._zeros(rows, cols)
            for at, blocks in pieces:
                result[at] = blocks[stored.index(name)]
            yield name, result

    def table(
        self,
        groups: Sequence[str] | None = None,
        *,
        kind: str = "sgd",
        rows: range | None = None,
        cols: range | None = None,
        layers_to_transform: Sequence[int] | None = None,
        target_modules: Sequence[str] | None = None,
    ) -> pa.Table:
        """The kernel of chosen layer groups as a table with a row per entry.

        Args:
            groups: as in `kernel`, as the others.
            kind: kind of kernel.
            rows: consecutive row examples; None: all.
            cols: consecutive column (train) examples; None: all.
            layers_to_transform: transformer layers, as in PEFT.
            target_modules: ends of module paths, as in PEFT.

        Returns:
            The columns of `kernelcolumns.ENTRIES`, the last index fastest.
        """
        rows, cols = self._rectangle(rows, cols)
        values = self.kernel(
            groups,
            kind=kind,
            rows=rows,
            cols=cols,
            layers_to_transform=layers_to_transform,
            target_modules=target_modules,
        )
        row, row_output, col, col_output = np.indices(values.shape).reshape(4, -1)
        columns = (row + rows.start, row_output, col + cols.start, col_output, values.reshape(-1))
        kinds = pa.repeat(kind, values.size)
        return pa.table([kinds, *map(pa.array, columns)], schema=schema_of(ENTRIES))

    # ------------------------------------------------------------ inside

    def _pieces(
        self, kind: str, rows: range, cols: range
    ) -> Iterator[tuple[Place, Float[np.ndarray, "groups n c m c"]]]:
        pieces = list(self.grid.pieces(rows, cols))
        present = self.present()
        cells = {(piece.cell.i, piece.cell.j) for piece in pieces}
        absent = [i for i, j in cells if block_name(i, j) not in present]
        if absent:
            raise self._incomplete(f"{len(absent)} of the {len(cells)} blocks needed", absent)
        names: Names | None = None
        for piece in pieces:
            block = self.read_block(piece.cell)
            names = names or block.names
            if block.names != names:
                path = self.path / block_name(piece.cell.i, piece.cell.j)
                raise BlockCorruptError(
                    arrowfile.damage(path, "other layer groups than the other blocks")
                )
            # K[i, j] of an asymmetric kind is not K[j, i]: a mirrored block is the other side's.
            stored = Kind(kind).flipped.value if piece.mirrored else kind
            yield place(piece, rows, cols), entries(piece, block.of_kind(stored))

    def _names(self) -> Names:
        present = self.present()
        for cell in self.grid.cells():
            if block_name(cell.i, cell.j) in present:
                return self.read_block(cell).names
        raise self._incomplete(f"all {self.grid.num_cells} blocks", [0])

    def _rectangle(self, rows: range | None, cols: range | None) -> tuple[range, range]:
        every_row, every_col = range(self.grid.num_rows), range(self.grid.num_cols)
        return every_row if rows is None else rows, every_col if cols is None else cols

    def _zeros(self, rows: range, cols: range) -> Float[np.ndarray, "n c m c"]:
        return np.zeros((len(rows), self.num_outputs, len(cols), self.num_outputs))

    def _incomplete(self, what: str, absent: Sequence[int]) -> KernelIncompleteError:
        """The error about missing files, `absent` the row blocks that they are of."""
        cure = "Run `raykernel kernel` with its configuration to compute what is missing."
        test, known = self.grid.test, self.grid.train_and_dev
        if all(self.grid.row_block(i).start in test for i in absent):
            cure = (
                "They are test's, which is predicted without its kernel: run `raykernel kernel` "
                "with its configuration and kernel.test_block=true to store that, too, or read "
                f"train and dev alone, rows={known}."
            )
        return KernelIncompleteError(
            f"kernel {self.fingerprint}: found a kernel without {what}, expected all of them. "
            f"{cure}"
        )


def _groups_of(names: Names, kind: str) -> list[str]:
    groups = [group for stored, group in names if stored == kind]
    if not groups:
        stored = {stored for stored, _ in names}
        raise InputError(
            f"kind: found {kind!r}, expected a stored kind of kernel; {nearest(kind, stored)}"
        )
    return groups
