"""Kernels of PEFT configurations in one call equal those of the real PEFT models, by autograd."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import peft
import pytest
import torch
from torch import nn

import raykernel
from raykernel.errors import InputError
from raykernel.ntk.adapters import lora_matrices
from tests import cases, oracles

ROBERTA = {
    "lora": partial(peft.LoraConfig, r=3, lora_alpha=5, target_modules=["query", "value"]),
    "rslora": partial(peft.LoraConfig, r=4, use_rslora=True, target_modules=r".*layer\.1\..*dense"),
    "dora": partial(peft.LoraConfig, r=2, use_dora=True, target_modules=["output.dense"]),
    "patterns": partial(
        peft.LoraConfig,
        r=2,
        target_modules=["query", "key"],
        layers_to_transform=[1],
        rank_pattern={"key": 3},
        alpha_pattern={"query": 7},
    ),
    "ia3": partial(
        peft.IA3Config, target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]
    ),
    "default": partial(peft.LoraConfig),
}
GPT2 = {
    "lora": partial(peft.LoraConfig, r=2, target_modules=["c_attn", "c_proj"]),
    "dora": partial(peft.LoraConfig, r=2, use_dora=True, target_modules=["mlp.c_fc"]),
    "ia3": partial(
        peft.IA3Config, target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]
    ),
}
COLS = cases.token_batch(n=2, lengths=(5, 8), seed=8)
SEED = 4


def plain_case(name: str) -> cases.Case:
    case = cases.transformer_case(name)
    case.model.double()
    return case


def real(model: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """PEFT's model in float64, with our A."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D, of tied heads, of a renamed attribute
        adapted = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    for path, module in adapted.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            weight = module.lora_A["default"].weight
            layer = path.removeprefix("base_model.model.")
            drawn = lora_matrices({layer: weight.shape[1]}, rank=weight.shape[0], seed=SEED)
            weight.data.copy_(drawn[layer])
    return adapted


def kernel_of(model: nn.Module, case: cases.Case) -> torch.Tensor:
    blocks = oracles.kernel_by_parameter(model, case.readout, case.batch, COLS)
    return torch.stack(list(blocks.values())).sum(0)


@pytest.mark.parametrize(("name", "configs"), [("roberta", ROBERTA), ("gpt2", GPT2)])
def test_kernels_are_those_of_the_peft_models(name, configs):
    """Every trained parameter of the real model counts, none is left out or added."""
    case = plain_case(name)
    case.model.requires_grad_(False)  # plays no role
    adapters = {key: make() for key, make in configs.items()}
    found = raykernel.adapter_kernels(
        case.model, case.readout, case.batch, COLS, adapters=adapters, seed=SEED, batch_size=3
    )
    assert list(found) == list(configs)
    for key, make in configs.items():
        expected = kernel_of(real(case.model, make()), case)
        whole = torch.stack(list(found[key].values())).sum(0)
        assert expected.norm() > 0
        assert oracles.relative_error(whole, expected) < 1e-9, key
    assert not any(p.requires_grad for p in case.model.parameters())


def test_blocks_are_named_by_layer_and_parameter():
    case = plain_case("roberta")
    found = raykernel.adapter_kernels(
        case.model, case.readout, case.batch, adapters={"dora": ROBERTA["dora"]()}
    )["dora"]
    layer = "roberta.encoder.layer.0.output.dense"
    assert {f"{layer}.lora_B", f"{layer}.lora_magnitude"} < set(found)
    assert all(block.shape == (5, 2, 5, 2) for block in found.values())


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("bitfit", lambda name: name.endswith("bias")),
        ("norm", lambda name: "norm" in name.lower()),
        ("head", lambda name: name.startswith("classifier")),
    ],
)
def test_selections_are_the_kernels_of_these_parameters(method, trained):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    config = RobertaConfig(**cases.SIZES, pad_token_id=cases.PAD, num_labels=2)
    model = RobertaForSequenceClassification(config).double().eval()
    names = [name for name, _ in model.named_parameters()]

    def readout(model, batch):
        return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    batch = {k: v for k, v in cases.token_batch().items() if k != "position"}
    found = raykernel.adapter_kernels(model, readout, batch, adapters={"it": method})["it"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    assert 0 < sum(map(trained, names)) < len(names)
    expected = oracles.kernel_by_parameter(model, readout, batch)
    whole = torch.stack(list(found.values())).sum(0)
    assert oracles.relative_error(whole, sum(expected.values())) < 1e-9


@pytest.mark.parametrize(
    ("chosen", "helps"),
    [
        ("bitfitt", "did you mean 'bitfit'"),
        (peft.LoraConfig(target_modules=["qery"]), "PEFT refuses it"),
        (peft.LoraConfig(target_modules=["query"], bias="all"), "bias', which is trained, too"),
        (peft.LoraConfig(target_modules=["query"], init_lora_weights="pissa"), "'pissa'"),
        (peft.LoraConfig(target_modules=["query"], init_lora_weights=False), "set by False"),
        (peft.LoraConfig(target_modules=["word_embeddings"]), "lora_embedding_A"),
        (
            peft.LoraConfig(target_modules=["query"], modules_to_save=["lm_head"]),
            "which is trained, too",
        ),
    ],
)
def test_what_has_no_closed_form_is_refused(chosen, helps):
    case = plain_case("roberta")
    with pytest.raises(InputError) as caught:
        raykernel.adapter_kernels(case.model, case.readout, case.batch, adapters={"x": chosen})
    assert helps in str(caught.value)
    assert "adapters['x']" in str(caught.value)


def test_nothing_to_do_is_refused():
    case = plain_case("roberta")
    with pytest.raises(InputError, match="adapters: found none"):
        raykernel.adapter_kernels(case.model, case.readout, case.batch, adapters={})
