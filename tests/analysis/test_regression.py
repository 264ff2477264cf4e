"""Selection on dev, report on test, metrics as scikit-learn defines them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raykernel.analysis.regression import SplitData, fits_of, judge, score, select
from raykernel.analysis.ridge import solve_ridge
from raykernel.analysis.targets import one_hot
from raykernel.config import SolverConfig
from raykernel.errors import InputError, RunError
from raykernel.terms import Metric, Solver


def splits(seed: int = 0, n: int = 12, c: int = 2, p: int = 30):
    """A linear problem: labels follow one direction of the gradients."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=p)
    jacobians = rng.normal(size=(3 * n, c, p))
    labels = (jacobians @ theta).argmax(axis=1)
    logits = 0.1 * rng.normal(size=(3 * n, c))
    kernel = np.einsum("iap,jbp->iajb", jacobians, jacobians[:n])
    parts = [slice(0, n), slice(n, 2 * n), slice(2 * n, 3 * n)]
    return [SplitData(k=kernel[s], f0=logits[s], labels=labels[s]) for s in parts]


def test_the_selected_point_is_the_first_best_on_dev_and_its_test_score_is_reported():
    train, dev, test = splits()
    ridge, scaling = [0.0, 1e-2, 1.0], [10.0, math.inf]
    metric, settings = Metric.accuracy, SolverConfig(ridge=ridge, f0_scaling=scaling)
    selection = select(train, dev, settings, solver=Solver.ridge, metric=metric)
    outputs = selection.fit.predict(test.k, test.f0)
    result = judge(selection, outputs, f0=test.f0, labels=test.labels, metric=metric)
    best = (-1.0, None)
    for s in scaling:
        for r in ridge:
            y = one_hot(train.labels, 2)
            one = solve_ridge(train.k, y, ridge=[r], f0=train.f0, f0_scaling=[s])
            dev_score = np.mean(one.predict(dev.k, dev.f0)[0, 0].argmax(1) == dev.labels)
            if dev_score > best[0]:
                test_score = np.mean(one.predict(test.k, test.f0)[0, 0].argmax(1) == test.labels)
                best = (dev_score, (s, r, test_score))
    assert (result.point.f0_scaling, result.point.ridge, result.test_score) == best[1]
    assert result.dev_score == best[0]
    assert result.zero_shot == np.mean(test.f0.argmax(1) == test.labels)


def asymmetric_splits():
    """The same problem with the signs of train's gradients, and the kernel seen from train."""
    rng = np.random.default_rng(1)
    jacobians = rng.normal(size=(36, 2, 30))
    labels = (jacobians @ rng.normal(size=30)).argmax(axis=1)
    signs, logits = np.sign(jacobians), rng.normal(size=(36, 2))
    k = np.einsum("iap,jbp->iajb", jacobians, signs[:12])
    flipped = np.einsum("iap,jbp->iajb", signs, jacobians[:12])
    whole = SplitData(k, logits, labels, flipped)
    return [whole.part(range(at, at + 12)) for at in (0, 12, 24)]


@pytest.mark.parametrize("solver", list(Solver))
def test_every_solver_gives_the_first_best_point_of_its_grid(solver):
    train, dev, _ = asymmetric_splits() if solver is Solver.asymmetric else splits(3)
    settings = SolverConfig(ridge=[0.01, 0.1], gamma=[1e-3, 0.1], c=[1.0, 0.2])
    selection = select(train, dev, settings, solver=solver, metric=Metric.accuracy)
    fits = list(fits_of(train, settings, solver))
    assert len(fits) == selection.num_points == (40 if solver is Solver.asymmetric else 10)
    assert len({fit.point for fit in fits}) == len(fits)
    scores = [
        np.mean(fit.predict(dev.k, dev.f0, dev.k_flipped).argmax(1) == dev.labels) for fit in fits
    ]
    best = fits[int(np.argmax(scores))]
    assert (selection.fit.point, selection.dev_score) == (best.point, max(scores))
    assert selection.fit.point.solver is solver


def test_points_without_a_solution_are_left_out_and_all_of_them_an_error():
    train, dev, _ = asymmetric_splits()
    values = np.linalg.svd(train.k.reshape(24, 24), compute_uv=False)
    singular = [float(1 / values[0]), float(1 / values[5])]

    def chosen(gamma):
        settings = SolverConfig(ridge=[0.0], gamma=gamma, f0_scaling=[10.0, math.inf])
        return select(train, dev, settings, solver=Solver.asymmetric, metric=Metric.accuracy)

    selection = chosen([*singular, 0.5])
    assert selection.fit.point.gamma == 0.5
    assert (len(selection.excluded), selection.num_points) == (4, 6)
    with pytest.raises(RunError, match=r"all 4 grid points .* singular value .*solver\.gamma"):
        chosen(singular)


def test_metrics_by_their_formulas():
    labels = np.array([1, 1, 1, 0, 0, 1])
    predicted = np.array([1, 0, 1, 1, 0, 1])
    outputs = one_hot(predicted, 2)
    tp, tn, fp, fn = 3, 1, 1, 1
    assert score(Metric.accuracy, labels, outputs) == pytest.approx(4 / 6)
    assert score(Metric.f1, labels, outputs) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert score(Metric.matthews, labels, outputs) == pytest.approx(matthews)


def test_f1_of_three_labels_is_refused():
    with pytest.raises(InputError, match="two labels"):
        score(Metric.f1, np.array([0, 1, 2]), np.eye(3))
