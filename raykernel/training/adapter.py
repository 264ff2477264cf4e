"""A trained adapter as the folder that PEFT loads."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from raykernel.config import ModelConfig, ParametersConfig
from raykernel.problem.readout import Probed
from raykernel.store.commit import commit, make_folder

if TYPE_CHECKING:
    from peft import PeftConfig

_OWN = re.compile(r"\.(\w+)\.default(?=\.|$)")
"""An adapter's parameters: PEFT keeps them under the adapter's name."""


def write_adapter(
    folder: Path,
    module: nn.Module,
    values: dict[str, Tensor],
    *,
    model: ModelConfig,
    parameters: ParametersConfig,
) -> None:
    """Commit `adapter_model.safetensors` and, last, `adapter_config.json`.

    `peft.PeftModel.from_pretrained(base, folder)` then adds the adapter to the plain model, which
    is the encoder where there is no prompt. Whatever else was trained is not in it.

    Args:
        folder: where.
        module: with the adapters.
        values: of the trained parameters, by name.
        model: what the base is called.
        parameters: rank and scale.
    """
    # A linear head is put around the encoder, which is the model that PEFT will be given.
    prefix = "model." if isinstance(module, Probed) else ""
    config = _config(module, parameters, prefix)
    config.base_model_name_or_path, config.revision = model.name, model.revision
    config.inference_mode = True
    tensors = {
        "base_model.model." + _OWN.sub(r".\1", name.removeprefix(prefix)): _saved(value)
        for name, value in values.items()
        if _OWN.search(name)
    }
    make_folder(folder)
    commit(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        commit(folder / "adapter_config.json", (Path(scratch) / "adapter_config.json").read_bytes())


def _config(module: nn.Module, parameters: ParametersConfig, prefix: str) -> PeftConfig:
    """What PEFT needs to add the same to the plain model."""
    from peft import LoraConfig, PeftConfig  # takes a second

    if parameters.adapter is not None:
        make: Callable[..., PeftConfig] = PeftConfig.from_peft_type
        return make(**json.loads(parameters.adapter))
    places = [path for path, layer in module.named_modules() if hasattr(layer, "lora_A")]
    layers = [module.get_submodule(path).get_submodule("base_layer") for path in places]
    return LoraConfig(
        r=parameters.r,
        lora_alpha=parameters.lora_alpha,  # type: ignore[arg-type]  # only ever divided
        use_rslora=parameters.use_rslora,
        target_modules=[path.removeprefix(prefix) for path in places],
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers),
        lora_dropout=0.0,
        bias="none",
    )


def _saved(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
