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

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from raykernel.errors import InputError, NonFiniteError, nearest
from raykernel.ntk import signs
from raykernel.ntk.capture import Capture
from raykernel.ntk.factors import Lookup, Part, Product, Rows, accumulator, is_finite
from raykernel.ntk.lookups import shared_tokens
from raykernel.ntk.matmul import fast_products
from raykernel.ntk.packed import MAX_BYTES, Packed, PackedRows, SignedCapture
from raykernel.ntk.pairs import direct, factored, formed, is_small, together, upper_share
from raykernel.ntk.rates import Rates, rates_of
from raykernel.ntk.signed import SIDES, signed
from raykernel.terms import Kind

Block = Float[Tensor, "n c m c"]

_SIGN_BYTES, _PACK_BYTES, _UNPACK_BYTES = 2.5 * 4 * 2 * 4.0, 2 * 4.0, 2 * 4.0
"""Elementwise traffic by coordinate: of a gradient and what takes its signs, of packing these, and
of unpacking them. The first does not stay in the cache, of which the device's rate is: 2.5 times
as long, measured on layers of 384 to 1536 inputs and outputs."""

_FORMING_SHARE, _ROWS_SHARE, _TABLE_SHARE = 0.6, 0.85, 0.65
"""Share of the rate of a large square product at which gradients are formed, their rows
multiplied, and tables of tokens made and summed. Measured with both libraries on eighteen shapes of
layers, from 128 to 3072 inputs and 12 to 128 tokens, within a quarter."""

_PART_SECONDS = 1e-4
"""Time of contracting a part however small: its dozen of calls."""


@dataclass(frozen=True, slots=True)
class Method:
    """How a product's kernel block is contracted, and what that costs."""

    name: str
    """`direct` or `factored`."""
    flops: float
    num_bytes: float
    """Elementwise memory traffic, in bytes."""
    seconds: float
    """Predicted time on the device, by which ways are compared."""


