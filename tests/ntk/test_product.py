"""J w and Jᵀ α equal the Jacobian's products, whatever way they are taken."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from raykernel.errors import InputError, NonFiniteError
from raykernel.ntk.empirical import empirical_kernel
from raykernel.ntk.product import tangent, tangents, weighted_gradient
from tests import cases, oracles
from tests.cases import Module, normal, pieces, random_direction, readout

D, T, N, C = 6, 4, 3, 2
TEST = cases.token_batch(n=3, lengths=(5, 8, 11), seed=8)


def bare_parameters():
    def forward(m, x):
        h = m.embed(x) * m.scale.exp() + m.shift + m.table
        return m.head(torch.tanh(h)).mean(1) * m.factor

    torch.manual_seed(0)
    module = Module(
        forward,
        embed=nn.Embedding(cases.VOCAB, D),
        head=nn.Linear(D, C),
        scale=nn.Parameter(torch.randn(D)),
        shift=nn.Parameter(torch.randn(D)),
        table=nn.Parameter(torch.randn(1, 1, D)),
        factor=nn.Parameter(torch.tensor(1.7)),
    )
    return cases.Case(
        module.eval(), lambda model, batch: model(batch["input_ids"]), cases.token_batch()
    )


CASES = {
    **{
        name: partial(cases.transformer_case, name)
        for name in ("roberta", "gpt2", "llama", "albert")
    },
    "lora": partial(cases.lora_case, "roberta", zero_b=False),
    "bare_parameters": bare_parameters,
    "some_frozen": partial(cases.partly_frozen_case, "roberta", "layer.1", "word_embeddings"),
}


def assert_same_vector(actual, expected, tolerance):
    """Relative to the whole vector: attention's key bias has no gradient but rounding."""
    assert actual.keys() == expected.keys()
    scale = torch.cat(list(expected.values())).norm()
    for name, value in expected.items():
        assert (actual[name].double().flatten() - value).norm() < tolerance * scale, name


def tolerance_of(name, dtype):
    # Llama normalises in float32 whatever the model's type.
    return 1e-5 if dtype is torch.float32 else 1e-6 if name == "llama" else 1e-10


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


@DTYPES
@pytest.mark.parametrize("name", list(CASES))
def test_kernel_times_weights_is_the_tangent_along_their_gradient(name, dtype):
    """K[test, train] α = J_test (J_trainᵀ α)."""
    case = CASES[name]()
    case.model.to(dtype)
    alpha = normal(5, C)
    w = weighted_gradient(case.model, case.readout, pieces(case.batch, 2, 3), alpha)
    logits, predicted = tangents(case.model, case.readout, pieces(TEST, 1, 2), w)
    blocks = empirical_kernel(case.model, case.readout, TEST, case.batch)["sgd"]
    expected = torch.einsum("iajb,jb->ia", sum(blocks.values()).double(), alpha)
    assert oracles.relative_error(predicted, expected) < tolerance_of(name, dtype)
    assert torch.allclose(logits, case.readout(case.model, TEST), rtol=1e-4, atol=1e-5)
    assert logits.dtype == predicted.dtype == dtype


