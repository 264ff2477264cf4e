"""What no exact method undercuts with the same matrix products: passes, and the cheapest Gram.

    floor = forward + c backwards to the activations  +  Σ_layers min(direct, factored) / rate

Passes run with frozen parameters and a head on the label words only. Operations count a symmetric
Gram once, over the tokens that carry a gradient, s of them in all texts together (Σ over texts in
place of N T); for a layer of p = d_in d_out weights and R = N C rows

    direct    2 C s p + R² p              form the rows, multiply them
    factored  s² d_in + C² s² (d_out + 2) multiply activations and gradients token by token

and divide by the float32 rate of a large matrix product. Embeddings, norms and biases are left
out: they would raise the floor by a few per cent.

There are two floors: one with torch's products over the whole model, which is what all peers run,
and one with what raykernel runs: its products (`raykernel.ntk.matmul`), in the passes and in the
rate, and passes whose last block ends on the read token alone (`raykernel.problem.tail`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import Run
from benchmarks.timing import Timing
from benchmarks.workloads import Batch, Workload, as_loaded, read
from raykernel.ntk.matmul import fast_products

PRODUCT_SIZE = 1536
"""Edge of the matrix product whose rate counts as the machine's."""

PASSES, PRODUCT = "forward + C backwards", "large matrix product"
OWN_PASSES, OWN_PRODUCT = f"{PASSES}, raykernel's products", f"{PRODUCT}, raykernel's"


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of the cheapest symmetric Gram."""

    flops: float
    num_direct: int
    """Layers that are cheaper direct."""
    num_factored: int
    """Layers that are cheaper factored."""


def work(workload: Workload) -> Work:
    """Operations of the cheapest Gram of a workload, layer by layer."""
    n, c = workload.num_examples, workload.num_outputs
    direct: list[float] = []
    factored: list[float] = []
    for d_in, d_out, s in _live_tokens(workload):
        p = d_in * d_out
        ways = {
            "direct": 2.0 * c * s * p + (n * c) ** 2 * p,
            "factored": s**2 * d_in + (c * s) ** 2 * (d_out + 2.0),
        }
        (direct if ways["direct"] <= ways["factored"] else factored).append(min(ways.values()))
    return Work(sum(direct) + sum(factored), len(direct), len(factored))


def passes(workload: Workload) -> Run:
    """One forward pass and one backward pass to the activations per output."""
    model = _frozen(workload)
    return lambda: _pass(model, workload.batch, lambda model, batch: model(**batch))


def own_passes(workload: Workload) -> Run:
    """The same with raykernel's products, and its last block on the read token alone."""
    model = _frozen(workload)

    def run() -> Tensor:
        with fast_products():
            return _pass(model, workload.batch, read)

    return run


def _pass(model: nn.Module, batch: Batch, readout: Callable[[nn.Module, Batch], Tensor]) -> Tensor:
    with _embedded_leaves(model) as leaves:
        logits = readout(model, batch)
        _backward(logits, leaves)
    return logits.detach()


def product(_: Workload) -> Run:
    """A matrix product large enough to run at the machine's rate."""
    a = _square()
    return lambda: a @ a


def own_product(_: Workload) -> Run:
    """The same by raykernel."""
    a = _square()

    def run() -> Tensor:
        with fast_products():
            return a @ a

    return run


def _square() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, generator=generator)


def rate(timing: Timing) -> float:
    """Operations per second of `product`."""
    return 2.0 * PRODUCT_SIZE**3 / timing.seconds


def floor(own: Work, of_passes: Timing, of_product: Timing) -> Timing:
    """The floor by round of the passes, with the median rate."""
    gram = own.flops / rate(of_product)
    return Timing(rounds=[seconds + gram for seconds in of_passes.rounds])


def _frozen(workload: Workload) -> nn.Module:
    return copy.deepcopy(as_loaded(workload.model)).requires_grad_(False)


@contextmanager
def _embedded_leaves(model: nn.Module) -> Iterator[list[Tensor]]:
    """Context in which the outputs of embeddings are what gradients are taken to."""
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        leaves.append(out.detach().requires_grad_())
        return leaves[-1]

    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    handles = [module.register_forward_hook(cut) for module in embeddings]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def _backward(logits: Tensor, tensors: list[Tensor]) -> list[tuple[Tensor | None, ...]]:
    c = logits.shape[1]
    return [
        torch.autograd.grad(logits[:, a].sum(), tensors, retain_graph=a < c - 1, allow_unused=True)
        for a in range(c)
    ]


def _live_tokens(workload: Workload) -> Iterator[tuple[int, int, int]]:
    """Inputs and outputs of the kernel's linear layers, and the tokens that carry a gradient."""
    model = _frozen(workload)
    wanted = {
        name
        for name, p in workload.model.named_parameters(remove_duplicate=False)
        if p.requires_grad
    }
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{path}.weight" in wanted
    }
    outputs: dict[str, Tensor] = {}

    def keep(path: str, _: nn.Module, __: Any, out: Tensor) -> None:
        outputs[path] = out

    handles = [m.register_forward_hook(partial(keep, path)) for path, m in layers.items()]
    with _embedded_leaves(model):
        logits = model(**workload.batch)
    for handle in handles:
        handle.remove()
    by_output = _backward(logits, list(outputs.values()))
    for path, gradients in zip(outputs, zip(*by_output, strict=True), strict=True):
        known = [gradient for gradient in gradients if gradient is not None]
        alive = torch.stack([(gradient != 0).any(-1) for gradient in known]).any(0)
        yield layers[path].in_features, known[0].shape[-1], int(alive.sum())
