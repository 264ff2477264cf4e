"""The engine on modules that break an assumption each: exact, and the model left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raykernel.errors import InconsistentError, NonFiniteError
from raykernel.ntk.capture import Capture, Tracer
from raykernel.ntk.contract import gram
from raykernel.ntk.empirical import empirical_kernel
from tests import cases, oracles
from tests.cases import Module, readout

D, T, N = 6, 4, 3


def inputs(*shape, seed=0):
    return {"x": torch.randn(*shape, generator=torch.Generator().manual_seed(seed))}


def tokens(*shape, high=9, seed=0):
    return {"x": torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))}


def vector(size=D):
    return nn.Parameter(torch.randn(size))


def norm_with_zero():
    norm = nn.LayerNorm(D)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.weight)
    norm.weight.data[2] = 0.0
    return norm


class LabelRows(nn.Linear):
    """A head that multiplies some rows only, at a position that it gathers itself."""

    def __init__(self, rows):
        super().__init__(D, 9)
        self.rows = torch.tensor(rows)

    def forward(self, x):
        return F.linear(x[:, 1], self.weight[self.rows], self.bias[self.rows])


class Scaled(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 3.0


class Hidden(torch.autograd.Function):
    """A product that no torch function mode can see."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        return gradient @ weight, rows


def in_place(m, x):
    h = m.first(x)
    h += m.second(x)
    h = m.third(h)
    h[:, 0].mul_(2.0)
    h = F.relu_(h)
    return m.head(h).sum(1)


def experts(m, x):
    h = m.first(x)
    flat = h.flatten(0, 1)
    out = torch.zeros_like(flat)
    chosen = flat[:, 0] > 0
    out[chosen] = m.second(flat[chosen])
    out[~chosen] = m.third(flat[~chosen])
    return m.head(out.view_as(h)).mean(1)


def functional_tie(m, x):
    return F.linear(m.first(m.embed(x)).mean(1), m.embed.weight)[:, 3:5]


def linears(*names, d=D, c=2):
    return {name: nn.Linear(d, d) for name in names} | {"head": nn.Linear(d, c)}


