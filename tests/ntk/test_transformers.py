"""Kernels of real architectures equal the definition, per layer group and in sum."""

from __future__ import annotations

import pytest
import torch

from raykernel.ntk.capture import Tracer
from raykernel.ntk.contract import gram
from raykernel.ntk.empirical import empirical_kernel
from raykernel.ntk.groups import layer_groups
from tests import cases, oracles

NAMES = [*cases.MASKED, *cases.CAUSAL]


def expected_blocks(model, readout, rows, cols=None):
    """One block per group, and the sum of the cross groups, from an untied copy's gradients."""
    per_use = oracles.untie(model)
    left = oracles.jacobian(per_use, readout, rows)
    right = left if cols is None else oracles.jacobian(per_use, readout, cols)
    blocks = {}
    for group, names in layer_groups(model).items():
        own = [name for name in names if name in left]
        blocks[group] = sum(oracles.inner(left[name], right[name]) for name in own)
    return blocks


def check(case, *, tolerance, cols=None, **options):
    blocks = empirical_kernel(case.model, case.readout, case.batch, cols, **options)["sgd"]
    whole = sum(oracles.kernel_by_parameter(case.model, case.readout, case.batch, cols).values())
    assert oracles.relative_error(sum(blocks.values()), whole) < tolerance
    scale = whole.norm()
    for group, expected in expected_blocks(case.model, case.readout, case.batch, cols).items():
        error = (blocks[group].double() - expected).norm()
        # Attention's key bias has no gradient but rounding, hence the share of the whole.
        assert error < tolerance * expected.norm() + 1e-3 * tolerance * scale, group
    return blocks


