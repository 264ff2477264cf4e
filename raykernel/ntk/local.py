"""Gradients of a module's own parameters by plain autograd: where no rule applies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raykernel.ntk.factors import Rows, accumulator


def module_gradients(
    module: nn.Module,
    names: Sequence[str],
    inputs: tuple[Any, ...],
    options: Mapping[str, Any],
    gradients: Tensor,
    num_examples: int,
) -> dict[str, Rows]:
    """A module's own parameters' gradients, from its inputs and the gradient of its output.

    Args:
        module: a module without children.
        names: parameters, as the module names them.
        inputs: its positional inputs; tensors whose leading dimension is n are cut by example.
        options: its named inputs, cut in the same way.
        gradients: of each of the c outputs, (c, n, ...).
        num_examples: n.

    Returns:
        (n, c, p) by parameter name.
    """
    theta = {name: module.get_parameter(name).detach().requires_grad_() for name in names}
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for i in range(num_examples):
        own = tuple(_example(value, i, num_examples) for value in inputs)
        named = {key: _example(value, i, num_examples) for key, value in options.items()}
        with torch.enable_grad():
            output = torch.func.functional_call(module, theta, own, named)
        cut = [_example(gradient, i, num_examples) for gradient in gradients]
        for name, rows in zip(names, _rows(output, list(theta.values()), cut), strict=True):
            found[name].append(rows)
    return {name: _stack(rows, theta[name].shape) for name, rows in found.items()}


@contextmanager
def requiring_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which these parameters need a gradient; afterwards they do not.

    Args:
        parameters: those.

    Yields:
        Nothing.
    """
    chosen = list(parameters)
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(False)


def _example(value: Any, index: int, count: int) -> Any:
    whole = count == 1 or not isinstance(value, Tensor) or value.dim() == 0
    return value if whole or value.shape[0] != count else value[index : index + 1]


def _rows(output: Tensor, theta: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Gradients (c, p) of each parameter."""
    if not output.requires_grad:
        return [t.new_zeros((len(gradients), t.numel())) for t in theta]
    by_output = [
        torch.autograd.grad(output, theta, gradient, retain_graph=True, materialize_grads=True)
        for gradient in gradients
    ]
    return [torch.stack([g.flatten() for g in grads]) for grads in zip(*by_output, strict=True)]


def _stack(rows: list[Tensor], shape: torch.Size) -> Rows:
    gradients = torch.stack(rows)
    return Rows(gradients.to(accumulator(gradients.dtype)), shape[0] if shape else 1)
