"""Adapter kernels from one capture of the plain model equal those of the real PEFT models."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from raykernel.errors import InputError
from raykernel.ntk.adapters import (
    dora,
    expected_lora_scale,
    ia3,
    input_widths,
    lora,
    lora_matrices,
    lora_scale,
)
from raykernel.ntk.capture import Tracer
from raykernel.ntk.contract import gram, grams
from raykernel.ntk.empirical import empirical_kernel
from raykernel.ntk.selections import is_bias, norm_groups, only, target_groups
from raykernel.terms import Kind
from tests import cases, oracles
from tests.cases import readout

TARGETS = {
    "roberta": ["query", "value", "output.dense"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "down_proj"],
    "albert": ["query", "ffn"],  # one layer, used twice
    "deberta_v2": ["query_proj", "key_proj"],  # positions go through both, too
}
FEEDFORWARD = {"roberta": ["output.dense"], "gpt2": ["mlp.c_proj"], "llama": ["down_proj"]}
THREE = [(name, dtype) for name in FEEDFORWARD for dtype in (torch.float32, torch.float64)]
FOUR = [("roberta", torch.float32), *[(name, torch.float64) for name in FEEDFORWARD]]
JOINED = [("albert", torch.float64), ("deberta_v2", torch.float64)]
COLS = cases.token_batch(n=3, lengths=(5, 8, 11), seed=8)
PREFIX = "base_model.model."


def plain_case(name, dtype=torch.float64):
    case = cases.transformer_case(name)
    case.model.to(dtype)
    return case


def captures(case):
    tracer = Tracer(case.model, case.readout)
    return tracer.capture(case.batch), tracer.capture(COLS)


def adapted(model, config):
    """The PEFT model, its adapters as PEFT initialises them, in the plain model's type."""
    import peft

    dtype = next(model.parameters()).dtype
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D, of tied heads, of a renamed attribute
        return peft.get_peft_model(copy.deepcopy(model), config).to(dtype).eval()


def drawn_by_peft(model):
    """PEFT's A by layer of the plain model."""
    return {
        path.removeprefix(PREFIX): module.lora_A["default"].weight
        for path, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def by_layer(blocks, ending):
    """PEFT's blocks of one of its parameters, by layer of the plain model."""
    return {
        group.removeprefix(PREFIX).split(f".{ending}")[0]: block
        for group, block in blocks.items()
        if f".{ending}" in group
    }


def assert_equal(actual, expected, dtype):
    """Per layer and in sum; what vanishes (a key's DoRA magnitude) vanishes against the whole."""
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    assert actual.keys() == expected.keys()
    whole = sum(expected.values()).norm()
    assert whole > 0
    for layer, block in expected.items():
        error = (actual[layer] - block).norm()
        assert error <= tolerance * (block.norm() + 1e-3 * whole), layer


def check(case, own, reference, *, names, kinds=(Kind.sgd,)):
    """`own` captures against the PEFT model's kernel; names: our ending and PEFT's."""
    dtype = next(case.model.parameters()).dtype
    blocks = grams(own[0], own[1], kinds=kinds)
    options = {"kinds": kinds, "batch_size": 8}
    expected = empirical_kernel(reference, case.readout, case.batch, COLS, **options)
    for kind in kinds:
        for ours, theirs in names.items():
            real = by_layer(expected[kind.value], theirs)
            assert_equal(by_layer(blocks[kind], ours), real, dtype)
        assert len(blocks[kind]) == len(names) * len(real)
        rest = sum(expected[kind.value].values()) - sum(blocks[kind].values())
        assert rest.norm() <= 1e-5 * sum(blocks[kind].values()).norm()
    return blocks


def lora_config(name, **options):
    import peft

    return peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": TARGETS[name], **options},
        fan_in_fan_out=name == "gpt2",
    )


@pytest.mark.parametrize(("name", "dtype"), THREE + JOINED)
def test_lora_equals_the_peft_model(name, dtype):
    rslora = name in ("llama", "deberta_v2")
    case = plain_case(name, dtype)
    reference = adapted(case.model, lora_config(name, use_rslora=rslora))
    scale = lora_scale(5, 3, rslora=rslora)
    matrices = drawn_by_peft(reference)
    own = [lora(capture, matrices, scale=scale) for capture in captures(case)]
    assert set(matrices) == set(
        target_groups(Tracer(case.model, case.readout).groups, TARGETS[name])
    )
    check(case, own, reference, names={"lora_B": "lora_B"})


