"""Products by either library are the product in float64, to the rounding of float32."""

from __future__ import annotations

import resource
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raykernel.ntk import adapters, matmul, onednn, packed, project, rates
from raykernel.ntk.capture import Tracer
from raykernel.ntk.contract import grams
from raykernel.ntk.matmul import fast_products
from raykernel.ntk.passes import prepared
from raykernel.ntk.product import tangent
from raykernel.ntk.random_matrix import Entries, RandomMatrices
from raykernel.ntk.rates import Rates
from raykernel.terms import Kind
from tests import oracles

pytestmark = pytest.mark.skipif(
    not onednn.available(), reason="torch cannot be told to use oneDNN here"
)


@pytest.fixture
def chosen(monkeypatch):
    """Says which library counts as the faster one."""
    return lambda faster: monkeypatch.setattr(matmul, "_measured", lambda threads: faster)


@pytest.fixture
def by_onednn(capfd):
    """Whether oneDNN multiplied matrices while some work was done, by what it says itself."""

    def watch(work):
        capfd.readouterr()
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            work()
        return "exec,cpu,matmul" in capfd.readouterr().out

    return watch


def setting():
    return torch.backends.mkldnn.matmul.fp32_precision


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected):
    """To the rounding of sums of some hundred terms in float32."""
    assert (actual.double() - expected).norm() <= 1e-6 * expected.norm()


A, B = normal(96, 130), normal(130, 72, seed=1)
GAPS = normal(96, 5000, seed=2)
TOKENS, WEIGHT, BIAS = normal(6, 17, 130), normal(72, 130, seed=3), normal(72, seed=4)
HEADS = normal(3, 40, 2, 64, seed=5).transpose(1, 2)
PRODUCTS = {
    "mm": lambda of: of(A) @ of(B),
    "left transposed": lambda of: of(A.mT.contiguous()).mT @ of(B),
    "right transposed": lambda of: of(A) @ of(B.mT.contiguous()).mT,
    "both transposed": lambda of: of(B).mT @ of(A).mT,
    "gaps": lambda of: of(GAPS)[:, :130] @ of(GAPS)[:, 130:260].mT,
    "one row": lambda of: of(A)[:1] @ of(B),
    "vector": lambda of: of(A) @ of(B)[:, 0],
    "nothing": lambda of: of(A)[:0] @ of(B),
    "no terms": lambda of: of(A)[:, :0] @ of(B)[:0] + 1,
    "added": lambda of: of(GAPS).clone()[:, 9:81].addmm_(of(A), of(B)),
    "layer": lambda of: F.linear(of(TOKENS), of(WEIGHT), of(BIAS)),
    "layer, turned": lambda of: F.linear(of(TOKENS).transpose(0, 1), of(WEIGHT)),
    "batch": lambda of: of(TOKENS).mT @ of(TOKENS),
    "heads": lambda of: of(HEADS) @ of(HEADS).mT,
    "attention": lambda of: F.scaled_dot_product_attention(of(HEADS), of(HEADS), of(HEADS)),
    "einsum": lambda of: torch.einsum("nto,nti->noi", of(TOKENS), of(TOKENS)[..., :64]),
    "double": lambda of: of(A).double() @ of(B).double(),
}


@pytest.mark.parametrize("faster", [True, False], ids=["onednn", "torch"])
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=list(PRODUCTS))
def test_products(product, faster, chosen):
    chosen(faster)
    with fast_products():
        found = product(lambda tensor: tensor)
    assert_close(found, product(lambda tensor: tensor.double()))


@pytest.mark.parametrize("faster", [True, False], ids=["onednn", "torch"])
def test_the_library_is_the_faster_one(faster, chosen, by_onednn):
    chosen(faster)

    def work():
        with fast_products():
            A @ B

    assert by_onednn(work) is faster
    assert not by_onednn(lambda: A @ B)


def test_a_derivative_is_by_the_same_library(chosen):
    chosen(True)
    x = TOKENS.clone().requires_grad_()
    g = normal(6, 17, 72, seed=6)
    with fast_products():
        (found,) = torch.autograd.grad(F.linear(x, WEIGHT, BIAS), x, g)
    assert_close(found, g.double() @ WEIGHT.double())


