"""Linear probing: the head from which standard fine-tuning and its kernel start."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Integer

from raykernel.errors import InputError

_FOLDS = 5
_MAX_ITER = 5000


@dataclass(frozen=True, slots=True)
class Head:
    """A linear layer from features to one logit per label."""

    weight: Float32[np.ndarray, "c d"]
    bias: Float32[np.ndarray, " c"]


def fit_head(
    features: Float[np.ndarray, "n d"], labels: Integer[np.ndarray, " n"], num_labels: int
) -> Head:
    """Head of a cross-validated multinomial logistic regression on frozen features.

        minimise  ½·‖W‖² + C · Σ_i cross-entropy(W h_i + b, y_i),  C among 10 from 1e-4 to 1e4

    C is chosen by accuracy in stratified 5-fold cross-validation; with fewer examples of a label
    there are as many folds as examples of the rarest, and with a single one C = 1. With 2 labels
    the one vector w of the binary model becomes the rows -w/2 and +w/2, so that the logits'
    difference is its own. Deterministic; fitted in float64.
    Reference: Malladi et al. 2023 (arXiv:2210.05643), A.3; Kumar et al. 2022 (arXiv:2202.10054).

    Args:
        features: what the head reads, one row per example.
        labels: label indices.
        num_labels: number of logits.

    Returns:
        The head, in float32.

    Raises:
        InputError: if there are not two labels, one has no example, or a feature is not finite.
    """
    counts = np.bincount(labels, minlength=num_labels)
    if num_labels < 2 or len(counts) != num_labels or not counts.all():
        raise InputError(
            f"A linear head needs examples of each of at least two labels; found "
            f"{counts.tolist()} examples by label, expected {num_labels} positive counts. "
            "Check task.label, task.labels and task.k."
        )
    if not np.isfinite(features).all():
        raise InputError(
            "The model's features hold NaN or infinity, expected finite numbers. "
            "Try kernel.precision=float32, or another checkpoint."
        )
    classifier = _classifier(folds=min(_FOLDS, int(counts.min())))
    classifier.fit(np.asarray(features, dtype=np.float64), labels)
    weight, bias = np.asarray(classifier.coef_), np.asarray(classifier.intercept_)
    if num_labels == 2:
        weight, bias = np.vstack([-weight / 2, weight / 2]), np.hstack([-bias / 2, bias / 2])
    return Head(weight.astype(np.float32), bias.astype(np.float32))


def _classifier(folds: int) -> Any:
    """scikit-learn's model with the reference's settings."""
    # It takes a second to import, and no worker needs it.
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.model_selection import StratifiedKFold

    if folds < 2:
        return LogisticRegression(C=1.0, max_iter=_MAX_ITER, random_state=0)
    options: dict[str, Any] = {"scoring": "accuracy", "max_iter": _MAX_ITER, "random_state": 0}
    # scikit-learn 1.8 renamed what says "plain L2 penalty" and warns unless told both of these;
    # before, the one is a warning and the other unknown.
    if "use_legacy_attributes" in inspect.signature(LogisticRegressionCV).parameters:
        options |= {"l1_ratios": (0.0,), "use_legacy_attributes": False}
    return LogisticRegressionCV(cv=StratifiedKFold(folds), **options)
