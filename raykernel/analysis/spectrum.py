"""Spectrum of a train kernel: every reading of its condition number, and ranks.

Rahimi Afzal et al. 2025 predict how well a choice of layers trains from the condition number of
its NTK. It has several readings, which disagree on kernels of real models; all are here. Which
outputs they are of says outputs.py: by default what softmax sees.

Legend: m rows of the kernel of these outputs, l_1 ≥ … ≥ l_m its eigenvalues, τ = (Σ l) / m their
mean, σ a ridge.

Rounding. Kernels are stored in float32, say. An eigenvalue below resolution · ||K||_op of the
stored kernel K is noise, and so is any number made of it: readings that need one are NaN, readings
with a ridge say whether the ridge covers it. The noise of a projection is that of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from raykernel.analysis.outputs import Outputs, choose_outputs, project, total
from raykernel.errors import InputError

RIDGE = 1e-3
"""Default ridge, relative to the mean eigenvalue: float32 resolves it on most kernels."""
COVERED = 0.1
"""Noise below this part of the ridge moves a regularised reading by at most as much."""


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
    floor: float = 0.0,
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
        floor: an eigenvalue that is known to be noise, where that is more.

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
    gram, reached = project(whole, relative, outputs=chosen, centred=centred, floor=floor)
    return read(
        gram.eigenvalues,
        gram.kept,
        floor=reached,
        outputs=chosen,
        centred=centred,
        ridge=ridge,
        sigma=sigma,
    )


def read(
    eigenvalues: Float[np.ndarray, " m"],
    kept: Bool[np.ndarray, " m"],
    *,
    floor: float,
    outputs: Outputs,
    centred: bool,
    ridge: float,
    sigma: float | None = None,
) -> Spectrum:
    """All readings of a spectrum.

    Args:
        eigenvalues: ascending.
        kept: those above the noise.
        floor: the eigenvalue that noise reaches.
        outputs: which outputs it is of.
        centred: whether it is centred.
        ridge: σ relative to the mean eigenvalue.
        sigma: σ itself, instead.

    Returns:
        The readings.
    """
    resolved = np.where(kept, eigenvalues, 0.0)
    size, top, bottom = resolved.size, float(resolved[-1]), float(resolved[0])
    mean = float(resolved.mean())
    absolute = ridge * mean if sigma is None else sigma
    share = resolved[kept] / (size * mean) if mean > 0 else np.zeros(0)
    highest = bottom if kept[0] else floor
    smallest = float(resolved[kept][0]) if kept.any() else 0.0
    shifted = resolved + absolute
    logarithms = np.log(shifted) if shifted[0] > 0 else np.full(size, -np.inf)
    return Spectrum(
        eigenvalues=eigenvalues,
        floor=floor,
        sigma=absolute,
        outputs=outputs,
        centred=centred,
        size=size,
        num_unresolved=int((~kept).sum()),
        top=top,
        bottom=bottom if kept[0] else math.nan,
        mean=mean,
        raw=_ratio(top, bottom),
        at_least=_ratio(top, highest) if top > 0 else math.nan,
        regularised=_ratio(top + absolute, bottom + absolute) if top > 0 else math.nan,
        regularised_at_least=_ratio(top + absolute, highest + absolute) if top > 0 else math.nan,
        truncated=_ratio(top, smallest),
        median=_ratio(top, float(resolved[size - (size + 1) // 2])),
        top_over_mean=_ratio(top, mean),
        mean_over_bottom=_ratio(mean, bottom),
        amgm_gap=math.nan if shifted[0] <= 0 else math.log(mean + absolute) - logarithms.mean(),
        stable_rank=1 / float(share.max()) if share.size else 0.0,
        participation=1 / float((share**2).sum()) if share.size else 0.0,
        effective_rank=math.exp(-float((share * np.log(share)).sum())) if share.size else 0.0,
        effective_dimension=float((resolved[kept] / shifted[kept]).sum()),
    )


def _ratio(over: float, under: float) -> float:
    """A ratio of eigenvalues; NaN if the one below is 0, which stands for noise."""
    return over / under if under > 0 else math.nan
