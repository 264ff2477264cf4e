"""Factors of two captures → their kernel block, per layer group.

    K[i, a, j, b] = ⟨G[i, a], G'[j, b]⟩,    G[i, a] = Σ_t b_t ⊗ a_t

Letters: n, m examples, c outputs, t, u tokens, i inputs and o outputs of a layer. Two ways to the
same number, the cheaper of which is taken (Goodfellow 2015, arXiv:1510.01799, for the second):

    direct    form G for a tile of the parameter's rows, then one matrix product
    factored  Σ_tu (A A'ᵀ)[t, u] · (B B'ᵀ)[t, u]; the first factor serves all outputs

Two embeddings are multiplied token by token (`lookups`). Everything else that is not a product of
one matrix with itself goes the direct way over the rows that both sides touch: a tied embedding
and head over the ids that are also label words. Products are summed in float32 (float64 factors:
in float64).

Kernels of signs go the direct way always, for a sign is one of the whole gradient (`signs`). For
the same reason a tied parameter's share of them is not a sum over its uses: all of it stands in
the first cross group of the modules that share it, and the sum over groups is still the whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raykernel.errors import InputError, NonFiniteError, nearest
from raykernel.ntk import signs
from raykernel.ntk.capture import Capture
from raykernel.ntk.factors import Lookup, Part, Product, accumulator, summed_rows
from raykernel.ntk.lookups import shared_tokens
from raykernel.ntk.rates import Rates, rates_of
from raykernel.terms import Kind

Block = Float[Tensor, "n c m c"]

MAX_BYTES = 1 << 28
"""Default bound on the temporaries of a contraction."""

_CPU_TILE_BYTES = 1 << 24
"""Small enough to be read back from cache, large enough for products that are not thin."""

_CPU_TABLE_BYTES = 1 << 19
"""The same for the factored way, which passes over its table three times."""

_UPPER_SHARE = 5 / 8
"""Share of a symmetric product's operations in strips above the diagonal, see `_add_upper`."""

_STRIP_ROWS = 16
"""Rows below which a matrix product is too thin to be fast."""


@dataclass(frozen=True, slots=True)
class Method:
    """How a product's kernel block is contracted, and what that costs."""

    name: str
    """`direct` or `factored`."""
    flops: float
    num_bytes: float
    """Elementwise memory traffic, in bytes."""
    seconds: float
    """Predicted time on the device."""


def method(
    num_rows: int,
    num_cols: int,
    *,
    c: int,
    t: int,
    u: int,
    d_in: int,
    d_out: int,
    rates: Rates,
    symmetric: bool = False,
) -> Method:
    """The faster way to contract one matrix's factors on a device.

    Args:
        num_rows: n.
        num_cols: m.
        c: outputs.
        t: tokens of a row example.
        u: tokens of a column example.
        d_in: inputs of the layer.
        d_out: outputs of the layer.
        rates: of the device.
        symmetric: whether rows and columns are the same examples.

    Returns:
        Its name and what it costs.
    """
    n, m, p = num_rows, num_cols, d_in * d_out
    formed = n * t if symmetric else n * t + m * u
    flops = 2.0 * c * p * formed + 2.0 * n * m * c * c * p * (_UPPER_SHARE if symmetric else 1)
    direct = flops, 2 * 4.0 * (n if symmetric else n + m) * c * p
    pairs = 1.0 * n * t * m * u / (2 if symmetric else 1)
    factored = 2 * pairs * (d_in + c * c * (d_out + 1)), 3 * 4 * pairs * c * c
    ways = [
        Method(name, *cost, rates.seconds(*cost))
        for name, cost in (("direct", direct), ("factored", factored))
    ]
    return min(ways, key=lambda way: way.seconds)


