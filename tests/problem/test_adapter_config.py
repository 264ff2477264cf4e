"""Adapters by a configuration of PEFT: what varies is what PEFT adds."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch

from raykernel.config import ParametersConfig
from raykernel.errors import InputError
from raykernel.problem.adapter_config import with_adapter
from raykernel.problem.parameters import select_parameters
from raykernel.terms import Method
from tests import cases

IA3 = {"peft_type": "IA3", "target_modules": ["key", "value"], "feedforward_modules": []}
DORA = {"peft_type": "LORA", "r": 2, "target_modules": ["query"], "use_dora": True}
LOHA = {"peft_type": "LOHA", "r": 2, "target_modules": ["query"]}


def parameters(adapter: object, **options: object) -> ParametersConfig:
    text = adapter if isinstance(adapter, str) else json.dumps(adapter)
    return with_adapter(ParametersConfig(Method.peft, adapter=text, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("adapter", [IA3, DORA, LOHA], ids=["ia3", "dora", "loha"])
def test_what_varies_is_what_peft_adds_and_the_function_stays(adapter: dict[str, object]) -> None:
    case = cases.transformer_case("roberta")
    known = {name for name, _ in case.model.named_parameters()}
    before = case.readout(case.model, case.batch)
    select_parameters(case.model, parameters(adapter))
    varying = {name for name, p in case.model.named_parameters() if p.requires_grad}
    assert varying
    assert all(".default" in name and name not in known for name in varying)
    assert not any("base_layer" in name for name in varying)
    torch.testing.assert_close(case.readout(case.model, case.batch), before, rtol=1e-5, atol=1e-6)


def test_what_peft_draws_is_a_function_of_the_seed() -> None:
    def drawn(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed + 100)  # of no influence
        case = cases.transformer_case("roberta")
        select_parameters(case.model, parameters(DORA, seed=seed))
        return [p for name, p in case.model.named_parameters() if "lora_A" in name]

    same, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(same, other, strict=True))


def test_include_adds_the_models_own_parameters() -> None:
    case = cases.transformer_case("roberta")
    select_parameters(case.model, parameters(IA3, include=["ia3_", "lm_head"]))
    varying = {name for name, p in case.model.named_parameters() if p.requires_grad}
    assert any("ia3_l" in name for name in varying)
    assert any("lm_head" in name for name in varying)


def test_a_file_its_folder_and_its_content_are_the_same(tmp_path: Path) -> None:
    """As PEFT saves it: where it was used is no part of what it is."""
    config = peft.IA3Config(
        target_modules=["key", "value"], feedforward_modules=[], base_model_name_or_path="a/b"
    )
    config.save_pretrained(tmp_path)
    of_folder = parameters(str(tmp_path))
    assert of_folder == parameters(str(tmp_path / "adapter_config.json"))
    assert "a/b" not in str(of_folder.identity)
    assert of_folder.identity != parameters(DORA).identity
    assert "adapter" not in ParametersConfig().identity  # kernels keep their names


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("no/such/folder", "could not read"),
        ("{peft_type", "no JSON"),
        ({"r": 8}, "no peft_type"),
        ({**IA3, "target_modules": ["qeury"]}, r"PEFT refuses it.*attention\.self\.query"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, "PEFT refuses it"),
        ({"peft_type": "UNHEARD_OF"}, "PEFT refuses it"),
        ({**IA3, "rnk": 3}, "PEFT refuses it"),
    ],
)
def test_a_wrong_configuration_is_an_input_error(adapter: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        select_parameters(cases.transformer_case("roberta").model, parameters(adapter))


def test_an_adapter_and_its_method_belong_together() -> None:
    with pytest.raises(InputError, match=r"parameters\.adapter: found None"):
        ParametersConfig(Method.peft)
    with pytest.raises(InputError, match=r"parameters\.adapter"):
        ParametersConfig(Method.lora, adapter="{}")