MODELS = {
    "two_dimensional_input": (
        lambda: nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 2)),
        inputs(N, D),
    ),
    "one_output": (lambda: nn.Sequential(nn.Linear(D, 1)), inputs(N, D)),
    "reused_module": (
        lambda: Module(
            lambda m, x: m.head(m.first(torch.tanh(m.first(x))).mean(1)), **linears("first")
        ),
        inputs(N, T, D),
    ),
    "in_place": (lambda: Module(in_place, **linears("first", "second", "third")), inputs(N, T, D)),
    "bare_parameters": (
        lambda: Module(
            lambda m, x: m.head((x * m.scale + m.shift + m.table).mean(1)),
            **linears(),
            scale=vector(),
            shift=vector(),
            table=nn.Parameter(torch.randn(1, T, D)),
        ),
        inputs(N, T, D),
    ),
    "scalar_parameter": (
        lambda: Module(
            lambda m, x: m.head(x.mean(1)) * m.s, **linears(), s=nn.Parameter(torch.tensor(1.7))
        ),
        inputs(N, T, D),
    ),
    "unknown_use": (
        lambda: Module(
            lambda m, x: m.head((x * m.scale.exp()).mean(1)), **linears(), scale=vector()
        ),
        inputs(N, T, D),
    ),
    "unknown_leaf": (
        lambda: nn.Sequential(
            Module(lambda m, x: x * m.scale.exp(), scale=vector()),
            nn.Flatten(),
            nn.Linear(T * D, 2),
        ),
        inputs(N, T, D),
    ),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv1d(T, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(3 * (D - 2), 2)
        ),
        inputs(N, T, D),
    ),
    "batch_norm": (
        lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, 2)),
        inputs(N, D),
    ),
    "zero_norm_weight": (
        lambda: nn.Sequential(nn.Linear(D, D), norm_with_zero(), nn.Flatten(), nn.Linear(T * D, 2)),
        inputs(N, T, D),
    ),
    "rms_norm": (
        lambda: nn.Sequential(nn.Linear(D, D), nn.RMSNorm(D), nn.Linear(D, 2)),
        inputs(N, D),
    ),
    "tokens_first": (
        lambda: Module(
            lambda m, x: m.head(torch.tanh(m.first(x.transpose(0, 1)))[0]), **linears("first")
        ),
        inputs(N, T, D),
    ),
    "tokens_first_square": (
        lambda: Module(
            lambda m, x: m.head(torch.tanh(m.first(x.transpose(0, 1)))[0]), **linears("first")
        ),
        inputs(N, N, D),
    ),
    "experts": (lambda: Module(experts, **linears("first", "second", "third")), inputs(N, T, D)),
    "attention": (
        lambda: Module(
            lambda m, x: m.head(m.attend(x, x, x)[0][:, 0]),
            **linears(),
            attend=nn.MultiheadAttention(D, 2, batch_first=True),
        ),
        inputs(N, T, D),
    ),
    "encoder_layer": (
        lambda: Module(
            lambda m, x: m.head(m.layer(x)[:, 0]),
            **linears(),
            layer=nn.TransformerEncoderLayer(D, 2, 8, batch_first=True),
        ),
        inputs(N, T, D),
    ),
    "encoder_layer_tokens_first": (
        lambda: Module(
            lambda m, x: m.head(m.layer(x.transpose(0, 1))[0]),
            **linears(),
            layer=nn.TransformerEncoderLayer(D, 2, 8),
        ),
        inputs(N, T, D),
    ),
    "label_rows": (lambda: nn.Sequential(nn.Linear(D, D), LabelRows([7, 2])), inputs(N, T, D)),
    "equal_label_rows": (
        lambda: nn.Sequential(nn.Linear(D, D), LabelRows([7, 7])),
        inputs(N, T, D),
    ),
    "hidden_use": (
        lambda: Module(
            lambda m, x: m.head(Hidden.apply(x, m.first.weight).mean(1)), **linears("first")
        ),
        inputs(N, T, D),
    ),
    "transposed_use": (
        lambda: Module(
            lambda m, x: m.head((x @ m.first.weight.T @ m.first.weight).mean(1)), **linears("first")
        ),
        inputs(N, T, D),
    ),
    "weight_norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(D, D)), nn.Linear(D, 2)
        ),
        inputs(N, D),
    ),
    "padding_index": (
        lambda: nn.Sequential(nn.Embedding(9, D, padding_idx=3), nn.Flatten(), nn.Linear(T * D, 2)),
        tokens(N, T, high=5),
    ),
    "scaled_embedding": (
        lambda: nn.Sequential(Scaled(9, D), nn.Flatten(), nn.Linear(T * D, 2)),
        tokens(N, T),
    ),
    "functional_tie": (
        lambda: Module(functional_tie, first=nn.Linear(D, D), embed=nn.Embedding(9, D)),
        tokens(N, T),
    ),
    "shared_positions": (
        lambda: Module(
            lambda m, x: m.head(torch.tanh(x + m.place(torch.arange(x.shape[1]))).mean(1)),
            **linears(),
            place=nn.Embedding(T, D),
        ),
        inputs(N, T, D),
    ),
    "positions_as_many_as_examples": (
        lambda: Module(
            lambda m, x: m.head(torch.tanh(x + m.place(torch.arange(x.shape[1]))).mean(1)),
            **linears(),
            place=nn.Embedding(T, D),
        ),
        inputs(T, T, D),
    ),
}


def make(name):
    torch.manual_seed(0)
    build, batch = MODELS[name]
    return build().double().eval(), {
        k: v.double() if v.is_floating_point() else v for k, v in batch.items()
    }


@pytest.mark.parametrize("name", list(MODELS))
def test_sum_over_groups_equals_the_definition(name):
    model, batch = make(name)
    blocks = empirical_kernel(model, readout, batch)["sgd"]
    expected = sum(oracles.kernel_by_parameter(model, readout, batch).values())
    assert oracles.relative_error(sum(blocks.values()), expected) < 1e-10


