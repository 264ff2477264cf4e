"""||J||_op of the stacked outputs, without J and without the kernel.

    α ← J Jᵀ α / ||J Jᵀ α||,    ||Jᵀ α|| / ||α||  →  ||J||_op = √(largest eigenvalue of J Jᵀ)

Power iteration: a step is one ordinary gradient of all examples and one forward-mode product. It
is the Lipschitz constant of θ ↦ F(θ) at a point, which bounds of fine-tuning ask for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from raykernel.ntk.batches import Batch, Readout, num_examples
from raykernel.ntk.passes import checked_logits
from raykernel.ntk.product import tangents, weighted_gradient

TOLERANCE = 1e-3
"""Relative growth of the norm in a step at which it counts as found."""

MAX_STEPS = 30
"""Steps at the most; each costs about eight forward passes over all examples."""


def operator_norm(
    model: nn.Module,
    readout: Readout,
    batches: Sequence[Batch],
    *,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> float:
    """||J||_op of all outputs of all examples.

    Every step's value is a lower bound, and no step's is below the one before. The start is random
    with a fixed seed, so that the result is a function of model and examples.

    Args:
        model: the network; parameters with `requires_grad` are those of J.
        readout: logits (n, c) of a batch.
        batches: the examples.
        tolerance: relative growth at which to stop.
        max_steps: steps at the most.

    Returns:
        The norm; 0 if the outputs do not depend on the parameters.
    """
    with torch.no_grad():
        outputs = checked_logits(model, readout, batches[0]).shape[1]
    generator = torch.Generator().manual_seed(0)
    shape = (sum(map(num_examples, batches)), outputs)
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    device = next(iter(batches[0].values())).device
    norm = 0.0
    for _ in range(max_steps):
        weights = weights / torch.linalg.vector_norm(weights)
        direction = weighted_gradient(model, readout, batches, weights.to(device))
        squares = (float(w.square().sum(dtype=torch.float64)) for w in direction.values())
        before, norm = norm, math.sqrt(sum(squares))
        if norm <= before * (1 + tolerance):
            break
        _, product = tangents(model, readout, batches, direction)
        weights = product.double().cpu()
    return norm
