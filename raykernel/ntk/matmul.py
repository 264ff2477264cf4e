"""Products of matrices by the faster of the two libraries that torch has for them on a CPU.

On x86 torch multiplies float32 matrices with MKL. On processors that are not Intel's this uses
half of the vector unit: on an AMD EPYC with AVX-512 a core reaches 100 GFLOP/s with it, and 205
with oneDNN, which is in the same build and asks the processor what it can do. Either rounds as a
sum in float32 does; oneDNN adds a row's products one after the other where MKL adds sums of parts,
so that layers of some hundred inputs round two to four times as much. Which one a process uses is
measured once per machine and kept (`rates.Rates.onednn`), so that no restart changes a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from raykernel.ntk import onednn
from raykernel.ntk.rates import rates_of

_SMALL = 1 << 20
"""Multiplications that MKL has done before oneDNN has begun."""

_THIN = 8
"""Rows or columns below which a product only reads memory, at which both are as fast."""


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, with a derivative by its input alone where oneDNN computes it.

    Args:
        input: (..., i).
        weight: (o, i); where it needs a gradient, this is `F.linear` itself.
        bias: (o), likewise.

    Returns:
        input weightᵀ + bias.
    """
    fixed = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if not (fixed and _by_onednn(input, weight)):
        return F.linear(input, weight, bias)
    if input.requires_grad and torch.is_grad_enabled():
        out: Tensor = _apply(input, weight, bias)
        return out
    return onednn.linear(input, weight, bias)


def times_transposed(
    left: Float[Tensor, "r p"], right: Float[Tensor, "s p"]
) -> Float[Tensor, "r s"]:
    """The product left rightᵀ.

    Args:
        left: one matrix.
        right: the other one.

    Returns:
        Inner products of their rows.
    """
    return onednn.linear(left, right) if _by_onednn(left, right) else left @ right.mT


def add_times_transposed(
    total: Float[Tensor, "r s"], left: Float[Tensor, "r p"], right: Float[Tensor, "s p"]
) -> None:
    """Add left rightᵀ to a matrix.

    Args:
        total: the sum.
        left: one matrix.
        right: the other one.
    """
    if _by_onednn(left, right):
        total += onednn.linear(left, right)
    else:
        total.addmm_(left, right.mT)


def is_onednn_faster(like: Tensor) -> bool:
    """Whether large products of this tensor's type and device run by oneDNN.

    Args:
        like: any tensor.

    Returns:
        The same answer in every process of a machine, number of threads and limits of memory.
    """
    plain = like.device.type == "cpu" and like.dtype == torch.float32
    if not plain or torch.is_autocast_enabled("cpu"):
        return False
    return _measured(torch.get_num_threads()) and onednn.is_safe()


_once_differentiable: Callable[[Callable[..., Any]], Callable[..., Any]] = once_differentiable


class _Linear(torch.autograd.Function):
    """A linear layer whose weight is fixed."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return onednn.linear(input, weight, bias)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return onednn.linear(gradients[0], weight.mT), None, None


_apply: Any = _Linear.apply


def _by_onednn(left: Tensor, right: Tensor) -> bool:
    if right.dim() != 2 or not left.dim() or left.dtype != right.dtype:
        return False
    depth = right.shape[1]
    rows = left.numel() // max(depth, 1)
    large = rows * right.numel() >= _SMALL and min(rows, *right.shape) >= _THIN
    # Of a matrix with gaps in memory oneDNN has but a plain loop, a thousand times slower.
    dense = right.is_contiguous() or right.mT.is_contiguous()
    return large and dense and is_onednn_faster(left)


@cache
def _measured(num_threads: int) -> bool:
    return rates_of("cpu").onednn