@pytest.mark.parametrize(("name", "dtype"), FOUR)
def test_dora_equals_the_peft_model(name, dtype):
    case = plain_case(name, dtype)
    reference = adapted(case.model, lora_config(name, use_dora=True))
    matrices = drawn_by_peft(reference)
    own = [dora(capture, case.model, matrices, scale=5 / 3) for capture in captures(case)]
    names = {"lora_B": "lora_B", "lora_magnitude": "lora_magnitude_vector"}
    check(case, own, reference, names=names)


@pytest.mark.parametrize(("name", "dtype"), FOUR)
def test_ia3_equals_the_peft_model(name, dtype):
    import peft

    case = plain_case(name, dtype)
    config = peft.IA3Config(
        target_modules=TARGETS[name],
        feedforward_modules=FEEDFORWARD[name],
        fan_in_fan_out=name == "gpt2",
    )
    own = captures(case)
    layers = target_groups(own[0].parts, TARGETS[name])
    inner = target_groups(own[0].parts, FEEDFORWARD[name])
    assert 0 < len(inner) < len(layers)
    scaled = [ia3(capture, case.model, layers, feedforward=inner) for capture in own]
    check(case, scaled, adapted(case.model, config), names={"ia3_l": "ia3_l"})


def test_kernels_of_signs_follow_from_the_same_capture():
    case = plain_case("roberta")
    reference = adapted(case.model, lora_config("roberta"))
    own = [lora(capture, drawn_by_peft(reference), scale=5 / 3) for capture in captures(case)]
    kinds = (Kind.signgd, Kind.asigngd)
    check(case, own, reference, names={"lora_B": "lora_B"}, kinds=kinds)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_float32_equals_the_definition(method):
    """Against one float64 backward pass per example and output of the PEFT model."""
    import peft

    case = plain_case("roberta", torch.float32)
    capture = Tracer(case.model, case.readout).capture(case.batch)
    if method == "ia3":
        config = peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[])
        layers = target_groups(capture.parts, ["key", "value"])
        reference, own = adapted(case.model, config), ia3(capture, case.model, layers)
    else:
        config = lora_config("roberta", use_dora=method == "dora")
        reference = adapted(case.model, config)
        matrices = drawn_by_peft(reference)
        own = lora(capture, matrices, scale=5 / 3)
        if method == "dora":
            own = dora(capture, case.model, matrices, scale=5 / 3)
    expected = sum(oracles.kernel_by_parameter(reference, case.readout, case.batch).values())
    assert oracles.relative_error(sum(gram(own, own).values()), expected) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_parts_form_the_gradient_of_b_itself(name):
    """∂f/∂B as PEFT stores B, (o, r), also where the weight is stored (i, o)."""
    case = plain_case(name)
    reference = adapted(case.model, lora_config(name))
    capture = Tracer(case.model, case.readout).capture(case.batch)
    own = lora(capture, drawn_by_peft(reference), scale=5 / 3)
    gradients = oracles.jacobian(reference, case.readout, case.batch)
    for layer in drawn_by_peft(reference):
        (part,) = own.parts[f"{layer}.lora_B"][f"{layer}.lora_B.weight"]
        expected = gradients[f"{PREFIX}{layer}.lora_B.default.weight"]
        block = part.row_block(slice(0, part.num_rows)).flatten(2)
        assert oracles.relative_error(block, expected) < 1e-9


def test_a_tied_head_takes_an_adapter():
    case = plain_case("gpt2")
    reference = adapted(case.model, lora_config("llama", target_modules=["lm_head"]))
    own = [lora(c, drawn_by_peft(reference), scale=5 / 3) for c in captures(case)]
    check(case, own, reference, names={"lora_B": "lora_B"})


def test_the_gradient_of_a_vanishes_and_that_of_b_does_not():
    case = plain_case("roberta", torch.float32)
    reference = adapted(case.model, lora_config("roberta"))
    blocks = empirical_kernel(reference, case.readout, case.batch)["sgd"]
    assert all(not block.any() for block in by_layer(blocks, "lora_A").values())
    capture = Tracer(case.model, case.readout).capture(case.batch)
    own = lora(capture, drawn_by_peft(reference), scale=5 / 3)
    assert all(block.norm() > 0 for block in gram(own, own).values())
    assert all("lora_A" not in group for group in own.groups)


