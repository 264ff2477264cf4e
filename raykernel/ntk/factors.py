"""What a capture keeps of ∂f_a(x_i)/∂θ, one part per use of a parameter, without forming it.

Letters: n examples, c outputs, t tokens, i inputs and o outputs of a layer, s rows of a
parameter, w width of such a row. A parameter is read as a matrix of rows: W[s, :], a vector as
rows of width 1. Every part can say which rows it touches and materialise any of them; that alone
makes every pair of parts contractible, so a tied matrix may be a lookup here and a product there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

RowBlock = Float[Tensor, "n c s w"]

_DROP_SHARE = 0.8
"""Share of tokens that may be left for it to pay to copy those that carry a gradient."""

_RAGGED_SHARE = 0.95
"""Share of tokens that may be left for it to pay to know how many each example has."""

_CPU_TILE_BYTES = 1 << 24
"""Small enough to be read back from a cache, and large enough that no product is thin."""

_COLUMN_SEARCH = 1024
"""Output features from which it pays to look for those that no readout uses (an LM head's)."""


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A matrix applied to tokens, W a or a W: G[i, a] = Σ_t b_t ⊗ a_t."""

    inputs: Float[Tensor, "n t i"]
    gradients: Float[Tensor, "n c t o"]
    """In memory by (n, t, c, o), so that an example is one product for all outputs."""
    rows: Int[Tensor, " o"] | None
    """Ascending rows of W that the outputs are; None: all. Never with `transposed`."""
    transposed: bool
    """W is stored (i, o), as in GPT-2, not (o, i)."""
    counts: tuple[int, ...] | None = None
    """Tokens of every example that come first and may carry a gradient; None: all do."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every example that may carry a gradient."""
        n, t = self.inputs.shape[:2]
        return (t,) * n if self.counts is None else self.counts

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples that may carry a gradient."""
        return sum(self.lengths)

    @property
    def num_rows(self) -> int:
        """Rows of the parameter, or of `rows`."""
        return self.inputs.shape[-1] if self.transposed else self.gradients.shape[-1]

    @property
    def width(self) -> int:
        """Width of a row."""
        return self.gradients.shape[-1] if self.transposed else self.inputs.shape[-1]

    def support(self) -> Int[Tensor, " s"] | None:
        """Ascending rows of the parameter that can be non-zero; None: all of them."""
        return self.rows

    def row_block(self, rows: Int[Tensor, " s"] | slice) -> RowBlock:
        """Gradient of these rows of the parameter."""
        if isinstance(rows, Tensor) and self.rows is not None:
            rows = torch.searchsorted(self.rows, rows)
        if self.transposed:
            return _raised(self.inputs[..., rows]).mT.unsqueeze(1).matmul(_raised(self.gradients))
        by_token = _raised(_by_token(self)[..., rows])
        n, _, c, s = by_token.shape
        return by_token.flatten(2).mT.bmm(_raised(self.inputs)).view(n, c, s, self.inputs.shape[-1])


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """Rows of a matrix read by index: G[i, a, v] = Σ_{t: id_t = v} b_t."""

    ids: Int[Tensor, "n t"]
    gradients: Float[Tensor, "n c t w"]

    @property
    def width(self) -> int:
        """Width of a row."""
        return self.gradients.shape[-1]

    def support(self) -> Int[Tensor, " s"]:
        """Ascending rows of the parameter that can be non-zero."""
        rows: Tensor = torch.unique(self.ids)
        return rows

    def row_block(self, rows: Int[Tensor, " s"] | slice) -> RowBlock:
        """Gradient of these rows of the parameter."""
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self.ids.device)
        # index_add_ adds atomically on CUDA, in any order; the product gives the same bits.
        scatter = lookup_by_product if self.ids.is_cuda else lookup_by_index
        return scatter(self.ids, _raised(self.gradients), rows)


def lookup_by_index(
    ids: Int[Tensor, "n t"], gradients: Float[Tensor, "n c t w"], rows: Int[Tensor, " s"]
) -> RowBlock:
    """Gradients summed by id, for ascending rows: cost O(n·c·t·w), deterministic on a CPU."""
    n, c, _, w = gradients.shape
    place, found = places(rows, ids)
    example, token = found.nonzero(as_tuple=True)
    block = gradients.new_zeros((n * len(rows), c, w))
    source = gradients.transpose(1, 2)[example, token]
    block.index_add_(0, example * len(rows) + place[example, token], source)
    return block.view(n, len(rows), c, w).transpose(1, 2)


def places(
    rows: Int[Tensor, " s"], ids: Int[Tensor, "*shape"]
) -> tuple[Int[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
    """Where ids stand among ascending rows, and whether they do."""
    place = torch.searchsorted(rows, ids.contiguous()).clamp_(max=len(rows) - 1)
    return place, rows[place] == ids


def lookup_by_product(
    ids: Int[Tensor, "n t"], gradients: Float[Tensor, "n c t w"], rows: Int[Tensor, " s"]
) -> RowBlock:
    """The same as a product with the incidence of ids: cost O(n·c·s·t·w), deterministic."""
    incidence = (rows == ids.unsqueeze(-1)).to(gradients.dtype)
    return incidence.mT.unsqueeze(1).matmul(gradients)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The gradient itself, materialised per example."""

    gradients: Float[Tensor, "n c p"]
    num_rows: int
    """Rows that the p coordinates are, in the parameter's order."""
    scale: Float[Tensor, "n c"] | None = None
    """`magnitude` of the tokens that were summed, where it was asked for."""

    @property
    def width(self) -> int:
        """Width of a row."""
        return self.gradients.shape[-1] // self.num_rows

    def support(self) -> None:
        """Ascending rows of the parameter that can be non-zero; None: all of them."""

    def row_block(self, rows: Int[Tensor, " s"] | slice) -> RowBlock:
        """Gradient of these rows of the parameter."""
        n, c, _ = self.gradients.shape
        return _raised(self.gradients.view(n, c, self.num_rows, self.width)[:, :, rows])


Part = Product | Lookup | Rows

_Tokens = TypeVar("_Tokens", Product, Lookup)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Type in which products of this type are summed: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def tile_bytes(device: torch.device, max_bytes: int) -> int:
    """Gradients that are formed at a time, in bytes.

    Args:
        device: where.
        max_bytes: bound on them.

    Returns:
        The bound on a GPU, at most what a cache holds elsewhere.
    """
    return max_bytes if device.type == "cuda" else min(max_bytes, _CPU_TILE_BYTES)


def is_finite(tensor: Tensor) -> bool:
    """Whether all entries are finite, in one pass where they are."""
    # A sum of finite entries may overflow, but a finite sum has no other.
    return math.isfinite(float(tensor.sum())) or bool(tensor.isfinite().all())


def _raised(tensor: Tensor) -> Tensor:
    return tensor.to(accumulator(tensor.dtype))


def num_bytes(part: Part) -> int:
    """Memory of a part's tensors, in bytes."""
    tensors = [getattr(part, name, None) for name in ("inputs", "gradients", "ids", "rows")]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def one_example(gradients: Tensor) -> Rows:
    """The part of one example, from a parameter's gradient of every output, (c, ...)."""
    c, *shape = gradients.shape
    return Rows(_raised(gradients.reshape(1, c, -1)), shape[0] if shape else 1)


def magnitude(part: Part) -> Float[Tensor, "n c"]:
    """Root mean square that a gradient would have if none of its tokens cancelled.

        Σ_t |b_t| |a_t| / sqrt(p)

    over the p coordinates of the parameter; where rows of it are read by index (`Lookup`, label
    words), over the rows that the example's gradient touches, the others being zero anyway.

    What rounding leaves of a gradient that is zero (attention's key bias: Σ_t b_t = 0) is small
    against it, but not against the gradient's own root mean square.

    Args:
        part: of any kind.

    Returns:
        One value per example and output; for `Rows` without `scale`, the root mean square itself.
    """
    b = _raised(part.gradients)
    if isinstance(part, Rows):
        own: Tensor = b.norm(dim=2) / max(b.shape[2], 1) ** 0.5
        return own if part.scale is None else part.scale
    if isinstance(part, Lookup):
        of_tokens = b.norm(dim=3)
        alive = (of_tokens > 0).sum(2).clamp_(min=1)  # not padding, which the batch decides
        single: Tensor = of_tokens.norm(dim=2) / (alive * max(b.shape[3], 1)) ** 0.5
        return single
    lengths = b.norm(dim=3) * _raised(part.inputs).norm(dim=2).unsqueeze(1)
    if part.rows is None:
        whole: Tensor = lengths.sum(2) / max(part.num_rows * part.width, 1) ** 0.5
        return whole
    # Of a head's rows those that this example and output touch; the company decides which others
    # are listed.
    touched = (b != 0).any(2).sum(2).clamp_(min=1)
    total: Tensor = lengths.sum(2) / (touched * max(part.width, 1)) ** 0.5
    return total


def support_of(parts: Sequence[Part]) -> Int[Tensor, " s"] | None:
    """Ascending rows of the parameter that any of its parts touches; None: all of them."""
    supports = [part.support() for part in parts]
    known = [rows for rows in supports if rows is not None]
    if len(known) < len(supports):
        return None
    return known[0] if len(known) == 1 else torch.unique(torch.cat(known))


def num_rows_of(parts: Sequence[Part]) -> int | None:
    """Rows of the parameter; None where its parts touch only some, of how many they do not know."""
    counts = [p.num_rows for p in parts if not isinstance(p, Lookup) and p.support() is None]
    return counts[0] if counts else None


def summed_rows(parts: Sequence[Part], rows: Int[Tensor, " s"] | slice) -> RowBlock:
    """Gradient of these rows of one parameter, over all its parts.

    Args:
        parts: every use of the parameter.
        rows: ascending rows; those outside a part's support are zero there.

    Returns:
        The sum.
    """
    return sum_of([_rows_within(part, rows) for part in parts])


def sum_of(blocks: Sequence[RowBlock]) -> RowBlock:
    """Σ of blocks of one shape; one alone is not copied."""
    total = blocks[0]
    for block in blocks[1:]:
        total = total + block
    return total


def _rows_within(part: Part, rows: Int[Tensor, " s"] | slice) -> RowBlock:
    support = part.support()
    if isinstance(part, Lookup) or support is None:
        return part.row_block(rows)
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=support.device)
    inside = torch.isin(rows, support)
    n, c = part.gradients.shape[:2]
    block = part.gradients.new_zeros(
        (n, c, len(rows), part.width), dtype=accumulator(part.gradients.dtype)
    )
    block[:, :, inside] = part.row_block(rows[inside])
    return block


