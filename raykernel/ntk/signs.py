"""Signs of gradients: ternary, with a dead zone around zero, and packed to two bits.

sign(0) = 0, and a gradient that is zero by the model's symmetries must not pass the noise of
rounding for a sign: attention's key bias has none (softmax does not change when all scores of a
row shift), but in floating point its gradient is a sum of terms that cancel. So a coordinate has
sign 0 where it is small against what its terms would give if they did not cancel (`magnitude`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from raykernel.ntk.factors import Part, magnitude

DEAD_ZONE = 1e-5
"""Default: a hundred times the rounding of float32, and 1e-5 of all signs that are none."""


def threshold(parts: Sequence[Part], dead_zone: float) -> Float[Tensor, "nc 1"]:
    """Absolute value up to which a coordinate of one parameter counts as zero.

    Args:
        parts: every use of the parameter.
        dead_zone: relative to `magnitude`.

    Returns:
        One value per example and output, flattened.
    """
    total = torch.stack([magnitude(part) for part in parts]).sum(0)
    return dead_zone * total.flatten().unsqueeze(1)


def signs(gradient: Float[Tensor, "r p"], limit: Float[Tensor, "r 1"]) -> Float[Tensor, "r p"]:
    """-1, 0 or 1 by coordinate, in the gradient's type; 0 up to the limit."""
    return gradient.sign().masked_fill_(gradient.abs() <= limit, 0.0)


def pack(ternary: Float[Tensor, "... p"]) -> UInt8[Tensor, "... q"]:
    """Signs in two bits each, four to a byte: a sixteenth of float32.

    Args:
        ternary: -1, 0 and 1.

    Returns:
        q = ceil(p / 4) bytes; two bits hold the sign plus one.
    """
    missing = -ternary.shape[-1] % 4
    codes = torch.nn.functional.pad(ternary.to(torch.int8) + 1, (0, missing)).to(torch.uint8)
    quads = codes.view(*codes.shape[:-1], -1, 4)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=ternary.device)
    packed: Tensor = (quads << shifts).sum(-1, dtype=torch.uint8)
    return packed


def unpack(
    packed: UInt8[Tensor, "... q"], num: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "... p"]:
    """The signs that `pack` packed.

    Args:
        packed: bytes.
        num: p.
        dtype: of the result.

    Returns:
        -1, 0 and 1.
    """
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts) & 3
    return codes.flatten(-2)[..., :num].to(dtype) - 1
