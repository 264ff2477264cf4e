"""Backward passes from several outputs of one graph, seen at every tensor that is watched.

    for every output a:  ∂output_a / ∂tensor → stacked[a], written while it is in the cache

A pass lets go of a tensor's gradient as soon as what came before it has been computed, so that
there is one copy of all gradients, where a list of what autograd returns, stacked afterwards,
would be two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Gradients = Tensor | None
"""Gradient of every output at one tensor, (c, ...); None where no output depends on it."""


def output_gradients(
    logits: Float[Tensor, "n c"],
    tensors: Sequence[Tensor],
    *,
    features: Sequence[int] | None = None,
    keep: bool = False,
) -> list[Gradients]:
    """Gradients of every model output, summed over the examples, see `gradients_of`."""
    outputs = [logits[:, a].sum() for a in range(logits.shape[1])]
    return gradients_of(outputs, tensors, features=features, keep=keep)


def gradients_of(
    outputs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    upstream: Gradients = None,
    *,
    features: Sequence[int] | None = None,
    keep: bool = False,
) -> list[Gradients]:
    """Gradients of several outputs of one graph.

    Args:
        outputs: scalars, or tensors of the shapes of `upstream`.
        tensors: with respect to which; they need a gradient.
        upstream: gradients with respect to the outputs; None: 1.
        features: by tensor, how many of its last dimensions lie behind the output's in memory, as
            they are read; None: all of them.
        keep: whether the graph is needed again.

    Returns:
        A gradient per tensor, (c, ...).
    """
    if not tensors or not any(output.requires_grad for output in outputs):
        return [None] * len(tensors)
    behind = features or [tensor.dim() for tensor in tensors]
    stacks = [
        _Stack(tensor, len(outputs), own) for tensor, own in zip(tensors, behind, strict=True)
    ]
    leaves = _leaves(outputs)
    with ExitStack() as hooks:
        for stack, tensor in zip(stacks, tensors, strict=True):
            hooks.callback(_hook(tensor, stack.take).remove)
        for a, output in enumerate(outputs):
            for stack in stacks:
                stack.output = a
            torch.autograd.grad(
                output,
                leaves,
                None if upstream is None else upstream[a],
                retain_graph=keep or a < len(outputs) - 1,
                allow_unused=True,
            )
    return [stack.gradients() for stack in stacks]


class _Stack:
    """Gradients of all outputs at one tensor."""

    def __init__(self, tensor: Tensor, num_outputs: int, features: int) -> None:
        self.output = 0
        """The output whose pass is under way."""
        self._tensor = tensor
        self._num_outputs = num_outputs
        self._place = tensor.dim() - features
        self._memory: Tensor | None = None
        self._taken: set[int] = set()

    def take(self, gradient: Tensor) -> Tensor | None:
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        if self._memory is None:
            shape = gradient.shape
            self._memory = gradient.new_empty(
                (*shape[: self._place], self._num_outputs, *shape[self._place :])
            )
        self._memory.select(self._place, self.output).copy_(gradient)
        self._taken.add(self.output)
        # Autograd holds what it gives back of a leaf until the pass is over: one number will do.
        return gradient.new_zeros(()).expand_as(gradient) if self._tensor.is_leaf else None

    def gradients(self) -> Gradients:
        if self._memory is None:
            return None
        for a in set(range(self._num_outputs)) - self._taken:
            self._memory.select(self._place, a).zero_()
        return self._memory.movedim(self._place, 0)


def _hook(tensor: Tensor, take: Any) -> Any:
    register: Any = tensor.register_hook
    return register(partial(take))


def _leaves(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Every leaf of the graph: a pass that wants their gradients goes through all of it."""
    return list({id(leaf): leaf for leaf in _walk(outputs)}.values())


def _walk(outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    nodes: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    yield from (output for output in outputs if output.requires_grad and output.is_leaf)
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                nodes.append(before)
