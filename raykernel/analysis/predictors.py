"""What foretells, before any training, how well a choice of layers fine-tunes.

Every predictor is a number of a set of layers' kernel at the start, beside the labels or without
them, and comes with the sign that theory gives it. None is a law: `size`, `num_parameters` and
`random` are among them as controls, which a predictor has to beat.

Legend: K the kernel of n train examples in the outputs that softmax sees, m = n(c - 1) rows (of a
single output m = n), l_1 ≥ … ≥ l_m its eigenvalues, τ their mean; r = y - f_0 what the outputs have
to change, one-hot labels less initial logits; v_iᵀ r its coordinate along eigenvector i.

Two ridges. ε τ is relative to each set's own kernel, so that readings with it do not depend on
scale; σ is one for all sets, so that those with it (`is_monotone`) move one way with every layer
added. Eigenvalues that are rounding noise count as 0, and a number that they make is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from raykernel.analysis.correlation import Expected
from raykernel.analysis.gram import Gram, decompose
from raykernel.analysis.leave_one_out import LeaveOneOut, leave_each_out
from raykernel.analysis.outputs import Outputs, choose_outputs, combined, contrast_basis, project
from raykernel.analysis.spectrum import RIDGE, Spectrum, read
from raykernel.errors import InputError
from raykernel.terms import Criterion

EVIDENCE_RIDGES = 11
"""Ridges over which the marginal likelihood is maximised, from ε to 10⁵ ε."""


@dataclass(frozen=True)
class Start:
    """A set of layers before training: its kernel, and what that has to fit."""

    kernel: Float[np.ndarray, "n1 c1 n2 c2"]
    """K(train, train) of all outputs, symmetric, in float64."""
    targets: Float[np.ndarray, "n c"]
    """One-hot labels y."""
    f0: Float[np.ndarray, "n0 c0"]
    """Initial logits."""
    sigma: float
    """Ridge σ, the same for all sets that are compared; above 0."""
    ridge: float = RIDGE
    """ε, relative to the mean eigenvalue of this kernel."""
    resolution: float = 0.0
    """Relative size of an eigenvalue of `kernel` that is rounding noise."""
    bound: float = math.inf
    """At least ||kernel||_op, where it is known: saves finding that of kernels without noise."""
    is_f0_fitted: bool = False
    """Whether f_0 was fitted to these labels, as a linear probe's is: then no example is left out
    by leaving it out of the kernel."""
    size: int = 1
    """Candidates in the set."""
    num_parameters: int = 0
    """Parameters that would be trained."""
    draw: float = 0.0
    """A random number, as a control."""

    def __post_init__(self) -> None:
        n, c = self.targets.shape
        if self.kernel.shape != (n, c, n, c) or self.f0.shape != (n, c):
            raise InputError(
                f"Found a kernel of shape {self.kernel.shape} and logits of shape {self.f0.shape} "
                f"beside labels of shape {(n, c)}, expected {(n, c, n, c)} and {(n, c)}."
            )
        if not (0 < self.sigma < math.inf and 0 <= self.ridge < math.inf):
            raise InputError(
                f"Found sigma={self.sigma} and ridge={self.ridge}, expected sigma > 0, ridge ≥ 0."
            )

    @property
    def outputs(self) -> Outputs:
        """What softmax sees, or the only output."""
        return choose_outputs(None, self.targets.shape[1])

    @cached_property
    def basis(self) -> Float[np.ndarray, "c c2"]:
        """Those outputs, one a column."""
        c = self.targets.shape[1]
        return contrast_basis(c) if self.outputs is Outputs.contrast else np.eye(c)

    @cached_property
    def seen(self) -> Float[np.ndarray, "n c2 n c2"]:
        """K in these outputs."""
        return combined(self.kernel, self.outputs)

    @cached_property
    def missing(self) -> Float[np.ndarray, " m"]:
        """What is to change, r, in these outputs."""
        flat: Float[np.ndarray, " m"] = ((self.targets - self.f0) @ self.basis).ravel()
        return flat

    @property
    def gram(self) -> Gram:
        """Eigenbasis of K."""
        return self._gram_and_floor[0]

    @cached_property
    def _gram_and_floor(self) -> tuple[Gram, float]:
        # Noise is relative to the norm of all outputs' kernel. Where even a bound of that leaves
        # every eigenvalue above the noise, the norm itself does not matter.
        highest = self.resolution * self.bound
        if math.isfinite(highest):
            gram = decompose(self.seen, np.zeros(self.seen.shape[:2]), 0.0, highest)
            if gram.kept.all():
                return gram, highest
        return project(self.kernel, self.resolution, outputs=self.outputs, centred=False)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Readings of K's eigenvalues, with the ridge ε τ."""
        gram, floor = self._gram_and_floor
        return read(gram, floor=floor, outputs=self.outputs, centred=False, ridge=self.ridge)

    @cached_property
    def left_out(self) -> LeaveOneOut | None:
        """Leave-one-out predictions with the ridge ε τ; None of noise, or if f_0 was fitted."""
        seen = self.spectrum
        hidden = seen.num_unresolved == seen.size or (seen.num_unresolved and seen.sigma == 0)
        if hidden or self.is_f0_fitted:
            return None
        return leave_each_out(
            self.gram, self.targets, f0=self.f0, basis=self.basis, sigma=seen.sigma
        )

    @cached_property
    def energy(self) -> Float[np.ndarray, " m"]:
        """(v_iᵀ r)², in the order of `gram`."""
        coordinates: Float[np.ndarray, " m"] = (self.missing @ self.gram.vectors) ** 2
        return coordinates


