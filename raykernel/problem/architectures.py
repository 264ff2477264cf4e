"""Which architecture can be read how; from its configuration alone, before any weight is loaded."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
)
from transformers.configuration_utils import PretrainedConfig

from raykernel.config import ModelConfig
from raykernel.errors import InputError
from raykernel.problem.checkpoints import locate, read_config
from raykernel.terms import Architecture, Pooling

HEADS = {
    Architecture.masked_lm: (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING),
    Architecture.causal_lm: (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    Architecture.encoder: (AutoModel, MODEL_MAPPING),
}
"""Class that loads it, and what that knows."""


def check_model(model: ModelConfig, *, has_prompt: bool) -> None:
    """Refuse a model that cannot work, before any weight is loaded.

    Args:
        model: which model.
        has_prompt: whether logits are read from label words.
    """
    check_architecture(model, read_config(model, locate(model)), has_prompt=has_prompt)


def check_architecture(model: ModelConfig, config: PretrainedConfig, *, has_prompt: bool) -> None:
    """Refuse an architecture without the head that is to be read, or in a form without gradients.

    Args:
        model: which model.
        config: its configuration.
        has_prompt: whether logits are read from label words.

    Raises:
        InputError: if it is such a one.
    """
    if has_prompt and model.architecture is Architecture.encoder:
        raise InputError(
            f"model.architecture: {model.name!r} is an encoder without a head over words, "
            "expected a masked or causal LM for a prompt. Use prompt=none (a linear head), or a "
            "model with model.architecture=masked_lm or causal_lm."
        )
    if config.is_encoder_decoder:
        raise InputError(
            f"model.name: {model.name!r} ({config.model_type}) is an encoder-decoder, expected an "
            "encoder or a decoder. Choose another model."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"model.name: the weights of {model.name!r} are quantised, expected floating-point "
            "weights, which have gradients. Choose the original checkpoint or a GGUF file."
        )
    if has_prompt:
        _check_head(model, config)
    elif model.pooling is Pooling.cls and _is_causal(config):
        raise InputError(
            f"model.pooling: cls reads the first token of {model.name!r} ({config.model_type}), "
            "which sees nothing of the text in a causal LM; expected mean. "
            "Set model.pooling=mean."
        )


def without_pooler(architecture: Architecture, config: PretrainedConfig) -> dict[str, bool]:
    """Options of an encoder that has a layer which is not used.

    Args:
        architecture: as what the model is made.
        config: its configuration.

    Returns:
        Keyword arguments of its class.
    """
    mapping = HEADS[architecture][1]
    if architecture is not Architecture.encoder or type(config) not in mapping:
        return {}
    encoder: Any = mapping[type(config)]
    has_option = "add_pooling_layer" in inspect.signature(encoder).parameters
    return {"add_pooling_layer": False} if has_option else {}


def _check_head(model: ModelConfig, config: PretrainedConfig) -> None:
    auto_class, mapping = HEADS[model.architecture]
    auto_map = getattr(config, "auto_map", None) or {}
    has_head = type(config) in mapping or auto_class.__name__ in auto_map
    other = (
        Architecture.causal_lm
        if model.architecture is Architecture.masked_lm
        else Architecture.masked_lm
    )
    # BERT and its kin also load as causal LMs, but were trained to see both sides.
    is_bidirectional = model.architecture is Architecture.causal_lm and not _is_causal(config)
    if has_head and not is_bidirectional:
        return
    fits = type(config) in HEADS[other][1]
    hint = f"Set model.architecture={other.value}." if fits else "Use prompt=none (a linear head)."
    raise InputError(
        f"model.architecture: found model type {config.model_type!r} in {model.name!r}, expected "
        f"one that is a {model.architecture.value}. {hint}"
    )


def _is_causal(config: PretrainedConfig) -> bool:
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return is_causal and (type(config) not in MODEL_FOR_MASKED_LM_MAPPING or config.is_decoder)
