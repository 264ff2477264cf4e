"""What people choose layers by today, measured by a worker in one pass over train.

Of the weight W of every linear layer that is asked for, example after example, at the start:

    Auto-RGN    ‖g‖ and ‖W‖, g = (1/n) Σ_i g_i, g_i = ∇_W of example i's cross-entropy
    EVA         eigenvalues of the covariance of the layer's inputs over all tokens of train
    AdaLoRA     I_i = |W ∘ g_i|,  Ī_i = Ī_{i-1} + (I_i - Ī_{i-1}) / i,
                Ū_i = Ū_{i-1} + (|I_i - Ī_i| - Ū_{i-1}) / i,  mean over entries of Ī_n ∘ Ū_n

AdaLoRA keeps moving averages of I and U because its weights move; here nothing moves, and every
example counts alike: its β is 1 - 1/i. It scores the three factors of an adapter, whose
sensitivities are 0 or noise before training; here it is W that is scored.

References: Lee et al. 2023 (arXiv:2210.11466), Auto-RGN; Paischer et al. 2024 (arXiv:2410.07170);
Zhang et al. 2023 (arXiv:2303.10512), equations 8 to 11.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raykernel.compute import memory, process
from raykernel.compute.examples import Examples
from raykernel.compute.loading import model_bytes, settle, stored_head, take_problem
from raykernel.compute.spec import BaselineReceipt, BaselineSpec
from raykernel.ntk.matmul import fast_products
from raykernel.ntk.product import product_bytes
from raykernel.ntk.selections import varying
from raykernel.problem.readout import Probed
from raykernel.store.baselines import Measured, add_baselines
from raykernel.store.blocks import Store

_TENSORS = 5
"""Of a weight's shape that are alive at once: its gradient, three means, and a temporary."""


