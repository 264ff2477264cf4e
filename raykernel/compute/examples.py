"""Examples as a model takes them: pass by pass, the longest first, so that little is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from raykernel.problem.batches import collate
from raykernel.problem.prompts import Encoded

_Indices = TypeVar("_Indices", range, list[int])


class Examples:
    """The examples of a run, on one device.

    Args:
        encoded: their tokens.
        device: where batches are made.
    """

    def __init__(self, encoded: Encoded, device: str) -> None:
        self._encoded = encoded
        self._device = device

    def __len__(self) -> int:
        return len(self._encoded.input_ids)

    def num_tokens(self, index: int) -> int:
        """Tokens of an example."""
        return len(self._encoded.input_ids[index])

    @cached_property
    def longest(self) -> list[int]:
        """The two examples with the most tokens, longest first."""
        return sorted(range(len(self)), key=lambda index: (-self.num_tokens(index), index))[:2]

    def by_length(self, examples: range) -> list[int]:
        """Some examples in the order in which they are taken: the longest first."""
        return sorted(examples, key=lambda index: -self.num_tokens(index))

    def places(self, examples: range) -> Tensor:
        """Where each of some examples stands in `by_length`: an index that restores their order."""
        return torch.tensor(self.by_length(examples), device=self._device).argsort()

    def passes(self, examples: range, size: int) -> Iterator[list[int]]:
        """Some examples by length, so many at a time."""
        return split(self.by_length(examples), size)

    def batches(self, examples: range, size: int) -> Iterator[dict[str, Tensor]]:
        """The same as tensors."""
        return map(self.batch, self.passes(examples, size))

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Some examples in the order given, as tensors."""
        return collate(self._encoded, indices, self._device)


def split(examples: _Indices, size: int) -> Iterator[_Indices]:
    """Consecutive pieces, the last of which may be smaller."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