@dataclass(frozen=True, slots=True)
class Predictor:
    """A score of a set of layers, and how to read it."""

    score: Callable[[Start], float]
    """NaN where the set has none."""
    expected: Expected
    """Sign of its relation to how well fine-tuning does: accuracy, or minus the train loss."""
    knows_labels: bool = False
    is_monotone: bool = False
    """Whether every layer added makes it better, so that it chooses nothing without a budget."""
    is_submodular: bool = False
    """Whether a layer adds the less, the more are there: greedy choice is then near the best."""

    def goodness(self, start: Start) -> float:
        """The score turned so that larger is better; -inf where there is none."""
        value = float(self.expected.value * self.score(start))
        return -math.inf if math.isnan(value) else value


# ---------------------------------------------------------------- without labels


def trace(start: Start) -> float:
    """Trace, Σ l: the scale of the kernel, and so of the first steps at one learning rate."""
    return float(np.einsum("iaia->", start.seen))


def log_det(start: Start) -> float:
    """Volume, log det(I + K/σ) = Σ log(1 + l/σ).

    Monotone and submodular in the set, as an entropy is: greedy choice under a budget of size
    reaches 1 - 1/e of the best.
    Reference: Nemhauser, Wolsey & Fisher 1978; Krause & Guestrin 2005.

    Args:
        start: the set.

    Returns:
        The logarithm.
    """
    return float(np.log1p(start.spectrum.resolved / start.sigma).sum())


def effective_dimension(start: Start) -> float:
    """Σ l / (l + σ), the degrees of freedom of ridge regression with σ (Zhang 2005)."""
    resolved = start.spectrum.resolved
    return float((resolved / (resolved + start.sigma)).sum())


# ---------------------------------------------------------------- with labels


def alignment(start: Start) -> float:
    """Centred alignment tᵀ HKH t / (||HKH||_F ||Ht||²), t the labels in K's outputs.

    H takes the mean over examples off, output by output, so that neither a direction shared by all
    gradients nor the frequencies of labels count.
    Reference: Cristianini et al. 2001; Cortes, Mohri & Rostamizadeh 2012. With the gradient
    kernel it is the idea of Deshpande et al. 2021 (arXiv:2102.00084).

    Args:
        start: the set.

    Returns:
        From 0 to 1; NaN if nothing is left.
    """
    labels = start.targets @ start.basis
    labels = (labels - labels.mean(axis=0)).ravel()
    kernel = start.seen - start.seen.mean(axis=0, keepdims=True)
    kernel = (kernel - kernel.mean(axis=2, keepdims=True)).reshape(labels.size, labels.size)
    norms = float(np.linalg.norm(kernel)) * float(labels @ labels)
    return float(labels @ kernel @ labels) / norms if norms > 0 else math.nan


