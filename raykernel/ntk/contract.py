"""Factors of two captures → their kernel block, per layer group.

    K[i, a, j, b] = ⟨G[i, a], G'[j, b]⟩,    G[i, a] = Σ_t b_t ⊗ a_t

Letters: n, m examples, c outputs, t, u tokens, i inputs and o outputs of a layer. Two ways to the
same number, the cheaper of which is taken (Goodfellow 2015, arXiv:1510.01799, for the second):

    direct    form G for a tile of the parameter's rows, then one matrix product
    factored  Σ_tu (A A'ᵀ)[t, u] · (B B'ᵀ)[t, u]; the first factor serves all outputs

Everything that is not a product of one matrix with itself goes the direct way over the rows that
both sides touch: embeddings over the token ids they share, a tied embedding and head over the
ids that are also label words. Products are summed in float32 (float64 factors: in float64).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raykernel.errors import InputError, NonFiniteError, nearest
from raykernel.ntk.capture import Capture
from raykernel.ntk.factors import Lookup, Part, Product, accumulator

Block = Float[Tensor, "n c m c"]

MAX_BYTES = 1 << 28
"""Default bound on the temporaries of a contraction."""

_CPU_TILE_BYTES = 1 << 24
"""Small enough to be read back from cache, large enough for products that are not thin."""

_CPU_TABLE_BYTES = 1 << 19
"""The same for the factored way, which passes over its table three times."""

_STRIP_ROWS = 32
"""Rows below which a matrix product is too thin to be fast."""

_FLOPS_PER_BYTE = 6.0
"""Floating-point operations of a matrix product in the time of one byte of elementwise traffic."""


@dataclass(frozen=True, slots=True)
class Method:
    """How a product's kernel block is contracted, and what that costs."""

    name: str
    """`direct` or `factored`."""
    flops: float
    num_bytes: float
    """Elementwise memory traffic, in bytes."""

    @property
    def cost(self) -> float:
        """Comparable cost: operations, with traffic in units of operations."""
        return self.flops + _FLOPS_PER_BYTE * self.num_bytes


def method(
    num_rows: int, num_cols: int, *, c: int, t: int, u: int, d_in: int, d_out: int
) -> Method:
    """The cheaper way to contract one matrix's factors.

    Args:
        num_rows: n.
        num_cols: m.
        c: outputs.
        t: tokens of a row example.
        u: tokens of a column example.
        d_in: inputs of the layer.
        d_out: outputs of the layer.

    Returns:
        Its name and what it costs.
    """
    sizes = (num_rows, num_cols, c, t, u, d_in, d_out)
    return min(_direct(*sizes), _factored(*sizes), key=lambda way: way.cost)


def _direct(n: int, m: int, c: int, t: int, u: int, d_in: int, d_out: int) -> Method:
    p = d_in * d_out
    flops = 2.0 * c * p * (n * t + m * u) + 2.0 * n * m * c * c * p
    return Method("direct", flops, 2 * 4.0 * (n + m) * c * p)


def _factored(n: int, m: int, c: int, t: int, u: int, d_in: int, d_out: int) -> Method:
    pairs = 1.0 * n * t * m * u
    return Method("factored", 2 * pairs * (d_in + c * c * (d_out + 1)), 3 * 4 * pairs * c * c)


