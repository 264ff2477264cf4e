"""Batches of examples: tensors whose leading dimension is the examples."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from raykernel.errors import InputError

Batch = dict[str, Tensor]
Readout = Callable[[nn.Module, Batch], Tensor]
"""Logits (n, c) of a batch."""


def check_batch(batch: Batch) -> int:
    """Number of examples of a batch.

    Args:
        batch: tensors whose leading dimension is the examples.

    Returns:
        Their number n.

    Raises:
        InputError: if there are none, or the tensors disagree.
    """
    sizes = {key: value.shape[0] if value.dim() else None for key, value in batch.items()}
    if len(set(sizes.values())) != 1 or None in sizes.values():
        raise InputError(
            f"leading dimensions of the batch: {sizes}, expected one number of examples in all. "
            "Give every tensor one row per example."
        )
    n = num_examples(batch)
    if n == 0:
        raise InputError("the batch has no examples, expected at least one. Check what fills it.")
    return n


def num_examples(batch: Batch) -> int:
    """Leading dimension of a batch."""
    return next(iter(batch.values())).shape[0]


def example(batch: Batch, index: int) -> Batch:
    """A batch of one."""
    return {key: value[index : index + 1] for key, value in batch.items()}
