"""A configuration of PEFT that a user brings: read once, and kept as its content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from raykernel.config import ParametersConfig, canonical_json
from raykernel.errors import InputError
from raykernel.jsontext import json_object
from raykernel.location import is_remote, location

FILE = "adapter_config.json"

_NOT_OF_THE_METHOD = ("base_model_name_or_path", "revision", "inference_mode", "task_type")
"""Settings that say where an adapter was used, not what it is."""

_REACHING = (
    "adapters", "corda_config", "lora_ga_config", "megatron_config", "shadow_model",
    "prompt_tuning_init_state_dict_path", "tokenizer_name_or_path", "tokenizer_kwargs",
)  # fmt: skip
"""Settings by which PEFT imports modules, or reads and writes files, that the configuration names:
pickles among them."""


def with_adapter(parameters: ParametersConfig) -> ParametersConfig:
    """The same with the content of an adapter's configuration in place of its file.

    Args:
        parameters: of any method.

    Returns:
        Those; unchanged without an adapter.

    Raises:
        InputError: if there is no such file, or it is no configuration of PEFT.
    """
    if parameters.adapter is None:
        return parameters
    return replace(parameters, adapter=canonical_json(_content(parameters.adapter)))


def _content(adapter: str) -> dict[str, Any]:
    text: str | bytes = adapter
    if not adapter.lstrip().startswith("{"):
        path = location(adapter) if is_remote(adapter) else Path(adapter)
        path = path / FILE if path.is_dir() else path
        try:
            text = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"parameters.adapter: could not read {path} ({error.strerror}), expected an "
                f"{FILE} or a folder that has one. Change it."
            ) from error
    try:
        found = json_object(text)
    except ValueError as error:
        raise InputError(
            f"parameters.adapter: {adapter} is no JSON ({error}), expected an {FILE} as PEFT "
            "saves it. Save it again."
        ) from error
    if not isinstance(found.get("peft_type"), str):
        raise InputError(
            f"parameters.adapter: {adapter} has no peft_type, expected an {FILE} as PEFT saves "
            "it, such as {peft_type: IA3, target_modules: [...]}. Add it."
        )
    if reaching := [name for name in _REACHING if found.get(name)]:
        raise InputError(
            f"parameters.adapter: {adapter} sets {', '.join(reaching)}, with which PEFT loads code "
            "or files that it names, expected an adapter that is made of its settings alone. Take "
            "it out."
        )
    return {k: v for k, v in found.items() if k not in _NOT_OF_THE_METHOD and v is not None}
