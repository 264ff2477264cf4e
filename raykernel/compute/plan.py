"""What a cell will take, before any is computed: methods, operations, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from raykernel.compute.memory import Footprint, Sizes
from raykernel.compute.sketches import Work, blank
from raykernel.config import KernelConfig
from raykernel.ntk import contract
from raykernel.ntk.capture import Capture
from raykernel.ntk.factors import Part
from raykernel.ntk.rates import PassRate, Rates
from raykernel.terms import Kind


@dataclass(frozen=True, slots=True)
class Cost:
    """What some work takes."""

    flops: float
    """Floating-point operations."""
    seconds: float
    """Predicted time."""


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What computing a full cell takes, measured on the longest example."""

    footprint: Footprint
    sizes: Sizes
    num_parameters: int
    """Parameters that vary."""
    methods: dict[str, str]
    """Layer group → direct, factored, packed, or what its parts are (lookup, rows), or the
    projection; no cross groups."""
    num_groups: int
    """Layer groups of a block, cross groups included."""
    fallbacks: dict[str, str]
    """Parameters without a rule: differentiated through their module or the whole model."""
    capture_flops: float
    """Floating-point operations to capture one example, and to form its signs where packed."""
    capture_seconds: float
    """Predicted time of capturing one example, and of packing its signs where they are."""
    product_flops: float
    """Operations of J w, and of an ordinary forward and backward pass, over one example."""
    product_seconds: float
    """Predicted time of either."""
    start_seconds: float
    """Time that loading the model and learning its pattern took."""
    groups: tuple[str, ...]
    """Every layer group, cross groups included."""
    parts: tuple[Part, ...]
    """What is contracted of one example."""
    kinds: tuple[Kind, ...]
    rates: Rates
    """Of the device."""

    def contraction(self, num_rows: int, num_cols: int, *, diagonal: bool) -> Cost:
        """What contracting a cell takes, chunk by chunk.

        Args:
            num_rows: its rows, as long as the longest example.
            num_cols: its columns.
            diagonal: whether they are the same examples.

        Returns:
            The cost; a chunk with itself is symmetric where both sides have the same chunks.
        """
        of_rows = _pieces(num_rows, self.sizes.rows)
        of_cols = _pieces(num_cols, self.sizes.cols)
        same = diagonal and self.sizes.rows == self.sizes.cols
        pairs = Counter(
            (n, m, same and i == j) for i, n in enumerate(of_rows) for j, m in enumerate(of_cols)
        )
        costs = [(count, self._chunk(*pair)) for pair, count in pairs.items()]
        return Cost(
            sum(count * cost.flops for count, cost in costs),
            sum(count * cost.seconds for count, cost in costs),
        )

    def _chunk(self, num_rows: int, num_cols: int, symmetric: bool) -> Cost:
        ways = [
            contract.method_of(
                part,
                num_rows,
                num_cols,
                kinds=self.kinds,
                rates=self.rates,
                symmetric=symmetric,
                packed=self.sizes.packed,
            )
            for part in self.parts
        ]
        seconds = contract.total_seconds(way.seconds for way in ways)
        return Cost(sum(way.flops for way in ways), seconds)


def _pieces(num: int, size: int) -> list[int]:
    """Sizes of the chunks that so many examples are cut into."""
    return [min(size, num - start) for start in range(0, num, size)]


def plan_of(
    module: nn.Module,
    capture: Capture,
    *,
    num_tokens: int,
    footprint: Footprint,
    sizes: Sizes,
    kernel: KernelConfig,
    rates: Rates,
    passes: PassRate,
    start_seconds: float,
    streamed: Collection[nn.Module],
    fallbacks: dict[str, str],
    num_groups: int,
    work: Work | None,
) -> WorkerPlan:
    """The plan of a worker.

    Args:
        module: the model.
        capture: of the longest example.
        num_tokens: its tokens.
        footprint: its bytes.
        sizes: how a cell is cut.
        kernel: kinds, and examples on a side of a cell.
        rates: of the device.
        passes: time of the model's passes.
        start_seconds: time until they could be timed.
        streamed: transformer blocks that are gone through backwards; empty: all of the model is.
        fallbacks: parameters that no rule covers.
        num_groups: of a block.
        work: what projecting examples takes; None: the kernel is exact.

    Returns:
        The plan.
    """
    methods: dict[str, str] = {}
    if work is not None:
        capture = blank(capture, kernel.projection)
    for group, by_name in capture.parts.items():
        found = [
            contract.method_of(
                part,
                sizes.rows,
                sizes.cols,
                kinds=kernel.stored_kinds,
                rates=rates,
                packed=sizes.packed,
            )
            for parts in by_name.values()
            for part in parts
        ]
        methods[group] = "+".join(sorted({way.name for way in found}))
        if work is not None:
            methods[group] = f"{kernel.projection.method.value} to {kernel.projection.dim}"
    packing = contract.packing(capture, rates=rates) if sizes.packed else None
    per_token = token_flops(module, capture.logits.shape[1], streamed=streamed, again=sizes.stream)
    capture_flops = num_tokens * per_token
    pass_seconds = passes.seconds([sizes.batch * num_tokens]) / sizes.batch
    seconds_per_flop = pass_seconds / capture_flops if capture_flops else 0.0
    capture_seconds = pass_seconds
    if work is not None:
        capture_flops += work.flops
        capture_seconds += work.seconds(sizes.rows, rates) / sizes.rows
    # Per weight one product forward and two more, for the gradients of inputs and weights or for
    # the tangents by them: as many as a capture of two outputs takes.
    product = num_tokens * token_flops(module, 2, streamed=streamed, again=False)
    return WorkerPlan(
        footprint=footprint,
        sizes=sizes,
        num_parameters=sum(p.numel() for p in module.parameters() if p.requires_grad),
        methods=methods,
        num_groups=num_groups,
        fallbacks=fallbacks,
        capture_flops=capture_flops + (packing.flops if packing else 0.0),
        capture_seconds=capture_seconds + (packing.seconds if packing else 0.0),
        product_flops=product,
        product_seconds=seconds_per_flop * product,
        start_seconds=start_seconds,
        groups=capture.groups,
        parts=tuple(p for own in capture.parts.values() for uses in own.values() for p in uses),
        kinds=tuple(kernel.stored_kinds),
        rates=rates,
    )


def token_flops(
    module: nn.Module, num_outputs: int, *, streamed: Collection[nn.Module], again: bool
) -> float:
    """Operations of a capture per token: those of matrix products, 2 per weight and pass.

    There are one forward and c backward passes; attention scores and lookups are left out.

    Args:
        module: the model.
        num_outputs: c.
        streamed: blocks that backward passes go through; empty: all of the model.
        again: whether these run forward a second time.

    Returns:
        The operations.
    """
    backward = sum(map(_num_weights, streamed)) if streamed else _num_weights(module)
    return 2.0 * (_num_weights(module) + (num_outputs + again) * backward)


def _num_weights(module: nn.Module) -> int:
    """Entries of the matrices that every token is multiplied with; a head of few rows is not."""
    layers = (layer for layer in module.modules() if not hasattr(layer, "rows"))
    linear = (m for m in layers if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
    return sum(layer.get_parameter("weight").numel() for layer in linear)