@pytest.mark.parametrize("name", list(MODELS))
def test_pieces_equal_the_whole(name):
    model, batch = make(name)
    tracer = Tracer(model, readout)
    whole = sum(gram(c := tracer.capture(batch), c).values())
    again = Tracer(model, readout)
    pieces = [again.capture({"x": batch["x"][i:j]}) for i, j in ((0, 1), (1, len(batch["x"])))]
    joined = Capture.concatenate(pieces)
    assert oracles.relative_error(sum(gram(joined, joined).values()), whole) < 1e-10


@pytest.mark.parametrize(
    ("name", "batched"),
    [
        ("in_place", True),
        ("shared_positions", True),
        ("label_rows", True),
        ("hidden_use", False),
        ("tokens_first", False),
        ("tokens_first_square", False),
        ("experts", False),
        ("positions_as_many_as_examples", False),
    ],
)
def test_batches_are_traced_at_once_only_where_examples_are_apart(name, batched):
    model, batch = make(name)
    tracer = Tracer(model, readout)
    tracer.capture(batch)
    assert tracer.batched is batched


@pytest.mark.parametrize(
    ("name", "fallbacks"),
    [
        ("label_rows", {}),
        ("scaled_embedding", {}),
        ("functional_tie", {}),
        ("bare_parameters", {}),
        ("rms_norm", {}),
        ("unknown_leaf", {"0.scale": "module"}),
        ("unknown_use", {"scale": "model"}),
        ("hidden_use", {"first.weight": "model"}),
    ],
)
def test_fallbacks_are_named(name, fallbacks):
    model, batch = make(name)
    tracer = Tracer(model, readout)
    tracer.capture(batch)
    assert tracer.fallbacks == fallbacks


def test_one_ambiguous_shape_does_not_slow_the_others():
    model, square = make("positions_as_many_as_examples")
    tracer = Tracer(model, readout)
    tracer.capture(square)
    assert not tracer.batched
    tracer.capture({"x": square["x"][: T - 1]})
    assert tracer.batched


def test_unused_parameter_has_a_zero_kernel():
    torch.manual_seed(0)
    model = Module(lambda m, x: m.head(x), **linears("unused"))
    blocks = empirical_kernel(model, readout, inputs(N, D))["sgd"]
    assert set(blocks) == {"unused", "head"}
    assert not blocks["unused"].any()
    assert blocks["head"].any()


def test_embedding_factors_hold_tokens_not_the_vocabulary():
    model = nn.Sequential(Scaled(100_000, 2), nn.Flatten(), nn.Linear(2 * T, 2))
    capture = Tracer(model, readout).capture(tokens(N, T, high=100_000))
    assert capture.num_bytes < 10_000


def test_tokens_without_gradient_are_dropped():
    case = cases.transformer_case("roberta")
    capture = Tracer(case.model, case.readout).capture(case.batch)
    group = "roberta.encoder.layer.1.intermediate.dense"
    (part,) = capture.parts[group][f"{group}.weight"]
    assert part.inputs.shape[1] == 1


@pytest.mark.parametrize("fails", [False, True])
def test_modes_flags_and_gradients_are_as_before(fails):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Linear(D, 2)).train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones(D, D)

    def broken(m, batch):
        out = m(batch["x"])
        if fails:
            raise ZeroDivisionError
        return out

    tracer = Tracer(model, broken)
    if fails:
        with pytest.raises(ZeroDivisionError):
            tracer.capture(inputs(N, D))
    else:
        with torch.no_grad():
            tracer.capture(inputs(N, D))
    assert [m.training for m in model] == [True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert torch.equal(model[0].weight.grad, torch.ones(D, D))
    assert model[2].weight.grad is None
    assert not model[0]._forward_hooks


def test_dropout_is_off():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Linear(D, 2)).train()
    first, second = (empirical_kernel(model, readout, inputs(N, D))["sgd"] for _ in range(2))
    assert all(torch.equal(first[group], second[group]) for group in first)


