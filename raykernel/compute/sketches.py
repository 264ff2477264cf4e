"""Projected kernels: what a worker keeps of a gradient is its sketch, `dim` random numbers.

    examples → factors, some layers at a time → sketches → products of sketches

The matrices are functions of seed, parameter and coordinate (`ntk.random_matrix`), so that every
worker has the same ones and none is sent or stored. Making them is most of the work of a sketch
from one side, and serves all examples that are projected at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raykernel.config import Json, ProjectionConfig
from raykernel.ntk.capture import Capture
from raykernel.ntk.contract import gram, grams
from raykernel.ntk.distortion import (
    dimension_needed,
    error_bound,
    failure_bound,
    projection_error,
)
from raykernel.ntk.factors import Lookup, Part, Product, Rows, accumulator
from raykernel.ntk.project import (
    SKETCH,
    WHOLE,
    intrinsic_dimension,
    join,
    project,
    project_two_sided,
)
from raykernel.ntk.random_matrix import Entries, RandomMatrices
from raykernel.ntk.rates import Rates
from raykernel.terms import Kind, Projection

SAMPLE = 8
"""Examples on which the error is measured, at the most."""

FAILURE = 0.05
"""Probability δ with which the printed bound may be exceeded."""

_ENTRIES = {
    Projection.gaussian: Entries.gaussian,
    Projection.rademacher: Entries.rademacher,
    Projection.two_sided: Entries.rademacher,
    Projection.intrinsic_dimension: Entries.gaussian,
}

_SECONDS_PER_ENTRY = {Entries.rademacher: 1e-9, Entries.gaussian: 16e-9}
"""Of making a matrix and bringing it to where it is multiplied, measured on one core at k = 256;
always made on the CPU, whatever the device."""

_PRODUCT_SHARE = 0.75
"""Share of the rate of a large square product that those with random matrices reach."""

_PART_SECONDS = 3e-4
"""Of a part however small: the calls that its sketch takes."""

_PRODUCT_FLOPS = 1e11
"""Speed of a core's matrix products beside it, for which order of magnitude is enough."""


def sketch(capture: Capture, projection: ProjectionConfig, *, max_bytes: int) -> Capture:
    """The projection that the configuration names.

    Args:
        capture: of some examples and layer groups.
        projection: method, dimension and seed.
        max_bytes: bound on a tile; never changes a number beyond rounding.

    Returns:
        Sketches of the same examples.
    """
    seed, entries = projection.seed, _ENTRIES[projection.method]
    if projection.method is Projection.two_sided:
        rows, cols = (RandomMatrices(k, seed=seed, entries=entries) for k in projection.sides)
        return project_two_sided(capture, rows, cols, max_bytes=max_bytes)
    matrices = RandomMatrices(projection.dim, seed=seed, entries=entries)
    if projection.method is Projection.intrinsic_dimension:
        return intrinsic_dimension(capture, matrices, max_bytes=max_bytes)
    return project(capture, matrices, max_bytes=max_bytes)


def stored_groups(projection: ProjectionConfig, groups: Sequence[str]) -> tuple[str, ...]:
    """Layer groups that a block has: those of the model, or one if layers are mixed."""
    whole = projection.method is Projection.intrinsic_dimension
    return (WHOLE,) if whole else tuple(groups)


# ------------------------------------------------------------------ what it costs


def num_bytes(capture: Capture, projection: ProjectionConfig) -> dict[str, int]:
    """Memory of one example's sketches, for `memory.Footprint`.

    Args:
        capture: of one example.
        projection: method and dimension.

    Returns:
        `sketch` for what is kept, `making` for what there is beside it meanwhile; of an exact
        kernel nothing.
    """
    if not projection.is_on:
        return {}
    c = capture.logits.shape[1]
    one = c * projection.dim * accumulator(capture.logits.dtype).itemsize
    of_groups = [sum(map(len, by_name.values())) for by_name in capture.parts.values()]
    mixed = projection.method is Projection.intrinsic_dimension
    return {
        "sketch": one * (1 if mixed else len(of_groups)),
        "making": one * (1 + (sum(of_groups) if mixed else max(of_groups))),
    }


def blank(capture: Capture, projection: ProjectionConfig) -> Capture:
    """A sketch of one example without its numbers, to plan products of sketches."""
    n, c = capture.logits.shape
    part = Rows(capture.logits.new_zeros((n, c, projection.dim)), projection.dim)
    groups = stored_groups(projection, tuple(capture.parts))
    return Capture(capture.logits, {group: {SKETCH: (part,)} for group in groups}, {})


