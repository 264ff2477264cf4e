"""Checks that a capture is what plain autograd gives.

A capture rests on two readings that no static look at a model can prove: that the watched calls
are all uses of a parameter, and that the examples are where the shapes say. Both are checked on
numbers, for every new pattern of calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raykernel.ntk.batches import Batch, Readout
from raykernel.ntk.factors import Part, magnitude
from raykernel.ntk.local import requiring_gradients

_SEPARATION_TOLERANCE = 1e-3


def output_weights(logits: Float[Tensor, "n c"]) -> Float[Tensor, " c"]:
    """Weights of the outputs in the audited sum: distinct, so that no two outputs can swap."""
    return 1.0 / torch.arange(1, logits.shape[1] + 1, device=logits.device, dtype=logits.dtype)


def example_scales(logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Weights of the examples in the separation probe.

    Args:
        logits: of the examples.

    Returns:
        Powers of two, which scale a backward pass without rounding; they repeat after 32 examples.
    """
    exponents = torch.arange(len(logits), device=logits.device) % 32
    return torch.exp2(-exponents.double()).to(logits.dtype)


def separated(
    gradients: Sequence[Tensor],
    scaled: Sequence[Tensor],
    scales: Float[Tensor, " n"],
) -> bool:
    """Whether each example's slice of every call carries that example's gradient only.

    Scaling the logits of example i by s_i must scale slice i by s_i and by nothing else.

    Args:
        gradients: of the sum of one output over the examples, by call.
        scaled: of the same sum with the examples scaled.
        scales: s.

    Returns:
        True if nothing leaks from one example into another's slice.
    """
    n = len(scales)
    for plain, other in zip(gradients, scaled, strict=True):
        if not plain.numel():
            continue
        expected = plain.reshape(n, -1) * scales.unsqueeze(1)
        error = (other.reshape(n, -1) - expected).abs().amax(1)
        if bool((error > _SEPARATION_TOLERANCE * expected.abs().amax(1)).any()):
            return False
    return True


def wrong_parameters(
    model: nn.Module,
    readout: Readout,
    batch: Batch,
    parameters: Mapping[str, nn.Parameter],
    parts: Mapping[str, Sequence[Part]],
    logits: Float[Tensor, "1 c"],
) -> set[str] | None:
    """Parameters whose captured gradient is not autograd's, for one example.

    Args:
        model: the network; none of its parameters need a gradient.
        readout: logits (n, c) of a batch.
        batch: the example.
        parameters: by name.
        parts: what was captured of the example, by parameter.
        logits: what was captured of the example.

    Returns:
        Names, or None if the logits themselves are others.
    """
    weights = output_weights(logits)
    if not parameters:
        return set()
    errors: dict[str, float] = {}
    norms: dict[str, float] = {}
    terms: dict[str, float] = {}

    def compare(name: str, gradient: Tensor | None) -> None:
        own = parts.get(name, ())
        captured = dense(own, weights, parameters[name])
        actual = torch.zeros_like(captured) if gradient is None else gradient.to(captured.dtype)
        errors[name] = float((actual - captured).norm())
        norms[name] = max(float(actual.norm()), float(captured.norm()))
        size = parameters[name].numel() ** 0.5
        terms[name] = sum(float(magnitude(p)[0].double() @ weights.double()) * size for p in own)

    # A hook per parameter takes each gradient as it becomes complete and frees it: the peak is
    # one parameter, not all of them.
    stash = {name: parameter.grad for name, parameter in parameters.items()}
    handles = []
    with requiring_gradients(parameters.values()):
        for name, parameter in parameters.items():
            parameter.grad = None
            handles.append(_on_gradient(parameter, partial(compare, name)))
        try:
            alone = readout(model, batch)
            if not _close(alone.detach(), logits):
                return None
            if alone.requires_grad:
                torch.autograd.backward((alone * weights).sum(), inputs=list(parameters.values()))
        finally:
            for handle in handles:
                handle.remove()
            for name, parameter in parameters.items():
                parameter.grad = stash[name]
    for name in parameters.keys() - errors.keys():
        compare(name, None)
    eps = _precision(logits.dtype)
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    # Rounding of a gradient that vanishes (attention's key bias) is relative to the others, and to
    # the terms that cancel in it.
    return {
        name
        for name, error in errors.items()
        if not error <= eps**0.5 * norms[name] + 10 * eps * (total + terms[name])
    }


def _on_gradient(parameter: nn.Parameter, receive: Callable[[Tensor | None], None]) -> Any:
    def take(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        receive(gradient)

    register: Callable[..., Any] = parameter.register_post_accumulate_grad_hook
    return register(take)


def dense(
    parts: Sequence[Part], weights: Float[Tensor, " c"], parameter: nn.Parameter
) -> Float[Tensor, " ..."]:
    """One example's gradient of the weighted sum of outputs, shaped like the parameter."""
    shape = parameter.shape if parameter.dim() else torch.Size([1])
    total = parameter.new_zeros((shape[0], shape[1:].numel()), dtype=torch.float64)
    for part in parts:
        rows = part.support()
        block = part.row_block(slice(0, shape[0]) if rows is None else rows)[0]
        summed = torch.einsum("csw,c->sw", block.double(), weights.double())
        if rows is None:
            total += summed
        else:
            total[rows] += summed
    return total.view(parameter.shape)


def _precision(dtype: torch.dtype) -> float:
    """Machine epsilon, of float32 at best: many models normalise in float32 whatever their type."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def _close(actual: Tensor, expected: Tensor) -> bool:
    eps = _precision(expected.dtype)
    return bool((actual - expected).abs().max() <= eps**0.5 * expected.abs().max().clamp(min=1e-3))
