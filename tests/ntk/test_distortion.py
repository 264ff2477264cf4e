"""The bounds are those of the theorems, and random projections keep to them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raykernel.errors import InputError
from raykernel.ntk.distortion import (
    dimension_needed,
    error_bound,
    failure_bound,
    lora_error_bound,
    lora_rank_needed,
    projection_error,
)


def failure_probability(error, k, num_rows):
    """The right-hand side of Theorem D.2."""
    return 4 * num_rows**2 * math.exp(-(error**2 - error**3) * k / 4)


failures = st.floats(1e-6, 0.5)
counts = st.integers(1, 10**6)


@given(error=st.floats(0.01, 0.66), failure=failures, num_rows=counts)
def test_needed_dimension_is_the_least_that_the_theorem_allows(error, failure, num_rows):
    k = dimension_needed(error, failure=failure, num_rows=num_rows)
    assert failure_probability(error, k, num_rows) <= failure * (1 + 1e-9)
    assert failure_probability(error, k - 1, num_rows) > failure * (1 - 1e-9)


@given(k=st.integers(1, 10**7), failure=failures, num_rows=counts)
def test_error_is_where_the_theorem_reaches_the_failure_probability(k, failure, num_rows):
    error = error_bound(k, failure=failure, num_rows=num_rows)
    if error == math.inf:
        assert failure_probability(2 / 3, k, num_rows) > failure * (1 - 1e-9)
    else:
        assert 0 < error <= 2 / 3 + 1e-6
        exponent = math.log(failure_probability(error, k, num_rows) / failure)
        assert abs(exponent) < 1e-6 * math.log(4 * num_rows**2 / failure)


@given(error=st.floats(0.01, 3.0), k=st.integers(1, 10**5), num_rows=counts)
def test_failure_bound_is_the_theorems_and_never_rises_with_the_error(error, k, num_rows):
    found = failure_bound(error, dimension=k, num_rows=num_rows)
    assert found == pytest.approx(failure_probability(min(error, 2 / 3), k, num_rows))
    assert failure_bound(1.1 * error, dimension=k, num_rows=num_rows) <= found * (1 + 1e-9)


def test_large_errors_need_no_more_than_smaller_ones():
    needed = [dimension_needed(e, failure=0.05, num_rows=100) for e in (0.1, 0.5, 2 / 3, 0.9, 3.0)]
    assert needed == sorted(needed, reverse=True)
    assert needed[2] == needed[3] == needed[4]


def test_a_layer_of_lora_is_the_same_with_the_square_of_the_bound():
    """Theorem D.5: c² ε in place of c ε."""
    options = {"failure": 0.1, "num_rows": 50}
    assert lora_rank_needed(0.2, **options) == dimension_needed(0.2, **options)
    assert lora_rank_needed(0.2 * 3**2, bound=3.0, **options) == dimension_needed(0.2, **options)
    assert lora_error_bound(5000, bound=3.0, **options) == pytest.approx(
        9 * error_bound(5000, **options)
    )


def test_layers_of_lora_are_those_of_the_remark():
    """Remark D.6: L c² ε, with the exponent times L."""
    error, bound, layers, rows = 1.5, 1.2, 4, 30
    eps = error / (layers * bound**2)
    k = lora_rank_needed(error, failure=0.05, num_rows=rows, bound=bound, num_layers=layers)
    assert failure_probability(eps, layers * k, rows) <= 0.05
    assert failure_probability(eps, layers * (k - 1), rows) > 0.05
    again = lora_error_bound(k, failure=0.05, num_rows=rows, bound=bound, num_layers=layers)
    assert again <= error


def test_the_rank_of_the_remark_has_the_failure_probability_that_is_said():
    """k = 20 c⁴ log N / ε² fails with 4 N^(5 ε / c² - 3)."""
    rows, eps, c = 64, 0.3, 1.5
    k = 20 * c**4 * math.log(rows) / eps**2
    ours = failure_probability(eps / c**2, k, rows)
    assert ours == pytest.approx(4 * rows ** (5 * eps / c**2 - 3))
    needed = lora_rank_needed(eps, failure=ours, num_rows=rows, bound=c)
    assert needed == math.ceil(k - 1e-6)


def lora_kernels(rank, seed):
    """Lemma D.4: (dH dHᵀ) ∘ (X Aᵀ A Xᵀ) and (dH dHᵀ) ∘ (X Xᵀ), all rows of length one."""
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((12, 30), (12, 8))]
    x, dh = (matrix / matrix.norm(dim=1, keepdim=True) for matrix in normal)
    a = torch.randn(rank, 30, generator=generator, dtype=torch.float64) / rank**0.5
    return (dh @ dh.T) * (x @ a.T @ a @ x.T), (dh @ dh.T) * (x @ x.T)


def test_lora_kernels_keep_to_the_bound():
    rank = lora_rank_needed(0.6, failure=0.1, num_rows=12)
    allowed = lora_error_bound(rank, failure=0.1, num_rows=12)
    errors = [
        float((lora - exact).abs().max())
        for lora, exact in (lora_kernels(rank, seed) for seed in range(100))
    ]
    assert sum(error >= allowed for error in errors) <= 10


def test_projection_error_is_the_largest_relative_to_the_lengths():
    g = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    exact = (g @ g.T).view(3, 1, 3, 1)
    projected = exact.clone()
    projected[0, 0, 1, 0] += 0.6
    assert projection_error(exact, exact) == 0.0
    assert projection_error(exact, projected) == pytest.approx(0.1)
    assert projection_error(0 * exact, 0 * exact) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dimension_needed(0.0, failure=0.1, num_rows=3), "error"),
        (lambda: dimension_needed(0.1, failure=1.0, num_rows=3), "failure"),
        (lambda: error_bound(0, failure=0.1, num_rows=3), "dimension"),
        (lambda: error_bound(9, failure=0.1, num_rows=0), "num_rows"),
        (lambda: failure_bound(0.0, dimension=3, num_rows=3), "error"),
        (lambda: lora_rank_needed(0.1, failure=0.1, num_rows=3, bound=-1.0), "bound"),
        (lambda: lora_error_bound(0, failure=0.1, num_rows=3), "rank"),
        (lambda: lora_error_bound(9, failure=0.1, num_rows=3, num_layers=0), "num_layers"),
    ],
)
def test_impossible_numbers_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
