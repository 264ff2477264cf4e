"""Kernel logistic regression over a whole grid, one convex problem after the other.

Legend: n train examples, c outputs, s scalings of the initial logits, r ridges; λ, V eigenvalues
and eigenvectors of K(train, train), flattened to (nc, nc).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
from jaxtyping import Bool, Float, Int
from scipy.sparse.linalg import LinearOperator, cg
from scipy.special import logsumexp, softmax

from raykernel.analysis.fit import DualSolution, Fit
from raykernel.analysis.gram import Gram, decompose
from raykernel.analysis.targets import scaled_logits
from raykernel.config import GridPoint
from raykernel.errors import InputError
from raykernel.terms import Solver

TOLERANCE = 1e-9
"""Default of the relative gradient norm at a minimum."""

MAX_ITERATIONS = 2000
"""Default of L-BFGS iterations at a grid point; 30 were the most seen at a ridge of 1e-5."""

_MEMORY = 20
"""Pairs of steps and gradient changes that L-BFGS keeps."""

_NEAR = 1e-6
"""Relative gradient norm at which Newton steps take over from L-BFGS: a line search compares
losses, whose rounding hides what is left of the way."""

_NEWTON_STEPS = 8
"""At the most; two were needed where L-BFGS had come so near."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogisticSolution(DualSolution):
    """Kernel logistic regression, with what is needed to trust it."""

    loss: Float[np.ndarray, "s r"]
    """What was minimised, at the minimum."""
    residual: Float[np.ndarray, "s r"]
    """Norm of the gradient with respect to the function, relative to that at α = 0."""
    converged: Bool[np.ndarray, "s r"]
    """Whether the residual is within the tolerance."""
    iterations: Int[np.ndarray, "s r"]
    """Of L-BFGS, from the neighbouring grid point's minimum on, and Newton steps at the end."""
    condition_number: Float[np.ndarray, "s r"]
    """Of the Hessian at the minimum with respect to the function, at the most."""

    def fits(self) -> Iterator[Fit]:
        """Every grid point, scaling before ridge; one that did not converge is excluded."""
        for s, r in np.ndindex(self.alpha.shape[:2]):
            number, residual = int(self.iterations[s, r]), float(self.residual[s, r])
            yield Fit(
                GridPoint(Solver.logistic, self.ridge[r], self.f0_scaling[s]),
                self.alpha[s, r],
                condition_number=float(self.condition_number[s, r]),
                residual=residual,
                iterations=number,
                num_dropped=self.num_dropped,
                excluded=""
                if self.converged[s, r]
                else f"stopped at relative gradient {residual:.1e} after {number} iterations",
            )


