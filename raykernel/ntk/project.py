"""Random projections of gradients: kernels from k numbers per example, output and layer.

    K[i, a, j, b] = ⟨g, g'⟩ ≈ ⟨S g, S g'⟩ / k,    S (k × p) random, mean 0, variance 1 (unbiased)

Every function takes a capture and gives a capture whose parts are the projected gradients, so that
`contract.gram` makes the kernel of them. A parameter has one matrix, by its name: the uses of a
tied parameter are projected alike, so cross groups and sums over groups come out right. Letters:
n examples, c outputs, t tokens, p coordinates, s rows of a parameter, w width of a row, q
coordinates of a tile.

Three projections, which differ in the kernel's error (`distortion` bounds it for the first and
the last):

    project                one sketch per layer group: errors of groups are independent and stay
                           in their block
    project_two_sided      the same with S = P ⊗ Q for a matrix: P G Qᵀ from the factors, without
                           forming G. Cheap; the variance is that of k_rows plus that of k_cols
    intrinsic_dimension    one sketch of the whole gradient: K has, beside the groups' own errors,
                           the products of different groups' sketches, whose mean is zero
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raykernel.ntk.capture import Capture, Parts
from raykernel.ntk.factors import Lookup, Part, Rows, accumulator
from raykernel.ntk.matmul import fast_products
from raykernel.ntk.random_matrix import RandomMatrices

SKETCH = "(sketch)"
"""Name under which a projected group's only part stands."""

WHOLE = "(all)"
"""The only group of a capture whose whole gradient was projected."""

MAX_BYTES = 1 << 26
"""Default bound on a tile of gradients, and on one of the matrix."""

_BYTES_PER_ENTRY = 32
"""What making one entry of the matrix takes at the most, its intermediate values included."""

Range = tuple[int, int]
"""Consecutive coordinates, the second excluded."""


@fast_products()
def project(capture: Capture, matrices: RandomMatrices, *, max_bytes: int = MAX_BYTES) -> Capture:
    """Johnson-Lindenstrauss sketch of every layer group's gradient.

        sketch[i, a] = k^(-1/2) Σ_θ S_θ ∂f_a(x_i)/∂θ    over the group's parameters θ

    With the probability of Theorem D.2 of Malladi et al. 2023 a group's block is within ε |g| |g'|
    of the exact one, for all pairs at once. A sum of such blocks is then within ε of the product
    of the whole norms, by Cauchy and Schwarz.
    Cost: 2·n·c·p·k operations and p·k random entries, which are made on the CPU.

    Args:
        capture: of some examples.
        matrices: S by parameter, the same for all captures of a kernel.
        max_bytes: bound on a tile; never changes a number beyond rounding.

    Returns:
        A capture of the same examples and groups, with k numbers per example and output in each.
    """
    return _by_group(capture, partial(_one_sided, matrices=matrices, max_bytes=max_bytes))


@fast_products()
def project_two_sided(
    capture: Capture, rows: RandomMatrices, cols: RandomMatrices, *, max_bytes: int = MAX_BYTES
) -> Capture:
    """Kronecker sketch of every layer group's gradient.

        sketch[i, a] = (k_r k_c)^(-1/2) Σ_θ (P_θ ⊗ Q_θ) ∂f_a(x_i)/∂θ  =  … Σ_θ vec(P_θ G Q_θᵀ)

    For a product G = Σ_t b_t ⊗ a_t that is Σ_t P b_t ⊗ Q a_t, and G is never formed. Unbiased, but
    where gradients are of rank one the relative variance is about 2 / k_r + 2 / k_c, not
    2 / (k_r k_c), and no bound of the paper covers it. Vectors are projected as by `project`.
    Cost: 2·n·c·t·(o·k_r + i·k_c + k_r·k_c) operations for a layer of i inputs and o outputs.

    Args:
        capture: of some examples.
        rows: P (k_r × s) by parameter, the same for all captures of a kernel.
        cols: Q (k_c × w) by parameter, likewise.
        max_bytes: bound on a tile of a matrix; never changes a number beyond rounding.

    Returns:
        A capture of the same examples and groups, k_r·k_c numbers per example and output in each.
    """
    return _by_group(capture, partial(_two_sided, rows=rows, cols=cols, max_bytes=max_bytes))


@fast_products()
def intrinsic_dimension(
    capture: Capture, matrices: RandomMatrices, *, max_bytes: int = MAX_BYTES
) -> Capture:
    """The gradient of a model that is fine-tuned in k random directions only.

        θ = θ_0 + Π z,    Π = k^(-1/2) Sᵀ,    ∂f/∂z = Πᵀ ∂f/∂θ,    K_ID = ⟨∂f/∂z, ∂f'/∂z⟩

    (Malladi et al. 2023, Definition D.1; Li et al. 2018.) All parameters share z, so the sketches
    of the groups are added before the inner product is taken. With the same S the groups' blocks
    of `project` are the part of K_ID without ⟨S_l g_l, S_m g'_m⟩ for l ≠ m, which is noise of mean
    zero: K_ID is the worse estimate of K, but it is the kernel of a method that people use.
    Cost: as `project`.

    Args:
        capture: of some examples.
        matrices: S by parameter, the same for all captures of a kernel; Gaussian in the paper.
        max_bytes: bound on a tile; never changes a number beyond rounding.

    Returns:
        A capture of the same examples with one group.
    """
    by_group = project(capture, matrices, max_bytes=max_bytes)
    parts = [
        part for by_name in by_group.parts.values() for own in by_name.values() for part in own
    ]
    whole: dict[str, tuple[Part, ...]] = {SKETCH: (_sum(parts),)} if parts else {}
    return Capture(capture.logits, {WHOLE: whole}, {})


