"""oneDNN's matrix product, which torch is built with and uses for float32 where it compiles models.

The operator is not documented: it belongs to torch's compiler. Whoever calls it asks `available`
and `is_safe` before.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def available() -> bool:
    """Whether this build of torch has the product."""
    built: Any = torch.backends.mkldnn.is_available
    return bool(built()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def is_safe() -> bool:
    """Whether memory that runs out ends a process rather than fails an allocation.

    oneDNN does not look whether it was given memory. Where torch would raise an error that halves
    a chunk, under a limit on the address space or without overcommitting, it would crash.

    Returns:
        Whether there is no such limit.
    """
    if resource is None:
        return False
    kinds = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    unlimited = all(resource.getrlimit(kind)[0] == resource.RLIM_INFINITY for kind in kinds)
    return unlimited and _overcommits()


@cache
def _overcommits() -> bool:
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "2"
    except OSError:  # not Linux
        return True


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
