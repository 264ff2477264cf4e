"""Block of two parts of one parameter: ⟨G, G'⟩ for every pair of their examples and outputs.

    direct     G by tiles of the parameter, then one matrix product per tile
    formed     the same where both parts are products of one matrix: G = Σ_t b_t ⊗ a_t
    factored   Σ_tu (A A'ᵀ)[t, u] · (B B'ᵀ)[t, u], which never forms G

Letters: n, m examples, c outputs, t, u tokens, i inputs and o outputs of a layer, p coordinates of
a tile. A block of a part with itself is symmetric; only its upper triangle is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raykernel.ntk.factors import Part, Product, accumulator, num_rows_of, tile_bytes
from raykernel.ntk.ragged import ByLength, Run, by_length, in_order

_CPU_TABLE_BYTES = 1 << 20
"""A table of the factored way that is read back from a cache, which happens twice."""

_TABLE_ROWS = 384
"""Rows of a table from which its products are not thin."""

_STRIP_ROWS = 32
"""Rows below which a matrix product is too thin to be fast."""

_WIDE_STRIP_ROWS = 128
"""Rows from which a strip is as fast as any."""

_TILE_ROWS = 64
"""Rows of a tile below which the product that forms it is thin."""

_FEW_TOKENS = 0.25
"""Tokens, as a share of a tile's width, up to which it costs little to read them tile by tile."""

SMALL = 1 << 22
"""Multiplications that are over before a second call has begun."""


@dataclass(frozen=True, slots=True, eq=False)
class _Factors:
    """Factors of a run's examples."""

    inputs: Float[Tensor, "n t i"]
    gradients: Float[Tensor, "n t c o"]


def direct(left: Part, right: Part, *, max_bytes: int) -> Float[Tensor, "nc mc"]:
    """Block of two parts of any kind, the gradient formed tile by tile.

    Args:
        left: rows of the block.
        right: columns of the block; `left` itself for the symmetric block.
        max_bytes: bound on a tile of both.

    Returns:
        The block, examples and outputs flattened.
    """
    shape, dtype, size = _tiling(left, right, max(left.width, 1), max_bytes)
    total = left.gradients.new_zeros(shape, dtype=dtype)
    for tile in tiles([left.support(), right.support()], num_rows_of([left]), size):
        own = left.row_block(tile).flatten(2).flatten(0, 1).to(dtype)
        if left is right:
            add_upper(total, own)
        else:
            other = right.row_block(tile).flatten(2).flatten(0, 1).to(dtype)
            total.addmm_(own, other.mT)
    return mirrored(total) if left is right else total


