from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
import yaml
from torch import nn

from raykernel.config import ParametersConfig
from raykernel.errors import InputError
from raykernel.problem.parameters import layer_index, parameter_layers, select_parameters
from raykernel.problem.readout import read_label_words, restrict_head
from raykernel.terms import Method

CONF = Path(__file__).parents[2] / "conf" / "parameters"
SIZE = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
LABELS = (5, 9)


def roberta(*, dtype: torch.dtype = torch.float64) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        **SIZE, num_hidden_layers=3, max_position_embeddings=20, attn_implementation="eager"
    )
    return with_label_rows(transformers.RobertaForMaskedLM(config).to(dtype))


def gpt2() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=20, attn_implementation="eager"
    )
    return with_label_rows(transformers.GPT2LMHeadModel(config).double())


def with_label_rows(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    restrict_head(model.eval(), LABELS)
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[4, 5, 6, 7], [8, 9, 10, 11]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position": torch.tensor([1, 3]),
    }


def chosen(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def select(model: nn.Module, **choice: object) -> set[str]:
    select_parameters(model, ParametersConfig(**choice))
    return chosen(model)


def test_by_default_every_parameter_varies() -> None:
    model = roberta()
    model.requires_grad_(False)
    assert select(model) == {name for name, _ in model.named_parameters()}


def test_include_and_exclude_search_in_names() -> None:
    names = select(roberta(), include=["bias"], exclude=["layer\\.1\\.", "^lm_head"])
    assert names == {
        name
        for name, _ in roberta().named_parameters()
        if "bias" in name and "layer.1." not in name and not name.startswith("lm_head")
    }


def test_a_tied_parameter_is_found_under_either_name() -> None:
    word = "roberta.embeddings.word_embeddings.weight"
    assert select(roberta(), include=["lm_head.decoder.weight"]) == {word}
    assert word not in select(roberta(), exclude=["lm_head.decoder.weight"])


@pytest.mark.parametrize(("layers", "expected"), [([0], {0}), ([-1], {2}), ([0, 2], {0, 2})])
def test_layers_to_transform_takes_whole_layers(layers: list[int], expected: set[int]) -> None:
    model = roberta()
    names = select(model, layers_to_transform=layers)
    by_layer = parameter_layers(model)
    assert names == {name for name, layer in by_layer.items() if layer in expected}


def test_target_modules_are_last_parts_of_module_names() -> None:
    names = select(roberta(), layers_to_transform=[1], target_modules=["query", "output.dense"])
    attention = "roberta.encoder.layer.1.attention"
    assert names == {
        f"{attention}.self.query.weight",
        f"{attention}.self.query.bias",
        f"{attention}.output.dense.weight",
        f"{attention}.output.dense.bias",
        "roberta.encoder.layer.1.output.dense.weight",
        "roberta.encoder.layer.1.output.dense.bias",
    }
    whole = select(roberta(), layers_to_transform=[1], target_modules=["attention"])
    assert whole == {n for n, _ in roberta().named_parameters() if n.startswith(attention + ".")}


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("roberta.encoder.layer.3.attention.self.query.weight", 3),
        ("model.layers.11.mlp.experts.2.up_proj.weight", 11),
        ("transformer.h.0.attn.c_attn.weight", 0),
        ("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight", 0),
        ("classifier.0.weight", None),
        ("lm_head.layer_norm.weight", None),
    ],
)
def test_layer_index_is_the_number_behind_the_list_of_layers(name: str, index: int | None) -> None:
    assert layer_index(name) == index


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"include": ["no_such_name"]}, "word_embeddings.weight"),
        ({"exclude": ["."]}, "leaves no parameter"),
        ({"include": ["("]}, r"parameters\.include.*regular expression"),
        ({"layers_to_transform": [3]}, "-3 to 2"),
        ({"target_modules": ["qeury"]}, "did you mean 'query'"),
        ({"method": Method.lora, "target_modules": ["qeury"]}, "did you mean 'query'"),
        (
            {"method": Method.lora, "target_modules": ["wxyz"]},
            "all-linear, dense, key, query, value\\.$",
        ),
        ({"method": Method.lora, "target_modules": ["LayerNorm"]}, "takes no adapter"),
        ({"method": Method.lora, "target_modules": ["decoder"]}, "takes no adapter"),
        (
            {
                "method": Method.lora,
                "layers_to_transform": [0],
                "target_modules": ["lm_head.dense"],
            },
            "no such layer",
        ),
    ],
)
def test_a_selection_that_fits_nothing_is_an_input_error(
    choice: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        select(roberta(), **choice)


def test_lora_without_a_default_asks_for_modules() -> None:
    model = roberta()
    model.config.model_type = "unheard-of"
    with pytest.raises(InputError, match=r"attention\.self\.query"):
        select(model, method=Method.lora)


@pytest.mark.parametrize("make", [roberta, gpt2])
def test_lora_starts_at_the_pre_trained_function_with_live_gradients(make: type) -> None:
    model = make()
    before = read_label_words(model, batch())
    names = select(model, method=Method.lora, r=4)
    assert names == {name for name, _ in model.named_parameters() if "lora_" in name}
    after = read_label_words(model, batch())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    after[0, 0].backward()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            assert parameter.any()
            assert not parameter.grad.any()  # dA = s·Bᵀ(...) and B = 0
        if "lora_B" in name:
            assert not parameter.any()
            assert parameter.grad.any()  # merged adapters would have none


def test_lora_goes_where_layers_and_modules_say() -> None:
    names = select(
        roberta(), method=Method.lora, layers_to_transform=[-1], target_modules=["query"]
    )
    path = "roberta.encoder.layer.2.attention.self.query"
    assert names == {f"{path}.lora_{x}.default.weight" for x in "AB"}
    assert select(roberta(), method=Method.lora) == {
        f"roberta.encoder.layer.{layer}.attention.self.{target}.lora_{x}.default.weight"
        for layer in range(3)
        for target in ("query", "value")
        for x in "AB"
    }


def test_all_linear_is_every_linear_layer_but_the_output_head() -> None:
    names = select(roberta(), method=Method.lora, target_modules=["all-linear"])
    assert len(names) == 2 * (3 * 6 + 1)
    assert any(name.startswith("lm_head.dense.") for name in names)


def test_lora_can_add_the_head() -> None:
    names = select(roberta(), method=Method.lora, include=["lora_", "lm_head"])
    assert "lm_head.dense.weight" in names
    assert not any("query.base_layer" in name for name in names)


def test_loras_a_depends_on_its_seed_only() -> None:
    def drawn(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
        select(model, method=Method.lora, seed=seed)
        return {n: p.float() for n, p in model.named_parameters() if "lora_A" in n}

    first, again = drawn(roberta(), 1), drawn(roberta(dtype=torch.float32), 1)
    other = drawn(roberta(), 2)
    for name, a in first.items():
        torch.testing.assert_close(a, again[name], rtol=0, atol=0)
        assert not torch.equal(a, other[name])
    model, state = roberta(), torch.get_rng_state()
    drawn(model, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_loras_a_of_a_layer_knows_nothing_of_the_other_adapters() -> None:
    """What makes the kernel of some adapted layers a part of that of all."""

    def drawn(**choice: object) -> dict[str, torch.Tensor]:
        model = roberta()
        select(model, method=Method.lora, **choice)
        return {n: p.detach() for n, p in model.named_parameters() if "lora_A" in n}

    every = drawn(target_modules=["query", "key", "value"])
    one = drawn(target_modules=["value"], layers_to_transform=[1])
    assert len(one) == 1
    for name, a in one.items():
        assert torch.equal(a, every[name])
    assert len({tuple(a.flatten().tolist()) for a in every.values()}) == len(every) == 9


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("make", [roberta, gpt2])
def test_every_shipped_choice_selects_something(path: Path, make: type) -> None:
    values = yaml.safe_load(path.read_text())
    values["method"] = Method(values["method"])
    names = select(make(), **values)
    assert names
    if path.stem == "no_embeddings":
        assert not any("embed" in n or ".wte" in n or ".wpe" in n for n in names)
    if path.stem == "bitfit":
        assert all(n.endswith("bias") for n in names)
    if path.stem == "head":
        assert all("layer" not in n or "layer_norm" in n for n in names)
