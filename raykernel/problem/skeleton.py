"""A model without its weights, from its configuration: its linear layers, and their LoRAs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from raykernel.config import ModelConfig
from raykernel.errors import InputError, nearest
from raykernel.names import ends_in, last_parts
from raykernel.problem.architectures import HEADS, without_pooler
from raykernel.problem.checkpoints import locate, read_config
from raykernel.problem.hub import quiet
from raykernel.problem.parameters import layer_index
from raykernel.terms import Architecture


def blank_model(model: ModelConfig, *, has_prompt: bool) -> nn.Module:
    """A model without values: its modules and the shapes of their parameters.

    Args:
        model: which model.
        has_prompt: whether it is a language model, or the encoder alone.

    Returns:
        The model on the meta device, in its plain class.
    """
    config = read_config(model, locate(model))
    architecture = model.architecture if has_prompt else Architecture.encoder
    auto_class: Any = HEADS[architecture][0]
    with quiet(), torch.device("meta"):
        module: nn.Module = auto_class.from_config(
            config,
            trust_remote_code=model.trust_remote_code,
            attn_implementation="eager",
            **without_pooler(architecture, config),
        )
    return module


def layer_linears(model: ModelConfig, *, has_prompt: bool) -> dict[str, nn.Module]:
    """The linear layers inside transformer layers, which take a LoRA.

    Args:
        model: which model.
        has_prompt: whether it is a language model, or the encoder alone.

    Returns:
        Layers without values, by their paths in the plain model.
    """
    module = blank_model(model, has_prompt=has_prompt)
    return {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer_index(path) is not None
    }


def adapted_paths(
    linears: dict[str, nn.Module], modules: list[str], model: ModelConfig
) -> list[str]:
    """Those linear layers that modules name.

    Args:
        linears: of `layer_linears`.
        modules: whole paths or their ends, as in PEFT; empty: PEFT's default for the model.
        model: which model.

    Returns:
        Paths, in the model's order.

    Raises:
        InputError: if an entry names no linear layer of a transformer layer, or PEFT has no
            default.
    """
    wanted = modules or default_modules(model)
    for name in wanted:
        if not any(ends_in(path, name) for path in linears):
            raise InputError(
                f"select.modules: {name!r} names no linear layer inside a transformer layer; "
                f"{nearest(name, last_parts(linears))}"
            )
    if not wanted:
        raise InputError(
            f"select.modules: PEFT has no default for {model.name!r}, expected names of linear "
            f"layers, among {', '.join(sorted(last_parts(linears)))}. Set it."
        )
    return [path for path in linears if any(ends_in(path, name) for name in wanted)]


def default_modules(model: ModelConfig) -> list[str]:
    """The modules that PEFT adapts by default; none if it knows no such model."""
    # PEFT takes a second to import.
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    found = DEFAULTS.get(read_config(model, locate(model)).model_type, ())
    return [] if isinstance(found, str) else list(found)


def lora_parameters(layer: nn.Module, r: int) -> int:
    """Parameters of a LoRA of a linear layer: r (d_in + d_out)."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor), "a linear layer has a weight"
    return r * sum(weight.shape)
