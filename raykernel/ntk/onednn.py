"""oneDNN's matrix product, which torch is built with and uses for float32 where it compiles models.

The operator is not documented: it belongs to torch's compiler. What depends on it asks `available`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def available() -> bool:
    """Whether this build of torch has the product."""
    built: Any = torch.backends.mkldnn.is_available
    return bool(built()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The values of `F.linear`, without a derivative.

    Args:
        input: (..., i) in float32 on the CPU; a copy is made unless it is contiguous.
        weight: (o, i), also a transposed view.
        bias: (o,).

    Returns:
        input weightᵀ + bias, (..., o).
    """
    product: Any = torch.ops.mkldnn._linear_pointwise.default
    out: Tensor = product(input, weight, bias, "none", [], "")
    return out
