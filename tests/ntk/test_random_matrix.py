"""Entries are those of Philox by definition, the same whatever else is made, and standardised."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri

from raykernel.errors import InputError
from raykernel.ntk.random_matrix import Entries, RandomMatrices

BOTH = pytest.mark.parametrize("entries", list(Entries), ids=lambda entries: entries.value)
MASK = (1 << 64) - 1


def philox(key, counter):
    """Four words of Philox 4x64-10 (Salmon et al. 2011, Random123), from Python's integers."""
    k0, k1 = key & MASK, key >> 64
    x = [(counter >> shift) & MASK for shift in (0, 64, 128, 192)]
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(right >> 64) ^ x[1] ^ k0, right & MASK, (left >> 64) ^ x[3] ^ k1, left & MASK]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return x


def column(matrices, name, q):
    """S[:, q] by definition, bits of a counter's words from the lowest up."""
    k = matrices.dimension
    key = int.from_bytes(
        hashlib.blake2b(f"{matrices.seed}/{name}".encode(), digest_size=16).digest(), "little"
    )
    bits_each = 1 if matrices.entries is Entries.rademacher else 32
    blocks = -(-k * bits_each // 256)
    numbers = []
    for i in range(blocks):
        # NumPy counts up before it draws.
        whole = sum(word << (64 * j) for j, word in enumerate(philox(key, q * blocks + i + 1)))
        numbers += [(whole >> shift) & ((1 << bits_each) - 1) for shift in range(0, 256, bits_each)]
    if matrices.entries is Entries.rademacher:
        return [2.0 * bit - 1.0 for bit in numbers[:k]]
    return [float(ndtri((number + 0.5) * 2.0**-32)) for number in numbers[:k]]


@BOTH
@pytest.mark.parametrize("k", [1, 5, 8, 9, 300])
def test_entries_are_philox_of_seed_name_and_coordinate(entries, k):
    matrices = RandomMatrices(k, seed=7, entries=entries)
    made = matrices.columns("layer.weight", 1000, 1003)
    expected = [column(matrices, "layer.weight", q) for q in (1000, 1001, 1002)]
    assert torch.allclose(made, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@BOTH
@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 70), start=st.integers(0, 50), cuts=st.lists(st.integers(0, 9), max_size=5))
def test_pieces_equal_the_whole_to_the_bit(entries, k, start, cuts):
    matrices = RandomMatrices(k, entries=entries)
    stop = start + sum(cuts) + 1
    ends = [start]
    for size in [*cuts, 1]:
        ends.append(ends[-1] + size)
    pieces = [matrices.columns("w", a, b) for a, b in pairwise(ends)]
    assert torch.equal(torch.cat(pieces), matrices.columns("w", start, stop))


@BOTH
def test_entries_are_standardised_and_independent(entries):
    """Moments of a million entries, and products along coordinates, along k, of seeds and names."""
    k, q = 500, 2000
    matrix = RandomMatrices(k, seed=1, entries=entries).columns("w", 0, q)
    others = [
        RandomMatrices(k, seed=2, entries=entries).columns("w", 0, q),
        RandomMatrices(k, seed=1, entries=entries).columns("v", 0, q),
        RandomMatrices(k + 1, seed=1, entries=entries).columns("w", 0, q)[:, :k],
    ]
    error = (k * q) ** -0.5
    assert abs(matrix.mean()) < 4 * error
    assert abs((matrix**2).mean() - 1) < 4 * 2**0.5 * error
    fourth = 1.0 if entries is Entries.rademacher else 3.0
    assert abs((matrix**4).mean() - fourth) < 4 * 96**0.5 * error
    pairs = [(matrix[1:], matrix[:-1]), (matrix[:, 1:], matrix[:, :-1])]
    pairs += [(matrix, other) for other in others[:2]]
    for one, other in pairs:
        assert abs((one * other).mean()) < 4.5 * error
    if entries is Entries.gaussian:
        assert matrix.abs().max() < 6.4
        ordered = matrix.flatten().sort().values
        expected = torch.special.ndtri((torch.arange(k * q) + 0.5) / (k * q))
        assert (ordered - expected)[k:-k].abs().max() < 0.05


def test_type_and_device_are_those_of_another_tensor():
    matrices = RandomMatrices(3, entries=Entries.gaussian)
    assert matrices.columns("w", 0, 2).dtype == torch.float64
    single = matrices.columns("w", 0, 2, like=torch.zeros(1))
    assert single.dtype == torch.float32
    assert torch.equal(single, matrices.columns("w", 0, 2).float())


def test_dimension_must_be_positive():
    with pytest.raises(InputError, match="dimension"):
        RandomMatrices(0)