def examples(part: Part, index: slice) -> Part:
    """The part of a contiguous range of its examples."""
    if isinstance(part, Product):
        return replace(
            part,
            inputs=part.inputs[index],
            gradients=part.gradients[index],
            counts=None if part.counts is None else part.counts[index],
        )
    if isinstance(part, Lookup):
        return replace(part, ids=part.ids[index], gradients=part.gradients[index])
    return replace(
        part,
        gradients=part.gradients[index],
        scale=None if part.scale is None else part.scale[index],
    )


def compress(part: Part) -> tuple[Part, bool]:
    """The same part without tokens that carry no gradient, and whether it is finite.

    Padding carries none, and in the last block of a prompt model only the readout's token does.
    Tokens are dropped per example: the result has as many as the example with most needs, those
    that carry a gradient first.

    Args:
        part: of any kind.

    Returns:
        The part, and whether its gradients are finite.
    """
    if isinstance(part, Rows):
        return part, is_finite(part.gradients)
    if not part.gradients.numel():
        return part, True
    by_token = _by_token(part).flatten(2)
    peak = torch.maximum(by_token.amax(2), -by_token.amin(2))
    finite = is_finite(peak)
    part = _drop_tokens(part, peak != 0)
    if isinstance(part, Product):
        part = _drop_columns(part)
    return part, finite


