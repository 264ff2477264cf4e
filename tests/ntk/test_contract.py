"""Every contraction gives the inner product of the gradients it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raykernel.errors import InputError, NonFiniteError
from raykernel.ntk import rates
from raykernel.ntk.capture import Capture, Tracer
from raykernel.ntk.contract import gram, method
from raykernel.ntk.factors import (
    Lookup,
    Product,
    Rows,
    compress,
    join_calls,
    join_examples,
    lookup_by_index,
    lookup_by_product,
)
from raykernel.ntk.lookups import shared_tokens
from raykernel.ntk.pairs import direct, factored, formed
from raykernel.ntk.rates import Rates, rates_of
from tests import cases, oracles
from tests.cases import normal
from tests.parts import KINDS, VOCAB, WIDTH, C, gradient, make_part

sizes = st.integers(1, 4)


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
@settings(max_examples=8, deadline=None)
@given(n=sizes, m=sizes, t=sizes, u=sizes, max_bytes=st.sampled_from([1, 700, 1 << 20]))
def test_any_two_parts_contract_to_the_inner_product(left, right, n, m, t, u, max_bytes):
    own, other = make_part(left, n, t, 0), make_part(right, m, u, 10)
    expected = oracles.inner(gradient(own), gradient(other))
    block = direct(own, other, max_bytes=max_bytes).view(n, C, m, C)
    assert torch.allclose(block, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["product", "turned", "some_rows"])
@settings(max_examples=20, deadline=None)
@given(n=sizes, m=sizes, t=sizes, u=sizes, max_bytes=st.sampled_from([1, 700, 1 << 20]))
def test_factored_and_formed_equal_direct(kind, n, m, t, u, max_bytes):
    own, other = make_part(kind, n, t, 0), make_part(kind, m, u, 0)
    expected = direct(own, other, max_bytes=max_bytes)
    for way in (factored, formed):
        one = way(own, other, max_bytes=max_bytes)
        assert torch.allclose(one, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["product", "turned", "some_rows"])
@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 60), t=sizes, max_bytes=st.sampled_from([1, 700, 1 << 20]))
def test_the_symmetric_block_equals_the_one_with_a_copy(kind, n, t, max_bytes):
    own, copy = make_part(kind, n, t, 0), make_part(kind, n, t, 0)
    expected = oracles.inner(gradient(own), gradient(copy)).view(n * C, n * C)
    for way in (direct, factored, formed):
        one = way(own, own, max_bytes=max_bytes)
        assert torch.equal(one, one.mT)
        assert torch.allclose(one, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["lookup", "product", "turned", "some_rows"])
@pytest.mark.parametrize(("t", "u"), [(0, 0), (0, 2), (2, 0)])
def test_a_layer_that_ran_on_no_token_has_a_zero_kernel(kind, t, u):
    """An expert that no token of a batch chose."""
    left, right = (
        Capture(torch.zeros(n, C), {"expert": {"weight": (make_part(kind, n, length, 0),)}}, {})
        for n, length in ((2, t), (3, u))
    )
    block = gram(left, right)["expert"]
    assert block.shape == (2, C, 3, C)
    assert not block.any()


@settings(max_examples=20, deadline=None)
@given(n=sizes, t=sizes, rows=st.sets(st.integers(0, VOCAB - 1), min_size=1))
def test_both_ways_to_sum_by_token_agree(n, t, rows):
    part = make_part("lookup", n, t, 0)
    ascending = torch.tensor(sorted(rows))
    expected = gradient(part).view(n, C, VOCAB, WIDTH)[:, :, ascending]
    for sum_by_token in (lookup_by_index, lookup_by_product):
        assert torch.allclose(sum_by_token(part.ids, part.gradients, ascending), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_joined_examples_are_those_of_the_pieces(kind):
    pieces = [make_part(kind, 2, 3, 0), make_part(kind, 1, 4, 5), make_part(kind, 3, 1, 9)]
    found = [(piece,) for piece in pieces[:2]] + [()] + [(pieces[2],)]
    (joined,) = join_examples(found, [2, 1, 2, 3])
    expected = torch.cat([gradient(p) for p in pieces[:2]] + [torch.zeros(2, C, VOCAB * WIDTH)])
    assert torch.allclose(gradient(joined), torch.cat([expected, gradient(pieces[2])]))


@pytest.mark.parametrize("kind", KINDS)
def test_joined_calls_add_up(kind):
    calls = [make_part(kind, 2, 3, 0), make_part(kind, 2, 1, 5)]
    (joined,) = join_calls(calls)
    assert torch.allclose(gradient(joined), gradient(calls[0]) + gradient(calls[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_compressing_drops_tokens_and_no_gradient(kind):
    part = make_part(kind, 3, 5, 0)
    if kind != "rows":
        part.gradients[0, :, :4] = 0
        part.gradients[1:, :, 2:] = 0
    smaller, finite = compress(part)
    assert finite
    assert torch.equal(gradient(smaller), gradient(part)) or kind == "rows"
    if kind != "rows":
        assert smaller.gradients.shape[2] == 2


def test_rarely_used_outputs_of_a_wide_head_are_dropped():
    gradients = torch.zeros(2, C, 3, 5000)
    gradients[..., [17, 400]] = 1.0
    part, _ = compress(Product(torch.ones(2, 3, 4), gradients, None, False))
    assert part.rows.tolist() == [17, 400]
    assert part.gradients.shape == (2, C, 3, 2)


@pytest.mark.parametrize("max_bytes", [1, 10_000, 1 << 28])
def test_tile_size_changes_nothing(max_bytes):
    case = cases.transformer_case("roberta")
    capture = Tracer(case.model, case.readout).capture(case.batch)
    expected = gram(capture, capture)
    for group, block in gram(capture, capture, max_bytes=max_bytes).items():
        assert torch.allclose(block, expected[group], rtol=1e-4, atol=1e-4)


def test_a_block_is_a_piece_of_the_whole():
    case = cases.transformer_case("gpt2")
    tracer = Tracer(case.model, case.readout)
    captures = [
        tracer.capture({k: v[i:j] for k, v in case.batch.items()}) for i, j in ((0, 2), (2, 5))
    ]
    block = gram(captures[0], captures[1])
    joined = Capture.concatenate(captures)
    whole = gram(joined, joined)
    for group, values in block.items():
        assert torch.allclose(values, whole[group][:2, :, 2:], rtol=1e-4, atol=1e-4)


def test_half_precision_factors_are_summed_in_float32():
    part = Product(torch.ones(1, 4096, 1), torch.ones(1, 1, 4096, 1), None, False)
    half = Product(part.inputs.bfloat16(), part.gradients.bfloat16(), None, False)
    for way in (direct, factored):
        block = way(half, half, max_bytes=1 << 20)
        assert block.dtype == torch.float32
        assert block.item() == 4096.0**2


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 7), st.integers(1, 30), st.integers(0, 99)
)
def test_lookups_are_multiplied_token_by_token(n, m, t, vocabulary, seed):
    """Tokens that few texts share, that most share, and that none does."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        Lookup(
            torch.randint(0, vocabulary, (size, t), generator=generator),
            normal(size, C, t, WIDTH, seed=seed + size),
        )
        for size in (n, m)
    )
    for other in (right, left):
        expected = direct(left, other, max_bytes=1 << 20)
        for max_bytes in (1, 200, 1 << 20):
            block = shared_tokens(left, other, max_bytes=max_bytes)
            torch.testing.assert_close(block, expected, rtol=1e-12, atol=1e-12)


