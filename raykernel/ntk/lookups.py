"""Kernel block of two embeddings: only texts that share a token have anything in common.

    K[i, a, j, b] = Σ_v ⟨G[i, a, v], G'[j, b, v]⟩,    G[i, a, v] = Σ_{t: id_t = v} b_t

A row G[·, v] is zero for most texts, so a product of matrices over all touched tokens would
multiply zeros. Gradients are summed by (token, text) once, and then only pairs of texts with the
same token are multiplied. Tokens that most texts share, such as positions, form a matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raykernel.ntk.factors import Lookup, accumulator

_DENSE = 10
"""A token is left to the matrix product if more than one in so many pairs of texts shares it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Entries:
    """Summed gradients by (token, text), tokens ascending."""

    ids: Int[Tensor, " q"]
    examples: Int[Tensor, " q"]
    gradients: Float[Tensor, "q c w"]


def shared_tokens(left: Lookup, right: Lookup) -> tuple[Float[Tensor, "nc mc"], Int[Tensor, " s"]]:
    """Share of a block that comes from tokens which few pairs of texts have in common.

    Cost: O(pairs · c² w), for pairs of texts that share a token.

    Args:
        left: rows of the block.
        right: columns of the block.

    Returns:
        That share, examples and outputs flattened, and the ascending tokens that it leaves out.
    """
    n, c = left.gradients.shape[:2]
    m = len(right.gradients)
    rows = _entries(left)
    cols = rows if left is right else _entries(right)
    first = torch.searchsorted(cols.ids, rows.ids)
    partners = torch.searchsorted(cols.ids, rows.ids, right=True) - first
    dense = _dense_tokens(rows.ids, partners, n * m)
    partners = partners.masked_fill(torch.isin(rows.ids, dense), 0)
    block = rows.gradients.new_zeros(n * m, c, c)
    for k in range(int(partners.max()) if len(partners) else 0):
        own = (partners > k).nonzero().squeeze(1)
        other = first[own] + k
        place = rows.examples[own] * m + cols.examples[other]
        block.index_add_(0, place, rows.gradients[own] @ cols.gradients[other].mT)
    return block.view(n, m, c, c).transpose(1, 2).reshape(n * c, m * c), dense


def _entries(part: Lookup) -> _Entries:
    n, c, _, w = part.gradients.shape
    keys = part.ids * n + torch.arange(n, device=part.ids.device).unsqueeze(1)
    distinct, place = torch.unique(keys, return_inverse=True)
    by_token = part.gradients.transpose(1, 2).flatten(0, 1)
    dtype = accumulator(by_token.dtype)
    summed = by_token.new_zeros((len(distinct), c, w), dtype=dtype)
    summed.index_add_(0, place.flatten(), by_token.to(dtype))
    return _Entries(distinct // n, distinct % n, summed)


def _dense_tokens(
    ids: Int[Tensor, " q"], partners: Int[Tensor, " q"], num_pairs: int
) -> Int[Tensor, " s"]:
    distinct, place = torch.unique(ids, return_inverse=True)
    shared = torch.zeros_like(distinct).index_add_(0, place, partners)
    dense: Tensor = distinct[shared * _DENSE > num_pairs]
    return dense
