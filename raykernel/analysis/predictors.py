"""What foretells, before any training, how well a choice of layers fine-tunes.

Every predictor is a number of a set of layers' kernel at the start, beside the labels or without
them, and comes with the sign that theory gives it. None is a law: `size`, `num_parameters` and
`random` are among them as controls, which a predictor has to beat.

Legend: K the kernel of n train examples in the outputs that softmax sees, m = n(c - 1) rows (of a
single output m = n), l_1 ≥ … ≥ l_m its eigenvalues, τ their mean; r = y - f_0 what the outputs have
to change, one-hot labels less initial logits; v_iᵀ r its coordinate along eigenvector i.

Three are what people choose layers by today, `relative_gradient_norm`, `explained_variance` and
`importance`: they are of a set's weights and their inputs, not of its kernel, and are there where
a model was at hand to measure them on.

Two ridges. ε τ is relative to each set's own kernel, so that readings with it do not depend on
scale; σ is one for all sets, so that those with it (`is_monotone`) move one way with every layer
added. Eigenvalues that are rounding noise count as 0, and a number that they make is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from raykernel.analysis.correlation import Expected
from raykernel.analysis.start import Start
from raykernel.terms import Criterion

EVIDENCE_RIDGES = 11
"""Ridges over which the marginal likelihood is maximised, from ε to 10⁵ ε."""


class Reads(Enum):
    """What of a set a score is made of: a search finds that of many sets at once."""

    counts = 0
    """Nothing of its kernel: sizes and draws."""
    weights = 1
    """Nothing of its kernel: what was measured of its weights."""
    entries = 2
    """The kernel's entries."""
    eigenvalues = 3
    eigenvectors = 4

    @property
    def is_of_kernel(self) -> bool:
        """Whether another sample of examples is another score."""
        return self.value >= Reads.entries.value


@dataclass(frozen=True, slots=True)
class Predictor:
    """A score of a set of layers, and how to read it."""

    score: Callable[[Start], float]
    """NaN where the set has none."""
    expected: Expected
    """Sign of its relation to how well fine-tuning does: accuracy, or minus the train loss."""
    reads: Reads
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

    Monotone and submodular in the set. With M = σI + K_S, layer l adds

        log det(M + K_l) - log det M = log det(I + K_l^½ M⁻¹ K_l^½) ≥ 0,

    and more layers in S make M larger, M⁻¹ smaller (the inverse reverses the Loewner order), and so
    the logarithm smaller. It is 0 of the empty set. Hence greedy choice reaches 1 - 1/e of the best
    set of a given size; of a budget of parameters that is not known. Without σ, log det K_S is
    neither bounded below nor monotone.
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


# ---------------------------------------------------------------- of weights and their inputs


def relative_gradient_norm(start: Start) -> float:
    """Auto-RGN ‖g‖ / ‖W‖, of all weight matrices of the set as one vector.

    g is the gradient of the mean cross-entropy over train. The ratio of a union lies between those
    of its parts.
    Reference: Lee et al. 2023 (surgical fine-tuning, arXiv:2210.11466), Auto-RGN.

    Args:
        start: the set.

    Returns:
        The ratio; NaN where it was not measured.
    """
    found = start.baseline
    if found is None or not found.weights > 0:
        return math.nan
    return math.sqrt(found.gradient / found.weights)


def explained_variance(start: Start) -> float:
    """Share of variance that the first r directions of a module's inputs explain, over modules.

    Reference: Paischer et al. 2024 (EVA, arXiv:2410.07170), which gives ranks to the modules and
    directions of the largest shares.

    Args:
        start: the set.

    Returns:
        The sum; NaN where it was not measured.
    """
    return math.nan if start.baseline is None else start.baseline.explained


def importance(start: Start) -> float:
    """AdaLoRA's importance of weights, the mean of a module, summed over modules.

    Reference: Zhang et al. 2023 (AdaLoRA, arXiv:2303.10512), equations 8 to 11; of W, as a LoRA's
    own sensitivities vanish where B = 0, and before training, see `compute.baselines`.

    Args:
        start: the set.

    Returns:
        The sum; NaN where it was not measured.
    """
    return math.nan if start.baseline is None else start.baseline.importance


# ---------------------------------------------------------------- all of them

_UP, _DOWN = Expected.positive, Expected.negative
_ENTRIES, _VALUES, _VECTORS = Reads.entries, Reads.eigenvalues, Reads.eigenvectors

PREDICTORS: Mapping[Criterion, Predictor] = {
    # Rahimi Afzal et al. 2025: the smaller, the faster gradient descent and the surer the risk.
    Criterion.condition_number: Predictor(lambda start: start.spectrum.raw, _DOWN, _VALUES),
    Criterion.regularised: Predictor(lambda start: start.spectrum.regularised, _DOWN, _VALUES),
    Criterion.top_over_median: Predictor(lambda start: start.spectrum.median, _DOWN, _VALUES),
    Criterion.amgm_gap: Predictor(lambda start: start.spectrum.amgm_gap, _DOWN, _VALUES),
    Criterion.effective_rank: Predictor(lambda start: start.spectrum.effective_rank, _UP, _VALUES),
    Criterion.trace: Predictor(trace, _UP, _ENTRIES, is_monotone=True),
    Criterion.log_det: Predictor(log_det, _UP, _VALUES, is_monotone=True, is_submodular=True),
    Criterion.effective_dimension: Predictor(effective_dimension, _UP, _VALUES, is_monotone=True),
    Criterion.alignment: Predictor(alignment, _UP, _ENTRIES, knows_labels=True),
    Criterion.gradient_norm: Predictor(
        gradient_norm, _UP, _ENTRIES, knows_labels=True, is_monotone=True
    ),
    Criterion.complexity: Predictor(
        complexity, _DOWN, _VECTORS, knows_labels=True, is_monotone=True
    ),
    Criterion.marginal_likelihood: Predictor(marginal_likelihood, _UP, _VECTORS, knows_labels=True),
    Criterion.loo_error: Predictor(loo_error, _DOWN, _VECTORS, knows_labels=True),
    Criterion.loo_accuracy: Predictor(loo_accuracy, _UP, _VECTORS, knows_labels=True),
    Criterion.relative_gradient_norm: Predictor(
        relative_gradient_norm, _UP, Reads.weights, knows_labels=True
    ),
    Criterion.explained_variance: Predictor(
        explained_variance, _UP, Reads.weights, is_monotone=True
    ),
    Criterion.importance: Predictor(
        importance, _UP, Reads.weights, knows_labels=True, is_monotone=True
    ),
    Criterion.size: Predictor(lambda start: start.size, _UP, Reads.counts, is_monotone=True),
    Criterion.num_parameters: Predictor(
        lambda start: start.num_parameters, _UP, Reads.counts, is_monotone=True
    ),
    Criterion.random: Predictor(lambda start: start.draw, _UP, Reads.counts),
}
"""By criterion."""