def test_method_follows_the_predicted_time():
    device = Rates(flops=1e11, bandwidth=2e10)
    short = method(32, 32, c=2, t=1.0, u=1.0, d_in=768, d_out=768, rates=device)
    long = method(32, 32, c=2, t=512.0, u=512.0, d_in=64, d_out=64, rates=device)
    assert (short.name, long.name) == ("factored", "direct")
    assert short.flops > 0
    assert long.num_bytes > 0
    for way in (short, long):
        least = way.flops / 1e11 + way.num_bytes / 2e10
        assert least < way.seconds < 2 * least


def test_the_predicted_time_is_that_of_the_rates():
    sizes = {"c": 2, "t": 40.0, "u": 30.0, "d_in": 48, "d_out": 64}
    forming, products = 2 * 2 * 48 * 64 * (5 * 40 + 4 * 30), 2 * 10 * 8 * 48 * 64
    direct = method(5, 4, **sizes, rates=Rates(flops=1e9, bandwidth=1e30))
    assert direct.name == "direct"
    assert direct.flops == forming + products
    assert direct.seconds == pytest.approx((forming / 0.6 + products / 0.85) / 1e9)
    half = method(5, 4, **sizes, rates=Rates(flops=5e8, bandwidth=1e30))
    assert half.seconds == pytest.approx(2 * direct.seconds)


