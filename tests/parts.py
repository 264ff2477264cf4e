"""Random parts of a capture, one of every kind, and the gradient that a part stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from raykernel.ntk.factors import Lookup, Part, Product, Rows
from tests.cases import normal

C, VOCAB, WIDTH = 2, 11, 3
"""Outputs, and the shape of the parameter."""

KINDS = ("lookup", "rows", "product", "turned", "some_rows")


def make_part(kind: str, n: int, t: int, seed: int) -> Part:
    """A random part of n examples with t tokens."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "lookup":
        ids = torch.randint(0, VOCAB, (n, t), generator=generator)
        return Lookup(ids, normal(n, C, t, WIDTH, seed=seed))
    if kind == "rows":
        return Rows(normal(n, C, VOCAB * WIDTH, seed=seed), VOCAB)
    if kind == "product":
        inputs, gradients = normal(n, t, WIDTH, seed=seed), normal(n, C, t, VOCAB, seed=seed + 1)
        return Product(inputs, gradients, None, False)
    if kind == "turned":
        inputs, gradients = normal(n, t, VOCAB, seed=seed), normal(n, C, t, WIDTH, seed=seed + 1)
        return Product(inputs, gradients, None, True)
    rows = torch.randperm(VOCAB, generator=generator)[:4].sort().values
    return Product(normal(n, t, WIDTH, seed=seed), normal(n, C, t, 4, seed=seed + 1), rows, False)


def gradient(part: Part) -> Tensor:
    """(n, c, VOCAB · WIDTH), token by token."""
    n, c = part.gradients.shape[:2]
    total = torch.zeros(n, c, VOCAB, WIDTH, dtype=torch.float64)
    if isinstance(part, Rows):
        return part.gradients
    for i in range(n):
        for t in range(part.gradients.shape[2]):
            for a in range(c):
                b = part.gradients[i, a, t]
                if isinstance(part, Lookup):
                    total[i, a, part.ids[i, t]] += b
                elif part.transposed:
                    total[i, a] += torch.outer(part.inputs[i, t], b)
                else:
                    rows = torch.arange(VOCAB) if part.rows is None else part.rows
                    total[i, a, rows] += torch.outer(b, part.inputs[i, t])
    return total.flatten(2)
