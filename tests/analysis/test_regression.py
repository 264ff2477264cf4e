"""Selection on dev, report on test, metrics as scikit-learn defines them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raykernel.analysis.regression import SplitData, judge, score, select
from raykernel.analysis.ridge import one_hot, solve_ridge
from raykernel.errors import InputError
from raykernel.terms import Metric


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
    metric = Metric.accuracy
    selection = select(train, dev, ridge=ridge, f0_scaling=scaling, metric=metric)
    outputs = selection.solution.predict(test.k, test.f0)[0, 0]
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
    assert (result.f0_scaling, result.ridge, result.test_score) == best[1]
    assert result.dev_score == best[0]
    assert result.zero_shot == np.mean(test.f0.argmax(1) == test.labels)


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