def _drop_tokens(part: Product | Lookup, alive: Bool[Tensor, "n t"]) -> Product | Lookup:
    n, t = alive.shape
    counts = alive.sum(1)
    most = max(int(counts.max()), 1)
    if not isinstance(part, Product):
        return (
            _take_tokens(part, _alive_first(alive)[:, :most]) if most <= _DROP_SHARE * t else part
        )
    lengths: list[int] = counts.tolist()
    known = tuple(lengths) if sum(lengths) <= _RAGGED_SHARE * n * t else None
    if most > _DROP_SHARE * t:
        places = torch.arange(t, device=alive.device)
        if known is None or bool((alive == (places < counts.unsqueeze(1))).all()):
            return replace(part, counts=known)
    return replace(_take_tokens(part, _alive_first(alive)[:, :most]), counts=known)


def _alive_first(alive: Bool[Tensor, "n t"]) -> Int[Tensor, "n t"]:
    """Tokens in order, those that carry a gradient first."""
    return alive.logical_not().byte().argsort(dim=1, stable=True)


def _take_tokens(part: _Tokens, order: Int[Tensor, "n t"]) -> _Tokens:
    n, c, t, _ = part.gradients.shape
    # Whole rows by one flat index; take_along_dim would index every element, which took a quarter
    # of a capture at t = 128.
    flat = order + t * torch.arange(n, device=order.device).unsqueeze(1)
    by_token = part.gradients.transpose(1, 2).flatten(2)
    gradients = (
        _rows_at(by_token, flat).view(*flat.shape, c, part.gradients.shape[3]).transpose(1, 2)
    )
    if isinstance(part, Lookup):
        return replace(part, ids=part.ids.gather(1, order), gradients=gradients)
    return replace(part, inputs=_rows_at(part.inputs, flat), gradients=gradients)


