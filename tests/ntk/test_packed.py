"""Packed signs are the signs of the gradients, and their blocks are the same to the last bit."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raykernel.errors import InputError
from raykernel.ntk.capture import Capture, Tracer
from raykernel.ntk.contract import grams, predicted_seconds
from raykernel.ntk.factors import Product
from raykernel.ntk.packed import PackedLookup, PackedRows, packed_bytes, signed_capture
from raykernel.ntk.rates import Rates
from raykernel.ntk.signed import signed
from raykernel.ntk.signs import pack, threshold, unpack
from raykernel.terms import Kind
from tests import cases, oracles
from tests.parts import VOCAB, WIDTH, C, gradient, make_part

MODELS = ["roberta", "albert", "bert", "gpt2", "llama", "qwen2", "electra"]
PARTS = st.lists(
    st.sampled_from(["lookup", "rows", "product", "turned", "some_rows"]), min_size=1, max_size=3
)


@cache
def captures(name):
    """Rows with padding, and columns of other lengths."""
    case = cases.transformer_case(name)
    tracer = Tracer(case.model, case.readout, signs=True)
    cols = cases.token_batch(n=3, lengths=(5, 8, 11), seed=8)
    return tracer.capture(case.batch), tracer.capture(cols)


def copy_of(capture):
    parts = {group: dict(own) for group, own in capture.parts.items()}
    return Capture(capture.logits, parts, capture.crosses)


def packed(capture, **options):
    """Its signs; the capture keeps its factors."""
    return signed_capture(copy_of(capture), **options)


def packed_parts(parts, **options):
    capture = Capture(torch.zeros(len(parts[0].gradients), C), {"g": {"w": tuple(parts)}}, {})
    return packed(capture, **options).signs["w"]


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.sampled_from([torch.float32, torch.float64]))
def test_any_width_comes_back(p, n, dtype):
    generator = torch.Generator().manual_seed(p)
    ternary = torch.randint(-1, 2, (n, 2, p), generator=generator).to(dtype)
    assert torch.equal(unpack(pack(ternary), p, dtype), ternary)
    assert pack(ternary).shape == (n, 2, -(-p // 4))


@settings(max_examples=60, deadline=None)
@given(
    PARTS,
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 99),
    st.sets(st.integers(0, VOCAB - 1), min_size=1),
    st.sampled_from([1, 600, 1 << 20]),
)
def test_rows_of_packed_signs_are_those_of_the_gradient(kinds, n, t, seed, rows, max_bytes):
    """Any rows of the parameter, also those that do not begin with a byte: width 3 of 11 rows."""
    parts = [make_part(kind, n, t, seed + i) for i, kind in enumerate(kinds)]
    own = packed_parts(parts, dead_zone=1e-12, max_bytes=max_bytes)
    expected = sum(map(gradient, parts)).view(n, C, VOCAB, WIDTH).sign()
    ascending = torch.tensor(sorted(rows))
    for some in (ascending, slice(min(rows), max(rows) + 1)):
        assert torch.equal(own.row_block(some), expected[:, :, some])
    whole = {"rows", "product", "turned"} & set(kinds)
    assert isinstance(own, PackedRows if whole else PackedLookup)


@settings(max_examples=60, deadline=None)
@given(PARTS, PARTS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_a_block_of_packed_signs_is_that_of_the_factors(left, right, n, m, seed):
    own = [make_part(kind, n, 3, seed + i) for i, kind in enumerate(left)]
    other = [make_part(kind, m, 3, seed + 50 + i) for i, kind in enumerate(right)]
    options = {"dead_zone": 0.1, "max_bytes": 600}
    a, b = (packed_parts(parts, **options) for parts in (own, other))
    kinds = [Kind.signgd, Kind.asigngd]
    expected = signed(own, other, kinds, **options)
    found = signed(own, b, kinds, **options)
    for kind in kinds:
        assert torch.equal(found[kind], expected[kind])
    assert torch.equal(signed(a, b, kinds[:1], **options)[Kind.signgd], expected[Kind.signgd])
    symmetric = signed(own, own, kinds[:1], **options)[Kind.signgd]
    assert torch.equal(signed(a, a, kinds[:1], **options)[Kind.signgd], symmetric)


@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_same_bits(name):
    """Tied embeddings, padding, LayerNorm, Conv1D, key biases, layers used several times."""
    rows, cols = captures(name)
    a, b = packed(rows), packed(cols)
    kinds = [Kind.signgd, Kind.asigngd]
    expected, found = grams(rows, cols, kinds=kinds), grams(rows, b, kinds=kinds)
    assert list(found[Kind.signgd]) == list(rows.groups) == list(a.groups)
    pairs = [(found[kind], expected[kind]) for kind in kinds]
    pairs.append((grams(a, b, kinds=kinds[:1])[Kind.signgd], expected[Kind.signgd]))
    symmetric = (grams(side, side, kinds=kinds[:1])[Kind.signgd] for side in (a, rows))
    pairs.append(tuple(symmetric))
    for blocks, others in pairs:
        for group, block in others.items():
            assert torch.equal(blocks[group], block), group
    assert any(block.any() for block in found[Kind.signgd].values())


def test_packed_signs_equal_the_definition():
    """Signs of a float64 loop of backward passes, where they are not rounding."""
    case = cases.transformer_case("roberta")
    case.model.double()
    g = torch.cat(list(oracles.jacobian(case.model, case.readout, case.batch).values()), dim=2)
    sign = torch.where(g.abs() <= 1e-10 * g.abs().amax(), 0.0, g.sign())
    own = packed(Tracer(case.model, case.readout, signs=True).capture(case.batch), dead_zone=1e-9)
    blocks = grams(own, own, kinds=[Kind.signgd], dead_zone=1e-9)[Kind.signgd]
    assert torch.equal(sum(blocks.values()), oracles.inner(sign, sign))


@pytest.mark.parametrize("name", MODELS)
def test_a_sixteenth_of_the_gradients_is_stored(name):
    rows, _ = captures(name)
    model = cases.transformer_case(name).model
    n, c = rows.logits.shape
    expected, own = packed_bytes(rows), packed(rows)
    whole = [p.numel() for p in model.parameters() if p.requires_grad]
    # Every parameter is filled up to a byte for each example and output.
    assert own.num_bytes <= n * c * (sum(whole) / 4 + len(whole))
    assert own.num_bytes == sum(expected.values())
    assert set(expected) == set(rows.parts)
    for signs in own.signs.values():
        if isinstance(signs, PackedRows):
            assert signs.codes.shape[2] == -(-signs.num_rows * signs.width // 4)


def test_packing_frees_the_factors():
    rows = copy_of(captures("roberta")[0])
    kept, freed = rows.num_bytes, []
    own = signed_capture(rows, after_group=lambda: freed.append(rows.num_bytes))
    assert kept > freed[0] >= freed[-1] == 0
    assert len(freed) == len(own.names)


def test_attention_key_bias_has_no_packed_sign():
    rows, _ = captures("bert")
    biases = [signs for name, signs in packed(rows).signs.items() if name.endswith("key.bias")]
    assert biases
    assert not any(bias.codes.any() for bias in biases)
    noise = packed(rows, dead_zone=0.0).signs
    assert any(own.codes.any() for name, own in noise.items() if name.endswith("key.bias"))


@pytest.mark.parametrize(("n", "m"), [(2, 14), (14, 2)])
def test_signs_do_not_depend_on_the_other_side(n, m):
    """Every coordinate is so near to the limit that the last bit of its sum may be its sign."""

    def product(n, seed):  # 4 rows of it are formed at a time for n = 2, one for n = 14
        generator = torch.Generator().manual_seed(seed)
        near = 1 + 1e-6 * torch.randn((n, 1, 96), generator=generator)
        a = torch.rand((n, 37, 1), generator=generator) * near
        b = torch.rand((n, 2, 37, 1), generator=generator).expand(-1, -1, -1, 331)
        return [Product(a, b.contiguous(), None, False)]

    rows, cols = product(n, 0), product(m, 1)
    # magnitude = Σ_t |b_t| |a_t| / sqrt(p) = Σ_t b_t a_t
    options = {"dead_zone": 1.0, "max_bytes": 1 << 16}
    a, b = (packed_parts(side, **options) for side in (rows, cols))
    assert 0 < unpack(a.codes, 96 * 331).mean() < 1
    assert threshold(rows, 1.0).shape == (2 * n, 1)
    expected = signed(rows, cols, [Kind.signgd], **options)[Kind.signgd]
    for left, right in ((rows, b), (a, cols), (a, b)):
        assert torch.equal(signed(left, right, [Kind.signgd], **options)[Kind.signgd], expected)


def test_what_signs_cannot_give_is_refused():
    rows, cols = captures("bert")
    own = packed(cols, dead_zone=1e-4)
    with pytest.raises(InputError, match="found packed signs as its columns, expected gradients"):
        grams(rows, own, kinds=[Kind.signgd, Kind.sgd], dead_zone=1e-4)
    with pytest.raises(InputError, match="found packed signs as its rows, expected gradients"):
        grams(own, rows, kinds=[Kind.asigngd], dead_zone=1e-4)
    with pytest.raises(InputError, match=r"dead_zone: found 1e-05, expected 0\.0001"):
        grams(rows, own, kinds=[Kind.signgd])


def test_packed_signs_are_predicted_to_save_their_forming():
    rows, cols = captures("bert")
    rates = Rates(flops=1e11, bandwidth=2e10)
    sides = [(rows, cols), (rows, packed(cols)), (packed(rows), packed(cols))]
    options = {"kinds": [Kind.signgd], "rates": rates}
    times = [predicted_seconds(a, b, **options) for a, b in sides]
    assert min(times[:2]) > times[2] > 0