def solve_logistic(
    k_train_train: Float[np.ndarray, "n1 c1 n2 c2"],
    targets: Float[np.ndarray, "n c"],
    *,
    ridge: Sequence[float] = (1e-2,),
    f0: Float[np.ndarray, "n c"] | None = None,
    f0_scaling: Sequence[float] = (float("inf"),),
    resolution: float | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> LogisticSolution:
    """Regularised kernel logistic regression for all ridges and scalings.

        α[s, r] = argmin_α  Σ_i CE(softmax h_i, y_i) + σ_r/2 αᵀ K α,
        h = K α + f0 / s,    σ_r = ridge_r · ||K||_op

    The loss is the sum over examples, not their mean, and αᵀ K α the squared norm of the function,
    so that σ means what it means in `solve_ridge`: σ α = y - softmax h here, σ α = y - h there (on
    the range of K). No intercept. At ridge 0 there is no minimum where the outputs can be
    separated, as a kernel of full rank always can, so a ridge must be positive.

    Solved by L-BFGS for w, α = V λ^-½ w, in which the norm is |w|: a tenth or less of the
    iterations that α itself takes. Every point starts from its neighbour's minimum, and a few
    Newton steps by conjugate gradients end it. Cost: one eigendecomposition, O((nc)³), and
    O((nc)²) an iteration. Directions whose eigenvalue is at or below resolution · λ_max are left
    out (minimum norm).
    Reference: Malladi et al. 2023, appendix A.3 (the loss; they state no scale of it).

    Args:
        k_train_train: symmetric positive semidefinite kernel.
        targets: probabilities of the classes, one-hot for labels.
        ridge: relative ridges, each > 0.
        f0: initial logits of the train examples; needed unless every scaling is inf.
        f0_scaling: divisors s of the initial logits, each > 0; 1 is the model itself.
        resolution: relative size of an eigenvalue that is rounding noise; default nc times the
            machine epsilon of the kernel's dtype.
        tolerance: a grid point has converged at this residual.
        max_iterations: of L-BFGS at one grid point.

    Returns:
        Coefficients and diagnostics of every grid point.

    Raises:
        InputError: if targets are no probabilities, a ridge is not positive, shapes disagree, a
            value is not finite, the kernel is zero, or initial logits are missing.
        NotPositiveSemidefiniteError: if the kernel has eigenvalues far below zero.
    """
    n, c = targets.shape
    if c < 2 or (targets < 0).any() or not np.allclose(targets.sum(axis=1), 1):
        raise InputError(
            f"found targets of {c} outputs with rows that sum to {targets.sum(axis=1)[:3]}, "
            "expected probabilities of at least two classes. Give one-hot labels."
        )
    if not all(value > 0 for value in ridge):
        raise InputError(
            f"ridge: found {list(ridge)}, expected values > 0: the logistic loss has no minimum "
            "without one. Take a small one instead of 0, such as 1e-4."
        )
    gram = decompose(k_train_train, targets, resolution)
    if not gram.kept.any():
        raise InputError("found a train kernel that is zero, expected gradients that are not.")
    offsets = np.broadcast_to(scaled_logits(f0, f0_scaling), (len(f0_scaling), n, c))
    # From the largest ridge, whose minimum is nearest zero, to the smallest.
    path = sorted(range(len(ridge)), key=lambda r: -ridge[r])
    solved: dict[tuple[int, int], _Minimum] = {}
    for s, offset in enumerate(offsets):
        for before, r in zip([None, *path], path, strict=False):
            near = solved.get((s - 1, r)) or (None if before is None else solved[s, before])
            solved[s, r] = _minimise(
                _Problem.of(gram, targets, offset, ridge[r] * gram.top),
                None if near is None else near.weights,
                tolerance=tolerance,
                max_iterations=max_iterations,
            )
    shape = (len(f0_scaling), len(ridge))
    found = [solved[at] for at in np.ndindex(shape)]
    kept = gram.eigenvalues[gram.kept]
    dual = np.stack([m.weights for m in found]) / np.sqrt(kept) @ gram.vectors[:, gram.kept].T
    residual = np.array([m.residual for m in found]).reshape(shape)
    return LogisticSolution(
        ridge=tuple(ridge),
        f0_scaling=tuple(f0_scaling),
        alpha=dual.reshape(*shape, n, c),
        loss=np.array([m.loss for m in found]).reshape(shape),
        residual=residual,
        converged=residual <= tolerance,
        iterations=np.array([m.iterations for m in found]).reshape(shape),
        condition_number=np.array([m.condition_number for m in found]).reshape(shape),
        eigenvalues=gram.eigenvalues,
        num_dropped=gram.num_dropped,
    )


@dataclass(frozen=True, slots=True)
class _Problem:
    """One grid point in explicit features φ = V λ^½ of the kept directions: h = φ w + offset."""

    features: Float[np.ndarray, "nc k"]
    """φ."""
    top: float
    """||K||_op."""
    targets: Float[np.ndarray, "n c"]
    offset: Float[np.ndarray, "n c"]
    sigma: float

    @staticmethod
    def of(
        gram: Gram,
        targets: Float[np.ndarray, "n c"],
        offset: Float[np.ndarray, "n c"],
        sigma: float,
    ) -> _Problem:
        features = gram.vectors[:, gram.kept] * np.sqrt(gram.eigenvalues[gram.kept])
        return _Problem(features, gram.top, targets, offset, sigma)

    def logits(self, w: Float[np.ndarray, " k"]) -> Float[np.ndarray, "n c"]:
        """Outputs h at the train examples."""
        fitted: np.ndarray = (self.features @ w).reshape(self.targets.shape) + self.offset
        return fitted

    def loss_and_gradient(
        self, w: Float[np.ndarray, " k"]
    ) -> tuple[float, Float[np.ndarray, " k"]]:
        """What is minimised, and its gradient."""
        h = self.logits(w)
        entropy = (logsumexp(h, axis=1) - (self.targets * h).sum(axis=1)).sum()
        gradient = self.features.T @ (softmax(h, axis=1) - self.targets).ravel() + self.sigma * w
        return float(entropy + self.sigma / 2 * w @ w), gradient

    def curvature(self, w: Float[np.ndarray, " k"]) -> Float[np.ndarray, "n c c"]:
        """W = diag(p) - p pᵀ of each example: the Hessian of its cross-entropy."""
        p = softmax(self.logits(w), axis=1)
        diagonal = np.einsum("ia,ab->iab", p, np.eye(p.shape[1]))
        curvature: np.ndarray = diagonal - np.einsum("ia,ib->iab", p, p)
        return curvature

    def newton_step(
        self, w: Float[np.ndarray, " k"], gradient: Float[np.ndarray, " k"]
    ) -> Float[np.ndarray, " k"]:
        """Hessian⁻¹ gradient, by conjugate gradients."""
        curvature, (n, c) = self.curvature(w), self.targets.shape

        def hessian(v: np.ndarray) -> np.ndarray:
            inner = np.einsum("iab,ib->ia", curvature, (self.features @ v).reshape(n, c))
            product: np.ndarray = self.features.T @ inner.ravel() + self.sigma * v
            return product

        operator = LinearOperator((len(w), len(w)), matvec=hessian, dtype=np.float64)
        step: np.ndarray = cg(operator, gradient, rtol=1e-4)[0]
        return step

    def condition_number(self, w: Float[np.ndarray, " k"]) -> float:
        """Of the Hessian φᵀ W φ + σI with respect to w, at the most."""
        # W is singular, since softmax does not see what all outputs share.
        steepest = float(np.linalg.eigvalsh(self.curvature(w)).max())
        return (steepest * self.top + self.sigma) / self.sigma


@dataclass(frozen=True, slots=True)
class _Minimum:
    weights: Float[np.ndarray, " k"]
    """w."""
    loss: float
    residual: float
    iterations: int
    condition_number: float


def _minimise(
    problem: _Problem,
    start: Float[np.ndarray, " k"] | None,
    *,
    tolerance: float,
    max_iterations: int,
) -> _Minimum:
    zero = np.zeros(problem.features.shape[1])
    steepness = float(np.linalg.norm(problem.loss_and_gradient(zero)[1]))
    found = scipy.optimize.minimize(
        problem.loss_and_gradient,
        zero if start is None else start,
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": max_iterations,
            "maxfun": 10 * max_iterations,
            "maxcor": _MEMORY,
            # Of the largest component, which bounds the norm; the loss itself says less.
            "gtol": max(tolerance, _NEAR) * steepness / np.sqrt(len(zero)),
            "ftol": 0.0,
        },
    )
    w, loss, gradient, iterations = found.x, found.fun, found.jac, int(found.nit)
    # Far from the minimum, where L-BFGS was cut short, a full Newton step may lead anywhere.
    for _ in range(_NEWTON_STEPS if iterations < max_iterations else 0):
        if np.linalg.norm(gradient) <= tolerance * steepness:
            break
        closer = w - problem.newton_step(w, gradient)
        new_loss, new_gradient = problem.loss_and_gradient(closer)
        if np.linalg.norm(new_gradient) >= np.linalg.norm(gradient):
            break
        w, loss, gradient, iterations = closer, new_loss, new_gradient, iterations + 1
    return _Minimum(
        weights=w,
        loss=float(loss),
        residual=float(np.linalg.norm(gradient)) / steepness if steepness else 0.0,
        iterations=iterations,
        condition_number=problem.condition_number(w),
    )
