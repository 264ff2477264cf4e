"""Examples of a product by their tokens, so that a short one does not pay for a long one's.

Letters: n, m examples, c outputs, t tokens, i inputs and o outputs of a layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raykernel.ntk.factors import Product

_RUN_EXAMPLES = 8
"""Examples from which a run of its own pays for the calls that it takes."""

_COPY_PRODUCTS = 128.0
"""Multiplications that an element must save for it to pay to copy it to another place."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Examples that are contracted together, with as many tokens as the longest of them has."""

    start: int
    """Place of the first of them in the order."""
    stop: int
    num_tokens: int

    @property
    def num_examples(self) -> int:
        """Examples of the run."""
        return self.stop - self.start

    @property
    def places(self) -> slice:
        """Where they are in the order."""
        return slice(self.start, self.stop)


@dataclass(frozen=True, slots=True, eq=False)
class ByLength:
    """A product's examples in runs, the longest first."""

    runs: tuple[Run, ...]
    order: Int[Tensor, " n"] | None
    """The examples as they stand in the runs; None: as they stood before."""

    def take(self, tensor: Tensor, run: Run, dim: int) -> Tensor:
        """A run's examples, which are copied only where examples are put in order.

        Args:
            tensor: of all examples.
            run: one of `runs`.
            dim: along which the examples are.

        Returns:
            Its part of the tensor.
        """
        if self.order is None:
            return tensor.narrow(dim, run.start, run.num_examples)
        return tensor.index_select(dim, self.order[run.places])


def by_length(part: Product, *, size: int | None = None) -> ByLength:
    """A product's examples in runs of about as many tokens, the longest first.

    Args:
        part: of any tokens.
        size: examples of a run; None: as few runs as waste little, and all in one as they stand
            where to form their gradients takes less time than to copy them into runs.

    Returns:
        Its runs.
    """
    n, t = part.inputs.shape[:2]
    lengths, order = part.lengths, None
    if size is None and not _pays(part):
        return ByLength((Run(0, n, t),), None)
    if list(lengths) != sorted(lengths, reverse=True):
        examples = sorted(range(n), key=lambda index: -lengths[index])
        lengths = tuple(lengths[index] for index in examples)
        order = torch.tensor(examples, device=part.inputs.device)
    cuts = _cuts(lengths) if size is None else [*range(0, n, size), n]
    runs = tuple(
        Run(start, stop, min(max(lengths[start], 1), t)) for start, stop in itertools.pairwise(cuts)
    )
    return ByLength(runs, order)


def _pays(part: Product) -> bool:
    """Whether forming gradients of tokens that carry none costs more than leaving them out."""
    n, t = part.inputs.shape[:2]
    wasted = 1 - part.num_tokens / max(n * t, 1)
    return wasted * min(part.inputs.shape[2], part.gradients.shape[3]) > _COPY_PRODUCTS


def _cuts(lengths: Sequence[int]) -> list[int]:
    """Where runs begin and end, for descending lengths."""
    cuts = [0]
    for at in range(1, len(lengths)):
        if lengths[at] < lengths[cuts[-1]] and at - cuts[-1] >= _RUN_EXAMPLES:
            cuts.append(at)
    return [*cuts, len(lengths)]


def in_order(
    block: Float[Tensor, "nc mc"], rows: ByLength, cols: ByLength, *, num_outputs: int
) -> Float[Tensor, "nc mc"]:
    """A block of examples in runs, in the order in which they stood before.

    Args:
        block: examples and outputs flattened.
        rows: order of its rows.
        cols: order of its columns.
        num_outputs: c.

    Returns:
        The block.
    """
    if rows.order is not None:
        by_example = block.view(-1, num_outputs, block.shape[1])
        block = by_example.index_select(0, rows.order.argsort()).flatten(0, 1)
    if cols.order is not None:
        by_example = block.view(len(block), -1, num_outputs)
        block = by_example.index_select(1, cols.order.argsort()).flatten(1)
    return block
