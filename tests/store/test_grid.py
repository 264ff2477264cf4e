from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raykernel.store.grid import Cell, Grid
from raykernel.store.pieces import entries, place


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    num_cols, num_dev, num_test = (draw(st.integers(low, 12)) for low in (1, 0, 0))
    num_rows = num_cols + num_dev + num_test
    return Grid(num_cols, num_rows, draw(st.integers(1, 9)), num_dev)


def test_cells_of_a_small_grid_column_by_column() -> None:
    grid = Grid(num_cols=3, num_rows=5, block_size=2)
    assert grid.cells() == [
        Cell(0, 0, range(2), range(2)),
        Cell(2, 0, range(3, 5), range(2)),
        Cell(0, 1, range(2), range(2, 3)),
        Cell(1, 1, range(2, 3), range(2, 3)),
        Cell(2, 1, range(3, 5), range(2, 3)),
    ]


@given(grids())
def test_every_entry_is_stored_exactly_once_after_mirroring(grid: Grid) -> None:
    count = np.zeros((grid.num_rows, grid.num_cols), int)
    for cell in grid.cells():
        count[np.ix_(cell.rows, cell.cols)] += 1
        if cell.i < cell.j:
            count[np.ix_(cell.cols, cell.rows)] += 1
    assert (count == 1).all()


@given(grids())
def test_row_blocks_partition_the_rows_and_straddle_no_border(grid: Grid) -> None:
    blocks = grid.row_blocks()
    assert [example for block in blocks for example in block] == list(range(grid.num_rows))
    for border in (grid.num_cols, grid.num_cols + grid.num_dev):
        assert all(block.stop <= border or block.start >= border for block in blocks)
    assert all(1 <= len(block) <= grid.block_size for block in blocks)


@given(grids(), st.data())
def test_cells_of_some_rows_are_those_that_hold_their_entries(
    grid: Grid, data: st.DataObject
) -> None:
    rows = range(*sorted(data.draw(st.tuples(*[st.integers(0, grid.num_rows)] * 2))))
    needed = {piece.cell for piece in grid.pieces(rows, range(grid.num_cols))}
    assert grid.cells(rows) == [cell for cell in grid.cells() if cell in needed]
    # No cell holds entries of test and of other examples.
    known, test = set(grid.cells(grid.train_and_dev)), set(grid.cells(grid.test))
    assert known | test == set(grid.cells())
    assert not known & test


@given(grids())
def test_cells_know_their_place_and_number(grid: Grid) -> None:
    cells = grid.cells()
    assert len(cells) == grid.num_cells
    assert [grid.cell(cell.i, cell.j) for cell in cells] == cells


@given(grids(), st.data())
def test_pieces_gather_any_rectangle(grid: Grid, data: st.DataObject) -> None:
    rows = range(*sorted(data.draw(st.tuples(*[st.integers(0, grid.num_rows)] * 2))))
    cols = range(*sorted(data.draw(st.tuples(*[st.integers(0, grid.num_cols)] * 2))))
    whole = np.arange(grid.num_rows * grid.num_cols, dtype=float)
    whole = whole.reshape(1, grid.num_rows, 1, grid.num_cols, 1)
    square = whole[:, : grid.num_cols]
    square += square.copy().transpose(0, 3, 2, 1, 4)
    found = np.full((len(rows), 1, len(cols), 1), np.nan)
    for piece in grid.pieces(rows, cols):
        cell = piece.cell
        stored = whole[:, cell.rows.start : cell.rows.stop, :, cell.cols.start : cell.cols.stop]
        found[place(piece, rows, cols)] = entries(piece, stored)[0]
    expected = whole[0, rows.start : rows.stop, :, cols.start : cols.stop]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("sizes", [(0, 3, 1), (4, 3, 1), (2, 3, 0)])
def test_impossible_grids_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="num_cols"):
        Grid(*sizes)


@pytest.mark.parametrize("num_dev", [-1, 4])
def test_more_dev_than_there_are_rows_is_refused(num_dev: int) -> None:
    with pytest.raises(ValueError, match="num_dev"):
        Grid(2, 5, 1, num_dev)


def test_cells_below_the_diagonal_are_not_stored() -> None:
    with pytest.raises(IndexError, match="no cell"):
        Grid(4, 4, 2).cell(1, 0)
    with pytest.raises(IndexError, match="rows"):
        list(Grid(4, 4, 2).pieces(range(5), range(2)))
