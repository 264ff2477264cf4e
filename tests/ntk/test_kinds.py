"""Kernels of signs equal their definition: the gradient of one example and output, its signs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raykernel.errors import InputError, NonFiniteError
from raykernel.ntk.capture import Capture, Tracer
from raykernel.ntk.contract import grams
from raykernel.ntk.empirical import empirical_kernel
from raykernel.ntk.factors import Product, Rows, magnitude
from raykernel.ntk.packed import signed_capture
from raykernel.ntk.signed import signed
from raykernel.ntk.signs import pack, signs, unpack
from raykernel.terms import Kind
from tests import cases, oracles
from tests.parts import gradient, make_part

KINDS = ["sgd", "signgd", "asigngd", "asigngd_flipped"]
ZERO = 1e-10  # against the largest gradient: rounding of float64, which is no sign


def definition(model, readout, rows, cols=None):
    """Whole kernel of every kind, in float64."""
    left = _flat(oracles.jacobian(model, readout, rows))
    right = left if cols is None else _flat(oracles.jacobian(model, readout, cols))
    sides = {"gradient": (left, right), "sign": (_sign(left), _sign(right))}
    pairs = {
        "sgd": ("gradient", "gradient"),
        "signgd": ("sign", "sign"),
        "asigngd": ("gradient", "sign"),
        "asigngd_flipped": ("sign", "gradient"),
    }
    return {kind: oracles.inner(sides[a][0], sides[b][1]) for kind, (a, b) in pairs.items()}


def _flat(jacobian):
    return torch.cat(list(jacobian.values()), dim=2)


def _sign(g):
    return torch.where(g.abs() <= ZERO * g.abs().amax(), 0.0, g.sign())


@pytest.mark.parametrize("name", ["roberta", "albert", "gpt2", "llama", "qwen2", "electra"])
def test_float64_equals_the_definition(name):
    case = cases.transformer_case(name)
    case.model.double()
    cols = cases.token_batch(n=3, lengths=(5, 8, 11), seed=8)
    for other in (None, cols):
        expected = definition(case.model, case.readout, case.batch, other)
        blocks = empirical_kernel(
            case.model, case.readout, case.batch, other, kinds=KINDS, dead_zone=1e-9
        )
        for kind in KINDS:
            actual = sum(blocks[kind].values())
            assert oracles.relative_error(actual, expected[kind]) < 1e-10, kind
        assert torch.equal(sum(blocks["signgd"].values()), expected["signgd"])


@pytest.mark.parametrize("name", ["roberta", "bert", "gpt2", "llama"])
def test_float32_differs_only_where_a_gradient_is_nearly_zero(name):
    case = cases.transformer_case(name)
    g = _flat(oracles.jacobian(case.model, case.readout, case.batch))
    expected = oracles.inner(_sign(g), _sign(g))
    doubtful = (g.abs() < 1e-4 * g.norm(dim=2, keepdim=True) / g.shape[2] ** 0.5).double().sum(2)
    blocks = empirical_kernel(case.model, case.readout, case.batch, kinds=["signgd"])["signgd"]
    bound = doubtful[:, :, None, None] + doubtful[None, None]
    assert ((sum(blocks.values()) - expected).abs() <= bound).all()


def test_attention_key_bias_has_no_sign():
    """Its gradient is zero (softmax is shift invariant); without a dead zone it is noise."""
    case = cases.transformer_case("bert")
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_(name.endswith("key.bias"))
    options = {"kinds": ["sgd", "signgd"]}
    blocks = empirical_kernel(case.model, case.readout, case.batch, **options)
    assert not any(block.any() for block in blocks["signgd"].values())
    noise = empirical_kernel(case.model, case.readout, case.batch, dead_zone=0.0, **options)
    assert any(block.any() for block in noise["signgd"].values())


def test_bias_only_kernels_have_signs():
    case = cases.transformer_case("bert")
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_(name.endswith("value.bias"))
    expected = definition(case.model, case.readout, case.batch)["signgd"]
    blocks = empirical_kernel(case.model, case.readout, case.batch, kinds=["signgd"])["signgd"]
    assert torch.equal(sum(blocks.values()).double(), expected)


def test_sgd_beside_signs_is_sgd_alone():
    case = cases.transformer_case("roberta")
    alone = empirical_kernel(case.model, case.readout, case.batch)["sgd"]
    beside = empirical_kernel(case.model, case.readout, case.batch, kinds=KINDS)["sgd"]
    assert alone.keys() == beside.keys()
    scale = sum(alone.values()).norm()
    for group, block in alone.items():
        assert (block - beside[group]).norm() < 1e-6 * scale, group


def test_flipped_is_the_transpose_from_the_other_side():
    case = cases.transformer_case("roberta")
    tracer = Tracer(case.model, case.readout, signs=True)
    rows, cols = tracer.capture(case.batch), tracer.capture(cases.token_batch(n=3, seed=8))
    kinds = (Kind.asigngd, Kind.asigngd_flipped)
    here, there = grams(rows, cols, kinds=kinds), grams(cols, rows, kinds=kinds)
    for group, block in here[Kind.asigngd].items():
        other = there[Kind.asigngd_flipped][group].permute(2, 3, 0, 1)
        assert oracles.relative_error(block, other) < 1e-5


def test_signs_of_a_tied_matrix_are_whole_where_rows_and_columns_use_it_elsewhere():
    """Two experts share a matrix; the row examples reach one of them, the columns both."""

    def forward(m, x):
        out = torch.zeros_like(x)
        chosen = x[:, 0] > 0
        for expert, own in ((m.first, chosen), (m.second, ~chosen), (m.both, x[:, 0] > 1)):
            if own.any():
                out[own] = out[own] + torch.tanh(expert(x[own]))
        return m.head(out)

    torch.manual_seed(0)
    experts = {name: torch.nn.Linear(3, 3) for name in ("first", "second", "both")}
    model = cases.Module(forward, **experts, head=torch.nn.Linear(3, 2)).double()
    for expert in experts.values():
        expert.weight = model.first.weight
    rows = {"x": torch.tensor([[0.5, 0.2, -1.0], [0.3, 1.0, 2.0]]).double()}
    cols = {"x": torch.tensor([[-0.5, 0.7, 1.1], [2.0, -0.3, 0.4], [-3.0, 0.1, 0.2]]).double()}
    for left, right in ((rows, cols), (cols, rows), (cols, None)):
        expected = definition(model, cases.readout, left, right)
        blocks = empirical_kernel(model, cases.readout, left, right, kinds=KINDS, dead_zone=1e-9)
        for kind in KINDS:
            actual = sum(blocks[kind].values())
            assert oracles.relative_error(actual, expected[kind]) < 1e-12, kind


PARTS = st.lists(
    st.sampled_from(["lookup", "rows", "product", "turned", "some_rows"]), min_size=1, max_size=3
)


@settings(max_examples=60, deadline=None)
@given(PARTS, PARTS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_signs_are_of_the_sum_over_all_uses(left, right, n, t, m, seed):
    own = [make_part(kind, n, t, seed + i) for i, kind in enumerate(left)]
    other = [make_part(kind, m, t, seed + 50 + i) for i, kind in enumerate(right)]
    g, h = sum(map(gradient, own)), sum(map(gradient, other))
    kinds = [Kind(kind) for kind in KINDS]
    for parts, q in ((other, h), (own, g)):
        found = signed(own, parts, kinds, dead_zone=1e-12, max_bytes=600)
        for kind, (a, b) in {
            Kind.sgd: (g, q),
            Kind.signgd: (g.sign(), q.sign()),
            Kind.asigngd: (g, q.sign()),
            Kind.asigngd_flipped: (g.sign(), q),
        }.items():
            expected = oracles.inner(a, b).flatten(2).flatten(0, 1)
            torch.testing.assert_close(found[kind], expected, rtol=1e-9, atol=1e-9)


def test_magnitude_is_the_root_mean_square_of_one_token():
    for kind in ("product", "turned"):
        part = make_part(kind, 2, 1, 5)
        expected = gradient(part).square().mean(2).sqrt()
        torch.testing.assert_close(magnitude(part), expected)
    # Of rows read by index, over those that the example and output touch.
    for kind in ("some_rows", "lookup"):
        part = make_part(kind, 2, 1, 5)
        dense = gradient(part)
        expected = (dense.square().sum(2) / (dense != 0).sum(2)).sqrt()
        torch.testing.assert_close(magnitude(part), expected)
    rows = make_part("rows", 2, 1, 5)
    torch.testing.assert_close(magnitude(rows), gradient(rows).square().mean(2).sqrt())
    assert torch.equal(magnitude(Rows(rows.gradients, 1, torch.ones(2, 2))), torch.ones(2, 2))


def test_a_rows_magnitude_does_not_depend_on_rows_that_only_others_touch():
    """Two label words: each output's gradient is one row of the head, whatever else is listed."""
    part = make_part("some_rows", 2, 3, 5)
    gradients = part.gradients.clone()
    for a in range(2):
        gradients[:, a, :, [row for row in range(4) if row != a]] = 0.0
    listed = replace(part, gradients=gradients)
    alone = replace(part, gradients=gradients[..., :1], rows=part.rows[:1])
    assert torch.equal(magnitude(listed)[:, 0], magnitude(alone)[:, 0])


