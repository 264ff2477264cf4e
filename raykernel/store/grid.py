"""The kernel matrix cut into cells: integers only.

Examples are numbered train first, then dev, then test. Train examples are the columns, all
examples are the rows:

              0 … num_cols
            ┌──────────────┐ 0
            │ ╲   stored   │
            │   ╲          │    train × train is symmetric: cells with i ≤ j are stored,
            │     ╲        │    the others are their mirror images
            ├──────────────┤ num_cols
            │    stored    │    dev × train
            ├──────────────┤ num_cols + num_dev
            │   optional   │    test × train: prediction can do without
            └──────────────┘ num_rows

Row and column blocks have the same boundaries inside train, and no row block straddles a border,
so that a cell is either wholly symmetric or wholly not, and either wholly of test or not at all.
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

    def __str__(self) -> str:
        return f"block {self.i}, {self.j}"


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
    """Examples on a side of a cell; the last of train, dev or test may be smaller."""
    num_dev: int = 0
    """Dev examples: num_cols … num_cols + num_dev − 1. Those after them are test."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_cols <= self.num_rows or self.block_size < 1:
            raise ValueError(f"{self}: expected 1 ≤ num_cols ≤ num_rows and block_size ≥ 1.")
        if not 0 <= self.num_dev <= self.num_rows - self.num_cols:
            raise ValueError(f"{self}: expected 0 ≤ num_dev ≤ num_rows − num_cols.")

    @property
    def rows(self) -> range:
        """All examples."""
        return range(self.num_rows)

    @property
    def train(self) -> range:
        """Train examples."""
        return range(self.num_cols)

    @property
    def train_and_dev(self) -> range:
        """Examples whose kernel with train every regression needs."""
        return range(self.num_cols + self.num_dev)

    @property
    def test(self) -> range:
        """Examples that are only predicted."""
        return range(self.train_and_dev.stop, self.num_rows)

    @property
    def num_col_blocks(self) -> int:
        """Blocks of train examples, on either side."""
        return self._count(range(self.num_cols))

    @property
    def num_row_blocks(self) -> int:
        """Blocks of all examples."""
        return sum(map(self._count, self._sections()))

    @property
    def num_cells(self) -> int:
        """Cells to store if all rows are wanted."""
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
        at = i
        for section in self._sections():
            count = self._count(section)
            if 0 <= at < count:
                start = section.start + at * self.block_size
                return range(start, min(start + self.block_size, section.stop))
            at -= count
        raise IndexError(f"row block {i} of {self.num_row_blocks}")

    def row_blocks(self) -> list[range]:
        """All row blocks, in order."""
        return [self.row_block(i) for i in range(self.num_row_blocks)]

    def row_indices(self, rows: range) -> list[int]:
        """Row blocks that hold some of the examples, in order."""
        return [i for i, block in enumerate(self.row_blocks()) if _overlap(block, rows)]

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

    def cells(self, rows: range | None = None) -> list[Cell]:
        """Stored cells, column by column, so that a worker keeps one column block resident.

        Args:
            rows: examples whose kernel with train is wanted; None: all.

        Returns:
            Cells that hold entries of these rows, be it as mirror images.
        """
        blocks = self.row_blocks()
        wanted = set(self.row_indices(self.rows if rows is None else rows))
        below = range(self.num_col_blocks, self.num_row_blocks)
        return [
            Cell(i, j, blocks[i], blocks[j])
            for j in range(self.num_col_blocks)
            for i in (*range(j + 1), *below)
            if i in wanted or (i < self.num_col_blocks and j in wanted)
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
        for j in self.row_indices(cols):
            for i in self.row_indices(rows):
                mirrored = j < i < self.num_col_blocks
                cell = self.cell(j, i) if mirrored else self.cell(i, j)
                yield Piece(
                    cell,
                    mirrored,
                    _overlap(self.row_block(i), rows),
                    _overlap(self.row_block(j), cols),
                )

    def _sections(self) -> tuple[range, range, range]:
        return range(self.num_cols), range(self.num_cols, self.train_and_dev.stop), self.test

    def _count(self, section: range) -> int:
        return -(-len(section) // self.block_size)


def _overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _require_inside(examples: range, count: int, side: str) -> None:
    if examples.step != 1 or not 0 <= examples.start <= examples.stop <= count:
        raise IndexError(f"{side}={examples}: expected consecutive examples within 0 … {count}")
