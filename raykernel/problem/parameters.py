"""Which parameters vary: by name, by layer, by module, or those of a LoRA adapter.

`layers_to_transform` and `target_modules` mean what they mean in PEFT: indices of transformer
layers, and module names or their last parts.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from raykernel.config import ParametersConfig
from raykernel.errors import InputError, nearest
from raykernel.names import compiled, ends_in, last_parts
from raykernel.problem.hub import first_line
from raykernel.problem.readout import LabelRows
from raykernel.terms import Method

# Names of the lists of layers: PEFT's common ones, and ALBERT's, whose layers share one entry.
_LAYER_LISTS = {"layer", "layers", "h", "block", "blocks", "albert_layer_groups"}
_ALL_LINEAR = "all-linear"


def select_parameters(module: nn.Module, parameters: ParametersConfig) -> None:
    """Set `requires_grad` on exactly the parameters that vary; with LoRA add them first.

    A tied parameter is selected or left out under any of its names. With LoRA, `include` names
    further parameters (`[lora_, lm_head]` adds the head), the adapter's alone being the default,
    and layers and modules say where the adapters go.

    Args:
        module: the model, changed in place.
        parameters: the selection.

    Raises:
        InputError: if a name, a layer or an expression fits nothing, or nothing is left.
    """
    include = parameters.include
    if parameters.method is Method.lora:
        add_lora(module, parameters)
        include = include or ["lora_"]
        within = None
    elif parameters.method is Method.peft:
        added = add_adapter(module, parameters)
        within = None if include else added
    else:
        within = _within(module, parameters)
    chosen, known = [], []
    names_by_parameter: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names_by_parameter.setdefault(parameter, []).append(name)
    for parameter, names in names_by_parameter.items():
        varies = (
            (within is None or any(name in within for name in names))
            and (not include or _any_match("parameters.include", include, names))
            and not _any_match("parameters.exclude", parameters.exclude, names)
        )
        parameter.requires_grad_(varies)
        known += names
        chosen += names if varies else []
    if not chosen:
        raise InputError(
            "parameters: the selection leaves no parameter, expected at least one. The model's "
            f"parameters are named like {_examples(known)}. Change parameters.include, exclude, "
            "layers_to_transform or target_modules."
        )


def add_lora(module: nn.Module, parameters: ParametersConfig) -> None:
    """Add LoRA adapters h ↦ W h + s·B A h with random A and B = 0, so that f(θ_0) is unchanged.

    s = lora_alpha / r, or lora_alpha / √r with `use_rslora`. No dropout, nothing merged. A is
    drawn in float32 on the CPU from a seed of its own and the layer's path: it depends on neither
    device nor precision nor on which other layers are adapted, so that kernels of adapters add.
    Reference: Hu et al. 2021 (arXiv:2106.09685).

    Args:
        module: the model, changed in place.
        parameters: rank, scale, seed and places.

    Raises:
        InputError: if no layer fits, or one that has no adapter.
    """
    # PEFT takes a second to import, and only LoRA needs it.
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    targets: Iterable[str] = parameters.target_modules
    if not targets:
        model_type = getattr(getattr(module, "config", None), "model_type", "")
        targets = DEFAULTS.get(model_type, ())
        if isinstance(targets, str) or not targets:
            raise InputError(
                f"parameters.target_modules: PEFT has no default for model type {model_type!r}, "
                f"expected names of linear layers: {_examples(linear_layers(module))}. Set them."
            )
    modules = dict(module.named_modules())
    layers = _layers(module, parameters.layers_to_transform)
    places = [
        path
        for path in _target_paths(module, list(targets), offered=linear_layers(module))
        if layers is None or layer_index(path) in layers
    ]
    wrong = [p for p in places if not isinstance(modules[p], nn.Linear | Conv1D | nn.Embedding)]
    wrong += [p for p in places if isinstance(modules[p], LabelRows)]
    if wrong or not places:
        found = f"{wrong[0]!r}, which takes no adapter" if wrong else "no such layer"
        raise InputError(
            f"parameters.target_modules: found {found}; expected linear layers other than the "
            f"output head: {_examples(linear_layers(module))}. Change target_modules."
        )
    config = LoraConfig(
        r=parameters.r,
        lora_alpha=parameters.lora_alpha,  # type: ignore[arg-type]  # only ever divided
        use_rslora=parameters.use_rslora,
        target_modules=places,
        fan_in_fan_out=any(isinstance(modules[path], Conv1D) for path in places),
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, module)
        # What PEFT draws while it injects depends on the order of the layers.
        for path in places:
            torch.manual_seed(_seed_of(path, parameters.seed))
            _draw(module.get_submodule(path))


def add_adapter(module: nn.Module, parameters: ParametersConfig) -> set[str]:
    """Add what a configuration of PEFT says, random where PEFT draws, from the given seed.

    Args:
        module: the model, changed in place.
        parameters: with the content of the configuration, and the seed.

    Returns:
        Names of the parameters that were added.

    Raises:
        InputError: if the configuration is wrong, or PEFT adds nothing of its kind to a module.
    """
    from peft import PeftConfig, inject_adapter_in_model

    assert parameters.adapter is not None, "checked by the configuration"
    before = {id(parameter) for parameter in module.parameters()}
    try:
        make: Callable[..., Any] = PeftConfig.from_peft_type
        # On the CPU and in PEFT's order: a function of configuration, model and seed.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            # A setting that PEFT does not know, a misspelt one for example, is no reason to it.
            warnings.filterwarnings("error", "Unexpected keyword arguments", UserWarning)
            # It knows a Conv1D when it sees one, and says so.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
            config = make(**json.loads(parameters.adapter))
            torch.manual_seed(parameters.seed)
            inject_adapter_in_model(config, module)
    except Exception as error:  # PEFT raises many types on settings that it does not expect
        raise InputError(
            f"parameters.adapter: PEFT refuses it ({first_line(error)}); expected the "
            "configuration of an adapter inside the model's layers, which are named like "
            f"{_examples(linear_layers(module))}. Change it."
        ) from error
    return {name for name, p in module.named_parameters() if id(p) not in before}


def layer_index(name: str) -> int | None:
    """Index of the transformer layer that a parameter or module lies in.

    Args:
        name: dotted path, such as `model.layers.3.mlp.up_proj.weight`.

    Returns:
        3 there; None outside the layers.
    """
    for container, index in pairwise(name.split(".")):
        if container in _LAYER_LISTS and index.isdecimal():
            return int(index)
    return None


def parameter_layers(module: nn.Module) -> dict[str, int | None]:
    """Transformer layer of every parameter, None outside the layers."""
    return {name: layer_index(name) for name, _ in module.named_parameters()}


def linear_layers(module: nn.Module) -> list[str]:
    """Paths of the linear layers other than the output head: what PEFT calls all-linear."""
    return [
        path
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
        and not isinstance(layer, LabelRows)
        and path != "classifier"
    ]


@torch.no_grad()
def _draw(layer: nn.Module) -> None:
    """Draw the random matrix of an adapter anew, from PEFT's distributions."""
    # Of an embedding it is B that is random, and A that is 0.
    for a in layer.get_submodule("lora_A").parameters():
        a.copy_(nn.init.kaiming_uniform_(torch.empty(a.shape), a=math.sqrt(5)))
    for b in layer.get_submodule("lora_embedding_B").parameters():
        b.copy_(torch.randn(b.shape))


