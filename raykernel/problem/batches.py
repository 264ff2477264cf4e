"""Examples as tensors: some of them at a time, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raykernel.problem.prompts import Encoded

Batch = dict[str, Tensor]
"""`input_ids` (n, t), `attention_mask` (n, t), `position` (n), perhaps `token_type_ids` (n, t)."""


def collate(encoded: Encoded, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
    """Some examples as tensors, padded on the right to the longest of them.

    Args:
        encoded: all examples.
        indices: which of them.
        device: where the tensors are made.

    Returns:
        `input_ids`, `attention_mask` and, where the model has them, `token_type_ids`, all
        (n, t), and `position` (n,).
    """

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        width = max(map(len, rows))
        filled = [[*row, *[fill] * (width - len(row))] for row in rows]
        return torch.tensor(filled, dtype=torch.long, device=device)

    rows = [encoded.input_ids[index] for index in indices]
    batch = {
        "input_ids": padded(rows, encoded.pad_id),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
        "position": torch.tensor(
            [encoded.position[index] for index in indices], dtype=torch.long, device=device
        ),
    }
    if encoded.token_type_ids is not None:
        batch["token_type_ids"] = padded([encoded.token_type_ids[index] for index in indices], 0)
    return batch
