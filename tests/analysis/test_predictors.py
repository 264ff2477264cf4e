"""Predictors of fine-tuning against their definitions, and the signs that they are read with."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from raykernel.analysis.correlation import Expected
from raykernel.analysis.leave_one_out import leave_one_out
from raykernel.analysis.predictors import EVIDENCE_RIDGES, PREDICTORS, Reads
from raykernel.analysis.spectrum import spectrum
from raykernel.analysis.start import Baseline, Start
from raykernel.analysis.targets import one_hot
from raykernel.errors import InputError
from raykernel.terms import Criterion
from tests.analysis.problems import draw


def start_of(c: int = 3, n: int = 6, p: int = 40, seed: int = 0, **changes: object) -> Start:
    drawn = draw(n=n, c=c, p=p, seed=seed)
    start = Start(
        (drawn.k_tt,),
        one_hot(drawn.labels, c),
        drawn.f0,
        sigma=7.0,
        ridge=0.01,
        baseline=Baseline(gradient=4.0, weights=25.0, explained=1.5, importance=0.25),
    )
    return replace(start, **changes)  # type: ignore[arg-type]


def matrix_and_rest(start: Start) -> tuple[np.ndarray, np.ndarray]:
    """K and r in an orthonormal basis of what sums to 0, another one than the code's."""
    n, c = start.targets.shape
    drawn = np.random.default_rng(9).normal(size=(c, c))
    drawn[:, 0] = 1
    basis = np.linalg.qr(drawn)[0][:, 1:] if c > 1 else np.eye(1)
    whole = np.kron(np.eye(n), basis)
    k = whole.T @ start.kernel.reshape(n * c, n * c) @ whole
    return k, whole.T @ (start.targets - start.f0).ravel()


def score(criterion: Criterion, start: Start) -> float:
    return PREDICTORS[criterion].score(start)


OF_WEIGHTS = {criterion for criterion, one in PREDICTORS.items() if one.reads is Reads.weights}


def test_every_criterion_has_a_predictor() -> None:
    assert set(PREDICTORS) == set(Criterion)


@pytest.mark.parametrize("c", [1, 2, 3])
def test_scores_are_their_formulas(c: int) -> None:
    start = start_of(c)
    k, r = matrix_and_rest(start)
    m, eye = len(k), np.eye(len(k))
    values = np.linalg.eigvalsh(k)
    ridge = 0.01 * np.trace(k) / m
    ends = values[-1] + ridge, values[0] + ridge
    p = values / values.sum()
    expected = {
        Criterion.condition_number: np.linalg.cond(k),
        Criterion.regularised: ends[0] / ends[1],
        Criterion.top_over_median: values[-1] / values[m - math.ceil(m / 2)],
        Criterion.amgm_gap: math.log(np.trace(k) / m + ridge)
        - np.linalg.slogdet(k + ridge * eye)[1] / m,
        Criterion.effective_rank: math.exp(-(p * np.log(p)).sum()),
        Criterion.trace: np.trace(k),
        Criterion.log_det: np.linalg.slogdet(eye + k / 7.0)[1],
        Criterion.effective_dimension: np.trace(k @ np.linalg.inv(k + 7.0 * eye)),
        Criterion.gradient_norm: math.sqrt(r @ k @ r),
        Criterion.complexity: r @ np.linalg.solve(k + 7.0 * eye, r),
        Criterion.relative_gradient_norm: 2 / 5,
        Criterion.explained_variance: 1.5,
        Criterion.importance: 0.25,
    }
    for criterion, value in expected.items():
        assert score(criterion, start) == pytest.approx(value, rel=1e-9), criterion


@pytest.mark.parametrize("c", [1, 2, 4])
def test_marginal_likelihood_is_the_best_density_over_scales_and_ridges(c: int) -> None:
    """log N(r; 0, s (K + ε τ I)) by scipy, on a fine grid of s that holds no better one."""
    start = start_of(c)
    k, r = matrix_and_rest(start)
    m = len(k)
    best = -math.inf
    for ridge in 0.01 * np.geomspace(1, 1e5, EVIDENCE_RIDGES):
        shifted = k + ridge * np.trace(k) / m * np.eye(m)
        scale = r @ np.linalg.solve(shifted, r) / m
        densities = [
            multivariate_normal.logpdf(r, cov=scale * factor * shifted)
            for factor in (0.5, 0.99, 1.0, 1.01, 2.0)
        ]
        assert max(densities) == densities[2]
        best = max(best, densities[2])
    assert score(Criterion.marginal_likelihood, start) == pytest.approx(best / m, rel=1e-9)