def test_autocast_is_left_alone(chosen):
    chosen(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.linear(TOKENS, WEIGHT)
        with fast_products():
            found = F.linear(TOKENS, WEIGHT)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_the_setting_is_as_before_afterwards(chosen):
    chosen(True)
    before = setting()
    with fast_products():
        with fast_products():
            assert setting() == "bf16"
        assert setting() == "bf16"
    assert setting() == before


def test_the_setting_is_as_before_after_an_error(chosen):
    chosen(True)
    before = setting()

    @fast_products()
    def fail():
        assert setting() == "bf16"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert setting() == before


def test_contexts_of_threads_overlap(chosen):
    chosen(True)
    before = setting()
    entered, left = threading.Event(), threading.Event()

    def other():
        with fast_products():
            entered.set()
            left.wait()

    thread = threading.Thread(target=other)
    with fast_products():
        thread.start()
        entered.wait()
    assert setting() == "bf16"
    left.set()
    thread.join()
    assert setting() == before


@pytest.mark.parametrize(
    "capabilities",
    [
        {"architecture": "x86_64", "amx_tile": True},
        {"architecture": "x86_64"},
        {"architecture": "aarch64", "amx_tile": False},
        {},
    ],
    ids=["AMX", "unknown", "Arm", "old torch"],
)
def test_processors_that_might_round_are_left_alone(capabilities, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert not onednn.available.__wrapped__()


def test_products_that_round_are_noticed(monkeypatch):
    @contextmanager
    def rounded():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield

    monkeypatch.setattr(onednn, "products", rounded)
    assert not onednn.available.__wrapped__()


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
    assert matmul.is_onednn_faster()
    matmul._measured.cache_clear()


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_onednn_is_not_called_where_memory_can_be_refused(kind, chosen, monkeypatch):
    chosen(True)
    limits = {getattr(resource, kind): (1 << 40, resource.RLIM_INFINITY)}
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits.get(kind, infinite))
    before = setting()
    with fast_products():
        assert setting() == before
    limits.clear()
    with fast_products():
        assert setting() == "bf16"


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


def readout(module, batch):
    return module(**batch)


@pytest.mark.parametrize("way", ["direct", "factored"])
def test_a_kernel_by_onednn_is_that_of_the_definition(way, chosen, by_onednn):
    chosen(True)
    model = Tokens()
    lengths = torch.tensor([48, 30, 41, 17, 48, 25, 8, 33])
    alive = (torch.arange(48) < lengths.unsqueeze(1)).float()
    rows = {"tokens": normal(8, 48, 64), "alive": alive}
    cols = {"tokens": normal(5, 48, 64, seed=1), "alive": alive[:5]}
    tracer = Tracer(model, readout)
    found = []
    assert by_onednn(lambda: found.extend(map(tracer.capture, (rows, cols))))
    left, right = found
    routes = {"direct": Rates(1.0, torch.inf), "factored": Rates(1e30, 1e-9)}
    for other, batch in ((left, rows), (right, cols)):
        blocks = {}
        assert by_onednn(
            lambda other=other, blocks=blocks: blocks.update(
                grams(left, other, rates=routes[way])[Kind.sgd]
            )
        )
        by_parameter = oracles.kernel_by_parameter(model, readout, rows, batch)
        assert_close(sum(blocks.values()), sum(by_parameter.values()))


def test_a_product_with_the_kernel_by_onednn_is_that_of_the_definition(chosen, by_onednn):
    chosen(True)
    model = Tokens()
    batch = {"tokens": normal(8, 48, 64), "alive": torch.ones(8, 48)}
    direction = {name: normal(*p.shape, seed=4) for name, p in model.named_parameters()}
    found = []
    assert by_onednn(lambda: found.extend(tangent(model, readout, batch, direction)))
    logits, change = found
    jacobian = oracles.jacobian(model, readout, batch)
    exact = {name: value.double() for name, value in direction.items()}
    assert_close(change, oracles.along(jacobian, exact))
    assert_close(logits, readout(model, batch).detach().double())


FOLLOWING = {
    "sketch": lambda capture, model: project.project(capture, project_matrices()),
    "two-sided sketch": lambda capture, model: project.project_two_sided(
        capture, project_matrices(), project_matrices()
    ),
    "intrinsic dimension": lambda capture, model: project.intrinsic_dimension(
        capture, project_matrices()
    ),
    "lora": lambda capture, model: adapters.lora(capture, {"first": normal(8, 64)}, scale=1.0),
    "dora": lambda capture, model: adapters.dora(
        capture, model, {"first": normal(8, 64)}, scale=1.0
    ),
    "ia3": lambda capture, model: adapters.ia3(capture, model, ["first"]),
    "packed signs": lambda capture, model: packed.signed_capture(capture),
}


def project_matrices():
    return RandomMatrices(48, seed=3, entries=Entries.gaussian)


@pytest.mark.parametrize("follow", FOLLOWING.values(), ids=list(FOLLOWING))
def test_what_follows_a_capture_multiplies_by_the_faster_library(follow, chosen, by_onednn):
    model = Tokens()
    batch = {"tokens": normal(8, 48, 64), "alive": torch.ones(8, 48)}
    capture = Tracer(model, readout, signs=True).capture(batch)
    for faster in (True, False):
        chosen(faster)
        assert by_onednn(lambda: follow(capture, model)) is faster


@pytest.mark.parametrize("faster", [True, False])
def test_attention_of_a_pass_is_not_fused_where_onednn_multiplies(faster, chosen):
    chosen(faster)
    model, x = nn.Linear(16, 16), normal(2, 4, 8, 16)
    with prepared(model, list(model.parameters())):
        out = F.scaled_dot_product_attention(model(x), x, x)
    assert ("Flash" in out.grad_fn.name()) != faster
    out = F.scaled_dot_product_attention(model(x), x, x)
    assert "Flash" in out.grad_fn.name()


def test_a_pass_multiplies_by_the_faster_library(chosen):
    chosen(True)
    before = setting()
    with prepared(Tokens(), ()):
        assert setting() == "bf16"
    assert setting() == before
