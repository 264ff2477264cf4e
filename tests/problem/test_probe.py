from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV

from raykernel.errors import InputError
from raykernel.problem.probe import fit_head


def sample(counts: list[int], *, d: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    centres = rng.normal(size=(len(counts), d))
    return centres[labels] + rng.normal(size=(len(labels), d)), labels


def reference(folds: int) -> LogisticRegressionCV:
    return LogisticRegressionCV(
        cv=folds,
        max_iter=5000,
        random_state=0,
        l1_ratios=(0,),
        scoring="accuracy",
        use_legacy_attributes=False,
    )


def test_three_labels_equal_scikit_learns_cross_validated_regression() -> None:
    features, labels = sample([8, 9, 10])
    head = fit_head(features, labels, 3)
    expected = reference(5).fit(features, labels)
    np.testing.assert_array_equal(head.weight, expected.coef_.astype(np.float32))
    np.testing.assert_array_equal(head.bias, expected.intercept_.astype(np.float32))
    assert head.weight.dtype == head.bias.dtype == np.float32


def test_two_labels_are_split_so_that_the_difference_of_logits_is_the_binary_model() -> None:
    features, labels = sample([8, 9])
    head = fit_head(features, labels, 2)
    expected = reference(5).fit(features, labels)
    np.testing.assert_array_equal(head.weight[0], -head.weight[1])
    logits = features @ head.weight.T + head.bias
    np.testing.assert_allclose(
        logits[:, 1] - logits[:, 0], expected.decision_function(features), rtol=1e-5, atol=1e-6
    )


def test_folds_are_limited_by_the_rarest_label() -> None:
    features, labels = sample([3, 9, 9])
    expected = reference(3).fit(features, labels)
    np.testing.assert_array_equal(
        fit_head(features, labels, 3).weight, expected.coef_.astype(np.float32)
    )


def test_one_example_of_a_label_fits_without_cross_validation() -> None:
    features, labels = sample([1, 4, 4])
    expected = LogisticRegression(C=1.0, max_iter=5000).fit(features, labels)
    np.testing.assert_array_equal(
        fit_head(features, labels, 3).weight, expected.coef_.astype(np.float32)
    )


def test_float32_features_are_fitted_in_float64_and_repeatably() -> None:
    features, labels = sample([6, 6])
    single = features.astype(np.float32)
    first, second = fit_head(single, labels, 2), fit_head(single.astype(np.float64), labels, 2)
    np.testing.assert_array_equal(first.weight, second.weight)


@pytest.mark.parametrize(("counts", "num_labels"), [([4, 4], 3), ([4, 4, 4], 2), ([5], 1)], ids=str)
def test_a_label_without_examples_is_an_input_error(counts: list[int], num_labels: int) -> None:
    features, labels = sample(counts)
    with pytest.raises(InputError, match="examples by label"):
        fit_head(features, labels, num_labels)


def test_features_that_are_not_finite_are_an_input_error() -> None:
    features, labels = sample([4, 4])
    features[2, 1] = np.nan
    with pytest.raises(InputError, match="NaN"):
        fit_head(features, labels, 2)
