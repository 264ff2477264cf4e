"""Spectrum of a train kernel: every reading of its condition number, and ranks.

Rahimi Afzal et al. 2025 predict how well a choice of layers trains from the condition number of
its NTK. It has several readings, which disagree on kernels of real models; all are here.

Legend: n train examples, c outputs, Q an isometry that maps outputs (or examples), m rows of
Qᵀ K Q, l_1 ≥ … ≥ l_m its eigenvalues, τ = (Σ l) / m their mean, σ a ridge.

Which outputs. Softmax does not see what all logits share: with the contrast basis Q (c, c - 1), an
orthonormal basis of the logits that sum to 0,

    K_contrast[i, a, j, b] = Σ_{a', b'} Q[a', a] K[i, a', j, b'] Q[b', b]

is the kernel of what a softmax classifier can change; of c = 2 it is the kernel of the margin
(f_1 - f_0) / √2. Cross-entropy never moves the direction left out, so the condition number of all
nc outputs counts n directions that no training visits. By the Rayleigh quotient the condition
number of Qᵀ K Q is at most that of K.

Rounding. Kernels are stored in float32, say. An eigenvalue below resolution · ||K||_op of the
stored kernel K is noise, and so is any number made of it: readings that need one are NaN, readings
with a ridge say whether the ridge covers it. The noise of a projection is that of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import scipy.linalg
from jaxtyping import Float

from raykernel.analysis.gram import Gram, decompose, flatten, noise
from raykernel.errors import InputError

RIDGE = 1e-4
"""Default ridge, relative to the mean eigenvalue."""
ASYMMETRY_TOLERANCE = 1e-3
"""||K - Kᵀ|| above this part of ||K|| is no rounding error (Frobenius norms)."""
COVERED = 0.1
"""Noise below this part of the ridge moves a regularised reading by at most as much."""


class Outputs(Enum):
    """Which combinations of a model's outputs a spectrum is of."""

    full = "full"
    """Every output: nc rows."""
    contrast = "contrast"
    """All that softmax sees, the logits without what they share: n(c - 1) rows."""
    trace = "trace"
    """(1/c) Σ_a K[i, a, j, a]: n rows."""
    pseudo = "pseudo"
    """The sum of all logits over √c, Mohamadi et al. 2023's pseudo-NTK: n rows. Of a trained
    softmax head it can vanish."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Eigenvalues of a train kernel and what is read off them.

    Readings whose eigenvalues are rounding noise are NaN. Readings with the ridge take noise as 0.
    """

    eigenvalues: Float[np.ndarray, " m"]
    """Ascending; those that are noise as they were found."""
    floor: float
    """Eigenvalues at or below are rounding noise: all that is known is that they lie in
    [0, floor]."""
    sigma: float
    """The ridge σ, absolute."""
    outputs: Outputs
    centred: bool
    """Whether the mean over examples was taken off: H K H, without its structural zeros."""
    size: int
    """Rows m."""
    num_unresolved: int
    """Eigenvalues that are noise."""
    top: float
    """l_1 = ||K||_op."""
    bottom: float
    """l_m; NaN if it is noise."""
    mean: float
    """Mean eigenvalue τ."""
    raw: float
    """l_1 / l_m; NaN if l_m is noise."""
    at_least: float
    """A lower bound of l_1 / l_m that rounding cannot spoil: l_1 / max(l_m, floor)."""
    regularised: float
    """(l_1 + σ) / (l_m + σ)."""
    regularised_at_least: float
    """The same with noise at its upper end, the floor."""
    truncated: float
    """l_1 over the smallest eigenvalue above the floor: jumps as the floor moves."""
    median: float
    """l_1 / l_k with k = ⌈m/2⌉; NaN if l_k is noise. A few duplicates do not move it."""
    top_over_mean: float
    """l_1 / τ, the top's part of the condition number: raw = top_over_mean · mean_over_bottom."""
    mean_over_bottom: float
    """τ / l_m, the bottom's part; NaN if l_m is noise."""
    amgm_gap: float
    """log τ_σ - (1/m) Σ log(l + σ) ≥ 0, with τ_σ = τ + σ; 0 if all eigenvalues are equal."""
    stable_rank: float
    """Σ l / l_1."""
    participation: float
    """(Σ l)² / Σ l²."""
    effective_rank: float
    """exp of the entropy of l / Σ l (Roy & Vetterli 2007)."""
    effective_dimension: float
    """Σ l / (l + σ)."""

    @property
    def is_ridge_covering(self) -> bool:
        """Whether the regularised readings are known in spite of noise: floor ≤ σ / 10, or none."""
        return self.num_unresolved == 0 or self.floor <= COVERED * self.sigma

    @property
    def resolved(self) -> Float[np.ndarray, " m"]:
        """The eigenvalues, ascending, noise as 0."""
        return np.where(self.eigenvalues > self.floor, self.eigenvalues, 0.0)

    def kth(self, k: int) -> float:
        """l_1 / l_k, which up to m - k duplicates among the examples do not move.

        Args:
            k: 1 is the largest eigenvalue.

        Returns:
            The ratio; NaN if l_k is noise.

        Raises:
            InputError: if there is no such eigenvalue.
        """
        if not 1 <= k <= self.size:
            raise InputError(f"k: found {k}, expected 1 to {self.size}, the number of eigenvalues.")
        return _ratio(self.top, float(self.resolved[-k]))

    def cut(self, tau: float) -> tuple[float, int]:
        """l_1 / min{l ≥ τ l_1}, and how many eigenvalues that leaves out.

        Args:
            tau: where to cut, relative to the largest; nothing below the floor is kept.

        Returns:
            The ratio and the number.
        """
        kept = self.resolved[(self.resolved >= tau * self.top) & (self.resolved > 0)]
        smallest = float(kept[0]) if kept.size else 0.0
        return _ratio(self.top, smallest), self.size - kept.size