@dataclass(frozen=True, slots=True)
class Work:
    """What projecting some examples takes."""

    flops: float
    """Floating-point operations per example."""
    entries: float
    """Random numbers per chunk of examples."""
    entry_seconds: float
    """Time of making one."""
    num_parts: int

    def seconds(self, num_examples: int, rates: Rates) -> float:
        """Predicted time of one chunk."""
        products = rates.seconds(num_examples * self.flops / _PRODUCT_SHARE, 0.0)
        return products + _PART_SECONDS * self.num_parts + self.entries * self.entry_seconds

    @property
    def chunk_flops(self) -> float:
        """What a chunk costs however few its examples, in operations of equal time."""
        return self.entries * self.entry_seconds * _PRODUCT_FLOPS


def work_of(parts: Iterable[Part], projection: ProjectionConfig) -> Work:
    """Operations and random numbers that sketches take.

    Args:
        parts: of one example.
        projection: method and dimension.

    Returns:
        The work; of lookups, with the rows that this example touches.
    """
    costs = [_cost(part, projection) for part in parts]
    seconds = _SECONDS_PER_ENTRY[_ENTRIES[projection.method]]
    flops, entries = (sum(of_parts) for of_parts in zip(*costs, strict=True))
    return Work(flops, entries, seconds, len(costs))


def _cost(part: Part, projection: ProjectionConfig) -> tuple[float, float]:
    """Operations and random numbers for one part of one example."""
    c, k = part.gradients.shape[1], projection.dim
    rows, width = part.ids.numel() if isinstance(part, Lookup) else part.num_rows, part.width
    t = 1 if isinstance(part, Rows) else part.gradients.shape[2]
    if projection.method is not Projection.two_sided or width <= 1:
        formed = c * t * rows * width if isinstance(part, Product) else 0
        return 2.0 * (formed + c * rows * width * k), 1.0 * rows * width * k
    k_rows, k_cols = projection.sides
    entries = 1.0 * (rows * k_rows + width * k_cols)
    if isinstance(part, Rows):
        return 2.0 * c * k_cols * rows * (width + k_rows), entries
    # The gradients are there for every output, the inputs once.
    gradients_are_rows = isinstance(part, Product) and not part.transposed
    left = 0 if isinstance(part, Lookup) else rows * k_rows * (c if gradients_are_rows else 1)
    right = width * k_cols * (1 if gradients_are_rows else c)
    return 2.0 * t * (left + right + c * k), entries


# ------------------------------------------------------------------ how far it is off


def distortion(
    segments: Iterable[Capture],
    projection: ProjectionConfig,
    *,
    num_gradients: int,
    rates: Rates,
    max_bytes: int,
) -> dict[str, Json]:
    """Error of the projected kernel on a sample, and the bound of Theorem D.2 for all examples.

    Args:
        segments: captures of the sample, each of some layer groups; taken one at a time.
        projection: what is measured.
        num_gradients: N, all examples times outputs.
        rates: of the device.
        max_bytes: bound on temporary memory.

    Returns:
        Largest errors of an entry, relative to |g| |g'|, of the sum of all layer groups and of the
        worst group (null if layers are mixed); the Frobenius error of the sum; and the bound.
    """
    exact: dict[str, Tensor] = {}

    def observed(capture: Capture) -> Capture:
        exact.update(grams(capture, capture, rates=rates, max_bytes=max_bytes)[Kind.sgd])
        return sketch(capture, projection, max_bytes=max_bytes)

    sketches = join(map(observed, segments))
    found = gram(sketches, sketches)
    of_groups = {g: projection_error(exact[g], found[g]) for g in sketches.parts if g in exact}
    worst = max(of_groups, key=lambda group: of_groups[group], default=None)
    whole, projected = (torch.stack(list(blocks.values())).sum(0) for blocks in (exact, found))
    norm = float(whole.norm())
    return {
        "method": projection.method.value,
        "dim": projection.dim,
        "examples": len(sketches.logits),
        "relative_error": float((projected - whole).norm()) / norm if norm else 0.0,
        "largest_error": projection_error(whole, projected),
        "worst_group": worst,
        "worst_group_error": None if worst is None else of_groups[worst],
        **_bound(projection, num_gradients, len(found)),
    }


def _bound(projection: ProjectionConfig, num_gradients: int, num_groups: int) -> dict[str, Json]:
    """Theorem D.2 for every layer group and their sum at once, each at its share of δ."""
    # Tied groups have one gradient together, which one matrix projects: one statement more for
    # each set of them, and so no more statements than groups with cross groups.
    if projection.method is Projection.two_sided:
        return {"theorem": None}
    rows, share = num_gradients, FAILURE / num_groups
    limit = error_bound(projection.dim, failure=share, num_rows=rows)
    least = num_groups * failure_bound(1.0, dimension=projection.dim, num_rows=rows)
    return {
        "theorem": "D.2",
        "gradients": rows,
        "statements": num_groups,
        "failure": FAILURE,
        "bound": limit if math.isfinite(limit) else None,
        "least_failure": least,
        "dim_needed": {
            f"{e:g}": dimension_needed(e, failure=share, num_rows=rows) for e in (0.1, 0.5)
        },
    }
