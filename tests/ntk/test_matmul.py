"""Products by either library are the product in float64, and its derivative."""

from __future__ import annotations

import resource

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raykernel.ntk import matmul, onednn, rates
from raykernel.ntk.capture import Tracer
from raykernel.ntk.contract import grams
from raykernel.ntk.product import tangent
from raykernel.ntk.rates import Rates
from raykernel.terms import Kind
from tests import oracles

pytestmark = pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN")

BOTH = pytest.mark.parametrize("faster", [True, False], ids=["onednn", "torch"])


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the products that oneDNN computed."""
    found = []
    product = onednn.linear

    def counted(input, weight, bias=None):
        found.append((tuple(input.shape), tuple(weight.shape)))
        return product(input, weight, bias)

    monkeypatch.setattr(onednn, "linear", counted)
    return found


@pytest.fixture
def chosen(monkeypatch):
    """Says which library counts as the faster one."""
    return lambda faster: monkeypatch.setattr(matmul, "_measured", lambda threads: faster)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected):
    """To the rounding of sums of some hundred terms in float32."""
    assert (actual.double() - expected).norm() <= 1e-6 * expected.norm()


@BOTH
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("lead", [(96,), (6, 17), (2, 3, 31)])
def test_a_layer_and_its_derivative(lead, bias, faster, calls, chosen):
    chosen(faster)
    x, weight = normal(*lead, 120), normal(130, 120, seed=1)
    shift = normal(130, seed=2) if bias else None
    g = normal(*lead, 130, seed=3)
    x.requires_grad_()
    out = matmul.linear(x, weight, shift)
    (own,) = torch.autograd.grad(out, x, g)
    exact = x.detach().double().requires_grad_()
    expected = F.linear(exact, weight.double(), None if shift is None else shift.double())
    assert_close(out, expected)
    assert_close(own, torch.autograd.grad(expected, exact, g.double())[0])
    assert len(calls) == (2 if faster else 0)
    with torch.no_grad():
        assert torch.equal(matmul.linear(x, weight, shift), out)


@BOTH
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("shape", [(64, 48, 700), (33, 129, 257), (9, 1000, 250)])
def test_products_with_a_transpose(shape, turned, faster, calls, chosen):
    chosen(faster)
    r, s, p = shape
    left, right = normal(r, p), normal(p, s, seed=1).mT if turned else normal(s, p, seed=1)
    expected = left.double() @ right.double().mT
    total = normal(r, 2 * s, seed=2)
    before = total.double()
    assert_close(matmul.times_transposed(left, right), expected)
    matmul.add_times_transposed(total[:, s:], left, right)
    assert_close(total[:, s:], before[:, s:] + expected)
    assert torch.equal(total[:, :s].double(), before[:, :s])
    assert len(calls) == (2 if faster else 0)


def test_what_a_weight_needs_it_gets(calls, chosen):
    chosen(True)
    x, weight = normal(200, 128).requires_grad_(), normal(128, 128, seed=1).requires_grad_()
    shift = normal(128, seed=2).requires_grad_()
    for wanted in ((x, weight), (x, shift)):
        out = matmul.linear(x, weight, shift).sum()
        assert all(g is not None for g in torch.autograd.grad(out, wanted))
    assert not calls


@pytest.mark.parametrize(
    "pair",
    {
        "small": (normal(8, 16), normal(8, 16)),
        "thin": (normal(2, 4096), normal(512, 4096)),
        "empty": (normal(64, 0), normal(64, 0)),
        "gaps": (normal(256, 128), normal(256, 200)[:, :128]),
        "double": (normal(256, 128).double(), normal(256, 128).double()),
        "half": (normal(256, 128).bfloat16(), normal(256, 128).bfloat16()),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_what_onednn_is_no_faster_at_stays(pair, calls, chosen):
    chosen(True)
    left, right = pair[1]
    assert torch.equal(matmul.times_transposed(left, right), left @ right.mT)
    assert not calls


def test_autocast_is_left_alone(calls, chosen):
    chosen(True)
    x, weight = normal(256, 128), normal(128, 128, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matmul.linear(x, weight).dtype == torch.bfloat16
    assert not calls


@pytest.mark.parametrize(("seconds", "faster"), [(0.5, True), (0.95, False), (2.0, False)])
def test_onednn_is_used_where_it_is_much_faster(seconds, faster, monkeypatch):
    timed = iter([1.0, seconds, 1.0])
    monkeypatch.setattr(rates, "_best", lambda work, device, **options: next(timed))
    found = rates.measure(torch.device("cpu"))
    assert found.onednn is faster
    assert found.flops == 2.0 * 512**3 / (seconds if faster else 1.0)


def test_a_process_asks_the_kept_rates(monkeypatch):
    matmul._measured.cache_clear()
    monkeypatch.setattr(matmul, "rates_of", lambda device: Rates(1.0, 1.0, onednn=True))
    assert matmul.is_onednn_faster(torch.zeros(1))
    assert not matmul.is_onednn_faster(torch.zeros(1, dtype=torch.float64))
    matmul._measured.cache_clear()


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_onednn_is_not_called_where_memory_can_be_refused(kind, calls, chosen, monkeypatch):
    chosen(True)
    limits = {getattr(resource, kind): (1 << 40, resource.RLIM_INFINITY)}
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits.get(kind, infinite))
    left = normal(256, 128)
    assert torch.equal(matmul.times_transposed(left, left), left @ left.mT)
    assert not calls
    limits.clear()
    matmul.times_transposed(left, left)
    assert calls


class Tokens(nn.Module):
    """Two layers over tokens of 64 features, padded with zeros, and a sum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 64)
        self.head = nn.Linear(64, 2)

    def forward(self, tokens, alive):
        """Logits (n, 2)."""
        hidden = self.second(torch.tanh(self.first(tokens)))
        return self.head((torch.tanh(hidden) * alive.unsqueeze(-1)).sum(1))


