"""The linear layers of a model whose weights were not read, against the model itself."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers import GPT2Config as Gpt2Config
from transformers import GPT2LMHeadModel as Gpt2
from transformers.pytorch_utils import Conv1D

from raykernel.config import ModelConfig
from raykernel.errors import InputError
from raykernel.problem.checkpoints import prepare_model
from raykernel.problem.skeleton import adapted_paths, layer_linears, lora_parameters
from raykernel.terms import Architecture
from tests import tiny

CLASSES = {"roberta": AutoModelForMaskedLM, "gpt2": AutoModelForCausalLM, "encoder": AutoModel}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("skeleton")
    tiny.save_masked_lm(folder / "roberta")
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 20}
    Gpt2(Gpt2Config(**sizes, bos_token_id=1, eos_token_id=1)).save_pretrained(folder / "gpt2")
    return {name: folder / name for name in ("roberta", "gpt2")} | {"encoder": folder / "roberta"}


def config_of(name: str, places: dict[str, Path]) -> ModelConfig:
    kind = Architecture.causal_lm if name == "gpt2" else Architecture.masked_lm
    return prepare_model(ModelConfig(name=str(places[name]), architecture=kind))


@pytest.mark.parametrize("name", CLASSES)
def test_layers_are_those_of_the_loaded_model(name: str, places: dict[str, Path]) -> None:
    found = layer_linears(config_of(name, places), has_prompt=name != "encoder")
    model = CLASSES[name].from_pretrained(places[name])
    shapes = {
        path: layer.weight.shape
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
        and any(part.isdecimal() for part in path.split("."))
    }
    assert {path: layer.weight.shape for path, layer in found.items()} == shapes
    assert all(p.is_meta for layer in found.values() for p in layer.parameters())


@pytest.mark.parametrize("name", CLASSES)
def test_a_lora_of_the_default_modules_is_that_of_peft(name: str, places: dict[str, Path]) -> None:
    config = config_of(name, places)
    linears = layer_linears(config, has_prompt=name != "encoder")
    paths = adapted_paths(linears, [], config)
    model = CLASSES[name].from_pretrained(places[name])
    with warnings.catch_warnings():  # PEFT reads an attribute that transformers renames
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        settings = peft.LoraConfig(r=3, fan_in_fan_out=name == "gpt2")
        adapted = peft.get_peft_model(model, settings)
    modules = dict(adapted.base_model.model.named_modules())
    assert [path for path in linears if hasattr(modules[path], "lora_A")] == paths
    num = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert sum(lora_parameters(linears[path], 3) for path in paths) == num


def test_modules_are_named_by_their_ends(places: dict[str, Path]) -> None:
    config = config_of("roberta", places)
    linears = layer_linears(config, has_prompt=True)
    ends = ["attention.output.dense", "layer.1.attention.self.key"]
    assert adapted_paths(linears, ends, config) == [
        "roberta.encoder.layer.0.attention.output.dense",
        "roberta.encoder.layer.1.attention.self.key",
        "roberta.encoder.layer.1.attention.output.dense",
    ]
    for wrong in ("decoder", "kye"):
        with pytest.raises(InputError, match="names no linear layer"):
            adapted_paths(linears, [wrong], config)