class WithLargeHead(nn.Module):
    """Two of 1500 outputs are read, so the capture keeps two rows of the head only."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 1500)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x))).sum(1)[:, [900, 7]]


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "ia3_input"])
def test_a_head_of_which_few_rows_are_read(method):
    import peft

    torch.manual_seed(0)
    model = WithLargeHead().double()
    batch = {"x": torch.randn(3, 2, 4, dtype=torch.float64)}
    capture = Tracer(model, readout).capture(batch)
    assert capture.parts["head"]["head.weight"][0].rows.tolist() == [7, 900]
    if method.startswith("ia3"):
        inner = ["head"] if method == "ia3_input" else []
        config = peft.IA3Config(target_modules=["head"], feedforward_modules=inner)
        own, reference = ia3(capture, model, ["head"], feedforward=inner), adapted(model, config)
    else:
        dora_too = method == "dora"
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["head"], use_dora=dora_too)
        reference = adapted(model, config)
        matrices = drawn_by_peft(reference)
        own = lora(capture, matrices, scale=1.0)
        if dora_too:
            own = dora(capture, model, matrices, scale=1.0)
    expected = sum(oracles.kernel_by_parameter(reference, readout, batch).values())
    assert expected.norm() > 0
    assert oracles.relative_error(sum(gram(own, own).values()), expected) < 1e-12


class Tokens(nn.Module):
    """Three linear layers on tokens; the last is used once, the others on every token."""

    def __init__(self, bias):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5, bias=bias), nn.Linear(5, 4, bias=bias)
        self.last = nn.Linear(4, 2, bias=bias)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))).sum(1))


class Adapted(nn.Module):
    """(W + s B A) a + bias by its definition."""

    def __init__(self, layer, a, scale):
        super().__init__()
        self.layer, self.a, self.scale = layer.requires_grad_(False), a, scale
        self.b = nn.Parameter(a.new_zeros(len(layer.weight), len(a)))

    def forward(self, x):
        change = self.scale * self.b @ self.a.to(self.b)
        return nn.functional.linear(x, self.layer.weight + change, self.layer.bias)


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 7),
    alpha=st.floats(0.1, 64),
    rslora=st.booleans(),
    layers=st.sets(st.sampled_from(["first", "second", "last"]), min_size=1),
    n=st.integers(1, 4),
    t=st.integers(1, 6),
    bias=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_lora_is_the_gradient_of_its_definition(rank, alpha, rslora, layers, n, t, bias, seed):
    """⟨∂f/∂B, ∂f'/∂B⟩ of f with W + s B A, at any rank, scale, layers and batch."""
    torch.manual_seed(seed % 2**31)
    model = Tokens(bias).double()
    batch = {"x": torch.randn(n, t, 3, dtype=torch.float64)}
    capture = Tracer(model, readout).capture(batch)
    scale = lora_scale(alpha, rank, rslora=rslora)
    assert scale == pytest.approx(alpha / (math.sqrt(rank) if rslora else rank))
    matrices = lora_matrices(
        input_widths(layers, capture), rank=rank, seed=seed, dtype=torch.float64
    )
    own = lora(capture, matrices, scale=scale)
    blocks = gram(own, own)
    model.requires_grad_(False)
    for layer in layers:
        setattr(model, layer, Adapted(getattr(model, layer), matrices[layer], scale))
    expected = oracles.kernel_by_parameter(model, readout, batch)
    assert blocks.keys() == {f"{layer}.lora_B" for layer in layers}
    for layer in layers:
        error = oracles.relative_error(blocks[f"{layer}.lora_B"], expected[f"{layer}.b"])
        assert error < 1e-9


def weight_kernel(capture, layer):
    weight = only(capture, lambda group, name: name == f"{layer}.weight")
    return gram(weight, weight)[layer]


@pytest.fixture(scope="module")
def token_capture():
    torch.manual_seed(0)
    model = Tokens(bias=True).double()
    return Tracer(model, readout).capture({"x": torch.randn(3, 4, 3, dtype=torch.float64)})


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_expectation_over_a_has_its_closed_form(token_capture, rank):
    """A finite set of A with E[AᵀA] = r / (3 d) I exactly: rows √(1/3) e_j, shifted cyclically."""
    d = 5
    rows = torch.eye(d, dtype=torch.float64) / math.sqrt(3)
    kernels = []
    for shift in range(d):
        a = rows[(torch.arange(rank) + shift) % d]
        own = lora(token_capture, {"second": a}, scale=0.7)
        kernels.append(gram(own, own)["second.lora_B"])
    expected = expected_lora_scale(rank, 0.7, d) * weight_kernel(token_capture, "second")
    assert oracles.relative_error(torch.stack(kernels).mean(0), expected) < 1e-12