def formed(left: Product, right: Product, *, max_bytes: int) -> Float[Tensor, "nc mc"]:
    """Block of two products of one matrix, the gradient formed tile by tile in one buffer.

    A tile takes some rows of the longer of the matrix's sides and all of the other: the product
    that forms it is thin if any of its sides is, and so is the next one.

    Args:
        left: rows of the block.
        right: columns of the block; `left` itself for the symmetric block.
        max_bytes: bound on a tile of both.

    Returns:
        The block, examples and outputs flattened.
    """
    num_inputs, num_outputs = left.inputs.shape[-1], left.gradients.shape[-1]
    of_inputs = num_inputs > num_outputs
    longer, width = max(num_inputs, num_outputs), min(num_inputs, num_outputs)
    shape, dtype, size = _tiling(left, right, max(width, 1), max_bytes)
    parts = (left,) if left is right else (left, right)
    tokens = max(part.inputs.shape[1] for part in parts)
    if not left.gradients.is_cuda and tokens <= _FEW_TOKENS * width:
        # Closer to the core; with many tokens to be read again, that takes longer than it saves.
        size = min(size, max(size // 4, _TILE_ROWS))
    size = min(size, max(longer, 1))
    orders = [by_length(part) for part in parts]
    sides = [_in_runs(part, order, dtype) for part, order in zip(parts, orders, strict=True)]
    # One buffer for all tiles: fresh memory costs a page fault for every 4 KiB, which takes longer
    # than the product that fills it.
    buffers = [
        left.gradients.new_empty(part.gradients.shape[:2].numel() * size * width, dtype=dtype)
        for part in parts
    ]
    total = left.gradients.new_zeros(shape, dtype=dtype)
    for start in range(0, longer, size):
        tile = slice(start, start + size)
        own, *other = map(partial(_form, tile, of_inputs), sides, buffers)
        if left is right:
            add_upper(total, own)
        else:
            total.addmm_(own, other[0].mT)
    block = mirrored(total) if left is right else total
    return in_order(block, orders[0], orders[-1], num_outputs=left.gradients.shape[1])


def _tiling(
    left: Part, right: Part, width: int, max_bytes: int
) -> tuple[list[int], torch.dtype, int]:
    """Sides of the block, its type, and how many rows of this width make a tile."""
    shape = [part.gradients.shape[:2].numel() for part in (left, right)]
    dtype = accumulator(torch.promote_types(left.gradients.dtype, right.gradients.dtype))
    row_bytes = dtype.itemsize * max(shape[0] if left is right else sum(shape), 1) * width
    return shape, dtype, max(1, tile_bytes(left.gradients.device, max_bytes) // row_bytes)


def _in_runs(part: Product, order: ByLength, dtype: torch.dtype) -> list[_Factors]:
    """Factors of every run's examples, as they are read tile after tile."""
    tensors = part.inputs, part.gradients.transpose(1, 2)
    return [
        _Factors(
            *(order.take(x[:, : run.num_tokens], run, 0).to(dtype).contiguous() for x in tensors)
        )
        for run in order.runs
    ]


def _form(
    tile: slice, of_inputs: bool, runs: Sequence[_Factors], buffer: Float[Tensor, " q"]
) -> Float[Tensor, "nc p"]:
    """Gradient of a tile: per example one product for all outputs."""
    start = 0
    for run in runs:
        a = run.inputs[..., tile].contiguous() if of_inputs else run.inputs
        b = run.gradients if of_inputs else run.gradients[..., tile]
        (n, t, c, o), i = b.shape, a.shape[2]
        out = buffer[start : start + n * c * o * i].view(n, c * o, i)
        torch.bmm(b.reshape(n, t, c * o).mT, a, out=out)
        start += out.numel()
    return buffer[:start].view(-1, o * i)


def factored(left: Product, right: Product, *, max_bytes: int) -> Float[Tensor, "nc mc"]:
    """Block of two products of one matrix, from token-by-token inner products.

    Tables are laid out (c, t, n, c, u, m): what is summed is followed by many examples, so that
    multiplying and summing run along memory.

    Args:
        left: rows of the block.
        right: columns of the block; `left` itself for the symmetric block.
        max_bytes: bound on the table of inner products.

    Returns:
        The block, examples and outputs flattened.
    """
    (n, c), m = left.gradients.shape[:2], len(right.gradients)
    dtype = accumulator(left.gradients.dtype)
    if not left.num_tokens * right.num_tokens:  # such as an expert that none chose
        return left.gradients.new_zeros((n * c, m * c), dtype=dtype)
    symmetric = left is right
    if left.inputs.shape[1] == right.inputs.shape[1] == 1:
        block = _of_one_token(left, right, dtype)
        return mirrored(block) if symmetric else block
    total = left.gradients.new_zeros((n, c, m, c), dtype=dtype)
    num_left, num_right = _table_sides(left, right, max_bytes)
    rows = by_length(left, size=num_left)
    cols = rows if symmetric else by_length(right, size=num_right)
    of_cols = [_tokens_first(right, cols, run, dtype) for run in cols.runs]
    for i, run in enumerate(rows.runs):
        a, b = of_cols[i] if symmetric else _tokens_first(left, rows, run, dtype)
        of_rows = (run.num_tokens, run.num_examples)
        for j in range(i if symmetric else 0, len(of_cols)):
            (a2, b2), other = of_cols[j], cols.runs[j]
            of_others = (other.num_tokens, other.num_examples)
            table = (b @ b2.mT).view(c, *of_rows, c, *of_others)
            table.mul_((a @ a2.mT).view(*of_rows, 1, *of_others))
            total[run.places, :, other.places] = table.sum(1).sum(3).permute(1, 0, 3, 2)
    block = total.view(n * c, m * c)
    return in_order(mirrored(block) if symmetric else block, rows, cols, num_outputs=c)


def _of_one_token(left: Product, right: Product, dtype: torch.dtype) -> Float[Tensor, "nc mc"]:
    """(a · a') (b · b'): with a token each, the block is its only table."""
    (n, c), m = left.gradients.shape[:2], len(right.gradients)
    a, a2 = (part.inputs.flatten(1).to(dtype) for part in (left, right))
    b, b2 = (part.gradients.flatten(0, 2).to(dtype) for part in (left, right))
    table = (b @ b2.mT).view(n, c, m, c)
    return table.mul_((a @ a2.mT).view(n, 1, m, 1)).view(n * c, m * c)


def _tokens_first(
    part: Product, order: ByLength, run: Run, dtype: torch.dtype
) -> tuple[Float[Tensor, "tn i"], Float[Tensor, "ctn o"]]:
    """Inputs and gradients of a run's examples, by (output and) token first."""
    t = run.num_tokens
    a = order.take(part.inputs.transpose(0, 1)[:t], run, 1)
    b = order.take(part.gradients.permute(1, 2, 0, 3)[:, :t], run, 2)
    return a.flatten(0, 1).to(dtype), b.flatten(0, 2).to(dtype)


def _table_sides(left: Product, right: Product, max_bytes: int) -> tuple[int, int]:
    """Row and column examples of a table."""
    # A square: a flat table would be a thin product, and read the other side once per row. A
    # symmetric block leaves out what lies below its diagonal tables, so that they should be small,
    # but not so small that their products are thin.
    n, c = left.gradients.shape[:2]
    m = len(right.gradients)
    pairs = max_bytes // (4 * c * c * max(left.lengths) * max(right.lengths))
    tokens = left.num_tokens / n
    if not left.gradients.is_cuda:
        typical = tokens * right.num_tokens / m
        pairs = min(pairs, round(_CPU_TABLE_BYTES / (4 * c * c * typical)))
    most = n
    if left is right:
        most = min(n, max(math.ceil(n / 8), math.ceil(_TABLE_ROWS / (c * tokens))))
    num_left = max(1, min(round(pairs**0.5), most))
    return num_left, num_left if left is right else max(1, min(m, pairs // num_left))


def add_upper(total: Float[Tensor, "r r"], rows: Float[Tensor, "r p"]) -> None:
    """Add rows·rowsᵀ on the diagonal and above it.

    In strips of columns that end at the diagonal: k of them cost (k + 1) / 2k of the operations,
    five eighths for four and less for more rows. Strips of rows, which lie flat, take a tenth
    longer. What lies below the diagonal has no meaning.

    Args:
        total: the sum.
        rows: of a tile.
    """
    num_rows = len(rows)
    if num_rows * rows.numel() < SMALL:
        total.addmm_(rows, rows.mT)
        return
    size = _strip_rows(num_rows)
    for start in range(0, num_rows, size):
        stop = min(start + size, num_rows)
        total[:stop, start:stop].addmm_(rows[:stop], rows[start:stop].mT)


def upper_share(num_rows: int) -> float:
    """Share of a square product's operations that `add_upper` takes."""
    strips = max(num_rows / _strip_rows(num_rows), 1.0)
    return (strips + 1) / (2 * strips)


def _strip_rows(num_rows: int) -> int:
    return max(_STRIP_ROWS, min(-(-num_rows // 4), _WIDE_STRIP_ROWS))


def mirrored(total: Float[Tensor, "*k r r"]) -> Float[Tensor, "*k r r"]:
    """The symmetric matrix whose upper triangle this is."""
    return total.triu().add_(total.mT.tril(-1))


def tiles(
    supports: Sequence[Int[Tensor, " _"] | None], num_rows: int | None, size: int
) -> Iterator[Int[Tensor, " s"] | slice]:
    """Rows of a parameter that both sides touch, in pieces.

    Args:
        supports: ascending rows that each side touches; None: all.
        num_rows: of the parameter, needed where both touch all.
        size: rows of a piece.

    Yields:
        Ascending rows.
    """
    touched = [rows for rows in supports if rows is not None]
    if len(touched) == 2:
        touched = [touched[0][torch.isin(touched[0], touched[1], assume_unique=True)]]
    if touched:
        yield from pieces(touched[0], size)
    elif num_rows is not None:
        for start in range(0, num_rows, size):
            yield slice(start, min(start + size, num_rows))


def pieces(rows: Int[Tensor, " s"], size: int) -> Iterator[Int[Tensor, " s"]]:
    """Consecutive pieces of `size` rows, the last of which may be smaller."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