class Measurer:
    """A model at θ_0 and the train examples that its weights are measured on.

    Args:
        spec: what to measure.
    """

    def __init__(self, spec: BaselineSpec) -> None:
        settle(spec.worker.compute)
        self._spec = spec
        self._handle = Store(spec.worker.store_path).open(spec.worker.fingerprint)
        head = stored_head(spec.worker, self._handle)
        self._problem = take_problem(self, spec.worker, head)
        self._examples = Examples(spec.worker.encoded, spec.worker.compute.device)

    @fast_products()
    def measure(self, paths: tuple[str, ...]) -> BaselineReceipt:
        """Measure modules and store what is found.

        Args:
            paths: in the plain model.

        Returns:
            A receipt; no number leaves the worker but to the store.
        """
        start = time.monotonic()
        layers = {path: plain_layer(self._problem.module, path) for path in paths}
        with varying(self._problem.module, self._weights(layers.values())):
            found: dict[str, Measured] = {}
            for part in self._parts(layers):
                found |= self._measured(part)
                process.trim_heap()
        add_baselines(self._handle, found)
        return BaselineReceipt(len(found), time.monotonic() - start)

    def _weights(self, layers: Iterable[nn.Module]) -> frozenset[str]:
        own = {id(layer.weight) for layer in layers}
        named = self._problem.module.named_parameters(remove_duplicate=False)
        return frozenset(name for name, parameter in named if id(parameter) in own)

    def _parts(self, layers: dict[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
        """Layers whose sums fit the memory together; train is passed once for each part."""
        compute, problem = self._spec.worker.compute, self._problem
        longest = self._examples.batch(self._examples.longest[:1])
        fixed = model_bytes(problem.module) + memory.process_bytes(compute)
        # A pass differentiated once is half of what that of a product is.
        fixed += product_bytes(problem.module, problem.readout, longest).example // 2
        room = int(compute.memory_gb * memory.GIB / memory.HEAP_SLACK) - fixed
        part: dict[str, nn.Module] = {}
        held = 0
        for path, layer in layers.items():
            needed = _num_bytes(layer)
            if part and held + needed > room:
                yield part
                part, held = {}, 0
            part[path] = layer
            held += needed
        yield part

    def _measured(self, layers: dict[str, nn.Module]) -> dict[str, Measured]:
        sums = {path: _Sums(layer) for path, layer in layers.items()}
        weights = [_weight(layer) for layer in layers.values()]
        with ExitStack() as hooks:
            for path, layer in layers.items():
                hooks.callback(layer.register_forward_pre_hook(sums[path].see).remove)
            for i, label in enumerate(self._spec.labels):
                logits = self._problem.readout(self._problem.module, self._examples.batch([i]))
                target = torch.tensor([label], device=logits.device)
                loss = cross_entropy(logits.float(), target)
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
                for own, gradient in zip(sums.values(), gradients, strict=True):
                    own.add(gradient)
        return {path: own.result() for path, own in sums.items()}


class _Sums:
    """What has been seen of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        self._weight = _weight(layer).detach()
        shape, device = self._weight.shape, self._weight.device
        self._gradient, self._mean, self._spread = (
            torch.zeros(shape, device=device) for _ in range(3)
        )
        self._num_examples = 0
        d_in = _width(layer)
        self._outer = torch.zeros((d_in, d_in), dtype=torch.float64, device=device)
        self._total = torch.zeros(d_in, dtype=torch.float64, device=device)
        self._num_tokens = 0

    def see(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Take the inputs of a pass; of one example, so that none of its tokens is padding."""
        del layer
        x = inputs[0].detach().flatten(0, -2).float()
        self._outer += (x.T @ x).double()
        self._total += x.sum(dim=0, dtype=torch.float64)
        self._num_tokens += len(x)

    def add(self, gradient: Tensor | None) -> None:
        """Take one example's gradient; None: the layer was not used."""
        self._num_examples += 1
        share = 1 / self._num_examples
        if gradient is None:
            gradient = torch.zeros_like(self._weight)
        gradient = gradient.float()
        self._gradient.lerp_(gradient, share)
        sensitivity = (self._weight * gradient).abs_()
        self._mean.lerp_(sensitivity, share)
        self._spread.lerp_((sensitivity - self._mean).abs_(), share)

    def result(self) -> Measured:
        return Measured(
            weights=_squared(self._weight),
            gradient=_squared(self._gradient),
            importance=float((self._mean * self._spread).mean(dtype=torch.float64)),
            shares=self._shares(),
        )

    def _shares(self) -> Float[np.ndarray, " d_in"]:
        """Of the variance, by direction; nothing where the inputs do not vary."""
        count = max(self._num_tokens, 1)
        covariance = self._outer - torch.outer(self._total, self._total) / count
        values = torch.linalg.eigvalsh(covariance.cpu()).flip(0).clamp_(min=0.0)
        total = float(values.sum())
        shares: np.ndarray = (values / total if total > 0 else torch.zeros_like(values)).numpy()
        return shares


def plain_layer(module: nn.Module, path: str) -> nn.Module:
    """A linear layer by its path in the plain model; without the adapter that may be around it.

    Args:
        module: the problem's.
        path: of the layer.

    Returns:
        The layer that holds the pre-trained weight.
    """
    layer = module.get_submodule(f"model.{path}" if isinstance(module, Probed) else path)
    return layer.get_submodule("base_layer") if hasattr(layer, "base_layer") else layer


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor), "a linear layer has a weight"
    return layer.weight


def _width(layer: nn.Module) -> int:
    """Numbers of an input: a Conv1D of GPT-2 is a linear layer whose weight is transposed."""
    return _weight(layer).shape[1 if isinstance(layer, nn.Linear) else 0]


def _num_bytes(layer: nn.Module) -> int:
    covariance = _width(layer) ** 2 * 16  # sum in float64, and an example's in float32 twice
    return _weight(layer).numel() * torch.float32.itemsize * _TENSORS + covariance


def _squared(values: Tensor) -> float:
    return float(values.double().square().sum())
