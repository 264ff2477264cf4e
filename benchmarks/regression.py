"""W6: kernel regression from texts to predictions, with and without the test kernel.

    h(x) = K(x, train) α,    (K(train, train) + σ I) α = y

With the test kernel every test text costs C backward passes and a contraction with every train
text. The predictor is linear in the parameters, so that α folds back into one direction of them,
and a forward-mode product per batch gives the same h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import reference
from benchmarks.workloads import Batch, Workload, read, roberta
from raykernel.analysis.ridge import solve_ridge
from raykernel.analysis.targets import one_hot
from raykernel.ntk.capture import Capture, Tracer
from raykernel.ntk.contract import gram
from raykernel.ntk.product import tangents, weighted_gradient

NUM_TRAIN, NUM_TEST, NUM_LABELS = 48, 500, 6
RIDGE = 1e-2
BATCH = 32
CHECKED = 8
"""Test texts whose predictions are held against float64."""

TITLE = "kernel regression, RoBERTa d=128, 4 layers, T=16 to 32, C=6, 48 train and 500 test texts"


@dataclass(frozen=True, slots=True, eq=False)
class Regression:
    """Train texts with their labels, and test texts."""

    train: Workload
    test: Workload
    targets: np.ndarray
    """(n, c), one-hot."""


def regression(num_train: int = NUM_TRAIN, num_test: int = NUM_TEST, **sizes: int) -> Regression:
    """Random texts with arbitrary labels: what is measured is time."""
    both = roberta("W6", TITLE, texts=num_train + num_test, outputs=NUM_LABELS, **sizes)
    train, test = both.first(num_train), both.after(num_train)
    labels = np.arange(num_train) % NUM_LABELS
    return Regression(train, test, one_hot(labels, NUM_LABELS))


def with_test_kernel(problem: Regression) -> np.ndarray:
    """Predictions (m, c) from the kernel of test and train texts."""
    tracer = Tracer(problem.train.model, read)
    train = Capture.concatenate([tracer.capture(b) for b in _batches(problem.train)])
    alpha = _solve(_summed(gram(train, train)), problem.targets)
    found = [_summed(gram(tracer.capture(b), train)) for b in _batches(problem.test)]
    k_test_train = np.concatenate(found)
    return np.tensordot(k_test_train, alpha, axes=2)


def without_test_kernel(problem: Regression) -> np.ndarray:
    """The same predictions from α folded into the parameters and one product per batch."""
    model = problem.train.model
    tracer = Tracer(model, read)
    train = Capture.concatenate([tracer.capture(b) for b in _batches(problem.train)])
    alpha = torch.from_numpy(_solve(_summed(gram(train, train)), problem.targets))
    direction = weighted_gradient(model, read, _batches(problem.train), alpha)
    _, predictions = tangents(model, read, _batches(problem.test), direction)
    return predictions.numpy()


WAYS: dict[str, Callable[[Regression], np.ndarray]] = {
    "raykernel, without the test kernel": without_test_kernel,
    "raykernel, with the test kernel": with_test_kernel,
}
"""From texts to predictions, by name."""


def reference_predictions(problem: Regression) -> np.ndarray:
    """Predictions of the first test texts from the float64 loop's kernel."""
    n, c = problem.targets.shape
    both = {
        key: torch.cat([problem.train.batch[key], problem.test.batch[key][:CHECKED]])
        for key in problem.train.batch
    }
    kernel = reference(problem.train.on(both)).numpy()
    alpha = _solve(kernel[: n * c, : n * c].reshape(n, c, n, c), problem.targets)
    return np.tensordot(kernel[n * c :, : n * c].reshape(-1, c, n, c), alpha, axes=2)


def _solve(kernel: np.ndarray, targets: np.ndarray) -> np.ndarray:
    alpha: np.ndarray = solve_ridge(kernel, targets, ridge=[RIDGE]).alpha[0, 0]
    return alpha


def _batches(workload: Workload) -> Iterator[Batch]:
    for start in range(0, workload.num_examples, BATCH):
        yield {key: value[start : start + BATCH] for key, value in workload.batch.items()}


def _summed(blocks: dict[str, Tensor]) -> np.ndarray:
    total: np.ndarray = torch.stack(list(blocks.values())).sum(0).numpy()
    return total
