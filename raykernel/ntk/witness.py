"""Which layer and which example: what an error about a model's numbers names.

Layers are compared in the order in which they end, so that the first one that is wrong is the
innermost, and nothing before it is. All of this runs once something is known to be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from raykernel.errors import InconsistentError, NonFiniteError
from raykernel.ntk.batches import Batch, Readout, num_examples
from raykernel.ntk.factors import is_finite

_READOUT = "the readout"


# ------------------------------------------------------------------ NaN and infinity


def check_parameters(model: nn.Module) -> None:
    """Refuse weights that are NaN or infinite, also those that no logit shows.

    Args:
        model: the network.

    Raises:
        NonFiniteError: with the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            layer = name.rpartition(".")[0] or name
            raise NonFiniteError(
                f"{layer}: parameter {name!r} holds NaN or infinity, expected finite weights. "
                "Load the checkpoint again, or check what wrote it."
            )


def raise_non_finite(
    model: nn.Module,
    readout: Readout,
    batch: Batch,
    *,
    gradient_of: str | None,
    example: int | None = None,
) -> NoReturn:
    """Name the layer at which NaN or infinity comes in, and the example.

    Args:
        model: the network.
        readout: logits (n, c) of a batch.
        batch: the examples.
        gradient_of: the layer group whose gradient is not finite, if it is known.
        example: whose it is.

    Raises:
        NonFiniteError: always.
    """
    check_parameters(model)
    for key, value in batch.items():
        if value.is_floating_point() and (row := _first_row(~value.isnan())) is not None:
            raise NonFiniteError(
                f"{key}: example {row} of the batch holds NaN, expected numbers. Check the input.",
                row=row,
            )
    for ended in outputs(model, readout, batch):
        row = _first_row(ended.output.isfinite())
        if row is None:
            continue
        own = row if len(ended.output) == num_examples(batch) else example
        raise NonFiniteError(
            f"{ended.path}: its output is {_kind(ended.output)} although the weights are finite"
            f"{_of(own)}. {_cure(ended.output.dtype)} Check the inputs, too (a row of only "
            "padding?).",
            row=own,
        )
    where = f"{gradient_of}: the gradient" if gradient_of else "The logits'"
    dtype = next(model.parameters()).dtype
    raise NonFiniteError(
        f"{where} is NaN or infinite{_of(example)}, expected a finite value. {_cure(dtype)} A "
        "division by zero or a square root of zero in the model has no gradient.",
        row=example,
    )


def first_row(tensor: Tensor) -> int | None:
    """First row of a tensor that holds NaN or infinity; None: all is finite."""
    return _first_row(tensor.isfinite())


def _first_row(good: Tensor) -> int | None:
    bad = ~good.flatten(1).all(1) if good.dim() > 1 else ~good.reshape(-1)
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


def _of(example: int | None) -> str:
    return "" if example is None else f" (example {example} of the batch)"


def _kind(output: Tensor) -> str:
    if not bool(output.isinf().any()):
        return "NaN"
    dtype = str(output.dtype).removeprefix("torch.")
    return f"infinite, beyond {torch.finfo(output.dtype).max:.2g} where {dtype} ends,"


def _cure(dtype: torch.dtype) -> str:
    """The next precision with more range or digits."""
    if torch.finfo(dtype).bits < 32:
        return "Use kernel.precision=float32, or float64 where that overflows, too."
    return "Use kernel.precision=float64."


# ------------------------------------------------------------------ two passes


@dataclass(frozen=True, slots=True, eq=False)
class Ended:
    """A layer's output, as it ended."""

    path: str
    output: Tensor


def outputs(model: nn.Module, readout: Readout, batch: Batch) -> Iterator[Ended]:
    """Outputs of all layers of a forward pass in the order in which they end, the logits last.

    Args:
        model: the network.
        readout: logits (n, c) of a batch.
        batch: the examples.

    Yields:
        Those that are floating tensors, or begin with one.
    """
    found: list[Ended] = []

    def noting(path: str) -> Callable[[nn.Module, object, object], None]:
        def note(_module: nn.Module, _arguments: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and first.is_floating_point() and first.dim():
                found.append(Ended(path, first.detach().clone()))

        return note

    named = [(path, module) for path, module in model.named_modules() if path]
    handles = [module.register_forward_hook(noting(path)) for path, module in named]
    try:
        with torch.no_grad():
            logits = readout(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    yield from found
    yield Ended(_READOUT, logits.detach())


def check_steady(model: nn.Module, readout: Readout, batch: Batch, tolerance: float) -> None:
    """Refuse a model of which two passes over the same batch differ.

    Args:
        model: the network.
        readout: logits (n, c) of a batch.
        batch: the examples.
        tolerance: of a layer's output, relative to its largest entry.

    Raises:
        InconsistentError: with the first layer whose output differs, and the example.
    """
    one, two = (list(outputs(model, readout, batch)) for _ in range(2))
    for row in range(num_examples(batch)):
        if found := first_difference(one, two, (row, row), tolerance):
            layer, change = found
            raise InconsistentError(
                f"{layer}: two passes over the same example gave different outputs: they differ by "
                f"{change:.1e} of the largest (example {row} of the batch), expected a function of "
                f"the example, at most {tolerance:.0e} by rounding. Remove randomness (dropout "
                "with training=True) and state from the model.",
                row=row,
            )


def first_difference(
    one: Sequence[Ended], two: Sequence[Ended], rows: tuple[int, int], tolerance: float
) -> tuple[str, float] | None:
    """The first layer whose outputs for an example differ between two passes.

    Args:
        one: layers of a pass, the logits last.
        two: of the other one; its examples may be padded to another length, on the right.
        rows: place of the example in either.
        tolerance: relative to the largest entry of a layer's output.

    Returns:
        The layer and how much it differs; None if none does.
    """
    sizes = [len(ended[-1].output) for ended in (one, two)]
    for first, second in zip(one, two, strict=False):
        if first.path != second.path:
            break  # other layers ran: all that were alike so far agreed
        sides = [
            ended.output[row].double()
            for ended, row, size in zip((first, second), rows, sizes, strict=True)
            if len(ended.output) == size
        ]
        if len(sides) < 2 or sides[0].dim() != sides[1].dim():
            continue
        shape = tuple(slice(min(pair)) for pair in zip(*(s.shape for s in sides), strict=True))
        left, right = (side[shape] for side in sides)
        if not left.numel():
            continue
        change = float((left - right).abs().max() / left.abs().max().clamp(min=1e-30))
        if not change <= tolerance:
            return first.path, change
    return None