def spectrum(
    kernel: Float[np.ndarray, "n1 c1 n2 c2"] | Sequence[Float[np.ndarray, "n1 c1 n2 c2"]],
    *,
    outputs: Outputs | None = None,
    centred: bool = False,
    ridge: float = RIDGE,
    sigma: float | None = None,
    resolution: float | None = None,
) -> Spectrum:
    """Spectrum of a train kernel, in float64; O((nc)³).

    The ridge is relative to the mean eigenvalue, unlike that of `solve_ridge`, which is relative
    to the largest: only so the regularised kernel of two layers is the sum of theirs, and a union
    of layers is never worse conditioned than its worst member (`perturbation`).
    Reference: Rahimi Afzal et al. 2025, condition number of the NTK at initialization.

    Args:
        kernel: K(train, train), symmetric positive semidefinite, or such kernels to sum.
        outputs: which combinations of outputs; default contrast, and full of a single output.
        centred: whether to take the mean over examples off, a direction that the examples share
            and one step of a bias absorbs.
        ridge: σ relative to the mean eigenvalue.
        sigma: σ itself, instead.
        resolution: relative size of an eigenvalue that is rounding noise; default nc times the
            machine epsilon of the kernel's dtype. Give it for a float64 array that was summed
            from float32 blocks.

    Returns:
        Its readings.

    Raises:
        InputError: if the kernel is not square, not symmetric or not finite, or has one output
            only and contrasts are asked for, or one example only and is to be centred, or the
            ridge is negative.
        NotPositiveSemidefiniteError: if the kernel has eigenvalues far below zero.
    """
    if not (ridge >= 0 and (sigma is None or sigma >= 0)):
        raise InputError(f"ridge: found {ridge if sigma is None else sigma}, expected ≥ 0.")
    whole, relative = total(kernel, resolution)
    chosen = choose_outputs(outputs, whole.shape[1])
    gram, floor = project(whole, relative, outputs=chosen, centred=centred)
    return read(gram, floor=floor, outputs=chosen, centred=centred, ridge=ridge, sigma=sigma)


def total(
    kernel: Float[np.ndarray, "n1 c1 n2 c2"] | Sequence[Float[np.ndarray, "n1 c1 n2 c2"]],
    resolution: float | None,
) -> tuple[Float[np.ndarray, "n c n c"], float]:
    """Sum of kernels in float64, and its resolution.

    Rounding entries of positive semidefinite blocks to a relative ε/2 moves their sum K by at most
    ε/2 · tr K ≤ ε/2 · nc ||K||_op, since Σ_l |K_l[p, q]| ≤ (K[p, p] K[q, q])^½ by Cauchy-Schwarz:
    the resolution of one block, nc · ε, is that of any sum of them.

    Args:
        kernel: one, or several.
        resolution: a known one.

    Returns:
        The sum and the resolution.

    Raises:
        InputError: if they are not alike, square, symmetric and finite.
    """
    blocks = [kernel] if isinstance(kernel, np.ndarray) else list(kernel)
    shapes = {block.shape for block in blocks}
    if len(shapes) != 1 or blocks[0].ndim != 4 or 0 in blocks[0].shape:
        raise InputError(
            f"Found kernels of shapes {sorted(shapes)}, expected one shape (n, c, n, c) and at "
            "least one kernel."
        )
    n, c = blocks[0].shape[:2]
    matrix = sum((flatten(block, np.zeros((n, c))) for block in blocks), np.zeros(()))
    relative = max(noise(block, resolution) for block in blocks)
    gap = float(np.linalg.norm(matrix - matrix.T))
    if gap > ASYMMETRY_TOLERANCE * float(np.linalg.norm(matrix)):
        raise InputError(
            f"The train kernel differs from its transpose by {gap:.3g} of norm "
            f"{np.linalg.norm(matrix):.3g}: expected a symmetric kernel. asigngd has singular "
            "values but no spectrum; take sgd or signgd."
        )
    return matrix.reshape(n, c, n, c), relative