def test_mean_over_drawn_a_is_the_expectation(token_capture):
    """Monte Carlo over 1000 seeds, every entry within five standard errors."""
    kernels = []
    for seed in range(1000):
        a = lora_matrices({"second": 5}, rank=2, seed=seed)
        own = lora(token_capture, a, scale=1.5)
        kernels.append(gram(own, own)["second.lora_B"])
    drawn = torch.stack(kernels)
    expected = expected_lora_scale(2, 1.5, 5) * weight_kernel(token_capture, "second")
    error = (drawn.mean(0) - expected).abs()
    assert (error < 5 * drawn.std(0) / math.sqrt(len(drawn))).all()
    assert error.norm() < 0.1 * expected.norm()


def test_a_is_uniform_with_the_bounds_and_moments_of_peft():
    a = lora_matrices({"layer": 400}, rank=500, seed=1, dtype=torch.float64)["layer"]
    assert a.abs().max() <= 1 / 20
    assert a.abs().max() > 0.999 / 20
    # Standard errors of the mean and of the second moment, times five.
    assert abs(float(a.mean())) < 5 * math.sqrt(1 / 1200 / a.numel())
    variance = 1 / (3 * 400)
    assert abs(float(a.square().mean()) - variance) < 5 * variance * math.sqrt(0.8 / a.numel())
    kaiming = nn.init.kaiming_uniform_(torch.empty(500, 400), a=math.sqrt(5))
    assert float(kaiming.abs().max()) == pytest.approx(float(a.abs().max()), rel=1e-3)


def test_a_depends_on_seed_and_layer_alone():
    widths = {"h.0.query": 6, "h.0.value": 6, "h.1.query": 6}
    every = lora_matrices(widths, rank=4, seed=3)
    alone = lora_matrices({"h.1.query": 6}, rank=4, seed=3)
    assert torch.equal(every["h.1.query"], alone["h.1.query"])
    assert torch.equal(lora_matrices(widths, rank=2, seed=3)["h.0.value"], every["h.0.value"][:2])
    others = [*every.values(), lora_matrices(widths, rank=4, seed=4)["h.0.query"]]
    assert len({tuple(a.flatten().tolist()) for a in others}) == 4
    # The same bits on every machine and with every version of numpy.
    drawn = lora_matrices({"h.1.query": 4}, rank=1, seed=3, dtype=torch.float64)
    assert drawn["h.1.query"][0].tolist() == PINNED


PINNED = [-0.39359188065891026, 0.013703300090851966, 0.2954889312350981, 0.15608733994845914]


def test_gradients_are_shared_and_nothing_needs_a_gradient():
    case = plain_case("roberta", torch.float32)
    capture = Tracer(case.model, case.readout).capture(case.batch)
    layers = target_groups(capture.parts, ["query"])
    matrices = lora_matrices(input_widths(layers, capture), rank=2, seed=0)
    own = lora(capture, {g: nn.Parameter(a) for g, a in matrices.items()}, scale=1.0)
    for layer in layers:
        (before,) = capture.parts[layer][f"{layer}.weight"]
        (after,) = own.parts[f"{layer}.lora_B"][f"{layer}.lora_B.weight"]
        assert after.gradients is before.gradients
        assert not after.inputs.requires_grad


class Gated(nn.Module):
    """Its expert is used by examples with a positive first entry only."""

    def __init__(self):
        super().__init__()
        self.expert, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        chosen = (x[:, :1] > 0).nonzero()[:, 0]
        if len(chosen):
            x = x.index_add(0, chosen, self.expert(x[chosen]))
        return self.head(x)


def test_a_layer_that_no_example_uses_has_a_kernel_of_zeros():
    torch.manual_seed(0)
    model = Gated()
    tracer = Tracer(model, readout)
    used, unused = (tracer.capture({"x": sign * torch.rand(2, 3)}) for sign in (1, -1))
    assert not unused.parts["expert"]
    widths = input_widths(["expert", "head"], unused, used)
    assert widths == {"expert": 3, "head": 3}
    matrices = lora_matrices(widths, rank=2, seed=0)
    adapters = [
        lambda capture: lora(capture, matrices, scale=1.0),
        lambda capture: dora(capture, model, matrices, scale=1.0),
        lambda capture: ia3(capture, model, list(widths), feedforward=["expert"]),
        lambda capture: only(capture, is_bias),
    ]
    for adapter in adapters:
        rows, cols = adapter(used), adapter(unused)
        for left, right in ((rows, cols), (cols, rows), (cols, cols)):
            blocks = gram(left, right)
            assert len(blocks) >= 2
            for group, block in blocks.items():
                assert bool(block.any()) == group.startswith("head")
        assert all(block.any() for block in gram(rows, rows).values())


