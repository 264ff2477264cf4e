"""The empirical NTK of two sets of examples, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from raykernel.errors import InputError, nearest
from raykernel.names import compiled
from raykernel.ntk.batches import check_batch
from raykernel.ntk.capture import Capture, Tracer
from raykernel.ntk.contract import grams
from raykernel.ntk.signs import DEAD_ZONE
from raykernel.terms import Kind


def empirical_kernel(
    model: nn.Module,
    readout: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    rows: dict[str, Tensor],
    cols: dict[str, Tensor] | None = None,
    *,
    kinds: Sequence[str | Kind] = ("sgd",),
    groups: Iterable[str] | None = None,
    dead_zone: float = DEAD_ZONE,
    batch_size: int = 32,
) -> dict[str, dict[str, Float[Tensor, "n c m c"]]]:
    """Exact empirical NTK of the parameters with `requires_grad`, by layer group.

        sgd       K[i, a, j, b] = Σ_p       ∂f_a(x_i)/∂θ_p ·      ∂f_b(x_j)/∂θ_p
        signgd    K[i, a, j, b] = Σ_p  sign ∂f_a(x_i)/∂θ_p · sign ∂f_b(x_j)/∂θ_p
        asigngd   K[i, a, j, b] = Σ_p       ∂f_a(x_i)/∂θ_p · sign ∂f_b(x_j)/∂θ_p

    (Malladi et al. 2023, Definitions 3.2 to 3.4; `asigngd_flipped` has the sign on the rows.)
    The sum over all groups is the whole kernel: no parameter is left out, and a parameter tied
    between modules a and b adds a group `cross(a, b)`; kernels of signs, which are not sums over
    the uses of a parameter, have all of its share there. Outputs are not traced out. Modules run in
    eval mode. Sums in float32 (a float64 model: in float64), on the model's device.
    Cost: one forward and c backward passes over rows and columns, then the contraction.

    Args:
        model: the network.
        readout: called as readout(model, batch), gives logits (n, c).
        rows: the row examples; tensors whose leading dimension is the examples.
        cols: the column examples; None: the rows.
        kinds: kernels wanted.
        groups: layer groups wanted, by name or by expressions searched in names; None: all.
        dead_zone: a coordinate this small against the terms that it is the sum of has sign 0.
        batch_size: examples of one forward pass at the most.

    Returns:
        Blocks by kind and layer group.

    Raises:
        InputError: for a kind or group that does not exist, an empty or uneven batch, a readout
            that is not (n, c), or a model none of whose parameters has `requires_grad`.
        NonFiniteError: if logits, gradients or blocks are NaN or infinite.
    """
    wanted_kinds = [_kind(kind) for kind in kinds]
    signs = any(kind.has_signs for kind in wanted_kinds)
    if batch_size < 1:
        raise InputError(f"batch_size: found {batch_size}, expected at least 1.")
    tracer = Tracer(model, readout, signs=signs)
    wanted = None if groups is None else select_groups(tracer.groups, groups)
    row_capture = capture_in_batches(tracer, rows, batch_size)
    col_capture = row_capture if cols is None else capture_in_batches(tracer, cols, batch_size)
    if row_capture.logits.shape[1] != col_capture.logits.shape[1]:
        raise InputError(
            f"readout gave {row_capture.logits.shape[1]} outputs for rows and "
            f"{col_capture.logits.shape[1]} for cols, expected the same outputs for both."
        )
    blocks = grams(row_capture, col_capture, kinds=wanted_kinds, groups=wanted, dead_zone=dead_zone)
    return {kind.value: by_group for kind, by_group in blocks.items()}


def select_groups(names: Sequence[str], wanted: Iterable[str]) -> tuple[str, ...]:
    """Layer groups in their order, chosen by name or by regular expression.

    Args:
        names: every layer group.
        wanted: names, or expressions searched in names.

    Returns:
        Those chosen, once each.

    Raises:
        InputError: if one of `wanted` chooses nothing, or is no regular expression.
    """
    chosen: set[str] = set()
    for pattern in wanted:
        # An exact name wins: `layer.1` is not also `layer.10`.
        found = (
            [pattern]
            if pattern in names
            else list(filter(compiled("groups", pattern).search, names))
        )
        if not found:
            raise InputError(
                f"groups: {pattern!r} is no layer group and matches none, {nearest(pattern, names)}"
            )
        chosen.update(found)
    return tuple(name for name in names if name in chosen)


def _kind(kind: str | Kind) -> Kind:
    known = {member.value: member for member in Kind}
    if isinstance(kind, str) and kind not in known:
        raise InputError(f"kinds: {kind!r} is no kernel, {nearest(kind, known)}")
    return known[kind] if isinstance(kind, str) else kind


def capture_in_batches(tracer: Tracer, batch: dict[str, Tensor], batch_size: int) -> Capture:
    """Capture of all examples, in passes of `batch_size` of them at the most."""
    n = check_batch(batch)
    pieces = [
        {key: value[start : start + batch_size] for key, value in batch.items()}
        for start in range(0, n, batch_size)
    ]
    return Capture.concatenate([tracer.capture(piece) for piece in pieces])