def gram(
    rows: Capture,
    cols: Capture,
    *,
    groups: Collection[str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> dict[str, Block]:
    """Kernel block of two captures by layer group; the sum over groups is the whole kernel.

    A cross group of a tied parameter holds ⟨g_a, g'_b⟩ + ⟨g_b, g'_a⟩.

    Args:
        rows: the row examples.
        cols: the column examples, of the same tracer; `rows` itself for the symmetric block.
        groups: those wanted; None: all.
        max_bytes: bound on temporary memory; never changes a number beyond rounding.

    Returns:
        (n, c, m, c) by group; zeros for a group that no output depends on.

    Raises:
        InputError: if a group does not exist.
        NonFiniteError: if a block overflows.
    """
    wanted = rows.groups if groups is None else tuple(groups)
    for group in wanted:
        if group not in rows.groups:
            raise InputError(f"layer group {group!r} does not exist, {nearest(group, rows.groups)}")
    blocks = {group: _group_block(rows, cols, group, max_bytes) for group in wanted}
    for group, block in blocks.items():
        if not bool(block.isfinite().all()):
            raise NonFiniteError(
                f"{group}: its kernel block overflows {block.dtype}, expected finite values. "
                "Use kernel.precision=float64."
            )
    return blocks


def _group_block(rows: Capture, cols: Capture, group: str, max_bytes: int) -> Block:
    n, c = rows.logits.shape
    m = len(cols.logits)
    dtype = accumulator(rows.logits.dtype)
    total = rows.logits.new_zeros((n * c, m * c), dtype=dtype)
    sides = rows.crosses.get(group, (group, group))
    for left, right in dict.fromkeys((sides, sides[::-1])):
        for name, parts in rows.parts[left].items():
            for own in parts:
                for other in cols.parts[right].get(name, ()):
                    total += _contract(own, other, max_bytes)
    return total.view(n, c, m, c)


def _contract(left: Part, right: Part, max_bytes: int) -> Float[Tensor, "nc mc"]:
    if isinstance(left, Product) and isinstance(right, Product) and _same_matrix(left, right):
        n, c, t, d_out = left.gradients.shape
        m, _, u, _ = right.gradients.shape
        way = method(n, m, c=c, t=t, u=u, d_in=left.inputs.shape[-1], d_out=d_out)
        if way.name == "factored":
            return factored(left, right, max_bytes=max_bytes)
        turned = _by_longer_side(left)
        same = turned if left is right else _by_longer_side(right)
        return direct(turned, same, max_bytes=max_bytes)
    return direct(left, right, max_bytes=max_bytes)


def _same_matrix(left: Product, right: Product) -> bool:
    if left.transposed != right.transposed or left.gradients.shape[-1] != right.gradients.shape[-1]:
        return False
    if left.rows is None or right.rows is None:
        return left.rows is right.rows
    return torch.equal(left.rows, right.rows)


def _by_longer_side(part: Product) -> Product:
    """The gradient or its transpose, whichever has more rows and so the larger tiles."""
    # ⟨G, G'⟩ = ⟨Gᵀ, G'ᵀ⟩, and a tile of few long rows makes thin products: half the speed where a
    # layer has thrice as many inputs as outputs.
    if part.rows is None and part.num_rows < part.width:
        return replace(part, transposed=not part.transposed)
    return part


def direct(left: Part, right: Part, *, max_bytes: int) -> Float[Tensor, "nc mc"]:
    """Block of two parts of one parameter, its gradient formed tile by tile.

    Args:
        left: rows of the block.
        right: columns of the block.
        max_bytes: bound on a tile of both.

    Returns:
        The block, examples and outputs flattened.
    """
    width = max(left.width, 1)
    num_gradients = sum(part.gradients.shape[:2].numel() for part in (left, right))
    tile_bytes = max_bytes if left.gradients.is_cuda else min(max_bytes, _CPU_TILE_BYTES)
    size = max(1, tile_bytes // (4 * num_gradients * width))
    shape = [part.gradients.shape[:2].numel() for part in (left, right)]
    common = torch.promote_types(left.gradients.dtype, right.gradients.dtype)
    total = left.gradients.new_zeros(shape, dtype=accumulator(common))
    for tile in _tiles(left, right, size):
        own = left.row_block(tile).flatten(2).flatten(0, 1).to(total.dtype)
        if left is right:
            _add_upper(total, own)
        else:
            other = right.row_block(tile).flatten(2).flatten(0, 1).to(total.dtype)
            total.addmm_(own, other.mT)
    return _mirrored(total) if left is right else total


def _add_upper(total: Float[Tensor, "r r"], rows: Float[Tensor, "r p"]) -> None:
    """Add rows·rowsᵀ above the diagonal and on it, in strips: 5/8 of the operations for four."""
    size = max(_STRIP_ROWS, -(-len(rows) // 4))
    for start in range(0, len(rows), size):
        total[start : start + size, start:].addmm_(rows[start : start + size], rows[start:].mT)


def _mirrored(total: Float[Tensor, "r r"]) -> Float[Tensor, "r r"]:
    return total.triu() + total.triu(1).mT


def _tiles(left: Part, right: Part, size: int) -> Iterator[Int[Tensor, " s"] | slice]:
    """Rows of the parameter that both parts touch, in pieces."""
    touched = [rows for part in (left, right) if (rows := part.support()) is not None]
    if touched and len(touched) == 2:
        touched = [touched[0][torch.isin(touched[0], touched[1], assume_unique=True)]]
    if touched:
        rows = touched[0]
        yield from (rows[start : start + size] for start in range(0, len(rows), size))
        return
    assert not isinstance(left, Lookup)
    num_rows = left.num_rows
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def factored(left: Product, right: Product, *, max_bytes: int) -> Float[Tensor, "nc mc"]:
    """Block of two products of one matrix, from token-by-token inner products.

    Args:
        left: rows of the block.
        right: columns of the block.
        max_bytes: bound on the table of inner products.

    Returns:
        The block, examples and outputs flattened.
    """
    n, c, t, _ = left.gradients.shape
    m, _, u, _ = right.gradients.shape
    dtype = accumulator(left.gradients.dtype)
    tile_bytes = max_bytes if left.gradients.is_cuda else min(max_bytes, _CPU_TABLE_BYTES)
    each = 4 * c * c * t * u
    num_right = max(1, min(m, tile_bytes // each))
    num_left = max(1, min(n, tile_bytes // (each * num_right)))
    total = left.gradients.new_zeros((n, c, m, c), dtype=dtype)
    symmetric = left is right
    for i in range(0, n, num_left):
        a = left.inputs[i : i + num_left].to(dtype).flatten(0, 1)
        b = left.gradients[i : i + num_left].to(dtype).flatten(0, 2)
        for j in range(i if symmetric else 0, m, num_right):
            a2 = right.inputs[j : j + num_right].to(dtype).flatten(0, 1)
            b2 = right.gradients[j : j + num_right].to(dtype).flatten(0, 2)
            inputs = (a @ a2.mT).view(-1, 1, t, a2.shape[0] // u, 1, u)
            table = (b @ b2.mT).view(-1, c, t, a2.shape[0] // u, c, u)
            total[i : i + num_left, :, j : j + num_right] = table.mul_(inputs).sum((2, 5))
    block = total.view(n * c, m * c)
    return _mirrored(block) if symmetric else block