def check_selection(case, keep):
    """`only` against a kernel for which only the chosen parameters have requires_grad."""
    tracer = Tracer(case.model, case.readout)
    own = only(tracer.capture(case.batch), keep)
    chosen = {name for by_name in own.parts.values() for name in by_name}
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_(name in chosen)
    expected = empirical_kernel(case.model, case.readout, case.batch)["sgd"]
    assert_equal(gram(own, own), expected, torch.float64)
    return chosen


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_bitfit_equals_a_kernel_of_biases_only(name):
    case = plain_case(name)
    chosen = check_selection(case, is_bias)
    assert chosen == {n for n, _ in case.model.named_parameters() if n.endswith(".bias")}


@pytest.mark.parametrize("name", ["roberta", "gpt2", "llama"])
def test_norms_only(name):
    case = plain_case(name)
    norms = norm_groups(case.model)
    chosen = check_selection(case, lambda group, _: group in norms)
    expected = {"roberta": "norm", "gpt2": "ln_", "llama": "norm"}[name]
    assert chosen == {n for n, _ in case.model.named_parameters() if expected in n.lower()}


def test_head_only_with_the_embedding_that_is_tied_to_it():
    case = plain_case("roberta")
    tied = "roberta.embeddings.word_embeddings.weight"
    chosen = check_selection(case, lambda group, name: group.startswith("lm_head") or name == tied)
    assert tied in chosen
    assert len(chosen) == 6


def test_one_layers_share_of_a_tied_parameter():
    """By layer group: the head without the embedding, as if the two were not tied."""
    case = plain_case("roberta")
    capture = Tracer(case.model, case.readout).capture(case.batch)
    head = only(capture, lambda group, name: group.startswith("lm_head"))
    whole = gram(capture, capture)
    for group, block in gram(head, head).items():
        assert torch.equal(block, whole[group])
    assert not head.crosses


NAMES = ("h.0.attn.query", "h.0.attn.value", "h.10.attn.query", "query", "h.0.my_query")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["query"], (0, 2, 3)),
        (["attn.query", "h.0.attn.value"], (0, 1, 2)),
        (r".*\.0\..*(query|value)", (0, 1, 4)),
        (r"query", (3,)),
    ],
)
def test_targets_are_chosen_as_peft_chooses_modules(targets, expected):
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(target_modules=targets)
    assert target_groups(NAMES, targets) == tuple(NAMES[i] for i in expected)
    real = [name for name in NAMES if check_target_module_exists(config, name)]
    assert list(target_groups(NAMES, targets)) == real


@pytest.mark.parametrize("targets", [["qery"], ["query", "qery"], r".*qery", "(", []])
def test_targets_that_fit_nothing_are_refused(targets):
    with pytest.raises(InputError, match="targets"):
        target_groups(NAMES, targets)
    with pytest.raises(InputError, match="did you mean 'query'"):
        target_groups(NAMES, ["qery"])


def test_what_takes_no_adapter_is_refused(token_capture):
    case = plain_case("roberta", torch.float32)
    capture = Tracer(case.model, case.readout).capture(case.batch)
    embedding, norm = "roberta.embeddings.word_embeddings", "lm_head.layer_norm"
    for group, message in [
        (embedding, "linear layer"),
        (norm, "linear layer"),
        ("lm_head.dens", "did you mean 'lm_head.dense'"),
    ]:
        with pytest.raises(InputError, match=message):
            lora(capture, {group: torch.ones(2, cases.HIDDEN)}, scale=1.0)
    biases = only(token_capture, is_bias)
    with pytest.raises(InputError, match="requires_grad"):
        input_widths(["first"], biases)
    with pytest.raises(InputError, match=r"\(2, 4\), expected \(rank, 3\)"):
        lora(token_capture, {"first": torch.ones(2, 4)}, scale=1.0)


def test_wrong_options_are_refused(token_capture):
    model = Tokens(bias=True).double()
    with pytest.raises(InputError, match="rank"):
        lora_scale(1, 0)
    with pytest.raises(InputError, match="rank"):
        lora_matrices({"first": 3}, rank=0, seed=0)
    with pytest.raises(InputError, match="feedforward"):
        ia3(token_capture, model, ["first"], feedforward=["second"])
    with torch.no_grad():
        model.first.weight[1] = 0
    with pytest.raises(InputError, match="zero"):
        dora(token_capture, model, {"first": torch.ones(1, 3)}, scale=1.0)
    with pytest.raises(InputError, match="none of 6 parameters"):
        only(token_capture, lambda group, name: False)
