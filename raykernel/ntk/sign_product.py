"""Jᵀ α with signs in place of gradients: the training side of the kernel asigngd, folded.

    Σ_j,b K[i, a, j, b] β[j, b]  =  ⟨∂f_a(x_i)/∂θ, w⟩,    w = Σ_j,b β[j, b] sign(∂f_b(x_j)/∂θ)

(Malladi et al. 2023, Definition 3.4), so predictions at new examples are products of their
Jacobian with w (`product.tangents`). A sign is no linear function of the gradient, so that every
example's gradient has to be formed, once and a few rows of a parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from raykernel.ntk.batches import Batch, Readout
from raykernel.ntk.capture import Capture, Tracer
from raykernel.ntk.factors import Part, summed_rows
from raykernel.ntk.matmul import fast_products
from raykernel.ntk.passes import check_outputs, paired, selected_parameters, zeros_like
from raykernel.ntk.product import ProductBytes, product_bytes

Sign = Callable[[Tensor], Tensor]
"""Elementwise, on gradients (r, p) of some coordinates; it gives -1, 0 or 1, and 0 for 0."""

MAX_BYTES = 1 << 26
"""Default bound on the per-example gradients formed at a time."""


@fast_products()
def weighted_sign_gradient(
    model: nn.Module,
    readout: Readout,
    batches: Iterable[Batch],
    weights: Float[Tensor, "n c"],
    *,
    sign_of: Callable[[Sequence[Part]], Sign] = lambda parts: torch.sign,
    max_bytes: int = MAX_BYTES,
) -> dict[str, Tensor]:
    """The weighted sum of the signs of all gradients.

        w = Σ_j,b  β[j, b] sign(∂f_b(x_j)/∂θ)

    The sign is of the whole gradient: the uses of a tied parameter are added before it is taken.
    Cost: one forward and c backward passes per batch, and every gradient formed once.

    Args:
        model: the network; parameters with `requires_grad` are selected.
        readout: logits (n, c) of a batch.
        batches: the examples, in the order of the weights.
        weights: β, in any floating type.
        sign_of: a parameter's sign function, from all its parts in a batch: a dead zone may depend
            on them.
        max_bytes: bound on the gradients formed at a time (one row of a parameter at least), beside
            w and one batch's factors.

    Returns:
        A tensor of the parameter's shape by name, every selected parameter once.

    Raises:
        InputError: if nothing is selected, or weights do not match the examples or outputs.
        NonFiniteError: if logits or gradients are NaN or infinite.
    """
    total = zeros_like(selected_parameters(model))
    tracer = Tracer(model, readout, signs=True)
    for batch, own in paired(batches, weights):
        capture = tracer.capture(batch)
        check_outputs(capture.logits, own)
        for name, parts in _by_parameter(capture).items():
            _add_signs(total[name], parts, own, sign_of(parts), max_bytes)
    return total


def sign_product_bytes(tracer: Tracer, batch: Batch, *, max_bytes: int = MAX_BYTES) -> ProductBytes:
    """Memory of `weighted_sign_gradient` and of the products with what it returns.

    Beside what `product_bytes` counts: the check of a capture against autograd, which holds all
    gradients twice, tiles of gradients and what the heap keeps of them, and of every example the
    factors of all layers at once.

    Args:
        tracer: of the model, with signs.
        batch: one example, as long as the longest.
        max_bytes: bound on the gradients formed at a time.

    Returns:
        The bytes.
    """
    plain = product_bytes(tracer.model, tracer.readout, batch)
    selected = selected_parameters(tracer.model).values()
    return ProductBytes(
        fixed=plain.fixed + sum(p.numel() * p.element_size() for p in selected) + 3 * max_bytes,
        example=max(plain.example, tracer.bytes_per_example(batch)),
    )


def _by_parameter(capture: Capture) -> dict[str, list[Part]]:
    parts: dict[str, list[Part]] = {}
    for by_name in capture.parts.values():
        for name, own in by_name.items():
            parts.setdefault(name, []).extend(own)
    return parts


def _add_signs(
    total: Tensor, parts: Sequence[Part], weights: Float[Tensor, "n c"], sign: Sign, max_bytes: int
) -> None:
    """Add Σ_i,c weights[i, c] sign(G[i, c]), with G formed for some of its rows at a time."""
    matrix = total.view(total.shape[0] if total.dim() else 1, -1)
    scales = weights.to(matrix).flatten()
    # A gradient, its sign, and what it takes to get from one to the other.
    each = 4 * matrix.element_size() * len(scales) * max(matrix.shape[1], 1)
    for rows in _tiles(parts, len(matrix), max(1, max_bytes // each)):
        signs = sign(summed_rows(parts, rows).flatten(2).flatten(0, 1)).to(matrix.dtype)
        matrix[rows] += (scales @ signs).view(-1, matrix.shape[1])


def _tiles(parts: Sequence[Part], num_rows: int, size: int) -> Iterator[Int[Tensor, " s"] | slice]:
    """Rows of the parameter that any of its parts touches, in pieces."""
    supports = [part.support() for part in parts]
    known = [rows for rows in supports if rows is not None]
    if len(known) == len(supports):
        yield from torch.unique(torch.cat(known)).split(size)
        return
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