def join(sketches: Iterable[Capture]) -> Capture:
    """Sketches of different parameters of the same examples as one.

    Groups that occur in several are added: the sketch of a whole gradient is the sum of those of
    its pieces, so that a model may be captured and projected layer by layer.

    Args:
        sketches: at least one, each of other parameters; taken one at a time.

    Returns:
        All their groups and cross groups.
    """
    parts: Parts = {}
    crosses: dict[str, tuple[str, str]] = {}
    for sketch in sketches:
        logits = sketch.logits
        crosses |= sketch.crosses
        for group, by_name in sketch.parts.items():
            own = [p for known in (parts.get(group, {}), by_name) for p in known.get(SKETCH, ())]
            parts[group] = {SKETCH: (_sum(own),)} if own else {}
    return Capture(logits, parts, crosses)


def _by_group(capture: Capture, sketch: Callable[[str, Part], Tensor]) -> Capture:
    parts: Parts = {}
    for group, by_name in capture.parts.items():
        own = [Rows(s := sketch(name, p), s.shape[2]) for name, ps in by_name.items() for p in ps]
        parts[group] = {SKETCH: (_sum(own),)} if own else {}
    return Capture(capture.logits, parts, capture.crosses)


def _sum(parts: Sequence[Part]) -> Rows:
    total = reduce(torch.add, [part.gradients for part in parts])
    return Rows(total, total.shape[2])


def _one_sided(
    name: str, part: Part, *, matrices: RandomMatrices, max_bytes: int
) -> Float[Tensor, "n c k"]:
    """k^(-1/2) S g, with g formed for some of its rows at a time."""
    n, c = part.gradients.shape[:2]
    width = max(part.width, 1)
    dtype = accumulator(part.gradients.dtype)
    total = part.gradients.new_zeros((n, c, matrices.dimension), dtype=dtype)
    for rows in _tiles(part, max(1, max_bytes // (8 * n * c * width))):
        tile = part.row_block(rows).flatten(2)
        total += _times(tile, _ranges(rows, width), name, matrices, max_bytes)
    total /= matrices.dimension**0.5
    return total


def _two_sided(
    name: str, part: Part, *, rows: RandomMatrices, cols: RandomMatrices, max_bytes: int
) -> Float[Tensor, "n c k"]:
    """(k_r k_c)^(-1/2) vec(P G Qᵀ)."""
    if part.width <= 1:
        vectors = replace(rows, dimension=rows.dimension * cols.dimension)
        return _one_sided(name, part, matrices=vectors, max_bytes=max_bytes)
    by_row = partial(_times, name=f"{name} (rows)", matrices=rows, max_bytes=max_bytes)
    by_col = partial(_times, name=f"{name} (columns)", matrices=cols, max_bytes=max_bytes)
    width = [(0, part.width)]
    if isinstance(part, Rows):
        height = [(0, part.num_rows)]
        half = by_col(part.gradients.view(*part.gradients.shape[:2], -1, part.width), width)
        sketch = by_row(half.mT, height).mT
    elif isinstance(part, Lookup):
        ids, place = torch.unique(part.ids, return_inverse=True)
        right = by_col(part.gradients, width)
        left = right.new_zeros((len(ids), rows.dimension))
        for i, row in enumerate(ids.tolist()):
            left[i] = rows.columns(f"{name} (rows)", row, row + 1, like=right)
        sketch = left[place].unsqueeze(1).mT @ right
    elif part.transposed:
        left = by_row(part.inputs, [(0, part.num_rows)]).unsqueeze(1)
        sketch = left.mT @ by_col(part.gradients, width)
    else:
        touched = slice(0, part.num_rows) if part.rows is None else part.rows
        left = by_row(part.gradients, _ranges(touched, 1))
        sketch = left.mT @ by_col(part.inputs, width).unsqueeze(1)
    flat: Tensor = sketch.flatten(2) / (rows.dimension * cols.dimension) ** 0.5
    return flat


def _times(
    left: Float[Tensor, "... q"],
    ranges: Iterable[Range],
    name: str,
    matrices: RandomMatrices,
    max_bytes: int,
) -> Float[Tensor, "... k"]:
    """The product with Sᵀ at these coordinates, S made some coordinates at a time."""
    k = matrices.dimension
    total = left.new_zeros((*left.shape[:-1], k), dtype=accumulator(left.dtype))
    # A coordinate has whole blocks of random bits, however few entries.
    size = max(1, max_bytes // (_BYTES_PER_ENTRY * max(k, 2)))
    place = 0
    for start, stop in ranges:
        for first in range(start, stop, size):
            last = min(first + size, stop)
            tile = left[..., place : place + last - first].to(total.dtype)
            total += tile @ matrices.columns(name, first, last, like=total)
            place += last - first
    return total


def _tiles(part: Part, size: int) -> Iterator[Int[Tensor, " s"] | slice]:
    """Rows of the parameter that the part touches, in pieces."""
    rows = part.support()
    if rows is not None:
        yield from (rows[start : start + size] for start in range(0, len(rows), size))
        return
    assert not isinstance(part, Lookup)
    for start in range(0, part.num_rows, size):
        yield slice(start, min(start + size, part.num_rows))


def _ranges(rows: Int[Tensor, " s"] | slice, width: int) -> list[Range]:
    """Coordinates of ascending rows of this width."""
    if isinstance(rows, slice):
        return [(rows.start * width, rows.stop * width)]
    found: list[Range] = []
    for row in rows.tolist():
        start, stop = row * width, (row + 1) * width
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found
