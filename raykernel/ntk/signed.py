"""Kernels with signs of one parameter: its whole gradient formed tile by tile, or its packed signs.

    K[i, a, j, b] = ⟨r(G[i, a]), s(G'[j, b])⟩,    r and s the identity or the sign

Sums of signs are exact integers: a tile's is below 2^24 and so exact in float32, and tiles are
summed in float64. Letters: n, m examples, c outputs, s rows of a parameter, p coordinates of a
tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raykernel.ntk import signs
from raykernel.ntk.factors import Part, accumulator, num_rows_of, summed_rows, support_of
from raykernel.ntk.matmul import fast_products
from raykernel.ntk.packed import Packed, formed_rows
from raykernel.ntk.pairs import add_upper, mirrored, tiles
from raykernel.terms import Kind

_Tile = dict[str, Tensor]


@fast_products()
def signed(
    left: Sequence[Part] | Packed,
    right: Sequence[Part] | Packed,
    kinds: Sequence[Kind],
    *,
    dead_zone: float,
    max_bytes: int,
    name: str = "a parameter",
) -> dict[Kind, Float[Tensor, "nc mc"]]:
    """Blocks of one parameter for several kinds, its whole gradient formed tile by tile once.

    Args:
        left: all uses of the parameter on the rows' side, or their signs.
        right: on the columns' side; `left` itself for the symmetric block.
        kinds: kernels wanted, which need no gradient of a side of signs.
        dead_zone: see `signs.signs`.
        max_bytes: bound on a tile of both sides and their signs.
        name: of the parameter.

    Returns:
        The blocks, examples and outputs flattened; sums of signs are exact integers.

    Raises:
        NonFiniteError: if a gradient overflows.
    """
    symmetric = left is right
    rows = _side(left, dead_zone, name)
    cols = rows if symmetric else _side(right, dead_zone, name)
    shape = [rows.num_gradients, cols.num_gradients]
    dtype = torch.promote_types(rows.dtype, cols.dtype)
    # A tile's sum of signs is below 2^24, so exact in float32; the sum over tiles needs more.
    total = {kind: torch.zeros(shape, dtype=torch.float64, device=rows.device) for kind in kinds}
    for own, other in _tiles_of_both(rows, cols, max_bytes):
        for kind in kinds:
            a, b = own[SIDES[kind][0]].to(dtype), other[SIDES[kind][1]].to(dtype)
            if a is b:
                piece = a.new_zeros(shape)
                add_upper(piece, a)
            else:
                piece = a @ b.mT
            total[kind] += piece
    result = {}
    for kind, block in total.items():
        upper = symmetric and SIDES[kind][0] == SIDES[kind][1]
        result[kind] = (mirrored(block) if upper else block).to(dtype)
    return result


@dataclass(frozen=True, slots=True, eq=False)
class _Formed:
    """One side of a parameter's block, formed from its factors."""

    parts: Sequence[Part]
    limit: Float[Tensor, "nc 1"]
    """See `signs.threshold`."""

    @property
    def num_gradients(self) -> int:
        return self.parts[0].gradients.shape[:2].numel()

    @property
    def width(self) -> int:
        return self.parts[0].width

    @property
    def num_rows(self) -> int | None:
        return num_rows_of(self.parts)

    @property
    def dtype(self) -> torch.dtype:
        return accumulator(self.parts[0].gradients.dtype)

    @property
    def device(self) -> torch.device:
        return self.limit.device

    def support(self) -> Int[Tensor, " s"] | None:
        return support_of(self.parts)

    def tile(self, rows: Int[Tensor, " s"] | slice) -> _Tile:
        gradient = summed_rows(self.parts, rows).flatten(2).flatten(0, 1).to(self.dtype)
        return {"gradient": gradient, "sign": signs.signs(gradient, self.limit)}


def _side(uses: Sequence[Part] | Packed, dead_zone: float, name: str) -> _Formed | Packed:
    if isinstance(uses, Sequence):
        return _Formed(uses, signs.threshold(uses, dead_zone, name=name))
    return uses


def _tiles_of_both(
    rows: _Formed | Packed, cols: _Formed | Packed, max_bytes: int
) -> Iterator[tuple[_Tile, _Tile]]:
    """The same rows of the parameter on both sides, tile by tile; of one side twice the same."""
    sizes = [
        formed_rows(side.num_gradients, side.width, side.device, max_bytes) for side in (rows, cols)
    ]
    supports = [rows.support(), cols.support()]
    if any(support is not None for support in supports):
        for tile in tiles(supports, None, min(sizes)):
            own = rows.tile(tile)
            yield own, own if rows is cols else cols.tile(tile)
        return
    pieces = _pieces_of(rows, sizes[0], min(sizes))
    if rows is cols:
        yield from ((own, own) for own in pieces)
    else:
        yield from zip(pieces, _pieces_of(cols, sizes[1], min(sizes)), strict=True)


def _pieces_of(side: _Formed | Packed, formed: int, size: int) -> Iterator[_Tile]:
    """A side in pieces of so many rows, formed more of them at a time."""
    # How many are formed at a time must not depend on the other side: a product of other sizes
    # rounds otherwise, and of 1e8 coordinates some always change sign with the last bit.
    assert side.num_rows is not None
    step = formed if isinstance(side, _Formed) else size
    for start in range(0, side.num_rows, step):
        stop = min(start + step, side.num_rows)
        tile = side.tile(slice(start, stop))
        for first in range(0, (stop - start) * side.width, size * max(side.width, 1)):
            last = first + size * side.width
            yield {name: block[:, first:last] for name, block in tile.items()}


SIDES: dict[Kind, tuple[str, str]] = {
    Kind.sgd: ("gradient", "gradient"),
    Kind.signgd: ("sign", "sign"),
    Kind.asigngd: ("gradient", "sign"),
    Kind.asigngd_flipped: ("sign", "gradient"),
}
"""What stands on the rows' and the columns' side (Malladi et al. 2023, Definitions 3.2 to 3.4)."""