@pytest.mark.parametrize("way", ["direct", "factored"])
def test_a_kernel_by_onednn_is_that_of_the_definition(way, calls, chosen):
    chosen(True)
    model = Tokens()
    lengths = torch.tensor([48, 30, 41, 17, 48, 25, 8, 33])
    alive = (torch.arange(48) < lengths.unsqueeze(1)).float()
    rows = {"tokens": normal(8, 48, 64), "alive": alive}
    cols = {"tokens": normal(5, 48, 64, seed=1), "alive": alive[:5]}

    def readout(module, batch):
        return module(**batch)

    tracer = Tracer(model, readout)
    left, right = tracer.capture(rows), tracer.capture(cols)
    del calls[:]
    routes = {"direct": Rates(1.0, torch.inf), "factored": Rates(1e30, 1e-9)}
    for other, batch in ((left, rows), (right, cols)):
        found = grams(left, other, rates=routes[way])[Kind.sgd]
        by_parameter = oracles.kernel_by_parameter(model, readout, rows, batch)
        assert_close(sum(found.values()), sum(by_parameter.values()))
    assert calls


def test_a_product_with_the_kernel_by_onednn_is_that_of_the_definition(calls, chosen):
    chosen(True)
    model = Tokens()
    batch = {"tokens": normal(8, 48, 64), "alive": torch.ones(8, 48)}

    def readout(module, batch):
        return module(**batch)

    direction = {name: normal(*p.shape, seed=4) for name, p in model.named_parameters()}
    logits, change = tangent(model, readout, batch, direction)
    jacobian = oracles.jacobian(model, readout, batch)
    exact = {name: value.double() for name, value in direction.items()}
    assert_close(change, oracles.along(jacobian, exact))
    assert_close(logits, readout(model, batch).detach().double())
    assert calls
