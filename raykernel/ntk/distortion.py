"""How far a projected kernel can be from the exact one: the papers' bounds, and what it is.

Theorem D.2 of Malladi et al. 2023 (random projection of the whole gradient): with entries of
mean 0 and variance 1/k and K(i, i) ≤ c for all of N rows of the kernel,

    Pr[∃ i, j: |K_ID(i, j) - K(i, j)| ≥ c ε]  ≤  4 N² exp(-(ε² - ε³) k / 4)

Its proof holds for any gradients, so it holds for a layer group's, too, and with gradients scaled
to length one (c = 1) for the error relative to |g| |g'|, which `projection_error` measures.

Theorem D.5 (LoRA at B = 0, one token per example, h = W x + B A x, A of variance 1/k): with
|dh|² ≤ c and |x|² ≤ c the same holds with c² ε; Remark D.6: over L adapted layers with
L c² ε and the exponent times L.

Several tokens per example, G = Σ_t dh_t x_tᵀ: the kernels are ⟨G Aᵀ, G' Aᵀ⟩ and ⟨G, G'⟩. With the
singular values σ_i and right vectors v_i of G, |G Aᵀ|² / |G|² = Σ_i σ_i² |A v_i|² / |G|² is a mean
of squares that Lemma D.3 bounds one by one, so by Jensen its moment generating function is no
larger than the largest of theirs, from which both tails follow. So D.5 holds for every token count
with |G| |G'| (≤ c² for one token) in place of c²; `compute.lora_error` measures that. If it holds
in every module, it holds for their sum, too: Σ_l |G_l| |G'_l| ≤ |G| |G'|.

D.5 wants Gaussian A, PEFT draws it uniformly. Scaled to the same variance a uniform entry has no
larger even moments than the Gaussian, which is all that the lemma's proof asks of it (Achlioptas
2003, Database-friendly random projections), so that the bound holds for PEFT's A, too.

On the text: Lemma D.3 allows entries from U(-1, 1), which is right only if it means -1 or 1 with
equal probability. The uniform distribution has variance 1/3 and would give a third of the kernel.
D.4 does not say that A needs variance 1/k: with variance v (PEFT: 1/3 over the layer's inputs) the
kernel is k v times as large. Remark D.6's k ≥ 20 c⁴ log N / ε² takes no failure probability: it is
the bound at 4 N^(5 ε/c² - 3), so that it says nothing from ε = 3 c² / 5 on.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from raykernel.errors import InputError

_BEST = 2 / 3
"""ε at which ε² - ε³ is largest: beyond, its own bound is the better one."""


def dimension_needed(error: float, *, failure: float, num_rows: int) -> int:
    """Dimension k from which Theorem D.2 promises this error.

        k = ceil(4 ln(4 N² / δ) / (ε² - ε³))

    Args:
        error: ε, relative to c (or to |g| |g'|).
        failure: δ, probability with which it may be exceeded for some pair.
        num_rows: N, gradients in the kernel: examples times outputs.

    Returns:
        k.

    Raises:
        InputError: if ε or N is not positive, or δ not between 0 and 1.
    """
    _check(failure, error=error, num_rows=num_rows)
    eps = min(error, _BEST)
    return math.ceil(4 * math.log(4 * num_rows**2 / failure) / (eps**2 - eps**3))


def error_bound(dimension: int, *, failure: float, num_rows: int) -> float:
    """Error that Theorem D.2 promises for this dimension, the inverse of `dimension_needed`.

    Args:
        dimension: k.
        failure: δ, probability with which it may be exceeded for some pair.
        num_rows: N, gradients in the kernel: examples times outputs.

    Returns:
        ε, relative to c (or to |g| |g'|); infinity where k is too small for any promise.

    Raises:
        InputError: if k or N is not positive, or δ not between 0 and 1.
    """
    _check(failure, dimension=dimension, num_rows=num_rows)
    value = 4 * math.log(4 * num_rows**2 / failure) / dimension
    if value > _BEST**2 - _BEST**3:
        return math.inf
    # The root of ε² - ε³ = value that grows with it from 0, by Viète's trigonometric formula.
    angle = math.acos(max(-1.0, 1 - 13.5 * value))
    return (1 + 2 * math.cos((angle - 2 * math.pi) / 3)) / 3


def failure_bound(error: float, *, dimension: int, num_rows: int) -> float:
    """Probability with which Theorem D.2 allows an error to be exceeded for some pair.

        4 N² exp(-(ε² - ε³) k / 4)

    Args:
        error: ε, relative to c (or to |g| |g'|); beyond 2/3 the bound at 2/3 is the better one.
        dimension: k.
        num_rows: N, gradients in the kernel: examples times outputs.

    Returns:
        The bound; above 1 it says nothing.

    Raises:
        InputError: if a number is not positive.
    """
    _check(0.5, error=error, dimension=dimension, num_rows=num_rows)
    eps = min(error, _BEST)
    return 4 * num_rows**2 * math.exp(-(eps**2 - eps**3) * dimension / 4)


def lora_rank_needed(
    error: float, *, failure: float, num_rows: int, bound: float = 1.0, num_layers: int = 1
) -> int:
    """Rank from which Theorem D.5 and Remark D.6 promise this error of the LoRA kernel.

        k = ceil(4 ln(4 N² / δ) / (L (ε² - ε³))),    ε = error / (L c²)

    Args:
        error: of a kernel entry, absolute.
        failure: δ, probability with which it may be exceeded for some pair.
        num_rows: N, gradients in the kernel.
        bound: c, no less than |dh|² and |x|² of every example and layer.
        num_layers: L.

    Returns:
        k.

    Raises:
        InputError: if a number is not positive, or δ not between 0 and 1.
    """
    _check(failure, error=error, bound=bound, num_layers=num_layers)
    eps = error / (num_layers * bound**2)
    return -(-dimension_needed(eps, failure=failure, num_rows=num_rows) // num_layers)


def lora_error_bound(
    rank: int, *, failure: float, num_rows: int, bound: float = 1.0, num_layers: int = 1
) -> float:
    """Error of the LoRA kernel that Theorem D.5 and Remark D.6 promise for this rank.

    Args:
        rank: k.
        failure: δ, probability with which it may be exceeded for some pair.
        num_rows: N, gradients in the kernel.
        bound: c, no less than |dh|² and |x|² of every example and layer.
        num_layers: L.

    Returns:
        Error of a kernel entry, absolute; infinity where k is too small for any promise.

    Raises:
        InputError: if a number is not positive, or δ not between 0 and 1.
    """
    _check(failure, rank=rank, bound=bound, num_layers=num_layers)
    eps = error_bound(num_layers * rank, failure=failure, num_rows=num_rows)
    return num_layers * bound**2 * eps


def _check(failure: float, **positive: float | int) -> None:
    if not 0 < failure < 1:
        raise InputError(f"failure: found {failure}, expected a probability between 0 and 1.")
    for name, value in positive.items():
        if not value > 0:
            raise InputError(f"{name}: found {value}, expected a positive number.")


def projection_error(exact: Float[Tensor, "n c n c"], projected: Float[Tensor, "n c n c"]) -> float:
    """Largest error of a projected kernel, relative to the lengths of the gradients.

        max |⟨S g, S g'⟩ - ⟨g, g'⟩| / (|g| |g'|)

    With the probability 1 - δ no more than `error_bound` for projections with one sketch.

    Args:
        exact: kernel of some examples with themselves.
        projected: of the same.

    Returns:
        The maximum over all pairs whose gradients do not vanish.
    """
    n, c = exact.shape[:2]
    error = (projected.double() - exact.double()).abs().view(n * c, n * c)
    lengths = exact.double().view(n * c, n * c).diagonal().clamp(min=0).sqrt()
    scale = torch.outer(lengths, lengths)
    return float((error / scale)[scale > 0].max()) if bool((scale > 0).any()) else 0.0
