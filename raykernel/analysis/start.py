"""A set of layers before training: the kernel that predictors read, and what it has to fit.

Legend: K = Σ_{l ∈ S} K_l the kernel of n train examples in the outputs that softmax sees, of
m = n(c - 1) rows (of a single output m = n); r = y - f_0 what the outputs have to change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float

from raykernel.analysis.gram import Gram, check_semidefinite, decompose, excused_noise
from raykernel.analysis.leave_one_out import LeaveOneOut, leave_each_out
from raykernel.analysis.outputs import Outputs, choose_outputs, combined, contrast_basis, noise_end
from raykernel.analysis.spectrum import RIDGE, Spectrum, read
from raykernel.errors import InputError


@dataclass(frozen=True, slots=True)
class Baseline:
    """What is measured of the weights W of a set's modules instead of its kernel.

    All four are sums over modules, so that disjoint sets add.
    """

    gradient: float
    """‖g‖², g the gradient of the mean cross-entropy over train."""
    weights: float
    """‖W‖²."""
    explained: float
    """Share of the variance of a module's inputs that their first r directions explain."""
    importance: float
    """Mean over a module's weights of their sensitivity times its uncertainty."""

    def __add__(self, other: Baseline) -> Baseline:
        return Baseline(
            self.gradient + other.gradient,
            self.weights + other.weights,
            self.explained + other.explained,
            self.importance + other.importance,
        )


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of K already: a search finds it of many sets at once."""

    seen: Float[np.ndarray, "m m"]
    """K."""
    eigenvalues: Float[np.ndarray, " m"] | None = None
    """Ascending."""
    vectors: Float[np.ndarray, "m m"] | None = None
    """Its eigenvectors, one a column."""


@dataclass(frozen=True)
class Start:
    """A set of layers before training: its kernel, and what that has to fit."""

    kernels: tuple[Float[np.ndarray, "n1 c1 n2 c2"], ...]
    """K_l(train, train) of all outputs, symmetric, in float64; at least one."""
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
    baseline: Baseline | None = None
    """Of its weights, where they were measured."""
    known: Known | None = None

    def __post_init__(self) -> None:
        n, c = self.targets.shape
        wrong = [kernel.shape for kernel in self.kernels if kernel.shape != (n, c, n, c)]
        if wrong or self.f0.shape != (n, c):
            raise InputError(
                f"Found a kernel of shape {(wrong or [(n, c, n, c)])[0]} and logits of shape "
                f"{self.f0.shape} beside labels of shape {(n, c)}, expected {(n, c, n, c)} and "
                f"{(n, c)}."
            )
        if not (0 < self.sigma < math.inf and 0 <= self.ridge < math.inf):
            raise InputError(
                f"Found sigma={self.sigma} and ridge={self.ridge}, expected sigma > 0, ridge ≥ 0."
            )

    @cached_property
    def kernel(self) -> Float[np.ndarray, "n c n c"]:
        """Their sum."""
        whole: np.ndarray = self.kernels[0].copy()
        for kernel in self.kernels[1:]:
            whole += kernel
        return whole

    @property
    def outputs(self) -> Outputs:
        """What softmax sees, or the only output."""
        return choose_outputs(None, self.targets.shape[1])

    @cached_property
    def basis(self) -> Float[np.ndarray, "c c2"]:
        """Those outputs, one a column."""
        return seen_basis(self.targets.shape[1])

    @cached_property
    def seen(self) -> Float[np.ndarray, "n c2 n c2"]:
        """K in these outputs."""
        if self.known is None:
            return combined(self.kernel, self.outputs)
        n, c2 = len(self.targets), self.basis.shape[1]
        return self.known.seen.reshape(n, c2, n, c2)

    @cached_property
    def missing(self) -> Float[np.ndarray, " m"]:
        """What is to change, r, in these outputs."""
        flat: Float[np.ndarray, " m"] = ((self.targets - self.f0) @ self.basis).ravel()
        return flat

    @cached_property
    def gram(self) -> Gram:
        """Eigenbasis of K."""
        known = self.known
        if known is None or known.eigenvalues is None or known.vectors is None:
            found = decompose(self.seen, np.zeros(self.seen.shape[:2]), 0.0, self._floor)
            return Gram(found.eigenvalues, found.vectors, found.eigenvalues > self._floor)
        return Gram(known.eigenvalues, known.vectors, self._kept)

    @cached_property
    def _eigenvalues(self) -> Float[np.ndarray, " m"]:
        if self.known is not None and self.known.eigenvalues is not None:
            return self.known.eigenvalues
        m = self.missing.size
        values: Float[np.ndarray, " m"] = np.linalg.eigvalsh(self.seen.reshape(m, m))
        return values

    @cached_property
    def _floor(self) -> float:
        """How far noise reaches."""
        # Noise is relative to the norm of all outputs' kernel. Where even a bound of that leaves
        # every eigenvalue above the noise, the norm itself does not matter.
        highest = self.resolution * self.bound
        if not (math.isfinite(highest) and self._eigenvalues[0] > highest):
            side = self.targets.size
            norm = float(np.linalg.eigvalsh(self.kernel.reshape(side, side))[-1])
            check_semidefinite(
                self._eigenvalues, excused_noise(self.kernel, self.resolution) * norm
            )
            highest = noise_end(self._eigenvalues, self.resolution, self.resolution * norm)
        return highest

    @property
    def _kept(self) -> Bool[np.ndarray, " m"]:
        kept: Bool[np.ndarray, " m"] = self._eigenvalues > self._floor
        return kept

    @cached_property
    def spectrum(self) -> Spectrum:
        """Readings of K's eigenvalues, with the ridge ε τ."""
        return read(
            self._eigenvalues,
            self._kept,
            floor=self._floor,
            outputs=self.outputs,
            centred=False,
            ridge=self.ridge,
        )

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


def seen_basis(c: int) -> Float[np.ndarray, "c c2"]:
    """Outputs that softmax sees, one a column; of a single output itself."""
    return contrast_basis(c) if choose_outputs(None, c) is Outputs.contrast else np.eye(c)
