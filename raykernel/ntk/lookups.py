"""Kernel block of two embeddings: only texts that share a token have anything in common.

    K[i, a, j, b] = Σ_v ⟨G[i, a, v], G'[j, b, v]⟩,    G[i, a, v] = Σ_{t: id_t = v} b_t

A row G[·, v] is zero for most texts, so a product of matrices over all touched tokens would
multiply zeros. Gradients are summed by (token, text) once, and then only pairs of texts with the
same token are multiplied. Tokens that most texts share, such as positions, form a matrix product.

Letters: n, m examples, c outputs, w width of the embedding, q sums by token and text, k pairs of
them with the same token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raykernel.ntk.factors import Lookup, accumulator, places, tile_bytes
from raykernel.ntk.pairs import add_upper, mirrored, pieces

_DENSE = 10
"""A token is left to the matrix product if more than one in so many pairs of texts shares it."""

_FEW_OUTPUTS = 4
"""Outputs up to which inner products take less time than a product of so small matrices."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """Gradients summed by (token, text), tokens ascending and texts ascending within a token."""

    ids: Int[Tensor, " q"]
    examples: Int[Tensor, " q"]
    gradients: Float[Tensor, "q c w"]


def shared_tokens(left: Lookup, right: Lookup, *, max_bytes: int) -> Float[Tensor, "nc mc"]:
    """Block of two embeddings of one matrix, token by token.

    Cost: O(pairs · c² w), for pairs of texts that share a token; at most ten times as much for
    tokens that form a matrix product.

    Args:
        left: rows of the block.
        right: columns of the block; `left` itself for the symmetric block.
        max_bytes: bound on temporary memory beside the sums by token and text.

    Returns:
        The block, examples and outputs flattened.
    """
    (n, c, _, w), m = left.gradients.shape, len(right.gradients)
    symmetric = left is right
    rows = _sums(left)
    cols = rows if symmetric else _sums(right)
    first = torch.searchsorted(cols.ids, rows.ids)
    stop = torch.searchsorted(cols.ids, rows.ids, right=True)
    dense = _dense_tokens(rows.ids, stop - first, n * m)
    if symmetric:  # with itself and the texts behind it; what lies below the diagonal is mirrored
        first = torch.arange(len(first), device=first.device)
    block = rows.gradients.new_zeros((n * c, m * c))
    pair_bytes = 2 * c * max(w, 1) * block.element_size()
    size = max(1, tile_bytes(block.device, max_bytes) // pair_bytes)
    partners = (stop - first).masked_fill(torch.isin(rows.ids, dense), 0)
    _add_pairs(block, rows, cols, first, partners, size=size)
    for tokens in pieces(dense, max(1, 2 * size // (n if symmetric else n + m))):
        own = _matrix(rows, tokens, n)
        if symmetric:
            add_upper(block, own)
        else:
            block.addmm_(own, _matrix(cols, tokens, m).mT)
    return mirrored(block) if symmetric else block


def _sums(part: Lookup) -> _Sums:
    n, c, _, w = part.gradients.shape
    keys = part.ids * n + torch.arange(n, device=part.ids.device).unsqueeze(1)
    distinct, place = torch.unique(keys, return_inverse=True)
    by_token = part.gradients.transpose(1, 2).flatten(0, 1)
    dtype = accumulator(by_token.dtype)
    summed = by_token.new_zeros((len(distinct), c, w), dtype=dtype)
    summed.index_add_(0, place.flatten(), by_token.to(dtype))
    return _Sums(distinct // n, distinct % n, summed)


def _dense_tokens(
    ids: Int[Tensor, " q"], partners: Int[Tensor, " q"], num_pairs: int
) -> Int[Tensor, " s"]:
    distinct, place = torch.unique(ids, return_inverse=True)
    shared = torch.zeros_like(distinct).index_add_(0, place, partners)
    dense: Tensor = distinct[shared * _DENSE > num_pairs]
    return dense


def _add_pairs(
    block: Float[Tensor, "nc mc"],
    rows: _Sums,
    cols: _Sums,
    first: Int[Tensor, " q"],
    partners: Int[Tensor, " q"],
    *,
    size: int,
) -> None:
    """Add the products of every row with its partners, which stand together; `size` at a time."""
    c = rows.gradients.shape[1]
    output = torch.arange(c, device=block.device)
    within = output.unsqueeze(1) * block.shape[1] + output
    stop = partners.cumsum(0)
    num_pairs = int(partners.sum())
    for start in range(0, num_pairs, size):
        pair = torch.arange(start, min(start + size, num_pairs), device=block.device)
        own = torch.searchsorted(stop, pair, right=True)
        other = first[own] + pair - (stop - partners)[own]
        corner = (rows.examples[own] * block.shape[1] + cols.examples[other]) * c
        products = _products(rows.gradients[own], cols.gradients[other])
        place = corner.view(-1, 1, 1) + within
        block.view(-1).index_add_(0, place.flatten(), products.flatten())


def _products(
    left: Float[Tensor, "k c w"], right: Float[Tensor, "k c w"]
) -> Float[Tensor, "k c c"]:
    c = left.shape[1]
    if c > _FEW_OUTPUTS:
        return left.bmm(right.mT)
    single = [torch.linalg.vecdot(left[:, a], right[:, b]) for a in range(c) for b in range(c)]
    return torch.stack(single, dim=1).view(-1, c, c)


def _matrix(sums: _Sums, tokens: Int[Tensor, " s"], n: int) -> Float[Tensor, "nc sw"]:
    """Gradients of some rows of the embedding, example by example."""
    _, c, w = sums.gradients.shape
    place, found = places(tokens, sums.ids)
    own = found.nonzero().squeeze(1)
    matrix = sums.gradients.new_zeros((n, c, len(tokens), w))
    matrix[sums.examples[own], :, place[own]] = sums.gradients[own]
    return matrix.flatten(0, 1).flatten(1)