@pytest.mark.parametrize("name", NAMES)
def test_float32_equals_the_definition(name):
    check(cases.transformer_case(name), tolerance=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_float64_equals_the_definition_also_off_the_diagonal(name, monkeypatch):
    if name.startswith("gemma"):  # its norms go through x.float(), whatever the model's type
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    case = cases.transformer_case(name)
    case.model.double()
    cols = cases.token_batch(n=3, lengths=(5, 8, 11), seed=8)
    check(case, tolerance=1e-10, cols=cols)


@pytest.mark.parametrize("zero_b", [True, False])
@pytest.mark.parametrize("name", list(cases.LORA_TARGETS))
def test_lora_equals_the_definition(name, zero_b):
    blocks = check(cases.lora_case(name, zero_b=zero_b), tolerance=1e-5)
    assert all("lora_" in group for group in blocks)
    if zero_b:
        assert all(not block.any() for group, block in blocks.items() if "lora_A" in group)


def test_lora_at_initialisation_has_its_closed_form():
    """With B = 0, K = s² Σ_tu ⟨b_t, b'_u⟩ ⟨A h_t, A h'_u⟩, s = lora_alpha / r."""
    case = cases.lora_case("llama", zero_b=True)
    case.model.double()
    lora = empirical_kernel(case.model, case.readout, case.batch)["sgd"]
    path = "base_model.model.model.layers.1.mlp.down_proj"
    module = case.model.get_submodule(path)
    seen = {}
    module.base_layer.register_forward_hook(lambda m, args, out: seen.update(h=args[0], b=out))
    kernel = torch.zeros(5, 2, 5, 2, dtype=torch.float64)
    for a in range(2):
        for b in range(2):
            (h, grad_a), (_, grad_b) = (
                (seen["h"], torch.autograd.grad(logits[:, o].sum(), seen["b"])[0])
                for o in (a, b)
                for logits in [case.readout(case.model, case.batch)]
            )
            low = h.detach() @ module.lora_A["default"].weight.detach().T
            kernel[:, a, :, b] = (
                torch.einsum("nto,muo,ntr,mur->nm", grad_a, grad_b, low, low) * (4 / 2) ** 2
            )
    assert oracles.relative_error(lora[f"{path}.lora_B.default"], kernel) < 1e-10


def test_tied_embedding_and_head_add_a_cross_group():
    case = cases.transformer_case("roberta")
    embedding, head = "roberta.embeddings.word_embeddings", "lm_head.decoder"
    blocks = check(case, tolerance=1e-5)
    left = oracles.jacobian(oracles.untie(case.model), case.readout, case.batch)
    g, h = left[f"{embedding}.weight"], left[f"{head}.weight"]
    expected = oracles.inner(g, h) + oracles.inner(h, g)
    cross = blocks[f"cross({embedding}, {head})"]
    assert expected.norm() > 0
    assert oracles.relative_error(cross, expected) < 1e-5


def test_a_head_bias_belongs_to_the_decoder_that_adds_it():
    case = cases.transformer_case("roberta")
    groups = layer_groups(case.model)
    assert "lm_head.decoder.bias" in groups["lm_head.decoder"]
    assert "lm_head" not in groups


@pytest.mark.parametrize("name", ["roberta", "gpt2", "llama"])
def test_padding_and_its_side_change_nothing(name):
    case = cases.transformer_case(name)
    wide = {
        k: torch.nn.functional.pad(v, (0, 5), value=cases.PAD if k == "input_ids" else 0)
        for k, v in case.batch.items()
        if v.dim() == 2
    }
    batches = [case.batch, {**wide, "position": case.batch["position"]}]
    if name in cases.CAUSAL:
        batches.append(cases.token_batch(side="left"))
    kernels = [
        sum(empirical_kernel(case.model, case.readout, batch)["sgd"].values()) for batch in batches
    ]
    for kernel in kernels[1:]:
        assert oracles.relative_error(kernel, kernels[0]) < 1e-5


@pytest.mark.parametrize("name", ["roberta", "deberta_v2", "gpt2"])
def test_batch_size_and_order_change_nothing(name):
    case = cases.transformer_case(name)
    whole = empirical_kernel(case.model, case.readout, case.batch)["sgd"]
    pieces = empirical_kernel(case.model, case.readout, case.batch, batch_size=2)["sgd"]
    order = torch.tensor([3, 0, 4, 1, 2])
    mixed = empirical_kernel(
        case.model, case.readout, {k: v[order] for k, v in case.batch.items()}
    )["sgd"]
    for group, block in whole.items():
        assert oracles.relative_error(pieces[group], block) < 1e-4 or block.norm() < 1e-6
        expected = block[order][:, :, order]
        assert oracles.relative_error(mixed[group], expected) < 1e-4 or block.norm() < 1e-6


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_kernel_is_symmetric_and_positive_semi_definite(name):
    case = cases.transformer_case(name)
    case.model.double()
    blocks = empirical_kernel(case.model, case.readout, case.batch)["sgd"]
    for group, block in blocks.items():
        matrix = block.reshape(10, 10)
        assert torch.allclose(matrix, matrix.T, atol=1e-12 * float(matrix.abs().max() + 1))
        if not group.startswith("cross"):
            assert torch.linalg.eigvalsh(matrix).min() > -1e-10 * matrix.trace() - 1e-14


def test_scaling_the_function_scales_the_kernel_by_the_square():
    case = cases.transformer_case("bert")
    plain = empirical_kernel(case.model, case.readout, case.batch)["sgd"]
    scaled = empirical_kernel(case.model, lambda m, b: -3 * case.readout(m, b), case.batch)["sgd"]
    whole = sum(plain.values())
    assert oracles.relative_error(sum(scaled.values()), 9 * whole) < 1e-5


def test_selecting_parameters_leaves_the_others_out():
    case = cases.transformer_case("roberta")
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_("bias" in name)
    check(case, tolerance=1e-5)


def test_bfloat16_needs_no_fallback():
    case = cases.transformer_case("roberta")
    expected = sum(empirical_kernel(case.model, case.readout, case.batch)["sgd"].values())
    case.model.bfloat16()
    tracer = Tracer(case.model, case.readout)
    blocks = gram(capture := tracer.capture(case.batch), capture)
    assert tracer.batched
    assert not tracer.fallbacks
    assert sum(blocks.values()).dtype == torch.float32
    assert oracles.relative_error(sum(blocks.values()), expected) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_cuda_equals_the_definition(name):
    case = cases.transformer_case(name)
    whole = sum(oracles.kernel_by_parameter(case.model, case.readout, case.batch).values())
    batch = {key: value.cuda() for key, value in case.batch.items()}
    first, second = (
        sum(empirical_kernel(case.model.cuda(), case.readout, batch)["sgd"].values())
        for _ in range(2)
    )
    assert first.is_cuda
    assert oracles.relative_error(first.cpu(), whole) < 1e-5
    assert torch.equal(first, second)
