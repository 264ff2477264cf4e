"""What a cell will take, before any is computed: methods, operations, memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from raykernel.compute.memory import Footprint, Sizes
from raykernel.ntk import contract
from raykernel.ntk.capture import Capture
from raykernel.ntk.factors import Part, Product


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What computing a full cell takes, measured on the longest example."""

    footprint: Footprint
    sizes: Sizes
    num_parameters: int
    """Parameters that vary."""
    methods: dict[str, str]
    """Layer group → direct, factored, or what its parts are (lookup, rows); no cross groups."""
    fallbacks: dict[str, str]
    """Parameters without a rule: differentiated through their module or the whole model."""
    capture_flops: float
    """Floating-point operations to capture one example."""
    block_flops: float
    """Floating-point operations to contract one full cell."""


def plan_of(
    module: nn.Module,
    capture: Capture,
    *,
    num_tokens: int,
    footprint: Footprint,
    sizes: Sizes,
    block_size: int,
    fallbacks: dict[str, str],
) -> WorkerPlan:
    """The plan of a worker.

    Operations are those of matrix products: 2 per weight, token and pass, of which there are one
    forward and c backward; attention scores and lookups are left out.

    Args:
        module: the model.
        capture: of the longest example.
        num_tokens: its tokens.
        footprint: its bytes.
        sizes: how a cell is cut.
        block_size: examples on a side of a cell.
        fallbacks: parameters that no rule covers.

    Returns:
        The plan.
    """
    num_pieces = math.ceil(block_size / sizes.rows) * math.ceil(block_size / sizes.cols)
    methods: dict[str, str] = {}
    flops = 0.0
    for group, by_name in capture.parts.items():
        found = [_method(part, sizes) for parts in by_name.values() for part in parts]
        methods[group] = "+".join(sorted({name for name, _ in found}))
        flops += num_pieces * sum(cost for _, cost in found)
    num_passes = 1 + capture.logits.shape[1]
    return WorkerPlan(
        footprint=footprint,
        sizes=sizes,
        num_parameters=sum(p.numel() for p in module.parameters() if p.requires_grad),
        methods=methods,
        fallbacks=fallbacks,
        capture_flops=2.0 * num_tokens * _num_weights(module) * num_passes,
        block_flops=flops,
    )


def _method(part: Part, sizes: Sizes) -> tuple[str, float]:
    """How a part is contracted, and the operations for one chunk against another."""
    if not isinstance(part, Product):
        return type(part).__name__.lower(), 0.0
    _, c, t, d_out = part.gradients.shape
    way = contract.method(
        sizes.rows, sizes.cols, c=c, t=t, u=t, d_in=part.inputs.shape[-1], d_out=d_out
    )
    return way.name, way.flops


def _num_weights(module: nn.Module) -> int:
    """Entries of the matrices that every token is multiplied with; a head of few rows is not."""
    layers = (layer for layer in module.modules() if not hasattr(layer, "rows"))
    linear = (m for m in layers if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
    return sum(layer.get_parameter("weight").numel() for layer in linear)