def method_of(
    part: Part,
    num_rows: int,
    num_cols: int,
    *,
    kinds: Sequence[Kind],
    rates: Rates,
    symmetric: bool = False,
) -> Method:
    """How a part is contracted with parts of as many tokens, and what that costs.

    Args:
        part: one use of a parameter.
        num_rows: n.
        num_cols: m.
        kinds: kernels wanted; with signs all go the direct way.
        rates: of the device.
        symmetric: whether rows and columns are the same examples.

    Returns:
        The method; a lookup's operations depend on the ids that both sides share and are left out.
    """
    c = part.gradients.shape[1]
    if isinstance(part, Lookup):
        return Method("lookup", 0.0, 0.0, 0.0)
    if not isinstance(part, Product):
        flops = 2.0 * len(kinds) * num_rows * num_cols * c * c * part.gradients.shape[2]
        return Method("rows", flops, 0.0, rates.seconds(flops, 0.0))
    t, d_out = part.gradients.shape[2:]
    sizes = {"c": c, "t": t, "u": t, "d_in": part.inputs.shape[2], "d_out": d_out}
    if not any(kind.has_signs for kind in kinds):
        return method(num_rows, num_cols, **sizes, rates=rates, symmetric=symmetric)
    formed = num_rows if symmetric else num_rows + num_cols
    p = sizes["d_in"] * d_out
    flops = 2.0 * c * p * (formed * t + len(kinds) * num_rows * num_cols * c)
    num_bytes = 4 * 2 * 4.0 * formed * c * p  # the gradient, and what takes its signs
    return Method("direct", flops, num_bytes, rates.seconds(flops, num_bytes))


def predicted_seconds(
    rows: Capture, cols: Capture, *, kinds: Sequence[Kind], rates: Rates
) -> float:
    """Predicted time of `grams` for two captures."""
    sizes, symmetric = (len(rows.logits), len(cols.logits)), rows is cols
    return sum(
        method_of(part, *sizes, kinds=kinds, rates=rates, symmetric=symmetric).seconds
        for by_name in rows.parts.values()
        for parts in by_name.values()
        for part in parts
    )


