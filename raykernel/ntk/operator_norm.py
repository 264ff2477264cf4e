"""||J||_op of the stacked outputs, and of its changes, without J and without the kernel.

    α ← J Jᵀ α / ||J Jᵀ α||,    ||Jᵀ α|| / ||α||  →  ||J||_op = √(largest eigenvalue of J Jᵀ)

Power iteration: a step is one ordinary gradient of all examples and one forward-mode product. It
is the Lipschitz constant of θ ↦ F(θ) at a point, and ||J(θ) - J(θ')||_op / ||θ - θ'|| that of J
between two, which bounds of fine-tuning ask for. They ask for the largest in a ball; whatever is
measured at points of it is at most that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raykernel.ntk.batches import Batch, Readout, num_examples
from raykernel.ntk.passes import checked_logits, selected_parameters
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
    return _power(
        lambda weights: weighted_gradient(model, readout, batches, weights),
        lambda direction: tangents(model, readout, batches, direction)[1],
        _first_weights(model, readout, batches),
        tolerance=tolerance,
        max_steps=max_steps,
    )


def norm_of_change(
    model: nn.Module,
    readout: Readout,
    batches: Sequence[Batch],
    to: Mapping[str, Tensor],
    *,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> float:
    """||J(θ') - J(θ)||_op, from where the model stands to other parameters.

    Args:
        model: the network at θ; it is there again afterwards, also after an error.
        readout: logits (n, c) of a batch.
        batches: the examples.
        to: θ', by name; every selected parameter.
        tolerance: relative growth at which to stop.
        max_steps: steps at the most; each costs twice one of `operator_norm`.

    Returns:
        The norm; a lower bound, as in `operator_norm`.
    """
    parameters = selected_parameters(model)
    here = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def at(values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])

    def gradient(weights: Tensor) -> dict[str, Tensor]:
        at(to)
        there = weighted_gradient(model, readout, batches, weights)
        at(here)
        back = weighted_gradient(model, readout, batches, weights)
        return {name: there[name] - own for name, own in back.items()}

    def product(direction: Mapping[str, Tensor]) -> Tensor:
        at(to)
        there = tangents(model, readout, batches, direction)[1]
        at(here)
        return there - tangents(model, readout, batches, direction)[1]

    try:
        weights = _first_weights(model, readout, batches)
        return _power(gradient, product, weights, tolerance=tolerance, max_steps=max_steps)
    finally:
        at(here)


def norms_on_sphere(
    model: nn.Module,
    readout: Readout,
    batches: Sequence[Batch],
    *,
    radius: float,
    samples: int,
    seed: int = 0,
) -> list[float]:
    """||J||_op at random points of a sphere around where the model stands.

        θ + r v / ||v||,    v ~ N(0, I)

    Their largest is a lower bound of the largest in the ball, and a weak one: of many directions
    a random one is nearly orthogonal to the few that matter. Rahimi Afzal et al. 2025 estimate
    mean and largest Lipschitz constants in this way.

    Args:
        model: the network at θ; it is there again afterwards, also after an error.
        readout: logits (n, c) of a batch.
        batches: the examples.
        radius: r.
        samples: points.
        seed: of the points.

    Returns:
        One norm per point.
    """
    parameters = selected_parameters(model)
    here = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    # Drawn on the CPU: the same points on every device.
    generator = torch.Generator().manual_seed(seed)
    found = []
    try:
        for _ in range(samples):
            drawn = {
                name: torch.randn(own.shape, generator=generator) for name, own in here.items()
            }
            squares = (float(v.double().square().sum()) for v in drawn.values())
            length = math.sqrt(sum(squares))
            with torch.no_grad():
                for name, parameter in parameters.items():
                    move = drawn[name].to(here[name])
                    parameter.copy_(here[name] + radius / length * move)
            found.append(operator_norm(model, readout, batches))
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(here[name])
    return found


def _first_weights(
    model: nn.Module, readout: Readout, batches: Sequence[Batch]
) -> Float[Tensor, "n c"]:
    """A random α with a fixed seed, on the examples' device."""
    with torch.no_grad():
        outputs = checked_logits(model, readout, batches[0]).shape[1]
    generator = torch.Generator().manual_seed(0)
    shape = (sum(map(num_examples, batches)), outputs)
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    return weights.to(next(iter(batches[0].values())).device)


def _power(
    gradient: Callable[[Tensor], Mapping[str, Tensor]],
    product: Callable[[Mapping[str, Tensor]], Tensor],
    weights: Float[Tensor, "n c"],
    *,
    tolerance: float,
    max_steps: int,
) -> float:
    """Power iteration of α ↦ Jᵀ α (`gradient`) and w ↦ J w (`product`)."""
    norm = 0.0
    for _ in range(max_steps):
        length = torch.linalg.vector_norm(weights)
        if not length:
            break
        direction = gradient(weights / length)
        squares = (float(w.square().sum(dtype=torch.float64)) for w in direction.values())
        before, norm = norm, math.sqrt(sum(squares))
        if norm <= before * (1 + tolerance):
            break
        weights = product(direction).double()
    return norm
