"""Weighted sums of signs equal the definition, and fold the kernel that has signs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from raykernel.errors import InputError
from raykernel.ntk import signs
from raykernel.ntk.empirical import empirical_kernel
from raykernel.ntk.product import tangent
from raykernel.ntk.sign_product import weighted_sign_gradient
from tests import cases, oracles
from tests.cases import normal, pieces, readout

D, N, C = 6, 3, 2
TEST = cases.token_batch(n=3, lengths=(5, 8, 11), seed=8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Tanh(), nn.Linear(D, C)).double()


CASES = {
    **{name: partial(cases.transformer_case, name) for name in ("roberta", "gpt2", "albert")},
    "lora": partial(cases.lora_case, "roberta", zero_b=False),
    "some_frozen": partial(cases.partly_frozen_case, "roberta", "layer.1", "word_embeddings"),
}


def clear_sign(parts):
    """Far above float64's rounding, which is all that attention's key bias has of a gradient."""
    return lambda gradient: gradient.sign() * (gradient.abs() > 1e-10)


def weighted(jacobian, beta, sign):
    """Σ_j,b β[j, b] sign G[j, b] by parameter."""
    return {n: torch.einsum("iap,ia->p", sign(own), beta) for n, own in jacobian.items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(actual[name].flatten(), value, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("max_bytes", [1, 1 << 26])
@pytest.mark.parametrize("name", list(CASES))
def test_weighted_signs_equal_the_definition(name, max_bytes):
    case = CASES[name]()
    case.model.double()
    beta = normal(5, C)
    w = weighted_sign_gradient(
        case.model,
        case.readout,
        pieces(case.batch, 2, 3),
        beta,
        sign_of=clear_sign,
        max_bytes=max_bytes,
    )
    jacobian = oracles.jacobian(case.model, case.readout, case.batch)
    assert_same(w, weighted(jacobian, beta, clear_sign(())))
    assert all(w[name].shape == p.shape for name, p in oracles.selected(case.model).items())


def test_plain_signs_are_the_default():
    model, batch, beta = network(), {"x": normal(N, D)}, normal(N, C)
    w = weighted_sign_gradient(model, readout, pieces(batch, 1, 2), beta)
    assert_same(w, weighted(oracles.jacobian(model, readout, batch), beta, torch.sign))


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_kernel_with_signs_times_weights_is_the_tangent_along_their_signs(name):
    """K_asigngd[test, train] β = J_test w, with the kernel's own dead zone."""
    case = CASES[name]()
    case.model.double()
    beta = normal(5, C)

    def dead_zone(parts):
        return partial(signs.signs, limit=signs.threshold(parts, signs.DEAD_ZONE))

    w = weighted_sign_gradient(case.model, case.readout, [case.batch], beta, sign_of=dead_zone)
    _, predicted = tangent(case.model, case.readout, TEST, w)
    blocks = empirical_kernel(case.model, case.readout, TEST, case.batch, kinds=["asigngd"])
    expected = torch.einsum("iajb,jb->ia", sum(blocks["asigngd"].values()), beta)
    assert oracles.relative_error(predicted, expected) < 1e-10


@pytest.mark.parametrize("max_bytes", [8_000, 100_000])
def test_signs_are_taken_of_no_more_than_max_bytes(max_bytes):
    case = CASES["roberta"]()
    sizes = []

    def watching(parts):
        def sign(gradient):
            sizes.append(gradient.numel() * gradient.element_size())
            return gradient.sign()

        return sign

    weighted_sign_gradient(
        case.model,
        case.readout,
        [case.batch],
        normal(5, C),
        sign_of=watching,
        max_bytes=max_bytes,
    )
    assert max_bytes // 10 < max(sizes) <= max_bytes


@pytest.mark.parametrize("fails", [False, True])
def test_modes_flags_and_gradients_are_as_before(fails):
    model = network().train()
    model[2].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones(D, D, dtype=torch.float64)

    def broken(m, batch):
        out = m(batch["x"])
        if fails:
            raise ZeroDivisionError
        return out

    def call():
        return weighted_sign_gradient(model, broken, [{"x": normal(N, D)}], normal(N, C))

    if fails:
        with pytest.raises(ZeroDivisionError):
            call()
    else:
        assert set(call()) == {"0.weight", "3.weight", "3.bias"}
    assert [m.training for m in model] == [True, True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert (model[0].weight.grad == 1).all()
    assert model[3].weight.grad is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(N - 1, C), "3, expected one row"),
        (torch.ones(N, C + 1), "3 outputs"),
        (torch.full((N, C), torch.inf), "infinity"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(InputError, match=message):
        weighted_sign_gradient(network(), readout, pieces({"x": normal(N, D)}, 2, 1), weights)


def test_nothing_selected_is_refused():
    model = network().requires_grad_(False)
    with pytest.raises(InputError, match="requires_grad"):
        weighted_sign_gradient(model, readout, [{"x": normal(N, D)}], normal(N, C))