@pytest.mark.parametrize("dead_zone", [0.0, 1e-5])
@pytest.mark.parametrize("pack_first", [False, True])
def test_a_gradient_that_is_not_a_number_has_no_sign(dead_zone, pack_first):
    """1e30 · 1e30 - 1e30 · 1e30 = NaN in float32, whose sign would pass for 0."""
    gradients = torch.ones(3, 2, 2, 4)
    inputs = torch.ones(3, 2, 5)
    gradients[1] *= torch.tensor([1e30, -1e30]).view(1, 2, 1)
    inputs[1] *= 1e30
    part = Product(inputs, gradients, None, transposed=False)
    capture = Capture(torch.zeros(3, 2), {"layer": {"layer.weight": (part,)}}, {})
    take = signed_capture if pack_first else partial(grams, cols=capture, kinds=[Kind.signgd])
    with pytest.raises(NonFiniteError, match=r"layer\.weight: the gradient of example 1 of"):
        take(capture, dead_zone=dead_zone)


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=40))
def test_packed_signs_come_back(values):
    ternary = torch.tensor([values, values[::-1]])
    packed = pack(ternary)
    assert packed.dtype == torch.uint8
    assert packed.shape[1] == -(-len(values) // 4)
    assert torch.equal(unpack(packed, len(values)), ternary)


def test_signs_are_zero_up_to_the_limit():
    found = signs(torch.tensor([[-2.0, -1.0, 0.0, 0.5, 1.5]]), torch.tensor([[1.0]]))
    assert found.tolist() == [[-1.0, 0.0, 0.0, 0.0, 1.0]]


def test_unknown_kind_is_an_error():
    case = cases.transformer_case("bert")
    with pytest.raises(InputError, match="did you mean 'signgd'"):
        empirical_kernel(case.model, case.readout, case.batch, kinds=["signsgd"])
