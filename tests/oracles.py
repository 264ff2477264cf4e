"""Kernels by definition: float64, one backward pass per example and output, one dot product."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Readout = Callable[[nn.Module, Batch], Tensor]


def selected(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def jacobian(model: nn.Module, readout: Readout, batch: Batch) -> dict[str, Tensor]:
    """(n, c, p) by parameter, in float64."""
    model = copy.deepcopy(model).double().eval()
    parameters = selected(model)
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in range(len(next(iter(batch.values())))):
        example = {key: value[i : i + 1] for key, value in batch.items()}
        logits = readout(model, _double(example))[0]
        for logit in logits:
            wanted = list(parameters.values())
            if logit.requires_grad:
                gradients = torch.autograd.grad(
                    logit, wanted, retain_graph=True, materialize_grads=True
                )
            else:  # it depends on no selected parameter
                gradients = [torch.zeros_like(parameter) for parameter in wanted]
            for name, gradient in zip(parameters, gradients, strict=True):
                rows[name].append(gradient.flatten())
        c = len(logits)
    return {name: torch.stack(own).unflatten(0, (-1, c)) for name, own in rows.items()}


def kernel_by_parameter(
    model: nn.Module, readout: Readout, rows: Batch, cols: Batch | None = None
) -> dict[str, Tensor]:
    left = jacobian(model, readout, rows)
    right = left if cols is None else jacobian(model, readout, cols)
    return {name: inner(left[name], right[name]) for name in left}


def inner(left: Tensor, right: Tensor) -> Tensor:
    """⟨G[i, a], G'[j, b]⟩ of (n, c, p) and (m, c, p)."""
    return torch.einsum("iap,jbp->iajb", left, right)


def fold(jacobian: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Σ_i,a α[i, a] G[i, a] by parameter."""
    return {name: torch.einsum("iap,ia->p", own, weights) for name, own in jacobian.items()}


def along(jacobian: dict[str, Tensor], direction: dict[str, Tensor]) -> Tensor:
    """Σ_p G[i, a, p] w[p] over all parameters."""
    return sum(
        torch.einsum("iap,p->ia", own, direction[name].double().flatten())
        for name, own in jacobian.items()
    )


def untie(model: nn.Module) -> nn.Module:
    """A copy in which every module owns its parameters, none shared: one gradient per use."""
    model = copy.deepcopy(model)
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                twin = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                setattr(module, name, twin)
            seen.add(id(parameter))
    return model


def _double(batch: Batch) -> Batch:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error; absolute where the expected kernel vanishes."""
    actual, expected = actual.double(), expected.double()
    norm = expected.norm()
    return float((actual - expected).norm() / (norm if norm > 0 else 1.0))
