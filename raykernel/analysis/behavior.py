"""Does fine-tuning behave like kernel regression with the kernel at θ_PT?

Three criteria and their conjunction, as Malladi et al. 2023 draw them in Table 1, one seed at a
time. The definition (3.2) sets no thresholds; the paper chose its own by hand, and they are the
defaults here. A criterion that nothing can decide is undefined, neither met nor missed.

Legend: m rows (test examples), n columns (train examples), c outputs; θ_PT before, θ_FT after
fine-tuning; K_PT and K_FT the kernels there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.special
from jaxtyping import Float, Int

from raykernel.analysis.targets import one_hot
from raykernel.terms import Loss

SOLVES = 0.9
"""Part of fine-tuning's metric that the kernel has to reach (Malladi et al. 2023, Table 1)."""
LINEARIZATION = 0.5
"""Part of fine-tuning's gain that the linearised model has to reach (Table 1)."""
FIXED_FEATURES = 2.0
"""Mean relative distance of the kernels that must not be reached (Table 1)."""
NEAR_ZERO = 0.01
"""Denominators up to this part of K_PT's root mean square count as near zero; ours, the paper says
nothing of them."""
ZERO = 1e-6
"""Denominators up to this part are zero: a float32 sum has no more digits."""

_TIE = 1e-9
# Scores are quotients of small integers that do hit a threshold: rounding must not decide.