def gradient_norm(start: Start) -> float:
    """√(rᵀ K r) = ||Jᵀ r||, the gradient of ½||f - y||² at the start.

    Reference: Lee et al. 2022 (surgical fine-tuning, arXiv:2210.11466), without their division by
    the norm of the parameters, which a kernel does not know.

    Args:
        start: the set.

    Returns:
        The norm.
    """
    m = start.missing.size
    return math.sqrt(max(0.0, float(start.missing @ start.seen.reshape(m, m) @ start.missing)))


def complexity(start: Start) -> float:
    """Complexity rᵀ (K + σI)⁻¹ r of the labels: the linear model's penalised loss over σ.

    Reference: Arora et al. 2019 (arXiv:1901.08584), Theorem 5.1, there with σ = 0 and y for r,
    where it is the squared distance that the parameters go.

    Args:
        start: the set.

    Returns:
        The complexity.
    """
    return float((start.energy / (start.spectrum.resolved + start.sigma)).sum())


def marginal_likelihood(start: Start) -> float:
    """Evidence of a Gaussian process: max over s, ε of log N(r; 0, s(K + ε τ I)), per row.

        s = rᵀ (K + ε τ I)⁻¹ r / m        the best scale, so that scale does not count
        log p = -m/2 (log(2π s) + 1) - ½ log det(K + ε τ I)

    The determinant is the price of a kernel that fits everything. ε runs from the ridge upwards;
    without a ridge it is 0.
    Reference: MacKay 1992; Rasmussen & Williams 2006, equation 5.8.

    Args:
        start: the set.

    Returns:
        The evidence; NaN of singular kernels without a ridge, inf where there is nothing to fit.
    """
    resolved, mean = start.spectrum.resolved, start.spectrum.mean
    m = resolved.size
    ridges = start.ridge * np.geomspace(1.0, 1e5, EVIDENCE_RIDGES)
    shifted = resolved + ridges[:, None] * mean
    if not shifted.min() > 0:
        return math.nan
    scale = (start.energy / shifted).mean(axis=1)
    if not scale.min() > 0:  # nothing to fit
        return math.inf
    evidence = -m / 2 * (np.log(2 * math.pi * scale) + 1) - np.log(shifted).sum(axis=1) / 2
    return float(evidence.max()) / m


def loo_error(start: Start) -> float:
    """Mean of ||e_i||², what example i has left once all others predict it."""
    return math.nan if start.left_out is None else start.left_out.error


def loo_accuracy(start: Start) -> float:
    """Share of examples that all others predict rightly."""
    return math.nan if start.left_out is None else start.left_out.accuracy


# ---------------------------------------------------------------- all of them

_UP, _DOWN = Expected.positive, Expected.negative

PREDICTORS: Mapping[Criterion, Predictor] = {
    # Rahimi Afzal et al. 2025: the smaller, the faster gradient descent and the surer the risk.
    Criterion.condition_number: Predictor(lambda start: start.spectrum.raw, _DOWN),
    Criterion.regularised: Predictor(lambda start: start.spectrum.regularised, _DOWN),
    Criterion.top_over_median: Predictor(lambda start: start.spectrum.median, _DOWN),
    Criterion.amgm_gap: Predictor(lambda start: start.spectrum.amgm_gap, _DOWN),
    Criterion.effective_rank: Predictor(lambda start: start.spectrum.effective_rank, _UP),
    Criterion.trace: Predictor(trace, _UP, is_monotone=True),
    Criterion.log_det: Predictor(log_det, _UP, is_monotone=True, is_submodular=True),
    Criterion.effective_dimension: Predictor(effective_dimension, _UP, is_monotone=True),
    Criterion.alignment: Predictor(alignment, _UP, knows_labels=True),
    Criterion.gradient_norm: Predictor(gradient_norm, _UP, knows_labels=True, is_monotone=True),
    Criterion.complexity: Predictor(complexity, _DOWN, knows_labels=True, is_monotone=True),
    Criterion.marginal_likelihood: Predictor(marginal_likelihood, _UP, knows_labels=True),
    Criterion.loo_error: Predictor(loo_error, _DOWN, knows_labels=True),
    Criterion.loo_accuracy: Predictor(loo_accuracy, _UP, knows_labels=True),
    Criterion.size: Predictor(lambda start: start.size, _UP, is_monotone=True),
    Criterion.num_parameters: Predictor(lambda start: start.num_parameters, _UP, is_monotone=True),
    Criterion.random: Predictor(lambda start: start.draw, _UP),
}
"""By criterion."""
