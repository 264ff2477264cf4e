"""What adding or removing layers does to the condition number of their kernel.

Kernels of disjoint parameters add, K_{S ∪ T} = K_S + K_T, exactly and for every network, because
the gradient is taken at one point. Rahimi Afzal et al. 2025 bound the spectrum when a trainable
layer is added; what can be proved, with A = K_S, B = K_T of m rows, eigenvalues descending, and
u_1, u_m eigenvectors of the largest and the smallest of A:

    l_i(A) + l_m(B) ≤ l_i(A + B) ≤ l_i(A) + l_1(B)                          (Weyl)
    κ(A + B) ≤ (l_1(A) + l_1(B)) / (l_m(A) + l_m(B)) ≤ max{κ(A), κ(B)}      (mediant)
    κ(A + B) ≥ (l_1(A) + u_1ᵀ B u_1) / (l_m(A) + u_mᵀ B u_m)                (Rayleigh)

A, B here are regularised, K + ε (tr K / m) I with a ridge ε relative to the mean eigenvalue: these
add as the kernels do, so that all of the above holds of them. With one fixed σ for every set of
layers the mediant bound is false: diag(1, 0) with σ = 1 has 2, twice that kernel has 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float

from raykernel.analysis.outputs import Outputs, choose_outputs, project, total
from raykernel.analysis.spectrum import RIDGE, Spectrum, read, spectrum
from raykernel.errors import InputError

Range = tuple[float, float]
"""Lower and upper bound."""


@dataclass(frozen=True, slots=True)
class Addition:
    """The condition number of A + B, as A and B alone foretell it, and as it is."""

    before: Spectrum
    """Of A, the layers that there are."""
    added: Spectrum
    """Of B, the layers added."""
    after: Spectrum
    """Of A + B."""
    top: Range
    """Of l_1(A + B), by Weyl, both ways round."""
    bottom: Range
    """Of l_m(A + B), likewise."""
    kappa: Range
    """Of κ(A + B): the better of `bottom`, `top` and Rayleigh below, the mediant above."""
    worst: float
    """max{κ(A), κ(B)}, never below the mediant."""
    is_sufficient: bool
    """κ(B) < κ(A): then κ(A + B) < κ(A)."""
    is_necessary: bool
    """u_mᵀ B u_m / l_m(A) > u_1ᵀ B u_1 / l_1(A): if not, κ(A + B) ≥ κ(A)."""
    slope: float
    """d log κ(A + εB) / dε at 0, of simple extremes: negative where a little of B helps."""

    @property
    def is_improving(self) -> bool:
        """Whether κ(A + B) < κ(A)."""
        return self.after.regularised < self.before.regularised

    @property
    def is_resolved(self) -> bool:
        """Whether rounding noise leaves all three condition numbers known."""
        return all(s.is_ridge_covering for s in (self.before, self.added, self.after))


@dataclass(frozen=True, slots=True)
class Removal:
    """The condition number of A, as A + B and B foretell it, and as it is."""

    before: Spectrum
    """Of A + B, the layers that there are."""
    removed: Spectrum
    """Of B, the layers removed."""
    after: Spectrum
    """Of A."""
    top: Range
    """Of l_1(A): [l_1(A + B) - l_1(B), l_1(A + B) - l_m(B)]."""
    bottom: Range
    """Of l_m(A): [max(0, l_m(A + B) - l_1(B)), l_m(A + B) - l_m(B)]."""
    kappa: Range
    """Of κ(A), from both; the upper end is inf where B may have been all that kept l_m up."""


def adding(
    kernel: Float[np.ndarray, "n1 c1 n2 c2"] | Sequence[Float[np.ndarray, "n1 c1 n2 c2"]],
    added: Float[np.ndarray, "n3 c3 n4 c4"] | Sequence[Float[np.ndarray, "n3 c3 n4 c4"]],
    *,
    outputs: Outputs | None = None,
    centred: bool = False,
    ridge: float = RIDGE,
    resolution: float | None = None,
) -> Addition:
    """What adding layers does to the condition number.

    Args:
        kernel: of the layers that there are, or several to sum.
        added: of the layers to add; no parameter is in both.
        outputs: see `spectrum`, as are the others.
        centred: whether to take the mean over examples off.
        ridge: relative to the mean eigenvalue.
        resolution: relative size of an eigenvalue that is rounding noise.

    Returns:
        Bounds, tests and the exact values.

    Raises:
        InputError: see `spectrum`; also if the shapes of the two differ.
    """
    one, two, noise_a, noise_b = _pair(kernel, added, resolution)
    chosen = choose_outputs(outputs, one.shape[1])
    gram_a, floor_a = project(one, noise_a, outputs=chosen, centred=centred)
    a = read(
        gram_a.eigenvalues, gram_a.kept, floor=floor_a, outputs=chosen, centred=centred, ridge=ridge
    )
    gram_b, floor_b = project(two, noise_b, outputs=chosen, centred=centred)
    b = read(
        gram_b.eigenvalues, gram_b.kept, floor=floor_b, outputs=chosen, centred=centred, ridge=ridge
    )
    after = spectrum(
        one + two,
        outputs=chosen,
        centred=centred,
        ridge=ridge,
        resolution=max(noise_a, noise_b),
    )
    # u ᵀ B u of the ends u of A, with B in its eigenbasis.
    seen = (gram_b.vectors.T @ gram_a.vectors[:, [0, -1]]) ** 2
    at_bottom, at_top = (b.resolved @ seen + b.sigma).tolist()
    (top_a, bottom_a), (top_b, bottom_b) = _ends(a), _ends(b)
    top = (max(top_a + bottom_b, top_b + bottom_a), top_a + top_b)
    bottom = (bottom_a + bottom_b, min(bottom_a + top_b, bottom_b + top_a))
    rayleigh = _over(top_a + at_top, bottom_a + at_bottom)
    return Addition(
        before=a,
        added=b,
        after=after,
        top=top,
        bottom=bottom,
        kappa=(max(1.0, _over(top[0], bottom[1]), rayleigh), _over(top[1], bottom[0])),
        worst=max(_over(top_a, bottom_a), _over(top_b, bottom_b)),
        is_sufficient=top_b * bottom_a < top_a * bottom_b,
        is_necessary=at_bottom * top_a > at_top * bottom_a,
        slope=at_top / top_a - at_bottom / bottom_a if bottom_a > 0 else math.nan,
    )


def removing(
    kernel: Float[np.ndarray, "n1 c1 n2 c2"] | Sequence[Float[np.ndarray, "n1 c1 n2 c2"]],
    removed: Float[np.ndarray, "n3 c3 n4 c4"] | Sequence[Float[np.ndarray, "n3 c3 n4 c4"]],
    *,
    outputs: Outputs | None = None,
    centred: bool = False,
    ridge: float = RIDGE,
    resolution: float | None = None,
) -> Removal:
    """What removing layers does to the condition number.

    Args:
        kernel: of all layers that there are, or several to sum.
        removed: of those to remove, a part of `kernel`.
        outputs: see `spectrum`, as are the others.
        centred: whether to take the mean over examples off.
        ridge: relative to the mean eigenvalue.
        resolution: relative size of an eigenvalue that is rounding noise.

    Returns:
        Bounds and the exact values.

    Raises:
        InputError: see `spectrum`; also if the shapes of the two differ.
        NotPositiveSemidefiniteError: if what remains is no kernel: `removed` was no part of it.
    """
    whole, part, noise_a, noise_b = _pair(kernel, removed, resolution)
    relative = max(noise_a, noise_b)
    alike = partial(spectrum, outputs=outputs, centred=centred, ridge=ridge, resolution=relative)
    before, gone = alike(whole), alike(part)
    after = alike(whole - part, floor=before.floor)  # a difference has the noise of the whole
    (top, bottom), (top_b, bottom_b) = _ends(before), _ends(gone)
    tops = (max(0.0, top - top_b), top - bottom_b)
    bottoms = (max(0.0, bottom - top_b), bottom - bottom_b)
    lowest = max(1.0, _over(tops[0], bottoms[1]))
    return Removal(before, gone, after, tops, bottoms, (lowest, _over(tops[1], bottoms[0])))


def _pair(
    kernel: Float[np.ndarray, "n1 c1 n2 c2"] | Sequence[Float[np.ndarray, "n1 c1 n2 c2"]],
    other: Float[np.ndarray, "n3 c3 n4 c4"] | Sequence[Float[np.ndarray, "n3 c3 n4 c4"]],
    resolution: float | None,
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Two sums of kernels of one shape, and their resolutions."""
    (one, noise_a), (two, noise_b) = total(kernel, resolution), total(other, resolution)
    if one.shape != two.shape:
        raise InputError(
            f"Found kernels of shapes {one.shape} and {two.shape}, expected the same examples and "
            "outputs."
        )
    return one, two, noise_a, noise_b


def _ends(found: Spectrum) -> tuple[float, float]:
    """Largest and smallest eigenvalue, regularised; noise counts as 0."""
    return found.top + found.sigma, float(found.resolved[0]) + found.sigma


def _over(top: float, bottom: float) -> float:
    """A condition number; inf of a singular matrix."""
    return top / bottom if bottom > 0 else math.inf