def _rows_at(tensor: Tensor, index: Tensor) -> Tensor:
    rows = tensor.reshape(-1, tensor.shape[-1]).index_select(0, index.flatten())
    return rows.view(*index.shape, tensor.shape[-1])


def _drop_columns(part: Product) -> Product:
    if part.transposed or part.rows is not None or part.gradients.shape[-1] < _COLUMN_SEARCH:
        return part
    rows = (part.gradients != 0).flatten(0, 2).any(0).nonzero().squeeze(1)
    if len(rows) > part.gradients.shape[-1] // 2:
        return part
    return replace(part, gradients=_by_token(part)[..., rows].transpose(1, 2), rows=rows)


def join_calls(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Uses of one parameter by one layer, those of a kind joined along their tokens.

    Σ over calls of Σ_t b_t ⊗ a_t is one sum over all tokens, so a layer that runs several times
    in a forward pass (ALBERT) is a layer with more tokens.

    Args:
        parts: one per call.

    Returns:
        One part per kind.
    """
    if len(parts) == 1:
        return tuple(parts)
    products = [p for p in parts if isinstance(p, Product) and not p.transposed]
    turned = [p for p in parts if isinstance(p, Product) and p.transposed]
    lookups = [p for p in parts if isinstance(p, Lookup)]
    rows = [p for p in parts if isinstance(p, Rows)]
    joined: list[Part] = [
        _cat_products(same, along_tokens=True) for same in (products, turned) if same
    ]
    if lookups:
        ids = torch.cat([p.ids for p in lookups], dim=1)
        gradients = torch.cat([_by_token(p) for p in lookups], dim=1).transpose(1, 2)
        joined.append(Lookup(ids, gradients))
    if rows:
        joined.append(_add_rows(rows))
    return tuple(joined)


def _add_rows(parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    scales = [part.scale for part in parts if part.scale is not None]
    return replace(
        parts[0],
        gradients=torch.stack([part.gradients for part in parts]).sum(0),
        scale=torch.stack(scales).sum(0) if len(scales) == len(parts) else None,
    )


def join_examples(found: Sequence[tuple[Part, ...]], counts: Sequence[int]) -> tuple[Part, ...]:
    """One parameter's parts of several captures, along examples.

    Shorter captures are filled up with tokens of zero gradient, and captures that lack a kind of
    part (an expert that no token chose) with a part of zeros.

    Args:
        found: what `join_calls` gave, by capture.
        counts: examples by capture.

    Returns:
        One part per kind.
    """
    patterns = {_kind(part): part for parts in found for part in parts}
    by_capture = [{_kind(part): part for part in parts} for parts in found]
    return tuple(
        _cat_examples(
            [own.get(kind) or _zeros(pattern, n) for own, n in zip(by_capture, counts, strict=True)]
        )
        for kind, pattern in patterns.items()
    )


def _kind(part: Part) -> tuple[type, bool]:
    return type(part), isinstance(part, Product) and part.transposed


def _zeros(part: Part, n: int) -> Part:
    gradients = part.gradients
    if isinstance(part, Rows):
        scale = None if part.scale is None else part.scale.new_zeros((n, part.scale.shape[1]))
        return replace(part, gradients=gradients.new_zeros((n, *gradients.shape[1:])), scale=scale)
    gradients = gradients.new_zeros((n, gradients.shape[1], 0, gradients.shape[3]))
    if isinstance(part, Lookup):
        return replace(part, ids=part.ids.new_zeros((n, 0)), gradients=gradients)
    inputs = part.inputs.new_zeros((n, 0, part.inputs.shape[2]))
    return replace(part, inputs=inputs, gradients=gradients, counts=None)


def _cat_examples(parts: Sequence[Part]) -> Part:
    products = [p for p in parts if isinstance(p, Product)]
    if products:
        return _cat_products(products, along_tokens=False)
    lookups = [p for p in parts if isinstance(p, Lookup)]
    if not lookups:
        rows = [part for part in parts if isinstance(part, Rows)]
        scales = [part.scale for part in rows if part.scale is not None]
        return replace(
            rows[0],
            gradients=torch.cat([part.gradients for part in rows]),
            scale=torch.cat(scales) if len(scales) == len(rows) else None,
        )
    t = max(part.ids.shape[1] for part in lookups)
    return Lookup(
        torch.cat([_pad(part.ids, t, dim=1) for part in lookups]),
        torch.cat([_pad(_by_token(part), t, dim=1) for part in lookups]).transpose(1, 2),
    )


def _cat_products(parts: Sequence[Product], *, along_tokens: bool) -> Product:
    parts = _on_same_rows(parts)
    if along_tokens:
        inputs = torch.cat([p.inputs for p in parts], dim=1)
        gradients = torch.cat([_by_token(p) for p in parts], dim=1)
    else:
        t = max(p.inputs.shape[1] for p in parts)
        inputs = torch.cat([_pad(p.inputs, t, dim=1) for p in parts])
        gradients = torch.cat([_pad(_by_token(p), t, dim=1) for p in parts])
    # Calls are joined before tokens are dropped: no more is known of their tokens together.
    ragged = not along_tokens and any(p.counts is not None for p in parts)
    counts = tuple(length for p in parts for length in p.lengths) if ragged else None
    return replace(parts[0], inputs=inputs, gradients=gradients.transpose(1, 2), counts=counts)


def _by_token(part: Product | Lookup) -> Float[Tensor, "n t c w"]:
    """Gradients as they lie in memory."""
    return part.gradients.transpose(1, 2)


def _on_same_rows(parts: Sequence[Product]) -> Sequence[Product]:
    """Products whose outputs are the same rows of the parameter: the union of all of them."""
    known = [p.rows for p in parts if p.rows is not None]
    if len(known) == len(parts):
        if all(torch.equal(rows, known[0]) for rows in known):
            return parts
        union: Tensor | None = torch.unique(torch.cat(known))
    elif not known:
        return parts
    else:
        union = None
    return [_spread_rows(p, union, parts) for p in parts]


def _spread_rows(part: Product, union: Tensor | None, parts: Sequence[Product]) -> Product:
    if part.rows is None:
        return part
    if union is None:
        num_outputs = next(p.gradients.shape[-1] for p in parts if p.rows is None)
        place = part.rows
    else:
        num_outputs = len(union)
        place = torch.searchsorted(union, part.rows)
    gradients = part.gradients.new_zeros((*part.gradients.shape[:-1], num_outputs))
    gradients[..., place] = part.gradients
    return replace(part, gradients=gradients, rows=union)


def _pad(tensor: Tensor, length: int, *, dim: int) -> Tensor:
    missing = length - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
