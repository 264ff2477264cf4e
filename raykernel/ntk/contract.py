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
from functools import cached_property

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
from raykernel.ntk.pairs import direct, factored, formed, upper_share
from raykernel.ntk.rates import Rates, rates_of
from raykernel.ntk.signed import SIDES, signed
from raykernel.ntk.vectors import Pair, is_small, together
from raykernel.terms import Kind

Block = Float[Tensor, "n c m c"]

_ByParameter = dict[str, dict[Kind, Float[Tensor, "nc mc"]]]

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
    contraction = _Contraction(
        rows, cols, tuple(kinds), dead_zone, max_bytes, rates or rates_of(rows.logits.device)
    )
    small = contraction.small_blocks(wanted)
    blocks: dict[Kind, dict[str, Block]] = {kind: {} for kind in kinds}
    for group in wanted:
        for kind, block in contraction.blocks(group, small.get(group, {})).items():
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


@dataclass(frozen=True, eq=False)
class _Contraction:
    """Of two captures for some kinds, group by group."""

    rows: Capture | SignedCapture
    cols: Capture | SignedCapture
    kinds: tuple[Kind, ...]
    dead_zone: float
    max_bytes: int
    rates: Rates

    @cached_property
    def of_signs(self) -> tuple[Kind, ...]:
        return tuple(kind for kind in self.kinds if kind.has_signs)

    @cached_property
    def signed_parameters(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """By group, the parameters whose kernels of signs stand in it, with all their groups."""
        # A module that no row example reached may have run on columns.
        of_cols = self.cols.names
        used = {g: dict.fromkeys([*own, *of_cols[g]]) for g, own in self.rows.names.items()}
        found: dict[str, dict[str, tuple[str, ...]]] = {group: {} for group in self.rows.groups}
        shared: set[str] = set()
        for cross, (first, second) in self.rows.crosses.items():
            for name in used[first]:
                if name in used[second] and name not in shared:
                    found[cross][name] = tuple(g for g, own in used.items() if name in own)
                    shared.add(name)
        for group, own in used.items():
            found[group].update({name: (group,) for name in own if name not in shared})
        return found

    def small_blocks(self, groups: Iterable[str]) -> dict[str, _ByParameter]:
        """Blocks of biases and norms by group: a model has dozens, of few shapes."""
        pairs: list[tuple[str, Pair]] = []
        for group in groups:
            for name in self.rows.names.get(group, ()):
                # Signs are of the sum of all uses, which other groups may have.
                if self.of_signs and name not in self.signed_parameters[group]:
                    continue
                match (_uses(self.rows, name, (group,)), _uses(self.cols, name, (group,))):
                    case (
                        [Rows() as left] | (PackedRows() as left),
                        [Rows() as right] | (PackedRows() as right),
                    ):
                        pair = Pair(name, left, right)
                        if is_small(pair):
                            pairs.append((group, pair))
        found = together(
            [pair for _, pair in pairs],
            self.kinds,
            dead_zone=self.dead_zone,
            max_bytes=self.max_bytes,
        )
        small: dict[str, _ByParameter] = {}
        for (group, pair), by_kind in zip(pairs, found, strict=True):
            small.setdefault(group, {})[pair.name] = by_kind
        return small

    def blocks(self, group: str, small: _ByParameter) -> dict[Kind, Block]:
        """Blocks of a group, of which those of some parameters are there already."""
        n, c = self.rows.logits.shape
        m = len(self.cols.logits)
        dtype = accumulator(self.rows.logits.dtype)
        total: dict[Kind, Tensor] = {}
        for by_kind in self._shares(group, small):
            for kind, block in by_kind.items():
                total[kind] = total[kind] + block if kind in total else block
        for kind in self.kinds:
            if kind not in total:
                total[kind] = self.rows.logits.new_zeros((n * c, m * c), dtype=dtype)
        return {kind: total[kind].view(n, c, m, c) for kind in self.kinds}

    def _shares(
        self, group: str, small: _ByParameter
    ) -> Iterator[dict[Kind, Float[Tensor, "nc mc"]]]:
        """What a group's parameters, or their uses, add to its blocks, one after the other."""
        yield from small.values()
        complete = set(small)
        for name, owners in self.signed_parameters[group].items() if self.of_signs else ():
            if name in small:
                continue
            # The gradients formed for signs serve sgd, too, but a tied parameter's share of that
            # is in every group that uses it.
            own = self.kinds if owners == (group,) else self.of_signs
            yield self._signed(name, owners, own)
            complete.update({name} if Kind.sgd in own else ())
        if Kind.sgd in self.kinds:
            for block in self._of_uses(group, complete):
                yield {Kind.sgd: block}

    def _signed(
        self, name: str, owners: Sequence[str], kinds: Sequence[Kind]
    ) -> dict[Kind, Float[Tensor, "nc mc"]]:
        """Blocks of all uses of a parameter; none if one side has no use of it."""
        left, right = (_uses(side, name, owners) for side in (self.rows, self.cols))
        if not left or not right:
            return {}
        return signed(
            left,
            left if self.rows is self.cols else right,
            kinds,
            dead_zone=self.dead_zone,
            max_bytes=self.max_bytes,
            name=name,
        )

    def _of_uses(self, group: str, complete: Collection[str]) -> Iterator[Float[Tensor, "nc mc"]]:
        """Blocks of kind sgd of all pairs of uses of a parameter, of those not `complete`."""
        assert isinstance(self.rows, Capture)
        assert isinstance(self.cols, Capture)
        sides = self.rows.crosses.get(group, (group, group))
        mirror = self.rows is self.cols and sides[0] != sides[1]
        for of_rows, of_cols in (sides,) if mirror else dict.fromkeys((sides, sides[::-1])):
            for name, parts in self.rows.parts[of_rows].items():
                for part in () if name in complete else parts:
                    for other in self.cols.parts[of_cols].get(name, ()):
                        block = self._contract(part, other)
                        yield block + block.mT if mirror else block

    def _contract(self, left: Part, right: Part) -> Float[Tensor, "nc mc"]:
        max_bytes = self.max_bytes
        if isinstance(left, Product) and isinstance(right, Product) and _same_matrix(left, right):
            (n, c, _, d_out), m = left.gradients.shape, len(right.gradients)
            sizes = {"c": c, "d_in": left.inputs.shape[2], "d_out": d_out}
            t, u, symmetric = left.num_tokens / n, right.num_tokens / m, left is right
            way = method(n, m, t=t, u=u, **sizes, rates=self.rates, symmetric=symmetric)
            contract = factored if way.name == "factored" else formed
            return contract(left, right, max_bytes=max_bytes)
        # On a GPU the sums by token would be atomic, in any order.
        if isinstance(left, Lookup) and isinstance(right, Lookup) and not left.ids.is_cuda:
            return shared_tokens(left, right, max_bytes=max_bytes)
        return direct(left, right, max_bytes=max_bytes)


def _uses(
    capture: Capture | SignedCapture, name: str, groups: Sequence[str]
) -> Sequence[Part] | Packed | None:
    if isinstance(capture, SignedCapture):
        return capture.signs.get(name)
    return [part for group in groups for part in capture.parts[group].get(name, ())]


def _same_matrix(left: Product, right: Product) -> bool:
    if left.transposed != right.transposed or left.gradients.shape[-1] != right.gradients.shape[-1]:
        return False
    if left.rows is None or right.rows is None:
        return left.rows is right.rows
    return torch.equal(left.rows, right.rows)