@DTYPES
@pytest.mark.parametrize("name", list(CASES))
def test_products_with_the_jacobian_equal_the_definition(name, dtype):
    case = CASES[name]()
    case.model.to(dtype)
    tolerance = tolerance_of(name, dtype)
    jacobian = oracles.jacobian(case.model, case.readout, case.batch)
    alpha = normal(5, C)
    w = weighted_gradient(case.model, case.readout, pieces(case.batch, 4, 1), alpha)
    assert_same_vector(w, oracles.fold(jacobian, alpha), tolerance)
    assert all(w[name].shape == p.shape for name, p in oracles.selected(case.model).items())
    direction = random_direction(case.model)
    _, change = tangent(case.model, case.readout, case.batch, direction)
    # Padding's embedding has no gradient, but forward mode would follow it.
    assert oracles.relative_error(change, oracles.along(jacobian, direction)) < tolerance


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    depth=st.integers(0, 2),
    c=st.integers(1, 3),
    tied=st.booleans(),
    frozen=st.sets(st.integers(0, 4)),
)
def test_any_small_network_equals_the_definition(seed, sizes, depth, c, tied, frozen):
    def forward(m, x):
        h = m.embed(x).mean(1)
        for layer in m.layers:
            h = torch.tanh(layer(h))
        return m.head(h)[:, :c]

    torch.manual_seed(seed)
    layers = nn.ModuleList([nn.Linear(D, D) for _ in range(depth)])
    model = Module(forward, embed=nn.Embedding(9, D), layers=layers, head=nn.Linear(D, 9)).double()
    if tied:
        model.head.weight = model.embed.weight
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i not in frozen or i == 0)
    batch = {"x": torch.randint(0, 9, (sum(sizes), T))}
    jacobian = oracles.jacobian(model, readout, batch)
    alpha = normal(sum(sizes), c, seed=seed)
    w = weighted_gradient(model, readout, pieces(batch, *sizes), alpha)
    assert_same_vector(w, oracles.fold(jacobian, alpha), 1e-12)
    direction = random_direction(model)
    _, change = tangents(model, readout, pieces(batch, *sizes), direction)
    assert torch.allclose(change, oracles.along(jacobian, direction), rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------ where forward mode fails
class Plain(torch.autograd.Function):
    """x Wᵀ with a backward pass only."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).T @ x.flatten(0, -2)


class Once(Plain):
    """The same, whose backward pass says that it cannot be differentiated."""

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return Plain.backward(ctx, gradient)


class Detached(Plain):
    """The same, whose backward pass loses the gradient without a word."""

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.detach().flatten(0, -2).T @ x.flatten(0, -2)


class WrongForwardMode(Plain):
    """The same with a forward-mode formula that is wrong."""

    @staticmethod
    def jvp(ctx, x, weight):
        like = x if weight is None else weight
        return like.new_zeros(N, T, D)


def through(function):
    return lambda: Module(
        lambda m, x: m.head(torch.tanh(function.apply(x, m.first.weight)).mean(1)),
        first=nn.Linear(D, D, bias=False),
        head=nn.Linear(D, C),
    )


def without_gradient():
    def forward(m, x):
        with torch.no_grad():
            gate = torch.sigmoid(m.first(x))
        return m.head((m.first(x) * gate).mean(1))

    return Module(forward, first=nn.Linear(D, D), head=nn.Linear(D, C))


def mixing_examples():
    """Time first, so that an example's output depends on those before it."""
    return Module(lambda m, x: m.lstm(x)[0][:, -1], lstm=nn.LSTM(D, C))


def kept_in_a_list():
    module = Module(lambda m, x: m.head(torch.tanh(x @ m.kept[0])).mean(1), head=nn.Linear(D, C))
    module.weight = nn.Parameter(torch.randn(D, D))
    module.kept = [module.weight]
    return module


def attention():
    def forward(m, x):
        x = m.first(x)
        return m.head(F.scaled_dot_product_attention(x, x, x, is_causal=True).mean(1))

    return Module(forward, first=nn.Linear(D, D), head=nn.Linear(D, C))


WHOLE, ONE = [N], [1]
FORWARD = WHOLE + ONE
DOUBLE = WHOLE + WHOLE + ONE
"""A failed forward mode, the differentiated backward pass, its check."""

WAYS = {
    "attention": (attention, FORWARD),
    "recurrent": (
        lambda: Module(lambda m, x: m.lstm(x)[0][:, -1], lstm=nn.LSTM(D, C, batch_first=True)),
        FORWARD,
    ),
    "encoder_layer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(D, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(T * D, C)
        ),
        FORWARD,
    ),
    "backward_only": (through(Plain), DOUBLE),
    "backward_once": (through(Once), WHOLE + WHOLE + ONE + ONE * N),
    "backward_detached": (through(Detached), WHOLE + WHOLE + ONE + ONE * N),
    "wrong_forward_mode": (through(WrongForwardMode), WHOLE + ONE + WHOLE + ONE),
    "no_grad": (without_gradient, WHOLE + ONE + WHOLE + ONE),
    "mixing_examples": (mixing_examples, WHOLE + ONE + WHOLE + ONE + ONE * N),
    "kept_in_a_list": (kept_in_a_list, DOUBLE),
}
"""Module, and the sizes of the batches that the readout is called with."""


@pytest.mark.parametrize("name", list(WAYS))
def test_every_way_gives_the_product_with_the_jacobian(name):
    build, expected_sizes = WAYS[name]
    torch.manual_seed(0)
    model = build().double()
    batch = {"x": normal(N, T, D)}
    sizes = []

    def counting(m, batch):
        sizes.append(len(batch["x"]))
        return m(batch["x"])

    direction = random_direction(model)
    logits, change = tangent(model, counting, batch, direction)
    jacobian = oracles.jacobian(model, readout, batch)
    assert oracles.relative_error(change, oracles.along(jacobian, direction)) < 1e-10
    assert sizes == expected_sizes
    alone = [model.eval()(one["x"]) for one in pieces(batch, *[1] * N)]
    assert torch.allclose(logits, torch.cat(alone))
    assert not logits.requires_grad
    assert not change.requires_grad
    w = weighted_gradient(model, readout, [batch], normal(N, C))
    assert_same_vector(w, oracles.fold(jacobian, normal(N, C)), 1e-10)