def gram(
    rows: Capture,
    cols: Capture,
    *,
    groups: Collection[str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> dict[str, Block]:
    """Block of the empirical NTK (kind sgd) by layer group, see `grams`."""
    return grams(rows, cols, groups=groups, max_bytes=max_bytes)[Kind.sgd]


def grams(
    rows: Capture,
    cols: Capture,
    *,
    kinds: Sequence[Kind] = (Kind.sgd,),
    groups: Collection[str] | None = None,
    dead_zone: float = signs.DEAD_ZONE,
    max_bytes: int = MAX_BYTES,
    rates: Rates | None = None,
) -> dict[Kind, dict[str, Block]]:
    """Kernel blocks of two captures by layer group; the sum over groups is the whole kernel.

    A cross group of a tied parameter holds ⟨g_a, g'_b⟩ + ⟨g_b, g'_a⟩ for sgd, and all of the
    parameter's share for kinds with signs.

    Args:
        rows: the row examples.
        cols: the column examples, of the same tracer; `rows` itself for the symmetric block.
        kinds: kernels wanted; several share the gradients that they need.
        groups: those wanted; None: all.
        dead_zone: gradients this small against their `magnitude` have sign 0.
        max_bytes: bound on temporary memory; never changes a number beyond rounding.
        rates: of the device, which choose between the ways; None: measured, or from the cache.

    Returns:
        (n, c, m, c) by kind and group; zeros for a group that no output depends on.

    Raises:
        InputError: if a group does not exist.
        NonFiniteError: if a block overflows.
    """
    wanted = rows.groups if groups is None else tuple(groups)
    for group in wanted:
        if group not in rows.groups:
            raise InputError(f"layer group {group!r} does not exist, {nearest(group, rows.groups)}")
    limits = _Limits(dead_zone, max_bytes, rates or rates_of(rows.logits.device))
    blocks: dict[Kind, dict[str, Block]] = {kind: {} for kind in kinds}
    for group in wanted:
        for kind, block in _group_blocks(rows, cols, group, kinds, limits).items():
            if not bool(block.isfinite().all()):
                raise NonFiniteError(
                    f"{group}: its kernel block overflows {block.dtype}, expected finite values. "
                    "Use kernel.precision=float64."
                )
            blocks[kind][group] = block
    return blocks


@dataclass(frozen=True, slots=True)
class _Limits:
    dead_zone: float
    max_bytes: int
    rates: Rates


def _group_blocks(
    rows: Capture, cols: Capture, group: str, kinds: Sequence[Kind], limits: _Limits
) -> dict[Kind, Block]:
    n, c = rows.logits.shape
    m = len(cols.logits)
    dtype = accumulator(rows.logits.dtype)
    total = {kind: rows.logits.new_zeros((n * c, m * c), dtype=dtype) for kind in kinds}
    of_signs = [kind for kind in kinds if kind.has_signs]
    complete: set[str] = set()
    for name, owners in _signed_parameters(rows, cols, group).items() if of_signs else ():
        # The gradients formed for signs serve sgd, too, but a tied parameter's share of that is
        # in every group that uses it.
        own = kinds if owners == (group,) else of_signs
        left, right = (_uses(side, name, owners) for side in (rows, cols))
        if left and right:
            right = left if rows is cols else right
            found = signed(left, right, own, dead_zone=limits.dead_zone, max_bytes=limits.max_bytes)
            for kind, block in found.items():
                total[kind] += block
        complete.update({name} if Kind.sgd in own else ())
    if Kind.sgd in kinds:
        sides = rows.crosses.get(group, (group, group))
        for of_rows, of_cols in dict.fromkeys((sides, sides[::-1])):
            for name, parts in rows.parts[of_rows].items():
                for part in () if name in complete else parts:
                    for other in cols.parts[of_cols].get(name, ()):
                        total[Kind.sgd] += _contract(part, other, limits)
    return {kind: block.view(n, c, m, c) for kind, block in total.items()}


def _signed_parameters(rows: Capture, cols: Capture, group: str) -> dict[str, tuple[str, ...]]:
    """Parameters whose kernels of signs stand in this group, with all groups that use them."""
    # A module that no row example reached may have run on columns.
    used = {g: {**own, **cols.parts[g]} for g, own in rows.parts.items()}
    home: dict[str, str] = {}
    for cross, (first, second) in rows.crosses.items():
        shared = (name for name in used[first] if name in used[second])
        home.update({name: cross for name in shared if name not in home})
    if group in rows.crosses:
        names = [name for name, cross in home.items() if cross == group]
        return {name: tuple(g for g, own in used.items() if name in own) for name in names}
    return {name: (group,) for name in used[group] if name not in home}


def _uses(capture: Capture, name: str, groups: Sequence[str]) -> list[Part]:
    return [part for group in groups for part in capture.parts[group].get(name, ())]


def _contract(left: Part, right: Part, limits: _Limits) -> Float[Tensor, "nc mc"]:
    max_bytes = limits.max_bytes
    if isinstance(left, Product) and isinstance(right, Product) and _same_matrix(left, right):
        n, c, t, d_out = left.gradients.shape
        m, _, u, _ = right.gradients.shape
        d_in, symmetric = left.inputs.shape[-1], left is right
        sizes = {"c": c, "t": t, "u": u, "d_in": d_in, "d_out": d_out}
        way = method(n, m, **sizes, rates=limits.rates, symmetric=symmetric)
        if way.name == "factored":
            return factored(left, right, max_bytes=max_bytes)
        turned = _by_longer_side(left)
        same = turned if left is right else _by_longer_side(right)
        return direct(turned, same, max_bytes=max_bytes)
    # On a GPU the sums by token would be atomic, in any order.
    if isinstance(left, Lookup) and isinstance(right, Lookup) and not left.ids.is_cuda:
        sparse, dense = shared_tokens(left, right)
        return sparse + direct(left, right, max_bytes=max_bytes, only=dense)
    return direct(left, right, max_bytes=max_bytes)


def _same_matrix(left: Product, right: Product) -> bool:
    if left.transposed != right.transposed or left.gradients.shape[-1] != right.gradients.shape[-1]:
        return False
    if left.rows is None or right.rows is None:
        return left.rows is right.rows
    return torch.equal(left.rows, right.rows)


def _by_longer_side(part: Product) -> Product:
    """The gradient or its transpose, whichever has more rows and so the larger tiles."""
    # ⟨G, G'⟩ = ⟨Gᵀ, G'ᵀ⟩, and a tile of few long rows makes thin products: half the speed where a
    # layer has thrice as many inputs as outputs.
    if part.rows is None and part.num_rows < part.width:
        return replace(part, transposed=not part.transposed)
    return part


def direct(
    left: Part, right: Part, *, max_bytes: int, only: Int[Tensor, " s"] | None = None
) -> Float[Tensor, "nc mc"]:
    """Block of two parts of one parameter, its gradient formed tile by tile.

    Args:
        left: rows of the block.
        right: columns of the block.
        max_bytes: bound on a tile of both.
        only: ascending rows of the parameter that count; None: all.

    Returns:
        The block, examples and outputs flattened.
    """
    width = max(left.width, 1)
    num_gradients = sum(part.gradients.shape[:2].numel() for part in (left, right))
    tile_bytes = max_bytes if left.gradients.is_cuda else min(max_bytes, _CPU_TILE_BYTES)
    size = max(1, tile_bytes // (4 * num_gradients * width))
    shape = [part.gradients.shape[:2].numel() for part in (left, right)]
    common = torch.promote_types(left.gradients.dtype, right.gradients.dtype)
    total = left.gradients.new_zeros(shape, dtype=accumulator(common))
    for tile in _tiles([left], [right], size) if only is None else _pieces(only, size):
        own = left.row_block(tile).flatten(2).flatten(0, 1).to(total.dtype)
        if left is right:
            _add_upper(total, own)
        else:
            other = right.row_block(tile).flatten(2).flatten(0, 1).to(total.dtype)
            total.addmm_(own, other.mT)
    return _mirrored(total) if left is right else total


def signed(
    left: Sequence[Part],
    right: Sequence[Part],
    kinds: Sequence[Kind],
    *,
    dead_zone: float,
    max_bytes: int,
) -> dict[Kind, Float[Tensor, "nc mc"]]:
    """Blocks of one parameter for several kinds, its whole gradient formed tile by tile once.

    Args:
        left: all uses of the parameter on the rows' side.
        right: on the columns' side; `left` itself for the symmetric block.
        kinds: kernels wanted.
        dead_zone: see `signs.signs`.
        max_bytes: bound on a tile of both sides and their signs.

    Returns:
        The blocks, examples and outputs flattened; sums of signs are exact integers.
    """
    symmetric = left is right
    shape = [side[0].gradients.shape[:2].numel() for side in (left, right)]
    width = max(left[0].width, 1)
    dtype = torch.promote_types(left[0].gradients.dtype, right[0].gradients.dtype)
    tile_bytes = max_bytes if left[0].gradients.is_cuda else min(max_bytes, _CPU_TILE_BYTES)
    # Gradients and signs of both sides, and what takes the sign.
    size = max(1, tile_bytes // (4 * 3 * sum(shape) * width))
    # A tile's sum of signs is below 2^24, so exact in float32; the sum over tiles needs more.
    total = {kind: left[0].gradients.new_zeros(shape, dtype=torch.float64) for kind in kinds}
    thresholds = [signs.threshold(side, dead_zone) for side in (left, right)]
    for tile in _tiles(left, right, size):
        own = _tile_of(left, tile, thresholds[0], dtype)
        other = own if symmetric else _tile_of(right, tile, thresholds[1], dtype)
        for kind in kinds:
            rows, cols = own[SIDES[kind][0]], other[SIDES[kind][1]]
            if rows is cols:
                piece = rows.new_zeros(shape)
                _add_upper(piece, rows)
            else:
                piece = rows @ cols.mT
            total[kind] += piece
    result = {}
    for kind, block in total.items():
        mirrored = symmetric and SIDES[kind][0] == SIDES[kind][1]
        result[kind] = (_mirrored(block) if mirrored else block).to(accumulator(dtype))
    return result


SIDES: dict[Kind, tuple[str, str]] = {
    Kind.sgd: ("gradient", "gradient"),
    Kind.signgd: ("sign", "sign"),
    Kind.asigngd: ("gradient", "sign"),
    Kind.asigngd_flipped: ("sign", "gradient"),
}
"""What stands on the rows' and the columns' side (Malladi et al. 2023, Definitions 3.2 to 3.4)."""


def _tile_of(
    parts: Sequence[Part],
    tile: Int[Tensor, " s"] | slice,
    threshold: Float[Tensor, "nc 1"],
    dtype: torch.dtype,
) -> dict[str, Float[Tensor, "nc p"]]:
    gradient = summed_rows(parts, tile).flatten(2).flatten(0, 1).to(accumulator(dtype))
    return {"gradient": gradient, "sign": signs.signs(gradient, threshold)}


def _add_upper(total: Float[Tensor, "r r"], rows: Float[Tensor, "r p"]) -> None:
    """Add rows·rowsᵀ above the diagonal and on it, in strips: 5/8 of the operations for four."""
    size = max(_STRIP_ROWS, -(-len(rows) // 4))
    for start in range(0, len(rows), size):
        total[start : start + size, start:].addmm_(rows[start : start + size], rows[start:].mT)


def _mirrored(total: Float[Tensor, "r r"]) -> Float[Tensor, "r r"]:
    return total.triu() + total.triu(1).mT


def _tiles(
    left: Sequence[Part], right: Sequence[Part], size: int
) -> Iterator[Int[Tensor, " s"] | slice]:
    """Rows of the parameter that both sides touch, in pieces."""
    touched = [rows for side in (left, right) if (rows := _support(side)) is not None]
    if len(touched) == 2:
        touched = [touched[0][torch.isin(touched[0], touched[1], assume_unique=True)]]
    if touched:
        yield from _pieces(touched[0], size)
        return
    num_rows = next(p.num_rows for p in left if not isinstance(p, Lookup) and p.support() is None)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _pieces(rows: Int[Tensor, " s"], size: int) -> Iterator[Int[Tensor, " s"]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _support(parts: Sequence[Part]) -> Int[Tensor, " s"] | None:
    """Ascending rows of the parameter that any of the parts touches; None: all of them."""
    supports = [part.support() for part in parts]
    known = [rows for rows in supports if rows is not None]
    if len(known) < len(supports):
        return None
    return known[0] if len(known) == 1 else torch.unique(torch.cat(known))


def factored(left: Product, right: Product, *, max_bytes: int) -> Float[Tensor, "nc mc"]:
    """Block of two products of one matrix, from token-by-token inner products.

    Args:
        left: rows of the block.
        right: columns of the block.
        max_bytes: bound on the table of inner products.

    Returns:
        The block, examples and outputs flattened.
    """
    n, c, t, _ = left.gradients.shape
    m, _, u, _ = right.gradients.shape
    dtype = accumulator(left.gradients.dtype)
    if not t * u:  # a layer that ran on no token, such as an expert that none chose
        return left.gradients.new_zeros((n * c, m * c), dtype=dtype)
    tile_bytes = max_bytes if left.gradients.is_cuda else min(max_bytes, _CPU_TABLE_BYTES)
    each = 4 * c * c * t * u
    num_right = max(1, min(m, tile_bytes // each))
    num_left = max(1, min(n, tile_bytes // (each * num_right)))
    total = left.gradients.new_zeros((n, c, m, c), dtype=dtype)
    symmetric = left is right
    for i in range(0, n, num_left):
        a = left.inputs[i : i + num_left].to(dtype).flatten(0, 1)
        b = left.gradients[i : i + num_left].to(dtype).flatten(0, 2)
        for j in range(i if symmetric else 0, m, num_right):
            a2 = right.inputs[j : j + num_right].to(dtype).flatten(0, 1)
            b2 = right.gradients[j : j + num_right].to(dtype).flatten(0, 2)
            inputs = (a @ a2.mT).view(-1, 1, t, a2.shape[0] // u, 1, u)
            table = (b @ b2.mT).view(-1, c, t, a2.shape[0] // u, c, u)
            total[i : i + num_left, :, j : j + num_right] = table.mul_(inputs).sum((2, 5))
    block = total.view(n * c, m * c)
    return _mirrored(block) if symmetric else block
