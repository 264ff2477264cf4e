"""Blocks of biases and norms: dozens of small pairs, of few shapes, in batched products.

    K[k, (i, a), (j, b)] = ⟨r(G_k[i, a]), s(G'_k[j, b])⟩,    r and s the identity or the sign

for the parameters k of one length: one call for all of them in place of a dozen for each. Letters:
k parameters, n, m examples, c outputs, p coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from raykernel.ntk import signs
from raykernel.ntk.factors import Rows, accumulator
from raykernel.ntk.packed import PackedRows
from raykernel.ntk.pairs import SMALL, mirrored
from raykernel.ntk.signed import SIDES
from raykernel.terms import Kind

Vector = Rows | PackedRows
"""Gradients of a parameter that are there, or their signs."""


class Pair(NamedTuple):
    """Both sides of one parameter's block."""

    name: str
    """Of the parameter."""
    left: Vector
    right: Vector
    """`left` itself for the symmetric block."""


def is_small(pair: Pair) -> bool:
    """Whether a pair's product is over before the next one's call has begun."""
    num_rows, num_cols = (_stored(part).shape[:2].numel() for part in (pair.left, pair.right))
    return num_rows * num_cols * _length(pair.left) < SMALL


def together(
    pairs: Sequence[Pair], kinds: Sequence[Kind], *, dead_zone: float, max_bytes: int
) -> list[dict[Kind, Float[Tensor, "nc mc"]]]:
    """Blocks of many small pairs, those of one length in batched products.

    Args:
        pairs: all of the same row and column examples.
        kinds: kernels wanted, which need no gradient of a side of signs; for those with signs a
            pair has all uses of its parameter.
        dead_zone: see `signs.signs`.
        max_bytes: bound on the gradients of a batched product and their signs.

    Returns:
        The blocks of each pair, examples and outputs flattened; sums of signs are exact integers.

    Raises:
        NonFiniteError: if a gradient overflows of which signs are wanted.
    """
    blocks: list[dict[Kind, Tensor]] = [{} for _ in pairs]
    equals: dict[int, list[int]] = {}
    for index, pair in enumerate(pairs):
        equals.setdefault(_length(pair.left), []).append(index)
    for same in equals.values():
        size = max(1, max_bytes // max(_num_bytes(pairs[same[0]], kinds), 1))
        for start in range(0, len(same), size):
            batch = same[start : start + size]
            names, left, right = zip(*(pairs[index] for index in batch), strict=True)
            own = _sides(left, names, kinds, dead_zone)
            symmetric = all(a is b for a, b in zip(left, right, strict=True))
            other = own if symmetric else _sides(right, names, kinds, dead_zone)
            for kind in kinds:
                rows, cols = own[SIDES[kind][0]], other[SIDES[kind][1]]
                found = rows.bmm(cols.mT)
                for index, block in zip(
                    batch, mirrored(found) if rows is cols else found, strict=True
                ):
                    blocks[index][kind] = block
    return blocks


def _num_bytes(pair: Pair, kinds: Sequence[Kind]) -> int:
    of_signs = any(kind.has_signs for kind in kinds)
    each = sum(
        _stored(part).shape[:2].numel() * _length(part) * _dtype(part).itemsize
        for part in (pair.left, pair.right)
    )
    return each * (2 if of_signs else 1)


def _stored(part: Vector) -> Tensor:
    """What there is by example and output."""
    return part.gradients if isinstance(part, Rows) else part.codes


def _length(part: Vector) -> int:
    """Coordinates of the parameter."""
    return part.num_rows * part.width


def _dtype(part: Vector) -> torch.dtype:
    return accumulator(part.gradients.dtype) if isinstance(part, Rows) else part.dtype


def _sides(
    parts: Sequence[Vector], names: Sequence[str], kinds: Sequence[Kind], dead_zone: float
) -> dict[str, Float[Tensor, "k nc p"]]:
    """What may stand on one side of the blocks, see `SIDES`."""
    stacked = torch.stack([_stored(part).flatten(0, 1) for part in parts])
    vectors = [part for part in parts if isinstance(part, Rows)]
    if not vectors:
        first = parts[0]
        assert isinstance(first, PackedRows)
        return {"sign": signs.unpack(stacked, _length(first), first.dtype)}
    gradient = stacked.to(_dtype(vectors[0]))
    if not any(kind.has_signs for kind in kinds):
        return {"gradient": gradient}
    limits = signs.thresholds([[part] for part in vectors], dead_zone, names=names)
    return {"gradient": gradient, "sign": signs.signs(gradient, limits)}
