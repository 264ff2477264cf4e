"""Blocks that another kernel of the store holds: samples nest, and their kernels with them.

    tokens of a cell's examples → their places in another kernel → its entries, copied

For one seed the 16-shot examples lie inside the 64-shot ones, and test is the same for every k and
seed (Malladi et al. 2023, appendix A). An entry is a function of the tokens of its two examples
alone, so that kernels which differ in nothing but the sample have the entries of common examples
in common. A linear probe is fitted to the sample: its kernels share nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from raykernel.config import Json, plain
from raykernel.errors import BlockCorruptError, InputError
from raykernel.store.blockfile import block_name, logits_name
from raykernel.store.blocks import Store
from raykernel.store.grid import Cell
from raykernel.store.kernelfiles import PINNED
from raykernel.store.kernels import KernelHandle
from raykernel.store.manifest import at
from raykernel.terms import Kind, PromptStyle

TOKENS = "tokens"
"""Column of a kernel's examples: hash of what the model is given of an example."""

_OF_THE_SAMPLE = {"task": ("k", "seed", "num_test", "examples"), "prompt": ("tokens",)}
"""Parts of an identity that say which examples there are."""


def copy_nested(store: Store, handle: KernelHandle, cells: Sequence[Cell]) -> dict[str, int]:
    """Copy those cells that other kernels of the store hold.

    Args:
        store: where they are.
        handle: the kernel that lacks the cells.
        cells: which; each is copied from one kernel, or left.

    Returns:
        Number of cells by the kernel that they were copied from.
    """
    copied: dict[str, int] = {}
    left = list(cells)
    for donor in _donors(store, handle) if left else ():
        done = [cell for cell in left if donor.covers(cell) and donor.copy(cell)]
        if done:
            copied[donor.other.fingerprint] = len(done)
            left = [cell for cell in left if cell not in set(done)]
        if not left:
            break
    return copied


