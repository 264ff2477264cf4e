"""Signs of gradients: ternary, with a dead zone around zero, and packed to two bits.

sign(0) = 0, and a gradient that is zero by the model's symmetries must not pass the noise of
rounding for a sign: attention's key bias has none (softmax does not change when all scores of a
row shift), but in floating point its gradient is a sum of terms that cancel. So a coordinate has
sign 0 where it is small against what its terms would give if they did not cancel (`magnitude`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from raykernel.errors import NonFiniteError
from raykernel.ntk.factors import Part, is_finite, magnitude

DEAD_ZONE = 1e-5
"""Default: a hundred times the rounding of float32, and 1e-5 of all signs that are none."""


def threshold(
    parts: Sequence[Part], dead_zone: float, *, name: str = "a parameter"
) -> Float[Tensor, "nc 1"]:
    """Absolute value up to which a coordinate of one parameter counts as zero.

    Args:
        parts: every use of the parameter.
        dead_zone: relative to `magnitude`.
        name: of the parameter.

    Returns:
        One value per example and output, flattened.

    Raises:
        NonFiniteError: if an example's gradient may be NaN or infinite, which has no sign.
    """
    limit: Tensor = thresholds([parts], dead_zone, names=[name])[0]
    return limit


def thresholds(
    parameters: Sequence[Sequence[Part]], dead_zone: float, *, names: Sequence[str]
) -> Float[Tensor, "k nc 1"]:
    """`threshold` of several parameters of the same batch, given their uses and names."""
    total = torch.stack(
        [torch.stack([magnitude(part) for part in parts]).sum(0) for parts in parameters]
    )
    # No coordinate, and no part of its sum over tokens, is larger than the sum of |b_t| |a_t|: the
    # gradient needs no look of its own.
    if not is_finite(total):
        index, example, _ = (int(place[0]) for place in (~total.isfinite()).nonzero(as_tuple=True))
        raise NonFiniteError(
            f"{names[index]}: the gradient of example {example} of the batch overflows "
            f"{total.dtype}, expected finite values, for NaN has no sign. Use "
            "kernel.precision=float64."
        )
    return dead_zone * total.flatten(1).unsqueeze(2)


def signs(
    gradient: Float[Tensor, "*k r p"], limit: Float[Tensor, "*k r 1"]
) -> Float[Tensor, "*k r p"]:
    """-1, 0 or 1 by coordinate, in the gradient's type; 0 up to the limit."""
    # The sign of what exceeds the limit: two different numbers differ by more than zero, however
    # near. Two comparisons, to which torch has no vector instructions, take 2.6 times as long.
    within = torch.minimum(gradient, limit)
    torch.maximum(within, -limit, out=within)
    return torch.sub(gradient, within, out=within).sign_()


def beyond(
    dead_zone: float,
) -> Callable[[Sequence[Part]], Callable[[Float[Tensor, "r p"]], Float[Tensor, "r p"]]]:
    """The signs of kernels with this dead zone, for one parameter after the other.

    Args:
        dead_zone: relative to `magnitude`.

    Returns:
        From every use of a parameter in a batch, the sign function of its gradients.
    """
    return lambda parts: partial(signs, limit=threshold(parts, dead_zone))


def pack(ternary: Float[Tensor, "... p"] | Int8[Tensor, "... p"]) -> UInt8[Tensor, "... q"]:
    """Signs in two bits each, four to a byte: a sixteenth of float32.

    Args:
        ternary: -1, 0 and 1.

    Returns:
        q = ceil(p / 4) bytes; two bits hold the sign in two's complement, the first sign lowest,
        so that a byte 0 is four times sign 0.
    """
    codes = torch.nn.functional.pad(ternary.to(torch.int8) & 3, (0, -ternary.shape[-1] % 4))
    # Four bytes at a time, as one integer: 0.3 ns a sign, a fifth of shifting every byte alone.
    quads = codes.view(torch.int32)
    pairs = (quads | (quads >> 6)).bitwise_and_(0x000F000F)
    return (pairs | (pairs >> 12)).bitwise_and_(0xFF).to(torch.uint8)


def unpack(
    packed: UInt8[Tensor, "... q"], num: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "... p"]:
    """The signs that `pack` packed.

    Each byte is looked up in a table of 256 entries of four int8 signs, which are then converted.
    Measured on one thread of an AVX2 CPU, in ns a sign, where copying float32 takes 0.13: this
    0.18, a table of four float32 0.43, shifts of every byte 0.32 to 0.77, and a table of 65536
    entries for two bytes 0.15, which rows of odd bytes could not use.

    Args:
        packed: bytes.
        num: p.
        dtype: of the result.

    Returns:
        -1, 0 and 1.
    """
    # Without `index_select` a byte index would be read as a mask, and take three times as long.
    quads = _quads(packed.device).index_select(0, packed.flatten().int())
    return quads.view(torch.int8).view(*packed.shape[:-1], -1)[..., :num].to(dtype)


@cache
def _quads(device: torch.device) -> Int[Tensor, " 256"]:
    """Four signs, in the bytes of an integer, by their packed byte."""
    shifts = torch.tensor([0, 2, 4, 6], device=device)
    codes = torch.arange(256, device=device).unsqueeze(1) >> shifts
    signed = ((codes & 3) ^ 2) - 2  # two bits, two's complement
    table: Tensor = signed.to(torch.int8).view(torch.int32).squeeze(1)
    return table
