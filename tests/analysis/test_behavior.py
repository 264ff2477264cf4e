"""Kernel behaviour: criteria by hand, distances by their definitions, derivatives by autograd."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from raykernel.analysis.behavior import (
    Criterion,
    KernelDistance,
    centred_alignment,
    fixed_features,
    kernel_distance,
    linearization,
    output_derivatives,
    solves,
    taylor_error,
    verdict,
)
from raykernel.terms import Loss
from raykernel.training.finetune import objective

RNG = np.random.default_rng(0)


def gram(n: int, c: int) -> np.ndarray:
    features = RNG.normal(size=(n * c, 7)) + 1.0
    return (features @ features.T).reshape(n, c, n, c)


def moved(by: float) -> KernelDistance:
    """A kernel whose entries all moved so far."""
    return KernelDistance(by, by, by, by, 1.0, 0.0, 0.0)


# ---------------------------------------------------------------- the criteria


@pytest.mark.parametrize(
    ("kernel", "finetuned", "holds"),
    [
        (0.883, 0.890, True),  # SST-2, 16-shot, SGD (Table 2)
        (0.560, 0.803, False),  # TREC
        (0.81, 0.9, True),  # exactly nine tenths
        (36 / 40, 40 / 40, True),
        (0.7, 7 / 9, True),  # 0.9 · 7/9 is 0.7 but for rounding
        (0.35, 0.4, False),
        (0.5, 0.0, None),  # F1 of a model that finds nothing
        (0.1, -0.2, None),  # Matthews correlation
    ],
)
def test_kernel_solves_at_nine_tenths_of_fine_tuning(
    kernel: float, finetuned: float, holds: bool | None
) -> None:
    assert solves(kernel, finetuned).holds is holds


@pytest.mark.parametrize(
    ("scores", "holds"),
    [
        ((0.790, 0.875, 0.883), True),  # SST-2, 16-shot, Adam (Table 5)
        ((0.274, 0.304, 0.796), False),  # TREC
        ((0.6, 0.7, 0.8), True),  # exactly half
        ((0.6, 0.9, 0.8), True),  # more than fine-tuning
        ((0.8, 0.9, 0.8), None),  # fine-tuning gains nothing
        ((0.8, 0.7, 0.7), None),
        ((0.687, 0.578, 0.840), False),  # AG News: the linearised model loses
    ],
)
def test_linearised_model_has_half_of_the_gain(
    scores: tuple[float, float, float], holds: bool | None
) -> None:
    assert linearization(*scores).holds is holds


def test_features_are_fixed_below_two() -> None:
    found = [fixed_features(moved(by)).holds for by in (0.39, 1.999, 2.0, 9.63, math.nan)]
    assert found == [True, True, False, False, None]


def test_thresholds_are_arguments() -> None:
    assert solves(0.5, 1.0, fraction=0.5).holds
    assert not linearization(0.0, 0.5, 1.0, fraction=0.6).holds
    assert not fixed_features(moved(0.5), threshold=0.5).holds


def test_reasons_name_the_numbers_and_what_was_wanted() -> None:
    assert solves(0.4, 0.8).reason == (
        "kernel 0.400 is 50% of fine-tuning's 0.800 (wanted: at least 90%)"
    )
    assert "does not improve" in linearization(0.8, 0.9, 0.7).reason
    assert "less than 2" in fixed_features(moved(3.0)).reason
    carried = replace(moved(3.0), mean_apart=0.25)
    assert "by 0.25 without near-zero entries" in fixed_features(carried).reason


def test_verdict_is_the_conjunction_and_what_is_missed_decides() -> None:
    """Three-valued: no beats undefined beats yes."""
    values = {True: Criterion(True, ""), False: Criterion(False, ""), None: Criterion(None, "")}
    for a in values:
        for b in values:
            for c in values:
                expected = False if False in (a, b, c) else None if None in (a, b, c) else True
                found = verdict(values[a], values[b], values[c])
                assert found.kernel_behavior.holds is expected
    found = verdict(values[False], values[None], values[False])
    assert found.kernel_behavior.reason == "missed: solves, fixed features"


def test_a_task_that_the_kernel_does_not_solve_shows_no_kernel_behavior() -> None:
    """SNLI, 16-shot, SGD in Table 1: two seeds have the other two properties, none behaves so."""
    found = verdict(
        solves(0.578, 0.657), linearization(0.498, 0.6, 0.657), fixed_features(moved(0.58))
    )
    assert [found.linearization.holds, found.fixed_features.holds] == [True, True]
    assert found.kernel_behavior.holds is False


# ---------------------------------------------------------------- distances of kernels


def test_distances_of_a_kernel_computed_by_hand() -> None:
    before = np.array([[2.0, -1.0], [4.0, 1.0]]).reshape(2, 1, 2, 1)
    after = np.array([[3.0, -1.5], [2.0, 4.0]]).reshape(2, 1, 2, 1)
    found = kernel_distance(before, after)  # relative: 0.5, 0.5, 0.5, 3
    assert found.mean_relative == pytest.approx(4.5 / 4)
    assert found.mean_apart == found.mean_relative
    assert found.median_relative == pytest.approx(0.5)
    assert found.frobenius == pytest.approx(math.sqrt((1 + 0.25 + 4 + 9) / (4 + 1 + 16 + 1)))
    assert (found.near_zero_share, found.zero_share) == (0, 0)


def test_mean_is_over_all_pairs_of_examples_and_outputs() -> None:
    before, after = RNG.normal(size=(2, 4, 3, 5, 3))
    entries = [
        abs(after[i, a, j, b] - before[i, a, j, b]) / abs(before[i, a, j, b])
        for i in range(4)
        for a in range(3)
        for j in range(5)
        for b in range(3)
    ]
    found = kernel_distance(before, after)
    assert found.mean_relative == pytest.approx(sum(entries) / len(entries), rel=1e-12)
    assert found.median_relative == pytest.approx(statistics.median(entries), rel=1e-12)


def test_scaling_a_kernel_moves_it_by_the_factor_and_does_not_turn_it() -> None:
    k = gram(4, 2)
    found = kernel_distance(k, 1.5 * k)
    for distance in (found.mean_relative, found.median_relative, found.frobenius):
        assert distance == pytest.approx(0.5)
    assert found.cka == pytest.approx(1.0)


def test_distances_do_not_depend_on_the_units_of_both_kernels() -> None:
    before, after = gram(4, 2), gram(4, 2)
    one, two = (kernel_distance(s * before, s * after) for s in (1.0, 1e-6))
    for name in ("mean_relative", "mean_apart", "median_relative", "frobenius", "cka"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-9)
    assert one.near_zero_share == two.near_zero_share


def test_float32_blocks_are_compared_in_float64() -> None:
    k = np.full((1, 1, 1, 1), 1e30, np.float32)  # its square is no float32
    assert kernel_distance(k, 2 * k).frobenius == pytest.approx(1.0)


def test_near_zero_denominators_carry_the_mean_and_are_shown_apart() -> None:
    before = np.array([1.0, 1.0, 1.0, 1e-4]).reshape(2, 1, 2, 1)
    after = np.array([1.1, 1.1, 1.1, 1.0]).reshape(2, 1, 2, 1)
    found = kernel_distance(before, after)
    assert found.mean_relative == pytest.approx((3 * 0.1 + 9999) / 4)
    assert found.mean_apart == pytest.approx(0.1)
    assert found.median_relative == pytest.approx(0.1)
    assert (found.near_zero_share, found.zero_share) == (0.25, 0)
    assert kernel_distance(before, after, near_zero=1e-5).near_zero_share == 0


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_entries_that_are_zero_but_for_rounding_have_no_relative_distance(noise: float) -> None:
    before = np.array([1.0, noise, -noise, 2.0]).reshape(1, 2, 1, 2)
    after = np.array([2.0, 0.0, 5.0, 2.0]).reshape(1, 2, 1, 2)
    found = kernel_distance(before, after)
    assert found.mean_relative == pytest.approx(0.5)
    assert (found.near_zero_share, found.zero_share) == (0.5, 0.5)


def test_a_kernel_that_is_zero_leaves_fixed_features_undefined() -> None:
    zero = np.zeros((2, 1, 2, 1))
    found = kernel_distance(zero, zero)
    undefined = (found.mean_relative, found.median_relative, found.frobenius, found.cka)
    assert all(map(math.isnan, undefined))
    assert found.zero_share == 1
    assert fixed_features(found).holds is None


# ---------------------------------------------------------------- alignment


def hsic(k1: np.ndarray, k2: np.ndarray) -> float:
    """tr(K H L H) / (n − 1)² with the centring matrix written out."""
    n = len(k1)
    centring = np.eye(n) - np.ones((n, n)) / n
    return float(np.trace(k1 @ centring @ k2 @ centring)) / (n - 1) ** 2


def test_alignment_is_the_normalised_hsic_of_gram_matrices() -> None:
    k1, k2 = gram(4, 2), gram(4, 2)
    one, two = k1.reshape(8, 8), k2.reshape(8, 8)
    expected = hsic(one, two) / math.sqrt(hsic(one, one) * hsic(two, two))
    assert centred_alignment(k1, k2) == pytest.approx(expected, rel=1e-12)


def test_alignment_of_a_rectangle_is_of_features_centred_by_their_own_means() -> None:
    kernels = []
    centred = []
    for _ in range(2):
        rows, cols = RNG.normal(size=(6, 5)) + 2, RNG.normal(size=(8, 5)) - 1
        kernels.append((rows @ cols.T).reshape(3, 2, 4, 2))
        centred.append((rows - rows.mean(0)) @ (cols - cols.mean(0)).T)
    expected = np.sum(centred[0] * centred[1]) / np.prod([np.linalg.norm(k) for k in centred])
    assert centred_alignment(*kernels) == pytest.approx(expected, rel=1e-12)


def test_alignment_ignores_scale_and_offset() -> None:
    k1, k2 = gram(3, 2), gram(3, 2)
    assert centred_alignment(3 * k1, 0.1 * k2 + 7) == pytest.approx(centred_alignment(k1, k2))
    assert centred_alignment(k1, -k1) == pytest.approx(-1)
    assert math.isnan(centred_alignment(k1, np.ones_like(k1)))


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize("loss", Loss)
def test_output_derivatives_are_those_of_the_loss_that_is_minimised(loss: Loss) -> None:
    logits, labels = RNG.normal(size=(5, 3)), RNG.integers(0, 3, 5)
    outputs = torch.tensor(logits, requires_grad=True)
    value = objective(outputs, torch.tensor(labels), loss, reduction="sum")
    (expected,) = torch.autograd.grad(value, outputs)
    found = output_derivatives(logits, labels, loss)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-12)


def test_two_outputs_have_one_minus_the_probability_of_the_label() -> None:
    logits, labels = np.array([[0.0, math.log(3)], [0.0, 0.0]]), np.array([1, 0])
    found = np.abs(output_derivatives(logits, labels))
    np.testing.assert_allclose(found, [[0.25, 0.25], [0.5, 0.5]])


def test_taylor_error_is_relative_to_the_change() -> None:
    before, after = np.zeros((2, 2)), np.array([[3.0, 0.0], [0.0, 4.0]])
    assert taylor_error(before, after, after) == 0
    assert taylor_error(before, before, after) == 1
    assert taylor_error(before, np.array([[3.0, 0.0], [0.0, 0.0]]), after) == pytest.approx(0.8)
    assert math.isnan(taylor_error(before, before, before))
