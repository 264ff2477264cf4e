"""The signs of a capture's gradients, two bits each: what has to wait or travel of it.

    factors → G = Σ over all uses → sign G, with the dead zone → n·c·p/4 bytes

A kernel whose column side is a sign needs no more of its columns. Formed once instead of for
every chunk of rows, they cost a lookup in a table (`signs.unpack`) from then on. Letters: n
examples, c outputs, s rows of a parameter, w width of such a row, p = s·w.

Packed signs are smaller than the factors of t tokens where t > c·i·o / (16 (i + c·o)) for a matrix
from i inputs to o outputs: from about 32 tokens on in RoBERTa-base with two outputs, 25 in
SmolLM2-135M. Measured on one thread (seconds of CPU time for a 32 × 32 cell of one transformer
block, two outputs; both sides formed, one side packed before, and both):

    RoBERTa-base    128 tokens  15.9  8.6  0.9     32 tokens  4.0  2.5  0.8
    SmolLM2-135M     96 tokens   3.7  2.3  0.5     24 tokens  1.6  1.1  0.5
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from raykernel.ntk import signs
from raykernel.ntk.capture import Capture
from raykernel.ntk.factors import (
    Part,
    RowBlock,
    accumulator,
    examples,
    num_rows_of,
    places,
    summed_rows,
    support_of,
    tile_bytes,
)
from raykernel.ntk.matmul import fast_products

MAX_BYTES = 1 << 28
"""Default bound on the temporaries of a contraction, and of packing."""


class _Side(ABC):
    """Packed signs as a side of a product."""

    __slots__ = ()
    codes: UInt8[Tensor, "n c ..."]

    @property
    def num_gradients(self) -> int:
        """Rows of a block that they make."""
        return self.codes.shape[:2].numel()

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.codes.device

    @abstractmethod
    def row_block(self, rows: Int[Tensor, " s"] | slice) -> RowBlock:
        """Signs of these rows of the parameter."""

    def tile(self, rows: Int[Tensor, " s"] | slice) -> dict[str, Float[Tensor, "nc p"]]:
        """Signs of these rows of the parameter, as a side of a product."""
        return {"sign": self.row_block(rows).flatten(2).flatten(0, 1)}


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows(_Side):
    """Signs of a whole parameter by example and output."""

    codes: UInt8[Tensor, "n c q"]
    """q = ceil(p / 4), the parameter's coordinates in order."""
    num_rows: int
    width: int
    dtype: torch.dtype
    """In which the gradients are summed."""

    def support(self) -> None:
        """Ascending rows of the parameter that can be non-zero; None: all of them."""

    def row_block(self, rows: Int[Tensor, " s"] | slice) -> RowBlock:
        """Signs of these rows of the parameter."""
        shape = (*self.codes.shape[:2], -1, self.width)
        if isinstance(rows, slice) and rows.start * self.width % 4 == 0:
            first, last = rows.start * self.width, rows.stop * self.width
            own = self.codes[..., first // 4 : -(-last // 4)]
            return signs.unpack(own, last - first, self.dtype).view(shape)
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self.codes.device)
        within = torch.arange(self.width, device=rows.device)
        return self._coordinates((rows.unsqueeze(1) * self.width + within).flatten()).view(shape)

    def _coordinates(self, index: Int[Tensor, " k"]) -> Float[Tensor, "n c k"]:
        """Signs that do not begin with a byte, one by one."""
        codes = self.codes[..., index // 4] >> (2 * (index % 4)).to(torch.uint8)
        return ((codes & 3) ^ 2).to(self.dtype) - 2  # two's complement of two bits


@dataclass(frozen=True, slots=True, eq=False)
class PackedLookup(_Side):
    """Signs of the few rows of a parameter that an example touches: its tokens, label words."""

    ids: Int[Tensor, "n s"]
    """Distinct rows by example; -1 fills up."""
    codes: UInt8[Tensor, "n c s q"]
    """q = ceil(w / 4)."""
    width: int
    dtype: torch.dtype
    """In which the gradients are summed."""

    @property
    def num_rows(self) -> None:
        """Rows of the parameter, which are not known."""

    def support(self) -> Int[Tensor, " s"]:
        """Ascending rows of the parameter that can be non-zero."""
        rows: Tensor = torch.unique(self.ids)
        return rows[rows >= 0]

    def row_block(self, rows: Int[Tensor, " s"] | slice) -> RowBlock:
        """Signs of these rows of the parameter."""
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self.ids.device)
        n, c, _, q = self.codes.shape
        block = self.codes.new_zeros((n, len(rows), c, q))
        if len(rows):
            place, found = places(rows, self.ids)
            example, slot = found.nonzero(as_tuple=True)
            block[example, place[example, slot]] = self.codes.transpose(1, 2)[example, slot]
        return signs.unpack(block.transpose(1, 2), self.width, self.dtype)


Packed = PackedRows | PackedLookup


@dataclass(frozen=True, slots=True, eq=False)
class SignedCapture:
    """What is left of a capture where nothing but the signs of its gradients is needed."""

    logits: Float[Tensor, "n c"]
    signs: dict[str, Packed]
    """By parameter, a tied one with all its uses."""
    names: dict[str, tuple[str, ...]]
    """Parameters by layer group."""
    crosses: dict[str, tuple[str, str]]
    """The two groups that share a parameter, by cross group."""
    dead_zone: float
    """That was applied, see `signs.threshold`."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Every layer group, cross groups last."""
        return (*self.names, *self.crosses)

    @property
    def num_bytes(self) -> int:
        """Memory of the signs, in bytes."""
        return sum(
            tensor.numel() * tensor.element_size()
            for own in self.signs.values()
            for tensor in (own.codes, getattr(own, "ids", None))
            if isinstance(tensor, Tensor)
        )


