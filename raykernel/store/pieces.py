"""Which entries of a stored block go where in an assembled kernel."""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped

from raykernel.store.grid import Piece

Place = tuple[slice, slice, slice, slice]
"""Where a piece stands in an assembled kernel (n, c, m, c)."""


def place(piece: Piece, rows: range, cols: range) -> Place:
    """Where a piece stands in the kernel of `rows` × `cols`.

    Args:
        piece: the piece.
        rows: row examples of the kernel.
        cols: column examples of the kernel.

    Returns:
        An index of the kernel.
    """
    every = slice(None)
    return _within(piece.rows, rows), every, _within(piece.cols, cols), every


def entries(
    piece: Piece, blocks: Shaped[np.ndarray, "groups rows c cols c"]
) -> Shaped[np.ndarray, "groups n c m c"]:
    """The entries of a piece; a mirrored one is K[i, a, j, b] = K[j, b, i, a].

    Args:
        piece: the piece.
        blocks: its cell's blocks.

    Returns:
        A view of the blocks.
    """
    cell, every = piece.cell, slice(None)
    rows, cols = (piece.cols, piece.rows) if piece.mirrored else (piece.rows, piece.cols)
    part = blocks[:, _within(rows, cell.rows), every, _within(cols, cell.cols), every]
    return part.transpose(0, 3, 4, 1, 2) if piece.mirrored else part


def _within(part: range, whole: range) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)