@pytest.mark.parametrize("c", [1, 2, 3])
def test_alignment_is_that_of_centred_features_with_centred_labels(c: int) -> None:
    """⟨HKH, HttᵀH⟩ / (||HKH||_F ||HttᵀH||_F), H = I - 11ᵀ/n over examples."""
    start = start_of(c)
    k, _ = matrix_and_rest(start)
    _, t = matrix_and_rest(replace(start, f0=np.zeros_like(start.f0)))
    if c == 1:
        t = t + np.arange(6)  # one label is the same for all
        start = replace(start, targets=t[:, None])
    n = len(start.targets)
    h = np.kron(np.eye(n) - 1 / n, np.eye(len(k) // n))
    one, two = h @ k @ h, h @ np.outer(t, t) @ h
    expected = np.sum(one * two) / (np.linalg.norm(one) * np.linalg.norm(two))
    assert score(Criterion.alignment, start) == pytest.approx(expected, rel=1e-9)


def test_a_kernel_of_the_labels_is_aligned_with_them_and_a_shared_gradient_changes_nothing() -> (
    None
):
    start = start_of(2)
    perfect = np.einsum("ia,jb->iajb", start.targets, start.targets)
    assert score(Criterion.alignment, replace(start, kernels=(perfect,))) == pytest.approx(1)
    shared = replace(start, kernels=(perfect, np.eye(2)[None, :, None, :] + 0 * perfect))
    assert score(Criterion.alignment, shared) == pytest.approx(1)
    none = replace(start, targets=np.eye(2)[np.zeros(6, dtype=int)])
    assert math.isnan(score(Criterion.alignment, none))


@pytest.mark.parametrize("c", [1, 2, 3])
def test_left_out_examples_are_those_of_the_set_with_its_own_ridge(c: int) -> None:
    start = start_of(c)
    sigma = spectrum(start.kernel, ridge=0.01).sigma
    found = leave_one_out(start.kernel, start.targets, sigma=sigma, f0=start.f0)
    assert score(Criterion.loo_error, start) == pytest.approx(found.error, rel=1e-9)
    accuracy = score(Criterion.loo_accuracy, start)
    assert accuracy == found.accuracy or (math.isnan(accuracy) and c == 1)


def test_logits_that_know_the_labels_leave_no_example_out() -> None:
    fitted = start_of(2, is_f0_fitted=True)
    assert math.isnan(score(Criterion.loo_error, fitted))
    assert math.isnan(score(Criterion.loo_accuracy, fitted))
    for criterion in set(PREDICTORS) - {Criterion.loo_error, Criterion.loo_accuracy}:
        assert score(criterion, fitted) == score(criterion, start_of(2)), criterion


def test_what_every_added_layer_betters_is_monotone_and_nothing_else() -> None:
    """Over random layers with few features each, every score that says so moves its way."""
    rng = np.random.default_rng(2)
    broken = dict.fromkeys(PREDICTORS, False)
    for seed in range(30):
        start = start_of(2, n=5, seed=seed)
        j = rng.normal(size=(2, 5, 2, 3)) * rng.choice([0.1, 1.0, 5.0], size=(2, 1, 1, 1))
        blocks = np.einsum("liap,ljbp->liajb", j, j)
        before = replace(start, kernels=(*start.kernels, blocks[0]))
        own = Baseline(*rng.uniform(0, 3, 4))
        after = replace(before, kernels=(*before.kernels, blocks[1]), size=2, num_parameters=1)
        assert before.baseline is not None
        after = replace(after, baseline=before.baseline + own)
        for criterion, predictor in PREDICTORS.items():
            if predictor.goodness(after) < predictor.goodness(before) - 1e-9:
                broken[criterion] = True
    monotone = {criterion for criterion, one in PREDICTORS.items() if one.is_monotone}
    assert {criterion for criterion, is_broken in broken.items() if not is_broken} == (
        monotone | {Criterion.random}  # the draw is a field, and did not change
    )


def test_only_log_det_is_submodular_and_it_is() -> None:
    """f(A + C) - f(A) ≥ f(A + B + C) - f(A + B)."""
    assert [c for c, one in PREDICTORS.items() if one.is_submodular] == [Criterion.log_det]
    for seed in range(30):
        a, b, c = (draw(n=4, p=2, seed=3 * seed + i).k_tt for i in range(3))
        start = start_of(2, n=4, seed=seed)

        def value(kernel: np.ndarray, start: Start = start) -> float:
            return score(Criterion.log_det, replace(start, kernels=(kernel,)))

        assert value(a + c) - value(a) >= value(a + b + c) - value(a + b) - 1e-9


def test_scale_does_not_count_where_the_ridge_is_relative() -> None:
    start = start_of(3)
    larger = replace(start, kernels=(100 * start.kernel,))
    same = {
        criterion
        for criterion in PREDICTORS
        if score(criterion, larger) == pytest.approx(score(criterion, start), rel=1e-9)
    }
    moved = {
        Criterion.trace,
        Criterion.log_det,
        Criterion.effective_dimension,
        Criterion.gradient_norm,
        Criterion.complexity,
    }
    assert same == set(PREDICTORS) - moved


def test_labels_enter_where_it_is_said() -> None:
    start = start_of(2)
    other = replace(start, targets=start.targets[:, ::-1].copy())
    moved = {
        criterion
        for criterion in PREDICTORS
        if score(criterion, other) != pytest.approx(score(criterion, start), rel=1e-9)
    }
    knowing = {c for c, one in PREDICTORS.items() if one.knows_labels} - OF_WEIGHTS
    # Alignment is the same for labels exchanged, as tᵀ K t is.
    assert moved == knowing - {Criterion.alignment}


def test_label_aware_predictors_tell_a_kernel_of_the_labels_from_one_of_noise() -> None:
    """Two spectra alike: labels on the top eigenvector, or on the bottom one."""
    n, labels = 8, np.arange(8) % 2
    y = one_hot(labels, 2)
    along = (2 * labels - 1) / math.sqrt(n)
    basis = np.linalg.qr(np.column_stack([along, np.random.default_rng(0).normal(size=(n, 7))]))[0]
    values = np.geomspace(1, 1e-2, n)
    margin = np.array([[1, -1], [-1, 1]]) / 2
    first, last = (
        Start(
            (np.einsum("ij,ab->iajb", basis @ np.diag(order) @ basis.T, margin),),
            y,
            np.zeros((n, 2)),
            sigma=0.1,
        )
        for order in (values, values[::-1])
    )
    for criterion in set(PREDICTORS) - OF_WEIGHTS:
        predictor = PREDICTORS[criterion]
        good, bad = predictor.goodness(first), predictor.goodness(last)
        if predictor.knows_labels:
            assert good > bad, criterion
        else:
            assert good == pytest.approx(bad, rel=1e-9, abs=1e-12), criterion


def test_noise_has_no_number_and_a_bound_of_the_norm_changes_none() -> None:
    start = start_of(2, p=4)  # 12 rows of outputs and 4 features
    blurred = replace(start, resolution=1e-6)
    assert math.isnan(score(Criterion.condition_number, blurred))
    assert PREDICTORS[Criterion.condition_number].goodness(blurred) == -math.inf
    for of in (blurred, start_of(2, resolution=1e-6)):
        norm = np.linalg.norm(of.kernel.reshape(12, 12), 2)
        bounded = replace(of, bound=3 * norm)
        for criterion in PREDICTORS:
            assert score(criterion, bounded) == pytest.approx(score(criterion, of), nan_ok=True)
    dead = replace(start, kernels=(np.zeros_like(start.kernel),), resolution=1e-6)
    assert math.isnan(score(Criterion.loo_error, dead))
    assert math.isnan(score(Criterion.marginal_likelihood, dead))


def test_signs_are_those_of_the_theory() -> None:
    down = {criterion for criterion, one in PREDICTORS.items() if one.expected is Expected.negative}
    assert down == {
        Criterion.condition_number,
        Criterion.regularised,
        Criterion.top_over_median,
        Criterion.amgm_gap,
        Criterion.complexity,
        Criterion.loo_error,
    }


def test_what_was_not_measured_has_no_number() -> None:
    bare = start_of(2, baseline=None)
    for criterion, predictor in PREDICTORS.items():
        assert math.isnan(predictor.score(bare)) == (criterion in OF_WEIGHTS), criterion
    zero = start_of(2, baseline=Baseline(0.0, 0.0, 0.0, 0.0))
    assert math.isnan(score(Criterion.relative_gradient_norm, zero))


@pytest.mark.parametrize(
    "changes", [{"sigma": 0.0}, {"ridge": -1.0}, {"f0": np.zeros((3, 2))}, {"sigma": math.nan}]
)
def test_wrong_input_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match="expected"):
        start_of(2, **changes)