def test_slow_memory_favours_the_way_with_less_traffic():
    sizes = {"c": 2, "t": 24.0, "u": 24.0, "d_in": 256, "d_out": 256}
    fast, slow = (
        method(32, 32, **sizes, rates=Rates(flops=1e11, bandwidth=bandwidth))
        for bandwidth in (1e15, 1e6)
    )
    assert fast.name == "direct"
    assert slow.name == "factored"
    assert slow.num_bytes < fast.num_bytes


def test_the_symmetric_block_costs_less():
    sizes = {"c": 2, "t": 8.0, "u": 8.0, "d_in": 64, "d_out": 64}
    device = Rates(flops=1e11, bandwidth=2e10)
    both = method(32, 32, **sizes, rates=device, symmetric=True)
    one = method(32, 32, **sizes, rates=device)
    assert both.flops < one.flops


def test_the_first_process_to_measure_decides(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYKERNEL_CACHE", str(tmp_path))
    rates._known.cache_clear()
    measure = rates.measure

    def slowly(device):
        monkeypatch.setattr(rates, "measure", measure)
        rates._known.cache_clear()
        first.append(rates_of("cpu"))  # another process, meanwhile
        return Rates(1.0, 2.0)

    first = []
    monkeypatch.setattr(rates, "measure", slowly)
    assert rates_of("cpu") == first[0] != Rates(1.0, 2.0)
    assert len(list((tmp_path / "rates").iterdir())) == 1
    rates._known.cache_clear()
    assert rates_of("cpu") == first[0]
    rates._known.cache_clear()


def test_rates_are_kept_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refused(path, target):
        raise PermissionError

    monkeypatch.setenv("RAYKERNEL_CACHE", str(tmp_path))
    monkeypatch.setattr(rates.Path, "hardlink_to", refused)
    rates._known.cache_clear()
    first = rates_of("cpu")
    rates._known.cache_clear()
    assert rates_of("cpu") == first
    assert len(list((tmp_path / "rates").iterdir())) == 1
    rates._known.cache_clear()


def test_rates_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYKERNEL_CACHE", str(tmp_path))
    rates._known.cache_clear()
    first = rates_of("cpu")
    assert first.flops > 1e8
    assert first.bandwidth > 1e7
    (file,) = (tmp_path / "rates").iterdir()
    file.write_text('{"flops": 1.0, "bandwidth": 2.0, "onednn": true}')
    assert rates_of("cpu") == first
    rates._known.cache_clear()
    assert rates_of("cpu") == Rates(1.0, 2.0, onednn=True)
    file.write_text('{"flops": 1.0, "bandwidth": 2.0}')  # of an earlier version
    rates._known.cache_clear()
    assert rates_of("cpu").flops > 1e8
    file.write_text("{")
    rates._known.cache_clear()
    assert rates_of("cpu").flops > 1e8
    rates._known.cache_clear()


def test_unknown_group_is_named():
    case = cases.transformer_case("gpt2")
    capture = Tracer(case.model, case.readout).capture(case.batch)
    with pytest.raises(InputError, match=r"transformer\.ln_f"):
        gram(capture, capture, groups=["transformer.lnf"])


def test_overflow_names_the_group():
    part = Rows(torch.full((1, 1, 2), 1e30), 2)
    capture = Capture(torch.zeros(1, 1), {"layer": {"layer.weight": (part,)}}, {})
    with pytest.raises(NonFiniteError, match="layer"):
        gram(capture, capture)
