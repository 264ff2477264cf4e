"""The linear twin of a model: its first-order expansion at θ_0, trained like the model itself.

    f̄(x; θ) = f(x; θ_0) + J_0(x) (θ − θ_0),    ∂L/∂θ = J_0ᵀ ∂L/∂f̄

J_0 (θ − θ_0) is one forward-mode product, and because f̄ is linear in θ the gradient of any loss is
one ordinary backward pass at θ_0: nothing is differentiated twice. Both are of the network in eval
mode: f̄ has no dropout. A module that holds θ and nothing else goes to the same `Trainer` as the
model; trained by its own gradients it is what Rahimi Afzal et al. 2025 compare with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raykernel.ntk.batches import Batch, Readout
from raykernel.ntk.passes import checked_logits, prepared, selected_parameters
from raykernel.ntk.product import TangentMap


class Linearized(nn.Module):
    """f̄ as a module: its parameters are θ, by the names that they have in the network.

    Args:
        network: at θ_0, where it has to stay; `requires_grad` says what θ is.
        readout: logits (n, c) of the network.
        probe: two examples, on which the way to forward-mode products is chosen. A function of the
            run, so that one that goes on chooses the same.
    """

    def __init__(self, network: nn.Module, readout: Readout, probe: Batch) -> None:
        super().__init__()
        self._expansion = _Expansion(network, readout, probe)
        self._theta: dict[str, nn.Parameter] = {}
        for name, start in self._expansion.start.items():
            # A submodule for every dot: `named_parameters` then says what the network's says.
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            self._theta[name] = nn.Parameter(start.detach().clone())
            place.register_parameter(last, self._theta[name])

    def forward(self, batch: Batch) -> Float[Tensor, "n c"]:
        """Logits of f̄ at θ.

        Args:
            batch: the examples.

        Returns:
            f(x; θ_0) + J_0(x) (θ − θ_0), with a gradient in θ.
        """
        found: Tensor = _Taylor.apply(self._expansion, batch, *self._theta.values())  # type: ignore[no-untyped-call]
        return found


def read_linearized_logits(module: nn.Module, batch: Batch) -> Float[Tensor, "n c"]:
    """The readout of `Linearized`."""
    logits: Tensor = module(batch)
    return logits


class _Expansion:
    """The network at θ_0, and its products with J_0."""

    def __init__(self, network: nn.Module, readout: Readout, probe: Batch) -> None:
        self.start = selected_parameters(network)
        self._network, self._readout = network, readout
        self._tangent = TangentMap(network, readout)
        # At θ_0 the direction is zero, which would show nothing about a way to the product.
        generator = torch.Generator().manual_seed(0)
        self._tangent(
            probe,
            {
                name: torch.randn(p.shape, generator=generator).to(p)
                for name, p in self.start.items()
            },
        )

    def at(self, batch: Batch, values: Mapping[str, Tensor]) -> Float[Tensor, "n c"]:
        """f(x; θ_0) + J_0(x) (θ − θ_0)."""
        direction = {name: values[name].detach() - p.detach() for name, p in self.start.items()}
        if not any(bool(w.any()) for w in direction.values()):
            with prepared(self._network, ()):
                return checked_logits(self._network, self._readout, batch)
        logits, change = self._tangent(batch, direction)
        return logits + change

    def pull_back(self, batch: Batch, weights: Float[Tensor, "n c"]) -> list[Tensor | None]:
        """J_0ᵀ u, by parameter; None where the logits do not depend on one."""
        parameters = list(self.start.values())
        # As the forward-mode product has it: f̄ and its gradient are then of one function.
        with prepared(self._network, parameters), sdpa_kernel(SDPBackend.MATH):
            logits = checked_logits(self._network, self._readout, batch)
            return list(torch.autograd.grad(logits, parameters, weights, allow_unused=True))


class _Taylor(torch.autograd.Function):
    """f̄ and its gradient in θ."""

    @staticmethod
    def forward(ctx: Any, expansion: _Expansion, batch: Batch, *theta: Tensor) -> Tensor:
        """The logits of f̄."""
        ctx.expansion, ctx.batch = expansion, batch
        return expansion.at(batch, dict(zip(expansion.start, theta, strict=True)))

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        """J_0ᵀ of the logits' gradient."""
        (own,) = weights
        return None, None, *ctx.expansion.pull_back(ctx.batch, own)