def method(
    num_rows: int,
    num_cols: int,
    *,
    c: int,
    t: float,
    u: float,
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
        t: tokens of a row example, on average.
        u: tokens of a column example, on average.
        d_in: inputs of the layer.
        d_out: outputs of the layer.
        rates: of the device.
        symmetric: whether rows and columns are the same examples.

    Returns:
        Its name and what it costs.
    """
    n, m, p = num_rows, num_cols, d_in * d_out
    num_formed = n if symmetric else n + m
    direct = _by_rows(
        "direct",
        forming=2.0 * c * p * (n * t if symmetric else n * t + m * u),
        products=2.0 * n * m * c * c * p * (upper_share(n * c) if symmetric else 1),
        num_bytes=2 * 4.0 * num_formed * c * p,
        rates=rates,
    )
    pairs = 1.0 * n * t * m * u / (2 if symmetric else 1)
    flops, num_bytes = 2 * pairs * (d_in + c * c * d_out), 2 * 4 * pairs * c * c
    seconds = rates.seconds(flops / _TABLE_SHARE, num_bytes)
    return min(direct, Method("factored", flops, num_bytes, seconds), key=lambda way: way.seconds)


def _by_rows(
    name: str, *, forming: float, products: float, num_bytes: float, rates: Rates
) -> Method:
    """Operations that form gradients, and those that multiply them."""
    least = forming / _FORMING_SHARE + products / _ROWS_SHARE
    return Method(name, forming + products, num_bytes, rates.seconds(least, num_bytes))


def method_of(
    part: Part,
    num_rows: int,
    num_cols: int,
    *,
    kinds: Sequence[Kind],
    rates: Rates,
    symmetric: bool = False,
    packed: bool = False,
) -> Method:
    """How a part is contracted with parts of as many tokens, and what that costs.

    Args:
        part: one use of a parameter.
        num_rows: n.
        num_cols: m.
        kinds: kernels wanted; with signs all go the direct way.
        rates: of the device.
        symmetric: whether rows and columns are the same examples.
        packed: whether both sides are packed signs.

    Returns:
        The method; a lookup's operations depend on the ids that both sides share and are left out.
    """
    c = part.gradients.shape[1]
    if isinstance(part, Lookup):
        return Method("lookup", 0.0, 0.0, 0.0)
    if not isinstance(part, Product):
        flops = 2.0 * len(kinds) * num_rows * num_cols * c * c * part.gradients.shape[2]
        return _by_rows("rows", forming=0.0, products=flops, num_bytes=0.0, rates=rates)
    t, d_in, d_out = (
        part.num_tokens / len(part.inputs),
        part.inputs.shape[2],
        part.gradients.shape[3],
    )
    if not any(kind.has_signs for kind in kinds):
        sizes = {"c": c, "d_in": d_in, "d_out": d_out}
        return method(num_rows, num_cols, t=t, u=t, **sizes, rates=rates, symmetric=symmetric)
    p = d_in * d_out
    if packed:
        return _of_packed(p, num_rows, num_cols, c=c, rates=rates, symmetric=symmetric)
    formed = num_rows if symmetric else num_rows + num_cols
    products = sum(_product_share(kind, num_rows * c, symmetric=symmetric) for kind in kinds)
    return _by_rows(
        "direct",
        forming=2.0 * c * p * formed * t,
        products=2.0 * c * p * products * num_rows * num_cols * c,
        num_bytes=_SIGN_BYTES * formed * c * p,
        rates=rates,
    )


def _product_share(kind: Kind, size: int, *, symmetric: bool) -> float:
    """Share of a block that is multiplied out, the rest being its mirror image."""
    rows, cols = SIDES[kind]
    return upper_share(size) if symmetric and rows == cols else 1.0


def _of_packed(
    p: int, num_rows: int, num_cols: int, *, c: int, rates: Rates, symmetric: bool
) -> Method:
    """Product of packed signs of p coordinates."""
    flops = 2.0 * num_rows * num_cols * c * c * p * (upper_share(num_rows * c) if symmetric else 1)
    num_bytes = _UNPACK_BYTES * (num_rows if symmetric else num_rows + num_cols) * c * p
    return _by_rows("packed", forming=0.0, products=flops, num_bytes=num_bytes, rates=rates)


def predicted_seconds(
    rows: Capture | SignedCapture,
    cols: Capture | SignedCapture,
    *,
    kinds: Sequence[Kind],
    rates: Rates,
) -> float:
    """Predicted time of `grams` for two captures."""
    sizes, symmetric = (len(rows.logits), len(cols.logits)), rows is cols
    if isinstance(rows, Capture) and isinstance(cols, Capture):
        parts = [p for own in rows.parts.values() for uses in own.values() for p in uses]
        ways = (
            method_of(part, *sizes, kinds=kinds, rates=rates, symmetric=symmetric) for part in parts
        )
        return total_seconds(way.seconds for way in ways)
    sides = [rows, cols]
    forming = sum(packing(side, rates=rates).seconds for side in sides if isinstance(side, Capture))
    packed = next(side for side in sides if isinstance(side, SignedCapture))
    whole = [own for own in packed.signs.values() if isinstance(own, PackedRows)]
    p, c = sum(own.num_rows * own.width for own in whole), rows.logits.shape[1]
    product = _of_packed(p, *sizes, c=c, rates=rates, symmetric=symmetric)
    return forming + product.seconds + _PART_SECONDS * len(packed.signs)


def total_seconds(of_parts: Iterable[float]) -> float:
    """Predicted time of contracting parts: their operations, and the calls that each takes."""
    return sum(seconds + _PART_SECONDS for seconds in of_parts)


def packing(capture: Capture, *, rates: Rates) -> Method:
    """What forming and packing all signs of a capture costs.

    Args:
        capture: of any examples.
        rates: of the device.

    Returns:
        The cost; that of lookups and materialised rows is left out.
    """
    n, c = capture.logits.shape
    parts = (p for own in capture.parts.values() for uses in own.values() for p in uses)
    products = [part for part in parts if isinstance(part, Product)]
    p = [n * c * part.num_rows * part.width for part in products]
    flops = sum(2.0 * size * q.gradients.shape[2] for size, q in zip(p, products, strict=True))
    num_bytes = (_SIGN_BYTES + _PACK_BYTES) * sum(p)
    return _by_rows("packed", forming=flops, products=0.0, num_bytes=num_bytes, rates=rates)


def gram(
    rows: Capture,
    cols: Capture,
    *,
    groups: Collection[str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> dict[str, Block]:
    """Block of the empirical NTK (kind sgd) by layer group, see `grams`."""
    return grams(rows, cols, groups=groups, max_bytes=max_bytes)[Kind.sgd]


@fast_products()
def grams(
    rows: Capture | SignedCapture,
    cols: Capture | SignedCapture,
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
        cols: the column examples, of the same tracer; `rows` itself for the symmetric block. On
            either side their packed signs will do for kinds that need no more of it.
        kinds: kernels wanted; several share the gradients that they need.
        groups: those wanted; None: all.
        dead_zone: gradients this small against their `magnitude` have sign 0.
        max_bytes: bound on temporary memory; never changes a number beyond rounding.
        rates: of the device, which choose between the ways; None: measured, or from the cache.

    Returns:
        (n, c, m, c) by kind and group; zeros for a group that no output depends on.

    Raises:
        InputError: if a group does not exist, or a side of packed signs does not fit.
        NonFiniteError: if a block overflows, or a gradient of which signs are wanted.
    """
    _check_signs(rows, cols, kinds, dead_zone)
    wanted = rows.groups if groups is None else tuple(groups)
    for group in wanted:
        if group not in rows.groups:
            raise InputError(f"layer group {group!r} does not exist, {nearest(group, rows.groups)}")
    limits = _Limits(dead_zone, max_bytes, rates or rates_of(rows.logits.device))
    small = _small_blocks(rows, cols, wanted, max_bytes) if list(kinds) == [Kind.sgd] else {}
    blocks: dict[Kind, dict[str, Block]] = {kind: {} for kind in kinds}
    for group in wanted:
        for kind, block in _group_blocks(rows, cols, group, kinds, limits, small).items():
            if not is_finite(block):
                row, _, col, _ = (
                    int(place[0]) for place in (~block.isfinite()).nonzero(as_tuple=True)
                )
                raise NonFiniteError(
                    f"{group}: its kernel block overflows {block.dtype} (first of row "
                    f"example {row} and column example {col}), expected finite values. Use "
                    "kernel.precision=float64.",
                    row=row,
                    col=col,
                )
            blocks[kind][group] = block
    return blocks


def needs_signs_only(kinds: Sequence[Kind]) -> bool:
    """Whether packed signs will do on both sides of all kinds."""
    return all(SIDES[kind] == ("sign", "sign") for kind in kinds)


def _check_signs(
    rows: Capture | SignedCapture,
    cols: Capture | SignedCapture,
    kinds: Sequence[Kind],
    dead_zone: float,
) -> None:
    for index, (side, own) in enumerate((("rows", rows), ("columns", cols))):
        if not isinstance(own, SignedCapture):
            continue
        for kind in kinds:
            if SIDES[kind][index] != "sign":
                raise InputError(
                    f"kind {kind.value}: found packed signs as its {side}, expected gradients. "
                    "Give the capture that the signs were taken of."
                )
        if own.dead_zone != dead_zone:
            raise InputError(
                f"dead_zone: found {dead_zone:g}, expected {own.dead_zone:g}, with which the signs "
                f"of the {side} were packed. Pack them anew, or use theirs."
            )


@dataclass(frozen=True, slots=True)
class _Limits:
    dead_zone: float
    max_bytes: int
    rates: Rates


def _group_blocks(
    rows: Capture | SignedCapture,
    cols: Capture | SignedCapture,
    group: str,
    kinds: Sequence[Kind],
    limits: _Limits,
    small: dict[tuple[str, str], Float[Tensor, "nc mc"]],
) -> dict[Kind, Block]:
    n, c = rows.logits.shape
    m = len(cols.logits)
    dtype = accumulator(rows.logits.dtype)
    total: dict[Kind, Tensor] = {}

    def add(kind: Kind, block: Float[Tensor, "nc mc"]) -> None:
        total[kind] = total[kind] + block if kind in total else block

    of_signs = [kind for kind in kinds if kind.has_signs]
    complete: set[str] = set()
    for name, owners in _signed_parameters(rows, cols, group).items() if of_signs else ():
        # The gradients formed for signs serve sgd, too, but a tied parameter's share of that is
        # in every group that uses it.
        own = kinds if owners == (group,) else of_signs
        left, right = (_uses(side, name, owners) for side in (rows, cols))
        if left and right:
            right = left if rows is cols else right
            by_kind = signed(
                left,
                right,
                own,
                dead_zone=limits.dead_zone,
                max_bytes=limits.max_bytes,
                name=name,
            )
            for kind, block in by_kind.items():
                add(kind, block)
        complete.update({name} if Kind.sgd in own else ())
    if isinstance(rows, Capture) and isinstance(cols, Capture) and Kind.sgd in kinds:
        for block in _blocks_of_uses(rows, cols, group, complete, limits, small):
            add(Kind.sgd, block)
    for kind in kinds:
        if kind not in total:
            total[kind] = rows.logits.new_zeros((n * c, m * c), dtype=dtype)
    return {kind: total[kind].view(n, c, m, c) for kind in kinds}


def _blocks_of_uses(
    rows: Capture,
    cols: Capture,
    group: str,
    complete: Collection[str],
    limits: _Limits,
    small: dict[tuple[str, str], Float[Tensor, "nc mc"]],
) -> Iterator[Float[Tensor, "nc mc"]]:
    """Blocks of kind sgd of all pairs of uses of a parameter, of those that are not `complete`."""
    sides = rows.crosses.get(group, (group, group))
    mirror = rows is cols and sides[0] != sides[1]
    for of_rows, of_cols in (sides,) if mirror else dict.fromkeys((sides, sides[::-1])):
        for name, parts in rows.parts[of_rows].items():
            if (group, name) in small:
                yield small[group, name]
                continue
            for part in () if name in complete else parts:
                for other in cols.parts[of_cols].get(name, ()):
                    block = _contract(part, other, limits)
                    yield block + block.mT if mirror else block


def _small_blocks(
    rows: Capture | SignedCapture,
    cols: Capture | SignedCapture,
    groups: Iterable[str],
    max_bytes: int,
) -> dict[tuple[str, str], Float[Tensor, "nc mc"]]:
    """Blocks of biases and norms, by group and parameter: a model has dozens, of few shapes."""
    pairs: dict[tuple[str, str], tuple[Rows, Rows]] = {}
    if isinstance(rows, Capture) and isinstance(cols, Capture):
        for group in groups:
            of_cols = cols.parts.get(group, {})
            for name, parts in rows.parts.get(group, {}).items():
                match (*parts, *of_cols.get(name, ())):
                    case (Rows() as left, Rows() as right) if is_small(left, right):
                        pairs[group, name] = left, right
    blocks = together(list(pairs.values()), max_bytes=max_bytes)
    return dict(zip(pairs, blocks, strict=True))


def _signed_parameters(
    rows: Capture | SignedCapture, cols: Capture | SignedCapture, group: str
) -> dict[str, tuple[str, ...]]:
    """Parameters whose kernels of signs stand in this group, with all groups that use them."""
    # A module that no row example reached may have run on columns.
    of_cols = cols.names
    used = {g: dict.fromkeys([*own, *of_cols[g]]) for g, own in rows.names.items()}
    home: dict[str, str] = {}
    for cross, (first, second) in rows.crosses.items():
        shared = (name for name in used[first] if name in used[second])
        home.update({name: cross for name in shared if name not in home})
    if group in rows.crosses:
        here = [name for name, cross in home.items() if cross == group]
        return {name: tuple(g for g, own in used.items() if name in own) for name in here}
    return {name: (group,) for name in used[group] if name not in home}


def _uses(
    capture: Capture | SignedCapture, name: str, groups: Sequence[str]
) -> Sequence[Part] | Packed | None:
    if isinstance(capture, SignedCapture):
        return capture.signs.get(name)
    return [part for group in groups for part in capture.parts[group].get(name, ())]


def _contract(left: Part, right: Part, limits: _Limits) -> Float[Tensor, "nc mc"]:
    max_bytes = limits.max_bytes
    if isinstance(left, Product) and isinstance(right, Product) and _same_matrix(left, right):
        (n, c, _, d_out), m = left.gradients.shape, len(right.gradients)
        sizes = {"c": c, "d_in": left.inputs.shape[2], "d_out": d_out}
        t, u, symmetric = left.num_tokens / n, right.num_tokens / m, left is right
        way = method(n, m, t=t, u=u, **sizes, rates=limits.rates, symmetric=symmetric)
        contract = factored if way.name == "factored" else formed
        return contract(left, right, max_bytes=max_bytes)
    # On a GPU the sums by token would be atomic, in any order.
    if isinstance(left, Lookup) and isinstance(right, Lookup) and not left.ids.is_cuda:
        return shared_tokens(left, right, max_bytes=max_bytes)
    return direct(left, right, max_bytes=max_bytes)


def _same_matrix(left: Product, right: Product) -> bool:
    if left.transposed != right.transposed or left.gradients.shape[-1] != right.gradients.shape[-1]:
        return False
    if left.rows is None or right.rows is None:
        return left.rows is right.rows
    return torch.equal(left.rows, right.rows)