@pytest.mark.parametrize("sizes", [(3,), (1, 2), (1, 1, 1)])
def test_a_model_that_mixes_examples_is_asked_for_one_at_a_time(sizes):
    torch.manual_seed(0)
    model = mixing_examples().double()
    batch = {"x": normal(N, T, D)}
    jacobian = oracles.jacobian(model, readout, batch)
    w = weighted_gradient(model, readout, pieces(batch, *sizes), normal(N, C))
    assert_same_vector(w, oracles.fold(jacobian, normal(N, C)), 1e-12)
    _, change = tangents(model, readout, pieces(batch, *sizes), w)
    assert oracles.relative_error(change, oracles.along(jacobian, w)) < 1e-10


def test_a_way_is_looked_for_once():
    torch.manual_seed(0)
    model = through(Plain)().double()
    sizes = []

    def counting(m, batch):
        sizes.append(len(batch["x"]))
        return m(batch["x"])

    tangents(model, counting, [{"x": normal(N, T, D)}] * 3, random_direction(model))
    assert sizes == DOUBLE + WHOLE + WHOLE


def test_a_batch_that_the_first_way_cannot_do_is_done_in_another():
    torch.manual_seed(0)

    def forward(m, x):
        h = Plain.apply(x, m.first.weight) if len(x) == 1 else m.first(x)
        return m.head(torch.tanh(h)).mean(1)

    model = Module(forward, first=nn.Linear(D, D, bias=False), head=nn.Linear(D, C)).double()
    batch = {"x": normal(N, T, D)}
    direction = random_direction(model)
    _, change = tangents(model, readout, pieces(batch, 2, 1), direction)
    expected = oracles.along(oracles.jacobian(model, readout, batch), direction)
    assert oracles.relative_error(change, expected) < 1e-10


@pytest.mark.parametrize("padding_idx", [3, -6])
def test_an_embeddings_padding_row_does_not_vary(padding_idx):
    """Also where only the first example reads it, and where the matrix is the head's, too."""
    torch.manual_seed(0)
    embed = nn.Embedding(9, D, padding_idx=padding_idx)
    model = Module(
        lambda m, x: F.linear(m.embed(x).mean(1), m.embed.weight)[:, [3, 5]], embed=embed
    ).double()
    batch = {"x": torch.tensor([[1, 3, 3, 7], [4, 1, 1, 1], [8, 0, 2, 5]])}
    direction = random_direction(model)
    sizes = []

    def counting(m, batch):
        sizes.append(len(batch["x"]))
        return m(batch["x"])

    _, change = tangent(model, counting, batch, direction)
    expected = oracles.along(oracles.jacobian(model, readout, batch), direction)
    assert oracles.relative_error(change, expected) < 1e-12
    assert sizes == FORWARD


def test_outputs_that_depend_on_nothing_do_not_change():
    model = Module(lambda m, x: x[:, 0, :C] * 2, unused=nn.Linear(D, D))
    batch = {"x": normal(N, T, D).float().requires_grad_()}
    _, change = tangent(model, readout, batch, random_direction(model))
    w = weighted_gradient(model, readout, [batch], normal(N, C))
    assert not change.any()
    assert not any(value.any() for value in w.values())


def test_sparse_gradients_are_added_densely():
    torch.manual_seed(0)
    embed = nn.Embedding(9, D, sparse=True)
    model = Module(lambda m, x: m.head(m.embed(x).mean(1)), embed=embed, head=nn.Linear(D, C))
    batch = {"x": torch.tensor([[1, 2, 2, 7], [3, 1, 1, 1], [8, 0, 2, 5]])}
    w = weighted_gradient(model, readout, pieces(batch, 2, 1), normal(N, C))
    _, change = tangent(model, readout, batch, w)
    embed.sparse = False
    jacobian = oracles.jacobian(model, readout, batch)
    assert_same_vector(w, oracles.fold(jacobian, normal(N, C)), 1e-6)
    assert oracles.relative_error(change, oracles.along(jacobian, w)) < 1e-6