def choose_outputs(outputs: Outputs | None, c: int) -> Outputs:
    """The outputs asked for, or the default.

    Args:
        outputs: None: contrast, and full of a single output.
        c: number of outputs.

    Returns:
        Which outputs.

    Raises:
        InputError: if contrasts of a single output are asked for.
    """
    if outputs is Outputs.contrast and c == 1:
        raise InputError("outputs: found contrast of a single output, expected full.")
    return outputs or (Outputs.full if c == 1 else Outputs.contrast)


def project(
    kernel: Float[np.ndarray, "n c n c"], resolution: float, *, outputs: Outputs, centred: bool
) -> tuple[Gram, float]:
    """Eigenbasis of Qᵀ K Q, whose noise is that of K.

    Args:
        kernel: the kernel K.
        resolution: of K.
        outputs: which outputs.
        centred: whether to take the mean over examples off.

    Returns:
        The eigenbasis, and the eigenvalue that noise reaches.

    Raises:
        InputError: if a single example is to be centred.
    """
    n, c = kernel.shape[:2]
    if centred and n == 1:
        raise InputError("centred: found one example, expected at least two.")
    flat = kernel.reshape(n * c, n * c)
    last = [n * c - 1, n * c - 1]
    scale = float(scipy.linalg.eigvalsh((flat + flat.T) / 2, subset_by_index=last)[0])
    if outputs is Outputs.contrast:
        kernel = _both_sides(kernel, scipy.linalg.helmert(c).T, axis=1)
    elif outputs is Outputs.pseudo:
        kernel = _both_sides(kernel, np.full((c, 1), 1 / math.sqrt(c)), axis=1)
    elif outputs is Outputs.trace:
        kernel = np.einsum("iaja->ij", kernel)[:, None, :, None] / c
    if centred:
        kernel = _both_sides(kernel, scipy.linalg.helmert(n).T, axis=0)
    gram = decompose(kernel, np.zeros(kernel.shape[:2]), resolution, max(scale, 0.0))
    return gram, resolution * max(scale, gram.top)


def read(
    gram: Gram,
    *,
    floor: float,
    outputs: Outputs,
    centred: bool,
    ridge: float,
    sigma: float | None = None,
) -> Spectrum:
    """All readings of a spectrum.

    Args:
        gram: the eigenbasis.
        floor: the eigenvalue that noise reaches.
        outputs: which outputs it is of.
        centred: whether it is centred.
        ridge: σ relative to the mean eigenvalue.
        sigma: σ itself, instead.

    Returns:
        The readings.
    """
    resolved = np.where(gram.kept, gram.eigenvalues, 0.0)
    size, top, bottom = resolved.size, float(resolved[-1]), float(resolved[0])
    mean = float(resolved.mean())
    absolute = ridge * mean if sigma is None else sigma
    share = resolved[gram.kept] / (size * mean) if mean > 0 else np.zeros(0)
    highest = bottom if gram.kept[0] else floor
    smallest = float(resolved[gram.kept][0]) if gram.kept.any() else 0.0
    shifted = resolved + absolute
    logarithms = np.log(shifted) if shifted[0] > 0 else np.full(size, -np.inf)
    return Spectrum(
        eigenvalues=gram.eigenvalues,
        floor=floor,
        sigma=absolute,
        outputs=outputs,
        centred=centred,
        size=size,
        num_unresolved=gram.num_dropped,
        top=top,
        bottom=bottom if gram.kept[0] else math.nan,
        mean=mean,
        raw=_ratio(top, bottom),
        at_least=_ratio(top, highest),
        regularised=_ratio(top + absolute, bottom + absolute),
        regularised_at_least=_ratio(top + absolute, highest + absolute),
        truncated=_ratio(top, smallest),
        median=_ratio(top, float(resolved[size - (size + 1) // 2])),
        top_over_mean=_ratio(top, mean),
        mean_over_bottom=_ratio(mean, bottom),
        amgm_gap=math.nan if shifted[0] <= 0 else math.log(mean + absolute) - logarithms.mean(),
        stable_rank=1 / float(share.max()) if share.size else 0.0,
        participation=1 / float((share**2).sum()) if share.size else 0.0,
        effective_rank=math.exp(-float((share * np.log(share)).sum())) if share.size else 0.0,
        effective_dimension=float((resolved[gram.kept] / shifted[gram.kept]).sum()),
    )


def _ratio(over: float, under: float) -> float:
    """A ratio of eigenvalues; NaN if the one below is 0, which stands for noise."""
    return over / under if under > 0 else math.nan


def _both_sides(
    kernel: Float[np.ndarray, "n c n c"], basis: Float[np.ndarray, "all some"], axis: int
) -> Float[np.ndarray, "n2 c2 n2 c2"]:
    """Qᵀ K Q along the examples (axis 0) or the outputs (axis 1)."""
    one = np.moveaxis(np.tensordot(kernel, basis, axes=(axis, 0)), -1, axis)
    return np.moveaxis(np.tensordot(one, basis, axes=(axis + 2, 0)), -1, axis + 2)