def _seed_of(path: str, seed: int) -> int:
    """A seed of a layer's own."""
    # 32 bits are all that PyTorch's generator on the CPU takes.
    text = f"{seed}/{path}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


def _within(module: nn.Module, parameters: ParametersConfig) -> set[str] | None:
    """Parameter names inside the chosen layers and modules; None where neither is chosen."""
    layers = _layers(module, parameters.layers_to_transform)
    targets = parameters.target_modules
    if layers is None and not targets:
        return None
    places = [f"{path}." for path in _target_paths(module, targets)] if targets else [""]
    return {
        name
        for name, _ in module.named_parameters(remove_duplicate=False)
        if (layers is None or layer_index(name) in layers)
        and any(name.startswith(place) for place in places)
    }


def _layers(module: nn.Module, wanted: list[int] | None) -> set[int] | None:
    """Layer indices, negative ones counted from the last."""
    if wanted is None:
        return None
    indices = [index for index in parameter_layers(module).values() if index is not None]
    count = max(indices, default=-1) + 1
    for index in wanted:
        if not -count <= index < count:
            expected = f"{-count} to {count - 1}" if count else "null: no layers were recognised"
            raise InputError(
                f"parameters.layers_to_transform: found {index}, expected {expected}. Change it."
            )
    return {index % count for index in wanted}


def _target_paths(
    module: nn.Module, targets: list[str], *, offered: list[str] | None = None
) -> list[str]:
    """Paths that a target names, whole or by last parts; a wrong one is offered some or all."""
    if targets == [_ALL_LINEAR]:
        return linear_layers(module)
    paths = [path for path, _ in module.named_modules() if path]
    chosen = []
    for target in targets:
        found = [path for path in paths if ends_in(path, target)]
        if not found:
            ends = last_parts(paths if offered is None else offered)
            choices = {end for end in ends if not end.isdecimal()} | {_ALL_LINEAR}
            raise InputError(
                f"parameters.target_modules: found {target!r}, expected a module of the model: "
                f"{nearest(target, choices)}"
            )
        chosen += found
    return chosen


def _any_match(key: str, expressions: list[str], names: list[str]) -> bool:
    patterns = [compiled(key, expression) for expression in expressions]
    return any(pattern.search(name) for pattern in patterns for name in names)


def _examples(names: list[str]) -> str:
    """A few names that differ in their last parts."""
    by_ending = {".".join(name.split(".")[-2:]): name for name in reversed(names)}
    return ", ".join(repr(name) for name in list(by_ending.values())[::-1][:6])