@dataclass(frozen=True, slots=True)
class Criterion:
    """A yes, a no, or neither, and why."""

    holds: bool | None
    """None: undefined."""
    reason: str
    """One clause, with the numbers."""

    @property
    def word(self) -> str:
        """As a table says it."""
        return "undefined" if self.holds is None else "yes" if self.holds else "no"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The rows of Table 1 for one seed."""

    solves: Criterion
    linearization: Criterion
    fixed_features: Criterion
    kernel_behavior: Criterion


@dataclass(frozen=True, slots=True)
class KernelDistance:
    """How far fine-tuning moved a kernel, in several ways; NaN where one is undefined."""

    mean_relative: float
    """Mean of |K_FT − K_PT| / |K_PT| over all entries of K_PT that are not zero."""
    mean_apart: float
    """The same mean without the near-zero denominators."""
    median_relative: float
    """Median of what the first mean is of: near-zero denominators do not move it."""
    frobenius: float
    """‖K_FT − K_PT‖ / ‖K_PT‖, Frobenius norms."""
    cka: float
    """Centred kernel alignment, 1 for kernels that are equal up to scale."""
    near_zero_share: float
    """Part of the entries whose denominator is near zero, zeros included."""
    zero_share: float
    """Part of the entries whose denominator is zero: they have no relative distance."""


def solves(kernel: float, finetuned: float, *, fraction: float = SOLVES) -> Criterion:
    """Whether kernel regression solves the task as fine-tuning does: kernel ≥ fraction · finetuned.

    Undefined where fine-tuning's metric is not positive (F1 0, Matthews correlation below 0).
    Reference: Malladi et al. 2023, Table 1.

    Args:
        kernel: test metric of kernel regression.
        finetuned: test metric of the fine-tuned model.
        fraction: the part that counts as solved.

    Returns:
        The criterion.
    """
    if not finetuned > 0:
        return Criterion(None, f"fine-tuning's metric is {finetuned:.3f}, not above 0")
    holds = _at_least(kernel, fraction * finetuned)
    return Criterion(
        holds,
        f"kernel {kernel:.3f} is {kernel / finetuned:.0%} of fine-tuning's {finetuned:.3f} "
        f"({_wanted(f'at least {fraction:.0%}', holds)})",
    )


def linearization(
    pretrained: float, linearized: float, finetuned: float, *, fraction: float = LINEARIZATION
) -> Criterion:
    """Whether the linearised model has a part of fine-tuning's gain.

        linearized − pretrained  ≥  fraction · (finetuned − pretrained)

    of the metrics of f(θ_PT), f(θ_PT) + ⟨∇f(θ_PT), θ_FT − θ_PT⟩ and f(θ_FT). Undefined where
    fine-tuning gains nothing.
    Reference: Malladi et al. 2023, Table 1 and Figure 2.

    Args:
        pretrained: test metric before fine-tuning.
        linearized: test metric of the linearised model.
        finetuned: test metric after fine-tuning.
        fraction: the part that counts.

    Returns:
        The criterion.
    """
    gain, linear = finetuned - pretrained, linearized - pretrained
    if gain <= _TIE:
        return Criterion(
            None, f"fine-tuning does not improve the model ({pretrained:.3f} → {finetuned:.3f})"
        )
    holds = _at_least(linear, fraction * gain)
    return Criterion(
        holds,
        f"linearised gain {linear:+.3f} is {linear / gain:.0%} of fine-tuning's {gain:+.3f} "
        f"({_wanted(f'at least {fraction:.0%}', holds)})",
    )


def fixed_features(distance: KernelDistance, *, threshold: float = FIXED_FEATURES) -> Criterion:
    """Whether the kernel stayed near enough: mean relative distance < threshold.

    Undefined where no relative distance is (K_PT = 0, or NaN).
    Reference: Malladi et al. 2023, Tables 1 and 6.

    Args:
        distance: of the kernels.
        threshold: what counts as moved.

    Returns:
        The criterion.
    """
    mean, apart = distance.mean_relative, distance.mean_apart
    if math.isnan(mean):
        return Criterion(None, "the kernel at the pre-trained weights is zero")
    holds = mean < threshold
    carried = f"; by {apart:.3g} without near-zero entries" if apart < threshold <= mean else ""
    return Criterion(
        holds,
        f"the kernel moved by {mean:.3g} relative to itself "
        f"({_wanted(f'less than {threshold:g}', holds)}{carried})",
    )


def verdict(solved: Criterion, linear: Criterion, fixed: Criterion) -> Verdict:
    """Kernel behaviour: all three criteria.

    Definition 3.2 asks for linearization and fixed features; that the kernel solves the task is
    necessary for them to describe fine-tuning (Malladi et al. 2023, section 6), and Table 1
    counts no seed without it (SNLI). One criterion that is missed decides; else one that is
    undefined leaves the verdict undefined.

    Args:
        solved: of `solves`.
        linear: of `linearization`.
        fixed: of `fixed_features`.

    Returns:
        The criteria and the verdict.
    """
    by_name = {"solves": solved, "linearization": linear, "fixed features": fixed}
    for holds, text in ((False, "missed"), (None, "undefined")):
        if names := [name for name, each in by_name.items() if each.holds is holds]:
            reason = f"{text}: {', '.join(names)}"
            return Verdict(solved, linear, fixed, Criterion(holds, reason))
    return Verdict(solved, linear, fixed, Criterion(True, "all three criteria are met"))


def kernel_distance(
    before: Float[np.ndarray, "m c n c"],
    after: Float[np.ndarray, "m c n c"],
    *,
    near_zero: float = NEAR_ZERO,
    zero: float = ZERO,
) -> KernelDistance:
    """How far a kernel moved.

        mean over (i, a, j, b) of  |K_FT[i, a, j, b] − K_PT[i, a, j, b]| / |K_PT[i, a, j, b]|

    is the paper's number, all pairs of outputs included. A few entries that happen to be near zero
    can carry it (one at 0.001 of the others' size weighs as a thousand of them), so it stands
    beside the same mean without them, the median, and two distances that divide by no entry.
    Entries of K_PT that are zero but for rounding have no relative distance and enter neither
    means nor median: with a linear head whose weights are small, half the entries are, those of
    two different outputs.
    Reference: Malladi et al. 2023, Table 6; which pairs, and what of small denominators, is left
    open there.

    Args:
        before: K_PT.
        after: K_FT of the same pairs.
        near_zero: denominators up to this part of K_PT's root mean square are near zero.
        zero: denominators up to this part are zero.

    Returns:
        The distances.
    """
    old, new = (k.astype(np.float64) for k in (before, after))
    size = np.abs(old)
    scale = math.sqrt(float(np.mean(old**2)))
    defined, small = size > zero * scale, size <= near_zero * scale
    moved = np.abs(new - old)
    relative = moved[defined] / size[defined]
    apart = relative[~small[defined]]
    norm = float(np.linalg.norm(size))
    return KernelDistance(
        mean_relative=_mean(relative),
        mean_apart=_mean(apart),
        median_relative=float(np.median(relative)) if relative.size else math.nan,
        frobenius=float(np.linalg.norm(moved)) / norm if norm else math.nan,
        cka=centred_alignment(old, new),
        near_zero_share=_mean(small),
        zero_share=_mean(~defined),
    )


def centred_alignment(k1: Float[np.ndarray, "m c n c"], k2: Float[np.ndarray, "m c n c"]) -> float:
    """Centred kernel alignment of two kernels of the same pairs.

        CKA = ⟨H K₁ H', H K₂ H'⟩ / (‖H K₁ H'‖ ‖H K₂ H'‖),    H = I − 11ᵀ/(mc), H' = I − 11ᵀ/(nc)

    An (example, output) pair is one sample, as in kernel regression. For kernels of examples with
    themselves this is HSIC(K₁, K₂) / √(HSIC(K₁, K₁) HSIC(K₂, K₂)); H and H' extend it to kernels
    between two sets, with the features of each set centred by their own mean.
    Reference: Cortes, Mohri and Rostamizadeh 2012; Kornblith et al. 2019, equations 3 and 4.

    Args:
        k1: one kernel.
        k2: the other.

    Returns:
        A number from -1 to 1 (from 0 for Gram matrices); NaN if a centred kernel is zero.
    """
    one, two = (_centred(k.reshape(k.shape[0] * k.shape[1], -1)) for k in (k1, k2))
    norms = float(np.linalg.norm(one)) * float(np.linalg.norm(two))
    return float(np.sum(one * two)) / norms if norms else math.nan


def output_derivatives(
    logits: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    loss: Loss = Loss.cross_entropy,
) -> Float[np.ndarray, "n c"]:
    """Output derivatives χ of a loss.

        χ[i, a] = ∂ℓ(f(x_i), y_i) / ∂f_a = softmax(f(x_i))[a] − 1[a = y_i]

    for the cross-entropy, as in the paper, and f_a(x_i) − 1[a = y_i] for the squared loss.

    Their mean absolute value over a data set, examples and outputs alike, is the number of
    Table 8, which shrinks with the width of a model for which a task is natural (Definition 5.3).
    Of two outputs both have the same absolute value, 1 minus the probability of the label; the
    paper's table has two-label tasks only.
    Reference: Malladi et al. 2023, Definition 3.1 and appendix B.1.

    Args:
        logits: of the model.
        labels: right outputs.
        loss: which.

    Returns:
        The derivatives.
    """
    outputs = logits.astype(np.float64)
    if loss is Loss.cross_entropy:
        outputs = scipy.special.softmax(outputs, axis=1)
    found: Float[np.ndarray, "n c"] = outputs - one_hot(labels, logits.shape[1])
    return found


def taylor_error(
    pretrained: Float[np.ndarray, "m c"],
    linearized: Float[np.ndarray, "m c"],
    finetuned: Float[np.ndarray, "m c"],
) -> float:
    """Error of the first-order expansion against the change that it expands.

        ‖f_FT − f_lin‖ / ‖f_FT − f_PT‖

    The two sides of Definition 3.2, compared as outputs rather than as metrics: 0 for a network
    that is linear in its parameters, 1 for a linearised model as far off as no change at all.
    Reference: Malladi et al. 2023, Definition 3.2.

    Args:
        pretrained: outputs at θ_PT.
        linearized: outputs of the linearised model.
        finetuned: outputs at θ_FT.

    Returns:
        The relative error; NaN if no output changed.
    """
    change = float(np.linalg.norm(finetuned - pretrained))
    return float(np.linalg.norm(finetuned - linearized)) / change if change else math.nan


def _at_least(found: float, wanted: float) -> bool:
    return found >= wanted - _TIE


def _wanted(text: str, holds: bool) -> str:
    return text if holds else f"wanted: {text}"


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan


def _centred(matrix: Float[np.ndarray, "p q"]) -> Float[np.ndarray, "p q"]:
    rows = matrix.mean(axis=1, keepdims=True)
    found: Float[np.ndarray, "p q"] = matrix - rows - matrix.mean(axis=0) + matrix.mean()
    return found