@dataclass(frozen=True)
class _Donor:
    """Another kernel, seen from one that lacks cells."""

    handle: KernelHandle
    other: KernelHandle
    places: Sequence[int | None]
    """Of every example of `handle`: its number in `other`."""
    _logits: dict[int, np.ndarray] = field(default_factory=dict)

    def covers(self, cell: Cell) -> bool:
        """Whether the other kernel holds a cell's entries, and the logits of its rows."""
        rows, cols = self._numbers(cell.rows), self._numbers(cell.cols)
        if len(rows) < len(cell.rows) or len(cols) < len(cell.cols):
            return False
        if any(col not in self.other.grid.train for col in cols):
            return False
        blocks = {block_name(i, j) for i, j, _ in self._parts(rows, cols)}
        logits = {logits_name(self._block_of[row]) for row in rows}
        return blocks | logits <= self._present

    def copy(self, cell: Cell) -> bool:
        """Commit a cell that is covered, and its rows' logits; False if a file is damaged."""
        rows, cols = self._numbers(cell.rows), self._numbers(cell.cols)
        try:
            kernels = self._kernels(rows, cols)
            logits = np.stack([self._logits_of(row) for row in rows])
        except (BlockCorruptError, FileNotFoundError):  # `verify` names what is damaged
            return False
        for name in PINNED:
            if self.other.has_pinned(name) and not self.handle.has_pinned(name):
                self.handle.pin(name, self.other.read_pinned(name))
        if logits_name(cell.i) not in self.handle.present():
            self.handle.write_logits(cell.rows, logits)
        self.handle.write_block(cell, kernels, {"copied_from": self.other.fingerprint})
        return True

    # ------------------------------------------------------------ inside

    def _kernels(
        self, rows: Sequence[int], cols: Sequence[int]
    ) -> dict[str, dict[str, np.ndarray]]:
        """Entries of a rectangle, by kind and layer group."""
        outputs = np.arange(c := self.other.num_outputs)
        shape = (len(rows), c, len(cols), c)
        found: dict[str, dict[str, np.ndarray]] = {}
        for i, j, is_mirrored in self._parts(rows, cols):
            cell = self.other.grid.cell(i, j)
            block = self.other.read_block(cell)
            for kind, group in block.names:  # in their order, whichever is filled first
                own = found.setdefault(kind, {})
                own.setdefault(group, np.empty(shape, block.values.dtype))
            at_rows = np.flatnonzero([self._block_of[n] == (j if is_mirrored else i) for n in rows])
            at_cols = np.flatnonzero([self._block_of[n] == (i if is_mirrored else j) for n in cols])
            of_rows, of_cols = np.take(rows, at_rows), np.take(cols, at_cols)
            for number, (kind, group) in enumerate(block.names):
                values = block.values[number]
                if is_mirrored:  # K[j, b, i, a] of the flipped kind
                    kind = Kind(kind).flipped.value
                    part = values[of_cols - cell.rows.start][:, :, of_rows - cell.cols.start]
                    part = part.transpose(2, 3, 0, 1)
                else:
                    part = values[of_rows - cell.rows.start][:, :, of_cols - cell.cols.start]
                found[kind][group][np.ix_(at_rows, outputs, at_cols, outputs)] = part
        return found

    def _parts(self, rows: Sequence[int], cols: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
        """Cells of the other kernel that hold a rectangle: i, j, and whether as mirror image."""
        for i in sorted({self._block_of[row] for row in rows}):
            for j in sorted({self._block_of[col] for col in cols}):
                is_mirrored = j < i < self.other.grid.num_col_blocks
                yield (j, i, True) if is_mirrored else (i, j, False)

    def _numbers(self, examples: range) -> list[int]:
        found = (self.places[n] for n in examples)
        return [number for number in found if number is not None]

    def _logits_of(self, row: int) -> np.ndarray:
        i = self._block_of[row]
        if i not in self._logits:
            self._logits[i] = self.other.read_logits(i)
        values: np.ndarray = self._logits[i][row - self.other.grid.row_block(i).start]
        return values

    @cached_property
    def _block_of(self) -> list[int]:
        """Row block of every example of the other kernel."""
        blocks = self.other.grid.row_blocks()
        return [i for i, block in enumerate(blocks) for _ in block]

    @cached_property
    def _present(self) -> set[str]:
        return self.other.present()


def _donors(store: Store, handle: KernelHandle) -> Iterator[_Donor]:
    """Kernels of the store that differ from one in the sample alone, and what they share."""
    wanted = apart_from_the_sample(handle.identity)
    if at(handle.identity, "prompt", "style") == PromptStyle.none.value:
        return
    own = _tokens(handle)
    for name in store.fingerprints() if own else ():
        if name == handle.fingerprint:
            continue
        try:
            other = store.open(name)
            if apart_from_the_sample(other.identity) != wanted:
                continue
            numbers = {tokens: n for n, tokens in reversed(list(enumerate(_tokens(other))))}
        except (InputError, BlockCorruptError, FileNotFoundError):
            continue
        yield _Donor(handle, other, [numbers.get(tokens) for tokens in own])


def _tokens(handle: KernelHandle) -> list[str]:
    """Hash of every example's tokens; none of a kernel that keeps no such hashes."""
    examples = handle.examples()
    if TOKENS not in examples.column_names:
        return []
    found: list[str] = examples[TOKENS].to_pylist()
    return found


def apart_from_the_sample(identity: Mapping[str, Json]) -> Json:
    """What kernels have in common whose entries of common examples are the same.

    Args:
        identity: of a kernel.

    Returns:
        The identity without its sample of examples.
    """
    tree = plain(dict(identity))
    assert isinstance(tree, dict), "an identity"
    for name, keys in _OF_THE_SAMPLE.items():
        part = tree.get(name)
        if isinstance(part, dict):
            tree[name] = {key: value for key, value in part.items() if key not in keys}
    return tree
