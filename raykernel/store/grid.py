"""The kernel matrix cut into cells: integers only.

Examples are numbered train first. Train examples are the columns, all examples are the rows:

              0 … num_cols
            ┌──────────────┐ 0
            │ ╲   stored   │
            │   ╲          │    train × train is symmetric: cells with i ≤ j are stored,
            │     ╲        │    the others are their mirror images
            ├──────────────┤ num_cols
            │    stored    │    dev and test × train
            └──────────────┘ num_rows

Row and column blocks have the same boundaries inside train, and no row block straddles
`num_cols`, so that a cell is either wholly symmetric or wholly not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cell:
    """A rectangle of the kernel: what one job computes and one file holds."""

    i: int
    """Row block."""
    j: int
    """Column block."""
    rows: range
    """Examples of the row block."""
    cols: range
    """Examples of the column block."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Entries of a requested rectangle that come from one stored cell."""

    cell: Cell
    mirrored: bool
    """The entries are the cell's with rows and columns exchanged."""
    rows: range
    """Row examples of the entries, as requested (after mirroring)."""
    cols: range
    """Column examples of the entries, as requested (after mirroring)."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How the kernel of `num_rows` examples with `num_cols` of them is cut."""

    num_cols: int
    """Train examples: 0 … num_cols − 1."""
    num_rows: int
    """All examples, train included."""
    block_size: int
    """Examples on a side of a cell; the last of a side may be smaller."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_cols <= self.num_rows or self.block_size < 1:
            raise ValueError(f"{self}: expected 1 ≤ num_cols ≤ num_rows and block_size ≥ 1.")

    @property
    def num_col_blocks(self) -> int:
        """Blocks of train examples, on either side."""
        return -(-self.num_cols // self.block_size)

    @property
    def num_row_blocks(self) -> int:
        """Blocks of all examples."""
        return self.num_col_blocks - (-(self.num_rows - self.num_cols) // self.block_size)

    @property
    def num_cells(self) -> int:
        """Cells to store."""
        num_symmetric = self.num_col_blocks * (self.num_col_blocks + 1) // 2
        return num_symmetric + (self.num_row_blocks - self.num_col_blocks) * self.num_col_blocks

    def row_block(self, i: int) -> range:
        """Examples of one row block; of column block i too where i < num_col_blocks.

        Args:
            i: block index.

        Returns:
            The examples.

        Raises:
            IndexError: for a block outside the grid.
        """
        if not 0 <= i < self.num_row_blocks:
            raise IndexError(f"row block {i} of {self.num_row_blocks}")
        if i < self.num_col_blocks:
            first, last = 0, self.num_cols
        else:
            first, last = self.num_cols, self.num_rows
            i -= self.num_col_blocks
        start = first + i * self.block_size
        return range(start, min(start + self.block_size, last))

    def row_blocks(self) -> list[range]:
        """All row blocks, in order."""
        return [self.row_block(i) for i in range(self.num_row_blocks)]

    def cell(self, i: int, j: int) -> Cell:
        """One stored cell.

        Args:
            i: row block.
            j: column block.

        Returns:
            The cell.

        Raises:
            IndexError: if the grid stores no such cell.
        """
        if not 0 <= j < self.num_col_blocks or j < i < self.num_col_blocks:
            raise IndexError(f"no cell ({i}, {j}) is stored in {self}")
        return Cell(i, j, self.row_block(i), self.row_block(j))

    def cells(self) -> list[Cell]:
        """Stored cells, column by column, so that a worker keeps one column block resident."""
        blocks = self.row_blocks()
        below = range(self.num_col_blocks, self.num_row_blocks)
        return [
            Cell(i, j, blocks[i], blocks[j])
            for j in range(self.num_col_blocks)
            for i in (*range(j + 1), *below)
        ]

    def pieces(self, rows: range, cols: range) -> Iterator[Piece]:
        """Where the entries of a rectangle of the kernel are stored; each entry once.

        Args:
            rows: consecutive row examples.
            cols: consecutive column (train) examples.

        Yields:
            Non-empty pieces.

        Raises:
            IndexError: if the rectangle leaves the kernel.
        """
        _require_inside(rows, self.num_rows, "rows")
        _require_inside(cols, self.num_cols, "cols")
        row_indices = [i for i, block in enumerate(self.row_blocks()) if _overlap(block, rows)]
        col_indices = [j for j in range(self.num_col_blocks) if _overlap(self.row_block(j), cols)]
        for j in col_indices:
            for i in row_indices:
                mirrored = j < i < self.num_col_blocks
                cell = self.cell(j, i) if mirrored else self.cell(i, j)
                yield Piece(
                    cell,
                    mirrored,
                    _overlap(self.row_block(i), rows),
                    _overlap(self.row_block(j), cols),
                )


def _overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _require_inside(examples: range, count: int, side: str) -> None:
    if examples.step != 1 or not 0 <= examples.start <= examples.stop <= count:
        raise IndexError(f"{side}={examples}: expected consecutive examples within 0 … {count}")
