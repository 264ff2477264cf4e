"""An adapter as the folder that PEFT loads: a trained one, or a choice of layers to train."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from raykernel.compute.tensorfile import write_tensors
from raykernel.config import ModelConfig, ParametersConfig
from raykernel.location import StorePath
from raykernel.names import ends_in
from raykernel.ntk.adapters import lora_scale
from raykernel.problem.adapter_config import FILE
from raykernel.problem.parameters import layer_index
from raykernel.problem.readout import Probed
from raykernel.problem.skeleton import blank_model
from raykernel.store.commit import make_folder
from raykernel.store.sealed import commit_beside

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

_OWN = re.compile(r"\.(\w+)\.default(?=\.|$)")
"""An adapter's parameters: PEFT keeps them under the adapter's name."""


def write_adapter(
    folder: StorePath,
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
        parameters: which adapter.
    """
    # A linear head is put around the encoder, which is the model that PEFT will be given.
    prefix = "model." if isinstance(module, Probed) else ""
    tensors = {
        "base_model.model." + _OWN.sub(r".\1", name.removeprefix(prefix)): value
        for name, value in values.items()
        if _OWN.search(name)
    }
    make_folder(folder)
    write_tensors(folder / "adapter_model.safetensors", tensors, {})
    _commit_config(folder, _config(module, parameters, prefix), model=model, is_trained=True)


def write_adapter_config(
    folder: StorePath,
    targets: Mapping[str, nn.Module],
    *,
    model: ModelConfig,
    parameters: ParametersConfig,
    has_prompt: bool,
    ranks: Mapping[str, int] | None = None,
) -> None:
    """Commit `adapter_config.json`, from which PEFT makes the LoRA of chosen layers.

    Where names of modules and indices of layers say the same as whole paths, it has these
    (`target_modules`, `layers_to_transform`), as a person would write it.

    Args:
        folder: where; made if it is not there.
        targets: the linear layers by their whole paths in the plain model.
        model: what the base is called.
        parameters: rank and scale.
        has_prompt: whether the plain model is a language model, or the encoder alone.
        ranks: rank by path where it may be another one than `parameters.r`; with the same scale.
    """
    from peft.tuners.tuners_utils import check_target_module_exists  # takes a second

    make_folder(folder)
    config, short = _lora(targets, parameters), _lora(targets, parameters)
    every = [path for path, _ in blank_model(model, has_prompt=has_prompt).named_modules()]
    short.target_modules, short.layers_to_transform = _names_and_layers(targets, every)
    if {path for path in every if check_target_module_exists(short, path)} == set(targets):
        config = short
    per_alpha = partial(lora_scale, 1, rslora=parameters.use_rslora)
    others = {path: r for path, r in (ranks or {}).items() if r != parameters.r}
    config.rank_pattern = others
    config.alpha_pattern = {
        path: parameters.lora_alpha * per_alpha(parameters.r) / per_alpha(r)
        for path, r in others.items()
    }
    _commit_config(folder, config, model=model, is_trained=False)


def _names_and_layers(
    paths: Collection[str], every: Collection[str]
) -> tuple[list[str], list[int]]:
    """The ends of some paths that no other module of their layers has, and the layers."""
    layers = {layer_index(path) for path in paths}
    others = [path for path in every if layer_index(path) in layers and path not in paths]
    names = set()
    for path in paths:
        parts = path.split(f".{layer_index(path)}.", 1)[-1].split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        own = (end for end in ends if not any(ends_in(other, end) for other in others))
        names.add(next(own, ends[-1]))
    return sorted(names), sorted(layer for layer in layers if layer is not None)


def _config(module: nn.Module, parameters: ParametersConfig, prefix: str) -> PeftConfig:
    """What PEFT needs to add the same to the plain model."""
    if parameters.adapter is not None:
        from peft import PeftConfig  # takes a second

        make: Callable[..., PeftConfig] = PeftConfig.from_peft_type
        return make(**json.loads(parameters.adapter))
    return _lora(
        {
            path.removeprefix(prefix): layer.get_submodule("base_layer")
            for path, layer in module.named_modules()
            if hasattr(layer, "lora_A")
        },
        parameters,
    )


def _lora(targets: Mapping[str, nn.Module], parameters: ParametersConfig) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=parameters.r,
        lora_alpha=parameters.lora_alpha,  # type: ignore[arg-type]  # only ever divided
        use_rslora=parameters.use_rslora,
        target_modules=list(targets),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in targets.values()),
        lora_dropout=0.0,
        bias="none",
    )


def _commit_config(
    folder: StorePath, config: PeftConfig, *, model: ModelConfig, is_trained: bool
) -> None:
    config.base_model_name_or_path, config.revision = model.name, model.revision
    config.inference_mode = is_trained  # a trained one is loaded for inference
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        commit_beside(folder / FILE, (Path(scratch) / FILE).read_bytes())