def test_a_random_model_is_refused():
    model = Module(lambda m, x: m.head(F.dropout(x, 0.5, training=True)), **linears())
    model = nn.Sequential(nn.Linear(D, D), model)
    with pytest.raises(InconsistentError, match=r"^1\.head: two passes over the same example"):
        empirical_kernel(model, readout, inputs(N, D))


def test_same_input_gives_same_bits():
    case = cases.transformer_case("roberta")
    first, second = (
        empirical_kernel(case.model, case.readout, case.batch)["sgd"] for _ in range(2)
    )
    assert all(torch.equal(first[group], second[group]) for group in first)


def test_nan_weight_names_its_layer():
    case = cases.transformer_case("roberta")
    layer = "roberta.encoder.layer.1.attention.self.query"
    case.model.get_submodule(layer).weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=layer):
        empirical_kernel(case.model, case.readout, case.batch)


def test_infinite_output_names_its_layer():
    model = nn.Sequential(
        nn.Linear(D, D), Module(lambda m, x: x.abs().neg().log()), nn.Linear(D, 2)
    )
    with pytest.raises(NonFiniteError, match=r"^1: its output"):
        empirical_kernel(model, readout, inputs(N, D))


def test_infinite_gradient_names_the_layer_it_reaches_first():
    model = nn.Sequential(nn.Linear(D, D), Module(lambda m, x: (x * 0).sqrt()), nn.Linear(D, 2))
    with pytest.raises(NonFiniteError, match=r"^0: the gradient"):
        empirical_kernel(model, readout, inputs(N, D))


def test_the_first_example_that_is_not_finite_is_named():
    """By NaN in the input, an output that overflows, and a norm at 0, which has no gradient."""
    batch = inputs(N, D)
    model = nn.Sequential(
        Module(lambda m, x: x * 1e30), Module(lambda m, x: x / 1e30), nn.Linear(D, 2)
    )
    norm = nn.Sequential(Module(lambda m, x: m.head(x) * x.norm(dim=1, keepdim=True), **linears()))
    at_zero = nn.Sequential(
        nn.Linear(D, D, bias=False),
        Module(lambda m, x: m.head(x) + (x**2).sum(1, keepdim=True).sqrt(), **linears()),
    )
    for own, value, text in (
        (model, torch.nan, "^x: example 2 of the batch holds NaN"),
        (model, 1e20, r"^0: its output is infinite, beyond 3.4e\+38.*\(example 2 of the batch"),
        (norm, 1e12, r"^0\.head: its kernel block overflows .* row example 2 and column example 2"),
        (at_zero, 0.0, r"^0: the gradient is NaN or infinite \(example 2 of the batch\)"),
    ):
        changed = {"x": batch["x"].clone()}
        changed["x"][2] = value
        with pytest.raises(NonFiniteError, match=text) as raised:
            empirical_kernel(own, readout, changed)
        assert raised.value.row == 2


def test_memory_of_a_pass_grows_with_its_tokens():
    case = cases.transformer_case("roberta")
    tracer = Tracer(case.model, case.readout)
    short = tracer.bytes_per_example(cases.token_batch(lengths=(5, 5)[:2], n=2))
    long = tracer.bytes_per_example(cases.token_batch(lengths=(20, 20), n=2))
    assert 2 * short < long < 20 * short
    assert tracer.capture(case.batch).num_bytes < 5 * long


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["host", "cuda", "allocator"],
)
def test_a_batch_that_memory_ran_out_for_is_not_taken_for_one_that_is_not_apart(error):
    """Chunks can be halved then; one example at a time would be slow for good."""
    module = torch.nn.Linear(3, 2)

    def readout(model, batch):
        if len(batch["x"]) > 1:
            raise error
        return model(batch["x"])

    with pytest.raises(type(error)):
        Tracer(module, readout).capture({"x": torch.ones(4, 3)})
