"""What holds of the kernels of a transformer and of its adapters whatever the weights and texts."""

from __future__ import annotations

import pytest
import torch

from raykernel.adapters import adapter_kernels
from raykernel.ntk.adapters import lora, lora_matrices
from raykernel.ntk.capture import Tracer
from raykernel.ntk.contract import gram
from raykernel.ntk.empirical import empirical_kernel
from raykernel.ntk.factors import Product
from tests import cases, oracles


def double_case(name, *varying):
    """In float64; only parameters vary that have one of these in their name, or all."""
    case = cases.partly_frozen_case(name, *varying or [""])
    case.model.double()
    return case


def first_token_readout(model, batch):
    """Three outputs of the last hidden state of the first token."""
    encoder = model.base_model
    hidden = encoder(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return hidden[:, 0] @ cases.normal(hidden.shape[-1], 3, seed=4).to(hidden)


def matrix(kernel):
    """(n, c, n, c) as a matrix."""
    n, c = kernel.shape[:2]
    return kernel.reshape(n * c, n * c)


def assert_positive_semidefinite(kernel):
    """Symmetric, no eigenvalue below zero but rounding, and not zero."""
    flat = matrix(kernel)
    scale = float(flat.trace())
    assert scale > 0
    assert (flat - flat.T).abs().max() < 1e-12 * scale
    assert torch.linalg.eigvalsh((flat + flat.T) / 2).min() > -1e-12 * scale


def weight_parts(capture, group):
    parts = capture.parts[group][f"{group}.weight"]
    assert all(isinstance(part, Product) for part in parts)
    return parts


# ---------------------------------------------------------------- attention


KEYS = {
    "roberta": "roberta.encoder.layer.{}.attention.self.key",
    "bert": "bert.encoder.layer.{}.attention.self.key",
    "distilbert": "distilbert.transformer.layer.{}.attention.k_lin",
}
VALUES = {"key": "value", "k_lin": "v_lin"}


@pytest.mark.parametrize("name", list(KEYS))
@pytest.mark.parametrize("layer", [0, 1])
def test_a_constant_added_to_all_keys_changes_no_gradient_of_theirs(name, layer):
    """As softmax is over keys, Σ_t b_t = 0: Σ_t b_t ⊗ (a_t - v) is one for all v, but of values."""
    key = KEYS[name].format(layer)
    last = key.rsplit(".", 1)[-1]
    value = key.removesuffix(last) + VALUES[last]
    case = double_case(name, f"{key}.weight", f"{value}.weight")
    capture = Tracer(case.model, case.readout).capture(case.batch)
    before = gram(capture, capture)
    for group, moves in ((key, False), (value, True)):
        (part,) = weight_parts(capture, group)
        sums, each = part.gradients.sum(2), part.gradients.norm(dim=-1).sum(2)
        assert bool((sums.norm(dim=-1) < 1e-12 * each.max()).all()) != moves
        part.inputs.add_(cases.normal(part.inputs.shape[-1], seed=6))
    after = gram(capture, capture)
    assert oracles.relative_error(after[key], before[key]) < 1e-9
    assert oracles.relative_error(after[value], before[value]) > 1e-2


@pytest.fixture(scope="module")
def first_token():
    """A RoBERTa read at its first token, of which the queries' weights vary."""
    case = double_case("roberta", "query.weight")
    return cases.Case(case.model, first_token_readout, case.batch)


def seen_by(case, group):
    """Inputs of a layer at the first token."""
    found = []
    module = case.model.get_submodule(group)
    hook = module.register_forward_hook(lambda _module, args, _output: found.append(args[0][:, 0]))
    with torch.no_grad():
        case.readout(case.model, case.batch)
    hook.remove()
    return found[0]


def test_the_last_queries_of_a_first_token_readout_have_gradients_of_rank_one(first_token):
    """G = g ⊗ x of that token alone; those of the first layer have every token in them."""
    capture = Tracer(first_token.model, first_token.readout).capture(first_token.batch)
    for layer, is_last in ((0, False), (1, True)):
        (part,) = weight_parts(capture, f"roberta.encoder.layer.{layer}.attention.self.query")
        values = torch.linalg.svdvals(part.row_block(slice(0, part.num_rows)))
        second = values[..., 1] / values[..., 0]
        assert bool((second < 1e-12).all()) == is_last
        assert is_last or bool((second > 1e-3).any())


def test_their_kernel_is_a_product_of_two_and_so_is_that_of_lora(first_token):
    """K = ⟨g, g'⟩ ⟨x, x'⟩ and s² ⟨g, g'⟩ ⟨A x, A x'⟩; g is the bias's gradient, by autograd."""
    group = "roberta.encoder.layer.1.attention.self.query"
    biased = double_case("roberta", f"{group}.bias")
    g = oracles.jacobian(biased.model, first_token.readout, first_token.batch)[f"{group}.bias"]
    x = seen_by(first_token, group)
    capture = Tracer(first_token.model, first_token.readout).capture(first_token.batch)
    whole = torch.einsum("iap,jbp,ik,jk->iajb", g, g, x, x)
    assert oracles.relative_error(gram(capture, capture)[group], whole) < 1e-10
    matrices = lora_matrices({group: x.shape[1]}, rank=2, seed=1, dtype=torch.float64)
    own = lora(capture, matrices, scale=1.5)
    low = 1.5 * x @ matrices[group].T
    expected = torch.einsum("iap,jbp,ik,jk->iajb", g, g, low, low)
    assert oracles.relative_error(gram(own, own)[f"{group}.lora_B"], expected) < 1e-10


# ---------------------------------------------------------------- sets of parameters


def test_disjoint_sets_of_parameters_add_up():
    """K_{S ∪ T} = K_S + K_T, each by itself with the others frozen, weights apart from biases."""
    names = [name for name, _ in double_case("roberta").model.named_parameters() if "layer" in name]
    one, other = names[::2], names[1::2]
    kernels = []
    for chosen in (one, other, names):
        case = double_case("roberta", *chosen)
        kernel = sum(empirical_kernel(case.model, case.readout, case.batch)["sgd"].values())
        assert_positive_semidefinite(kernel)
        kernels.append(kernel)
    assert oracles.relative_error(kernels[0] + kernels[1], kernels[2]) < 1e-12
    assert min(oracles.relative_error(kernel, kernels[2]) for kernel in kernels[:2]) > 1e-3


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("name", list(cases.LORA_TARGETS))
def test_a_lora_that_has_not_been_trained_gives_the_output_of_the_plain_model(name):
    """To the bit, since B = 0: the plain model's capture is at that point."""
    plain = cases.transformer_case(name)
    with torch.no_grad():
        expected = plain.readout(plain.model, plain.batch)
        untrained, trained = (cases.lora_case(name, zero_b=zero_b) for zero_b in (True, False))
        assert torch.equal(untrained.readout(untrained.model, plain.batch), expected)
        assert not torch.allclose(trained.readout(trained.model, plain.batch), expected)


@pytest.fixture(scope="module")
def start():
    """LoRA of two ranks at s = 1 and DoRA, total kernels and DoRA's layers, all with the same A."""
    import peft

    case = double_case("roberta", "query.weight", "value.weight")
    common = {"target_modules": ["query", "value"], "bias": "none"}
    found = adapter_kernels(
        case.model,
        case.readout,
        case.batch,
        adapters={
            "lora 2": peft.LoraConfig(r=2, lora_alpha=2, **common),
            "lora 4": peft.LoraConfig(r=4, lora_alpha=4, **common),
            "dora 2": peft.LoraConfig(r=2, lora_alpha=2, use_dora=True, **common),
        },
    )
    return case, {name: sum(blocks.values()) for name, blocks in found.items()}, found["dora 2"]


def test_dora_has_what_lora_has_and_magnitudes(start):
    """K_DoRA - K_LoRA is positive semidefinite, the kernel of the magnitudes and nothing else."""
    _, kernels, layers = start
    gap = kernels["dora 2"] - kernels["lora 2"]
    assert_positive_semidefinite(gap)
    magnitudes = sum(block for name, block in layers.items() if name.endswith(".lora_magnitude"))
    assert oracles.relative_error(gap, magnitudes) < 1e-10


def test_a_larger_rank_has_what_a_smaller_one_has_and_the_rest_of_a(start):
    """A sum over rows of A: K of r = 4 minus K of r = 2, at one s, is that of two rows."""
    case, kernels, _ = start
    gap = kernels["lora 4"] - kernels["lora 2"]
    assert_positive_semidefinite(gap)
    capture = Tracer(case.model, case.readout).capture(case.batch)
    widths = dict.fromkeys(capture.parts, cases.HIDDEN)
    rows = lora_matrices(widths, rank=4, seed=0, dtype=torch.float64)
    rest = lora(capture, {group: own[2:] for group, own in rows.items()}, scale=1.0)
    # The kernels above are of A in float32.
    assert oracles.relative_error(gap, sum(gram(rest, rest).values())) < 1e-6


# ---------------------------------------------------------------- finite differences


@pytest.mark.parametrize("name", ["roberta", "distilbert"])
def test_a_step_along_a_gradient_moves_the_outputs_by_a_column_of_the_kernel(name):
    """d/dε f(θ + ε ∇(aᵀ f)) = K a, by the difference of two passes: no derivative is involved."""
    case = double_case(name)
    kernel = matrix(whole(empirical_kernel(case.model, case.readout, case.batch)["sgd"]))
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    logits = case.readout(case.model, case.batch)
    a = cases.normal(*logits.shape, seed=11)
    gradients = torch.autograd.grad((a * logits).sum(), parameters, materialize_grads=True)
    step = 1e-5 / float(kernel.diagonal().max())

    def at(distance):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter += distance * gradient
            found = case.readout(case.model, case.batch)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= distance * gradient
        return found.flatten()

    found = (at(step) - at(-step)) / (2 * step)
    expected = kernel @ a.flatten()
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def whole(blocks):
    """Σ over layer groups."""
    return torch.stack(list(blocks.values())).sum(0)