@fast_products()
def signed_capture(
    capture: Capture,
    *,
    dead_zone: float = signs.DEAD_ZONE,
    max_bytes: int = MAX_BYTES,
    after_group: Callable[[], None] | None = None,
) -> SignedCapture:
    """The signs of a capture, which gives up its factors parameter by parameter.

    Cost: every gradient is formed once, 2·n·c·t·p operations.

    Args:
        capture: of a tracer with `signs`; empty afterwards.
        dead_zone: gradients this small against their `magnitude` have sign 0.
        max_bytes: bound on temporary memory, one row of a parameter at least.
        after_group: called whenever a layer group's factors have been freed.

    Returns:
        Its signs.

    Raises:
        NonFiniteError: if a gradient overflows.
    """
    names = capture.names
    packed: dict[str, Packed] = {}
    for group in names:
        for name in names[group]:
            uses = [part for own in capture.parts.values() for part in own.pop(name, ())]
            if uses:  # else they were packed with those of an earlier group
                packed[name] = _packed(name, uses, dead_zone, max_bytes)
            del uses
        if after_group is not None:
            after_group()
    return SignedCapture(capture.logits, packed, names, capture.crosses, dead_zone)


def formed_rows(num_gradients: int, width: int, device: torch.device, max_bytes: int) -> int:
    """Rows of a parameter whose gradients are formed at a time.

    Args:
        num_gradients: n c.
        width: of a row.
        device: where.
        max_bytes: bound on the gradients and signs of both sides of a product.

    Returns:
        A power of two; for rows that do not fill whole bytes at least four, which do.
    """
    # Gradients and signs of both sides, and what takes the sign.
    size = max(1, tile_bytes(device, max_bytes) // (2 * 4 * 3 * num_gradients * max(width, 1)))
    return max(1 << (size.bit_length() - 1), 4 if width % 4 else 1)


def packed_bytes(capture: Capture) -> dict[str, int]:
    """Memory that a capture's signs would take, without forming them.

    Args:
        capture: of any examples.

    Returns:
        Bytes by layer group; those of a tied parameter with the first group that uses it.
    """
    found: dict[str, int] = {}
    seen: set[str] = set()
    for group, by_name in capture.parts.items():
        found[group] = 0
        for name in by_name:
            if name not in seen:
                uses = [part for own in capture.parts.values() for part in own.get(name, ())]
                found[group] += _num_bytes(uses)
        seen.update(by_name)
    return found


def _num_bytes(parts: Sequence[Part]) -> int:
    n, c = parts[0].gradients.shape[:2]
    num_rows = num_rows_of(parts)
    if num_rows is not None:
        return n * c * -(-num_rows * parts[0].width // 4)
    each = max(len(_touched(parts, i)) for i in range(n))
    return n * each * (c * -(-parts[0].width // 4) + 8)


def _packed(name: str, parts: Sequence[Part], dead_zone: float, max_bytes: int) -> Packed:
    """Signs of one parameter."""
    limit = signs.threshold(parts, dead_zone, name=name)
    num_rows = num_rows_of(parts)
    if num_rows is None:
        return _packed_lookup(parts, limit)
    return _packed_rows(parts, num_rows, limit, max_bytes)


def _packed_rows(
    parts: Sequence[Part], num_rows: int, limit: Float[Tensor, "nc 1"], max_bytes: int
) -> PackedRows:
    first = parts[0]
    (n, c), width = first.gradients.shape[:2], first.width
    codes = torch.empty((n * c, -(-num_rows * width // 4)), dtype=torch.uint8, device=limit.device)
    size = formed_rows(n * c, width, limit.device, max_bytes)
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        gradient = summed_rows(parts, rows).flatten(2).flatten(0, 1)
        own = signs.pack(signs.signs(gradient, limit))
        begin = start * width // 4
        codes[:, begin : begin + own.shape[1]] = own
    return PackedRows(codes.view(n, c, -1), num_rows, width, accumulator(first.gradients.dtype))


def _packed_lookup(parts: Sequence[Part], limit: Float[Tensor, "nc 1"]) -> PackedLookup:
    first = parts[0]
    (n, c), width = first.gradients.shape[:2], first.width
    touched = [_touched(parts, i) for i in range(n)]
    longest = max(map(len, touched))
    ids = touched[0].new_full((n, longest), -1)
    codes = torch.zeros((n, c, longest, -(-width // 4)), dtype=torch.uint8, device=limit.device)
    for i, rows in enumerate(touched):
        own = [examples(part, slice(i, i + 1)) for part in parts]
        gradient = summed_rows(own, rows)[0]
        ternary = signs.signs(gradient.flatten(1), limit[i * c : (i + 1) * c])
        ids[i, : len(rows)] = rows
        codes[i, :, : len(rows)] = signs.pack(ternary.view(gradient.shape))
    return PackedLookup(ids, codes, width, accumulator(first.gradients.dtype))


def _touched(parts: Sequence[Part], index: int) -> Int[Tensor, " s"]:
    """Ascending rows of the parameter that one example touches."""
    rows = support_of([examples(part, slice(index, index + 1)) for part in parts])
    assert rows is not None
    return rows