def test_half_precision_gradients_add_up_in_float32():
    """A thousand batches that each move w by less than bfloat16 can tell from its sum."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    batches = [{"x": torch.ones(1, 1, dtype=torch.bfloat16)}] * 1000
    w = weighted_gradient(model, readout, batches, torch.ones(1000, 1))
    assert w["weight"].dtype == torch.float32
    assert w["weight"].item() == 1000.0
    _, change = tangent(model, readout, batches[0], w)
    assert change.item() == 1000.0


# ------------------------------------------------------------------ the model as it was
CALLS = {
    "weighted_gradient": lambda m, r, b: weighted_gradient(m, r, [b], normal(N, C)),
    "tangent": lambda m, r, b: tangent(m, r, b, {"0.bias": torch.ones(D)}),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("call", list(CALLS))
def test_modes_flags_and_gradients_are_as_before(call, fails):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Linear(D, C)).train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones(D, D)

    def broken(m, batch):
        assert not any(module.training for module in m.modules())
        out = m(batch["x"])
        if fails:
            raise ZeroDivisionError
        return out

    batch = {"x": normal(N, D).float()}
    if fails:
        with pytest.raises(ZeroDivisionError):
            CALLS[call](model, broken, batch)
    else:
        with torch.no_grad():
            CALLS[call](model, broken, batch)
    assert [m.training for m in model] == [True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert torch.equal(model[0].weight.grad, torch.ones(D, D))
    assert model[2].weight.grad is None
    assert not model[0].weight._backward_hooks
    assert torch.backends.cuda.flash_sdp_enabled()


def test_frozen_parameters_are_no_part_of_the_gradient_but_may_be_of_a_direction():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, C)).double()
    model[0].requires_grad_(False)
    batch = {"x": normal(N, D)}
    assert set(weighted_gradient(model, readout, [batch], normal(N, C))) == {"1.weight", "1.bias"}
    _, change = tangent(model, readout, batch, {"0.bias": normal(D)})
    assert torch.allclose(change, (model[1].weight @ normal(D)).expand(N, C))


def linear():
    torch.manual_seed(0)
    return nn.Linear(D, C)


BATCH = {"x": normal(N, D).float()}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(N - 1, C), "3, expected one row"),
        (torch.ones(N + 1, C), "3, expected one row"),
        (torch.ones(N, C + 1), "3 outputs"),
        (torch.full((N, C), torch.nan), "NaN"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(InputError, match=message):
        weighted_gradient(linear(), readout, pieces(BATCH, 2, 1), weights)


def test_nothing_selected_is_refused():
    with pytest.raises(InputError, match="requires_grad"):
        weighted_gradient(linear().requires_grad_(False), readout, [BATCH], torch.ones(N, C))


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ({}, "empty"),
        ({"wieght": torch.ones(C, D)}, "did you mean 'weight'"),
        ({"weight": torch.ones(D, C)}, r"expected the parameter's, \(2, 6\)"),
    ],
)
def test_directions_that_do_not_fit_are_refused(direction, message):
    with pytest.raises(InputError, match=message):
        tangent(linear(), readout, BATCH, direction)


def test_no_batch_is_refused():
    with pytest.raises(InputError, match="no batch"):
        tangents(linear(), readout, [], {"bias": torch.ones(C)})


@pytest.mark.parametrize("wrong", [lambda m, b: m(b["x"]).sum(1), lambda m, b: (m(b["x"]),)])
def test_readouts_of_another_shape_are_refused(wrong):
    with pytest.raises(InputError, match="readout"):
        tangent(linear(), wrong, BATCH, {"bias": torch.ones(C)})
    with pytest.raises(InputError, match="readout"):
        weighted_gradient(linear(), wrong, [BATCH], torch.ones(N, C))


def test_an_error_of_the_readout_is_its_own():
    def broken(model, batch):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        tangent(linear(), broken, BATCH, {"bias": torch.ones(C)})


def test_values_that_are_not_finite_are_refused():
    model = nn.Sequential(linear(), Module(lambda m, x: (x * 0).sqrt()))
    direction = {"0.bias": torch.ones(C)}
    with pytest.raises(NonFiniteError, match="J w"):
        tangent(model, readout, BATCH, direction)
    with pytest.raises(NonFiniteError, match=r"0\.(weight|bias): its weighted gradient"):
        weighted_gradient(model, readout, [BATCH], torch.ones(N, C))
    model[0].weight.data[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"'0\.weight' holds"):
        tangent(model, readout, BATCH, direction)
