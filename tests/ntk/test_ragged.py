"""Examples of different lengths: what is left out is zero, and everything stays in its place."""

import pytest
import torch

from raykernel.ntk.factors import Product, compress, examples, join_examples
from raykernel.ntk.pairs import direct, factored, formed
from raykernel.ntk.ragged import by_length
from tests.parts import normal

LENGTHS = (3, 7, 1, 5, 7, 2, 7, 4, 1, 6, 6, 3)


def ragged(lengths=LENGTHS, *, t=7, width=384, seed=0, left=False):
    """A product whose tokens from `lengths` on (or before, padded on the left) are padding."""
    inputs = normal(len(lengths), t, width, seed=seed)
    gradients = normal(len(lengths), 2, t, width + 1, seed=seed + 1)
    for own, length in zip(gradients, lengths, strict=True):
        own[:, slice(t - length) if left else slice(length, t)] = 0
    return Product(inputs, gradients, None, False)


def definition(left, right):
    """⟨Σ_t b_t ⊗ a_t, Σ_u b_u ⊗ a_u⟩, with all tokens."""
    g, h = (
        torch.einsum("ncto,nti->ncoi", p.gradients, p.inputs).flatten(2).flatten(0, 1)
        for p in (left, right)
    )
    return g @ h.mT


@pytest.mark.parametrize("left", [False, True], ids=["right padding", "left padding"])
@pytest.mark.parametrize("way", [formed, factored, direct])
def test_every_way_gives_the_kernel_of_all_tokens(way, left):
    rows, cols = ragged(left=left), ragged(LENGTHS[:5], left=left, seed=2)
    (a, _), (b, _) = compress(rows), compress(cols)
    assert a.counts == LENGTHS
    for own, other, whole in ((a, b, definition(rows, cols)), (a, a, definition(rows, rows))):
        found = way(own, other, max_bytes=1 << 20)
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-10)


def test_runs_are_no_longer_than_their_longest_example():
    part, _ = compress(ragged(tuple(range(1, 33)), t=32))
    found = by_length(part)
    assert [(run.start, run.stop, run.num_tokens) for run in found.runs] == [
        (0, 8, 32),
        (8, 16, 24),
        (16, 24, 16),
        (24, 32, 8),
    ]
    assert found.order.tolist() == list(range(31, -1, -1))
    fixed = by_length(part, size=20)
    assert [(run.start, run.stop, run.num_tokens) for run in fixed.runs] == [
        (0, 20, 32),
        (20, 32, 12),
    ]


def test_examples_in_order_are_not_copied():
    part, _ = compress(ragged(tuple(range(32, 0, -1)), t=32))
    found = by_length(part)
    assert found.order is None
    assert len(found.runs) == 4
    taken = found.take(part.inputs, found.runs[1], 0)
    assert taken.data_ptr() == part.inputs[8].data_ptr()


def test_joined_and_sliced_examples_keep_their_lengths():
    whole = ragged()
    first, _ = compress(ragged(LENGTHS[:4]))
    second, _ = compress(ragged((7, 7), seed=2))
    assert second.counts is None
    (joined,) = join_examples([(first,), (second,)], [4, 2])
    assert joined.counts == (*LENGTHS[:4], 7, 7)
    part, _ = compress(whole)
    assert examples(part, slice(2, 5)).counts == LENGTHS[2:5]


def test_an_example_without_any_gradient_has_a_zero_kernel():
    rows = ragged((0, 5, 2, 7, 1))
    part, _ = compress(rows)
    assert part.counts == (0, 5, 2, 7, 1)
    for way in (formed, factored):
        found = way(part, part, max_bytes=1 << 20)
        torch.testing.assert_close(found, definition(rows, rows), rtol=1e-12, atol=1e-10)
        assert not found[:2].any()
